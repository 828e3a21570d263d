"""Dynamic thresholding: the quantile of every row, the limit it gives, and rows that have one beside rows without."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.networks import UNETS
from reference.random_weights import randomize
from reference.recording import DryRecorder
from reference.sampling import draw, network, run, worst
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stepfuse import Engine, EngineConfig, Request
from stepfuse.engine import batch as batch_module
from stepfuse.engine import pipeline
from stepfuse.engine import runner as runner_module
from stepfuse.engine.batch import Batch
from stepfuse.engine.components import Components
from stepfuse.engine.errors import CheckpointError, RequestError
from stepfuse.engine.loading import load_components
from stepfuse.engine.runner import Runner
from stepfuse.engine.sampling.dynamic_threshold import DynamicThreshold
from stepfuse.engine.sampling.limits import bounded, limits, quantile, raw_estimate
from stepfuse.engine.sampling.names import SAMPLERS
from stepfuse.engine.sampling.planning import make_plan
from stepfuse.engine.sampling.scheduler_config import SchedulerConfig
from stepfuse.engine.settling import settle
from stepfuse.engine.user_module import user_components
from stepfuse.kernels.sampler_step.columns import Column
from stepfuse.kernels.sampler_step.reference import sampler_step

SHAPE = (3, 5, 7)
REQUESTS: tuple[dict[str, Any], ...] = (
    {"seed": 1, "steps": 4, "sampler": "ddim", "dynamic_threshold": 0.9},
    {"seed": 2, "steps": 6, "sampler": "dpmpp_2m"},
    {"seed": 3, "steps": 5, "sampler": "ddpm", "dynamic_threshold": (0.995, 1.5)},
    {"seed": 4, "steps": 4, "sampler": "euler_a", "dynamic_threshold": 1.0},
    {"seed": 5, "steps": 7, "sampler": "heun"},
)


# The statistic.


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 400), st.lists(st.floats(0, 1), min_size=1, max_size=5), st.integers(0, 2**31))
def test_quantiles_equal_torch(count: int, shares: list[float], seed: int) -> None:
    values = torch.randn(len(shares), count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    found = quantile(values, torch.tensor(shares, dtype=torch.float64))
    for row, share in enumerate(shares):
        assert abs(found[row] - torch.quantile(values[row], share)) <= 1e-12


def test_a_rank_between_large_numbers_keeps_its_fraction() -> None:
    """In float32 the rank 0.5 (2^22 - 1) would be a whole number, or one half more."""
    count, p = 2**22, torch.tensor([0.5], dtype=torch.float64)
    assert quantile((torch.arange(count) % 2).float()[None], p).item() == 0.5


def test_the_limit_is_the_quantile_between_one_and_the_most() -> None:
    raw = torch.stack([scale * torch.linspace(-1, 1, 105).reshape(SHAPE) for scale in (0.5, 2.0, 8.0, 8.0, 8.0)])
    threshold = torch.tensor([[1, math.inf], [1, math.inf], [0.5, math.inf], [0.5, 1.5], [0, 9]], dtype=torch.float64)
    assert limits(raw.double(), threshold).tolist() == pytest.approx([1.0, 2.0, 4.0, 1.5, 0.0])
    assert limits(raw, threshold).dtype == torch.float32


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([-1.0, 0.0, 1.0]) | st.floats(-3, 3), min_size=1, max_size=4), st.floats(0.1, 3))
def test_the_op_keeps_and_divides_as_written(limit: list[float], clamp: float) -> None:
    rows, generator = len(limit), torch.Generator().manual_seed(len(limit))
    x, output = (2 * torch.randn(rows, *SHAPE, dtype=torch.float64, generator=generator) for _ in range(2))
    table = torch.zeros(rows, 1, len(Column), dtype=torch.float64)
    table[..., [Column.LIVE, Column.P, Column.B]] = 1.0
    table[..., Column.Q], table[..., Column.CLAMP] = 0.5, clamp
    rest = (torch.zeros(rows, dtype=torch.int64), torch.ones(rows, 1).double(), torch.zeros(rows, dtype=torch.int64))
    history, given = torch.zeros(rows, 3, *SHAPE).double(), torch.tensor(limit, dtype=torch.float64)
    found = sampler_step(x, x, history, output[:, None], table, *rest, draws=0, limit=given)[0]
    without = sampler_step(x, x, history, output[:, None], table, *rest, draws=0)[0]
    for row, s in enumerate(limit):
        raw = (x + 0.5 * output)[row].numpy()
        expected = np.clip(raw, -s, s) / s if s > 0 else np.clip(raw, -clamp, clamp)
        assert np.abs(found[row].numpy() - expected).max() <= 1e-14
        assert s > 0 or torch.equal(found[row], without[row])
    lines = table[:, 0]
    assert torch.equal(bounded(raw_estimate(x, output[:, None], rest[1], lines), lines[:, Column.CLAMP], given), found)


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "ddim"])
def test_every_sampler_takes_the_kept_estimate_for_the_network_s(sampler: str) -> None:
    """DDIM, as diffusers has it, keeps the direction of the network's own estimate."""
    config = SchedulerConfig.from_diffusers({"_class_name": "DDIMScheduler", "clip_sample": False})
    plan = make_plan(config, steps=7, sampler=sampler, dynamic_threshold=(0.8, 40.0))
    plain = make_plan(config, steps=7, sampler=sampler)
    updates, threshold = iter(plain.updates), torch.tensor([[0.8, 40.0]], dtype=torch.float64)

    def kept(model_input: Tensor, timestep: float) -> Tensor:
        u = next(updates)
        x, output = model_input / u.c_in, 3 * network(model_input, timestep)
        raw = u.p * x + u.q * output
        return (bounded(raw, torch.tensor([math.inf]), limits(raw, threshold)) - u.p * x) / u.q

    start, noises = plan.init_scale * draw(1)[0], draw(40, 1)
    ours = run(plan, start, lambda x, t: 3 * network(x, t), noises)
    assert worst(ours, run(plain, start, kept, noises)) <= 1e-9
    free = make_plan(config, steps=7, sampler=sampler)
    assert worst(ours, run(free, start, lambda x, t: 3 * network(x, t), noises)) > 0.01


# Rows.


def denoiser(x: Tensor, t: Tensor) -> Tensor:
    """Element by element, so that no number of rows changes its bits; estimates leave -1..1."""
    return 2.0 * torch.tanh(x) - 0.3 * torch.cos(3 * x + 0.01 * t[:, None, None, None])


def parts_of(runner: str = "eager", device: str = "cpu", shape: tuple[int, ...] = SHAPE) -> Components:
    made = user_components(denoiser, shape, EngineConfig(device=device, max_rows=8), name="user")
    return dataclasses.replace(made, config=dataclasses.replace(made.config, runner=runner))


@torch.inference_mode()
def join(parts: Components, batch: Batch, request: dict[str, Any]) -> None:
    settled = settle(parts, Request(**request))
    ((conditioning, _),) = pipeline.encode(parts, [settled])
    batch.join(pipeline.start(parts, settled, conditioning, range(1)), settled.seeds)


def filled(parts: Components, requests: tuple[dict[str, Any], ...]) -> Batch:
    batch = Batch(parts.config.max_rows)
    for request in requests:
        join(parts, batch, request)
    return batch


@torch.inference_mode()
def ends(parts: Components, runner: Runner, requests: tuple[dict[str, Any], ...]) -> list[Tensor]:
    """Final states, every row leaving when it is done."""
    batch, found = filled(parts, requests), {}
    while len(batch):
        runner.update(batch)
        done = [i for i, seat in enumerate(batch.seats) if seat.done == seat.updates]
        for i, state in zip(done, batch.take(done)[0], strict=True):
            found[batch.owners[i]] = state
        batch.leave(done)
    return [found[request["seed"]] for request in requests]


@pytest.mark.parametrize("recorded", [False, True])
def test_every_row_of_a_mixed_batch_has_the_bits_of_its_own_run(recorded: bool) -> None:
    """Recorded updates are replayed without Python: nothing of the statistic is read on the host."""
    parts = parts_of("graph" if recorded else "eager")
    solo = Runner(parts_of())
    runner = Runner(parts, DryRecorder(frozen=True)) if recorded else solo
    requests = REQUESTS[:3] if recorded else REQUESTS
    for request, found in zip(requests, ends(parts, runner, requests), strict=True):
        (alone,) = ends(parts, solo, (request,))
        assert torch.equal(found, alone), request
        if "dynamic_threshold" in request:
            (free,) = ends(parts, solo, ({**request, "dynamic_threshold": None},))
            assert not torch.equal(found, free), request


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", [SHAPE, (3, 64, 64)])
def test_a_cuda_graph_has_the_bits_of_eager_updates(shape: tuple[int, ...]) -> None:
    """Rows that one thread block sorts, and larger ones, which torch sorts in another way."""
    eager, graph = (parts_of(runner, "cuda", shape) for runner in ("eager", "graph"))
    pairs = zip(ends(eager, Runner(eager), REQUESTS), ends(graph, Runner(graph), REQUESTS), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


class Sorts(TorchDispatchMode):
    """Counts sorts."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "sort" in str(func)
        return func(*args, **(kwargs or {}))


def test_a_batch_without_thresholds_sorts_nothing() -> None:
    parts = parts_of()
    rescaled = {**REQUESTS[1], "guidance_rescale": 0.5}
    for requests, expected in ((REQUESTS[1::3], 0), ((rescaled,), 0), (REQUESTS, 1)):
        batch, runner = filled(parts, requests), Runner(parts)
        with torch.inference_mode(), Sorts() as sorts:
            runner.update(batch)
        assert sorts.count == expected
        assert batch.needs.limited == bool(expected)


def test_a_capture_of_rows_with_thresholds_is_another() -> None:
    parts = parts_of("graph")
    runner, batch = Runner(parts, DryRecorder()), filled(parts, (REQUESTS[4], REQUESTS[1]))
    for request, captured in ((REQUESTS[1], 1), (REQUESTS[0], 2), (REQUESTS[1], 2), (REQUESTS[2], 2)):
        with torch.inference_mode():
            batch.leave([1])
        join(parts, batch, request)
        runner.update(batch)
        assert runner.captures.captured == captured


def test_the_preview_of_the_last_update_is_the_image() -> None:
    """DDIM's last step ends at its estimate."""
    parts = parts_of()
    for request in ({**REQUESTS[0], "steps": 2}, {**REQUESTS[0], "steps": 2, "dynamic_threshold": (0.5, 1.2)}):
        batch, runner = filled(parts, (request, {**REQUESTS[1], "steps": 2})), Runner(parts)
        runner.update(batch)
        before = runner.update(batch, preview=True)
        assert torch.allclose(before.denoised([0])[0], batch.state.x[0], atol=1e-6)
        assert before.denoised([0]).abs().max() <= 1
        assert torch.allclose(before.denoised([1])[0], batch.state.x[1], atol=1e-6)


def test_a_plan_longer_than_its_window_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    parts, request = parts_of(), {**REQUESTS[2], "steps": 20}
    (whole,) = ends(parts, Runner(parts), (request,))
    for module in (batch_module, runner_module):
        monkeypatch.setattr(module, "WINDOW", 6)
    assert torch.equal(ends(parts, Runner(parts), (request,))[0], whole)


# Requests and checkpoints.


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pixels")
    cls, config = UNETS["ddpm"]
    unet = getattr(diffusers, cls)(**config)
    randomize(unet, "threshold")
    scheduler = diffusers.DDIMScheduler(thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=1.7)
    diffusers.DDIMPipeline(unet, scheduler).save_pretrained(folder)
    return folder


def test_a_checkpoint_that_thresholds_equals_diffusers(checkpoint: Path) -> None:
    theirs = diffusers.DDIMPipeline.from_pretrained(checkpoint)
    theirs.set_progress_bar_config(disable=True)
    with Engine.load(checkpoint, device="cpu") as engine:
        found, one = (engine.generate(seed=5, n=n, steps=4, output="np") for n in (2, 1))
        clipped = engine.generate(seed=5, steps=4, output="np", dynamic_threshold=0)
        given = engine.generate(seed=5, steps=4, output="np", dynamic_threshold=(0.9, 1.7))
        euler = engine.generate(seed=5, steps=4, output="np", sampler="euler")
    generators = [torch.Generator().manual_seed(5 + i) for i in range(2)]
    expected = theirs(batch_size=2, generator=generators, num_inference_steps=4, output_type="np").images
    assert abs(found.images - expected).max() <= 1e-4
    assert abs(clipped.images - one.images).max() > 0.01
    assert np.array_equal(given.images, one.images)
    assert one.settings["dynamic_threshold"] == [0.9, 1.7]
    assert json.loads(one.parameters(5))["dynamic_threshold"] == [0.9, 1.7]
    assert "dynamic_threshold" not in clipped.settings | euler.settings, "diffusers' Euler has none"


def test_a_request_of_a_users_network_has_a_threshold_and_says_so() -> None:
    with Engine.from_module(denoiser, SHAPE, device="cpu") as engine:
        free, kept = (engine.generate(seed=1, steps=5, dynamic_threshold=p) for p in (None, 0.99))
    assert free.images.abs().max() > 1.2 > 1.0 >= kept.images.abs().max()
    assert kept.settings["dynamic_threshold"] == 0.99


@pytest.mark.parametrize("wanted", [-0.1, 1.1, math.nan, True, "0.9", (0.9, 0.5), (0.9, 1.0, 2.0), (), (0, 2.0)])
def test_other_values_are_refused(wanted: Any) -> None:
    with pytest.raises(RequestError, match=r"dynamic_threshold: got .*, expected a percentile above 0 up to 1"):
        settle(parts_of(), Request(dynamic_threshold=wanted))


def test_latents_have_no_threshold() -> None:
    parts = load_components("shapes", EngineConfig(device="cpu"))
    with pytest.raises(RequestError, match="shapes samples latents, which have no range"):
        settle(parts, Request(prompt="a red circle", dynamic_threshold=0.995))
    scheduler = SchedulerConfig("DDIMScheduler", {**parts.scheduler.options, "thresholding": True})
    own = dataclasses.replace(parts, scheduler=scheduler)
    with pytest.raises(CheckpointError, match="`thresholding: true`; set it to false"):
        settle(own, Request(prompt="a red circle", sampler="ddim"))
    asked = Request(prompt="a red circle", sampler="ddim", dynamic_threshold=0)
    assert settle(own, asked).plan.dynamic_threshold is None


def test_the_schedulers_own_threshold_is_for_the_samplers_that_have_it_in_diffusers() -> None:
    config = SchedulerConfig.from_diffusers({"_class_name": "DDPMScheduler", "thresholding": True})
    own = DynamicThreshold(0.995, 1.0)
    for sampler in SAMPLERS:
        found = make_plan(config, steps=4, sampler=sampler).dynamic_threshold
        assert found == (own if sampler in ("ddim", "ddpm", "dpmpp_2m", "lcm") else None)
        assert make_plan(config, steps=4, sampler=sampler, dynamic_threshold=0.9).dynamic_threshold == (
            DynamicThreshold(0.9)
        )
