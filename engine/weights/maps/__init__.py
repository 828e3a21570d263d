"""Key maps as data: how the tensors of published checkpoints are spelled."""

from ..keymap import KeyMap
from .autoencoder import AUTOENCODER
from .clip import CLIP
from .unet import UNET

MAPS: dict[str, KeyMap] = {
    "UNet2DConditionModel": UNET,
    "UNet2DModel": UNET,
    "ControlNetModel": UNET,
    "AutoencoderKL": AUTOENCODER,
    "VQModel": AUTOENCODER,
    "CLIPTextModel": CLIP,
    "CLIPTextModelWithProjection": CLIP,
}

__all__ = ["AUTOENCODER", "CLIP", "MAPS", "UNET"]
