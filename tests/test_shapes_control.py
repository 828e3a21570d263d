"""The built-in ControlNet: what it gains, that diffusers reads its folder alike, and how it was made."""

import random
from collections.abc import Iterator
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

from stepfuse import Control, Engine, Request
from stepfuse.engine.errors import CheckpointError
from stepfuse.engine.families import builtin_folder
from stepfuse.examples.shapes import controlnet
from stepfuse.examples.shapes.judge import look
from stepfuse.examples.shapes.latents import CHANNELS
from stepfuse.examples.shapes.render import render
from stepfuse.examples.shapes.scenes import SIZE, Scene, caption
from stepfuse.examples.shapes.silhouettes import objects_of, overlap, right, sample_free_scene, score, silhouette
from stepfuse.examples.shapes.tuning import Tuner

PARITY = 1e-4  # relative L2 of the final latents


def free_scenes(count: int) -> list[Scene]:
    return [sample_free_scene(random.Random(seed)) for seed in range(count)]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.load("shapes", device="cpu", controlnets={"silhouette": "shapes-silhouette"}) as made:
        yield made


def asked(scene: Scene, seed: int, *, controlled: bool, output: str = "np") -> Request:
    controls = (Control(name="silhouette", image=silhouette(scene)),) if controlled else ()
    return Request(prompt=caption(scene), seed=seed, controls=controls, output=output)


def test_objects_appear_where_the_silhouette_has_them(engine: Engine) -> None:
    scenes = free_scenes(6)
    requests = [asked(s, i, controlled=c) for c in (False, True) for i, s in enumerate(scenes)]
    images = [result.images[0] for result in engine.generate(requests)]
    (_, free), (fit, held) = score(images[:6], scenes), score(images[6:], scenes)
    assert fit >= 4, "the prompt still says colors and shapes; one small circle here is drawn too square"
    assert held > 0.8
    assert held > free + 0.4, "the prompt alone does not tell places and sizes"


def test_final_latents_equal_those_of_diffusers(engine: Engine) -> None:
    scene = free_scenes(2)[1]
    ours = engine.generate(asked(scene, 5, controlled=True, output="latent")).latents
    net = diffusers.ControlNetModel.from_pretrained(builtin_folder("shapes-silhouette"), dtype=torch.float32)
    pipe = diffusers.StableDiffusionControlNetPipeline.from_pretrained(
        builtin_folder("shapes"), controlnet=net, dtype=torch.float32
    )
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        caption(scene),
        image=torch.from_numpy(silhouette(scene)).permute(2, 0, 1)[None],
        latents=torch.randn((1, CHANNELS, 8, 8), generator=torch.Generator().manual_seed(5)),
        num_inference_steps=20,
        guidance_scale=3.0,
        output_type="latent",
    ).images
    assert float((ours - theirs).norm() / theirs.norm()) < PARITY


def test_it_fits_shapes_only() -> None:
    with pytest.raises(CheckpointError, match="does not fit this model"):
        Engine.load("shapes-x4", device="cpu", controlnets={"silhouette": "shapes-silhouette"})


def test_free_scenes_are_as_their_captions_say_and_inside() -> None:
    scenes = free_scenes(200)
    truths = render(scenes).transpose(0, 2, 3, 1)
    assert score(list(truths), scenes)[0] == len(scenes)
    assert min(overlap(image, scene) for image, scene in zip(truths, scenes, strict=True)) > 0.97
    centers = np.array([(item.x, item.y, item.r) for scene in scenes for item in scene.items])
    assert (centers[:, :2].min(0) < 16).all(), "anywhere, not on the grid of the captions"
    assert (centers[:, :2].max(0) > SIZE - 16).all()
    edges = np.stack([silhouette(scene) for scene in scenes])
    assert edges[:, [0, -1]].max() == edges[:, :, [0, -1]].max() == 0
    assert not right(truths[0], next(s for s in scenes if s.background != scenes[0].background))


def test_overlap_measures_place_and_size() -> None:
    scene = free_scenes(1)[0]
    image = render([scene])[0].transpose(1, 2, 0)
    assert objects_of(image).sum() == pytest.approx((silhouette(scene)[..., 0] > 0.5).sum(), rel=0.03)
    shifted = np.roll(image, 6, axis=1)
    assert len(look(shifted)[1]) == len(scene.items)
    assert overlap(shifted, scene) < 0.8 < overlap(image, scene)
    assert overlap(np.zeros_like(image), scene) == 0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("controlnet")
    return controlnet.train(work, minutes=0, steps=1, batch=4, lr=1e-3, device="cpu")


def test_training_starts_from_the_model_unchanged_and_goes_on(checkpoint: Path) -> None:
    tuner = Tuner(controlnet.open_control, 1e-3, "cpu")
    latents, pictures, _ = controlnet.sample_batch(random.Random(0), 4, frozenset())
    with torch.no_grad():
        states = torch.zeros(4, 77, 128)
        down, mid = tuner.unet.control(latents, 500, states, controlnet_cond=pictures, return_dict=False)
    assert max(float(t.abs().max()) for t in (*down, mid)) == 0
    state = controlnet.load_checkpoint(checkpoint)
    assert state is not None
    assert state["progress"]["step"] == 1
    moved = state["trained"]["controlnet_mid_block.weight"]
    assert 0 < float(moved.abs().max()) < 0.01
    path = controlnet.train(checkpoint.parent, minutes=0, steps=2, batch=4, lr=1e-3, device="cpu")
    again = controlnet.load_checkpoint(path)
    assert again is not None
    assert again["progress"]["step"] == 2


def test_the_package_holds_the_averaged_weights_in_half_precision(checkpoint: Path, tmp_path: Path) -> None:
    size = controlnet.package(checkpoint, tmp_path / "net")
    assert size <= controlnet.FILE_LIMIT
    net = diffusers.ControlNetModel.from_pretrained(tmp_path / "net")
    state = controlnet.load_checkpoint(checkpoint)
    assert state is not None
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter, state["average"][name].half().to(parameter.dtype))
    shipped = (controlnet.SHIPPED / "config.json").read_text()
    assert (tmp_path / "net" / "config.json").read_text() == shipped
    with pytest.raises(RuntimeError, match="train first"):
        controlnet.package(tmp_path / "none.pt", tmp_path / "net")
