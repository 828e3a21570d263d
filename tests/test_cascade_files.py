"""Cascades as files, names and options of the command line, and what is said where they are wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stepfuse import Engine, EngineConfig, cli
from stepfuse.engine.cascade import Cascade, Stage
from stepfuse.engine.conditioning.images import load_image
from stepfuse.engine.errors import RequestError
from stepfuse.engine.loading import load_components

SIZE: dict[str, Any] = {"width": 32, "height": 32}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    parts = load_components("shapes", EngineConfig(device="cpu", max_rows=6))
    with Engine(parts) as made:
        yield made


def test_a_file_says_what_a_cascade_is(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "models: {third: shapes}\nstages: [{steps: 3}, {model: third, scale: 2, strength: 0.5, steps: 4, tile: 48}]\n"
    )
    cascade = Cascade.from_file(tmp_path / "mine.yaml")
    assert cascade.name == "mine"
    assert cascade.stages[1] == Stage(model="third", scale=2, tile=48, request={"strength": 0.5, "steps": 4})
    made = engine.generate("a circle", cascade=tmp_path / "mine.yaml", output="latent", **SIZE)
    assert [stage.settings["steps"] for stage in made.stages] == [3, 4]
    assert "third" in engine.models, "it was loaded"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stages: [", "is no YAML"),
        ("a: 1", "has no list `stages`"),
        ("stages: [{}, {stepz: 3}]", "stage: unknown entry 'stepz': did you mean 'steps'"),
        ("stages: [{}, {}]\nmodel: x", "unknown entry 'model'"),
        ("stages: [{}]", "got 1 stages, expected at least two"),
        ("stages: [{scale: 2}, {}]", "the first stage has no stage before it"),
        ("stages: [{}, {input: latent}]", "input: got 'latent', did you mean 'latents'"),
        ("stages: [{}, {input: latents, scale: 2}]", "latents are resized by 'bicubic'"),
        ("stages: [{}, {scale: -1}]", "scale: got -1"),
        ("stages: [{}, {width: 64 px}]", "width: got '64 px', expected a whole number"),
        ("stages: [{}, {tile: 64, overlap: 40}]", "overlap: got 40 with tile 64"),
        ("stages: [{}, {model: lanczos, steps: 3}]", "lanczos only resamples an image"),
        ("stages: [{}, {model: lanczos}, {input: latents}]", "lanczos leaves an image, no latents"),
        ("stages: [{}, {}]\nmodels: {a: 1}", "models: expected name: source"),
    ],
)
def test_a_wrong_file_is_an_error_that_says_why(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(RequestError, match=message):
        Cascade.of(path)


def test_an_unknown_name_is_an_error_that_names_the_closest() -> None:
    with pytest.raises(RequestError, match=r"cascade: got 'hires-fx', .*did you mean 'hires-fix'"):
        Cascade.of("hires-fx")


def test_tiles_must_fit_the_latents(engine: Engine) -> None:
    cascade = Cascade(name="t", stages=(Stage(), Stage(scale=2, tile=8, request={"strength": 0.5})))
    with pytest.raises(RequestError, match="stage 2 of 2: tile: 8 pixels are 1 latents"):
        engine.submit("a circle", cascade=cascade, **SIZE)


def test_the_command_line_runs_a_cascade(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["generate", "a red circle", "--cascade", "hires-fix", "--size", "32x32", "--steps", "4", "-o", "a.png"]
    monkeypatch.setattr("sys.argv", ["stepfuse", *arguments, "--device", "cpu"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert load_image(tmp_path / "a.png").shape == (64, 64, 3)
