"""From the keys of a checkpoint to the names of a module: rules are data (`maps/`), every key is used exactly once."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Rule:
    """Keys matching `pattern` may be meant as `target` (a replacement as in re.sub)."""

    pattern: str
    target: str


@dataclass(frozen=True)
class KeyMap:
    """How the keys of one kind of component are read.

    rules: other spellings, tried in this order, one after another and in combination, where a key is not a name of the
    module. ignore: patterns of keys that carry no weight of the model. flatten: patterns of names that may be stored as
    1x1 convolutions [a, b, 1, 1] of a matrix [a, b].
    """

    rules: tuple[Rule, ...] = ()
    ignore: tuple[str, ...] = ()
    flatten: tuple[str, ...] = ()


@dataclass(frozen=True)
class Assignment:
    """One tensor of the checkpoint and the parameter it fills."""

    key: str
    name: str
    shape: tuple[int, ...]  # of the parameter; the stored one may have trailing ones


def assign(keys: Shapes, names: Shapes, keymap: KeyMap, what: str) -> list[Assignment]:
    """Match the stored `keys` with the parameter `names` of a module, both with their shapes.

    Raises CheckpointError listing, by name, parameters without a tensor, tensors without a parameter, two tensors for
    one parameter, and tensors of the wrong shape. what: the component, for the message.
    """
    found: dict[str, str] = {}
    extra: list[str] = []
    twice: list[str] = []
    for key in keys:
        name = _resolve(key, names, keymap)
        if name is None:
            if not any(re.search(pattern, key) for pattern in keymap.ignore):
                extra.append(key)
        elif name in found:
            twice.append(f"{name}: {found[name]} and {key}")
        else:
            found[name] = key
    missing = [name for name in names if name not in found]
    misshaped = [
        f"{key}: {list(keys[key])}, expected {list(names[name])}"
        for name, key in found.items()
        if not _fits(keys[key], names[name], name, keymap)
    ]
    problems = {
        "missing in the checkpoint": missing,
        "not part of the model": extra,
        "stored twice": twice,
        "of the wrong shape": misshaped,
    }
    if any(problems.values()):
        parts = [_list(title, entries) for title, entries in problems.items() if entries]
        raise CheckpointError(f"the weights of {what} do not fit its configuration: " + "; ".join(parts))
    return [Assignment(key, name, names[name]) for name, key in found.items()]


def _resolve(key: str, names: Shapes, keymap: KeyMap) -> str | None:
    """The module's name for a key, or None."""
    if key in names:
        return key
    spelling = key
    for rule in keymap.rules:
        single = re.sub(rule.pattern, rule.target, key)
        if single in names:
            return single
        spelling = re.sub(rule.pattern, rule.target, spelling)
        if spelling in names:
            return spelling
    return None


def _fits(stored: tuple[int, ...], expected: tuple[int, ...], name: str, keymap: KeyMap) -> bool:
    if stored == expected:
        return True
    trailing = stored[len(expected) :]
    flat = stored[: len(expected)] == expected and len(trailing) > 0 and math.prod(trailing) == 1
    return flat and any(re.search(pattern, name) for pattern in keymap.flatten)


def _list(title: str, entries: list[str], limit: int = 20) -> str:
    more = f" and {len(entries) - limit} more" if len(entries) > limit else ""
    return f"{len(entries)} {title}: {', '.join(entries[:limit])}{more}"
