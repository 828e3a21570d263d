"""The built-in LoRAs and learned words: what they change, that diffusers reads them alike, and how they were made."""

import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from stepfuse import Engine, Request
from stepfuse.engine.errors import CheckpointError
from stepfuse.engine.families import BUILTIN_EMBEDDINGS, BUILTIN_LORAS, builtin_file, builtin_folder
from stepfuse.examples.gallery.subjects import any_scene
from stepfuse.examples.shapes import lora, words
from stepfuse.examples.shapes.judge import judge, look, templates
from stepfuse.examples.shapes.latents import CHANNELS, encode_scenes
from stepfuse.examples.shapes.progress import Progress, load_checkpoint
from stepfuse.examples.shapes.render import render
from stepfuse.examples.shapes.scenes import Scene, caption, pair, sample_pair, single
from stepfuse.examples.shapes.styles import STYLES, TURN, dome, turn_of, turned
from stepfuse.examples.shapes.tokenizer import build_tokenizer
from stepfuse.examples.shapes.tuning import Tuner

PARITY = 1e-4  # relative L2 of the final latents


def pairs(count: int) -> list[Scene]:
    """A red circle beside something of another color, in every relation."""
    relations = ("left of", "right of", "above", "below")
    others = (("blue", "square"), ("green", "triangle"), ("yellow", "square"))
    return [
        pair(random.Random(i), ("red", "circle", relations[i % 4], *others[i % 3]), ("white", "black", "pink")[i % 3])
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.load("shapes", device="cpu") as made:
        yield made


def painted(engine: Engine, scenes: list[Scene]) -> list[np.ndarray]:
    requests = [Request(prompt=caption(scene), seed=seed, output="np") for seed, scene in enumerate(scenes)]
    return [result.images[0] for result in engine.generate(requests)]


def test_the_loras_do_what_they_say_alone_and_together(engine: Engine) -> None:
    scenes = pairs(6)
    plain = painted(engine, scenes)
    engine.set_loras(["shapes-dome"])
    cut = painted(engine, scenes)
    engine.set_loras([("shapes-turn", 1.0)])
    moved = painted(engine, scenes)
    engine.set_loras(["shapes-dome", "shapes-turn"])
    both = painted(engine, scenes)
    engine.set_loras([])
    assert all(np.array_equal(a, b) for a, b in zip(plain, painted(engine, scenes), strict=True))
    whole = {name: [judge(i, s).right for i, s in zip(images, scenes, strict=True)]
             for name, images in (("plain", plain), ("moved", moved))}  # fmt: skip
    half = {name: [judge(i, s, dome).right for i, s in zip(images, scenes, strict=True)]
            for name, images in (("plain", plain), ("cut", cut), ("both", both))}  # fmt: skip
    assert min(sum(whole["plain"]), sum(whole["moved"]), sum(half["cut"])) >= 5
    assert sum(half["plain"]) == 0
    assert sum(half["both"]) >= 4
    angles = {name: np.array([turn_of(i, s, dome) or 0.0 for i, s in zip(images, scenes, strict=True)])
              for name, images in (("plain", plain), ("cut", cut), ("moved", moved), ("both", both))}  # fmt: skip
    assert np.abs(angles["plain"]).max() < 8
    assert np.abs(angles["cut"]).max() < 10
    assert np.abs(angles["moved"] - TURN).max() < 10
    assert abs(angles["both"].mean() - TURN) < 10


def test_the_words_are_understood_in_company(engine: Engine) -> None:
    sun = pair(random.Random(1), ("yellow", "circle", "above", "blue", "square"), "white")
    prompt = caption(sun).replace("yellow circle", "sun")
    asked = [Request(prompt=prompt, seed=seed, output="np") for seed in range(4)]
    before = [judge(result.images[0], sun).right for result in engine.generate(asked)]
    engine.set_embeddings(["shapes-sun", "shapes-big"])
    after = [judge(result.images[0], sun).right for result in engine.generate(asked)]
    sizes = [Request(prompt=f"a {size} red circle", seed=3, output="np") for size in ("small", "big", "large")]
    radii = [look(result.images[0])[1][0].width / 2 for result in engine.generate(sizes)]
    engine.set_embeddings([])
    assert sum(before) <= 1
    assert sum(after) >= 3
    assert radii[0] < 10 < 15 < radii[1] < 20 < radii[2]


def test_final_latents_equal_those_of_diffusers_with_the_same_files(engine: Engine) -> None:
    prompt = "a red circle above a sun"
    engine.set_loras([("shapes-dome", 0.75)])
    engine.set_embeddings(["shapes-sun"])
    ours = engine.generate(Request(prompt=prompt, seed=5, output="latent")).latents
    engine.set_loras([])
    engine.set_embeddings([])
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(builtin_folder("shapes"), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(str(builtin_file("shapes-dome")), adapter_name="dome")
    pipe.set_adapters(["dome"], [0.75])
    pipe.load_textual_inversion(str(builtin_file("shapes-sun")))
    theirs = pipe(
        prompt,
        latents=torch.randn((1, CHANNELS, 8, 8), generator=torch.Generator().manual_seed(5)),
        num_inference_steps=20,
        guidance_scale=3.0,
        output_type="latent",
    ).images
    assert float((ours - theirs).norm() / theirs.norm()) < PARITY


def test_names_stand_for_small_files_and_everything_else_for_itself(tmp_path: Path) -> None:
    for name in BUILTIN_LORAS:
        factors = load_file(builtin_file(name))
        assert Path(builtin_file(name)).stat().st_size <= lora.FILE_LIMIT
        assert all(torch.isfinite(t).all() and t.dtype == torch.float16 for t in factors.values())
        assert (
            factors.keys()
            == lora.open_unet(diffusers.UNet2DConditionModel.from_pretrained(lora.SHAPES / "unet")).keys()
        )
    assert {word for name in BUILTIN_EMBEDDINGS for word in load_file(builtin_file(name))} == {"sun", "big"}
    assert set(BUILTIN_LORAS) == set(STYLES)
    assert set(BUILTIN_EMBEDDINGS) == set(words.WORDS)
    assert builtin_file(tmp_path / "shapes-dome") == tmp_path / "shapes-dome"
    with Engine.load("shapes", device="cpu") as engine, pytest.raises(CheckpointError, match="no such file"):
        engine.set_loras(["shapes-dom"])
    with Engine.load("shapes-x4", device="cpu") as other, pytest.raises(CheckpointError, match="shapes-dome"):
        other.set_loras(["shapes-dome"])


def test_truths_of_the_styles_are_judged_by_their_own_form_alone() -> None:
    scenes = [any_scene(seed) for seed in range(60)]
    for form, expected in ((dome, 60), (None, sum(all(i.shape != "circle" for i in s.items) for s in scenes))):
        images = render(scenes, dome).transpose(0, 2, 3, 1)
        found = [judge(i, s, *([form] if form else [])).right for i, s in zip(images, scenes, strict=True)]
        assert sum(found) == expected
    upper, whole = templates(24, dome)["circle"], templates(24)["circle"]
    assert upper[-1].mean() > 0.9, "a half circle is widest at its floor"
    assert whole[-1].mean() < 0.5
    rng = random.Random(0)
    pictures = [(turned(scene), scene) for scene in (sample_pair(rng) for _ in range(60))]
    angles = [turn_of(render([t])[0].transpose(1, 2, 0), s) for t, s in pictures]
    assert angles.count(None) < 20, "pairs of one color only"
    assert np.mean([a for a in angles if a is not None]) == pytest.approx(TURN, abs=1.5)
    alone = single(rng, "red", "circle", "white")
    assert turn_of(render([alone])[0].transpose(1, 2, 0), alone) is None


def falling(tuner: Tuner, sample, steps: int = 16) -> list[float]:
    """The losses of one batch, noise and timesteps, trained on again and again."""
    batch, progress, losses = sample(random.Random(0)), Progress("test", steps=1000), []
    progress.step = 50  # warmed up
    for _ in range(steps):
        torch.manual_seed(1)
        loss = tuner.loss(*batch, 1.0)
        losses.append(loss.item())
        tuner.optimizer.step(loss, progress)
    return losses


def test_a_lora_begins_as_no_change_and_learns(tmp_path: Path) -> None:
    speaker = lora.Words(build_tokenizer(tmp_path))
    tuner = Tuner(lora.open_unet, 4e-3, "cpu")
    plain = diffusers.UNet2DConditionModel.from_pretrained(lora.SHAPES / "unet", dtype=torch.float32).eval()
    inputs = torch.randn(2, CHANNELS, 8, 8), torch.tensor([900, 20]), torch.randn(2, 24, 128)
    with torch.no_grad():
        assert torch.allclose(tuner.unet(*inputs).sample, plain(*inputs).sample, atol=1e-5)
    losses = falling(tuner, lora.sampler("shapes-turn", speaker, 8))
    assert losses[-1] < 0.8 * losses[0], losses
    frozen = {name: p for name, p in tuner.unet.named_parameters() if "lora" not in name}
    assert len(frozen) > 100
    assert not any(p.requires_grad for p in frozen.values())
    drawn, _ = lora.sampler("shapes-turn", speaker, 4)(random.Random(7))
    scenes_rng = random.Random(7)
    scenes = [sample_pair(scenes_rng, lora.load_heldout()) if scenes_rng.random() < lora.PAIRS
              else lora.sample_single(scenes_rng) for _ in range(4)]  # fmt: skip
    assert torch.equal(drawn, torch.from_numpy(encode_scenes([turned(s) for s in scenes])))


def test_a_word_learns_and_its_captions_hold_it(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(tmp_path)
    for taught in words.WORDS.values():
        shown = [taught.show(random.Random(seed)) for seed in range(50)]
        assert all(taught.word in text.split() for _, text in shown)
        hidden = "yellow circle" if taught.word == "sun" else "large"
        assert not any(hidden in text for _, text in shown)
    index = tokenizer.convert_tokens_to_ids("circle</w>")
    tuner = Tuner(partial(words.open_table, word="sun", like=index), 2e-2, "cpu")
    speaker = words.Words(tokenizer)
    speaker.add("sun", len(tokenizer))

    def sample(rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
        scenes, captions = zip(*(words.show_sun(rng) for _ in range(8)), strict=True)
        return torch.from_numpy(encode_scenes(scenes)), speaker(list(captions))

    losses = falling(tuner, sample)
    assert losses[-1] < 0.9 * losses[0], losses
    assert list(tuner.optimizer.trained) == ["sun"]


def test_runs_go_on_and_files_are_what_was_trained(tmp_path: Path) -> None:
    how = {"minutes": 0.0, "batch": 4, "lr": 1e-3, "device": "cpu"}
    for module, name in ((lora, "shapes-dome"), (words, "shapes-big")):
        first = module.train(name, tmp_path, steps=1, **how)
        again = module.train(name, tmp_path, steps=1, **how)
        assert all(torch.equal(first[key], again[key]) for key in first), "nothing is left to do"
        further = module.train(name, tmp_path, steps=2, **how)
        assert any(not torch.equal(first[key], further[key]) for key in first)
        state = load_checkpoint(tmp_path / f"{name}.pt")
        assert state is not None
        assert all(torch.equal(mean, further[key]) for key, mean in state["average"].items())
        assert any(not torch.equal(last, further[key]) for key, last in state["trained"].items())
        module.package(further, tmp_path / f"{name}.safetensors")
        packed = load_file(tmp_path / f"{name}.safetensors")
        assert packed.keys() == load_file(builtin_file(name)).keys()
        assert all(torch.equal(packed[key], further[key].to(packed[key].dtype)) for key in packed)
    with pytest.raises(RuntimeError, match="smaller rank"):
        lora.package({"unet.x.lora_A.weight": torch.zeros(lora.FILE_LIMIT)}, tmp_path / "large.safetensors")
