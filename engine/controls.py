"""ControlNets beside a checkpoint: loaded with it, checked in requests, and what their rows are prepared from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .conditioning.images import load_image, resize
from .config import ResolvedConfig
from .errors import CheckpointError, RequestError, closest
from .families import BUILTIN_CONTROLNETS, builtin_folder
from .models.controlled import Controlled, ControlledPrepared
from .models.controlnet import ControlNet, ControlNetConfig
from .models.transforms import transform
from .models.unet import Conditioning
from .models.unet_config import UNetConfig
from .request import Control
from .weights.checkpoint import Checkpoint
from .weights.load import check_weights, load_weights
from .weights.maps import MAPS

CLASS = "ControlNetModel"


class ControlNetFile:
    """A ControlNet whose structure and tensors were found to fit the U-Net; nothing of it is loaded yet."""

    def __init__(
        self,
        name: str,
        source: str | Path,
        unet: UNetConfig,
        *,
        channels: int,
        scale: int,
        variant: str | None = None,
        download: bool = False,
    ) -> None:
        """source: built-in name, folder or hub id of a ControlNet, or of a pipeline that has one. channels: of the
        latents; scale: pixels per latent site. Raises CheckpointError for a structure that is not built here, or does
        not fit.
        """
        self.what = f"controlnets[{name!r}]"
        if not isinstance(source, (str, Path)):
            raise RequestError(f"{self.what}: got {type(source).__name__}, expected a folder or a hub id")
        folder = builtin_folder(str(source)) if str(source) in BUILTIN_CONTROLNETS else source
        checkpoint = Checkpoint.open(folder, variant=variant, download=download)
        found = [part for part, kind in checkpoint.components.items() if kind == CLASS]
        if not found:
            kinds = ", ".join(checkpoint.components.values())
            raise CheckpointError(f"{self.what}: {checkpoint.root} holds {kinds}; expected a {CLASS}")
        config = ControlNetConfig.from_diffusers(checkpoint.config(found[0]))
        check_fit(self.what, config, unet, channels, scale)
        with torch.device("meta"):
            self.net = ControlNet(config)
        self.weights = checkpoint.weights(found[0])
        check_weights(self.net, self.weights, MAPS[CLASS], self.what)

    def load(self, config: ResolvedConfig) -> ControlNet:
        """Read the weights. Raises as `load_weights`."""
        where: dict[str, Any] = {"device": config.device, "dtype": config.dtype, "what": self.what}
        load_weights(self.net, self.weights, MAPS[CLASS], **where)
        transform(self.net, config.transforms)
        return self.net


def check_fit(what: str, config: ControlNetConfig, unet: UNetConfig, channels: int, scale: int) -> None:
    """Raise CheckpointError where a ControlNet was made for another kind of U-Net."""
    net = config.trunk
    compared: dict[str, tuple[Any, Any]] = {
        "channels of the latents": (net.in_channels, channels),
        "pixels per latent": (2 ** (len(config.image_widths) - 1), scale),
        "channels of its picture": (config.image_channels, 3),
        "(channels, layers, change of size) of its levels": (_levels(net), _levels(unet)),
        "width of the prompt": (_width(net), _width(unet)),
        "width of the added embedding": (net.added_dim, unet.added_dim),
        "class embedding": ((net.class_embedding, net.class_dim), (unet.class_embedding, unet.class_dim)),
    }
    for name, (got, expected) in compared.items():
        if got != expected:
            raise CheckpointError(
                f"{what} does not fit this model: {name}: got {got}, expected {expected}; it was trained for another "
                "kind of model (SD 1.x, SD 2.x and SDXL each need their own)"
            )


def settle_controls(
    nets: Mapping[str, ControlNet], controls: Sequence[Control], width: int, height: int
) -> tuple[Control, ...]:
    """The controls of a request with their pictures read: float32 [height, width, 3] in 0..1.

    One net may be asked for several times, with several pictures. Raises RequestError.
    """
    if not isinstance(controls, (tuple, list)):
        raise RequestError(f"controls: got {type(controls).__name__}, expected a tuple of Control")
    return tuple(_settle(nets, i, control, width, height) for i, control in enumerate(controls))


def describe(control: Control) -> dict[str, Any]:
    """All but the picture, JSON-able."""
    return {name: value for name, value in vars(control).items() if name != "image"}


def prepare_controls(
    network: Controlled, controls: Sequence[Control], conditioning: Conditioning, timesteps: Tensor, branches: int
) -> ControlledPrepared:
    """The model rows of images of a request with these settled controls; timesteps: [rows, U], branch 0 first."""
    images = [torch.from_numpy(control.image).permute(2, 0, 1)[None].to(timesteps.device) for control in controls]
    rows, updates = timesteps.shape
    factors = [
        scales(net, control, updates, branches).repeat(rows // branches, 1, 1)
        for net, control in zip(network.controlnets, controls, strict=True)
    ]
    return network.prepare(conditioning, timesteps, images, factors)


def scales(net: ControlNet, control: Control, updates: int, branches: int) -> Tensor:
    """Factors of everything a ControlNet adds, float32 [branches, updates, n + 1]; branch 0 has the prompt.

    Update i of U acts where start <= i / U and (i + 1) / U <= end, as in diffusers. In guess mode the branch without
    the prompt gets nothing, and the first skips less (`ControlNet.guess_scales`); so does the branch, but not the
    skips, of a ControlNet that averages over the image, as in diffusers.
    """
    acts = [not (i / updates < control.start or (i + 1) / updates > control.end) for i in range(updates)]
    one = control.scale * torch.tensor(acts, dtype=torch.float32)
    pooled = net.control.pool
    factors = net.guess_scales(one) if control.guess and not pooled else one[:, None].expand(-1, net.scales)
    prompted = [1.0] + [0.0 if control.guess or pooled else 1.0] * (branches - 1)
    return factors * torch.tensor(prompted)[:, None, None]


def _settle(nets: Mapping[str, ControlNet], index: int, control: Control, width: int, height: int) -> Control:
    where = f"controls[{index}]"
    if not isinstance(control, Control):
        raise RequestError(f"{where}: got {type(control).__name__}, expected a Control")
    if not nets:
        raise RequestError(f"{where}: no ControlNet is loaded; load the model with controlnets={{name: folder}}")
    if control.name not in nets:
        raise RequestError(f"{where}: no ControlNet is called {control.name!r}; {closest(str(control.name), nets)}")
    for name in ("scale", "start", "end"):
        value = getattr(control, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise RequestError(f"{where}.{name}: got {value!r}, expected a finite number >= 0")
    if not control.start < control.end <= 1:
        raise RequestError(f"{where}: got start={control.start}, end={control.end}; expected 0 <= start < end <= 1")
    image = load_image(control.image, f"{where}.image")
    return replace(control, image=image if image.shape[:2] == (height, width) else resize(image, width, height))


def _levels(config: UNetConfig) -> tuple[tuple[int, int, str], ...]:
    return tuple((level.channels, level.layers, level.resample) for level in config.down)


def _width(config: UNetConfig) -> int | None:
    return config.text_dim or config.blocks.cross_dim
