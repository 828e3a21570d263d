"""One op switched at a time inside a whole evaluation: what a kernel is worth where it runs, not alone.

A kernel becomes a default where the captured evaluation that contains it is faster with it. All variants are captured
as CUDA graphs in one process and replayed interleaved with a second instance of the reference (A/A). The error of the
whole evaluation against float32 is the gate: above twice that of the reference, no ratio is given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ...kernels.dispatch import Dispatch, Selected, Site, record, resolve
from ...kernels.op import Call
from ...kernels.timing import time_call, time_calls
from ..kernel_measurement import VARIANT_ERRORS, claim, spread
from .session import Session, relative_error
from .unets import profile

REFERENCE, CONTROL, ENGINE = "reference", "reference again", "auto"


def ablate(
    session: Session, module: nn.Module, run: Callable[[], torch.Tensor], truth: torch.Tensor, budget_s: float = 20.0
) -> dict[str, Any]:
    """ms, error, and ratio to all-reference of every variant; the variants that could not run, and why.

    module: holds the op sites; run: one evaluation of it; truth: its float32 result.
    """
    calls = record(module, run)
    variants, switched, refused = {}, {}, {}
    for name, dispatch in dispatches(module, calls, session.device.type).items():
        call = _bound(module, dispatch, run)
        try:
            out = call()
            if not bool(out.isfinite().all()):
                raise ValueError("the evaluation is not finite")
            time_call(call, session.device, rounds=1, launches=1)
        except VARIANT_ERRORS as error:
            refused[name] = f"{type(error).__name__}: {error}"[:300]
            continue
        variants[name] = (call, relative_error(out, truth))
        switched[name] = sum(site.implementation != REFERENCE for site in dispatch.sites.values())
    if REFERENCE not in variants:
        raise RuntimeError(f"the evaluation by references alone does not run: {refused[REFERENCE]}")
    plain, plain_error = variants[REFERENCE]
    timed = {CONTROL: [plain], **{name: [call] for name, (call, _) in variants.items()}}
    timings = time_calls(timed, session.device, rounds=20, launches=1, budget_s=budget_s)
    apart = spread(timings[REFERENCE], timings[CONTROL])
    facts: dict[str, Any] = {"sites": len(calls), "a_a_spread": apart, "refused": refused, "variants": {}}
    for name, (call, error) in variants.items():
        timing, green = timings[name], error <= 2 * plain_error
        facts["variants"][name] = {
            "ms": 1e3 * timing.median_s,
            "switched_sites": switched[name],
            "error_vs_float32": error,
            "gate": green,
            "speedup": claim(timings[REFERENCE].median_s, timing.median_s, apart) if green else None,
            **timing.record(),
        }
        if session.cuda and name in (REFERENCE, ENGINE):
            facts["variants"][name]["profile"] = profile(call)
    return facts


def dispatches(module: nn.Module, calls: Mapping[str, Call], device: str) -> dict[str, Dispatch]:
    """All references; each op alone on each of its implementations that fits somewhere; what an engine would bind."""
    sites = {path: site for path, site in module.named_modules() if isinstance(site, Site)}
    made = {REFERENCE: _switch(sites, calls, "", REFERENCE)}
    for op in {site.op.name: site.op for site in sites.values()}.values():
        for implementation in op.implementations:
            dispatch = _switch(sites, calls, op.name, implementation)
            if any(site.implementation != REFERENCE for site in dispatch.sites.values()):
                made[f"{op.name}={implementation}"] = dispatch
    return made | {ENGINE: resolve(module, device, "auto", calls)}


def _switch(sites: Mapping[str, Site], calls: Mapping[str, Call], op: str, implementation: str) -> Dispatch:
    """`implementation` at the sites of `op` whose calls it takes, the reference everywhere else."""
    made = {}
    for path, site in sites.items():
        fits = site.op.name == op and path in calls
        fits = fits and site.op.implementations[implementation].unsupported(calls[path]) is None
        made[path] = Selected(site.op.name, implementation if fits else REFERENCE, "ablation")
    return Dispatch(made)


def _bound(module: nn.Module, dispatch: Dispatch, run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    def call() -> torch.Tensor:
        dispatch.bind(module)  # on the host: a captured graph holds only the launches
        return run()

    return call
