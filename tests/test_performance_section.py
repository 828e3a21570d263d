"""The performance section of the README is what the recorded results say, and nothing else."""

import json
from pathlib import Path

import pytest
import torch

from stepfuse.benchmarks import gpu_suite, harness, readme
from stepfuse.benchmarks.kernel_measurement import Settings, measure
from stepfuse.benchmarks.kernel_shapes import shapes

GPU = {"gpu": "NVIDIA H200", "driver": "580.1", "commit": "abc1234", "packages": {"torch": "2.11.0", "triton": "3.6.0"}}
CPU = {"processor": "Some CPU", "threads": 2, "commit": "abc1234", "packages": {"torch": "2.13.0"}}
ABLATION = {
    "part": "update-ablation", "key": "sdxl 1024^2 rows=2", "time": "2026-01-01T00:00:00+00:00",
    "variants": {
        "reference": {"ms": 40.0, "gate": True, "speedup": 1.0},
        "auto": {"ms": 30.0, "gate": True, "speedup": 40 / 30},
    },
}  # fmt: skip


def write(folder: Path, *records: dict) -> Path:
    for record in records:
        harness.append(folder / "some-device" / f"{record['kind']}.jsonl", record)
    return folder


def test_the_readme_is_what_the_results_say():
    """Not by hand: run python -m stepfuse.benchmarks.readme."""
    assert readme.main(["--check"]) == 0


def test_an_edited_number_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    page = tmp_path / "README.md"
    page.write_text(f"before\n{readme.BEGIN}\n{readme.END}\nafter\n")
    assert readme.main(["--readme", str(page)]) == 0
    assert readme.main(["--readme", str(page), "--check"]) == 0
    page.write_text(page.read_text().replace(readme.END, f"3x faster\n{readme.END}"))
    assert readme.main(["--readme", str(page), "--check"]) == 1
    assert "run without it" in capsys.readouterr().out
    assert readme.main(["--readme", str(page)]) == 0
    text = page.read_text()
    assert "3x faster" not in text
    assert text.startswith("before\n")
    assert text.endswith(f"{readme.END}\nafter\n")


def test_without_a_gpu_it_says_so_and_what_to_run(tmp_path: Path):
    latency = harness.measurement("latency", "shapes n=1", 0.25, "s", CPU, SAID, latency=RATES)
    text = readme.section(readme.results(write(tmp_path, latency)))
    assert "Not measured on a GPU yet" in text
    assert "gpu_suite --call A" in text
    assert "**Some CPU (CPU, 2 threads)**, torch 2.13.0, measured at abc1234" in text
    assert "| prompt to pixels | shapes n=1 | 64 x 96 | float32 | 0.25 s | 80 updates/s, 4 images/s |" in text
    assert "Not measured on a GPU yet" in readme.section([])


RATES = {"it_per_s": 80.0, "images_per_s": 4.0}
SAID = {"n": 1, "dtype": "float32", "width": 64, "height": 96, "sampler": "ddim", "note": "a busy machine"}


def test_conditions_stay_in_the_records(tmp_path: Path):
    """The table shows what a reader compares: its lines fit on a screen."""
    latency = harness.measurement("latency", "shapes n=1", 0.25, "s", CPU, SAID, latency=RATES)
    compared = harness.measurement("compare", "tiny decode", 0.5, "s", CPU, {"latent": [8, 16], "dtype": "bfloat16"})
    text = readme.section(readme.results(write(tmp_path, latency, compared)))
    assert "ddim" not in text
    assert "busy" not in text
    assert "| tiny decode | 16 x 8 latents | bfloat16 | 0.5 s |  |" in text
    assert max(len(line) for line in text.splitlines() if line.startswith("|")) < 120


def test_results_of_a_gpu_bundle(tmp_path: Path):
    shape = next(s for s in shapes("tiny") if s.op == "geglu")
    settings = Settings(device=torch.device("cpu"), dtype=torch.float32, compiled=False, rounds=3, budget_s=0.01)
    kernel = {"part": "kernels", "key": shape.key, "time": ABLATION["time"], **measure(shape, settings)}
    start = {"part": "update-ablation", "key": "start", "tiny": False, "fingerprint": GPU, "time": ABLATION["time"]}
    for record in (start, ABLATION, kernel):
        harness.append(tmp_path / "run" / "records.jsonl", record)
    gpu_suite.merge(gpu_suite.bundle(tmp_path / "run"), tmp_path / "checkout")
    text = readme.section(readme.results(tmp_path / "checkout" / "benchmarks" / "results"))
    assert "Not measured" not in text
    assert "**NVIDIA H200**, torch 2.11.0, triton 3.6.0, driver 580.1, measured at abc1234, last on 2026-01-01:" in text
    assert "| sdxl 1024^2 rows=2 |  |  | 30 ms | 1.33x all references |" in text
    assert f"| one op | {shape.key} |  |  | {kernel['us']:.4g} us | reference" in text


def test_a_red_gate_gets_no_ratio(tmp_path: Path):
    wrong = {**ABLATION, "variants": {**ABLATION["variants"], "auto": {"ms": 30.0, "gate": False, "speedup": None}}}
    text = readme.section([gpu_suite.formed(wrong, GPU)])
    assert "no ratio: the error is too large" in text
    assert "1.33x" not in text


def test_the_last_record_counts_and_failed_and_quick_ones_do_not(tmp_path: Path):
    def record(value: float, hour: int, name: str = "a", **facts: object) -> dict:
        made = harness.measurement("unet", name, value, "ms", GPU, {"quick": name == "quick"}, **facts)
        return made | {"time": f"2026-01-01T{hour:02}:00:00+00:00"}

    records = [record(2.0, 9), record(1.0, 8), record(3.0, 10, error="out of memory"), record(4.0, 9, "quick")]
    text = readme.section(readme.results(write(tmp_path, *records)))
    assert "| a |  |  | 2 ms |" in text
    assert not any(f"| {value} ms |" in text for value in (1, 3, 4))


def test_a_number_without_its_machine_is_refused(tmp_path: Path):
    path = tmp_path / "cpu" / "latency.jsonl"
    path.parent.mkdir()
    path.write_text(json.dumps({"kind": "latency", "name": "a", "time": "now", "value": 1.0}) + "\n")
    with pytest.raises(ValueError, match=r"latency.jsonl:1: a record without fingerprint"):
        readme.results(tmp_path)


@pytest.mark.parametrize("text", ["", readme.BEGIN, f"{readme.END}\n{readme.BEGIN}", 2 * f"{readme.BEGIN}{readme.END}"])
def test_missing_or_doubled_markers_are_an_error(text: str):
    with pytest.raises(ValueError, match="once each and in this order"):
        readme.rewritten(text, "body")
