"""The op `attention`."""

from ..op import define
from .cases import CASES
from .reference import attention as reference

attention = define(rows=("q", "k", "v", "kv_len", "bias"), cases=CASES)(reference)
