"""Plans run on linear forms: with a linear denoiser, mean and covariance of the result are known without sampling."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stepfuse.engine.sampling.update import Plan, Update
from stepfuse.kernels.sampler_step.reference import sampler_step


def final_form(
    plan: Plan,
    denoise: Callable[[Tensor, Update], Tensor],
    start: Tensor,
    known: Tensor | None = None,
    *,
    fresh: bool = False,
) -> Tensor:
    """Coefficients [P, K] of the final state of P pixels over (1, the noises of the start, every update's noise).

    `start` [P, K0] are those of the initial state over (1, its noises). `denoise` maps coefficients [P, K] to
    coefficients. Where `known` [P, 2, K0] is given, the image and its noise, the first pixel is new and the
    others are known. fresh: the known image is covered with new noise after every update, not with its own.
    """
    pixels, first = start.shape
    columns = first + pixels * len(plan.updates)

    def widened(form: Tensor) -> Tensor:
        return torch.cat((form, form.new_zeros(*form.shape[:-1], columns - first)), -1)

    table = torch.from_numpy(plan.table()).unsqueeze(0)
    x = widened(start)[None, None]
    base, history = torch.zeros_like(x), torch.zeros(1, 3, *x.shape[1:], dtype=x.dtype)
    one, seeds, past = torch.ones(1, 1, dtype=x.dtype), torch.zeros(1, dtype=torch.int64), torch.zeros_like(x)
    mask = torch.zeros(1, 1, pixels, 1, dtype=x.dtype)
    mask[:, :, 0] = 1.0
    painted = {} if known is None else {"mask": mask, "known": widened(known.movedim(1, 0))[None, :, None]}
    for i, u in enumerate(plan.updates):
        own = torch.zeros_like(x)
        own[0, 0, :, first + pixels * i : first + pixels * (i + 1)] = torch.eye(pixels, dtype=x.dtype)
        output = (denoise(x[0, 0], u) - u.p * x) / u.q
        x, base, history, _, _ = sampler_step(
            x, base, history, output.unsqueeze(1), table, torch.tensor([i]), one, seeds,
            extra_noise=torch.stack((own, past), 1), **painted,
        )  # fmt: skip
        if fresh and known is not None:
            x[0, 0, 1:] = u.known * painted["known"][0, 0, 0, 1:] + u.known_noise * own[0, 0, 1:]
        past = own
    return x[0, 0]
