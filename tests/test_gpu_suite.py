"""The GPU suite without a GPU: every part runs its smallest shapes, resumes, bundles and merges."""

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from stepfuse.benchmarks import gpu_suite, harness
from stepfuse.benchmarks.gpu_parts import tuning
from stepfuse.benchmarks.gpu_parts.convs import fold_upsampling
from stepfuse.benchmarks.gpu_parts.unets import kind_of

pytestmark = pytest.mark.slow  # left out by `.ci/run quick`


def suite(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stepfuse.benchmarks.gpu_suite", "--device", "cpu", "--tiny", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_every_part_runs_on_a_cpu(tmp_path: Path):
    done = suite("--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    records = harness.read(tmp_path / "records.jsonl")
    for part in gpu_suite.PARTS:
        keys = [r["key"] for r in records if r["part"] == part.name]
        assert keys[0] == "start"
        assert keys[-1] == "end"
        assert len(keys) >= 3, f"{part.name} measured nothing"
    failed = [(r["part"], r["key"], r["error"]) for r in records if "error" in r and "fp8" not in r["key"]]
    assert failed == []
    assert all(r["probe_exact"] for r in records if r["part"] == "gemm" and "probe_exact" in r)
    errors = [r["error_vs_float32"] for r in records if "error_vs_float32" in r]
    assert len(errors) >= 12
    assert max(errors) < 0.1  # bf16 against float32


def test_a_resumed_run_measures_only_what_is_missing(tmp_path: Path):
    assert suite("--out", str(tmp_path), "--parts", "launches").returncode == 0
    first = harness.read(tmp_path / "records.jsonl")
    interrupted = [r for r in first if r["key"] not in ("end", "host, 20 adds of 1048576")]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in interrupted) + '{"cut short')
    assert suite("--out", str(tmp_path), "--parts", "launches", "--resume").returncode == 0
    keys = [r["key"] for r in harness.read(tmp_path / "records.jsonl")]
    assert keys.count("host, 20 adds of 1") == 1
    assert keys.count("host, 20 adds of 1048576") == 1
    assert keys[-1] == "end"
    again = suite("--out", str(tmp_path), "--parts", "launches", "--resume")
    assert "complete in an earlier run" in again.stdout


def test_a_part_that_hangs_or_crashes_takes_only_itself_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu_suite, "GRACE", 0.0)
    parts = [
        gpu_suite.Part("broken", "no_such_module", 60, ""),
        gpu_suite.Part("hanging", "launches", 0.01, ""),
        gpu_suite.Part("launches", "launches", 60, ""),
    ]
    parser_options = ["--out", str(tmp_path), "--device", "cpu", "--tiny", "--bundle", str(tmp_path / "b.tar")]
    monkeypatch.setattr(gpu_suite, "PARTS", tuple(parts))
    assert gpu_suite.main(parser_options) == 1
    records = harness.read(tmp_path / "records.jsonl")
    outcome = {r["part"]: r["key"] for r in records}
    assert outcome == {"broken": "crashed", "hanging": "killed", "launches": "end"}
    assert "no_such_module" in next(r["error"] for r in records if r["key"] == "crashed")
    with tarfile.open(tmp_path / "b.tar") as tar:
        assert {"records.jsonl", "broken.log", "launches.log"} <= set(tar.getnames())


def bundle_of(folder: Path, records: list[dict], configs: dict[str, str]) -> Path:
    for record in records:
        harness.append(folder / "records.jsonl", record)
    for name, text in configs.items():
        path = folder / "configs" / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
    return gpu_suite.bundle(folder)


def start(tiny: bool) -> dict:
    return {"part": "gemm", "key": "start", "tiny": tiny, "fingerprint": {"gpu": "NVIDIA H200"}}


def test_merge_spreads_records_and_configurations_once(tmp_path: Path):
    good, bad = {"part": "gemm", "key": "a", "us": 1.0}, {"part": "gemm", "key": "b", "error": "out of memory"}
    archive = bundle_of(tmp_path / "run", [start(False), good, bad], {"geglu/nvidia-h200.json": "{}"})
    checkout = tmp_path / "checkout"
    (checkout / "kernels" / "geglu").mkdir(parents=True)
    for _ in range(2):
        gpu_suite.merge(archive, checkout)
    results = checkout / "benchmarks" / "results" / "nvidia-h200" / "gemm.jsonl"
    assert harness.read(results) == [start(False), good]
    assert (checkout / "kernels" / "geglu" / "configs" / "nvidia-h200.json").read_text() == "{}"


def test_configurations_of_an_earlier_run_are_installed_and_bundled_again(tmp_path: Path):
    archive = bundle_of(tmp_path / "run", [start(False)], {"geglu/NVIDIA_H200.json": "{}"})
    out = tmp_path / "resumed"
    done = suite("--out", str(out), "--parts", "launches", "--resume", str(archive))
    assert done.returncode == 0, done.stderr
    with tarfile.open(out / "bundle.tar") as tar:
        assert "configs/geglu/NVIDIA_H200.json" in tar.getnames()
    assert tuning.install(out / "configs", tmp_path) == [tmp_path / "geglu" / "configs" / "NVIDIA_H200.json"]
    assert (tmp_path / "geglu" / "configs" / "NVIDIA_H200.json").read_text() == "{}"


def test_merge_refuses_tiny_records_and_unknown_ops(tmp_path: Path):
    archive = bundle_of(tmp_path / "tiny", [start(True), {"part": "gemm", "key": "a", "us": 1.0}], {})
    assert gpu_suite.merge(archive, tmp_path) == []
    assert not (tmp_path / "benchmarks").exists()
    archive = bundle_of(tmp_path / "other", [start(False)], {"no_such_op/nvidia-h200.json": "{}"})
    with pytest.raises(ValueError, match="no_such_op"):
        gpu_suite.merge(archive, tmp_path)


def test_bad_arguments_are_one_line(tmp_path: Path):
    assert "--out DIR is needed" in suite().stderr
    assert "unknown part 'gem'; valid: ceilings" in suite("--out", str(tmp_path), "--parts", "gem").stderr


def test_folded_upsampling_is_exact():
    """Nearest-2x then 3x3 equals the 4x4 transposed convolution, to rounding in float64."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 5, 7, generator=generator, dtype=torch.float64)
    weight = torch.randn(4, 3, 3, 3, generator=generator, dtype=torch.float64)
    bias = torch.randn(4, generator=generator, dtype=torch.float64)
    truth = F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)
    folded = F.conv_transpose2d(x, fold_upsampling(weight), bias, 2, 1)
    assert (folded - truth).abs().max() < 1e-13 * truth.abs().max()


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_sm90_tst_128x256_64x4_1x2_h_bz_coopA_TNT", "gemm"),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64", "convolution"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("void at::native::RowwiseMomentsCUDAKernel<float>", "norm"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::SiluFunctor>", "pointwise"),
    ],
)
def test_kernels_are_sorted_by_kind(kernel: str, kind: str):
    assert kind_of(kernel) == kind
