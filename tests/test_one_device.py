"""Everything between encoding and decoding stays on one device and never waits for it.

Tensors on the meta device have no values: reading one on the host raises, and so does an operation that mixes devices.
What passes here has no host sync and no forgotten transfer on a GPU either.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from stepfuse import Engine, Request
from stepfuse.engine import pipeline
from stepfuse.engine.batch import Batch
from stepfuse.engine.binding import Binder
from stepfuse.engine.components import Components
from stepfuse.engine.models.unet import UNet
from stepfuse.engine.models.vae import AutoencoderKL
from stepfuse.engine.runner import Runner
from stepfuse.engine.settling import settle

pytestmark = pytest.mark.slow  # left out by `.ci/run quick`

META = torch.device("meta")


def on_meta(parts: Components) -> Components:
    """The same components without any weights."""
    assert parts.vae is not None
    with META:
        unet, vae = UNet(parts.denoiser.config).bfloat16(), AutoencoderKL(parts.vae.config).bfloat16()
    config = dataclasses.replace(
        parts.config, device=META, dtype=torch.bfloat16, vae_dtype=torch.bfloat16, kernels="reference"
    )
    encoders = tuple(dataclasses.replace(one, model=one.model.to(META)) for one in parts.text)
    binders = {"unet": Binder(unet, config), "vae": Binder(vae, config)}
    return dataclasses.replace(parts, config=config, denoiser=unet, vae=vae, text=encoders, binders=binders)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
@pytest.mark.parametrize("sampler", ["euler_a", "dpmpp_2m", "pndm", "lcm"])
@torch.inference_mode()
def test_an_update_reads_nothing_back_and_mixes_no_devices(
    reference_pipeline: Callable[[str], Path], name: str, sampler: str
) -> None:
    with Engine.load(reference_pipeline(name), device="cpu") as engine:
        parts = on_meta(engine.components)
    request = Request(prompt="a cat", seed=1, n=2, steps=4, sampler=sampler, guidance_rescale=0.3)
    settled = settle(parts, request)
    ((conditioning, _),) = pipeline.encode(parts, [settled])
    runner, batch = Runner(parts), Batch(max_rows=4)
    batch.join(pipeline.start(parts, settled, conditioning, [0, 1]), ["a", "b"])
    runner.update(batch)
    batch.leave([0])
    batch.join(pipeline.start(parts, settled, conditioning, [0, 1]), ["c", "d"])
    before = runner.update(batch, preview=True)
    state = batch.state
    assert {t.device for t in (*state.of_rows(), *state.of_model_rows(), state.row_of, state.outputs)} == {META}
    assert batch.owners == ["b", "c", "d"]
    assert state.x.dtype == torch.float32
    assert before is not None
    assert before.denoised([0, 2]).shape == state.x[:2].shape


def test_reading_a_value_would_be_noticed() -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.zeros(1, device=META).item()
    with pytest.raises(RuntimeError):
        _ = torch.zeros(2, device=META) + torch.zeros(2)
