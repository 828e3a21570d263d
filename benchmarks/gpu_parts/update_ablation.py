"""Op ablation inside one guided update of SDXL and SD 1.5: the U-Net's evaluation and the sampler's step, one graph."""

from __future__ import annotations

from typing import Any

from ..random_networks import Update, deploy, unet, unet_inputs
from .ablation import ablate
from .session import Session
from .unets import CASES, TINY_CASES


def run(session: Session) -> None:
    for case, (config, rows) in (TINY_CASES if session.tiny else CASES).items():
        if not session.measure(case, lambda c=config, r=rows: _measure(session, c, r)):
            return


def _measure(session: Session, config: dict[str, Any], rows: int) -> dict[str, Any]:
    update = Update(unet(config, session.device), unet_inputs(config, rows, session.device))
    truth = update()
    deploy(update.unet, session.dtype)
    update.refresh()
    return ablate(session, update, update, truth)
