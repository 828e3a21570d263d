"""`stepfuse export ...`: make artefacts, prove them, look into them. Imports torch only when a command runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ..engine.errors import RequestError
from .arguments import Download, Dtype, Model, NoVerify, Output, Reference, Variant, names, resolutions, row_counts
from .tensorrt_cli import tensorrt

if TYPE_CHECKING:
    import torch

    from .verify import Report

app = typer.Typer(help="Turn a model into files other runtimes execute, and prove them.", no_args_is_help=True)
app.command()(tensorrt)
out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

Folder = Annotated[Path, typer.Argument(help="Folder of an artefact.")]


@app.callback()
def export() -> None:
    """Turn a model into files other runtimes execute, and prove them."""


@app.command()
def onnx(
    model: Model,
    output: Output,
    components: Annotated[
        str | None, typer.Option(help="unet,vae_decoder,...; default: all the checkpoint has.")
    ] = None,
    shapes: Annotated[str, typer.Option(help="Resolutions WIDTHxHEIGHT in pixels, for the profiles.")] = "512x512",
    rows: Annotated[str, typer.Option(help="Rows of the network, for the profiles.")] = "1,2",
    dtype: Dtype = "float32",
    opset: Annotated[int, typer.Option(help="23, or 21 and 18 for older runtimes.")] = 23,
    weights: Annotated[str, typer.Option(help="copy, or link: hard links of the checkpoint's files.")] = "copy",
    keep: Annotated[str, typer.Option(help="Ops kept as stepfuse:: nodes: attention,geglu,group_norm_silu.")] = "",
    variant: Variant = None,
    download: Download = False,
    no_verify: NoVerify = False,
    reference: Reference = "float64",
) -> None:
    """Export to ONNX, in the folder layout of diffusers, and compare every graph with float64."""
    found = {
        "components": names(components), "shapes": resolutions(shapes),
        "rows": row_counts(rows), "keep": names(keep),
    }  # fmt: skip
    if weights not in ("copy", "link"):
        raise RequestError(f"--weights: got {weights!r}, expected copy or link")
    from .folder import Options, export_onnx, open_source, resolve_dtype
    from .verify import require_runnable, verify

    options = Options(
        **found, dtype=resolve_dtype(dtype), opset=opset, where=weights, variant=variant, download=download
    )
    if not no_verify:
        require_runnable(options.dtype)
    manifest = export_onnx(model, output, options, lambda text: err.print(text))
    for name, graph in manifest.graphs.items():
        size = sum(file.stat().st_size for file in (output / name).iterdir())
        err.print(f"{name}: {graph.dtype}, {size / 2**20:.1f} MiB, weights by {graph.options['weights']}")
    if not no_verify:
        _conclude(verify(output, open_source(model, options), _reference(reference), lambda text: err.print(text)))


@app.command()
def aoti(
    model: Model,
    output: Output,
    components: Annotated[str | None, typer.Option(help="Default: unet,vae_decoder and the text encoders.")] = None,
    shapes: Annotated[str, typer.Option(help="Resolutions WIDTHxHEIGHT in pixels: a package each.")] = "512x512",
    rows: Annotated[str, typer.Option(help="Rows of the network that packages are made for.")] = "1,2",
    dtype: Dtype = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda: this machine's own, nothing is cross-compiled.")] = "cpu",
    fixed_rows: Annotated[
        bool | None, typer.Option("--fixed-rows/--free-rows", help="A package per number of rows; default: on CUDA.")
    ] = None,
    variant: Variant = None,
    download: Download = False,
    no_verify: NoVerify = False,
    reference: Reference = "float64",
) -> None:
    """Compile ahead of time with AOTInductor for this machine, and compare every package with float64."""
    found = {
        "components": names(components), "shapes": resolutions(shapes),
        "rows": row_counts(rows),
    }  # fmt: skip
    from .aoti import export_aoti
    from .folder import Options, open_source, resolve_dtype
    from .verify import verify

    options = Options(**found, dtype=resolve_dtype(dtype), variant=variant, download=download)
    manifest = export_aoti(
        model, output, options, device=device, fixed_rows=fixed_rows, progress=lambda text: err.print(text)
    )
    for name, graph in manifest.graphs.items():
        sizes = [(output / file).stat().st_size / 2**20 for file in graph.options["packages"].values()]
        err.print(f"{name}: {graph.dtype}, {len(sizes)} packages of {max(sizes):.1f} MiB, weights beside them")
    if not no_verify:
        _conclude(verify(output, open_source(model, options), _reference(reference), lambda text: err.print(text)))


@app.command()
def verify(
    folder: Folder,
    model: Annotated[str | None, typer.Option(help="The checkpoint; default: the weights in the artefact.")] = None,
    reference: Reference = "float64",
) -> None:
    """Run every graph and compare it with float64; fails past the tolerance. Writes parity.md and parity.json."""
    from .folder import Options, open_source
    from .verify import verify as run

    source = None if model is None else open_source(model, Options())
    _conclude(run(folder, source, _reference(reference), lambda text: err.print(text)))


@app.command()
def inspect(
    folder: Folder, as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False
) -> None:
    """Kind, versions, sizes, profiles and operators of an artefact; of plans and packages what is readable here."""
    from .inspect import inspect as read

    found = read(folder)
    if as_json:
        sys.stdout.write(json.dumps(found.as_json(), indent=2) + "\n")
        return
    for line in found.lines():
        out.print(line, markup=False)


def _conclude(report: Report) -> None:
    """Print the report and fail with exit code 1 where a graph is not what it should be."""
    out.print(report.markdown(), markup=False, end="")
    if not report.passed:
        raise typer.Exit(1)


def _reference(name: str) -> torch.dtype:
    import torch

    if name not in ("float64", "float32"):
        raise RequestError(f"--reference: got {name!r}, expected float64 or float32")
    return getattr(torch, name)
