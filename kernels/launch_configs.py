"""The record of what is fastest: implementation and launch configuration of every op and shape, per device.

`kernels/<op>/configs/<device>.json` is written by `python -m stepfuse.kernels.tune` and committed. A shape is looked up
exactly, then by the nearest one that was measured, then a heuristic decides, and one warning names the command.
"""

from __future__ import annotations

import inspect
import json
import logging
import math
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import device
from .op import Call, TensorInfo

log = logging.getLogger("stepfuse.kernels")
ROOT = Path(__file__).parent
Shape = Mapping[str, int | bool | str]
"""What a choice depends on. Integers are sizes, compared by their logarithms; anything else must be equal."""


@dataclass(frozen=True)
class Entry:
    """One line of a record.

    shape: of the call (`shape_of`); sizes: what the launch configuration was asked for, empty if the implementation has
    none; config: it, as JSON; measured: whether it was timed; evidence: seconds, method, versions.
    """

    shape: Shape
    implementation: str
    sizes: Shape
    config: Mapping[str, Any] | None
    measured: bool
    evidence: Mapping[str, Any]


def shape_of(call: Call) -> dict[str, int | bool | str]:
    """Tensors' dtypes, layouts and sizes, and the options of a call but for floats (eps) which do not change speed."""
    shape: dict[str, int | bool | str] = {}
    for name, tensor in call.tensors.items():
        layout = " channels_last" if tensor.channels_last else ""
        shape[name] = f"{str(tensor.dtype).removeprefix('torch.')}[{len(tensor.shape)}]{layout}"
        shape |= {f"{name}.{axis}": extent for axis, extent in enumerate(tensor.shape)}
    for name, value in call.options.items():
        if value is None or isinstance(value, bool | int | str):
            shape[name] = "none" if value is None else value
    return shape


def distance(a: Shape, b: Shape) -> float:
    """Root of the summed squares of log ratios of the sizes; infinite where something else differs."""
    if a.keys() != b.keys():
        return math.inf
    total = 0.0
    for name, x in a.items():
        y = b[name]
        if type(x) is int and type(y) is int:
            total += math.log(max(x, 1) / max(y, 1)) ** 2
        elif x != y:
            return math.inf
    return math.sqrt(total)


@dataclass(frozen=True)
class Match:
    """The line of a record that decides, and the distance of its shape from the one asked for (0: exact)."""

    entry: Entry
    distance: float

    def __str__(self) -> str:
        """Its evidence: "exact shape, measured 12.3 us", "nearest shape (sdxl norm), not measured"."""
        evidence = self.entry.evidence
        place = "exact shape" if self.distance == 0 else f"nearest shape ({evidence.get('workload', 'unnamed')})"
        if not self.entry.measured:
            return f"{place}, not measured"
        return f"{place}, measured" + (f" {1e6 * evidence['warm_s']:.1f} us" if "warm_s" in evidence else "")


def nearest(entries: Sequence[Entry], shape: Shape, by: Callable[[Entry], Shape]) -> Match | None:
    """The entry whose shape (`by`) is closest, an equal one first; None if there is none of the same kind."""
    found = ((distance(by(e), shape), by(e) != shape, i) for i, e in enumerate(entries))
    apart, _, index = min(found, default=(math.inf, True, 0))
    return None if math.isinf(apart) else Match(entries[index], apart)


def path(op: str, device_name: str, root: Path = ROOT) -> Path:
    """Where the record of an op on a device is."""
    return root / op / "configs" / f"{device_name}.json"


def read(file: Path) -> tuple[Entry, ...]:
    """The entries of a record, () if there is no such file. Raises ValueError for a file that is not one."""
    if not file.exists():
        return ()
    try:
        return tuple(Entry(**entry) for entry in json.loads(file.read_text())["entries"])
    except (TypeError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is not a record of kernels ({error}); write it anew with {command()}") from error


def write(file: Path, op: str, device_name: str, entries: Sequence[Entry]) -> None:
    """Write a record, one entry a line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n  ".join(json.dumps(asdict(entry)) for entry in entries)
    heading = f'{{"op": {json.dumps(op)}, "device": {json.dumps(device_name)}, "entries": [\n  '
    file.write_text(f"{heading}{lines}\n]}}\n")


@cache
def recorded(op: str, device_name: str) -> tuple[Entry, ...]:
    """The committed record of an op on a device; warns once per device where there is none."""
    entries = read(path(op, device_name))
    if not entries:
        _warn(device_name)
    return entries


@cache
def _warn(device_name: str) -> None:
    log.warning("kernels were not measured on %s, heuristics choose: run `%s`", device_name, command())


def command() -> str:
    return "python -m stepfuse.kernels.tune"


def lookup(op: str, call: Call) -> Match | None:
    """The line of this device's record that decides which implementation takes a call, or None."""
    name = device.name()
    return None if name == "cpu" else _lookup(op, name, tuple(shape_of(call).items()))


@cache
def _lookup(op: str, device_name: str, shape: tuple[Any, ...]) -> Match | None:
    return nearest(recorded(op, device_name), dict(shape), lambda entry: entry.shape)


def in_use(ops: Iterable[str]) -> str:
    """Which records of this machine's device there are, and what to do where there are none."""
    device_name = device.name()
    if device_name == "cpu":
        return "no CUDA device: no record is used"
    files = {op: path(op, device_name) for op in ops}
    there = {op: _short(file) for op, file in files.items() if file.exists()}
    missing = ", ".join(op for op in files if op not in there)
    if not there:
        return f"no record for {device_name}: heuristics; run `{command()}`"
    return f"record for {device_name}: {', '.join(there.values())}" + (
        f"; none for {missing}: heuristics; run `{command()} --ops {missing.replace(',', '')}`" if missing else ""
    )


def _short(file: Path) -> str:
    return str(file.relative_to(ROOT.parent) if file.is_relative_to(ROOT) else file)


class _Thread(threading.local):
    forced: Mapping[str, Any] = {}
    probing = False


_thread = _Thread()


class Asked(NamedTuple):
    """What a launch asks `launch_config`."""

    op: str
    heuristic: Callable[..., Any]
    sizes: Shape


class _Probed(BaseException):
    """Ends a launch that is only asked what it depends on."""

    def __init__(self, asked: Asked) -> None:
        self.asked = asked


def launch_config(op: str, heuristic: Callable[..., Any], *sizes: int | bool, **named: int | bool) -> Any:
    """The configuration a launcher uses: the record's for these sizes, the nearest one's that is in the op's
    `search_space`, else `heuristic(*sizes, **named)`. `search_space` lives beside `heuristic` and takes its arguments
    (or some of them)."""
    bound = inspect.signature(heuristic).bind(*sizes, **named)
    bound.apply_defaults()
    wanted = {k: bool(v) if isinstance(v, bool) else int(v) for k, v in bound.arguments.items()}
    if _thread.probing:
        raise _Probed(Asked(op, heuristic, wanted))
    if op in _thread.forced:
        return _thread.forced[op]
    return _decide(op, device.name(), heuristic, tuple(wanted.items())).config


@dataclass(frozen=True)
class Launch:
    """A launch configuration and where it comes from."""

    config: Any
    source: str

    def __str__(self) -> str:
        """As in "block_m 4, block_n 512, num_warps 8, num_stages 1 (heuristic)"."""
        return f"{in_words(asdict(self.config))} ({self.source})"


def launch_of(run: Callable[..., Any], call: Call) -> Launch | None:
    """The configuration with which an implementation (`run`) would launch a call; None if it has none to choose."""
    arguments = dict(call.options) | {name: _without_memory(info) for name, info in call.tensors.items()}
    asked = probe(partial(run, **arguments))
    return None if asked is None else _decide(asked.op, device.name(), asked.heuristic, tuple(asked.sizes.items()))


def _without_memory(info: TensorInfo) -> torch.Tensor:
    layout = torch.channels_last if info.channels_last else torch.contiguous_format
    return torch.empty(info.shape, dtype=info.dtype, device="meta", memory_format=layout)


@cache
def _decide(op: str, device_name: str, heuristic: Callable[..., Any], sizes: tuple[Any, ...]) -> Launch:
    wanted = dict(sizes)
    entries = [e for e in recorded(op, device_name) if e.config is not None] if device_name != "cpu" else []
    if found := nearest(entries, wanted, lambda entry: entry.sizes):
        config = from_json(found.entry.config or {}, heuristic)
        if found.distance == 0 or config in search_space(heuristic, wanted):
            return Launch(config, f"record, {found}")
    return Launch(heuristic(**wanted), "heuristic")


def search_space(heuristic: Callable[..., Any], sizes: Shape) -> list[Any]:
    """The configurations an op offers for these sizes."""
    space = sys.modules[heuristic.__module__].search_space
    return space(**{name: sizes[name] for name in inspect.signature(space).parameters if name in sizes})


def in_words(config: Mapping[str, Any]) -> str:
    """The fields of a configuration, flat: "block_m 4, block_n 512, num_warps 8, num_stages 1"."""
    fields = {**config, **config.get("options", {})}
    return ", ".join(f"{k} {v}" for k, v in fields.items() if k not in ("type", "options") and v is not True)


def to_json(config: Any) -> dict[str, Any]:
    """A configuration dataclass as JSON, with the name of its class."""
    return {"type": type(config).__name__, **asdict(config)}


def from_json(text: Mapping[str, Any], heuristic: Callable[..., Any]) -> Any:
    """A configuration from JSON; its class lives beside `heuristic`."""
    from .launch import Options

    fields = dict(text)
    made = getattr(sys.modules[heuristic.__module__], fields.pop("type"))
    return made(**{name: Options(**v) if name == "options" else v for name, v in fields.items()})


@contextmanager
def forced(configs: Mapping[str, Any]) -> Iterator[None]:
    """Launches of this thread take the configuration given for their op."""
    before, _thread.forced = _thread.forced, configs
    try:
        yield
    finally:
        _thread.forced = before


def probe(launch: Callable[[], Any]) -> Asked | None:
    """What `launch()` first asks `launch_config`, before anything is launched; None if it ends without a question."""
    _thread.probing = True
    try:
        launch()
    except _Probed as probed:
        return probed.asked
    finally:
        _thread.probing = False
    return None
