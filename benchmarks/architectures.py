"""The same network twice, diffusers' and ours, on the same weights: the built-in model's, or random ones.

Full-size networks are filled with random weights where they stand; nothing is downloaded. Random weights say how long
an evaluation takes and how its rounding errors grow, not what it draws. Before anything is timed, the spread of every
block's output must lie within `SANE`: data changes power, and with it clocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.families import builtin_folder
from ..engine.models.unet import Conditioning, UNet
from ..engine.models.unet_config import UNetConfig
from ..engine.models.vae import AutoencoderKL, VAEConfig
from ..engine.runtimes.networks import DenoiserNetwork
from ..engine.weights.maps import MAPS
from ..engine.weights.share import Shared
from .gpu_parts import unets, vaes

TEXT = 77  # tokens of a CLIP prompt
SANE = (0.1, 10.0)
DEFAULT_LEVELS = (320, 640, 1280, 1280)  # of diffusers, where a configuration does not say
SD2 = unets.SD15 | {
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}


@dataclass(frozen=True)
class Architecture:
    """A U-Net and the autoencoder that goes with it, as diffusers configurations; trained: weights of a built-in."""

    name: str
    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    trained: bool = False

    @property
    def factor(self) -> int:
        """Pixels per latent in each direction."""
        return 2 ** (len(self.vae["block_out_channels"]) - 1)

    def latent(self, width: int | None, height: int | None) -> tuple[int, int]:
        """Height and width of the latents for a size in pixels; the architecture's own for None.

        Raises ValueError where the network cannot halve the size as often as it needs to.
        """
        own = self.unet["sample_size"] * self.factor
        multiple = self.factor * 2 ** (len(self.unet.get("block_out_channels", DEFAULT_LEVELS)) - 1)
        for name, value in (("width", width), ("height", height)):
            if value is not None and (value < multiple or value % multiple):
                raise ValueError(f"{name}: got {value}, expected a multiple of {multiple} for {self.name}")
        return (height or own) // self.factor, (width or own) // self.factor


def architecture(name: str) -> Architecture:
    """An architecture by name. Raises ValueError for one that is not known."""
    if name == "shapes":
        folder = builtin_folder("shapes")
        from diffusers import AutoencoderKL as TheirVAE
        from diffusers import UNet2DConditionModel as TheirUNet

        found: list[Any] = [TheirUNet.load_config(folder / "unet"), TheirVAE.load_config(folder / "vae")]
        return Architecture(name, *found, trained=True)
    if name not in NETWORKS:
        raise ValueError(f"--arch: got {name!r}, expected one of: {', '.join(ARCHITECTURES)}")
    return Architecture(name, *NETWORKS[name])


NETWORKS = {
    "sd15": (unets.SD15, vaes.SDXL),
    "sd2": (SD2, vaes.SDXL),
    "sdxl": (unets.SDXL, vaes.SDXL),
    "tiny": (unets.TINY | {"block_out_channels": (32, 64)}, vaes.TINY),  # seconds; proves the code only
}
ARCHITECTURES = ("shapes", *NETWORKS)


class Network:
    """One network: `theirs` in diffusers' own layout, `nhwc` its channels-last twin, `ours` on the weights of `nhwc`.

    kind: "unet" or "vae". Raises ImportError without diffusers, ValueError where activations are not sane.
    """

    def __init__(self, arch: Architecture, kind: str, device: torch.device, dtype: torch.dtype) -> None:
        import diffusers

        diffusers.utils.logging.set_verbosity_error()  # it warns of every change of dtype
        self.arch, self.kind, self.device, self.dtype = arch, kind, device, dtype
        self.cls: Any = diffusers.UNet2DConditionModel if kind == "unet" else diffusers.AutoencoderKL
        self.config = dict(arch.unet if kind == "unet" else arch.vae)
        if arch.trained:
            self.theirs: Any = self.cls.from_pretrained(builtin_folder(arch.name) / kind).to(device)
        else:
            torch.manual_seed(0)
            with torch.device(device):
                self.theirs = self.cls(**self.config)
        self.theirs.eval().requires_grad_(False).to(dtype)
        self.nhwc: Any = None
        self.ours: Any = None

    def exact(self, run: Callable[[Any], Tensor]) -> Tensor:
        """`run(theirs)` one precision up, on the weights as they are: float64 for float32, float32 for half."""
        with _up(self.theirs, self.dtype):
            return run(self.theirs)

    def lay_out(self) -> None:
        """Make the channels-last twin, which copies the convolutions' weights only, and ours on its weights."""
        self.nhwc = self.twin(self.theirs).to(memory_format=torch.channels_last)
        with torch.device("meta"):
            self.ours = (
                UNet(UNetConfig.from_diffusers(self.config))
                if self.kind == "unet"
                else AutoencoderKL(VAEConfig.from_diffusers(self.config))
            )
        Shared.match(self.ours, self.nhwc, MAPS[self.cls.__name__], self.kind).fill(self.ours, self.kind)

    def twin(self, source: Any) -> Any:
        """Another module object on the weights of `source`, to be configured differently or laid out anew."""
        with torch.device("meta"):
            made: Any = self.cls(**{k: v for k, v in self.config.items() if not k.startswith("_")})
        made.load_state_dict(source.state_dict(), assign=True)
        return made.eval().requires_grad_(False)


class _up:
    """A module one precision up while entered; the way back is exact."""

    def __init__(self, module: Any, dtype: torch.dtype) -> None:
        self.module, self.dtype = module, dtype

    def __enter__(self) -> None:
        self.module.to(above(self.dtype))

    def __exit__(self, *_: object) -> None:
        self.module.to(self.dtype)


def above(dtype: torch.dtype) -> torch.dtype:
    """The precision in which the truth for `dtype` is computed."""
    return torch.float64 if dtype == torch.float32 else torch.float32


def unet_inputs(
    arch: Architecture, rows: int, latent: tuple[int, int], device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """latents [rows, C, h, w] and everything else an evaluation takes, in `dtype`; the same for both graphs."""
    config, random = arch.unet, torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(device, dtype)

    inputs = {
        "latents": normal(rows, config.get("in_channels", 4), *latent),
        "hidden": normal(rows, TEXT, config["cross_attention_dim"]),
        "timesteps": torch.full((rows,), 500.0, device=device),
    }
    if config.get("addition_embed_type") == "text_time":
        height, width = (float(side * arch.factor) for side in latent)
        inputs["pooled"] = normal(rows, 1280)
        inputs["time_ids"] = torch.tensor([[height, width, 0, 0, height, width]], device=device).repeat(rows, 1)
    return inputs


def their_call(unet: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """One evaluation by diffusers, inputs in the dtype of its weights."""
    dtype = unet.dtype
    added = {}
    if "pooled" in inputs:
        added["added_cond_kwargs"] = {
            "text_embeds": inputs["pooled"].to(dtype), "time_ids": inputs["time_ids"].to(dtype),
        }  # fmt: skip
    hidden = inputs["hidden"].to(dtype)
    return unet(inputs["latents"].to(dtype), inputs["timesteps"], hidden, **added, return_dict=False)[0]


def our_arguments(unet: DenoiserNetwork, inputs: Mapping[str, Tensor]) -> tuple[Any, ...]:
    """The arguments of our graph; what all updates share is computed here, once, as the engine does."""
    given = {name: inputs[name] for name in ("hidden", "pooled", "time_ids") if name in inputs}
    prepared, latents = unet.prepare(Conditioning(**given), inputs["timesteps"][:, None]), inputs["latents"]
    return latents, prepared, torch.zeros(len(latents), dtype=torch.int64, device=latents.device)


def spreads(theirs: Any, run: Callable[[], Any]) -> dict[str, float]:
    """Standard deviation of every block's output in one evaluation of diffusers' graph."""
    coder = getattr(theirs, "decoder", theirs)
    blocks = {f"{part}.{i}": block for part in ("down_blocks", "up_blocks")
              for i, block in enumerate(getattr(coder, part, ()))} | {"mid_block": coder.mid_block}  # fmt: skip
    found: dict[str, float] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found[name] = float((output[0] if isinstance(output, tuple) else output).float().std())

        return hook

    handles = [block.register_forward_hook(note(name)) for name, block in blocks.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found


def check_sane(found: Mapping[str, float]) -> None:
    """Raise ValueError for a block whose output is not finite or whose spread lies outside `SANE`."""
    for name, value in found.items():
        if not SANE[0] <= value <= SANE[1]:
            raise ValueError(
                f"{name}: the standard deviation of its output is {value:.3g}, expected {SANE[0]} to {SANE[1]}: "
                "times and errors on such activations say little about a trained model"
            )
