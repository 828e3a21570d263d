"""Trains the built-in model `shapes` from nothing and packages it: the one command for everything.

    python -m stepfuse.examples.shapes.train --hours 2

Every stage keeps checkpoints under --work; the same command goes on where it was stopped. With --steps everything is
counted in steps instead of minutes, which is repeatable exactly on the same machine.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from . import autoencoder, denoiser
from .package import SHIPPED, package

SHARES = {"decoder": 0.1, "encoder": 0.1}
AUTOENCODER_STEPS = 2500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache/stepfuse/shapes", help="checkpoints")
    parser.add_argument("--target", type=Path, default=SHIPPED, help="where the packaged model goes")
    parser.add_argument("--hours", type=float, default=2.0, help="for all stages together")
    parser.add_argument("--steps", type=int, help="steps of the denoiser, instead of --hours")
    parser.add_argument("--batch", type=int, default=48, help="scenes a step of the denoiser")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate of the denoiser")
    parser.add_argument("--init-from", type=Path, help="start the denoiser from this diffusers folder")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    minutes = 60 * args.hours
    for stage, share in SHARES.items():
        steps = AUTOENCODER_STEPS if args.steps else None
        autoencoder.train(args.work, stage, minutes=share * minutes, steps=steps, batch=32, lr=2e-3, device=args.device)
    denoiser.train(
        args.work,
        minutes=(1 - sum(SHARES.values())) * minutes,
        steps=args.steps,
        batch=args.batch,
        lr=args.lr,
        device=args.device,
        init_from=args.init_from,
    )
    size = package(args.work, args.target)
    print(f"{args.target}: {size / 2**20:.1f} MiB; now: python -m stepfuse.examples.shapes.evaluate", flush=True)


if __name__ == "__main__":
    main()
