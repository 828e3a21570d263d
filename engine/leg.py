"""A stage of a cascade after the first: its size, its tiles, and the fields of its request."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from .cascade import Stage
from .conditioning.images import resize
from .errors import RequestError
from .imaging import for_tiles
from .low_resolution import check_enlarges, enlarged_size
from .model import Model
from .models.tiles import Tiles
from .models.vae import Gaussian, from_model
from .sampling.noise import initial_noise
from .settling import Settled

EMBEDDED = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")


@dataclass(frozen=True)
class Outcome:
    """What a stage leaves to the next. latents: [n, C, h, w] on the device; images: float32 [n, H, W, 3] in 0..1."""

    latents: Tensor
    images: NDArray[np.float32] | None


@dataclass(frozen=True)
class Leg:
    """A stage of known size in pixels. tiles: in latents of its result; None: in one piece."""

    index: int
    stage: Stage
    model: Model
    width: int
    height: int
    tiles: Tiles | None

    @classmethod
    def after(cls, size: tuple[int, int], index: int, stage: Stage, model: Model) -> Leg:
        """The stage behind one of `size` (width, height). Raises RequestError for tiles that cannot overlap, and for an
        upscaler whose result is smaller.
        """
        site = model.parts.scale
        if stage.scale is None and model.parts.family.enlarges:
            width, height = enlarged_size(model.parts, *size)
        else:
            width, height = scaled(size, stage.scale or 1.0, site)
        width, height = stage.request.get("width") or width, stage.request.get("height") or height
        if model.parts.family.enlarges:
            check_enlarges(model.parts, size, width, height)
        tiles = None
        if stage.tile is not None and max(width, height) > stage.tile:
            tile, overlap = stage.tile // site, math.ceil((stage.overlap or stage.tile / 4) / site)
            if not 0 < overlap <= tile // 2:
                raise RequestError(
                    f"tile: {stage.tile} pixels are {tile} latents and overlap by {overlap}; expected at "
                    "least two, and an overlap of at most half of them: choose larger tiles"
                )
            tiles = Tiles(height // site, width // site, tile, overlap)
        return cls(index, stage, model, width, height, tiles)

    @property
    def enlarges(self) -> bool:
        """Whether the model itself enlarges its image."""
        return self.model.parts.family.enlarges

    @property
    def goes_on(self) -> bool:
        """Whether it goes on from the latents as they are."""
        return self.stage.input == "latents" and self.stage.request.get("denoising_start") is not None

    @property
    def pixels(self) -> int:
        """Of its input image along one side of a latent site."""
        return 1 if self.enlarges else self.model.parts.scale

    def check_input(self, before: Model) -> None:
        """Raise RequestError for latents of the model before it that the stage cannot start from."""
        parts = self.model.parts
        if self.stage.input == "image":
            return
        if self.enlarges or (parts.vae is None and not self.goes_on):
            raise RequestError(f"input: {parts.name} starts from an image; use 'image'")
        if parts.channels != before.parts.channels:
            raise RequestError(
                f"input: got 'latents', but {parts.name} has {parts.channels} channels and {before.parts.name} leaves "
                f"{before.parts.channels}; use 'image'"
            )

    def without(self) -> dict[str, Any]:
        """What the model cannot take of a request that was made for another one, as None; what the stage says stays."""
        parts = self.model.parts
        dropped = [] if parts.classes else ["class_labels"]
        if parts.family.text == "none":
            dropped += ["prompt", "prompt_2", "negative_prompt", "negative_prompt_2"]
        elif len(parts.text) < 2:
            dropped += ["prompt_2", "negative_prompt_2"]
        return {name: None for name in dropped if name not in self.stage.request}

    def images(self, outcome: Outcome | None) -> list[NDArray[np.float32]]:
        """The images it takes, in the size it takes them; a blank one for all where they do not matter.

        An upscaler of pixels takes them as they are.
        """
        site = self.model.parts.scale // self.pixels
        width, height = self.width // site, self.height // site
        if outcome is None or outcome.images is None:
            return [np.zeros((height, width, 3), np.float32)]
        if self.enlarges and self.model.parts.vae is None:
            return [colors(image) for image in outcome.images]
        return [resize(colors(image), width, height, self.stage.resize) for image in outcome.images]

    def latents(self, outcome: Outcome | None, n: int) -> Tensor:
        """The latents it takes [n, C, h, w], in its size."""
        parts = self.model.parts
        shape = self.height // parts.scale, self.width // parts.scale
        if outcome is None:
            return torch.zeros(1).expand(n, parts.channels, *shape)
        latents = outcome.latents
        if latents.shape[-2:] == shape:
            return latents
        mode = self.stage.resize if self.stage.resize != "nearest" else "nearest-exact"
        return F.interpolate(latents, shape, mode=mode, antialias=mode != "nearest-exact")

    def in_tiles(self, tiles: Tiles, values: dict[str, Any], n: int, seed: int | None) -> dict[str, Any]:
        """The fields of the request whose images are the tiles of all n images, in order. They share one field of
        noise.

        seed: of the noise; None where it does not matter.
        """
        parts = self.model.parts
        site = parts.scale
        own: dict[str, Any] = {"n": n * len(tiles), "height": tiles.shape[0] * site, "width": tiles.shape[1] * site}
        if self.goes_on:
            own["latents"] = crop(tiles, values["latents"])
        elif seed is not None and not self.enlarges:
            own["latents"] = crop(tiles, initial_noise(seed, (parts.channels, *tiles.size), n))
        if self.enlarges:
            own["image"] = [np.zeros((*tiles.shape, 3), np.float32)]  # `cut_whole` puts in what it is, and the noise
        elif not self.goes_on:
            images = torch.from_numpy(np.stack(values["image"])).permute(0, 3, 1, 2)
            cut = list(crop(tiles, images, self.pixels).permute(0, 2, 3, 1).numpy())
            own["image"] = cut if len(cut) == own["n"] else cut[:1]
        for name in EMBEDDED:
            given = values.get(name)
            if given is not None and len(given) == n > 1:
                own[name] = given.repeat_interleave(len(tiles), 0)
        labels = values.get("class_labels")
        if isinstance(labels, (tuple, list)):
            own["class_labels"] = tuple(label for label in labels for _ in range(len(tiles)))
        return own

    def cut_whole(self, settled: Settled, whole: Settled, images: list[NDArray[np.float32]]) -> Settled:
        """The rows of an upscaler's tiles, which see parts of images [h, w, 3] that were blurred, enlarged and noised
        whole. whole: the request that they are together.
        """
        assert self.tiles is not None
        low, noise = (crop(self.tiles, one) for one in for_tiles(self.model.parts, whole, images))
        pictures = replace(settled.pictures, enlarged=low)
        return replace(settled, request=replace(settled.request, latents=noise), pictures=pictures)

    def encode(self, settled: Settled, latents: Tensor) -> None:
        """Put latents [n, C, h, w] of its size in place of what the VAE would make of its rows' image."""
        parts = self.model.parts
        assert parts.vae is not None
        own = latents if self.tiles is None else crop(self.tiles, latents)
        mean = from_model(own.to(parts.config.device), parts.vae.config)
        settled.pictures.encoded["image"] = Gaussian(mean, torch.full_like(mean, -math.inf))


def scaled(size: tuple[int, int], factor: float, multiple: int) -> tuple[int, int]:
    """(width, height) times a factor, to the nearest multiples."""
    width, height = (max(multiple, round(side * factor / multiple) * multiple) for side in size)
    return width, height


def crop(tiles: Tiles, images: Tensor, factor: int = 1) -> Tensor:
    """Rows image by image [n * tiles, C, *] of images [n, C, H, W]."""
    return torch.stack(tiles.crops(images, factor), 1).flatten(0, 1)


def colors(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """[H, W, 3] of an image [H, W, 1] or [H, W, 3]."""
    return np.repeat(image, 3, -1) if image.shape[-1] == 1 else image
