"""Every kind of diffusers pipeline that `stepfuse.optimize` takes: the same latents, and an exact way back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from reference.pipeline_calls import build_call, run

import stepfuse

pytestmark = pytest.mark.slow  # left out by `.ci/run quick`

TOLERANCE = 1e-4  # relative L2, of the final latents and of the images

KINDS = [
    "sd15", "sd15/image", "sd15/inpaint", "sd15/edit", "sd15_inpaint9/inpaint", "sd2_v", "x4_upscaler/upscale",
    "sdxl", "sdxl/image", "sdxl/inpaint", "sdxl_inpaint9/inpaint", "sdxl_refiner/image",
    "sd15_controlnet/control", "sd15_controlnet/guess", "sd15_controlnet/two", "sd15_controlnet/control_image",
    "sd15_controlnet/control_inpaint", "sdxl/xl_control",
]  # fmt: skip


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_latents_equal_and_restore_is_exact(reference_pipeline: Callable[[str], Path], kind: str) -> None:
    pipe, arguments = build_call(kind, reference_pipeline)
    components = dict(pipe.components)
    before, images = run(pipe, arguments), run(pipe, arguments, "pt")
    bits = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    with stepfuse.optimize(pipe) as fast:
        assert 0 < relative(run(pipe, arguments), before) <= TOLERANCE
        assert relative(run(fast, arguments, "pt"), images) <= TOLERANCE
        replaced = [network.name for network in fast.networks]
    assert replaced[0] == "unet"
    assert replaced[-1] == "vae"
    assert len(replaced) == 2 + ("control" in kind) + kind.endswith("/two")
    assert pipe.components == components
    assert all(now is components[name] for name, now in pipe.components.items())
    for name, tensor in pipe.unet.state_dict().items():
        assert torch.equal(tensor, bits[name]), name
        assert tensor.stride() == bits[name].stride(), name
    assert torch.equal(run(pipe, arguments), before)


def test_base_and_refiner_share_a_schedule(reference_pipeline: Callable[[str], Path]) -> None:
    base, arguments = build_call("sdxl", reference_pipeline)
    refiner, _ = build_call("sdxl_refiner/image", reference_pipeline)
    common = {name: arguments[name] for name in ("prompt", "negative_prompt", "num_inference_steps")}

    def refined() -> torch.Tensor:
        latents = run(base, arguments, denoising_end=0.5)
        return run(refiner, common, image=latents, denoising_start=0.5)

    before = refined()
    with stepfuse.optimize(base), stepfuse.optimize(refiner):
        assert 0 < relative(refined(), before) <= TOLERANCE
    assert torch.equal(refined(), before)
