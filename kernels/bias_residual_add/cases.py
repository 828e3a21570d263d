"""Contract cases of `bias_residual_add`."""

from ..op import Case

CASES = (
    Case("sd15, 320 channels", {"x": (2, 320, 8, 8), "bias": (320,), "residual": (2, 320, 8, 8)}),
    Case("two runs, the second short", {"x": (2, 64, 9, 11), "bias": (64,), "residual": (2, 64, 9, 11)}),
    Case("no bias", {"x": (3, 24, 8, 16), "bias": None, "residual": (3, 24, 8, 16)}),
    Case("tokens", {"x": (2, 64, 70), "bias": (64,), "residual": (2, 64, 70)}),
    Case("odd channels, one site", {"x": (2, 17, 1, 1), "bias": (17,), "residual": (2, 17, 1, 1)}),
)
