"""The parts of a loaded checkpoint, on their device, ready to run."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .binding import Binder
from .conditioning import text as clip
from .config import EngineConfig, ResolvedConfig, resolve
from .errors import CheckpointError
from .families import BUILTIN, Family, builtin_folder, family_of
from .models.transforms import check_transforms, transform
from .models.unet import UNet
from .models.unet_config import UNetConfig
from .models.vae import AutoencoderKL, VAEConfig
from .sampling.scheduler_config import SchedulerConfig
from .weights.checkpoint import Checkpoint
from .weights.detect import detect
from .weights.load import check_weights, load_weights
from .weights.maps import MAPS

logger = logging.getLogger("stepfuse")

DEFAULTS_FILE = "stepfuse.json"
"""Optional file beside model_index.json: steps, guidance_scale, sampler, width, height that suit the checkpoint."""
DEFAULTS = ("steps", "guidance_scale", "sampler", "width", "height")


@dataclass(frozen=True, eq=False)
class Components:
    """Everything a request needs: networks, tokenizers, the scheduler's settings and the family's habits.

    zero_negative: negative_prompt=None is a zero embedding instead of the empty prompt. binders: the op sites of the
    denoiser and the VAE.
    """

    name: str
    family: Family
    config: ResolvedConfig
    denoiser: UNet
    scheduler: SchedulerConfig
    text: tuple[clip.TextEncoder, ...]
    vae: AutoencoderKL | None
    zero_negative: bool
    defaults: Mapping[str, Any]
    binders: Mapping[str, Binder]

    @property
    def scale(self) -> int:
        """Pixels per latent site along one side."""
        return 1 if self.vae is None else self.vae.config.factor

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        return self.denoiser.config.in_channels

    def explain(self) -> str:
        """What was loaded, on what, and which implementation every op uses and why."""
        c = self.config
        lines = [
            f"{self.name}: {self.family.summary}",
            f"device {c.device}, denoiser {_short(c.dtype)}, VAE {_short(c.vae_dtype)}, at most {c.max_rows} rows",
            f"sampler {self.scheduler.sampler}, defaults {dict(self.defaults) or 'of the family'}",
        ]
        for part, binder in self.binders.items():
            lines += [f"{part}:", *(f"  {line}" for line in binder.explain().splitlines())]
        return "\n".join(lines)


def load_components(source: str | Path, config: EngineConfig) -> Components:
    """Load a built-in name, a diffusers folder or a cached hub id.

    The structure of every part is checked before memory on the device is taken. Raises CheckpointError for anything
    missing, extra or unknown; DeviceError / RequestError for options this machine cannot honour.
    """
    folder = builtin_folder(str(source)) if str(source) in BUILTIN else source
    checkpoint = Checkpoint.open(folder, variant=config.variant, download=config.download)
    family = family_of(detect(checkpoint).architecture)
    vae_config = VAEConfig.from_diffusers(checkpoint.config("vae")) if family.latent else None
    resolved = resolve(config, vae_force_upcast=vae_config is not None and vae_config.force_upcast)
    scheduler = SchedulerConfig.from_diffusers(checkpoint.config("scheduler"))
    defaults = _read_defaults(checkpoint.root)
    modules: dict[str, nn.Module] = {}
    with torch.device("meta"):
        modules["unet"] = UNet(UNetConfig.from_diffusers(checkpoint.config("unet")))
        if vae_config is not None:
            modules["vae"] = AutoencoderKL(vae_config)
    encoders = [name for name in ("text_encoder", "text_encoder_2") if name in checkpoint.components]
    for name in encoders if family.text != "none" else ():
        modules[name] = clip.build_model(checkpoint.components[name], checkpoint.config(name))
    _check_parts(family, modules, checkpoint)
    check_transforms(resolved.transforms)
    _load(checkpoint, modules, resolved)
    binders = {name: Binder(modules[name], resolved) for name in ("unet", "vae") if name in modules}
    text = tuple(_text_encoder(checkpoint, family, name, modules[name]) for name in encoders if name in modules)
    if "safety_checker" in checkpoint.components:
        logger.warning(
            "%s: its safety_checker is not run; pass EngineConfig(safety=...) for a check of your own", source
        )
    return Components(
        name=str(source),
        family=family,
        config=resolved,
        denoiser=modules["unet"],  # type: ignore[arg-type]
        scheduler=scheduler,
        text=text,
        vae=modules.get("vae"),  # type: ignore[arg-type]
        zero_negative=family.text == "penultimate"
        and bool(checkpoint.options.get("force_zeros_for_empty_prompt", True)),
        defaults=defaults,
        binders=binders,
    )


def _load(checkpoint: Checkpoint, modules: Mapping[str, nn.Module], config: ResolvedConfig) -> None:
    """Read every part's weights; names and shapes of all parts are compared first."""
    stored = {name: checkpoint.weights(name) for name in modules}
    maps = {name: MAPS[checkpoint.components[name].removeprefix("Flax")] for name in modules}
    for name, module in modules.items():
        check_weights(module, stored[name], maps[name], name)
    for name, module in modules.items():
        dtype = config.vae_dtype if name == "vae" else config.dtype
        load_weights(module, stored[name], maps[name], device=config.device, dtype=dtype, what=name)
        if name in ("unet", "vae"):
            transform(module, config.transforms)


def _text_encoder(checkpoint: Checkpoint, family: Family, name: str, module: nn.Module) -> clip.TextEncoder:
    tokenizer = clip.load_tokenizer(checkpoint.folder(name.replace("text_encoder", "tokenizer")))
    masked = bool(checkpoint.config(name).get("use_attention_mask", False))
    return clip.TextEncoder(module, tokenizer, family.text == "penultimate", masked)


def _check_parts(family: Family, modules: Mapping[str, nn.Module], checkpoint: Checkpoint) -> None:
    """The parts must fit each other: prompt width, and channels of the latents and of the prediction."""
    unet, vae = modules["unet"], modules.get("vae")
    assert isinstance(unet, UNet)
    encoders: list[Any] = [module for name, module in modules.items() if name.startswith("text_encoder")]
    if family.text != "none" and not encoders:
        raise CheckpointError(f"{checkpoint.root}: no text encoder in model_index.json, but {family.name} needs one")
    width = sum(encoder.config.hidden_size for encoder in encoders)
    expected = unet.config.text_dim or unet.config.blocks.cross_dim
    if encoders and width != expected:
        raise CheckpointError(f"text encoders give {width} features, the denoiser takes {expected}: mixed checkpoints?")
    made, own = unet.config.out_channels, unet.config.in_channels
    what = "the images have"
    if isinstance(vae, AutoencoderKL):
        own, what = vae.config.latent_channels, "the VAE has"
    if made not in (own, 2 * own):  # twice as many: a learned variance
        raise CheckpointError(
            f"{what} {own} channels, the denoiser predicts {made}; expected {own}, or {2 * own} with a learned "
            "variance: mixed checkpoints?"
        )


def _read_defaults(root: Path) -> dict[str, Any]:
    path = root / DEFAULTS_FILE
    if not path.exists():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    return {name: found[name] for name in DEFAULTS if name in found}


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
