"""Same seed, same image, whatever the batch: unlike rows against their solo runs, and bit-equal when deterministic.

By default the relative L2 distance of final latents is held against the tolerance of `throughput`. Deterministic, the
latents of every row must be the same bits alone, among other rows, in another order, beside rows of NaN, and in another
process. Image to image, inpainting, a ControlNet, LoRAs and cascades beside text to image, in float16: by the tolerance
again.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import count
from typing import Any

import numpy as np
import torch

from ...engine.components import Components
from ...engine.config import EngineConfig
from ...engine.engine import Engine
from ...engine.errors import NumericsError
from ...engine.loading import load_components
from ...engine.request import Control, Job, Request, Result
from ..mix import Mix
from ..random_models import with_controlnet, with_loras
from ..throughput import TOLERANCE
from .batches import model
from .restarted import digest
from .session import Session

ROWS = 8
SEED = 5
CONTROLNET = "random"
LORAS = {"narrow": 4, "wide": 16}
"""LoRAs of random weights, and their ranks."""


def run(session: Session) -> None:
    for name in ("tiny",) if session.tiny else ("shapes", "sd15"):
        with Engines(session, name) as engines:
            for what, measure in MEASUREMENTS.items():
                if session.tiny and measure is restarted:
                    continue  # seconds of imports; a test has it alone
                if not session.measure(f"{name} {what}", lambda m=measure, e=engines: m(session, e)):
                    return


class Engines:
    """The engine of a model in its default mode and the deterministic one, loaded when they are first asked for."""

    def __init__(self, session: Session, name: str) -> None:
        self.session, self.name = session, name
        self._made: dict[bool, Engine] = {}
        self.alone = cache(self._alone)

    def __enter__(self) -> Engines:
        return self

    def __exit__(self, *exc: object) -> None:
        for engine in self._made.values():
            engine.close()

    def engine(self, deterministic: bool) -> Engine:
        """Raises RequestError where this version has no deterministic mode."""
        if deterministic not in self._made:
            self._made[deterministic] = load(self.session, self.name, deterministic)
        return self._made[deterministic]

    def _alone(self, deterministic: bool) -> list[torch.Tensor]:
        """Final latents of every request of `unlike`, each run alone."""
        return [self.engine(deterministic).generate(one).latents for one in unlike(self.session.tiny)]


def load(session: Session, name: str, deterministic: bool) -> Engine:
    """An engine for `ROWS` rows of "shapes", or of an architecture with random weights.

    On CUDA, deterministic, the process must have been started with cuBLAS's repeatable workspaces.
    """
    options: dict[str, Any] = {"deterministic": ROWS} if deterministic else {"max_rows": ROWS}
    return Engine(_parts(session, name, session.dtype, **options))


def _parts(session: Session, name: str, dtype: torch.dtype, **options: Any) -> Components:
    given = {"device": str(session.device), "dtype": dtype, "max_rows": ROWS, **options}
    return load_components(name, EngineConfig(**given)) if name == "shapes" else model(session, name, **given)


def unlike(tiny: bool) -> list[Request]:
    """Requests that differ in steps, sampler, guidance (two branches or one), prompt and seed."""
    requests = Mix.load("mixed").draw(ROWS, SEED)
    return [replace(one, output="latent", steps=2 + i % 2 if tiny else one.steps) for i, one in enumerate(requests)]


def _tolerance(session: Session, engines: Engines) -> dict[str, Any]:
    together: list[Result] = engines.engine(False).generate(unlike(session.tiny))
    alone = engines.alone(False)
    errors = [float((found.latents - own).norm() / own.norm()) for found, own in zip(together, alone, strict=True)]
    allowed = TOLERANCE[str(session.dtype).removeprefix("torch.")]
    return {"green": all(error <= allowed for error in errors), "largest": max(errors), "errors": errors,
            "allowed": allowed, "rows": ROWS}  # fmt: skip


def _kinds_of_work(session: Session, engines: Engines) -> dict[str, Any]:
    """Requests of every kind in one engine, in float16, against the same ones alone."""
    requests = kinds(session.tiny)
    parts = with_loras(_parts(session, engines.name, torch.float16), LORAS)
    with Engine(with_controlnet(parts, CONTROLNET)) as engine:
        jobs = [engine.submit(one, cascade=cascade) for one, cascade in requests.values()]
        together = [job.result() for job in jobs]
        alone = [engine.generate(one, cascade=cascade) for one, cascade in requests.values()]
    errors = {name: float((found.latents - own.latents).norm() / own.latents.norm())
              for name, found, own in zip(requests, together, alone, strict=True)}  # fmt: skip
    allowed = TOLERANCE["float16"]
    return {"green": all(error <= allowed for error in errors.values()), "largest": max(errors.values()),
            "errors": errors, "allowed": allowed, "rows": len(requests)}  # fmt: skip


def kinds(tiny: bool) -> dict[str, tuple[Request, str | None]]:
    """Requests by what they do, with the cascade they go through."""
    size = {"width": 32, "height": 32} if tiny else {}
    numbers = count()

    def one(**fields: Any) -> Request:
        seed = next(numbers)
        return Request(
            prompt="a red circle", seed=seed, steps=3 if tiny else 8 + seed, output="latent", **size, **fields
        )

    ramp = np.linspace(0, 1, 64, dtype=np.float32)
    across, down = np.meshgrid(ramp, ramp)
    image = np.stack([across, down, 1 - across], -1)
    control = {"controls": (Control(name=CONTROLNET, image=image, scale=0.5),)}
    return {
        "text to image": (one(), None),
        "image to image": (one(image=image, strength=0.6), None),
        "inpainting": (one(image=image, mask=across.round()), None),
        "change map": (one(image=image, change_map=across), None),
        "ControlNet": (one(**control), None),
        "ControlNet, image to image": (one(image=image, strength=0.7, **control), None),
        "LoRA": (one(loras=(("narrow", 0.8),)), None),
        "another LoRA, inpainting": (one(loras=(("wide", 0.5),), image=image, mask=across.round()), None),
        "two LoRAs, ControlNet": (one(loras=tuple((name, 0.4) for name in LORAS), **control), None),
        "cascade": (one(), "hires-fix"),
        "cascade, two images": (one(n=2), "hires-fix"),
    }


def _among_others(session: Session, engines: Engines) -> dict[str, Any]:
    together = engines.engine(True).generate(unlike(session.tiny))
    return _equal(engines.alone(True), [found.latents for found in together])


def _permuted(session: Session, engines: Engines) -> dict[str, Any]:
    order = [(3 * place + 1) % ROWS for place in range(ROWS)]
    requests, alone = unlike(session.tiny), engines.alone(True)
    found = engines.engine(True).generate([requests[place] for place in order])
    return _equal([alone[place] for place in order], [one.latents for one in found])


def _beside_nan(session: Session, engines: Engines) -> dict[str, Any]:
    """Every second row starts from NaN: its request ends with an error, the others as if it had not been there."""
    requests, alone = unlike(session.tiny), engines.alone(True)
    broken = [replace(one, latents=torch.full_like(own, torch.nan)) if place % 2 else one
              for place, (one, own) in enumerate(zip(requests, alone, strict=True))]  # fmt: skip
    engine = engines.engine(True)
    jobs = [engine.submit(one) for one in broken]
    refused = [_refused(job) for job in jobs[1::2]]
    facts = _equal(alone[::2], [job.result().latents for job in jobs[::2]])
    return facts | {"refused": refused, "green": facts["green"] and all(refused)}


def _refused(job: Job) -> bool:
    try:
        job.result()
    except NumericsError:
        return True
    return False


def restarted(session: Session, engines: Engines) -> dict[str, Any]:
    """The same requests together in a process of their own, against alone in this one."""
    here = [digest(latents) for latents in engines.alone(True)]
    found = elsewhere(session, engines.name)
    return {"green": found == here, "equal": [a == b for a, b in zip(found, here, strict=True)]}


def elsewhere(session: Session, name: str) -> list[str]:
    """The digests that another process finds. Raises RuntimeError where it fails."""
    command = [sys.executable, "-m", f"{__package__}.restarted", name, "--device", str(session.device)]
    command += ["--tiny"] if session.tiny else []
    limit = max(5.0, session.seconds_left())
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise RuntimeError(f"exit {done.returncode}: {lines[-1] if lines else 'no output'}")
    return json.loads(done.stdout.splitlines()[-1])


def _equal(expected: Sequence[torch.Tensor], found: Sequence[torch.Tensor]) -> dict[str, Any]:
    equal = [torch.equal(a, b) for a, b in zip(found, expected, strict=True)]
    distances = [float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)]
    return {"green": all(equal), "equal": equal, "largest_difference": max(distances)}


MEASUREMENTS: dict[str, Callable[[Session, Engines], dict[str, Any]]] = {
    f"{ROWS} unlike rows against their solo runs": _tolerance,
    "every kind of request against its solo run, float16": _kinds_of_work,
    "deterministic, among other rows": _among_others,
    "deterministic, permuted": _permuted,
    "deterministic, beside NaN": _beside_nan,
    "deterministic, in another process": restarted,
}
