"""The optimizer of every trained part, with a running average of what it trains, and runs that go on after a stop."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from .progress import Progress, load_checkpoint, save_checkpoint

DECAY = 0.999
SAVE_SECONDS = 240.0


class Averaged:
    """Named parameters, their exponential moving average, and the optimizer: what a checkpoint holds.

    Learning rates follow `Progress.cosine`, gradients are clipped at norm 1.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, warmup: int, decay: float = DECAY) -> None:
        """optimizer: of named parameters, with the peak rate, of which a group takes its `scale`, if it has one.

        decay: of the average, after the first steps; 0 makes it the last weights.
        """
        self.optimizer, self.warmup, self.decay = optimizer, warmup, decay
        self.trained: dict[str, Tensor] = {}
        for group in optimizer.param_groups:
            self.trained |= zip(group["param_names"], group["params"], strict=True)
        self.average = {name: parameter.detach().clone() for name, parameter in self.trained.items()}

    def step(self, loss: Tensor, progress: Progress) -> None:
        rate = progress.cosine(self.optimizer.defaults["lr"], warmup=self.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = group.get("scale", 1.0) * rate
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        decay = min(self.decay, (1 + progress.step) / (10 + progress.step))
        current = [parameter.detach() for parameter in self.trained.values()]
        torch._foreach_lerp_(list(self.average.values()), current, 1 - decay)

    def state(self) -> dict:
        trained = {name: parameter.detach() for name, parameter in self.trained.items()}
        return {"trained": trained, "average": self.average, "optimizer": self.optimizer.state_dict()}

    @torch.no_grad()
    def restore(self, state: dict) -> None:
        for name, parameter in self.trained.items():
            parameter.copy_(state["trained"][name])
            self.average[name].copy_(state["average"][name])
        self.optimizer.load_state_dict(state["optimizer"])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Networks have the averaged weights meanwhile."""
        current = [parameter.data for parameter in self.trained.values()]
        for parameter, mean in zip(self.trained.values(), self.average.values(), strict=True):
            parameter.data = mean
        try:
            yield
        finally:
            for parameter, data in zip(self.trained.values(), current, strict=True):
                parameter.data = data


def run(
    optimizer: Averaged,
    progress: Progress,
    checkpoint: Path,
    loss: Callable[[random.Random], Tensor],
    publish: Callable[[], None] = lambda: None,
    *,
    seed: int = 0,
    every: float = SAVE_SECONDS,
) -> None:
    """Train until the budget is used, going on from the checkpoint where there is one.

    loss: of fresh examples, which it draws with the numbers it is given and torch's, both seeded by the step: a resumed
    run is the uninterrupted one. publish: is called whenever the checkpoint was written, after every so many working
    seconds and at the end; the time of both does not count.
    """
    if state := load_checkpoint(checkpoint):
        optimizer.restore(state)
        progress.restore(state["progress"])

    def save() -> None:
        save_checkpoint(checkpoint, optimizer.state() | {"progress": progress.state()})
        publish()
        progress.pause()

    saved = progress.seconds
    progress.pause()
    while not progress.done:
        torch.manual_seed(seed * 1_000_003 + progress.step)
        found = loss(random.Random(f"{progress.name} {seed} {progress.step}"))
        optimizer.step(found, progress)
        progress.advance(found)
        if progress.seconds - saved > every:
            saved = progress.seconds
            save()
    save()
