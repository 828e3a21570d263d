"""A kernel that does nearly nothing, for the cost of launching it: one read and one write of 4 bytes per element."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def add_one(x_ptr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr):
    if DEPENDENT:
        gdc_wait()  # the predecessor's writes are visible from here on
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x_ptr + offsets) + 1.0
    tl.store(x_ptr + offsets, value)
    if DEPENDENT:
        gdc_launch_dependents()
