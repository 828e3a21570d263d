"""`stepfuse export tensorrt`: plans from an ONNX artefact, or straight from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress, TaskID

from ..engine.artifact import MANIFEST, Manifest
from ..engine.errors import NumericsError, RequestError
from .arguments import Download, Variant, names, resolutions, row_counts

if TYPE_CHECKING:
    from .folder import Options

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def tensorrt(
    model: Annotated[str, typer.Argument(help="ONNX artefact; or a built-in name, checkpoint folder, cached hub id.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="New folder; default: in the cache.")] = None,
    flavour: Annotated[str, typer.Option(help="tensorrt_rtx or tensorrt.")] = "tensorrt_rtx",
    sm: Annotated[
        str | None, typer.Option(help="Compute capabilities; default 86,89,120. tensorrt: the GPU here.")
    ] = None,
    components: Annotated[str, typer.Option(help="unet,vae_decoder,...; default: all there are.")] = "",
    shapes: Annotated[
        str | None, typer.Option(help="Resolutions WIDTHxHEIGHT in pixels; default 512x512, or the artefact's.")
    ] = None,
    rows: Annotated[str | None, typer.Option(help="Rows of the network; default 1,2, or the artefact's.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of a checkpoint: fp16, bf16, float32; default fp16.")] = None,
    variant: Variant = None,
    download: Download = False,
    workspace: Annotated[int | None, typer.Option(help="MiB of device memory a layer may use.", min=1)] = None,
    fused_attention: Annotated[
        bool, typer.Option("--fused-attention", help="Fail where an attention has no kernel of its own.")
    ] = False,
    ignore_memory: Annotated[
        bool, typer.Option("--ignore-memory", help="Build even if the estimate says memory is short.")
    ] = False,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Of a checkpoint: do not prove the ONNX graphs first.")
    ] = False,
) -> None:
    """Build TensorRT plans. They cannot be proved here: the command that does it on the target is printed."""
    from .plan import Target, check_dtype, check_target
    from .tensorrt import PlanOptions, build_plans, load_package, verify_command

    targets = () if flavour == "tensorrt" and sm is None else parse_sms(sm or "86,89,120")
    limit = None if workspace is None else workspace * 2**20
    target = Target(flavour=flavour, sms=targets, workspace=limit, fused_attention=fused_attention)
    check_target(load_package(flavour), target)
    common = {"components": names(components), "shapes": resolutions(shapes or ""), "rows": row_counts(rows or "")}
    with TemporaryDirectory(prefix="stepfuse-onnx-") as scratch, Progress(console=err, transient=True) as bar:
        source = Path(model)
        if (source / MANIFEST).is_file():
            if dtype or variant or download:
                raise RequestError(
                    "--dtype, --variant, --download: those of an ONNX artefact are fixed; give a checkpoint"
                )
        else:
            options = source_options(common, dtype or "fp16", flavour, variant, download)
            check_dtype(options.dtype, targets)
            source = Path(scratch) / "onnx"
            export_first(model, source, options, no_verify)
        tasks: dict[tuple[str, str], TaskID] = {}

        def advance(graph: str, phase: str, done: int, steps: int) -> None:
            if (graph, phase) not in tasks:
                tasks[graph, phase] = bar.add_task(f"{graph}: {phase}", total=steps)
            bar.update(tasks[graph, phase], completed=done, total=steps, visible=done < steps)

        made = PlanOptions(**common, target=target, ignore_memory=ignore_memory)
        folder = build_plans(source, output, made, advance)
    report_plans(folder)
    err.print("Built, not executed. On the target machine:", markup=False)
    err.print("  " + verify_command(folder, "MODEL" if (Path(model) / MANIFEST).is_file() else model), markup=False)


def source_options(common: Mapping[str, Any], dtype: str, flavour: str, variant: str | None, download: bool) -> Options:
    """How a checkpoint becomes the ONNX graphs of plans. common: components, shapes and rows; () means the default."""
    from .folder import Options, resolve_dtype
    from .tensorrt import default_opset

    given = {name: value for name, value in common.items() if value}
    opset = default_opset(flavour)
    return Options(**given, dtype=resolve_dtype(dtype), opset=opset, variant=variant, download=download)


def export_first(model: str, folder: Path, options: Options, no_verify: bool) -> None:
    """The checkpoint's graphs as ONNX, proved on the CPU.

    Raises NumericsError for a graph past its tolerance, RequestError for bfloat16 graphs that cannot be proved here.
    """
    from .folder import export_onnx, open_source
    from .verify import require_runnable, verify

    if not no_verify:
        require_runnable(options.dtype)
    export_onnx(model, folder, options, lambda text: err.print(text))
    if not no_verify:
        report = verify(folder, open_source(model, options), progress=lambda text: err.print(text))
        if not report.passed:
            raise NumericsError("the ONNX graphs differ from float64:\n" + report.markdown())


def report_plans(folder: Path) -> None:
    """One line per plan, and where they are."""
    for name, graph in Manifest.load(folder).graphs.items():
        size, attention = (folder / graph.file).stat().st_size, graph.options["attention"]
        sms = ", ".join(map(str, graph.options["sm"]))
        text = f"{name}: {graph.dtype}, SM {sms}, {len(graph.profiles)} profile(s), {size / 2**20:.1f} MiB"
        lacking = f", {attention['decomposed']} of {attention['layers']} attentions without a kernel of their own"
        err.print(text + (lacking if attention["decomposed"] else ""))
    out.print(str(folder), markup=False)


def parse_sms(text: str) -> tuple[int, ...]:
    """(86, 120) of "86,120"; "8.6" is 86, too. Raises RequestError for anything else."""
    words = [word.strip().replace(".", "").removeprefix("sm") for word in text.lower().split(",")]
    if not all(word.isdecimal() for word in words) or len(set(words)) < len(words):
        raise RequestError(f"--sm: got {text!r}, expected different compute capabilities such as 86,89,120")
    return tuple(int(word) for word in words)
