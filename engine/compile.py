"""The denoiser through torch.compile, with a limit on how often it may be compiled that is an error to pass.

The whole network is one graph. Compiling its blocks one by one would not be less work: every block reads its own
columns of the hoisted tables, a constant, so no two blocks share their code. CUDA graphs are captured around it by
hand (`graphs`), because inductor's own are skipped where inputs change in place, and here the state always does.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

_numbers = itertools.count()


class Compiled:
    """Compiles a network once per shape; `sizes` numbers of model rows are allowed for all that is not their number.

    Raises torch._dynamo's FailOnRecompileLimitHit where something else makes it compile again: a missed recompilation
    would be slow without a word.
    """

    def __init__(self, network: nn.Module, sizes: int, backend: str = "inductor") -> None:
        self.network, self.sizes, self.backend = network, sizes, backend
        self._entries: dict[Hashable, Callable[..., Tensor]] = {}
        self._seen: set[Hashable] = set()

    @property
    def count(self) -> int:
        """Shapes it was compiled for."""
        return len(self._seen)

    def __call__(self, latents: Tensor, prepared: Any, update: Tensor) -> Tensor:
        """As the network."""
        tensors = {name: tuple(t.shape[1:]) for name, t in vars(prepared).items() if t is not None}
        bucket = tuple(latents.shape[1:]), latents.dtype, tuple(tensors.items())
        if bucket not in self._entries:
            self._entries[bucket] = self._entry()
        self._seen.add((bucket, len(latents)))
        with torch._dynamo.config.patch(recompile_limit=self.sizes, fail_on_recompile_limit_hit=True):
            return self._entries[bucket](latents, prepared, update)

    def _entry(self) -> Callable[..., Tensor]:
        """A compiled function with code of its own: what is compiled for one network and bucket counts for no other."""
        network = self.network

        def run(latents: Tensor, prepared: Any, update: Tensor) -> Tensor:
            return network(latents, prepared, update)

        code = run.__code__.replace(co_name=f"update_{next(_numbers)}")
        own = FunctionType(code, run.__globals__, code.co_name, closure=run.__closure__)
        return torch.compile(own, fullgraph=True, dynamic=False, backend=self.backend)
