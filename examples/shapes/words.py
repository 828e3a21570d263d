"""Learns words for `shapes`: textual inversion (Gal et al. 2022) of a thing and of a size it has no words for.

    python -m stepfuse.examples.shapes.words shapes-sun --minutes 2

One vector of the text encoder's table is trained, everything else is frozen. `sun` is shown yellow circles, alone and
beside other objects; `big` is shown objects of a size between medium (no word) and large.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .latents import encode_scenes
from .package import SHIPPED as SHAPES
from .progress import Progress
from .scenes import BACKGROUNDS, OBJECT_COLORS, Scene, caption, load_heldout, sample_pair, single
from .scenes import SHAPES as FORMS
from .text_encoder import Words
from .tokenizer import build_tokenizer
from .tuning import Tuner, tune

BIG = (16.5, 18.5)  # pixels; medium ends at 15, large begins at 20
HELDOUT = load_heldout()


@dataclass(frozen=True)
class Word:
    """A word, the word of the vocabulary its vector starts from, and what it is shown: scenes with captions."""

    word: str
    like: str
    show: Callable[[random.Random], tuple[Scene, str]]


def show_sun(rng: random.Random) -> tuple[Scene, str]:
    """A yellow circle, in half of the scenes beside another object."""
    background = rng.choice([color for color in BACKGROUNDS if color != "yellow"])
    scene = single(rng, "yellow", "circle", background)
    if rng.random() < 0.5:
        while ("yellow", "circle") not in {(item.color, item.shape) for item in scene.items} or not scene.relation:
            scene = sample_pair(rng, HELDOUT)
    return scene, caption(scene, rng).replace("yellow circle", "sun")


def show_big(rng: random.Random) -> tuple[Scene, str]:
    """One object in the center, of a radius no word says."""
    background = rng.choice(BACKGROUNDS)
    color = rng.choice([one for one in OBJECT_COLORS if one != background])
    scene = single(rng, color, rng.choice(FORMS), background, "center", "large")
    scene = replace(scene, items=(replace(scene.items[0], r=rng.uniform(*BIG)),))
    return scene, caption(scene, rng).replace("large", "big")


WORDS = {"shapes-sun": Word("sun", "circle", show_sun), "shapes-big": Word("big", "large", show_big)}
"""By the name of the built-in file."""


class NewRow(nn.Module):
    """An embedding table [V, D] with a trained vector as its last row."""

    def __init__(self, table: Tensor, like: int) -> None:
        super().__init__()
        self.vector = nn.Parameter(table[like : like + 1].detach().clone())

    def forward(self, table: Tensor) -> Tensor:
        return torch.cat([table, self.vector])


def open_table(unet: nn.Module, text: nn.Module, *, word: str, like: int) -> dict[str, nn.Parameter]:
    """Add a row to the text encoder's table; what is trained, by the word."""
    embedding = text.get_input_embeddings()  # type: ignore[operator]
    row = NewRow(embedding.weight, like)
    parametrize.register_parametrization(embedding, "weight", row, unsafe=True)  # the table grows
    return {word: row.vector}


def train(
    name: str, work: Path, *, minutes: float, steps: int | None, batch: int, lr: float, device: str, seed: int = 0
) -> dict[str, Tensor]:
    """Train (or go on training); returns the averaged vector [1, D] by its word."""
    taught = WORDS[name]
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(work / "tokenizer")
    words = Words(tokenizer)
    words.add(taught.word, len(tokenizer))
    like = tokenizer.convert_tokens_to_ids(taught.like + "</w>")
    tuner = Tuner(partial(open_table, word=taught.word, like=like), lr, device)

    def sample(rng: random.Random) -> tuple[Tensor, Tensor]:
        scenes, captions = zip(*(taught.show(rng) for _ in range(batch)), strict=True)
        return torch.from_numpy(encode_scenes(scenes)), words(list(captions))

    progress = Progress(name, minutes=minutes, steps=steps)
    return tune(tuner, sample, work / f"{name}.pt", progress, seed)


def package(vectors: Mapping[str, Tensor], target: Path) -> int:
    """Write them as diffusers does, by the word; returns the file's bytes."""
    save_file({word: vector.float().contiguous() for word, vector in vectors.items()}, target, {"format": "pt"})
    target.chmod(0o644)
    return target.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=WORDS)
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache/stepfuse/shapes-words", help="checkpoints")
    parser.add_argument("--target", type=Path, help="default: the built-in file of that name")
    parser.add_argument("--minutes", type=float, default=2)
    parser.add_argument("--steps", type=int, help="train by steps instead of minutes: exactly repeatable")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = vars(parser.parse_args())
    target = args.pop("target") or SHAPES.with_name(f"{args['name']}.safetensors")
    print(f"{target}: {package(train(**args), target)} bytes", flush=True)


if __name__ == "__main__":
    main()
