"""The pictures of a report. Each draws what its records allow, and says whether there was anything to draw."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..engine.errors import RequestError
from .latency import knee

Record = Mapping[str, Any]
PHASES = {"encode": "C4", "denoise": "C0", "decode": "C2", "rest": "0.7"}
FRONTS = {"rows": "C0", "static": "C1"}


def latency_bars(records: Sequence[Record], path: Path) -> bool:
    """Median seconds per request by images in the batch, split into phases, with the 90th percentile."""
    facts = [r["latency"] for r in records]
    figure, axis = _canvas(records, 0.7 * len(facts) + 2.4)
    places = range(len(facts))
    left = [0.0] * len(facts)
    for phase, colour in PHASES.items():
        widths = [1e3 * max(0.0, f["phases_s"].get(phase, 0.0)) for f in facts]
        axis.barh(places, widths, left=left, color=colour, label=phase, height=0.6)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for place, f in zip(places, facts, strict=True):
        axis.plot([1e3 * f["p90_s"]], [place], "k|", markersize=14, label="p90, whole" if place == 0 else None)
        label = f"  {1e3 * f['p50_s']:.3g} ms, {f['images_per_s']:.3g} images/s"
        axis.text(max(left[place], 1e3 * f["p90_s"]), place, label, va="center", fontsize=8)
    axis.set_yticks(places, [f"{f['model']}, n={f['n']}" for f in facts])
    axis.invert_yaxis()
    axis.set_xlim(0, 1.35 * max(*left, *(1e3 * f["p90_s"] for f in facts)))
    axis.set_xlabel("milliseconds per request")
    axis.set_title("Latency by phase (medians)", loc="left")
    axis.legend(fontsize=8, ncols=5, loc="lower right", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return _save(figure, path)


def knee_curve(records: Sequence[Record], path: Path) -> bool:
    """Seconds per update and images times updates per second over the images in the batch, with the knee."""
    curves: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        curves.setdefault(record["latency"]["model"], []).append(record["latency"])
    curves = {model: sorted(found, key=lambda f: f["n"]) for model, found in curves.items() if len(found) > 1}
    if not curves:
        return False
    figure, (above, below) = _canvas(records, 5.6, panels=2)
    for index, (model, found) in enumerate(curves.items()):
        counts = [f["n"] for f in found]
        times = [1e3 * f["t_update_s"] for f in found]
        rates = [f["n"] * f["it_per_s"] for f in found]
        above.plot(counts, times, "o-", color=f"C{index}", label=f"{model}, measured")
        one = times[0] / counts[0]
        above.plot(counts, [one * n for n in counts], ":", color="0.6", label="proportional to the images")
        below.plot(counts, rates, "o-", color=f"C{index}")
        best = knee(dict(zip(counts, rates, strict=True)))
        below.axvline(best, color=f"C{index}", linewidth=1, linestyle="--")
        below.annotate(f"knee: {best} ", (best, 0.1 * max(rates)), (-3, 0), textcoords="offset points", ha="right",
                       fontsize=8)  # fmt: skip
    above.set(ylabel="ms per update", title="An update of n images", ylim=(0, None))
    below.set(xlabel="images in the batch", ylabel="image updates per second", ylim=(0, None))
    below.margins(y=0.15)
    for axis in (above, below):
        axis.set_xticks(sorted({f["n"] for found in curves.values() for f in found}))
        axis.grid(alpha=0.3)
    above.legend(fontsize=8)
    return _save(figure, path)


def roofs(records: Sequence[Record], path: Path) -> bool:
    """TFLOP/s while denoising as a fraction of the matrix product sustained in the same run."""
    found = [r["latency"] for r in records if r["latency"].get("roof")]
    if not found:
        return False
    figure, axis = _canvas(records, 0.5 * len(found) + 2.0)
    values = [100 * f["roof"]["fraction"] for f in found]
    axis.barh(range(len(found)), values, color="C0", height=0.6)
    for place, (value, f) in enumerate(zip(values, found, strict=True)):
        axis.text(value, place, f"  {f['roof']['tflops']:.3g} TFLOP/s ({value:.0f} %)", va="center", fontsize=8)
    axis.set_yticks(range(len(found)), [f"{f['model']}, n={f['n']}" for f in found])
    axis.axvline(100, color="0.4", linewidth=1)
    axis.set_xlim(0, 112)
    axis.invert_yaxis()
    product = found[0]["roof"]["product"]
    axis.set(xlabel=f"% of a matrix product sustained for {product['seconds']:.2g} s: {product['tflops']:.3g} TFLOP/s",
             title="Fraction of the roof while denoising")  # fmt: skip
    return _save(figure, path)


def load_curves(records: Sequence[Record], path: Path) -> bool:
    """Median and 95th percentile of latency over the request rate, rows and static batching."""
    points = [r for r in records if r["kind"] == "throughput open"]
    if not points:
        return False
    figure, axis = _canvas(records, 4.2)
    for front, colour in FRONTS.items():
        curve = sorted((r["rate"], r["p50_s"], r["p95_s"]) for r in points if r["front"] == front)
        rates = [rate for rate, _, _ in curve]
        axis.plot(rates, [p95 for _, _, p95 in curve], "o-", color=colour, label=f"{front}, p95")
        axis.plot(rates, [p50 for _, p50, _ in curve], ".--", color=colour, linewidth=1, label=f"{front}, p50")
    for r in (r for r in records if "equal_p95" in r):
        slo = r["equal_p95"]["slo_s"]
        axis.axhline(slo, color="0.4", linewidth=1)
        axis.annotate("compared at this p95", (0.01, slo), (0, 3), xycoords=("axes fraction", "data"),
                      textcoords="offset points", fontsize=8, color="0.3")  # fmt: skip
    mix = points[0]["conditions"]["mix"]
    axis.set(xlabel="requests per second (Poisson)", ylabel="seconds from arrival to images", ylim=(0, None),
             title=f"Latency under load, mix '{mix}'")  # fmt: skip
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return _save(figure, path)


def timelines(records: Sequence[Record], path: Path) -> bool:
    """What the first requests went through at the highest rate: waiting, then running, one line each."""
    found = next((r for r in records if r.get("timelines")), None)
    if found is None:
        return False
    figure, axes = _canvas(records, 5.6, panels=2)
    end = 0.0
    for axis, front in zip(axes, FRONTS, strict=True):
        for place, (arrived, began, ended) in enumerate(found["timelines"][front]):
            axis.hlines(place, arrived, began, color="0.75", linewidth=2.5)
            axis.hlines(place, began, ended, color=FRONTS[front], linewidth=2.5)
            end = max(end, ended)
        axis.set(ylabel="request", yticks=[])
        axis.set_title(f"{front}: grey waits, colour runs", loc="left", fontsize=10)
        axis.invert_yaxis()
    for axis in axes:
        axis.set_xlim(0, 1.02 * end)
        axis.grid(axis="x", alpha=0.3)
    axes[-1].set_xlabel(f"seconds; the same arrivals, {found['timeline_rate']:.3g} requests per second")
    return _save(figure, path)


def cascade_timelines(records: Sequence[Record], path: Path) -> bool:
    """When every request of the last record was updated, and at which stage: a panel a way, a line a request."""
    found = records[-1]
    lines: Mapping[str, Any] = found["timelines"]
    count = len(next(iter(lines.values())))
    figure, axes = _canvas(records[-1:], 0.9 + len(lines) * (0.55 + 0.17 * count), panels=len(lines))
    end = max(stages[-1][-1] for requests in lines.values() for stages in requests)
    for axis, (way, requests) in zip(axes, lines.items(), strict=True):
        for place, stages in enumerate(requests):
            for number, ticks in enumerate(stages):
                colour = f"C{number}"
                axis.hlines(place, ticks[0], ticks[-1], color=colour, linewidth=4, alpha=0.3)
                axis.plot(ticks[:-1], [place] * (len(ticks) - 1), "|", color=colour, markersize=6)
        rate = found["variants"][way]["images_per_s"]
        last = max(stages[-1][-1] for stages in requests)
        axis.axvline(last, color="0.5", linewidth=1, linestyle="--")
        axis.set(ylabel="request", yticks=[], xlim=(0, 1.02 * end), ylim=(count - 0.4, -0.6))
        axis.set_title(f"{way}: {rate:.3g} images/s (median of {found['conditions']['rounds']} runs)", loc="left",
                       fontsize=10)  # fmt: skip
        axis.grid(axis="x", alpha=0.3)
    axes[-1].set_xlabel(f"seconds; cascade {found['conditions']['cascade']}: a tick is an update of a request, blue of "
                        "its first stage, orange of its second")  # fmt: skip
    return _save(figure, path)


def comparisons(records: Sequence[Record], path: Path) -> bool:
    """Median milliseconds of every variant, 10th to 90th percentile; hatched where ours may not be compared with it."""
    figure, axes = _canvas(records, 1.1 + 0.42 * sum(len(r["variants"]) + 1.6 for r in records), panels=len(records),
                           heights=[len(r["variants"]) + 1.2 for r in records])  # fmt: skip
    for axis, record in zip(axes, records, strict=True):
        for place, (name, f) in enumerate(record["variants"].items()):
            median, low, high = (1e3 * f[key] for key in ("median_s", "p10_s", "p90_s"))
            own = name.startswith("stepfuse")
            red = "gate" in f and not f["gate"]["green"]
            axis.barh(place, median, color="C0" if own else "0.75", hatch="///" if red else None, height=0.65)
            axis.plot([low, high], [place, place], "k-", linewidth=1)
            axis.text(max(median, high), place, f"  {median:.4g} ms" + (" (no ratio: errors)" if red else ""),
                      va="center", fontsize=8)  # fmt: skip
        axis.set_yticks(range(len(record["variants"])), list(record["variants"]), fontsize=8)
        axis.set_xlim(0, 1.45 * max(1e3 * f["p90_s"] for f in record["variants"].values()))
        axis.invert_yaxis()
        axis.set_title(f"{record['name']}, A/A spread {100 * record['a_a_spread']:.2g} %", loc="left", fontsize=10)
    axes[-1].set_xlabel("milliseconds (median; line: 10th to 90th percentile)")
    return _save(figure, path)


def shares(records: Sequence[Record], path: Path) -> bool:
    """Shares of the time by kind of kernel or operation."""
    figure, axis = _canvas(records, 0.6 * len(records) + 2.0)
    kinds = list(dict.fromkeys(kind for r in records for kind in r["kinds"]))
    for place, record in enumerate(records):
        left = 0.0
        for index, kind in enumerate(kinds):
            share = 100 * record["kinds"].get(kind, {"share": 0.0})["share"]
            axis.barh(place, share, left=left, color=f"C{index}", height=0.6, label=kind if place == 0 else None)
            if share > 4:
                axis.text(left + share / 2, place, f"{share:.0f} %", ha="center", va="center", fontsize=8, color="w")
            left += share
    axis.set_yticks(range(len(records)), [r["name"] for r in records])
    axis.set(xlim=(0, 100), xlabel=f"% of {records[0]['what']}")
    axis.set_title("Where the time goes", loc="left")
    axis.legend(fontsize=8, ncols=len(kinds), loc="lower right", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return _save(figure, path)


PICTURES: dict[str, dict[str, Callable[[Sequence[Record], Path], bool]]] = {
    "latency": {"latency": latency_bars, "knee": knee_curve, "roofs": roofs},
    "throughput": {"load": load_curves, "timeline": timelines},
    "compare": {"compare": comparisons},
    "cascade": {"cascade": cascade_timelines},
    "profile": {"profile": shares},
}


def _canvas(records: Sequence[Record], height: float, panels: int | None = None, heights: Any = None) -> Any:
    """A figure and its axes (one, or a list for `panels`), with the machine below the picture."""
    try:
        import matplotlib
    except ImportError:
        raise RequestError("the pictures need matplotlib: pip install 'stepfuse[bench]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        panels or 1, 1, figsize=(9, height), squeeze=False, layout="constrained", height_ratios=heights
    )
    machine = records[0]["fingerprint"]
    packages = f"torch {machine['packages'].get('torch')}"
    figure.supxlabel(f"{records[0]['device']}, {packages}, {records[0]['time'][:10]}", fontsize=7, color="0.4")
    return figure, (axes[0, 0] if panels is None else list(axes[:, 0]))


def _save(figure: Any, path: Path) -> bool:
    from matplotlib import pyplot

    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True
