"""How the built-in upscaler starts to train: it enlarges already; a table of levels; the judge of larger pictures."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from stepfuse.examples.shapes import upscaler, upscaler_autoencoder
from stepfuse.examples.shapes.judge import altered, judge
from stepfuse.examples.shapes.progress import load_checkpoint
from stepfuse.examples.shapes.render import render_window
from stepfuse.examples.shapes.scenes import SIZE, sample_pair
from stepfuse.examples.shapes.upscaler_latents import CHANNELS, encode_images
from stepfuse.examples.shapes.upscaler_scenes import SCALE, WINDOWS, Examples


def test_untrained_networks_enlarge_and_average() -> None:
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    vae, unet = upscaler_autoencoder.build_autoencoder(), upscaler.build_unet()
    latents = encode_images(images)
    flat = torch.full((1, 3, 64, 64), 0.3)
    with torch.no_grad():
        read = vae.encode(images).latent_dist.mode()
        drawn = vae.decode(encode_images(flat)).sample
        small = torch.rand(1, 3, 16, 16) * 2 - 1
        output = unet(torch.cat([latents, small], 1), 990, None, class_labels=torch.tensor([5])).sample
    assert (read[:, :3] - latents[:, :3]).abs().max() < 0.03
    assert (drawn - flat)[:, :, 8:-8, 8:-8].abs().max() < 0.01
    assert (output[:, :3] - small / 0.7).abs().max() < 0.05
    assert output[:, 3:].abs().max() == 0


def test_the_table_of_levels_is_the_trained_function() -> None:
    unet = upscaler.build_unet(1)
    with torch.no_grad():
        for parameter in unet.parameters():  # an output that depends on the level
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
        baked, inputs = upscaler.with_level_table(unet), torch.randn(3, CHANNELS + 3, 16, 16)
        levels = torch.tensor([0, 20, upscaler.MAX_LEVEL])
        ours = baked(inputs, 400, None, class_labels=levels).sample
        truth = unet(inputs, 400, None, class_labels=levels).sample
        assert torch.allclose(ours, truth, atol=1e-4 * float(truth.abs().max()))
        assert (ours - baked(inputs, 400, None, class_labels=levels.flip(0)).sample).abs().max() > 1e-3
    assert baked.class_embedding.weight.shape[0] == upscaler.MAX_LEVEL + 1


def test_examples_show_the_same_window_twice() -> None:
    examples = Examples(frozenset(), stock=4)
    small, large = examples.sample(random.Random(0), 16)
    assert small.shape == (WINDOWS[16], 3, 16, 16)
    assert large.shape == (WINDOWS[16], 3, 64, 64)
    means = torch.nn.functional.avg_pool2d(large, SCALE)
    assert (means - small).abs().mean() < 0.02
    assert (means.roll(1, 0) - small).abs().mean() > 0.2


def test_most_levels_are_low() -> None:
    torch.manual_seed(0)
    levels = upscaler.draw_levels(4000)
    assert levels.min() == 0
    assert levels.max() == upscaler.MAX_LEVEL
    assert 0.3 < (levels <= 20).float().mean() < 0.5


@pytest.mark.slow
def test_training_continues_and_keeps_what_carries_colors(tmp_path: Path) -> None:
    before = upscaler_autoencoder.build_autoencoder()
    upscaler_autoencoder.train(tmp_path, "encoder", minutes=0, steps=2)
    state = load_checkpoint(tmp_path / "encoder.pt")
    assert state is not None
    assert state["progress"]["step"] == 2
    upscaler_autoencoder.train(tmp_path, "encoder", minutes=0, steps=3)
    state = load_checkpoint(tmp_path / "encoder.pt")
    assert state is not None
    assert state["progress"]["step"] == 3
    assert not torch.equal(state["trained"]["0.conv_out.weight"], before.encoder.conv_out.weight)
    # What carries colors along is left alone.
    assert torch.equal(state["trained"]["0.conv_in.weight"][:12], before.encoder.conv_in.weight[:12])


def test_the_judge_takes_pictures_of_256_pixels() -> None:
    rng = random.Random(5)
    scenes = [sample_pair(rng) for _ in range(24)]
    images = [
        render_window(scene, scale=SCALE, left=0, top=0, side=SCALE * SIZE).transpose(1, 2, 0) for scene in scenes
    ]
    assert all(judge(image, scene).right for image, scene in zip(images, scenes, strict=True))
    assert not any(judge(image, altered(scene, rng)).right for image, scene in zip(images, scenes, strict=True))
    with pytest.raises(ValueError, match="or a multiple"):
        judge(np.zeros((100, 100, 3), np.float32), scenes[0])
