"""The GPU suite without a GPU: every part runs its smallest shapes, resumes, bundles and merges."""

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from stepfuse.benchmarks import gpu_suite, harness
from stepfuse.benchmarks.gpu_parts import worker
from stepfuse.benchmarks.gpu_parts.convs import fold_upsampling
from stepfuse.benchmarks.gpu_parts.unets import kind_of

pytestmark = pytest.mark.slow  # left out by `.ci/run quick`


TIME = "2026-01-01T00:00:00+00:00"
TINY = ("--device", "cpu", "--tiny")


def suite(*arguments: str) -> int:
    """The suite in this process; its parts run in processes of their own."""
    return gpu_suite.main([*TINY, *arguments])


@pytest.fixture
def torch_as_before() -> Iterator[None]:
    """A part sets switches of its process, which here is the test's."""
    matmul, cudnn, dynamo = torch.backends.cuda.matmul, torch.backends.cudnn, torch._dynamo.config
    before = matmul.allow_tf32, cudnn.allow_tf32, dynamo.fail_on_recompile_limit_hit
    with torch.random.fork_rng():
        yield
    matmul.allow_tf32, cudnn.allow_tf32, dynamo.fail_on_recompile_limit_hit = before
    torch._dynamo.reset()


@pytest.mark.usefixtures("torch_as_before")
@pytest.mark.parametrize("part", gpu_suite.PARTS, ids=lambda part: part.name)
def test_every_part_runs_on_a_cpu(part: gpu_suite.Part, tmp_path: Path):
    """What the part's process does, in this one: tiny shapes, all of its lines that need no GPU."""
    path = tmp_path / "records.jsonl"
    options = ["--module", part.module, "--records", str(path), "--seconds", "60", *TINY]
    assert worker.main([part.name, *options]) == 0
    records = harness.read(path)
    assert {r["part"] for r in records} == {part.name}
    keys = [r["key"] for r in records]
    assert keys[:2] == ["start", "canaries"]
    assert keys[-1] == "end"
    assert len(keys) > 3, "it measured nothing"
    assert records[0]["fingerprint"]["packages"]["torch"] == torch.__version__
    assert [(r["key"], r["error"]) for r in records if "error" in r and "fp8" not in r["key"]] == []
    assert all(r["probe_exact"] for r in records if "probe_exact" in r)
    errors = [r["error_vs_float32"] for r in records if "error_vs_float32" in r]
    assert len(errors) >= {"unet": 4, "unet-own": 4, "vae": 8, "unet-autotune": 1, "runners": 2}.get(part.name, 0)
    assert all(error < 0.1 for error in errors)  # bf16 against float32
    for ablation in (r["variants"] for r in records if part.name.endswith("ablation") and "variants" in r):
        assert ablation["reference"]["gate"]
        assert {"reference", "auto"} <= set(ablation)
    assert all(r["green"] for r in records if "green" in r and r.get("checked", True))
    assert [r["updates"] for r in records if r.get("checked") is False] == ([3] if part.name == "replays" else [])
    if part.name == "sanitizer":
        assert [r["verdict"] for r in records[2:-1]] == ["not run"] * 6
        assert "CUDA" in records[2]["reason"]


def test_a_resumed_run_measures_only_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert suite("--out", str(tmp_path), "--parts", "launches") == 0
    first = harness.read(tmp_path / "records.jsonl")
    interrupted = [r for r in first if r["key"] not in ("end", "host, 20 adds of 1048576")]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in interrupted) + '{"cut short')
    assert suite("--out", str(tmp_path), "--parts", "launches", "--resume") == 0
    keys = [r["key"] for r in harness.read(tmp_path / "records.jsonl")]
    assert keys.count("host, 20 adds of 1") == 1
    assert keys.count("host, 20 adds of 1048576") == 1
    assert keys[-1] == "end"
    capsys.readouterr()
    assert suite("--out", str(tmp_path), "--parts", "launches", "--resume") == 0
    assert "complete in an earlier run" in capsys.readouterr().out


def test_a_part_that_hangs_or_crashes_takes_only_itself_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(gpu_suite, "GRACE", 0.0)
    every = gpu_suite.PARTS
    parts = [
        gpu_suite.Part("broken", "no_such_module", 60, ""),
        gpu_suite.Part("hanging", "launches", 0.01, ""),
        gpu_suite.Part("launches", "launches", 60, "", gpu_suite.REPEATABLE),
    ]
    monkeypatch.setattr(gpu_suite, "PARTS", tuple(parts))
    assert suite("--out", str(tmp_path), "--bundle", str(tmp_path / "b.tar")) == 1
    records = harness.read(tmp_path / "records.jsonl")
    outcome = {r["part"]: r["key"] for r in records}
    assert outcome == {"broken": "crashed", "hanging": "killed", "launches": "end"}
    assert "no_such_module" in next(r["error"] for r in records if r["key"] == "crashed")
    start = next(r for r in records if r["part"] == "launches" and r["key"] == "start")
    assert start["fingerprint"]["switches"]["cublas_workspace"] == ":4096:8", "the variable of its part"
    assert next(part for part in every if part.name == "equality").environment == gpu_suite.REPEATABLE
    said = capsys.readouterr().out
    assert "broken: exit 1: ModuleNotFoundError" in said
    assert "hanging: killed after 0 s" in said
    assert "launches: ok" in said
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
    return {"part": "gemm", "key": "start", "time": TIME, "tiny": tiny, "fingerprint": {"gpu": "NVIDIA H200"}}


def test_merge_spreads_records_and_configurations_once(tmp_path: Path):
    good = {"part": "gemm", "key": "a", "time": TIME, "us": 1.0}
    bad = {"part": "gemm", "key": "b", "time": TIME, "error": "out of memory"}
    archive = bundle_of(tmp_path / "run", [start(False), good, bad], {"geglu/nvidia-h200.json": "{}"})
    checkout = tmp_path / "checkout"
    (checkout / "kernels" / "geglu").mkdir(parents=True)
    for _ in range(2):
        gpu_suite.merge(archive, checkout)
    results = checkout / "benchmarks" / "results" / "nvidia-h200" / "gemm.jsonl"
    begun, measured = harness.read(results)
    assert (begun["name"], measured["name"]) == ("start", "a")
    assert (measured["kind"], measured["value"], measured["unit"]) == ("gemm", 1.0, "us")
    assert measured["device"] == measured["fingerprint"]["gpu"] == "NVIDIA H200"
    assert (checkout / "kernels" / "geglu" / "configs" / "nvidia-h200.json").read_text() == "{}"


def test_configurations_of_an_earlier_run_are_installed_and_bundled_again(tmp_path: Path):
    archive = bundle_of(tmp_path / "run", [start(False)], {"geglu/NVIDIA_H200.json": "{}"})
    out = tmp_path / "resumed"
    assert suite("--out", str(out), "--seconds", "0.001", "--parts", "launches", "--resume", str(archive)) == 0
    with tarfile.open(out / "bundle.tar") as tar:
        assert "configs/geglu/NVIDIA_H200.json" in tar.getnames()
    assert gpu_suite.install(out / "configs", tmp_path) == [tmp_path / "geglu" / "configs" / "NVIDIA_H200.json"]
    assert (tmp_path / "geglu" / "configs" / "NVIDIA_H200.json").read_text() == "{}"


def test_merge_refuses_tiny_records_and_unknown_ops(tmp_path: Path):
    archive = bundle_of(tmp_path / "tiny", [start(True), {"part": "gemm", "key": "a", "us": 1.0}], {})
    assert gpu_suite.merge(archive, tmp_path) == []
    assert not (tmp_path / "benchmarks").exists()
    archive = bundle_of(tmp_path / "other", [start(False)], {"no_such_op/nvidia-h200.json": "{}"})
    with pytest.raises(ValueError, match="no_such_op"):
        gpu_suite.merge(archive, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--out DIR is needed"),
        (["--out", "x", "--parts", "gem"], "unknown part 'gem'; valid: ceilings"),
        (["--out", "x", "--call", "D"], "no call 'D'; valid: A, B, C"),
        (["--out", "x", "--call", "A", "--parts", "gemm"], "--call and --parts exclude each other"),
    ],
)
def test_bad_arguments_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        suite(*arguments)
    assert message in capsys.readouterr().err


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
