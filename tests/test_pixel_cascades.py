"""Cascades of pixels (Ho et al. 2021): upscalers against plain loops over diffusers' parts, stages against requests."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference.exports import invoke
from reference.pixel_upscalers import NETWORK, UPSCALER, beside, sample, save
from torch import Tensor, nn

from stepfuse import Engine, EngineConfig, Request
from stepfuse.engine import pipeline
from stepfuse.engine.batch import Batch
from stepfuse.engine.cascade import Cascade, Stage
from stepfuse.engine.components import Components
from stepfuse.engine.errors import CheckpointError, RequestError
from stepfuse.engine.loading import load_components
from stepfuse.engine.low_resolution import enlarged
from stepfuse.engine.relay import SEED_STRIDE, Relay
from stepfuse.engine.results import to_arrays
from stepfuse.engine.runner import Runner
from stepfuse.engine.settling import settle

SMALL = np.random.default_rng(3).random((2, 8, 8, 3), dtype=np.float32)
CLASSES = {"num_class_embeds": 6}
NULL = 5
CASCADE = Cascade(
    name="pixels",
    stages=(
        Stage(request={"guidance_scale": 3.0}),
        Stage(model="levels", request={"steps": 3, "noise_level": 200, "blur": 0.75}),
        Stage(model="classes", scale=2, request={"steps": 2, "guidance_scale": 2.0}),
    ),
)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, nn.Module]]:
    """A class-conditional base of 8 x 8, an upscaler that is told its image's level, one that is told a class."""
    made: dict[str, tuple[Path, nn.Module]] = {}
    for name, network, options in (
        ("base", NETWORK | CLASSES | {"sample_size": 8}, {"says": {"null_class": NULL, "steps": 3}}),
        ("levels", UPSCALER, {"noising": "image_noising_scheduler", "max_noise_level": 700}),
        ("classes", NETWORK | CLASSES | {"in_channels": 6}, {"says": {"null_class": NULL}}),
        ("blurs", UPSCALER, {"says": {"blur_per_level": 0.25, "noise_level": 3}, "max_noise_level": 8}),
    ):
        folder = tmp_path_factory.mktemp(name) / name
        made[name] = folder, save(folder, network, **options)
    return made


@pytest.fixture(scope="module")
def engine(folders: dict[str, tuple[Path, nn.Module]]) -> Iterator[Engine]:
    models = {name: folders[name][0] for name in ("levels", "classes", "blurs")}
    with Engine.load(folders["base"][0], device="cpu", models=models, max_rows=8) as made:
        yield made


@pytest.fixture
def load(folders: dict[str, tuple[Path, nn.Module]]) -> Callable[..., tuple[Components, nn.Module]]:
    def get(name: str, dtype: str = "float32") -> tuple[Components, nn.Module]:
        return load_components(folders[name][0], EngineConfig(device="cpu", dtype=dtype)), folders[name][1]

    return get


def states(parts: Components, request: Request) -> Tensor:
    """The final state of a request's rows, in the dtype it is sampled in."""
    settled, runner, batch = settle(parts, request), Runner(parts), Batch(8)
    with torch.inference_mode():
        ((conditioning, _),) = pipeline.encode(parts, [settled])
        batch.join(pipeline.start(parts, settled, conditioning, range(request.n)), range(request.n))
        for _ in settled.plan.updates:
            runner.update(batch)
        return batch.state.x[: request.n].clone()


# An upscaler is the loop that its paper describes.


@pytest.mark.parametrize(("dtype", "gate"), [("float32", 1e-4), ("float64", 1e-10)])
@pytest.mark.parametrize(
    ("name", "fields", "reference"),
    [
        ("levels", {"noise_level": 350}, {"level": 350}),
        ("levels", {"noise_level": 0, "blur": 0.75}, {"level": 0}),
        ("levels", {"width": 24, "height": 20}, {"level": 20}),
        ("blurs", {}, {"level": 3, "noised": False}),
        ("classes", {"class_labels": 2}, {"label": 2}),
        ("classes", {"class_labels": 2, "guidance_scale": 3.0, "blur": 0.75},
         {"label": 2, "null": NULL, "guidance": 3.0}),
    ],
)  # fmt: skip
def test_an_upscaler_equals_a_plain_loop(
    load: Callable[..., Any], name: str, fields: dict[str, Any], reference: dict[str, Any], dtype: str, gate: float
) -> None:
    parts, unet = load(name, dtype)
    request = Request(image=list(SMALL), n=2, seed=7, steps=4, **fields)
    found = states(parts, request)
    size = fields.get("height", 16), fields.get("width", 16)
    sigma = 0.75 if name == "blurs" else fields.get("blur", 0.0)
    for index, row in enumerate(found):
        low = beside(SMALL[index], size, found.dtype, sigma)
        assert relative(row[None], sample(unet, low, 7 + index, 4, **reference)) <= gate
    told = "class_labels" if name == "classes" else "noise_level"
    other = states(parts, dataclasses.replace(request, **{told: 4}))
    assert relative(other, found) > 1e-3, "the network does not listen"


def test_an_image_of_the_size_of_the_result_is_taken_as_it_is(load: Callable[..., Any]) -> None:
    """Palette (Saharia et al. 2022) has such networks for colorisation and restoration."""
    parts, unet = load("classes", "float64")
    image = np.random.default_rng(1).random((16, 16, 3), dtype=np.float32)
    found = states(parts, Request(image=image, seed=2, steps=3, class_labels=0))
    low = torch.from_numpy(image.astype(np.float64) * 2 - 1).permute(2, 0, 1)[None]
    assert relative(found, sample(unet, low, 2, 3, label=0)) <= 1e-10


def test_guidance_leads_away_from_the_null_class(load: Callable[..., Any]) -> None:
    parts, unet = load("base", "float64")
    found = states(parts, Request(class_labels=(1, 4), n=2, seed=3, steps=4, guidance_scale=2.5))
    for index, label in enumerate((1, 4)):
        nothing = torch.zeros(1, 0, 8, 8, dtype=torch.float64)
        expected = sample(unet, nothing, 3 + index, 4, label=label, null=NULL, guidance=2.5)
        assert relative(found[index, None], expected) <= 1e-10


def test_guided_and_unguided_rows_equal_themselves_alone_bit_by_bit(folders: dict[str, tuple[Path, nn.Module]]) -> None:
    requests = [Request(class_labels=i, seed=i, guidance_scale=1.0 + i, output="latent") for i in range(3)]
    with Engine.load(folders["base"][0], device="cpu", deterministic=2) as engine:
        assert engine.models[None].runner.width == 2, "planned sizes have room for both branches"
        together = engine.generate(requests)
        alone = [engine.generate(request) for request in requests]
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one.latents, other.latents)


def test_guidance_without_a_null_class_is_an_error(load: Callable[..., Any]) -> None:
    parts, _ = load("base")
    for says, error, message in (
        ({}, RequestError, "guidance_scale: got 2.0, but .* does not say which class stands for none"),
        ({"null_class": 6}, CheckpointError, "null_class: got 6, expected one of its 6 classes"),
        ({"null_class": True}, CheckpointError, "null_class: got True"),
    ):
        changed = dataclasses.replace(parts, defaults=says)
        with pytest.raises(error, match=message):
            settle(changed, Request(class_labels=1, guidance_scale=2.0))
    assert settle(dataclasses.replace(parts, defaults={}), Request(class_labels=1)).branches == 1


# Cascades.


def test_a_cascade_is_its_requests_made_by_hand(engine: Engine) -> None:
    made = engine.generate(cascade=CASCADE, class_labels=(2, 1), n=2, seed=9, output="np")
    first, second, third = made.stages
    assert [stage.images.shape[1:] for stage in made.stages] == [(8, 8, 3), (16, 16, 3), (32, 32, 3)]
    base = engine.generate(class_labels=(2, 1), n=2, seed=9, guidance_scale=3.0, output="np")
    small = engine.generate(
        model="levels", image=list(base.images), n=2, seed=9 + SEED_STRIDE, steps=3, noise_level=200, blur=0.75,
        output="np",
    )  # fmt: skip
    large = engine.generate(
        model="classes", image=list(small.images), n=2, seed=9 + 2 * SEED_STRIDE, steps=2, class_labels=(2, 1),
        guidance_scale=2.0, width=32, height=32, output="np",
    )  # fmt: skip
    for stage, alone in ((first, base), (second, small), (third, large)):
        assert relative(stage.latents, alone.latents) <= 1e-4
    assert relative(engine.generate(second.request).latents, second.latents) <= 1e-4
    assert second.request.class_labels is None, "it is told a level"


def test_cascades_that_run_together_equal_themselves_alone(engine: Engine) -> None:
    """Guided and unguided rows, other classes, levels and sizes, at every stage."""
    plain = (Stage(), Stage(model="levels", request={"noise_level": 0, "sampler": "euler_a"}))
    requests = [
        (Request(class_labels=(0, 3), n=2, seed=1), CASCADE),
        (Request(class_labels=4, seed=2, steps=5), Cascade(name="plain", stages=plain)),
        (Request(class_labels=1, seed=3, width=16, height=16),
         Cascade(name="wide", stages=(Stage(), Stage(model="classes", scale=1.5, request={"steps": 4})))),
        (Request(class_labels=2, seed=4), Cascade(name="b", stages=(Stage(), Stage(model="blurs")))),
    ]  # fmt: skip
    for request, _ in requests:
        assert request.guidance_scale is None
    jobs = [engine.submit(request, cascade=cascade, output="np") for request, cascade in requests]
    for (request, cascade), job in zip(requests, jobs, strict=True):
        found, alone = job.result(60), engine.generate(request, cascade=cascade, output="np")
        for mixed, own in zip(found.stages, alone.stages, strict=True):
            assert relative(mixed.latents, own.latents) <= 1e-4


@pytest.mark.parametrize("labels", [(1, 2), [1, 2], 1])
def test_tiles_are_parts_of_the_whole_blurred_and_enlarged(engine: Engine, labels: Any) -> None:
    stage = Stage(model="classes", scale=4, tile=16, overlap=4, request={"blur": 1.5, "steps": 2})
    cascade, request = Cascade(name="t", stages=(Stage(), stage)), Request(class_labels=labels, n=2, seed=1)
    relay = Relay(cascade, request, engine._model)
    images = torch.from_numpy(SMALL).permute(0, 3, 1, 2)
    ticket = relay.follow(engine.generate(class_labels=1, steps=1), images * 2 - 1, images)
    assert ticket is not None
    assert ticket.tiles is not None
    rows = ticket.settled.pictures.enlarged
    assert rows is not None
    assert rows.shape == (2 * len(ticket.tiles), 3, 16, 16)
    parts = engine.models["classes"].parts
    told = ticket.settled.request.class_labels
    assert told == (1 if labels == 1 else tuple(label for label in labels for _ in range(len(ticket.tiles))))
    whole = enlarged(parts, Request(blur=1.5), list(SMALL), 32, 32)
    for own, image in zip(rows.split(len(ticket.tiles)), whole, strict=True):
        assert torch.allclose(ticket.tiles.blend(own.split(1))[0], image, atol=1e-6)
    made = engine.generate(request, cascade=cascade, output="np")
    assert made.images.shape == (2, 32, 32, 3)
    assert np.array_equal(to_arrays(made.latents).shape, made.images.shape)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (Stage(model="levels", input="latents"), "starts from an image; use 'image'"),
        (Stage(model="levels", scale=0.5), "image: got 8 x 8 pixels for a result of 4 x 4; .* enlarges"),
        (Stage(model="levels", request={"noise_level": 701}), "noise_level=701; expected .* 0 to 700"),
        (Stage(model="levels", request={"strength": 0.5}), "strength: .* enlarges images"),
        (Stage(model="levels", request={"blur": 65.0}), "blur: got 65.0, expected 0 to 64 pixels"),
        (Stage(model="blurs", request={"noise_level": 9}), "noise_level=9; expected an integer from 0 to 8, a blur"),
        (Stage(model="classes", request={"noise_level": 1}), "noise_level: .* was trained without one"),
        (Stage(request={"strength": 0.5, "blur": 1.0}), "blur: .* is no upscaler"),
    ],
)
def test_what_makes_no_sense_is_said_before_anything_runs(engine: Engine, stage: Stage, message: str) -> None:
    with pytest.raises(RequestError, match=f"stage 2 of 2.*{message}"):
        engine.submit(cascade=Cascade(name="w", stages=(Stage(), stage)), class_labels=1)


@pytest.mark.parametrize(
    ("model", "fields", "message"),
    [
        ("levels", {}, "needs an image to enlarge"),
        ("levels", {"image": np.zeros((20, 20, 3), np.float32)}, "got 20 x 20 pixels for a result of 16 x 16"),
        ("levels", {"image": SMALL[0], "class_labels": 1}, "class_labels: .* takes noise_level instead"),
        ("levels", {"image": SMALL[0], "prompt": "a cat"}, "prompt: .* takes no text; leave it out$"),
        ("levels", {"image": SMALL[0], "blur": -1}, "blur: got -1, expected 0 to 64 pixels"),
        ("levels", {"image": SMALL[0], "blur": float("nan")}, "blur: got nan"),
        ("levels", {"blur": 1.0}, "blur: got one without an image"),
        ("classes", {"image": SMALL[0]}, "class_labels: got None, expected 1 class numbers from 0 to 5"),
        (None, {"class_labels": 1.5}, "class_labels: got 1.5, expected 1 class numbers"),
        (None, {"class_labels": (1.5,)}, r"class_labels: got \(1.5,\), expected 1 class numbers"),
        (None, {"class_labels": "1"}, "class_labels: got '1', expected 1 class numbers"),
    ],
)
def test_requests_that_fit_no_upscaler(engine: Engine, model: str | None, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        engine.submit(model=model, **fields)


@pytest.mark.parametrize(
    ("network", "options", "message"),
    [
        ({"in_channels": 6, "out_channels": 4}, {}, "the images have 3 channels, the denoiser predicts 4"),
        ({"in_channels": 5}, {}, "the images have 5 channels, the denoiser predicts 3"),
        (UPSCALER, {}, "told a level of noise, without a low_res_scheduler or image_noising_scheduler"),
        (UPSCALER, {"says": {"blur_per_level": 0}}, "blur_per_level: got 0, expected pixels above 0"),
    ],
)
def test_checkpoints_that_are_no_upscaler(
    tmp_path: Path, network: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    save(tmp_path, NETWORK | network, **options)
    with pytest.raises(CheckpointError, match=message):
        load_components(tmp_path, EngineConfig(device="cpu"))


def test_one_shape_for_another_is_a_warning(engine: Engine) -> None:
    image = np.zeros((8, 6, 3), np.float32)
    found = engine.generate(model="levels", image=image, steps=1, seed=1)
    assert found.warnings == ("image: stretched from 6 x 8 to 16 x 16 pixels; give another width or height",)
    assert engine.generate(model="levels", image=image, steps=1, width=12, seed=1).image.size == (12, 16)


def test_levels_of_blur_end_where_the_work_would_not(load: Callable[..., Any]) -> None:
    parts, _ = load("blurs")
    low = parts.low_resolution
    assert low is not None
    open_ended = dataclasses.replace(parts, low_resolution=dataclasses.replace(low, highest=None))
    with pytest.raises(RequestError, match="expected an integer from 0 to 256, a blur"):
        settle(open_ended, Request(image=SMALL[0], noise_level=257))


@pytest.mark.parametrize("model", [None, "levels", "classes", "blurs"])
def test_warming_up_needs_no_picture(engine: Engine, model: str | None) -> None:
    engine.warmup(16, 16, model=model)
    engine.warmup(8, 8, cascade=CASCADE)


@pytest.mark.slow
def test_an_upscaler_is_exported_and_runs_from_its_checkpoint_only(
    folders: dict[str, tuple[Path, nn.Module]], tmp_path: Path
) -> None:
    assert invoke("onnx", str(folders["levels"][0]), "-o", str(tmp_path / "made"), "--shapes", "16x16,24x16") == 0
    assert (tmp_path / "made" / "image_noising_scheduler" / "scheduler_config.json").is_file()
    engine = Engine.load(tmp_path / "made", device="cpu", runtime="onnxruntime")
    with engine, pytest.raises(RequestError, match="is an upscaler, which runs from its checkpoint"):
        engine.generate(image=SMALL[0])
