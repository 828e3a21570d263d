"""Training of the built-in model: tokens, the latent code, and that a resumed run is the uninterrupted one."""

import random
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("diffusers")

from stepfuse.examples.shapes import denoiser
from stepfuse.examples.shapes.averaging import Averaged, run
from stepfuse.examples.shapes.latents import encode_scene
from stepfuse.examples.shapes.scenes import WORDS, caption, pair, sample_pair, sample_single, single
from stepfuse.examples.shapes.text_encoder import Words, labels_of
from stepfuse.examples.shapes.tokenizer import LENGTH, build_tokenizer


def test_every_word_is_one_token_and_captions_fit(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(tmp_path)
    assert all(len(tokenizer.tokenize(word)) == 1 for word in WORDS)
    rng = random.Random(0)
    captions = [caption(sample_pair(rng), rng) for _ in range(300)]
    captions += [caption(sample_single(rng), rng) for _ in range(300)]
    captions += ["", "a red circle above a blue square"]
    expected = tokenizer(captions, padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
    assert expected.shape == (602, LENGTH)
    assert torch.equal(Words(tokenizer)(captions), expected)


def test_latent_code_of_a_known_scene() -> None:
    scene = single(random.Random(0), "red", "square", "white", size="large")
    latents = encode_scene(scene)
    background = (np.array([248, 248, 248]) / 255 - 0.5) / 0.35
    red = (np.array([220, 40, 40]) / 255 - 0.5) / 0.35
    assert np.allclose(latents[:3, 0, 0], background, atol=1e-6)
    assert np.allclose(latents[:3, 4, 4], red, atol=1e-6)
    assert latents[3, 4, 4] == pytest.approx(1.5 / 0.65, abs=0.02)  # deep inside: tanh is 1
    assert latents[3, 0, 0] == pytest.approx(-0.5 / 0.65, abs=0.1)  # far outside: tanh is -1


def test_labels_name_what_stands_where() -> None:
    scene = pair(random.Random(0), ("red", "circle", "below", "pink", "square"), "black")
    # places: center, left, right, top, bottom; colors and shapes count from 1
    assert labels_of([scene]).tolist() == [[0, 0, 0, 8, 1, 0, 0, 0, 2, 1, 0, 0, 0, 2, 2, 2]]


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(denoiser.CONFIG, "block_out_channels", (32, 32))
    monkeypatch.setitem(denoiser.CONFIG, "attention_head_dim", (2, 2))
    options = {"minutes": 1.0, "batch": 4, "lr": 1e-3, "device": "cpu", "text_steps": 1}
    denoiser.train(tmp_path / "whole", steps=4, **options)
    with monkeypatch.context() as patch:
        step = Averaged.step

        def step_twice(self: Averaged, loss: torch.Tensor, progress: denoiser.Progress) -> None:
            if progress.step == 2:
                raise KeyboardInterrupt
            step(self, loss, progress)

        patch.setattr(Averaged, "step", step_twice)
        patch.setattr(denoiser, "run", partial(run, every=0.0))
        with pytest.raises(KeyboardInterrupt):
            denoiser.train(tmp_path / "halves", steps=4, **options)
    denoiser.train(tmp_path / "halves", steps=4, **options)
    whole, halves = (torch.load(tmp_path / name / "denoiser.pt", weights_only=True) for name in ("whole", "halves"))
    assert halves["progress"]["step"] == whole["progress"]["step"] == 4
    assert all(torch.equal(mean, halves["average"][name]) for name, mean in whole["average"].items())
    assert any(not torch.equal(mean, whole["trained"][name]) for name, mean in whole["average"].items())
    exported = load_file(tmp_path / "whole/unet/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(weight, whole["average"][name]) for name, weight in exported.items())
