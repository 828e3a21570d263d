"""Prompts of requests, up to the image: weights, any length, two encoders, and what is refused before it is queued."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from stepfuse import Engine, EngineConfig, Request
from stepfuse.engine import pipeline
from stepfuse.engine.components import Components
from stepfuse.engine.errors import RequestError
from stepfuse.engine.loading import load_components
from stepfuse.engine.prompting import token_counts
from stepfuse.engine.request import build_request
from stepfuse.engine.settling import settle

SOLO = 1e-4  # relative L2 of latents, batch against solo
LONG = "a photo of a cat, " * 20 + "of a photo"
SMALL = {"width": 32, "height": 32, "steps": 3, "seed": 1, "output": "latent"}

Pipeline = Callable[[str], Path]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def engines(reference_pipeline: Pipeline) -> Iterator[Callable[[str], Engine]]:
    made: dict[str, Engine] = {}

    def get(name: str) -> Engine:
        if name not in made:
            made[name] = Engine.load(reference_pipeline(name), device="cpu", max_rows=4)
        return made[name]

    yield get
    for engine in made.values():
        engine.close()


@pytest.fixture(scope="module")
def engine(engines: Callable[[str], Engine]) -> Engine:
    return engines("sd15")


def test_weights_change_the_image_and_a_weight_of_one_keeps_its_bits(engine: Engine) -> None:
    plain = engine.generate("a photo of a cat", **SMALL).latents
    assert torch.equal(engine.generate("a photo of (a:1) cat", **SMALL).latents, plain)
    for weighted in ("a photo of a (cat:1.3)", "a photo of a [cat]"):
        assert relative(engine.generate(weighted, **SMALL).latents, plain) > 1e-3
    negative = engine.generate("a photo", negative_prompt="a cat", **SMALL).latents
    assert relative(engine.generate("a photo", negative_prompt="a (cat:1.3)", **SMALL).latents, negative) > 1e-4


def test_the_end_of_a_long_prompt_counts(engine: Engine) -> None:
    found = engine.generate(LONG, **SMALL)
    assert not found.warnings
    assert relative(engine.generate(LONG + " blurry", **SMALL).latents, found.latents) > 1e-3


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_guided_rows_of_several_lengths_are_the_sum_of_their_branches(engines, name: str) -> None:
    """After one step of euler the latents are linear in the network's output: g * prompted + (1 - g) * negative."""
    one = SMALL | {"steps": 1, "sampler": "euler"}
    engine, scale = engines(name), 4.0
    for prompt, negative in ((LONG, "blurry"), ("a cat", LONG)):
        guided = engine.generate(prompt, negative_prompt=negative, guidance_scale=scale, **one).latents
        alone = [engine.generate(text, guidance_scale=1.0, **one).latents for text in (prompt, negative)]
        assert relative(guided, scale * alone[0] + (1 - scale) * alone[1]) <= 1e-5


def test_long_prompts_equal_diffusers_with_the_same_embeddings(engine: Engine, reference_pipeline: Pipeline) -> None:
    import diffusers

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(reference_pipeline("sd15"), torch_dtype=torch.float32)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)

    def embed(*chunks: str) -> torch.Tensor:
        return torch.cat([pipe.encode_prompt(chunk, "cpu", 1, False)[0] for chunk in chunks], 1)

    found = engine.generate("a " * 75 + "cat", negative_prompt="x BREAK y", sampler="ddim", **SMALL)
    theirs = pipe(
        prompt_embeds=embed("a " * 75, "cat"), negative_prompt_embeds=embed("x", "y"), num_inference_steps=3,
        width=32, height=32, generator=torch.Generator().manual_seed(1), output_type="latent",
    ).images  # fmt: skip
    assert relative(found.latents, theirs) <= 1e-4


def test_unlike_prompts_in_one_batch_equal_their_solo_runs(engine: Engine) -> None:
    requests = [
        Request(prompt=LONG, n=2, **SMALL),
        Request(prompt="a cat", **SMALL),
        Request(prompt="a photo", negative_prompt=LONG, **SMALL | {"steps": 5}),
        Request(prompt="x BREAK (y:1.2)", negative_prompt="a BREAK cat", **SMALL),
        Request(prompt=LONG, guidance_scale=1.0, **SMALL | {"steps": 2}),
        Request(prompt="a BREAK photo", n=2, **SMALL | {"sampler": "euler_a"}),
    ]
    for request, found in zip(requests, engine.generate(requests), strict=True):
        assert relative(found.latents, engine.generate(request).latents) <= SOLO


def test_two_encoders_with_unlike_numbers_of_chunks(engines) -> None:
    """The shorter one gets empty chunks, as if they had been written; a negative prompt of None stays zero."""
    engine = engines("sdxl")
    found = engine.generate("a cat", prompt_2="a photo BREAK of a cat", **SMALL)
    written = engine.generate("a cat BREAK  BREAK", prompt_2="a photo BREAK of a cat", **SMALL)
    assert torch.equal(found.latents, written.latents)
    assert relative(engine.generate("a cat", prompt_2="a photo", **SMALL).latents, found.latents) > 1e-3


def test_deterministic_bits_do_not_depend_on_the_length_of_neighbours(reference_pipeline: Pipeline) -> None:
    with Engine.load(reference_pipeline("sd15"), device="cpu", max_rows=2, deterministic=2) as engine:
        alone = engine.generate(LONG, **SMALL).latents
        together = engine.generate([Request(prompt=LONG, **SMALL), Request(prompt=LONG + " of", **SMALL)])
        assert torch.equal(together[0].latents, alone)


@pytest.fixture(scope="module")
def parts(reference_pipeline: Pipeline) -> Callable[[str], Components]:
    return lambda name: load_components(reference_pipeline(name), EngineConfig(device="cpu"))


@pytest.mark.parametrize(
    ("name", "fields", "expected"),
    [
        ("sd15", {"prompt": "a cat"}, 77),
        ("sd15", {"prompt": LONG}, 154),
        ("sd15", {"prompt": "a cat", "negative_prompt": "a BREAK b BREAK c"}, 231),
        ("sd15", {"prompt": "a cat", "negative_prompt": "a BREAK b", "guidance_scale": 1.0}, 77),
        ("sd15", {"prompt_embeds": torch.zeros(1, 90, 32)}, 90),
        ("sdxl", {"prompt": "a cat", "prompt_2": "a BREAK b"}, 154),
    ],
)
def test_tokens_that_are_counted_are_tokens_that_are_encoded(parts, name: str, fields: dict, expected: int) -> None:
    own = parts(name)
    settled = settle(own, build_request(None, fields | {"n": 2, "width": 32, "height": 32}))
    with torch.inference_mode():
        ((conditioning, _),) = pipeline.encode(own, [settled])
    assert max(token_counts(own, settled)) == conditioning.hidden.shape[1] == expected
    assert len(conditioning.hidden) == 2 * settled.branches
    if conditioning.kv_len is not None:
        assert conditioning.kv_len.shape == (2 * settled.branches,)
        assert conditioning.kv_len.max() == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "a (cat:1.2.3)"}, "got the weight '1.2.3', expected a number"),
        ({"prompt": "a cat", "negative_prompt": "(a:" + "9" * 400 + ")"}, "use smaller weights"),
        ({"prompt": "a cat", "clip_skip": 5}, "clip_skip: got 5, expected less than 5"),
        ({"prompt_embeds": torch.zeros(1, 77, 31)}, r"prompt_embeds: got shape \(1, 77, 31\), expected \[1, L, 32\]"),
        ({"prompt_embeds": torch.zeros(1, 0, 32)}, r"prompt_embeds: got shape \(1, 0, 32\)"),
        ({"prompt": "a", "negative_prompt_embeds": torch.zeros(3, 5, 32), "n": 2}, r"expected \[1 or 2, L, 32\]"),
        ({"prompt_embeds": [1.0]}, "prompt_embeds: got list, expected a tensor"),
        ({"prompt_embeds": torch.zeros(1, 77, 32), "clip_skip": 1}, "clip_skip: .*leave it out"),
        ({"prompt": "a", "pooled_prompt_embeds": torch.zeros(1, 32)}, "pooled_prompt_embeds: .*leave them out"),
        (
            {"prompt": "a", "negative_prompt": "b", "negative_prompt_embeds": torch.zeros(1, 5, 32)},
            "negative_prompt: got negative_prompt_embeds, too",
        ),
        ({"prompt": "a", "latents": [0.0]}, "latents: got list, expected a tensor"),
    ],
)
def test_what_cannot_be_encoded_is_refused_before_it_is_queued(engine: Engine, fields: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        engine.submit(**fields)
    assert not engine._worker.inbox


@pytest.mark.parametrize(
    ("pooled", "message"),
    [
        (None, "pooled_prompt_embeds: this family needs them beside prompt_embeds"),
        (torch.zeros(1, 31), r"pooled_prompt_embeds: got shape \(1, 31\), expected \[1 or 2, 32\]"),
        (torch.zeros(3, 32), r"pooled_prompt_embeds: got shape \(3, 32\), expected \[1 or 2, 32\]"),
    ],
)
def test_pooled_embeddings_must_fit_the_model_and_the_number_of_images(engines, pooled: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        engines("sdxl").submit(prompt_embeds=torch.zeros(1, 77, 64), pooled_prompt_embeds=pooled, n=2, **SMALL)


def test_embeddings_of_another_length_than_the_negative_ones_are_fine(engine: Engine) -> None:
    encoded = settle(engine.components, Request(prompt=LONG, guidance_scale=1.0, **SMALL))
    with torch.inference_mode():
        ((conditioning, _),) = pipeline.encode(engine.components, [encoded])
    hidden = conditioning.hidden.clone()
    found = engine.generate(prompt_embeds=hidden, negative_prompt="a cat", **SMALL)
    assert relative(found.latents, engine.generate(LONG, negative_prompt="a cat", **SMALL).latents) <= SOLO


def test_a_lora_tag_in_the_prompt_is_reported(engine: Engine) -> None:
    (warning,) = engine.generate("a cat <lora:style:0.8>", **SMALL).warnings
    assert warning.startswith("<lora:style:0.8> in the prompt is read as text")
