"""The shapes at which ops are timed: those of our own graphs, read from an evaluation with fake tensors.

Nothing is listed by hand, so the list cannot fall behind the graphs. An op that no graph calls takes the shapes of the
op beside which it would stand, and counts no calls.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from .. import kernels
from ..kernels.dispatch import Site
from ..kernels.op import REGISTRY, Op, Spec
from . import random_networks
from .gpu_parts import unets, vaes

UNETS: dict[str, dict[str, Any]] = {"sdxl": unets.SDXL, "sd15": unets.SD15}
DECODERS = {"sdxl-vae": (vaes.SDXL, 128), "sd15-vae": (vaes.SDXL, 64)}  # one autoencoder at two latent sizes
MODELS = (*UNETS, *DECODERS)
TINY = ("tiny", "tiny-vae")
BESIDE = {
    "add_layer_norm": "layer_norm",
    "bias_residual_add": "group_norm_silu",
    "guidance_stats": "sampler_step",
}


@dataclass(frozen=True)
class Input:
    """A tensor argument: shape, strides, and its own dtype where it does not follow the benchmark's."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype | None = None

    @property
    def elements(self) -> int:
        """How many values it has."""
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Shape:
    """One op call of a model: arguments by name (an `Input` or a constant), and its calls per evaluation."""

    op: str
    model: str
    arguments: tuple[tuple[str, Any], ...]
    count: int

    @property
    def name(self) -> str:
        """What tells it from the other shapes of its op: "x[2,640,64,64] pre_bias[2,640] silu=False"."""
        signature = REGISTRY[self.op].signature.parameters
        parts = []
        for name, value in self.arguments:
            if isinstance(value, Input):
                if name not in ("weight", "bias"):  # parameters follow from the channels
                    parts.append(f"{name}[{','.join(map(str, value.shape))}]")
            elif value != signature[name].default and name not in ("eps", "groups"):
                parts.append(f"{name}={value}")
        return " ".join(parts)

    @property
    def key(self) -> str:
        """Unique among all shapes, and stable between runs."""
        images = {name: i for name, i in self.inputs().items() if len(i.shape) == 4 and self.op != "attention"}
        planar = [name for name, i in images.items() if i.shape[1] > 1 and i.stride[1] != 1]
        return f"{self.op} {self.model} {self.name}" + (f" planar {','.join(planar)}" if planar else "")

    def inputs(self) -> dict[str, Input]:
        """The tensor arguments."""
        return {name: value for name, value in self.arguments if isinstance(value, Input)}

    def make(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
        """The arguments on `device`: normal values in `dtype`, or values the op's contract cases call valid."""
        generator = torch.Generator(device).manual_seed(seed)
        return {
            name: _tensor(self.op, name, value, device, dtype, generator) if isinstance(value, Input) else value
            for name, value in self.arguments
        }


def shapes(model: str, rows: int = 2) -> list[Shape]:
    """Distinct op calls of one update (`UNETS`, "tiny") or decoding (`DECODERS`, "tiny-vae") of `model`.

    rows: model rows of an update, even: prompt and negative prompt. A decoding has one row. Costliest first in each op.
    Raises ValueError for an unknown model.
    """
    for name in kernels.__all__:
        getattr(kernels, name)  # registers the op
    with torch.no_grad(), FakeTensorMode():  # the strides are those of a real run, and nothing is computed
        if model in UNETS or model == "tiny":
            counted = _record(*_update(unets.TINY if model == "tiny" else UNETS[model], rows))
        elif model in DECODERS or model == "tiny-vae":
            counted = _record(*_decoding(*((vaes.TINY, 8) if model == "tiny-vae" else DECODERS[model])))
        else:
            raise ValueError(f"unknown model {model!r}; expected one of: {', '.join(MODELS + TINY)}")
    made = [Shape(op, model, arguments, count) for (op, arguments), count in counted.items()]
    made += [_stochastic(shape) for shape in made if shape.op == "sampler_step"]
    for op, other in BESIDE.items():
        if op in REGISTRY and not any(shape.op == op for shape in made):
            near = (shape for shape in made if shape.op == other and not _joined(shape))
            made += list(dict.fromkeys(_beside(op, shape) for shape in near))
    return sorted(made, key=lambda s: (s.op, -max(s.count, 1) * sum(i.elements for i in s.inputs().values())))


def _update(config: Mapping[str, Any], rows: int) -> tuple[nn.Module, Callable[[], Any]]:
    net = random_networks.unet(config, "cpu", torch.bfloat16)
    update = random_networks.Update(net, random_networks.unet_inputs(config, rows, "cpu"))
    return update, update


def _decoding(config: Mapping[str, Any], size: int) -> tuple[nn.Module, Callable[[], Any]]:
    vae = random_networks.autoencoder(config, "cpu", torch.bfloat16)
    return vae, lambda: vae.decode(torch.empty(1, 4, size, size, dtype=torch.bfloat16))


def _record(module: nn.Module, run: Callable[[], Any]) -> Counter[tuple[str, tuple[tuple[str, Any], ...]]]:
    """Every op call of `run`, by op and arguments, as fused implementations would get it."""
    calls: Counter[tuple[str, tuple[tuple[str, Any], ...]]] = Counter()

    def note(site: nn.Module, args: Any, kwargs: Any) -> None:
        assert isinstance(site, Site)
        bound = site.op.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        calls[site.op.name, tuple((name, _input(value)) for name, value in bound.arguments.items())] += 1

    for site in module.modules():
        if isinstance(site, Site):
            site.recording = True
            site.register_forward_pre_hook(note, with_kwargs=True)
    run()
    return calls


def _input(value: Any) -> Any:
    """A tensor as an `Input`; the networks run in bfloat16, which stands for the dtype of the benchmark."""
    if not isinstance(value, torch.Tensor):
        return value
    return Input(tuple(value.shape), value.stride(), None if value.dtype == torch.bfloat16 else value.dtype)


def _stochastic(shape: Shape) -> Shape:
    """The sampler step of a stochastic sampler, which draws noise."""
    return replace(shape, count=0, arguments=tuple((n, 2 if n == "draws" else v) for n, v in shape.arguments))


def _joined(shape: Shape) -> bool:
    return any(name in ("x2", "partial_stats") for name in shape.inputs())


def _beside(op: str, shape: Shape) -> Shape:
    """The call of `op` next to the one of `shape`: arguments of the same name are equal, another image is like x."""
    given = dict(shape.arguments)
    return Shape(op, shape.model, tuple((n, given.get(n, given["x"])) for n in REGISTRY[op].signature.parameters), 0)


def _tensor(
    op: str, name: str, want: Input, device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> torch.Tensor:
    extent = 1 + sum((n - 1) * step for n, step in zip(want.shape, want.stride, strict=True))
    spec = _valid(REGISTRY[op], name)
    made: dict[str, Any] = {"device": device, "generator": generator}
    if spec is not None:
        flat = torch.randint(spec.low, spec.high, (extent,), dtype=want.dtype or spec.dtype, **made)
    else:
        flat = torch.randn(extent, dtype=want.dtype or dtype, **made)
    return flat.as_strided(want.shape, want.stride)


def _valid(op: Op, name: str) -> Spec | None:
    """What the contract cases say an argument's values are, if not normal."""
    found = (case.arguments.get(name) for case in op.cases)
    return next((spec for spec in found if isinstance(spec, Spec) and spec.dtype is not None), None)
