"""The op `guidance_stats` and its implementations."""

from ..device import has_triton
from ..op import define
from .cases import CASES
from .reference import guidance_stats as reference

guidance_stats = define(rows=("model_output",), cases=CASES)(reference)

if has_triton():
    from ..launch import needs_cuda
    from .kernel import guidance_stats as triton_guidance_stats

    guidance_stats.implement("triton", needs_cuda)(triton_guidance_stats)
