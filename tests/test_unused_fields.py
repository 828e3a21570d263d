"""Fields of a request that nothing would read are errors or warnings, never silence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stepfuse import EngineConfig
from stepfuse.engine.components import Components
from stepfuse.engine.errors import RequestError
from stepfuse.engine.loading import load_components
from stepfuse.engine.request import build_request
from stepfuse.engine.settling import settle
from stepfuse.engine.user_module import user_components

Pipeline = Callable[[str], Path]
ALONE = "without guidance"


@pytest.fixture(scope="module")
def shapes() -> Components:
    return load_components("shapes", EngineConfig(device="cpu"))


@pytest.fixture(scope="module")
def sdxl(reference_pipeline: Pipeline) -> Components:
    return load_components(reference_pipeline("sdxl"), EngineConfig(device="cpu"))


def warnings(parts: Components, **fields: Any) -> tuple[str, ...]:
    return settle(parts, build_request(None, {"steps": 4, **fields})).warnings


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"guidance_rescale": 0.7}, f"guidance_rescale has no effect {ALONE}"),
        ({"negative_prompt": "blurry"}, f"negative_prompt has no effect {ALONE}"),
        ({"negative_prompt_embeds": torch.zeros(1, 24, 128)}, f"negative_prompt_embeds has no effect {ALONE}"),
    ],
)
def test_what_only_guidance_reads(shapes: Components, fields: dict[str, Any], expected: str) -> None:
    (warning,) = warnings(shapes, prompt="a circle", guidance_scale=1.0, **fields)
    assert warning == f"{expected} (guidance_scale <= 1, or a distilled model)"
    assert warnings(shapes, prompt="a circle", guidance_scale=3.0, **fields) == ()


def test_the_second_prompt_of_two_encoders(sdxl: Components) -> None:
    fields: dict[str, Any] = {"prompt": "a cat", "negative_prompt_2": "blurry"}
    (warning,) = warnings(sdxl, guidance_scale=1.0, **fields)
    assert warning.startswith(f"negative_prompt_2 has no effect {ALONE}")
    assert warnings(sdxl, guidance_scale=5.0, **fields) == ()
    net = sdxl.denoiser.config
    given = {
        "prompt_embeds": torch.zeros(1, 77, net.text_dim or net.blocks.cross_dim or 0),
        "pooled_prompt_embeds": torch.zeros(1, net.added_dim - 6 * (net.added_time_dim or 0)),
    }
    assert warnings(sdxl, guidance_scale=1.0, **given) == ()
    with pytest.raises(RequestError, match="prompt_2: prompt_embeds hold what both text encoders make; leave it out"):
        warnings(sdxl, prompt_2="a cat", **given)


def test_guidance_of_a_network_without_a_condition() -> None:
    parts = user_components(lambda x, t: x, (4,), EngineConfig(device="cpu"))
    (warning,) = warnings(parts, guidance_scale=3.0)
    assert warning.startswith("guidance_scale has no effect: ")
    assert warnings(parts) == warnings(parts, guidance_scale=1.0) == ()


@pytest.mark.parametrize("name", ["s_tmin", "s_tmax", "s_noise"])
def test_the_range_of_a_churn_that_is_not_there(shapes: Components, name: str) -> None:
    fields: dict[str, Any] = {"prompt": "a circle", "sampler": "euler", name: 0.5}
    assert warnings(shapes, **fields) == (f"{name} has no effect without s_churn",)
    assert warnings(shapes, s_churn=2.0, **fields) == ()
    with pytest.raises(RequestError, match="does not use churn"):
        warnings(shapes, **fields | {"sampler": "ddim"})


def test_a_churn_between_no_levels(shapes: Components) -> None:
    (warning,) = warnings(shapes, prompt="a circle", sampler="heun", s_churn=2.0, s_tmin=3.0, s_tmax=2.0)
    assert warning == "s_churn has no effect: no level lies between s_tmin=3.0 and s_tmax=2.0"
