"""The command line: what it writes, what it prints, and the exit code of every kind of error."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from stepfuse import cli


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of `stepfuse ARGUMENTS`, in this process."""
    monkeypatch.setattr(sys, "argv", ["stepfuse", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, " ".join(said.err.split())


@pytest.fixture
def stepfuse(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "out", cli.Console(highlight=False, soft_wrap=True, width=200))
    return lambda *arguments: run(capsys, monkeypatch, *arguments)


def test_generate_twice_gives_identical_files_with_parameters(stepfuse, tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        code, out, _ = stepfuse("generate", "a red circle", "--seed", "7", "--steps", "3", "-o", name)
        assert (code, out) == (0, "")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    said = json.loads(Image.open(tmp_path / "a.png").text["parameters"])
    assert said["prompt"] == "a red circle"
    assert said["seed"] == 7


def test_several_images_get_their_seed_in_the_name_and_json_lists_them(stepfuse, tmp_path: Path) -> None:
    code, out, _ = stepfuse(
        "generate",
        "a red circle",
        "--seed",
        "3",
        "--steps",
        "2",
        "--n",
        "2",
        "--size",
        "32x64",
        "-o",
        "x.png",
        "--json",
    )
    assert code == 0
    (made,) = json.loads(out)
    assert made["files"] == ["x-3.png", "x-4.png"]
    assert made["settings"]["steps"] == 2
    assert Image.open(tmp_path / "x-4.png").size == (32, 64)


def test_prompt_file(stepfuse, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\n\na blue square\n")
    code, _, _ = stepfuse("generate", "--prompts", "prompts.txt", "--seed", "1", "--steps", "2", "-o", "p.png")
    assert code == 0
    assert (tmp_path / "p-000.png").exists()
    assert (tmp_path / "p-001.png").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["generate", "x", "--model", "absent/folder/here"], 3, "no checkpoint at absent/folder/here"),
        (["generate", "x", "--sampler", "eulr"], 2, "unknown sampler 'eulr'; did you mean 'euler'"),
        (["generate", "x", "--steps", "0"], 2, "steps: got 0, expected a whole number >= 1"),
        (["generate", "x", "--guidance", "nan"], 2, "guidance_scale: got nan"),
        (["generate", "x", "--size", "63x64"], 2, "width: got 63, expected a multiple of"),
        (["generate", "x", "--size", "big"], 2, "expected WIDTHxHEIGHT"),
        (["generate", "x", "-o", "a.jpg"], 2, "expected a name ending in .png"),
        (["generate", "x", "-o", "no/such/a.png"], 2, "does not exist; create it first"),
        (["generate", "x", "--prompts", "absent.txt"], 2, "give one of them"),
        (["generate", "--prompts", "absent.txt"], 2, "absent.txt is not a file"),
        (["generate"], 2, "give either prompt or prompt_embeds"),
        (["generate", "x", "--device", "mps"], 4, "'mps' is not supported"),
    ],
)
def test_errors_are_one_line_with_a_fix_and_an_exit_code(
    stepfuse, arguments: list[str], code: int, message: str
) -> None:
    found, out, err = stepfuse(*arguments)
    assert found == code, err
    assert out == ""
    assert message in err
    assert "Traceback" not in err


def test_version_models_and_doctor(stepfuse) -> None:
    from stepfuse import __version__

    assert stepfuse("--version")[1].strip() == f"stepfuse {__version__}"
    code, out, _ = stepfuse("models")
    assert code == 0
    assert "shapes" in out
    assert "sdxl" in out
    code, out, _ = stepfuse("doctor")
    assert code in (0, 4)
    for topic in ("python", "torch", "triton", "xformers", "kernels"):
        assert topic in out


@pytest.mark.slow
def test_quiet_in_a_pipe_and_interruptible(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "stepfuse", "-q", "generate", "a red circle", "--steps", "2", "-o", "q.png"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == ""
    assert done.stderr == ""
    assert (tmp_path / "q.png").exists()
