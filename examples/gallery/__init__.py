"""The gallery: what every feature does, painted by the built-in models and judged by the pixels (docs/gallery.md)."""
