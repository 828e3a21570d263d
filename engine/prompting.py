"""What the rows of a request are conditioned on: its prompts, the embeddings it brings instead, or its class labels."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .components import Components
from .conditioning.prompt_weights import parse_prompt
from .conditioning.text import Encoded, encode_prompts, pad_prompts
from .errors import RequestError
from .loras import Asked
from .low_resolution import noise_level
from .models.unet import Conditioning
from .request import Request
from .samples import check_user_request, condition_user, refuse_user_fields
from .sampling.guidance import guidance_embedding

if TYPE_CHECKING:
    from .settling import Settled

TEXTS = ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2")
EMBEDS = (("prompt_embeds", "pooled_prompt_embeds"), ("negative_prompt_embeds", "negative_pooled_prompt_embeds"))
AESTHETICS = (6.0, 2.5)
"""Scores that SDXL's refiner is told, of the prompt and of what is guided away from (diffusers' defaults)."""
LORA_TAG = re.compile(r"<lora:[^<>]*>")

Key = tuple[tuple[str, ...], int | None, Asked]
"""A text for each encoder, clip_skip, and the LoRAs of the encoders."""


def check_prompts(parts: Components, request: Request) -> None:
    """Raise RequestError for prompts that cannot be read, embeddings and labels of wrong shapes, and too large a
    clip_skip: here, and not where requests of several callers are encoded together.
    """
    if parts.user is not None:
        check_user_request(parts.user, parts.name, request)
        return
    refuse_user_fields(parts.name, request)
    if parts.family.text == "none":
        _labels(parts, request)
        return
    for name in TEXTS:
        parse_prompt(getattr(request, name) or "")
    most = min(encoder.layers - encoder.penultimate for encoder in parts.text)
    if (request.clip_skip or 0) >= most:
        raise RequestError(f"clip_skip: got {request.clip_skip}, expected less than {most}, the layers there are")
    for names in EMBEDS:
        _check_embeds(parts, request, *names)
    if request.negative_prompt_embeds is not None and (request.negative_prompt or request.negative_prompt_2):
        raise RequestError("negative_prompt: got negative_prompt_embeds, too; give one of them")
    if request.prompt_embeds is not None and request.clip_skip is not None:
        raise RequestError("clip_skip: prompt_embeds come from a layer already; leave it out")


def _check_embeds(parts: Components, request: Request, hidden: str, pooled: str) -> None:
    """Raise RequestError for embeddings that do not fit the model, or each other."""
    net, states, summary = parts.denoiser.config, getattr(request, hidden), getattr(request, pooled)

    def check(name: str, tensor: Any, axes: int, width: int | None) -> None:
        if not isinstance(tensor, torch.Tensor):
            raise RequestError(f"{name}: got {type(tensor).__name__}, expected a tensor")
        shape = tuple(tensor.shape)
        if len(shape) != axes or shape[0] not in (1, request.n) or 0 in shape or shape[-1] != width:
            expected = f"[{'1' if request.n == 1 else f'1 or {request.n}'}, {'L, ' if axes == 3 else ''}{width}]"
            raise RequestError(f"{name}: got shape {shape}, expected {expected}")

    if states is not None:
        check(hidden, states, 3, net.text_dim or net.blocks.cross_dim)
    if summary is not None and not net.added_time_dim:
        raise RequestError(f"{pooled}: {parts.name} takes none; leave them out")
    if net.added_time_dim and (summary is None) != (states is None):
        raise RequestError(f"{pooled}: this family needs them beside {hidden}; give both or none")
    if summary is not None:
        ids = 5 if parts.family.aesthetics else 6
        check(pooled, summary, 2, net.added_dim - ids * (net.added_time_dim or 0))


def token_counts(parts: Components, settled: Settled) -> list[int]:
    """Tokens of each of the request's prompts with padding: of the longest, its model rows have room for."""
    request = settled.request
    embeds = (request.prompt_embeds, request.negative_prompt_embeds if settled.branches == 2 else None)
    counts = [max(len(encoder.chunks(text)) * encoder.length for encoder, text in zip(parts.text, texts, strict=True))
              for texts, *_ in _texts(parts, settled)]  # fmt: skip
    return counts + [given.shape[1] for given in embeds if given is not None]


def condition(parts: Components, batch: Sequence[Settled]) -> list[tuple[Conditioning, tuple[str, ...]]]:
    """Conditioning of the model rows (image 0 cond, image 0 uncond, image 1 ...) of each request, and warnings.

    The distinct prompts of all requests that share clip_skip and LoRAs go through each text encoder in one batch; in
    deterministic mode one by one.
    """
    if parts.user is not None:
        device = parts.config.device
        return [(condition_user(one.request, len(one.seeds), one.branches, device), ()) for one in batch]
    if parts.family.text == "none":
        return [(_label_conditioning(parts, one), ()) for one in batch]
    encoded = _encode(parts, [key for one in batch for key in _texts(parts, one)])
    return [(_text_conditioning(parts, one, encoded), _warnings(one.request)) for one in batch]


def _encode(parts: Components, keys: Sequence[Key]) -> dict[Key, Encoded]:
    found: dict[Key, Encoded] = {}
    for skip, loras in dict.fromkeys((skip, loras) for _, skip, loras in keys):
        texts = list(dict.fromkeys(text for text, *how in keys if how == [skip, loras]))
        for part in [[text] for text in texts] if parts.config.deterministic else [texts]:
            with parts.loras.of(loras):
                encoded = encode_prompts(parts.text, part, skip)
            found |= {(text, skip, loras): one for text, one in zip(part, encoded, strict=True)}
    return found


def _texts(parts: Components, settled: Settled) -> list[Key]:
    """The branches that must be encoded, in order.

    clip_skip holds for the prompt only, as in diffusers; the negative prompt always takes the default layer.
    """
    request, encoders, loras = settled.request, len(parts.text), parts.loras.for_texts(settled.loras)
    texts: list[Key] = []
    if not encoders:  # guidance leads away from a class, or from what the user gives
        return texts
    if request.prompt is not None:
        texts.append(((request.prompt, request.prompt_2 or request.prompt)[:encoders], request.clip_skip, loras))
    if settled.branches == 2 and request.negative_prompt_embeds is None and not _zero_negative(parts, request):
        negative = request.negative_prompt or ""
        texts.append(((negative, request.negative_prompt_2 or negative)[:encoders], None, loras))
    return texts


def _zero_negative(parts: Components, request: Request) -> bool:
    return parts.zero_negative and request.negative_prompt is None and request.negative_prompt_2 is None


def _warnings(request: Request) -> tuple[str, ...]:
    tags = [tag for name in TEXTS for tag in LORA_TAG.findall(getattr(request, name) or "")]
    return tuple(
        f"{tag} in the prompt is read as text: use Request.loras, or set LoRAs on the engine (--lora)" for tag in tags
    )


def _text_conditioning(parts: Components, settled: Settled, encoded: dict[Key, Encoded]) -> Conditioning:
    n = len(settled.seeds)
    branches = _branches(parts, settled, iter([encoded[key] for key in _texts(parts, settled)]))
    hidden, kv_len = pad_prompts([Encoded(branch.hidden.expand(n, -1, -1), None) for branch in branches])
    rows: dict[str, Any] = {"hidden": _by_image(hidden, n)}
    if kv_len is not None:
        rows["kv_len"] = _by_image(kv_len, n)
    if parts.denoiser.config.added_time_dim:
        pooled = [branch.pooled.expand(n, -1) for branch in branches if branch.pooled is not None]
        rows["pooled"] = torch.stack(pooled, 1).flatten(0, 1)
        rows["time_ids"] = _sizes(parts, settled).to(parts.config.device).repeat(n, 1)
    if parts.denoiser.config.time_cond_dim is not None:
        embedding = guidance_embedding([settled.guidance_scale] * n, parts.denoiser.config.time_cond_dim)
        rows["timestep_cond"] = embedding.to(parts.config.device)
    if parts.denoiser.config.class_embedding != "none":
        labels = torch.tensor(_labels(parts, settled.request), dtype=torch.int64, device=parts.config.device)
        rows["class_labels"] = labels.repeat_interleave(settled.branches)
    return Conditioning(**rows)


def _sizes(parts: Components, settled: Settled) -> torch.Tensor:
    """Sizes and crops of SDXL's branches in pixels, float32 [J, 6]; [J, 5] with aesthetic scores for its refiner."""
    height, width = settled.height, settled.width
    if not parts.family.aesthetics:
        return torch.tensor([[height, width, 0, 0, height, width]] * settled.branches, dtype=torch.float32)
    return torch.tensor([[height, width, 0, 0, score] for score in AESTHETICS[: settled.branches]], dtype=torch.float32)


def _branches(parts: Components, settled: Settled, encoded: Iterable[Encoded]) -> list[Encoded]:
    """The prompt and, with guidance, what it is guided away from; encoded: those of `_texts`."""
    request, texts = settled.request, iter(encoded)
    given = [_given(parts, request, *names) for names in EMBEDS]
    positive = given[0] or next(texts)
    if settled.branches == 1:
        return [positive]
    if given[1] is None and _zero_negative(parts, request):
        pooled = None if positive.pooled is None else torch.zeros_like(positive.pooled)
        return [positive, Encoded(torch.zeros_like(positive.hidden), pooled)]
    return [positive, given[1] or next(texts)]


def _given(parts: Components, request: Request, hidden: str, pooled: str) -> Encoded | None:
    """Embeddings the user computed."""
    states, summary = getattr(request, hidden), getattr(request, pooled)
    if states is None:
        return None
    device = parts.config.device
    return Encoded(states.to(device), None if summary is None else summary.to(device))


def _by_image(rows: torch.Tensor, n: int) -> torch.Tensor:
    """Rows that lead with the branches [J * n, ...], image by image."""
    return rows.unflatten(0, (-1, n)).transpose(0, 1).flatten(0, 1)


def _label_conditioning(parts: Components, settled: Settled) -> Conditioning:
    labels = _labels(parts, settled.request)
    if labels is None:
        return Conditioning()
    branches = [(label, parts.null_class)[: settled.branches] for label in labels]
    return Conditioning(class_labels=torch.tensor(branches, dtype=torch.int64, device=parts.config.device).flatten())


def _labels(parts: Components, request: Request) -> tuple[int, ...] | None:
    """What the class embedding of every image is given: a class, or the level of an upscaler's low-resolution image."""
    labels, n = request.class_labels, request.n
    if parts.augments:
        if labels is not None:
            raise RequestError(f"class_labels: {parts.name} takes noise_level instead; leave them out")
        level = noise_level(parts, request)
        return None if parts.denoiser.config.class_embedding == "none" else (level,) * n
    classes = parts.classes
    if not classes:
        if labels is not None:
            raise RequestError(f"class_labels: {parts.name} is unconditional; leave them out")
        return None
    chosen = labels if isinstance(labels, (tuple, list)) else (labels,) * n
    known = tuple(label for label in chosen if type(label) is int and 0 <= label < classes)
    if len(chosen) != n or len(known) != n:
        raise RequestError(f"class_labels: got {labels!r}, expected {n} class numbers from 0 to {classes - 1}")
    return known
