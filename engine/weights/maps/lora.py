"""How LoRA files spell the layers of U-Nets and CLIP text encoders; ours are diffusers' and transformers' names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

COMPONENTS: tuple[tuple[str, str], ...] = (
    ("lora_unet_", "unet"),
    ("lora_te1_", "text_encoder"),
    ("lora_te2_", "text_encoder_2"),
    ("lora_te_", "text_encoder"),
    ("unet.", "unet"),
    ("text_encoder_2.", "text_encoder_2"),
    ("text_encoder.", "text_encoder"),
    ("diffusion_model.", "unet"),
    ("model.diffusion_model.", "unet"),
)
"""Prefix of a key -> component; kohya's first. A key without one belongs to the U-Net, as PEFT saves it alone."""

WRAPPERS = ("base_model.model.",)
"""What PEFT puts before (or between prefix and) the name of a layer."""

ROLES: tuple[tuple[str, str], ...] = (
    (r"\.lora_down\.weight$", "down"),
    (r"\.lora_up\.weight$", "up"),
    (r"\.lora_mid\.weight$", "mid"),
    (r"\.lora_A(\.\w+)?\.weight$", "down"),
    (r"\.lora_B(\.\w+)?\.weight$", "up"),
    (r"(\.lora|_lora|\.lora_linear_layer)\.down\.weight$", "down"),
    (r"(\.lora|_lora|\.lora_linear_layer)\.up\.weight$", "up"),
    (r"(\.lora|_lora|\.lora_linear_layer)?\.alpha$", "alpha"),
)
"""End of a key -> what the tensor is: kohya and LyCORIS, PEFT, diffusers before and after PEFT."""

OTHER_KINDS: tuple[tuple[str, str], ...] = (
    (r"\.(dora_scale|lora_magnitude_vector(\.\w+)?(\.weight)?)$", "DoRA"),
    (r"\.hada_(w1|w2|t1|t2)(_\w+)?$", "LoHa"),
    (r"\.lokr_(w1|w2|t2)(_\w+)?$", "LoKr"),
    (r"\.(diff|diff_b)$", "full differences of weights"),
    (r"\.(oft_blocks|oft_diag|oft_R(\.\w+)?(\.weight)?)$", "OFT"),
    (r"\.(a1|a2|b1|b2)\.weight$", "GLoRA"),
    (r"\.on_input$", "IA3"),
    (r"\.lora_B(\.\w+)?\.bias$", "LoRA with biases"),
    (r"\.lora_embedding_[AB](\.\w+)?$", "LoRA of an embedding table"),
)
"""End of a key -> the kind of adapter it betrays, none of which is a plain low-rank update."""

OLD_LAYERS: tuple[tuple[str, str], ...] = (
    (r"\.processor\.", "."),
    (r"^(.*\.self_attn)\.to_(q|k|v)$", r"\1.\2_proj"),
    (r"^(.*\.self_attn)\.to_out$", r"\1.out_proj"),
    (r"\.to_out$", ".to_out.0"),
)
"""Names of attention layers in diffusers' own files before it used PEFT, applied in this order."""

_RESNET = (
    ("in_layers.2", "conv1"),
    ("emb_layers.1", "time_emb_proj"),
    ("out_layers.3", "conv2"),
    ("skip_connection", "conv_shortcut"),
)
_FIXED = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


def spellings(layers: Iterable[str]) -> dict[str, str]:
    """Every way to write the names of a component's layers -> the name: with dots or underscores, original or ours.

    layers: dotted names of linear layers and convolutions, of one U-Net or one text encoder.
    """
    layers = list(layers)
    found: dict[str, str] = {}
    originals = _original_blocks(layers)
    for layer in layers:
        for name in (layer, *_clip(layer), *_original(layer, originals)):
            found[name] = found[name.replace(".", "_")] = layer
    return found


def _clip(layer: str) -> Iterator[str]:
    """transformers writes and leaves out `text_model.` from version to version."""
    if re.match(r"(text_model\.)?(encoder|embeddings)\.", layer):
        yield layer.removeprefix("text_model.")
        yield "text_model." + layer.removeprefix("text_model.")


def _original(layer: str, blocks: dict[str, str]) -> Iterator[str]:
    """The name in Stability AI's code, which kohya uses for SDXL."""
    if layer in _FIXED:
        yield _FIXED[layer]
    match = re.match(r"(\w+\.(?:\d+\.)?(?:resnets|attentions|downsamplers|upsamplers)\.\d+)\.(.+)", layer)
    if match is None or match[1] not in blocks:
        return
    block, rest = match.groups()
    if ".resnets." in block:
        rest = {ours: theirs for theirs, ours in _RESNET}.get(rest, rest)
    elif ".downsamplers." in block:
        rest = {"conv": "op"}.get(rest, rest)
    yield f"{blocks[block]}.{rest}"


def _original_blocks(layers: Iterable[str]) -> dict[str, str]:
    """Our block -> the original one: input and output blocks are counted through, attentions come after resnets."""
    blocks = {
        match[0]
        for layer in layers
        if (match := re.match(r"(down|up)_blocks\.\d+\.\w+\.\d+|mid_block\.\w+\.\d+", layer))
    }
    found: dict[str, str] = {}
    for way, side, start in (("down", "input", 1), ("up", "output", 0)):
        index, level = start, 0
        while f"{way}_blocks.{level}.resnets.0" in blocks:
            here, layer = f"{way}_blocks.{level}", 0
            while f"{here}.resnets.{layer}" in blocks:
                found[f"{here}.resnets.{layer}"] = f"{side}_blocks.{index}.0"
                found[f"{here}.attentions.{layer}"] = f"{side}_blocks.{index}.1"
                index, layer = index + 1, layer + 1
            if f"{here}.downsamplers.0" in blocks:
                found[f"{here}.downsamplers.0"] = f"{side}_blocks.{index}.0"
                index += 1
            after = 2 if f"{here}.attentions.0" in blocks else 1
            found[f"{here}.upsamplers.0"] = f"{side}_blocks.{index - 1}.{after}"
            level += 1
    found |= {f"mid_block.resnets.{i}": f"middle_block.{2 * i}" for i in range(2)}
    found["mid_block.attentions.0"] = "middle_block.1"
    return found
