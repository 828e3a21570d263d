"""What every measurement shares: the fingerprint of the machine, the log of its clocks, and records in JSON lines."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import platform
import shutil
import statistics
import subprocess
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "numpy", "transformers", "diffusers", "xformers", "onnxruntime", "onnx", "onnxscript",
            "safetensors")  # fmt: skip
CLOCK_FIELDS = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "clocks_event_reasons.active")


def fingerprint(device: str = "cpu") -> dict[str, Any]:
    """What a number depends on: hardware, driver, versions, and the global switches of torch. Imports torch."""
    import torch

    from .. import __version__
    from ..engine import env

    facts: dict[str, Any] = {
        "stepfuse": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "commit": _commit(),
        "device": device,
    }
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "l2_mb": properties.L2_cache_size / 2**20,
            "memory_gb": properties.total_memory / 2**30,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": _nvidia_smi("driver_version"),
            "power_limit_w": _nvidia_smi("power.limit"),
        }
    facts["switches"] = {
        "cudnn.benchmark": torch.backends.cudnn.benchmark,
        "matmul.allow_tf32": torch.backends.cuda.matmul.allow_tf32,
        "cudnn.allow_tf32": torch.backends.cudnn.allow_tf32,
        "bf16_reduced_precision": torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        "cublas_workspace": env.cublas_workspace(),
    }
    facts["id"] = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:12]
    return facts


def device_slug(facts: Mapping[str, Any]) -> str:
    """A file name for the device of a fingerprint: `nvidia-h200`, `cpu`."""
    return str(facts.get("gpu", "cpu")).lower().replace(" ", "-")


def now() -> str:
    """The time, UTC, to the second, in ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def where(facts: Mapping[str, Any]) -> str:
    """The device of a fingerprint in words: the GPU, or the processor and how many of its threads."""
    return facts.get("gpu") or f"{facts['processor']} (CPU, {facts['threads']} threads)"


def measurement(
    kind: str, name: str, value: float | None, unit: str, machine: Mapping[str, Any], conditions: Mapping[str, Any],
    **facts: Any,
) -> dict[str, Any]:  # fmt: skip
    """The one form of a record: its headline number, what it depends on, and everything else that was found.

    kind: the command ("latency", "compare", ...). name: unique among the records of that kind in one run. value: the
    headline number in `unit`, None where there is none. machine: `fingerprint(...)`. conditions: what was asked for.
    """
    return {
        "time": now(),
        "kind": kind,
        "name": name,
        "device": where(machine),
        "value": value,
        "unit": unit,
        "conditions": dict(conditions),
        **facts,
        "fingerprint": dict(machine),
    }


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Append one record as a line of JSON and flush it: what is measured survives whatever ends the process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(record, default=str) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """Records of a file; a last line cut short by a killed process is left out."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def percentile(values: Iterable[float], percent: float) -> float:
    """The percentile by linear interpolation. Raises ValueError for no values."""
    ordered = sorted(values)
    if not ordered:
        raise ValueError("no values to take a percentile of; expected at least one")
    place = percent / 100 * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """p50_s, p90_s and p99_s of some seconds. With fewer than a hundred of them p99 is close to the slowest."""
    return {f"p{percent}_s": percentile(seconds, percent) for percent in (50, 90, 99)}


class ClockLog:
    """Samples SM clock, memory clock, power, temperature and throttle reasons ten times a second while it is entered.

    `summary()` gives the median, lowest and highest of each, or {} where there is no nvidia-smi. A speed without its
    clocks cannot be compared with another: ten products in a burst run at clocks that twenty seconds do not hold.
    """

    def __init__(self, period_ms: int = 100) -> None:
        self.period_ms = period_ms
        self.samples: list[list[str]] = []
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None

    def __enter__(self) -> ClockLog:
        command = shutil.which("nvidia-smi")
        if command:
            query = [f"--query-gpu={','.join(CLOCK_FIELDS)}", "--format=csv,noheader,nounits", f"-lms={self.period_ms}"]
            self._process = subprocess.Popen(
                [command, *query], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            self._reader = threading.Thread(target=self._read, daemon=True)
            self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process:
            self._process.terminate()
            self._process.wait()
        if self._reader:
            self._reader.join(timeout=2)

    def _read(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.samples.append([part.strip() for part in line.split(",")])

    def summary(self) -> dict[str, Any]:
        facts: dict[str, Any] = {}
        for column, field in enumerate(CLOCK_FIELDS):
            values = [sample[column] for sample in self.samples if len(sample) == len(CLOCK_FIELDS)]
            if not values:
                continue
            if field.startswith("clocks_event"):
                facts[field] = sorted(set(values))
                continue
            numbers = [float(v) for v in values if v.replace(".", "", 1).isdigit()]
            if numbers:
                facts[field] = {"median": statistics.median(numbers), "min": min(numbers), "max": max(numbers)}
        return facts


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _commit() -> str | None:
    git = shutil.which("git")
    if git is None:
        return None
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [git, "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or None


def _nvidia_smi(field: str) -> str | None:
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    query = [command, f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else None
