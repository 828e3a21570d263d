"""The report docs/gallery.md: per feature its strip, the call that made a picture of it, and the counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

HEAD = """# Gallery

Written by `python -m stepfuse.examples.gallery` with the built-in models, in float32 on the CPU; do not edit. Prompts
and seeds are fixed (scene and seed i for i = 0, 1, ...) and the strips show the first ones: none was chosen by its
result, settings such as strengths were. Counts are those of `examples/shapes/judge.py`, which reads the pixels; a red
frame is a picture it finds wrong. Pictures that are given were drawn by `examples/shapes/render.py`. In the calls,
`image`, `mask` and `change_map` are arrays; settings that are not said are the model's defaults.
"""


def report(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown of all entries."""
    return "\n".join([HEAD, *(_section(name, entry) for name, entry in entries.items())])


def _section(name: str, entry: Mapping[str, Any]) -> str:
    title, lines = entry["title"], fill(entry["text"], 120, break_on_hyphens=False)
    strip = f"![{title}](images/gallery/{name}.png)"
    return "\n\n".join([f"## {title}", lines, strip, f"```text\n{entry['call']}\n```", _table(entry["scores"])]) + "\n"


def _table(scores: Sequence[Mapping[str, Any]]) -> str:
    """One line for each count; where settings are compared, one for each setting."""
    places = list(dict.fromkeys(s["at"] for s in scores))
    if places == [""]:
        return "\n".join(["| judged | pictures |", "|---|---|", *(f"| {s['what']} | {_share(s)} |" for s in scores)])
    kinds = list(dict.fromkeys(s["what"] for s in scores))
    found = {(s["at"], s["what"]): _share(s) for s in scores}
    lines = ["| | " + " | ".join(kinds) + " |", "|---|" + "---|" * len(kinds)]
    return "\n".join([*lines, *(f"| {at} | {' | '.join(found[at, kind] for kind in kinds)} |" for at in places)])


def _share(score: Mapping[str, Any]) -> str:
    return f"{score['count']} of {score['of']}"
