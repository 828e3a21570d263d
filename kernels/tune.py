"""Measure implementations and launch configurations on this machine and write the record that dispatch reads.

    python -m stepfuse.kernels.tune [--ops geglu layer_norm] [--models sdxl sdxl-vae] [--out DIR] [--dry-run]

Every call of workloads.json (or of --workloads FILE, see workloads.py) is timed as a CUDA graph of many launches, warm
(its input was just written) and cold (buffers rotate through three times the L2 cache); what fits in the cache is
decided warm, because that is how a model sees it. The heuristic's configuration is timed twice: only what beats it by
twice the difference of the two replaces it. A variant that is less accurate than twice the reference's own error in the
dtype is not timed. `--dry-run` lists what would be timed, without a GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from . import __all__ as OPS
from . import device, launch_configs
from . import workloads as calls
from .launch_configs import Entry, Shape
from .op import REGISTRY, Call, Op
from .timing import Timing, buffers_for_cold, time_calls
from .workloads import Workload


@dataclass(frozen=True)
class Variant:
    """One way to run a call: an implementation, and the launch configuration forced on it (None: it has none)."""

    implementation: str
    config: Any = None
    sizes: Shape | None = None
    is_heuristic: bool = False

    def run(self, op: Op, arguments: Mapping[str, Any]) -> Any:
        call = partial(op.implementations[self.implementation].call, **arguments)
        if self.config is None:
            return call()
        with launch_configs.forced({op.name: self.config}):
            return call()


@dataclass(frozen=True)
class Choice:
    """The fastest variant of a call, its timings, and the spread of the control."""

    variant: Variant
    warm: Timing
    cold: Timing
    spread: float


def main(arguments: list[str] | None = None) -> int:
    """Tune, or list what would be; 2 for an unknown op, or without a CUDA device."""
    parser = argparse.ArgumentParser(prog="tune", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--ops", nargs="*", default=list(OPS), help="ops to tune (default: all)")
    parser.add_argument("--models", nargs="*", help="only calls of these models (default: all in the file)")
    parser.add_argument(
        "--workloads", type=Path, default=calls.FILE, help="the calls to time (default: workloads.json)"
    )
    parser.add_argument("--out", type=Path, default=launch_configs.ROOT, help="folder for OP/configs/DEVICE.json")
    parser.add_argument("--budget", type=float, default=0.5, help="seconds per call and cache state (default 0.5)")
    parser.add_argument("--dry-run", action="store_true", help="list the variants, time nothing")
    options = parser.parse_args(arguments)
    try:
        chosen = select(options.workloads, options.ops, options.models)
    except ValueError as error:
        parser.error(str(error))
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("tuning needs a CUDA device, and there is none; --dry-run lists what it would time")
    for name, workloads in chosen.items():
        op, entries = _op(name), []
        for workload in workloads:
            found = variants(op, workload)
            _say(f"{op.name}: {workload.name}: {_summary(found)}")
            if not options.dry_run:
                choice = fastest(op, workload, found, options.budget)
                entries.append(entry(op, workload, choice))
                v, us = choice.variant, 1e6 * choice.warm.median_s
                _say(f"    {v.implementation} {v.config or ''} {us:.2f} us warm, {1e6 * choice.cold.median_s:.2f} cold")
        if entries:
            file = launch_configs.path(op.name, device.name(), options.out)
            launch_configs.write(file, op.name, device.name(), entries)
            _say(f"wrote {file}")
    return 0


def select(file: Path, ops: Sequence[str], models: Sequence[str] | None) -> dict[str, list[Workload]]:
    """The workloads of a file, by op, for some ops and models (None: all). Raises ValueError for unknown names."""
    if unknown := sorted(set(ops) - set(OPS)):
        raise ValueError(f"no op {', '.join(unknown)}; valid: {', '.join(OPS)}")
    found = calls.read(file)
    known = sorted({model for workloads in found.values() for w in workloads for model in w.calls})
    if unknown := sorted(set(models or ()) - set(known)):
        raise ValueError(f"no calls of model {', '.join(unknown)} in {file}; there are: {', '.join(known)}")
    wanted = set(known if models is None else models)
    return {op: [w for w in found.get(op, ()) if wanted & set(w.calls)] for op in ops}


def _op(name: str) -> Op:
    import_module(f".{name}.op", __package__)  # registers it
    return REGISTRY[name]


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _summary(found: Sequence[Variant]) -> str:
    names = dict.fromkeys(v.implementation for v in found)
    counts = {name: sum(v.implementation == name for v in found) for name in names}
    return ", ".join(name if n == 1 else f"{name} ({n} configurations)" for name, n in counts.items())


def describe(op: Op, workload: Workload) -> Call:
    """The signature of a workload's call on a CUDA device, from tensors without memory."""
    return replace(op.describe(**workload.tensors(torch.device("meta"))), device="cuda")


def variants(op: Op, workload: Workload) -> list[Variant]:
    """Every implementation that fits, with every configuration of its search space, the heuristic's first."""
    call, arguments = describe(op, workload), workload.tensors(torch.device("meta"))
    found = []
    for name, implementation in op.implementations.items():
        if implementation.unsupported(call):
            continue
        asked = launch_configs.probe(partial(implementation.call, **arguments))
        if asked is None:
            found.append(Variant(name, is_heuristic=True))
            continue
        _, heuristic, sizes = asked
        first = heuristic(**sizes)
        space = [first, *(c for c in launch_configs.search_space(heuristic, sizes) if c != first)]
        found += [Variant(name, config, sizes, config == first) for config in space]
    return found


def fastest(op: Op, workload: Workload, found: Sequence[Variant], budget: float = 1.0) -> Choice:
    """Time the variants that agree with the reference, and choose."""
    where = torch.device("cuda")
    arguments = workload.tensors(where)
    accurate = [variant for variant in found if agrees(op, variant, arguments)]
    nbytes = sum(t.nbytes for t in arguments.values() if isinstance(t, torch.Tensor))
    sets = [arguments, *(workload.tensors(where) for _ in range(buffers_for_cold(nbytes, where) - 1))]

    def timed(buffers: Sequence[Mapping[str, Any]]) -> dict[str, Timing]:
        calls: dict[str, list[Callable[[], object]]] = {
            str(i): [partial(variant.run, op, args) for args in buffers] for i, variant in enumerate(accurate)
        }
        for i, variant in enumerate(accurate):
            if variant.is_heuristic:
                calls[f"{i} again"] = calls[str(i)]
        return time_calls(calls, where, budget_s=budget)

    warm, cold = timed(sets[:1]), timed(sets)
    fits = nbytes <= torch.cuda.get_device_properties(where).L2_cache_size
    index, spread = choose(accurate, warm if fits else cold)
    return Choice(accurate[index], warm[str(index)], cold[str(index)], spread)


def choose(found: Sequence[Variant], times: Mapping[str, Timing]) -> tuple[int, float]:
    """Index of the fastest variant and the relative spread of its control.

    Within an implementation, another configuration must beat the heuristic's by twice the difference between its two
    timings ("0", "0 again"); so must another implementation beat the best heuristic.
    """

    def seconds(i: int) -> float:
        return times[str(i)].median_s

    controls = [i for i, variant in enumerate(found) if variant.is_heuristic]
    base = min(controls, key=seconds)
    spread = abs(times[f"{base} again"].median_s / seconds(base) - 1)
    best = min(range(len(found)), key=seconds)
    return (best if seconds(best) < seconds(base) * (1 - 2 * spread) else base), spread


def agrees(op: Op, variant: Variant, arguments: Mapping[str, Any]) -> bool:
    """Whether a variant runs here, and its error is at most twice the reference's own in the dtype, against float32."""
    wide = {
        name: v.float() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for name, v in arguments.items()
    }
    truths, plains = _outputs(op.reference(**wide)), _outputs(op.reference(**arguments))
    try:
        results = _outputs(variant.run(op, arguments))
    except _compiler_errors():  # more shared memory or registers than this device has
        return False
    for found, plain, truth in zip(results, plains, truths, strict=True):
        if found.shape != truth.shape or not torch.isfinite(found).all():
            return False
        allowed = 2 * (plain.float() - truth).abs().max() + 1e-5 * truth.abs().max()
        if truth.numel() and not (found.float() - truth).abs().max() <= allowed:
            return False
    return True


def _compiler_errors() -> tuple[type[Exception], ...]:
    if not device.has_triton():
        return ()
    from triton.runtime.errors import OutOfResources, PTXASError

    return OutOfResources, PTXASError


def _outputs(result: Any) -> tuple[torch.Tensor, ...]:
    return tuple(t.float() for t in (result if isinstance(result, tuple) else (result,)))


def entry(op: Op, workload: Workload, choice: Choice) -> Entry:
    """The line of the record for a choice."""
    variant = choice.variant
    return Entry(
        shape=launch_configs.shape_of(describe(op, workload)),
        implementation=variant.implementation,
        sizes=variant.sizes or {},
        config=None if variant.config is None else launch_configs.to_json(variant.config),
        measured=True,
        evidence={
            "workload": workload.name,
            "warm_s": choice.warm.median_s,
            "cold_s": choice.cold.median_s,
            "rounds": choice.warm.rounds,
            "method": choice.warm.method,
            "spread": choice.spread,
            "torch": torch.__version__,
            "scope": "op alone",
        },
    )


if __name__ == "__main__":
    sys.exit(main())
