"""CLIP text conditioning: tokenize, encode, weigh, and join what one or two text encoders give."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import CheckpointError, RequestError
from .prompt_weights import Chunk, parse_prompt, split_tokens

CONFIG_FIELDS = ("vocab_size", "hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers",
                 "num_attention_heads", "max_position_embeddings", "hidden_act", "layer_norm_eps", "pad_token_id",
                 "bos_token_id", "eos_token_id")  # fmt: skip
CLASSES = ("CLIPTextModel", "CLIPTextModelWithProjection")
NO_COMMA = -1
ACTIVATIONS = ("quick_gelu", "gelu", "gelu_new", "gelu_pytorch_tanh")
_TOKENIZING = threading.Lock()  # a call changes the tokenizer's settings, which fails while another thread calls it


@dataclass(frozen=True)
class Tokens:
    """ids: int64 [P, L], padded to the encoder's length; mask: 1 where a token is not padding."""

    ids: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True)
class Encoded:
    """hidden: [P, L, D] for cross-attention; pooled: [P, E] projected summary, or None."""

    hidden: torch.Tensor
    pooled: torch.Tensor | None


@dataclass(eq=False)
class TextEncoder:
    """One CLIP text encoder with its tokenizer. penultimate: take hidden_states[-2] without the final norm (SDXL).

    vectors: id of an added token -> the ids of its vectors (textual_inversion.py).
    """

    model: Any
    tokenizer: Any
    penultimate: bool
    use_attention_mask: bool = False
    vectors: dict[int, tuple[int, ...]] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Tokens per prompt or chunk of one, begin and end included."""
        return min(self.tokenizer.model_max_length, self.model.config.max_position_embeddings)

    @property
    def layers(self) -> int:
        """Number of transformer layers."""
        return self.model.config.num_hidden_layers

    def chunks(self, prompt: str) -> list[Chunk]:
        """The prompt as chunks of `length` - 2 tokens with their weights; at least one. Raises RequestError."""
        sections = parse_prompt(prompt)
        units = [[(unit, span.weight) for span in section for unit in self._units(span.text)] for section in sections]
        comma = self._units(",")
        return split_tokens(units, self.length - 2, comma[0][0] if len(comma) == 1 else NO_COMMA)

    def pack(self, chunks: Sequence[Chunk]) -> Tokens:
        """Each chunk between begin and end, padded to `length`."""
        t, size = self.tokenizer, self.length
        ids = [[t.bos_token_id, *chunk.ids, t.eos_token_id] for chunk in chunks]
        padded = [row + [t.pad_token_id] * (size - len(row)) for row in ids]
        mask = [[1] * len(row) + [0] * (size - len(row)) for row in ids]
        return Tokens(torch.tensor(padded), torch.tensor(mask))

    def _units(self, text: str) -> list[tuple[int, ...]]:
        """Token ids of a text; the vectors of an embedding stay together."""
        with _TOKENIZING:
            ids = self.tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids
        return [self.vectors.get(token, (token,)) for token in ids]

    def encode(self, tokens: Tokens, clip_skip: int | None) -> Encoded:
        """Hidden states and, for a model with projection, the pooled embedding.

        clip_skip = k takes the hidden state k layers before the default one; for SD1/2 the final layer norm is applied
        to it, for SDXL it is not (as diffusers does).
        """
        skip = clip_skip or 0
        if skip >= self.layers - self.penultimate:
            raise RequestError(
                f"clip_skip: got {skip}, expected less than {self.layers - self.penultimate}, the layers there are"
            )
        device = next(self.model.parameters()).device
        mask = tokens.mask.to(device) if self.use_attention_mask else None
        out = self.model(tokens.ids.to(device), attention_mask=mask, output_hidden_states=True)
        pooled = getattr(out, "text_embeds", None)
        if pooled is not None and self.vectors and (tokens.ids > self.tokenizer.eos_token_id).any():
            pooled = self._pool(out.last_hidden_state, tokens.ids)
        if self.penultimate:
            return Encoded(out.hidden_states[-(skip + 2)], pooled)
        if clip_skip is None:
            return Encoded(out.last_hidden_state, pooled)
        inner = getattr(self.model, "text_model", self.model)
        return Encoded(inner.final_layer_norm(out.hidden_states[-(skip + 1)]), pooled)

    def _pool(self, last: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The projected state at the first end of text.

        Configurations that say eos_token_id 2 make transformers take the largest id for the end, which the ids of
        added embeddings exceed.
        """
        end = (ids == self.tokenizer.eos_token_id).int().argmax(-1).to(last.device)
        return self.model.text_projection(last[torch.arange(len(ids), device=last.device), end])


def encode_prompts(
    encoders: Sequence[TextEncoder], texts: Sequence[Sequence[str]], clip_skip: int | None, *, restore_mean: bool = True
) -> list[Encoded]:
    """Encode prompts with weights, BREAK and any length: hidden [1, chunks * L, D], pooled of the first chunk [1, E].

    texts: per prompt, one text per encoder. All chunks of all prompts go through an encoder in one batch; an encoder
    whose text has fewer chunks than another's gets empty ones. A prompt of one chunk without weights gives what the
    model makes of its tokens. Weights multiply the hidden states that `clip_skip` selects; restore_mean: scale the
    chunk so that its mean stays (the web UI's emphasis "Original", else "No norm"). Raises RequestError.
    """
    parts: list[list[Encoded]] = []
    split = [[encoder.chunks(text) for encoder, text in zip(encoders, prompt, strict=True)] for prompt in texts]
    counts = [max(len(chunks) for chunks in prompt) for prompt in split]
    for index, encoder in enumerate(encoders):
        rows: list[Chunk] = []
        for prompt, count in zip(split, counts, strict=True):
            rows += prompt[index] + [Chunk((), ())] * (count - len(prompt[index]))
        whole = encoder.encode(encoder.pack(rows), clip_skip)
        hidden = _weigh(whole.hidden, rows, restore_mean)
        pooled = [None] * len(rows) if whole.pooled is None else whole.pooled.split(1)
        starts = [sum(counts[:i]) for i in range(len(counts))]
        own = [part.flatten(0, 1)[None] for part in hidden.split(counts)]
        parts.append([Encoded(part, pooled[start]) for part, start in zip(own, starts, strict=True)])
    return [join(prompt) for prompt in zip(*parts, strict=True)]


def pad_prompts(parts: Sequence[Encoded]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Hidden states [sum of P, L, D] of prompts of several lengths, and their lengths (int32) if they are not one.

    Shorter ones end with zeros that the lengths (`Conditioning.kv_len`) keep out of attention, so no prompt sees how
    long its neighbours are.
    """
    lengths = [part.hidden.shape[1] for part in parts]
    hidden = [F.pad(part.hidden, (0, 0, 0, max(lengths) - n)) for part, n in zip(parts, lengths, strict=True)]
    if len(set(lengths)) == 1:
        return torch.cat(hidden), None
    counts = [length for part, length in zip(parts, lengths, strict=True) for _ in range(len(part.hidden))]
    return torch.cat(hidden), torch.tensor(counts, dtype=torch.int32, device=hidden[0].device)


def _weigh(hidden: torch.Tensor, chunks: Sequence[Chunk], restore_mean: bool) -> torch.Tensor:
    """Multiply the states [n, L, D] of every chunk with its weights; chunks without any keep their bits."""
    weighted = [i for i, chunk in enumerate(chunks) if any(weight != 1 for weight in chunk.weights)]
    if not weighted:
        return hidden
    exact = hidden.to(torch.promote_types(hidden.dtype, torch.float32), copy=True)
    for i in weighted:
        weights = torch.ones(hidden.shape[1], dtype=exact.dtype)
        weights[1 : 1 + len(chunks[i].weights)] = torch.tensor(chunks[i].weights, dtype=exact.dtype)
        before, row = exact[i].mean(), exact[i] * weights[:, None].to(exact.device)
        after = row.mean()
        exact[i] = row * torch.where(after == 0, 1, before / after) if restore_mean else row
    return exact.to(hidden.dtype)


def build_model(class_name: str, config: dict[str, Any]) -> nn.Module:
    """A CLIP text model on the meta device from its config.json; unknown options are an error."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    if class_name not in CLASSES:
        raise CheckpointError(f"text encoder: got class {class_name!r}, expected one of {', '.join(CLASSES)}")
    if config.get("hidden_act", "quick_gelu") not in ACTIVATIONS:
        raise CheckpointError(
            f"text encoder: got hidden_act {config['hidden_act']!r}, expected one of {', '.join(ACTIVATIONS)}"
        )
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
        if not isinstance(config.get(name), int):
            raise CheckpointError(f"text encoder config.json: got {name}={config.get(name)!r}, expected a whole number")
    known = {name: value for name, value in config.items() if name in CONFIG_FIELDS}
    with torch.device("meta"):
        made = CLIPTextConfig(**known)
        model = CLIPTextModel(made) if class_name == "CLIPTextModel" else CLIPTextModelWithProjection(made)
    return model.eval().requires_grad_(False)


def load_tokenizer(folder: Path) -> Any:
    """The CLIP tokenizer stored in `folder`; raises CheckpointError if its files are missing."""
    from transformers import CLIPTokenizer

    if not (folder / "tokenizer.json").exists():
        for name in ("vocab.json", "merges.txt"):
            if not (folder / name).exists():
                raise CheckpointError(
                    f"tokenizer: {folder / name} is missing; copy the tokenizer folder of the checkpoint"
                )
    return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)


def join(parts: Sequence[Encoded]) -> Encoded:
    """The encoders' hidden states side by side on the feature axis; pooled is the last encoder's (SDXL)."""
    hidden = parts[0].hidden if len(parts) == 1 else torch.cat([part.hidden for part in parts], -1)
    return Encoded(hidden, parts[-1].pooled)
