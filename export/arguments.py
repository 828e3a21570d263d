"""Arguments that the export commands share, and what their texts mean. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..engine.errors import RequestError

Model = Annotated[str, typer.Argument(help="Built-in name, checkpoint folder, or cached hub id org/name.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write; new, or an older artefact.")]
Dtype = Annotated[str, typer.Option(help="float32, fp16, bf16.")]
Variant = Annotated[str | None, typer.Option(help="Weight file variant, e.g. fp16.")]
Download = Annotated[bool, typer.Option("--download", help="Fetch a hub id that is not in the local cache.")]
NoVerify = Annotated[bool, typer.Option("--no-verify", help="Make no parity report.")]
Reference = Annotated[str, typer.Option(help="float64, or float32 where memory is short.")]


def names(text: str | None) -> tuple[str, ...]:
    """The words between the commas; none for None."""
    return tuple(name.strip() for name in (text or "").split(",") if name.strip())


def resolutions(text: str) -> tuple[tuple[int, int], ...]:
    """Widths and heights of "768x512,512x512". Raises RequestError."""
    return tuple(_resolution(name) for name in names(text))


def row_counts(text: str) -> tuple[int, ...]:
    """Numbers of rows of "1,2,4". Raises RequestError."""
    return tuple(_row_count(name) for name in names(text))


def _resolution(text: str) -> tuple[int, int]:
    width, cross, height = text.lower().partition("x")
    if not (cross and width.isdecimal() and height.isdecimal()):
        raise RequestError(f"--shapes: got {text!r}, expected WIDTHxHEIGHT such as 768x512")
    return int(width), int(height)


def _row_count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise RequestError(f"--rows: got {text!r}, expected whole numbers such as 1,2,4")
    return int(text)
