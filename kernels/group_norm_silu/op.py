"""The op `group_norm_silu`."""

from ..op import define
from .cases import CASES
from .reference import group_norm_silu as reference

group_norm_silu = define(rows=("x", "pre_bias", "scale", "shift", "x2"), cases=CASES)(reference)
