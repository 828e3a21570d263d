"""Saved records as one Markdown page; `figures.py` draws the pictures beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..engine.errors import RequestError
from .cascades import say as say_cascade
from .comparison import configuration, ratio
from .latency import knee
from .throughput import say

Record = Mapping[str, Any]


def write(records: Sequence[Record], output: Path) -> list[Path]:
    """Write `output` and the pictures its records allow, NAME-<picture>.png; returns what was written.

    Raises RequestError where no record is one of `stepfuse bench` or matplotlib is missing.
    """
    from . import figures

    sections = {kind: [r for r in records if str(r.get("kind", "")).split(" ")[0] == kind] for kind in SECTIONS}
    if not any(sections.values()):
        raise RequestError("none of the records comes from `stepfuse bench`; give files written with --save")
    lines, written = ["# Measurements", ""], []
    output.parent.mkdir(parents=True, exist_ok=True)
    for kind, made in sections.items():
        if not made:
            continue
        lines += ["", *SECTIONS[kind](made)]
        for name, draw in figures.PICTURES.get(kind, {}).items():
            path = output.with_name(f"{output.stem}-{name}.png")
            if draw(made, path):
                lines += ["", f"![{name.replace('-', ' ')}]({path.name})"]
                written.append(path)
    output.write_text("\n".join(lines) + "\n")
    return [output, *written]


def latency(records: Sequence[Record]) -> Iterator[str]:
    """Latency by images in one batch."""
    yield from _title("Latency", records)
    yield "One request at a time; seconds. The phases are medians."
    yield ""
    columns = ("model", "n", "p50", "p90", "p99", "encode", "denoise", "decode", "ms/update", "it/s", "images/s", "GB",
               "calls/update")  # fmt: skip
    yield _row(columns)
    yield "|" + len(columns) * "---|"
    for record in records:
        f = record["latency"]
        memory, calls = f.get("peak_memory", {}).get("gb"), f.get("launches")
        numbers = [f["p50_s"], f["p90_s"], f["p99_s"], *(f["phases_s"][p] for p in ("encode", "denoise", "decode")),
                   1e3 * f["t_update_s"], f["it_per_s"], f["images_per_s"]]  # fmt: skip
        cells = [f["model"], f["n"], *(f"{number:.3g}" for number in numbers),
                 "?" if memory is None else f"{memory:.2f}",
                 f"{calls['per_update']:.0f} {calls['unit']}" if calls else "?"]  # fmt: skip
        yield _row(cells)
    for name in dict.fromkeys(r["latency"]["model"] for r in records):
        rates = {r["latency"]["n"]: r["latency"]["n"] * r["latency"]["it_per_s"] for r in records
                 if r["latency"]["model"] == name}  # fmt: skip
        if len(rates) > 1:
            yield f"\nKnee of {name}: {knee(rates)} images reach 90 % of the highest rate while denoising."
    for record in records:
        if roof := record["latency"].get("roof"):
            yield (f"\nn={record['latency']['n']}: {roof['tflops']:.3g} TFLOP/s while denoising, "
                   f"{100 * roof['fraction']:.0f} % of a matrix product sustained in the same run "
                   f"({roof['product']['tflops']:.3g} TFLOP/s).")  # fmt: skip


def startup(records: Sequence[Record]) -> Iterator[str]:
    """Start-up."""
    yield from _title("Start-up", records)
    yield "From the start of a process to a picture on disk."
    yield ""
    yield from (f"* {r['name']}: {r['value']:.2f} s (first time {r['first_s']:.2f} s)" for r in records)


def throughput(records: Sequence[Record]) -> Iterator[str]:
    """Rows against static batching."""
    yield from _title("Rows against static batching", records)
    c = records[0]["conditions"]
    yield f"One engine, the same requests and arrival times, interleaved; at most {c['max_rows']} images in a batch."
    yield f"A static batch holds requests of equal parameters and waits {1e3 * c['wait_s']:.0f} ms for more."
    yield ""
    yield "| mix | load | front | images/s | p50 s | p95 s | gate |"
    yield "|---|---|---|---|---|---|---|"
    for r in records:
        if "front" in r:
            load = "closed loop" if r["kind"].endswith("closed") else f"{r['rate']:.3g}/s"
            gate = "green" if r["gate"]["green"] else "**RED**"
            numbers = [f"{r[name]:.3g}" for name in ("images_per_s", "p50_s", "p95_s")]
            yield _row([r["conditions"]["mix"], load, r["front"], *numbers, f"{gate} {r['gate']['error']:.1e}"])
    yield ""
    yield from (f"{r['conditions']['mix']}: {say(r['equal_p95'])}." for r in records if "equal_p95" in r)


def compare(records: Sequence[Record]) -> Iterator[str]:
    """Ours and diffusers."""
    yield from _title("Against diffusers", records)
    yield "One process, interleaved, the same weights and inputs. Errors are relative, against one precision up."
    for r in records:
        c = ", ".join(f"{name} {value}" for name, value in r["conditions"].items())
        yield f'\n### {r["name"]}\n\n{c}. A/A spread {100 * r["a_a_spread"]:.2g} %: less than twice that is "equal".\n'
        yield "| variant | ms | p10 | p90 | error | its time over ours |"
        yield "|---|---|---|---|---|---|"
        for name, f in r["variants"].items():
            times = [f"{1e3 * f[key]:.4g}" for key in ("median_s", "p10_s", "p90_s")]
            yield _row([name, *times, f"{f['error']:.1e}", ratio(r, name)])
        yield ""
        yield from (f"* {name}: {configuration(f['configuration'])}" for name, f in r["variants"].items())
        yield from (f"* did not run: {name}: {why}" for name, why in r["refused"].items())


def cascade(records: Sequence[Record]) -> Iterator[str]:
    """Cascades, re-batched and not."""
    yield from _title("Cascades", records)
    yield "One engine, the same requests, all there from the start, interleaved."
    for r in records:
        c = ", ".join(f"{name} {value}" for name, value in r["conditions"].items())
        yield f"\n### {r['name']}\n\n{c}. A/A spread {100 * r['a_a_spread']:.2g} %.\n"
        yield "| way | images/s | median s | p10 | p90 | mean end s | gate |"
        yield "|---|---|---|---|---|---|---|"
        for name, f in r["variants"].items():
            numbers = [f"{f[key]:.3g}" for key in ("images_per_s", "median_s", "p10_s", "p90_s", "mean_end_s")]
            gate = f"{'green' if f['gate']['green'] else '**RED**'} {f['gate']['error']:.1e}"
            yield _row([name, *numbers, gate])
        yield ""
        yield from (f"* re-batched over {rival}: {say_cascade(r, rival)}" for rival in r["speedup"])


def profile(records: Sequence[Record]) -> Iterator[str]:
    """Where the time goes."""
    yield from _title("Where the time goes", records)
    for r in records:
        yield f"{r['name']}: shares of {r['what']}."
        yield ""
        yield "| kind | share | calls |"
        yield "|---|---|---|"
        yield from (_row([k, f"{100 * f['share']:.1f} %", f["calls"]]) for k, f in r["kinds"].items())


SECTIONS: dict[str, Callable[[Sequence[Record]], Iterator[str]]] = {
    "latency": latency,
    "startup": startup,
    "throughput": throughput,
    "compare": compare,
    "cascade": cascade,
    "profile": profile,
}


def _title(text: str, records: Sequence[Record]) -> Iterator[str]:
    yield f"## {text}"
    yield ""
    for machine in {r["fingerprint"]["id"]: r["fingerprint"] for r in records}.values():
        packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
        where = machine.get("gpu") or f"**CPU**: {machine['processor']}, {machine['threads']} threads"
        driver = f"; driver {machine['driver']}, CUDA {machine['cuda']}" if machine.get("gpu") else ""
        yield f"{where}{driver}; {packages}; commit {machine['commit']}; {records[0]['time'][:10]}."
        yield ""


def _row(cells: Sequence[Any]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"
