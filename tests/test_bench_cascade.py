"""`stepfuse bench cascade`: three ways through the same stages, each compared with solo runs, and no ratio without."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from stepfuse import Engine
from stepfuse.benchmarks import cascades, harness
from stepfuse.benchmarks.cli import app
from stepfuse.benchmarks.mix import Mix
from stepfuse.engine.cascade import BUILTIN, Cascade, Stage
from stepfuse.engine.errors import RequestError
from stepfuse.engine.request import Request, Result

HIRES = BUILTIN["hires-fix"]
CHOICES = {"prompt": ["a red circle", "a blue square"], "steps": [4, 6], "size": [[32, 32]], "sampler": ["euler"]}
MACHINE = {"processor": "Processor", "threads": 1, "packages": {}, "commit": "abc", "id": "0"}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.load("shapes", device="cpu", max_rows=4) as made:
        yield made


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    return [dataclasses.replace(one, output="np") for one in Mix("small", CHOICES).draw(3, 1)]


@pytest.fixture(scope="module")
def alone(engine: Engine, requests: list[Request]) -> list[Result]:
    return [engine.generate(one, cascade=HIRES) for one in requests]


@pytest.mark.parametrize("way", [cascades.rebatched, cascades.by_stage, cascades.one_by_one])
def test_every_way_makes_every_stage_of_every_request(way, engine: Engine, requests: list[Request], alone):
    found = way(engine, HIRES, requests, alone)
    assert cascades.gate(found, alone, 1e-4)["green"]
    made = found.ticks(engine)
    for request, stages, ticks in zip(requests, found.stages, made, strict=True):
        assert [one.images.shape for one in stages] == [(1, 32, 32, 3), (1, 64, 64, 3)]
        flat = [tick for stage in ticks for tick in stage]
        assert flat == sorted(flat)
        assert request.steps
        assert [len(one) for one in ticks] == [request.steps + 1, request.steps // 2 + 1], "every update, and the image"
    first, second = ([one[stage] for one in made] for stage in (0, 1))
    if way is cascades.by_stage:
        assert max(ticks[-1] for ticks in first) <= min(ticks[0] for ticks in second)
    if way is cascades.one_by_one:
        assert all(found.ends[i] < first[i + 1][0] for i in range(2))
    wrong = [dataclasses.replace(alone[0], stages=alone[1].stages), *alone[1:]]
    assert not cascades.gate(found, wrong, 1e-4)["green"]


def test_stages_by_hand_take_the_images_of_this_run(engine: Engine, requests: list[Request], alone: list[Result]):
    blank = [dataclasses.replace(stage, request=dataclasses.replace(stage.request, image=np.zeros((8, 8, 3))))
             for stage in (one.stages[1] for one in alone)]  # fmt: skip
    given = [dataclasses.replace(one, stages=(one.stages[0], b)) for one, b in zip(alone, blank, strict=True)]
    assert cascades.gate(cascades.by_stage(engine, HIRES, requests, given), alone, 1e-4)["green"]


def test_a_red_gate_gives_no_ratio(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    plan = cascades.Plan(cascade=HIRES, mix=Mix("small", CHOICES), requests=2, rounds=3, budget_s=0.1)
    monkeypatch.setitem(cascades.TOLERANCE, "float32", -1.0)
    found = cascades.record(engine, plan, MACHINE)
    assert found["speedup"] == dict.fromkeys(cascades.RIVALS)
    assert cascades.say(found, cascades.BY_STAGE) == "no ratio: a correctness gate is red"


@pytest.mark.parametrize(
    "stage",
    [Stage(model="lanczos", scale=2), Stage(scale=2, tile=48), Stage(input="latents", scale=2, resize="bicubic")],
)
def test_stages_that_cannot_be_made_by_hand_are_refused(stage: Stage):
    with pytest.raises(RequestError, match="choose a cascade without tiles, filters and stages that take latents"):
        cascades.check(Cascade(name="other", stages=(Stage(), stage)))


def test_the_command_writes_a_record_a_picture_and_a_report(tmp_path: Path):
    mix, out, picture = tmp_path / "small.json", tmp_path / "cascade.jsonl", tmp_path / "t.png"
    mix.write_text(json.dumps(CHOICES | {"loras": [[["shapes-dome", 0.5]]]}))
    options = ["cascade", "--cascade", "hires-fix", "--mix", str(mix), "--requests", "2", "--rounds", "3"]
    options += ["--budget", "0.1", "--device", "cpu", "--save", str(out), "--timeline", str(picture)]
    done = CliRunner().invoke(app, options)
    assert done.exit_code == 0, done.output
    assert "re-batched over stage after stage: " in done.output
    (record,) = harness.read(out)
    assert record["value"] == record["variants"][cascades.REBATCHED]["images_per_s"]
    assert set(record["variants"]) == {cascades.REBATCHED, cascades.CONTROL, *cascades.RIVALS}
    assert record["a_a_spread"] > 0
    assert picture.stat().st_size > 10_000
    report = tmp_path / "r.md"
    assert CliRunner().invoke(app, ["report", str(out), "-o", str(report)]).exit_code == 0
    assert "| re-batched |" in report.read_text()
    assert (tmp_path / "r-cascade.png").is_file()
