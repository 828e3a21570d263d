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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from . import device
from .op import Call

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


def nearest(entries: Sequence[Entry], shape: Shape, by: Callable[[Entry], Shape]) -> tuple[Entry, float] | None:
    """The entry whose shape (`by`) is closest, and its distance (0: exact); None if there is none of the same kind."""
    found = min(((distance(by(e), shape), i) for i, e in enumerate(entries)), default=(math.inf, 0))
    return None if math.isinf(found[0]) else (entries[found[1]], found[0])


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


def implementation(op: str, call: Call) -> str | None:
    """The implementation that the record names for a call on this machine's device, or None."""
    name = device.name()
    if name == "cpu":
        return None
    found = nearest(recorded(op, name), shape_of(call), lambda entry: entry.shape)
    return found[0].implementation if found else None


class _Thread(threading.local):
    forced: Mapping[str, Any] = {}
    probing = False


_thread = _Thread()


class _Probed(BaseException):
    """Ends a launch that is only asked what it depends on."""

    def __init__(self, heuristic: Callable[..., Any], sizes: Shape) -> None:
        self.heuristic, self.sizes = heuristic, sizes


def launch_config(op: str, heuristic: Callable[..., Any], *sizes: int | bool, **named: int | bool) -> Any:
    """The configuration a launcher uses: the record's for these sizes, the nearest one's that is in the op's
    `search_space`, else `heuristic(*sizes, **named)`. `search_space` lives beside `heuristic` and takes its arguments
    (or some of them)."""
    bound = inspect.signature(heuristic).bind(*sizes, **named)
    bound.apply_defaults()
    wanted = {k: bool(v) if isinstance(v, bool) else int(v) for k, v in bound.arguments.items()}
    if _thread.probing:
        raise _Probed(heuristic, wanted)
    if op in _thread.forced:
        return _thread.forced[op]
    name = device.name()
    if name == "cpu":
        return heuristic(**wanted)
    return _launch_config(op, name, heuristic, tuple(wanted.items()))


@cache
def _launch_config(op: str, device_name: str, heuristic: Callable[..., Any], sizes: tuple[Any, ...]) -> Any:
    wanted = dict(sizes)
    entries = [entry for entry in recorded(op, device_name) if entry.config is not None]
    if found := nearest(entries, wanted, lambda entry: entry.sizes):
        config = from_json(found[0].config or {}, heuristic)
        if found[1] == 0 or config in search_space(heuristic, wanted):
            return config
    return heuristic(**wanted)


def search_space(heuristic: Callable[..., Any], sizes: Shape) -> list[Any]:
    """The configurations an op offers for these sizes."""
    space = sys.modules[heuristic.__module__].search_space
    return space(**{name: sizes[name] for name in inspect.signature(space).parameters if name in sizes})


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


def probe(launch: Callable[[], Any]) -> tuple[Callable[..., Any], Shape] | None:
    """Heuristic and sizes of the first `launch_config` that `launch()` comes to, before anything is launched; None if
    it ends without one."""
    _thread.probing = True
    try:
        launch()
    except _Probed as probed:
        return probed.heuristic, probed.sizes
    finally:
        _thread.probing = False
    return None
