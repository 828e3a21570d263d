"""One sampler update for every running row: guidance sum, denoised estimate, linear update, history and noise."""

from .columns import HISTORY, Column

__all__ = ["HISTORY", "Column"]
