"""Puts the implementation of every op site of a network in place: decided once per bucket, before any tracing."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from torch import nn

from ..kernels.dispatch import Dispatch, Site, record, resolve
from ..kernels.launch_configs import in_use
from ..kernels.op import UnsupportedCallError
from ..kernels.policy import validate
from .config import ResolvedConfig
from .determinism import without_splits
from .errors import RequestError


class Binder:
    """The dispatches of one network, by bucket (rows that share shapes). Raises RequestError for an unusable choice."""

    def __init__(self, module: nn.Module, config: ResolvedConfig) -> None:
        self.module = module
        self.config = config
        self.dispatches: dict[Hashable, Dispatch] = {}
        self._bound: Hashable = None
        try:
            validate(config.kernels)
        except UnsupportedCallError as error:
            raise RequestError(str(error)) from None
        if self.fixed:
            self.bind(None, lambda: None)

    @property
    def fixed(self) -> bool:
        """Whether one dispatch serves all shapes: on a CPU every op is its reference unless the user chose one."""
        return self.config.device.type == "cpu" and self.config.kernels == "auto"

    def bind(self, bucket: Hashable, run: Callable[[], Any]) -> None:
        """Bind the dispatch of `bucket`; the first time, `run()` is called once to record every site's signature."""
        if self.fixed:
            bucket = "every shape"
        if bucket == self._bound:
            return
        if bucket not in self.dispatches:
            self.dispatches[bucket] = self._resolve(run)
        self.dispatches[bucket].bind(self.module)
        self._bound = bucket

    def explain(self) -> str:
        """The records in use and the dispatch of every bucket seen so far."""
        if not self.dispatches:
            ops = {site.op.name for site in self.module.modules() if isinstance(site, Site)}
            return f"{in_use(sorted(ops))}\ndecided by the first request of each shape"
        first, *_ = self.dispatches.values()
        tables = (f"{bucket}:\n{dispatch.table()}" for bucket, dispatch in self.dispatches.items())
        return "\n".join((first.records(), *tables))

    def _resolve(self, run: Callable[[], Any]) -> Dispatch:
        device, choice = self.config.device.type, self.config.kernels
        calls = None if self.fixed else record(self.module, run)
        try:
            dispatch = resolve(self.module, device, choice, calls)
        except UnsupportedCallError as error:
            raise RequestError(str(error)) from None
        return (
            without_splits(dispatch, calls or {}, self.config, self.module) if self.config.deterministic else dispatch
        )
