"""One guided U-Net evaluation of SDXL and SD 1.5 by our own graph, on the inputs of the diffusers baselines.

What every update shares (prompt keys and values, timestep embeddings) is prepared outside the timed call, as the engine
does. Weights are random; the truth is the same graph in float32.
"""

from __future__ import annotations

from typing import Any

import torch

from ...kernels.timing import time_call
from ..random_networks import deploy, prepared, unet, unet_inputs
from .session import Session, relative_error
from .unets import CASES, TINY_CASES, priority, profile

VARIANTS = ("graph", "graph+cudnn", "eager", "compile+graph+cudnn")


def run(session: Session) -> None:
    for case, (config, rows) in (TINY_CASES if session.tiny else CASES).items():
        keys = [f"{case} {variant}" for variant in VARIANTS]
        if all(key in session.finished for key in keys) or session.seconds_left() <= 0:
            continue
        net, inputs = unet(config, session.device), unet_inputs(config, rows, session.device)
        with priority("cudnn" if session.cuda else ""):
            truth = net(*prepared(net, inputs))
        deploy(net, session.dtype)
        arguments = prepared(net, inputs)
        for key, variant in zip(keys, VARIANTS, strict=True):
            call = lambda n=net, a=arguments, t=truth, v=variant: _measure(session, n, a, t, v)  # noqa: E731
            if not session.measure(key, call):
                return


def _measure(
    session: Session, net: Any, arguments: tuple[Any, ...], truth: torch.Tensor, variant: str
) -> dict[str, Any]:
    model = net
    if "compile" in variant:
        torch._dynamo.reset()
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        model = torch.compile(net, fullgraph=True, dynamic=False, backend="eager" if session.tiny else "inductor")

    def evaluate() -> torch.Tensor:
        return model(*arguments)

    with priority(variant if session.cuda else ""):
        out = evaluate()
        if not bool(out.isfinite().all()):
            raise ValueError("the evaluation is not finite")
        facts: dict[str, Any] = {"std": float(out.float().std()), "error_vs_float32": relative_error(out, truth)}
        timing = time_call(evaluate, session.device, rounds=20, graph="graph" in variant, launches=1, budget_s=10.0)
        facts |= {"ms": 1e3 * timing.median_s, **timing.record()}
        if session.cuda:
            facts["profile"] = profile(evaluate)
            facts["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 2**30
    return facts
