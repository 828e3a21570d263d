"""The performance section of README.md, written from recorded results alone: `python -m stepfuse.benchmarks.readme`.

Reads `benchmarks/results/<device>/*.jsonl`, whose lines have the one form of `harness.measurement`, and rewrites what
stands between two markers; `--check` only says whether that would change anything. A test compares the two, so the
numbers in the README cannot be written by hand. Of several records of one name on one device the last counts. The
records hold every condition; the tables show size and dtype only.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import gpu_windows, harness

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN = "<!-- performance: written by python -m stepfuse.benchmarks.readme from benchmarks/results; do not edit -->"
END = "<!-- performance: end -->"
NEEDED = ("kind", "name", "time", "fingerprint")
KINDS = {
    "compare": "against other libraries",
    "latency": "prompt to pixels",
    "startup": "start-up",
    "throughput closed": "eight waiting clients",
    "throughput": "many requests",
    "cascade": "requests through a cascade",
    "runners": "one guided update, by runner",
    "rows-static": "many requests",
    "update-ablation": "one guided update, our kernels in place",
    "vae-ablation": "one decoding, our kernels in place",
    "unet-own": "one U-Net evaluation, ours",
    "unet": "one U-Net evaluation, diffusers",
    "vae": "one decoding, diffusers",
    "kernels": "one op",
}
"""Kinds of records that the section shows, in this order."""

Record = Mapping[str, Any]


def main(arguments: list[str] | None = None) -> int:
    """Rewrite the section; with --check 1 where it is not what the results say."""
    parser = argparse.ArgumentParser(prog="readme", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; 1 when the section is not current")
    parser.add_argument("--results", type=Path, default=harness.RESULTS)
    parser.add_argument("--readme", type=Path, default=README)
    options = parser.parse_args(arguments)
    before = options.readme.read_text()
    after = rewritten(before, section(results(options.results)))
    if options.check:
        print("current" if before == after else f"{options.readme} is not what {options.results} says: run without it")
        return int(before != after)
    options.readme.write_text(after)
    return 0


def rewritten(text: str, body: str) -> str:
    """`text` with `body` between the markers. Raises ValueError where it does not have each of them once, in order."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"expected the lines {BEGIN!r} and {END!r}, once each and in this order")
    head, _, rest = text.partition(BEGIN)
    return f"{head}{BEGIN}\n\n{body}\n{END}{rest.partition(END)[2]}"


def results(folder: Path) -> list[Record]:
    """The records of every file below `folder`, failed ones left out, the last of each device, kind and name.

    Raises ValueError for a line that is no record: a number without its machine and its time says nothing.
    """
    found: dict[tuple[str, str, str], Record] = {}
    for file in sorted(folder.glob("*/*.jsonl")):
        for number, line in enumerate(file.read_text().splitlines(), 1):
            record = json.loads(line)
            if missing := [key for key in NEEDED if not record.get(key)]:
                raise ValueError(
                    f"{file}:{number}: a record without {', '.join(missing)}; every line of benchmarks/results is a "
                    "record of harness.measurement, with the fingerprint of its machine"
                )
            key = harness.where(record["fingerprint"]), record["kind"], record["name"]
            if "error" not in record and (key not in found or record["time"] >= found[key]["time"]):
                found[key] = record
    return list(found.values())


def section(records: Sequence[Record]) -> str:
    """The section's Markdown: GPUs first, then CPUs, one table a device; what was never measured is said."""
    shown = [r for r in records if r["kind"] in KINDS and not r.get("conditions", {}).get("quick")]
    gpus = {harness.where(r["fingerprint"]): r for r in shown if r["fingerprint"].get("gpu")}
    cpus = {harness.where(r["fingerprint"]): r for r in shown if not r["fingerprint"].get("gpu")}
    lines = [] if gpus else [*_not_measured()]
    for name in (*gpus, *cpus):
        own = [r for r in shown if harness.where(r["fingerprint"]) == name]
        lines += [*_table(name, own), ""]
    return "\n".join(lines)


def _not_measured() -> Iterator[str]:
    yield "**Not measured on a GPU yet:** no number of this project says how fast it is on one. To measure, run"
    yield f"`{gpu_windows.command('A')}`; [docs/gpu_windows.md](docs/gpu_windows.md) has"
    yield "the whole plan for half an hour on a machine."
    yield ""


def _table(device: str, records: Sequence[Record]) -> Iterator[str]:
    last = max(records, key=lambda record: record["time"])
    machine = last["fingerprint"]
    packages = ", ".join(f"{name} {machine['packages'][name]}" for name in ("torch", "triton", "diffusers")
                         if name in machine["packages"])  # fmt: skip
    driver = f", driver {machine['driver']}" if machine.get("driver") else ""
    commits = ", ".join(dict.fromkeys(r["fingerprint"]["commit"] for r in sorted(records, key=lambda r: r["time"])))
    yield f"**{device}**, {packages}{driver}, measured at {commits}, last on {last['time'][:10]}:"
    yield ""
    yield "| what | case | size | dtype | result | comparison |"
    yield "|---|---|---|---|---|---|"
    for kind, about in KINDS.items():
        for record in sorted((r for r in records if r["kind"] == kind), key=lambda r: r["name"]):
            if record.get("value") is not None:
                result = f"{record['value']:.4g} {record['unit']}"
                cells = (about, record["name"], _size(record), _dtype(record), result, _comparison(record))
                yield f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _size(record: Record) -> str:
    """Pixels, or latents where that is what was said; empty where the name says it or there is none."""
    said = record.get("conditions", {}) | {name: record[name] for name in ("width", "height") if record.get(name)}
    if said.get("width") and said.get("height"):
        return f"{said['width']} x {said['height']}"
    return "{1} x {0} latents".format(*said["latent"]) if said.get("latent") else ""


def _dtype(record: Record) -> str:
    return str(record.get("conditions", {}).get("dtype", ""))


def _comparison(record: Record) -> str:
    """What may be said against others: never a ratio where a gate is red."""
    variants = record.get("variants", {})
    if record["kind"] == "compare":
        from .comparison import ratio

        rivals = {name: facts for name, facts in variants.items() if "gate" in facts}
        if not rivals:
            return ""
        fastest = min(rivals, key=lambda name: rivals[name]["median_s"])
        return f"fastest other: {fastest}, {ratio(record, fastest)}"
    if record["kind"] == "cascade":
        return ", ".join(_against(rival, claim) for rival, claim in record["speedup"].items())
    if record["kind"] == "runners":
        return _against(record["beside"], record["speedup"])
    if record["kind"].endswith("ablation"):
        return _against("all references", variants["auto"]["speedup"])
    if record["kind"] == "kernels":
        claims = variants.get(record["fastest"], {}).get("speedup", {}).get("warm", {})
        return ", ".join([record["fastest"], *(_against(rival, claim) for rival, claim in claims.items())])
    if record["kind"] == "throughput closed":
        return f"p95 {record['p95_s']:.3g} s"
    if record["kind"] == "latency":
        return f"{record['latency']['it_per_s']:.3g} updates/s, {record['latency']['images_per_s']:.3g} images/s"
    return ""


def _against(rival: str, claim: float | str | None) -> str:
    """A ratio of times in words; none where the result is wrong."""
    if claim is None:
        return "no ratio: the error is too large"
    return f"{claim} to {rival}" if isinstance(claim, str) else f"{claim:.2f}x {rival}"


if __name__ == "__main__":
    raise SystemExit(main())
