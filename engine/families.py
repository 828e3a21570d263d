"""The table of families: what a kind of checkpoint needs around its denoiser.

A family is a value, never a pipeline class.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .errors import CheckpointError, closest

BUILTIN = {
    "shapes": "64 x 64 scenes of coloured shapes, e.g. 'a red circle above a blue square'",
    "shapes-x4": "upscaler of such scenes, 64 x 64 to 256 x 256",
}
BUILTIN_CONTROLNETS = {
    "shapes-silhouette": "ControlNet of shapes: objects where a silhouette, white on black, has them",
}
BUILTIN_LORAS = {
    "shapes-dome": "LoRA of shapes: circles are cut to their upper halves",
    "shapes-turn": "LoRA of shapes: the places of objects are turned by 30 degrees",
}
BUILTIN_EMBEDDINGS = {
    "shapes-sun": "a word for shapes: a sun is a yellow circle",
    "shapes-big": "a word for shapes: big is between medium and large",
}


def builtin_folder(name: str) -> Path:
    """Where the checkpoint of a built-in model or ControlNet lies in the installed package."""
    return Path(__file__).parent / "builtin" / name


def builtin_file(source: str | Path) -> str | Path:
    """Where a built-in LoRA or embedding lies, for its name; every other source as it is."""
    known = str(source) in BUILTIN_LORAS or str(source) in BUILTIN_EMBEDDINGS
    return builtin_folder(f"{source}.safetensors") if known else source


@dataclass(frozen=True, kw_only=True)
class Family:
    """What surrounds the denoiser of one architecture (names: weights/detect.py).

    text: "last" = final hidden state of one CLIP encoder; "penultimate" = hidden_states[-2] of one or two encoders with
    pooled summary and size ids (SDXL); "given" = tensors that requests bring (`Engine.from_module`); "none". latent:
    there is a VAE around the denoiser. steps, guidance_scale: defaults of the published pipeline. beside: what the
    denoiser takes beside the latents, as more channels: a mask and what it leaves of the image, or a low-resolution
    image. starts: it starts from an image or from latents, never from noise alone. strength: default of image to image.
    aesthetics: its size ids hold a score in place of a target size.
    """

    name: str
    summary: str
    text: Literal["last", "penultimate", "given", "none"] = "last"
    latent: bool = True
    steps: int = 50
    guidance_scale: float = 7.5
    beside: Literal["nothing", "masked_image", "low_resolution"] = "nothing"
    starts: bool = False
    strength: float = 0.8
    aesthetics: bool = False

    @property
    def enlarges(self) -> bool:
        """Whether it is given a low-resolution image to enlarge."""
        return self.beside == "low_resolution"

    @property
    def needs(self) -> str:
        """What a request must give beside a prompt, in words; empty for text to image."""
        if self.beside == "masked_image":
            return "an image and a mask"
        if self.enlarges:
            return "an image to enlarge"
        return "an image, or latents and denoising_start" if self.starts else ""


_TABLE = (
    Family(name="sd", summary="Stable Diffusion 1.x and 2.x (epsilon or v-prediction), and fine-tunes of them"),
    Family(
        name="sdxl", summary="Stable Diffusion XL base and fine-tunes of it", text="penultimate", guidance_scale=5.0
    ),
    Family(name="sd_lcm", summary="latent consistency models with guidance embedding", steps=4, guidance_scale=8.5),
    Family(
        name="pixel",
        summary="unconditional pixel diffusion (DDPM, DDIM)",
        text="none",
        latent=False,
        guidance_scale=1.0,
    ),
    Family(
        name="pixel_class",
        summary="class-conditional pixel diffusion (ADM)",
        text="none",
        latent=False,
        guidance_scale=1.0,
    ),
    Family(
        name="sdxl_refiner",
        summary="Stable Diffusion XL refiner",
        text="penultimate",
        guidance_scale=5.0,
        starts=True,
        strength=0.3,
        aesthetics=True,
    ),
    Family(
        name="sd_inpaint",
        summary="Stable Diffusion inpainting, which sees the mask (9 input channels)",
        beside="masked_image",
    ),
    Family(
        name="sdxl_inpaint",
        summary="Stable Diffusion XL inpainting, which sees the mask (9 input channels)",
        text="penultimate",
        beside="masked_image",
    ),
    Family(
        name="sd_x4_upscaler",
        summary="Stable Diffusion x4 upscaler",
        beside="low_resolution",
        steps=75,
        guidance_scale=9.0,
    ),
    Family(
        name="x4_upscaler",
        summary="latent x4 upscaler without text, told the noise level of the small image",
        text="none",
        beside="low_resolution",
        steps=10,
        guidance_scale=1.0,
    ),
    Family(
        name="pixel_upscaler",
        summary="pixel diffusion beside a low-resolution image: the later stages of pixel cascades (CDM, SR3)",
        text="none",
        latent=False,
        beside="low_resolution",
        guidance_scale=1.0,
    ),
)
FAMILIES = {family.name: family for family in _TABLE}


def family_of(architecture: str) -> Family:
    """The family of a detected architecture. Raises CheckpointError for one whose surroundings are not built."""
    if architecture not in FAMILIES:
        raise CheckpointError(
            f"{architecture}: this kind of checkpoint cannot be run yet; {closest(architecture, FAMILIES)}"
        )
    return FAMILIES[architecture]
