"""Requests of every kind at once in one engine: each gives what it gives alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from stepfuse import Control, Engine, Request
from stepfuse.engine.cascade import Cascade, Stage

SIZE: dict[str, Any] = {"width": 64, "height": 64}
PICTURE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
LINES = np.asarray(Image.fromarray(PICTURE).resize((16, 16)).resize((64, 64)))
RIGHT = np.linspace(0, 1, 64, dtype=np.float32).repeat(64).reshape(64, 64).T
ENLARGED = Cascade(
    name="enlarged",
    stages=(
        Stage(),
        Stage(scale=2, tile=96, overlap=32, request={"strength": 0.5}),
        Stage(model="x4", request={"steps": 2, "noise_level": 20}),
    ),
)
HALF = RIGHT > 0.5
KINDS: dict[str, tuple[dict[str, Any], Cascade | None]] = {
    "text to image": ({"steps": 6, "guidance_scale": 1.0, "sampler": "euler_a"}, None),
    "weighted words, long prompt": ({"prompt": "a (cat:1.3) " + "and a dog " * 30, "n": 2, "steps": 5}, None),
    "image to image": ({"image": PICTURE, "strength": 0.6, "sampler": "dpmpp_2m", "steps": 8}, None),
    "inpainting": ({"image": PICTURE, "mask": HALF, "steps": 5}, None),
    "RePaint": ({"image": PICTURE, "mask": HALF, "resample": (2, 2), "sampler": "ddpm", "steps": 4}, None),
    "change map": ({"image": PICTURE, "change_map": RIGHT, "steps": 6}, None),
    "ControlNet": ({"controls": (Control(name="lines", image=LINES, scale=0.8, end=0.5),), "steps": 6}, None),
    "ControlNet, inpainting": (
        {"controls": (Control(name="lines", image=LINES),), "image": PICTURE, "mask": HALF, "steps": 4, "n": 2},
        None,
    ),
    "cascade": ({"steps": 4}, ENLARGED),
    "cascade of an image": ({"image": PICTURE, "strength": 0.7, "steps": 4}, ENLARGED),
}  # fmt: skip


@pytest.fixture(scope="module")
def engine(reference_pipeline: Callable[[str], Path], reference_network: Callable[[str], Any]) -> Any:
    lines = reference_network("controlnet/sd15")[1]
    with Engine.load(
        reference_pipeline("sd15"), device="cpu", max_rows=6, controlnets={"lines": lines},
        models={"x4": reference_pipeline("x4_upscaler")},
    ) as made:  # fmt: skip
        yield made


def request(number: int, fields: dict[str, Any]) -> Request:
    sampler = {} if "sampler" in fields else {"sampler": "ddim"}
    return Request(**{"prompt": "a cat", "seed": 50 + number, "output": "np", **SIZE, **sampler, **fields})


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.slow
def test_every_kind_beside_all_others_equals_itself_alone(engine: Engine) -> None:
    requests = {name: (request(i, fields), cascade) for i, (name, (fields, cascade)) in enumerate(KINDS.items())}
    jobs = {name: engine.submit(one, cascade=cascade) for name, (one, cascade) in requests.items()}
    together = {name: job.result(300) for name, job in jobs.items()}
    for name, (one, cascade) in requests.items():
        alone = engine.generate(one, cascade=cascade)
        assert relative(together[name].latents, alone.latents) <= 1e-4, name
        assert len(together[name].stages) == len(alone.stages), name
        for mixed, own in zip(together[name].stages, alone.stages, strict=True):
            assert relative(mixed.latents, own.latents) <= 1e-4, name
    images = {name: result.images for name, result in together.items()}
    assert images["cascade"].shape == (1, 512, 512, 3)
    assert float(np.abs(images["inpainting"] - images["change map"]).max()) > 0.05, "the requests differ"
