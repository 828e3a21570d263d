"""The engine: batches equal solo runs, jobs end as they should, bad input is an error that says what to do."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from stepfuse import Engine, EngineConfig, Request
from stepfuse.engine.errors import (
    Cancelled,
    CheckpointError,
    DeviceError,
    EngineClosed,
    NumericsError,
    RequestError,
    StepfuseError,
)
from stepfuse.engine.settling import settle
from stepfuse.kernels import geglu

SOLO = 1e-4  # relative L2 of latents, batch against solo
PROMPT = "a photo of a cat"


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def engine(reference_pipeline: Callable[[str], Path]) -> Iterator[Engine]:
    with Engine.load(reference_pipeline("sd15"), device="cpu", max_rows=4) as made:
        yield made


@pytest.fixture
def small(engine: Engine) -> dict[str, int]:
    """The smallest sensible request."""
    return {"width": 64, "height": 64, "steps": 3}


def test_n_images_equal_n_single_ones(engine: Engine, small: dict[str, int]) -> None:
    many = engine.generate(PROMPT, seed=11, n=3, output="np", **small)
    assert many.seeds == (11, 12, 13)
    for i, seed in enumerate(many.seeds):
        one = engine.generate(PROMPT, seed=seed, output="np", **small)
        assert relative(many.latents[i : i + 1], one.latents) <= SOLO
        assert np.abs(many.images[i] - one.images[0]).max() * 255 <= 2


def test_unlike_requests_in_one_batch_equal_their_solo_runs(engine: Engine) -> None:
    size = {"width": 64, "height": 64, "output": "latent"}
    requests = [
        Request(prompt=PROMPT, seed=1, steps=3, sampler="ddim", guidance_scale=5.0, **size),
        Request(prompt="of a", seed=2, steps=6, sampler="dpmpp_2m", guidance_scale=2.0, **size),
        Request(prompt="photo", seed=3, steps=4, sampler="euler_a", guidance_scale=7.5, **size),
        Request(prompt="cat", seed=4, steps=5, sampler="heun", guidance_rescale=0.5, **size),
        Request(prompt="cat", seed=5, steps=2, sampler="lcm", guidance_scale=1.0, **size),
        Request(prompt="a", seed=6, steps=4, sampler="ddpm", width=96, height=64, output="latent"),
    ]
    together = engine.generate(requests)
    for request, found in zip(requests, together, strict=True):
        assert relative(found.latents, engine.generate(request).latents) <= SOLO


def test_rows_without_guidance_cost_one_model_row_beside_guided_ones(
    engine: Engine, small: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser, sizes = engine.components.denoiser, []
    forward = denoiser.forward
    monkeypatch.setattr(denoiser, "forward", lambda x, *rest: (sizes.append(len(x)), forward(x, *rest))[1])
    requests = [Request(prompt=PROMPT, seed=i, guidance_scale=g, **small) for i, g in enumerate((1.0, 5.0, 1.0))]
    together = engine.generate(requests)
    assert set(sizes) == {4}, "1 + 2 + 1 model rows in every update"
    monkeypatch.undo()
    for request, found in zip(requests, together, strict=True):
        assert relative(found.latents, engine.generate(request).latents) <= SOLO


def test_more_images_than_rows_fit(engine: Engine, small: dict[str, int]) -> None:
    assert engine.components.config.max_rows == 4
    many = engine.generate(PROMPT, seed=20, n=6, output="latent", **small)
    last = engine.generate(PROMPT, seed=25, output="latent", **small)
    assert many.latents.shape[0] == 6
    assert relative(many.latents[5:], last.latents) <= SOLO


@settings(max_examples=8, deadline=None)
@given(width=st.integers(1, 14), height=st.integers(1, 14), steps=st.integers(1, 3))
def test_any_multiple_of_the_scale_gives_an_image_of_that_size(width: int, height: int, steps: int) -> None:
    with Engine.load("shapes", device="cpu") as engine:
        scale = engine.components.scale
        request = {"width": width * scale, "height": height * scale, "steps": steps, "output": "np"}
        image = engine.generate("a red circle", seed=1, **request).images
    assert image.shape == (1, height * scale, width * scale, 3)
    assert np.isfinite(image).all()
    assert image.std() > 0


def test_same_seed_same_bits_and_another_seed_another_image(engine: Engine, small: dict[str, int]) -> None:
    a, b = (engine.generate(PROMPT, seed=3, sampler="euler_a", output="latent", **small).latents for _ in range(2))
    c = engine.generate(PROMPT, seed=4, sampler="euler_a", output="latent", **small).latents
    assert torch.equal(a, b)
    assert relative(a, c) > 0.1


def test_seed_none_is_random_and_reported(engine: Engine, small: dict[str, int]) -> None:
    first, second = (engine.generate(PROMPT, output="latent", **small) for _ in range(2))
    assert first.seeds != second.seeds
    again = engine.generate(PROMPT, seed=first.seeds[0], output="latent", **small)
    assert torch.equal(first.latents, again.latents)


def test_outputs_agree_and_png_says_how_it_was_made(engine: Engine, small: dict[str, int], tmp_path: Path) -> None:
    results = {kind: engine.generate(PROMPT, seed=3, output=kind, **small) for kind in ("pil", "np", "pt")}
    array = results["np"].images[0]
    assert np.array_equal(np.asarray(results["pil"].image), (array * 255).round().astype(np.uint8))
    assert np.array_equal(results["pt"].images[0].permute(1, 2, 0).numpy(), array)
    (path,) = results["pil"].save(tmp_path / "a.png")
    said = json.loads(Image.open(path).text["parameters"])
    assert (said["prompt"], said["seed"], said["steps"], said["width"]) == (PROMPT, 3, 3, 64)
    bare = engine.generate(PROMPT, seed=3, metadata=False, **small).save(tmp_path / "b.png")
    assert "parameters" not in Image.open(bare[0]).text


def test_events_count_updates_and_carry_previews_and_the_result(engine: Engine, small: dict[str, int]) -> None:
    events = list(engine.stream(PROMPT, seed=3, preview_every=2, sampler="heun", **small))
    counted = [event.update for event in events[:-1]]
    assert counted == list(range(1, events[0].total + 1))
    assert events[0].total == 5, "three steps of Heun are five evaluations"
    assert [event.preview is not None for event in events[:-1]] == [n % 2 == 0 for n in counted]
    assert events[1].preview.shape == (1, 64, 64, 3)
    assert torch.equal(events[-1].result.latents, engine.generate(PROMPT, seed=3, sampler="heun", **small).latents)


def test_last_preview_is_close_to_the_image(engine: Engine, small: dict[str, int]) -> None:
    events = list(engine.stream(PROMPT, seed=3, preview_every=1, sampler="euler", output="np", **small))
    final = events[-1].result.images
    difference = [np.abs(event.preview / 255 - final).mean() for event in events[:-1]]
    assert difference[-1] <= 1 / 255, "the last update of Euler returns its denoised estimate"
    assert difference[0] > difference[-1]


def test_cancel_takes_effect_within_an_update(engine: Engine) -> None:
    job = engine.submit(PROMPT, steps=500, sampler="ddim", width=64, height=64)
    updates = []

    def watch() -> None:
        for event in job.events():
            updates.append(event.update)
            if event.update == 2:
                job.cancel()

    with pytest.raises(Cancelled):
        watch()
    assert updates[-1] <= 4
    assert engine.generate(PROMPT, steps=1, width=64, height=64).images, "the engine goes on"


def test_job_can_be_awaited(engine: Engine, small: dict[str, int]) -> None:
    async def both() -> list:
        return await asyncio.gather(*(asyncio.ensure_future(wait(seed)) for seed in (1, 2)))

    async def wait(seed: int):
        return await engine.submit(PROMPT, seed=seed, output="latent", **small)

    assert [found.seeds for found in asyncio.run(both())] == [(1,), (2,)]


def test_many_threads_share_an_engine(engine: Engine, small: dict[str, int]) -> None:
    found: dict[int, torch.Tensor] = {}

    def work(seed: int) -> None:
        found[seed] = engine.generate(PROMPT, seed=seed, output="latent", **small).latents

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for seed, latents in found.items():
        assert relative(latents, engine.generate(PROMPT, seed=seed, output="latent", **small).latents) <= SOLO
    assert len(found) == 6


def test_closing_ends_what_is_queued(reference_pipeline: Callable[[str], Path]) -> None:
    engine = Engine.load(reference_pipeline("sd15"), device="cpu", max_rows=1)
    jobs = [engine.submit(PROMPT, steps=300, sampler="ddim", width=64, height=64) for _ in range(3)]
    engine.close()
    engine.close()
    for job in jobs:
        with pytest.raises(EngineClosed):
            job.result(5)
    with pytest.raises(EngineClosed):
        engine.generate(PROMPT)


@pytest.mark.slow
def test_a_program_that_forgets_to_close_ends_cleanly() -> None:
    program = (
        "from stepfuse import Engine\n"
        "engine = Engine.load('shapes', device='cpu')\n"
        "engine.submit('a red circle', steps=900, sampler='ddim')\n"
        "engine.generate('a red circle', steps=1)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_negative_prompt_without_guidance_is_reported(engine: Engine, small: dict[str, int]) -> None:
    found = engine.generate(PROMPT, negative_prompt="blurry", guidance_scale=1.0, **small)
    assert any("negative_prompt has no effect" in warning for warning in found.warnings)


def test_own_noise_is_used_and_checked(engine: Engine, small: dict[str, int]) -> None:
    seeded = engine.generate(PROMPT, seed=8, output="latent", **small)
    noise = torch.randn(tuple(seeded.latents.shape), generator=torch.Generator().manual_seed(8))
    own = engine.generate(PROMPT, seed=1, latents=noise, output="latent", **small)
    assert torch.equal(own.latents, seeded.latents)
    with pytest.raises(RequestError, match=r"latents: got shape \(1, 4, 9, 9\), expected"):
        engine.generate(PROMPT, latents=torch.zeros(1, 4, 9, 9), **small)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 65}, "width: got 65, expected a multiple of 8; the nearest is 64"),
        ({"sampler": "eular"}, "unknown sampler 'eular'.*did you mean 'euler'"),
        ({"schedule": "karas"}, "did you mean 'karras'"),
        ({"eta": 0.5, "sampler": "euler"}, "eta"),
        ({"clip_skip": 40}, "clip_skip: got 40, expected less than 5"),
        ({"prompt_2": "x"}, "prompt_2.*only one text encoder"),
        ({"class_labels": 1}, "class_labels"),
        ({"prompt_embeds": torch.zeros(1, 77, 32)}, "either prompt or prompt_embeds"),
    ],
)
def test_bad_requests_are_errors_before_anything_runs(engine: Engine, options: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        engine.generate(PROMPT, **options)


def test_own_sigmas_replace_the_schedule(engine: Engine) -> None:
    options = {"sampler": "euler", "seed": 1, "width": 64, "height": 64, "output": "latent"}
    karras = engine.generate(PROMPT, steps=3, schedule="karras", **options)
    table = settle(engine.components, karras.request).plan
    sigmas = (*(update.sigma for update in table.updates), 0.0)
    own = engine.generate(PROMPT, sigmas=sigmas, **options)
    assert own.settings["steps"] == 3
    assert relative(own.latents, karras.latents) <= 1e-2, "the same levels; timesteps are interpolated"
    assert relative(own.latents, engine.generate(PROMPT, sigmas=(5.0, 2.0, 1.0, 0.0), **options).latents) > 1e-2
    with pytest.raises(RequestError, match="steps: got 7, but sigmas has 4 levels"):
        engine.generate(PROMPT, sigmas=sigmas, steps=7, **options)


def test_no_prompt_is_an_error(engine: Engine) -> None:
    with pytest.raises(RequestError, match="give either prompt or prompt_embeds"):
        engine.generate()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"device": "cuda"}, DeviceError, "device: got 'cuda', but .*use device='cpu'"),
        ({"device": "mps"}, DeviceError, "'mps' is not supported"),
        ({"device": "toaster"}, DeviceError, "expected 'cpu', 'cuda' or 'cuda:N'"),
        ({"dtype": "float8"}, RequestError, "dtype: got 'float8'"),
        ({"kernels": "fast"}, RequestError, "no implementation 'fast'"),
        ({"max_row": 3}, RequestError, "unknown engine option 'max_row': did you mean 'max_rows'"),
        ({"max_rows": 0}, RequestError, "max_rows: got 0"),
    ],
)
def test_bad_engine_options_are_errors(options: dict, error: type[StepfuseError], message: str) -> None:
    if options.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(error, match=message):
        Engine.load("shapes", **options)


def test_unknown_source_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        Engine.load(str(tmp_path / "absent"))


def test_nan_weights_are_reported_by_name(reference_pipeline: Callable[[str], Path], tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "nan"
    shutil.copytree(reference_pipeline("sd15"), folder)
    (file,) = (folder / "unet").glob("*.safetensors")
    weights = load_file(file)
    weights["conv_in.weight"][0, 0, 0, 0] = float("nan")
    save_file(weights, file)
    with pytest.raises(NumericsError, match=r"unet: 1 tensors hold NaN or Inf .*conv_in\.weight"):
        Engine.load(folder, device="cpu")


def test_nan_in_the_latents_is_an_error_and_not_a_black_image(engine: Engine, small: dict[str, int]) -> None:
    bad = torch.full((1, 4, 8, 8), float("nan"))
    with pytest.raises(NumericsError, match=r"NaN or Inf in the latents \(float32\); try a lower guidance_scale"):
        engine.generate(PROMPT, seed=5, latents=bad, **small)
    assert engine.generate(PROMPT, **small).images


def test_one_bad_row_does_not_end_its_neighbours(engine: Engine, small: dict[str, int]) -> None:
    jobs = [
        engine.submit(PROMPT, seed=5, latents=torch.full((1, 4, 8, 8), float("nan")), **small),
        engine.submit(PROMPT, seed=6, output="latent", **small),
    ]
    with pytest.raises(NumericsError):
        jobs[0].result(60)
    alone = engine.generate(PROMPT, seed=6, output="latent", **small)
    assert relative(jobs[1].result(60).latents, alone.latents) <= SOLO


def test_safety_hook_sees_every_image_once(reference_pipeline: Callable[[str], Path]) -> None:
    seen = []

    def hook(images: np.ndarray, prompt: str) -> np.ndarray:
        seen.append((images.shape, prompt))
        return images * 0

    config = EngineConfig(device="cpu", safety=hook)
    with Engine.load(reference_pipeline("sd15"), config=config) as engine:
        found = engine.generate(PROMPT, n=2, steps=1, width=64, height=64, output="np")
        assert seen == [((2, 64, 64, 3), PROMPT)]
        assert not found.images.any()
        previews = [e.preview for e in engine.stream(PROMPT, steps=2, width=64, height=64, preview_every=1)]
    assert len(seen) > 2, "previews, too"
    assert not any(preview.any() for preview in previews if preview is not None)


def test_an_explicit_implementation_is_used_at_every_site(reference_pipeline: Callable[[str], Path]) -> None:
    calls = []

    def spy(x: torch.Tensor) -> torch.Tensor:
        calls.append(tuple(x.shape))
        return geglu.reference(x)

    geglu.implement("spy", lambda call: None if call.tensors["x"].shape[1] > 16 else "16 tokens or fewer")(spy)
    try:
        with Engine.load(reference_pipeline("sd15"), device="cpu", kernels={"geglu": "spy"}) as engine:
            assert "decided by the first request" in engine.explain()
            with pytest.raises(RequestError, match="spy cannot run this call: 16 tokens or fewer"):
                engine.generate(PROMPT, width=32, height=32, steps=1)
    finally:
        del geglu.implementations["spy"]
    assert not calls


def test_choosing_the_reference_by_name_changes_nothing(
    engine: Engine, small: dict[str, int], reference_pipeline: Callable[[str], Path]
) -> None:
    with Engine.load(reference_pipeline("sd15"), device="cpu", kernels="reference") as named:
        found = named.generate(PROMPT, seed=2, **small)
        assert "chosen by the user" in named.explain()
    assert torch.equal(found.latents, engine.generate(PROMPT, seed=2, **small).latents)


def test_tiled_decode_is_close_to_whole(reference_pipeline: Callable[[str], Path]) -> None:
    with Engine.load("shapes", device="cpu", vae_tiling=True) as tiled, Engine.load("shapes", device="cpu") as whole:
        side = 96 * whole.components.scale
        request = {"width": side, "height": 64, "steps": 1, "seed": 1, "output": "np"}
        a, b = (e.generate("a red circle", **request) for e in (tiled, whole))
    assert torch.equal(a.latents, b.latents)
    assert a.images.shape == b.images.shape
    assert 0 < np.abs(a.images - b.images).mean() < 0.1


def test_explain_names_the_implementation_of_every_op(engine: Engine) -> None:
    text = engine.explain()
    for op in ("attention", "group_norm_silu", "layer_norm", "geglu", "sampler_step"):
        assert op in text
    assert "reference" in text
