"""Rows against static batching under the same load: the same engine, requests and arrival times, interleaved."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from . import harness, load
from .fronts import WAIT_S, Rows, Static
from .load import Served
from .mix import Mix, arrivals

if TYPE_CHECKING:
    from ..engine.engine import Engine
    from ..engine.request import Request, Result

FRONTS = ("rows", "static")
KIND = "throughput"  # of the last record, the comparison
TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
"""Relative L2 of final latents against the solo run, by the engine's dtype. Half precision: other batch sizes take
other kernels, and what they round differently grows over the updates."""
LOADS = (0.4, 0.6, 0.75, 0.9)  # of the closed-loop throughput of rows


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is run: `rounds` pairs of `requests` requests at every rate, and a closed loop of `clients` before them.

    rates: requests per second; None: fractions `LOADS` of what rows reach in the closed loop. checked: requests of the
    load whose images are compared with their solo runs. slo_s: the 95th percentile that is compared at; None: `slo`
    times the mean solo latency of the checked requests.
    """

    mix: Mix
    requests: int = 60
    clients: int = 8
    rates: tuple[float, ...] | None = None
    rounds: int = 2
    seed: int = 0
    wait_s: float = WAIT_S
    checked: int = 6
    slo: float = 4.0
    slo_s: float | None = None


Notice = Callable[[str, int, int], None]
"""Called with what runs, requests done and requests in all."""


def records(
    engine: Engine, plan: Plan, machine: Mapping[str, Any], notice: Notice = lambda what, done, total: None
) -> Iterator[dict[str, Any]]:
    """Closed loop, then every rate by both fronts in the order rows, static, static, rows ...; and the comparison.

    Yields a record as soon as it is measured: the closed loop of each front, each front at each rate (the mean over
    its rounds), with the gate of its own images; last the comparison: how many requests per second each serves at the
    same 95th percentile, and their ratio, which is None where a gate is red.
    """
    requests = plan.mix.draw(plan.requests, plan.seed)
    for request in {_shape(request): request for request in requests}.values():
        engine.warmup(width=request.width, height=request.height, loras=len(request.loras))
    alone = solo(engine, requests, plan.checked, lambda done: notice("solo runs", done, plan.checked))
    solo_s = statistics.mean(result.timings["total"] for result in alone.values())
    load.closed_loop(Rows(engine), requests[: 2 * plan.clients], plan.clients)  # first use of every row count

    def run(front: str, what: str, drive: Callable[[Any, load.Progress], list[Served]]) -> list[Served]:
        server = Rows(engine) if front == "rows" else Static(engine, _cap(engine), plan.wait_s)
        try:
            return drive(server, lambda done: notice(f"{what}, {front}", done, len(requests)))
        finally:
            server.close()

    made = partial(_record, plan, engine, machine)
    allowed = TOLERANCE[str(engine.components.config.dtype).removeprefix("torch.")]
    reached, gates = {}, dict[str, dict[str, Any]]()
    for front in FRONTS:
        served = run(front, "closed loop", lambda s, p: load.closed_loop(s, requests, plan.clients, p))
        facts, gates[front] = load.summary(served), gate(served, alone, allowed)
        reached[front] = facts["images_per_s"]
        yield made("throughput closed", front, reached[front], "images/s", front=front, **facts, gate=gates[front])
    rates = plan.rates or tuple(share * reached["rows"] for share in LOADS)
    points: list[dict[str, Any]] = []
    timelines: dict[str, list[list[float]]] = {}
    for rate in rates:
        times = arrivals(plan.requests, rate, plan.seed)
        served_by: dict[str, list[Served]] = {front: [] for front in FRONTS}
        for number in range(plan.rounds):
            for front in FRONTS if number % 2 == 0 else reversed(FRONTS):
                found = run(front, f"{rate:.3g}/s", lambda s, p, t=times: load.open_loop(s, requests, t, p))
                served_by[front] += found
                timelines[front] = load.timeline(found)
        for front, found in served_by.items():
            each = [load.summary(found[i : i + len(requests)]) for i in range(0, len(found), len(requests))]
            here = gate(found, alone, allowed)
            gates[front] = max(gates[front], here, key=lambda one: (not one["green"], one["error"]))
            points.append({"front": front, "rate": rate, **_average(each), "rounds": each})
            name = f"{rate:.3g}/s {front}"
            yield made("throughput open", name, points[-1]["p95_s"], "s (p95)", **points[-1], gate=here)
    equal = equal_p95(points, plan.slo_s or plan.slo * solo_s, all(one["green"] for one in gates.values()))
    yield made(KIND, "rows over static at equal p95", equal["ratio"], "x", equal_p95=equal, gates=gates,
               solo_s=solo_s, timelines=timelines, timeline_rate=rates[-1])  # fmt: skip


def solo(
    engine: Engine, requests: Sequence[Request], count: int, progress: load.Progress = lambda done: None
) -> dict[int, Result]:
    """The results of `count` of the requests, spread over them, each run alone; by their number."""
    numbers = range(0, len(requests), max(1, len(requests) // count))[:count]
    alone = {}
    for number in numbers:
        alone[number] = engine.generate(requests[number])
        progress(len(alone))
    return alone


def gate(served: Sequence[Served], alone: Mapping[int, Result], allowed: float) -> dict[str, Any]:
    """The largest relative L2 difference of final latents from the solo runs, for those requests that have one.

    The largest difference of picture values (0..1) is given beside it. A NaN is red.
    """
    pairs = [(one.result, alone[one.number]) for one in served if one.number in alone]
    errors = [float((found.latents - truth.latents).norm() / truth.latents.norm()) for found, truth in pairs]
    pictures = [float((found.images - truth.images).abs().max()) for found, truth in pairs]
    error = math.nan if any(map(math.isnan, errors)) else max(errors)
    return {"green": error <= allowed, "error": error, "allowed": allowed, "checked": len(pairs),
            "picture_error": max(pictures)}  # fmt: skip


def equal_p95(points: Sequence[Mapping[str, Any]], slo_s: float, green: bool) -> dict[str, Any]:
    """Requests per second of each front at a 95th percentile of `slo_s`, by interpolation between measured rates.

    A front that meets it at every rate is given its highest rate and "at least"; one that meets it at none its lowest
    rate and "less than". The ratio is given where the gates are green and both are interpolated; otherwise a bound
    where the two say one, or the reason why there is none.
    """
    found: dict[str, Any] = {"slo_s": slo_s}
    for front in FRONTS:
        curve = sorted((point["rate"], point["p95_s"]) for point in points if point["front"] == front)
        found[front] = capacity(curve, slo_s)
    rows, static = found["rows"], found["static"]
    if not green:
        return found | {"ratio": None, "reason": "a correctness gate is red"}
    ratio = rows["rate"] / static["rate"]
    if rows["bound"] == static["bound"] == "":
        return found | {"ratio": ratio, "reason": ""}
    if rows["bound"] in ("", "at least") and static["bound"] in ("", "less than"):
        return found | {"ratio": None, "at_least": ratio, "reason": "one end lies outside the measured rates"}
    return found | {"ratio": None, "reason": "the measured rates do not bracket this percentile"}


def capacity(curve: Sequence[tuple[float, float]], slo_s: float) -> dict[str, Any]:
    """The highest rate before `curve` (rate, p95; rates ascending) first exceeds `slo_s`: rate and bound."""
    if curve[0][1] > slo_s:
        return {"rate": curve[0][0], "bound": "less than"}
    for (low, below), (high, above) in pairwise(curve):
        if above > slo_s:
            return {"rate": low + (high - low) * (slo_s - below) / (above - below), "bound": ""}
    return {"rate": curve[-1][0], "bound": "at least"}


def _average(each: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean over rounds of every number."""
    return {name: sum(one[name] for one in each) / len(each) for name in each[0]}


def _cap(engine: Engine) -> int:
    return engine.components.config.max_rows


def _shape(request: Request) -> tuple[int | None, int | None, int]:
    return request.width, request.height, len(request.loras)


def _record(
    plan: Plan, engine: Engine, machine: Mapping[str, Any], kind: str, name: str, value: float | None, unit: str,
    **facts: Any,
) -> dict[str, Any]:  # fmt: skip
    config = engine.components.config
    conditions = {"model": engine.components.name, "mix": plan.mix.name, "dtype": str(config.dtype)[6:],
                  "max_rows": config.max_rows, "wait_s": plan.wait_s, "requests": plan.requests, "rounds": plan.rounds,
                  "clients": plan.clients, "seed": plan.seed}  # fmt: skip
    return harness.measurement(kind, f"{plan.mix.name} {name}", value, unit, machine, conditions, **facts)


def table(records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The records for a terminal."""
    for r in records:
        if "front" in r:
            load = "closed loop" if r["kind"].endswith("closed") else f"{r['rate']:8.3g}/s "
            yield (f"{load}  {r['front']:<7} {r['images_per_s']:8.3g} images/s   p50 {r['p50_s']:.3f} s   "
                   f"p95 {r['p95_s']:.3f} s")  # fmt: skip
    *_, last = records
    for front, found in last["gates"].items():
        verdict = "green" if found["green"] else "RED"
        yield (f"gate {verdict}: {front}, {found['checked']} requests against their solo runs: {found['error']:.2g}, "
               f"allowed {found['allowed']:.2g}")  # fmt: skip
    yield say(last["equal_p95"])


def say(equal: Mapping[str, Any]) -> str:
    """The comparison at an equal 95th percentile, in words."""
    ends = ", ".join(
        f"{front} {equal[front]['bound']} {equal[front]['rate']:.3g}/s".replace("  ", " ") for front in FRONTS
    )
    start = f"at p95 = {equal['slo_s']:.3g} s: {ends}"
    if equal["ratio"] is not None:
        return f"{start}: {equal['ratio']:.2f}x"
    bound = f"at least {equal['at_least']:.2f}x ({equal['reason']})" if "at_least" in equal else equal["reason"]
    return f"{start}: {bound if 'at_least' in equal else f'no ratio: {bound}'}"
