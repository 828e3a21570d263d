"""The parity report: every graph of an artefact against the same network in float64, beside torch in its own dtype."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..engine.artifact import Graph, Manifest
from ..engine.errors import CheckpointError, RequestError
from ..engine.runtimes import aoti, tensorrt
from ..engine.runtimes.onnxruntime import Session
from ..engine.weights.checkpoint import Checkpoint
from ..kernels.policy import reference_only
from .aoti import cases as bucket_cases
from .folder import REPORTS, load_network
from .program import DTYPES, example
from .spec import make_spec

FLOAT32_LIMIT = 2e-5
"""Largest relative error of a float32 graph; other dtypes may have twice the error torch has in them, plus 1e-7."""

Run = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class Line:
    """One output at one set of sizes. Errors are the largest difference to float64; relative ones over max|y|."""

    graph: str
    sizes: Mapping[str, int]
    output: str
    max_error: float
    relative: float
    eager: float
    limit: float
    psnr: float | None = None  # dB, of decoded images

    @property
    def passed(self) -> bool:
        """Whether the error is within the limit; NaN is not."""
        return self.relative <= self.limit


@dataclass(frozen=True)
class Report:
    """All lines of an artefact."""

    kind: str
    versions: Mapping[str, str]
    lines: tuple[Line, ...]

    @property
    def passed(self) -> bool:
        """Whether every line is within its limit."""
        return all(line.passed for line in self.lines)

    def markdown(self) -> str:
        """A table for people."""
        used = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        head = [
            "# Parity report", "", f"{self.kind} artefact; {used}.",
            "Errors are relative to the largest value of the output, against the same network in float64.", "",
            "| graph | sizes | output | artefact | torch, same dtype | limit | PSNR of the image | |",
            "|---|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        return "\n".join(head + [_row(line) for line in self.lines]) + "\n"

    def save(self, folder: Path) -> None:
        """Write `parity.md` and `parity.json`."""
        (folder / REPORTS[0]).write_text(self.markdown(), encoding="utf-8")
        lines = [asdict(line) | {"passed": line.passed} for line in self.lines]
        found = {"kind": self.kind, "versions": dict(self.versions), "passed": self.passed, "lines": lines}
        (folder / REPORTS[1]).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Exported(Checkpoint):
    """An artefact as the checkpoint a graph of it is rebuilt from: configuration and weights lie beside the graph."""

    owners: Mapping[str, str] | None = None  # component -> the folder of a graph made from it

    def folder(self, component: str) -> Path:
        """The folder that has this component's configuration and weights."""
        owners = self.owners or {}
        if component not in owners:
            raise CheckpointError(f"{self.root} has no graph of {component!r}: export it, too")
        return self.root / owners[component]


def verify(
    folder: Path,
    source: Checkpoint | None = None,
    reference: torch.dtype = torch.float64,
    progress: Callable[[str], None] = lambda text: None,
) -> Report:
    """Compare every graph of an artefact with the network it was made from, at sizes it was not recorded at.

    source: the checkpoint that was exported; without it, the weights in the artefact are taken. reference: float64, or
    float32 for networks that do not fit in memory twice. Raises CheckpointError for a damaged artefact, RequestError
    for graphs that cannot be run here. The tolerances are written into the manifest.
    """
    manifest = Manifest.load(folder)
    lines: list[Line] = []
    graphs = dict(manifest.graphs)
    for name, graph in manifest.graphs.items():
        progress(f"{name}: comparing with {str(reference).removeprefix('torch.')}")
        if manifest.kind == "onnx":
            require_runnable(graph.dtype)
        manifest.check(folder, only=[name])  # before what it holds is read
        checkpoint = source or _rebuilt(folder, manifest, name)
        found = _verify_graph(checkpoint, name, graph, partial(runner, manifest, folder, name), reference)
        graphs[name] = replace(graph, tolerance=max(line.limit for line in found))
        lines += found
    report = Report(manifest.kind, _versions(manifest), tuple(lines))
    report.save(folder)
    if report.passed:
        replace(manifest, graphs=graphs).save(folder)
    return report


def runner(manifest: Manifest, folder: Path, name: str) -> Run:
    """What executes a graph here. Raises RequestError for a kind or dtype that this machine cannot run."""
    if manifest.kind == "aoti":
        return _packaged(manifest, folder, name)
    if manifest.kind == "tensorrt":
        return _planned(folder, name)
    if manifest.kind != "onnx":
        raise RequestError(f"{manifest.kind} artefacts cannot be verified")
    require_runnable(manifest.graph(name).dtype)
    return Session(folder, name).run


def require_runnable(dtype: str) -> None:
    """Raise RequestError for ONNX graphs in a dtype that this machine cannot run."""
    if dtype == "bfloat16":
        raise RequestError(
            "ONNX Runtime has no bfloat16 on the CPU: verify a float32 export, and pass --no-verify here"
        )


def _packaged(manifest: Manifest, folder: Path, name: str) -> Run:
    """AOT packages on the device they were compiled for; results come to the CPU, where the truth is."""
    packages = aoti.Session(folder, name, manifest.graph(name).options["target"]["device"])
    return lambda inputs: {port: value.cpu() for port, value in packages.run(inputs).items()}


def _planned(folder: Path, name: str) -> Run:
    """Plans on the GPU they were built for; not executed on any machine yet."""
    plan = tensorrt.Session(folder, name, "cuda")
    return lambda inputs: {port: value.cpu() for port, value in plan.run(inputs).items()}


def cases(graph: Graph) -> list[dict[str, int]]:
    """Two or more sets of axis sizes, none of them the one the graph was recorded at: the smallest that was declared,
    and sizes that are odd where they may be."""
    if "packages" in graph.options:
        return bucket_cases(graph)
    declared = [{name: size.min for name, size in profile.axes.items()} for profile in graph.profiles]
    for sizes in declared:
        if "tokens" in sizes:
            sizes["tokens"] = graph.profiles[0].axes["tokens"].opt
    if "flavour" in graph.options:  # a plan has its profiles and nothing between or beyond them
        largest = [{name: size.max for name, size in profile.axes.items()} for profile in graph.profiles]
        for sizes in (*declared, *largest):
            if "steps" in sizes:
                sizes["steps"] = sizes["rows"]
        return [*declared, *largest]
    odd = {
        name: min(high, max(low, graph.traced[name] + (-1 if name == "width" else 1)))
        for name, (low, high) in graph.axes.items()
    }
    recorded = dict(graph.traced)
    listed = [declared[0], odd, {**odd, "rows": 1}, {**odd, "rows": 4}]
    for sizes in (recorded, *listed):
        if "steps" in sizes:  # a time per row
            sizes["steps"] = sizes["rows"]
    chosen: list[dict[str, int]] = []
    for sizes in listed:
        if sizes != recorded and sizes not in chosen:
            chosen.append(sizes)
    return chosen[:3]


def compare(truth: Tensor, eager: Tensor, made: Tensor, dtype: str) -> tuple[float, float, float, float]:
    """(largest error, relative error, torch's relative error, limit) of a result; integers and flags must agree."""
    if not truth.is_floating_point():
        wrong = float((truth != made).any())
        return wrong, wrong, 0.0, 0.0
    scale = float(truth.abs().max()) or 1.0
    error = float((made.double() - truth.double()).abs().max())
    own = float((eager.double() - truth.double()).abs().max()) / scale
    return error, error / scale, own, FLOAT32_LIMIT if dtype == "float32" else 2 * own + 1e-7


def psnr(truth: Tensor, made: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images given in -1..1; 200 where they are equal."""
    pictures = [(image.double() / 2 + 0.5).clamp(0, 1) for image in (truth, made)]
    error = float((pictures[0] - pictures[1]).square().mean())
    return 200.0 if error == 0 else min(200.0, -10 * math.log10(error))


@torch.inference_mode()
def _verify_graph(
    checkpoint: Checkpoint, name: str, graph: Graph, opened: Callable[[], Run], reference: torch.dtype
) -> list[Line]:
    """opened: the graph, ready to run; opened once the networks it is compared with are out of memory."""
    sizes = cases(graph)
    dtype = DTYPES[graph.dtype]
    ports = make_spec(checkpoint, name).inputs
    inputs = [example(ports, axes, dtype, seed) for seed, axes in enumerate(sizes, 1)]
    wide = [{k: v.to(reference) if v.is_floating_point() else v for k, v in given.items()} for given in inputs]
    truths = _evaluate(checkpoint, name, reference, wide)
    eagers = _evaluate(checkpoint, name, dtype, inputs)
    lines, run = [], opened()
    for axes, given, truth, eager in zip(sizes, inputs, truths, eagers, strict=True):
        made = run(given)
        for port, expected, own in zip(graph.outputs, truth, eager, strict=True):
            numbers = compare(expected, own, made[port.name], graph.dtype)
            quality = psnr(expected, made[port.name]) if name == "vae_decoder" else None
            lines.append(Line(name, axes, port.name, *numbers, quality))
    return lines


def _evaluate(
    checkpoint: Checkpoint, name: str, dtype: torch.dtype, inputs: list[dict[str, Tensor]]
) -> list[tuple[Tensor, ...]]:
    spec = make_spec(checkpoint, name)
    load_network(checkpoint, spec, dtype)
    with reference_only():
        return [spec.module(**given) for given in inputs]


def _rebuilt(folder: Path, manifest: Manifest, name: str) -> Exported:
    owners = {graph.component: other for other, graph in manifest.graphs.items()}
    owners[manifest.graph(name).component] = name
    components = {part: cls for part, cls in manifest.components.items() if part in owners}
    return Exported(folder, "", components, {}, None, owners)


def _versions(manifest: Manifest) -> dict[str, str]:
    from importlib.metadata import version

    runs = {"onnxruntime": version("onnxruntime")} if manifest.kind == "onnx" else {}
    return {**manifest.versions, **runs}


def _row(line: Line) -> str:
    sizes = " ".join(f"{name}={size}" for name, size in line.sizes.items())
    quality = "" if line.psnr is None else f"{line.psnr:.1f} dB"
    verdict = "ok" if line.passed else "**FAILED**"
    numbers = f"{line.relative:.2e} | {line.eager:.2e} | {line.limit:.2e}"
    return f"| {line.graph} | {sizes} | {line.output} | {numbers} | {quality} | {verdict} |"
