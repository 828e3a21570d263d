"""One guided U-Net evaluation of SDXL and SD 1.5 by our own graph, on the inputs of the diffusers baselines.

What every update shares (prompt keys and values, timestep embeddings) is prepared outside the timed call, as the engine
does. Weights are random; the truth is the same graph in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...kernels.timing import time_call
from .session import Session, relative_error
from .unets import CASES, TINY_CASES, priority, profile

VARIANTS = ("graph", "graph+cudnn", "eager", "compile+graph+cudnn")


def run(session: Session) -> None:
    for case, (config, rows) in (TINY_CASES if session.tiny else CASES).items():
        keys = [f"{case} {variant}" for variant in VARIANTS]
        if all(key in session.finished for key in keys) or session.seconds_left() <= 0:
            continue
        net, inputs = _build(session, config, rows)
        with priority("cudnn" if session.cuda else ""):
            truth = net(*_prepared(net, inputs))
        net.to(session.dtype).to(memory_format=torch.channels_last)
        arguments = _prepared(net, inputs)
        for key, variant in zip(keys, VARIANTS, strict=True):
            call = lambda n=net, a=arguments, t=truth, v=variant: _measure(session, n, a, t, v)  # noqa: E731
            if not session.measure(key, call):
                return


def _build(session: Session, config: dict[str, Any], rows: int) -> tuple[Any, dict[str, torch.Tensor]]:
    """Our U-Net with random float32 weights of unit gain, and its inputs."""
    from ...engine.models.unet import UNet
    from ...engine.models.unet_config import UNetConfig

    with torch.device(session.device):
        net = UNet(UNetConfig.from_diffusers(config)).eval().requires_grad_(False)
        for module in net.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.dim() > 1:
                    nn.init.kaiming_uniform_(parameter, a=5**0.5)  # torch's own default for these layers
                else:
                    parameter.fill_(1.0 if name == "weight" else 0.0)
        size = config["sample_size"]
        inputs = {
            "latents": torch.randn(rows, 4, size, size).to(memory_format=torch.channels_last),
            "hidden": torch.randn(rows, 77, config["cross_attention_dim"]),
            "timesteps": torch.full((rows, 4), 500.0),
        }
        if config.get("addition_embed_type") == "text_time":
            inputs["pooled"] = torch.randn(rows, 1280)
            inputs["time_ids"] = torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]]).repeat(rows, 1)
    return net, inputs


def _prepared(net: Any, inputs: dict[str, torch.Tensor]) -> tuple[Any, ...]:
    from ...engine.models.unet import Conditioning

    given = {name: inputs[name] for name in ("hidden", "pooled", "time_ids") if name in inputs}
    prepared = net.prepare(Conditioning(**given), inputs["timesteps"])
    latents = inputs["latents"].to(net.dtype)
    return latents, prepared, torch.zeros(len(latents), dtype=torch.int64, device=latents.device)


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
