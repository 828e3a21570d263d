"""LoRA files in every spelling, merged in place: W + strength * alpha / r * up @ down, and back bit for bit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from reference.parity import ours
from safetensors.torch import save_file
from torch import Tensor, nn

from stepfuse.engine.components import Components
from stepfuse.engine.config import EngineConfig
from stepfuse.engine.errors import CheckpointError, NumericsError, RequestError
from stepfuse.engine.loading import load_components
from stepfuse.engine.models.projections import stacked
from stepfuse.engine.weights.lora import MergedLoRAs
from stepfuse.engine.weights.lora_file import LoRA, parse_lora, read_lora
from stepfuse.engine.weights.maps.lora import spellings

Pipeline = Callable[[str], Path]
Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
K2 = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
OUT = "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0"
CONV = "down_blocks.0.resnets.0.conv1"
SHORTCUT = "up_blocks.1.resnets.0.conv_shortcut"
PROJ = "down_blocks.0.attentions.0.proj_in"
TE_Q, TE_MLP = "encoder.layers.1.self_attn.q_proj", "encoder.layers.0.mlp.fc1"


@pytest.fixture(scope="module")
def parts(reference_pipeline: Pipeline) -> Callable[[str], Components]:
    made: dict[str, Components] = {}

    def get(name: str) -> Components:
        if name not in made:
            made[name] = load_components(reference_pipeline(name), EngineConfig(device="cpu"))
        return made[name]

    return get


def networks(parts: Components) -> dict[str, nn.Module]:
    names = ("text_encoder", "text_encoder_2")
    assert isinstance(parts.denoiser, nn.Module)
    return {"unet": parts.denoiser, **{n: e.model for n, e in zip(names, parts.text, strict=False)}}


def layer(module: nn.Module, name: str) -> Tensor:
    """The weight of a layer, whatever this version of transformers calls it."""
    found = {key.removeprefix("text_model."): p for key, p in module.named_parameters()}
    return found[name + ".weight"]


def digest(modules: dict[str, nn.Module]) -> str:
    h = hashlib.sha256()
    for module in modules.values():
        for key, tensor in sorted(module.state_dict().items()):
            h.update(key.encode() + tensor.detach().clone().contiguous().view(torch.uint8).numpy().tobytes())
    return h.hexdigest()


def factors(weight: Tensor, rank: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, *weight.shape[1:], generator=g) / 8
    return down, torch.randn(weight.shape[0], rank, *([1] * (weight.dim() - 2)), generator=g) / 8


def dense(down: Tensor, up: Tensor) -> Tensor:
    """up @ down by loops over the rank, in float64."""
    total = torch.zeros(up.shape[0], *down.shape[1:], dtype=torch.float64)
    for r in range(down.shape[0]):
        total += up[:, r].double().reshape(-1, *[1] * (down.dim() - 1)) * down[r].double()
    return total


KOHYA = ("lora_down.weight", "lora_up.weight")
PEFT = ("lora_A.weight", "lora_B.weight")
ENDS = ("down.weight", "up.weight")
OLD = ("lora.down.weight", "lora.up.weight")
SPELLINGS = {
    "kohya": ("sd15", [(f"lora_unet_{n.replace('.', '_')}.", *KOHYA) for n in (Q, K2, OUT, CONV, SHORTCUT)]),
    "peft": ("sd15", [(f"unet.{n}.", *PEFT) for n in (Q, K2, OUT, CONV, SHORTCUT)]),
    "peft alone": ("sd15", [(f"base_model.model.{n}.", *PEFT) for n in (Q, K2, OUT, CONV, SHORTCUT)]),
    "adapter name": ("sd15", [(f"unet.base_model.model.{n}.", "lora_A.style.weight", "lora_B.style.weight")
                              for n in (Q, K2, OUT, CONV, SHORTCUT)]),
    "dotted": ("sd15", [(f"unet.{n}.", *OLD) for n in (Q, K2, OUT, CONV, SHORTCUT)]),
    "processors": ("sd15", [("unet." + n.replace(".to_", ".processor.to_").replace(
        ".to_out.0", ".to_out") + "_lora.", "down.weight", "up.weight") for n in (Q, K2, OUT)]),
    "hybrid": ("sd15", [(f"unet.{n}.", *KOHYA) for n in (Q, K2, OUT, CONV, SHORTCUT)]),
}  # fmt: skip
LAYERS = (Q, K2, OUT, CONV, SHORTCUT)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_reaches_its_layer(parts, tmp_path: Path, spelling: str) -> None:
    name, prefixes = SPELLINGS[spelling]
    modules = networks(parts(name))
    tensors, expected = {}, {}
    for i, (prefix, down_key, up_key) in enumerate(prefixes):
        weight = layer(modules["unet"], LAYERS[i])
        down, up = factors(weight, 3, i)
        tensors |= {prefix + down_key: down, prefix + up_key: up}
        expected[LAYERS[i]] = weight.double() + 0.5 * dense(down, up)
    save_file(tensors, tmp_path / "style.safetensors")
    merged = MergedLoRAs(modules)
    merged.set([(read_lora(tmp_path / "style.safetensors"), 0.5)])
    for key, value in expected.items():
        found = layer(modules["unet"], key)
        assert (found.double() - value).abs().max() <= 1e-6 * value.abs().max(), key
    merged.set([])


def test_text_encoders_of_sdxl_in_kohyas_and_old_spelling(parts) -> None:
    modules = networks(parts("sdxl"))
    keys = {
        "lora_te1_text_model_encoder_layers_1_self_attn_q_proj": ("text_encoder", TE_Q, KOHYA),
        "lora_te2_text_model_encoder_layers_0_mlp_fc1": ("text_encoder_2", TE_MLP, KOHYA),
        "lora_te2_text_projection": ("text_encoder_2", "text_projection", KOHYA),
        "text_encoder_2.text_model.encoder.layers.1.self_attn.to_q": ("text_encoder_2", TE_Q, ENDS),
        "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_linear_layer": ("text_encoder", TE_MLP, ENDS),
    }  # fmt: skip
    tensors, expected = {}, []
    for i, (key, (component, name, (a, b))) in enumerate(keys.items()):
        weight = layer(modules[component], name)
        down, up = factors(weight, 2, i)
        joint = "_lora." if "to_q" in key else "."
        tensors |= {f"{key}{joint}{a}": down, f"{key}{joint}{b}": up}
        expected.append((component, name, weight.double() + dense(down, up)))
    merged = MergedLoRAs(modules)
    merged.set([(parse_lora("te", tensors), 1.0)])
    for component, name, value in expected:
        assert (layer(modules[component], name).double() - value).abs().max() <= 1e-6 * value.abs().max(), name
    merged.set([])


def test_original_names_are_those_of_published_sdxl_and_sd_loras() -> None:
    """Pairs from kohya's files for SDXL, and of Stability AI's SD 1.x, whose up levels differ in attention."""
    sdxl = [f"down_blocks.{b}.resnets.{i}.conv1" for b in range(3) for i in range(2)]
    sdxl += [f"down_blocks.{b}.downsamplers.0.conv" for b in range(2)] + ["mid_block.resnets.1.time_emb_proj"]
    sdxl += [f"up_blocks.{b}.resnets.{i}.conv_shortcut" for b in range(3) for i in range(3)]
    sdxl += [f"up_blocks.{b}.upsamplers.0.conv" for b in range(2)] + ["conv_in", "conv_out", "add_embedding.linear_2"]
    inner, inner_flat = "transformer_blocks.0.attn2.to_out.0", "transformer_blocks_0_attn2_to_out_0"
    depths = {"down_blocks.1": 2, "down_blocks.2": 2, "mid_block": 1, "up_blocks.0": 3, "up_blocks.1": 3}
    sdxl += [f"{b}.attentions.{i}.{inner}" for b, n in depths.items() for i in range(n)]
    pairs = {
        f"input_blocks_4_1_{inner_flat}": f"down_blocks.1.attentions.0.{inner}",
        f"input_blocks_8_1_{inner_flat}": f"down_blocks.2.attentions.1.{inner}",
        f"middle_block_1_{inner_flat}": f"mid_block.attentions.0.{inner}",
        f"output_blocks_5_1_{inner_flat}": f"up_blocks.1.attentions.2.{inner}",
        "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
        "input_blocks_6_0_op": "down_blocks.1.downsamplers.0.conv",
        "input_blocks_7_0_in_layers_2": "down_blocks.2.resnets.0.conv1",
        "middle_block_2_emb_layers_1": "mid_block.resnets.1.time_emb_proj",
        "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
        "output_blocks_5_2_conv": "up_blocks.1.upsamplers.0.conv",
        "output_blocks_8_0_skip_connection": "up_blocks.2.resnets.2.conv_shortcut",
        "label_emb_0_2": "add_embedding.linear_2",
        "input_blocks_0_0": "conv_in",
        "out_2": "conv_out",
    }  # fmt: skip
    table = spellings(sdxl)
    assert {key: table.get(key) for key in pairs} == pairs
    assert table["input_blocks.7.0.in_layers.2"] == "down_blocks.2.resnets.0.conv1"
    sd = [f"up_blocks.0.resnets.{i}.conv1" for i in range(3)] + ["up_blocks.0.upsamplers.0.conv"]
    assert spellings(sd)["output_blocks_2_1_conv"] == "up_blocks.0.upsamplers.0.conv"


def test_original_names_of_every_layer_are_those_diffusers_reads(parts) -> None:
    """Each layer of a tiny SDXL U-Net, written in the original spelling, comes back through diffusers' converter."""
    from diffusers.loaders import lora_conversion_utils as theirs

    unet = parts("sdxl").denoiser
    names = [n for n, m in unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    table = spellings(names)
    originals = {key: name for key, name in table.items() if "_blocks_" in key and key.startswith(("input", "output"))}
    originals |= {key: name for key, name in table.items() if key.startswith("middle_block_")}
    assert set(originals.values()) == {n for n in names if n.startswith(("down_", "up_", "mid_"))} | {"conv_in"}
    state = {f"lora_unet_{key}.lora_down.weight": torch.zeros(()) for key in originals}
    config = type("Config", (), {"layers_per_block": unet.config.down[0].layers})
    mapped = theirs._maybe_map_sgm_blocks_to_diffusers(dict.fromkeys(state, 0), config)
    assert len(mapped) == len(originals)
    back = set()
    for key in mapped:
        prefix = theirs._convert_unet_lora_key(key)
        for end in (".lora.down.weight", "_lora.down.weight", ".lora_down.weight", ".lora.down", "_lora.down"):
            prefix = prefix.removesuffix(end)
        back.add(prefix.replace(".processor", "").replace("to_out", "to_out.0"))
    assert back == set(originals.values())


@pytest.mark.parametrize(
    ("settings", "key_alpha", "scale"),
    [
        ({}, None, 1.0),
        ({}, 2.0, 0.5),
        ({"unet.lora_alpha": 8}, None, 2.0),
        ({"unet.lora_alpha": 8, "unet.use_rslora": True}, None, 4.0),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"attn1.to_q": 1}}, None, 0.25),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"tn1.to_q": 1}}, None, 2.0),
        ({"text_encoder.lora_alpha": 8}, None, 1.0),
    ],
)
def test_alpha_of_the_key_or_of_pefts_configuration(
    parts, tmp_path: Path, settings: dict, key_alpha: float | None, scale: float
) -> None:
    modules = {"unet": parts("sd15").denoiser}
    weight = layer(modules["unet"], Q)
    down, up = factors(weight, 4)
    tensors = {f"unet.{Q}.lora_A.weight": down, f"unet.{Q}.lora_B.weight": up}
    tensors |= {} if key_alpha is None else {f"unet.{Q}.alpha": torch.tensor(key_alpha)}
    save_file(
        tensors, tmp_path / "x.safetensors", {"lora_adapter_metadata": json.dumps(settings)} if settings else None
    )
    (update,) = read_lora(tmp_path / "x.safetensors").updates
    assert update.scale == scale
    expected, merged = weight.double() + scale * dense(down, up), MergedLoRAs(modules)
    merged.set([(read_lora(tmp_path / "x.safetensors"), 1.0)])
    assert (weight.double() - expected).abs().max() <= 1e-6 * expected.abs().max()
    merged.set([])


def test_pefts_own_folder_with_its_configuration(parts, tmp_path: Path) -> None:
    down, up = factors(layer(parts("sd15").denoiser, Q), 4)
    save_file({f"base_model.model.{Q}.{k}": t for k, t in zip(PEFT, (down, up), strict=True)},
              tmp_path / "adapter_model.safetensors")  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 2, "r": 4}))
    lora = read_lora(tmp_path)
    assert lora.name == tmp_path.name
    assert lora.updates[0].scale == 0.5


def test_locon_with_a_middle_convolution_and_1x1_layers(parts) -> None:
    """LyCORIS' CP form: down 1x1, a k x k core of the rank, up 1x1; a matrix stored as 1x1 convolution and back."""
    unet = parts("sd15").denoiser
    conv, shortcut, proj = (layer(unet, n) for n in (CONV, SHORTCUT, PROJ))
    g = torch.Generator().manual_seed(3)
    down, mid, up = (
        torch.randn(s, generator=g) / 4 for s in ((3, conv.shape[1], 1, 1), (3, 3, 3, 3), (conv.shape[0], 3, 1, 1))
    )
    tensors = {
        f"lora_unet_{CONV.replace('.', '_')}.lora_{k}.weight": t for k, t in (("down", down), ("mid", mid), ("up", up))
    }
    d2, u2 = factors(shortcut.flatten(1), 2, 1)
    d3, u3 = factors(proj, 2, 2)
    tensors |= {f"unet.{SHORTCUT}.lora_A.weight": d2, f"unet.{SHORTCUT}.lora_B.weight": u2}
    tensors |= {f"unet.{PROJ}.lora_A.weight": d3[..., None, None], f"unet.{PROJ}.lora_B.weight": u3[..., None, None]}
    core = torch.zeros(conv.shape, dtype=torch.float64)
    for p in range(3):
        for q in range(3):
            outer = up[:, p, 0, 0].double()[:, None] * down[q, :, 0, 0].double()[None]
            core += outer[..., None, None] * mid[p, q].double()
    expected = [conv.double() + core, shortcut.double() + dense(d2, u2)[..., None, None], proj.double() + dense(d3, u3)]
    merged = MergedLoRAs({"unet": unet})
    merged.set([(parse_lora("locon", tensors), 1.0)])
    for found, value in zip((conv, shortcut, proj), expected, strict=True):
        assert (found.double() - value).abs().max() <= 1e-6 * value.abs().max()
    merged.set([])


def full(parts: Components, seed: int, name: str = "lora", rank: int = 2) -> LoRA:
    """An update of every layer of every network."""
    tensors: dict[str, Tensor] = {}
    for component, module in networks(parts).items():
        for i, (key, m) in enumerate(module.named_modules()):
            if isinstance(m, nn.Linear | nn.Conv2d):
                down, up = factors(m.weight, rank, 1000 * seed + i)
                tensors |= {f"{component}.{key}.lora_A.weight": down, f"{component}.{key}.lora_B.weight": up}
    return parse_lora(name, tensors)


@pytest.mark.parametrize("name", ["sd15", "sd2_v", "sdxl"])
def test_several_sum_from_the_originals_and_removing_restores_every_bit(parts, name: str) -> None:
    modules = networks(parts(name))
    before, unet = digest(modules), parts(name).denoiser
    places = {key: p.data_ptr() for m in modules.values() for key, p in m.named_parameters()}
    groups = [[unet.get_parameter(key) for key in group] for group in unet.stacks()]
    a, b = full(parts(name), 1, "a"), full(parts(name), 2, "b", rank=5)
    merged = MergedLoRAs(modules)
    weight = layer(unet, K2)
    updates = [next(u for u in lora.updates if u.layer == K2) for lora in (a, b)]
    expected = weight.double() + sum(w * dense(u.down, u.up) for w, u in zip((0.75, -1.5), updates, strict=True))
    merged.set([(a, 3.0)])
    assert digest(modules) != before
    merged.set([(a, 0.75), (b, -1.5)])
    once = digest(modules)
    assert merged.active == (("a", 0.75), ("b", -1.5))
    assert (weight.double() - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert all(stacked(group) is not None for group in groups), "prompt and time projections no longer lie together"
    assert torch.equal(stacked(groups[1]), torch.cat(groups[1])), "the stack does not hold the merged values"
    merged.set([(b, 1.0)])
    merged.set([(a, 0.75), (b, -1.5)])
    assert digest(modules) == once, "the sum depends on what was merged before"
    merged.set([(a, 0.0), (b, 0.0)])
    assert digest(modules) == before
    merged.set([(a, 0.75)])
    merged.set([])
    assert digest(modules) == before
    assert merged.active == ()
    assert {key: p.data_ptr() for m in modules.values() for key, p in m.named_parameters()} == places


def test_half_precision_sums_in_float32_and_rounds_once(reference_pipeline: Pipeline) -> None:
    unet = ours(reference_pipeline("sd15"), "unet", torch.float16)
    weight, loras, exact = layer(unet, Q), [], 0
    for i in range(6):
        down, up = factors(weight.float(), 4, i)
        loras.append((parse_lora(str(i), {f"{Q}.lora_A.weight": down, f"{Q}.lora_B.weight": up}), 1.0))
        exact = exact + dense(down, up)
    expected = (weight.double() + exact).half()
    before = weight.clone()
    merged = MergedLoRAs({"unet": unet})
    merged.set(loras)
    assert (weight == expected).float().mean() > 0.995  # but for ties that float32 decides otherwise
    merged.set([])
    assert torch.equal(weight, before)
    huge = parse_lora(
        "huge", {f"{Q}.lora_A.weight": torch.full((1, 40), 300.0), f"{Q}.lora_B.weight": torch.full((40, 1), 300.0)}
    )
    with pytest.raises(NumericsError, match=r"1 weights: unet\.down_blocks.*removed"):
        merged.set([(huge, 1.0)])
    assert torch.equal(weight, before)
    assert merged.active == ()


def test_fused_projections_take_their_thirds(reference_pipeline: Pipeline) -> None:
    plain = load_components(reference_pipeline("sd15"), EngineConfig(device="cpu"))
    fused = load_components(reference_pipeline("sd15"), EngineConfig(device="cpu", transforms=("fused_qkv",)))
    stem = Q.removesuffix(".to_q")
    lora = full(plain, 4)
    for one in (plain, fused):
        MergedLoRAs(networks(one)).set([(lora, 1.0)])
    parts = [layer(plain.denoiser, f"{stem}.to_{x}") for x in "qkv"]
    assert torch.equal(layer(fused.denoiser, f"{stem}.to_qkv"), torch.cat(parts))


def test_a_weight_that_was_copied_by_a_transform_is_refused(reference_pipeline: Pipeline) -> None:
    parts = load_components(reference_pipeline("sd15"), EngineConfig(device="cpu", transforms=("folded_upsample",)))
    merged = MergedLoRAs(networks(parts))
    with pytest.raises(RequestError, match=r"upsamplers\.0\.conv has a second copy .*folded_upsample"):
        merged.set([(full(parts, 1), 1.0)])
    down, up = factors(layer(parts.denoiser, Q), 2)
    merged.set([(parse_lora("attention", {f"{Q}.lora_A.weight": down, f"{Q}.lora_B.weight": up}), 1.0)])


def test_partial_or_no_match_lists_the_keys_and_changes_nothing(parts) -> None:
    modules = networks(parts("sd15"))
    before = digest(modules)
    merged, (down, up) = MergedLoRAs(modules), factors(layer(modules["unet"], Q), 2)
    good = {f"unet.{Q}.lora_A.weight": down, f"unet.{Q}.lora_B.weight": up}
    flux = {
        "transformer.single_blocks.0.proj_mlp.lora_A.weight": down,
        "transformer.single_blocks.0.proj_mlp.lora_B.weight": up,
    }
    with pytest.raises(CheckpointError, match=r"2 of 2 keys fit no layer: transformer\.single_blocks\.0\.proj_mlp"):
        merged.set([(parse_lora("flux", flux), 1.0)])
    with pytest.raises(CheckpointError, match=r"2 of 4 keys fit no layer: transformer\.single"):
        merged.set([(parse_lora("mixed", good | flux), 1.0)])
    te2 = {f"lora_te2_text_projection.{k}": t for k, t in zip(KOHYA, (down, up), strict=True)}
    with pytest.raises(CheckpointError, match="2 of 4 keys fit no layer: lora_te2_text_projection"):
        merged.set([(parse_lora("sdxl", good | te2), 1.0)])
    wide = {f"unet.{Q}.lora_A.weight": torch.zeros(2, 41), f"unet.{Q}.lora_B.weight": up}
    with pytest.raises(CheckpointError, match=r"wrong shape: unet.*\[40, 41\], expected \[40, 40\]"):
        merged.set([(parse_lora("wide", wide), 1.0)])
    one = {
        f"unet.{CONV}.lora_A.weight": torch.zeros(2, 40, 1, 1),
        f"unet.{CONV}.lora_B.weight": torch.zeros(40, 2, 1, 1),
    }
    with pytest.raises(CheckpointError, match=r"\[40, 40, 1, 1\], expected \[40, 40, 3, 3\]"):
        merged.set([(parse_lora("kernel", one), 1.0)])
    flat = {f"lora_unet_{Q.replace('.', '_')}.{k}": t for k, t in zip(KOHYA, (down, up), strict=True)}
    with pytest.raises(CheckpointError, match=r"holds unet\.down_blocks.*to_q twice, e\.g\. lora_unet"):
        merged.set([(parse_lora("twice", good | flat), 1.0)])
    with pytest.raises(RequestError, match="got strength nan"):
        merged.set([(parse_lora("x", good), float("nan"))])
    assert digest(modules) == before


@pytest.mark.parametrize(
    ("extra", "kind"),
    [
        ("lora_unet_x.dora_scale", "DoRA"),
        ("unet.x.lora_magnitude_vector", "DoRA"),
        ("lora_unet_x.hada_w1_a", "LoHa"),
        ("lora_unet_x.lokr_w2", "LoKr"),
        ("lora_unet_x.diff", "full differences"),
        ("unet.x.lora_B.bias", "LoRA with biases"),
    ],
)
def test_other_adapters_are_named(extra: str, kind: str) -> None:
    tensors = {f"unet.{Q}.lora_A.weight": torch.zeros(2, 4), f"unet.{Q}.lora_B.weight": torch.zeros(4, 2)}
    with pytest.raises(CheckpointError, match=rf"holds {kind}.*{extra}"):
        parse_lora("x", tensors | {extra: torch.zeros(4)})


def test_keys_that_are_no_lora_half_pairs_and_bad_files(tmp_path: Path) -> None:
    pair = {f"unet.{Q}.lora_A.weight": torch.zeros(2, 4), f"unet.{Q}.lora_B.weight": torch.zeros(4, 2)}
    with pytest.raises(CheckpointError, match="1 keys not understood: bundle_emb"):
        parse_lora("x", pair | {"bundle_emb.a": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"1 keys without the other half of their pair: unet.*lora_A"):
        parse_lora("x", {f"unet.{Q}.lora_A.weight": torch.zeros(2, 4)})
    with pytest.raises(CheckpointError, match="the file is empty"):
        parse_lora("x", {})
    with pytest.raises(CheckpointError, match=r"1 keys not understood: base_model.*"):
        parse_lora("x", pair | {f"base_model.model.unet.{Q}.lora_A.weight": torch.zeros(2, 4)})
    with pytest.raises(CheckpointError, match="no low-rank update"):
        parse_lora("x", {f"unet.{Q}.lora_A.weight": torch.zeros(2, 4), f"unet.{Q}.lora_B.weight": torch.zeros(4, 3)})
    with pytest.raises(NumericsError, match=r"NaN or Inf in unet.*lora_B"):
        parse_lora("x", pair | {f"unet.{Q}.lora_B.weight": torch.full((4, 2), float("inf"))})
    with pytest.raises(CheckpointError, match="use_dora"):
        parse_lora("x", pair, {"unet.use_dora": True})
    scalar = {f"unet.{Q}.lora_A.weight": torch.zeros(()), f"unet.{Q}.lora_B.weight": torch.zeros(4, 2)}
    with pytest.raises(CheckpointError, match="no low-rank update"):
        parse_lora("x", scalar)
    for text, message in (("{", "is no JSON"), ("[]", "no JSON object")):
        save_file(pair, tmp_path / "x.safetensors", {"lora_adapter_metadata": text})
        with pytest.raises(CheckpointError, match=message):
            read_lora(tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").write_bytes(b"no")
    (tmp_path / "x.pt").write_bytes(b"no")
    for name, message in (
        ("x.safetensors", "not a safetensors"),
        ("x.pt", "pickled"),
        ("y.safetensors", "no such file"),
    ):
        with pytest.raises(CheckpointError, match=message):
            read_lora(tmp_path / name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="found none"):
        read_lora(tmp_path / "empty")


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_merged_weights_equal_diffusers_fuse_lora(
    parts, reference_pipeline: Pipeline, tmp_path: Path, name: str
) -> None:
    pytest.importorskip("peft")
    import diffusers

    pipe = diffusers.DiffusionPipeline.from_pretrained(reference_pipeline(name), torch_dtype=torch.float32)
    unet = parts(name).denoiser
    tensors: dict[str, Tensor] = {}
    for i, (key, m) in enumerate(unet.named_modules()):
        if "attentions" in key and isinstance(m, nn.Linear) and "proj_" not in key:
            down, up = factors(m.weight, 4, i)
            stem = f"lora_unet_{key.replace('.', '_')}"
            tensors |= {f"{stem}.{k}": t for k, t in zip(KOHYA, (down, up), strict=True)}
            tensors[f"{stem}.alpha"] = torch.tensor(3.0)
    save_file(tensors, tmp_path / "style.safetensors")
    pipe.load_lora_weights(tmp_path, weight_name="style.safetensors")
    pipe.fuse_lora(lora_scale=0.6)
    pipe.unload_lora_weights()
    merged = MergedLoRAs({"unet": unet})
    merged.set([(read_lora(tmp_path / "style.safetensors"), 0.6)])
    theirs, seen = dict(pipe.unet.named_parameters()), 0
    for key, p in unet.named_parameters():
        expected = theirs[key].reshape(p.shape)
        assert (p - expected).abs().max() <= 1e-6 * expected.abs().max(), key
        seen += 1
    assert seen == len(theirs)
    merged.set([])
