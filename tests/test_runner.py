"""Updates on static rows: recorded ones equal eager ones in any order, and nothing but shapes is ever recorded anew.

Without CUDA the recorder freezes the torch operations of an update and replays those on the CPU.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from reference.recording import DryRecorder

from stepfuse import Engine, EngineConfig, Request
from stepfuse.engine import batch as batch_module
from stepfuse.engine import pipeline
from stepfuse.engine import runner as runner_module
from stepfuse.engine.batch import Batch
from stepfuse.engine.compile import Compiled
from stepfuse.engine.components import Components
from stepfuse.engine.errors import RequestError
from stepfuse.engine.graphs import planned_sizes
from stepfuse.engine.loading import load_components
from stepfuse.engine.runner import Runner
from stepfuse.engine.settling import settle

SOLO = 1e-4  # relative L2 of latents
SIZE: dict[str, Any] = {"width": 32, "height": 32}
UNLIKE = (
    Request(prompt="a red circle", seed=1, steps=3, sampler="ddim", guidance_scale=5.0, **SIZE),
    Request(prompt="a blue square", seed=2, steps=6, sampler="dpmpp_2m", guidance_scale=2.0, **SIZE),
    Request(prompt="circle", seed=3, steps=4, sampler="euler_a", guidance_scale=7.5, **SIZE),
    Request(prompt="a green triangle", seed=4, steps=5, sampler="heun", guidance_rescale=0.5, **SIZE),
    Request(prompt="square", seed=5, steps=2, sampler="lcm", guidance_scale=1.0, **SIZE),
    Request(prompt="a circle", seed=6, steps=4, sampler="ddpm", guidance_scale=1.0, **SIZE),
)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def configured(parts: Components, **options: Any) -> Components:
    return dataclasses.replace(parts, config=dataclasses.replace(parts.config, **options))


@pytest.fixture(scope="module")
def parts() -> Components:
    return load_components("shapes", EngineConfig(device="cpu", max_rows=4))


@pytest.fixture(scope="module")
def eager(parts: Components) -> Iterator[Engine]:
    with Engine(parts) as engine:
        yield engine


@pytest.fixture
def graph(parts: Components) -> Iterator[Engine]:
    recorded = configured(parts, runner="graph")
    with Engine(recorded, Runner(recorded, DryRecorder())) as engine:
        yield engine


@pytest.fixture
def frozen(parts: Components) -> Iterator[Engine]:
    """Its recorded updates run no Python."""
    recorded = configured(parts, runner="graph")
    with Engine(recorded, Runner(recorded, DryRecorder(frozen=True))) as engine:
        yield engine


def filled(parts: Components, requests: tuple[Request, ...]) -> Batch:
    batch = Batch(parts.config.max_rows, width=2)
    with torch.inference_mode():
        for request in requests:
            settled = settle(parts, request)
            ((conditioning, _),) = pipeline.encode(parts, [settled])
            batch.join(pipeline.start(parts, settled, conditioning, range(len(settled.seeds))), [request.seed])
    return batch


@pytest.mark.slow
def test_recorded_updates_of_unlike_rows_equal_their_solo_runs(eager: Engine, frozen: Engine) -> None:
    """Rows come and go, so there is padding, and rows move; one plan is longer than its window."""
    requests = [*UNLIKE, Request(prompt="a red square", seed=7, steps=70, sampler="ddpm", **SIZE)]
    for request, found in zip(requests, frozen.generate(requests), strict=True):
        assert relative(found.latents, eager.generate(request).latents) <= SOLO, request


def test_nothing_is_recorded_anew_when_sampler_steps_guidance_or_seed_change(graph: Engine) -> None:
    captures, updates = graph.models[None].runner.captures, 0
    assert captures is not None
    graph.generate("a red circle", **SIZE, steps=1, sampler="ddim")
    assert (captures.captured, captures.replayed) == (1, 1)
    for sampler in ("ddim", "euler_a", "heun", "dpmpp_2m", "pndm", "lms", "ddpm", "lcm"):
        for steps, guidance, seed in ((4, 1.5, 1), (5, 9.0, 2)):
            job = graph.submit(
                "a blue square", sampler=sampler, steps=steps, guidance_scale=guidance, seed=seed, **SIZE
            )
            updates += next(iter(job.events())).total
            job.result()
    assert captures.captured == 1, "one shape, one capture"
    assert captures.replayed == 1 + updates
    graph.generate("a circle", guidance_scale=1.0, steps=2, **SIZE)
    assert captures.captured == 2, "a row without guidance has one model row"
    graph.generate("a circle", guidance_rescale=0.5, steps=2, **SIZE)
    assert captures.captured == 3, "rescaled guidance is another graph"
    graph.generate("a circle", steps=2, width=48, height=32)
    assert captures.captured == 4, "another size"
    graph.generate(["a circle", "a square"], steps=2, seed=1, **SIZE)
    graph.generate("a square", steps=2, seed=1, **SIZE)
    assert captures.captured == 6, "room for two rows: tensors moved, so both sizes are new"


@pytest.mark.slow
@torch.inference_mode()
def test_recordings_of_any_size_in_any_order_equal_eager_updates(parts: Components) -> None:
    rng = random.Random(3)
    recorder = DryRecorder(frozen=True)
    recorded, exact = Runner(configured(parts, runner="graph"), recorder), Runner(parts)
    requests = tuple(dataclasses.replace(request, steps=12) for request in UNLIKE[:3])
    ours, theirs = filled(parts, requests), filled(parts, requests)
    recorded.warm(ours, 4)
    assert len(recorder.made) == len(planned_sizes(8))
    for round in range(10):
        if round == 5:  # three rows, five model rows; then the middle one leaves and a wider one comes
            for batch in (ours, theirs):
                batch.leave([1])
        size = rng.choice([n for n in planned_sizes(8) if n >= ours.model_rows])
        recorded._replay(ours, size)
        ours.advance()
        exact.update(theirs)
        for name in ("x", "base", "history", "update", "bad"):
            mine, other = (getattr(b.state, name)[: len(b)] for b in (ours, theirs))
            assert torch.allclose(mine, other, atol=1e-4, rtol=1e-4), (name, round, size)
        assert torch.allclose(ours.state.model_input[: ours.model_rows], theirs.state.model_input[: ours.model_rows],
                              atol=1e-4)  # fmt: skip
    assert len(recorder.made) == len(planned_sizes(8)), "nothing was recorded after the warm-up"


@torch.inference_mode()
def test_padding_rows_stay_as_they_are_and_harm_nobody(parts: Components) -> None:
    recorded, exact = Runner(configured(parts, runner="graph"), DryRecorder()), Runner(parts)
    ours, theirs = filled(parts, UNLIKE[:2]), filled(parts, UNLIKE[:2])
    recorded.warm(ours, 4)
    state = ours.state
    for tensor in (state.x, state.base, state.history, state.model_input, state.prepared.kv, state.prepared.time):
        tensor[4 if tensor.shape[0] == 8 else 2 :] = float("nan")
    for _ in range(2):  # the second reads the network inputs that the first has written
        recorded._replay(ours, 8)
        exact.update(theirs)
    assert relative(state.x[:2], theirs.state.x[:2]) <= 1e-5
    assert not state.bad.any()
    assert state.x[2:].isnan().all()


def test_buffers_and_recordings_outlive_a_bucket_until_they_are_released(graph: Engine) -> None:
    runner = graph.models[None].runner
    assert runner.captures is not None
    graph.generate("a circle", steps=1, **SIZE)
    graph.generate("a circle", steps=1, width=48, height=32)
    assert (len(runner._idle), len(runner.captures)) == (2, 2)
    assert not graph._worker.batches
    runner.release()
    assert (len(runner._idle), len(runner.captures)) == (0, 0)
    graph.generate("a circle", steps=1, **SIZE)
    assert runner.captures.captured == 3


def test_idle_buffers_stay_within_the_budget(parts: Components) -> None:
    recorded = configured(parts, runner="graph")
    with Engine(recorded, Runner(recorded, DryRecorder())) as engine:
        engine.generate("a circle", steps=1, **SIZE)
        (kept,) = engine.models[None].runner._idle.values()
    recorded = configured(parts, runner="graph", graph_bytes=int(1.5 * kept.bytes))
    with Engine(recorded, Runner(recorded, DryRecorder())) as engine:
        for width in (32, 40, 48):
            engine.generate("a circle", steps=1, width=width, height=32)
        assert [bucket[1] for bucket in engine.models[None].runner._idle] == [48], "the last one used"
        assert len(engine.models[None].runner.captures) == 1


def test_recordings_of_outgrown_buffers_are_dropped(graph: Engine) -> None:
    runner = graph.models[None].runner
    assert runner.captures is not None
    graph.generate("a circle", steps=1, **SIZE)
    graph.generate("a circle", steps=1, n=4, **SIZE)
    (batch,) = runner._idle.values()
    assert runner.captures.captured == 2
    assert len(runner.captures) == 1
    needs = batch.needs._replace(draws=2, masked=True)
    assert (batch.state, 8, needs, 8) in runner.captures


def test_warm_up_records_every_planned_size_largest_first(parts: Components) -> None:
    recorder, sizes = DryRecorder(), []
    recorded = configured(parts, runner="graph")
    runner = Runner(recorded, recorder)
    capture = runner.captures.capture
    runner.captures.capture = lambda key, *rest: (sizes.append(key[1]), capture(key, *rest))
    with Engine(recorded, runner) as engine:
        engine.warmup(**SIZE, rows=3)
        assert tuple(dict.fromkeys(sizes)) == planned_sizes(6)[::-1]
        before = runner.captures.captured
        assert before == len(planned_sizes(6))
        engine.generate(list(UNLIKE[:3]))
        assert runner.captures.captured == before
        text = engine.explain()
    assert "runner graph, model rows padded to 1, 2, 4, 6, 8" in text
    assert f"{before} captures made, {runner.captures.replayed} replays" in text
    assert "1 idle buckets" in text


def test_previews_of_recorded_updates_equal_eager_ones(eager: Engine, frozen: Engine) -> None:
    request = {"seed": 4, "steps": 4, "sampler": "heun", "guidance_rescale": 0.4, "n": 2, "preview_every": 3, **SIZE}
    ours, theirs = ([e.preview for e in engine.stream("a red circle", **request)] for engine in (frozen, eager))
    assert frozen.models[None].runner.captures.captured == 1
    assert [a is None for a in ours] == [b is None for b in theirs]
    assert sum(a is not None for a in ours) == 2
    for a, b in zip(ours, theirs, strict=True):
        assert a is None or np.abs(a.astype(int) - b.astype(int)).max() <= 1


def test_state_is_copied_for_a_preview_only(eager: Engine, parts: Components) -> None:
    batch, runner = filled(parts, UNLIKE[:1]), Runner(parts)
    assert runner.update(batch) is None
    before = runner.update(batch, preview=True)
    assert before is not None
    assert before.x.data_ptr() != batch.state.x.data_ptr()
    assert not torch.equal(before.x, batch.state.x[:1]), "from before the update"


def test_a_plan_longer_than_its_window_gives_the_same_bits(eager: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request(prompt="a circle", seed=1, steps=20, sampler="ddpm", output="latent", **SIZE)
    whole = eager.generate(request).latents
    for module in (batch_module, runner_module):
        monkeypatch.setattr(module, "WINDOW", 6)
    assert torch.equal(eager.generate(request).latents, whole)


@pytest.mark.parametrize(("mode", "most"), [("eager", 1), ("eager", 2), ("eager", 3), ("graph", 2)])
@torch.inference_mode()
def test_an_update_in_several_forwards_equals_one(parts: Components, mode: str, most: int) -> None:
    """Three rows, five model rows; in graph mode all forwards are in one capture, which runs no Python."""
    recorder = DryRecorder(frozen=True) if mode == "graph" else None
    split = Runner(configured(parts, runner=mode, forward_rows=most), recorder)
    whole = Runner(configured(parts, runner=mode), None if recorder is None else DryRecorder())
    rows = (*UNLIKE[:2], UNLIKE[4])
    ours, theirs = filled(parts, rows), filled(parts, rows)
    split.update(ours)
    forwards: list[int] = []
    hook = parts.denoiser.register_forward_pre_hook(lambda _, args: forwards.append(len(args[0])))
    split.update(ours)
    hook.remove()
    padded = 6 if mode == "graph" else 5
    expected = [most] * (padded // most) + [padded % most] * (padded % most > 0)
    assert forwards == ([] if mode == "graph" else expected)
    assert recorder is None or (len(recorder.made) == 1 and split.captures.captured == 1)
    whole.update(theirs)
    whole.update(theirs)
    assert relative(ours.state.x[:3], theirs.state.x[:3]) <= 1e-5
    assert f"at most {most} in one forward" in split.explain()


@pytest.mark.parametrize("most", [1, 3, 8])
def test_compilations_are_allowed_for_every_number_of_rows_in_a_forward(parts: Components, most: int) -> None:
    runner = Runner(configured(parts, runner="compiled", forward_rows=most))
    shapes = {n for size in planned_sizes(8) for n in runner_module._split(size, most)}
    assert shapes == {1: {1}, 3: {1, 2, 3}, 8: set(planned_sizes(8))}[most]
    assert runner.compiled[(), False].sizes >= len(shapes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runner": "graph"}, "runner: 'graph' needs CUDA, the device is cpu; use runner='eager' or 'compiled'"),
        ({"runner": "graphs"}, "runner: got 'graphs', did you mean 'graph'"),
        ({"graph_bytes": 0}, "graph_bytes: got 0"),
        ({"decode_rows": -1}, "decode_rows: got -1"),
    ],
)
def test_options_that_cannot_be_honoured_are_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Engine.load("shapes", device="cpu", **options)


def test_warm_up_refuses_more_rows_than_may_run(eager: Engine) -> None:
    with pytest.raises(RequestError, match="rows: got 5, expected 1 to max_rows, 4"):
        eager.warmup(rows=5)
    eager.warmup(**SIZE, rows=4)


@pytest.mark.compile
@pytest.mark.slow
def test_nothing_is_compiled_anew_when_sampler_steps_guidance_or_seed_change(parts: Components, eager: Engine) -> None:
    compiled = configured(parts, runner="compiled")
    runner, graphs = Runner(compiled), []
    backend = lambda graph, _: (graphs.append(graph), graph.forward)[1]  # noqa: E731
    runner.compiled[(), False] = Compiled(parts.denoiser, len(runner.sizes), backend=backend)
    with Engine(compiled, runner) as engine:
        engine.warmup(**SIZE, rows=2)
        assert len(graphs) == runner.compiled[(), False].count == len(planned_sizes(4))
        for request, found in zip(UNLIKE[:4], [engine.generate(request) for request in UNLIKE[:4]], strict=True):
            assert relative(found.latents, eager.generate(request).latents) <= SOLO
        for found, request in zip(engine.generate(list(UNLIKE[:2])), UNLIKE[:2], strict=True):
            assert relative(found.latents, eager.generate(request).latents) <= SOLO
        assert len(graphs) == runner.compiled[(), False].count == len(planned_sizes(4))
        assert f"compiled {len(graphs)} shapes" in engine.explain()


@pytest.mark.compile
@pytest.mark.slow
@torch.inference_mode()
def test_one_compilation_more_than_planned_is_an_error(parts: Components) -> None:
    """Quietly running op by op would be slow without a word."""
    batch = filled(parts, UNLIKE[:2])
    compiled = Compiled(parts.denoiser, 2, backend="eager")

    def call(rows: int) -> torch.Tensor:
        part = batch.prefix(2, rows)
        return compiled(part.model_input, part.prepared, part.update[part.row_of])

    call(2)
    call(4)
    call(2)
    with pytest.raises(Exception, match="recompile_limit"):
        call(3)
    other = Compiled(parts.denoiser, 1, backend="eager")
    part = batch.prefix(2, 3)
    other(part.model_input, part.prepared, part.update[part.row_of])  # counts for itself


@pytest.mark.compile
@pytest.mark.slow
def test_images_of_the_compiled_denoiser_equal_eager_ones(parts: Components, eager: Engine) -> None:
    compiled = configured(parts, runner="compiled")
    with Engine(compiled) as engine:
        found = engine.generate(UNLIKE[0])
    assert relative(found.latents, eager.generate(UNLIKE[0]).latents) <= SOLO


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_captured_updates_on_cuda_equal_eager_ones_and_never_wait() -> None:
    parts = load_components("shapes", EngineConfig(device="cuda", dtype="float32", max_rows=4))
    assert parts.config.runner == "graph"
    captured, exact = Runner(parts), Runner(configured(parts, runner="eager"))
    long = dataclasses.replace(UNLIKE[0], steps=100, sampler="ddpm")
    ours, theirs = filled(parts, (long, *UNLIKE[1:3])), filled(parts, (long, *UNLIKE[1:3]))
    captured.warm(ours, 4)
    captured.update(ours)
    exact.update(theirs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(80):  # over the end of the window, and of the shorter plans
            captured.update(ours)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for _ in range(80):
        exact.update(theirs)
    assert not ours.state.bad[:3].any()
    assert relative(ours.state.x[:3].cpu(), theirs.state.x[:3].cpu()) <= SOLO
    assert captured.captures is not None
    assert captured.captures.captured == len(planned_sizes(8))
