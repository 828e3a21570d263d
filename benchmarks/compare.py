"""Ours against diffusers on the same weights and inputs, in one process: an update, a decoding, and end to end.

All variants are timed interleaved (A B B A) with a second instance of the eager baseline (A/A). The error of each
against the same network one precision up stands beside its time; where ours is more than twice a rival's, there is no
ratio over that rival.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels.timing import Timing, time_calls
from . import architectures, flops
from .architectures import Architecture, Network
from .harness import ClockLog
from .kernel_measurement import claim, spread
from .rivals import BASELINE, CONTROL, OURS, OURS_GRAPH, Lineup, Variant

Notice = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Where and how to compare. width, height: pixels, None for the architecture's own. images: in one update.

    exported: also our ONNX export by ONNX Runtime.
    """

    device: torch.device
    dtype: torch.dtype
    width: int | None = None
    height: int | None = None
    images: int = 1
    rounds: int = 12
    budget_s: float = 60.0
    compiled: bool = False
    exported: bool = False


@torch.inference_mode()
def update(arch: Architecture, settings: Settings, notice: Notice = lambda text: None) -> dict[str, Any]:
    """One evaluation of both guidance branches of `images` images (2 rows each) by every variant."""
    latent = arch.latent(settings.width, settings.height)
    notice(f"{arch.name} update: building the U-Net twice")
    net = Network(arch, "unet", settings.device, settings.dtype)
    inputs = architectures.unet_inputs(arch, 2 * settings.images, latent, settings.device, settings.dtype)

    def theirs(module: Any) -> Tensor:
        return architectures.their_call(module, inputs)

    def ours(module: Any) -> Callable[[], Tensor]:
        arguments = architectures.our_arguments(module, inputs)
        return lambda: module(*arguments)

    found = _phase(net, theirs, ours, settings, notice, f"{arch.name} update")
    config = net.ours.config
    found["tflop"] = 1e-12 * flops.of_update(config, 2 * settings.images, *latent)
    return found | {"rows": 2 * settings.images, "latent": list(latent)}


@torch.inference_mode()
def decode(arch: Architecture, settings: Settings, notice: Notice = lambda text: None) -> dict[str, Any]:
    """One decoding of `images` latents by every variant, without tiling."""
    latent = arch.latent(settings.width, settings.height)
    notice(f"{arch.name} decode: building the autoencoder twice")
    net = Network(arch, "vae", settings.device, settings.dtype)
    shape = (settings.images, arch.vae.get("latent_channels", 4), *latent)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(settings.device, settings.dtype)

    def theirs(module: Any) -> Tensor:
        return module.decode(latents.to(module.dtype), return_dict=False)[0]

    def ours(module: Any) -> Callable[[], Tensor]:
        return lambda: module.decode(latents)

    found = _phase(net, theirs, ours, settings, notice, f"{arch.name} decode")
    return found | {"rows": settings.images, "latent": list(latent)}


def _phase(
    net: Network, theirs: Callable[[Any], Tensor], ours: Callable[[Any], Callable[[], Tensor]], settings: Settings,
    notice: Notice, what: str,
) -> dict[str, Any]:  # fmt: skip
    """Sanity, truth, variants, times and verdicts of one network."""
    activations = architectures.spreads(net.theirs, lambda: theirs(net.theirs))
    architectures.check_sane(activations)
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # for a truth in float32
    try:
        truth = net.exact(theirs)
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32
    net.lay_out()
    lineup = Lineup(net, theirs, ours, compiled=settings.compiled, exported=settings.exported)
    lineup.gather()
    notice(f"{what}: timing {', '.join(variant.name for variant in lineup.variants)}")
    found = judge(lineup.variants, truth, settings)
    return found | {"refused": lineup.refused, "activations_std": activations, "truth": str(truth.dtype)}


def judge(variants: list[Variant], truth: Tensor, settings: Settings) -> dict[str, Any]:
    """Times, errors and verdicts of variants that all ran.

    Raises RuntimeError where the baseline or ours is not among them.
    """
    names = {variant.name for variant in variants}
    for name in (BASELINE, OURS):
        if name not in names:
            raise RuntimeError(f"{name} did not run, so there is nothing to compare")
    errors = {variant.name: relative_error(variant.call(), truth) for variant in variants}
    with ClockLog() as clocks:
        timings = time_calls(
            {variant.name: [variant.timed] for variant in variants}, settings.device, rounds=settings.rounds,
            graph=False, budget_s=settings.budget_s,
        )  # fmt: skip
    ours = OURS_GRAPH if OURS_GRAPH in names else OURS
    found = verdicts(timings, errors, ours)
    facts = {variant.name: variant.facts for variant in variants}
    for name, record in found["variants"].items():
        record |= {"configuration": facts[name]}
    return found | {"clocks": clocks.summary()}


def verdicts(timings: Mapping[str, Timing], errors: Mapping[str, float], ours: str) -> dict[str, Any]:
    """Per variant: times, error, and how much longer it took than `ours` (or "equal", or why there is no ratio).

    There is no ratio where `ours` errs more than twice as much as the rival (plus 1e-7), or gives NaN; differences
    below twice the A/A spread are "equal".
    """
    apart = spread(timings[BASELINE], timings[CONTROL])
    variants: dict[str, Any] = {}
    for name, timing in timings.items():
        record: dict[str, Any] = {"error": errors[name], **timing.record()}
        if name not in (ours, CONTROL) and not name.startswith("stepfuse"):
            green = errors[ours] <= 2 * errors[name] + 1e-7  # NaN is not <=
            record["gate"] = {"green": green, "error": errors[ours], "allowed": 2 * errors[name] + 1e-7}
            record["speedup"] = claim(timing.median_s, timings[ours].median_s, apart) if green else None
        variants[name] = record
    rivals = [n for n in timings if n != CONTROL and not n.startswith("stepfuse")]
    strongest = min(rivals, key=lambda name: timings[name].median_s)
    return {"ours": ours, "ours_s": timings[ours].median_s, "strongest": strongest, "a_a_spread": apart,
            "variants": variants}  # fmt: skip


def relative_error(value: Tensor, truth: Tensor) -> float:
    """||value - truth|| / ||truth|| in float64; every element counts, so one lucky maximum decides nothing."""
    value, truth = value.double(), truth.double()
    return float((value - truth).norm() / truth.norm().clamp_min(1e-300))
