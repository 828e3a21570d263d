"""What `Engine.load` builds: the parts of a checkpoint, or of an artefact for the runtimes that execute graphs."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .artifact import Graph
from .binding import Binder
from .components import (
    DEFAULTS,
    DEFAULTS_FILE,
    NOISING,
    Components,
    LowResolution,
    control_binder,
    image_channels,
    short,
)
from .conditioning import text as clip
from .config import EngineConfig, ResolvedConfig, resolve, resolve_dtype, resolve_runtime
from .controls import ControlNetFile
from .errors import CheckpointError, RequestError
from .families import BUILTIN, Family, builtin_folder, family_of
from .loras import RowLoRAs, read_row_loras
from .models.transforms import check_transforms, transform
from .models.unet import UNet
from .models.unet_config import UNetConfig
from .models.vae import AutoencoderKL, VAEConfig
from .runtimes.exported import FixedKernels
from .runtimes.opened import Opened, require_checkpoint
from .sampling.scheduler_config import SchedulerConfig
from .weights.checkpoint import Checkpoint
from .weights.detect import detect
from .weights.load import check_weights, load_weights
from .weights.maps import MAPS

logger = logging.getLogger("stepfuse")


def load(source: str | Path, config: EngineConfig) -> Components:
    """The parts of a checkpoint (`load_components`) or, for a runtime other than "torch", of an artefact.

    Raises CheckpointError for a checkpoint where an artefact is needed and the other way round, and as
    `load_components`; RequestError for options that exported networks cannot honour.
    """
    if resolve_runtime(config.runtime) == "torch":
        if str(source) not in BUILTIN:
            require_checkpoint(source)
        return load_components(source, config)
    return _load_artifact(source, config)


def load_components(source: str | Path, config: EngineConfig) -> Components:
    """Load a built-in name, a diffusers folder or a cached hub id.

    The structure of every part is checked before memory on the device is taken. Raises CheckpointError for anything
    missing, extra or unknown; DeviceError / RequestError for options this machine cannot honour.
    """
    assert config.runtime == "torch", "loading.py loads artefacts"
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
    files = _controlnet_files(config, modules)
    low_resolution = _low_resolution(checkpoint, modules["unet"], defaults) if family.enlarges else None
    loras = read_row_loras(config.loras)
    check_transforms(resolved.transforms)
    _load(checkpoint, modules, resolved)
    adapted = {name: module for name, module in modules.items() if name != "vae"}
    controlnets = {name: file.load(resolved) for name, file in files.items()}
    binders = {name: Binder(modules[name], resolved) for name in ("unet", "vae") if name in modules}
    binders |= {control_binder(name): Binder(net, resolved) for name, net in controlnets.items()}
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
        zero_negative=_zero_negative(family, checkpoint.options),
        defaults=defaults,
        binders=binders,
        controlnets=controlnets,
        low_resolution=low_resolution,
        loras=RowLoRAs(loras, adapted),
    )


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
    made, own = unet.config.out_channels, image_channels(family, unet.config.in_channels)
    what = "the images have"
    if isinstance(vae, AutoencoderKL):
        own, what = vae.config.latent_channels, "the VAE has"
    if made not in (own, 2 * own):  # twice as many: a learned variance
        raise CheckpointError(
            f"{what} {own} channels, the denoiser predicts {made}; expected {own}, or {2 * own} with a learned "
            "variance: mixed checkpoints?"
        )


def _low_resolution(checkpoint: Checkpoint, unet: nn.Module, defaults: Mapping[str, Any]) -> LowResolution | None:
    """Raises CheckpointError where an upscaler is told levels, but nothing says what they are."""
    assert isinstance(unet, UNet)
    tops = [checkpoint.options.get("max_noise_level")]
    tops += [unet.config.class_dim - 1] if unet.config.class_embedding == "table" else []
    highest = min((top for top in tops if top is not None), default=None)
    per_level = defaults.get("blur_per_level")
    if per_level is not None:
        if isinstance(per_level, bool) or not isinstance(per_level, (int, float)) or not 0 < per_level < math.inf:
            raise CheckpointError(f"{DEFAULTS_FILE}: blur_per_level: got {per_level!r}, expected pixels above 0")
        return LowResolution(None, highest, per_level)
    found = next((name for name in NOISING if name in checkpoint.components), None)
    if found is None and "vae" not in checkpoint.components and unet.config.class_embedding in ("none", "table"):
        return None
    if found is None:
        raise CheckpointError(
            f"{checkpoint.root}: an upscaler that is told a level of noise, without a {' or '.join(NOISING)}; add "
            f"one, or blur_per_level to {DEFAULTS_FILE}"
        )
    return LowResolution(SchedulerConfig.from_diffusers(checkpoint.config(found)), highest)


def _controlnet_files(config: EngineConfig, modules: Mapping[str, nn.Module]) -> dict[str, ControlNetFile]:
    """The ControlNets of the configuration, checked against the denoiser."""
    unet, vae = modules["unet"], modules.get("vae")
    assert isinstance(unet, UNet)
    channels, scale = unet.config.in_channels, 1
    if isinstance(vae, AutoencoderKL):
        channels, scale = vae.config.latent_channels, vae.config.factor
    how: dict[str, Any] = {"variant": config.variant, "download": config.download}
    return {
        name: ControlNetFile(name, source, unet.config, channels=channels, scale=scale, **how)
        for name, source in config.controlnets.items()
    }


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


def _load_artifact(source: str | Path, config: EngineConfig) -> Components:
    opened = Opened(source, config.runtime)
    family = family_of(opened.manifest.architecture or f"one part of a checkpoint ({opened.folder})")
    graphs = _graphs(opened, family)
    resolved = resolve(replace(config, **_dtypes(config, opened, graphs)))
    device, kernels = resolved.device, FixedKernels(_summary(opened))
    return Components(
        name=str(source),
        family=family,
        config=resolved,
        denoiser=opened.denoiser(device),
        scheduler=SchedulerConfig.from_diffusers(opened.config("scheduler")),
        text=tuple(
            clip.TextEncoder(
                opened.text_model(name, device),
                clip.load_tokenizer(opened.folder / name.replace("text_encoder", "tokenizer")),
                family.text == "penultimate",
                bool(opened.config(name).get("use_attention_mask", False)),
            )
            for name in graphs
            if name.startswith("text_encoder")
        ),
        vae=opened.vae(device) if family.latent else None,
        zero_negative=_zero_negative(family, opened.manifest.settings),
        defaults=_read_defaults(opened.folder),
        binders={"unet": kernels, "vae": kernels} if family.latent else {"unet": kernels},
        artifact_bytes=opened.bytes([*graphs, "vae_encoder"]),
    )


def _graphs(opened: Opened, family: Family) -> dict[str, Graph]:
    """The graphs a request needs. Raises CheckpointError for one that was not exported."""
    names = ["unet", "vae_decoder"] if family.latent else ["unet"]
    if family.text != "none":
        names += [name for name in ("text_encoder", "text_encoder_2") if name in opened.manifest.components]
    return {name: opened.manifest.graph(name) for name in names}


def _dtypes(config: EngineConfig, opened: Opened, graphs: dict[str, Graph]) -> dict[str, Any]:
    """The dtypes of the graphs. Raises RequestError where the configuration asks for others."""
    owners = {"dtype": "unet", "vae_dtype": "vae_decoder" if "vae_decoder" in graphs else "unet"}
    made = {option: resolve_dtype(option, graphs[name].dtype) for option, name in owners.items()}
    for option, name in owners.items():
        asked = resolve_dtype(option, getattr(config, option))
        if asked not in (None, made[option]):
            raise RequestError(
                f"{option}: got {short(asked)}, the {name} of {opened.folder} is {graphs[name].dtype}: leave it out, "
                "or export with another --dtype"
            )
    return made


def _summary(opened: Opened) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in sorted(opened.manifest.versions.items()))
    return f"{opened.manifest.kind} graph run by {opened.runtime}; its kernels were chosen by the export ({versions})"


def _zero_negative(family: Family, settings: Mapping[str, Any]) -> bool:
    """Whether no negative prompt is a zero embedding; settings: of model_index.json."""
    return family.text == "penultimate" and bool(settings.get("force_zeros_for_empty_prompt", True))


def _read_defaults(root: Path) -> dict[str, Any]:
    """What suits the checkpoint, as it says itself."""
    path = root / DEFAULTS_FILE
    if not path.exists():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    return {name: found[name] for name in DEFAULTS if name in found}
