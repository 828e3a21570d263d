"""An ONNX artefact to TensorRT plans: the memory a build needs, a private folder, the manifest."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from tempfile import mkdtemp
from typing import Any

import torch

from .. import __version__
from ..engine.artifact import MANIFEST, Graph, Manifest, sha256
from ..engine.env import cache_dir
from ..engine.errors import CheckpointError, DeviceError, MemoryBudgetError, RequestError
from ..engine.runtimes.exported import FINAL_NORM
from ..engine.runtimes.tensorrt import load_package, open_plan
from .inspect import read_graph
from .plan import Built, Target, build, check_dtype, check_target
from .profiles import redeclare

FILE = "model.plan"
MEMORY_FACTOR = 3.5
"""Host memory a build takes, in sizes of the weights: measured with a U-Net of 1.6 GiB and three targets."""
MEMORY_BASE = 512 * 2**20
"""Host memory of the libraries themselves, in bytes."""

Progress = Callable[[str, str, int, int], None]
"""Called with the graph, the phase, steps done and steps in all."""


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What is built and for what.

    components: graphs of the artefact, () means all. shapes: width x height in pixels, and rows, that profiles are made
    for; () means those of the artefact. ignore_memory: build even where the estimate exceeds this machine's memory.
    """

    components: tuple[str, ...] = ()
    shapes: tuple[tuple[int, int], ...] = ()
    rows: tuple[int, ...] = ()
    target: Target = field(default_factory=Target)
    ignore_memory: bool = False


def default_opset(flavour: str) -> int:
    """The opset to export for it: 23 where attention is a layer, else 21. Raises RequestError if it is missing."""
    return 23 if hasattr(load_package(flavour), "IAttention") else 21


def build_plans(
    source: Path, output: Path | None, options: PlanOptions, progress: Progress = lambda *given: None
) -> Path:
    """Build a plan for every graph of the ONNX artefact `source`; returns the folder of the plans.

    output: a new or empty folder, made private; None: one in the cache, named after what is built, kept if it is there.
    Everything is checked before the first build. Raises RequestError, CheckpointError, MemoryBudgetError, or
    DeviceError where TensorRT fails.
    """
    target = options.target
    trt = load_package(target.flavour)
    check_target(trt, target)
    manifest = _onnx_manifest(source)
    target_sms = target.sms or _device_sm(target.flavour)
    graphs = {
        name: redeclare(name, manifest.graph(name), options.shapes, options.rows)
        for name in options.components or manifest.graphs
    }
    for graph in graphs.values():
        check_dtype(graph.dtype, target_sms)
    copied = _copied(manifest, list(graphs))
    manifest.check(source, only={*graphs, *(PurePosixPath(name).parts[0] for name in copied)})
    manifest = replace(manifest, graphs=graphs)
    weights = {name: sum(read_graph(source, name, graph).weights.values()) for name, graph in graphs.items()}
    versions = {**manifest.versions, "stepfuse": __version__, target.flavour: str(trt.__version__)}
    planned = {name: plan_graph(manifest, name, target, target_sms) for name in graphs}
    folder = _cached(planned, versions, copied) if output is None else output
    if output is None and _is_built(folder, planned, versions):
        return folder
    require_memory(weights, options.ignore_memory)
    _require_free(folder)
    part = Path(mkdtemp(prefix=".plans-", dir=_made(folder.parent)))  # mode 0700
    try:
        for name, graph in graphs.items():
            (part / name).mkdir(mode=0o700)
            built = build(
                trt, source / graph.file, part / planned[name].file, graph, target,
                lambda phase, done, steps, name=name: progress(name, phase, done, steps),
            )  # fmt: skip
            planned[name] = replace(planned[name], options={**planned[name].options, **_notes(built, target_sms)})
        for name in copied:
            (part / name).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            shutil.copyfile(source / name, part / name)
        files = [file for file in sorted(part.rglob("*")) if file.is_file()]
        hashes = {file.relative_to(part).as_posix(): sha256(file) for file in files}
        replace(manifest, kind="tensorrt", graphs=planned, versions=versions, files=hashes).save(part)
        folder.rmdir() if folder.exists() else None
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def plan_graph(manifest: Manifest, name: str, target: Target, sms: tuple[int, ...]) -> Graph:
    """What the manifest of the plans says about a graph before it is built.

    Its axes are those its profiles cover; its options name the model it is made from by hash.
    """
    graph = manifest.graph(name)
    covered = {
        axis: (min(p.axes[axis].min for p in graph.profiles), max(p.axes[axis].max for p in graph.profiles))
        for axis in graph.axes
    }
    options = {
        "flavour": target.flavour,
        "sm": list(sms),
        "workspace": target.workspace,
        "fused_attention": target.fused_attention,
        "opset": graph.options.get("opset"),
        "scale": graph.options.get("scale"),
        "onnx": manifest.files[graph.file],
        "weights": weight_hashes(manifest, name),
        "onnx_tolerance": graph.tolerance,
    }
    return replace(graph, file=f"{name}/{FILE}", axes=covered, tolerance=None, options=options)


def weight_hashes(manifest: Manifest, name: str) -> dict[str, str]:
    """SHA-256 of the weight files of a graph, by file name."""
    found = {file.removeprefix(f"{name}/"): digest for file, digest in manifest.files.items()}
    return {file: digest for file, digest in found.items() if "/" not in file and file.endswith(".safetensors")}


def check_origin(plans: Path, source: Path) -> None:
    """Raise CheckpointError unless the plans were built from this ONNX artefact."""
    made, given = Manifest.load(plans), Manifest.load(source)
    for name, graph in made.graphs.items():
        origin = given.graph(name)
        expected = (given.files[origin.file], weight_hashes(given, name))
        if (graph.options["onnx"], graph.options["weights"]) != expected:
            raise CheckpointError(
                f"plan {name!r} of {plans} was built from another model than {source}: build it again"
            )


def estimate(weights: int) -> int:
    """Bytes of host memory it takes to build a plan of a graph with that many bytes of weights."""
    return int(MEMORY_FACTOR * weights) + MEMORY_BASE


def require_memory(weights: Mapping[str, int], ignore: bool = False) -> int:
    """The estimate for the largest graph, in bytes; weights: by graph.

    Raises MemoryBudgetError if this machine has less free, unless `ignore`.
    """
    name, largest = max(weights.items(), key=lambda item: item[1])
    needed, free = estimate(largest), available_memory()
    if needed > free and not ignore:
        raise MemoryBudgetError(
            f"{name}: building its plan takes about {needed / 2**30:.1f} GiB of host memory ({MEMORY_FACTOR} times its"
            f" weights), {free / 2**30:.1f} GiB are free: use a larger machine, or --ignore-memory to try"
        )
    return needed


def available_memory() -> int:
    """Bytes of host memory a process can have without swapping, the limit of its container included."""
    limits: list[int] = []
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        lines = (line.split() for line in meminfo.read_text(encoding="ascii").splitlines())
        limits += [int(words[1]) * 1024 for words in lines if words[0] == "MemAvailable:"]
    group = Path("/sys/fs/cgroup")
    if (group / "memory.max").is_file() and (limit := (group / "memory.max").read_text().strip()) != "max":
        stats = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(stats["inactive_file"])
        limits.append(int(limit) - used)
    return min(limits) if limits else 2**62  # not Linux: nothing to compare with


def verify_command(folder: Path, model: str) -> str:
    """What proves the plans on the machine they are for."""
    return f"stepfuse export verify {folder} --model {model}"


def _onnx_manifest(source: Path) -> Manifest:
    manifest = Manifest.load(source)
    if manifest.kind != "onnx":
        raise CheckpointError(f"{source} holds {manifest.kind} graphs; plans are built from ONNX ones")
    return manifest


def _notes(built: Built, sms: tuple[int, ...]) -> dict[str, Any]:
    """What the manifest says about the network a plan was built from."""
    attention = {
        "layers": len(built.attentions),
        "head_dims": sorted({attention.head_dim for attention in built.attentions}),
        "decomposed": sum(bool(attention.unfused(sms)) for attention in built.attentions),
    }
    return {"attention": attention, "layers": dict(built.layers), "precisions": dict(built.precisions)}


def _device_sm(flavour: str) -> tuple[int, ...]:
    """The GPU that `tensorrt` builds for."""
    if not torch.cuda.is_available():
        raise DeviceError(f"{flavour} builds on the GPU it builds for, and there is none: use --flavour tensorrt_rtx")
    major, minor = torch.cuda.get_device_capability()
    return (10 * major + minor,)


def _copied(manifest: Manifest, graphs: Sequence[str]) -> dict[str, str]:
    """The files of the ONNX artefact that plans need, too, with their hashes."""
    needed = {f"{name}/{file}" for name in graphs for file in ("config.json", FINAL_NORM)}
    needed |= set(manifest.beside) - {"model_index.json"}
    return {name: digest for name, digest in manifest.files.items() if name in needed}


def _cached(graphs: Mapping[str, Graph], versions: Mapping[str, str], copied: Mapping[str, str]) -> Path:
    """The folder in the cache for exactly these plans and the files beside them."""
    described = {name: asdict(graph) for name, graph in graphs.items()}
    described |= {"versions": dict(versions), "copied": dict(copied)}
    key = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:24]
    return cache_dir() / "plans" / key


def _is_built(folder: Path, graphs: Mapping[str, Graph], versions: Mapping[str, str]) -> bool:
    """Whether the folder has these plans, unharmed; the folder is named after what else they depend on."""
    if not (folder / MANIFEST).is_file():
        return False
    return all(open_plan(folder, name)[0].versions == versions for name in graphs)


def _require_free(folder: Path) -> None:
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise RequestError(f"--output: {folder} is not empty: give a new folder, plans are not overwritten")


def _made(folder: Path) -> Path:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder
