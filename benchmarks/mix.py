"""Loads of unlike requests: what is asked for, drawn with a fixed seed, and when it arrives."""

from __future__ import annotations

import json
import random
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..engine.errors import RequestError, closest
from ..engine.request import Request, build_request

COLOURS, FORMS = ("red", "blue", "green", "yellow"), ("circle", "square", "triangle")
PROMPTS = [f"a {colour} {form}" for colour in COLOURS for form in FORMS]
LORAS = [
    [],
    [["shapes-dome", 1.0]],
    [["shapes-dome", 0.7]],
    [["shapes-turn", 1.0]],
    [["shapes-turn", 0.5]],
    [["shapes-dome", 0.8], ["shapes-turn", 0.6]],
]
BUILT_IN: dict[str, dict[str, list[Any]]] = {
    "mixed": {
        "prompt": PROMPTS,
        "steps": [8, 12, 16, 20, 20, 24, 30],
        "guidance_scale": [1.0, 2.0, 3.0, 3.0, 4.0, 5.0],
        "sampler": ["ddim", "euler", "dpmpp_2m", "euler_a"],
    },
    "sizes": {
        "prompt": PROMPTS,
        "steps": [12, 20, 30],
        "guidance_scale": [2.0, 3.0, 4.0],
        "sampler": ["ddim", "euler", "dpmpp_2m"],
        "size": [[64, 64], [64, 64], [64, 96]],
    },
    "loras": {"prompt": PROMPTS, "steps": [20], "guidance_scale": [3.0], "sampler": ["ddim"], "loras": LORAS},
    "alike": {"prompt": PROMPTS, "steps": [20], "guidance_scale": [3.0], "sampler": ["ddim"]},
}
BUILT_IN["mixed_loras"] = BUILT_IN["mixed"] | {"loras": LORAS}
"""Every request draws one value of every list; a value listed twice is twice as likely. "alike" has requests that
differ in prompt and seed only, which is what merging requests of equal parameters was made for. "loras" has requests
that differ in their LoRAs beside that, "mixed_loras" in everything."""


@dataclass(frozen=True)
class Mix:
    """A load: name, and the values every field of a request is drawn from. "size" is [width, height]; LoRAs go by what
    they are read from.
    """

    name: str
    choices: Mapping[str, Sequence[Any]]

    @classmethod
    def load(cls, source: str) -> Mix:
        """A built-in mix by name, or a JSON file: a mapping from request fields to lists of values.

        Raises RequestError for an unknown name, an unknown field, an empty list, or a value no request could have.
        """
        path = Path(source)
        if source in BUILT_IN:
            mix = cls(source, BUILT_IN[source])
        elif path.suffix == ".json":
            try:
                mix = cls(path.stem, json.loads(path.read_text(encoding="utf-8")))
            except (OSError, json.JSONDecodeError) as error:
                raise RequestError(
                    f"--mix {source}: {error}; expected a JSON file of field -> list of values"
                ) from None
        else:
            raise RequestError(f"--mix: got {source!r}, {closest(source, BUILT_IN)}, or give a file NAME.json")
        if not isinstance(mix.choices, Mapping) or not all(isinstance(v, list) and v for v in mix.choices.values()):
            raise RequestError(f"--mix {source}: expected a mapping of request fields to lists with at least one value")
        for name, values in mix.choices.items():
            for value in values:
                build_request(None, _fields(name, value))
        return mix

    @property
    def loras(self) -> dict[str, str]:
        """The LoRAs that its requests choose from, as `EngineConfig.loras`."""
        chosen = (_fields("loras", value)["loras"] for value in self.choices.get("loras", ()))
        return {name: name for loras in chosen for name, _ in loras}

    def draw(self, count: int, seed: int) -> list[Request]:
        """`count` requests, the same for the same seed; image i has seed i."""
        rng = random.Random(seed)
        made = []
        for number in range(count):
            fields: dict[str, Any] = {"seed": number, "output": "pt"}
            for name, values in self.choices.items():
                fields |= _fields(name, rng.choice(values))
            made.append(build_request(None, fields))
        return made


def arrivals(count: int, rate: float, seed: int) -> list[float]:
    """Seconds from the start at which `count` requests of a Poisson process with `rate` per second arrive."""
    rng, clock, times = random.Random(seed), 0.0, []
    for _ in range(count):
        clock += rng.expovariate(rate)
        times.append(clock)
    return times


def parameters(request: Request) -> Hashable:
    """What must be equal for requests to run in one lockstep batch: everything but prompts and seed."""
    fields = vars(request)
    free = ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2", "seed", "metadata", "output")
    return tuple((name, value) for name, value in fields.items() if name not in free)


def _fields(name: str, value: Any) -> dict[str, Any]:
    if name == "loras":
        if not isinstance(value, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
            raise RequestError(f"loras: got {value!r}, expected a list of [file or built-in name, strength]")
        return {"loras": tuple((source, strength) for source, strength in value)}
    if name != "size":
        return {name: value}
    if not (isinstance(value, Sequence) and len(value) == 2):
        raise RequestError(f"size: got {value!r}, expected [width, height]")
    return {"width": value[0], "height": value[1]}
