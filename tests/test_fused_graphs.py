"""The graphs as fused kernels see them: other calls, same result; and weight transforms, exact in float64."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from reference.parity import GATE, error, ours
from reference.random_weights import normal
from test_unet_parity import check

from stepfuse.engine.errors import RequestError
from stepfuse.engine.models.transforms import TRANSFORMS, transform
from stepfuse.engine.models.unet import UNet
from stepfuse.engine.models.unet_blocks import Transformer2d
from stepfuse.engine.models.vae import AutoencoderKL
from stepfuse.kernels.dispatch import record, resolve
from stepfuse.kernels.op import REGISTRY, Op

UNETS = ("sd15", "sdxl", "x4_upscaler", "ddpm", "adm")


@pytest.fixture
def shadows():
    """A second implementation of every op, equal to its reference; yields the arguments each was called with."""
    seen: Counter[str] = Counter()

    def shadow(op: Op):
        def call(*args: Any, **kwargs: Any) -> Any:
            bound = op.signature.bind(*args, **kwargs).arguments
            seen.update([op.name, *(f"{op.name}.{name}" for name, value in bound.items() if value is not None)])
            return op.reference(*args, **kwargs)

        call.__signature__ = op.signature  # type: ignore[attr-defined]
        return call

    for op in REGISTRY.values():
        op.implement("shadow", lambda call: None)(shadow(op))
    yield seen
    for op in REGISTRY.values():
        del op.implementations["shadow"]


@pytest.mark.parametrize("name", UNETS)
@torch.inference_mode()
def test_unet_with_every_op_fused_matches_diffusers(name: str, reference_network: Any, shadows: Counter[str]) -> None:
    module, folder = reference_network(f"unet/{name}")
    unet = ours(folder)
    assert isinstance(unet, UNet)
    calls = record(unet, lambda: check(module, unet, (12, 8)))
    dispatch = resolve(unet, "cpu", "shadow", calls)
    assert {choice.implementation for choice in dispatch.sites.values()} == {"shadow"}
    dispatch.bind(unet)
    shadows.clear()
    assert check(module, unet, (12, 8)) <= GATE
    assert shadows["bias_residual_add.bias"] > 0, "blocks leave conv2's bias to their exit"
    used, written = shadows["group_norm_silu.partial_stats"], shadows["bias_residual_add"]
    assert used >= written / 2 > 0, "norms use the statistics that exits write"
    if unet.config.blocks.cross_dim:
        transformers = sum(isinstance(module, Transformer2d) for module in unet.modules())
        assert shadows["layer_norm"] == transformers, "only a first block has no sum to read"
        assert shadows["add_layer_norm"] == 3 * shadows["geglu"] - transformers


@torch.inference_mode()
def test_vae_with_every_op_fused_matches_diffusers(reference_network: Any, shadows: Counter[str]) -> None:
    module, folder = reference_network("vae/f8")
    vae = ours(folder)
    assert isinstance(vae, AutoencoderKL)
    latents = normal("z", 2, vae.config.latent_channels, 6, 5)
    calls = record(vae, lambda: vae.decode(latents))
    resolve(vae, "cpu", "shadow", calls).bind(vae)
    assert error(vae.decode(latents), module.decode(latents, return_dict=False)[0]) <= GATE
    assert shadows["group_norm_silu.pre_bias"] > 0, "without a time embedding the norm adds conv1's bias"


@pytest.mark.parametrize("names", [("fused_qkv",), ("folded_upsample",), tuple(TRANSFORMS)])
@pytest.mark.parametrize("name", UNETS)
@torch.inference_mode()
def test_transforms_change_nothing(name: str, names: tuple[str, ...], reference_network: Any) -> None:
    module, folder = reference_network(f"unet/{name}")
    unet = ours(folder)
    assert isinstance(unet, UNet)
    before = sum(1 for _ in unet.parameters())
    transform(unet, names)
    assert sum(1 for _ in unet.parameters()) != before or "fused_qkv" not in names
    for size in ((8, 16), (13, 10) if type(module).__name__ == "UNet2DConditionModel" else (12, 8)):
        assert check(module, unet, size) <= GATE


@torch.inference_mode()
def test_transforms_of_the_vae_change_nothing(reference_network: Any) -> None:
    module, folder = reference_network("vae/f8")
    vae = ours(folder)
    transform(vae, tuple(TRANSFORMS))
    latents = normal("z", 2, vae.config.latent_channels, 5, 7)
    assert error(vae.decode(latents), module.decode(latents, return_dict=False)[0]) <= GATE


def test_unknown_transform_names_the_closest() -> None:
    with pytest.raises(RequestError, match="did you mean 'fused_qkv'"):
        transform(torch.nn.Identity(), ["fuse_qkv"])
