"""Images of the built-in model with every Triton kernel forced, under the interpreter, against the references."""

from __future__ import annotations

import os

import pytest

from stepfuse import Engine

pytestmark = [
    pytest.mark.interpret,
    pytest.mark.slow,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1, in its own process"
    ),
]
OPS = (
    "attention",
    "group_norm_silu",
    "geglu",
    "add_layer_norm",
    "layer_norm",
    "bias_residual_add",
    "sampler_step",
)
LOSSLESS = 1e-4  # relative L2 of the final latents


def test_images_with_forced_kernels_equal_the_reference() -> None:
    request = {"seed": 7, "steps": 2, "width": 32, "height": 64, "sampler": "euler_a", "output": "np"}
    prompt = "a red circle above a blue square"
    with Engine.load("shapes", device="cpu", kernels="triton") as engine:
        forced = engine.generate(prompt, **request)
        explained = engine.explain()
    with Engine.load("shapes", device="cpu") as engine:
        plain = engine.generate(prompt, **request)
    for op in OPS:
        lines = [line.split() for line in explained.splitlines() if line.split()[0] == op]
        assert "triton" in {line[1] for line in lines}, explained
    difference = float((forced.latents - plain.latents).norm() / plain.latents.norm())
    assert 0 < difference <= LOSSLESS
    assert abs(forced.images - plain.images).max() <= 2 / 255
