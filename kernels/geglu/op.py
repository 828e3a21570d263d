"""The op `geglu` and its implementations."""

from ..device import has_triton
from ..op import define
from .cases import CASES
from .reference import geglu as reference

geglu = define(rows=("x",), cases=CASES)(reference)

if has_triton():
    from ..launch import needs_cuda
    from .kernel import geglu as triton_geglu

    geglu.implement("triton", needs_cuda)(triton_geglu)
