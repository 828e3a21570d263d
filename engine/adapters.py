"""LoRAs and learned words of a model, and how a change of them takes its turn between requests."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .components import Components
from .conditioning.textual_inversion import Embedding, TextualInversions, read_embeddings
from .errors import RequestError
from .families import builtin_file
from .models.unet import UNet
from .weights.lora import MergedLoRAs
from .weights.lora_file import LoRA, read_lora

if TYPE_CHECKING:
    from .ticket import Ticket

Source = str | Path


class Adapters:
    """What is merged into the networks of one checkpoint and added to its text encoders. Not thread-safe."""

    def __init__(self, parts: Components) -> None:
        """Raises RequestError for exported networks, whose weights are part of their graphs."""
        require_weights(parts)
        encoders = zip(("text_encoder", "text_encoder_2"), parts.text, strict=False)
        self.loras = MergedLoRAs({"unet": parts.unet, **{name: encoder.model for name, encoder in encoders}})
        self.embeddings = TextualInversions(parts.text)

    @property
    def settings(self) -> dict[str, Any]:
        """What is active, plain and JSON-able; nothing where nothing is."""
        found = {"loras": [list(pair) for pair in self.loras.active], "embeddings": list(self.embeddings.active)}
        return {name: active for name, active in found.items() if active}


@dataclass(eq=False)
class Change:
    """What changes, and the requests submitted after it, which wait for it."""

    make: Callable[[], None]
    behind: list[Ticket] = field(default_factory=list)
    done: Future[None] = field(default_factory=Future)

    def run(self) -> None:
        """Make it; what it raises is for who asked for it."""
        try:
            self.make()
        except Exception as error:  # boundary: a file that does not fit ends its change, not the engine
            self.done.set_exception(error)
        else:
            self.done.set_result(None)


class Changes:
    """Changes in line: the turn of one comes when every request submitted before it has ended.

    For the engine's thread; `add` and `hold` for whoever has its lock.
    """

    def __init__(self) -> None:
        self._line: deque[Change] = deque()

    def __len__(self) -> int:
        return len(self._line)

    def add(self, make: Callable[[], None]) -> Future[None]:
        """Put a change in line; the future ends with it."""
        self._line.append(Change(make))
        return self._line[-1].done

    def hold(self, tickets: Iterable[Ticket]) -> bool:
        """Keep new requests behind the last change, if there is one."""
        if self._line:
            self._line[-1].behind += tickets
        return bool(self._line)

    def first(self) -> Change:
        """The one whose turn is next; it stays in line, and holds requests, until `pop`."""
        return self._line[0]

    def pop(self) -> list[Ticket]:
        """Take the first, which was made, out of line; returns the requests that waited for it alone."""
        return self._line.popleft().behind

    def end(self, error: Exception) -> list[Ticket]:
        """End all changes with an error; returns the requests that waited."""
        for change in self._line:
            change.done.set_exception(error)
        return [ticket for change in self._line for ticket in change.behind]


def require_weights(parts: Components) -> None:
    """Raise RequestError unless all networks that adapters change are in torch."""
    if parts.user is not None:
        raise RequestError(f"{parts.name}: LoRAs and embeddings fit no network of yours; change its weights yourself")
    if not isinstance(parts.denoiser, UNet) or not all(hasattr(e.model, "get_input_embeddings") for e in parts.text):
        raise RequestError(
            f"{parts.name}: the weights of exported networks are fixed; load the checkpoint with runtime='torch' for "
            "LoRAs and embeddings, or merge them into it before it is exported"
        )


def read_loras(given: Sequence[Source | tuple[Source, float]]) -> list[tuple[LoRA, float]]:
    """Read LoRA files, or built-in ones by name, with their strengths, 1 where none is given.

    Raises as `read_lora`, RequestError for no list.
    """
    pairs = _pairs("loras", given, (int, float), "strength")
    return [(read_lora(builtin_file(source)), 1.0 if strength is None else strength) for source, strength in pairs]


def read_words(given: Sequence[Source | tuple[Source, str]]) -> list[Embedding]:
    """Read embedding files, or built-in ones by name; beside some the word to use in place of the file's own.

    Raises as `read_embeddings`, RequestError for no list.
    """
    pairs = _pairs("embeddings", given, (str,), "word")
    return [one for source, word in pairs for one in read_embeddings(builtin_file(source), word)]


def _pairs(name: str, given: Any, kinds: tuple[type, ...], what: str) -> list[tuple[Source, Any]]:
    pairs: list[tuple[Any, Any]] = []
    for entry in given if isinstance(given, list | tuple) else [None]:
        source, value = entry if isinstance(entry, tuple) and len(entry) == 2 else (entry, None)
        right = value is None or (isinstance(value, kinds) and not isinstance(value, bool))
        if not isinstance(source, str | Path) or not right:
            raise RequestError(f"{name}: got {given!r}, expected a list of paths or of (path, {what}); [] removes all")
        pairs.append((source, value))
    return pairs
