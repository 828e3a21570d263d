"""Dispatch: which implementation every op call site of a model uses, fixed before tracing and read by everything after.

A model calls ops through `Site` modules. `record` runs the model once and notes the signature of every site's call;
`resolve` turns the signatures into a `Dispatch`; `Dispatch.bind` puts the chosen functions into the sites as constants,
so eager execution, torch.compile, CUDA graphs and ahead-of-time packages all run the same kernels.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from .launch_configs import Launch, in_use, launch_of
from .op import Call, Op
from .policy import Choice, decide, validate


class Site(nn.Module):
    """One call site of an op in a model. Calls the reference until a Dispatch binds another implementation."""

    def __init__(self, op: Op) -> None:
        super().__init__()
        self.op = op
        self.bound: Callable[..., Any] = op.reference
        self.recording = False

    @property
    def fused(self) -> bool:
        """Whether a fused implementation is bound: then callers leave to it what it can do in the same pass.

        Also true while calls are recorded, so that the recorded call is the one a fused implementation would get.
        """
        return self.recording or self.bound is not self.op.reference

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the bound implementation; arguments as the op's reference."""
        return self.bound(*args, **kwargs)

    def extra_repr(self) -> str:
        """The op's name, for printed models."""
        return self.op.name


@dataclass(frozen=True)
class Selected:
    """What one site uses and why.

    shape: of the recorded call, as text; launch: its launch configuration, None where there is none to choose;
    measured: whether the implementation was the fastest of a measurement on this device.
    """

    op: str
    implementation: str
    reason: str
    shape: str = ""
    launch: Launch | None = None
    measured: bool = False

    def __str__(self) -> str:
        """All of it but the op and the implementation."""
        parts = [
            self.shape,
            self.launch and str(self.launch),
            f"{self.reason} (measured: {str(self.measured).lower()})",
        ]
        return "; ".join(part for part in parts if part)


@dataclass(frozen=True)
class Dispatch:
    """Site path -> what it uses."""

    sites: Mapping[str, Selected]

    def bind(self, model: nn.Module) -> None:
        """Put the chosen implementation into every site of `model`.

        Raises KeyError for a site that is not in the table.
        """
        for path, site in _sites(model).items():
            site.bound = site.op.implementations[self.sites[path].implementation].call

    def explain(self) -> str:
        """The records in use, then `table`."""
        return f"{self.records()}\n{self.table()}"

    def records(self) -> str:
        """Which records of this machine's device the choices come from."""
        return in_use(sorted({site.op for site in self.sites.values()}))

    def table(self) -> str:
        """One line per op, implementation, shape, launch configuration and reason, with the number of such sites."""
        counts = Counter(self.sites.values())
        rows = sorted(counts.items(), key=lambda row: (row[0].op, row[0].implementation, row[0].shape))
        return "\n".join(f"{s.op:<18} {s.implementation:<16} {n:>4} sites  {s}" for s, n in rows)


def record(model: nn.Module, run: Callable[[], Any]) -> dict[str, Call]:
    """Call `run()` (which runs `model`) and return the signature of the last call of every site that was reached."""
    calls: dict[str, Call] = {}
    handles = []
    for path, site in _sites(model).items():

        def note(module: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
            assert isinstance(module, Site)
            calls[path] = module.op.describe(*args, **kwargs)

        handles.append(site.register_forward_pre_hook(note, with_kwargs=True))
        site.recording = True
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
        for site in _sites(model).values():
            site.recording = False
    return calls


def resolve(
    model: nn.Module, device: str, choice: Choice = "auto", calls: Mapping[str, Call] | None = None
) -> Dispatch:
    """Fix the implementation of every site of `model` on `device` ("cpu", "cuda").

    `calls` are the recorded signatures (`record`); sites without one, and every site under `auto` on a CPU, take the
    reference. Raises UnsupportedCallError for an explicit choice that does not exist or does not fit.
    """
    validate(choice)
    known: dict[tuple[Any, ...], Selected] = {}  # sites share shapes: a U-Net's hundreds of calls are some dozens
    sites = {}
    for path, site in _sites(model).items():
        call = (calls or {}).get(path)
        if call is None:
            automatic = device == "cpu" and choice == "auto"
            reason = "CPU: the reference is the implementation" if automatic else "no recorded call"
            sites[path] = Selected(site.op.name, "reference", reason)
            continue
        key = (site.op.name, call.requires_grad, *call.tensors.items(), *call.options.items())
        if key not in known:
            known[key] = _select(site.op, call, choice)
        sites[path] = known[key]
    return Dispatch(sites)


def _select(op: Op, call: Call, choice: Choice) -> Selected:
    decision = decide(op, call, choice)
    name, launch = decision.implementation.name, None
    if name.startswith("triton"):
        launch = launch_of(decision.implementation.call, call)
    return Selected(op.name, name, decision.reason, _shape(call), launch, decision.measured)


def _shape(call: Call) -> str:
    """As in "x 2x640x64x64 channels-last bfloat16, pre_bias 2x640"; parameters follow from the rest."""
    parts, before = [], None
    for name, info in call.tensors.items():
        if name not in ("weight", "bias"):
            dtype = str(info.dtype).removeprefix("torch.")
            layout = " channels-last" if info.channels_last else ""
            extents = "x".join(map(str, info.shape))
            parts.append(f"{name} {extents}{layout}" + (f" {dtype}" if dtype != before else ""))
            before = dtype
    return ", ".join(parts)


def _sites(model: nn.Module) -> dict[str, Site]:
    return {path: module for path, module in model.named_modules() if isinstance(module, Site)}
