"""The sanitizer part: what it makes of the tool's words, and the program that the tool watches, interpreted."""

import os

import pytest
import torch

from stepfuse import kernels
from stepfuse.benchmarks.gpu_parts import sanitized, sanitizer
from stepfuse.kernels.op import REGISTRY

CLEAN = "========= COMPUTE-SANITIZER\n12 cases, 0 wrong\n========= ERROR SUMMARY: 0 errors\n"
OUT_OF_BOUNDS = """========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at normalise_kernel+0x1a0
=========     by thread (32,0,0) in block (3,0,0)
========= ERROR SUMMARY: 2 errors
"""
RACE = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at attention_kernel+0x4c0
8 cases, 0 wrong
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
NO_RACE = "8 cases, 0 wrong\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
REFUSED = """========= COMPUTE-SANITIZER
========= Error: Device not supported. Please refer to the "Supported Devices" section of the sanitizer documentation
=========
"""
WRONG = "attention, key padding: error 1, allowed 0.1\n8 cases, 1 wrong\n========= ERROR SUMMARY: 0 errors\n"


@pytest.mark.parametrize(("output", "code"), [(CLEAN, 0), (NO_RACE, 0)])
def test_none_found_and_right_results_are_clean(output: str, code: int):
    assert sanitizer.verdict(output, code) == {"verdict": "clean", "errors": 0}


def test_what_the_tool_found_is_counted_and_quoted():
    found = sanitizer.verdict(OUT_OF_BOUNDS, 0)
    assert (found["verdict"], found["errors"]) == ("errors", 2)
    assert "Invalid __global__ write of size 4 bytes" in found["lines"]
    assert sanitizer.verdict(RACE, 0)["errors"] == 1


def test_a_tool_that_did_not_work_is_no_verdict():
    assert sanitizer.verdict(REFUSED, 1)["verdict"] == "not run"
    assert "Device not supported" in sanitizer.verdict(REFUSED, 1)["reason"]
    assert sanitizer.verdict("", 127) == {"verdict": "not run", "reason": "exit 127: no output"}


def test_wrong_results_are_not_clean():
    found = sanitizer.verdict(WRONG, 1)
    assert found["verdict"] == "program failed"
    assert "8 cases, 1 wrong" in found["lines"]


def test_the_allocator_does_not_hide_what_lies_beyond_a_tensor():
    assert sanitizer.command("tool", "memcheck", "attention")[:4] == [
        "env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "tool", "--tool",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.interpret
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1, in its own process")
@pytest.mark.parametrize("name", sanitized.KERNELS)
def test_the_program_tells_right_from_wrong(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    getattr(kernels, sanitized.KERNELS[name])  # registers it
    op = REGISTRY[sanitized.KERNELS[name]]
    monkeypatch.setattr(op, "cases", op.cases[-3:])
    assert sanitized.main([name, "--device", "cpu"]) == 0
    assert capsys.readouterr().out == "3 cases, 0 wrong\n"
    implementation = op.implementations["triton"]

    def wrong(**arguments: object) -> object:
        found = implementation.call(**arguments)
        first = found[0] if isinstance(found, tuple) else found
        torch.Tensor.mul_(first, 1.5)
        return found

    monkeypatch.setitem(op.implementations, "triton", type(implementation)("triton", wrong, implementation.unsupported))
    monkeypatch.setattr(op, "cases", op.cases[-1:])
    assert sanitized.main([name, "--device", "cpu"]) == 1
    assert "1 cases, 1 wrong" in capsys.readouterr().out


def test_the_kernels_that_are_watched_exist():
    assert len(sanitized.KERNELS) == 3
    assert set(sanitized.KERNELS.values()) <= set(kernels.__all__)
