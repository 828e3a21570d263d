"""What users say and get: Request, Result, Event, Job. Imports no torch."""

from __future__ import annotations

import asyncio
import json
import math
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .errors import RequestError, closest

if TYPE_CHECKING:
    import torch

Output = Literal["pil", "np", "pt", "latent"]
OUTPUTS = ("pil", "np", "pt", "latent")
TEXTS = ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2", "sampler", "schedule", "client", "model",
         "upscale")  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class Control:
    """One ControlNet of a request: the name it was loaded under and its picture.

    scale: factor of what it adds. start, end: fractions of the steps between which it acts. guess: less at the outer
    levels and, with guidance, on the prompted branch only (guess mode of Zhang et al. 2023).
    """

    name: str
    image: Any
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    guess: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """One request: n images of one prompt. `None` means what the checkpoint and its family do by default.

    Sizes are pixels. Embeddings are [1 or n, L, D] (prompt_embeds) and [1 or n, D] (pooled), latents [n, C, h, w]
    unit-variance noise; image i of n uses seed + i. negative_prompt=None does what the checkpoint's own pipeline does
    (SDXL zeroes the embedding), "" encodes the empty prompt. sigmas: sigma / alpha of every level in place of a
    schedule, descending to 0. deadline: seconds from submission; a request that has not started by then ends with
    DeadlineMissed, one that runs goes on. client: whose request it is; clients get equal shares of the device. model:
    which of the engine's models. dynamic_threshold: percentile of the pixels' absolute values, or (percentile, largest
    threshold), that every estimate is kept to and divided by; 0: none.

    image: what to start from (image to image), to fill in, or to enlarge: anything `conditioning.images.load_image`
    takes. strength: how much of the schedule is run on it, 0 to 1. mask: white is painted anew. change_map: a strength
    for every pixel. resample: (jump length, times) of RePaint. noise_level: of the low-resolution image of an upscaler.
    blur: standard deviation in its pixels of a Gaussian blur before that noise; None or 0: none.
    controls: ControlNets. loras: (name, strength) of LoRAs that were loaded with the model. denoising_start,
    denoising_end: the part of the schedule to run; with a start, `latents` are what another model left. upscale: "NAME"
    or "NAME:FACTOR", an upscaler of the engine that enlarges the images at the end ("lanczos:2"). output: None for
    "pil".

    Of a network of your own (docs/user_networks.md): shape of a sample where the network leaves it open; conditioning
    and, with guidance, negative_conditioning [1 or n, *]; latents and image are tensors [n, *shape], mask and
    change_map broadcast to a sample; output None is "pt".

    Raises RequestError for values that no model could honour.
    """

    prompt: str | None = None
    prompt_2: str | None = None
    negative_prompt: str | None = None
    negative_prompt_2: str | None = None
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    guidance_rescale: float = 0.0
    dynamic_threshold: float | tuple[float, float] | None = None
    sampler: str | None = None
    schedule: str | None = None
    sigmas: tuple[float, ...] | None = None
    eta: float | None = None
    s_churn: float = 0.0
    s_tmin: float = 0.0
    s_tmax: float = math.inf
    s_noise: float = 1.0
    seed: int | None = None
    n: int = 1
    latents: torch.Tensor | None = None
    prompt_embeds: torch.Tensor | None = None
    negative_prompt_embeds: torch.Tensor | None = None
    pooled_prompt_embeds: torch.Tensor | None = None
    negative_pooled_prompt_embeds: torch.Tensor | None = None
    clip_skip: int | None = None
    class_labels: int | tuple[int, ...] | None = None
    image: Any = None
    mask: Any = None
    change_map: Any = None
    strength: float | None = None
    resample: tuple[int, int] | None = None
    noise_level: int | None = None
    blur: float | None = None
    controls: tuple[Control, ...] = ()
    loras: tuple[tuple[str, float], ...] = ()
    denoising_start: float | None = None
    denoising_end: float | None = None
    upscale: str | None = None
    model: str | None = None
    shape: tuple[int, ...] | None = None
    conditioning: torch.Tensor | None = None
    negative_conditioning: torch.Tensor | None = None
    output: Output | None = None
    metadata: bool = True
    deadline: float | None = None
    client: str | None = None

    def __post_init__(self) -> None:
        for name in TEXTS:
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise RequestError(f"{name}: got {type(value).__name__}, expected text")
        for name, low in (("width", 1), ("height", 1), ("steps", 1), ("seed", 0), ("n", 1), ("clip_skip", 0)):
            self._check_integer(name, low)
        for name in ("guidance_scale", "guidance_rescale", "eta", "s_churn", "s_tmin", "s_tmax", "s_noise", "deadline"):
            self._check_number(name)
        if self.guidance_rescale > 1:
            raise RequestError(f"guidance_rescale: got {self.guidance_rescale}, expected a number from 0 to 1")
        if self.seed is not None and self.seed + self.n > 2**63:
            raise RequestError(f"seed: got {self.seed}, expected seed + n <= 2**63; choose a smaller seed")
        if self.sigmas is not None and self.steps not in (None, len(self.sigmas) - 1):
            raise RequestError(f"steps: got {self.steps}, but sigmas has {len(self.sigmas)} levels; leave steps out")
        if self.upscale is not None and self.output == "latent":
            raise RequestError("upscale: enlarges images, but output='latent' asks for none; leave one of them out")
        if self.output is not None and self.output not in OUTPUTS:
            raise RequestError(f"output: got {self.output!r}, {closest(str(self.output), OUTPUTS)}")

    def _check_integer(self, name: str, low: int) -> None:
        value = getattr(self, name)
        if value is None and name != "n":
            return
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise RequestError(f"{name}: got {value!r}, expected a whole number >= {low}")

    def _check_number(self, name: str) -> None:
        value: Any = getattr(self, name)
        if value is None and name in ("guidance_scale", "eta", "deadline"):
            return
        number = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
        # NaN fails the comparison, so it is refused, too
        if not number >= 0 or (number == math.inf and name != "s_tmax"):
            raise RequestError(f"{name}: got {value!r}, expected a finite number >= 0")


def build_request(prompt: str | Request | None, options: Mapping[str, Any]) -> Request:
    """A Request from a prompt or another Request and field values.

    An unknown field is an error naming the closest one.
    """
    valid = [f.name for f in fields(Request)]
    for name in options:
        if name not in valid:
            raise RequestError(f"unknown request field {name!r}: {closest(name, valid)}")
    values: dict[str, Any] = {"prompt": prompt}
    if isinstance(prompt, Request):
        values = {name: getattr(prompt, name) for name in valid}
    return Request(**values | dict(options))


@dataclass(frozen=True, kw_only=True, eq=False)
class Result:
    """What a request gave.

    images: list of PIL images ("pil"), float32 array [n, H, W, 3] in 0..1 ("np"), float32 CPU tensor [n, 3, H, W] in
    0..1 ("pt"), or None ("latent"). latents: float32 CPU tensor [n, C, h, w] in the model's scaled latent space. seeds:
    one per image. timings: seconds per phase (encode, denoise, decode, total). warnings: what was cut or ignored.
    settings: the resolved values (steps, guidance_scale, sampler, ...). model: name of the checkpoint. stages: of a
    cascade, the result of every stage, of which this is the last; its phases are sums.

    Of a network of your own images and latents are the samples [n, *shape] in the dtype of the sampler's state, images
    as array ("np"), tensor ("pt") or None ("latent").
    """

    images: Any
    latents: torch.Tensor
    seeds: tuple[int, ...]
    request: Request
    settings: Mapping[str, Any]
    timings: Mapping[str, float]
    warnings: tuple[str, ...] = ()
    model: str = ""
    stages: tuple[Result, ...] = ()

    @property
    def image(self) -> Any:
        """The only image; raises RequestError where there are several or none."""
        if self.images is None or len(self.images) != 1:
            count = 0 if self.images is None else len(self.images)
            raise RequestError(f"result.image: the result has {count} images, expected exactly one; use result.images")
        return self.images[0]

    def save(self, path: str | Path) -> list[Path]:
        """Write PNG files: `path` for one image, NAME-<seed>.png for several; returns what was written.

        The parameters go into the PNG text unless metadata=False. Raises RequestError for outputs other than "pil" and
        "np".
        """
        from .images import save_png

        path = Path(path)
        if "shape" in self.settings:
            raise RequestError(f"save: {self.model} makes samples, not pictures; write result.images yourself")
        if self.images is None or self.request.output not in (None, "pil", "np"):
            raise RequestError(f"save: got output={self.request.output!r}, expected a result with output='pil' or 'np'")
        many = len(self.images) > 1
        names = [path.with_name(f"{path.stem}-{seed}{path.suffix}") if many else path for seed in self.seeds]
        for name, image, seed in zip(names, self.images, self.seeds, strict=True):
            save_png(image, name, self.parameters(seed) if self.request.metadata else None)
        return names

    def parameters(self, seed: int) -> str:
        """JSON text that says how the image with `seed` was made."""
        said = {"prompt": self.request.prompt, "negative_prompt": self.request.negative_prompt}
        return json.dumps({**said, "seed": seed, **self.settings, "model": self.model})


@dataclass(frozen=True, kw_only=True, eq=False)
class Event:
    """Progress of a request: network evaluation `update` of `total` done.

    preview: uint8 [n, H, W, 3] array of the denoised estimate where one was asked for. result: set on the last event.
    """

    update: int
    total: int
    preview: Any = None
    result: Result | None = None


@dataclass(eq=False)
class Job:
    """A submitted request. Await it, or call result(); events() may be read by several threads.

    on_cancel: engine side, called by cancel() until the job has ended.
    """

    request: Request
    preview_every: int = 0
    on_cancel: Callable[[], None] | None = field(default=None, repr=False)
    _future: Future[Result] = field(default_factory=Future, repr=False)
    _log: list[Event] = field(default_factory=list, repr=False)
    _news: threading.Condition = field(default_factory=threading.Condition, repr=False)
    _cancel: threading.Event = field(default_factory=threading.Event, repr=False)

    def result(self, timeout: float | None = None) -> Result:
        """Wait at most `timeout` seconds.

        Raises what the request raised, Cancelled, or TimeoutError (the job goes on).
        """
        try:
            return self._future.result(timeout)
        except FutureTimeout as error:
            if self._future.done():
                raise
            raise TimeoutError(f"no result within {timeout} s; the job goes on: call cancel() to stop it") from error

    def cancel(self) -> bool:
        """Ask the job to stop; it does so within one update. False if it had already ended."""
        self._cancel.set()
        notify = self.on_cancel
        if notify is not None:
            notify()
        return not self._future.done()

    @property
    def done(self) -> bool:
        """True once a result or an error is there."""
        return self._future.done()

    @property
    def cancelled(self) -> bool:
        """True once cancel() was called."""
        return self._cancel.is_set()

    def events(self) -> Iterator[Event]:
        """Every event from the first, waiting for new ones; ends with the job and raises what it raised."""
        seen = 0
        while True:
            with self._news:
                self._news.wait_for(lambda seen=seen: len(self._log) > seen or self._future.done())
                fresh = self._log[seen:]
            if not fresh:
                break
            seen += len(fresh)
            yield from fresh
        self._future.result()

    def __await__(self) -> Generator[Any, None, Result]:
        return asyncio.wrap_future(self._future).__await__()

    def report(self, event: Event) -> None:
        """Engine side: append an event."""
        with self._news:
            self._log.append(event)
            self._news.notify_all()

    def finish(self, outcome: Result | BaseException) -> None:
        """Engine side: end the job once, with a result or an error."""
        with self._news:
            self.on_cancel = None
            if not self._future.done():
                if isinstance(outcome, BaseException):
                    self._future.set_exception(outcome)
                else:
                    self._future.set_result(outcome)
            self._news.notify_all()
