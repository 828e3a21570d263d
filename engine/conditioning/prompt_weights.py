"""Weights and breaks written into a prompt, and how its tokens fill the encoder: as in AUTOMATIC1111's web UI.

`(word)` multiplies the weight by 1.1, `[word]` divides by 1.1, `(word:1.3)` multiplies by 1.3; brackets nest, and one
that is never closed reaches to the end. A backslash before a bracket or a backslash takes its meaning away. The word
BREAK ends a chunk. Scheduled prompts (`[a:b:0.5]`, `[a|b]`) are not read as such.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import RequestError

STRONGER, WEAKER = 1.1, 1 / 1.1
BACKTRACK = 20
"""A chunk that overflows ends after its last comma, if that is at most so many tokens before the chunk's end."""

_TOKEN = re.compile(r"\\[\\()\[\]]|[(\[]|:\s*([+-]?[.\d]+)\s*\)|[)\]]|[^\\()\[\]:]+|[\\:]")
_BREAK = re.compile(r"\s*\bBREAK\b\s*")


@dataclass(frozen=True)
class Span:
    """A piece of a prompt and its weight."""

    text: str
    weight: float = 1.0


@dataclass(frozen=True)
class Chunk:
    """Tokens that go through the encoder together, without begin and end, and the weight of each."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]


def parse_prompt(prompt: str) -> tuple[tuple[Span, ...], ...]:
    """The spans between BREAKs; neighbours of one weight are one span, and empty ones are left out.

    A prompt without syntax is its own single span. Raises RequestError for a weight that is no finite number.
    """
    sections: list[list[Span]] = [[]]
    for text, weight in _weigh(prompt):
        if not math.isfinite(weight):
            raise RequestError(f"prompt: the brackets around {text[:40]!r} multiply to {weight}; use smaller weights")
        for i, part in enumerate(_BREAK.split(text)):
            if i > 0:
                sections.append([])
            here = sections[-1]
            if part and here and here[-1].weight == weight:
                here[-1] = Span(here[-1].text + part, weight)
            elif part:
                here.append(Span(part, weight))
    return tuple(tuple(section) for section in sections)


def split_tokens(sections: Sequence[Sequence[tuple[tuple[int, ...], float]]], size: int, comma: int) -> list[Chunk]:
    """Fill chunks of at most `size` tokens, a new one after every section and where the tokens do not fit.

    sections: units (tokens that stay together, their weight). comma: the id of the comma, see `BACKTRACK`. There is
    always one chunk, perhaps empty. Raises RequestError for a unit longer than a chunk.
    """
    chunks: list[list[tuple[int, float]]] = []
    for section in sections:
        current: list[tuple[int, float]] = []
        after_comma = 0  # where the text after the last comma of `current` begins; 0: there is none
        for unit, weight in section:
            if len(unit) > size:
                raise RequestError(f"prompt: an embedding of {len(unit)} vectors does not fit a chunk of {size} tokens")
            if len(current) + len(unit) > size:
                near = after_comma > max(0, size - BACKTRACK) and unit != (comma,)
                end = after_comma if near else size
                chunks.append(current[:end])
                current, after_comma = current[end:], 0
            if len(current) + len(unit) > size:
                chunks.append(current)
                current = []
            current += [(token, weight) for token in unit]
            after_comma = len(current) if unit == (comma,) else after_comma
        chunks.append(current)
    if len(chunks) > 1 and not chunks[-1]:
        chunks.pop()
    return [Chunk(tuple(token for token, _ in chunk), tuple(weight for _, weight in chunk)) for chunk in chunks]


def _weigh(prompt: str) -> list[tuple[str, float]]:
    """Pieces of text in order and the product of the weights around each."""
    texts: list[str] = []
    weights: list[float] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def close(bracket: str, factor: float) -> None:
        for i in range(opened[bracket].pop(), len(weights)):
            weights[i] *= factor

    for match in _TOKEN.finditer(prompt):
        token, number = match[0], match[1]
        if token in opened:
            opened[token].append(len(texts))
        elif number is not None and opened["("]:
            close("(", _number(number))
        elif token == ")" and opened["("]:
            close("(", STRONGER)
        elif token == "]" and opened["["]:
            close("[", WEAKER)
        else:
            texts.append(token[1] if token[0] == "\\" and len(token) == 2 else token)
            weights.append(1.0)
    for bracket, factor in (("(", STRONGER), ("[", WEAKER)):
        while opened[bracket]:
            close(bracket, factor)
    return list(zip(texts, weights, strict=True))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise RequestError(
            f"prompt: got the weight {text!r}, expected a number as in (word:1.3); write \\( and \\) for plain brackets"
        ) from None
