"""Textual inversion (Gal et al. 2022): embeddings learned for new words, added to tokenizers and embedding tables."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import CheckpointError, NumericsError, RequestError
from ..weights.files import PICKLES
from .text import TextEncoder

UNNAMED = ("emb_params", "*")
"""Keys of files that hold one embedding and not its word: the file's name is the word then."""
BY_ENCODER = ("clip_l", "clip_g")
"""Keys of SDXL's files, in the order of its text encoders."""
SYNTAX = "()[]\\"


@dataclass(frozen=True, eq=False)
class Embedding:
    """A word and its vectors [n, D]: one tensor ("") or one per text encoder ("clip_l", "clip_g")."""

    token: str
    vectors: Mapping[str, Tensor]


def read_embeddings(source: str | Path, token: str | None = None) -> list[Embedding]:
    """The embeddings of a `.safetensors` file: `emb_params`, `clip_l` and `clip_g`, or diffusers' {word: vectors}.

    token: the word to use instead of the file's (of files with one embedding). Raises CheckpointError for what is no
    such file.
    """
    path = Path(source).expanduser()
    if path.suffix in PICKLES:
        raise CheckpointError(f"embedding {path}: pickled files can run code when opened; convert it to safetensors")
    if not path.is_file():
        raise CheckpointError(f"embedding {path}: no such file; `stepfuse models` lists the built-in ones")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise CheckpointError(f"embedding {path}: not a safetensors file ({error}); fetch it again") from None
    return parse_embeddings(path.stem, tensors, token)


def parse_embeddings(name: str, tensors: Mapping[str, Tensor], token: str | None = None) -> list[Embedding]:
    """Embeddings from the tensors of a file `name`. Raises as `read_embeddings`; NumericsError for NaN or Inf."""
    if bad := [f"{key} {list(t.shape)}" for key, t in tensors.items() if t.dim() not in (1, 2) or t.numel() == 0]:
        raise CheckpointError(f"embedding {name}: expected vectors [n, D], got {', '.join(bad[:3])}")
    if bad := [key for key, t in tensors.items() if not t.is_floating_point() or not torch.isfinite(t).all()]:
        raise NumericsError(f"embedding {name}: NaN, Inf or integers in {', '.join(bad[:20])}")
    vectors = {key: t if t.dim() == 2 else t[None] for key, t in tensors.items()}
    if vectors and vectors.keys() <= set(BY_ENCODER):
        return [Embedding(token or name, vectors)]
    if len(vectors) == 1 and set(vectors) <= set(UNNAMED):
        return [Embedding(token or name, {"": next(iter(vectors.values()))})]
    if not vectors or vectors.keys() & {*BY_ENCODER, *UNNAMED} or (token is not None and len(vectors) > 1):
        expected = (
            "one embedding to be renamed" if token is not None else "emb_params, clip_l and clip_g, or {word: vectors}"
        )
        raise CheckpointError(
            f"embedding {name}: got the keys {', '.join(sorted(vectors)) or 'none'}, expected {expected}"
        )
    return [Embedding(token or key, {"": t}) for key, t in vectors.items()]


class TextualInversions:
    """The embeddings added to the text encoders of one checkpoint.

    Tokenizers are copied, embedding tables are put in place of the originals, which come back with `set([])`. Not
    thread-safe: no prompt may be encoded meanwhile.
    """

    def __init__(self, encoders: Sequence[TextEncoder]) -> None:
        self.active: tuple[str, ...] = ()
        self._encoders = tuple(encoders)
        self._before: list[tuple[Any, nn.Parameter]] = []

    def set(self, embeddings: Sequence[Embedding]) -> None:
        """Make these, and no others, the words that were added.

        A word of n vectors stands for n tokens; case does not matter, and it is found inside other words only if it
        begins or ends with another sign than a letter or digit. Raises, with nothing changed, CheckpointError where
        vectors do not fit the encoders, RequestError for words that cannot be used.
        """
        plans = [self._vectors(index, embeddings) for index in range(len(self._encoders))]
        self._check_words([embedding.token for embedding in embeddings])
        self._restore()
        if embeddings:
            self._before = [(e.tokenizer, e.model.get_input_embeddings().weight) for e in self._encoders]
            for encoder, plan in zip(self._encoders, plans, strict=True):
                _extend(encoder, plan)
        self.active = tuple(embedding.token for embedding in embeddings)

    def _vectors(self, index: int, embeddings: Sequence[Embedding]) -> dict[str, Tensor]:
        """word -> its vectors for one encoder."""
        encoder, several = self._encoders[index], len(self._encoders) > 1
        if embeddings and not hasattr(encoder.model, "get_input_embeddings"):
            raise RequestError(
                "embeddings: an exported text encoder's table is fixed; load with the text encoder in torch"
            )
        width = encoder.model.get_input_embeddings().weight.shape[1]
        key = BY_ENCODER[index] if several else BY_ENCODER[encoder.penultimate]  # SDXL's refiner has the second alone
        wanted = key if several or encoder.penultimate else ""
        found: dict[str, Tensor] = {}
        for embedding in embeddings:
            vectors = embedding.vectors.get(wanted)
            if vectors is None or vectors.shape[1] != width or vectors.shape[0] > encoder.length - 2:
                got = ", ".join(f"{k or 'vectors'} {list(t.shape)}" for k, t in embedding.vectors.items())
                raise CheckpointError(
                    f"embedding {embedding.token!r}: got {got}; expected {wanted or 'vectors'} [n, {width}], n up to "
                    f"{encoder.length - 2}, for text encoder {index + 1} of {len(self._encoders)}: of another model?"
                )
            found[embedding.token] = vectors
        return found

    def _check_words(self, words: Sequence[str]) -> None:
        lowered = [word.lower() for word in words]
        tokenizers = [before[0] for before in self._before] or [encoder.tokenizer for encoder in self._encoders]
        vocabulary = {token.removesuffix("</w>") for tokenizer in tokenizers for token in tokenizer.get_vocab()}
        for word, low in zip(words, lowered, strict=True):
            if not word.strip() or word != word.strip() or set(word) & set(SYNTAX):
                reason = f"expected a word without spaces at its ends and without any of {SYNTAX}"
            elif lowered.count(low) > 1:
                reason = "expected every word once"
            elif low in vocabulary:
                reason = "which the tokenizer knows already"
            else:
                continue
            raise RequestError(f"embedding: got the word {word!r}, {reason}; give (file, another word)")

    def _restore(self) -> None:
        for encoder, (tokenizer, table) in zip(self._encoders, self._before, strict=False):
            encoder.tokenizer, encoder.vectors = tokenizer, {}
            _install(encoder, table)
        self._before = []


@torch.no_grad()
def _extend(encoder: TextEncoder, plan: Mapping[str, Tensor]) -> None:
    """Give the encoder a tokenizer that knows the words of `plan` and a table with their vectors."""
    from tokenizers import AddedToken

    tokenizer = copy.deepcopy(encoder.tokenizer)
    tokenizer.add_tokens([AddedToken(word, single_word=_is_word(word)) for word in plan])
    first = {word: tokenizer.convert_tokens_to_ids(word) for word in plan}
    table = encoder.model.get_input_embeddings().weight
    spare = max(*first.values(), len(tokenizer) - 1, len(table) - 1) + 1
    rows: dict[int, Tensor] = {}
    vectors: dict[int, tuple[int, ...]] = {}
    for word, values in plan.items():
        ids = (first[word], *range(spare, spare + len(values) - 1))
        spare += len(values) - 1
        vectors[first[word]] = ids
        rows |= dict(zip(ids, values, strict=True))
    larger = table.new_zeros(spare, table.shape[1])
    larger[: len(table)] = table
    for row, value in rows.items():
        larger[row] = value.to(larger)
    encoder.tokenizer, encoder.vectors = tokenizer, vectors
    _install(encoder, nn.Parameter(larger, requires_grad=False))


def _install(encoder: TextEncoder, table: nn.Parameter) -> None:
    embedding = encoder.model.get_input_embeddings()
    embedding.weight, embedding.num_embeddings = table, len(table)


def _is_word(word: str) -> bool:
    return word[0].isalnum() and word[-1].isalnum()
