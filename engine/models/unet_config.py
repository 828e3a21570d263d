"""What a U-Net is made of, in one vocabulary, read from the configurations diffusers writes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from ..errors import CheckpointError

logger = logging.getLogger("stepfuse")

AttentionKind = Literal["none", "self", "cross"]
ResampleKind = Literal["none", "conv", "resnet"]
ClassEmbedding = Literal["none", "table", "timestep", "projection", "linear", "identity"]


@dataclass(frozen=True, kw_only=True)
class Level:
    """One resolution of one half of the network."""

    channels: int
    layers: int  # residual blocks; in the middle: residual blocks after the first
    attention: AttentionKind = "none"
    heads: int = 1
    depth: tuple[int, ...] = ()  # transformer blocks of each cross-attention layer
    cross_only: bool = False  # the first attention of a transformer block reads the prompt, too
    resample: ResampleKind = "none"


@dataclass(frozen=True, kw_only=True)
class BlockOptions:
    """What all blocks of a network share."""

    groups: int
    eps: float
    time_dim: int | None = None  # None: the network has no time embedding
    scale_shift: bool = False  # the time embedding scales and shifts the second norm instead of being added before it
    cross_dim: int | None = None
    downsample_padding: int = 1  # 0 pads one row and column at the end only
    middle_groups: int | None = None  # groups of the norm before the middle's self-attention; None: no norm


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Structure of a U-Net. `up` is empty for the half network of a ControlNet."""

    in_channels: int
    out_channels: int
    sample_size: tuple[int, int] | None
    down: tuple[Level, ...]
    middle: Level | None
    up: tuple[Level, ...]
    blocks: BlockOptions
    sinusoid_dim: int
    sine_first: bool
    frequency_shift: float
    time_dim: int
    time_cond_dim: int | None = None
    class_embedding: ClassEmbedding = "none"
    class_dim: int = 0  # number of classes of a table, else the width of the class vector
    added_time_dim: int | None = None  # sinusoid width of each of SDXL's time ids
    added_dim: int = 0
    text_dim: int | None = None  # width of the prompt before `encoder_hid_proj`; None: no projection
    conv_in_kernel: int = 3
    conv_out_kernel: int = 3
    center_input: bool = False

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> UNetConfig:
        """Read a `config.json` of UNet2DConditionModel, ControlNetModel or UNet2DModel (also their Flax spellings).

        Missing and None entries take diffusers' defaults. Raises CheckpointError for a structure this network does not
        have, naming the option; entries nobody knows are ignored with a warning.
        """
        return _read(_with_defaults(config))


_COMMON: dict[str, Any] = {
    "sample_size": None,
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "layers_per_block": 2,
    "downsample_padding": 1,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "attention_head_dim": 8,
    "num_class_embeds": None,
    "class_embed_type": None,
    "resnet_time_scale_shift": "default",
    "time_embedding_dim": None,
    # conditional models only; the unconditional class has none of these
    "only_cross_attention": False,
    "cross_attention_dim": None,
    "transformer_layers_per_block": 1,
    "reverse_transformer_layers_per_block": None,
    "num_attention_heads": None,
    "encoder_hid_dim": None,
    "addition_time_embed_dim": None,
    "projection_class_embeddings_input_dim": None,
    "time_cond_proj_dim": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    # unconditional models only
    "downsample_type": "conv",
    "upsample_type": "conv",
    "attn_norm_num_groups": None,
    "add_attention": True,
}
_CONDITIONAL: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 1280,
}
_UNCONDITIONAL: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownBlock2D",) + ("AttnDownBlock2D",) * 3,
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ("AttnUpBlock2D",) * 3 + ("UpBlock2D",),
    "block_out_channels": (224, 448, 672, 896),
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "UNet2DConditionModel": _COMMON | _CONDITIONAL,
    "ControlNetModel": _COMMON | _CONDITIONAL | {"up_block_types": ()},
    "UNet2DModel": _COMMON | _UNCONDITIONAL,
}
# Options with one meaning here: any other value is another network.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "time_embedding_type": ("positional",),
    "addition_embed_type": (None, "text_time"),
    "encoder_hid_dim_type": (None, "text_proj"),
    "class_embed_type": (None, "timestep", "projection", "simple_projection", "identity"),
    "mid_block_type": (None, "UNetMidBlock2D", "UNetMidBlock2DCrossAttn"),
    "downsample_type": ("conv", "resnet"),
    "upsample_type": ("conv", "resnet"),
    "dual_cross_attention": (None, False),
    "attention_type": (None, "default"),
    "cross_attention_norm": (None,),
    "timestep_post_act": (None,),
    "time_embedding_act_fn": (None,),
    "resnet_skip_time_act": (None, False),
    "resnet_out_scale_factor": (None, 1),
    "mid_block_scale_factor": (None, 1),
    "class_embeddings_concat": (None, False),
}
# Options that change nothing in inference, or only blocks that are refused above. Attention always accumulates in
# float32, which is what `upcast_attention` asks for.
_IRRELEVANT = {
    "dropout",
    "upcast_attention",
    "mid_block_only_cross_attention",
    "addition_embed_type_num_heads",
    "num_train_timesteps",
    "use_linear_projection",
}
_MEANINGFUL_NONE = {"attention_head_dim", "mid_block_type", "norm_num_groups"}
_DOWN: dict[str, tuple[AttentionKind, ResampleKind]] = {
    "DownBlock2D": ("none", "conv"),
    "ResnetDownsampleBlock2D": ("none", "resnet"),
    "AttnDownBlock2D": ("self", "conv"),
    "CrossAttnDownBlock2D": ("cross", "conv"),
}
_UP: dict[str, tuple[AttentionKind, ResampleKind]] = {
    "UpBlock2D": ("none", "conv"),
    "ResnetUpsampleBlock2D": ("none", "resnet"),
    "AttnUpBlock2D": ("self", "conv"),
    "CrossAttnUpBlock2D": ("cross", "conv"),
}


def _with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    name = str(config.get("_class_name", "UNet2DConditionModel")).removeprefix("Flax")
    if name not in _DEFAULTS:
        raise CheckpointError(f"{name!r} is not a U-Net of this engine; supported: {', '.join(_DEFAULTS)}")
    defaults = _DEFAULTS[name]
    for option, allowed in _SUPPORTED.items():
        if option in config and config[option] not in allowed and not (config[option] is None and option in defaults):
            values = ", ".join(repr(v) for v in allowed if v is not None)
            raise CheckpointError(
                f"{name}: {option}={config[option]!r} is not supported; supported: {values or 'None'}"
            )
    unknown = {k for k in config if not k.startswith("_")} - set(defaults) - set(_SUPPORTED) - _IRRELEVANT
    if unknown:
        logger.warning("%s: ignored unknown configuration entries: %s", name, ", ".join(sorted(unknown)))
    given = {k: v for k, v in config.items() if v is not None or k in _MEANINGFUL_NONE}
    return defaults | given | {"_class_name": name}


def _read(c: dict[str, Any]) -> UNetConfig:
    name, width = c["_class_name"], c["block_out_channels"]
    levels, groups = len(width), c["norm_num_groups"]
    unconditional = name == "UNet2DModel"
    if groups is None:
        raise CheckpointError(f"{name}: norm_num_groups=None is not supported; expected a number of groups")
    for option in ("down_block_types", "up_block_types"):
        if len(c[option]) != levels and not (option == "up_block_types" and name == "ControlNetModel"):
            raise CheckpointError(f"{name}: {option} has {len(c[option])} entries for {levels} block_out_channels")
    time_dim = c["time_embedding_dim"] or 4 * width[0]
    down, up = _levels(c, "down", _DOWN), _levels(c, "up", _UP)
    middle = _middle(c, down[-1])
    crossed = any(level.attention == "cross" for level in (*down, *up, *([middle] if middle else [])))
    cross_dim = set(_per_level(c["cross_attention_dim"], levels, "cross_attention_dim"))
    if crossed and len(cross_dim) != 1:
        raise CheckpointError(f"{name}: cross_attention_dim differs between levels: {c['cross_attention_dim']}")
    kind, class_dim = _class_embedding(c)
    middle_groups = c["attn_norm_num_groups"] or (groups if c["resnet_time_scale_shift"] == "default" else None)
    added = c.get("addition_embed_type") == "text_time"
    size = c["sample_size"]
    return UNetConfig(
        in_channels=c["in_channels"],
        out_channels=c["out_channels"],
        sample_size=(size, size) if isinstance(size, int) else None if size is None else (size[0], size[1]),
        down=down,
        middle=middle,
        up=up,
        blocks=BlockOptions(
            groups=groups,
            eps=c["norm_eps"],
            time_dim=time_dim,
            scale_shift=c["resnet_time_scale_shift"] == "scale_shift",
            cross_dim=cross_dim.pop() if crossed else None,
            downsample_padding=c["downsample_padding"],
            middle_groups=middle_groups if unconditional else groups,
        ),
        sinusoid_dim=width[0],
        sine_first=not c["flip_sin_to_cos"],
        frequency_shift=c["freq_shift"],
        time_dim=time_dim,
        time_cond_dim=c["time_cond_proj_dim"],
        class_embedding=kind,
        class_dim=class_dim,
        added_time_dim=_needed(c, "addition_time_embed_dim") if added else None,
        added_dim=_needed(c, "projection_class_embeddings_input_dim") if added else 0,
        text_dim=c["encoder_hid_dim"] if crossed else None,
        conv_in_kernel=c["conv_in_kernel"],
        conv_out_kernel=c["conv_out_kernel"],
        center_input=bool(c["center_input_sample"]),
    )


def _levels(c: dict[str, Any], half: str, table: dict[str, tuple[AttentionKind, ResampleKind]]) -> tuple[Level, ...]:
    """The levels of one half in the order they run; upwards everything given per level is reversed."""
    kinds, n = c[f"{half}_block_types"], len(c["block_out_channels"])
    order = range(n) if half == "down" else range(n - 1, -1, -1)
    layers = _per_level(c["layers_per_block"], n, "layers_per_block")
    depths = _per_level(c["transformer_layers_per_block"], n, "transformer_layers_per_block")
    reverse = c["reverse_transformer_layers_per_block"]
    cross_only = _per_level(c["only_cross_attention"], n, "only_cross_attention")
    levels = []
    for position, (kind, i) in enumerate(zip(kinds, order, strict=False)):
        attention, resample = _lookup(table, kind, f"{half}_block_types[{position}]")
        if attention == "self":
            resample = cast(ResampleKind, c[f"{half}sample_type"])
        count = layers[i] + (half == "up")
        depth = reverse[position] if half == "up" and reverse is not None else depths[i]
        levels.append(
            Level(
                channels=c["block_out_channels"][i],
                layers=count,
                attention=attention,
                heads=_heads(c, i, attention),
                depth=_depth(depth, count, half) if attention == "cross" else (),
                cross_only=bool(cross_only[i]),
                resample="none" if position == n - 1 else resample,
            )
        )
    return tuple(levels)


def _middle(c: dict[str, Any], last: Level) -> Level | None:
    kind, i = c["mid_block_type"], len(c["block_out_channels"]) - 1
    if kind is None:
        return None
    if kind == "UNetMidBlock2DCrossAttn":
        depth = _per_level(c["transformer_layers_per_block"], i + 1, "transformer_layers_per_block")[-1]
        depth = depth if isinstance(depth, int) else depth[0]
        return Level(channels=last.channels, layers=1, attention="cross", heads=_heads(c, i, "cross"), depth=(depth,))
    if c["_class_name"] != "UNet2DModel":  # there this block is a single residual block
        return Level(channels=last.channels, layers=0)
    attention: AttentionKind = "self" if c["add_attention"] else "none"
    return Level(channels=last.channels, layers=1, attention=attention, heads=_heads(c, i, attention))


def _heads(c: dict[str, Any], i: int, attention: AttentionKind) -> int:
    """`attention_head_dim` is the number of heads of cross-attention blocks and the head size of the others.

    The misnomer is kept by diffusers because tens of thousands of published configurations carry it.
    """
    channels, n = c["block_out_channels"][i], len(c["block_out_channels"])
    size = _per_level(c["attention_head_dim"], n, "attention_head_dim")[i]
    if attention == "none":
        return 1
    if attention == "cross":
        counts = c["num_attention_heads"] if c["num_attention_heads"] is not None else c["attention_head_dim"]
        heads = _per_level(counts, n, "num_attention_heads")[i] or 8
    else:
        heads = channels // (size or channels)
    if heads < 1 or channels % heads:
        raise CheckpointError(f"{c['_class_name']}: {channels} channels cannot be split into {heads} attention heads")
    return heads


def _class_embedding(c: dict[str, Any]) -> tuple[ClassEmbedding, int]:
    kind = c["class_embed_type"]
    if kind is None:
        return ("none", 0) if c["num_class_embeds"] is None else ("table", c["num_class_embeds"])
    if kind in ("timestep", "identity"):
        return cast(ClassEmbedding, kind), 0
    renamed: ClassEmbedding = "projection" if kind == "projection" else "linear"
    return renamed, _needed(c, "projection_class_embeddings_input_dim")


def _per_level(value: Any, levels: int, option: str) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)):
        return (value,) * levels
    if len(value) != levels:
        raise CheckpointError(f"{option} has {len(value)} entries for {levels} levels: {value}")
    return value


def _depth(value: int | Sequence[int], count: int, half: str) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * count
    if len(value) != count:
        raise CheckpointError(
            f"transformer layers {list(value)} given for a {half} block of {count} layers; a different depth per layer "
            "also needs reverse_transformer_layers_per_block"
        )
    return tuple(value)


def _lookup(
    table: dict[str, tuple[AttentionKind, ResampleKind]], kind: str, option: str
) -> tuple[AttentionKind, ResampleKind]:
    kind = kind.removeprefix("UNetRes")  # spelling of diffusers before 0.3
    if kind not in table:
        raise CheckpointError(f"{option}={kind!r} is not supported; supported: {', '.join(table)}")
    return table[kind]


def _needed(c: dict[str, Any], option: str) -> int:
    if c[option] is None:
        raise CheckpointError(f"{c['_class_name']}: {option} is missing but the other options need it")
    return c[option]
