"""What is in an artefact: facts of its manifest, and what can be read of its files without running them."""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from ..engine.artifact import Graph, Manifest, Profile, inside
from ..engine.errors import CheckpointError
from ..engine.weights.checkpoint import read_header
from .onnx import require_packages
from .weights import SPELLING

UNREADABLE = (
    "layers after fusion, their types and tactics: TensorRT opens plans on a GPU only, so its inspector cannot be asked"
)
MIB = 2**20


@dataclass(frozen=True)
class Contents:
    """One graph.

    files: bytes by path. tensors: parameters stored; weights: their bytes by dtype. ops: nodes of an ONNX graph, or
    layers of the network a plan was built from, by type. packages: by bucket, what an AOT package holds. unread: what
    cannot be told here.
    """

    name: str
    graph: Graph
    files: Mapping[str, int]
    tensors: int = 0
    weights: Mapping[str, int] = field(default_factory=dict[str, int])
    ops: Mapping[str, int] = field(default_factory=dict[str, int])
    packages: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    unread: str = ""

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        graph = self.graph
        ports = {"inputs": graph.inputs, "outputs": graph.outputs}
        found = {
            "graph": self.name, "dtype": graph.dtype, "files": dict(self.files), "tensors": self.tensors,
            "weights": dict(self.weights), "nodes": sum(self.ops.values()), "ops": dict(self.ops),
            **{key: {p.name: [p.dtype, *p.shape] for p in value} for key, value in ports.items()},
            "axes": {name: list(span) for name, span in graph.axes.items()},
            "profiles": [asdict(profile) for profile in graph.profiles],
            "options": dict(graph.options), "tolerance": graph.tolerance,
        }  # fmt: skip
        more = {"packages": dict(self.packages), "unread": self.unread}
        return found | {key: value for key, value in more.items() if value}

    def lines(self) -> list[str]:
        """The same for people."""
        graph, options = self.graph, self.graph.options
        size = f"{sum(self.files.values()) / MIB:.1f} MiB in {len(self.files)} file(s)"
        head = [f"{self.name}  {graph.dtype}, {size}"]
        if self.weights:
            kinds = ", ".join(f"{kind} {size / MIB:.1f} MiB" for kind, size in self.weights.items())
            head.append(f"  {self.tensors} tensors: {kinds}")
        if "sm" in options:
            head.append(
                f"  {options['flavour']}, SM {', '.join(map(str, options['sm']))}, ONNX opset {options['opset']}"
            )
        if "target" in options:
            others = [str(v) for k, v in options["target"].items() if k != "device" and not isinstance(v, list)]
            head.append(f"  compiled for {', '.join([options['target']['device'], *others])}")
        for port in (*graph.inputs, *graph.outputs):
            head.append(f"  {'->' if port in graph.outputs else '  '} {port.name}  {port.dtype} {list(port.shape)}")
        head += [f"  {profile_text(profile)}" for profile in graph.profiles]
        head += [f"  {_package_text(name, found)}" for name, found in self.packages.items()]
        if self.ops:
            what = "built from layers" if "sm" in options else "nodes"
            head.append(f"  {sum(self.ops.values())} {what}: {_counts(self.ops)}")
        if "precisions" in options:
            head.append(f"  results of these layers: {_counts(options['precisions'])}")
            attention = options["attention"]
            lacking = f"{attention['decomposed']} without a kernel of their own"
            head.append(f"  attentions: {attention['layers']}, {lacking}; head dims {attention['head_dims']}")
        tolerance = "not verified" if graph.tolerance is None else f"verified to {graph.tolerance:.1e}"
        return [*head, f"  {tolerance}", *([f"  not readable: {self.unread}"] if self.unread else [])]


@dataclass(frozen=True)
class Inspection:
    """A whole artefact."""

    manifest: Manifest
    graphs: tuple[Contents, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        facts = {key: getattr(self.manifest, key) for key in ("kind", "architecture", "components", "versions")}
        return facts | {"graphs": [contents.as_json() for contents in self.graphs]}

    def lines(self) -> list[str]:
        """The same for people."""
        made = ", ".join(f"{name} {version}" for name, version in self.manifest.versions.items())
        head = f"{self.manifest.kind} artefact of {self.manifest.architecture or 'one component'}, made by {made}"
        return [head, *(line for contents in self.graphs for line in contents.lines())]


def inspect(folder: Path) -> Inspection:
    """Read an artefact of any kind; nothing of it is run, and hashes are not compared.

    Raises CheckpointError for damage, and for files outside their folder.
    """
    manifest = Manifest.load(folder)
    readers = {"onnx": read_graph, "tensorrt": _read_plan, "aoti": _read_packages}
    read = readers[manifest.kind]
    return Inspection(manifest, tuple(read(folder, name, graph) for name, graph in manifest.graphs.items()))


def read_graph(folder: Path, name: str, graph: Graph) -> Contents:
    """An ONNX graph: its nodes, and where its weights are. Raises CheckpointError."""
    require_packages("onnx")
    import onnx

    path = _present(folder, graph.file)
    model = onnx.load(str(path), load_external_data=False)
    sizes: Counter[str] = Counter()
    files = {path.name: path.stat().st_size}
    for tensor in model.graph.initializer:
        kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        sizes[kind.name] += kind.itemsize * prod(tensor.dims)
        for entry in tensor.external_data:
            if entry.key == "location":
                files[entry.value] = _present(path.parent, entry.value).stat().st_size
    ops = Counter(f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in model.graph.node)
    return Contents(name, graph, files, len(model.graph.initializer), sizes, dict(ops.most_common()))


def profile_text(profile: Profile) -> str:
    """ "64x64: height 8, rows 1..4": the sizes of a profile, and the usual one where it is not the largest."""
    sizes = []
    for name, size in sorted(profile.axes.items()):
        span = str(size.max) if size.min == size.max else f"{size.min}..{size.max}"
        sizes.append(f"{name} {span}" + ("" if size.opt == size.max else f" (usually {size.opt})"))
    return f"{profile.name}: {', '.join(sizes)}"


def _read_plan(folder: Path, name: str, graph: Graph) -> Contents:
    """A plan is opaque without its GPU: the file, and the network that was noted when it was built."""
    path = _present(folder, graph.file)
    layers = graph.options.get("layers", {})
    return Contents(name, graph, {path.name: path.stat().st_size}, ops=layers, unread=UNREADABLE)


def _read_packages(folder: Path, name: str, graph: Graph) -> Contents:
    """AOT packages are archives: libraries, kernels of a GPU, and the weights beside them."""
    dtypes = {short: full for full, short in SPELLING.items()}
    header = read_header(_present(folder, graph.file))
    sizes: Counter[str] = Counter()
    for info in header.values():
        kind = dtypes[info.dtype]
        sizes[kind] += _itemsize(kind) * prod(info.shape)
    paths = {bucket: _present(folder, file) for bucket, file in graph.options["packages"].items()}
    chosen = graph.options.get("kernels", {})
    packages = {bucket: _read_package(path) | {"kernels": chosen.get(bucket, {})} for bucket, path in paths.items()}
    listed = [_present(folder, graph.file), *paths.values()]
    files = {path.relative_to(folder / name).as_posix(): path.stat().st_size for path in listed}
    return Contents(name, graph, files, len(header), sizes, packages=packages)


def _read_package(path: Path) -> dict[str, Any]:
    """Bytes of the package and of the machine code in it, and how many GPU kernels it holds."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename: entry.file_size for entry in archive.infolist()}
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"{path} is no AOT package ({error}): copy the artefact again") from error
    code = sum(size for file, size in entries.items() if file.endswith((".so", ".cubin")))
    cubins = sum(file.endswith(".cubin") for file in entries)
    return {"bytes": path.stat().st_size, "code_bytes": code, "gpu_kernels": cubins}


def _package_text(bucket: str, found: Mapping[str, Any]) -> str:
    kernels = "".join(f", {name} {count}" for name, count in found["kernels"].items())
    gpu = f", {found['gpu_kernels']} GPU kernels" if found["gpu_kernels"] else ""
    return f"package {bucket}: {found['code_bytes'] / MIB:.1f} MiB of code{gpu}{kernels}"


def _present(folder: Path, file: str) -> Path:
    path = inside(folder, file)
    if not path.is_file():
        raise CheckpointError(f"{file} of the artefact {folder} is missing: copy the whole folder again")
    return path


def _counts(of: Mapping[str, int]) -> str:
    """The most frequent first: the manifest keeps no order."""
    return ", ".join(f"{name} {count}" for name, count in Counter(of).most_common())


def _itemsize(dtype: str) -> int:
    return 1 if dtype == "bool" else int("".join(c for c in dtype if c.isdecimal())) // 8
