"""Records of the kernel benchmark as a picture: how near to its roof every variant comes, op by op."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .kernel_report import measurements

Record = Mapping[str, Any]
COSTLIEST = 6
"""Shapes of an op that are drawn; the tables hold all."""
ROW_INCHES = 0.24  # height of one bar


def draw(records: Sequence[Record], path: Path) -> None:
    """Save a picture: per op, the costliest shapes with the time and the share of the roof of each variant, warm.

    The roof is the copy of the same bytes, or the sustained matrix product where an op counts operations (attention).
    A variant whose gate is red has no bar. Raises ImportError where matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            "the picture needs matplotlib: pip install 'stepfuse[bench]', or leave --report out"
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    measured = measurements(records)
    names = list(dict.fromkeys(name for r in measured for name in r["variants"]))
    colors = {name: f"C{index}" for index, name in enumerate(names)}
    drawn = {op: [r for r in measured if r["op"] == op][:COSTLIEST] for op in dict.fromkeys(r["op"] for r in measured)}
    rows = [sum(len(r["variants"]) + 1 for r in own) for own in drawn.values()]
    heights = [ROW_INCHES * (count + 4) for count in rows]
    figure, axes = pyplot.subplots(
        len(drawn), 1, figsize=(11, sum(heights) + 1), height_ratios=heights, squeeze=False, layout="constrained"
    )
    figure.suptitle(_title(records), fontsize=11, x=0.01, ha="left")
    for axis, (op, own) in zip(axes[:, 0], drawn.items(), strict=True):
        _panel(axis, op, own, colors)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _title(records: Sequence[Record]) -> str:
    machine = next((r["fingerprint"] for r in records if "fingerprint" in r), {})
    where = machine.get("gpu") or f"{machine.get('processor', 'CPU')} (a CPU: this shows that the benchmark runs)"
    torch = machine.get("packages", {}).get("torch", "?")
    return f"Percent of the roof, warm: longer is faster. At each bar, the median time.\n{where}, torch {torch}"


def _panel(axis: Any, op: str, own: Sequence[Record], colors: Mapping[str, str]) -> None:
    """Horizontal bars, one group a shape, from the top; a line at the roof."""
    ticks, labels, y, most = [], [], 0.0, 100.0
    for record in own:
        top = y
        for name, facts in record["variants"].items():
            green = facts["gate"]["green"]
            share = _of_roof(facts["warm"]) if green else 0.0
            axis.barh(y, share, 0.85, color=colors[name])
            text = f"{name}  {_time(facts['warm']['us'])}" if green else f"{name}  wrong result"
            axis.text(share, y, f" {text}", va="center", fontsize=8, color="black" if green else "red")
            most, y = max(most, share), y + 1
        ticks.append((top + y - 1) / 2)
        count = f"x{record['count']}" if record["count"] else "not in the graph"
        labels.append("\n".join([f"{record['model']}, {count}", *textwrap.wrap(record["shape"], 38)[:2]]))
        y += 1
    axis.set_ylim(y - 1.2, -0.8)
    axis.set_xlim(0, 1.3 * most)
    axis.axvline(100, color="gray", linewidth=0.8, linestyle="--")
    axis.set_yticks(ticks, labels, fontsize=7)
    roof = "sustained matrix product" if own[0]["flops"] else "copy of the same bytes"
    axis.set_title(f"{op}, % of {roof}", loc="left", fontsize=10, fontweight="bold")
    axis.tick_params(axis="x", labelsize=7)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _of_roof(facts: Record) -> float:
    return facts.get("percent_of_product", facts["percent_of_copy"])


def _time(microseconds: float) -> str:
    return f"{microseconds:.3g} us" if microseconds < 1000 else f"{microseconds / 1000:.3g} ms"
