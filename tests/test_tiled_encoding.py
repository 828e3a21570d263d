"""Pictures that are too large to encode whole: the engine takes tiles by the rule it decodes by, without seams."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from stepfuse import Engine, EngineConfig
from stepfuse.engine.components import Components
from stepfuse.engine.loading import load_components
from stepfuse.engine.models import vae_tiling
from stepfuse.engine.models.vae_tiling import UNTILED_PIXELS, in_tiles

WIDTH, HEIGHT = 896, 64  # latents 112 x 8: tiles of 64 start at 0 and 48
SEAMS = (48, 64)


@pytest.fixture(scope="module")
def parts() -> Components:
    return load_components("shapes", EngineConfig(device="cpu"))


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random((HEIGHT, WIDTH, 3), dtype=np.float32)


def latents_of(parts: Components, asked: bool | str, **fields: Any) -> torch.Tensor:
    """What the engine encodes a picture to: nothing of it is painted anew."""
    config = dataclasses.replace(parts.config, vae_tiling=asked)
    with Engine(dataclasses.replace(parts, config=config)) as engine:
        mask = np.zeros((HEIGHT, WIDTH), np.float32)
        options = {"mask": mask, "steps": 1, "sampler": "ddim", "output": "latent", "seed": 5, **fields}
        return engine.generate("a circle", **options).latents


@pytest.mark.parametrize(
    ("asked", "limit", "tiles"), [("auto", 32768, 2), (True, None, 2), ("auto", None, 1), (False, 32768, 1)]
)
def test_the_rule_of_decoding_holds_for_encoding(
    parts: Components, asked: bool | str, limit: int | None, tiles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two pictures of one request: no evaluation of the encoder sees more than a tile of one of them."""
    vae = parts.vae
    assert vae is not None
    seen, encode = list[tuple[int, ...]](), vae.encode
    monkeypatch.setattr(vae, "encode", lambda images: seen.append(tuple(images.shape)) or encode(images))
    if limit is not None:
        monkeypatch.setattr(vae_tiling, "UNTILED_PIXELS", limit)
    latents_of(parts, asked, image=[picture(0), picture(1)], n=2)
    run = seen[-4:] if tiles == 2 else seen[-1:]  # before them the kernels are chosen
    assert run == ([(1, 3, HEIGHT, 512)] * 4 if tiles == 2 else [(2, 3, HEIGHT, WIDTH)])
    assert max(shape[3] for shape in seen) == run[0][3]


def test_tiles_of_the_builtin_encoder_have_no_seams(parts: Components) -> None:
    """The deviation from the whole, since group norms see one tile, steps no more where a tile starts or ends."""
    steps, deviations = [], []
    for seed in range(4):
        whole, tiled = (latents_of(parts, asked, image=picture(seed)) for asked in (False, True))
        difference = tiled - whole
        deviations.append(float(difference.norm() / whole.norm()))
        steps.append((difference[..., 1:] - difference[..., :-1]).abs().mean((0, 1, 2)))
    profile = torch.stack(steps).mean(0)
    assert 0 < max(deviations) <= 0.1, deviations  # 0.07 when written
    worst = max(float(profile[seam - 1] / profile.mean()) for seam in SEAMS)
    assert worst <= 1.5, worst  # 1.0 when written, 2 and more where the edges of tiles count


def test_auto_takes_tiles_above_its_limit() -> None:
    assert UNTILED_PIXELS == 1536 * 1536
    assert not in_tiles("auto", 1536, 1536)
    assert in_tiles("auto", 1536, 1544)
    assert in_tiles(True, 64, 64)
    assert not in_tiles(False, 4096, 4096)
