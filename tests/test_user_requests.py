"""What `Engine.from_module` and requests to its engines refuse, and what a broken module does to them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from reference.exact import conditional, epsilon
from torch import Tensor, nn

from stepfuse import Engine
from stepfuse.engine.errors import NumericsError, RequestError


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.from_module(epsilon, (400, 3), time="sigma", device="cpu") as made:
        yield made


REFUSED: tuple[tuple[dict[str, Any], str], ...] = (
    ({"prompt": "a cat"}, "prompt: epsilon is a network of its own"),
    ({"width": 64}, "width: epsilon"),
    ({"class_labels": 1}, "class_labels: epsilon"),
    ({"output": "pil"}, "makes samples, not pictures; use 'pt'"),
    ({"upscale": "lanczos:2"}, "upscale: epsilon"),
    ({"noise_level": 3}, "noise_level"),
    ({"conditioning": torch.ones(1, 2)}, "without conditioning=; leave it out"),
    ({"shape": (400, 2)}, r"shape: got \(400, 2\), expected \[400, 3\]"),
    ({"latents": torch.zeros(1, 3)}, r"latents: got shape \(1, 3\), expected 1 rows of \[400, 3\]"),
    ({"image": "photo.png"}, "image: got str, expected a tensor"),
    ({"image": torch.zeros(2, 400, 3)}, "expected 1 rows"),
    ({"image": torch.full((1, 400, 3), math.nan)}, "image: got NaN"),
    ({"image": torch.zeros(1, 400, 3), "mask": torch.ones(2)}, "mask: got shape"),
    ({"image": torch.zeros(1, 400, 3), "mask": torch.full((3,), 2.0)}, "mask: expected numbers from 0 to 1"),
    ({"mask": torch.ones(3)}, "without an image"),
    ({"cascade": "hires-fix"}, "cascade: epsilon makes samples"),
)


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=lambda one: "-".join(one) if isinstance(one, dict) else "")
def test_requests_that_mean_nothing_are_refused(engine: Engine, fields: dict[str, Any], message: str):
    with pytest.raises(RequestError, match=message):
        engine.submit(**{"seed": 0, "steps": 2, **fields})


def test_conditioning_is_checked():
    with Engine.from_module(conditional, (6, 2), conditioning=2, device="cpu") as made:
        for fields, message in (
            ({}, r"conditioning: conditional needs a tensor \[1 or n, \*\[2\]\]"),
            ({"conditioning": torch.ones(1, 3)}, "expected 1 rows of"),
            ({"conditioning": [1, 2]}, "expected a tensor"),
            ({"conditioning": torch.ones(1, 2), "guidance_scale": 2.0}, "needs what to guide away from"),
            ({"conditioning": torch.ones(1, 2), "negative_conditioning": torch.ones(1, 2).int()}, "as of conditioning"),
        ):
            with pytest.raises(RequestError, match=message):
                made.submit(**fields)


OPTIONS: tuple[tuple[dict[str, Any], str], ...] = (
    ({"prediction": "epsilom"}, "prediction: got 'epsilom'.*epsilon"),
    ({"time": "seconds"}, "time: got 'seconds'"),
    ({"schedule": "linaer"}, "schedule: got 'linaer'.*linear"),
    ({"schedule": [0.1, 0.2]}, "two descending numbers"),
    ({"schedule": {"beta_strat": 0.1}}, "schedule: .*beta_start"),
    ({"schedule": {"prediction_type": "sample"}}, "its prediction_type is 'sample'"),
    ({"shape": (0, 2)}, "shape: got"),
    ({"shape": (2, None, None)}, "shape: got"),
    ({"conditioning": (2, None)}, "only the first axis may be None"),
    ({"defaults": {"width": 3}}, "defaults: got 'width'"),
    ({"vae_dtype": "float32"}, "vae_dtype: .*leave it out"),
    ({"safety": lambda images, prompt: images}, "safety: .*leave it out"),
    ({"dtype": "float64", "module": nn.Linear(3, 3)}, "dtype: got float64, the module is float32"),
    ({"module": 3}, "module: got int"),
)


@pytest.mark.parametrize(
    ("options", "message"), OPTIONS, ids=lambda one: "-".join(one) if isinstance(one, dict) else ""
)
def test_options_that_fit_no_network_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(RequestError, match=message):
        Engine.from_module(**{"module": epsilon, "shape": 4, "device": "cpu", **options})


@pytest.mark.parametrize(
    ("network", "error", "message"),
    [
        (lambda x, t: x[:, :1], RequestError, r"returned shape \(1, 1\) for x \(1, 4\)"),
        (lambda x, t: (x,), RequestError, "returned tuple for x"),
        (lambda x, t: x * math.nan, NumericsError, "NaN or Inf"),
    ],
)
def test_what_a_module_gives_wrong_ends_its_job_alone(network: Any, error: type[Exception], message: str):
    broken = [True]

    def module(x: Tensor, t: Tensor) -> Tensor:
        return network(x, t) if broken else x

    with Engine.from_module(module, 4, device="cpu") as made:
        with pytest.raises(error, match=message):
            made.generate(seed=0, steps=3)
        broken.clear()
        assert made.generate(seed=0, steps=3).images.shape == (1, 4)


def test_samples_are_not_saved_as_pictures_and_take_no_adapters(engine: Engine):
    with pytest.raises(RequestError, match="save: epsilon makes samples"):
        engine.generate(seed=0, steps=2, output="np").save("points.png")
    with pytest.raises(RequestError, match="fit no network of yours"):
        engine.set_loras([])


def test_an_open_shape_must_be_said():
    with Engine.from_module(epsilon, (None, 2), device="cpu") as made:
        with pytest.raises(RequestError, match=r"shape: the network takes \[any, 2\]; give shape="):
            made.submit(seed=0)
        with pytest.raises(RequestError, match="give one shape"):
            made.submit(shape=(3, 2), latents=torch.zeros(1, 4, 2))
