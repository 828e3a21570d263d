"""Deterministic mode: what is fixed so that the bits of an image depend on nothing but its request (determinism.md).

The shapes are fixed elsewhere (`runner`, `pipeline`): one row count for updates, one image or prompt for all the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import torch

from ..kernels.dispatch import Dispatch, Site, resolve
from ..kernels.op import Call
from .config import ResolvedConfig
from .errors import RequestError

P = ParamSpec("P")
T = TypeVar("T")

SPLITTING = {("attention", "vendor:flash_attn"), ("attention", "vendor:xformers")}
"""Implementations that may split a sum (over keys) in a number of parts that they choose themselves."""


class Configured(Protocol):
    """Something with a resolved configuration."""

    @property
    def config(self) -> ResolvedConfig:
        """It."""
        ...


@contextmanager
def fixed_algorithms(config: ResolvedConfig) -> Iterator[None]:
    """In deterministic mode on CUDA: no timing of algorithms, deterministic convolutions, no split-K in half precision.

    The switches are the process's; they are put back at the end.
    """
    if not config.deterministic or config.device.type != "cuda":
        yield
        return
    cudnn: Any = torch.backends.cudnn  # a module that swaps its class; its switches are not declared
    matmul = torch.backends.cuda.matmul
    reductions = [f"allow_{dtype}_reduced_precision_reduction" for dtype in ("fp16", "bf16")]
    before = cudnn.benchmark, cudnn.deterministic
    allowed = [(getattr(matmul, name), getattr(matmul, f"{name}_split_k")) for name in reductions]
    cudnn.benchmark, cudnn.deterministic = False, True
    for name in reductions:
        setattr(matmul, name, (False, False))
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before
        for name, value in zip(reductions, allowed, strict=True):
            setattr(matmul, name, value)


Phase = Callable[Concatenate[Any, P], T]


def with_fixed_algorithms(phase: Phase[P, T]) -> Phase[P, T]:
    """A function of (something with a configuration, ...) that runs with `fixed_algorithms`."""

    @wraps(phase)
    def run(parts: Configured, *args: P.args, **kwargs: P.kwargs) -> T:
        with fixed_algorithms(parts.config):
            return phase(parts, *args, **kwargs)

    return run


def without_splits(dispatch: Dispatch, calls: Mapping[str, Call], config: ResolvedConfig, model: Any) -> Dispatch:
    """The dispatch with the first implementation that fits in the place of each that may split sums.

    Raises RequestError where the user has chosen such an implementation.
    """
    sites = dict(dispatch.sites)
    ops = {path: module.op for path, module in model.named_modules() if isinstance(module, Site)}
    for path, selected in dispatch.sites.items():
        if (selected.op, selected.implementation) not in SPLITTING:
            continue
        if config.kernels != "auto":
            raise RequestError(
                f"kernels: {selected.op}={selected.implementation} may split sums as it likes; "
                "choose another one, or deterministic=False"
            )
        op, call = ops[path], calls[path]
        fitting = [
            name
            for name, implementation in op.implementations.items()
            if (op.name, name) not in SPLITTING and implementation.unsupported(call) is None
        ]
        choice = {op.name: fitting[0]}
        sites[path] = resolve(model, config.device.type, choice, {path: call}).sites[path]
    return Dispatch(sites)
