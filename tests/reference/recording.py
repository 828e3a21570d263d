"""Recorders for machines without CUDA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from stepfuse.engine.graphs import WARM_UP, Run


@dataclass
class Replayed:
    """What a recording does when it is replayed, and how often it was."""

    run: Any
    replays: int = 0

    def replay(self) -> None:
        """Do it again."""
        self.replays += 1
        self.run()


class DryRecorder:
    """Warms up as a capture does, and replays on the CPU. size: bytes every recording is said to hold.

    frozen: replay the torch operations of the recorded run on the memory they touched, without any Python, as a CUDA
    graph does; tracing takes about a second. Otherwise the function itself runs again.
    """

    def __init__(self, size: int = 0, frozen: bool = False) -> None:
        self.size, self.frozen = size, frozen
        self.made: list[Replayed] = []

    def record(self, run: Run) -> tuple[Replayed, int]:
        """As `stepfuse.engine.graphs.CudaRecorder.record`."""
        for _ in range(WARM_UP):
            run()
        with torch.inference_mode():
            self.made.append(Replayed(make_fx(lambda: (run(), ())[1])() if self.frozen else run))
        return self.made[-1], self.size
