"""Group normalisation with optional bias, scale-shift and SiLU."""
