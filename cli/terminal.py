"""What the command line writes where: results to standard output, progress and errors to standard error."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from ..engine.errors import StepfuseError

if TYPE_CHECKING:
    from rich.progress import Progress

    from ..engine.request import Job, Result

# Without markup: a path or a prompt may hold brackets and colons
out = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
err = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)


def log_to_terminal(verbose: int, quiet: bool) -> None:
    """Log lines of this level and above to standard error; quiet: errors only, and no progress."""
    from rich.logging import RichHandler

    logger = logging.getLogger("stepfuse")
    logger.setLevel(logging.ERROR if quiet else (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)])
    logger.handlers = [RichHandler(console=err, show_path=False, show_time=False)]
    err.quiet = quiet


def report(error: Exception) -> int:
    """Print an error as one line, whatever it is; the exit code."""
    err.quiet = False
    usage = getattr(error, "format_message", None)  # of the argument parser, whose classes are not public
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()  # type: ignore[attr-defined]
        return 2
    text = str(error) if usage is None else f"{usage()} (--help lists the options)"
    if usage is None and not isinstance(error, StepfuseError):
        text = f"{type(error).__name__}: {error} (-vv shows where)"
    logging.getLogger("stepfuse").debug("where the error was raised", exc_info=error)
    err.print(Text.assemble(("error:", "red"), " ", " ".join(text.split())))
    return int(getattr(error, "exit_code", 1))


def progress(*columns: Any) -> Progress:
    """A bar on a terminal, nothing elsewhere."""
    from rich.progress import Progress

    return Progress(*columns, console=err, disable=not err.is_terminal or err.quiet, transient=True)


def watch(jobs: Sequence[Job]) -> Iterator[Result]:
    """The results of jobs in their order, each as soon as it is there. Where that ends early, the rest is cancelled."""
    from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn, TimeRemainingColumn

    class Speed(ProgressColumn):
        def render(self, task: Any) -> str:
            return f"{task.speed:.2f} it/s" if task.speed else ""

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Speed(), TimeRemainingColumn())
    try:
        with progress(*columns) as bar:
            for index, job in enumerate(jobs):
                task = bar.add_task(f"image {index + 1}/{len(jobs)}" if len(jobs) > 1 else "sampling", total=None)
                for event in job.events():
                    bar.update(task, completed=event.update, total=event.total)
                yield job.result()
    finally:
        for job in jobs:
            job.cancel()
