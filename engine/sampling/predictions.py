"""What a network predicts: D = p x + q F for every prediction type. Plain numbers, no torch."""

from __future__ import annotations

import math

from ..errors import RequestError, closest

ALIASES = {
    "eps": "epsilon",
    "v": "v_prediction",
    "x0": "sample",
    "original_sample": "sample",
    "flow_prediction": "flow",
}
PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow", "score", "edm", "trigflow")


def resolve_prediction(name: str) -> str:
    """The canonical name of a prediction type; RequestError names the valid ones."""
    name = ALIASES.get(name, name)
    if name not in PREDICTIONS:
        raise RequestError(f"unknown prediction type {name!r}; {closest(name, PREDICTIONS)}")
    return name


def denoised_coefficients(
    prediction: str, alpha: float, sigma: float, *, sigma_data: float = 1.0
) -> tuple[float, float]:
    """(p, q) of the denoised estimate D = p x + q F at the level x = alpha x0 + sigma eps.

    epsilon  F = eps                                      (Ho et al. 2020)
    v        F = (alpha eps - sigma x0) / hypot           (Salimans & Ho 2022; hypot = 1 when variance preserving, and
             the same line serves the variance exploding state: c_skip, c_out of k-diffusion's VDenoiser)
    sample   F = x0
    flow     F = eps - x0, alpha + sigma = 1              (rectified flow)
    score    F = grad log p(x)                            (Song et al. 2021)
    edm      D = c_skip x + c_out F, alpha = 1            (Karras et al. 2022, table 1)
    trigflow alpha = cos t, sigma = sin t                 (Lu & Song 2024)

    Raises RequestError where the type does not determine x0 (epsilon or score at alpha = 0, a zero-terminal-SNR level).
    """
    if alpha == 0.0 and prediction in ("epsilon", "score"):
        raise RequestError(
            f"prediction type {prediction!r} says nothing about the image at a level without signal (zero terminal "
            "SNR); use schedule='leading', which starts below it, or a checkpoint trained with v_prediction"
        )
    if prediction == "epsilon":
        return 1.0 / alpha, -sigma / alpha
    if prediction == "v_prediction":
        norm = math.hypot(alpha, sigma)
        return alpha / norm**2, -sigma / norm
    if prediction == "sample":
        return 0.0, 1.0
    if prediction == "flow":
        return 1.0 / (alpha + sigma), -sigma / (alpha + sigma)
    if prediction == "score":
        return 1.0 / alpha, sigma**2 / alpha
    if prediction == "edm":
        norm = math.hypot(sigma, sigma_data)
        return (sigma_data / norm) ** 2, sigma * sigma_data / norm
    if prediction == "trigflow":
        return alpha, -sigma
    raise RequestError(f"unknown prediction type {prediction!r}; {closest(prediction, PREDICTIONS)}")
