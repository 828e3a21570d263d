"""Trains the upscaler `shapes-x4` from nothing and packages it.

    python -m stepfuse.examples.shapes.upscaler_train --hours 1.5

Needs the built-in model `shapes` (train.py), whose pictures it learns to enlarge. Every stage keeps checkpoints under
--work; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from . import upscaler, upscaler_autoencoder
from .upscaler_package import SHIPPED, package

SHARES = {"decoder": 0.2, "encoder": 0.07}
AUTOENCODER_STEPS = 2500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache/stepfuse/shapes-x4", help="checkpoints")
    parser.add_argument("--target", type=Path, default=SHIPPED, help="where the packaged model goes")
    parser.add_argument("--hours", type=float, default=1.5, help="for all stages together")
    parser.add_argument("--steps", type=int, help="steps of the U-Net, instead of --hours")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    minutes = 60 * args.hours
    options = {"lr": args.lr, "device": args.device}
    for stage, share in SHARES.items():
        steps = AUTOENCODER_STEPS if args.steps else None
        upscaler_autoencoder.train(args.work, stage, minutes=share * minutes, steps=steps, **options)
    upscaler.train(args.work, minutes=(1 - sum(SHARES.values())) * minutes, steps=args.steps, **options)
    size = package(args.work, args.target)
    print(
        f"{args.target}: {size / 2**20:.1f} MiB; now: python -m stepfuse.examples.shapes.upscaler_evaluate", flush=True
    )


if __name__ == "__main__":
    main()
