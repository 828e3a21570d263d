"""`Trunk.prepare` for callers that come back once per update and name everything anew: what did not change is kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from ..errors import RequestError
from .unet import Conditioning, Prepared, Trunk

T = TypeVar("T")

PROMPTS = 2
"""Prompts kept: one, or two for callers that evaluate the branches of guidance apart (SDXL: 51 MB per row in bf16)."""
TIMES = 128
"""Timesteps kept."""
WINDOW = 64
"""Timesteps embedded in one go, where the timestep is an element of a scheduler's table."""


def identity(tensor: Tensor | None) -> Hashable:
    """Equal for the same memory with the same contents, as long as the tensor is alive; None: cannot be told.

    Changes in place are seen by the version counter, which all views share; tensors made in inference mode have none.
    Changes that bypass it (`tensor.data`, numpy) are not seen.
    """
    if tensor is None:
        return ()
    if tensor.is_inference():
        return None
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device, tensor._version


class Recent:
    """The last few results of something computed from tensors."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._entries: OrderedDict[Hashable, tuple[object, list[Tensor]]] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], T], *sources: Tensor | None) -> T:
        """The result under `key`, made where it is not there; None is never kept.

        The memory of `sources` is held as long as the entry, so their addresses cannot come back with other contents.
        """
        if key is not None and key in self._entries:
            self._entries.move_to_end(key)
            return self._entries[key][0]  # type: ignore[return-value]
        made = make()
        if key is not None:
            self._entries[key] = (made, [t.detach() for t in sources if t is not None])
            while len(self._entries) > self.size:
                self._entries.popitem(last=False)
        return made

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()


class Hoisted:
    """Prepares a network's updates one at a time, with the work `Trunk.prepare` does once done once.

    The prompt's keys and values are computed once per prompt, the time projections once per schedule: of all timesteps
    of the table the first one belongs to, `WINDOW` at a time.
    """

    def __init__(self, trunk: Trunk) -> None:
        self.trunk = trunk
        self._prompts, self._times = Recent(PROMPTS), Recent(TIMES)

    def clear(self) -> None:
        """Forget everything; to be called when weights have changed."""
        self._prompts.clear()
        self._times.clear()

    def prepared(self, rows: int, timestep: Tensor, conditioning: Conditioning) -> Prepared:
        """What `Trunk.forward` takes for one update of `rows` rows, at update 0.

        timestep: [] or [1] for all rows, or [R]. Raises RequestError where the conditioning does not fit the network or
        the number of rows.
        """
        hidden = conditioning.hidden
        for name, tensor in vars(conditioning).items():
            if tensor is not None and len(tensor) != rows:
                raise RequestError(f"{name}: got {len(tensor)} rows for {rows} latents; give each row its own")
        if timestep.numel() not in (1, rows):
            raise RequestError(f"timestep: got {timestep.numel()} values for {rows} latents; give one, or one for each")
        kv = self._prompts.get(identity(hidden), lambda: self._keys_and_values(conditioning), hidden)
        time = self._time(timestep, conditioning)
        return Prepared(time=time.expand(rows, -1, -1), kv=kv, kv_len=conditioning.kv_len)

    def _keys_and_values(self, conditioning: Conditioning) -> Tensor | None:
        """`prepare` for no timestep at all."""
        none = torch.empty(1, 0, device=self.trunk.conv_in.weight.device)
        return self.trunk.prepare(conditioning, none).kv

    def _time(self, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """The time projections [R or 1, 1, *] of this timestep."""
        sources = [conditioning.pooled, conditioning.time_ids, conditioning.class_labels, conditioning.timestep_cond]
        others = tuple(identity(tensor) for tensor in sources)
        timestep = timestep.reshape(()) if timestep.numel() == 1 else timestep
        held = [timestep, *sources]

        def key(t: Tensor) -> Hashable:
            own = tuple(t.flatten().tolist()) if t.device.type == "cpu" else identity(t)
            return None if own is None or None in others else (own, *others)

        def make() -> Tensor:
            steps = _window(timestep)
            table = self._project(conditioning, steps)
            for i in range(1, steps.shape[1] if len(steps) == 1 else 0):
                self._times.get(key(steps[0, i]), lambda i=i: table[:, i : i + 1], *held)
            return table[:, :1]

        return self._times.get(key(timestep), make, *held)

    def _project(self, conditioning: Conditioning, steps: Tensor) -> Tensor:
        """`prepare` for a prompt of no tokens: time projections [R or 1, U, *] of steps [R or 1, U]."""
        hidden = conditioning.hidden
        empty = None if hidden is None else hidden[:, :0]
        steps = steps.to(self.trunk.conv_in.weight.device)
        return self.trunk.prepare(replace(conditioning, hidden=empty), steps).time


def _window(timestep: Tensor) -> Tensor:
    """The timestep and those after it in the table it is a view of, [1, U]; [R, 1] for one timestep per row."""
    if timestep.numel() > 1:
        return timestep.reshape(-1, 1)
    table = timestep._base
    if table is None or table.dim() != 1 or not table.is_contiguous():
        return timestep.reshape(1, 1)
    first = timestep.storage_offset() - table.storage_offset()
    return table[first : first + WINDOW][None]
