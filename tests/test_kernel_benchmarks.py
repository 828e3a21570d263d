"""The kernel benchmark without a GPU: it runs, its accounting is right, and what is wrong gets no speed-up."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from stepfuse.benchmarks import gate, harness, kernel_measurement, kernel_picture, kernel_report, kernel_work, kernels
from stepfuse.benchmarks.cli import app
from stepfuse.benchmarks.gpu_parts import ablation
from stepfuse.benchmarks.gpu_parts.session import Session
from stepfuse.benchmarks.gpu_parts.vaes import TINY
from stepfuse.benchmarks.kernel_measurement import Settings, claim, measure
from stepfuse.benchmarks.kernel_shapes import Input, shapes
from stepfuse.benchmarks.random_networks import autoencoder
from stepfuse.kernels.op import REGISTRY

pytestmark = pytest.mark.slow  # left out by `.ci/run quick`

SETTINGS = Settings(device=torch.device("cpu"), dtype=torch.float32, compiled=False, rounds=3, budget_s=0.01)
Register = Callable[[str, str, Callable[..., object]], None]


@pytest.fixture
def register() -> Iterator[Register]:
    """Adds an implementation that runs anywhere, for the length of a test: (op, name, function)."""
    added: list[tuple[str, str]] = []

    def add(op: str, name: str, call: Callable[..., object]) -> None:
        REGISTRY[op].implement(name, lambda call: None)(call)
        added.append((op, name))

    yield add
    for op, name in added:
        del REGISTRY[op].implementations[name]


def test_a_quick_run_on_a_cpu_measures_every_op_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out, report = tmp_path / "kernels.jsonl", tmp_path / "kernels.md"
    options = ["--device", "cpu", "--quick", "--no-compile", "--out", str(out), "--report", str(report)]
    assert kernels.main(options) == 0, capsys.readouterr().out
    roof, *rest = harness.read(out)
    assert roof["product"]["tflops"] == roof["value"] > 0
    for record in (roof, *rest):
        assert record["fingerprint"]["packages"]["torch"] == torch.__version__
        assert record["kind"] == "kernels"
        assert record["conditions"]["quick"]
    assert {record["op"] for record in rest} == set(REGISTRY)
    for record in rest:
        assert record["value"] == min(facts["warm"]["us"] for facts in record["variants"].values())
        reference = record["variants"]["reference"]
        assert reference["gate"]["green"]
        rate = record["bytes"] / reference["warm"]["median_s"] * 1e-9
        assert reference["warm"]["gb_per_s"] == pytest.approx(rate)
        assert reference["warm"]["p10_s"] <= reference["warm"]["median_s"] <= reference["warm"]["p90_s"]
        assert "cold" not in reference, "there is no GPU cache to be cold"
        assert record["a_a_spread"]["warm"] >= 0
    text = report.read_text()
    assert kernel_report.NOT_A_GPU in text
    assert all(f"## {op}\n" in text for op in REGISTRY)


def test_the_picture_is_drawn(tmp_path: Path):
    pytest.importorskip("matplotlib")
    record = measure(small("geglu"), SETTINGS)
    kernel_picture.draw([record], tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_a_missing_matplotlib_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'stepfuse\[bench\]'"):
        kernel_picture.draw([], tmp_path / "speed.png")


def small(op: str):
    return next(shape for shape in shapes("tiny") if shape.op == op)


def test_a_wrong_implementation_is_red_and_gets_no_speedup(
    tmp_path: Path, register: Register, capsys: pytest.CaptureFixture[str]
):
    register("geglu", "wrong", lambda x: x.chunk(2, -1)[0].contiguous())
    register("geglu", "right", lambda x: (x.chunk(2, -1)[0] * torch.nn.functional.gelu(x.chunk(2, -1)[1])).contiguous())
    out = tmp_path / "kernels.jsonl"
    options = ["--device", "cpu", "--quick", "--no-compile", "--op", "geglu", "--model", "tiny", "--out", str(out)]
    assert kernels.main(options) == 1
    variants = harness.read(out)[-1]["variants"]
    assert not variants["wrong"]["gate"]["green"]
    assert variants["wrong"]["gate"]["error"] > 1000 * variants["wrong"]["gate"]["allowed"]
    assert variants["wrong"]["speedup"] == {"warm": {}}
    assert set(variants["right"]["speedup"]["warm"]) == {"reference"}
    rows = {row.split("|")[1].strip(): row for row in capsys.readouterr().out.splitlines() if row.startswith("| ")}
    assert "**RED**" in rows["wrong"]
    assert rows["wrong"].endswith("| - | - |")
    assert "RED" not in rows["right"]


def test_an_implementation_that_fails_is_refused_with_its_reason(register: Register):
    def broken(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such instruction")

    register("geglu", "broken", broken)
    record = measure(small("geglu"), SETTINGS)
    assert record["refused"]["broken"] == "RuntimeError: no such instruction"
    assert set(record["variants"]) == {"reference"}


def test_a_failed_shape_is_recorded_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(shape, settings):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(kernel_measurement, "measure", fail)
    out = tmp_path / "kernels.jsonl"
    assert kernels.main(["--device", "cpu", "--quick", "--op", "geglu", "layer_norm", "--out", str(out)]) == 1
    assert [r["op"] for r in harness.read(out) if r.get("error") == "RuntimeError: out of memory"] == [
        "geglu",
        "layer_norm",
    ]


def test_differences_below_twice_the_spread_are_equal():
    assert claim(1.05, 1.0, spread=0.03) == "equal"
    assert claim(1.0, 1.05, spread=0.03) == "equal"
    assert claim(1.07, 1.0, spread=0.03) == pytest.approx(1.07)
    assert claim(1.0, 2.0, spread=0.03) == 0.5


@pytest.mark.parametrize(
    ("shape", "extra", "total", "text"),
    [
        # 2 x 320 x 128 x 128 bf16 = 20.97 MB: read once, written once, and two vectors of 320
        ((2, 320, 128, 128), {}, 2 * 20_971_520 + 2 * 640, "2.00X"),
        # 268 MB do not stay in the cache between the statistics and the normalisation
        ((1, 128, 1024, 1024), {}, 3 * 268_435_456 + 2 * 256, "3.00X: reads x twice; writes 1; X = 268 MB"),
        # with the statistics given, one read: 1024 runs x 2 x 128 float32 more
        ((1, 128, 1024, 1024), {"partial_stats": (1, 1024, 2, 128)}, 2 * 268_435_456 + 2 * 256 + 1_048_576, "2.00X"),
    ],
)
def test_bytes_of_a_group_norm_by_hand(
    shape: tuple[int, ...], extra: dict[str, tuple[int, ...]], total: int, text: str
):
    def tensor(size: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    arguments = {"x": tensor(shape), "weight": tensor(shape[1:2]), "bias": tensor(shape[1:2]), "groups": 32}
    arguments |= {name: tensor(size, torch.float32) for name, size in extra.items()}
    work = kernel_work.count("group_norm_silu", arguments, [tensor(shape)])
    assert work.bytes == total
    assert work.accounting.startswith(text)
    assert work.flops == 0


def test_bytes_of_a_reduction_are_counted_in_its_input():
    x = torch.empty(1, 2, 4, 128, 128, device="meta")  # 524 kB
    work = kernel_work.count("guidance_stats", {"model_output": x}, [x.new_empty(1, 2, 2), x.new_empty(1, 2)])
    assert work.bytes == 524_288 + 16 + 8
    assert work.accounting == "1.00X: reads model_output; writes 2; X = 0.524 MB"


def test_operations_of_an_attention_by_hand():
    q, k = (torch.empty(2, length, 10, 64, dtype=torch.bfloat16, device="meta") for length in (4096, 77))
    work = kernel_work.count("attention", {"q": q, "k": k, "v": k}, [q])
    assert work.flops == 4 * 2 * 10 * 4096 * 77 * 64  # two products, a multiply-add counts two
    assert work.bytes == 2 * (2 * 4096 * 640 * 2) + 2 * (2 * 77 * 640 * 2)


@pytest.mark.parametrize(
    ("model", "norms", "attentions", "geglus"),
    [("sdxl", 46, 140, 70), ("sd15", 61, 32, 16), ("sdxl-vae", 30, 1, 0), ("sd15-vae", 30, 1, 0)],
)
def test_shapes_are_those_of_the_published_graphs(model: str, norms: int, attentions: int, geglus: int):
    found = shapes(model)
    calls: Counter[str] = Counter()
    for shape in found:
        calls[shape.op] += shape.count
    assert (calls["group_norm_silu"], calls["attention"], calls["geglu"]) == (norms, attentions, geglus)
    assert len({shape.key for shape in found}) == len(found)
    image = next(s for s in found if s.op == "group_norm_silu").inputs()["x"]
    assert image.stride[1] == 1, "images are channels-last"


def test_arguments_keep_the_strides_of_the_model():
    shape = next(s for s in shapes("tiny") if s.op == "attention" and s.inputs()["k"].shape[1] == 77)
    made = shape.make(torch.device("cpu"), torch.float16)
    for name, want in shape.inputs().items():
        assert isinstance(want, Input)
        assert (tuple(made[name].shape), made[name].stride()) == (want.shape, want.stride)
        assert made[name].dtype == torch.float16
    assert not made["k"].is_contiguous(), "keys of the prompt are a slice of all layers' keys"


def test_the_gate_is_the_tolerance_rule():
    exact, plain = torch.tensor([1.0, -4.0], dtype=torch.float64), torch.tensor([1.0, -4.5], dtype=torch.float64)
    verdict = gate.judge([exact + 1.0], [plain], [exact])
    assert verdict == gate.Gate(True, 1.0, 2 * 0.5 + 1e-7 * 4)
    assert not gate.judge([exact + 1.001], [plain], [exact]).green
    assert not gate.judge([exact * math.nan], [plain], [exact]).green
    flags = torch.tensor([True, False])
    assert gate.judge([exact, flags], [exact, flags], [exact, flags]).green
    assert not gate.judge([exact, ~flags], [exact, flags], [exact, flags]).green


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--op", "gegluu"], "unknown op 'gegluu'; valid: add_layer_norm, attention"),
        (["--model", "sd16"], "unknown model 'sd16'; valid: sdxl, sd15"),
        (["--rows", "3"], "--rows 3: expected an even number"),
        (["--read", "no-such-file.jsonl"], "expected the records of a kernel benchmark"),
    ],
)
def test_bad_options_are_one_line(options: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        kernels.main(["--device", "cpu", "--quick", *options])
    assert message in capsys.readouterr().err


def test_the_command_line_passes_options_on():
    done = CliRunner().invoke(app, ["kernels", "--device", "cpu", "--quick", "--op", "gegluu"])
    assert done.exit_code == 2
    assert "unknown op 'gegluu'" in done.output


def test_ablation_switches_one_op_and_gives_a_wrong_one_no_ratio(tmp_path: Path, register: Register):
    reference = REGISTRY["group_norm_silu"].reference
    register("group_norm_silu", "same", wraps(reference)(lambda *a, **k: reference(*a, **k)))
    register("group_norm_silu", "wrong", wraps(reference)(lambda *a, **k: 1.5 * reference(*a, **k)))
    session = Session("vae", tmp_path / "r.jsonl", torch.device("cpu"), tiny=True, deadline=math.inf)
    with torch.no_grad():
        vae = autoencoder(TINY, "cpu")
        latents = torch.randn(1, 4, 8, 8)
        truth = vae.decode(latents)
        vae.to(torch.bfloat16)
        facts = ablation.ablate(session, vae, lambda: vae.decode(latents.bfloat16()), truth, budget_s=0.1)
    variants = facts["variants"]
    norms = sum(shape.count for shape in shapes("tiny-vae") if shape.op == "group_norm_silu")
    assert variants["reference"]["switched_sites"] == 0
    assert variants["group_norm_silu=same"]["switched_sites"] >= norms
    assert variants["group_norm_silu=same"]["gate"]
    assert not variants["group_norm_silu=wrong"]["gate"]
    assert variants["group_norm_silu=wrong"]["speedup"] is None
