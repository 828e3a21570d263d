"""The calls that real models make, which tuning and benchmarks time: SD 1.5 at 512, SDXL at 1024, with guidance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .op import Case, Spec
from .sampler_step.columns import HISTORY, Column

ROWS = 2  # one image, two guidance branches


@dataclass(frozen=True)
class Workload:
    """A call of a model: a case whose tensors are in the model's dtype unless a Spec says otherwise."""

    case: Case
    channels_last: frozenset[str] = field(default_factory=frozenset)


def _tokens(name: str, lengths: Mapping[str, tuple[int, int]], factor: int = 1, **extra: Any) -> tuple[Workload, ...]:
    return tuple(
        Workload(Case(f"{label} {name}", {"x": (ROWS, length, factor * width), **_affine(width, extra)}))
        for label, (length, width) in lengths.items()
    )


def _affine(width: int, extra: Mapping[str, Any]) -> dict[str, Any]:
    return {key: (width,) if key in ("weight", "bias") else value for key, value in extra.items()}


TOKENS = {"sd15 64": (4096, 320), "sd15 32": (1024, 640), "sd15 16": (256, 1280)}
TOKENS |= {"sdxl 64": (4096, 640), "sdxl 32": (1024, 1280)}
HIDDEN = {label: (length, 4 * width) for label, (length, width) in TOKENS.items()}
IMAGES = {
    "sd15 64": (ROWS, 320, 64),
    "sd15 32": (ROWS, 640, 32),
    "sd15 8": (ROWS, 1280, 8),
    "sdxl 128": (ROWS, 320, 128),
    "sdxl 64": (ROWS, 640, 64),
    "sdxl 32": (ROWS, 1280, 32),
    "vae 256": (1, 512, 256),
    "vae 1024": (1, 128, 1024),
}
ATTENTIONS = {
    "sd15 self 64": (4096, 4096, 8, 40),
    "sd15 cross 64": (4096, 77, 8, 40),
    "sd15 self 32": (1024, 1024, 8, 80),
    "sd15 self 16": (256, 256, 8, 160),
    "sdxl self 64": (4096, 4096, 10, 64),
    "sdxl cross 64": (4096, 77, 10, 64),
    "sdxl self 32": (1024, 1024, 20, 64),
    "sdxl cross 32": (1024, 77, 20, 64),
}
LATENTS = {"sd15": (1, 4, 64, 64), "sdxl": (1, 4, 128, 128), "sdxl, 8 rows": (8, 4, 128, 128)}


def _image(channels: int, size: int, rows: int) -> tuple[int, int, int, int]:
    return rows, channels, size, size


def _step(rows: int, *latent: int, draws: int) -> Workload:
    # whole numbers 0 or 1 as coefficients: half of the terms are read, as in a real table
    state, line = Spec((rows, *latent), torch.float32), len(Column)
    arguments = {
        "x": state,
        "base": state,
        "history": Spec((rows, HISTORY, *latent), torch.float32),
        "model_output": (rows, 2, *latent),
        "table": Spec((rows, 30, line), torch.float32),
        "update": Spec((rows,), torch.int64, 0, 30),
        "weights": Spec((rows, 2), torch.float32),
        "seeds": Spec((rows,), torch.int64, 0, 2**62),
        "draws": draws,
    }
    return Workload(Case(f"{rows} x {latent[-1]}, draws {draws}", arguments))


WORKLOADS: dict[str, tuple[Workload, ...]] = {
    "attention": tuple(
        Workload(Case(label, {"q": (ROWS, lq, heads, dim), "k": (ROWS, lk, heads, dim), "v": (ROWS, lk, heads, dim)}))
        for label, (lq, lk, heads, dim) in ATTENTIONS.items()
    ),
    "geglu": _tokens("feed-forward", HIDDEN, factor=2),
    "layer_norm": _tokens("norm", TOKENS, weight=(), bias=(), eps=1e-5),
    "add_layer_norm": tuple(
        Workload(Case(w.case.name, {"residual": w.case.arguments["x"], **w.case.arguments}))
        for w in _tokens("norm", TOKENS, weight=(), bias=(), eps=1e-5)
    ),
    "group_norm_silu": tuple(
        Workload(
            Case(label, {"x": _image(c, size, rows), "weight": (c,), "bias": (c,), "groups": 32, "eps": 1e-5}),
            frozenset({"x"}),
        )
        for label, (rows, c, size) in IMAGES.items()
    ),
    "bias_residual_add": tuple(
        Workload(
            Case(label, {"x": _image(c, size, rows), "bias": (c,), "residual": _image(c, size, rows)}),
            frozenset({"x", "residual"}),
        )
        for label, (rows, c, size) in IMAGES.items()
    ),
    "sampler_step": tuple(_step(*latent, draws=draws) for latent in LATENTS.values() for draws in (0, 1)),
    "guidance_stats": tuple(
        Workload(Case(label, {"model_output": (rows, 2, *latent)})) for label, (rows, *latent) in LATENTS.items()
    ),
}


def tensors(workload: Workload, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """The arguments of a workload on a device: unit normals; Specs are whole numbers of their range and dtype."""
    made: dict[str, Any] = {}
    for name, value in workload.case.arguments.items():
        spec = Spec(value) if isinstance(value, tuple) else value
        if not isinstance(spec, Spec):
            made[name] = spec
            continue
        if spec.dtype is None:
            made[name] = torch.randn(spec.shape, device=device, dtype=dtype)
        else:
            made[name] = torch.randint(spec.low, spec.high, spec.shape, device=device, dtype=spec.dtype)
        if name in workload.channels_last:
            made[name] = made[name].contiguous(memory_format=torch.channels_last)
    return made
