"""Records of the kernel benchmark as Markdown tables and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]
NOT_A_GPU = (
    "**Measured on a CPU.** Triton kernels do not run there: this proves that the benchmark works, "
    "and says nothing about any GPU."
)


def markdown(records: Sequence[Record]) -> str:
    """The whole report: conditions, ceilings, one table per op and shape.

    Raises ValueError where the records hold no fingerprint or no measured shape.
    """
    start = next((r for r in records if "fingerprint" in r), None)
    measured = measurements(records)
    if start is None or not measured:
        raise ValueError("expected the records of a kernel benchmark: a fingerprint and at least one measured shape")
    lines = ["# Kernel benchmark", "", *_conditions(start, records)]
    for op in dict.fromkeys(r["op"] for r in measured):
        lines += ["", f"## {op}"]
        for record in (r for r in measured if r["op"] == op):
            lines += ["", *_section(record)]
    failed = [r for r in records if "error" in r and "op" in r]
    if failed:
        lines += ["", "## Not measured", ""]
        lines += [f"* {r['op']} {r['model']} {r['shape']}: {r['error']}" for r in failed]
    return "\n".join(lines) + "\n"


def measurements(records: Sequence[Record]) -> list[Record]:
    """The records of measured shapes."""
    return [r for r in records if "variants" in r]


def _conditions(start: Record, records: Sequence[Record]) -> list[str]:
    machine = start["fingerprint"]
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    lines = [f"{machine.get('gpu') or machine['processor']}; {packages}; commit {machine['commit']}; {start['time']}."]
    if machine.get("gpu"):
        lines[0] += f" Driver {machine['driver']}, CUDA {machine['cuda']}, power limit {machine['power_limit_w']} W."
    else:
        lines += ["", NOT_A_GPU]
    product = next((r["product"] for r in records if "product" in r), None)
    if product:
        lines += ["", f"Sustained matrix product: {product['tflops']:.4g} TFLOP/s over {product['seconds']:.1f} s."]
    return [
        *lines,
        "",
        "Times are medians [10th, 90th percentile] in microseconds, variants interleaved (A B B A). Warm: the input",
        "was just used; cold: buffers rotate through three times the L2 cache. Copy: as many bytes, same cache state.",
        'Ratios are rival\'s time over own, warm; "equal" is less than twice the A/A spread; a red gate gets no ratio.',
    ]


def _section(record: Record) -> list[str]:
    spread = ", ".join(f"{state} {100 * value:.2g} %" for state, value in record["a_a_spread"].items())
    copy = ", ".join(f"{state} {facts['us']:.3g} us" for state, facts in record["copy"].items())
    calls = f"{record['count']} calls" if record["count"] else "not called by the graph"
    lines = [
        f"### {record['model']}: {record['shape']}",
        "",
        f"{calls}, {record['dtype']}. Bytes: {record['accounting']}. Copy of the same bytes: {copy}. A/A: {spread}.",
        "",
        "| variant | error / allowed | warm us | cold us | GB/s | % of copy | TFLOP/s | % of product | vs eager | "
        "vs compiled |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_row(name, facts) for name, facts in record["variants"].items()]
    if record["refused"]:
        lines += ["", "Did not run: " + "; ".join(f"{name}: {why}" for name, why in record["refused"].items()) + "."]
    return lines


def _row(name: str, facts: Record) -> str:
    warm, cold, gate = facts["warm"], facts.get("cold"), facts["gate"]
    verdict = f"{gate['error']:.2g} / {gate['allowed']:.2g}" + ("" if gate["green"] else " **RED**")
    claims = facts["speedup"]["warm"]
    cells = [
        name,
        verdict,
        _time(warm),
        _time(cold) if cold else "-",
        f"{warm['gb_per_s']:.4g}",
        f"{warm['percent_of_copy']:.0f}",
        f"{warm['tflops']:.4g}" if "tflops" in warm else "-",
        f"{warm['percent_of_product']:.0f}" if "percent_of_product" in warm else "-",
        _claim(claims.get("reference")),
        _claim(claims.get("compiled")),
    ]
    return "| " + " | ".join(cells) + " |"


def _time(facts: Record) -> str:
    return f"{facts['us']:.4g} [{1e6 * facts['p10_s']:.4g}, {1e6 * facts['p90_s']:.4g}]"


def _claim(value: float | str | None) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else f"{value:.2f}x"
