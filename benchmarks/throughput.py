"""Rows against static batching under the same load: the same engine, requests and arrival times, interleaved."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from . import harness, load
from .fronts import WAIT_S, Rows, Static
from .load import Served
from .mix import Mix, arrivals

if TYPE_CHECKING:
    from ..engine.engine import Engine

FRONTS = ("rows", "static")
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


def measure(engine: Engine, plan: Plan, notice: Notice = lambda what, done, total: None) -> dict[str, Any]:
    """Closed loop, then every rate by both fronts in the order rows, static, static, rows ...; and the comparison.

    Returns the closed-loop and open-loop summaries of both fronts, the correctness gate of each, timelines at the
    highest rate, and `equal_p95`: how many requests per second each serves at the same 95th percentile, and their
    ratio. There is no ratio where a gate is red.
    """
    requests = plan.mix.draw(plan.requests, plan.seed)
    for request in {_shape(request): request for request in requests}.values():
        engine.warmup(width=request.width, height=request.height)
    load.closed_loop(Rows(engine), requests[: 2 * plan.clients], plan.clients)  # first use of every row count

    def run(front: str, what: str, drive: Callable[[Any, load.Progress], list[Served]]) -> list[Served]:
        server = Rows(engine) if front == "rows" else Static(engine, _cap(engine), plan.wait_s)
        try:
            return drive(server, lambda done: notice(f"{what}, {front}", done, len(requests)))
        finally:
            server.close()

    closed: dict[str, dict[str, Any]] = {}
    seen: dict[str, dict[int, Served]] = {front: {} for front in FRONTS}
    for front in FRONTS:
        served = run(front, "closed loop", lambda s, p: load.closed_loop(s, requests, plan.clients, p))
        closed[front] = load.summary(served)
        seen[front] |= {one.number: one for one in served}
    rates = plan.rates or tuple(share * closed["rows"]["images_per_s"] for share in LOADS)
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
            points.append({"front": front, "rate": rate, **_average(each), "rounds": each})
            seen[front] |= {one.number: one for one in found}
    gates, solo_s = check(engine, seen, plan)
    slo_s = plan.slo_s or plan.slo * solo_s
    equal = equal_p95(points, slo_s, all(gate["green"] for gate in gates.values()))
    return {"closed": closed, "open": points, "gates": gates, "solo_s": solo_s, "equal_p95": equal,
            "timelines": timelines, "timeline_rate": rates[-1]}  # fmt: skip


def check(
    engine: Engine, seen: Mapping[str, Mapping[int, Served]], plan: Plan
) -> tuple[dict[str, dict[str, Any]], float]:
    """Gate of every front: the largest difference of checked requests from their solo runs; and the mean solo latency.

    The difference is the relative L2 of final latents; the largest of picture values (0..1) is given beside it. Images
    are those of the last run that served the request.
    """
    numbers = sorted(seen["rows"])[:: max(1, len(seen["rows"]) // plan.checked)][: plan.checked]
    alone = {number: engine.generate(seen["rows"][number].request) for number in numbers}
    solo_s = sum(result.timings["total"] for result in alone.values()) / len(alone)
    allowed = TOLERANCE[str(engine.components.config.dtype).removeprefix("torch.")]
    gates = {}
    for front, served in seen.items():
        errors, pictures = [], []
        for number in numbers:
            found, truth = served[number].result, alone[number]
            errors.append(float((found.latents - truth.latents).norm() / truth.latents.norm()))
            pictures.append(float((found.images - truth.images).abs().max()))
        error = math.nan if any(map(math.isnan, errors)) else max(errors)
        gates[front] = {"green": error <= allowed, "error": error, "allowed": allowed, "checked": len(numbers),
                        "picture_error": max(pictures)}  # fmt: skip
    return gates, solo_s


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


def _shape(request: Any) -> tuple[int | None, int | None]:
    return request.width, request.height


def records(
    found: Mapping[str, Any], plan: Plan, engine: Engine, machine: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """What `measure` found as records: one per front and rate, one per closed loop, and one of the comparison."""
    config = engine.components.config
    conditions = {"model": engine.components.name, "mix": plan.mix.name, "dtype": str(config.dtype)[6:],
                  "max_rows": config.max_rows, "wait_s": plan.wait_s, "requests": plan.requests, "rounds": plan.rounds,
                  "clients": plan.clients, "seed": plan.seed}  # fmt: skip

    def record(kind: str, name: str, value: float | None, unit: str, **facts: Any) -> dict[str, Any]:
        return harness.measurement(kind, f"{plan.mix.name} {name}", value, unit, machine, conditions, **facts)

    for front, facts in found["closed"].items():
        yield record("throughput closed", front, facts["images_per_s"], "images/s", front=front, **facts,
                     gate=found["gates"][front])  # fmt: skip
    for point in found["open"]:
        yield record("throughput open", f"{point['rate']:.3g}/s {point['front']}", point["p95_s"], "s (p95)", **point,
                     gate=found["gates"][point["front"]])  # fmt: skip
    equal = found["equal_p95"]
    facts = {k: found[k] for k in ("equal_p95", "gates", "solo_s", "timelines", "timeline_rate")}
    yield record("throughput", "rows over static at equal p95", equal["ratio"], "x", **facts)


def table(found: Mapping[str, Any]) -> Iterator[str]:
    """What `measure` found, for a terminal."""
    for front, facts in found["closed"].items():
        yield (f"closed loop  {front:<7} {facts['images_per_s']:8.3g} images/s   p50 {facts['p50_s']:.3f} s   "
               f"p95 {facts['p95_s']:.3f} s")  # fmt: skip
    for point in found["open"]:
        yield (f"{point['rate']:8.3g}/s   {point['front']:<7} {point['images_per_s']:8.3g} images/s   "
               f"p50 {point['p50_s']:.3f} s   p95 {point['p95_s']:.3f} s")  # fmt: skip
    for front, gate in found["gates"].items():
        verdict = "green" if gate["green"] else "RED"
        yield (f"gate {verdict}: {front}, {gate['checked']} requests against their solo runs: {gate['error']:.2g}, "
               f"allowed {gate['allowed']:.2g}")  # fmt: skip
    yield say(found["equal_p95"])


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
