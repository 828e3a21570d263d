"""The parts of a loaded checkpoint, on their device, ready to run."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .binding import Binder
from .conditioning import text as clip
from .config import EngineConfig, ResolvedConfig, resolve
from .controls import ControlNetFile
from .errors import CheckpointError, RequestError
from .families import BUILTIN, Family, builtin_folder, family_of
from .models.controlled import Controlled
from .models.controlnet import ControlNet
from .models.transforms import check_transforms, transform
from .models.unet import UNet
from .models.unet_config import UNetConfig
from .models.vae import AutoencoderKL, VAEConfig
from .runtimes.networks import Autoencoder, Binding, DenoiserNetwork
from .runtimes.user_network import UserNetwork
from .sampling.scheduler_config import SchedulerConfig
from .sampling.update import Plan
from .weights.checkpoint import Checkpoint
from .weights.detect import detect
from .weights.load import check_weights, load_weights
from .weights.maps import MAPS

logger = logging.getLogger("stepfuse")

DEFAULTS_FILE = "stepfuse.json"
"""Optional file beside model_index.json: steps, guidance_scale, sampler, width, height, noise_level that suit it."""
DEFAULTS = ("steps", "guidance_scale", "sampler", "width", "height", "noise_level")


@dataclass(frozen=True, eq=False)
class LowResolution:
    """How an upscaler's small image is noised: the scheduler of its levels, and the highest it was trained on."""

    scheduler: SchedulerConfig
    highest: int | None


@dataclass(frozen=True, eq=False)
class Components:
    """Everything a request needs: networks, tokenizers, the scheduler's settings and the family's habits.

    zero_negative: negative_prompt=None is a zero embedding instead of the empty prompt. binders: the op sites of the
    denoiser, the VAE and every ControlNet. controlnets: by the name requests call them. low_resolution: of an upscaler.
    """

    name: str
    family: Family
    config: ResolvedConfig
    denoiser: DenoiserNetwork
    scheduler: SchedulerConfig
    text: tuple[clip.TextEncoder, ...]
    vae: Autoencoder | None
    zero_negative: bool
    defaults: Mapping[str, Any]
    binders: Mapping[str, Binding]
    controlnets: Mapping[str, ControlNet] = field(default_factory=dict)
    low_resolution: LowResolution | None = None

    @property
    def scale(self) -> int:
        """Pixels per latent site along one side."""
        return 1 if self.vae is None else self.vae.config.factor

    @property
    def channels(self) -> int:
        """Channels of the latents; a denoiser that is given more takes more."""
        return self.denoiser.config.in_channels if self.vae is None else self.vae.config.latent_channels

    @property
    def user(self) -> UserNetwork | None:
        """The denoiser where it is a network of the user's, whose samples are of any shape."""
        return self.denoiser if isinstance(self.denoiser, UserNetwork) else None

    @property
    def unet(self) -> UNet:
        """The denoiser with its weights within reach. Raises RequestError where it is an exported network."""
        if not isinstance(self.denoiser, UNet):
            raise RequestError(
                f"runtime={self.config.runtime!r} runs exported networks, whose weights are fixed: load the checkpoint "
                "with runtime='torch' for this"
            )
        return self.denoiser

    def times(self, plan: Plan) -> Tensor:
        """What `prepare` of the network is told of the updates: float32 [U], or as a network of the user's has it."""
        times = torch.tensor(plan.timesteps, dtype=torch.float32) if self.user is None else self.user.times(plan)
        return times.to(self.config.device)

    def network(self, controls: tuple[str, ...] = ()) -> DenoiserNetwork | Controlled:
        """What rows with these ControlNets run through; without any, the denoiser."""
        if not controls:
            return self.denoiser
        if controls not in self._controlled:
            self._controlled[controls] = Controlled(self.unet, [self.controlnets[name] for name in controls])
        return self._controlled[controls]

    def network_binders(self, controls: tuple[str, ...] = ()) -> list[Binding]:
        """The op sites of `network`."""
        return [self.binders[part] for part in ("unet", *map(control_binder, controls))]

    @cached_property
    def _controlled(self) -> dict[tuple[str, ...], Controlled]:
        return {}

    def explain(self) -> str:
        """What was loaded, on what, and which implementation every op uses and why."""
        c = self.config
        lines = [
            f"{self.name}: {self.family.summary}",
            f"device {c.device}, runtime {c.runtime}, denoiser {short(c.dtype)}, VAE {short(c.vae_dtype)}, "
            f"at most {c.max_rows} rows",
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
    assert config.runtime == "torch", "loading.py loads artefacts"
    folder = builtin_folder(str(source)) if str(source) in BUILTIN else source
    checkpoint = Checkpoint.open(folder, variant=config.variant, download=config.download)
    family = family_of(detect(checkpoint).architecture)
    vae_config = VAEConfig.from_diffusers(checkpoint.config("vae")) if family.latent else None
    resolved = resolve(config, vae_force_upcast=vae_config is not None and vae_config.force_upcast)
    scheduler = SchedulerConfig.from_diffusers(checkpoint.config("scheduler"))
    defaults = read_defaults(checkpoint.root)
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
    low_resolution = _low_resolution(checkpoint) if family.beside == "low_resolution" else None
    check_transforms(resolved.transforms)
    _load(checkpoint, modules, resolved)
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
        zero_negative=zero_negative(family, checkpoint.options),
        defaults=defaults,
        binders=binders,
        controlnets=controlnets,
        low_resolution=low_resolution,
    )


def _low_resolution(checkpoint: Checkpoint) -> LowResolution:
    scheduler = SchedulerConfig.from_diffusers(checkpoint.config("low_res_scheduler"))
    return LowResolution(scheduler, checkpoint.options.get("max_noise_level"))


def control_binder(name: str) -> str:
    """The key of a ControlNet among the binders."""
    return f"controlnets[{name!r}]"


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


def zero_negative(family: Family, settings: Mapping[str, Any]) -> bool:
    """Whether no negative prompt is a zero embedding; settings: of model_index.json."""
    return family.text == "penultimate" and bool(settings.get("force_zeros_for_empty_prompt", True))


def read_defaults(root: Path) -> dict[str, Any]:
    """What suits the checkpoint, as it says itself."""
    path = root / DEFAULTS_FILE
    if not path.exists():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    return {name: found[name] for name in DEFAULTS if name in found}


def short(dtype: torch.dtype | None) -> str:
    """A dtype without `torch.`."""
    return str(dtype).removeprefix("torch.")
