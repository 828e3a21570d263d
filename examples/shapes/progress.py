"""The budget of a training stage, in steps or minutes, and how its progress is shown and kept over restarts."""

from __future__ import annotations

import math
import os
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm


class Progress:
    """Counts steps and working seconds of a stage; a bar on a terminal, one plain line every 20 seconds in a pipe.

    A stage ends after `steps` if given (then runs are reproducible exactly), else after `minutes` of working time.
    Time spent in earlier runs counts: `state()` goes into the checkpoint and `restore()` continues the schedule.
    """

    def __init__(self, name: str, *, minutes: float = 0.0, steps: int | None = None) -> None:
        self.name, self.minutes, self.steps = name, minutes, steps
        self.step, self.seconds = 0, 0.0
        self._losses: deque[torch.Tensor] = deque(maxlen=100)
        self._resumed, self._shown = time.monotonic(), time.monotonic()
        self._bar = tqdm(desc=name, total=1000, disable=not sys.stderr.isatty(), bar_format="{l_bar}{bar}{postfix}")

    @property
    def fraction(self) -> float:
        """The part of the budget used, 0..1 and a little over at the end."""
        return self.step / self.steps if self.steps else self.seconds / (60 * self.minutes)

    @property
    def done(self) -> bool:
        return self.fraction >= 1

    def cosine(self, peak: float, *, warmup: int = 50, floor: float = 0.02) -> float:
        """Learning rate of this step: linear warm-up, then a cosine from `peak` to `floor * peak`."""
        decay = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, self.fraction)))
        return peak * min(1.0, (self.step + 1) / warmup) * decay

    def advance(self, loss: torch.Tensor) -> None:
        """Count one step; call once per optimizer step."""
        now = time.monotonic()
        self.seconds += now - self._resumed
        self._resumed = now
        self.step += 1
        self._losses.append(loss.detach())
        if now - self._shown >= (1 if self._bar.disable is False else 20):
            self._shown = now
            mean = torch.stack(list(self._losses)).mean().item()
            text = f"step {self.step} {self.seconds / 60:.1f} min {self.seconds / self.step:.3f} s/step loss {mean:.4f}"
            if self._bar.disable:
                print(f"{self.name}: {100 * self.fraction:.0f}% {text}", flush=True)
            else:
                self._bar.set_postfix_str(text, refresh=False)
                self._bar.update(int(1000 * min(1.0, self.fraction)) - self._bar.n)

    def pause(self) -> None:
        """Leave out the time since the last `advance` (evaluation, writing files)."""
        self._resumed = time.monotonic()

    def state(self) -> dict[str, float]:
        return {"step": self.step, "seconds": self.seconds}

    def restore(self, state: dict[str, float]) -> None:
        self.step, self.seconds = int(state["step"]), state["seconds"]
        self.pause()


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint so that a crash leaves the old one or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """The checkpoint's state, or None where there is none yet."""
    return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None
