"""One feature of the gallery: its pictures, the call that made them, what the judge counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from stepfuse import Engine, Request

from ..shapes.judge import judge, look
from ..shapes.render import Form, signed_distance
from ..shapes.scenes import Item, Scene
from .strip import Row, strip

SHOWN = 3  # rows of a strip: the first ones, whatever they show
COLORS = (128, 64, 32)  # of a strip; fewer where it would be too large a file
MOST_BYTES = 60_000
Maker = Callable[[Engine, int | None], "Exhibit"]
"""Paints a feature; the number is that of prompts, None for the feature's own."""


@dataclass(frozen=True)
class Score:
    """`count` of `of` pictures have what `what` says. at: the setting, where several are compared."""

    what: str
    count: int
    of: int
    at: str = ""

    @classmethod
    def of_all(cls, what: str, found: Sequence[bool], at: str = "") -> Score:
        """Counts what is true."""
        return cls(what, sum(map(bool, found)), len(found), at)


@dataclass(frozen=True)
class Exhibit:
    """A feature. side: width in pixels of a picture in the strip; call: Python that makes one of them."""

    title: str
    text: str
    call: str
    rows: Sequence[Row]
    scores: Sequence[Score]
    side: int = 128

    def save(self, file: Path) -> dict[str, Any]:
        """Write the strip; returns what the report says beside it."""
        file.parent.mkdir(parents=True, exist_ok=True)
        drawn = strip(self.rows, self.side)
        for colors in COLORS:
            drawn.quantize(colors).save(file, optimize=True)
            if file.stat().st_size <= MOST_BYTES:
                break
        return {"title": self.title, "text": self.text, "call": self.call, "scores": [asdict(s) for s in self.scores]}


def paint(engine: Engine, requests: Sequence[Request], **how: Any) -> list[np.ndarray]:
    """The first image [H, W, 3] of every request, in one running batch."""
    return [result.images[0] for result in engine.generate(requests, output="np", **how)]


def call(request: Request, **how: Any) -> str:
    """The Python that submits a request: pictures by the name of their field."""
    given = {f.name: getattr(request, f.name) for f in fields(Request) if f.name not in ("prompt", "output")}
    named = {f.name: f.default for f in fields(Request)}
    said = [f"{name}={name if isinstance(value, np.ndarray) else repr(value)}" for name, value in given.items()
            if value is not named[name] and (isinstance(value, np.ndarray) or value != named[name])]  # fmt: skip
    return f"engine.generate({', '.join([repr(request.prompt), *said, *(f'{k}={v!r}' for k, v in how.items())])})"


def right(images: Sequence[np.ndarray], scenes: Sequence[Scene], form: Form = signed_distance) -> list[bool]:
    """Whether the judge finds in each image what its scene says, shapes drawn in a form."""
    return [judge(image, scene, form).right for image, scene in zip(images, scenes, strict=True)]


def holds(image: np.ndarray, item: Item, within: float) -> bool:
    """Whether an object of this color and shape is in the image, its center at most `within` pixels from the item's."""
    # centers of objects are counted from pixel edges in scenes, from pixel centers by the judge
    return any(
        (seen.color, seen.shape) == (item.color, item.shape)
        and max(abs(seen.x + 0.5 - item.x), abs(seen.y + 0.5 - item.y)) <= within
        for seen in look(image)[1]
    )
