"""Contract cases of `layer_norm`."""

from ..op import Case

CASES = (
    Case("sd15, 320 channels", {"x": (2, 64, 320), "weight": (320,), "bias": (320,), "eps": 1e-5}),
    Case("sdxl, 1280 channels", {"x": (2, 16, 1280), "weight": (1280,), "bias": (1280,), "eps": 1e-5}),
    Case("no affine part", {"x": (2, 9, 72), "weight": None, "bias": None, "eps": 1e-6}),
    Case("no bias, odd width", {"x": (3, 5, 17), "weight": (17,), "bias": None, "eps": 1e-5}),
)
