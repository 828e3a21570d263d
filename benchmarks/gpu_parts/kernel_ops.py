"""The kernel benchmark (benchmarks/kernels.py) as a part: every op at the models' shapes, costliest first."""

from __future__ import annotations

from itertools import groupby

from ..ceilings import sustained_product
from ..kernel_measurement import Settings, measure
from ..kernel_shapes import MODELS, TINY, Shape, shapes
from .session import Session


def run(session: Session) -> None:
    size, seconds = (256, 0.1) if session.tiny else (8192, 5.0)
    product = sustained_product(session.device, session.dtype, size, seconds)
    session.write("product", product={"size": size, **product})
    settings = Settings(
        device=session.device,
        dtype=session.dtype,
        compiled=session.cuda,
        rounds=3 if session.tiny else 12,
        budget_s=0.05 if session.tiny else 1.0,
        product_tflops=product["tflops"],
    )
    for shape in _order(TINY if session.tiny else MODELS):
        if not session.measure(shape.key, lambda s=shape: measure(s, settings)):
            return


def _order(models: tuple[str, ...]) -> list[Shape]:
    """The costliest shape of every op and model, then the second of each, and so on."""
    ranked: list[tuple[int, Shape]] = []
    for model in models:
        for _, same in groupby(shapes(model), key=lambda shape: shape.op):
            ranked += enumerate(same)
    return [shape for _, shape in sorted(ranked, key=lambda pair: pair[0])]
