"""Several models in one engine: requests pick theirs, and rows of different models never share a batch."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from stepfuse import Engine, EngineConfig, Request
from stepfuse.engine import admission
from stepfuse.engine.admission import weight_bytes
from stepfuse.engine.components import Components
from stepfuse.engine.errors import MemoryBudgetError, RequestError
from stepfuse.engine.loading import load_components
from stepfuse.engine.scheduling.costs import MeasuredCosts
from stepfuse.engine.ticket import Bucket

SIZE: dict[str, Any] = {"width": 32, "height": 32, "output": "latent"}


@pytest.fixture(scope="module")
def folder(reference_pipeline: Callable[[str], Path]) -> Path:
    return reference_pipeline("sd15")


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    with Engine.load("shapes", device="cpu", max_rows=4, models={"tiny": folder}) as made:
        yield made


@pytest.fixture(scope="module")
def parts() -> Components:
    return load_components("shapes", EngineConfig(device="cpu", max_rows=4))


def test_each_model_gives_what_an_engine_of_its_own_gives(engine: Engine, folder: Path) -> None:
    requests = [
        Request(prompt="a cat", seed=seed, steps=3, model=model, guidance_scale=scale, **SIZE)
        for seed, (model, scale) in enumerate([(None, 3.0), ("tiny", 3.0), ("shapes", 1.0), ("tiny", 1.0)])
    ]
    together = engine.generate(requests)
    assert [result.model for result in together] == ["shapes", str(folder), "shapes", str(folder)]
    with Engine.load("shapes", device="cpu") as one, Engine.load(folder, device="cpu") as two:
        for request, found in zip(requests, together, strict=True):
            own = two if request.model == "tiny" else one
            alone = own.generate(dataclasses.replace(request, model=None)).latents
            assert float((found.latents - alone).norm() / alone.norm()) <= 1e-4, request


def test_rows_of_one_size_are_batched_by_model(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: dict[str | None, list[int]] = {}
    for name, model in engine.models.items():
        forward, own = model.parts.denoiser.forward, sizes.setdefault(name, [])
        record = lambda x, *rest, forward=forward, own=own: (own.append(len(x)), forward(x, *rest))[1]  # noqa: E731
        monkeypatch.setattr(model.parts.denoiser, "forward", record)
    fields: dict[str, Any] = {"prompt": "a", "steps": 2, "sampler": "ddim", "guidance_scale": 1.0, **SIZE}
    engine.generate([Request(seed=i, model=model, **fields) for model in ("tiny", None) for i in range(2)])
    assert sizes == {None: [2, 2], "tiny": [2, 2]}


def test_an_unknown_model_is_an_error_that_names_the_closest(engine: Engine) -> None:
    with pytest.raises(RequestError, match=r"model: got 'tinny', did you mean 'tiny'\? valid: shapes, tiny"):
        engine.generate("a", model="tinny")


@pytest.mark.parametrize("name", ["tiny", "shapes"])
def test_a_name_is_given_once(engine: Engine, name: str, parts: Components) -> None:
    with pytest.raises(RequestError, match=f"name: '{name}' is taken"):
        engine.add(name, parts)


def test_a_model_that_cannot_run_beside_the_others_is_refused(engine: Engine) -> None:
    with pytest.raises(RequestError, match="deterministic: got 1 for 'other', expected 0 as of shapes"):
        engine.add("other", "shapes", deterministic=True, max_rows=1)
    assert "other" not in engine.models


def test_a_model_is_added_while_rows_run(parts: Components, folder: Path) -> None:
    with Engine(parts) as engine:
        running = engine.submit("a red circle", seed=1, steps=400, sampler="ddim", **SIZE)
        errors: list[BaseException] = []

        def add(name: str) -> None:
            try:
                engine.add(name, folder)
            except RequestError as error:
                errors.append(error)

        adders = [threading.Thread(target=add, args=("late",)) for _ in range(2)]
        for adder in adders:
            adder.start()
        for adder in adders:
            adder.join()
        assert not running.done, "nobody waited for the rows that run"
        assert engine.generate("a cat", steps=1, model="late", **SIZE).model == str(folder)
        running.cancel()
    assert len(errors) == 1, "two threads cannot take one name"


def test_max_rows_of_a_model_beside_the_first_bounds_its_own_updates(parts: Components) -> None:
    small = dataclasses.replace(parts, config=dataclasses.replace(parts.config, max_rows=1))
    with Engine(parts) as engine:
        engine.add("narrow", small)
        update, sizes = engine.models["narrow"].runner.update, []
        engine.models["narrow"].runner.update = lambda batch, *rest: (sizes.append(len(batch)), update(batch, *rest))[1]
        engine.generate("a", n=3, steps=2, guidance_scale=3.0, model="narrow", **SIZE)
    assert sizes == [1] * 6


def test_costs_of_models_are_not_mixed(engine: Engine) -> None:
    costs = MeasuredCosts(lambda bucket: bucket[0] * bucket[1], kind=lambda bucket: bucket[2])
    costs.note((8, 8, "wide"), 2, 1.0)
    costs.note((8, 8, "narrow"), 2, 3.0)
    assert costs((8, 8, "wide"), 2) == 1.0
    assert costs((8, 16, "narrow"), 2) == 6.0, "another size of the same kind"
    assert costs((8, 8, "unseen"), 2) == 0.0, "what is unknown is not refused"

    engine.generate("a", steps=4, **SIZE)
    engine.generate("a", steps=4, model="tiny", **SIZE)
    worker = engine._worker
    seconds = [worker._cost(Bucket(32, 32, 77, False, (), name), 2) for name in (None, "tiny", "tiny")]
    assert seconds[0] != seconds[1] == seconds[2] > 0


def test_memory_for_one_model_is_taken_back_from_all(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    released: list[str | None] = []
    for name, model in engine.models.items():
        monkeypatch.setattr(model.runner, "release", lambda name=name: released.append(name))
    runner = engine.models["tiny"].runner
    update, failed = runner.update, []

    def once(*args: Any) -> Any:
        if not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return update(*args)

    monkeypatch.setattr(runner, "update", once)
    assert torch.isfinite(engine.generate("a", steps=2, model="tiny", **SIZE).latents).all()
    assert released == [None, "tiny"]


def test_weights_of_another_model_lower_what_is_free(parts: Components, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "_free", lambda device: 40_000_000)
    parts = dataclasses.replace(parts, config=dataclasses.replace(parts.config, memory_bytes=0))  # as on CUDA
    with Engine(parts) as own:
        request = {"prompt": "a", "width": 512, "height": 512, "steps": 1, "output": "latent", "guidance_scale": 1.0}
        own.submit(Request(**request)).cancel()
        own.add("more", parts)
        assert weight_bytes(parts) > 30e6
        for model in (None, "more"):
            assert own.models[model].admission.free == 40_000_000 - weight_bytes(parts)
            with pytest.raises(MemoryBudgetError):
                own.submit(Request(**request, model=model))


def test_explain_names_every_model(engine: Engine, folder: Path) -> None:
    engine.generate("a", steps=1, model="tiny", **SIZE)
    first, second = engine.explain().split("\nmodel 'tiny': ")
    assert first.startswith("shapes: ")
    assert second.startswith(f"{folder}: ")
    assert "unet:" in second


def test_warming_up_a_model_leaves_the_others_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []
    for name, model in engine.models.items():
        update = model.runner.update
        record = lambda *args, name=name, update=update: (seen.append(name), update(*args))[1]  # noqa: E731
        monkeypatch.setattr(model.runner, "update", record)
    engine.warmup(32, 32, model="tiny")
    assert seen == ["tiny"]
