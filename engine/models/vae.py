"""Autoencoders of images: AutoencoderKL (Rombach et al. 2022) and VQModel (van den Oord et al. 2017)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from .layers import GroupNorm, Image, channels_last
from .unet_blocks import DownBlock, MiddleBlock, Step, UpBlock
from .unet_config import AttentionKind, BlockOptions, Level

logger = logging.getLogger("stepfuse")


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """Structure of an autoencoder and the scale of its latents."""

    in_channels: int
    out_channels: int
    latent_channels: int
    down: tuple[Level, ...]
    up: tuple[Level, ...]
    middle: Level
    blocks: BlockOptions
    scaling_factor: float
    shift_factor: float
    latents_mean: tuple[float, ...] | None
    latents_std: tuple[float, ...] | None
    force_upcast: bool  # not to be run in float16: activations overflow
    quant_conv: bool = True
    post_quant_conv: bool = True
    codes: int = 0  # vectors in the codebook of a VQModel; 0 for AutoencoderKL
    code_dim: int = 0

    @property
    def factor(self) -> int:
        """Pixels per latent in each direction."""
        return 2 ** (len(self.down) - 1)

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> VAEConfig:
        """Read a `config.json` of AutoencoderKL or VQModel. Raises CheckpointError for a structure not built here."""
        name = str(config.get("_class_name", "AutoencoderKL")).removeprefix("Flax")
        if name not in _DEFAULTS:
            raise CheckpointError(f"{name!r} is not an autoencoder of this engine; supported: {', '.join(_DEFAULTS)}")
        for option, allowed in _SUPPORTED.items():
            if config.get(option, allowed[0]) not in allowed:
                values = ", ".join(map(repr, allowed))
                raise CheckpointError(f"{name}: {option}={config[option]!r} is not supported; supported: {values}")
        unknown = {k for k in config if not k.startswith("_")} - set(_DEFAULTS[name]) - set(_SUPPORTED) - _IRRELEVANT
        if unknown:
            logger.warning("%s: ignored unknown configuration entries: %s", name, ", ".join(sorted(unknown)))
        c = _DEFAULTS[name] | {k: v for k, v in config.items() if v is not None}
        widths, layers, quantised = c["block_out_channels"], c["layers_per_block"], name == "VQModel"
        if c["lookup_from_codebook"]:
            raise CheckpointError(f"{name}: lookup_from_codebook=True is not supported")
        attention: AttentionKind = "self" if c["mid_block_add_attention"] else "none"
        return cls(
            in_channels=c["in_channels"],
            out_channels=c["out_channels"],
            latent_channels=c["latent_channels"],
            down=_levels(c["down_block_types"], widths, layers, "Down"),
            up=_levels(c["up_block_types"], widths[::-1], layers + 1, "Up"),
            middle=Level(channels=widths[-1], layers=1, attention=attention),
            blocks=BlockOptions(
                groups=c["norm_num_groups"], eps=1e-6, downsample_padding=0, middle_groups=c["norm_num_groups"]
            ),
            scaling_factor=c["scaling_factor"],
            shift_factor=c["shift_factor"],
            latents_mean=_optional_tuple(c["latents_mean"]),
            latents_std=_optional_tuple(c["latents_std"]),
            force_upcast=bool(c["force_upcast"]),
            quant_conv=bool(c["use_quant_conv"]),
            post_quant_conv=bool(c["use_post_quant_conv"]),
            codes=c["num_vq_embeddings"] if quantised else 0,
            code_dim=(c["vq_embed_dim"] or c["latent_channels"]) if quantised else 0,
        )


@dataclass(frozen=True)
class Gaussian:
    """A diagonal normal distribution of latents."""

    mean: Tensor  # [R, C, h, w]
    logvar: Tensor  # [R, C, h, w], logarithm of the variance, in -30..20

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std * noise for standard normal noise [R, C, h, w]."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise


class Encoder(nn.Module):
    """From images to the moments of the latents."""

    def __init__(self, config: VAEConfig, out_channels: int) -> None:
        super().__init__()
        c, width = config, config.down[0].channels
        self.conv_in = nn.Conv2d(c.in_channels, width, 3, padding=1)
        widths = [width] + [level.channels for level in c.down]
        self.down_blocks = nn.ModuleList(
            DownBlock(w, level, c.blocks) for w, level in zip(widths, c.down, strict=False)
        )
        self.mid_block = MiddleBlock(c.middle, c.blocks)
        self.conv_norm_out = GroupNorm(c.middle.channels, c.blocks.groups, c.blocks.eps)
        self.conv_out = nn.Conv2d(c.middle.channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x: [R, 3, H, W] in -1..1; returns [R, out_channels, H / factor, W / factor]."""
        image, step = Image(self.conv_in(channels_last(x))), Step()
        for block in self.down_blocks:
            image, _ = block(image, step)
        return self.conv_out(self.conv_norm_out(self.mid_block(image, step)))


class Decoder(nn.Module):
    """From latents to images."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        c = config
        self.conv_in = nn.Conv2d(c.latent_channels, c.middle.channels, 3, padding=1)
        self.mid_block = MiddleBlock(c.middle, c.blocks)
        widths = [c.middle.channels] + [level.channels for level in c.up]
        self.up_blocks = nn.ModuleList(UpBlock(w, [], level, c.blocks) for w, level in zip(widths, c.up, strict=False))
        self.conv_norm_out = GroupNorm(c.up[-1].channels, c.blocks.groups, c.blocks.eps)
        self.conv_out = nn.Conv2d(c.up[-1].channels, c.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """z: [R, C, h, w]; returns [R, 3, h * factor, w * factor]."""
        step = Step()
        x = self.mid_block(Image(self.conv_in(channels_last(z))), step)
        for block in self.up_blocks:
            x = block(x, step, [])
        return self.conv_out(self.conv_norm_out(x))


class AutoencoderKL(nn.Module):
    """Continuous latents. `encode` and `decode` work in the autoencoder's own scale: see `to_model`, `from_model`."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config, channels = config, config.latent_channels
        self.encoder = Encoder(config, 2 * channels)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1) if config.quant_conv else None
        self.post_quant_conv = nn.Conv2d(channels, channels, 1) if config.post_quant_conv else None

    def encode(self, images: Tensor) -> Gaussian:
        """images: [R, 3, H, W] in -1..1, sides divisible by `config.factor`."""
        moments = self.encoder(images)
        mean, logvar = (moments if self.quant_conv is None else self.quant_conv(moments)).chunk(2, 1)
        return Gaussian(mean, logvar.clamp(-30.0, 20.0))

    def decode(self, latents: Tensor) -> Tensor:
        """latents: [R, C, h, w]; returns images [R, 3, H, W], about -1..1, not clamped."""
        return self.decoder(latents if self.post_quant_conv is None else self.post_quant_conv(channels_last(latents)))


class VQModel(nn.Module):
    """Latents that snap to the nearest vector of a codebook before they are decoded."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config, channels = config, config.latent_channels
        self.encoder = Encoder(config, channels)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(channels, config.code_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.code_dim, channels, 1)
        self.quantize = Codebook(config.codes, config.code_dim)

    def encode(self, images: Tensor) -> Tensor:
        """images: [R, 3, H, W] in -1..1; returns latents [R, C, h, w] before they snap."""
        return self.quant_conv(self.encoder(images))

    def decode(self, latents: Tensor, quantize: bool = True) -> Tensor:
        """latents: [R, C, h, w]; returns images [R, 3, H, W], not clamped."""
        return self.decoder(self.post_quant_conv(channels_last(self.quantize(latents) if quantize else latents)))


class Codebook(nn.Module):
    """Nearest vector of a table."""

    def __init__(self, codes: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codes, dim)

    def forward(self, z: Tensor) -> Tensor:
        """z: [R, dim, h, w]; returns the nearest code of every site, in the same shape."""
        sites = z.permute(0, 2, 3, 1)
        nearest = torch.cdist(sites.reshape(-1, sites.shape[-1]), self.embedding.weight).argmin(1)
        return self.embedding(nearest).view(sites.shape).permute(0, 3, 1, 2)


def to_model(latents: Tensor, config: VAEConfig) -> Tensor:
    """The autoencoder's latents [R, C, h, w] in the unit-variance scale of the diffusion model."""
    if config.latents_mean is None or config.latents_std is None:
        return (latents - config.shift_factor) * config.scaling_factor
    mean, std = _channels(config.latents_mean, latents), _channels(config.latents_std, latents)
    return (latents - mean) * (config.scaling_factor / std)


def from_model(latents: Tensor, config: VAEConfig) -> Tensor:
    """The diffusion model's latents [R, C, h, w] in the scale `decode` takes: the inverse of `to_model`."""
    if config.latents_mean is None or config.latents_std is None:
        return latents / config.scaling_factor + config.shift_factor
    mean, std = _channels(config.latents_mean, latents), _channels(config.latents_std, latents)
    return latents * (std / config.scaling_factor) + mean


_DEFAULTS: dict[str, dict[str, Any]] = {}
_DEFAULTS["AutoencoderKL"] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
    "shift_factor": 0.0,
    "latents_mean": None,
    "latents_std": None,
    "force_upcast": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
    "lookup_from_codebook": False,
}
_DEFAULTS["VQModel"] = _DEFAULTS["AutoencoderKL"] | {
    "latent_channels": 3,
    "num_vq_embeddings": 256,
    "vq_embed_dim": None,
    "force_upcast": False,
}
_SUPPORTED: dict[str, tuple[str, ...]] = {"act_fn": ("silu", "swish"), "norm_type": ("group",)}
_IRRELEVANT = {"sample_size"}


def _levels(kinds: list[str], widths: list[int], layers: int, half: str) -> tuple[Level, ...]:
    coder = {"Down": "DownEncoderBlock2D", "Up": "UpDecoderBlock2D"}[half]
    table: dict[str, AttentionKind] = {coder: "none", f"Attn{coder}": "self"}
    if len(kinds) != len(widths):
        raise CheckpointError(
            f"{half.lower()}_block_types has {len(kinds)} entries for {len(widths)} block_out_channels"
        )
    levels = []
    for i, (kind, width) in enumerate(zip(kinds, widths, strict=True)):
        if kind not in table:
            option = f"{half.lower()}_block_types[{i}]"
            raise CheckpointError(f"{option}={kind!r} is not supported; supported: {', '.join(table)}")
        resample = "none" if i == len(widths) - 1 else "conv"
        levels.append(Level(channels=width, layers=layers, attention=table[kind], resample=resample))
    return tuple(levels)


def _optional_tuple(values: list[float] | None) -> tuple[float, ...] | None:
    return None if values is None else tuple(values)


def _channels(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None, None]
