"""The gated GELU of transformer feed-forward blocks."""
