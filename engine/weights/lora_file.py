"""LoRA files: low-rank updates of layers, in the spellings of kohya, LyCORIS (LoCon), diffusers and PEFT."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError, NumericsError
from .files import PICKLES
from .maps.lora import COMPONENTS, OLD_LAYERS, OTHER_KINDS, ROLES, WRAPPERS

_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
_METADATA = "lora_adapter_metadata"


@dataclass(frozen=True, eq=False)
class LowRank:
    """The update of one layer, W + weight * scale * up @ down (Hu et al. 2021, section 4.1).

    down: [r, i] or [r, i, k, k]; up: [o, r], possibly with trailing ones; mid: [r, r, k, k] between two of 1x1
    (LoCon's CP form), or None. scale: alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA (Kalajdzievski 2023).
    """

    component: str
    layer: str  # as the file spells it
    keys: tuple[str, ...]
    down: Tensor
    up: Tensor
    mid: Tensor | None
    scale: float

    def delta(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """scale * up @ down as [o, i] or [o, i, k, k], computed in `dtype`."""
        down, up = (t.to(device=device, dtype=dtype) for t in (self.down, self.up))
        if self.mid is not None:
            mid = self.mid.to(device=device, dtype=dtype)
            return self.scale * torch.einsum("pqkl,op,qi->oikl", mid, up.flatten(1), down.flatten(1))
        return self.scale * (up.flatten(1) @ down.flatten(1)).unflatten(1, tuple(down.shape[1:]))

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """down [r, i * k * k], which has `mid` in it, and scale * up [o, r]: their product is `delta`. On the host."""
        down, up = self.down.to(dtype), self.up.to(dtype).flatten(1)
        if self.mid is not None:
            down = torch.einsum("pqkl,qi->pikl", self.mid.to(dtype), down.flatten(1))
        return down.flatten(1), self.scale * up


@dataclass(frozen=True, eq=False)
class LoRA:
    """What one file holds."""

    name: str
    updates: tuple[LowRank, ...]


def read_lora(source: str | Path) -> LoRA:
    """Read a `.safetensors` file, or a folder saved by diffusers or PEFT.

    Raises CheckpointError for what is no safetensors file, for adapters of another kind (DoRA, LoHa, LoKr ...), and
    for keys that are not understood or pairs that are not complete, listing them; NumericsError for NaN or Inf.
    """
    path = _locate(Path(source).expanduser())
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise CheckpointError(f"LoRA {path}: not a safetensors file ({error}); fetch it again") from None
    return parse_lora(path.stem if path.name not in _FILES else path.parent.name, tensors, _settings(path, metadata))


def parse_lora(name: str, tensors: Mapping[str, Tensor], settings: Mapping[str, Any] | None = None) -> LoRA:
    """A LoRA from its tensors. settings: PEFT's configuration, its keys led by `component.`. Raises as `read_lora`."""
    _refuse_other_kinds(name, tensors)
    layers: dict[tuple[str, str], dict[str, str]] = {}
    strange: list[str] = []
    for key in tensors:
        parsed = _parse_key(key)
        role = "" if parsed is None else parsed[2]
        if parsed is None or role in (found := layers.setdefault(parsed[:2], {})):
            strange.append(key)
        else:
            found[role] = key
    half = [key for roles in layers.values() if not {"down", "up"} <= roles.keys() for key in roles.values()]
    problems = {"not understood": strange, "without the other half of their pair": half}
    if strange or half:
        listed = (f"{len(keys)} keys {what}: {short_list(keys)}" for what, keys in problems.items() if keys)
        raise CheckpointError(f"LoRA {name}: {'; '.join(listed)}")
    if not layers:
        raise CheckpointError(f"LoRA {name}: the file is empty")
    updates = tuple(
        _update(name, component, layer, roles, tensors, settings or {}) for (component, layer), roles in layers.items()
    )
    return LoRA(name, updates)


def short_list(keys: Iterable[str], limit: int = 20) -> str:
    """The first keys, sorted, for a message."""
    keys = sorted(keys)
    return ", ".join(keys[:limit]) + (f" and {len(keys) - limit} more" if len(keys) > limit else "")


def _update(
    name: str, component: str, layer: str, roles: dict[str, str], tensors: Mapping[str, Tensor], settings: Any
) -> LowRank:
    down, up = tensors[roles["down"]], tensors[roles["up"]]
    mid = tensors[roles["mid"]] if "mid" in roles else None
    rank = down.shape[0] if down.dim() else 0
    fits = down.dim() in (2, 4) and up.dim() in (2, 4) and up.numel() == up.shape[0] * rank and rank > 0
    if mid is not None:  # between two 1x1 convolutions
        fits = fits and mid.dim() == 4 and mid.shape[:2] == (rank, rank) and down.numel() == rank * down.shape[1]
    if not fits or ("alpha" in roles and tensors[roles["alpha"]].numel() != 1):
        shapes = ", ".join(f"{key} {list(tensors[key].shape)}" for key in roles.values())
        raise CheckpointError(f"LoRA {name}: shapes that are no low-rank update [r, i...] and [o, r]: {shapes}")
    if bad := [key for key in roles.values() if not torch.isfinite(tensors[key]).all()]:
        raise NumericsError(f"LoRA {name}: NaN or Inf in {', '.join(bad)}; fetch the file again")
    alpha, root = _alpha(component, layer, settings)
    if "alpha" in roles:
        alpha = float(tensors[roles["alpha"]].item())
    scale = 1.0 if alpha is None else alpha / (math.sqrt(rank) if root else rank)
    return LowRank(component, layer, tuple(roles.values()), down, up, mid, scale)


def _parse_key(key: str) -> tuple[str, str, str] | None:
    """(component, layer as spelled, role), or None."""
    found = ((re.search(pattern, key), role) for pattern, role in ROLES)
    match, role = next(((match, role) for match, role in found if match), (None, ""))
    if match is None:
        return None
    layer, component = _unwrap(key[: match.start()]), "unet"
    for prefix, owner in COMPONENTS:
        if layer.startswith(prefix):
            layer, component = _unwrap(layer.removeprefix(prefix)), owner
            break
    for old, modern in OLD_LAYERS:
        layer = re.sub(old, modern, layer)
    return component, layer, role


def _unwrap(layer: str) -> str:
    for wrapper in WRAPPERS:
        layer = layer.removeprefix(wrapper)
    return layer


def _refuse_other_kinds(name: str, tensors: Mapping[str, Tensor]) -> None:
    for pattern, kind in OTHER_KINDS:
        if found := sorted(key for key in tensors if re.search(pattern, key)):
            raise CheckpointError(
                f"LoRA {name}: holds {kind} ({len(found)} keys, e.g. {found[0]}), which is not supported; expected "
                "plain LoRA or LoCon weights: merge it into the checkpoint with the tool it was trained with"
            )


def _alpha(component: str, layer: str, settings: Mapping[str, Any]) -> tuple[float | None, bool]:
    """alpha by PEFT's configuration, and whether it is divided by the root of the rank."""
    own = {
        key.removeprefix(f"{component}."): value for key, value in settings.items() if key.startswith(component + ".")
    }
    if own.get("use_dora"):
        raise CheckpointError(f"the LoRA's configuration says use_dora for {component}: DoRA is not supported")
    alpha = own.get("lora_alpha")
    for pattern, value in (own.get("alpha_pattern") or {}).items():
        try:
            alpha = value if re.fullmatch(rf"(.*\.)?({pattern})", layer) else alpha
        except re.error as error:
            raise CheckpointError(
                f"the LoRA's configuration: alpha_pattern {pattern!r} is no pattern ({error})"
            ) from None
    return None if alpha is None else float(alpha), bool(own.get("use_rslora"))


def _settings(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """PEFT's configuration from the header (diffusers) or the file beside the weights (PEFT, U-Net alone)."""
    beside = path.with_name("adapter_config.json")
    text, prefix = metadata.get(_METADATA, ""), ""
    if not text and path.name == _FILES[1] and beside.is_file():
        text, prefix = beside.read_text(encoding="utf-8"), "unet."
    try:
        found = json.loads(text or "{}")
    except ValueError as error:
        raise CheckpointError(f"LoRA {path}: its configuration is no JSON ({error})") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"LoRA {path}: its configuration is no JSON object")
    return {f"{prefix}{key}": value for key, value in found.items()}


def _locate(path: Path) -> Path:
    if path.is_dir():
        found = [path / name for name in _FILES if (path / name).is_file()] or sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            names = ", ".join(file.name for file in found) or "none"
            raise CheckpointError(
                f"LoRA {path}: expected one safetensors file in the folder, found {names}; name the file"
            )
        return found[0]
    if path.suffix in PICKLES:
        raise CheckpointError(f"LoRA {path}: pickled files can run code when opened; get the safetensors file")
    if not path.is_file():
        raise CheckpointError(f"LoRA {path}: no such file or folder; `stepfuse models` lists the built-in ones")
    return path
