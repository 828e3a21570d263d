"""The plan of a GPU window: it fits into its time, names real parts, and is what its page says."""

from pathlib import Path

import pytest

from stepfuse.benchmarks import gpu_suite, gpu_windows

PAGE = Path(__file__).resolve().parent.parent / "docs" / "gpu_windows.md"
PARTS = {part.name: part for part in gpu_suite.PARTS}


@pytest.mark.parametrize("call", gpu_windows.CALLS, ids=lambda call: call.name)
def test_a_call_fits_into_its_limit(call: gpu_windows.Call):
    assert sum(call.parts.values()) <= call.seconds <= gpu_windows.CALL_LIMIT_S - gpu_windows.MARGIN_S
    assert set(call.parts) <= set(PARTS)
    assert all(seconds >= 10 for seconds in call.parts.values()), "the suite starts no part with less"


def test_the_calls_fit_into_the_window_and_share_no_part():
    used = sum(call.seconds + gpu_windows.MARGIN_S for call in gpu_windows.CALLS)
    assert used + gpu_windows.START_S <= gpu_windows.WINDOW_S + gpu_windows.MARGIN_S
    names = [name for call in gpu_windows.CALLS for name in call.parts]
    assert len(names) == len(set(names))
    must = {"tests", "tuning", "sanitizer", "update-ablation", "vae-ablation", "ceilings", "compare", "kernels"}
    must |= {"runners", "knee", "replays", "equality", "rows-static"}
    assert must <= set(names)
    order = [call.name for call in gpu_windows.CALLS for name in call.parts if name in ("tuning", "update-ablation")]
    assert order == ["A", "B"], "what is tuned is what the ablation runs with"


def test_the_page_holds_the_plan(capsys: pytest.CaptureFixture[str]):
    assert gpu_suite.main(["--plan"]) == 0
    plan = capsys.readouterr().out
    assert plan in PAGE.read_text(), "copy the output of gpu_suite --plan between the markers"
    for call in gpu_windows.CALLS:
        assert gpu_windows.command(call.name) in plan


def test_a_call_runs_its_parts_with_its_seconds(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--device", "cpu", "--tiny", "--out", str(tmp_path), "--resume", "--seconds", "0.001"]
    assert gpu_suite.main(["--call", "b", *options]) == 0
    said = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert said == list(gpu_windows.call("B").parts)
