"""`stepfuse bench throughput`: the load is what it says, batches are static, and wrong images get no ratio."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from typer.testing import CliRunner

from stepfuse import Engine, Request
from stepfuse.benchmarks import harness, load, throughput
from stepfuse.benchmarks.cli import app
from stepfuse.benchmarks.fronts import Rows, Static
from stepfuse.benchmarks.load import Served
from stepfuse.benchmarks.mix import BUILT_IN, Mix, arrivals, parameters
from stepfuse.benchmarks.throughput import Plan, capacity, equal_p95
from stepfuse.engine.errors import RequestError


@pytest.fixture(scope="module")
def engine():
    with Engine.load("shapes", device="cpu", max_rows=3) as made:
        yield made


def tiny(**fields) -> Request:
    return Request(prompt="a red circle", output="pt", width=32, height=32, **{"steps": 2, "seed": 0} | fields)


def test_the_same_seed_draws_the_same_requests_and_arrivals():
    mix = Mix.load("mixed")
    drawn = [vars(request) for request in mix.draw(30, 5)]
    assert drawn == [vars(request) for request in mix.draw(30, 5)]
    assert drawn != [vars(request) for request in mix.draw(30, 6)]
    assert {fields["sampler"] for fields in drawn} == set(BUILT_IN["mixed"]["sampler"])
    assert arrivals(9, 2.0, 1) == arrivals(9, 2.0, 1)


def test_arrivals_are_poisson():
    times = arrivals(4000, 8.0, 3)
    gaps = [b - a for a, b in pairwise(times)]
    assert statistics.mean(gaps) == pytest.approx(1 / 8, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(1 / 8, rel=0.08)  # of an exponential: its mean
    assert min(gaps) > 0


def test_only_prompts_and_seeds_may_differ_in_a_static_batch():
    one = tiny()
    assert parameters(one) == parameters(replace(one, prompt="a blue square", seed=9))
    for change in ({"steps": 3}, {"guidance_scale": 2.0}, {"sampler": "euler"}, {"width": 64}, {"schedule": "karras"}):
        assert parameters(one) != parameters(replace(one, **change)), change


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"stepz": [1]}, "unknown request field 'stepz'"),
        ({"steps": []}, "at least one value"),
        ({"steps": [0]}, "steps: got 0"),
        ({"size": [64]}, "expected [width, height]"),
        ({"loras": [["shapes-dome", 1.0]]}, "expected a list of [file or built-in name, strength]"),
        ([1], "expected a mapping"),
    ],
)
def test_a_bad_mix_file_says_what_is_wrong(tmp_path: Path, content: object, message: str):
    path = tmp_path / "mix.json"
    path.write_text(json.dumps(content))
    with pytest.raises(RequestError) as raised:
        Mix.load(str(path))
    assert message in str(raised.value)
    with pytest.raises(RequestError, match="did you mean 'mixed'"):
        Mix.load("mixd")


def test_static_batches_hold_equal_requests_up_to_the_cap(engine: Engine):
    front = Static(engine, cap=3, wait_s=0.2)
    alike = [tiny(seed=i) for i in range(5)]
    others = [tiny(seed=i, steps=3) for i in range(2)]

    async def all_of_them():
        return await asyncio.gather(*(front.run(request) for request in [*alike, *others]))

    results = asyncio.run(all_of_them())
    front.close()
    assert sorted(front.batches) == [2, 2, 3]
    for request, result in zip([*alike, *others], results, strict=True):
        assert result.seeds == (request.seed,)
        assert result.settings["steps"] == request.steps


def test_a_static_batch_waits_for_more_and_no_longer(engine: Engine):
    engine.generate(tiny())
    front = Static(engine, cap=3, wait_s=0.4)
    start = time.perf_counter()
    asyncio.run(_run(front, tiny()))
    assert time.perf_counter() - start >= 0.4
    with pytest.raises(ValueError, match="at most 3"):
        asyncio.run(_run(front, tiny(n=4)))
    with pytest.raises(RequestError, match="unknown sampler"):
        asyncio.run(_run(front, tiny(sampler="eulr")))
    front.close()


def test_static_batches_merge_the_loras_that_rows_have_beside_the_weights():
    mix = Mix.load("loras")
    assert set(mix.loras) == {"shapes-dome", "shapes-turn"}
    drawn = [replace(request, steps=3, output="latent") for request in mix.draw(8, 0)]
    assert len({request.loras for request in drawn}) > 2
    with Engine.load("shapes", device="cpu", max_rows=3, loras=mix.loras) as engine:
        together = [job.result() for job in [engine.submit(request) for request in drawn]]
        front = Static(engine, cap=3, wait_s=0.0)

        async def all_of_them():
            return await asyncio.gather(*(front.run(request) for request in drawn))

        merged = asyncio.run(all_of_them())
        front.close()
        plain = engine.generate(replace(drawn[0], loras=()))
        assert "loras" not in plain.settings, "the engine is left without any"
    for request, rows, static in zip(drawn, together, merged, strict=True):
        assert [tuple(pair) for pair in rows.settings.get("loras", [])] == list(request.loras)
        assert float((rows.latents - static.latents).norm() / rows.latents.norm()) <= 1e-4


async def _run(front: Rows | Static, request: Request):
    return await front.run(request)


def test_latency_counts_from_the_arrival(engine: Engine):
    """All at once, one row at a time: the last request's latency holds the waiting behind all others."""
    requests = [tiny(seed=i, steps=6) for i in range(8)]
    served = load.open_loop(Rows(engine), requests, [0.01] * 8)
    assert sorted(one.number for one in served) == list(range(8))
    assert all(one.arrived == 0.01 <= one.began < one.ended for one in served)
    latencies = sorted(one.latency for one in served)
    assert latencies[-1] > 1.5 * latencies[0]
    assert all(one.latency == one.ended - 0.01 for one in served)
    assert load.summary(served)["images_per_s"] == pytest.approx(8 / (max(one.ended for one in served) - 0.01))


def test_a_late_load_generator_hides_no_waiting(engine: Engine):
    """While the loop is held up for 0.3 s, the second request arrives; its latency holds what it was kept waiting."""

    class Held(Rows):
        async def run(self, request: Request):
            time.sleep(0.3 if request.seed == 0 else 0)
            return await super().run(request)

    served = load.open_loop(Held(engine), [tiny(seed=0), tiny(seed=1)], [0.0, 0.02])
    assert served[1].arrived == 0.02
    assert served[1].latency >= 0.28


def test_a_closed_loop_never_has_more_requests_than_clients(engine: Engine):
    served = load.closed_loop(Rows(engine), [tiny(seed=i) for i in range(7)], clients=2)
    assert len(served) == 7
    for one in served:
        running = sum(other.arrived <= one.arrived < other.ended for other in served)
        assert running <= 2


def test_capacity_is_interpolated_between_measured_rates():
    curve = [(1.0, 0.5), (2.0, 1.0), (4.0, 3.0)]
    assert capacity(curve, 2.0) == {"rate": 3.0, "bound": ""}
    assert capacity(curve, 9.0) == {"rate": 4.0, "bound": "at least"}
    assert capacity(curve, 0.1) == {"rate": 1.0, "bound": "less than"}
    assert capacity([(1.0, 0.5), (2.0, 1.5), (3.0, 0.9)], 1.0) == {"rate": 1.5, "bound": ""}, "the first crossing"


def points(rows: list[float], static: list[float]) -> list[dict]:
    return [{"front": front, "rate": rate, "p95_s": p95} for front, p95s in (("rows", rows), ("static", static))
            for rate, p95 in zip((1.0, 2.0, 4.0), p95s, strict=True)]  # fmt: skip


def test_no_ratio_without_a_green_gate_or_a_bracket():
    curves = points([0.5, 1.0, 3.0], [1.0, 3.0, 9.0])
    assert equal_p95(curves, 2.0, True)["ratio"] == pytest.approx(3.0 / 1.5)
    red = equal_p95(curves, 2.0, False)
    assert red["ratio"] is None
    assert "red" in red["reason"]
    bound = equal_p95(points([0.5, 1.0, 1.5], [1.0, 3.0, 9.0]), 2.0, True)
    assert bound["ratio"] is None
    assert bound["at_least"] == pytest.approx(4.0 / 1.5)
    assert "at least 2.67x" in throughput.say(bound)
    neither = equal_p95(points([0.5, 1.0, 1.5], [0.5, 1.0, 1.5]), 2.0, True)
    assert neither["ratio"] is None
    assert "at_least" not in neither
    assert "no ratio" in throughput.say(neither)


def test_an_image_that_is_not_its_solo_run_turns_the_gate_red(engine: Engine):
    request = tiny()
    alone = throughput.solo(engine, [request, tiny(seed=2)], 1)
    assert list(alone) == [0]
    right, wrong = engine.generate(request), engine.generate(replace(request, seed=1))
    for result, green in ((right, True), (wrong, False)):
        served = [Served(0, request, result, 0.0, 0.0, 1.0), Served(1, request, wrong, 0.0, 0.0, 1.0)]
        found = throughput.gate(served, alone, 1e-4)
        assert found["green"] is green
        assert (found["picture_error"] < 1e-3) is green
        assert found["checked"] == 1


def test_every_run_is_a_record_as_soon_as_it_ends(engine: Engine):
    """Whatever ends the process later, what was measured is saved: the next run has not begun."""
    seen: list[str] = []
    plan = Plan(mix=Mix("small", {"prompt": ["a red circle"], "steps": [1, 2], "size": [[32, 32]]}), requests=4,
                clients=2, rates=(50.0,), rounds=1, checked=1)  # fmt: skip
    made = throughput.records(engine, plan, harness.fingerprint(), lambda what, done, total: seen.append(what))
    begun = ["closed loop, rows", "closed loop, static", "50/s, static"]
    for record, last in zip(made, (*begun, begun[-1], begun[-1]), strict=True):
        assert seen[-1] == last, record["name"]
    assert set(seen) == {"solo runs", *begun, "50/s, rows"}


def test_the_command_compares_both_fronts_and_saves(tmp_path: Path):
    mix, out = tmp_path / "small.json", tmp_path / "throughput.jsonl"
    mix.write_text(json.dumps({"prompt": ["a red circle", "a blue square"], "steps": [2, 3], "sampler": ["ddim"],
                               "size": [[32, 32]]}))  # fmt: skip
    options = ["throughput", "--mix", str(mix), "--requests", "6", "--clients", "2", "--rounds", "1", "--rates", "5,20"]
    done = CliRunner().invoke(app, [*options, "--device", "cpu", "--max-rows", "2", "--save", str(out)])
    assert done.exit_code == 0, done.output
    assert "gate green: static" in done.output
    records = harness.read(out)
    kinds = [record["kind"] for record in records]
    assert kinds == ["throughput closed"] * 2 + ["throughput open"] * 4 + ["throughput"]
    assert {(r["front"], r["rate"]) for r in records if r["kind"] == "throughput open"} == {
        (front, rate) for front in ("rows", "static") for rate in (5.0, 20.0)
    }
    timelines = records[-1]["timelines"]
    assert [len(timelines[front]) for front in ("rows", "static")] == [6, 6]
    assert [line[0] for line in timelines["rows"]] == [line[0] for line in timelines["static"]], "the same arrivals"
