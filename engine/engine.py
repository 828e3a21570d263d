"""The Engine: requests in from any thread, results out; what runs them is its `Worker`."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import env
from .adapters import read_loras, read_words, require_weights
from .admission import weight_bytes
from .cascade import Cascade
from .components import Components
from .config import EngineConfig, ResolvedConfig, merge, resolve_dtype
from .errors import RequestError, closest
from .imaging import blank_pictures
from .loading import load
from .model import Model
from .relay import Relay
from .request import Control, Event, Job, Request, build_request
from .runner import Runner
from .settling import settle
from .ticket import Ticket
from .upscaling.registry import Upscalers
from .upscaling.upscaler import Upscaler
from .user_module import Schedule, Told, user_components
from .worker import Worker


class Engine:
    """Runs one or several checkpoints on one device. Safe to use from several threads; use it as a context manager, or
    call close().

    components: of the first checkpoint, the default. models: all of them by the name requests call them; None for the
    default.
    """

    def __init__(
        self, components: Components, runner: Runner | None = None, *, config: EngineConfig | None = None
    ) -> None:
        """runner: how updates are executed; None: as the components' configuration says. config: what was said to load
        the components; more models are loaded with it.
        """
        resolved = components.config
        self.components = components
        self.models: dict[str | None, Model] = {None: Model.of(None, components, runner)}
        self.upscalers = Upscalers(resolved.device)
        self._said = config or _said(resolved)
        self._adding = threading.RLock()
        self._worker = Worker(self.models)
        atexit.register(self.close)  # a worker inside torch while the interpreter ends would abort the process

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        device: str | None = None,
        dtype: str | torch.dtype | None = None,
        runtime: str | None = None,
        models: Mapping[str, str | Path] | None = None,
        config: EngineConfig | None = None,
        **overrides: Any,
    ) -> Engine:
        """Load a built-in model name ("shapes"), a diffusers folder, or a hub id org/name from the local cache.

        device and dtype default to CUDA with bf16 (fp16 below sm_80), else CPU with float32. runtime: "torch", the
        default; for a folder that `stepfuse export` made "onnxruntime", "tensorrt", "tensorrt_rtx" or "aoti". models:
        name -> source of more checkpoints, as by `add`; requests pick one with `model=name`.
        `overrides` are fields of EngineConfig put over `config`. Raises CheckpointError, DeviceError or RequestError,
        before memory on the device is taken where the cause is a missing, extra or mis-shaped weight.
        """
        given = {"device": device, "dtype": dtype, "runtime": runtime}
        merged = merge(config, overrides | {name: value for name, value in given.items() if value is not None})
        if (threads := env.num_threads()) is not None:
            torch.set_num_threads(threads)
        engine = cls(load(source, merged), config=merged)
        try:
            for name, other in (models or {}).items():
                engine.add(name, other)
        except BaseException:
            engine.close()
            raise
        return engine

    @classmethod
    def from_module(
        cls,
        module: Callable[..., torch.Tensor],
        shape: int | Sequence[int | None],
        *,
        prediction: str = "epsilon",
        schedule: Schedule = "linear",
        time: Told | None = None,
        conditioning: int | Sequence[int | None] | None = None,
        defaults: Mapping[str, Any] | None = None,
        name: str | None = None,
        config: EngineConfig | None = None,
        **overrides: Any,
    ) -> Engine:
        """An engine for a network of your own, of samples of any shape (docs/user_networks.md).

        module: called as it is with x [R, *shape] at unit variance and t float [R], and conditioning [R, *] if
        `conditioning` gives the shape of a row of it. shape, conditioning: None where requests choose the first axis
        (of shape also one other). prediction: what it returns, "epsilon", "v_prediction", "sample", "score" (of x) or
        "flow" (eps - x0; x is then (1 - t) x0 + t eps). schedule: a name of a beta schedule, options of a
        scheduler_config.json, or alphas_cumprod of all training timesteps. time: what t is, "timestep", "sigma" (sigma
        / alpha) or "flow"; by default the timestep, of a flow its own. defaults: steps, sampler, guidance_scale.

        device and dtype default to the module's, then to CUDA or CPU and float32; runner to "eager". `overrides` are
        fields of EngineConfig. Raises RequestError and DeviceError.
        """
        if (threads := env.num_threads()) is not None:
            torch.set_num_threads(threads)
        how = {"prediction": prediction, "schedule": schedule, "time": time, "conditioning": conditioning}
        return cls(user_components(module, shape, merge(config, overrides), defaults=defaults, name=name, **how))

    def add(self, name: str, source: str | Path | Components, **overrides: Any) -> None:
        """Load another checkpoint, or take loaded components; requests pick it with `model=name`, and others go on.

        All models share the device, the first one's max_rows and queue, and the rows that are parked. `overrides` are
        fields of EngineConfig over those of the first; max_rows bounds the rows of this model. Raises RequestError for
        a name that is taken or a model that cannot run beside the others, and what `load` raises.
        """
        self._check_name(name)
        parts = source if isinstance(source, Components) else load(source, merge(self._shared(), overrides))
        for option in ("device", "deterministic"):
            got, expected = getattr(parts.config, option), getattr(self.components.config, option)
            if got != expected:
                raise RequestError(
                    f"{option}: got {got} for {name!r}, expected {expected} as of {self.components.name}"
                )
        runner, size = Runner(parts), weight_bytes(parts)
        with self._adding:
            self._check_name(name)
            for other in self.models.values():
                other.admission.lower(size)
            self.models[name] = Model.of(name, parts, runner, beside=self.models[None].admission)

    def generate(
        self,
        prompt: str | Request | Sequence[str | Request] | None = None,
        *,
        cascade: str | Path | Cascade | None = None,
        **fields: Any,
    ) -> Any:  # Result, or list[Result] for a list
        """Make images and wait for them: a Result for one prompt or Request, a list of Results for a list.

        cascade: as of `submit`. `fields` are fields of Request, for every entry. Raises RequestError for bad values
        before anything runs.
        """
        if isinstance(prompt, (str, Request)) or prompt is None:
            return self.submit(prompt, cascade=cascade, **fields).result()
        jobs = self._submit([build_request(one, fields) for one in prompt], 0, cascade)
        try:
            return [job.result() for job in jobs]
        except BaseException:
            for job in jobs:
                job.cancel()
            raise

    def submit(
        self,
        request: str | Request | None = None,
        *,
        cascade: str | Path | Cascade | None = None,
        preview_every: int = 0,
        **fields: Any,
    ) -> Job:
        """Queue a request and return its Job at once.

        cascade: a Cascade, a built-in name or a file, through whose stages the request goes; models of it that are not
        there are loaded now. preview_every = k attaches a decoded estimate to every k-th event. Raises RequestError,
        MemoryBudgetError for a size that never fits, and QueueFull where the configured bound of the queue would be
        exceeded.
        """
        return self._submit([build_request(request, fields)], preview_every, cascade)[0]

    def stream(self, request: str | Request | None = None, *, preview_every: int = 0, **fields: Any) -> Iterator[Event]:
        """Yield an Event per update; the last one carries the result. Closing the iterator cancels the request."""
        job = self.submit(request, preview_every=preview_every, **fields)
        try:
            yield from job.events()
        finally:
            job.cancel()

    def warmup(
        self,
        width: int | None = None,
        height: int | None = None,
        *,
        model: str | None = None,
        cascade: str | Path | Cascade | None = None,
        controls: Sequence[str] = (),
        loras: int = 0,
        rows: int | None = None,
        calibrate: bool = False,
        budget_s: float = 10.0,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        """Pay the first-use costs of a size now: one update, one decode, and every planned graph or compilation; of a
        cascade, of the sizes of all its stages.

        model: which; None: the default. controls: names of the ControlNets that requests will have; loras: how many
        LoRAs of their own. rows: the most images that will run together, for runner="graph" and "compiled"; None:
        max_rows on CUDA, else 1. calibrate: also measure updates of up to `rows` images (None: max_rows), without
        LoRAs; from then on that decides how many run together and in how many forwards. It is kept for later engines
        and printed by `explain`; other work waits.
        budget_s: no timing begins after so many seconds. progress: gets a line of text per timing, on another thread.
        Raises RequestError for a size or number of rows that cannot be run, and for calibrating in deterministic mode.
        """
        chosen = self._model(model)
        config = chosen.parts.config
        rows = rows if rows is not None else config.max_rows if calibrate or config.device.type == "cuda" else 1
        if not isinstance(rows, int) or not 1 <= rows <= config.max_rows:
            raise RequestError(
                f"rows: got {rows!r}, expected 1 to max_rows, {config.max_rows}; load with more max_rows"
            )
        if loras and calibrate:
            raise RequestError(
                f"calibrate: measures updates without LoRAs, got loras={loras}; warm these up without it"
            )
        prompt = None if not chosen.parts.text else ""
        pictures = blank_pictures(chosen.parts, width, height)
        labels = 0 if chosen.parts.classes else None
        nets = tuple(Control(name=name, image=np.zeros((8, 8), np.uint8)) for name in controls)
        fields = {"width": width, "height": height, "class_labels": labels, "model": chosen.name, **pictures}
        steps = 1 if cascade is None else None  # of a part of one step nothing might be left
        idle = chosen.parts.loras.idle(loras)
        request = Request(prompt=prompt, steps=steps, seed=0, controls=nets, loras=idle, **fields)
        how = {"budget_s": budget_s, "progress": progress} if calibrate else None
        if cascade is None:
            tickets = [self._ticket(request)]
        else:
            tickets = self._relay(Cascade.of(cascade), request, 0).first_updates()
        for ticket in tickets:
            ticket.warm, ticket.calibrate = min(rows, ticket.model.parts.config.max_rows), how
            self._worker.submit([ticket])
            ticket.job.result()

    def set_loras(self, loras: Sequence[str | Path | tuple[str | Path, float]], *, model: str | None = None) -> None:
        """Make these, and no others, the LoRAs merged into a model: files or folders, or pairs with a strength.

        The change takes its turn: requests submitted before it use the old weights, those after it the new ones, and it
        returns once it is made. [] brings the checkpoint's bits back. model: which; None: the default. Raises
        CheckpointError listing the keys that fit no layer, NumericsError, and RequestError for an exported model.
        """
        chosen, found = self._model(model), read_loras(loras)
        require_weights(chosen.parts)
        self._worker.in_turn(lambda: chosen.adapters.loras.set(found))

    def set_embeddings(
        self, embeddings: Sequence[str | Path | tuple[str | Path, str]], *, model: str | None = None
    ) -> None:
        """Make these, and no others, the learned words (textual inversion) of a model's prompts: files, or pairs with
        the word to use. Takes its turn, and raises, as `set_loras`.
        """
        chosen, found = self._model(model), read_words(embeddings)
        require_weights(chosen.parts)
        self._worker.in_turn(lambda: chosen.adapters.embeddings.set(found))

    def add_upscaler(
        self,
        name: str,
        source: str | Path | Upscaler,
        *,
        dtype: str | torch.dtype | None = None,
        tile: int = 512,
        overlap: int = 32,
    ) -> None:
        """Load a feed-forward upscaler (Real-ESRGAN, SwinIR, ... as safetensors), or take one; requests enlarge their
        images by it with `upscale=name`, or name:factor.

        dtype: as of `load_upscaler`. tile, overlap: in pixels of its input. Raises what `Upscalers.add` raises.
        """
        self.upscalers.add(name, source, dtype=resolve_dtype("dtype", dtype), tile=tile, overlap=overlap)

    def explain(self) -> str:
        """What was loaded, on what, how updates are executed, and which implementation every op uses and why."""
        first, *others = list(self.models.values())
        return "\n".join([first.explain(), *(f"\nmodel {model.name!r}: {model.explain()}" for model in others)])

    def close(self) -> None:
        """Cancel what is queued or running and stop the worker. Safe to call twice."""
        self._worker.close()
        atexit.unregister(self.close)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _submit(
        self, requests: Sequence[Request], preview_every: int, cascade: str | Path | Cascade | None = None
    ) -> list[Job]:
        if not isinstance(preview_every, int) or preview_every < 0:
            raise RequestError(f"preview_every: got {preview_every!r}, expected a whole number >= 0")
        if cascade is None:
            tickets = [self._ticket(request, preview_every) for request in requests]
        else:
            stages = Cascade.of(cascade)
            tickets = [self._relay(stages, request, preview_every).tickets[0] for request in requests]
        self._worker.submit(tickets)
        return [ticket.job for ticket in tickets]

    def _relay(self, cascade: Cascade, request: Request, preview_every: int) -> Relay:
        """A request on its way through a cascade, whose models are loaded where they are not there."""
        with self._adding:
            for name, source in cascade.models.items():
                if name not in self.models and name != self.components.name:
                    self.add(name, source)
        return Relay(cascade, request, self._model, preview_every, self.upscalers)

    def _ticket(self, request: Request, preview_every: int = 0) -> Ticket:
        """A request that is settled, and fits its model."""
        model = self._model(request.model)
        settled = settle(model.parts, request)
        model.admission.fits(settled)
        upscaler = self.upscalers.find(request.upscale, settled.width, settled.height)
        return Ticket(Job(settled.request, preview_every), model, settled, upscaler=upscaler)

    def _model(self, name: str | None) -> Model:
        found = self.models.get(None if name == self.components.name else name)
        if found is None:
            names = [self.components.name, *(known for known in list(self.models) if known is not None)]
            raise RequestError(f"model: got {name!r}, {closest(str(name), names)}; more are loaded with engine.add()")
        return found

    def _shared(self) -> EngineConfig:
        """What was said to load the default that holds for other checkpoints, too."""
        return replace(self._said, variant=None, controlnets={}, loras={})

    def _check_name(self, name: str) -> None:
        if not isinstance(name, str) or not name:
            raise RequestError(f"name: got {name!r}, expected a name for requests to pick the model by")
        if name in self.models or name == self.components.name:
            raise RequestError(f"name: {name!r} is taken by another model of this engine; choose another")


def _said(config: ResolvedConfig) -> EngineConfig:
    """What of a resolved configuration holds for any checkpoint on the same device."""
    names = ("dtype", "kernels", "max_rows", "runner", "graph_bytes", "deterministic", "parked_bytes", "vae_tiling")
    return EngineConfig(device=str(config.device), **{name: getattr(config, name) for name in names})
