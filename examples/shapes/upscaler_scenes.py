"""Training examples of the upscaler: windows of 64x64 pictures and the same windows drawn four times as large.

Most small pictures are rendered; some were drawn by the built-in model's own decoder from latents with a little noise,
so that the upscaler knows how pictures look that a cascade gives it. The large ones are always rendered.
"""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from .latents import encode_scenes
from .render import render, render_window
from .scenes import SIZE, Combination, Scene, sample_pair, sample_single

SCALE = 4
BUILTIN = Path(__file__).resolve().parents[2] / "engine" / "builtin"
# Window side in pixels of the small picture -> windows a step: the cost of a step is the same for each.
WINDOWS = {16: 16, 24: 7, 32: 4, SIZE: 1}
DRAWN_SHARE = 0.35
DRAWN_NOISE = 0.25  # of the built-in model's latents, whose deviation is one
ANYWHERE = 0.1


def sample_scene(rng: random.Random, heldout: frozenset[Combination]) -> Scene:
    """A random scene, one or two objects, of combinations that are not held out."""
    return sample_pair(rng, heldout) if rng.random() < 0.5 else sample_single(rng)


@torch.no_grad()
def draw_scenes(scenes: list[Scene], seed: int, device: str = "cpu") -> np.ndarray:
    """The scenes as the decoder of the built-in model `shapes` draws them, uint8 [B, 3, 64, 64]."""
    vae = AutoencoderKL.from_pretrained(BUILTIN / "shapes" / "vae", torch_dtype=torch.float32).to(device)
    generator = torch.Generator().manual_seed(seed)
    latents = torch.from_numpy(encode_scenes(scenes))
    spread = DRAWN_NOISE * torch.rand(len(scenes), 1, 1, 1, generator=generator)
    latents = latents + spread * torch.randn(latents.shape, generator=generator)
    images = [vae.decode(part.to(device) / vae.config.scaling_factor).sample.cpu() for part in latents.split(64)]
    return torch.cat(images).mul(127.5).add(127.5).round().clamp(0, 255).to(torch.uint8).numpy()


def window_near_outline(scene: Scene, side: int, rng: random.Random) -> tuple[int, int]:
    """Left and top of a window of `side` small pixels: about a point of an outline, one time in ten anywhere."""
    room = SIZE - side
    if rng.random() < ANYWHERE:
        return rng.randint(0, room), rng.randint(0, room)
    item, angle = rng.choice(scene.items), rng.uniform(0, 2 * math.pi)
    centers = (item.x + item.r * math.cos(angle), item.y + item.r * math.sin(angle))
    left, top = (min(max(round(c + rng.uniform(-side, side) / 3 - side / 2), 0), room) for c in centers)
    return left, top


class Examples:
    """Pairs of small and large windows, from fresh scenes and from a fixed stock that the built-in decoder drew."""

    def __init__(self, heldout: frozenset[Combination], *, stock: int = 2048, seed: int = 0) -> None:
        rng = random.Random(f"stock {seed}")
        self.heldout = heldout
        self._scenes = [sample_scene(rng, heldout) for _ in range(stock)]
        self._drawn = draw_scenes(self._scenes, seed) if stock else np.empty((0, 3, SIZE, SIZE), np.uint8)

    def sample(self, rng: random.Random, side: int) -> tuple[Tensor, Tensor]:
        """Small windows [B, 3, side, side] and large ones [B, 3, 4 side, 4 side], float32 in -1..1; B by `WINDOWS`."""
        small, large = [], []
        for _ in range(WINDOWS[side]):
            scene, picture = self._picture(rng)
            left, top = window_near_outline(scene, side, rng)
            small.append(picture[:, top : top + side, left : left + side])
            large.append(render_window(scene, scale=SCALE, left=SCALE * left, top=SCALE * top, side=SCALE * side))
        return torch.from_numpy(np.stack(small)) * 2 - 1, torch.from_numpy(np.stack(large)) * 2 - 1

    def _picture(self, rng: random.Random) -> tuple[Scene, np.ndarray]:
        if len(self._drawn) and rng.random() < DRAWN_SHARE:
            index = rng.randrange(len(self._drawn))
            return self._scenes[index], self._drawn[index].astype(np.float32) / 255
        scene = sample_scene(rng, self.heldout)
        return scene, render([scene])[0]


def choose_side(rng: random.Random, fraction: float) -> int:
    """Window side of a step. Whole pictures come more often at the end: norms see different statistics in windows."""
    if fraction > 0.65 and rng.random() < 0.5:
        return SIZE
    return rng.choice(tuple(WINDOWS))
