"""How one update of a batch is executed: the denoiser, then one `sampler_step` for all rows, on the batch's tensors.

eager: op by op, exactly the rows there are. graph: the same ops captured into one CUDA graph per number of model rows,
padded to a planned one. compiled: the denoiser through torch.compile, padded too, and captured on CUDA. With
deterministic=R every mode pads to R rows.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..kernels import sampler_step
from ..kernels.dispatch import Site
from ..kernels.sampler_step.columns import Column
from .batch import WINDOW, Batch, Needs, State
from .binding import Binder
from .calibration import Calibration, Curve, measure_curve, seconds_of
from .compile import Compiled
from .components import Components
from .config import ResolvedConfig
from .determinism import fixed_algorithms
from .errors import DeviceError, RequestError
from .graphs import Captures, CudaRecorder, Recorder, planned_sizes
from .sampling.guidance import rescale_weights
from .sampling.limits import bounded, limits, raw_estimate


class Before(NamedTuple):
    """What an update saw, for a preview of it; to be read before the next one. x: [R, C, h, w]."""

    x: Tensor
    batch: Batch

    def denoised(self, rows: list[int]) -> Tensor:
        """The denoised estimate D [n, C, h, w] of the rows at these positions, clamped or kept to its limit."""
        state, x = self.batch.state, self.x[rows]
        lines = state.table[rows, (state.update - 1 - state.first_line)[rows]]
        outputs = state.outputs[state.model_rows[rows]][:, :, : x.shape[1]].to(x.dtype)
        weights = rescale_weights(outputs, state.weights[rows], state.rescale[rows]).to(x.dtype)
        raw = raw_estimate(x, outputs, weights, lines)
        limit = limits(raw, state.threshold[rows]) if self.batch.needs.limited else None
        return bounded(raw, lines[:, Column.CLAMP], limit)


class Runner:
    """Runs updates as the configuration says, and keeps the buffers and captures of buckets that may come back.

    recorder: how updates are captured; None: CUDA graphs where they are wanted. calibration: what updates cost; None:
    what earlier measurements left.
    """

    def __init__(
        self, parts: Components, recorder: Recorder | None = None, calibration: Calibration | None = None
    ) -> None:
        config = parts.config
        self.parts, self.mode, self.config = parts, config.runner, config
        self.calibration = Calibration.of(parts) if calibration is None else calibration
        self.step = Site(sampler_step)
        self.binder = Binder(self.step, config)
        self.padded = self.mode != "eager" or config.deterministic > 1
        self.width = 2 if parts.guided and self.padded else 1
        self.sizes = self._sizes(config.max_rows, self.width)
        self.compiled: dict[tuple[tuple[str, ...], bool], Compiled] = {}  # ControlNets, and whether there are LoRAs
        if self.mode == "compiled":
            self._compile(())
        if recorder is None and self.mode != "eager" and config.device.type == "cuda":
            recorder = CudaRecorder(config.device, benchmark=not config.deterministic)
        self.captures = None if recorder is None else Captures(recorder, config.graph_bytes)
        self._idle: OrderedDict[Hashable, Batch] = OrderedDict()
        self._states: WeakKeyDictionary[Batch, State] = WeakKeyDictionary()

    def batch(self, bucket: Hashable, controls: tuple[str, ...] = ()) -> Batch:
        """An empty batch for a bucket, whose rows have these ControlNets: the one that was kept, or a new one."""
        if bucket in self._idle:
            return self._idle.pop(bucket)
        return Batch(self.parts.config.max_rows, self.width, controls)

    def retire(self, bucket: Hashable, batch: Batch) -> None:
        """Take back a batch that has become empty. With its captures it is kept, up to the byte budget."""
        if self.captures is None or not batch.capacity:
            return
        self._idle[bucket] = batch
        while sum(kept.bytes for kept in self._idle.values()) > self.captures.budget:
            self._drop(next(iter(self._idle)))

    def release(self) -> None:
        """Give back the memory of buckets that do not run."""
        for bucket in list(self._idle):
            self._drop(bucket)
        if self.parts.config.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def update(self, batch: Batch, preview: bool = False) -> Before | None:
        """One network evaluation and sampler update of every row, in place; what it saw, if that is asked for.

        Nothing waits for the device. A batch whose update ran out of memory is as it was before.
        """
        if self.config.deterministic > 1:
            batch.reserve(self.config.deterministic, self.width)
        batch.refill()
        before = Before(batch.state.x[: len(batch)].clone(), batch) if preview else None
        with fixed_algorithms(self.config):
            if self.padded:
                self._replay(batch, self._planned(batch, batch.model_rows))
            else:
                state = batch.prefix(len(batch), batch.model_rows)
                self._run(state, batch.controls, batch.needs, self._forward_rows(state, batch.controls))
        batch.advance()
        return before

    @torch.inference_mode()
    def warm(self, batch: Batch, rows: int) -> None:
        """Make room for `rows` rows and record (or compile) every planned number of model rows, the largest first."""
        if not self.padded:
            return
        batch.reserve(max(rows, self.config.deterministic), batch.width)
        with fixed_algorithms(self.config):
            for size in reversed(self._sizes(rows, batch.width)):
                self._replay(batch, size, only_record=True)

    @torch.inference_mode()
    def calibrate(
        self,
        batch: Batch,
        rows: int,
        *,
        budget_s: float = 10.0,
        progress: Callable[[str], None] | None = None,
    ) -> Curve:
        """Time updates of up to `rows` rows on the buffers of a batch that has a row, which stays as it is.

        The result is used from now on, and kept. Raises RequestError in deterministic mode, which runs one number of
        rows and lets no measurement decide.
        """
        if self.config.deterministic:
            raise RequestError("calibrate: deterministic mode runs one number of rows in one way; leave it out")
        batch.reserve(rows, batch.width)
        latent, scale = batch.state.x.shape[-2:], self.parts.scale
        saved = [tensor.clone() for tensor in _changed(batch.state)]

        def measure(model_rows: int, forward_rows: int) -> float:
            try:
                return seconds_of(partial(self._timed, batch, model_rows, forward_rows), self.config.device)
            except torch.OutOfMemoryError:
                return math.inf

        try:
            curve = measure_curve(
                (latent[0] * scale, latent[1] * scale),
                planned_sizes(rows * batch.width),
                measure,
                budget_s=budget_s,
                controls=batch.controls,
                progress=progress,
            )
        finally:
            torch._foreach_copy_(_changed(batch.state), saved)
        self.calibration.add(curve)
        return curve

    def explain(self) -> str:
        """Mode, planned numbers of model rows, captures and the memory they and the idle buffers hold."""
        lines = [f"runner {self.mode}"]
        if self.padded:
            lines[0] += f", model rows padded to {', '.join(map(str, self.sizes))}"
        if self.config.forward_rows:
            lines[0] += f", at most {self.config.forward_rows} in one forward"
        if self.config.deterministic:
            lines[0] += f", deterministic: every update has {self.config.deterministic} images"
        if self.mode == "compiled":
            count = sum(compiled.count for compiled in self.compiled.values())
            lines.append(f"  compiled {count} shapes, at most {len(self.sizes)} per bucket")
        if self.captures is not None:
            c, idle = self.captures, sum(batch.bytes for batch in self._idle.values())
            lines += [
                f"  {c.captured} captures made, {c.replayed} replays",
                f"  kept: {len(c)} captures with {_mib(c.bytes)}, {len(self._idle)} idle buckets with {_mib(idle)}; "
                f"at most {_mib(c.budget)} for each",
            ]
        if not self.config.deterministic:
            lines += self.calibration.explain().splitlines()
        lines += ["sampler:", *(f"  {line}" for line in self.binder.explain().splitlines())]
        return "\n".join(lines)

    def _sizes(self, rows: int, width: int) -> tuple[int, ...]:
        """Model rows that updates of at most `rows` rows are padded to."""
        fixed = self.config.deterministic
        return (fixed * width,) if fixed > 1 else planned_sizes(rows * width)

    def _planned(self, batch: Batch, model_rows: int) -> int:
        return next(n for n in self._sizes(batch.capacity, batch.width) if n >= model_rows)

    def _forward_rows(self, state: State, controls: tuple[str, ...]) -> int:
        """The most model rows of one forward of an update of this state, whose rows have these ControlNets."""
        count, latent, scale = len(state.model_input), state.x.shape[-2:], self.parts.scale
        size = latent[0] * scale, latent[1] * scale
        return self.config.forward_rows or self.calibration.forward_rows(size, count, controls)

    def _forward_shapes(self) -> int:
        """How many numbers of model rows a forward may have for one size of images."""
        most = self.config.forward_rows
        return len({n for size in self.sizes for k in (most or size, -(-size // 2)) for n in _split(size, k)})

    def _replay(self, batch: Batch, size: int, only_record: bool = False, forward_rows: int | None = None) -> None:
        """An update of `size` model rows, and of as many rows as could need them."""
        state, needs = batch.prefix(min(size, batch.capacity), size), batch.needs
        if self.captures is not None or self.config.deterministic:  # idle rows cost the kernel nothing
            needs = needs._replace(draws=2, masked=True)
        most = self._forward_rows(state, batch.controls) if forward_rows is None else forward_rows
        run = partial(self._run, state, batch.controls, needs, most)
        changed = _changed(state)
        if self.captures is not None:
            self._forget_outgrown(self.captures, batch)
            act = self.captures.capture if only_record else self.captures.replay
            act((batch.state, size, needs, most), run, changed)
        elif only_record:
            saved = [tensor.clone() for tensor in changed]
            run()
            torch._foreach_copy_(changed, saved)
        else:
            run()

    def _timed(self, batch: Batch, model_rows: int, forward_rows: int) -> None:
        """An update as it would run with that many model rows; what it changes does not matter."""
        if self.padded:
            self._replay(batch, model_rows, forward_rows=forward_rows)
        else:
            state = batch.prefix(-(-model_rows // batch.width), model_rows)
            self._run(state, batch.controls, batch.needs, forward_rows)

    def _run(self, state: State, controls: tuple[str, ...], needs: Needs, forward_rows: int) -> None:
        """The update itself. All memory is taken before anything changes."""
        self._evaluate(state, controls, forward_rows)
        weights, limit = _statistics(state, needs)
        draws, masked = needs.draws, needs.masked
        step = partial(
            self.step,
            *(state.x, state.base, state.history, state.outputs, state.table, state.update, weights, state.seeds),
            draws=draws,
            mask=state.mask if masked else None,
            known=state.known if masked else None,
            model_rows=state.model_rows,
            first_line=state.first_line,
            limit=limit,
        )
        shapes = tuple(state.outputs.shape), tuple(state.model_rows.shape)
        self.binder.bind((*shapes, draws, masked, needs.limited), step)
        x, base, history, model_input, bad = step()
        torch._foreach_copy_(
            [state.x, state.base, state.history, state.latent_input],
            [x, base, history, model_input[: len(state.model_input)]],
        )
        state.bad.logical_or_(bad)
        state.update.add_(1)

    def _evaluate(self, state: State, controls: tuple[str, ...], forward_rows: int) -> None:
        """The network's outputs of all model rows, in forwards of at most `forward_rows`."""
        at, first = _line_at(state)[state.row_of], 0
        adapted = getattr(state.prepared, "loras", None) is not None
        for count in _split(len(at), forward_rows):
            rows = slice(first, first + count)
            inputs = (state.model_input[rows], _rows(state.prepared, rows), at[rows])
            denoise = partial(self.parts.adapted(controls) if adapted else self.parts.network(controls), *inputs)
            for binder in self.parts.network_binders(controls):
                binder.bind((tuple(inputs[0].shape), *_shapes(state.prepared)), denoise)
            outputs = self._compile(controls, adapted)(*inputs) if self.mode == "compiled" else denoise()
            state.outputs[rows].copy_(outputs)
            first += count

    def _compile(self, controls: tuple[str, ...], adapted: bool = False) -> Compiled:
        if (controls, adapted) not in self.compiled:
            network = self.parts.adapted(controls) if adapted else self.parts.network(controls)
            assert isinstance(network, nn.Module), "exported networks run eagerly"
            self.compiled[controls, adapted] = Compiled(network, self._forward_shapes())
        return self.compiled[controls, adapted]

    def _forget_outgrown(self, captures: Captures, batch: Batch) -> None:
        """Captures of a batch that has grown since hold tensors that nobody uses any more."""
        before = self._states.get(batch)
        if before is not batch.state:
            captures.forget(before)
            self._states[batch] = batch.state

    def _drop(self, bucket: Hashable) -> None:
        batch = self._idle.pop(bucket)
        if self.captures is not None:
            self.captures.forget(batch.state)


def _statistics(state: State, needs: Needs) -> tuple[Tensor, Tensor | None]:
    """The guidance weights and, where a row has one, the limits of this update, from the network's outputs."""
    weights, limit = state.weights, None
    if not (needs.rescaled or needs.limited):
        return weights, limit
    branches = state.outputs[state.model_rows][:, :, : state.x.shape[1]]
    if needs.rescaled:
        changed = rescale_weights(branches, weights, state.rescale).to(weights.dtype)
        weights = torch.where(state.rescale[:, None] == 0, weights, changed)
    if needs.limited:
        lines = state.table.take_along_dim(_line_at(state)[:, None, None], 1).squeeze(1)
        limit = limits(raw_estimate(state.x, branches, weights, lines), state.threshold)
    return weights, limit


def _line_at(state: State) -> Tensor:
    """The line of its window every row is at, int64 [R]. Runs before a capture go beyond the window."""
    return (state.update - state.first_line).clamp(0, WINDOW - 1)


def _split(model_rows: int, most: int) -> list[int]:
    """The model rows of every forward."""
    whole, rest = divmod(model_rows, most)
    return [most] * whole + [rest] * (rest > 0)


def _shapes(prepared: Any) -> list[tuple[str, tuple[int, ...]]]:
    """What else tells op calls apart: a masked prompt, or a longer one, may need another attention."""
    return [(name, tuple(t.shape[1:])) for name, t in vars(prepared).items() if t is not None and name != "time"]


def _rows(prepared: Any, rows: slice) -> Any:
    """Some of the model rows, in the same memory."""
    return replace(prepared, **{name: tensor[rows] for name, tensor in vars(prepared).items() if tensor is not None})


def _changed(state: State) -> list[Tensor]:
    """What an update changes and the next one reads."""
    return [state.x, state.base, state.history, state.update, state.bad, state.model_input]


def out_of_memory(config: ResolvedConfig, rows: int, error: BaseException) -> DeviceError:
    """The error for a request that did not fit, `rows` images running together."""
    failed = DeviceError(
        f"out of memory on {config.device} with {rows} images in the batch; make smaller or fewer images, or load with "
        f"a smaller max_rows (now {config.max_rows})"
    )
    failed.__cause__ = error
    return failed


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"
