"""Out of memory makes batches smaller and loses nothing; requests that end together are decoded together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from reference.recording import DryRecorder

from stepfuse import Engine, EngineConfig, Job, Request
from stepfuse.engine import pipeline
from stepfuse.engine.batch import Batch
from stepfuse.engine.components import Components
from stepfuse.engine.errors import DeviceError, EngineClosed, NumericsError
from stepfuse.engine.loading import load_components
from stepfuse.engine.request import build_request
from stepfuse.engine.runner import Runner
from stepfuse.engine.settling import Settled
from stepfuse.engine.ticket import Ticket

SIZE: dict[str, Any] = {"width": 32, "height": 32}
PROMPTS = ("a red circle", "a blue square", "a green triangle")


@pytest.fixture(scope="module")
def parts() -> Components:
    return load_components("shapes", EngineConfig(device="cpu", max_rows=4))


@pytest.fixture
def engine(parts: Components) -> Iterator[Engine]:
    with Engine(parts) as made:
        yield made


def together(engine: Engine, **fields: Any) -> list[Job]:
    """Jobs of all prompts that start with the same update; the last one is the newest."""
    return engine._submit([build(prompt, **fields) for prompt in PROMPTS], 0)


def build(prompt: str, **fields: Any) -> Request:
    return build_request(prompt, {"seed": len(prompt), **SIZE, **fields})


def fail_when(monkeypatch: pytest.MonkeyPatch, engine: Engine, full: Callable[[int], bool]) -> list[int]:
    """The network has no memory where full(model rows); returns the model rows of every call."""
    denoiser, sizes = engine.components.denoiser, []
    forward = denoiser.forward

    def limited(latents: torch.Tensor, *rest: Any) -> torch.Tensor:
        sizes.append(len(latents))
        if full(len(latents)):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(latents, *rest)

    monkeypatch.setattr(denoiser, "forward", limited)
    return sizes


def test_one_lack_of_memory_costs_nothing(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = [engine.generate(build(p, steps=4)) for p in PROMPTS]
    sizes = fail_when(monkeypatch, engine, lambda rows: len(sizes) == 2)
    for job, expected in zip(together(engine, steps=4), alone, strict=True):
        assert float((job.result(60).latents - expected.latents).norm() / expected.latents.norm()) <= 1e-4
    assert sizes == [6] * 5, "four updates, one of them tried twice"


def test_a_batch_that_does_not_fit_runs_as_smaller_ones_and_loses_nothing(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = [engine.generate(build(p, steps=4)) for p in PROMPTS]
    sizes = fail_when(monkeypatch, engine, lambda rows: rows > 4)
    for job, expected in zip(together(engine, steps=4), alone, strict=True):
        assert float((job.result(60).latents - expected.latents).norm() / expected.latents.norm()) <= 1e-4
    assert sizes == [6, 6] + [2] * 12, "the cap is half of what failed: three model rows, one image"
    assert len(engine._worker.batches.bank) == 0


def test_a_lack_of_memory_in_the_middle_parks_rows_that_go_on_where_they_were(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"steps": 6, "sampler": "dpmpp_2m"}
    alone = [engine.generate(build(p, **options)) for p in PROMPTS]
    sizes = fail_when(monkeypatch, engine, lambda rows: rows > 2 and len(sizes) > 3)
    jobs = together(engine, **options)
    for job, expected in zip(jobs, alone, strict=True):
        assert float((job.result(60).latents - expected.latents).norm() / expected.latents.norm()) <= 1e-4
        assert [event.update for event in job.events()] == [1, 2, 3, 4, 5, 6, 6], "no update is done again"
    assert sizes == [6] * 5 + [2] * 9


def test_a_row_that_does_not_fit_beside_others_when_it_joins_waits_for_them(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = [engine.generate(build(p, steps=3)) for p in PROMPTS]
    start = pipeline.start
    refused = []

    def limited(parts: Components, *rest: Any) -> Any:
        if sum(map(len, engine._worker.batches)) == 1:
            refused.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return start(parts, *rest)

    monkeypatch.setattr(pipeline, "start", limited)
    for job, expected in zip(together(engine, steps=3), alone, strict=True):
        assert float((job.result(60).latents - expected.latents).norm() / expected.latents.norm()) <= 1e-4
    assert len(refused) >= 2
    assert not engine._worker.batches
    assert len(engine._worker.scheduler) == 0


def test_a_request_that_does_not_fit_alone_ends_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_when(monkeypatch, engine, lambda rows: True)
    for job in together(engine, steps=4):
        with pytest.raises(DeviceError):
            job.result(60)
    assert len(engine._worker.scheduler) == 0
    assert not engine._worker.batches


def test_idle_buckets_are_given_up_for_a_batch_that_does_not_fit(
    parts: Components, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = dataclasses.replace(parts, config=dataclasses.replace(parts.config, runner="graph"))
    runner = Runner(recorded, DryRecorder())
    with Engine(recorded, runner) as engine:
        engine.generate(build(PROMPTS[0], steps=1, width=48))
        assert len(runner._idle) == 1
        fail_when(monkeypatch, engine, lambda rows: bool(runner._idle))
        assert engine.generate(build(PROMPTS[0], steps=2)).images
        assert [bucket[1] for bucket in runner._idle] == [32]


def test_lack_of_memory_for_joining_is_tried_again(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    start, calls = pipeline.start, []

    def limited(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return start(*args)

    monkeypatch.setattr(pipeline, "start", limited)
    assert engine.generate(build(PROMPTS[0], steps=1)).images
    assert len(calls) == 2


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_images_that_end_together_are_decoded_together(
    parts: Components, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(parts.config, decode_rows=rows)
    with Engine(dataclasses.replace(parts, config=config)) as engine:
        alone = [engine.generate(build(p, steps=2, output="np")).images for p in PROMPTS]
        decode, sizes = engine.components.vae.decode, []
        monkeypatch.setattr(engine.components.vae, "decode", lambda x: (sizes.append(len(x)), decode(x))[1])
        found = [job.result(60).images for job in together(engine, steps=2, output="np")]
    assert sizes == {1: [1, 1, 1], 2: [2, 1], 3: [3]}[rows]
    for a, b in zip(found, alone, strict=True):
        assert np.abs(a - b).max() * 255 <= 2


def test_one_image_that_cannot_be_decoded_ends_its_own_job(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = engine.components.vae.decode
    alone = engine.generate(build(PROMPTS[0], steps=2, output="np")).images
    broken = engine.generate(build(PROMPTS[1], steps=2, output="latent")).latents

    def spoiled(x: torch.Tensor) -> torch.Tensor:
        image = decode(x)
        same = [float((row - other).abs().max()) < 1e-3 for row in x for other in scaled]
        return image * float("nan") if any(same) else image

    scaled = pipeline.from_model(broken, engine.components.vae.config)
    monkeypatch.setattr(engine.components.vae, "decode", spoiled)
    jobs = together(engine, steps=2, output="np")
    with pytest.raises(NumericsError, match="the VAE produced NaN"):
        jobs[1].result(60)
    assert np.abs(jobs[0].result(60).images - alone).max() * 255 <= 2
    assert jobs[2].result(60).images.shape == (1, 32, 32, 3)


def test_no_memory_for_the_last_latents_of_a_job_ends_it_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    stacked = Ticket.stacked

    def short(ticket: Ticket) -> torch.Tensor:
        if ticket.settled.request.prompt == PROMPTS[1]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return stacked(ticket)

    monkeypatch.setattr(Ticket, "stacked", short)
    jobs = together(engine, steps=2)
    with pytest.raises(DeviceError, match="out of memory on cpu with 1 images"):
        jobs[1].result(60)
    assert all(len(job.result(60).images) == 1 for job in (jobs[0], jobs[2]))


def test_one_prompt_that_cannot_be_encoded_ends_its_own_job(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, sizes = pipeline.encode, []

    def short(parts: Components, batch: Sequence[Settled]) -> Any:
        sizes.append(len(batch))
        if any(one.request.prompt == PROMPTS[1] for one in batch):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(parts, batch)

    monkeypatch.setattr(pipeline, "encode", short)
    jobs = together(engine, steps=2)
    with pytest.raises(DeviceError, match="out of memory on cpu with 1 images"):
        jobs[1].result(60)
    assert all(len(job.result(60).images) == 1 for job in (jobs[0], jobs[2]))
    assert max(sizes) > 1, "they came together"


def test_copying_the_last_latents_is_tried_again(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    take, calls = Batch.take, []

    def short(batch: Batch, positions: Sequence[int]) -> Any:
        calls.append(list(positions))
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return take(batch, positions)

    monkeypatch.setattr(Batch, "take", short)
    assert len(engine.submit(build(PROMPTS[0], steps=2)).result(60).images) == 1
    assert calls == [[0], [0]]


def test_nobody_waits_for_an_engine_whose_thread_failed(parts: Components, monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine(parts) as engine:

        def broken(batch: Batch, positions: Sequence[int]) -> Any:
            raise RuntimeError("an illegal memory access was encountered")

        monkeypatch.setattr(Batch, "take", broken)
        jobs = [engine.submit(build(PROMPTS[0], steps=steps)) for steps in (2, 40)]
        for job in jobs:
            with pytest.raises(EngineClosed, match="RuntimeError: an illegal memory access"):
                job.result(60)
        with pytest.raises(EngineClosed):
            engine.submit(build(PROMPTS[0]))


def test_one_preview_that_cannot_be_decoded_ends_its_own_job(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = [engine.generate(build(p, steps=3, output="latent")).latents for p in PROMPTS]
    decode = pipeline.decode

    def spoiled(parts: Components, latents: torch.Tensor) -> torch.Tensor:
        if len(latents) == 2:
            raise NumericsError("the VAE produced NaN")
        return decode(parts, latents)

    monkeypatch.setattr(pipeline, "decode", spoiled)
    requests = [build(p, steps=3, output="latent", n=1 + (i == 0)) for i, p in enumerate(PROMPTS)]
    jobs = engine._submit(requests, preview_every=1)
    with pytest.raises(NumericsError, match="the VAE produced NaN"):
        jobs[0].result(60)
    for job, expected in zip(jobs[1:], alone[1:], strict=True):
        assert float((job.result(60).latents - expected).norm() / expected.norm()) <= 1e-4
        assert [event.preview is not None for event in job.events()][:2] == [True, True]


def test_a_warm_up_that_does_not_fit_says_so(parts: Components, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = dataclasses.replace(parts, config=dataclasses.replace(parts.config, runner="graph"))
    with Engine(recorded, Runner(recorded, DryRecorder())) as engine:
        sizes = fail_when(monkeypatch, engine, lambda rows: rows > 4)
        with pytest.raises(DeviceError, match="out of memory on cpu with 4 images"):
            engine.warmup(**SIZE, rows=4)
        assert sizes == [8], "the largest first"
        engine.warmup(**SIZE, rows=2)
        assert engine.generate(build(PROMPTS[0], steps=2)).images
