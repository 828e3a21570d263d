"""Trains the upscaler `shapes-x4`: a U-Net that denoises latents of a 256x256 picture, given its 64x64 version.

The structure of the Stable Diffusion x4 upscaler without its text: the small picture, noised to a level that is told as
a class (conditioning augmentation, Ho et al. 2021), is joined to the latents as three more channels. There is no
attention, so what is learned on windows holds for pictures of any size. The network predicts the clean latents: the
small picture says nearly all of them, and v would ask it to find the noise, too. Linear betas, stratified timesteps, an
exponential moving average of the weights.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from torch import Tensor

from .averaging import Averaged, run
from .diffusion import SCHEDULER as BASE_SCHEDULER
from .diffusion import add_noise, stratified
from .progress import Progress
from .render import render, render_window
from .scenes import SIZE, load_heldout
from .upscaler_latents import CHANNELS, encode_images, importance, outlines
from .upscaler_scenes import SCALE, Examples, choose_side, sample_scene
from .upscaler_start import start_unet

CONFIG = {
    "sample_size": SIZE,
    "in_channels": CHANNELS + 3,
    "out_channels": CHANNELS,
    "block_out_channels": (64, 96, 128),
    "down_block_types": ("DownBlock2D",) * 3,
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ("UpBlock2D",) * 3,
    "layers_per_block": 1,
    "norm_num_groups": 16,
    "cross_attention_dim": 64,  # of nothing: there is no cross-attention
}
SCHEDULER = BASE_SCHEDULER | {"prediction_type": "sample"}
LOW_RES_SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "clip_sample": False,
}
MAX_LEVEL = 350
LEVEL_WEIGHT = 25.0  # the level whose examples count half: what is lost in noise cannot be learned
OUTLINE_WEIGHT = 6.0


def build_unet(seed: int = 0) -> UNet2DConditionModel:
    """Weights to start from; while it trains, levels go through a sinusoid and two layers: neighbors learn together."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(**CONFIG, class_embed_type="timestep")
    start_unet(unet, CHANNELS)
    return unet


@torch.no_grad()
def with_level_table(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The same network with what it computes for each level 0..350 in a table, as the published upscaler has it."""
    assert unet.class_embedding is not None
    levels = torch.arange(MAX_LEVEL + 1, device=unet.device)
    table = unet.class_embedding(unet.time_proj(levels))
    baked = UNet2DConditionModel(**CONFIG, num_class_embeds=MAX_LEVEL + 1).to(unet.device)
    weights = {k: v for k, v in unet.state_dict().items() if not k.startswith("class_embedding.")}
    baked.load_state_dict(weights | {"class_embedding.weight": table})
    return baked.eval()


def draw_levels(batch: int) -> Tensor:
    """Noise levels of the small pictures, int64 [B] in 0..350, most of them low: those are asked for most."""
    return (MAX_LEVEL * torch.rand(batch) ** 3).round().long()


class Trainer:
    """U-Net and its optimizer."""

    def __init__(self, unet: UNet2DConditionModel, lr: float, device: str) -> None:
        self.unet, self.device = unet.to(device).train(), device
        named = unet.named_parameters()
        optimizer = torch.optim.AdamW(named, lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        self.optimizer = Averaged(optimizer, warmup=100)
        self.low_res = DDPMScheduler(**LOW_RES_SCHEDULER)

    def loss(self, small: Tensor, large: Tensor) -> Tensor:
        """Weighted mean squared error of the predicted latents; draws timesteps, levels and noise.

        small: [B, 3, h, w], large: [B, 3, 4h, 4w], both in -1..1.
        """
        batch = len(small)
        levels = draw_levels(batch)
        small = self.low_res.add_noise(small, torch.randn(small.shape), levels).to(self.device)
        latents = encode_images(large.to(self.device))
        timesteps = stratified(torch.randperm(batch)).to(self.device)
        noisy, _ = add_noise(latents, timesteps)
        inputs = torch.cat([noisy, small], 1)
        with torch.autocast(torch.device(self.device).type, torch.bfloat16):
            output = self.unet(inputs, timesteps, None, class_labels=levels.to(self.device)).sample
        error = (output.float() - latents) ** 2
        weights = (1 + OUTLINE_WEIGHT * outlines(latents)) * importance(latents)
        weights = weights / (1 + levels.to(self.device) / LEVEL_WEIGHT)[:, None, None, None]
        return (weights * error).mean() / weights.mean()

    def averaged(self) -> UNet2DConditionModel:
        """The averaged network, with its table of levels."""
        with self.optimizer.applied():
            return with_level_table(self.unet)


@torch.no_grad()
def upscale(
    unet: UNet2DConditionModel, vae: AutoencoderKL, small: Tensor, *, steps: int, level: int, seed: int = 0
) -> Tensor:
    """Large pictures [B, 3, 4h, 4w] of small ones [B, 3, h, w], both in -1..1; DDIM, no guidance.

    Noise comes from torch's CPU generator: first that of the small picture, then that of the latents.
    """
    device, generator = unet.device, torch.Generator().manual_seed(seed)
    batch, _, height, width = small.shape
    scheduler = DDIMScheduler(**SCHEDULER)
    scheduler.set_timesteps(steps)
    levels = torch.full((batch,), level)
    noise = torch.randn(small.shape, generator=generator)
    small = DDPMScheduler(**LOW_RES_SCHEDULER).add_noise(small.cpu(), noise, levels).to(device)
    latents = torch.randn((batch, CHANNELS, height, width), generator=generator).to(device)
    for timestep in scheduler.timesteps.to(device):
        output = unet(torch.cat([latents, small], 1), timestep, None, class_labels=levels.to(device)).sample
        latents = scheduler.step(output, timestep, latents).prev_sample
    return vae.decode(latents / vae.config.scaling_factor).sample.clamp(-1, 1)


def psnr(unet: UNet2DConditionModel, vae: AutoencoderKL, count: int = 8) -> float:
    """Mean PSNR in dB of enlarged renders against the same scenes drawn large."""
    rng, values = random.Random("upscaler validation"), []
    for _ in range(count):
        scene = sample_scene(rng, frozenset())
        truth = torch.from_numpy(render_window(scene, scale=SCALE, left=0, top=0, side=SCALE * SIZE))
        small = torch.from_numpy(render([scene])) * 2 - 1
        image = (upscale(unet, vae, small, steps=8, level=0)[0].cpu() + 1) / 2
        values.append(-10 * (image - truth).square().mean().log10().item())
    return sum(values) / count


def train(
    work: Path,
    *,
    minutes: float,
    steps: int | None = None,
    lr: float = 1e-3,
    device: str = "cpu",
    seed: int = 0,
) -> None:
    """Train (or go on training) the U-Net; the result is `work/unet` in diffusers format."""
    examples = Examples(load_heldout(), seed=seed)
    trainer = Trainer(build_unet(seed), lr, device)
    progress = Progress("upscaler", minutes=minutes, steps=steps)

    def loss(rng: random.Random) -> Tensor:
        return trainer.loss(*examples.sample(rng, choose_side(rng, progress.fraction)))

    def publish() -> None:
        unet = trainer.averaged()
        unet.save_pretrained(work / "unet")
        if (work / "vae").exists():
            vae = AutoencoderKL.from_pretrained(work / "vae").to(device)
            print(f"upscaler: {psnr(unet, vae):.2f} dB", flush=True)

    run(trainer.optimizer, progress, work / "upscaler.pt", loss, publish, seed=seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache/stepfuse/shapes-x4")
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--steps", type=int, help="train by steps instead of minutes: exactly repeatable")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    train(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
