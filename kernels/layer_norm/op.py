"""The op `layer_norm`."""

from ..op import define
from .cases import CASES
from .reference import layer_norm as reference

layer_norm = define(rows=("x",), cases=CASES)(reference)
