"""Weights reach the module by name: strict, every key once, other spellings by rule, nothing allocated before."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from reference.networks import build_network
from reference.parity import GATE, error, ours
from reference.random_weights import normal
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from stepfuse.engine.errors import CheckpointError, NumericsError
from stepfuse.engine.models.vae import AutoencoderKL
from stepfuse.engine.weights.checkpoint import Checkpoint
from stepfuse.engine.weights.keymap import KeyMap, Rule, assign
from stepfuse.engine.weights.load import load_weights
from stepfuse.engine.weights.maps import MAPS

FILE = "diffusion_pytorch_model.safetensors"
Edit = Callable[[dict[str, Tensor]], None]


@pytest.fixture
def vae_folder(tmp_path: Path) -> Path:
    """A small autoencoder, ours to damage."""
    build_network("vae/f4", tmp_path)
    return tmp_path


def edit(folder: Path, change: Edit) -> None:
    """Change the stored tensors in place."""
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / FILE)


def drop(tensors: dict[str, Tensor]) -> None:
    del tensors["decoder.conv_in.bias"], tensors["encoder.conv_out.weight"]


def add(tensors: dict[str, Tensor]) -> None:
    tensors["decoder.extra.weight"] = torch.zeros(2)


def misshape(tensors: dict[str, Tensor]) -> None:
    tensors["decoder.conv_in.bias"] = torch.zeros(3)


def flatten_a_convolution(tensors: dict[str, Tensor]) -> None:
    tensors["post_quant_conv.weight"] = tensors["post_quant_conv.weight"].flatten(1)


def double(tensors: dict[str, Tensor]) -> None:
    old = "decoder.mid_block.attentions.0.query.weight"
    tensors[old] = tensors[old.replace("query", "to_q")].clone()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, "2 missing in the checkpoint: encoder.conv_out.weight, decoder.conv_in.bias"),
        (add, "1 not part of the model: decoder.extra.weight"),
        (misshape, r"1 of the wrong shape: decoder.conv_in.bias: \[3\], expected \[16\]"),
        (flatten_a_convolution, r"post_quant_conv.weight: \[4, 4\], expected \[4, 4, 1, 1\]"),
        (double, "1 stored twice: decoder.mid_block.attentions.0.to_q.weight: "),
    ],
)
def test_what_does_not_fit_is_named_before_anything_is_read(
    change: Edit, message: str, vae_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(vae_folder, change)
    monkeypatch.setattr("stepfuse.engine.weights.load.safe_open", None)  # reading a tensor would fail differently
    with pytest.raises(CheckpointError, match=message):
        ours(vae_folder)


def test_long_lists_are_cut() -> None:
    names = {f"layer.{i}": (1,) for i in range(50)}
    with pytest.raises(CheckpointError, match=r"50 missing in the checkpoint: layer.0, .*layer.19 and 30 more"):
        assign({}, names, KeyMap(), "thing")


def old_names(tensors: dict[str, Tensor]) -> None:
    """Attention as diffusers stored it before 0.15: its own names, and matrices as 1x1 convolutions."""
    renamed = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for key in [k for k in tensors if ".attentions." in k]:
        value = tensors.pop(key)
        for new, old in renamed.items():
            if f".{new}." in key:
                key = key.replace(f".{new}.", f".{old}.")
                value = value[..., None, None] if value.ndim == 2 else value
        tensors[key] = value


@torch.inference_mode()
def test_old_attention_names_and_convolutions(vae_folder: Path) -> None:
    latents = normal("z", 1, 4, 5, 5)
    before, after = ours(vae_folder), None
    edit(vae_folder, old_names)
    assert any("proj_attn" in key for key in load_file(vae_folder / FILE))
    after = ours(vae_folder)
    assert isinstance(before, AutoencoderKL)
    assert isinstance(after, AutoencoderKL)
    assert torch.equal(after.decode(latents), before.decode(latents))


@torch.inference_mode()
def test_transformer_projections_as_convolutions_or_matrices(reference_network: Any) -> None:
    """SD 1.x stores proj_in and proj_out as 1x1 convolutions, SD 2 and XL as matrices; both reach the same layer."""
    shapes = {}
    for name in ("sd15", "sd2"):
        _, folder = reference_network(f"unet/{name}")
        key = "down_blocks.0.attentions.0.proj_in.weight"
        shapes[name] = len(Checkpoint.open(folder).weights("")[key].shape)
        assert ours(folder).state_dict()[key].ndim == 2
    assert shapes == {"sd15": 4, "sd2": 2}


def test_nan_and_overflow_are_reported_by_name(vae_folder: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["decoder.conv_in.bias"][3] = float("nan")
        tensors["encoder.conv_out.weight"].view(-1)[5] = 1e5

    edit(vae_folder, spoil)
    with pytest.raises(NumericsError, match=r"1 tensors hold NaN or Inf in float32: decoder.conv_in.bias;"):
        ours(vae_folder, dtype=torch.float32)
    with pytest.raises(NumericsError, match=r"2 tensors hold NaN or Inf in float16: "):
        ours(vae_folder, dtype=torch.float16)


def test_quantised_tensors_are_refused(vae_folder: Path) -> None:
    def quantise(tensors: dict[str, Tensor]) -> None:
        tensors["decoder.conv_in.weight"] = tensors["decoder.conv_in.weight"].to(torch.float8_e4m3fn)

    edit(vae_folder, quantise)
    with pytest.raises(CheckpointError, match=r"quantised tensors, .*decoder.conv_in.weight \(F8_E4M3\)"):
        ours(vae_folder)


def test_a_module_that_is_allocated_already_is_refused(vae_folder: Path) -> None:
    weights = Checkpoint.open(vae_folder).weights("")
    with pytest.raises(ValueError, match=r"build the module under torch\.device"):
        load_weights(nn.Linear(2, 2), weights, KeyMap(), device="cpu", dtype=torch.float32, what="thing")


def test_what_the_loader_leaves_behind(vae_folder: Path) -> None:
    vae = ours(vae_folder, dtype=torch.bfloat16)
    assert not vae.training
    for name, parameter in vae.named_parameters():
        assert parameter.dtype == torch.bfloat16, name
        assert not parameter.requires_grad, name
        assert parameter.ndim != 4 or parameter.is_contiguous(memory_format=torch.channels_last), name


@torch.inference_mode()
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_and_variants_written_by_diffusers(variant: str | None, tmp_path: Path, reference_network: Any) -> None:
    module, folder = reference_network("vae/f4")
    module.float().save_pretrained(tmp_path, variant=variant, max_shard_size="100KB")
    module.double()
    names = [file.name for file in tmp_path.iterdir()]
    assert sum("-of-" in name for name in names) > 1
    assert any(name.endswith(f"index{'.fp16' if variant else ''}.json") for name in names)
    latents = normal("z", 1, 4, 6, 6)
    sharded, single = ours(tmp_path), ours(folder)
    assert isinstance(sharded, AutoencoderKL)
    assert isinstance(single, AutoencoderKL)
    assert torch.equal(sharded.decode(latents), single.decode(latents))


def clip(projection: bool) -> Callable[[], nn.Module]:
    config = CLIPTextConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    return lambda: (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


@torch.inference_mode()
@pytest.mark.parametrize("projection", [False, True], ids=["CLIPTextModel", "CLIPTextModelWithProjection"])
@pytest.mark.parametrize("prefixed", [False, True], ids=["flat", "prefixed"])
def test_both_spellings_of_clip(projection: bool, prefixed: bool, tmp_path: Path) -> None:
    build, name = clip(projection), "CLIPTextModelWithProjection" if projection else "CLIPTextModel"
    model = build().eval()
    stored = {}
    for key, value in model.state_dict().items():
        bare = key.removeprefix("text_model.")
        stored["text_model." + bare if prefixed and bare != "text_projection.weight" else bare] = value
    stored["text_model.embeddings.position_ids"] = torch.arange(77)[None]  # junk of old files
    save_file(stored, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [name]}))
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.components == {"": name}
    with torch.device("meta"):
        loaded = build()
    load_weights(loaded, checkpoint.weights(""), MAPS[name], device="cpu", dtype=torch.float32, what="text encoder")
    ids = torch.arange(20)[None]
    assert torch.equal(loaded(ids)[0], model(ids)[0])


@torch.inference_mode()
def test_a_pipeline_folder(reference_pipeline: Any) -> None:
    """Components of a pipeline load by name."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL as Reference

    folder = reference_pipeline("sdxl")
    vae = ours(folder, "vae")
    assert isinstance(vae, AutoencoderKL)
    reference: Any = Reference.from_pretrained(folder / "vae", torch_dtype=torch.float64)
    latents = normal("z", 1, 4, 6, 4)
    assert error(vae.decode(latents), reference.decode(latents).sample) <= GATE
    ours(folder, "unet")


def test_rules_combine_and_do_not_capture_names_of_the_module() -> None:
    keymap = KeyMap(rules=(Rule(r"^model\.", ""), Rule("query", "to_q")), ignore=("^junk",))
    names = {"a.to_q": (2,), "model.b": (2,)}
    plan = assign({"model.a.query": (2,), "model.b": (2,), "junk.c": (1,)}, names, keymap, "thing")
    assert {a.key: a.name for a in plan} == {"model.a.query": "a.to_q", "model.b": "model.b"}
    with pytest.raises(CheckpointError, match=r"1 stored twice: a\.to_q: a\.query and model\.a\.query"):
        assign({"a.query": (2,), "model.a.query": (2,), "model.b": (2,)}, names, keymap, "thing")


def test_only_listed_matrices_may_be_stored_as_convolutions() -> None:
    stored, names = {"x.weight": (2, 3, 1, 1)}, {"x.weight": (2, 3)}
    (one,) = assign(stored, names, KeyMap(flatten=(r"^x\.weight$",)), "thing")
    assert one.shape == (2, 3)
    with pytest.raises(CheckpointError, match=r"x\.weight: \[2, 3, 1, 1\], expected \[2, 3\]"):
        assign(stored, names, KeyMap(flatten=(r"^y\.weight$",)), "thing")
    with pytest.raises(CheckpointError, match=r"x\.weight: \[2, 3, 3, 3\], expected \[2, 3\]"):
        assign({"x.weight": (2, 3, 3, 3)}, names, KeyMap(flatten=(r"^x\.weight$",)), "thing")
