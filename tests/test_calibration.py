"""Calibration: the knee, split or whole forwards, prices between and beyond what was timed, and what is kept of it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stepfuse import Control, Engine
from stepfuse.engine.calibration import GAIN, SPLIT_GAIN, Calibration, Curve, Point, identity, measure_curve
from stepfuse.engine.errors import RequestError
from stepfuse.engine.graphs import planned_sizes
from stepfuse.engine.ticket import Bucket

SIZE: dict[str, Any] = {"width": 32, "height": 32}
BUCKET = (64, 32, 77, False)
KEY = {"device": "a"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STEPFUSE_CACHE", str(tmp_path))
    return tmp_path


def timed(seconds: Mapping[int, float], split: Mapping[int, float] | None = None) -> Curve:
    """The curve of a machine that takes this long for whole forwards, and this much longer by default for halves."""
    halves = {n: 1.5 * s for n, s in seconds.items()} | dict(split or {})
    return measure_curve((64, 32), list(seconds), lambda n, k: seconds[n] if k == n else halves[n], budget_s=math.inf)


@pytest.mark.parametrize(
    ("seconds", "knee"),
    [
        ({1: 1.0, 2: 1.0, 4: 1.0, 8: 1.0}, 8),  # rows are free
        ({1: 1.0, 2: 2.0, 4: 4.0, 8: 8.0}, 1),  # rows gain nothing
        ({1: 1.0, 2: 1.2, 4: 2.0, 8: 4.0}, 4),  # the device is full at 4
        ({1: 1.0, 2: 1.2, 4: 2.4, 6: 3.0, 8: 4.0}, 6),  # a step that gains nothing, then one that does
        ({1: 1.0, 2: 2 * (1 - GAIN / 2), 4: 4 * (1 - GAIN / 2)}, 1),  # below what counts
        ({1: 1.0, 2: 2 * (1 - 0.6 * GAIN), 4: 4 * (1 - 1.2 * GAIN)}, 4),  # small gains add up
        ({1: 1.0, 2: 1.0, 4: 9.0}, 2),  # slower
        ({3: 2.0}, 3),
    ],
)
def test_knee(seconds: dict[int, float], knee: int) -> None:
    curve = timed(seconds)
    assert curve.knee == knee
    assert "<- knee" in next(line for line in curve.explain() if line.split()[0] == str(knee))


def test_halves_are_taken_where_they_are_clearly_faster() -> None:
    curve = timed({1: 1.0, 2: 2.0, 4: 3.0, 8: 8.0}, {2: 2.0 * (1 - SPLIT_GAIN / 2), 4: 2.5, 8: 9.0})
    assert [(p.model_rows, p.forward_rows, p.seconds) for p in curve.best] == [
        (1, 1, 1.0), (2, 2, 2.0), (4, 2, 2.5), (8, 8, 8.0)]  # fmt: skip
    assert [curve.forward_rows(n) for n in (1, 2, 3, 4, 5, 8, 9)] == [1, 2, 2, 2, 5, 8, 9]
    assert curve.knee == 4, "the faster way counts"
    assert "2 forwards (1: 3000.000 ms)" in "\n".join(curve.explain())


def test_prices_between_and_beyond_what_was_timed() -> None:
    calibration = Calibration(KEY)
    assert calibration.cost(BUCKET, 3) == 1.0
    assert calibration.cap(BUCKET) is None
    assert calibration.forward_rows((64, 32), 3) == 3
    assert calibration.explain().startswith("calibration: none")
    calibration.add(timed({2: 1.0, 4: 1.4, 8: 3.0}))
    found = [calibration.cost(BUCKET, n) for n in (1, 2, 3, 4, 5, 8, 16)]
    assert found == pytest.approx([1.0, 1.0, 1.2, 1.4, 1.8, 3.0, 6.0])
    assert calibration.cap(BUCKET) == 4
    other = (128, 64, 77, False)
    assert calibration.cost(other, 4) == pytest.approx(4 * 1.4), "by its pixels"
    assert calibration.cap(other) is None
    large = dataclasses.replace(timed({2: 100.0}), height=256, width=128)
    calibration.add(large)
    assert calibration.cost((256, 100, None, False), 2) == pytest.approx(100.0 * 100 / 128), "the nearest"


class Clock:
    """Time passes while something is measured only."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def measure(self, model_rows: int, forward_rows: int) -> float:
        self.now += 1.0
        return float(model_rows)


def test_the_budget_ends_a_measurement_but_not_before_the_first() -> None:
    clock, said = Clock(), list[str]()
    curve = measure_curve((64, 32), (8, 1, 2, 4), clock.measure, budget_s=2.5, progress=said.append, clock=clock)
    assert [p.model_rows for p in curve.best] == [1, 2], "ascending; 1 s, then 2 s"
    assert not curve.complete
    assert said == ["32 x 64: 1 model rows 1000.000 ms", "32 x 64: 2 model rows 2000.000 ms"]
    assert "stopped by its budget" in curve.explain()[0]
    assert [p.model_rows for p in measure_curve((64, 32), (2, 4), Clock().measure, budget_s=0).best] == [2]


def test_rows_that_do_not_fit_end_a_measurement() -> None:
    def measure(n: int, k: int) -> float:
        return 1.0 if k <= 4 else math.inf

    curve = measure_curve((64, 32), (1, 4, 8, 16), measure, budget_s=math.inf)
    assert [(p.model_rows, p.forward_rows) for p in curve.best] == [(1, 1), (4, 4), (8, 4)], "8 rows fit in two halves"
    assert not curve.complete
    with pytest.raises(torch.OutOfMemoryError, match="not even 1 model rows of 32 x 64 fit"):
        measure_curve((64, 32), (1, 2), lambda n, k: math.inf, budget_s=1)


def test_curves_are_kept_by_what_they_hold_for(cache: Path) -> None:
    first = Calibration(KEY, cache)
    first.add(timed({1: 1.0, 2: 1.2}))
    first.add(dataclasses.replace(timed({1: 4.0}), height=128))
    again = Calibration(KEY, cache)
    assert again.curves == first.curves
    assert again.path is not None
    assert f"read from {again.path}" in again.explain()
    assert not Calibration({"device": "b"}, cache).curves
    assert len(list(again.path.parent.iterdir())) == 1, "no partial file is left"


@pytest.mark.parametrize("break_it", [
    lambda text: text[:-20],
    lambda text: text.replace('"a"', '"b"'),
    lambda text: text.replace('"seconds": 1.0', '"seconds": -1.0'),
    lambda text: text.replace('"points"', '"dots"'),
    lambda text: "[]",
])  # fmt: skip
def test_a_file_that_cannot_be_used_is_a_warning(
    cache: Path, break_it: Callable[[str], str], caplog: pytest.LogCaptureFixture
) -> None:
    made = Calibration(KEY, cache)
    made.add(timed({1: 1.0, 2: 1.2}))
    assert made.path is not None
    made.path.write_text(break_it(made.path.read_text()))
    assert not Calibration(KEY, cache).curves
    assert f"{made.path} is ignored" in caplog.text
    made.add(timed({1: 1.0}))
    assert Calibration(KEY, cache).curves, "a new measurement replaces it"


def test_a_folder_that_cannot_be_written_is_a_warning(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    blocked = cache / "file"
    blocked.write_text("")
    made = Calibration(KEY, blocked)
    made.add(timed({1: 1.0}))
    assert made.curves
    assert "not kept" in caplog.text


def test_a_running_engine_is_measured_without_changing_its_images(cache: Path) -> None:
    request = {"seed": 1, "steps": 3, "output": "latent", **SIZE}
    said: list[str] = []
    with Engine.load("shapes", device="cpu", max_rows=2) as engine:
        before = engine.generate("a red circle", **request).latents
        assert "calibration: none" in engine.explain()
        other = engine.submit("a red circle", **{**request, "steps": 60})
        engine.warmup(**SIZE, calibrate=True, progress=said.append)
        assert len(said) == len(planned_sizes(4)), "max_rows images, of two model rows each"
        after = engine.generate("a red circle", **request).latents
        assert float((after - before).norm() / before.norm()) <= 1e-4
        (curve,) = engine.models[None].runner.calibration.curves.values()
        text = engine.explain()
        assert "calibration: measured by this process" in text
        assert f"32 x 32: knee at {curve.knee} model rows" in text
        assert engine.models[None].runner.calibration.cap((32, 32, 77, False)) == curve.knee
        assert engine.models[None].runner.calibration.cost((32, 32, 77, False), 2) == curve.seconds(2) < 1
        undisturbed = engine.generate("a red circle", **{**request, "steps": 60}).latents
        assert float((other.result().latents - undisturbed).norm() / undisturbed.norm()) <= 1e-4
    with Engine.load("shapes", device="cpu", max_rows=2) as engine:
        assert engine.models[None].runner.calibration.curves == {((32, 32), ()): curve}
        assert "calibration: read from" in engine.explain()
        key = identity(engine.components)
        assert json.loads(next((cache / "calibration").iterdir()).read_text())["key"] == key
    assert set(key) == {"device", "model", "dtype", "runtime", "runner", "kernels", "torch", "triton", "stepfuse"}
    with Engine.load("shapes", device="cpu", dtype="float64") as engine:
        assert not engine.models[None].runner.calibration.curves, "another precision"
    with Engine.load("shapes", device="cpu", deterministic=True) as engine:
        assert not engine.models[None].runner.calibration.curves, "no measurement decides there"


def test_a_measured_preference_for_halves_is_followed() -> None:
    with Engine.load("shapes", device="cpu", max_rows=1) as engine:
        forwards: list[int] = []
        hook = engine.components.denoiser.register_forward_pre_hook(lambda _, args: forwards.append(len(args[0])))
        engine.models[None].runner.calibration.add(dataclasses.replace(timed({2: 2.0}, {2: 1.0}), height=32, width=32))
        engine.generate("a circle", steps=2, **SIZE)
        assert forwards == [1, 1, 1, 1]
        engine.generate("a circle", steps=1, width=40, height=32)
        hook.remove()
        assert forwards[4:] == [2], "another size was not measured"


def test_updates_with_controlnets_have_curves_of_their_own(cache: Path) -> None:
    with Engine.load("shapes", device="cpu", max_rows=1, controlnets={"silhouette": "shapes-silhouette"}) as engine:
        forwards: list[int] = []
        hook = engine.components.denoiser.register_forward_pre_hook(lambda _, args: forwards.append(len(args[0])))
        calibration = engine.models[None].runner.calibration
        engine.warmup(**SIZE, controls=["silhouette"], calibrate=True)
        (curve,) = calibration.curves.values()
        assert (curve.controls, curve.height, curve.width) == (("silhouette",), 32, 32)
        assert "32 x 32 with silhouette: knee at" in engine.explain()
        plain, controlled = Bucket(32, 32, 24, False), Bucket(32, 32, 24, False, ("silhouette",))
        assert (calibration.cap(plain), calibration.cap(controlled)) == (None, curve.knee)
        assert calibration.cost(controlled, 2) == curve.seconds(2)
        assert calibration.cost(plain, 2) == 1.0, "nothing of its kind was measured"
        halves = dataclasses.replace(timed({2: 2.0}, {2: 1.0}), height=32, width=32, controls=("silhouette",))
        calibration.add(halves)
        forwards.clear()
        control = Control(name="silhouette", image=np.zeros((32, 32), np.uint8))
        engine.generate("a circle", steps=1, guidance_scale=3.0, controls=(control,), **SIZE)
        assert forwards == [1, 1]
        engine.generate("a circle", steps=1, guidance_scale=3.0, **SIZE)
        hook.remove()
        assert forwards[2:] == [2], "without the ControlNet nothing was measured"
        plainly = dataclasses.replace(timed({2: 2.0}), height=32, width=32)
        calibration.add(plainly)
        assert len(calibration.curves) == 2
    assert Calibration(calibration.key, cache).curves == {plainly.kind: plainly}
    kept = json.loads(next((cache / "calibration").iterdir()).read_text())["curves"]
    assert [entry["controls"] for entry in kept] == [[]], "another process may give the name to another ControlNet"


def test_rows_above_max_rows_are_not_measured() -> None:
    wrong = pytest.raises(RequestError, match="rows: got 3, expected 1 to max_rows, 2")
    with Engine.load("shapes", device="cpu", max_rows=2) as engine, wrong:
        engine.warmup(**SIZE, rows=3, calibrate=True)


def test_point_counts_its_forwards() -> None:
    assert [Point(6, k, 1.0).forwards for k in (1, 2, 4, 6, 8)] == [6, 3, 2, 1, 1]
