"""Stream a component's tensors into a module: everything is checked from the headers before anything is allocated."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..errors import CheckpointError, NumericsError
from .checkpoint import TensorInfo
from .keymap import Assignment, KeyMap, assign

_STORED = {"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"}


@runtime_checkable
class Stacked(Protocol):
    """A module that multiplies several of its matrices with one input at once."""

    def stacks(self) -> list[list[str]]:
        """Lists of names of parameters [n_i, D] of one D, each list to lie in one storage, one after another."""
        ...


def load_weights(
    module: nn.Module,
    tensors: Mapping[str, TensorInfo],
    keymap: KeyMap,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    what: str,
) -> None:
    """Fill `module`, built under `torch.device("meta")`, with `tensors` (`Checkpoint.weights`).

    Names and shapes are compared first; only then tensors are read one by one, converted to `dtype` (integers keep
    theirs) and moved to `device`, convolutions in channels-last memory, the matrices of a `Stacked` module as views of
    their stacks. Peak memory is the module plus one tensor. Parameters do not require gradients. what: the component,
    for messages.

    Raises CheckpointError listing by name what is missing, extra, stored twice, mis-shaped or quantised; NumericsError
    naming the tensors that hold NaN or Inf, also where they only arise in `dtype`.
    """
    plan = check_weights(module, tensors, keymap, what)
    by_file: defaultdict[Path, list[Assignment]] = defaultdict(list)
    for assignment in plan:
        by_file[tensors[assignment.key].file].append(assignment)
    places = _allocate_stacks(module, device, dtype)
    finite: dict[str, Tensor] = {}
    for file, assignments in by_file.items():
        with safe_open(file, framework="pt") as stream:
            for a in assignments:
                value = _place(stream.get_tensor(a.key).reshape(a.shape), device, dtype)
                finite[a.key] = torch.isfinite(value).all()
                _store(module, a.name, places[a.name].copy_(value) if a.name in places else value)
    if bad := [key for key, ok in finite.items() if not ok.item()]:
        precision = str(dtype).removeprefix("torch.")
        raise NumericsError(
            f"{what}: {len(bad)} tensors hold NaN or Inf in {precision}: {', '.join(bad[:20])}; "
            "fetch the checkpoint again, or load it in float32 if it is stored so"
        )
    _compute_buffers(module, device, what)
    module.eval()


def check_weights(module: nn.Module, tensors: Mapping[str, TensorInfo], keymap: KeyMap, what: str) -> list[Assignment]:
    """Which stored tensor fills which parameter of `module` (still on the meta device); reads no data.

    Raises CheckpointError as `load_weights` does.
    """
    targets = module.state_dict()
    if filled := [name for name, tensor in targets.items() if not tensor.is_meta]:
        raise ValueError(f"{what}: build the module under torch.device('meta'); {filled[0]} is already allocated")
    plan = assign(
        {key: info.shape for key, info in tensors.items()},
        {name: tuple(tensor.shape) for name, tensor in targets.items()},
        keymap,
        what,
    )
    if odd := [f"{a.key} ({tensors[a.key].dtype})" for a in plan if tensors[a.key].dtype not in _STORED]:
        raise CheckpointError(f"{what} holds quantised tensors, which cannot be loaded yet: {', '.join(odd[:20])}")
    return plan


def _allocate_stacks(module: nn.Module, device: torch.device | str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Where every parameter that belongs to a stack goes, by name."""
    places: dict[str, Tensor] = {}
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    for names in module.stacks() if isinstance(module, Stacked) else []:
        rows = [shapes[name][0] for name in names]
        stack = torch.empty(sum(rows), shapes[names[0]][1], device=device, dtype=dtype)
        places |= dict(zip(names, stack.split(rows), strict=True))
    return places


def _place(value: Tensor, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    value = value.to(device=device, dtype=dtype if value.is_floating_point() else value.dtype)
    return value.contiguous(memory_format=torch.channels_last if value.dim() == 4 else torch.contiguous_format)


def _store(module: nn.Module, name: str, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        owner._buffers[leaf] = value


def _compute_buffers(module: nn.Module, device: torch.device | str, what: str) -> None:
    """Buffers no checkpoint stores: position ids count 0, 1, 2 ... along the last dimension."""
    for name, buffer in list(module.named_buffers()):
        if buffer.is_meta:
            assert name.endswith("position_ids"), f"{what}: {name} is neither stored nor known how to compute"
            values = torch.arange(buffer.shape[-1], dtype=buffer.dtype, device=device)
            _store(module, name, values.expand(buffer.shape).contiguous())
