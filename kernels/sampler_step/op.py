"""The op `sampler_step`."""

from ..op import define
from .cases import CASES
from .reference import sampler_step as reference

_ROWS = ("x", "base", "history", "model_output", "table", "update", "weights", "seeds", "extra_noise")

sampler_step = define(rows=_ROWS, cases=CASES)(reference)
