"""Requests that the graphs of an artefact cannot run are refused by submit, before they wait for their turn."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stepfuse import Engine
from stepfuse.engine import admission
from stepfuse.engine.admission import weight_bytes
from stepfuse.engine.artifact import Manifest
from stepfuse.engine.errors import RequestError
from stepfuse.engine.runtimes.exported import VAE, Denoiser

PICTURE = np.random.default_rng(0).random((64, 64, 3), dtype=np.float32)
LONG = "a red circle BREAK a blue square"
SMALL: dict[str, Any] = {"steps": 2, "seed": 1, "width": 64, "height": 64}


@pytest.fixture(scope="module")
def engine(exported_shapes: Path) -> Iterator[Engine]:
    with Engine.load(exported_shapes, runtime="onnxruntime", device="cpu") as made:
        yield made


@pytest.fixture
def profiled(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """As a runtime that runs the sizes of profiles only: 64x64 and 96x64, prompts of 24 tokens."""
    net, vae = engine.components.denoiser, engine.components.vae
    assert isinstance(net, Denoiser)
    assert isinstance(vae, VAE)
    for session in (net.session, vae.decoder):
        monkeypatch.setattr(session, "only_profiles", True, raising=False)
    return engine


def test_pictures_need_the_graph_of_the_encoder(exported_shapes: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported_shapes, tmp_path / "copy"))
    manifest = Manifest.load(folder)
    kept = {name: graph for name, graph in manifest.graphs.items() if name != "vae_encoder"}
    replace(manifest, graphs=kept).save(folder)
    with Engine.load(folder, runtime="onnxruntime", device="cpu") as engine:
        for fields in ({"strength": 0.5}, {"mask": np.ones((64, 64), np.float32)}):
            with pytest.raises(RequestError, match=r"image: this artefact has no vae_encoder, .* --components"):
                engine.submit("a red circle", image=PICTURE, **fields)
        assert not len(engine._worker.scheduler)
        assert engine.generate("a red circle", **SMALL).images


def test_weights_of_an_artefact_are_counted_by_its_files(engine: Engine) -> None:
    """A model beside others takes what theirs leaves: graphs keep their weights to themselves."""
    with Engine.load("shapes", device="cpu") as own:
        expected = weight_bytes(own.components)
    assert expected <= weight_bytes(engine.components) <= 1.1 * expected


def test_pictures_through_an_exported_encoder(engine: Engine) -> None:
    with Engine.load("shapes", device="cpu") as own:
        options: dict[str, Any] = {"image": PICTURE, "strength": 0.5, "steps": 4, "seed": 1, "output": "latent"}
        found, expected = (each.generate("a red circle", **options).latents for each in (engine, own))
    assert float((found - expected).norm() / expected.norm()) <= 1e-4


def test_prompts_of_several_lengths(engine: Engine) -> None:
    for fields in ({"prompt": LONG}, {"prompt": "a red circle", "negative_prompt": LONG}):
        with pytest.raises(RequestError, match=r"prompt: got (48 and 24|24 and 48) tokens .* runtime='torch'"):
            engine.submit(**fields, **SMALL)
    assert not len(engine._worker.scheduler)
    assert engine.generate(LONG, guidance_scale=1.0, **SMALL).images, "one branch has one length"
    assert engine.generate(LONG, negative_prompt="green BREAK black", **SMALL).images


def test_lengths_that_no_profile_has(profiled: Engine) -> None:
    with pytest.raises(RequestError, match="prompt: got 48 tokens, this network was exported for 24"):
        profiled.submit(LONG, negative_prompt="green BREAK black", **SMALL)
    with pytest.raises(RequestError, match="prompt: got 30 tokens"):
        profiled.submit(prompt_embeds=torch.zeros(1, 30, 128), guidance_scale=1.0, **SMALL)
    assert profiled.generate("a red circle", **SMALL).images


def test_tiles_that_no_profile_has(profiled: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The denoiser has a graph for the whole, and the autoencoder none for the tiles it would be decoded in."""
    config = replace(profiled.components.config, vae_tiling=True)
    monkeypatch.setattr(admission, "TILE", 6)
    with Engine(replace(profiled.components, config=config)) as tiled:
        message = r"the vae_decoder would run 48x48 \(tiles\), .* made for 64x64, 96x64: .* with vae_tiling=False"
        with pytest.raises(RequestError, match=message):
            tiled.submit("a red circle", **SMALL)
        with pytest.raises(RequestError, match="the vae_encoder would run 48x48"):
            tiled.submit("a red circle", image=PICTURE, output="latent")
        assert tiled.generate("a red circle", output="latent", **SMALL).images is None, "nothing is decoded"
