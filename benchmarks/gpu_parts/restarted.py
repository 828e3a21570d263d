"""The requests of `equalities` in a process of their own: prints the digests of their final latents as JSON."""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import torch


def digest(latents: torch.Tensor) -> str:
    """SHA-256 of the bytes of a tensor."""
    return hashlib.sha256(latents.detach().cpu().contiguous().numpy().tobytes()).hexdigest()


def main(arguments: list[str] | None = None) -> int:
    """Run all requests together, deterministic."""
    from .equalities import load, unlike
    from .session import Session

    parser = argparse.ArgumentParser(prog="restarted", description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--device", required=True)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args(arguments)
    session = Session("restarted", Path(), torch.device(options.device), options.tiny, 0.0)
    with load(session, options.model, deterministic=True) as engine:
        found = engine.generate(unlike(options.tiny))
    print(json.dumps([digest(one.latents) for one in found]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
