"""TensorRT and TensorRT-RTX: a plan behind its manifest, run on torch's CUDA tensors.

A plan is machine code: it is loaded from a private folder only, after its hash was compared. Written against the
recorded Python API of TensorRT 10.13, 11.4 and TensorRT-RTX 1.7; executing a plan has not been verified.
"""

from __future__ import annotations

import importlib
import logging
import os
import stat
from collections import deque
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..artifact import Graph, Manifest, Profile, inside
from ..errors import CheckpointError, DeviceError, RequestError, closest

PACKAGES = {"tensorrt_rtx": "pip install tensorrt-rtx", "tensorrt": "pip install 'stepfuse[tensorrt]'"}
"""Flavour, which is the name of its Python package -> the command that installs it."""
DTYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int32": "INT32", "int64": "INT64", "bool": "BOOL"}
"""dtype of a port -> its name in `DataType`."""
log = logging.getLogger("stepfuse")


def load_package(flavour: str) -> ModuleType:
    """The package of a flavour. Raises RequestError with the command that installs it."""
    if flavour not in PACKAGES:
        raise RequestError(f"--flavour: got {flavour!r}; {closest(flavour, PACKAGES)}")
    try:
        return importlib.import_module(flavour)
    except (ImportError, RuntimeError, OSError) as error:  # placeholder packages raise RuntimeError, libraries OSError
        raise RequestError(f"this needs {flavour}, which cannot be imported ({error}): {PACKAGES[flavour]}") from error


@cache
def logger(trt: ModuleType) -> Any:
    """The one logger of a flavour, whose `messages` are its last errors: the library keeps the first it was given."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: deque[str] = deque(maxlen=16)

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.messages.append(msg)
            log.log(logging.INFO if severity == trt.ILogger.WARNING else logging.DEBUG, "%s: %s", trt.__name__, msg)

    return Logger()


def require_private(folder: Path) -> None:
    """Raise CheckpointError where somebody else could have written into the folder."""
    if os.name != "posix":
        return
    found = folder.stat()
    if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        mode = f"owner {found.st_uid}, mode {stat.S_IMODE(found.st_mode):04o}"
        raise CheckpointError(
            f"{folder} is not private ({mode}): a plan is code; own it and chmod 700 it, or build the plan again"
        )


def open_plan(folder: Path, name: str) -> tuple[Manifest, Graph, Path]:
    """Manifest, graph and path of a plan whose folder is private and whose files are those that were built.

    Raises CheckpointError otherwise.
    """
    manifest = Manifest.load(folder)
    if manifest.kind != "tensorrt":
        raise CheckpointError(f"{folder} holds {manifest.kind} graphs, not plans; build them: stepfuse export tensorrt")
    graph = manifest.graph(name)
    path = inside(folder, graph.file)
    for place in (folder, path.parent):
        require_private(place)
    if graph.file not in manifest.files:
        raise CheckpointError(f"the manifest of {folder} has no hash of {graph.file}: build the plan again")
    manifest.check(folder, only=[name])
    return manifest, graph, path


def choose_profile(graph: Graph, axes: Mapping[str, int], at: int = 0) -> int:
    """The profile these sizes fit in; the present one, `at`, if it does. Raises RequestError if none does."""
    fitting = [index for index, profile in enumerate(graph.profiles) if _fits(profile, axes)]
    if not fitting:
        known = "; ".join(
            ", ".join(f"{name} {size.min}..{size.max}" for name, size in profile.axes.items())
            for profile in graph.profiles
        )
        raise RequestError(f"no profile for {dict(axes)}; this plan has {known}: build it with these sizes")
    return at if at in fitting else fitting[0]


class Session:
    """One plan, ready to run on a CUDA device.

    Raises CheckpointError for a plan that is damaged, of another version, or in a folder others can write to,
    RequestError where the package is missing, DeviceError for a GPU it was not built for.
    """

    only_profiles = True

    def __init__(self, folder: Path, name: str, device: torch.device | str = "cuda") -> None:
        manifest, self.graph, path = open_plan(folder, name)
        flavour = str(self.graph.options["flavour"])
        trt = load_package(flavour)
        if manifest.versions.get(flavour) != trt.__version__:
            built = f"built by {flavour} {manifest.versions.get(flavour)}, installed is {trt.__version__}"
            raise CheckpointError(f"{graph_path(folder, name)}: {built}; install that version, or build the plan again")
        self.device = torch.device(device)
        self._require_device()
        self.messages = logger(trt).messages
        self.messages.clear()
        self.runtime = trt.Runtime(logger(trt))
        self.engine = self.runtime.deserialize_cuda_engine(path.read_bytes())
        if self.engine is None:
            reason = "; ".join(self.messages)
            raise CheckpointError(f"{graph_path(folder, name)}: {flavour} refuses the plan ({reason}): build it again")
        self._check_ports(trt)
        self.context = self.engine.create_execution_context()
        self.profile = 0

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the plan on torch's current stream; results are on the device.

        Raises RequestError for sizes no profile has, DeviceError where TensorRT fails.
        """
        axes = self.graph.measure({name: tuple(tensor.shape) for name, tensor in inputs.items()})
        stream = torch.cuda.current_stream(self.device)
        index = choose_profile(self.graph, axes, self.profile)
        if index != self.profile:
            self._require(self.context.set_optimization_profile_async(index, stream.cuda_stream), "choosing a profile")
            self.profile = index
        given = {p.name: inputs[p.name].to(self.device, getattr(torch, p.dtype)) for p in self.graph.inputs}
        held = {name: tensor.contiguous() for name, tensor in given.items()}
        for name, tensor in held.items():
            self._require(self.context.set_input_shape(name, tuple(tensor.shape)), f"the shape of {name}")
        made = {
            port.name: torch.empty(port.sizes(axes), dtype=getattr(torch, port.dtype), device=self.device)
            for port in self.graph.outputs
        }
        for name, tensor in (held | made).items():
            self._require(self.context.set_tensor_address(name, tensor.data_ptr()), f"the address of {name}")
        self._require(self.context.execute_async_v3(stream.cuda_stream), "running the plan")
        for tensor in held.values():  # copies may be freed before the stream has read them
            tensor.record_stream(stream)
        return made

    def _require_device(self) -> None:
        if self.device.type != "cuda" or not torch.cuda.is_available():
            raise DeviceError(f"plans run on CUDA devices; got {self.device}: run this on the GPU they were built for")
        major, minor = torch.cuda.get_device_capability(self.device)
        targets = [str(sm) for sm in self.graph.options["sm"]]
        if f"{major}{minor}" not in targets:
            raise DeviceError(
                f"this plan was built for SM {', '.join(targets)}, the GPU is SM {major}{minor}: build it for that one"
            )

    def _check_ports(self, trt: ModuleType) -> None:
        """Names, directions and types of the plan are those of the manifest."""
        engine, ports = self.engine, (*self.graph.inputs, *self.graph.outputs)
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        wrong = set(names) ^ {port.name for port in ports}
        for port in [] if wrong else ports:
            mode = trt.TensorIOMode.INPUT if port in self.graph.inputs else trt.TensorIOMode.OUTPUT
            kind = getattr(trt.DataType, DTYPES[port.dtype])
            if engine.get_tensor_mode(port.name) != mode or engine.get_tensor_dtype(port.name) != kind:
                wrong.add(port.name)
        if wrong or engine.num_optimization_profiles != len(self.graph.profiles):
            raise CheckpointError(f"the plan's inputs, outputs or profiles are not the manifest's: {sorted(wrong)}")

    def _require(self, done: bool, what: str) -> None:
        if not done:
            raise DeviceError(f"TensorRT failed at {what}: {'; '.join(self.messages) or 'it gave no reason'}")


def graph_path(folder: Path, name: str) -> str:
    """How errors name a plan."""
    return f"plan {name!r} of {folder}"


def _fits(profile: Profile, axes: Mapping[str, int]) -> bool:
    return all(profile.axes[name].min <= size <= profile.axes[name].max for name, size in axes.items())
