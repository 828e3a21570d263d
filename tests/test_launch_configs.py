"""The record of kernels: exact, nearest, heuristic; what tuning would time, and how it chooses."""

from __future__ import annotations

import ast
import logging
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from stepfuse import kernels
from stepfuse.kernels import device, geglu, launch_configs, tune, workloads
from stepfuse.kernels.geglu.config import Config, heuristic
from stepfuse.kernels.launch import Options
from stepfuse.kernels.launch_configs import Entry, distance, launch_config, shape_of
from stepfuse.kernels.op import REGISTRY, Call, Implementation, Op
from stepfuse.kernels.policy import choose
from stepfuse.kernels.timing import summarize
from stepfuse.kernels.tune import Variant
from stepfuse.kernels.workloads import Workload

for _name in kernels.__all__:
    getattr(kernels, _name)
META = torch.device("meta")
WORKLOADS = workloads.read()


def on_gpu(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Call:
    return replace(geglu.describe(torch.empty(shape, device=META, dtype=dtype)), device="cuda")


def line(call: Call, implementation: str, config: Config | None, rows: int, columns: int) -> Entry:
    made = None if config is None else launch_configs.to_json(config)
    return Entry(shape_of(call), implementation, {"rows": rows, "columns": columns}, made, True, {})


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A machine with a GPU of a name that has no record yet; where its records are read from."""
    caches = (launch_configs.recorded, launch_configs._lookup, launch_configs._decide, launch_configs._warn)
    monkeypatch.setattr(device, "name", lambda: "Some_GPU")
    monkeypatch.setattr(launch_configs, "path", lambda op, name: tmp_path / f"{op}-{name}.json")
    for function in caches:
        function.cache_clear()
    yield tmp_path
    for function in caches:
        function.cache_clear()


def test_distance_is_of_logarithms_and_kinds_must_be_equal() -> None:
    a = shape_of(on_gpu(2, 64, 2560))
    assert distance(a, a) == 0
    assert distance(a, shape_of(on_gpu(4, 64, 1280))) == pytest.approx(math.sqrt(2) * math.log(2))
    assert distance(a, shape_of(on_gpu(2, 64, 2560, dtype=torch.float16))) == math.inf
    assert distance(a, shape_of(on_gpu(128, 2560))) == math.inf
    assert distance({"statistics": True}, {"statistics": False}) == math.inf
    assert distance({"rows": 0}, {"rows": 1}) == 0


def test_the_nearest_measured_shape_names_the_implementation(gpu: Path) -> None:
    small, large = on_gpu(2, 64, 640), on_gpu(2, 4096, 2560)
    entries = [line(small, "reference", None, 128, 320), line(large, "triton", None, 8192, 1280)]
    launch_configs.write(gpu / "geglu-Some_GPU.json", "geglu", "Some_GPU", entries)
    assert choose(geglu, small, "auto").name == "reference"
    assert choose(geglu, on_gpu(2, 128, 640), "auto").name == "reference"
    assert choose(geglu, on_gpu(2, 2048, 2560), "auto").name == "triton"
    assert choose(geglu, on_gpu(2, 64, 640, dtype=torch.float16), "auto").name == "triton"  # the first that fits
    assert choose(geglu, replace(large, requires_grad=True), "auto").name == "reference"
    assert choose(geglu, replace(large, device="cpu"), "auto").name == "reference"


def test_a_recorded_implementation_that_does_not_fit_or_exist_is_passed_over(gpu: Path) -> None:
    call = on_gpu(2, 64, 640)
    geglu.implement("picky", lambda call: "never")(lambda x: x)
    try:
        for name in ("picky", "gone"):
            launch_configs.recorded.cache_clear()
            launch_configs._lookup.cache_clear()
            launch_configs.write(gpu / "geglu-Some_GPU.json", "geglu", "Some_GPU", [line(call, name, None, 1, 1)])
            assert choose(geglu, call, "auto").name == "triton"
    finally:
        del geglu.implementations["picky"]


def test_launch_configurations_exact_nearest_heuristic(gpu: Path) -> None:
    exact, other = Config(8, 256, Options(4, 1)), Config(3, 128, Options(2, 1))
    call = on_gpu(2, 4096, 2560)
    entries = [line(call, "triton", exact, 8192, 1280), line(call, "triton", other, 16, 40)]
    launch_configs.write(gpu / "geglu-Some_GPU.json", "geglu", "Some_GPU", entries)
    assert launch_config("geglu", heuristic, 8192, 1280) == exact
    assert launch_config("geglu", heuristic, 9000, columns=1280) == exact != heuristic(9000, 1280)
    assert launch_config("geglu", heuristic, 16, 40) == other
    assert launch_config("geglu", heuristic, 17, 40) == heuristic(17, 40), "not in the search space of that shape"


def test_without_a_record_one_warning_names_the_command(gpu: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "stepfuse.kernels"):
        for rows in (1, 2):
            assert launch_config("geglu", heuristic, rows, 64) == heuristic(rows, 64)
        assert choose(geglu, on_gpu(2, 64), "auto").name == "triton"
        launch_config("layer_norm", heuristic, 4, 64)
    assert [record.getMessage() for record in caplog.records] == [
        "kernels were not measured on Some_GPU, heuristics choose: run `python -m stepfuse.kernels.tune`"
    ]


class Taken(Exception):
    """A launcher reads the configuration it was given."""


class Marked:
    def __getattr__(self, field: str) -> None:
        raise Taken(field)


LAUNCHES = [
    pytest.param(op, made, workload, id=f"{name}-{made.name}-{workload.name}")
    for name, op in REGISTRY.items()
    for made in op.implementations.values()
    for workload in WORKLOADS[name]
    if made.name.startswith("triton") and made.unsupported(tune.describe(op, workload)) is None
]


@pytest.mark.parametrize(("op", "made", "workload"), LAUNCHES)
def test_a_triton_launch_asks_for_its_configuration_and_takes_it(
    op: Op, made: Implementation, workload: Workload
) -> None:
    launch = partial(made.call, **workload.tensors(META))
    asked = launch_configs.probe(launch)
    assert asked is not None, "the launcher does not call launch_config"
    assert asked.op == op.name
    assert asked.heuristic(**asked.sizes) == launch_configs.launch_of(made.call, tune.describe(op, workload)).config
    with launch_configs.forced({op.name: Marked()}), pytest.raises(Taken):
        launch()


def test_every_op_with_kernels_has_such_a_launch() -> None:
    with_kernels = {file.parent.name for file in launch_configs.ROOT.glob("*/kernel.py")}
    assert with_kernels == {param.values[0].name for param in LAUNCHES} == set(kernels.__all__)


def test_launchers_leave_heuristics_to_the_record() -> None:
    """Only a configuration's own file and the list of what to compile call `heuristic`."""
    found = []
    for file in launch_configs.ROOT.rglob("*.py"):
        for function in ast.walk(ast.parse(file.read_text())):
            if isinstance(function, ast.FunctionDef) and not re.search(
                "compilations?$|search_space|_decide", function.name
            ):
                found += [f"{file.name}: {function.name}" for node in ast.walk(function) if _calls_heuristic(node)]
    assert found == ["tune.py: variants"]


def _calls_heuristic(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "heuristic"


def test_a_forced_configuration_is_taken_by_its_op_only() -> None:
    config = Config(2, 64)
    with launch_configs.forced({"geglu": config}):
        assert launch_config("geglu", heuristic, 5, 5) is config
        assert launch_config("other", heuristic, 5, 5) == heuristic(5, 5)
    assert launch_config("geglu", heuristic, 5, 5) == heuristic(5, 5)


def test_records_read_back_and_a_broken_one_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "geglu" / "configs" / "X.json"
    assert launch_configs.read(file) == ()
    entries = (line(on_gpu(2, 64, 640), "triton", heuristic(128, 320), 128, 320),)
    launch_configs.write(file, "geglu", "X", entries)
    assert launch_configs.read(file) == entries
    assert launch_configs.from_json(entries[0].config or {}, heuristic) == heuristic(128, 320)
    file.write_text(file.read_text().replace('"measured"', '"mesured"'))
    with pytest.raises(ValueError, match=r"X\.json is not a record"):
        launch_configs.read(file)


def test_committed_records_name_what_there_is() -> None:
    for file in launch_configs.ROOT.glob("*/configs/*.json"):
        op = REGISTRY[file.parent.parent.name]
        for entry in launch_configs.read(file):
            assert entry.implementation in op.implementations, file
            assert isinstance(entry.measured, bool)
            assert not entry.measured or entry.evidence["warm_s"] > 0


def test_every_op_has_workloads_that_its_reference_takes() -> None:
    assert set(WORKLOADS) == set(kernels.__all__)
    for name, of_op in WORKLOADS.items():
        op = REGISTRY[name]
        for workload in of_op:
            op.reference(**workload.tensors(META))
            call = tune.describe(op, workload)
            fused = [made for made in op.implementations.values() if made.name != "reference"]
            assert any(made.unsupported(call) is None for made in fused), workload


def workload(op: str, name: str) -> Workload:
    return next(w for w in WORKLOADS[op] if w.name == name)


def test_variants_are_the_search_space_of_the_launch_that_would_be_made() -> None:
    found = tune.variants(geglu, workload("geglu", "sdxl: x[2,1024,10240]"))
    assert [v.implementation for v in found[:2]] == ["reference", "triton"]
    configs = [v.config for v in found[1:]]
    assert found[1].sizes == {"rows": 2048, "columns": 5120}
    assert configs[0] == heuristic(2048, 5120)
    assert len(configs) == len(set(configs)) > 10
    assert [v.is_heuristic for v in found].count(True) == 2


def test_only_a_clear_gain_replaces_the_heuristic() -> None:
    found = [
        Variant("reference", is_heuristic=True),
        Variant("triton", Config(), {}, True),
        Variant("triton", Config(2)),
    ]

    def times(*seconds: float) -> dict[str, object]:
        names = ("0", "0 again", "1", "1 again", "2")
        return {n: summarize([s], 1, "graph") for n, s in zip(names, seconds, strict=True)}

    assert tune.choose(found, times(9, 9, 5, 5.1, 4))[0] == 2
    assert tune.choose(found, times(9, 9, 5, 5.1, 4.9))[0] == 1, "2 % is within twice the spread of 2 %"
    assert tune.choose(found, times(3, 3, 5, 5.1, 4))[0] == 0
    assert tune.choose(found, times(3, 3, 5, 5.1, 4))[1] == 0
    assert tune.choose(found, times(9, 9, 5, 5.1, 4))[1] == pytest.approx(0.02)


def test_what_is_wrong_is_not_timed() -> None:
    x = torch.randn(3, 40).bfloat16()
    geglu.implement("wrong", lambda call: None)(lambda x: 1.02 * geglu.reference(x))
    geglu.implement("nan", lambda call: None)(lambda x: geglu.reference(x) * math.nan)
    try:
        assert tune.agrees(geglu, Variant("reference"), {"x": x})
        assert not tune.agrees(geglu, Variant("wrong"), {"x": x})
        assert not tune.agrees(geglu, Variant("nan"), {"x": x})
    finally:
        del geglu.implementations["wrong"], geglu.implementations["nan"]


def test_dry_run_lists_and_writes_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert tune.main(["--ops", "geglu", "guidance_stats", "--dry-run", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(WORKLOADS["geglu"]) + len(WORKLOADS["guidance_stats"])
    assert "geglu: sd15: x[2,4096,2560]: reference, triton (22 configurations)" in lines
    assert tune.main(["--ops", "geglu", "--models", "sdxl", "sdxl-vae", "--dry-run", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("geglu: sdxl: x[2,") == 2
    assert list(tmp_path.iterdir()) == []


def test_unknown_ops_and_a_missing_gpu_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tune.main(["--ops", "conv"])
    assert "no op conv; valid: add_layer_norm" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tune.main(["--models", "sd9", "--dry-run"])
    assert "no calls of model sd9" in capsys.readouterr().err
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            tune.main(["--ops", "geglu"])
        assert "needs a CUDA device" in capsys.readouterr().err


@pytest.mark.interpret
def test_kernels_run_under_every_forced_configuration() -> None:
    x = torch.randn(3, 5, 34)
    for config in (Config(1, 16), Config(4, 32), Config(8, 8)):
        result = Variant("triton", config).run(geglu, {"x": x})
        torch.testing.assert_close(result, geglu.reference(x), rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tuning_times_and_writes_a_record(tmp_path: Path) -> None:
    assert tune.main(["--ops", "guidance_stats", "--budget", "0.05", "--out", str(tmp_path)]) == 0
    entries = launch_configs.read(launch_configs.path("guidance_stats", device.name(), tmp_path))
    assert len(entries) == len(WORKLOADS["guidance_stats"])
    assert all(entry.measured and 0 < entry.evidence["warm_s"] < 1e-3 for entry in entries)
