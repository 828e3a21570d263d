"""The parts of a loaded checkpoint, on their device, ready to run."""

from __future__ import annotations

import json
import logging
import math
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
from .loras import RowLoRAs, read_row_loras
from .models.adapted import Adapted
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
"""Optional file beside model_index.json: steps, guidance_scale, sampler, width, height, noise_level that suit it, and
what it was trained with: null_class, the class that stands for none; blur_per_level, as of LowResolution."""
DEFAULTS = ("steps", "guidance_scale", "sampler", "width", "height", "noise_level", "null_class", "blur_per_level")
NOISING = ("low_res_scheduler", "image_noising_scheduler")
"""Names of the scheduler of an upscaler's low-resolution image in diffusers' folders."""


@dataclass(frozen=True, eq=False)
class LowResolution:
    """How an upscaler's low-resolution image is augmented at the levels that the network is told.

    scheduler: of the noise; None where a level is a Gaussian blur of `blur_per_level` pixels, without noise. highest:
    the highest level it was trained on; None: all of the scheduler's.
    """

    scheduler: SchedulerConfig | None
    highest: int | None
    blur_per_level: float | None = None


@dataclass(frozen=True, eq=False)
class Components:
    """Everything a request needs: networks, tokenizers, the scheduler's settings and the family's habits.

    zero_negative: negative_prompt=None is a zero embedding instead of the empty prompt. binders: the op sites of the
    denoiser, the VAE and every ControlNet. controlnets: by the name requests call them. low_resolution: of an upscaler;
    None for one that takes the image as it is. loras: what requests may choose from. artifact_bytes: of the files of an
    artefact's graphs, whose weights are within nobody's reach.
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
    loras: RowLoRAs = field(default_factory=RowLoRAs)
    artifact_bytes: int = 0

    @property
    def scale(self) -> int:
        """Pixels per latent site along one side."""
        return 1 if self.vae is None else self.vae.config.factor

    @property
    def channels(self) -> int:
        """Channels of the latents; a denoiser that is given more takes more."""
        taken = self.denoiser.config.in_channels
        return _image_channels(self.family, taken) if self.vae is None else self.vae.config.latent_channels

    @property
    def classes(self) -> int:
        """Classes a request chooses from; 0: none, also where the network is told a noise level in their place."""
        return 0 if self.augments or self.denoiser.config.class_embedding != "table" else self.denoiser.config.class_dim

    @property
    def augments(self) -> bool:
        """Whether it is an upscaler with levels of noise or blur; one of pixels may take its image as it is."""
        return self.family.enlarges and (self.low_resolution is not None or self.vae is not None)

    @property
    def null_class(self) -> int | None:
        """The class that stands for none, which guidance leads away from. Raises CheckpointError for no class of it."""
        label = self.defaults.get("null_class")
        if label is not None and not (type(label) is int and 0 <= label < self.classes):
            raise CheckpointError(
                f"{self.name}: {DEFAULTS_FILE}: null_class: got {label!r}, expected one of its {self.classes} classes"
            )
        return label

    @property
    def guided(self) -> bool:
        """Whether guidance is a second branch of its rows."""
        away = self.family.text != "none" or self.null_class is not None
        return away and self.denoiser.config.time_cond_dim is None

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

    def adapted(self, controls: tuple[str, ...] = ()) -> Adapted:
        """What rows with LoRAs and these ControlNets run through."""
        network = self.network(controls)
        assert isinstance(network, UNet | Controlled)
        return Adapted(network, self.loras.chosen)

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
            *([self.loras.explain()] if self.loras.names else []),
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
        zero_negative=zero_negative(family, checkpoint.options),
        defaults=defaults,
        binders=binders,
        controlnets=controlnets,
        low_resolution=low_resolution,
        loras=RowLoRAs(loras, adapted),
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


def _image_channels(family: Family, taken: int) -> int:
    """Channels of the images of a pixel model that takes so many: an upscaler takes two images."""
    return taken // 2 if family.enlarges else taken


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
    made, own = unet.config.out_channels, _image_channels(family, unet.config.in_channels)
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
