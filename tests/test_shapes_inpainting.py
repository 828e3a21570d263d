"""The inpainting model of `shapes`: how it is composed, what it gains, its latents beside diffusers', its training."""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from stepfuse import Engine, Request
from stepfuse.examples.gallery.subjects import one_exchanged, picture
from stepfuse.examples.shapes import inpainting
from stepfuse.examples.shapes.inpainting_masks import KINDS, around, sample_mask
from stepfuse.examples.shapes.inpainting_weights import (
    DIFFERENCE,
    FILE_LIMIT,
    IN_CHANNELS,
    SHAPES,
    WEIGHTS,
    build,
    compose,
    open_unet,
    save_difference,
)
from stepfuse.examples.shapes.judge import judge
from stepfuse.examples.shapes.latents import CELL, CHANNELS
from stepfuse.examples.shapes.render import coverage
from stepfuse.examples.shapes.scenes import caption, sample_pair
from stepfuse.examples.shapes.tokenizer import LENGTH

PARITY = 1e-4  # relative L2 of the final latents


def original() -> diffusers.UNet2DConditionModel:
    return diffusers.UNet2DConditionModel.from_pretrained(SHAPES / "unet", dtype=torch.float32)


def base() -> dict[str, Tensor]:
    return load_file(SHAPES / "unet" / WEIGHTS)


def difference(seed: int = 0, scale: float = 0.0) -> dict[str, Tensor]:
    """As it is when training begins, or with random numbers of this scale added."""
    torch.manual_seed(seed)
    return {name: p.detach() + scale * torch.randn_like(p) for name, p in open_unet(original()).items()}


def test_a_difference_of_zero_is_the_model_it_began_as() -> None:
    before, after = base(), compose(base(), difference())
    wide = after.pop("conv_in.weight")
    assert wide.shape[1] == IN_CHANNELS == 17
    assert torch.equal(wide[:, :CHANNELS], before.pop("conv_in.weight"))
    assert not wide[:, CHANNELS:].any()
    assert set(after) == set(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_the_network_begins_as_shapes_and_ends_as_what_is_composed() -> None:
    plain, opened = original().eval(), original().eval()
    trained = open_unet(opened)
    x, beside = torch.randn(2, CHANNELS, 8, 8), torch.randn(2, CHANNELS + 1, 8, 8)
    rest = torch.tensor([900, 20]), torch.randn(2, LENGTH, 128)
    with torch.no_grad():
        first, expected = opened(torch.cat([x, beside], 1), *rest).sample, plain(x, *rest).sample
        assert torch.allclose(first, expected, atol=1e-6)
        for parameter in trained.values():
            parameter += 0.02 * torch.randn_like(parameter)
        moved = opened(torch.cat([x, beside], 1), *rest).sample
        config = dict(plain.config) | {"in_channels": IN_CHANNELS}
        composed = diffusers.UNet2DConditionModel.from_config(config).eval()
        composed.load_state_dict(compose(plain.state_dict(), trained))
        again = composed(torch.cat([x, beside], 1), *rest).sample
    assert float((moved - first).abs().max()) > 0.05
    assert torch.allclose(again, moved, atol=1e-5)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    name = "mid_block.resnets.0.conv1.lora_A.weight"
    with pytest.raises(ValueError, match="expected conv_in"):
        compose(base(), {name: difference()[name]})
    with pytest.raises(ValueError, match=r"got 'other.weight'"):
        compose(base(), {"other.weight": torch.zeros(2, 2)})
    with pytest.raises(RuntimeError, match="smaller rank"):
        save_difference({"conv_in.weight": torch.zeros(FILE_LIMIT)}, tmp_path / "large")


def test_masks_of_training_cover_objects_and_are_of_all_sizes() -> None:
    rng = random.Random(0)
    scenes = [sample_pair(rng) for _ in range(300)]
    masks = [sample_mask(rng, scene) for scene in scenes]
    assert all(set(np.unique(mask)) <= {0, 1} for mask in masks)
    assert all(mask[::CELL, ::CELL].any() for mask in masks), "a mask of no latent site asks for nothing"
    shares = np.array([mask.mean() for mask in masks])
    assert np.mean(shares == 1) == pytest.approx(KINDS["everything"], abs=0.05)
    assert min(shares) < 0.1
    assert np.mean((shares > 0.1) & (shares < 0.9)) > 0.7
    item = scenes[0].items[0]
    assert (around(item, 4.0) >= (coverage(item) > 0)).all()
    assert not around(item, 4.0)[coverage(scenes[0].items[1]) > 0.5].any()


def test_training_lowers_the_loss_of_what_it_trains_on(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tuner, vae = inpainting.build_tuner(3e-3, "cpu"), inpainting.load_encoder("cpu")
    *tensors, captions = inpainting.sample_batch(random.Random(0), 8, frozenset())
    words = inpainting.Words(inpainting.build_tokenizer(tmp_path))(captions)
    progress, losses = inpainting.Progress("test", steps=1000), []
    progress.step = 50  # warmed up
    frozen = {name: p.clone() for name, p in tuner.unet.named_parameters() if not p.requires_grad}
    for _ in range(16):
        torch.manual_seed(1)
        loss = inpainting.painting_loss(tuner, vae, *tensors, words, 0.0)
        losses.append(loss.item())
        tuner.optimizer.step(loss, progress)
    assert losses[-1] < 0.8 * losses[0], losses
    assert len(frozen) > 100
    assert all(torch.equal(p, frozen[name]) for name, p in tuner.unet.named_parameters() if name in frozen)


def test_a_run_goes_on_and_its_averaged_difference_is_packaged(tmp_path: Path) -> None:
    for steps in (1, 2):
        path = inpainting.train(tmp_path, minutes=0, steps=steps, batch=4, lr=1e-3, device="cpu")
        state = inpainting.load_checkpoint(path)
        assert state is not None
        assert state["progress"]["step"] == steps
    size = inpainting.package(path, tmp_path / "small.safetensors")
    assert size <= FILE_LIMIT
    packed = load_file(tmp_path / "small.safetensors")
    assert packed.keys() == load_file(DIFFERENCE).keys()
    assert all(torch.equal(packed[name], mean.half()) for name, mean in state["average"].items())
    with pytest.raises(RuntimeError, match="train first"):
        inpainting.package(tmp_path / "none.pt", tmp_path / "x")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("model") / "inpainting")


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    with Engine.load("shapes", device="cpu") as made:
        made.add("inpainting", folder)
        yield made


def test_the_built_folder_is_an_inpainting_model_and_the_file_is_small(engine: Engine, folder: Path) -> None:
    assert DIFFERENCE.stat().st_size <= FILE_LIMIT
    assert engine.models["inpainting"].parts.family.name == "sd_inpaint"
    assert load_file(folder / "unet" / WEIGHTS)["conv_out.weight"].dtype == torch.float16
    with pytest.raises(FileExistsError):
        build(folder)


def test_it_fills_small_masks_better_than_putting_back(engine: Engine) -> None:
    scenes = [one_exchanged(seed) for seed in (0, 4, 8, 10, 12, 15)]  # wrong by putting back when this was written
    right, moved = {}, {}
    for model in (None, "inpainting"):
        requests = [
            Request(prompt=caption(wanted), image=picture(given), mask=around(given.items[1], 4.0).astype(np.float32),
                    seed=seed, model=model, output="np")
            for seed, (given, wanted) in zip((0, 4, 8, 10, 12, 15), scenes, strict=True)
        ]  # fmt: skip
        images = [result.images[0] for result in engine.generate(requests)]
        right[model] = sum(judge(i, wanted).right for i, (_, wanted) in zip(images, scenes, strict=True))
        moved[model] = [np.abs(i - r.image)[r.mask == 0].mean() for i, r in zip(images, requests, strict=True)]
    assert right["inpainting"] >= 5
    assert right[None] <= 2
    assert max(moved["inpainting"]) < 0.02, "what is outside the mask stays, though nothing is put back"


@torch.no_grad()
def test_final_latents_equal_those_of_the_parts_of_diffusers(engine: Engine, folder: Path) -> None:
    """Its inpainting pipeline takes U-Nets of 4 and 9 channels only, so its loop is written out."""
    given, wanted = one_exchanged(1)
    mask = around(given.items[1], 4.0).astype(np.float32)
    request = Request(prompt=caption(wanted), image=picture(given), mask=mask, seed=5, model="inpainting")
    ours = engine.generate(replace(request, output="latent")).latents
    parts = diffusers.StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    ids = parts.tokenizer(["", caption(wanted)], padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
    states, generator = parts.text_encoder(ids)[0], torch.Generator().manual_seed(5)
    x = torch.randn((1, CHANNELS, 8, 8), generator=generator)
    holes = torch.from_numpy(mask)[None, None]
    left = (torch.from_numpy(picture(given)).permute(2, 0, 1)[None] * 2 - 1) * (1 - holes)
    left = parts.vae.encode(left).latent_dist.sample(generator) * parts.vae.config.scaling_factor
    beside = torch.cat([holes[:, :, ::CELL, ::CELL], left], 1)
    parts.scheduler.set_timesteps(20)
    for t in parts.scheduler.timesteps:
        away, toward = parts.unet(torch.cat([x, beside], 1).repeat(2, 1, 1, 1), t, states).sample.chunk(2)
        x = parts.scheduler.step(away + 3.0 * (toward - away), t, x).prev_sample
    assert float((ours - x).norm() / x.norm()) < PARITY
