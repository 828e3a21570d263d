"""Prompt to pixels with the built-in model: our engine against diffusers' pipeline on the same files and seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from ..engine.engine import Engine
from ..engine.families import builtin_folder
from ..kernels.timing import time_calls
from . import exported
from .architectures import above
from .compare import Settings, relative_error, verdicts
from .rivals import (
    BASELINE,
    CONTROL,
    NO_COMPILE,
    NO_ONNX,
    ONNX,
    OURS,
    REFUSALS,
    attention_used,
    layout,
    versions,
)

PROMPT = "a red circle above a blue square"
SEED = 7
FACTOR = 8  # pixels per latent
GRAPHS = ("unet", "vae_decoder", "text_encoder")
CPU = torch.device("cpu")  # results arrive on the host, so the host's clock sees all of the work on any device


def measure(settings: Settings, steps: int = 20, notice: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Seconds per request, errors of the pictures and verdicts, as in `compare.verdicts`.

    The truth is diffusers' pipeline one precision up. Every side gets float tensors on the host. Raises ImportError
    without diffusers.
    """
    size = {"width": settings.width or 64, "height": settings.height or 64}
    exact = _pipeline(settings, above(settings.dtype))
    truth = _draw(exact, settings.images, steps, size)
    del exact
    configurations: dict[str, Any] = {}
    refused: dict[str, str] = {}
    with ExitStack() as opened:
        engine = opened.enter_context(Engine.load("shapes", device=str(settings.device), dtype=settings.dtype))
        theirs = _their_call(settings, steps, size)
        calls = {BASELINE: theirs, CONTROL: theirs, OURS: _our_call(engine, settings, steps, size)}
        calls["diffusers channels-last"] = _their_call(settings, steps, size, channels_last=True)
        more = {
            "diffusers channels-last, compiled": (
                settings.compiled, NO_COMPILE,
                lambda: _their_call(settings, steps, size, channels_last=True, compiled=True),
            ),
            ONNX: (
                settings.exported, NO_ONNX,
                lambda: _our_call(opened.enter_context(_exported(settings)), settings, steps, size),
            ),
        }  # fmt: skip
        for name, (wanted, why_not, make) in more.items():
            try:
                if wanted:
                    calls[name] = make()
                else:
                    refused[name] = why_not
            except REFUSALS as error:
                refused[name] = f"{type(error).__name__}: {error}"[:300]
        errors = {name: relative_error(call().cpu(), truth) for name, call in calls.items()}
        for name, call in calls.items():
            configurations[name] = {"attention_used": attention_used(call, settings.device)}
        own = {"sampler": "the checkpoint's own (DDIM)"}
        configurations[OURS] |= {"layout": layout(engine.components.unet)} | own
        if ONNX in calls:
            configurations[ONNX] |= {"versions": versions(ONNX), "threads": torch.get_num_threads()} | own
        notice(f"shapes end to end: timing {', '.join(calls)}")
        timings = time_calls(
            {name: [call] for name, call in calls.items()}, CPU, rounds=settings.rounds, budget_s=settings.budget_s
        )
    found = verdicts(timings, errors, OURS)
    for name, record in found["variants"].items():
        record |= {"configuration": configurations[name]}
    return found | {"refused": refused, "steps": steps, "truth": str(truth.dtype), **size}


@contextmanager
def _exported(settings: Settings) -> Iterator[Engine]:
    """An engine on our ONNX export of the built-in model, which is made for it."""
    with TemporaryDirectory(prefix="stepfuse-compare-") as folder:
        exported.export("shapes", Path(folder), settings.dtype, GRAPHS)
        with Engine.load(folder, runtime="onnxruntime", device=str(settings.device)) as engine:
            yield engine


def _our_call(engine: Engine, settings: Settings, steps: int, size: dict[str, int]) -> Callable[[], Tensor]:
    options: dict[str, Any] = {"n": settings.images, "steps": steps, "seed": SEED, "guidance_scale": 3.0, **size}
    return lambda: engine.generate(PROMPT, output="pt", **options).images


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
