"""Autoencoders against diffusers in float64, and in tiles against the whole picture at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference.networks import VAES, build_network
from reference.parity import GATE, error, ours
from reference.random_weights import normal
from torch import Tensor

from stepfuse.engine.errors import CheckpointError
from stepfuse.engine.models.vae import AutoencoderKL, Gaussian, VAEConfig, VQModel, from_model, to_model
from stepfuse.engine.models.vae_tiling import tiled, tiled_encode

SIZES = {"square": (8, 8), "odd": (5, 7)}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", VAES)
@torch.inference_mode()
def test_decode_matches_diffusers(name: str, size: str, reference_network: Any) -> None:
    module, folder = reference_network(f"vae/{name}")
    vae = ours(folder)
    assert isinstance(vae, AutoencoderKL | VQModel)
    latents = normal("z", 2, vae.config.code_dim or vae.config.latent_channels, *SIZES[size])
    assert error(vae.decode(latents), module.decode(latents, return_dict=False)[0]) <= GATE


@pytest.mark.parametrize("name", VAES)
@torch.inference_mode()
def test_encode_matches_diffusers(name: str, reference_network: Any) -> None:
    module, folder = reference_network(f"vae/{name}")
    vae = ours(folder)
    images = normal("images", 2, 3, 40, 24).clamp(-1, 1)
    if isinstance(vae, VQModel):
        assert error(vae.encode(images), module.encode(images).latents) <= GATE
        return
    assert isinstance(vae, AutoencoderKL)
    got, expected = vae.encode(images), module.encode(images).latent_dist
    assert error(got.mean, expected.mean) <= GATE
    assert error(got.logvar, expected.logvar) <= GATE
    noise = normal("noise", *got.mean.shape)
    assert error(got.sample(noise), expected.mean + expected.std * noise) <= GATE


@torch.inference_mode()
def test_vq_without_snapping(reference_network: Any) -> None:
    module, folder = reference_network("vae/vq_f4")
    vae = ours(folder)
    assert isinstance(vae, VQModel)
    latents = normal("z", 1, 3, 6, 6)
    loose = vae.decode(latents, quantize=False)
    assert error(loose, module.decode(latents, force_not_quantize=True).sample) <= GATE
    assert error(loose, vae.decode(latents)) > 0.01  # snapping is no identity on these latents


@torch.inference_mode()
def test_logvar_is_clamped_as_in_diffusers(tmp_path: Path) -> None:
    module: Any = build_network("vae/f4", tmp_path)
    vae = ours(tmp_path)
    assert isinstance(vae, AutoencoderKL)
    assert vae.quant_conv is not None
    for conv in (module.quant_conv, vae.quant_conv):
        assert isinstance(conv.bias, torch.nn.Parameter)
        conv.bias[4:6] += 100
        conv.bias[6:] -= 100
    images = normal("images", 1, 3, 8, 8)
    got = vae.encode(images).logvar
    assert torch.equal(got, module.encode(images).latent_dist.logvar)
    assert (float(got.min()), float(got.max())) == (-30.0, 20.0)


@pytest.fixture(scope="module")
def decoder(reference_network: Any) -> AutoencoderKL:
    """The f8 autoencoder without attention over the whole image, in float64."""
    vae = ours(reference_network("vae/no_middle_attention")[1])
    assert isinstance(vae, AutoencoderKL)
    return vae


@torch.inference_mode()
def test_tiled_decode_of_a_local_decoder_is_exact() -> None:
    """Where no pixel depends on more than its own latent, tiles must reproduce the whole."""

    def enlarge(z: Tensor) -> Tensor:
        return z[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3)

    for height, width in ((20, 33), (8, 40), (17, 16), (9, 10)):
        latents = normal("tiles", 2, 4, height, width)
        assert error(tiled(enlarge, latents, tile=16, overlap=4), enlarge(latents)) <= 1e-14


@torch.inference_mode()
def test_small_latents_are_decoded_at_once(decoder: AutoencoderKL) -> None:
    latents = normal("small", 1, 4, 16, 12)
    assert torch.equal(tiled(decoder.decode, latents, tile=16, overlap=4), decoder.decode(latents))


def deviation(found: Tensor, whole: Tensor, seams: list[int], scale: int = 1) -> tuple[float, float]:
    """Size of the deviation of [R, C, h, w], and its largest mean step across a column before which a seam stands over
    its mean step everywhere. seams: in latents; scale: columns per latent."""
    difference = found - whole
    steps = (difference[..., 1:] - difference[..., :-1]).abs().mean((0, 1, 2))
    worst = max(float(steps[scale * seam - 1] / steps.mean()) for seam in seams)
    return float(difference.norm() / whole.norm()), worst


@torch.inference_mode()
def test_tiled_decode_has_no_seams(decoder: AutoencoderKL) -> None:
    """The deviation from the untiled image steps no more across lines where tiles start or end than elsewhere."""
    latents = normal("stationary", 1, 4, 40, 40)
    whole = decoder.decode(latents)
    # tiles of 16 that share 4 start at 0, 12 and 24
    found = tiled(decoder.decode, latents, tile=16, overlap=4)
    size, step = deviation(found, whole, [12, 16, 24, 28], 8)
    cut = torch.cat([decoder.decode(part) for part in latents.split(10, 3)], 3)
    cut_size, cut_step = deviation(cut, whole, [10, 20, 30], 8)
    assert step <= 1.3, step  # 1.2 when written
    assert cut_step >= 2.5, cut_step  # the measure sees hard seams: 3.4 when written
    assert size <= 0.6 * cut_size, (size, cut_size)  # group norms see one tile only, so it is not zero


@torch.inference_mode()
def test_tiled_encode_of_a_local_encoder_is_exact() -> None:
    """Where no latent depends on other pixels than its own, tiles must reproduce both moments of the whole."""

    def shrink(images: Tensor) -> Gaussian:
        mean = F.avg_pool2d(images, 8)
        return Gaussian(mean, mean**2)

    for height, width in ((20, 33), (8, 40), (17, 16), (9, 10)):
        images = normal("tiles", 2, 3, 8 * height, 8 * width)
        found, whole = tiled_encode(shrink, images, 8, tile=16, overlap=4), shrink(images)
        assert error(found.mean, whole.mean) <= 1e-14
        assert error(found.logvar, whole.logvar) <= 1e-14


@torch.inference_mode()
def test_small_pictures_are_encoded_at_once(decoder: AutoencoderKL) -> None:
    images = normal("small", 1, 3, 128, 96)
    found, whole = tiled_encode(decoder.encode, images, 8, tile=16, overlap=4), decoder.encode(images)
    assert torch.equal(found.mean, whole.mean)
    assert torch.equal(found.logvar, whole.logvar)


@torch.inference_mode()
@pytest.mark.parametrize("moment", ["mean", "logvar"])
def test_tiled_encode_has_no_seams(decoder: AutoencoderKL, moment: str) -> None:
    """As for decoding."""
    images = normal("stationary", 1, 3, 320, 320)
    whole = getattr(decoder.encode(images), moment)
    found = tiled_encode(decoder.encode, images, 8, tile=16, overlap=4)
    cut = torch.cat([getattr(decoder.encode(part), moment) for part in images.split(80, 3)], 3)
    size, step = deviation(getattr(found, moment), whole, [12, 16, 24, 28])
    cut_size, cut_step = deviation(cut, whole, [10, 20, 30])
    assert step <= 1.4, step  # 1.24 and 1.32 when written
    assert cut_step >= 2.5, cut_step  # 3.1 and more when written
    assert size <= 0.6 * cut_size, (size, cut_size)


def test_tiles_refuse_an_overlap_that_cannot_blend() -> None:
    message = r"overlap 0 with tiles of 16: expected 1 to 8"
    with pytest.raises(ValueError, match=message):
        tiled(lambda z: z, torch.zeros(1, 4, 32, 32), tile=16, overlap=0)
    with pytest.raises(ValueError, match=message):
        tiled_encode(lambda z: Gaussian(z, z), torch.zeros(1, 3, 64, 64), 2, tile=16, overlap=0)


@pytest.mark.parametrize(
    "config",
    [
        {"scaling_factor": 0.18215},
        {"scaling_factor": 1.5305, "shift_factor": 0.0609},
        {"scaling_factor": 0.5, "latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.5, 2.0, 0.5, 1.0]},
    ],
)
def test_latent_scales_invert_each_other(config: dict[str, Any]) -> None:
    parsed = VAEConfig.from_diffusers(config)
    latents = normal("latents", 1, 4, 3, 3)
    assert error(to_model(from_model(latents, parsed), parsed), latents) <= 1e-14
    mean = torch.tensor(config.get("latents_mean") or [config.get("shift_factor", 0.0)] * 4, dtype=torch.float64)
    std = torch.tensor(config.get("latents_std") or [1.0] * 4, dtype=torch.float64)
    expected = latents * std[:, None, None] / config["scaling_factor"] + mean[:, None, None]
    assert error(from_model(latents, parsed), expected) <= 1e-14


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "VQModel", "norm_type": "spatial"}, "norm_type='spatial'"),
        ({"act_fn": "gelu"}, "act_fn='gelu'"),
        ({"_class_name": "AutoencoderDC"}, "'AutoencoderDC' is not an autoencoder"),
        ({"down_block_types": ["KDownBlock2D"]}, r"down_block_types\[0\]='KDownBlock2D'"),
        ({"block_out_channels": [8, 8]}, "1 entries for 2"),
    ],
)
def test_unknown_structures_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        VAEConfig.from_diffusers(config)


def test_flags_for_the_caller() -> None:
    assert VAEConfig.from_diffusers({}).force_upcast
    assert not VAEConfig.from_diffusers({"_class_name": "AutoencoderKL", "force_upcast": False}).force_upcast
    assert VAEConfig.from_diffusers(VAES["f4"][1]).factor == 4


@pytest.mark.parametrize(
    ("config", "parameters", "tensors"),
    [
        ({"block_out_channels": [128, 256, 512, 512]}, 83_653_863, 248),  # SD 1, 2, XL
        ({"block_out_channels": [128, 256, 512]}, 55_325_927, 204),  # x4 upscaler
        (
            {
                "block_out_channels": [128, 256, 512, 512],
                "latent_channels": 16,
                "use_quant_conv": False,
                "use_post_quant_conv": False,
            },
            83_819_683,
            244,
        ),  # SD 3, Flux
        ({"_class_name": "VQModel", "block_out_channels": [128, 256, 512], "num_vq_embeddings": 8192}, 55_322_782, 205),
    ],
)
def test_published_sizes(config: dict[str, Any], parameters: int, tensors: int) -> None:
    levels = len(config["block_out_channels"])
    kinds = {
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": 2,
    }
    parsed = VAEConfig.from_diffusers(config | kinds)
    with torch.device("meta"):
        vae = VQModel(parsed) if parsed.codes else AutoencoderKL(parsed)
    assert sum(p.numel() for p in vae.parameters()) == parameters
    assert len(vae.state_dict()) == tensors
