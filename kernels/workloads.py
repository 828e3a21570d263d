"""The calls that tuning times: those of real networks, as data.

`workloads.json` holds every distinct op call of one guided update of SD 1.5 (512 x 512), SD 2 (768 x 768) and SDXL
(1024 x 1024) and of the decoding after it; a test compares it with the graphs, so it cannot fall behind them. `record`
and `write` make such a file for any other network:

    write(Path("mine.json"), record(network, lambda: network(x), "mine"))
    python -m stepfuse.kernels.tune --workloads mine.json
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .dispatch import Site
from .op import REGISTRY, Op, Spec

FILE = Path(__file__).parent / "workloads.json"


@dataclass(frozen=True)
class Tensor:
    """A tensor argument: shape, strides in elements, dtype."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    def of(x: torch.Tensor) -> Tensor:
        """What is described, without its values."""
        return Tensor(tuple(x.shape), x.stride(), x.dtype)


@dataclass(frozen=True)
class Workload:
    """One op call. arguments: name -> `Tensor` or a constant; calls: model -> how often one evaluation makes it."""

    op: str
    arguments: Mapping[str, Any]
    calls: Mapping[str, int]

    @property
    def name(self) -> str:
        """Unique within its op: "sdxl: x[2,640,64,64] pre_bias[2,640] silu=False"; parameters follow from the rest."""
        defaults = _op(self.op).signature.parameters
        parts = []
        for name, value in self.arguments.items():
            if isinstance(value, Tensor):
                if name not in ("weight", "bias"):
                    parts.append(f"{name}[{','.join(map(str, value.shape))}]")
            elif value != defaults[name].default and name not in ("eps", "groups"):
                parts.append(f"{name}={value}")
        return f"{' '.join(self.calls)}: {' '.join(parts)}"

    def tensors(self, device: torch.device) -> dict[str, Any]:
        """The arguments on a device: unit normals, or what the op's contract cases call valid."""
        return {k: _make(self.op, k, v, device) if isinstance(v, Tensor) else v for k, v in self.arguments.items()}


def record(network: nn.Module, run: Callable[[], Any], model: str) -> list[Workload]:
    """Every distinct op call that `run()` makes at the sites of `network`, as a fused implementation would get it."""
    made: list[Workload] = []
    sites = [module for module in network.modules() if isinstance(module, Site)]

    def note(site: nn.Module, args: Any, kwargs: Any) -> None:
        assert isinstance(site, Site)
        bound = site.op.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        values = {k: Tensor.of(v) if isinstance(v, torch.Tensor) else v for k, v in bound.arguments.items()}
        made.append(Workload(site.op.name, values, {model: 1}))

    handles = [site.register_forward_pre_hook(note, with_kwargs=True) for site in sites]
    for site in sites:
        site.recording = True
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
        for site in sites:
            site.recording = False
    return merged(made)


def merged(workloads: Iterable[Workload]) -> list[Workload]:
    """One workload for all of equal op and arguments, whose calls are their sum."""
    calls: dict[tuple[Any, ...], dict[str, int]] = {}
    for workload in workloads:
        counts = calls.setdefault((workload.op, *workload.arguments.items()), {})
        for model, count in workload.calls.items():
            counts[model] = counts.get(model, 0) + count
    return [Workload(op, dict(arguments), counts) for (op, *arguments), counts in calls.items()]


def read(file: Path = FILE) -> dict[str, list[Workload]]:
    """Workloads by op. Raises ValueError for a file that has none."""
    try:
        lines = json.loads(file.read_text())
        found = [
            Workload(line["op"], {k: _read(v) for k, v in line["arguments"].items()}, line["calls"]) for line in lines
        ]
    except (OSError, TypeError, KeyError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} has no workloads ({error!r}); make it with kernels/workloads.py: write") from error
    by_op: dict[str, list[Workload]] = {}
    for workload in found:
        by_op.setdefault(workload.op, []).append(workload)
    return by_op


def write(file: Path, workloads: Iterable[Workload]) -> None:
    """Write a file of workloads, one a line."""
    lines = (
        {"op": w.op, "calls": dict(w.calls), "arguments": {k: _plain(v) for k, v in w.arguments.items()}}
        for w in workloads
    )
    file.write_text("[\n" + ",\n".join(json.dumps(line) for line in lines) + "\n]\n")


def _plain(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    dtype = str(value.dtype).removeprefix("torch.")
    return {"shape": value.shape, "stride": value.stride, "dtype": dtype}


def _read(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return Tensor(tuple(value["shape"]), tuple(value["stride"]), getattr(torch, value["dtype"]))


def _make(op: str, name: str, want: Tensor, device: torch.device) -> torch.Tensor:
    extent = 1 + sum((n - 1) * step for n, step in zip(want.shape, want.stride, strict=True))
    given = (case.arguments.get(name) for case in _op(op).cases)
    spec = next((spec for spec in given if isinstance(spec, Spec) and spec.dtype is not None), None)
    if spec is None:
        flat = torch.randn(extent, dtype=want.dtype, device=device)
    else:
        flat = torch.randint(spec.low, spec.high, (extent,), dtype=want.dtype, device=device)
    return flat.as_strided(want.shape, want.stride)


def _op(name: str) -> Op:
    import_module(f".{name}.op", __package__)  # registers it
    return REGISTRY[name]
