"""The one entry for work on a GPU machine: `python -m stepfuse.benchmarks.gpu_suite --out DIR [--resume]`.

Parts run in processes of their own with a time box each, the most valuable first; every record is appended as soon as
it is measured, and `DIR/bundle.tar` is rewritten after each part, so whatever ends the run leaves what was measured.
`--resume` (with an earlier bundle or folder) measures only what is missing. `--merge bundle.tar` spreads a bundle into
`benchmarks/results/<device>/` and `kernels/<op>/configs/`. `--device cpu --tiny` runs every line on small shapes.
`--plan` prints how thirty minutes are best spent, and `--call A` runs a call of that plan (gpu_windows.py).
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from . import gpu_windows, harness

ROOT = Path(__file__).resolve().parent.parent
HEADLINES = {"ms": "ms", "p50_s": "s", "us": "us"}  # a record's headline number and its unit
GRACE = 15.0  # seconds beyond its box in which a part may still finish the measurement at hand
REPEATABLE = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # deterministic engines refuse to start without it


@dataclass(frozen=True)
class Part:
    """One part: a module of gpu_parts with `run(session)`, its time box in seconds, and variables of its process."""

    name: str
    module: str
    seconds: float
    about: str
    environment: Mapping[str, str] = field(default_factory=dict)


PARTS = (
    Part("ceilings", "ceilings", 90, "what the device can do: products, copies, fp8"),
    Part("launches", "launches", 40, "what a launch costs"),
    Part("attention", "attentions", 120, "attention by backend at the models' shapes"),
    Part("gemm", "gemms", 120, "matrix products at the models' shapes"),
    Part("conv", "convs", 120, "convolutions at the models' shapes"),
    Part("unet", "unets", 480, "diffusers U-Net baselines: eager, graph, cuDNN attention, compiled"),
    Part("unet-own", "own_unets", 180, "our own U-Net graphs, the same evaluations"),
    Part("tuning", "tuning", 420, "implementation and launch configuration of every op, written and bundled"),
    Part("kernels", "kernel_ops", 300, "every op against its rivals at the models' shapes"),
    Part("update-ablation", "update_ablation", 300, "our update with one op switched at a time, as a graph"),
    Part("vae-ablation", "vae_ablation", 120, "our decoding with one op switched at a time, as a graph"),
    Part("compare", "comparisons", 300, "an update and a decoding of ours beside the strongest of diffusers"),
    Part("runners", "runners", 240, "one update as the engine makes it: eager, captured, compiled"),
    Part("packages", "packages", 300, "one update by an AOT package, compiled here, beside our own graphs"),
    Part("replays", "replays", 60, "recorded updates in random order against eager, no wait, no new capture"),
    Part(
        "equality", "equalities", 90, "unlike rows against their solo runs; deterministic ones to the bit", REPEATABLE
    ),
    Part("knee", "knees", 180, "t_update(rows) by model and size; guidance in one evaluation or two"),
    Part("rows-static", "loads", 120, "Poisson arrivals: rows against static batching"),
    Part("vae", "vaes", 180, "decoding: dtype, layout, folding, compilation"),
    Part("latency", "latencies", 60, "our engine, end to end, with the built-in model"),
    Part("tests", "gpu_tests", 180, "the GPU tests: every op's contract, tuning, timing"),
    Part("sanitizer", "sanitizer", 100, "three kernels under compute-sanitizer: memcheck, then racecheck"),
    Part("unet-autotune", "unets_autotuned", 270, "SDXL baseline with Inductor's max-autotune"),
)


def main(arguments: list[str] | None = None) -> int:
    """Run, list or merge; 0 when every part that ran came to its end, 1 when one crashed or was killed."""
    parser = argparse.ArgumentParser(
        prog="gpu_suite", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder for records, logs and bundle.tar")
    parser.add_argument("--bundle", type=Path, help="write the bundle here instead of DIR/bundle.tar")
    parser.add_argument("--seconds", type=float, help="for everything (540); parts that do not fit are left")
    parser.add_argument("--parts", help=f"comma-separated, of: {', '.join(p.name for p in PARTS)}")
    parser.add_argument("--call", help="the parts and times of one call of the plan: A, B or C")
    parser.add_argument("--plan", action="store_true", help="print the plan of a thirty-minute window and stop")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="smallest shapes; proves the code, measures nothing")
    parser.add_argument("--resume", type=Path, nargs="?", const=Path(), help="keep what --out, or this bundle, holds")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to unpack for the parts that import diffusers")
    parser.add_argument("--merge", type=Path, metavar="BUNDLE", help="spread a bundle into this checkout and stop")
    parser.add_argument("--into", type=Path, default=ROOT, help="with --merge: the checkout")
    parser.add_argument("--list", action="store_true", help="list the parts and stop")
    options = parser.parse_args(arguments)
    if options.list:
        for part in PARTS:
            print(f"{part.name:16} {part.seconds:4.0f} s  {part.about}")
        return 0
    if options.plan:
        print(gpu_windows.plan({part.name: part.about for part in PARTS}), end="")
        return 0
    if options.merge:
        for path in merge(options.merge, options.into):
            print(path)
        return 0
    if options.out is None:
        parser.error("--out DIR is needed: records, logs and bundle.tar go there")
    return run(options, chosen(options, parser))


def chosen(options: argparse.Namespace, parser: argparse.ArgumentParser) -> list[Part]:
    """The parts to run, and `options.seconds` settled: those of --call, or of --parts, or all."""
    if options.call is None:
        options.seconds = options.seconds or 540.0
        return select(options.parts, parser)
    if options.parts:
        parser.error("--call and --parts exclude each other: a call of the plan has its own parts")
    try:
        call = gpu_windows.call(options.call)
    except ValueError as error:
        parser.error(f"--call: {error}")
    options.seconds = options.seconds or call.seconds
    known = {part.name: part for part in PARTS}
    return [replace(known[name], seconds=seconds) for name, seconds in call.parts.items()]


def select(names: str | None, parser: argparse.ArgumentParser) -> list[Part]:
    """The parts named, in the suite's own order; all of them for None."""
    if names is None:
        return list(PARTS)
    wanted = [name.strip() for name in names.split(",")]
    valid = {part.name for part in PARTS}
    unknown = [name for name in wanted if name not in valid]
    if unknown:
        parser.error(f"unknown part {unknown[0]!r}; valid: {', '.join(part.name for part in PARTS)}")
    return [part for part in PARTS if part.name in wanted]


def run(options: argparse.Namespace, parts: list[Part]) -> int:
    """Run `parts` one after the other within `options.seconds`."""
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    records = out / "records.jsonl"
    if options.resume is None:
        records.unlink(missing_ok=True)
    elif options.resume.is_file():
        records.write_bytes(_member(options.resume, "records.jsonl"))
        for (op, name), content in _configurations(options.resume).items():
            target = out / "configs" / op / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
    if options.device.startswith("cuda"):
        install(out / "configs", ROOT / "kernels")
    packages = _unpack(options.wheels) if options.wheels else None
    bundle(out, options.bundle)  # so that there is one, whatever comes
    deadline = time.monotonic() + options.seconds
    finished = {r["part"] for r in harness.read(records) if r.get("key") == "end" and r.get("complete")}
    crashed = []
    for part in parts:
        left = deadline - time.monotonic()
        if part.name in finished:
            print(f"{part.name}: complete in an earlier run")
        elif left < min(10.0, part.seconds):
            print(f"{part.name}: no time left")
        else:
            box = min(part.seconds, left)
            start = time.monotonic()
            outcome = run_part(part, options, box, records, packages)
            made = [r for r in harness.read(records) if r["part"] == part.name]
            failed = sum("error" in r for r in made)
            took = f"{time.monotonic() - start:.0f} s"
            print(f"{part.name}: {outcome}, {len(made)} records, {failed} of them errors, {took}", flush=True)
            if outcome != "ok":
                crashed.append(part.name)
            bundle(out, options.bundle)
    return 1 if crashed else 0


def run_part(part: Part, options: argparse.Namespace, box: float, records: Path, packages: Path | None) -> str:
    """Run one part in a process of its own: "ok", "exit N" or "killed after N s"; its output goes to a log file."""
    command = ["env", *(f"{name}={value}" for name, value in part.environment.items())]
    command += [sys.executable, "-m", f"{__package__}.gpu_parts.worker", part.name, "--module", part.module]
    command += ["--records", str(records), "--seconds", str(box), "--device", options.device]
    command += ["--tiny"] if options.tiny else []
    command += ["--packages", str(packages)] if packages else []
    log = options.out / f"{part.name}.log"
    with log.open("ab") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, process_group=0
        )
        try:
            code = process.wait(timeout=box + GRACE)
        except subprocess.TimeoutExpired:
            harness.append(records, {"part": part.name, "key": "killed", "time": harness.now(), "error": "time box"})
            return f"killed after {box + GRACE:.0f} s"
        finally:  # what the part started must not run beside the next one
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if code != 0:
        lines = log.read_text(errors="replace").strip().splitlines()
        error = lines[-1][:400] if lines else "no output"
        harness.append(records, {"part": part.name, "key": "crashed", "time": harness.now(), "error": error})
        return f"exit {code}: {error}"
    return "ok"


def install(folder: Path, kernels: Path) -> list[Path]:
    """Copy configs/<op>/X of an earlier run to <op>/configs/X below `kernels`, for all parts to run with.

    Returns the paths written.
    """
    written = []
    for file in sorted(folder.glob("*/*.json")):
        target = kernels / file.parent.name / "configs" / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
        written.append(target)
    return written


def bundle(out: Path, target: Path | None = None) -> Path:
    """Write records, logs and tuned configurations of `out` to `target` (bundle.tar in `out`), whole or not at all."""
    target = target or out / "bundle.tar"
    partial = target.with_name(f"{target.name}.partial")
    with tarfile.open(partial, "w") as tar:
        for path in sorted((*out.glob("*.jsonl"), *out.glob("*.log"), *out.glob("configs/*/*.json"))):
            tar.add(path, arcname=path.relative_to(out).as_posix())
    partial.replace(target)
    return target


def merge(archive: Path, into: Path) -> list[Path]:
    """Spread a bundle: records to benchmarks/results/<device>/<part>.jsonl, configs/<op>/X to kernels/<op>/configs/X.

    Records already there are not written twice, failed ones are left out, and so are tiny ones: they measure nothing.
    Returns the paths written. Raises ValueError for a configuration of an op that the checkout does not have.
    """
    written: list[Path] = []
    text = _member(archive, "records.jsonl").decode()
    machine: dict[str, Any] = {}
    tiny = False
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # the last line of a killed process
        if record["key"] == "start":
            machine, tiny = record["fingerprint"], bool(record["tiny"])
        if tiny or "error" in record:
            continue
        path = into / "benchmarks" / "results" / harness.device_slug(machine) / f"{record['part']}.jsonl"
        record = formed(record, machine)
        if record not in harness.read(path):
            harness.append(path, record)
            if path not in written:
                written.append(path)
    for (op, name), content in _configurations(archive).items():
        folder = into / "kernels" / op
        if not folder.is_dir():
            raise ValueError(f"configuration of op {op!r}, expected one of the folders in {into / 'kernels'}")
        path = folder / "configs" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        written.append(path)
    return written


def formed(record: Mapping[str, Any], machine: Mapping[str, Any]) -> dict[str, Any]:
    """A part's record in the form of `harness.measurement`: kind, name, headline value, and the machine it is of."""
    facts = {name: value for name, value in record.items() if name not in ("part", "key", "fingerprint")}
    source = facts.get("variants", {}).get("auto", facts) if record["part"].endswith("ablation") else facts
    found = next(((source[name], unit) for name, unit in HEADLINES.items() if name in source), (None, ""))
    found = facts.pop("value", found[0]), facts.pop("unit", found[1])  # a part that has records of its own says them
    made = harness.measurement(record["part"], record["key"], *found, machine, facts.pop("conditions", {}), **facts)
    if record["part"] == "latency" and "p50_s" in facts:
        made["latency"] = facts
    return made


def _configurations(archive: Path) -> dict[tuple[str, str], bytes]:
    """The tuned configurations of a bundle: (op, file name) -> content."""
    found: dict[tuple[str, str], bytes] = {}
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            match = re.fullmatch(r"configs/(\w+)/([\w.-]+\.json)", member.name)
            content = tar.extractfile(member) if match and member.isfile() else None
            if match and content:
                found[match[1], match[2]] = content.read()
    return found


def _member(archive: Path, name: str) -> bytes:
    with tarfile.open(archive) as tar:
        try:
            content = tar.extractfile(name)
        except KeyError:
            content = None
        if content is None:
            raise ValueError(f"{archive} holds no {name}; expected a bundle.tar of this suite")
        return content.read()


def _unpack(wheels: Path) -> Path:
    """Unpack every wheel of a folder into one import folder (extension modules cannot be imported from archives)."""
    files = sorted(wheels.glob("*.whl"))
    if not files:
        raise ValueError(f"no wheels in {wheels}; expected files named *.whl")
    target = Path(tempfile.mkdtemp(prefix="stepfuse-packages-"))
    for file in files:
        with zipfile.ZipFile(io.BytesIO(file.read_bytes())) as archive:
            archive.extractall(target)
    return target


if __name__ == "__main__":
    raise SystemExit(main())
