"""Initial weights of the upscaler that already enlarge: the decoder interpolates, the U-Net copies the small picture.

Most of a picture is flat, and the norms of these networks take away exactly what flat areas are: the level of a color
relative to nothing. It takes thousands of steps to learn a way around them. Here it is built in: each color is carried
in a group of four channels (x, -x, C, -C) whose constant C outweighs the color in the norm's statistics, so that the
norm becomes a division by a known number; and silu(x) - silu(-x) = x passes it through the last activation. Residual
branches start at zero. The convolutions that carry these channels along stay as they are (`_keep`): with values of ten
behind them, the optimizer's first steps would undo everything; whatever is learned goes through residual branches.
"""

from __future__ import annotations

import math

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from .upscaler_latents import SCALES

CONSTANT = 10.0
CARRIED = 12  # channels: (x, -x, C, -C) of three colors
COLORS = (0, 1, 4, 5, 8, 9)  # those that hold x or -x
MEAN_SCALE = SCALES[0]
_POINT = torch.tensor([0.0, 1.0, 0.0])
_PAIR = torch.tensor([0.5, 0.5, 0.0])  # every second time, with padding at the end only: the mean of a pair
_LINEAR = torch.tensor([0.25, 0.5, 0.25])  # after doubling by repetition: linear interpolation


@torch.no_grad()
def start_decoder(vae: AutoencoderKL) -> None:
    """Make the decoder enlarge the mean channels of the latents linearly; details play no part yet."""
    decoder = vae.decoder
    nn.init.dirac_(vae.post_quant_conv.weight)
    nn.init.zeros_(vae.post_quant_conv.bias)
    _load(decoder.conv_in, first=0, gain=MEAN_SCALE)
    _carry_through(decoder, _LINEAR)
    _emit(decoder.conv_norm_out, decoder.conv_out, 1.0)


@torch.no_grad()
def start_encoder(vae: AutoencoderKL) -> None:
    """Make the encoder average cells of 4x4 pixels into the mean channels of the latents."""
    encoder = vae.encoder
    nn.init.dirac_(vae.quant_conv.weight)
    nn.init.zeros_(vae.quant_conv.bias)
    _load(encoder.conv_in, first=0, gain=1.0)
    _carry_through(encoder, _PAIR)
    _emit(encoder.conv_norm_out, encoder.conv_out, 1 / MEAN_SCALE)


@torch.no_grad()
def start_unet(unet: UNet2DConditionModel, latent_channels: int) -> None:
    """Make the U-Net predict the small picture in the mean channels of the latents, and no details."""
    _load(unet.conv_in, first=latent_channels, gain=1.0)
    for resnet in _resnets(unet):
        nn.init.zeros_(resnet.conv2.weight)
        nn.init.zeros_(resnet.conv2.bias)
    for resnet in _resnets(unet.down_blocks[0]):
        _undo(resnet.norm1)
    # The last block's last residual block reads its predecessor's channels, then those of `conv_in`.
    shortcut = _resnets(unet.up_blocks[-1])[-1].conv_shortcut
    _carry(shortcut, shortcut.in_channels - unet.conv_in.out_channels, _POINT)
    _emit(unet.conv_norm_out, unet.conv_out, 1 / MEAN_SCALE)


def _load(conv: nn.Conv2d, first: int, gain: float) -> None:
    """Fill the carried channels from the three input channels that begin at `first`."""
    conv.weight[:CARRIED] = 0
    _keep(conv, [])
    for color in range(3):
        conv.weight[4 * color, first + color, 1, 1] = gain
        conv.weight[4 * color + 1, first + color, 1, 1] = -gain
    conv.bias[:CARRIED] = torch.tensor([0, 0, CONSTANT, -CONSTANT] * 3)


def _carry(conv: nn.Conv2d, first: int, taps: Tensor) -> None:
    """Pass the carried channels on, found at input channel `first`, with a separable kernel."""
    kernel = torch.outer(taps, taps) if conv.kernel_size == (3, 3) else torch.ones(1, 1)
    constants = [first + channel for channel in range(CARRIED) if channel not in COLORS]
    conv.weight[:, constants] = 0
    conv.weight[:CARRIED] = 0
    conv.bias[:CARRIED] = 0
    _keep(conv, constants)
    for channel in range(CARRIED):
        # Zeros around the picture must not dim the constants, which is why a wide kernel leaves them alone.
        alone = channel not in COLORS and conv.kernel_size == (3, 3)
        conv.weight[channel, first + channel] = torch.outer(_POINT, _POINT) if alone else kernel


def _keep(conv: nn.Conv2d, constants: list[int]) -> None:
    """Leave the carried channels, and what reads the constants at these input channels, out of training."""
    trained = torch.ones_like(conv.weight)
    trained[:CARRIED] = 0
    trained[:, constants] = 0
    conv.weight.register_hook(lambda gradient: gradient * trained.to(gradient.device))
    conv.bias.register_hook(lambda gradient: torch.cat([torch.zeros_like(gradient[:CARRIED]), gradient[CARRIED:]]))


def _carry_through(network: nn.Module, taps: Tensor) -> None:
    """Pass the carried channels through all of a decoder or encoder; its residual branches see them and start at zero.

    taps: the kernel where the size changes.
    """
    for resnet in _resnets(network):
        _undo(resnet.norm1)
        nn.init.zeros_(resnet.conv2.weight)
        nn.init.zeros_(resnet.conv2.bias)
        if resnet.conv_shortcut is not None:
            _carry(resnet.conv_shortcut, 0, _POINT)
    for module in network.modules():
        if isinstance(module, (Downsample2D, Upsample2D)):
            assert isinstance(module.conv, nn.Conv2d)
            _carry(module.conv, 0, taps)


def _resnets(network: nn.Module) -> list[ResnetBlock2D]:
    return [module for module in network.modules() if isinstance(module, ResnetBlock2D)]


def _undo(norm: nn.GroupNorm) -> None:
    """Multiply carried colors by what the norm divides them by: the constants' deviation within their group."""
    size = norm.num_channels // norm.num_groups
    for channel in COLORS:
        group = range(channel // size * size, (channel // size + 1) * size)
        constants = sum(other < CARRIED and other not in COLORS for other in group)
        norm.weight[channel] = CONSTANT * math.sqrt(constants / size)


def _emit(norm: nn.GroupNorm, conv: nn.Conv2d, gain: float) -> None:
    """The carried colors through norm and activation to the first three outputs, nothing else yet."""
    _undo(norm)
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    for color in range(3):
        conv.weight[color, 4 * color, 1, 1] = gain
        conv.weight[color, 4 * color + 1, 1, 1] = -gain
