"""How one update of a batch is executed. Eager: the denoiser, then one `sampler_step` for all rows."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch

from ..kernels import sampler_step
from ..kernels.dispatch import Site
from ..kernels.sampler_step.columns import Column
from .batch import Batch
from .binding import Binder
from .components import Components
from .sampling.guidance import rescale_weights


class Before(NamedTuple):
    """What an update saw, for a preview of it.

    The model's outputs [R, J, C, h, w] and the weights [R, J] they were summed with.
    """

    x: torch.Tensor
    outputs: torch.Tensor
    weights: torch.Tensor
    table: torch.Tensor
    update: torch.Tensor

    def denoised(self, rows: list[int]) -> torch.Tensor:
        """The denoised estimate D = clamp(p x + q sum_j w_j F_j) [n, C, h, w] of the rows at these positions."""
        columns = (Column.P, Column.Q, Column.CLAMP)
        lines = self.table[rows, self.update[rows]]
        p, q, bound = (lines[:, column, None, None, None] for column in columns)
        total = (self.weights[rows, :, None, None, None] * self.outputs[rows]).sum(1)
        return (p * self.x[rows] + q * total).clamp(-bound, bound)


class EagerRunner:
    """Runs updates op by op, with the implementations the components' dispatch bound."""

    def __init__(self, parts: Components) -> None:
        self.parts = parts
        self.step = Site(sampler_step)
        self.binder = Binder(self.step, parts.config)

    @torch.inference_mode()
    def update(self, batch: Batch) -> Before:
        """One network evaluation and sampler update of every row, in place of the batch's tensors."""
        latents = batch.model_input.to(self.parts.config.dtype)[batch.row_of]
        denoise = partial(self.parts.denoiser, latents, batch.prepared, batch.update[batch.row_of])
        self.parts.binders["unet"].bind(tuple(latents.shape), denoise)
        outputs = denoise()[batch.model_rows].to(batch.x.dtype)
        weights = batch.weights
        if batch.rescaled:
            weights = rescale_weights(outputs, weights, batch.rescale).to(batch.x.dtype)
        before = Before(batch.x, outputs, weights, batch.table, batch.update)
        state = (batch.x, batch.base, batch.history, outputs, batch.table, batch.update, weights, batch.seeds)
        step = partial(self.step, *state, draws=batch.draws)
        self.binder.bind((tuple(outputs.shape), batch.draws), step)
        batch.x, batch.base, batch.history, batch.model_input, bad = step()
        batch.bad |= bad
        batch.update = batch.update + 1
        return before
