"""The `stepfuse` command and those of its parts that only list what there is."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from . import terminal
from .generate import generate
from .upscale import upscale

app = typer.Typer(
    name="stepfuse", help="A diffusion inference engine.", no_args_is_help=True, add_completion=False,
    pretty_exceptions_enable=False,
)  # fmt: skip
app.command()(generate)
app.command()(upscale)


def _version(asked: bool) -> None:
    if asked:
        from .. import __version__

        terminal.out.print(f"stepfuse {__version__}")
        raise typer.Exit()


@app.callback()
def stepfuse(
    verbose: Annotated[int, typer.Option("--verbose", "-v", count=True, help="More log lines; twice for debug.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Errors only, no progress.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """A diffusion inference engine: text to image on your own checkpoints, or on the built-in model."""
    terminal.log_to_terminal(verbose, quiet)


@app.command()
def models() -> None:
    """List the built-in models and the kinds of checkpoint that can be loaded."""
    from ..engine.families import BUILTIN, BUILTIN_CONTROLNETS, BUILTIN_EMBEDDINGS, BUILTIN_LORAS, FAMILIES

    terminal.out.print("built-in", style="bold")
    for name, text in (BUILTIN | BUILTIN_CONTROLNETS | BUILTIN_LORAS | BUILTIN_EMBEDDINGS).items():
        terminal.out.print(f"  {name:<17} {text}")
    terminal.out.print("checkpoint folders (--model PATH or a cached hub id)", style="bold")
    for family in FAMILIES.values():
        note = f" (needs {family.needs})" if family.needs else ""
        terminal.out.print(Text.assemble(f"  {family.name:<17} {family.summary}", (note, "dim")))


@app.command()
def doctor() -> None:
    """Show versions, devices and optional packages, what is missing, and the command that fixes it."""
    from ..engine.doctor import examine

    marks = {"ok": ("ok     ", "green"), "absent": ("absent ", "yellow"), "problem": ("PROBLEM", "red")}
    findings = examine()
    for finding in findings:
        fix = f"  -> {finding.fix}" if finding.fix else ""
        line = f" {finding.topic:<13} {finding.text}{fix}".rstrip()
        terminal.out.print(Text.assemble(marks[finding.state], line))
    if any(finding.state == "problem" for finding in findings):
        raise typer.Exit(4)


def main() -> None:
    """Entry point of the `stepfuse` command. Raises SystemExit with the exit code, always."""
    from ..benchmarks.cli import app as bench
    from ..export.cli import app as export

    for name, group in (("bench", bench), ("export", export)):
        if not any(known.name == name for known in app.registered_groups):
            app.add_typer(group, name=name)
    try:
        code = app(standalone_mode=False)
    except KeyboardInterrupt:
        code = 130
    except Exception as error:  # boundary: whatever went wrong, the user gets one line and an exit code
        code = terminal.report(error)
    raise SystemExit(code or 0)
