"""Prompt to pixels with the built-in model: our engine against diffusers' pipeline on the same files and seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..engine.engine import Engine
from ..engine.families import builtin_folder
from ..kernels.timing import time_calls
from .architectures import above
from .compare import Settings, relative_error, verdicts
from .rivals import BASELINE, CONTROL, OURS, REFUSALS, attention_used, layout

PROMPT = "a red circle above a blue square"
SEED = 7
FACTOR = 8  # pixels per latent
CPU = torch.device("cpu")  # results arrive on the host, so the host's clock sees all of the work on any device


def measure(settings: Settings, steps: int = 20, notice: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Seconds per request, errors of the pictures and verdicts, as in `compare.verdicts`.

    The truth is diffusers' pipeline one precision up. Both sides get float tensors on the host. Raises ImportError
    without diffusers.
    """
    options = {"n": settings.images, "steps": steps, "seed": SEED, "guidance_scale": 3.0}
    size = {"width": settings.width or 64, "height": settings.height or 64}
    exact = _pipeline(settings, above(settings.dtype))
    truth = _draw(exact, settings.images, steps, size)
    del exact
    configurations: dict[str, Any] = {}
    refused: dict[str, str] = {}
    with Engine.load("shapes", device=str(settings.device), dtype=settings.dtype) as engine:
        calls = {BASELINE: _their_call(settings, steps, size), CONTROL: None, OURS: None}
        calls[OURS] = lambda: engine.generate(PROMPT, output="pt", **options, **size).images
        calls[CONTROL] = calls[BASELINE]
        calls["diffusers channels-last"] = _their_call(settings, steps, size, channels_last=True)
        if settings.compiled:
            try:
                calls["diffusers channels-last, compiled"] = _their_call(
                    settings, steps, size, channels_last=True, compiled=True
                )
            except REFUSALS as error:
                refused["diffusers channels-last, compiled"] = f"{type(error).__name__}: {error}"[:300]
        else:
            refused["torch.compile"] = "left out (--compile turns it on; the default on CUDA only)"
        errors = {name: relative_error(call().cpu(), truth) for name, call in calls.items()}
        for name, call in calls.items():
            configurations[name] = {"attention_used": attention_used(call, settings.device)}
        configurations[OURS] |= {"layout": layout(engine.components.denoiser), "sampler": "the checkpoint's own (DDIM)"}
        notice(f"shapes end to end: timing {', '.join(calls)}")
        timings = time_calls(
            {name: [call] for name, call in calls.items()}, CPU, rounds=settings.rounds, budget_s=settings.budget_s
        )
    found = verdicts(timings, errors, OURS)
    for name, record in found["variants"].items():
        record |= {"configuration": configurations[name]}
    return found | {"refused": refused, "steps": steps, "truth": str(truth.dtype), **size}


def _pipeline(settings: Settings, dtype: torch.dtype) -> Any:
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(builtin_folder("shapes"))
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(settings.device, dtype)


def _their_call(
    settings: Settings, steps: int, size: dict[str, int], *, channels_last: bool = False, compiled: bool = False
) -> Callable[[], Tensor]:
    pipe = _pipeline(settings, settings.dtype)
    if channels_last:
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
    if compiled:
        pipe.unet.forward = torch.compile(pipe.unet.forward, fullgraph=True, dynamic=False)
        pipe.vae.decoder.forward = torch.compile(pipe.vae.decoder.forward, fullgraph=True, dynamic=False)
    return lambda: _draw(pipe, settings.images, steps, size)


@torch.inference_mode()
def _draw(pipe: Any, images: int, steps: int, size: dict[str, int]) -> Tensor:
    """Pictures float [n, 3, H, W] in 0..1 on the host; image i has the float32 noise of seed SEED + i, as with ours."""
    shape = (1, pipe.unet.config.in_channels, size["height"] // FACTOR, size["width"] // FACTOR)
    noise = torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(SEED + i)) for i in range(images)])
    return pipe(
        PROMPT, num_inference_steps=steps, guidance_scale=3.0, num_images_per_prompt=images, output_type="pt",
        latents=noise.to(pipe.device, pipe.unet.dtype), **size,
    ).images.cpu()  # fmt: skip
