"""Trains and packages the LoRAs of `shapes`: `shapes-dome` and `shapes-turn`, the styles of styles.py.

    python -m stepfuse.examples.shapes.lora shapes-dome --minutes 8

Low-rank additions (Hu et al. 2022) to attention projections and convolutions of the U-Net, which is frozen as the text
encoder is. Captions do not tell the style: with the LoRA it is there, whatever the prompt says.
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .denoiser import DROP
from .inpainting_weights import LowRank
from .latents import encode_scenes
from .package import SHIPPED as SHAPES
from .progress import Progress
from .scenes import caption, load_heldout, sample_pair, sample_single
from .styles import STYLES
from .text_encoder import Words
from .tokenizer import build_tokenizer
from .tuning import Sample, Tuner, tune

RANK = 4
LAYERS = re.compile(r"to_(q|k|v|out\.0)|resnets\.\d+\.conv[12]")
PAIRS = 0.6  # of the scenes
FILE_LIMIT = 400_000


def open_unet(unet: nn.Module, text: nn.Module | None = None) -> dict[str, nn.Parameter]:
    """Add low-rank updates, zero at first, to the U-Net's layers; what is trained, by its name in the file (PEFT)."""
    trained: dict[str, nn.Parameter] = {}
    for name, layer in list(unet.named_modules()):
        if isinstance(layer, nn.Linear | nn.Conv2d) and LAYERS.search(name):
            added = LowRank(layer.weight, RANK)
            parametrize.register_parametrization(layer, "weight", added)
            trained |= {f"unet.{name}.{part}.weight": parameter for part, parameter in added.named_parameters()}
    return trained


def sampler(style: str, words: Words, batch: int) -> Sample:
    """Batches of fresh scenes, drawn in a style and told as ever; captions are empty one time in ten."""
    heldout, drawn = load_heldout(), STYLES[style]

    def sample(rng: random.Random) -> tuple[Tensor, Tensor]:
        scenes = [sample_pair(rng, heldout) if rng.random() < PAIRS else sample_single(rng) for _ in range(batch)]
        captions = ["" if rng.random() < DROP else caption(scene, rng) for scene in scenes]
        latents = encode_scenes(list(map(drawn.arrange, scenes)), drawn.form)
        return torch.from_numpy(latents), words(captions)

    return sample


def train(
    style: str,
    work: Path,
    *,
    minutes: float,
    steps: int | None,
    batch: int,
    lr: float,
    device: str,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Train (or go on training); returns the averaged low-rank factors by their names in the file."""
    torch.manual_seed(seed)
    words = Words(build_tokenizer(work / "tokenizer"))
    progress = Progress(style, minutes=minutes, steps=steps)
    return tune(Tuner(open_unet, lr, device), sampler(style, words, batch), work / f"{style}.pt", progress, seed)


def package(factors: Mapping[str, Tensor], target: Path) -> int:
    """Write them in float16; returns the file's bytes. RuntimeError where it outgrows its limit."""
    save_file({name: tensor.half().contiguous() for name, tensor in factors.items()}, target, {"format": "pt"})
    target.chmod(0o644)
    if (size := target.stat().st_size) > FILE_LIMIT:
        raise RuntimeError(f"{target}: got {size} bytes, expected at most {FILE_LIMIT}; choose a smaller rank")
    return size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("style", choices=STYLES)
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache/stepfuse/shapes-lora", help="checkpoints")
    parser.add_argument("--target", type=Path, help="default: the built-in file of that name")
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--steps", type=int, help="train by steps instead of minutes: exactly repeatable")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = vars(parser.parse_args())
    target = args.pop("target") or SHAPES.with_name(f"{args['style']}.safetensors")
    print(f"{target}: {package(train(**args), target) / 1e3:.0f} kB", flush=True)


if __name__ == "__main__":
    main()
