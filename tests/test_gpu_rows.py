"""The suite's parts about rows find what they are there to find; tiny models on a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stepfuse import Engine, EngineConfig, Request
from stepfuse.benchmarks import gpu_suite, harness
from stepfuse.benchmarks.gpu_parts import equalities, replays, restarted, runners
from stepfuse.benchmarks.gpu_parts.batches import Updates, filled, model
from stepfuse.benchmarks.gpu_parts.session import Session
from stepfuse.benchmarks.random_models import random_model
from stepfuse.engine.batch import Batch
from stepfuse.engine.runner import Runner

CPU = EngineConfig(device="cpu", dtype="float32")


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return Session("part", tmp_path / "records.jsonl", torch.device("cpu"), True, time.monotonic() + 60)


def test_a_random_model_is_a_whole_engine_and_the_same_every_time():
    request = Request(prompt="a red circle", steps=2, seed=3, n=2, output="pt")
    found = []
    for _ in range(2):
        with Engine(random_model("tiny", CPU)) as engine:
            found.append(engine.generate(request))
    assert found[0].images.shape == (2, 3, 16, 16)
    assert torch.equal(found[0].latents, found[1].latents)
    assert float(found[0].latents.std()) > 0.1
    with pytest.raises(ValueError, match="expected one of: shapes, sd15"):
        random_model("sd16", CPU)


def test_prompts_of_a_random_model_matter():
    with Engine(random_model("tiny", CPU)) as engine:
        one, other = engine.generate(["a red circle", "a blue square"], seed=1, steps=2, output="latent")
    assert not torch.allclose(one.latents, other.latents, atol=1e-3)


def test_updates_return_to_the_start_before_a_row_ends(session: Session):
    """So a timed update is always a real one: beyond its last line a row would stand still."""
    parts = model(session, "tiny", max_rows=1, dtype="float32")
    runner = Runner(parts)
    updates = Updates(runner, filled(parts, runner, [Request(prompt="a red circle", steps=4, seed=1)]))
    states = []
    for _ in range(7):
        updates()
        states.append((updates.batch.seats[0].done, updates.moved().clone()))
    assert [done for done, _ in states] == [1, 2, 3, 1, 2, 3, 1]
    for (_, early), (_, late) in zip(states[:3], states[3:], strict=False):
        assert torch.equal(early, late)
    assert not torch.equal(states[0][1], states[1][1])


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Makes every update but eager ones wrong by a factor."""
    update = Runner.update

    def break_them(factor: float) -> None:
        def broken(self: Runner, batch: Batch, *args: Any, **options: Any) -> Any:
            done = update(self, batch, *args, **options)
            if self.mode != "eager":
                batch.state.x.mul_(factor)
            return done

        monkeypatch.setattr(Runner, "update", torch.inference_mode()(broken))

    return break_them


def test_a_mode_that_changes_the_result_gets_no_ratio(session: Session, wrong: Callable[[float], None]):
    parts, truth = runners._ready(session, "tiny")
    right = runners._measure(session, "graph", "eager", parts, truth)
    assert right["gate"]
    assert right["speedup"] is not None
    wrong(1.1)
    found = runners._measure(session, "graph", "eager", parts, truth)
    assert (found["gate"], found["speedup"]) == (False, None)


def test_replays_that_differ_from_eager_updates_are_found(session: Session, wrong: Callable[[float], None]):
    parts = replays._model(session, "shapes")
    right = replays._random_order(session, parts)
    assert right["green"]
    assert len(right["model_rows"]) > 1, "rows come and go"
    wrong(1.001)
    found = replays._random_order(session, parts)
    assert found["largest"] > found["allowed"]
    assert found["captures"] == right["captures"]
    assert not found["green"]


def test_a_capture_after_the_warm_up_is_found(session: Session, monkeypatch: pytest.MonkeyPatch):
    parts = replays._model(session, "shapes")
    warm = Runner.warm
    monkeypatch.setattr(Runner, "warm", lambda self, batch, rows: warm(self, batch, 1))
    found = replays._random_order(session, parts)
    assert found["largest"] <= found["allowed"]
    assert not found["green"]


def test_a_capture_too_many_is_found(session: Session, monkeypatch: pytest.MonkeyPatch):
    parts = replays._model(session, "shapes")
    assert replays._captures(session, parts)["green"]
    requests = replays._requests
    monkeypatch.setattr(
        replays,
        "_requests",
        lambda *a: (replace(one, guidance_rescale=0.5, guidance_scale=3.0) for one in requests(*a)),
    )
    found = replays._captures(session, parts)
    assert found["captured"] > found["warmed"]
    assert not found["green"]


def test_latents_that_are_not_those_of_the_solo_run_are_found(session: Session, monkeypatch: pytest.MonkeyPatch):
    with equalities.Engines(session, "tiny") as engines:
        assert equalities._among_others(session, engines)["green"]
        assert equalities._tolerance(session, engines)["green"]
        requests = equalities.unlike(True)
        changed = [replace(one, seed=9) if place == 3 else one for place, one in enumerate(requests)]
        monkeypatch.setattr(equalities, "unlike", lambda tiny: changed)
        found = equalities._among_others(session, engines)
        assert found["equal"] == [place != 3 for place in range(8)]
        assert not found["green"]
        loose = equalities._tolerance(session, engines)
        assert not loose["green"]
        assert loose["largest"] > loose["allowed"]


@pytest.mark.slow
def test_another_process_gives_the_same_bits(session: Session, monkeypatch: pytest.MonkeyPatch):
    found = equalities.elsewhere(session, "tiny")
    assert len(set(found)) == 8
    with equalities.Engines(session, "tiny") as engines:
        for digests, equal in ((found, [True] * 8), ([*found[:7], found[0]], [True] * 7 + [False])):
            monkeypatch.setattr(equalities, "elsewhere", lambda session, name, d=digests: d)
            facts = equalities.restarted(session, engines)
            assert facts == {"green": all(equal), "equal": equal}


def test_a_digest_is_of_the_bits():
    zero = torch.zeros(2, 3)
    assert restarted.digest(zero) == restarted.digest(zero.clone())
    assert restarted.digest(zero) != restarted.digest(-zero)


def test_records_of_a_load_keep_their_own_value_and_conditions():
    record = {"part": "rows-static", "key": "shapes mixed", "time": "2026-01-01T00:00:00+00:00", "value": 1.7,
              "unit": "x", "conditions": {"mix": "mixed"}, "device": "here", "gates": {}}  # fmt: skip
    made = gpu_suite.formed(record, harness.fingerprint())
    assert (made["kind"], made["name"], made["value"], made["unit"]) == ("rows-static", "shapes mixed", 1.7, "x")
    assert made["conditions"] == {"mix": "mixed"}
