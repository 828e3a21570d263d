"""The op `geglu`."""

from ..op import define
from .cases import CASES
from .reference import geglu as reference

geglu = define(rows=("x",), cases=CASES)(reference)
