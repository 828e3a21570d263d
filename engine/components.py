"""The parts of a loaded checkpoint, on their device, ready to run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .conditioning import text as clip
from .config import ResolvedConfig
from .errors import CheckpointError, RequestError
from .families import Family
from .loras import RowLoRAs
from .models.adapted import Adapted
from .models.controlled import Controlled
from .models.controlnet import ControlNet
from .models.unet import UNet
from .runtimes.networks import Autoencoder, Binding, DenoiserNetwork
from .runtimes.user_network import UserNetwork
from .sampling.scheduler_config import SchedulerConfig
from .sampling.update import Plan

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
        return image_channels(self.family, taken) if self.vae is None else self.vae.config.latent_channels

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
        if controls not in self._adapted:
            network = self.network(controls)
            assert isinstance(network, UNet | Controlled)
            self._adapted[controls] = Adapted(network, self.loras.chosen)
        return self._adapted[controls]

    def network_binders(self, controls: tuple[str, ...] = ()) -> list[Binding]:
        """The op sites of `network`."""
        return [self.binders[part] for part in ("unet", *map(control_binder, controls))]

    @cached_property
    def _adapted(self) -> dict[tuple[str, ...], Adapted]:
        return {}

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


def image_channels(family: Family, taken: int) -> int:
    """Channels of the images of a pixel model that takes so many: an upscaler takes two images."""
    return taken // 2 if family.enlarges else taken


def control_binder(name: str) -> str:
    """The key of a ControlNet among the binders."""
    return f"controlnets[{name!r}]"


def short(dtype: torch.dtype | None) -> str:
    """A dtype without `torch.`."""
    return str(dtype).removeprefix("torch.")
