"""LoRAs and learned words of an engine: whole images with and without them, and the order of changes and requests."""

from __future__ import annotations

import dataclasses
import re
import runpy
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stepfuse import Engine
from stepfuse.engine.adapters import require_weights
from stepfuse.engine.errors import CheckpointError, EngineClosed, RequestError

SMALL = {"width": 32, "height": 32, "steps": 3, "seed": 1, "output": "latent"}
PROMPT = "a photo of a cat"
CROSS = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
LAYERS = {
    "unet": (f"{CROSS}.to_q", f"{CROSS}.to_k", "mid_block.resnets.0.conv1", "mid_block.resnets.0.time_emb_proj"),
    "text_encoder": ("text_model.encoder.layers.1.self_attn.q_proj", "text_model.encoder.layers.3.mlp.fc1"),
}
PREFIX = {"unet": "lora_unet_", "text_encoder": "lora_te_"}

Pipeline = Callable[[str], Path]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.001)


def weights(folder: Path, part: str) -> tuple[Path, dict[str, torch.Tensor]]:
    (file,) = (folder / part).glob("*.safetensors")
    return file, load_file(file)


def stored(tensors: dict[str, torch.Tensor], layer: str) -> str:
    """The key of a layer's weight, whatever this version of transformers calls it."""
    return next(key for key in (f"{layer}.weight", f"{layer.removeprefix('text_model.')}.weight") if key in tensors)


def style(folder: Path, path: Path, seed: int) -> tuple[Path, dict[tuple[str, str], torch.Tensor]]:
    """A LoRA file of rank 3 and alpha 6 for some layers of every kind, and what it adds to each, in float64."""
    generator, tensors, added = torch.Generator().manual_seed(seed), {}, {}
    for part, layers in LAYERS.items():
        _, found = weights(folder, part)
        for layer in layers:
            weight = found[stored(found, layer)]
            down = torch.randn(3, *weight.shape[1:], generator=generator) / 8
            up = torch.randn(weight.shape[0], 3, *[1] * (weight.dim() - 2), generator=generator) / 8
            stem = PREFIX[part] + layer.replace(".", "_")
            tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
            tensors[f"{stem}.alpha"] = torch.tensor(6.0)
            product = up.double().flatten(1) @ down.double().flatten(1)
            added[part, layer] = 2 * product.reshape(weight.shape)
    save_file(tensors, path)
    return path, added


@pytest.fixture(scope="module")
def folder(reference_pipeline: Pipeline) -> Path:
    return reference_pipeline("sd15")


@pytest.fixture(scope="module")
def files(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, dict]]:
    home = tmp_path_factory.mktemp("styles")
    return [style(folder, home / f"style{seed}.safetensors", seed) for seed in (0, 1)]


@pytest.fixture
def engine(folder: Path) -> Iterator[Engine]:
    with Engine.load(folder, device="cpu", max_rows=4) as made:
        yield made


def test_images_equal_those_of_the_merged_checkpoint_and_removing_restores_their_bits(
    engine: Engine, folder: Path, files: list, tmp_path: Path
) -> None:
    before = engine.generate(PROMPT, **SMALL).latents
    (first, one), (second, two) = files
    engine.set_loras([(first, 0.7), (second, -0.4)])
    found = engine.generate(PROMPT, **SMALL).latents
    assert relative(found, before) > 1e-2
    merged = tmp_path / "merged"
    shutil.copytree(folder, merged)
    for part, layers in LAYERS.items():
        file, tensors = weights(merged, part)
        for layer in layers:
            key = stored(tensors, layer)
            value = tensors[key].double() + 0.7 * one[part, layer] - 0.4 * two[part, layer]
            tensors[key] = value.float()
        save_file(tensors, file, {"format": "pt"})
    with Engine.load(merged, device="cpu") as truth:
        assert relative(found, truth.generate(PROMPT, **SMALL).latents) <= 1e-5
    engine.set_loras([first])
    assert relative(engine.generate(PROMPT, **SMALL).latents, found) > 1e-3
    engine.set_loras([])
    assert torch.equal(engine.generate(PROMPT, **SMALL).latents, before)


def test_requests_use_the_weights_of_when_they_were_submitted(engine: Engine, files: list) -> None:
    """Three changes in line; what runs finishes first, and what was submitted later waits."""
    styles = [[], [files[0][0]], [files[1][0]], []]
    expected = []
    for loras in styles:
        engine.set_loras(loras)
        expected.append([engine.generate(PROMPT, **SMALL | {"seed": seed}).latents for seed in (5, 6)])
    assert relative(expected[1][0], expected[0][0]) > 1e-2
    jobs, changes = [engine.submit(PROMPT, **SMALL | {"steps": 80, "seed": 9})], []
    jobs += [engine.submit(PROMPT, **SMALL | {"seed": seed}) for seed in (5, 6)]
    for number, loras in enumerate(styles[1:], 1):
        changes.append(threading.Thread(target=engine.set_loras, args=(loras,)))
        changes[-1].start()
        wait_for(lambda number=number: len(engine._worker.changes) == number)
        jobs += [engine.submit(PROMPT, **SMALL | {"seed": seed}) for seed in (5, 6)]
    assert not jobs[0].done, "the changes did not have to wait for anything"
    found = [job.result(60).latents for job in jobs]
    for change in changes:
        change.join(10)
        assert not change.is_alive()
    for number, pair in enumerate(expected):
        for latents, own in zip(found[1 + 2 * number : 3 + 2 * number], pair, strict=True):
            assert relative(latents, own) <= 1e-5
    assert torch.equal(engine.generate(PROMPT, **SMALL | {"seed": 5}).latents, expected[0][0])
    assert not len(engine._worker.changes)


def test_results_and_explain_say_what_was_active(engine: Engine, files: list) -> None:
    (first, _), (second, _) = files
    engine.set_loras([(first, 0.5), second])
    found, said = engine.generate(PROMPT, **SMALL), engine.explain()
    assert found.settings["loras"] == [[first.stem, 0.5], [second.stem, 1.0]]
    assert f"loras [['{first.stem}', 0.5], ['{second.stem}', 1.0]]" in said
    engine.set_loras([])
    assert "loras" not in engine.generate(PROMPT, **SMALL).settings
    assert "loras" not in engine.explain()


def test_a_change_is_of_one_model(engine: Engine, folder: Path, files: list) -> None:
    engine.add("second", folder)
    before = engine.generate(PROMPT, **SMALL).latents
    engine.set_loras([files[0][0]], model="second")
    assert torch.equal(engine.generate(PROMPT, **SMALL).latents, before)
    assert relative(engine.generate(PROMPT, model="second", **SMALL).latents, before) > 1e-2
    with pytest.raises(RequestError, match="model: got 'third'"):
        engine.set_loras([], model="third")


def test_closing_ends_changes_and_what_waits_for_them(folder: Path, files: list) -> None:
    errors: list[BaseException] = []

    def change() -> None:
        try:
            engine.set_loras([files[0][0]])
        except EngineClosed as error:
            errors.append(error)

    with Engine.load(folder, device="cpu") as engine:
        running = engine.submit(PROMPT, **SMALL | {"steps": 900, "sampler": "ddim"})
        thread = threading.Thread(target=change)
        thread.start()
        wait_for(lambda: len(engine._worker.changes) == 1)
        waiting = engine.submit(PROMPT, **SMALL)
        cancelled = engine.submit(PROMPT, **SMALL)
        cancelled.cancel()
    thread.join(10)
    assert len(errors) == 1
    for job in (running, waiting):
        with pytest.raises(EngineClosed):
            job.result(1)
    assert cancelled.done
    with pytest.raises(EngineClosed):
        engine.set_loras([])


def test_what_does_not_fit_is_an_error_and_changes_nothing(engine: Engine, files: list, tmp_path: Path) -> None:
    before = engine.generate(PROMPT, **SMALL).latents
    strange = load_file(files[0][0]) | {"lora_unet_absent.lora_down.weight": torch.zeros(1, 4)}
    strange["lora_unet_absent.lora_up.weight"] = torch.zeros(4, 1)
    save_file(strange, tmp_path / "partial.safetensors")
    with pytest.raises(CheckpointError, match=r"2 of 20 keys fit no layer: lora_unet_absent.lora_down"):
        engine.set_loras([tmp_path / "partial.safetensors"])
    for given in ("style.safetensors", [("a", "b")], [(1, 1.0)], [("a", True)]):
        with pytest.raises(RequestError, match=r"loras: got .* expected a list of paths or of \(path, strength\)"):
            engine.set_loras(given)
    with pytest.raises(CheckpointError, match="no such file"):
        engine.set_loras(["absent.safetensors"])
    with pytest.raises(CheckpointError, match="no such file"):
        engine.set_embeddings(["absent.safetensors"])
    assert torch.equal(engine.generate(PROMPT, **SMALL).latents, before)


def test_exported_networks_take_no_adapters(engine: Engine) -> None:
    parts = engine.components
    text = dataclasses.replace(parts.text[0], model=torch.nn.Identity())
    for changed in ({"denoiser": torch.nn.Identity()}, {"text": (text,)}):
        with pytest.raises(RequestError, match=r"weights of exported networks are fixed; load .* runtime='torch'"):
            require_weights(dataclasses.replace(parts, **changed))


def test_a_callback_cannot_wait_for_its_own_engine(folder: Path) -> None:
    def safety(images: object, prompt: str) -> object:
        engine.set_loras([])
        return images

    with (
        Engine.load(folder, device="cpu", safety=safety) as engine,
        pytest.raises(RequestError, match="cannot be changed from a callback"),
    ):
        engine.generate(PROMPT, **SMALL | {"output": "np"})


def test_the_examples_of_the_docs_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[1] / "docs" / "adapters.md").read_text(encoding="utf-8")
    blocks = [code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "import" in code]
    assert len(blocks) == 2, "those that stand alone"
    style = {f"lora_unet_{CROSS.replace('.', '_')}_to_k.{half}.weight" for half in ("lora_down", "lora_up")}
    with Engine.load("shapes", device="cpu") as engine:
        width, inner = engine.components.denoiser.get_submodule(CROSS).to_k.weight.shape
    tensors = {key: torch.ones(1, inner) if "lora_down" in key else torch.ones(width, 1) / 100 for key in style}
    for name in ("style", "other"):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    save_file({"emb_params": torch.ones(2, 128) / 50}, tmp_path / "toy.safetensors")
    monkeypatch.chdir(tmp_path)
    for code in blocks:
        (tmp_path / "block.py").write_text(code, encoding="utf-8")
        runpy.run_path("block.py")
    assert (tmp_path / "styled.png").stat().st_size > 100


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_a_learned_word_with_the_vector_of_another_draws_what_that_draws(
    reference_pipeline: Pipeline, tmp_path: Path, name: str
) -> None:
    with Engine.load(reference_pipeline(name), device="cpu") as engine:
        vectors = []
        for encoder in engine.components.text:
            (token,) = encoder.tokenizer("cat", add_special_tokens=False).input_ids
            vectors.append(encoder.model.get_input_embeddings().weight[token : token + 1].clone())
        keys = ("emb_params",) if len(vectors) == 1 else ("clip_l", "clip_g")
        save_file(dict(zip(keys, vectors, strict=True)), tmp_path / "my-toy.safetensors")
        cat, unknown = (engine.generate(f"a photo of {word}", **SMALL).latents for word in ("cat", "<toy>"))
        engine.set_embeddings([(tmp_path / "my-toy.safetensors", "<toy>")])
        assert torch.equal(engine.generate("a photo of <toy>", **SMALL).latents, cat)
        assert relative(engine.generate("a photo of (<toy>:1.5)", **SMALL).latents, cat) > 1e-4
        engine.set_embeddings([tmp_path / "my-toy.safetensors"])
        assert torch.equal(engine.generate("a photo of my-toy", **SMALL).latents, cat)
        engine.set_embeddings([])
        assert torch.equal(engine.generate("a photo of <toy>", **SMALL).latents, unknown)
        assert relative(unknown, cat) > 1e-3
