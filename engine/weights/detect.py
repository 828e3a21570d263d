"""Which architecture a checkpoint is, from the facts it states about itself; no or several matches are an error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from ..errors import CheckpointError
from .checkpoint import Checkpoint

Expected = str | int | Literal["absent", "present"] | None


@dataclass(frozen=True)
class Detected:
    """The one architecture whose signature fits, and the facts it was found by."""

    architecture: str
    evidence: tuple[str, ...]


# Architecture -> what must hold. "absent" also means null; widths and depths are free, so that any size fits.
_CLIP = {"text_encoder": "CLIPTextModel", "text_encoder_2": "absent", "vae": "AutoencoderKL"}
_CONDITIONAL = {"unet": "UNet2DConditionModel"}
_PLAIN = {"unet": "UNet2DModel", "vae": "absent", "vqvae": "absent", "text_encoder": "absent"}
_PIXELS = _PLAIN | {"second_image": "absent"}
_MASKED = "a mask and masked latents"  # 5 where latents have 4 channels
_SD = _CONDITIONAL | _CLIP | {"unet.addition_embed_type": "absent", "unet.class_embed_type": "absent"}
_XL = _CONDITIONAL | {
    "text_encoder_2": "CLIPTextModelWithProjection",
    "vae": "AutoencoderKL",
    "unet.addition_embed_type": "text_time",
}
SIGNATURES: dict[str, Mapping[str, Expected]] = {
    "sd": _SD | {"extra_channels": 0, "unet.num_class_embeds": "absent", "unet.time_cond_proj_dim": "absent"},
    "sd_lcm": _SD | {"extra_channels": 0, "unet.num_class_embeds": "absent", "unet.time_cond_proj_dim": "present"},
    "sd_inpaint": _SD | {"extra_channels": _MASKED, "unet.num_class_embeds": "absent"},
    "sd_x4_upscaler": _SD
    | {"extra_channels": 3, "unet.num_class_embeds": "present"},  # small image and its noise level
    "x4_upscaler": _CONDITIONAL
    | {
        "text_encoder": "absent",
        "text_encoder_2": "absent",
        "vae": "AutoencoderKL",
        "extra_channels": 3,
        "unet.num_class_embeds": "present",
        "unet.class_embed_type": "absent",
        "unet.addition_embed_type": "absent",
    },
    "sdxl": _XL | {"text_encoder": "CLIPTextModel", "extra_channels": 0},
    "sdxl_inpaint": _XL | {"text_encoder": "CLIPTextModel", "extra_channels": _MASKED},
    "sdxl_refiner": _XL | {"text_encoder": "absent", "extra_channels": 0},
    "pixel": _PIXELS | {"unet.num_class_embeds": "absent"},
    "pixel_class": _PIXELS | {"unet.num_class_embeds": "present"},
    "pixel_upscaler": _PLAIN | {"second_image": "present"},
    "ldm": {"unet": "UNet2DModel", "vqvae": "VQModel", "extra_channels": 0},
    "ldm_super_resolution": {"unet": "UNet2DModel", "vqvae": "VQModel", "extra_channels": 3},
}
_UNET_FACTS = ("addition_embed_type", "class_embed_type", "num_class_embeds", "time_cond_proj_dim")
_COMPONENTS = ("unet", "transformer", "vae", "vqvae", "text_encoder", "text_encoder_2", "text_encoder_3")
TWO_IMAGES = (2, 6)
"""Input channels of a network of pixels that is given a second image: both grey, or both in colour."""


def detect(checkpoint: Checkpoint) -> Detected:
    """Compare the checkpoint with every signature. Raises CheckpointError listing the facts unless exactly one fits."""
    facts = _facts(checkpoint)
    evidence = tuple(f"{name}={value}" for name, value in facts.items())
    misfits = {name: _misfits(signature, facts) for name, signature in SIGNATURES.items()}
    fitting = [name for name, problems in misfits.items() if not problems]
    if len(fitting) == 1:
        return Detected(fitting[0], evidence)
    what = f"{checkpoint.root} ({checkpoint.class_name or 'no pipeline class'}) says {', '.join(evidence) or 'nothing'}"
    if fitting:
        raise CheckpointError(f"{what}: that fits several architectures: {', '.join(fitting)}")
    nearest = min(misfits, key=lambda name: len(misfits[name]))
    raise CheckpointError(
        f"{what}: no architecture of this engine. Supported: {', '.join(SIGNATURES)}. "
        f"The nearest is {nearest!r}, which needs {'; '.join(misfits[nearest])}"
    )


def _facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the signatures look at: classes of components, options of the U-Net, channels beyond the latents."""
    facts: dict[str, Any] = {
        name: checkpoint.components[name].removeprefix("Flax") for name in _COMPONENTS if name in checkpoint.components
    }
    if "unet" not in facts:
        return facts
    unet = checkpoint.config("unet")
    facts |= {f"unet.{name}": unet[name] for name in _UNET_FACTS if unet.get(name) is not None}
    for autoencoder, default in (("vae", 4), ("vqvae", 3)):
        if autoencoder in facts:
            latent = cast(int, checkpoint.config(autoencoder).get("latent_channels", default))
            extra = cast(int, unet.get("in_channels", 4)) - latent
            facts["extra_channels"] = _MASKED if extra == latent + 1 else extra
    if facts["unet"] == "UNet2DModel" and "extra_channels" not in facts and unet.get("in_channels") in TWO_IMAGES:
        facts["second_image"] = f"{unet['in_channels']} channels"
    return facts


def _misfits(signature: Mapping[str, Expected], facts: Mapping[str, Any]) -> list[str]:
    problems: list[str] = []
    for name, expected in signature.items():
        got = facts.get(name)
        fits = got is None if expected == "absent" else got is not None if expected == "present" else got == expected
        if not fits:
            problems.append(f"{name} {'=' if expected not in ('absent', 'present') else ''}{expected}, not {got}")
    return problems
