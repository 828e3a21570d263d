"""LoRAs beside a checkpoint: read with it, checked in requests, and given to the rows that asked for them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import RequestError, closest
from .families import builtin_file
from .models.adapted import Chosen, SidePath, adapt
from .weights.lora import Layer, Layers
from .weights.lora_file import LoRA, LowRank, read_lora

Asked = tuple[tuple[str, float], ...]
"""LoRAs of a request, by name, with their strengths, in the order they were loaded."""
Update = tuple[Layer, LowRank]


class RowLoRAs:
    """The LoRAs that requests of one checkpoint choose from, as side paths of its networks."""

    def __init__(
        self, loras: Mapping[str, LoRA] | None = None, networks: Mapping[str, nn.Module] | None = None
    ) -> None:
        """Give every layer that a LoRA changes a side path, in place. networks: loaded and transformed, by component
        name. Raises as `Layers.match`, before anything is changed.
        """
        self.names = tuple(loras or ())
        self.chosen = Chosen()
        self.paths: list[SidePath] = []
        layers = Layers(networks or {})
        matched = {name: layers.match(lora) for name, lora in (loras or {}).items()}
        self._reading = frozenset(name for name, places in matched.items() if any(part != "unet" for part, _ in places))
        kinds: dict[tuple[int, ...], int] = {}
        for part, network in (networks or {}).items():
            changed = [{layers[place]: update for place, update in own.items() if place[0] == part}
                       for own in matched.values()]  # fmt: skip
            for name, updates in _by_module(network, changed).items():
                kind = tuple(number for number, own in enumerate(updates) if own)
                inputs = network.get_submodule(name).get_parameter("weight")[0].numel()
                self.paths.append(SidePath(_bank(updates), inputs, kinds.setdefault(kind, len(kinds)), self.chosen))
                adapt(network, name, self.paths[-1])
        every = range(len(self.names))
        entries = [[kind.index(number) if number in kind else len(kind) for kind in kinds] for number in every]
        self._entries = torch.tensor(entries, dtype=torch.int64)

    def explain(self) -> str:
        """Their names, and the memory of the side paths."""
        size = sum(path.bytes for path in self.paths)
        return f"LoRAs of requests: {', '.join(self.names)}; {len(self.paths)} layers, {size / 2**20:.1f} MiB"

    def settle(self, asked: Sequence[Any]) -> Asked:
        """The LoRAs of a request in the order they were loaded. Raises RequestError."""
        if not isinstance(asked, tuple | list):
            raise RequestError(f"loras: got {asked!r}, expected pairs (name, strength)")
        found: dict[str, float] = {}
        for pair in asked:
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise RequestError(f"loras: got {pair!r}, expected a pair (name, strength)")
            name, strength = pair
            if not self.names:
                raise RequestError("loras: none is loaded; load the model with loras={name: file}, or use set_loras")
            if name not in self.names:
                raise RequestError(f"loras: none is called {name!r}; {closest(str(name), self.names)}")
            if name in found:
                raise RequestError(f"loras: got {name!r} twice; give it once, with the sum of the strengths")
            number = isinstance(strength, int | float) and not isinstance(strength, bool)
            if not number or not math.isfinite(strength):
                raise RequestError(f"loras: {name}: got strength {strength!r}, expected a finite number")
            found[name] = float(strength)
        return tuple((name, found[name]) for name in self.names if name in found)

    def idle(self, count: int) -> Asked:
        """Some LoRAs at a strength of 0. Raises RequestError where there are fewer."""
        if not isinstance(count, int) or not 0 <= count <= len(self.names):
            raise RequestError(
                f"loras: got {count!r}, expected a number up to {len(self.names)}, those that are loaded"
            )
        return tuple((name, 0.0) for name in self.names[:count])

    def for_texts(self, asked: Asked) -> Asked:
        """Those that change what text encoders make of a prompt."""
        return tuple((name, strength) for name, strength in asked if name in self._reading and strength != 0)

    def of(self, asked: Asked) -> AbstractContextManager[None]:
        """What the networks make meanwhile they make with these LoRAs."""
        return self.chosen.of(*self._rows(asked)) if asked else nullcontext()

    def marked(self, prepared: Any, asked: Asked) -> Any:
        """Prepared model rows as those of requests with these LoRAs."""
        if not asked:
            return prepared
        rows = len(prepared.time)
        entries, strengths = (tensor.expand(rows, *tensor.shape[1:]) for tensor in self._rows(asked))
        return replace(prepared, loras=entries, strengths=strengths)

    def _rows(self, asked: Asked) -> tuple[Tensor, Tensor]:
        """Entries [1, S, kinds] and strengths [1, S], as of `Chosen`."""
        bank = self.paths[0].get_buffer("bank")
        entries = self._entries[[self.names.index(name) for name, _ in asked]][None].to(bank.device)
        return entries, bank.new_tensor([[strength for _, strength in asked]])


def read_row_loras(sources: Mapping[str, str | Path]) -> dict[str, LoRA]:
    """Read the files of `EngineConfig.loras`, or built-in ones by name. Raises as `read_lora`, and RequestError."""
    for name, source in sources.items():
        if not isinstance(name, str) or not name or not isinstance(source, str | Path):
            raise RequestError(f"loras: got {name!r}: {source!r}, expected name: file or folder")
    return {name: read_lora(builtin_file(source)) for name, source in sources.items()}


def _by_module(network: nn.Module, changed: Sequence[Mapping[Layer, LowRank]]) -> dict[str, list[list[Update]]]:
    """By the name of a module of the network, what every LoRA changes of it."""
    names = {id(module): name for name, module in network.named_modules()}
    found: dict[str, list[list[Update]]] = {}
    for number, own in enumerate(changed):
        for layer, update in own.items():
            updates = found.setdefault(names[id(layer.module)], [[] for _ in changed])
            updates[number].append((layer, update))
    return found


def _bank(updates: Sequence[Sequence[Update]]) -> Tensor:
    """The bank of a layer, as of SidePath, from its updates by every LoRA, of which those without any share the last
    entry: zero. A layer that several were fused into has the factors of each one after the other.
    """
    present = [own for own in updates if own]
    weight = present[0][0][0].module.weight
    exact = torch.promote_types(weight.dtype, torch.float32)
    factors = [[(layer, *update.factors(exact)) for layer, update in own] for own in present]
    inputs = factors[0][0][1].shape[1]
    rank = max(sum(len(down) for _, down, _ in own) for own in factors)
    bank = torch.zeros(len(present) + (len(present) < len(updates)), rank, inputs + len(weight), dtype=exact)
    for entry, own in zip(bank, factors, strict=False):
        first = 0
        for layer, down, up in own:
            lines = entry[first : first + len(down)]
            lines[:, :inputs] = down
            lines[:, inputs:][:, layer.rows or slice(None)] = up.mT
            first += len(down)
    return bank.to(weight.device, weight.dtype)
