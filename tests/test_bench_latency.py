"""`stepfuse bench latency` and `profile`: what they count is right, and every line runs on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from stepfuse import Engine
from stepfuse.benchmarks import flops, footprint, harness, latency, profiling, startup
from stepfuse.benchmarks.cli import app
from stepfuse.benchmarks.gpu_parts.unets import SD15
from stepfuse.benchmarks.gpu_parts.workloads import Attention, Conv, Gemm, counted
from stepfuse.benchmarks.gpu_parts.workloads import flops as of_site
from stepfuse.benchmarks.latency import Workload, knee
from stepfuse.engine.models.unet_config import UNetConfig

FEW = (("steps", 2),)
HEADER = {"time", "kind", "name", "device", "value", "unit", "conditions", "fingerprint"}


@pytest.fixture(scope="module")
def engine():
    with Engine.load("shapes", device="cpu", max_rows=8) as made:
        yield made


def test_percentiles_interpolate():
    found = harness.percentiles([4.0, 1.0, 3.0, 2.0, 5.0])
    assert found == {"p50_s": 3.0, "p90_s": pytest.approx(4.6), "p99_s": pytest.approx(4.96)}


def test_the_phases_of_a_request_add_up(engine: Engine):
    facts = latency.measure(engine, Workload(n=2, repeats=3, warmup=1, options=FEW))
    assert facts["updates"] == 2
    assert set(facts["phases_s"]) == {"encode", "denoise", "decode", "rest"}
    assert len(facts["seconds"]) == 3
    assert sum(facts["phases_s"].values()) == pytest.approx(facts["p50_s"], rel=0.5)
    assert 0 < facts["phases_s"]["denoise"] < facts["p50_s"]
    assert facts["p50_s"] <= facts["p90_s"] <= facts["p99_s"] <= max(facts["seconds"])
    assert facts["t_update_s"] == pytest.approx(facts["phases_s"]["denoise"] / 2)
    assert facts["images_per_s"] == pytest.approx(2 / facts["p50_s"])


def test_the_knee_is_the_fewest_images_near_the_highest_rate():
    assert knee({1: 10.0, 2: 18.0, 4: 30.0, 8: 32.0}) == 4
    assert knee({1: 10.0, 2: 9.0}) == 1
    with pytest.raises(ValueError, match="at least one"):
        knee({})


def test_operations_of_an_update_are_those_of_the_graph():
    """SD 1.5, two rows of 512^2: all sites of the published graph but what is prepared once (text and timesteps)."""
    sites = {site: n for kind in (Gemm, Conv, Attention) for site, n in counted("sd15", kind).items()}
    once = {s for s in sites if isinstance(s, Gemm) and (not s.per_row or s.m == 77)}
    expected = sum(n * of_site(site, 2) for site, n in sites.items() if site not in once)
    assert flops.of_update(UNetConfig.from_diffusers(SD15), 2, 64, 64) == pytest.approx(expected, rel=1e-9)
    prepared = sum(sites[site] * of_site(site, 2) for site in once)
    assert 0 < prepared < 0.01 * expected


def test_calls_per_update_do_not_depend_on_the_steps_they_are_counted_with(engine: Engine):
    work = Workload(n=1, options=FEW)
    two, other = footprint.per_update(engine, work), footprint.per_update(engine, work, steps=(3, 4))
    assert "no launches" in two["unit"]
    assert two["per_update"] == other["per_update"]
    assert two["per_update"] > len(list(engine.components.denoiser.parameters())) / 2
    assert two["graph_launches_per_update"] == 0


def test_peak_memory_sees_what_was_freed_again():
    device = torch.device("cpu")
    with footprint.PeakMemory(device) as idle:
        pass
    with footprint.PeakMemory(device) as busy:
        torch.ones(2**28, dtype=torch.uint8).sum()
    if idle.gb is None or "since its start" in idle.what:
        pytest.skip("this system does not tell the peak of the resident set")
    assert busy.gb is not None
    assert busy.gb - idle.gb > 0.2
    with footprint.PeakMemory(device) as after:
        pass
    assert after.gb is not None
    assert busy.gb - after.gb > 0.2, "the peak of an earlier measurement is forgotten"


def test_a_profile_names_the_networks_and_sorts_by_kind(engine: Engine, tmp_path: Path):
    facts = profiling.measure(engine, Workload(warmup=1, options=FEW), tmp_path / "trace.json")
    assert sum(kind["share"] for kind in facts["kinds"].values()) == pytest.approx(1.0)
    assert facts["kinds"]["conv"]["share"] > 0.05
    assert facts["kinds"]["gemm"]["calls"] > 20
    assert facts["kinds"]["attention"]["calls"] >= 2
    assert {"request", "denoiser", "decoder", "text encoder 1", "denoiser.up_blocks.0"} <= set(facts["ranges"])
    assert facts["ranges"]["denoiser.mid_block"] < facts["ranges"]["denoiser"] < 1.0
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert any(event.get("name") == "stepfuse: denoiser" for event in events)
    assert not engine.components.denoiser._forward_hooks, "marks are taken off again"
    profiling.mark_only(engine, Workload(warmup=0, options=FEW))  # NVTX ranges only: on a CPU they mark nothing


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::addmm", "gemm"),
        ("aten::mkldnn_convolution", "conv"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("aten::silu", "pointwise"),
        ("aten::native_group_norm", "pointwise"),
        ("aten::copy_", "other"),
        ("aten::transpose", "other"),
        ("aten::expand", "other"),
        ("aten::add_", "pointwise"),
        ("aten::mm", "gemm"),
        ("nvjet_sm90_tst_128x256_64x4_1x2_h_bz_coopA_TNT", "gemm"),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc", "conv"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::SiluFunctor>", "pointwise"),
        ("_group_norm_silu_kernel", "pointwise"),
        ("Memcpy DtoD (Device -> Device)", "other"),
    ],
)
def test_kinds_of_kernels_and_operations(name: str, kind: str):
    assert profiling.kind_of(name) == kind


@pytest.mark.slow
def test_the_command_saves_one_record_per_number_of_images(tmp_path: Path):
    out = tmp_path / "latency.jsonl"
    options = ["latency", "--rows", "1,2", "--steps", "2", "--repeats", "2", "--device", "cpu", "--save", str(out)]
    done = CliRunner().invoke(app, [*options, "--ceiling", "0.05"])
    assert done.exit_code == 0, done.output
    assert "knee" in done.output
    records = harness.read(out)
    assert [record["conditions"]["n"] for record in records] == [1, 2]
    for record in records:
        assert set(record) >= HEADER
        assert record["unit"] == "s"
        assert record["value"] == record["latency"]["p50_s"]
        roof = record["latency"]["roof"]
        assert roof["fraction"] == pytest.approx(roof["tflops"] / roof["product"]["tflops"])
        assert roof["tflops"] == pytest.approx(roof["tflop_per_update"] / record["latency"]["t_update_s"])
    one, two = (record["latency"]["roof"]["tflop_per_update"] for record in records)
    assert two == pytest.approx(2 * one)


@pytest.mark.parametrize("rows", ["0", "4-2", "a", "1,,2"])
def test_bad_rows_are_refused(rows: str):
    done = CliRunner().invoke(app, ["latency", "--rows", rows])
    assert done.exit_code == 2
    assert "expected a range such as" in " ".join(done.output.split())


@pytest.mark.slow
def test_start_up_is_timed_until_the_picture_is_there():
    found = startup.measure("shapes", {"steps": 1, "device": "cpu"}, repeats=1)
    assert 0.5 < found["first_s"] < 120
    with pytest.raises(RuntimeError, match=r"code 2.*unknown sampler"):
        startup.measure("shapes", {"sampler": "eulr"}, repeats=1)
