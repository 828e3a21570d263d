"""What belongs to one of an engine's checkpoints."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .adapters import Adapters
from .admission import Admission
from .components import Components
from .runner import Runner


@dataclass(frozen=True, eq=False)
class Model:
    """A checkpoint, how its updates run, and what fits beside it. name: what requests call it; None: the default."""

    name: str | None
    parts: Components
    runner: Runner
    admission: Admission

    @classmethod
    def of(
        cls, name: str | None, parts: Components, runner: Runner | None = None, beside: Admission | None = None
    ) -> Model:
        """runner: None for what the components' configuration says. beside: as of Admission."""
        return cls(name, parts, runner or Runner(parts), Admission(parts, beside))

    @cached_property
    def adapters(self) -> Adapters:
        """Its LoRAs and learned words; for the engine's thread. Raises RequestError for exported networks."""
        return Adapters(self.parts)

    @property
    def adapted(self) -> dict[str, Any]:
        """The LoRAs and learned words that are active now, as `Adapters.settings`."""
        made: Adapters | None = vars(self).get("adapters")  # the property would make them
        return {} if made is None else made.settings

    def said(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Settings of a request and what is active on the engine; the LoRAs of both add up."""
        both = {**settings, **self.adapted}
        loras = [*self.adapted.get("loras", ()), *settings.get("loras", ())]
        return both | ({"loras": loras} if loras else {})

    def cap(self, bucket: Hashable) -> int | None:
        """The most model rows of one update: the measured knee, and for a model beside the default its own max_rows,
        guided or not. None for no cap: the scheduler's max_rows is the default's.
        """
        knee = self.runner.calibration.cap(bucket)
        if self.name is None:
            return knee
        most = self.parts.config.max_rows * (2 if self.parts.guided else 1)
        return most if knee is None else min(knee, most)

    def calibrated(self, bucket: Hashable) -> bool:
        """Whether updates of the bucket's size were measured."""
        return self.runner.calibration.cap(bucket) is not None

    def explain(self) -> str:
        """What was loaded, how its updates are executed, and which implementation every op uses and why."""
        adapted = "".join(f"{name} {active}\n" for name, active in self.adapted.items())
        return f"{self.parts.explain()}\n{adapted}{self.runner.explain()}"
