"""LoRA merged into the weights of loaded networks, in place; the originals are kept, so removing it is exact."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, NumericsError, RequestError
from .lora_file import LoRA, LowRank, short_list
from .maps.lora import spellings

_FUSED = ("to_q", "to_k", "to_v")

Place = tuple[str, str]
"""A network ("unet", "text_encoder", "text_encoder_2") and a layer of it, by our name."""


@dataclass(frozen=True, eq=False)
class Layer:
    """A linear layer or convolution, or the rows that stand for it in one that several layers were fused into."""

    module: nn.Linear | nn.Conv2d
    rows: slice | None = None
    frozen: str = ""  # why it cannot be changed, or empty

    @property
    def weight(self) -> Tensor:
        """[o, i] or [o, i, k, k], the very memory the network reads."""
        return self.module.weight.detach()[self.rows or slice(None)]


class Layers:
    """The layers of one checkpoint's networks that LoRAs can change, and every spelling of their names."""

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        """networks: by component name, of "unet", "text_encoder", "text_encoder_2"; transforms are done already."""
        self._layers = {component: _layers(module) for component, module in networks.items()}
        self._spellings = {component: spellings(layers) for component, layers in self._layers.items()}

    def __getitem__(self, place: Place) -> Layer:
        return self._layers[place[0]][place[1]]

    def match(self, lora: LoRA) -> dict[Place, LowRank]:
        """The layer of every update. Raises CheckpointError unless all of them fit, RequestError for a layer that
        cannot be changed.
        """
        found: dict[Place, LowRank] = {}
        lost: list[str] = []
        misshaped: list[str] = []
        for update in lora.updates:
            name = self._spellings.get(update.component, {}).get(update.layer)
            if name is None:
                lost += update.keys
                continue
            layer = self[update.component, name]
            if layer.frozen:
                raise RequestError(f"LoRA {lora.name}: {name} {layer.frozen}")
            shape = (update.up.shape[0], update.down.shape[1])
            kernel = (update.down if update.mid is None else update.mid).shape[2:]
            if shape != layer.weight.shape[:2] or math.prod(kernel) != layer.weight[0, 0].numel():
                misshaped.append(f"{update.keys[0]} {[*shape, *kernel]}, expected {list(layer.weight.shape)}")
            if (update.component, name) in found:
                raise CheckpointError(f"LoRA {lora.name} holds {update.component}.{name} twice, e.g. {update.keys[0]}")
            found[update.component, name] = update
        if lost or misshaped:
            total = sum(len(update.keys) for update in lora.updates)
            parts = [f"{len(lost)} of {total} keys fit no layer: {short_list(lost)}"] if lost else []
            parts += [f"{len(misshaped)} updates of the wrong shape: {short_list(misshaped)}"] if misshaped else []
            raise CheckpointError(
                f"LoRA {lora.name} was made for another model, which has other layers than this one's "
                f"{', '.join(self._layers)}: {'; '.join(parts)}"
            )
        return found


class MergedLoRAs:
    """The LoRAs merged into the networks of one checkpoint.

    Weights are written in place, so views of them (stacked projections), CUDA graphs and compiled networks see the new
    values. Whatever was computed from the old ones (text embeddings, prepared rows of running requests) is the
    caller's to drop. Not thread-safe.
    """

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        """networks: as of Layers."""
        self.active: tuple[tuple[str, float], ...] = ()
        self._layers = Layers(networks)
        self._originals: dict[Place, Tensor] = {}  # on the host

    @torch.no_grad()
    def set(self, loras: Sequence[tuple[LoRA, float]]) -> None:
        """Make every weight W + sum of weight * LoRA's scale * up @ down, W being the checkpoint's own.

        Sums are taken in float32 (float64 for float64 weights) and rounded once, whatever was merged before;
        `set([])` restores the checkpoint's bits. Peak memory on the device: one layer's update.

        Raises, with nothing changed, CheckpointError listing the keys that fit no layer, and RequestError for a
        strength that is no finite number; NumericsError, with all LoRAs removed, where a weight leaves its dtype's
        range.
        """
        for lora, strength in loras:
            if not math.isfinite(strength):
                raise RequestError(f"LoRA {lora.name}: got strength {strength}, expected a finite number")
        wanted: dict[Place, list[tuple[LowRank, float]]] = {}
        for lora, strength in loras:
            for place, update in self._layers.match(lora).items():
                if strength != 0:
                    wanted.setdefault(place, []).append((update, strength))
        self._restore(self._originals.keys() - wanted.keys())
        try:
            finite = {place: self._merge(place, updates) for place, updates in wanted.items()}
        except BaseException:  # out of memory, interrupted: no half-merged network
            self._remove()
            raise
        self.active = tuple((lora.name, float(strength)) for lora, strength in loras)
        if bad := [".".join(place) for place, ok in finite.items() if not ok.item()]:
            self._remove()
            raise NumericsError(
                f"merging LoRAs gives NaN or Inf in {len(bad)} weights: {short_list(bad)}; all LoRAs were removed. "
                "Lower the strength, or load in float32 or bfloat16"
            )

    def _merge(self, place: Place, updates: Sequence[tuple[LowRank, float]]) -> Tensor:
        """Write one weight; returns whether all of it is finite, without waiting for the device."""
        weight = self._layers[place].weight
        if place not in self._originals:
            self._originals[place] = weight.detach().to("cpu", copy=True)
        exact = torch.promote_types(weight.dtype, torch.float32)
        value = self._originals[place].to(weight.device, exact, copy=True)
        for update, strength in updates:
            value += strength * update.delta(weight.device, exact).reshape(weight.shape)
        return torch.isfinite(weight.copy_(value)).all()

    def _remove(self) -> None:
        self._restore(set(self._originals))
        self.active = ()

    def _restore(self, places: set[Place]) -> None:
        for place in places:
            self._layers[place].weight.copy_(self._originals.pop(place))


def _layers(module: nn.Module) -> dict[str, Layer]:
    """The linear layers and convolutions of a network by name; those fused into one under their own names."""
    found: dict[str, Layer] = {}
    for name, layer in module.named_modules():
        stem, _, leaf = name.rpartition(".")
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            continue
        if leaf == "to_qkv":
            width = layer.weight.shape[0] // 3
            found |= {f"{stem}.{own}": Layer(layer, slice(i * width, (i + 1) * width)) for i, own in enumerate(_FUSED)}
            continue
        copied = getattr(module.get_submodule(stem), "folded", None) if isinstance(layer, nn.Conv2d) else None
        frozen = "has a second copy made by transforms=('folded_upsample',); load without it to use this LoRA"
        found[name] = Layer(layer, frozen=frozen if isinstance(copied, Tensor) else "")
    return found
