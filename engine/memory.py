"""Bytes of rows and of everything else that is kept on the device, against a budget. Plain numbers, no torch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from .errors import MemoryBudgetError

WORKSPACE = 8
"""Tensors of the largest image beside the skips in `activation_bytes`: input, output, normalised copy, the halves of a
gated feed-forward (4 x 2 channels at a quarter of the sites or fewer) and convolution workspace. A guess until the
allocator's peak was read; `RowSize.activations` takes the measured value."""


@dataclass(frozen=True, kw_only=True)
class RowSize:
    """The plain numbers that fix the bytes of one row of a bucket.

    channels, height, width: of the latents. updates: lines of its tables. columns: of the sampler table. tokens: prompt
    length, 0 without a prompt. prompt_columns: keys and values of all cross-attention layers, per token. time_columns:
    time projections of all residual blocks, per update. image_columns: embedded pictures of its ControlNets, per site
    of the latents. activations: bytes one update needs per model row, estimated (`activation_bytes`) or measured.
    element: bytes of the network's dtype; state: bytes of the sampler's dtype; images: latent-sized tensors of the
    sampler (x, base, model input, three of history, the known image and its noise).
    """

    channels: int
    height: int
    width: int
    updates: int
    columns: int
    tokens: int = 0
    prompt_columns: int = 0
    time_columns: int = 0
    image_columns: int = 0
    activations: int = 0
    element: int = 2
    state: int = 4
    images: int = 8

    @property
    def sampler(self) -> int:
        """Latents, history and the sampler's table of one row."""
        return self.state * (self.images * self.channels * self.height * self.width + self.updates * self.columns)

    @property
    def prepared(self) -> int:
        """Prompt keys and values, time tables and embedded pictures of one model row."""
        images = self.height * self.width * self.image_columns
        return self.element * (self.tokens * self.prompt_columns + self.updates * self.time_columns + images)

    def held(self, branches: int = 1) -> int:
        """Bytes a row with that many model rows keeps while it is parked."""
        return self.sampler + branches * self.prepared

    def total(self, branches: int = 1) -> int:
        """Bytes the row needs while it runs."""
        return self.held(branches) + branches * self.activations


def activation_bytes(
    widths: Sequence[int], layers: int, height: int, width: int, element: int = 2, controls: int = 0
) -> int:
    """An estimate of what one update of a U-Net needs per model row.

    widths: channels of the levels, each half the size of the one before; layers: residual blocks per level; height,
    width: of the latents; controls: ControlNets. Counted: the skips, which live until the way up takes them, WORKSPACE
    images at the largest level, and what ControlNets add to the skips: their sum, and those of the one that runs.
    """
    skips = sum(channels * (layers + 1) * height * width // 4**level for level, channels in enumerate(widths))
    largest = max(channels * height * width // 4**level for level, channels in enumerate(widths))
    return element * (skips * (1 + min(controls, 2)) + WORKSPACE * largest)


class Budget:
    """Device memory in bytes: what is held, by whom, and who can be evicted.

    total_bytes: what the engine may use beside the weights. headroom: fraction of it that stays free for fragmentation
    and workspaces. A holder (row buffers of a bucket, a captured graph, a parked row) is in use or idle; idle holders
    are evicted least recently used first.
    """

    def __init__(self, total_bytes: int, headroom: float = 0.1) -> None:
        self.limit = int(total_bytes * (1 - headroom))
        self._held: dict[Hashable, int] = {}
        self._idle: OrderedDict[Hashable, None] = OrderedDict()

    @property
    def used(self) -> int:
        """Bytes of all holders."""
        return sum(self._held.values())

    @property
    def free(self) -> int:
        """Bytes nobody holds."""
        return self.limit - self.used

    @property
    def idle(self) -> list[Hashable]:
        """Holders that can be evicted, least recently used first."""
        return list(self._idle)

    def hold(self, holder: Hashable, size: int) -> None:
        """Book `size` bytes for a holder in use; a second call changes its size. Raises MemoryBudgetError."""
        more = size - self._held.get(holder, 0)
        if more > self.free:
            raise MemoryBudgetError(
                f"{holder} needs {gigabytes(size)}, free are {gigabytes(self.free)} of {gigabytes(self.limit)}; "
                "evict idle holders first, or lower max_rows"
            )
        self._held[holder] = size
        self._idle.pop(holder, None)

    def use(self, holder: Hashable) -> None:
        """The holder is in use, and not evicted."""
        assert holder in self._held, f"{holder!r} holds nothing"
        self._idle.pop(holder, None)

    def rest(self, holder: Hashable) -> None:
        """The holder is idle from now on: the last of the idle to be evicted."""
        assert holder in self._held, f"{holder!r} holds nothing"
        self._idle[holder] = None
        self._idle.move_to_end(holder)

    def release(self, holder: Hashable) -> None:
        """The holder's bytes were freed; an unknown holder is ignored."""
        self._held.pop(holder, None)
        self._idle.pop(holder, None)

    def fits(self, size: int) -> bool:
        """Whether `size` bytes can be had, if need be by evicting every idle holder."""
        return size <= self.free + sum(self._held[holder] for holder in self._idle)

    def evictions(self, size: int) -> list[Hashable] | None:
        """The idle holders to free, in this order, before `size` bytes fit; None where they are not enough.

        Nothing is changed: the caller frees each and calls `release`.
        """
        free, chosen = self.free, list[Hashable]()
        for holder in self._idle:
            if size <= free:
                break
            free += self._held[holder]
            chosen.append(holder)
        return chosen if size <= free else None

    def largest_rows(self, row: RowSize, branches: int = 1) -> int:
        """The most running rows of this size that fit beside all holders in use."""
        return max(0, self.free + sum(self._held[holder] for holder in self._idle)) // row.total(branches)

    def require(self, row: RowSize, branches: int, width: int, height: int) -> None:
        """Raise MemoryBudgetError where not even one row fits the whole budget. width, height: pixels of the image."""
        need = row.total(branches)
        if need > self.limit:
            lower = "width or height" if branches == 1 else "width or height, or use guidance_scale=1"
            raise MemoryBudgetError(
                f"one row of {width}x{height} needs {gigabytes(need)}, budget {gigabytes(self.limit)}; lower {lower}"
            )


def gigabytes(size: int) -> str:
    """Bytes as text in units of 10^9, or of 10^6 below a tenth of one."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
