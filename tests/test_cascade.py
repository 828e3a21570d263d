"""Cascades: stages equal what a user would do by hand, rows of many requests are batched anew at every stage."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from stepfuse import Engine, EngineConfig, Request
from stepfuse.engine.cascade import BUILTIN, Cascade, Stage
from stepfuse.engine.components import Components, LowResolution
from stepfuse.engine.conditioning.images import load_image, resize
from stepfuse.engine.errors import Cancelled, DeadlineMissed, QueueFull, RequestError, StepfuseError
from stepfuse.engine.imaging import begin
from stepfuse.engine.leg import Leg
from stepfuse.engine.loading import load_components
from stepfuse.engine.models.tiles import Tiles
from stepfuse.engine.relay import SEED_STRIDE, Relay
from stepfuse.engine.sampling.noise import initial_noise

SIZE: dict[str, Any] = {"width": 32, "height": 32}
HIRES = BUILTIN["hires-fix"]
SPLIT = Cascade(
    name="split",
    stages=(
        Stage(request={"denoising_end": 0.6}),
        Stage(input="latents", request={"denoising_start": 0.6}),
    ),
)
TILED = Cascade(name="tiled", stages=(Stage(), Stage(scale=2, tile=48, overlap=16, request={"strength": 0.5})))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def parts() -> Components:
    return load_components("shapes", EngineConfig(device="cpu", max_rows=6))


@pytest.fixture(scope="module")
def engine(parts: Components) -> Iterator[Engine]:
    with Engine(parts) as made:
        made.add("second", parts)
        yield made


@pytest.fixture(scope="module")
def both(parts: Components, reference_pipeline: Callable[[str], Path]) -> Iterator[Engine]:
    """The built-in model, again as "second", and a small x4 upscaler, also "clean": one whose levels are no noise."""
    with Engine(parts) as made:
        made.add("second", parts)
        made.add("x4", reference_pipeline("x4_upscaler"))
        made.add("clean", dataclasses.replace(made.models["x4"].parts, low_resolution=LowResolution(None, 350, 1.0)))
        made.add("other", reference_pipeline("sd15"))
        yield made


# A cascade is what a user would do by hand.


def test_every_stage_equals_its_request_made_alone(engine: Engine) -> None:
    made = engine.generate("a red circle", cascade=HIRES, seed=3, n=2, steps=4, output="np", **SIZE)
    first, second = made.stages
    alone = engine.generate("a red circle", seed=3, n=2, steps=4, output="np", **SIZE)
    assert relative(first.latents, alone.latents) <= 1e-4
    again = engine.generate(
        "a red circle", image=list(first.images), strength=0.5, width=64, height=64, n=2, steps=4,
        seed=3 + SEED_STRIDE, output="np",
    )  # fmt: skip
    assert relative(second.latents, again.latents) <= 1e-4
    assert made.images is second.images
    assert made.images.shape == (2, 64, 64, 3)
    assert (made.seeds, second.seeds) == ((3, 4), (3 + SEED_STRIDE, 4 + SEED_STRIDE))
    assert made.settings["cascade"] == "hires-fix"
    assert made.timings["denoise"] == pytest.approx(sum(stage.timings["denoise"] for stage in made.stages))
    assert made.timings["total"] >= sum(stage.timings["total"] for stage in made.stages)


def test_a_split_schedule_equals_the_whole(engine: Engine) -> None:
    fields = {"seed": 5, "steps": 10, "sampler": "ddim", "guidance_scale": 3.0, "output": "latent", **SIZE}
    whole, split = engine.generate("a blue square", **fields), engine.generate("a blue square", cascade=SPLIT, **fields)
    assert [stage.images for stage in split.stages] == [None, None]
    assert relative(split.latents, whole.latents) <= 1e-5
    assert relative(split.stages[0].latents, whole.latents) > 0.05


@pytest.mark.parametrize("sampler", ["euler", "ddim"])
def test_base_and_refiner_equal_the_pipelines_of_diffusers(
    reference_pipeline: Callable[[str], Path], sampler: str
) -> None:
    base, refiner = reference_pipeline("sdxl"), reference_pipeline("sdxl_refiner")
    common: dict[str, Any] = {"negative_prompt": "blurry", "guidance_scale": 4.0}
    pipes: list[Any] = [
        diffusers.StableDiffusionXLPipeline.from_pretrained(base, torch_dtype=torch.float32),
        diffusers.StableDiffusionXLImg2ImgPipeline.from_pretrained(refiner, torch_dtype=torch.float32),
    ]
    for pipe in pipes:
        scheduler = {"euler": diffusers.EulerDiscreteScheduler, "ddim": diffusers.DDIMScheduler}[sampler]
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
    between = pipes[0](
        "a photo of a cat", num_inference_steps=7, denoising_end=0.6, output_type="latent",
        generator=torch.Generator().manual_seed(2), **SIZE, **common,
    ).images  # fmt: skip
    expected = pipes[1](
        "a photo of a cat", image=between, num_inference_steps=7, denoising_start=0.6, output_type="latent", **common
    ).images
    stages = (SPLIT.stages[0], dataclasses.replace(SPLIT.stages[1], model="refiner"))
    with Engine.load(base, device="cpu", models={"refiner": refiner}) as engine:
        fields = {"seed": 2, "steps": 7, "sampler": sampler, "output": "latent", **SIZE, **common}
        found = engine.generate("a photo of a cat", cascade=Cascade(name="sdxl", stages=stages), **fields)
    assert relative(found.latents, expected) <= 1e-4


def test_an_upscaler_enlarges_and_its_request_can_be_made_again(both: Engine) -> None:
    stage = Stage(model="x4", request={"noise_level": 20, "steps": 3})
    cascade = Cascade(name="x4", stages=(Stage(), stage))
    made = both.generate("a red circle", cascade=cascade, seed=4, n=2, steps=2, output="np", **SIZE)
    assert made.images.shape == (2, 128, 128, 3)
    again = both.generate(made.stages[1].request)
    assert relative(again.latents, made.latents) <= 1e-4


def test_stages_without_a_model_are_of_the_requests_model(both: Engine) -> None:
    made = both.generate("a circle", model="other", cascade=HIRES, seed=1, steps=4, output="latent", **SIZE)
    assert [stage.request.model for stage in made.stages] == ["other", "other"]
    assert [stage.model for stage in made.stages] == [both.models["other"].parts.name] * 2
    assert made.stages[1].settings["steps"] == 4, "how to sample is shared"


def test_a_stage_is_told_where_its_model_cannot_take_its_own_fields(engine: Engine) -> None:
    cascade = Cascade(name="t", stages=(Stage(), Stage(request={"prompt_2": "a square", "strength": 0.5})))
    with pytest.raises(RequestError, match="stage 2 of 2: prompt_2: shapes has only one text encoder"):
        engine.submit("a circle", cascade=cascade, **SIZE)


def test_class_labels_are_for_the_stages_that_have_classes(both: Engine) -> None:
    """What enlarges is told a noise level where others are told a class."""
    x4 = both.models["x4"]
    no_text = dataclasses.replace(x4.parts.family, text="none")
    model = dataclasses.replace(x4, parts=dataclasses.replace(x4.parts, family=no_text))
    leg = Leg.after((32, 32), 1, Stage(model="x4"), model)
    assert leg.without() == dict.fromkeys(
        ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2", "class_labels")
    )


def test_a_safety_hook_sees_what_a_plain_stage_resamples(parts: Components) -> None:
    seen: list[tuple[tuple[int, ...], str]] = []

    def blacken(images: np.ndarray, prompt: str) -> np.ndarray:
        seen.append((images.shape, prompt))
        return np.zeros_like(images)

    ending = Cascade(name="e", stages=(Stage(), Stage(model="lanczos", scale=2)))
    with Engine(dataclasses.replace(parts, config=dataclasses.replace(parts.config, safety=blacken))) as engine:
        made = engine.generate("a red circle", cascade=ending, seed=1, steps=2, output="np", **SIZE)
    assert seen == [((1, 32, 32, 3), "a red circle"), ((1, 64, 64, 3), "a red circle")]
    assert made.images.shape == (1, 64, 64, 3)
    assert not made.images.any()


def test_stages_that_wait_hold_no_pictures(engine: Engine) -> None:
    relay = Relay(TILED, Request(prompt="a circle", n=2, **SIZE), engine._model)
    waiting = relay.tickets[1]
    assert len(waiting.rows) == 8
    assert waiting.settled.pictures.images == ()
    assert waiting.settled.request.image is waiting.asked.request.image is None


def test_latents_are_resized_and_noised_to_the_strength(engine: Engine) -> None:
    """x = alpha z' + sigma noise for the latents z' of the stage before, without a round through the autoencoder."""
    stage = Stage(input="latents", resize="bicubic", scale=2, request={"strength": 0.6})
    cascade = Cascade(name="latent", stages=(Stage(), stage))
    relay = Relay(cascade, Request(prompt="a circle", seed=1, n=2, steps=5, **SIZE), engine._model)
    channels = engine.components.channels
    latents, result = torch.randn(2, channels, 4, 4), engine.generate("a circle", steps=1, **SIZE)
    ticket = relay.follow(result, latents, None)
    assert ticket is not None
    plan, wanted = ticket.settled.plan, F.interpolate(latents, (8, 8), mode="bicubic", antialias=True)
    assert len(plan.updates) == 3
    noisy = begin(engine.components, ticket.settled, [0, 1]).x - plan.init_alpha * wanted
    for index, row in enumerate(noisy / plan.init_scale):
        generator = torch.Generator().manual_seed(1 + SEED_STRIDE + index)
        torch.randn((1, channels, 8, 8), generator=generator)  # what the autoencoder would have drawn
        assert torch.allclose(row, torch.randn((1, channels, 8, 8), generator=generator)[0], atol=1e-4)


def test_a_plain_stage_resamples_and_the_next_takes_its_image(engine: Engine) -> None:
    stages = (Stage(), Stage(model="lanczos", scale=2), Stage(model="second", request={"strength": 0.4, "steps": 5}))
    made = engine.generate(
        "a red circle", cascade=Cascade(name="p", stages=stages), seed=1, steps=3, output="np", **SIZE
    )
    first, plain, last = made.stages
    assert np.array_equal(plain.images[0], resize(first.images[0], 64, 64))
    alone = engine.generate(
        "a red circle", image=plain.images[0], strength=0.4, steps=5, seed=1 + 2 * SEED_STRIDE, output="latent"
    )
    assert relative(last.latents, alone.latents) <= 1e-4
    ending = Cascade(name="e", stages=stages[:2])
    final = engine.generate("a red circle", cascade=ending, seed=1, steps=3, output="pil", **SIZE)
    assert np.abs(load_image(final.image) - plain.images[0]).max() <= 0.5 / 255 + 1e-6


def test_without_a_seed_the_stages_share_one_that_is_reported(engine: Engine) -> None:
    made = engine.generate("a circle", cascade=HIRES, steps=2, output="latent", **SIZE)
    again = engine.generate("a circle", cascade=HIRES, steps=2, seed=made.seeds[0], output="latent", **SIZE)
    assert made.images is None
    assert torch.equal(made.latents, again.latents)


def test_another_model_samples_by_its_own_defaults(engine: Engine) -> None:
    stages = (Stage(), Stage(model="second", request={"strength": 0.5, "prompt": "a blue square"}))
    made = engine.generate("a circle", cascade=Cascade(name="d", stages=stages), steps=2, sampler="euler", **SIZE)
    first, second = made.stages
    assert (first.settings["steps"], first.settings["sampler"]) == (2, "euler")
    assert second.settings["steps"] == engine.components.defaults["steps"] != 2
    assert second.request.prompt == "a blue square"
    assert made.request.prompt == "a circle"


# Tiles.


@pytest.mark.parametrize(("height", "width", "tile", "overlap"), [(9, 14, 6, 2), (5, 20, 8, 3), (7, 7, 8, 4)])
def test_tiles_put_together_are_the_image(height: int, width: int, tile: int, overlap: int) -> None:
    images, tiles = torch.randn(2, 3, height, width, dtype=torch.float64), Tiles(height, width, tile, overlap)
    crops = tiles.crops(images)
    assert len(crops) == len(tiles)
    assert {crop.shape[-2:] for crop in crops} == {torch.Size(tiles.shape)}
    assert torch.allclose(tiles.blend(crops), images, atol=1e-14)
    larger = [F.interpolate(crop, scale_factor=2, mode="nearest") for crop in crops]
    assert torch.allclose(tiles.blend(larger), F.interpolate(images, scale_factor=2, mode="nearest"), atol=1e-14)


def test_tiled_resampling_equals_untiled_but_near_seams() -> None:
    """Lanczos-3 sees three pixels to each side: with more overlap than that, only ramps see a border."""
    image = np.random.default_rng(1).random((40, 56, 3), dtype=np.float32)
    tiles, pixels = Tiles(40, 56, 24, 12), torch.from_numpy(image).permute(2, 0, 1)[None]
    parts = [resize(crop[0].permute(1, 2, 0).numpy(), 48, 48) for crop in tiles.crops(pixels)]
    blended = tiles.blend(torch.from_numpy(part).permute(2, 0, 1)[None] for part in parts)
    error = np.abs(blended[0].permute(1, 2, 0).numpy() - resize(image, 112, 80))
    assert error.max() < 0.05
    assert np.median(error) < 1e-6


@pytest.mark.parametrize(
    ("model", "tile", "overlap", "factor", "fields"),
    [("second", 48, 16, 2, {"strength": 0.5}), ("clean", 96, 24, 4, {"noise_level": 0})],
)
def test_tiles_are_rows_that_equal_requests_of_their_own(
    both: Engine, model: str, tile: int, overlap: int, factor: int, fields: dict[str, Any]
) -> None:
    """An upscaler's input has one pixel for a latent site, an image to image model's as many as its output."""
    stage = Stage(model=model, scale=factor, tile=tile, overlap=overlap, request={"steps": 4, **fields})
    cascade = Cascade(name="tiles", stages=(Stage(), stage))
    made = both.generate("a red circle", cascade=cascade, seed=2, n=2, steps=2, output="np", **SIZE)
    first, second = made.stages
    parts = both.models[model].parts
    site, channels, side = parts.scale, parts.channels, 32 * factor // parts.scale
    tiles = Tiles(side, side, tile // site, overlap // site)
    assert len(tiles) == 4
    assert second.images.shape == (2, 32 * factor, 32 * factor, 3)
    assert second.latents.shape == (2, channels, side, side)
    assert second.request.n == 2
    pixels = 1 if model == "clean" else site
    inputs = [resize(image, side * pixels, side * pixels) for image in first.images]
    noise, by_tile = initial_noise(2 + SEED_STRIDE, (channels, side, side), 2), []
    for number, (top, left) in enumerate(tiles.places):
        n, at = tile // site, (slice(top, top + tile // site), slice(left, left + tile // site))
        box = tuple(slice(pixels * one.start, pixels * one.stop) for one in at)
        rows = [
            both.generate(
                "a red circle", model=model, image=inputs[i][box], latents=noise[i : i + 1, :, at[0], at[1]], steps=4,
                seed=2 + SEED_STRIDE + 4 * i + number, output="latent", width=n * site, height=n * site, **fields,
            ).latents
            for i in range(2)
        ]  # fmt: skip
        by_tile.append(torch.cat(rows))
    assert relative(second.latents, tiles.blend(by_tile)) <= 1e-4


# Many requests.


def sizes_of_updates(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(width in latents, rows) of every update from now on."""
    runner, sizes = engine.models[None].runner, []
    update = runner.update
    record = lambda batch, *rest: (sizes.append((batch.state.x.shape[-1], len(batch))), update(batch, *rest))[1]  # noqa: E731
    monkeypatch.setattr(runner, "update", record)
    return sizes


def test_stages_of_several_requests_run_together(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = sizes_of_updates(engine, monkeypatch)
    prompts = ["a red circle", "a blue square", "a green triangle"]
    engine.generate(prompts, cascade=HIRES, seed=1, steps=4, output="latent", **SIZE)
    assert sizes == [(4, 3)] * 4 + [(8, 3)] * 2


def test_tiles_of_several_requests_share_a_batch(parts: Components, monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine(dataclasses.replace(parts, config=dataclasses.replace(parts.config, max_rows=8))) as engine:
        sizes = sizes_of_updates(engine, monkeypatch)
        engine.generate(["a red circle", "a blue square"], cascade=TILED, seed=1, steps=4, output="latent", **SIZE)
    assert sizes == [(4, 2)] * 4 + [(6, 8)] * 2


def test_tiles_of_images_of_two_sizes_are_decoded_apart(parts: Components) -> None:
    config = dataclasses.replace(parts.config, max_rows=16, decode_rows=4)
    larger = dataclasses.replace(TILED, stages=(Stage(), dataclasses.replace(TILED.stages[1], scale=3)))
    with Engine(dataclasses.replace(parts, config=config)) as engine:
        jobs = [engine.submit("a circle", cascade=one, seed=1, steps=4, output="np", **SIZE) for one in (TILED, larger)]
        found = [job.result(60) for job in jobs]
        assert [result.images.shape[1] for result in found] == [64, 96]
        for result, cascade in zip(found, (TILED, larger), strict=True):
            alone = engine.generate("a circle", cascade=cascade, seed=1, steps=4, output="np", **SIZE)
            assert np.abs(result.images - alone.images).max() <= 2 / 255


def test_a_mixed_load_equals_solo_runs(engine: Engine) -> None:
    requests = [
        (Request(prompt=f"a circle {i}", seed=i, steps=2 + i % 4, n=1 + i % 2, **SIZE), i % 4) for i in range(12)
    ]
    kinds = (None, HIRES, TILED, SPLIT)
    jobs = [engine.submit(request, cascade=kinds[kind], output="latent") for request, kind in requests]
    together = [job.result(120) for job in jobs]
    for (request, kind), found in zip(requests, together, strict=True):
        alone = engine.generate(request, cascade=kinds[kind], output="latent")
        assert relative(found.latents, alone.latents) <= 1e-4, (request, kind)
        assert len(found.stages) == (2 if kind else 0)
    worker = engine._worker
    assert len(worker.scheduler) == len(worker.batches) == len(worker.bookings) == len(worker.batches.bank) == 0


def test_progress_counts_through_all_stages(engine: Engine) -> None:
    events = list(engine.stream("a circle", cascade=TILED, steps=4, **SIZE))
    updates = [event.update for event in events]
    assert {event.total for event in events} == {6}
    assert updates == sorted(updates)
    assert (updates[0], updates[-1]) == (1, 6)
    assert [event.result is None for event in events] == [True] * (len(events) - 1) + [False]


# How jobs end.


def until_stage(engine: Engine, monkeypatch: pytest.MonkeyPatch, act: Any, stage: int = 2) -> None:
    """Call act() once, before the first update of a stage."""
    runner, done = engine.models[None].runner, threading.Event()
    update = runner.update

    def acting(batch: Any, *rest: Any) -> Any:
        if batch.state.x.shape[-1] == 4 * stage and not done.is_set():
            done.set()
            act()
        return update(batch, *rest)

    monkeypatch.setattr(runner, "update", acting)


def nothing_is_left(engine: Engine) -> bool:
    worker = engine._worker
    return not (len(worker.scheduler) or len(worker.batches) or len(worker.bookings) or worker.inbox)


@pytest.mark.parametrize("stage", [1, 2])
def test_cancelling_names_the_stage(engine: Engine, monkeypatch: pytest.MonkeyPatch, stage: int) -> None:
    jobs: list[Any] = []
    until_stage(engine, monkeypatch, lambda: jobs[0].cancel(), stage)
    jobs.append(engine.submit("a circle", cascade=HIRES, steps=8, **SIZE))
    with pytest.raises(Cancelled, match=f"stage {stage} of 2: the job was cancelled"):
        jobs[0].result(60)
    engine.generate("a circle", steps=1, **SIZE)
    assert nothing_is_left(engine)


def test_an_error_in_the_second_stage_names_it_and_ends_its_job_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise ValueError("broken")

    until_stage(engine, monkeypatch, fail)
    plain = engine.submit("a circle", steps=30, **SIZE)
    with pytest.raises(StepfuseError, match="stage 2 of 2: ValueError: broken") as caught:
        engine.generate("a circle", cascade=HIRES, steps=4, **SIZE)
    assert isinstance(caught.value.__cause__, ValueError)
    assert plain.result(60).images
    assert nothing_is_left(engine)


def test_what_a_later_stage_cannot_do_is_said_before_anything_runs(engine: Engine) -> None:
    for request, message in (
        ({"sampler": "dimm"}, "stage 2 of 2 .second.: .*ddim"),
        ({"strength": 0.01, "steps": 4}, "stage 2 of 2 .second.: strength=0.01 leaves none of the 4 steps"),
    ):
        cascade = Cascade(name="wrong", stages=(Stage(), Stage(model="second", request=request)))
        with pytest.raises(RequestError, match=message):
            engine.submit("a circle", cascade=cascade, **SIZE)
    with pytest.raises(RequestError, match=r"stage 2 of 2 .secnd.: model: got 'secnd', did you mean 'second'"):
        engine.submit("a circle", cascade=Cascade(name="w", stages=(Stage(), Stage(model="secnd"))), **SIZE)


def test_a_deadline_is_for_the_start_of_the_first_stage(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    until_stage(engine, monkeypatch, lambda: time.sleep(0.6), stage=1)
    slow = engine.submit("a circle", cascade=HIRES, steps=4, deadline=0.5, **SIZE)
    assert slow.result(60).timings["total"] > 0.5, "one that runs goes on: the second stage came after the deadline"
    with pytest.raises(DeadlineMissed, match="stage 1 of 2"):
        engine.generate("a circle", cascade=HIRES, deadline=1e-9, **SIZE)
    assert nothing_is_left(engine)


def test_the_bound_of_the_queue_counts_all_stages_once(parts: Components) -> None:
    config = dataclasses.replace(parts.config, queue_seconds=1.0)
    with Engine(dataclasses.replace(parts, config=config)) as engine:
        engine.generate("a circle", cascade=HIRES, steps=8, **SIZE)
        costs = engine._worker._costs
        small, large = costs._seconds[None, (), 0][32 * 32], costs._seconds[None, (), 0][64 * 64]
        for times, seconds in ((small, 0.01), (large, 0.5)):
            times.update(dict.fromkeys(times, seconds))
        held = engine.submit("a circle", steps=50, **SIZE)
        with pytest.raises(QueueFull):  # eight updates of 0.01 s have room, four of 0.5 s have none
            engine.submit("a circle", cascade=HIRES, steps=8, **SIZE)
        beside = engine.submit("a circle", steps=1, **SIZE)
        assert held.result(60).images
        assert beside.result(60).images
        taken = engine.submit("a circle", cascade=HIRES, steps=8, **SIZE)  # an empty queue takes anything
        assert taken.result(60).images, "the second stage is not asked again"
        assert not len(engine._worker.bookings)


def test_warming_up_sees_the_sizes_of_all_stages(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = sizes_of_updates(engine, monkeypatch)
    engine.warmup(32, 32, cascade=TILED)
    assert sizes == [(4, 1), (6, 4)], "the four tiles of an image"
