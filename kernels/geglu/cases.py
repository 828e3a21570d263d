"""Contract cases of `geglu`."""

from ..op import Case

CASES = (
    Case("sd15, 1280 of 2560", {"x": (2, 64, 2560)}),
    Case("sdxl, 5120 of 10240", {"x": (2, 8, 10240)}),
    Case("odd half", {"x": (3, 5, 34)}),
    Case("one channel", {"x": (2, 3, 2)}),
)
