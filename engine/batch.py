"""Device state of the running rows. A row is one image; rows of one batch may differ in everything but shapes.

The tensors stay where they are while rows come and go, so that a captured update can be replayed on them: joining
copies a row in, leaving moves the last rows into the holes, and whoever runs fewer rows than fit takes a prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..kernels.sampler_step.columns import HISTORY, Column

WINDOW = 64
"""Lines of a row's table, and timesteps projected for it, that are on hand in the batch; longer plans are refilled."""


class ModelRows(Protocol):
    """Step-invariant inputs of the denoiser: a dataclass of tensors (or None) that lead with the model rows."""

    time: Tensor  # [M, U, *], one line per update


@dataclass(frozen=True, eq=False, kw_only=True)
class Arrivals:
    """n rows of one request before their first update, each with the same branches and table.

    x: float32 [n, C, h, w]; c_in: scale of x for the first evaluation; table: like x [U, K]; weights: guidance weight
    of every branch; rescale: guidance_rescale; seeds: one per row; draws: the most noises one update needs; channels:
    of the network's output; prepared: n * branches model rows (row 0 branch 0, row 0 branch 1, row 1 ...).
    mask [n, 1, h, w] and known [n, 2, C, h, w], or neither: as of `sampler_step`, for a table that puts a known image
    back. concat: [n * branches, E, h, w], what the network takes beside the latents at every update; None: E is 0.
    threshold: percentile and largest limit of a dynamic threshold (`sampling.limits`), or None.
    """

    x: Tensor
    c_in: float
    table: Tensor
    weights: Sequence[float]
    rescale: float
    seeds: Sequence[int]
    draws: int
    channels: int
    prepared: Any
    mask: Tensor | None = None
    known: Tensor | None = None
    concat: Tensor | None = None
    threshold: tuple[float, float] | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class State:
    """Tensors of R rows with up to J guidance branches each, and of M model rows: one per branch a row has.

    A row whose table is zero is padding: it stays as it is and does no harm. Padding model rows compute something that
    nobody reads. Everything of the network is in its dtype and channels-last.
    """

    x: Tensor  # float32 [R, C, h, w]
    base: Tensor  # like x
    history: Tensor  # like x [R, 3, C, h, w]
    table: Tensor  # like x [R, WINDOW, K]
    update: Tensor  # int64 [R], updates done
    first_line: Tensor  # int64 [R], the update the first line of the table belongs to
    weights: Tensor  # like x [R, J], 0 for branches a row does not have
    rescale: Tensor  # like x [R]
    threshold: Tensor  # float64 [R, 2], percentile (0: none) and largest limit of dynamic thresholding
    seeds: Tensor  # int64 [R]
    bad: Tensor  # bool [R], NaN or Inf was seen
    mask: Tensor  # like x [R, 1, h, w]; nothing in the table of a row without one reads it
    known: Tensor  # like x [R, 2, C, h, w], the known image and its noise; as mask
    model_rows: (
        Tensor  # int64 [R, J], where each branch is; absent branches are a row's first, padding is the last place
    )
    row_of: Tensor  # int64 [M], the row of every model row; 0 for padding
    model_input: Tensor  # [M, C + E, h, w], c_in * x and what the network takes beside it
    prepared: Any  # M model rows
    outputs: Tensor  # [all model rows and one place for padding, C_out, h, w], of the last update

    @staticmethod
    def zeros(x: Tensor, prepared: Any, channels: int, rows: int, width: int, extra: int = 0) -> State:
        """Room for `rows` rows of `width` branches, with the shapes of x [*, C, h, w] and of `prepared`.

        channels: of the network's output; extra: of its input beside the latents.
        """
        shape, model_rows, dtype = x.shape[1:], rows * width, prepared.time.dtype
        integers = {"dtype": torch.int64, "device": x.device}

        def image(count: int, channels: int) -> Tensor:
            made = torch.zeros(count, channels, *shape[1:], dtype=dtype, device=x.device)
            return made.contiguous(memory_format=torch.channels_last)

        def room(name: str, tensor: Tensor) -> Tensor:
            lines = (WINDOW,) if name == "time" else tensor.shape[1:2]
            return tensor.new_zeros(model_rows, *lines, *tensor.shape[2:])

        return State(
            x=x.new_zeros(rows, *shape),
            base=x.new_zeros(rows, *shape),
            history=x.new_zeros(rows, HISTORY, *shape),
            table=x.new_zeros(rows, WINDOW, len(Column)),
            update=torch.zeros(rows, **integers),
            first_line=torch.zeros(rows, **integers),
            weights=x.new_zeros(rows, width),
            rescale=x.new_zeros(rows),
            threshold=torch.zeros(rows, 2, dtype=torch.float64, device=x.device),
            seeds=torch.zeros(rows, **integers),
            bad=torch.zeros(rows, dtype=torch.bool, device=x.device),
            mask=x.new_zeros(rows, 1, *shape[1:]),
            known=x.new_zeros(rows, 2, *shape),
            model_rows=torch.full((rows, width), model_rows, **integers),
            row_of=torch.zeros(model_rows, **integers),
            model_input=image(model_rows, shape[0] + extra),
            prepared=_each(prepared, room),
            outputs=image(model_rows + 1, channels),
        )

    def prefix(self, rows: int, model_rows: int) -> State:
        """The first rows and model rows, in the same memory."""
        return replace(
            self,
            **{name: getattr(self, name)[:rows] for name in _OF_ROWS},
            row_of=self.row_of[:model_rows],
            model_input=self.model_input[:model_rows],
            prepared=_each(self.prepared, lambda _, tensor: tensor[:model_rows]),
        )

    def of_rows(self) -> list[Tensor]:
        """The tensors that lead with the rows and move with them."""
        return [getattr(self, name) for name in _OF_ROWS if name != "model_rows"]

    def of_model_rows(self) -> list[Tensor]:
        """The tensors that lead with the model rows and move with them."""
        return [self.model_input, *_tensors(self.prepared)]

    @property
    def latent_input(self) -> Tensor:
        """The part of the network's input that updates change [M, C, h, w], in the same memory."""
        return self.model_input[:, : self.x.shape[1]]

    @property
    def bytes(self) -> int:
        """Memory of all tensors."""
        own = [value for value in vars(self).values() if isinstance(value, Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in (*own, *_tensors(self.prepared)))


_OF_ROWS = ("x", "base", "history", "table", "update", "first_line", "weights", "rescale", "threshold", "seeds", "bad",
            "mask", "known", "model_rows")  # fmt: skip


class Needs(NamedTuple):
    """What an update has to do for a row, or for some of its rows."""

    draws: int = 0  # the most noises of one update; 0: deterministic
    rescaled: bool = False  # a guidance_rescale
    limited: bool = False  # a dynamic threshold
    masked: bool = False  # a known image to put back


@dataclass(eq=False)
class Seat:
    """What the host knows about a row: who owns it, its model rows, how far it is.

    table, time: the whole plan [U, K] and its projections [branches, U, *], kept where they do not fit the window.
    """

    owner: Hashable
    places: list[int]
    updates: int
    needs: Needs
    table: Tensor | None = None
    time: Tensor | None = None
    done: int = 0
    first: int = 0


@dataclass(eq=False, kw_only=True)
class Saved:
    """A row in the middle of its run, outside a batch: copies of all it needs to go on.

    rows: of every tensor that leads with the rows, in the order of `State.of_rows`; model_input: of its branches;
    table: the whole plan [U, K]; channels: of the network's output; prepared: its model rows, with the projections of
    the whole plan; None: dropped, whoever restores the row computes them again.
    """

    seat: Seat
    rows: list[Tensor]
    model_input: Tensor
    table: Tensor
    channels: int
    prepared: Any | None

    @property
    def bytes(self) -> int:
        """Memory of all tensors."""
        kept = [] if self.prepared is None else _tensors(self.prepared)
        return sum(t.numel() * t.element_size() for t in (*self.rows, self.model_input, self.table, *kept))


class Batch:
    """The running rows of one bucket. Model rows are compact, in any order; so are rows.

    controls: names of the ControlNets they run through.
    """

    def __init__(self, max_rows: int, width: int = 1, controls: tuple[str, ...] = ()) -> None:
        self.max_rows, self.width, self.controls = max_rows, width, controls
        self.seats: list[Seat] = []
        self._state: State | None = None
        self._prefixes: dict[tuple[int, int], State] = {}

    def __len__(self) -> int:
        return len(self.seats)

    @property
    def state(self) -> State:
        """All tensors. Another object once the batch has grown; captures of the old one are worthless then."""
        assert self._state is not None, "nobody has joined"
        return self._state

    @property
    def owners(self) -> list[Any]:
        """Host ids of the rows."""
        return [seat.owner for seat in self.seats]

    @property
    def capacity(self) -> int:
        """Rows there is room for."""
        return 0 if self._state is None else len(self._state.x)

    @property
    def model_rows(self) -> int:
        """Model rows in use."""
        return sum(len(seat.places) for seat in self.seats)

    @property
    def needs(self) -> Needs:
        """What an update of all rows has to do."""
        return Needs(*map(max, zip(Needs(), *(seat.needs for seat in self.seats), strict=True)))

    @property
    def bytes(self) -> int:
        """Memory of all tensors."""
        return 0 if self._state is None else self._state.bytes

    def prefix(self, rows: int, model_rows: int) -> State:
        """`State.prefix`, the same object every time."""
        key = rows, model_rows
        if key not in self._prefixes:
            self._prefixes[key] = self.state.prefix(rows, model_rows)
        return self._prefixes[key]

    def join(self, new: Arrivals, owners: Sequence[Hashable]) -> None:
        """Copy rows in after the ones that run. Nothing has changed if it runs out of memory."""
        first, start, branches = len(self), self.model_rows, len(new.weights)
        count, model_rows = first + len(owners), start + len(owners) * branches
        extra = 0 if new.concat is None else new.concat.shape[1]
        self._make_room(new.x, new.prepared, new.channels, count, branches, extra)
        state, rows = self.state, slice(first, count)
        state.x[rows] = new.x
        state.base[rows] = new.x
        for tensor in (state.history, state.update, state.weights, state.bad):
            tensor[rows] = 0
        state.rescale[rows] = new.rescale
        for column, value in enumerate(new.threshold or (0.0, 0.0)):
            state.threshold[rows, column] = value
        for branch, weight in enumerate(new.weights):
            state.weights[rows, branch] = weight
        if new.mask is not None and new.known is not None:
            state.mask[rows], state.known[rows] = new.mask, new.known
        state.model_input[start:model_rows] = _network_input(new)
        for target, source in _pairs(state.prepared, new.prepared):
            target[start:model_rows] = source
        updates = len(new.table)
        needs = Needs(new.draws, new.rescale > 0, new.threshold is not None, new.mask is not None)
        for i, owner in enumerate(owners):
            own = slice(i * branches, (i + 1) * branches)
            state.seeds[first + i] = new.seeds[i]
            places = list(range(start + own.start, start + own.stop))
            seat = Seat(owner, places, updates, needs)
            self.seats.append(seat)
            self._fill(first + i, new.table, new.prepared.time[own])
            if updates > WINDOW:
                seat.table, seat.time = new.table, new.prepared.time[own]
        self._index()

    def save(self, position: int, keep_prepared: bool = True) -> Saved:
        """Copy a row, to go on later in this or another batch of its bucket; the caller lets it leave.

        keep_prepared: also what `prepare` computed for it, most of its memory.
        """
        state, seat = self.state, self.seats[position]

        def part(name: str, tensor: Tensor) -> Tensor:
            if name != "time":
                return tensor[seat.places]
            return tensor[seat.places, : seat.updates] if seat.time is None else seat.time

        return Saved(
            seat=replace(seat, table=None, time=None),
            rows=[tensor[position].clone() for tensor in state.of_rows()],
            model_input=state.model_input[seat.places],
            table=state.table[position, : seat.updates].clone() if seat.table is None else seat.table,
            channels=state.outputs.shape[1],
            prepared=_each(state.prepared, part) if keep_prepared else None,
        )

    def restore(self, saved: Saved, prepared: Any) -> None:
        """Copy a saved row in after the ones that run; prepared: its model rows. As `join` where memory is short."""
        position, start, branches = len(self), self.model_rows, len(saved.seat.places)
        extra = saved.model_input.shape[1] - saved.rows[0].shape[0]
        self._make_room(saved.rows[0][None], prepared, saved.channels, position + 1, branches, extra)
        state, places = self.state, slice(start, start + branches)
        for target, source in zip(state.of_rows(), saved.rows, strict=True):
            if target is state.weights:  # the batches may have room for different numbers of branches
                target[position] = 0
                target[position, :branches] = source[:branches]
            else:
                target[position] = source
        for target, source in [(state.model_input, saved.model_input), *_pairs(state.prepared, prepared)]:
            target[places] = source
        long = saved.seat.updates > WINDOW
        kept = (saved.table, prepared.time) if long else (None, None)
        seat = replace(saved.seat, places=list(range(start, start + branches)), table=kept[0], time=kept[1])
        self.seats.append(seat)
        self._fill(position, saved.table, prepared.time)
        self._index()

    def take(self, positions: Sequence[int]) -> tuple[list[Tensor], list[bool]]:
        """Copies of the latents [C, h, w] of these rows, and which of them saw NaN or Inf. Waits for the device."""
        return [self.state.x[position].clone() for position in positions], self.state.bad[list(positions)].tolist()

    def leave(self, positions: Sequence[int]) -> None:
        """Take rows out; the last ones move into their places."""
        state, gone = self.state, set(positions)
        kept = [position for position in range(len(self)) if position not in gone]
        free = [place for position in gone for place in self.seats[position].places]
        before, model_rows = len(self), self.model_rows - len(free)
        moved = _moves(kept, len(kept))
        for source, target in moved:
            _move(state.of_rows(), source, target)
            self.seats[target] = self.seats[source]
        del self.seats[len(kept) :]
        state.table[len(kept) : before] = 0
        used = [place for seat in self.seats for place in seat.places]
        homes = dict(_moves(used, model_rows))
        for source, target in homes.items():
            _move(state.of_model_rows(), source, target)
        for seat in self.seats:
            seat.places = [homes.get(place, place) for place in seat.places]
        self._index()

    def refill(self) -> None:
        """Move the windows of rows that come to the end of theirs. Copies on the device: nothing waits."""
        for position, seat in enumerate(self.seats):
            last = seat.done + 1 == seat.first + WINDOW  # an update reads its line and the next one
            if last and seat.table is not None and seat.first + WINDOW < seat.updates:
                seat.first = seat.done
                assert seat.time is not None
                self._fill(position, seat.table, seat.time)

    def advance(self) -> None:
        """Note on the host that every row was updated."""
        for seat in self.seats:
            seat.done += 1

    def reserve(self, rows: int, width: int) -> None:
        """Room for this many rows and branches: new tensors, with what the old ones held."""
        old, before = self.state, (self.capacity, self.width)
        if rows <= before[0] and width <= before[1]:
            return
        rows, width = max(rows, before[0]), max(width, before[1])
        extra = old.model_input.shape[1] - old.x.shape[1]
        made = State.zeros(old.x, old.prepared, old.outputs.shape[1], rows, width, extra)
        for target, source in zip(
            (*made.of_rows(), *made.of_model_rows()), (*old.of_rows(), *old.of_model_rows()), strict=True
        ):
            target[tuple(slice(0, n) for n in source.shape)] = source
        self._replace(made, width)

    def _make_room(self, x: Tensor, prepared: Any, channels: int, rows: int, width: int, extra: int) -> None:
        """Room grows by powers of two up to max_rows."""
        room = min(1 << (rows - 1).bit_length(), max(rows, self.max_rows))
        if self._state is None:
            width = max(width, self.width)
            self._replace(State.zeros(x, prepared, channels, room, width, extra), width)
        elif rows > self.capacity or width > self.width:
            self.reserve(max(self.capacity, room), width)

    def _replace(self, state: State, width: int) -> None:
        self._state, self.width = state, width
        self._prefixes.clear()
        self._index()

    def _fill(self, position: int, table: Tensor, time: Tensor) -> None:
        """Put in place the window of a plan [U, K] and its projections [branches, U, *] from `seat.first` on."""
        state, seat = self.state, self.seats[position]
        lines = slice(seat.first, seat.first + WINDOW)
        part = table[lines]
        state.table[position, : len(part)] = part
        state.table[position, len(part) :] = 0
        state.first_line[position] = seat.first
        for place, rows in zip(seat.places, time, strict=True):
            state.prepared.time[place, : len(part)] = rows[lines]

    def _index(self) -> None:
        """Write where everybody's model rows are."""
        state, nowhere = self.state, self.capacity * self.width
        row_of = [0] * nowhere
        model_rows = [[nowhere] * self.width for _ in range(self.capacity)]
        for position, seat in enumerate(self.seats):
            model_rows[position] = seat.places + seat.places[:1] * (self.width - len(seat.places))
            for place in seat.places:
                row_of[place] = position
        for target, values in ((state.row_of, row_of), (state.model_rows, model_rows)):
            target.copy_(torch.tensor(values, pin_memory=target.is_cuda), non_blocking=True)


def _network_input(new: Arrivals) -> Tensor:
    """What the network takes of arriving rows at their first update [n * branches, C + E, h, w]."""
    scaled = (new.x * new.c_in).repeat_interleave(len(new.weights), 0)
    return scaled if new.concat is None else torch.cat([scaled, new.concat.to(scaled.dtype)], 1)


def _moves(used: Sequence[int], count: int) -> list[tuple[int, int]]:
    """(from, to) for the `count` places in use, so that they become 0 to count - 1."""
    holes = sorted(set(range(count)) - set(used))
    return list(zip(sorted(place for place in used if place >= count), holes, strict=True))


def _move(tensors: Sequence[Tensor], source: int, target: int) -> None:
    torch._foreach_copy_([tensor[target] for tensor in tensors], [tensor[source] for tensor in tensors])


def _tensors(prepared: Any) -> list[Tensor]:
    return [value for field in fields(prepared) if isinstance(value := getattr(prepared, field.name), Tensor)]


def _each(prepared: Any, change: Callable[[str, Tensor], Tensor]) -> Any:
    """The same model rows with every tensor changed."""
    given = {field.name: getattr(prepared, field.name) for field in fields(prepared)}
    return replace(prepared, **{n: change(n, t) for n, t in given.items() if isinstance(t, Tensor)})


def _pairs(state: Any, new: Any) -> list[tuple[Tensor, Tensor]]:
    """(tensor of the batch, tensor of the arrivals) for everything but the time tables, which are filled by windows."""
    names = [field.name for field in fields(state) if field.name != "time"]
    pairs = [(getattr(state, name), getattr(new, name)) for name in names]
    assert all((a is None) == (b is None) for a, b in pairs), "rows of one bucket have the same inputs"
    return [(a, b) for a, b in pairs if a is not None]
