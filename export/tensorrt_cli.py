"""`stepfuse export tensorrt`: plans from an ONNX artefact, or straight from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress, TaskID

from ..engine.artifact import MANIFEST, Manifest
from ..engine.errors import NumericsError, RequestError
from .arguments import names, resolutions, row_counts

if TYPE_CHECKING:
    from .plan import Target

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
    shapes: Annotated[str | None, typer.Option(help="Of a checkpoint: resolutions WIDTHxHEIGHT in pixels.")] = None,
    rows: Annotated[str | None, typer.Option(help="Of a checkpoint: rows of the network.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of a checkpoint: fp16, bf16, float32; default fp16.")] = None,
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
    from .plan import Target, check_target
    from .tensorrt import PlanOptions, build_plans, load_package, verify_command

    targets = () if flavour == "tensorrt" and sm is None else parse_sms(sm or "86,89,120")
    limit = None if workspace is None else workspace * 2**20
    target = Target(flavour=flavour, sms=targets, workspace=limit, fused_attention=fused_attention)
    check_target(load_package(flavour), target)
    wanted = names(components)
    with TemporaryDirectory(prefix="stepfuse-onnx-") as scratch, Progress(console=err, transient=True) as bar:
        source = Path(model)
        if (source / MANIFEST).is_file():
            if shapes or rows or dtype:
                raise RequestError("--shapes, --rows, --dtype: those of an ONNX artefact are fixed; give a checkpoint")
        else:
            source = Path(scratch) / "onnx"
            export_first(model, source, wanted, shapes or "512x512", rows or "1,2", dtype or "fp16", target, no_verify)
        tasks: dict[tuple[str, str], TaskID] = {}

        def advance(graph: str, phase: str, done: int, steps: int) -> None:
            if (graph, phase) not in tasks:
                tasks[graph, phase] = bar.add_task(f"{graph}: {phase}", total=steps)
            bar.update(tasks[graph, phase], completed=done, total=steps, visible=done < steps)

        options = PlanOptions(components=wanted, target=target, ignore_memory=ignore_memory)
        folder = build_plans(source, output, options, advance)
    report_plans(folder)
    err.print("Built, not executed. On the target machine:", markup=False)
    err.print("  " + verify_command(folder, "MODEL" if (Path(model) / MANIFEST).is_file() else model), markup=False)


def export_first(
    model: str, folder: Path, components: tuple[str, ...], shapes: str, rows: str, dtype: str, target: Target,
    no_verify: bool,
) -> None:  # fmt: skip
    """The checkpoint's graphs as ONNX, proved on the CPU. Raises NumericsError for a graph past its tolerance."""
    from .folder import Options, export_onnx, open_source, resolve_dtype
    from .tensorrt import default_opset
    from .verify import verify

    options = Options(
        components=components,
        shapes=resolutions(shapes),
        rows=row_counts(rows),
        dtype=resolve_dtype(dtype),
        opset=default_opset(target.flavour),
    )
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
