"""Launch configuration of `add_layer_norm`: tiles of whole rows."""

from ..row_tiles import MAX_COLUMNS, Config, heuristic, search_space

__all__ = ["MAX_COLUMNS", "Config", "heuristic", "search_space"]
