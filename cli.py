"""The command line: `stepfuse generate | models | doctor | bench | export`. Imports torch only when a command needs it.

Exit codes: 0 done; 1 other failure; 2 bad request or option; 3 checkpoint problem; 4 device problem; 5 NaN or Inf;
6 cancelled; 130 interrupted.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from .engine.errors import RequestError, StepfuseError

if TYPE_CHECKING:
    from .engine.request import Job, Result

app = typer.Typer(
    name="stepfuse", help="A diffusion inference engine.", no_args_is_help=True, add_completion=False,
    pretty_exceptions_enable=False,
)  # fmt: skip
out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def _version(asked: bool) -> None:
    if asked:
        from . import __version__

        out.print(f"stepfuse {__version__}")
        raise typer.Exit()


@app.callback()
def common(
    verbose: Annotated[int, typer.Option("--verbose", "-v", count=True, help="More log lines; twice for debug.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Errors only, no progress.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """A diffusion inference engine: text to image on your own checkpoints, or on the built-in model."""
    from rich.logging import RichHandler

    level = logging.ERROR if quiet else (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    logger = logging.getLogger("stepfuse")
    logger.setLevel(level)
    logger.handlers = [RichHandler(console=err, show_path=False, show_time=False)]
    err.quiet = quiet


Model = Annotated[str, typer.Option("--model", "-m", help="Built-in name, checkpoint folder, or hub id org/name.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N. Default: cuda if there is one.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bf16, fp16. Default: bf16 on CUDA, float32 on CPU.")]


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="What to draw.")] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="PNG to write; with several images NAME-<seed>.png.")
    ] = Path("image.png"),
    model: Model = "shapes",
    negative: Annotated[str | None, typer.Option(help="What to avoid.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="First seed; image i uses seed + i. Default: random, reported.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Sampling steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1 turns guidance off.")] = None,
    sampler: Annotated[str | None, typer.Option(help="ddim, euler, euler_a, heun, dpmpp_2m, ...")] = None,
    schedule: Annotated[str | None, typer.Option(help="karras, exponential, ...")] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels.")] = None,
    n: Annotated[int, typer.Option("--n", "-n", help="Images per prompt.")] = 1,
    prompts: Annotated[Path | None, typer.Option(help="Text file with one prompt per line.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    variant: Annotated[str | None, typer.Option(help="Weight file variant, e.g. fp16.")] = None,
    download: Annotated[
        bool, typer.Option("--download", help="Fetch a hub id that is not in the local cache.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was made as JSON on standard output.")] = False,
) -> None:
    """Turn a prompt into a picture."""
    from .engine.request import build_request

    fields = {"negative_prompt": negative, "seed": seed, "steps": steps, "guidance_scale": guidance, "sampler": sampler,
              "schedule": schedule, "n": n, **_size(size)}  # fmt: skip
    requests = [build_request(text, fields) for text in _prompts(prompt, prompts)]
    _check_writable(output)
    from .engine.engine import Engine

    with err.status(f"loading {model}"):
        engine = Engine.load(model, device=device, dtype=dtype, variant=variant, download=download)
    with engine:
        jobs = [engine.submit(request) for request in requests]
        results = _watch(jobs)
        made = []
        for index, result in enumerate(results):
            name = output if len(results) == 1 else output.with_name(f"{output.stem}-{index:03d}{output.suffix}")
            paths = result.save(name)
            made.append(_summary(result, paths))
            for warning in result.warnings:
                err.print(f"[yellow]warning:[/] {warning}")
    if as_json:
        sys.stdout.write(json.dumps(made, indent=2) + "\n")
    else:
        for entry in made:
            err.print(f"{', '.join(entry['files'])}  ({entry['timings']['total']:.2f} s, seeds {entry['seeds']})")


@app.command()
def models() -> None:
    """List the built-in models and the kinds of checkpoint that can be loaded."""
    from .engine.families import BUILTIN, FAMILIES

    out.print("[bold]built-in[/]")
    for name, text in BUILTIN.items():
        out.print(f"  {name:<14} {text}")
    out.print("[bold]checkpoint folders (--model PATH or a cached hub id)[/]")
    for family in FAMILIES.values():
        note = f" [dim](no text to image: {family.missing})[/]" if family.missing else ""
        out.print(f"  {family.name:<14} {family.summary}{note}")


@app.command()
def doctor() -> None:
    """Show versions, devices and optional packages, what is missing, and the command that fixes it."""
    from .engine.doctor import examine

    marks = {"ok": "[green]ok     [/]", "absent": "[yellow]absent [/]", "problem": "[red]PROBLEM[/]"}
    findings = examine()
    for finding in findings:
        fix = f"  -> {finding.fix}" if finding.fix else ""
        out.print(f"{marks[finding.state]} {finding.topic:<13} {finding.text}{fix}".rstrip())
    if any(finding.state == "problem" for finding in findings):
        raise typer.Exit(4)


def _prompts(prompt: str | None, file: Path | None) -> list[str | None]:
    if prompt is not None and file is not None:
        raise RequestError("got a prompt and --prompts; give one of them")
    if file is None:
        return [prompt]
    if not file.is_file():
        raise RequestError(f"--prompts: {file} is not a file; give a text file with one prompt per line")
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise RequestError(f"--prompts: {file} has no prompts; write one per line")
    return list(lines)


def _size(size: str | None) -> dict[str, int]:
    if size is None:
        return {}
    width, cross, height = size.lower().partition("x")
    if not (cross and width.isdecimal() and height.isdecimal()):
        raise RequestError(f"--size: got {size!r}, expected WIDTHxHEIGHT such as 512x768")
    return {"width": int(width), "height": int(height)}


def _check_writable(output: Path) -> None:
    if output.suffix.lower() != ".png":
        raise RequestError(f"--output: got {output.name!r}, expected a name ending in .png")
    if not output.resolve().parent.is_dir():
        raise RequestError(f"--output: the folder {output.resolve().parent} does not exist; create it first")


def _watch(jobs: list[Job]) -> list[Result]:
    """Wait for all jobs, with a progress bar on a terminal; Ctrl-C cancels them."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

    class Speed(ProgressColumn):
        def render(self, task: Any) -> str:
            return f"{task.speed:.2f} it/s" if task.speed else ""

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Speed(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=err, disable=not err.is_terminal or err.quiet, transient=True) as progress:
            for index, job in enumerate(jobs):
                task = progress.add_task(f"image {index + 1}/{len(jobs)}" if len(jobs) > 1 else "sampling", total=None)
                for event in job.events():
                    progress.update(task, completed=event.update, total=event.total)
        return [job.result() for job in jobs]
    except KeyboardInterrupt:
        for job in jobs:
            job.cancel()
        raise


def _summary(result: Result, paths: list[Path]) -> dict[str, Any]:
    return {
        "files": [str(path) for path in paths],
        "prompt": result.request.prompt,
        "seeds": list(result.seeds),
        "settings": dict(result.settings),
        "timings": dict(result.timings),
        "warnings": list(result.warnings),
        "model": result.model,
    }


@contextmanager
def _readable_errors() -> Iterator[None]:
    try:
        yield
    except StepfuseError as error:
        err.quiet = False
        err.print(f"[red]error:[/] {error!s}", markup=True)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def main() -> None:
    """Entry point of the `stepfuse` command."""
    from .benchmarks.cli import app as bench
    from .export.cli import app as export

    for name, group in (("bench", bench), ("export", export)):
        if not any(known.name == name for known in app.registered_groups):
            app.add_typer(group, name=name)
    with _readable_errors():
        app()
