"""Pictures as inputs of rows: what they must be, identities that hold for any model, and rows of all kinds together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from reference.recording import DryRecorder

from stepfuse import Engine, EngineConfig, Request
from stepfuse.engine import pipeline
from stepfuse.engine.batch import Batch
from stepfuse.engine.conditioning.images import expand
from stepfuse.engine.errors import RequestError
from stepfuse.engine.loading import load_components
from stepfuse.engine.models.vae import to_model
from stepfuse.engine.runner import Runner
from stepfuse.engine.settling import settle

SOLO = 1e-4  # relative L2 of latents
WIDTH, HEIGHT = 48, 32
RNG = np.random.default_rng(0)
PICTURE = RNG.random((HEIGHT, WIDTH, 3), dtype=np.float32)
HALF = np.zeros((HEIGHT, WIDTH), np.float32)
HALF[:, WIDTH // 2 :] = 1
ONES = np.ones_like(HALF)
SMALL: dict[str, Any] = {"output": "latent", "steps": 5, "seed": 3}

Pipeline = Callable[[str], Path]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def engine(reference_pipeline: Pipeline) -> Iterator[Engine]:
    with Engine.load(reference_pipeline("sd15"), device="cpu", max_rows=8) as made:
        yield made


@pytest.fixture(scope="module")
def load(reference_pipeline: Pipeline) -> Iterator[Callable[[str], Engine]]:
    made: dict[str, Engine] = {}

    def get(name: str) -> Engine:
        if name not in made:
            made[name] = Engine.load(reference_pipeline(name), device="cpu")
        return made[name]

    yield get
    for each in made.values():
        each.close()


def latents_of(engine: Engine, picture: np.ndarray, seed: int) -> torch.Tensor:
    """What a seed makes of a picture: the first numbers its generator draws choose the sample."""
    vae = engine.components.vae
    assert vae is not None
    moments = vae.encode(torch.from_numpy(picture).permute(2, 0, 1)[None] * 2 - 1)
    noise = torch.randn(moments.mean.shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return to_model(moments.sample(noise), vae.config)


@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmpp_2m", "euler_a"])
def test_where_nothing_is_painted_the_picture_comes_back(engine: Engine, sampler: str) -> None:
    known = latents_of(engine, PICTURE, 3)
    nothing = engine.generate("cat", image=PICTURE, mask=0 * ONES, sampler=sampler, **SMALL)
    assert relative(nothing.latents, known) <= 1e-6
    half = engine.generate("cat", image=PICTURE, mask=HALF, sampler=sampler, **SMALL)
    side = half.latents.shape[-1] // 2
    assert relative(half.latents[..., :side], known[..., :side]) <= 1e-6
    assert relative(half.latents[..., side:], known[..., side:]) > 0.1


@pytest.mark.parametrize("sampler", ["ddim", "heun", "dpmpp_2m"])
def test_where_everything_is_painted_a_mask_changes_nothing(engine: Engine, sampler: str) -> None:
    options = {"sampler": sampler, **SMALL}
    with_mask = engine.generate("cat", image=PICTURE, mask=ONES, strength=0.6, **options)
    without = engine.generate("cat", image=PICTURE, strength=0.6, **options)
    assert relative(with_mask.latents, without.latents) <= 1e-6
    noise = torch.randn((1, 4, HEIGHT // 8, WIDTH // 8), generator=torch.Generator().manual_seed(9))
    with_mask = engine.generate("cat", image=PICTURE, mask=ONES, latents=noise, **options)
    from_text = engine.generate("cat", width=WIDTH, height=HEIGHT, latents=noise, **options)
    assert relative(with_mask.latents, from_text.latents) <= 1e-6


@pytest.mark.parametrize("strength", [1.0, 0.7, 0.29, 0.2])
@pytest.mark.parametrize("sampler", ["ddim", "heun", "dpmpp_2m"])
def test_a_constant_change_map_is_image_to_image(engine: Engine, sampler: str, strength: float) -> None:
    options = {"image": PICTURE, "sampler": sampler, "output": "latent", "steps": 10, "seed": 3}
    mapped = engine.generate("cat", change_map=strength * ONES, **options)
    plain = engine.generate("cat", strength=strength, **options)
    assert relative(mapped.latents, plain.latents) <= 1e-6
    assert mapped.settings["strength"] == pytest.approx(strength)


def test_a_constant_change_map_is_image_to_image_in_float64() -> None:
    """Tenths are other numbers in float32, which maps are read in."""
    with Engine.load("shapes", device="cpu", dtype="float64") as engine:
        options = {"image": PICTURE, "sampler": "ddim", "output": "latent", "steps": 10, "seed": 3}
        for strength in (0.9, 0.7):
            mapped = engine.generate("a circle", change_map=strength * ONES, **options)
            plain = engine.generate("a circle", strength=strength, **options)
            assert relative(mapped.latents, plain.latents) <= 1e-6


def test_a_change_map_gives_every_pixel_its_strength(engine: Engine) -> None:
    """Where it is 0 the picture stays; a site whose strength is 0.4 is not as far from it as one whose is 1."""
    ramp = np.repeat(np.array([0.0, 0.4, 1.0], np.float32), WIDTH // 3)[None].repeat(HEIGHT, 0)
    found = engine.generate("cat", image=PICTURE, change_map=ramp, **SMALL | {"steps": 10}).latents
    known, side = latents_of(engine, PICTURE, 3), found.shape[-1] // 3
    away = [relative(found[..., i : i + side], known[..., i : i + side]) for i in range(0, 3 * side, side)]
    assert away[0] <= 1e-6 < 0.05 < away[1]
    assert away[2] > away[1]


def test_strengths_run_their_share_of_the_steps(engine: Engine) -> None:
    assert engine.generate("cat", image=PICTURE, **SMALL).settings["strength"] == 0.8
    options = {"image": PICTURE, "sampler": "ddim", **SMALL}
    events = [list(engine.stream("cat", strength=strength, **options)) for strength in (0.2, 0.5, 1.0)]
    assert [each[-1].total for each in events] == [1, 2, 5]
    with pytest.raises(RequestError, match=r"strength=0\.1 leaves none of the 5 steps"):
        engine.submit("cat", image=PICTURE, strength=0.1, **SMALL)


ALL_KINDS: tuple[dict[str, Any], ...] = (
    {"width": WIDTH, "height": HEIGHT, "sampler": "ddim"},
    {"image": PICTURE, "strength": 0.5, "sampler": "dpmpp_2m"},
    {"image": PICTURE, "mask": HALF, "sampler": "euler_a", "guidance_scale": 1.0},
    {"image": [PICTURE, 1 - PICTURE], "mask": HALF, "strength": 0.7, "n": 2},
    {"image": PICTURE, "change_map": 0.8 * HALF, "guidance_rescale": 0.5},
    {"image": PICTURE, "mask": HALF, "resample": (2, 2), "sampler": "ddim"},
    {"width": WIDTH, "height": HEIGHT, "sampler": "heun"},
)


def requests() -> list[Request]:
    return [Request(prompt="a photo of a cat", output="latent", seed=i, **{"steps": 4, **kind})
            for i, kind in enumerate(ALL_KINDS)]  # fmt: skip


def test_rows_of_all_kinds_share_a_batch_and_equal_their_solo_runs(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, together = engine.models[None].runner, set()
    update = runner.update

    def noted(batch: Any, *rest: Any) -> Any:
        together.add(frozenset(ticket.settled.request.seed for ticket, _ in batch.owners))
        return update(batch, *rest)

    monkeypatch.setattr(runner, "update", noted)
    found = engine.generate(requests())
    assert frozenset(range(len(ALL_KINDS))) in together, "they ran in one batch"
    for request, one in zip(requests(), found, strict=True):
        assert relative(one.latents, engine.generate(request).latents) <= SOLO, request


def test_a_recorded_update_serves_rows_with_and_without_pictures() -> None:
    """The recorder replays torch operations without any Python, as a CUDA graph does."""
    parts = load_components("shapes", EngineConfig(device="cpu", max_rows=2))
    recorded = dataclasses.replace(parts, config=dataclasses.replace(parts.config, runner="graph"))
    size = {"width": 32, "height": 32}
    picture = PICTURE[:, :32]
    kinds = [size, {"image": picture, "mask": HALF[:, :32]}, size, {"image": picture, "change_map": HALF[:, :32]}]
    runner = Runner(recorded, DryRecorder(frozen=True))
    with Engine(recorded, runner) as graph, Engine(parts) as eager:
        for kind in kinds:
            options = {"steps": 3, "seed": 1, "output": "latent", "sampler": "euler_a", **kind}
            found = graph.generate("a red circle", **options)
            assert relative(found.latents, eager.generate("a red circle", **options).latents) <= SOLO
        assert runner.captures is not None
        assert runner.captures.captured == 1


def test_deterministic_rows_do_not_notice_that_a_neighbour_has_a_mask() -> None:
    size = {"width": 32, "height": 32}
    plain = Request(prompt="a red circle", steps=3, seed=1, output="latent", sampler="euler_a", **size)
    masked = dataclasses.replace(plain, seed=2, image=PICTURE[:, :32], mask=HALF[:, :32])
    with Engine.load("shapes", device="cpu", deterministic=2) as engine:
        found = engine.generate([plain, masked])
        for one, request in zip(found, (plain, masked), strict=True):
            assert torch.equal(one.latents, engine.generate(request).latents)


@pytest.mark.parametrize("name", ["sd15_inpaint9", "x4_upscaler", "sd15"])
def test_rows_of_one_request_have_their_own_pictures(load: Callable[[str], Engine], name: str) -> None:
    options: dict[str, Any] = {"steps": 3, "output": "latent"}
    if name != "x4_upscaler":
        options["mask"] = HALF
    pictures = [PICTURE, 1 - PICTURE]
    together = load(name).generate("cat", image=pictures, n=2, seed=5, **options).latents
    for i, picture in enumerate(pictures):
        alone = load(name).generate("cat", image=picture, seed=5 + i, **options).latents
        assert relative(together[i : i + 1], alone) <= SOLO
    assert relative(together[:1], together[1:]) > 0.1


@torch.inference_mode()
def test_a_parked_row_takes_along_what_is_beside_its_latents(load: Callable[[str], Engine]) -> None:
    parts = load("sd15_inpaint9").components
    settled = settle(parts, Request(prompt="cat", image=PICTURE, mask=HALF, steps=4, seed=1, sampler="dpmpp_2m"))
    ((conditioning, _),) = pipeline.encode(parts, [settled])
    runner, found = Runner(parts), []
    for parked_after in (4, 2):
        batch = Batch(2)
        batch.join(pipeline.start(parts, settled, conditioning, [0]), ["row"])
        for _ in range(parked_after):
            runner.update(batch)
        saved = batch.save(0, keep_prepared=True)
        batch.leave([0])
        batch.state.model_input.fill_(float("nan"))
        batch = Batch(2)
        batch.restore(saved, saved.prepared)
        for _ in range(4 - parked_after):
            runner.update(batch)
        found.append(batch.state.x[0].clone())
    assert torch.equal(*found)


@pytest.mark.parametrize("name", ["sd15_inpaint9", "x4_upscaler", "sdxl_refiner"])
def test_models_that_need_pictures_warm_up(load: Callable[[str], Engine], name: str) -> None:
    load(name).warmup()
    load(name).warmup(96, 64)


def test_an_upscaler_enlarges_to_the_size_that_was_asked_for(load: Callable[[str], Engine]) -> None:
    upscaler = load("x4_upscaler")
    found = upscaler.generate("cat", image=PICTURE[:12, :20], steps=2, seed=1, n=2)
    assert [image.size for image in found.images] == [(80, 48)] * 2
    assert upscaler.generate("cat", image=PICTURE, width=40, height=32, steps=2).image.size == (40, 32)


def test_the_size_is_the_pictures_rounded_down_to_whole_latents(engine: Engine) -> None:
    odd = RNG.random((37, 50, 3), dtype=np.float32)
    found = engine.generate("cat", image=odd, **SMALL)
    assert (found.settings["width"], found.settings["height"]) == (48, 32)
    assert found.warnings == ("image: resized from 50 x 37 to 48 x 32 pixels, multiples of 8",)
    found = engine.generate("cat", image=odd, width=64, height=32, **SMALL)
    assert found.latents.shape[-2:] == (4, 8)
    assert found.warnings == ()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"mask": HALF}, "mask: got one without an image"),
        ({"change_map": HALF}, "change_map: got one without an image"),
        ({"strength": 0.5}, "strength: got one without an image"),
        ({"image": PICTURE, "mask": HALF, "change_map": HALF}, "both mask and change_map"),
        ({"image": PICTURE, "change_map": HALF, "strength": 0.5}, "both strength and change_map"),
        ({"image": PICTURE, "change_map": 0 * HALF}, "change_map: 0 everywhere"),
        ({"image": PICTURE, "resample": (2, 2)}, "resample: needs an image and a mask"),
        ({"image": PICTURE, "mask": HALF, "resample": 3}, r"resample: got 3, expected \(jump length, times\)"),
        ({"image": [PICTURE] * 2, "n": 3}, "image: got 2 images for n=3"),
        ({"image": PICTURE, "noise_level": 20}, "noise_level: .* is no upscaler"),
        ({"image": "nowhere.png"}, "image: no file 'nowhere.png'"),
        ({"denoising_start": 0.5}, "denoising_start: give the latents"),
        ({"image": PICTURE, "strength": 1.5}, "strength=1.5"),
        ({"image": PICTURE, "strength": 0.5, "denoising_start": 0.5}, "both strength and denoising_start"),
    ],
)
def test_what_means_nothing_is_refused_at_once(engine: Engine, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        engine.submit("cat", **fields)


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        ("sd15_inpaint9", {}, "needs an image and a mask"),
        ("sd15_inpaint9", {"image": PICTURE}, "needs an image and a mask"),
        ("sd15_inpaint9", {"image": PICTURE, "mask": HALF, "resample": (2, 2)}, "resample: .* sees the mask"),
        ("x4_upscaler", {}, "needs an image to enlarge"),
        ("x4_upscaler", {"image": PICTURE, "strength": 0.5}, "strength: .* enlarges images"),
        ("x4_upscaler", {"image": PICTURE, "noise_level": 351}, "noise_level=351; expected .* 0 to 350"),
        ("x4_upscaler", {"image": PICTURE, "class_labels": 3}, "class_labels: "),
        ("sdxl_refiner", {}, "needs an image, or latents and denoising_start"),
    ],
)
def test_models_say_what_they_need(load: Callable[[str], Engine], name: str, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        load(name).submit("cat", **fields)


def test_outpainting_makes_room_and_paints_it() -> None:
    picture = np.arange(2 * 3 * 3, dtype=np.float32).reshape(2, 3, 3) / 18
    image, mask = expand(picture, left=2, bottom=1, overlap=1)
    assert image.shape == (3, 5, 3)
    assert np.array_equal(image[:2, 2:], picture)
    assert np.array_equal(image[0, :2], picture[0, [0, 0]])
    assert np.array_equal(image[2, 2:], picture[1])
    assert mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]]
    for wrong, said in (({}, "no room"), ({"left": -1}, "left: got -1"), ({"top": 1, "overlap": 2}, "leave nothing")):
        with pytest.raises(RequestError, match=said):
            expand(picture, **wrong)


def test_an_outpainted_picture_keeps_its_latents(engine: Engine) -> None:
    image, mask = expand(PICTURE, right=20, overlap=8)
    found = engine.generate("cat", image=Image.fromarray((image * 255).astype(np.uint8)), mask=mask, **SMALL)
    assert found.settings["width"] == 64, "68 pixels are no whole latents"
    image, mask = expand(PICTURE, right=16, overlap=8)
    found = engine.generate("cat", image=image, mask=mask, **SMALL)
    known = latents_of(engine, image, 3)
    assert relative(found.latents[..., :5], known[..., :5]) <= 1e-6
    assert relative(found.latents[..., 5:], known[..., 5:]) > 0.1
