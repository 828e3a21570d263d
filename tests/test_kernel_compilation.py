"""Every Triton kernel compiles for every architecture, with the registers and shared memory of the committed table.

Needs no GPU, and processes of its own: the compiler under test is chosen by the import path, and the interpreter
(TRITON_INTERPRET) would replace it. TRITON_36 names a folder with Triton 3.6.0 (`pip install --no-deps --target`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import triton

from stepfuse.benchmarks import resources
from stepfuse.benchmarks.resources import Resources, complaints, too_small

ROOT = Path(__file__).resolve().parent.parent
FINE = {"op.kernel: bf16": {"sm_80": Resources(64, 0, 1024, 9000), "gfx942": Resources(40, 8, 0, 7000)}}


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.6.0", "installed"])
def test_every_kernel_needs_what_the_table_says(version: str) -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if version == "installed":
        version = triton.__version__
    elif not env.get("TRITON_36"):
        pytest.skip("TRITON_36 names no folder with Triton 3.6.0")
    else:
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (env["TRITON_36"], env.get("PYTHONPATH"))))
    jobs = str(min(4, os.cpu_count() or 1))
    command = [sys.executable, "-m", "stepfuse.benchmarks.resources", "--check", "--jobs", jobs]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"Triton {version}: "), done.stdout


def test_the_table_has_every_module_under_both_compilers_and_no_other() -> None:
    versions = json.loads(resources.TABLE.read_text())
    assert sorted(versions) == ["3.6.0", "3.7.1"]
    for rows in versions.values():
        assert {name.split(":")[0] for name in rows} == set(resources.modules())


def test_the_page_is_the_table() -> None:
    assert resources.PAGE.read_text() == resources.page(), "run python -m stepfuse.benchmarks.resources --write"


def with_sm80(**changes: int) -> dict[str, dict[str, Resources]]:
    name, targets = next(iter(FINE.items()))
    return {name: targets | {"sm_80": replace(targets["sm_80"], **changes)}}


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (with_sm80(stack=8), "sm_80: 8 bytes of stack"),
        (with_sm80(registers=68), "sm_80: 68 registers, the table has 64"),
        (with_sm80(shared=163 * 1024 + 1), "the limit is 166912"),
        (with_sm80(code=4000), "sm_80: 4000 bytes of code, the table has 9000"),
        ({}, "no longer compiled"),
        (FINE | {"op.kernel: fp16": {"sm_80": Resources(1, 0, 0, 1)}}, "not in the table"),
    ],
)
def test_what_got_worse_is_a_complaint(found: resources.Table, text: str) -> None:
    (only,) = complaints(found, FINE)
    assert text in only


def test_what_got_no_worse_is_none() -> None:
    assert not list(complaints(FINE, FINE))
    assert not list(complaints(with_sm80(registers=67, shared=0, code=4100), FINE))


def with_code(**code: int) -> dict[str, dict[str, Resources]]:
    return {"op.kernel: bf16": {target: Resources(64, 0, 0, size) for target, size in code.items()}}


def test_code_much_smaller_than_on_other_architectures_is_a_complaint() -> None:
    """An empty kernel of 8 KB where 33 to 41 KB are usual, in a compiler that reported no error."""
    found = with_code(sm_80=34_000, sm_86=33_000, sm_90=36_000, sm_100=8_300, sm_120=41_000, gfx942=7_000)
    (only,) = too_small(found)
    assert "sm_100: 8300 bytes of code, other architectures have 35000" in only
    assert list(complaints(found, found)) == [only], "also where the table itself holds it"
    assert not list(too_small(with_code(sm_90=39_080, sm_100=69_496)))


@pytest.mark.parametrize("version", ["3.6.0", "3.7.1"])
def test_no_code_in_the_table_is_suspiciously_small(version: str) -> None:
    assert list(too_small(resources.read_table(version))) == []


def test_an_empty_kernel_is_not_written_to_the_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written: list[object] = []
    monkeypatch.setattr(resources, "measure", lambda op, jobs: with_code(sm_90=36_000, sm_100=8_300))
    monkeypatch.setattr(resources, "write_table", lambda *arguments: written.append(arguments))
    assert resources.main(["--write"]) == 1
    assert "sm_100: 8300 bytes of code" in capsys.readouterr().out
    assert written == []


def test_writing_one_op_keeps_the_others_and_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    resources.write_table("3.7.1", FINE, path=path)
    other = {"geglu.kernel: bf16": {"sm_80": Resources(32, 0, 0, 100)}}
    resources.write_table("3.7.1", other, "geglu", path)
    assert resources.read_table("3.7.1", path) == FINE | other
    resources.write_table("3.7.1", other, path=path)
    assert resources.read_table("3.7.1", path) == other
    with pytest.raises(KeyError, match=r"no table for Triton 3.9.0"):
        resources.read_table("3.9.0", path)


def test_an_unknown_op_is_named() -> None:
    with pytest.raises(ValueError, match=r"no kernels of 'conv'.*geglu"):
        resources.modules("conv")
