"""Which files hold the weights of a component: one file or shards, with or without a variant, old and new spellings."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError

PICKLES = (".bin", ".ckpt", ".pt", ".pth")

# name[.variant].safetensors, name[.variant]-00001-of-00003.safetensors, name-00001-of-00003.variant.safetensors (old),
# name.safetensors.index[.variant].json, name.safetensors.variant.index.json (old)
_NAMES = ("diffusion_pytorch_model", "model")
_NAME = rf"(?P<name>{'|'.join(_NAMES)})"
_VARIANT = r"(?:\.(?P<variant>[A-Za-z][\w]*))?"
_SHARD = r"-(?P<part>\d{5})-of-(?P<parts>\d{5})"
_SINGLE = re.compile(rf"{_NAME}{_VARIANT}\.safetensors")
_SHARDS = (
    re.compile(rf"{_NAME}{_VARIANT}{_SHARD}\.safetensors"),
    re.compile(rf"{_NAME}{_SHARD}{_VARIANT}\.safetensors"),
)
_INDICES = (
    re.compile(rf"{_NAME}\.safetensors\.index{_VARIANT}\.json"),
    re.compile(rf"{_NAME}\.safetensors{_VARIANT}\.index\.json"),
)


@dataclass(frozen=True)
class Choice:
    """The files to read: those of `index` if there is one, else `files`."""

    files: tuple[str, ...]
    index: str | None = None
    note: str | None = None  # something the user should know


def listing(folder: Path) -> list[str]:
    """Names of the files in a folder, sorted."""
    return sorted(entry.name for entry in folder.iterdir() if entry.is_file())


def choose(component: str, names: Iterable[str], variant: str | None) -> Choice:
    """Choose among the files of a component.

    The variant asked for comes first, then weights without a variant, then fp16, then what else there is. Raises
    CheckpointError if nothing can be read, saying what was found.
    """
    names = sorted(names)
    found = _candidates(component, names)
    if not found:
        pickles = [name for name in names if name.endswith(PICKLES)]
        if pickles:
            raise CheckpointError(
                f"{component} has only pickled weights ({', '.join(pickles)}), which can run code when opened: get the "
                "safetensors files, or load it once with diffusers and save_pretrained(folder, safe_serialization=True)"
            )
        raise CheckpointError(
            f"{component} has no weights: expected {_NAMES[0]}.safetensors or {_NAMES[1]}.safetensors, or shards of "
            f"them; found: {', '.join(names) or 'nothing'}"
        )
    order = sorted(found, key=lambda v: (v != variant, v is not None, v != "fp16", v or ""))
    picked, choice = order[0], found[order[0]]
    if picked == variant:
        return choice
    wanted = f"variant {variant!r}" if variant else "weights without a variant"
    taken = f"variant {picked!r}" if picked else "weights without a variant"
    return Choice(choice.files, choice.index, f"no {wanted} there; using the {taken}")


def _candidates(component: str, names: list[str]) -> dict[str | None, Choice]:
    """Variant -> how to read it. A single file goes before an index, an index before shards without one."""
    found: dict[str | None, Choice] = {}
    shards: dict[str | None, dict[str, str]] = {}
    totals: dict[str | None, int] = {}
    for name in names:
        for pattern in _SHARDS:
            if match := pattern.fullmatch(name):
                shards.setdefault(match["variant"], {})[match["part"]] = name
                totals[match["variant"]] = int(match["parts"])
    for variant, parts in shards.items():
        found[variant] = Choice(tuple(parts[part] for part in sorted(parts)))
    for name in names:
        for pattern in _INDICES:
            if match := pattern.fullmatch(name):
                found[match["variant"]] = Choice((), index=name)
    for variant, choice in found.items():
        missing = [i for i in range(1, totals.get(variant, 0) + 1) if f"{i:05d}" not in shards.get(variant, {})]
        if choice.index is None and missing:
            raise CheckpointError(f"{component}: shard {missing[0]} of {totals[variant]} is missing: fetch it again")
    for name in names:
        if match := _SINGLE.fullmatch(name):
            found[match["variant"]] = Choice((name,))
    return found
