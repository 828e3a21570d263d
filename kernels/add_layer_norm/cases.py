"""Contract cases of `add_layer_norm`."""

from ..op import Case


def _norm(shape: tuple[int, ...], affine: bool = True, eps: float = 1e-5) -> dict[str, object]:
    width = (shape[-1],) if affine else None
    return {"x": shape, "residual": shape, "weight": width, "bias": width, "eps": eps}


CASES = (
    Case("sd15, 320 channels", _norm((2, 64, 320))),
    Case("sdxl, 1280 channels", _norm((2, 16, 1280))),
    Case("no affine part", _norm((2, 9, 72), affine=False, eps=1e-6)),
    Case("odd width", _norm((3, 5, 17))),
)
