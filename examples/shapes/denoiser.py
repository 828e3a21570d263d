"""Trains the denoiser of `shapes`: a small U-Net on 8x8 latents, jointly with its pre-trained text encoder.

v-prediction (Salimans & Ho 2022), linear betas, stratified timesteps, captions dropped one time in ten for
classifier-free guidance, an exponential moving average of all weights. Single objects come first, pairs join them.
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
from .latents import CHANNELS, encode_scenes
from .progress import Progress, load_checkpoint, run, save_checkpoint
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
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "clip_sample": False,
    "set_alpha_to_one": True,
    "steps_offset": 1,
}
DROP = 0.1
NEAR = -0.46  # of the distance channels: cells with an outline within some four pixels, or inside
OBJECT_WEIGHT = 2.0
EMA_DECAY = 0.999
SAVE_SECONDS = 240.0


def sample_batch(
    rng: random.Random, batch: int, share: float, heldout: frozenset[Combination]
) -> tuple[Tensor, Tensor, list[str]]:
    """Fresh scenes: latents [B, 8, 8, 8], where objects are [B, 1, 8, 8], captions (empty one time in ten)."""
    scenes = [sample_pair(rng, heldout) if rng.random() < share else sample_single(rng) for _ in range(batch)]
    latents = torch.from_numpy(encode_scenes(scenes))
    objects = (latents[:, 3:].amax(1, keepdim=True) > NEAR).float()
    captions = ["" if rng.random() < DROP else caption(scene, rng) for scene in scenes]
    return latents, objects, captions


def pair_share(fraction: float) -> float:
    """The share of two-object scenes: none in the first tenth of training, 65 % after a third."""
    return 0.65 * min(1.0, max(0.0, (fraction - 0.1) / 0.2))


def object_weight(fraction: float) -> float:
    """How much more the cells of objects count; fades out because it makes backgrounds unclean."""
    return OBJECT_WEIGHT * max(0.0, 1 - fraction / 0.85)


class Trainer:
    """U-Net, text encoder, their average, and the optimizer: what a checkpoint holds."""

    def __init__(self, unet: UNet2DConditionModel, text: CLIPTextModel, words: Words, lr: float, device: str) -> None:
        self.unet, self.text, self.words, self.device = unet.to(device).train(), text.to(device).train(), words, device
        # Plain matrix products: the fused attention backward of torch's CPU took a third of each step.
        self.unet.set_attn_processor(AttnProcessor())
        self.parameters = [*unet.parameters(), *text.parameters()]
        self.average = [p.detach().clone() for p in self.parameters]
        groups = [
            {"params": list(unet.parameters()), "scale": 1.0},
            {"params": list(text.parameters()), "scale": 0.3},
        ]
        self.lr = lr
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        self.alphas = DDIMScheduler(**SCHEDULER).alphas_cumprod.to(device)

    def loss(self, latents: Tensor, objects: Tensor, captions: list[str], weight: float) -> Tensor:
        """Weighted mean squared error of v = sqrt(a) noise - sqrt(1 - a) latents; draws timesteps and noise."""
        batch = len(latents)
        latents, objects = latents.to(self.device), objects.to(self.device)
        timesteps = (1000 * (torch.arange(batch) + torch.rand(batch)) / batch).long().clamp(max=999).to(self.device)
        noise = torch.randn(latents.shape).to(self.device)
        signal = self.alphas[timesteps].sqrt()[:, None, None, None]
        spread = (1 - self.alphas[timesteps]).sqrt()[:, None, None, None]
        with torch.autocast(torch.device(self.device).type, torch.bfloat16):
            states = self.text(self.words(captions).to(self.device))[0]
            output = self.unet(signal * latents + spread * noise, timesteps, states).sample
        error = (output.float() - (signal * noise - spread * latents)) ** 2
        weights = 1 + weight * objects
        return (weights * error).mean() / weights.mean()

    def step(self, loss: Tensor, progress: Progress) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = group["scale"] * progress.cosine(self.lr, warmup=100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        decay = min(EMA_DECAY, (1 + progress.step) / (10 + progress.step))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)

    def state(self) -> dict:
        return {
            "unet": self.unet.state_dict(),
            "text": self.text.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
        }

    def restore(self, state: dict) -> None:
        self.unet.load_state_dict(state["unet"])
        self.text.load_state_dict(state["text"])
        self.average = [tensor.to(self.device) for tensor in state["average"]]
        self.optimizer.load_state_dict(state["optimizer"])

    def export(self, work: Path) -> None:
        """Write the averaged weights as `work/unet` and `work/text_encoder` in diffusers format."""
        current = [p.data for p in self.parameters]
        for parameter, mean in zip(self.parameters, self.average, strict=True):
            parameter.data = mean
        self.unet.save_pretrained(work / "unet")
        self.text.save_pretrained(work / "text_encoder")
        for parameter, data in zip(self.parameters, current, strict=True):
            parameter.data = data


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
    path = work / "denoiser.pt"
    if state := load_checkpoint(path):
        trainer.restore(state["trainer"])
        progress.restore(state["progress"])

    def step() -> Tensor:
        rng = random.Random(f"denoiser {seed} {progress.step}")
        torch.manual_seed(seed * 1_000_003 + progress.step)
        latents, objects, captions = sample_batch(rng, batch, pair_share(progress.fraction), heldout)
        loss = trainer.loss(latents, objects, captions, object_weight(progress.fraction))
        trainer.step(loss, progress)
        return loss

    def save() -> None:
        save_checkpoint(path, {"trainer": trainer.state(), "progress": progress.state()})
        trainer.export(work)

    run(progress, step, save, SAVE_SECONDS)


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
