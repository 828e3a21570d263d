"""Profiles: declared resolutions and numbers of rows, as sizes of a graph's axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..engine.artifact import Graph, Profile, Range
from ..engine.errors import RequestError

IMAGE = ("height", "width")


def declare(
    graph: str,
    axes: Mapping[str, tuple[int, int]],
    scale: int,
    usual: Mapping[str, int],
    shapes: Sequence[tuple[int, int]],
    rows: Sequence[int],
) -> tuple[Profile, ...]:
    """One profile per resolution (width, height in pixels) for all row counts, the largest being the usual one.

    axes: smallest and largest size the graph takes. scale: pixels per site of its height and width; 0: it has none, and
    one profile. usual: sizes of the axes that neither resolution nor rows decide. Raises RequestError for a resolution
    or rows the graph cannot have.
    """
    low, high = axes["rows"]
    if not rows or not all(low <= size <= high for size in rows):
        raise RequestError(f"--rows: got {list(rows)}, expected whole numbers from {low} to {high}")
    if scale and not shapes:
        raise RequestError(f"--shapes: {graph} needs a resolution at least, such as 512x512")
    made: list[Profile] = []
    for width, height in shapes if scale else ((0, 0),):
        pixels = {"width": width, "height": height}
        sizes: dict[str, Range] = {}
        for name, span in axes.items():
            if name in IMAGE:
                size = _sites(graph, name, pixels[name], span, scale)
                sizes[name] = Range(size, size, size)
            elif name in ("rows", "steps"):
                sizes[name] = Range(1 if name == "steps" else min(rows), max(rows), max(rows))
            else:
                sizes[name] = Range(span[0], usual[name], max(span[0], usual[name]))
        made.append(Profile(f"{width}x{height}" if scale else "all", sizes))
    return tuple(made)


def redeclare(name: str, graph: Graph, shapes: Sequence[tuple[int, int]], rows: Sequence[int]) -> Graph:
    """An exported graph with other resolutions or rows; without any, it keeps its own.

    Raises RequestError for what the graph cannot have, and for artefacts that do not say how many pixels a site has.
    """
    if not shapes and not rows:
        return graph
    scale = graph.options.get("scale")
    if scale is None:
        raise RequestError(
            f"--shapes, --rows: {name} does not say how many pixels a latent has; export the model again"
        )
    own = graph.profiles[0].axes
    usual = {axis: size.opt for axis, size in own.items()}
    kept = [(p.axes["width"].opt * scale, p.axes["height"].opt * scale) for p in graph.profiles] if scale else []
    profiles = declare(name, graph.axes, scale, usual, shapes or kept, rows or (own["rows"].min, own["rows"].max))
    return replace(graph, profiles=profiles)


def _sites(graph: str, name: str, pixels: int, span: tuple[int, int], scale: int) -> int:
    sites, rest = divmod(pixels, scale)
    low, high = span
    if rest or not low <= sites <= high:
        expected = f"expected a multiple of {scale} from {low * scale} to {high * scale}"
        raise RequestError(f"--shapes: {graph} got {name} {pixels}, {expected}")
    return sites
