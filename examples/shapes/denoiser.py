"""Trains the denoiser of `shapes`: a small U-Net on 8x8 latents, jointly with its pre-trained text encoder.

v-prediction (diffusion.py), captions dropped one time in ten for classifier-free guidance, an exponential moving
average of all weights (averaging.py). Single objects come first, pairs join them.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor
from transformers import CLIPTextModel

from . import text_encoder
from .averaging import Averaged, run
from .diffusion import SCHEDULER, object_weight, velocity_loss
from .latents import CHANNELS, encode_scenes
from .progress import Progress
from .scenes import Combination, caption, load_heldout, sample_pair, sample_single
from .text_encoder import WIDTH, Words
from .tokenizer import build_tokenizer

CONFIG = {
    "sample_size": 8,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "block_out_channels": (96, 160),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": WIDTH,
    "attention_head_dim": (3, 4),  # the number of heads: diffusers kept the wrong name for compatibility
    "norm_num_groups": 16,
}
DROP = 0.1


def sample_batch(
    rng: random.Random, batch: int, share: float, heldout: frozenset[Combination]
) -> tuple[Tensor, list[str]]:
    """Fresh scenes: latents [B, 8, 8, 8], captions (empty one time in ten)."""
    scenes = [sample_pair(rng, heldout) if rng.random() < share else sample_single(rng) for _ in range(batch)]
    captions = ["" if rng.random() < DROP else caption(scene, rng) for scene in scenes]
    return torch.from_numpy(encode_scenes(scenes)), captions


def pair_share(fraction: float) -> float:
    """The share of two-object scenes: none in the first tenth of training, 65 % after a third."""
    return 0.65 * min(1.0, max(0.0, (fraction - 0.1) / 0.2))


class Trainer:
    """U-Net and text encoder, and their optimizer."""

    def __init__(self, unet: UNet2DConditionModel, text: CLIPTextModel, words: Words, lr: float, device: str) -> None:
        self.unet, self.text, self.words, self.device = unet.to(device).train(), text.to(device).train(), words, device
        # Plain matrix products: the fused attention backward of torch's CPU took a third of each step.
        self.unet.set_attn_processor(AttnProcessor())
        groups = [{"params": unet.named_parameters()}, {"params": text.named_parameters(), "scale": 0.3}]
        optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        self.optimizer = Averaged(optimizer, warmup=100)

    def loss(self, latents: Tensor, captions: list[str], weight: float) -> Tensor:
        """See `velocity_loss`; draws timesteps and noise."""

        def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
            return self.unet(noisy, timesteps, self.text(self.words(captions).to(self.device))[0]).sample

        return velocity_loss(predict, latents.to(self.device), weight)

    def export(self, work: Path) -> None:
        """Write the averaged weights as `work/unet` and `work/text_encoder` in diffusers format."""
        with self.optimizer.applied():
            self.unet.save_pretrained(work / "unet")
            self.text.save_pretrained(work / "text_encoder")


def train(
    work: Path,
    *,
    minutes: float,
    steps: int | None,
    batch: int,
    lr: float,
    device: str,
    text_steps: int = 500,
    init_from: Path | None = None,
    seed: int = 0,
) -> None:
    """Train (or go on training) the denoiser; the results are `work/unet`, `work/text_encoder`, `work/scheduler`."""
    heldout = load_heldout()
    tokenizer = build_tokenizer(work / "tokenizer")
    DDIMScheduler(**SCHEDULER).save_pretrained(work / "scheduler")
    words = Words(tokenizer)
    if init_from:
        unet = UNet2DConditionModel.from_pretrained(init_from / "unet", torch_dtype=torch.float32)
        text = CLIPTextModel.from_pretrained(init_from / "text_encoder", torch_dtype=torch.float32)
    else:
        text = text_encoder.train(work, tokenizer, heldout, steps=text_steps, device=device, seed=seed)
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(**CONFIG)
    trainer = Trainer(unet, text, words, lr, device)
    progress = Progress("denoiser", minutes=minutes, steps=steps)

    def loss(rng: random.Random) -> Tensor:
        latents, captions = sample_batch(rng, batch, pair_share(progress.fraction), heldout)
        return trainer.loss(latents, captions, object_weight(progress.fraction))

    run(trainer.optimizer, progress, work / "denoiser.pt", loss, lambda: trainer.export(work), seed=seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache/stepfuse/shapes")
    parser.add_argument("--minutes", type=float, default=70)
    parser.add_argument("--steps", type=int, help="train by steps instead of minutes: exactly repeatable")
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--text-steps", type=int, default=500, help="of the text encoder's pre-training")
    parser.add_argument("--init-from", type=Path, help="start from the weights in this diffusers folder")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    train(**vars(args))


if __name__ == "__main__":
    main()
