"""t_update(rows) by model and size, and whether both guidance branches belong into one evaluation or two.

Up to the knee a row more costs little; beyond it rows only wait for each other. One evaluation of 2 B model rows is
timed against two of B, captured and interleaved with a second instance of the first (A/A).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch

from ...engine.components import Components
from ...engine.request import Request
from ...engine.runner import Runner
from ...kernels.timing import time_call, time_calls
from .. import harness
from ..architectures import architecture
from ..kernel_measurement import claim, spread
from ..latency import knee
from ..random_networks import prepared, unet_inputs
from .batches import STEPS, Updates, configured, filled, model
from .session import Session, relative_error

CASES = {"sd15 512^2": ("sd15", 512), "sdxl 1024^2": ("sdxl", 1024), "sd15 256^2": ("sd15", 256),
         "sdxl 512^2": ("sdxl", 512)}  # fmt: skip
TINY_CASES = {"tiny 16^2": ("tiny", 16)}
ROWS = (1, 2, 4, 8, 16)
BATCHED, AGAIN, SPLIT = "one of 2B", "one of 2B again", "two of B"


def run(session: Session) -> None:
    rows = ROWS[:2] if session.tiny else ROWS
    for case, (arch, pixels) in (TINY_CASES if session.tiny else CASES).items():
        ready = cache(lambda a=arch, most=rows[-1]: model(session, a, max_rows=most))
        for count in rows:
            key = f"{case} rows={count}"
            if not session.measure(key, lambda n=count, a=arch, p=pixels, r=ready: _measure(session, r(), a, p, n)):
                return
        session.measure(f"{case} knee", lambda c=case: _knee(session, c))


def _measure(session: Session, parts: Components, arch: str, pixels: int, rows: int) -> dict[str, Any]:
    parts = configured(parts, runner="graph")
    runner = Runner(parts)
    request = Request(prompt="a red circle", n=rows, steps=STEPS, seed=1, width=pixels, height=pixels)
    updates = Updates(runner, filled(parts, runner, [request]))
    timing = time_call(updates, session.device, rounds=3 if session.tiny else 20, graph=False, budget_s=4.0)
    config = {**architecture(arch).unet, "sample_size": pixels // parts.scale}
    return {
        "ms": 1e3 * timing.median_s,
        "ms_per_row": 1e3 * timing.median_s / rows,
        "rows": rows,
        "guidance": _guidance(session, parts, config, rows),
        **timing.record(),
    }


@torch.inference_mode()
def _guidance(session: Session, parts: Components, config: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """Seconds of one evaluation of 2 `rows` model rows and of two of `rows`, and how far the results are apart."""
    torch.manual_seed(1)
    inputs = unet_inputs(config, 2 * rows, session.device)
    inputs = {name: tensor.to(session.dtype) for name, tensor in inputs.items()}
    halves = [{name: tensor[branch::2].contiguous() for name, tensor in inputs.items()} for branch in (0, 1)]
    whole, first, second = (_evaluation(parts, one) for one in (inputs, *halves))
    both = lambda: (first(), second())  # noqa: E731
    error = max(relative_error(own, whole()[branch::2]) for branch, own in enumerate(both()))
    calls: dict[str, list[Callable[[], object]]] = {BATCHED: [whole], AGAIN: [whole], SPLIT: [both]}
    timings = time_calls(calls, session.device, rounds=3 if session.tiny else 15, launches=1, budget_s=4.0)
    apart = spread(timings[BATCHED], timings[AGAIN])
    return {
        "batched_over_split": claim(timings[SPLIT].median_s, timings[BATCHED].median_s, apart),
        "a_a_spread": apart,
        "difference": error,
        "variants": {name: timing.record() for name, timing in timings.items()},
    }


def _evaluation(parts: Components, inputs: Mapping[str, torch.Tensor]) -> Callable[[], torch.Tensor]:
    net = parts.unet
    arguments = prepared(net, inputs)

    def evaluate() -> torch.Tensor:
        parts.binders["unet"].bind(tuple(arguments[0].shape), lambda: net(*arguments))
        return net(*arguments)

    return evaluate


def _knee(session: Session, case: str) -> dict[str, Any]:
    """The fewest rows that give 90 % of the most rows per second, from what this part has recorded."""
    mine = [r for r in harness.read(session.records) if r["part"] == session.part and "error" not in r]
    rates = {r["rows"]: r["rows"] / (1e-3 * r["ms"]) for r in mine if r["key"].startswith(f"{case} rows=")}
    return {"knee": knee(rates), "row_updates_per_s": rates}
