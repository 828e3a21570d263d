"""A request, phase by phase, as functions over Components.

Settle -> encode -> start -> (the running batch) -> decode.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from .batch import Arrivals
from .components import Components
from .conditioning import text as clip
from .determinism import with_fixed_algorithms
from .errors import NumericsError, RequestError
from .models.unet import Conditioning, Prepared
from .models.vae import from_model
from .models.vae_tiling import tiled
from .request import Request
from .sampling.guidance import guidance_embedding
from .sampling.noise import initial_noise
from .settling import Settled

TILE = 64
MEGAPIXEL = 1024 * 1024
"""decode_rows of 0 decodes this many pixels together: below it, one image does not fill a large GPU."""
UNTILED_PIXELS = 1536 * 1536
"""vae_tiling="auto" decodes in tiles above this: memory grows with the area, and the attention in the middle of the VAE
with its square."""


@with_fixed_algorithms
def encode(parts: Components, batch: Sequence[Settled]) -> list[tuple[Conditioning, tuple[str, ...]]]:
    """Conditioning of the model rows (image 0 cond, image 0 uncond, image 1 ...) of each request, and what was cut.

    The prompts of all requests that share a clip_skip go through each text encoder in one batch; in deterministic mode
    one by one.
    """
    if parts.family.text == "none":
        return [(_label_conditioning(parts, one), ()) for one in batch]
    prompts = _PromptSet(parts)
    for one in batch:
        for text, skip in _texts(parts, one):
            prompts.add(text, skip)
    prompts.encode()
    return [_text_conditioning(parts, one, prompts) for one in batch]


@with_fixed_algorithms
def start(parts: Components, settled: Settled, conditioning: Conditioning, images: Sequence[int]) -> Arrivals:
    """The rows of the request's images at `images` before their first update, on the engine's device."""
    device = parts.config.device
    dtype = torch.float64 if parts.config.dtype == torch.float64 else torch.float32
    plan = settled.plan
    noise = torch.cat([_noise(parts, settled, index) for index in images])
    return Arrivals(
        x=(noise.to(dtype) * plan.init_scale).to(device),
        c_in=plan.updates[0].c_in,
        table=torch.from_numpy(plan.table()).to(dtype).to(device),
        weights=[settled.guidance_scale, 1 - settled.guidance_scale] if settled.branches == 2 else [1.0],
        rescale=settled.request.guidance_rescale,
        seeds=[settled.seeds[index] for index in images],
        draws=2 if plan.stochastic else 0,
        channels=parts.denoiser.config.out_channels,
        prepared=prepare(parts, settled, conditioning, images),
    )


@with_fixed_algorithms
def prepare(parts: Components, settled: Settled, conditioning: Conditioning, images: Sequence[int]) -> Prepared:
    """The model rows of the request's images at `images`: what all their updates share.

    In deterministic mode the images are prepared one by one.
    """
    if parts.config.deterministic and len(images) > 1:
        return Prepared.cat([prepare(parts, settled, conditioning, [index]) for index in images])
    timesteps = torch.tensor(settled.plan.timesteps, dtype=torch.float32, device=parts.config.device)
    rows = [index * settled.branches + branch for index in images for branch in range(settled.branches)]
    return parts.denoiser.prepare(_select(conditioning, rows), timesteps.expand(len(rows), -1))


@with_fixed_algorithms
def decode(parts: Components, latents: torch.Tensor) -> torch.Tensor:
    """Images float32 [n, 3, H, W] in 0..1 on the engine's device from final latents [n, C, h, w].

    Decodes as many images together as configured, or in overlapping tiles. Raises NumericsError instead of returning
    NaN.
    """
    if parts.vae is None:
        images = latents.float()
    else:
        pixels = latents.shape[-1] * latents.shape[-2] * parts.scale**2
        scaled = from_model(latents, parts.vae.config).to(parts.config.vae_dtype)
        whole = pixels <= UNTILED_PIXELS
        tiles = not whole if parts.config.vae_tiling == "auto" else parts.config.vae_tiling
        chunk = parts.config.decode_rows or max(1, MEGAPIXEL // pixels)
        one = scaled[:1, :, :TILE, :TILE] if tiles else scaled[:chunk]
        parts.binders["vae"].bind(tuple(one.shape[1:]), partial(parts.vae.decode, one))
        decoded = [
            tiled(parts.vae.decode, part, TILE) if tiles else parts.vae.decode(part)
            for part in map(torch.clone, scaled.split(1 if tiles else chunk))  # alignment, too, can change the bits
        ]
        images = torch.cat(decoded).float()
    if not torch.isfinite(images).all():
        raise NumericsError(f"the VAE produced NaN or Inf in {parts.config.vae_dtype}; load with vae_dtype='float32'")
    return (images / 2 + 0.5).clamp(0, 1)


def decode_each(
    parts: Components, latents: Sequence[torch.Tensor], wanted: Sequence[bool]
) -> list[torch.Tensor | None]:
    """The images of several requests of one size, decoded together; None for a request that wants latents only."""
    chosen = [own for own, asked in zip(latents, wanted, strict=True) if asked]
    if not chosen:
        return [None] * len(latents)
    images = iter(decode(parts, torch.cat(chosen)).split([len(own) for own in chosen]))
    return [next(images) if asked else None for asked in wanted]


def _noise(parts: Components, settled: Settled, index: int) -> torch.Tensor:
    """Unit noise of image `index` [1, C, h, w] on the CPU; a seed gives the noise diffusers gives."""
    if settled.request.latents is not None:
        return settled.request.latents[index : index + 1].detach().cpu()
    shape = (parts.channels, settled.height // parts.scale, settled.width // parts.scale)
    return initial_noise(settled.seeds[index], shape, 1)


def _select(conditioning: Conditioning, rows: list[int]) -> Conditioning:
    given = {name: value for name, value in vars(conditioning).items() if value is not None}
    return Conditioning(**{name: value[rows] for name, value in given.items()})


def _label_conditioning(parts: Components, settled: Settled) -> Conditioning:
    kind, labels, n = parts.denoiser.config.class_embedding, settled.request.class_labels, len(settled.seeds)
    if kind == "none":
        if labels is not None:
            raise RequestError(f"class_labels: {parts.name} is unconditional; leave them out")
        return Conditioning()
    classes = parts.denoiser.config.class_dim
    chosen = (labels,) * n if isinstance(labels, int) else labels
    if chosen is None or len(chosen) != n or not all(0 <= label < classes for label in chosen):
        raise RequestError(f"class_labels: got {labels!r}, expected {n} class numbers from 0 to {classes - 1}")
    return Conditioning(class_labels=torch.tensor(chosen, dtype=torch.int64, device=parts.config.device))


def _texts(parts: Components, settled: Settled) -> list[tuple[tuple[str, str], int | None]]:
    """(texts for the two encoders, clip_skip) of each branch that must be encoded.

    clip_skip holds for the prompt only, as in diffusers; the negative prompt always takes the default layer.
    """
    request = settled.request
    texts: list[tuple[tuple[str, str], int | None]] = []
    if request.prompt is not None:
        texts.append(((request.prompt, request.prompt_2 or request.prompt), request.clip_skip))
    if settled.branches == 2 and request.negative_prompt_embeds is None and not _zero_negative(parts, request):
        negative = request.negative_prompt or ""
        texts.append(((negative, request.negative_prompt_2 or negative), None))
    return texts


def _zero_negative(parts: Components, request: Request) -> bool:
    return parts.zero_negative and request.negative_prompt is None and request.negative_prompt_2 is None


class _PromptSet:
    """Distinct prompts of several requests, encoded in one batch per clip_skip."""

    def __init__(self, parts: Components) -> None:
        self.parts = parts
        self.found: dict[tuple[tuple[str, str], int | None], clip.Encoded] = {}
        self.cut: dict[tuple[str, str], tuple[str, ...]] = {}

    def add(self, text: tuple[str, str], skip: int | None) -> None:
        self.found.setdefault((text, skip), clip.Encoded(torch.empty(0), None))

    def encode(self) -> None:
        for skip in {skip for _, skip in self.found}:
            texts = [text for text, s in self.found if s == skip]
            for part in [[text] for text in texts] if self.parts.config.deterministic else [texts]:
                self._encode(part, skip)

    def _encode(self, texts: list[tuple[str, str]], skip: int | None) -> None:
        encoded, cuts = [], []
        for index, encoder in enumerate(self.parts.text):
            tokens = encoder.tokenize([text[index] for text in texts])
            cuts.append(tokens.cut)
            encoded.append(encoder.encode(tokens, skip))
        joined = clip.join(encoded)
        for row, text in enumerate(texts):
            self.found[text, skip] = joined.select([row])
            self.cut[text] = tuple(dict.fromkeys(cut[row] for cut in cuts if cut[row]))


def _text_conditioning(
    parts: Components, settled: Settled, prompts: _PromptSet
) -> tuple[Conditioning, tuple[str, ...]]:
    request, n = settled.request, len(settled.seeds)
    texts = _texts(parts, settled)
    cut = [
        f"the prompt is too long for the text encoder; ignored: {part!r}"
        for text, _ in texts
        for part in prompts.cut[text]
    ]
    encoded = iter([prompts.found[key] for key in texts])
    if request.prompt_embeds is None:
        positive = next(encoded)
    else:
        positive = _given(parts, n, request.prompt_embeds, request.pooled_prompt_embeds, "prompt_embeds")
    branches = [positive]
    if settled.branches == 2:
        if request.negative_prompt_embeds is not None:
            pooled = request.negative_pooled_prompt_embeds
            branches.append(_given(parts, n, request.negative_prompt_embeds, pooled, "negative_prompt_embeds"))
        elif _zero_negative(parts, request):
            zero = None if positive.pooled is None else torch.zeros_like(positive.pooled)
            branches.append(clip.Encoded(torch.zeros_like(positive.hidden), zero))
        else:
            branches.append(next(encoded))
    hidden = [part.hidden.expand(n, -1, -1) for part in branches]
    if any(part.shape[1:] != hidden[0].shape[1:] for part in hidden):
        raise RequestError("negative_prompt_embeds: got another length or width than prompt_embeds; pad them alike")
    rows: dict[str, Any] = {"hidden": torch.stack(hidden, 1).flatten(0, 1)}
    if parts.denoiser.config.added_time_dim:
        pooled = [part.pooled.expand(n, -1) for part in branches if part.pooled is not None]
        sizes = torch.tensor([settled.height, settled.width, 0, 0, settled.height, settled.width], dtype=torch.float32)
        rows["pooled"] = torch.stack(pooled, 1).flatten(0, 1)
        rows["time_ids"] = sizes.to(parts.config.device).expand(n * settled.branches, -1)
    if parts.denoiser.config.time_cond_dim is not None:
        embedding = guidance_embedding([settled.guidance_scale] * n, parts.denoiser.config.time_cond_dim)
        rows["timestep_cond"] = embedding.to(parts.config.device)
    return Conditioning(**rows), tuple(dict.fromkeys(cut))


def _given(parts: Components, n: int, hidden: torch.Tensor, pooled: torch.Tensor | None, name: str) -> clip.Encoded:
    """Embeddings the user computed, checked against the denoiser."""
    width = parts.denoiser.config.text_dim or parts.denoiser.config.blocks.cross_dim
    if hidden.dim() != 3 or hidden.shape[0] not in (1, n) or hidden.shape[2] != width:
        raise RequestError(f"{name}: got shape {tuple(hidden.shape)}, expected [1 or {n}, L, {width}]")
    device = parts.config.device
    return clip.Encoded(hidden.to(device), None if pooled is None else pooled.to(device))
