"""What an update costs on this machine, by size, ControlNets and number of model rows; measured, kept, and used.

Three decisions rest on it: how many model rows run together (the knee of the curve), whether they run in one forward of
the network or in several, and what the scheduler takes for the price of an update. Without a measurement nothing is
capped, everything runs in one forward, and all updates cost the same.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from . import env
from .components import Components
from .scheduling.costs import interpolate

logger = logging.getLogger("stepfuse")

GAIN = 0.03
"""More rows must lower the time per row by this fraction to be worth the longer updates: the knee is the last to."""
SPLIT_GAIN = 0.02
"""Several forwards must be faster than one by this fraction to be preferred: less is within the noise of a timing."""

Size = tuple[int, int]
"""Height and width in pixels: the first two entries of a bucket."""
Kind = tuple[Size, tuple[str, ...]]
"""A size, and the names of the rows' ControlNets, which make updates longer."""
Measure = Callable[[int, int], float]
"""(model rows, most model rows of one forward) -> seconds of one update; infinite where it does not fit."""


@dataclass(frozen=True)
class Point:
    """One timing: seconds of an update of `model_rows`, in forwards of at most `forward_rows`."""

    model_rows: int
    forward_rows: int
    seconds: float

    @property
    def forwards(self) -> int:
        """Evaluations of the network in one update."""
        return -(-self.model_rows // self.forward_rows)


@dataclass(frozen=True)
class Curve:
    """All timings of a size, of rows with these ControlNets. complete: the budget was enough for all planned numbers of
    rows.
    """

    height: int
    width: int
    points: tuple[Point, ...]
    complete: bool
    measured: str
    controls: tuple[str, ...] = ()

    @property
    def kind(self) -> Kind:
        """What it holds for."""
        return (self.height, self.width), self.controls

    @property
    def best(self) -> list[Point]:
        """The preferred way to run every measured number of model rows, ascending."""
        chosen: dict[int, Point] = {}
        for point in sorted(self.points, key=lambda p: (p.model_rows, -p.forward_rows)):  # one forward comes first
            known = chosen.get(point.model_rows)
            if known is None or point.seconds < known.seconds * (1 - SPLIT_GAIN):
                chosen[point.model_rows] = point
        return list(chosen.values())

    @property
    def knee(self) -> int:
        """The largest number of model rows whose time per row is at least GAIN below that of any smaller knee."""
        first, *rest = self.best
        knee = first
        for point in rest:
            if point.seconds / point.model_rows <= (1 - GAIN) * knee.seconds / knee.model_rows:
                knee = point
        return knee.model_rows

    def seconds(self, model_rows: int) -> float:
        """Of one update."""
        return interpolate({point.model_rows: point.seconds for point in self.best}, model_rows)

    def forward_rows(self, model_rows: int) -> int:
        """The most model rows of one forward, as it was best for the next larger measured number."""
        best = self.best
        point = next((p for p in best if p.model_rows >= model_rows), best[-1])
        return model_rows if point.forward_rows >= point.model_rows else min(point.forward_rows, model_rows)

    def explain(self) -> list[str]:
        """A line about the size, and one per number of model rows."""
        knee, missing = self.knee, "" if self.complete else ", stopped by its budget"
        nets = f" with {', '.join(self.controls)}" if self.controls else ""
        lines = [f"{self.width} x {self.height}{nets}: knee at {knee} model rows, measured {self.measured}{missing}"]
        for point in self.best:
            ms, n = 1e3 * point.seconds, point.model_rows
            text = f"  {n:>4} rows {ms:9.3f} ms {ms / n:9.3f} ms per row, {point.forwards} forwards"
            others = [p for p in self.points if p.model_rows == n and p is not point]
            text += "".join(f" ({p.forwards}: {1e3 * p.seconds:.3f} ms)" for p in others)
            lines.append(text + (" <- knee" if n == knee else ""))
        return lines


def measure_curve(
    size: Size,
    rows: Sequence[int],
    measure: Measure,
    *,
    budget_s: float,
    controls: tuple[str, ...] = (),
    progress: Callable[[str], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Curve:
    """Time updates of `rows` model rows, ascending, in one forward and in two halves, until the budget is spent.

    The smallest number is always timed. A number that does not fit ends the measurement.
    """
    began, points = clock(), list[Point]()
    left = sorted(rows)
    while left and (not points or clock() - began < budget_s):
        n = left[0]
        found = [Point(n, k, measure(n, k)) for k in dict.fromkeys((n, -(-n // 2)))]
        fitting = [point for point in found if math.isfinite(point.seconds)]
        if not fitting:
            break
        points += fitting
        left.pop(0)
        if progress is not None:
            fastest = min(fitting, key=lambda p: p.seconds)
            progress(f"{size[1]} x {size[0]}: {n} model rows {1e3 * fastest.seconds:.3f} ms")
    if not points:
        raise torch.OutOfMemoryError(f"calibration: not even {min(rows)} model rows of {size[1]} x {size[0]} fit")
    return Curve(*size, tuple(points), not left, time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), controls)


def seconds_of(run: Callable[[], None], device: torch.device, enough: float = 0.05) -> float:
    """Median seconds of a run, of at least three and `enough` seconds in all, after one that warms up."""
    cuda = device.type == "cuda"
    calls, found = 5 if cuda else 1, list[float]()  # on CUDA a wait for the device must not count for every run
    run()
    while len(found) < 3 or sum(found) * calls < enough:
        if cuda:
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        for _ in range(calls):
            run()
        if cuda:
            torch.cuda.synchronize(device)
        found.append((time.perf_counter() - began) / calls)
    return statistics.median(found)


class Calibration:
    """The curves of one engine, by kind; kept in a file where `folder` is given, but for those of ControlNets, whose
    names another process may give to others. Reading is safe from any thread.

    key: what the curves hold for; another engine with the same key finds them.
    """

    def __init__(self, key: Mapping[str, str], folder: Path | None = None) -> None:
        self.key, self.source = dict(key), "defaults"
        digest = hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()[:16]
        self.path = None if folder is None else folder / "calibration" / f"{digest}.json"
        self.curves: dict[Kind, Curve] = {}
        if self.path is not None and self.path.exists():
            self._read(self.path)

    @classmethod
    def of(cls, parts: Components) -> Calibration:
        """What earlier measurements of the same model on the same machine left; empty in deterministic mode, and for a
        network of the user's, which nothing tells from another one.
        """
        unknown = parts.config.deterministic or parts.user is not None
        return cls(identity(parts), None if unknown else env.cache_dir())

    def add(self, curve: Curve) -> None:
        """Use a new curve, and keep it. A folder that cannot be written is a warning."""
        self.curves = {**self.curves, curve.kind: curve}  # another object: readers hold no lock
        self.source = "measured by this process"
        if self.path is None:
            return
        content = {"key": self.key, "curves": [asdict(c) for c in self.curves.values() if not c.controls]}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_suffix(f".{os.getpid()}")
            partial.write_text(json.dumps(content, indent=1), encoding="utf-8")
            partial.replace(self.path)
        except OSError as error:
            logger.warning("calibration: not kept, %s; set STEPFUSE_CACHE to a folder that can be written", error)

    def cost(self, bucket: Hashable, model_rows: int) -> float:
        """Seconds of one update of a bucket (height, width, ...); the scheduler's cost model.

        A size that was not measured is priced by the pixels of the nearest one that was, with the same ControlNets;
        without any, as 1 second.
        """
        curves, kind = self.curves, _kind(bucket)
        if kind in curves:
            return curves[kind].seconds(model_rows)
        (height, width), controls = kind
        alike = [curve for curve in curves.values() if curve.controls == controls]
        if not alike:
            return 1.0
        pixels = height * width
        near = min(alike, key=lambda c: abs(math.log(pixels / (c.height * c.width))))
        return near.seconds(model_rows) * pixels / (near.height * near.width)

    def cap(self, bucket: Hashable) -> int | None:
        """The most model rows of one update of a bucket that are worth it; None where it was not measured.

        LoRAs of rows make updates longer, and only updates without them are measured.
        """
        curve = None if getattr(bucket, "loras", 0) else self.curves.get(_kind(bucket))
        return None if curve is None else curve.knee

    def forward_rows(self, size: Size, model_rows: int, controls: tuple[str, ...] = ()) -> int:
        """The most model rows of one forward."""
        curve = self.curves.get((size, controls))
        return model_rows if curve is None else curve.forward_rows(model_rows)

    def explain(self) -> str:
        """Every curve, and where they come from."""
        if not self.curves:
            return "calibration: none, so no cap on rows and one forward per update; engine.warmup(calibrate=True)"
        lines = [line for curve in self.curves.values() for line in curve.explain()]
        return "\n".join((f"calibration: {self.source}", *(f"  {line}" for line in lines)))

    def _read(self, path: Path) -> None:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["key"] != self.key:
                raise ValueError("it belongs to something else")
            curves = [_curve(entry) for entry in found["curves"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("calibration: %s is ignored (%s); delete it, or calibrate again", path, error)
            return
        self.curves = {curve.kind: curve for curve in curves}
        self.source = f"read from {path}"


def identity(parts: Components) -> dict[str, str]:
    """What a time depends on, as text: device, network, precision, versions, how updates run."""
    config = parts.config
    if config.device.type == "cuda":
        device = torch.cuda.get_device_name(config.device)
    else:
        cpu = platform.processor() or platform.machine()
        device = f"{cpu} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    kernels = config.kernels if isinstance(config.kernels, str) else json.dumps(dict(config.kernels), sort_keys=True)
    network = hashlib.sha256(f"{parts.denoiser.config!r} {config.transforms}".encode()).hexdigest()[:16]
    return {
        "device": device,
        "model": network,
        "dtype": str(config.dtype).removeprefix("torch."),
        "runtime": config.runtime,
        "runner": config.runner,
        "kernels": kernels,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "stepfuse": __version__,
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _curve(entry: Mapping[str, Any]) -> Curve:
    points = tuple(Point(int(p["model_rows"]), int(p["forward_rows"]), float(p["seconds"])) for p in entry["points"])
    if not points or min(min(p.model_rows, p.forward_rows, p.seconds) for p in points) <= 0:
        raise ValueError("it has no usable timings")
    return Curve(int(entry["height"]), int(entry["width"]), points, bool(entry["complete"]), str(entry["measured"]))


def _kind(bucket: Hashable) -> Kind:
    height, width, *_ = bucket  # type: ignore[misc]
    return (height, width), getattr(bucket, "controls", ())
