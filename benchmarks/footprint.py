"""What a request needs beside time: peak memory, and operations or kernel launches per update."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity, profile

from .latency import Workload

if TYPE_CHECKING:
    from ..engine.engine import Engine

CLEAR_PEAK = "5"  # written to /proc/self/clear_refs: forget the peak of the resident set (proc(5))


class PeakMemory:
    """The most memory in use while it is entered: allocated on a CUDA device, else resident of the whole process.

    `record()` gives gb and what was counted; gb is None on systems that do not tell.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.gb: float | None = None
        self.what = "allocated on the device" if device.type == "cuda" else "resident, whole process"

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            try:
                Path("/proc/self/clear_refs").write_text(CLEAR_PEAK)
            except OSError:
                self.what += ", since its start"
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.device.type == "cuda":
            self.gb = torch.cuda.max_memory_allocated(self.device) / 2**30
        else:
            self.gb = _resident_peak_gb()

    def record(self) -> dict[str, Any]:
        """As a mapping for a JSON record."""
        return {"gb": self.gb, "what": self.what}


def _resident_peak_gb() -> float | None:
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    found = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
    return int(found[0].split()[1]) / 2**20 if found else None


def trace(run: Any, device: torch.device, *, shapes: bool = False) -> profile:
    """The profile of `run()` on all threads: an engine works on one of its own."""
    from torch._C._profiler import _ExperimentalConfig

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    every = _ExperimentalConfig(profile_all_threads=True)
    with profile(activities=activities, record_shapes=shapes, experimental_config=every) as found:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return found


def per_update(engine: Engine, workload: Workload, steps: tuple[int, int] = (2, 5)) -> dict[str, Any]:
    """Kernel launches per update by the profiler's count on CUDA, operations that Python called on a CPU.

    Two requests that differ only in steps are profiled; the difference holds the updates and nothing else. On a CPU
    there are no launches: the number counts outermost aten operations, views included, and "unit" says so.
    """
    device = engine.components.config.device
    counts, updates = [], []
    for number in steps:
        options: dict[str, Any] = dict(workload.options) | {"steps": number}
        engine.generate(workload.prompt, n=workload.n, seed=0, **options)  # first use of this many steps
        counts.append(_count(engine, workload, options, device))
        last = list(engine.stream(workload.prompt, n=workload.n, seed=0, **options))[-1]
        updates.append(last.total)
    launches = {
        name: (counts[1][name] - counts[0][name]) / (updates[1] - updates[0]) for name in ("total", "graph launches")
    }
    unit = "kernel launches" if device.type == "cuda" else "aten calls (CPU: no launches)"
    return {"per_update": launches["total"], "unit": unit, "graph_launches_per_update": launches["graph launches"]}


def _count(engine: Engine, workload: Workload, options: dict[str, Any], device: torch.device) -> Counter[str]:
    found = trace(lambda: engine.generate(workload.prompt, n=workload.n, seed=0, **options), device)
    counted: Counter[str] = Counter()
    for event in found.events() or ():
        if device.type != "cuda":
            counted["total"] += event.name.startswith("aten::") and event.cpu_parent is None
        elif event.device_type == torch.autograd.DeviceType.CUDA:
            counted["total"] += not event.name.startswith(("Memcpy", "Memset"))
        else:
            counted["graph launches"] += event.name == "cudaGraphLaunch"
    return counted
