"""Deterministic mode: the bits of an image depend on nothing but its request. Without it, only a tolerance is kept."""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from reference.recording import DryRecorder

from stepfuse import Engine, EngineConfig, Request
from stepfuse.engine import binding, config, determinism, pipeline
from stepfuse.engine.batch import Batch
from stepfuse.engine.components import Components
from stepfuse.engine.errors import RequestError
from stepfuse.engine.graphs import CudaRecorder
from stepfuse.engine.loading import load_components
from stepfuse.engine.runner import Runner
from stepfuse.engine.settling import settle
from stepfuse.kernels import attention
from stepfuse.kernels.op import Implementation

SIZE: dict[str, Any] = {"width": 32, "height": 32}
UNLIKE = (
    Request(prompt="a red circle", seed=1, steps=3, sampler="ddim", guidance_scale=5.0, **SIZE),
    Request(prompt="a blue square", seed=2, steps=6, sampler="dpmpp_2m", guidance_scale=2.0, **SIZE),
    Request(prompt="circle", seed=3, steps=4, sampler="euler_a", guidance_scale=7.5, n=2, **SIZE),
    Request(prompt="a green triangle", seed=4, steps=5, sampler="heun", guidance_rescale=0.5, **SIZE),
    Request(prompt="square", seed=5, steps=2, sampler="lcm", guidance_scale=1.0, **SIZE),
    Request(prompt="a circle", seed=6, steps=4, sampler="ddpm", guidance_scale=1.0, width=40, height=32),
    Request(prompt="square", negative_prompt="red", seed=7, steps=4, sampler="ddpm", **SIZE),
)
FIXED = 4


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.slow)])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def digest(engine: Engine, requests: tuple[Request, ...]) -> list[str]:
    """Of latents and pixels, all requests submitted together."""
    made = engine.generate([dataclasses.replace(one, output="pt") for one in requests])
    return [hashlib.sha256(r.latents.numpy().tobytes() + r.images.numpy().tobytes()).hexdigest() for r in made]


@pytest.mark.parametrize("rows", [True, FIXED])
def test_a_mixed_load_gives_the_bits_of_solo_runs(threads: int, rows: bool | int) -> None:
    with Engine.load("shapes", device="cpu", deterministic=rows) as engine:
        together = digest(engine, UNLIKE)
        assert together == [digest(engine, (one,))[0] for one in UNLIKE]
        assert digest(engine, UNLIKE[::-1])[::-1] == together
        assert len(set(together)) == len(UNLIKE)
        images = 1 if rows is True else FIXED
        assert f"deterministic: every update has {images} images" in engine.explain()


def filled(parts: Components, requests: list[Request]) -> Batch:
    """A batch of one row per request, in this order."""
    batch = Batch(parts.config.max_rows, width=2)
    for request in requests:
        settled = settle(parts, request)
        ((conditioning, _),) = pipeline.encode(parts, [settled])
        batch.join(pipeline.start(parts, settled, conditioning, [0]), [request.seed])
    return batch


def spoil(batch: Batch, positions: list[int], value: float | None) -> None:
    """Put noise, or a value, into everything of these rows that an update reads."""
    state = batch.state
    places = [place for position in positions for place in batch.seats[position].places]
    rows = (state.x, state.base, state.history)
    for tensors, where in ((rows, positions), ((state.model_input, state.prepared.time, state.prepared.kv), places)):
        for tensor in tensors:
            chosen = torch.randn_like(tensor[where])
            tensor[where] = chosen if value is None else torch.full_like(chosen, value)


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
@torch.inference_mode()
def test_position_and_neighbours_change_no_bit(threads: int, value: float | None, mode: str) -> None:
    loaded = load_components("shapes", EngineConfig(device="cpu", deterministic=FIXED))
    parts = dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, runner=mode))
    same = [dataclasses.replace(one, steps=6, n=1, **SIZE) for one in (*UNLIKE[:2], *UNLIKE[3:5])]
    runner = Runner(parts, DryRecorder() if mode == "graph" else None)
    alone = filled(parts, same[:1])
    for _ in range(5):
        runner.update(alone)
    for order in ((0, 1, 2, 3), (3, 2, 1, 0), (1, 0)):
        batch = filled(parts, [same[i] for i in order])
        position = order.index(0)
        spoil(batch, [i for i in range(len(order)) if i != position], value)
        for _ in range(5):
            runner.update(batch)
        for name in ("x", "base", "history"):
            assert torch.equal(getattr(batch.state, name)[position], getattr(alone.state, name)[0]), (order, name)
        assert not batch.state.bad[position]
        assert bool(batch.state.bad[: len(order)].any()) == (value is not None), "the neighbours were really spoiled"


def test_every_update_and_phase_has_the_same_shape_whatever_the_load(monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine.load("shapes", device="cpu", deterministic=FIXED) as engine:
        parts, seen = engine.components, {"updates": set(), "prepared": set(), "decoded": set(), "prompts": set()}
        hooks = [
            parts.denoiser.register_forward_pre_hook(lambda _, args: seen["updates"].add(len(args[0]))),
            parts.text[0].model.register_forward_pre_hook(lambda _, args: seen["prompts"].add(len(args[0]))),
        ]
        decode, prepare = parts.vae.decode, parts.denoiser.prepare
        monkeypatch.setattr(parts.vae, "decode", lambda z: (seen["decoded"].add(len(z)), decode(z))[1])
        monkeypatch.setattr(parts.denoiser, "prepare",
                            lambda c, t: (seen["prepared"].add(len(t)), prepare(c, t))[1])  # fmt: skip
        engine.generate(list(UNLIKE))
        engine.generate("a circle", n=FIXED, seed=1, steps=1, **SIZE)  # its rows start together
        for hook in hooks:
            hook.remove()
    assert seen == {"updates": {2 * FIXED}, "prepared": {1, 2}, "decoded": {1}, "prompts": {1}}


RESTARTED = """
import hashlib, sys
from stepfuse import Engine
with Engine.load("shapes", device="cpu", deterministic={rows}) as engine:
    made = engine.generate(["a red circle", "a blue square"], seed=3, steps=4, sampler="euler_a", width=32, height=32)
    print(hashlib.sha256(b"".join(r.latents.numpy().tobytes() for r in made)).hexdigest())
"""


@pytest.mark.slow
@pytest.mark.parametrize("rows", [True, FIXED])
def test_a_restarted_process_gives_the_same_bits(rows: bool | int) -> None:
    script = RESTARTED.format(rows=rows)
    runs = [subprocess.run([sys.executable, "-c", script], capture_output=True, text=True) for _ in range(2)]
    assert all(run.returncode == 0 for run in runs), runs[0].stderr
    first, second = (run.stdout for run in runs)
    assert len(first.strip()) == 64
    assert first == second


def test_without_it_the_shapes_follow_the_load() -> None:
    """So only a tolerance is promised (test_engine.py): the same row is computed with other shapes."""
    with Engine.load("shapes", device="cpu", max_rows=4) as engine:
        seen: set[int] = set()
        hook = engine.components.denoiser.register_forward_pre_hook(lambda _, args: seen.add(len(args[0])))
        engine.generate(list(UNLIKE[:3]))
        hook.remove()
        assert len(seen) > 1
        assert "deterministic" not in engine.explain()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"deterministic": -1}, "deterministic: got -1, expected True, False or a number of images"),
        ({"deterministic": "yes"}, "deterministic: got 'yes'"),
        ({"deterministic": True, "max_rows": 4}, "max_rows: got 4, but deterministic=True fixes it at 1"),
        ({"deterministic": 4, "max_rows": 2}, "max_rows: got 2, but deterministic=4 fixes it at 4"),
        ({"deterministic": 4, "decode_rows": 2}, "decode_rows: got 2, but deterministic=4 fixes it at 1"),
        ({"deterministic": 4, "runner": "compiled"}, "'compiled' times kernels while it compiles"),
        ({"forward_rows": 0}, "forward_rows: got 0"),
    ],
)
def test_what_would_break_the_promise_is_an_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Engine.load("shapes", device="cpu", **options)


def test_calibration_is_refused_where_nothing_may_be_chosen() -> None:
    with Engine.load("shapes", device="cpu", deterministic=True) as engine:
        with pytest.raises(RequestError, match="deterministic mode runs one number of rows"):
            engine.warmup(**SIZE, calibrate=True)
        assert engine.generate("a circle", steps=1, **SIZE).images


def test_cublas_must_be_told_before_the_process_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check reads the environment only, so it needs no device."""
    cuda, wanted = torch.device("cuda"), EngineConfig(deterministic=4)
    for bad in ("", ":0:0"):
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", bad)
        with pytest.raises(RequestError, match="set it to ':4096:8' in the environment before the process starts"):
            config.resolve_deterministic(wanted, cuda)
    assert config.resolve_deterministic(EngineConfig(), cuda) == 0
    for good in (":4096:8", ":16:8"):
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", good)
        assert config.resolve_deterministic(wanted, cuda) == 4


def test_library_switches_are_set_on_cuda_and_put_back() -> None:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul

    def switches() -> tuple[bool | str, ...]:
        half = (matmul.allow_bf16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction_split_k)
        return cudnn.benchmark, cudnn.deterministic, *half

    parts = load_components("shapes", EngineConfig(device="cpu", deterministic=2))
    on_cuda = dataclasses.replace(parts.config, device=torch.device("cuda"))
    before = switches()
    with determinism.fixed_algorithms(on_cuda):
        assert switches() == (False, True, False, False)
    assert switches() == before
    with determinism.fixed_algorithms(dataclasses.replace(on_cuda, deterministic=0)):
        assert switches() == before


def test_implementations_that_may_split_sums_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that would split is put beside the reference, because on a CPU no library attention runs."""
    splitting = Implementation("splitting", attention.reference, lambda call: None)
    monkeypatch.setitem(attention.implementations, "splitting", splitting)
    monkeypatch.setattr(determinism, "SPLITTING", {("attention", "splitting")})
    parts = load_components("shapes", EngineConfig(device="cpu", deterministic=2))
    batch, chosen = filled(parts, [UNLIKE[0]]), {"attention": "splitting"}

    def run() -> torch.Tensor:
        return parts.denoiser(batch.state.model_input, batch.state.prepared, batch.state.update[batch.state.row_of])

    with torch.inference_mode():
        explicit = binding.Binder(parts.denoiser, dataclasses.replace(parts.config, kernels=chosen))
        with pytest.raises(RequestError, match="attention=splitting may split sums"):
            explicit.bind("here", run)
        calls = binding.record(parts.denoiser, run)
    dispatch = binding.resolve(parts.denoiser, "cpu", chosen, calls)
    assert "splitting" in {site.implementation for site in dispatch.sites.values()}
    kept = determinism.without_splits(dispatch, calls, parts.config, parts.denoiser)
    assert {site.implementation for site in kept.sites.values()} == {"reference"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_a_mixed_load_gives_the_bits_of_solo_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with Engine.load("shapes", device="cuda", deterministic=FIXED) as engine:
        assert isinstance(engine.models[None].runner.captures.recorder, CudaRecorder)
        assert not engine.models[None].runner.captures.recorder.benchmark
        assert digest(engine, UNLIKE) == [digest(engine, (one,))[0] for one in UNLIKE]
