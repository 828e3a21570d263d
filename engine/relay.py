"""A request on its way through a cascade: what has ended, and the request that the next stage makes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from .cascade import Cascade, Stage
from .conditioning.images import resize
from .errors import RequestError, StepfuseError, located
from .imaging import Pictures
from .leg import Leg, Outcome, colors, scaled
from .model import Model
from .request import Job, Request, Result
from .results import checked, convert, to_arrays
from .settling import Settled, settle
from .ticket import Ticket
from .upscaling.registry import Upscalers

SEED_STRIDE = 2**32
"""Between the seeds of two stages: the same noise in both would show in the image."""


class Relay:
    """All stages are settled with blank inputs when it is made, so that bad values are errors of the caller.

    model_of: the engine's models; upscalers: its upscalers, None for Lanczos only. tickets: of the stages that run a
    network; results: of those that have ended.
    """

    def __init__(
        self,
        cascade: Cascade,
        request: Request,
        model_of: Callable[[str | None], Model],
        preview_every: int = 0,
        upscalers: Upscalers | None = None,
    ) -> None:
        self.cascade, self.request = cascade, request
        self.job = Job(request, preview_every)
        self.results: list[Result] = []
        self.current = 0
        self.tickets: dict[int, Ticket] = {}
        self.legs: dict[int, Leg] = {}
        self._upscalers = upscalers or Upscalers(model_of(None).parts.config.device)
        self._plan(model_of)

    @property
    def updates(self) -> int:
        """Network evaluations of one row through all stages."""
        return sum(ticket.updates for ticket in self.tickets.values())

    def before(self, stage: int) -> int:
        """Network evaluations of the stages before this one."""
        return sum(ticket.updates for index, ticket in self.tickets.items() if index < stage)

    @property
    def where(self) -> str:
        """The stage that runs now, in words."""
        name = self.cascade.stages[self.current].model
        return f"stage {self.current + 1} of {len(self.cascade.stages)}" + (f" ({name})" if name else "")

    def follow(self, result: Result, latents: Tensor, pictures: Tensor | None) -> Ticket | None:
        """Note what the current stage gave, and get the next stage ready; None after the last one.

        latents [n, C, h, w] and pictures [n, 3, H, W] on the device; None: no pictures were asked for.
        """
        outcome = Outcome(latents, None if pictures is None else to_arrays(pictures))
        self.results.append(result)
        stages = self.cascade.stages
        while (following := self.current + 1) < len(stages):
            self.current = following
            if not stages[following].plain:
                ticket = self.tickets[following]
                ticket.proceed(*self._settle(self.legs[following], outcome))
                return ticket
            outcome = self._resample(stages[following], outcome)
        return None

    def combined(self, ended: float) -> Result:
        """The result of the whole: the last stage's, and all of them. ended: a time of `perf_counter`."""
        first, last = self.results[0], self.results[-1]
        phases = ("encode", "denoise", "decode")
        spent = {phase: sum(result.timings.get(phase, 0.0) for result in self.results) for phase in phases}
        return replace(
            last,
            seeds=first.seeds,
            request=self.request,
            settings={**last.settings, "cascade": self.cascade.name},
            timings={**spent, "total": ended - self.tickets[0].submitted},
            warnings=tuple(dict.fromkeys(warning for result in self.results for warning in result.warnings)),
            stages=tuple(self.results),
        )

    def first_updates(self) -> list[Ticket]:
        """The first update of every stage with blank inputs, each a job of its own: to warm up."""
        made = [self.tickets[0].settled, *(self._settle(leg, None)[0] for leg in self.legs.values())]
        cut = [replace(one, plan=replace(one.plan, updates=one.plan.updates[:1])) for one in made]
        return [
            Ticket(Job(one.request), ticket.model, one) for one, ticket in zip(cut, self.tickets.values(), strict=True)
        ]

    # Planning.

    def _plan(self, model_of: Callable[[str | None], Model]) -> None:
        stages = self.cascade.stages
        if self.request.output == "latent" and stages[-1].plain:
            raise RequestError(f"output: the last stage of {self.cascade.name!r} gives images; leave 'latent' out")
        if self.request.upscale is not None and stages[-1].plain:
            raise RequestError(f"upscale: the last stage of {self.cascade.name!r} only resamples; set its scale")
        first = model_of(self._name(stages[0]))
        _require_images(first)
        values = self.cascade.fields_of(0, self.request) | {"output": self._output(0)}
        settled = settle(first.parts, Request(**values))
        first.admission.fits(settled)
        upscaler = self._upscalers.find(settled.request.upscale, settled.width, settled.height)
        self.tickets[0] = Ticket(self.job, first, settled, relay=self, upscaler=upscaler)
        size, model = scaled((settled.width, settled.height), self.tickets[0].enlarged, 1), first
        for self.current, stage in enumerate(stages[1:], 1):
            if stage.plain:
                size = scaled(size, stage.scale or 1.0, 1)
                continue
            try:
                leg = Leg.after(size, self.current, stage, model_of(self._name(stage)))
                _require_images(leg.model)
                leg.check_input(model)
                self.legs[self.current] = leg
                self.tickets[self.current] = self._ahead(leg)
            except StepfuseError as error:
                raise located(error, self.where) from error
            size, model = scaled((leg.width, leg.height), self.tickets[self.current].enlarged, 1), leg.model
        self.current = 0

    def _ahead(self, leg: Leg) -> Ticket:
        """The ticket of a stage whose turn will come; blank images are not kept until then."""
        settled, whole = self._settle(leg, None)
        leg.model.admission.fits(settled)
        settled = replace(settled, pictures=Pictures(), request=replace(settled.request, image=None))
        upscaler = self._upscalers.find(whole.request.upscale, whole.width, whole.height)
        how = {"stage": leg.index, "whole": whole, "tiles": leg.tiles, "upscaler": upscaler}
        return Ticket(self.job, leg.model, settled, relay=self, **how)

    def _name(self, stage: Stage) -> str | None:
        """The model of a stage."""
        return stage.model or self.request.model

    def _before(self, stage: int) -> Ticket:
        """Of the last stage before this one that runs a network."""
        return next(ticket for index, ticket in reversed(self.tickets.items()) if index < stage)

    def _output(self, index: int) -> Any:
        """In what form a stage gives its images: none where the next one goes on from its latents."""
        following = self.cascade.stages[index + 1 : index + 2]
        if not following:
            return self.request.output
        if following[0].input == "latents":
            return "latent"
        return "pt" if self.request.output == "latent" else self.request.output

    # From one stage to the next.

    def _settle(self, leg: Leg, outcome: Outcome | None) -> tuple[Settled, Settled]:
        """The rows of a stage, and the request they are together. outcome: None for blank inputs."""
        parts, n = leg.model.parts, self.request.n
        values = self.cascade.fields_of(leg.index, self.request) | leg.without()
        first = self.tickets[0].settled.seeds[0]
        seed = (first + leg.index * SEED_STRIDE) % (2**63 - SEED_STRIDE)
        values |= {"width": leg.width, "height": leg.height, "seed": seed, "output": self._output(leg.index)}
        latents = leg.latents(outcome, n) if leg.stage.input == "latents" else None
        whole, rows = dict(values), dict(values)
        if leg.goes_on:
            rows["latents"], whole["latents"] = latents, None if latents is None else latents.cpu()
        else:
            rows["image"] = leg.images(outcome)
            whole["image"] = None if outcome is None or outcome.images is None else list(outcome.images)
        if leg.tiles is not None:
            rows |= leg.in_tiles(leg.tiles, rows, n, None if outcome is None else seed)
        settled = settle(parts, Request(**rows))
        size = {"width": leg.width, "height": leg.height, "seeds": settled.seeds[:n], "pictures": Pictures()}
        together = replace(settled, request=Request(**whole), **size)
        if leg.tiles is not None and leg.enlarges and outcome is not None:
            settled = leg.cut_whole(settled, together, leg.images(outcome))
        if latents is not None and not leg.goes_on:
            leg.encode(settled, latents)
        return settled, together

    def _resample(self, stage: Stage, outcome: Outcome) -> Outcome:
        """A stage without a network."""
        last = self.results[-1]
        assert outcome.images is not None
        assert stage.model is not None
        height, width = outcome.images.shape[1:3]
        size = scaled((width, height), stage.scale or 1.0, 1)
        images = np.stack([resize(colors(image), *size, stage.model) for image in outcome.images])
        shown = checked(self._before(self.current).model.parts, images, self.request.prompt)
        self.results.append(
            replace(
                last,
                images=convert(shown, self._output(self.current)),
                settings={"width": size[0], "height": size[1]},
                timings={},
                warnings=(),
                model=stage.model,
            )
        )
        return Outcome(outcome.latents, images)


def _require_images(model: Model) -> None:
    """Raise RequestError for a network of the user's, which makes no pictures."""
    if model.parts.user is not None:
        raise RequestError(f"cascade: {model.parts.name} makes samples, not pictures; run it on its own")
