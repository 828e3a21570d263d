"""The records of `stepfuse bench compare`, one per phase, and their table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ..engine.errors import RequestError, closest
from . import harness

PHASES = ("update", "decode", "end-to-end")


def records(
    phases: Sequence[str], *, arch: str, device: str | None, dtype: str | None, images: int, rounds: int,
    budget_s: float, compiled: bool | None, steps: int, notice: Callable[[str], None], exported: bool | None = None,
    width: int | None = None, height: int | None = None,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Compare in `phases` (empty: all that `arch` has). Raises RequestError for what cannot be compared."""
    known = PHASES if arch == "shapes" else PHASES[:2]
    for phase in phases:
        if phase not in known:
            raise RequestError(f"--phases: got {phase!r} for {arch}, {closest(phase, known)}")
    try:
        import diffusers  # noqa: F401
    except ImportError:
        raise RequestError("compare needs diffusers: pip install 'stepfuse[bench]'") from None
    import torch

    from ..engine.config import resolve_device, resolve_dtype
    from . import compare, end_to_end
    from .architectures import architecture

    place = resolve_device(device)
    half = torch.bfloat16 if place.type == "cuda" else torch.float32
    settings = compare.Settings(
        device=place, dtype=resolve_dtype("dtype", dtype) or half, width=width, height=height, images=images,
        rounds=rounds, budget_s=budget_s, compiled=place.type == "cuda" if compiled is None else compiled,
        exported=arch == "shapes" if exported is None else exported,
    )  # fmt: skip
    try:
        network = architecture(arch)
        network.latent(width, height)
    except ValueError as error:
        raise RequestError(str(error)) from None
    machine = harness.fingerprint(str(place))
    conditions = {"arch": arch, "dtype": str(settings.dtype).removeprefix("torch."), "images": images,
                  "weights": "trained" if network.trained else "random", "rounds": rounds}  # fmt: skip
    for phase in phases or known:
        if phase == "end-to-end":
            found = end_to_end.measure(settings, steps, notice)
        else:
            found = (compare.update if phase == "update" else compare.decode)(network, settings, notice)
        size = {"latent": found.get("latent"), "rows": found.get("rows"), "steps": found.get("steps")}
        here = conditions | {k: v for k, v in size.items() if v is not None}
        yield harness.measurement("compare", f"{arch} {phase}", found["ours_s"], "s", machine, here, **found)


def red(record: Mapping[str, Any]) -> bool:
    """Whether ours errs more than twice as much as every rival: then it has no ratio at all."""
    gates = [facts["gate"]["green"] for facts in record["variants"].values() if "gate" in facts]
    return not any(gates)


def table(records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The records for a terminal."""
    for record in records:
        said = ", ".join(f"{name} {value}" for name, value in record["conditions"].items())
        yield f"{record['name']} on {record['device']}: {said}"
        yield f"  {'variant':<58} {'median ms':>10} {'p10':>9} {'p90':>9} {'error':>9}  time over ours"
        for name, facts in record["variants"].items():
            times = [1e3 * facts[key] for key in ("median_s", "p10_s", "p90_s")]
            cells = f"{times[0]:>10.4g} {times[1]:>9.4g} {times[2]:>9.4g} {facts['error']:>9.2g}"
            yield f"  {name:<58} {cells}  {ratio(record, name)}"
        for name, facts in record["variants"].items():
            yield f"  {name}: {configuration(facts['configuration'])}"
        truth = record["truth"].removeprefix("torch.")
        yield f"  A/A spread {100 * record['a_a_spread']:.2g} %; errors against {truth}"
        for name, why in record["refused"].items():
            yield f"  did not run: {name}: {why}"


def ratio(record: Mapping[str, Any], name: str) -> str:
    """What may be said about a variant's time over ours, in words; "-" for ours and the control."""
    facts = record["variants"][name]
    if "gate" not in facts:
        return "-"
    if not facts["gate"]["green"]:
        return f"none: ours errs {facts['gate']['error']:.2g}, allowed {facts['gate']['allowed']:.2g}"
    said = facts["speedup"]
    return said if isinstance(said, str) else f"{said:.3g}x"


def configuration(facts: Mapping[str, Any]) -> str:
    """What a variant really was, in one line."""
    parts = []
    for name, value in facts.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{key} {number}" for key, number in value.items()) or "none"
        parts.append(f"{name.replace('_', ' ')}: {value}")
    return "; ".join(parts)
