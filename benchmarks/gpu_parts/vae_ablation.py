"""Op ablation inside one decoding by our own autoencoder: SDXL's at 1024 x 1024, SD 1.5's at 512 x 512."""

from __future__ import annotations

from typing import Any

import torch

from ..random_networks import autoencoder, deploy
from .ablation import ablate
from .session import Session
from .vaes import SDXL, TINY

CASES = {"sdxl-vae 1024^2": (SDXL, 128), "sd15-vae 512^2": (SDXL, 64)}
TINY_CASES = {"tiny-vae": (TINY, 8)}


def run(session: Session) -> None:
    for case, (config, size) in (TINY_CASES if session.tiny else CASES).items():
        if not session.measure(case, lambda c=config, s=size: _measure(session, c, s)):
            return


def _measure(session: Session, config: dict[str, Any], size: int) -> dict[str, Any]:
    vae = autoencoder(config, session.device)
    latents = torch.randn(1, 4, size, size, device=session.device)
    truth = vae.decode(latents)
    deploy(vae, session.dtype)
    latents = latents.to(session.dtype)
    return ablate(session, vae, lambda: vae.decode(latents), truth)
