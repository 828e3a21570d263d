"""Contract cases of `guidance_stats`: branches, several blocks, odd sizes."""

from ..op import Case

CASES = (
    Case("sd15 guided", {"model_output": (2, 2, 4, 16, 16)}),
    Case("three branches, several splits", {"model_output": (2, 3, 4, 72, 64)}),
    Case("no guidance, odd sizes", {"model_output": (3, 1, 3, 5, 7)}),
    Case("sixteen channels", {"model_output": (1, 4, 16, 6, 5)}),
    Case("one element", {"model_output": (2, 2, 1, 1, 1)}),
)
