"""Folders of every layout, opened without torch: what is there, which files are read, what is wrong with them."""

from __future__ import annotations

import json
import logging
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stepfuse.engine.errors import CheckpointError
from stepfuse.engine.weights.checkpoint import Checkpoint, read_header
from stepfuse.engine.weights.detect import SIGNATURES, detect
from stepfuse.engine.weights.files import choose
from stepfuse.engine.weights.hub import _wanted

BASE = "diffusion_pytorch_model"


def write_tensors(file: Path, *keys: str) -> None:
    """A safetensors file of float32 tensors [2], all zero."""
    header = {k: {"dtype": "F32", "shape": [2], "data_offsets": [8 * i, 8 * i + 8]} for i, k in enumerate(keys)}
    text = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8 * len(keys)))


def component(folder: Path, files: dict[str, tuple[str, ...]], index: str | None = None) -> Checkpoint:
    """A component whose files hold the given keys; index: the name of a shard index over all of them."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    for name, keys in files.items():
        write_tensors(folder / name, *keys)
    if index:
        weight_map = {key: name for name, keys in files.items() for key in keys}
        (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return Checkpoint.open(folder)


LAYOUTS: dict[str, tuple[dict[str, tuple[str, ...]], str | None]] = {
    "single": ({f"{BASE}.safetensors": ("a", "b")}, None),
    "transformers": ({"model.safetensors": ("a", "b")}, None),
    "shards": (
        {f"{BASE}-00001-of-00002.safetensors": ("a",), f"{BASE}-00002-of-00002.safetensors": ("b",)},
        f"{BASE}.safetensors.index.json",
    ),
    "shards without index": (
        {"model-00001-of-00002.safetensors": ("a",), "model-00002-of-00002.safetensors": ("b",)},
        None,
    ),
    "variant": ({f"{BASE}.fp16.safetensors": ("a", "b")}, None),
    "variant shards": (
        {f"{BASE}.fp16-00001-of-00002.safetensors": ("a",), f"{BASE}.fp16-00002-of-00002.safetensors": ("b",)},
        f"{BASE}.safetensors.index.fp16.json",
    ),
    "variant shards, old spelling": (
        {f"{BASE}-00001-of-00002.fp16.safetensors": ("a",), f"{BASE}-00002-of-00002.fp16.safetensors": ("b",)},
        f"{BASE}.safetensors.fp16.index.json",
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read(layout: str, tmp_path: Path) -> None:
    files, index = LAYOUTS[layout]
    tensors = component(tmp_path, files, index).weights("")
    assert {key: (info.dtype, info.shape) for key, info in tensors.items()} == {"a": ("F32", (2,)), "b": ("F32", (2,))}
    assert {info.file.name for info in tensors.values()} == set(files)


@pytest.mark.parametrize(
    ("variant", "names", "picked", "note"),
    [
        (None, ["model.safetensors", "model.fp16.safetensors"], "model.safetensors", None),
        ("fp16", ["model.safetensors", "model.fp16.safetensors"], "model.fp16.safetensors", None),
        ("fp16", ["model.safetensors"], "model.safetensors", "no variant 'fp16' there; using the weights without"),
        (None, ["model.fp16.safetensors"], "model.fp16.safetensors", "using the variant 'fp16'"),
        (None, ["model.non_ema.safetensors", "model.fp16.safetensors"], "model.fp16.safetensors", "'fp16'"),
        (
            "bf16",
            ["model.fp16.safetensors", "model.non_ema.safetensors"],
            "model.fp16.safetensors",
            "no variant 'bf16'",
        ),
        (None, ["model.safetensors", "pytorch_model.bin", "model.onnx"], "model.safetensors", None),
        # one file beside the shards of the same weights: one of the two, not both
        (None, ["model.safetensors", "model-00001-of-00001.safetensors"], "model.safetensors", None),
    ],
)
def test_choice_of_variant(variant: str | None, names: list[str], picked: str, note: str | None) -> None:
    choice = choose("unet", names, variant)
    assert choice.files == (picked,)
    assert note is None if choice.note is None else note is not None and note in choice.note


def test_a_fallback_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    component(tmp_path, {f"{BASE}.fp16.safetensors": ("a",)})
    with caplog.at_level(logging.WARNING, "stepfuse"):
        Checkpoint.open(tmp_path, variant="bf16").weights("")
    assert "no variant 'bf16' there; using the variant 'fp16'" in caplog.text


def test_missing_shards_are_named(tmp_path: Path) -> None:
    files, index = LAYOUTS["shards"]
    checkpoint = component(tmp_path, files, index)
    (tmp_path / f"{BASE}-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=f"shard {BASE}-00002-of-00002.safetensors of .* is missing"):
        checkpoint.weights("")
    with pytest.raises(CheckpointError, match="unet: shard 2 of 3 is missing"):
        choose("unet", ["model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"], None)


def test_an_index_that_lies(tmp_path: Path) -> None:
    checkpoint = component(tmp_path, *LAYOUTS["shards"])
    write_tensors(tmp_path / f"{BASE}-00002-of-00002.safetensors", "c")
    with pytest.raises(CheckpointError, match=r"promises 1 tensors that its shards do not hold, e\.g\. b"):
        checkpoint.weights("")
    write_tensors(tmp_path / f"{BASE}-00002-of-00002.safetensors", "a", "b")
    with pytest.raises(CheckpointError, match="a is stored twice"):
        checkpoint.weights("")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["diffusion_pytorch_model.bin"], r"only pickled weights \(diffusion_pytorch_model.bin\), which can run code"),
        (["config.json"], "has no weights: expected .* found: config.json"),
        ([], "found: nothing"),
    ],
)
def test_nothing_to_read(names: list[str], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        choose("unet", names, None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
        (b"", "not a safetensors file"),
        (b"PK\x03\x04" + bytes(100), "not a safetensors file"),
        (struct.pack("<Q", 10) + b"{not json}", "damaged header"),
    ],
)
def test_damaged_files(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_header(file)


def test_a_file_that_is_cut_off(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    write_tensors(file, "a", "b")
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="bytes, its header asks for"):
        read_header(file)


def test_sources_that_are_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model.ckpt").touch()
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "empty").mkdir()
    for source, message in {
        tmp_path / "model.ckpt": "is pickled",
        tmp_path / "model.safetensors": "is a single file: give the folder",
        tmp_path / "empty": "neither model_index.json nor config.json",
        tmp_path / "nowhere": "no checkpoint at .*: expected a diffusers folder or a hub id",
        "nobody/nothing-of-the-kind": "neither a folder here nor in the local cache .* --download",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            Checkpoint.open(source)


def test_a_hub_id_resolves_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--some--model"
    snapshot = repo / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    (snapshot / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    assert Checkpoint.open("some/model").components == {"": "AutoencoderKL"}


def test_only_what_is_read_is_downloaded() -> None:
    files = [
        "model_index.json",
        "v1-5.safetensors",
        "unet/config.json",
        f"unet/{BASE}.safetensors",
        f"unet/{BASE}.fp16.safetensors",
        f"unet/{BASE}.bin",
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
        "text_encoder/model.safetensors",
        "text_encoder/flax_model.msgpack",
    ]
    configs = {"model_index.json", "unet/config.json", "tokenizer/vocab.json", "tokenizer/merges.txt"}
    full, half = f"unet/{BASE}.safetensors", f"unet/{BASE}.fp16.safetensors"
    assert set(_wanted("some/model", files, None)) == configs | {full, "text_encoder/model.safetensors"}
    assert set(_wanted("some/model", files, "fp16")) == configs | {half, "text_encoder/model.safetensors"}


def index(folder: Path, components: dict[str, Any], configs: dict[str, dict[str, Any]]) -> Checkpoint:
    """A pipeline folder without weights."""
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "P", "_diffusers_version": "0"} | components))
    for name in components:
        (folder / name).mkdir(exist_ok=True)
        if name in configs:
            (folder / name / "config.json").write_text(json.dumps(configs[name]))
    return Checkpoint.open(folder)


def test_the_index_is_read_by_class_and_ignores_libraries(tmp_path: Path) -> None:
    components = {
        "unet": ["onnx", "UNet2DConditionModel"],
        "safety_checker": [None, None],
        "vae": ["some.module", "AutoencoderKL"],
        "requires_safety_checker": False,
    }
    checkpoint = index(tmp_path, components, {"unet": {"in_channels": 9}})
    assert checkpoint.components == {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
    assert checkpoint.options == {"requires_safety_checker": False}
    assert checkpoint.config("unet") == {"_class_name": "UNet2DConditionModel", "in_channels": 9}
    with pytest.raises(CheckpointError, match=r"no component 'vea'; did you mean 'vae'\?"):
        checkpoint.config("vea")
    with pytest.raises(CheckpointError, match=r"has no config.json"):
        checkpoint.config("vae")
    (tmp_path / "vae").rmdir()
    with pytest.raises(CheckpointError, match=r"names 'vae' \(AutoencoderKL\), but that folder is missing"):
        checkpoint.config("vae")
    (tmp_path / "unet" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not valid JSON"):
        checkpoint.config("unet")


CLIP = ["transformers", "CLIPTextModel"]
CLIP2 = ["transformers", "CLIPTextModelWithProjection"]
KL = ["diffusers", "AutoencoderKL"]
COND = ["diffusers", "UNet2DConditionModel"]
PLAIN = ["diffusers", "UNet2DModel"]
SD = {"unet": COND, "vae": KL, "text_encoder": CLIP}
XL = {"unet": COND, "vae": KL, "text_encoder": CLIP, "text_encoder_2": CLIP2}
VQ = {"unet": PLAIN, "vqvae": ["diffusers", "VQModel"]}
KNOWN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sd": (SD, {}),
    "sd_lcm": (SD, {"time_cond_proj_dim": 256}),
    "sd_inpaint": (SD, {"in_channels": 9}),
    "sd_x4_upscaler": (SD, {"in_channels": 7, "num_class_embeds": 1000}),
    "x4_upscaler": ({"unet": COND, "vae": KL}, {"in_channels": 7, "num_class_embeds": 351}),
    "sdxl": (XL, {"addition_embed_type": "text_time"}),
    "sdxl_inpaint": (XL, {"addition_embed_type": "text_time", "in_channels": 9}),
    "sdxl_refiner": (XL | {"text_encoder": [None, None]}, {"addition_embed_type": "text_time"}),
    "pixel": ({"unet": PLAIN}, {"in_channels": 3}),
    "pixel_class": ({"unet": PLAIN}, {"in_channels": 3, "num_class_embeds": 10}),
    "pixel_upscaler": ({"unet": PLAIN}, {"in_channels": 6, "class_embed_type": "timestep"}),
    "ldm": (VQ, {"in_channels": 3}),
    "ldm_super_resolution": (VQ, {"in_channels": 6}),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_architectures_are_told_apart(name: str, tmp_path: Path) -> None:
    components, unet = KNOWN[name]
    vae = {"latent_channels": 3 if "vqvae" in components else 4}
    found = detect(index(tmp_path, components, {"unet": unet, "vae": vae, "vqvae": vae}))
    assert found.architecture == name
    assert f"unet={components['unet'][1]}" in found.evidence


def test_an_unknown_architecture_lists_the_evidence(tmp_path: Path) -> None:
    checkpoint = index(tmp_path, SD, {"unet": {"in_channels": 8}, "vae": {"latent_channels": 4}})
    with pytest.raises(CheckpointError) as caught:
        detect(checkpoint)
    text = str(caught.value)
    assert "extra_channels=4" in text
    assert "The nearest is 'sd', which needs extra_channels =0, not 4" in text
    flux = index(tmp_path, {"transformer": ["diffusers", "FluxTransformer2DModel"]}, {})
    with pytest.raises(CheckpointError, match="transformer=FluxTransformer2DModel: no architecture of this engine"):
        detect(flux)


def test_two_fitting_architectures_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIGNATURES, "twin", dict(SIGNATURES["sd"]))
    with pytest.raises(CheckpointError, match="fits several architectures: sd, twin"):
        detect(index(tmp_path, SD, {"unet": {}, "vae": {}}))


def test_real_pipelines_are_detected(reference_pipeline: Any) -> None:
    assert detect(Checkpoint.open(reference_pipeline("sd15"))).architecture == "sd"
    assert detect(Checkpoint.open(reference_pipeline("sdxl"))).architecture == "sdxl"


def test_reading_a_folder_imports_no_torch(tmp_path: Path) -> None:
    component(tmp_path, {f"{BASE}.safetensors": ("a",)})
    code = (
        "import sys; from stepfuse.engine.weights import checkpoint, detect, keymap, maps\n"
        f"assert 'a' in checkpoint.Checkpoint.open({str(tmp_path)!r}).weights('')\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
