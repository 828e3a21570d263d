"""Kinds of diffusers pipelines around the reference checkpoints, and what each is called with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch

from .networks import CONTROLNETS
from .random_weights import randomize

SIZE = {"width": 96, "height": 64}
COMMON = {"prompt": "a photo of a cat", "negative_prompt": "of", "num_inference_steps": 4, "guidance_scale": 5.0}

Call = tuple[Any, dict[str, Any]]


def picture(seed: int = 0, channels: int = 3, height: int = 64, width: int = 96) -> torch.Tensor:
    """A smooth picture [1, C, height, width] in 0..1."""
    coarse = torch.rand((1, channels, 4, 6), generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")


def mask() -> torch.Tensor:
    """[1, 1, 64, 96]: 1 in a rectangle."""
    found = torch.zeros(1, 1, 64, 96)
    found[..., 16:48, 24:64] = 1
    return found


def controlnet(name: str) -> Any:
    """A random ControlNet of `CONTROLNETS`."""
    net = diffusers.ControlNetModel(**CONTROLNETS[name])
    randomize(net, f"controlnet.{name}")
    return net


def build_call(kind: str, reference_pipeline: Callable[[str], Path]) -> Call:
    """A fresh pipeline in float32 and its arguments. kind: NAME or NAME/KIND, of PIPELINES and KINDS."""
    name, _, variant = kind.partition("/")
    pipe = diffusers.DiffusionPipeline.from_pretrained(reference_pipeline(name), torch_dtype=torch.float32)
    pipe, more = KINDS[variant](pipe)
    pipe.set_progress_bar_config(disable=True)
    return pipe, COMMON | more


def run(pipe: Any, arguments: dict[str, Any], output: str = "latent", **more: Any) -> torch.Tensor:
    """Call a pipeline with a generator of seed 11."""
    generator = torch.Generator().manual_seed(11)
    return pipe(**arguments | more, output_type=output, generator=generator).images


def image_to_image(pipe: Any) -> Call:
    """Four steps of five at a strength of 0.8."""
    return _like(pipe, "Img2Img"), {"image": picture(), "strength": 0.8}


def _like(pipe: Any, task: str, **parts: Any) -> Any:
    """The pipeline of another task on the same components, of SDXL where they are."""
    xl = "XL" if "XL" in type(pipe).__name__ else ""
    components = pipe.components | parts
    control = "ControlNet" if components.get("controlnet") is not None else ""
    cls = getattr(diffusers, f"StableDiffusion{xl}{control}{task}Pipeline")
    if type(pipe) is cls and not parts:
        return pipe  # with its own settings, as the refiner's aesthetic score
    return cls(**components, **{} if xl else {"requires_safety_checker": False})


def _inpaint(pipe: Any) -> Call:
    return _like(pipe, "Inpaint"), {"image": picture(), "mask_image": mask(), "strength": 0.9, **SIZE}


def _control(pipe: Any, **more: Any) -> Call:
    return pipe, {"image": picture(3), "controlnet_conditioning_scale": 0.7, **SIZE} | more


def _two_controls(pipe: Any) -> Call:
    pipe = _like(pipe, "", controlnet=[pipe.controlnet, controlnet("bgr")])
    return _control(pipe, image=[picture(3), picture(4)], controlnet_conditioning_scale=[0.7, 0.4])


def _control_image(pipe: Any) -> Call:
    return _control(_like(pipe, "Img2Img"), image=picture(), control_image=picture(3), strength=0.8)


def _control_inpaint(pipe: Any) -> Call:
    pipe = _like(pipe, "Inpaint")
    return _control(pipe, image=picture(), mask_image=mask(), control_image=picture(3), strength=0.9)


def _xl_control(pipe: Any) -> Call:
    return _control(_like(pipe, "", controlnet=controlnet("sdxl")), control_guidance_end=0.5)


def _upscale(pipe: Any) -> Call:
    return pipe, {"image": picture(height=16, width=24), "noise_level": 20}


def _edit(pipe: Any) -> Call:
    """A U-Net of eight channels, which sees the picture it changes (InstructPix2Pix)."""
    pipe.unet = diffusers.UNet2DConditionModel.from_config(dict(pipe.unet.config) | {"in_channels": 8})
    randomize(pipe.unet, "edit")
    made = diffusers.StableDiffusionInstructPix2PixPipeline(**pipe.components, requires_safety_checker=False)
    return made, {"image": picture(), "image_guidance_scale": 1.5}


KINDS: dict[str, Callable[[Any], Call]] = {
    "": lambda pipe: (pipe, dict(SIZE)),
    "image": image_to_image,
    "inpaint": _inpaint,
    "edit": _edit,
    "upscale": _upscale,
    "control": _control,
    "guess": lambda pipe: _control(pipe, guess_mode=True),
    "two": _two_controls,
    "control_image": _control_image,
    "control_inpaint": _control_inpaint,
    "xl_control": _xl_control,
}
