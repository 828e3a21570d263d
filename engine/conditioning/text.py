"""CLIP text conditioning: tokenize, encode, and join what one or two text encoders give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError, RequestError

CONFIG_FIELDS = ("vocab_size", "hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers",
                 "num_attention_heads", "max_position_embeddings", "hidden_act", "layer_norm_eps", "pad_token_id",
                 "bos_token_id", "eos_token_id")  # fmt: skip
CLASSES = ("CLIPTextModel", "CLIPTextModelWithProjection")
ACTIVATIONS = ("quick_gelu", "gelu", "gelu_new", "gelu_pytorch_tanh")


@dataclass(frozen=True)
class Tokens:
    """ids: int64 [P, L], padded to the encoder's length; mask: 1 where a token is not padding; cut.

    Text beyond L, per prompt.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    cut: tuple[str, ...]


@dataclass(frozen=True)
class Encoded:
    """hidden: [P, L, D] for cross-attention; pooled: [P, E] projected summary, or None."""

    hidden: torch.Tensor
    pooled: torch.Tensor | None

    def select(self, index: Sequence[int]) -> Encoded:
        """The prompts at `index`, in that order."""
        rows = torch.tensor(list(index), device=self.hidden.device)
        return Encoded(self.hidden[rows], None if self.pooled is None else self.pooled[rows])


@dataclass(frozen=True)
class TextEncoder:
    """One CLIP text encoder with its tokenizer. penultimate: take hidden_states[-2] without the final norm (SDXL)."""

    model: Any
    tokenizer: Any
    penultimate: bool
    use_attention_mask: bool = False

    @property
    def length(self) -> int:
        """Tokens per prompt, begin and end included."""
        return min(self.tokenizer.model_max_length, self.model.config.max_position_embeddings)

    @property
    def layers(self) -> int:
        """Number of transformer layers."""
        return self.model.config.num_hidden_layers

    def tokenize(self, prompts: Sequence[str]) -> Tokens:
        """Tokens of each prompt, cut to `length`; what was cut is returned, never dropped silently."""
        options = {"max_length": self.length, "truncation": True, "padding": "max_length", "return_tensors": "pt"}
        found = self.tokenizer(list(prompts), **options)
        cut = []
        for prompt in prompts:
            ids = self.tokenizer(prompt, truncation=False, verbose=False).input_ids
            cut.append(self.tokenizer.decode(ids[self.length - 1 : -1]) if len(ids) > self.length else "")
        return Tokens(found.input_ids, found.attention_mask, tuple(cut))

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
        if self.penultimate:
            return Encoded(out.hidden_states[-(skip + 2)], pooled)
        if clip_skip is None:
            return Encoded(out.last_hidden_state, pooled)
        inner = getattr(self.model, "text_model", self.model)
        return Encoded(inner.final_layer_norm(out.hidden_states[-(skip + 1)]), pooled)


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
