"""`stepfuse bench compare`: the same weights on both sides, errors beside times, and no ratio over a better image."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from stepfuse.benchmarks import architectures, comparison, harness, rivals
from stepfuse.benchmarks.architectures import Network, architecture
from stepfuse.benchmarks.cli import app
from stepfuse.benchmarks.compare import relative_error, verdicts
from stepfuse.benchmarks.rivals import BASELINE, CONTROL, ONNX, OURS
from stepfuse.engine.weights.maps import MAPS
from stepfuse.engine.weights.share import Shared
from stepfuse.kernels.timing import Timing

CPU = torch.device("cpu")


def timing(median: float, spread: float = 0.0) -> Timing:
    return Timing(median, median * (1 - spread), median * (1 + spread), 10, 1, "host")


def test_both_graphs_run_on_the_same_weights():
    arch = architecture("tiny")
    net = Network(arch, "unet", CPU, torch.float32)
    inputs = architectures.unet_inputs(arch, 2, (8, 8), CPU, torch.float32)
    with torch.inference_mode():
        truth = net.exact(lambda module: architectures.their_call(module, inputs))
        net.lay_out()
        ours = net.ours(*architectures.our_arguments(net.ours, inputs))
        theirs = architectures.their_call(net.theirs, inputs)
        assert truth.dtype == torch.float64
        assert relative_error(ours, truth) < 1e-5
        assert 0 < relative_error(theirs, truth) < 1e-5
        net.nhwc.conv_in.weight.mul_(1.5)  # what ours reads, too; the default layout has its own copy
        assert relative_error(net.ours(*architectures.our_arguments(net.ours, inputs)), truth) > 1e-2
        assert relative_error(architectures.their_call(net.theirs, inputs), truth) < 1e-5
    assert rivals.layout(net.theirs) == "contiguous"
    assert rivals.layout(net.nhwc) == rivals.layout(net.ours) == "channels-last"


@pytest.mark.parametrize("name", ["sd15", "sd2", "sdxl"])
def test_full_size_architectures_match_ours_parameter_by_parameter(name: str):
    """On the meta device: no weight is made."""
    import diffusers

    from stepfuse.engine.models.unet import UNet
    from stepfuse.engine.models.unet_config import UNetConfig

    config = architecture(name).unet
    with torch.device("meta"):
        theirs, ours = diffusers.UNet2DConditionModel(**config), UNet(UNetConfig.from_diffusers(config))
    with pytest.raises(Exception, match="not loaded"):  # the names and shapes agree: only the weights are missing
        Shared.match(ours, theirs, MAPS["UNet2DConditionModel"], name)
    millions = sum(p.numel() for p in theirs.parameters()) / 1e6
    assert millions == pytest.approx({"sd15": 859.5, "sd2": 865.9, "sdxl": 2567.5}[name], abs=0.1)


def test_insane_activations_are_refused():
    arch = architecture("tiny")
    net = Network(arch, "unet", CPU, torch.float32)
    inputs = architectures.unet_inputs(arch, 2, (8, 8), CPU, torch.float32)
    run = lambda: architectures.their_call(net.theirs, inputs)  # noqa: E731
    with torch.inference_mode():
        architectures.check_sane(architectures.spreads(net.theirs, run))
        net.theirs.mid_block.resnets[1].conv2.weight.mul_(1000)
        with pytest.raises(ValueError, match="mid_block: the standard deviation"):
            architectures.check_sane(architectures.spreads(net.theirs, run))
    with pytest.raises(ValueError, match="nan"):
        architectures.check_sane({"mid_block": math.nan})


def test_a_ratio_needs_times_that_differ_and_errors_that_do_not():
    times = {BASELINE: timing(2.0), CONTROL: timing(2.02), OURS: timing(1.0), "diffusers channels-last": timing(1.01)}
    errors = {BASELINE: 1e-6, CONTROL: 1e-6, OURS: 1.5e-6, "diffusers channels-last": 1e-6}
    found = verdicts(times, errors, OURS)
    assert found["variants"][BASELINE]["speedup"] == 2.0
    assert found["variants"]["diffusers channels-last"]["speedup"] == "equal", "1 % at an A/A spread of 1 %"
    assert found["strongest"] == "diffusers channels-last"
    assert "speedup" not in found["variants"][CONTROL]
    for wrong in (2.2e-6, math.nan):
        found = verdicts(times, errors | {OURS: wrong}, OURS)
        assert found["variants"][BASELINE]["speedup"] is None
        assert comparison.red(found)
        assert comparison.ratio(found, BASELINE).startswith("none: ours errs")
    found = verdicts(times, errors | {OURS: 2.2e-6, "diffusers channels-last": 2e-6}, OURS)
    assert found["variants"][BASELINE]["speedup"] is None, "each rival is judged by its own error"
    assert found["variants"]["diffusers channels-last"]["speedup"] == "equal"
    assert not comparison.red(found)


def test_compilations_are_counted():
    class Net(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sin() + 1

    count = rivals.Compilations()
    count.inductor = lambda graph, inputs: graph.forward  # no C++ compiler is needed
    net = Net()
    net.forward = torch.compile(net.forward, fullgraph=True, dynamic=False, backend=count)
    net(torch.ones(3))
    net(torch.ones(3))
    assert count.count == 1
    net(torch.ones(4))
    assert count.count == 2
    torch._dynamo.reset()


def test_the_profiler_names_the_attention_that_ran():
    q = torch.randn(1, 2, 8, 16)
    with torch.inference_mode():
        used = rivals.attention_used(lambda: nn.functional.scaled_dot_product_attention(q, q, q), CPU)
    assert used == {"aten::_scaled_dot_product_flash_attention_for_cpu": 1}
    assert rivals.attention_used(lambda: q + 1, CPU) == {}


@pytest.mark.slow
def test_the_command_compares_the_built_in_model_in_every_phase(tmp_path: Path):
    out = tmp_path / "compare.jsonl"
    options = ["compare", "--arch", "shapes", "--rounds", "3", "--budget", "0.1", "--size", "32x32", "--steps", "2"]
    options += ["--no-onnx"]  # exported once, below
    done = CliRunner().invoke(app, [*options, "--device", "cpu", "--save", str(out), "--note", "shared"])
    assert done.exit_code in (0, 1), done.output  # 1: every gate is red, which depends on the processor's rounding
    records = harness.read(out)
    assert [record["name"] for record in records] == ["shapes update", "shapes decode", "shapes end-to-end"]
    for record in records:
        assert record["conditions"]["note"] == "shared"
        assert record["value"] == record["variants"][OURS]["median_s"] > 0
        assert set(record["variants"]) == {BASELINE, CONTROL, OURS, "diffusers channels-last"}
        assert all(0 < facts["error"] < 1e-4 for facts in record["variants"].values())
        assert record["variants"][BASELINE]["configuration"]
    update = records[0]
    assert update["variants"][BASELINE]["configuration"]["layout"] == "contiguous"
    assert update["variants"][BASELINE]["configuration"]["versions"]["diffusers"]
    assert "flash_attention_for_cpu" in str(update["variants"][BASELINE]["configuration"]["attention_used"])
    assert set(update["refused"]) >= {"torch.compile", ONNX, "diffusers, xformers attention"}
    assert update["activations_std"]["mid_block"] > 0.1


@pytest.mark.slow
def test_our_export_is_a_rival_with_an_error_of_its_own(tmp_path: Path):
    pytest.importorskip("onnxruntime")
    out = tmp_path / "compare.jsonl"
    options = ["compare", "--arch", "tiny", "--phases", "update", "--rounds", "3", "--budget", "0.1"]
    done = CliRunner().invoke(app, [*options, "--device", "cpu", "--onnx", "--save", str(out)])
    assert done.exit_code in (0, 1), done.output
    (record,) = harness.read(out)
    found = record["variants"][ONNX]
    assert ONNX not in record["refused"]
    assert 0 < found["error"] < 1e-4
    assert found["gate"]["error"] == record["variants"][OURS]["error"]
    assert found["configuration"]["versions"]["onnxruntime"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--arch", "sd16"], "--arch: got 'sd16', expected one of: shapes, sd15"),
        (["--arch", "sd15", "--phases", "end-to-end"], "--phases: got 'end-to-end' for sd15"),
        (["--arch", "sd15", "--size", "250x256"], "width: got 250, expected a multiple of 64"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_built(options: list[str], message: str):
    done = CliRunner().invoke(app, ["compare", *options, "--device", "cpu"])
    assert done.exit_code != 0
    assert message in str(done.exception)
