"""Dispatch and policy: what a site uses is fixed once, explicit choices never fall back silently."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_launch_configs import gpu as gpu_fixture
from test_launch_configs import line, on_gpu
from torch import nn

from stepfuse.engine.doctor import examine
from stepfuse.kernels import geglu, launch_configs, layer_norm
from stepfuse.kernels.dispatch import Dispatch, Site, record, resolve
from stepfuse.kernels.geglu.config import Config, heuristic
from stepfuse.kernels.launch import Options
from stepfuse.kernels.op import Call, UnsupportedCallError
from stepfuse.kernels.policy import choose, policy, reference_only


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act = Site(geglu)
        self.norm = Site(layer_norm)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.act(x), None, None, 1e-5)


@pytest.fixture
def doubled():
    """A second implementation of geglu, visibly different and for some widths only, beside the reference alone."""
    before = dict(geglu.implementations)
    for name in set(before) - {"reference"}:
        del geglu.implementations[name]
    reason = lambda call: None if call.tensors["x"].shape[-1] % 4 == 0 else "the width is no multiple of 4"  # noqa: E731
    geglu.implement("doubled", reason)(lambda x: 2 * geglu.reference(x))
    yield
    geglu.implementations.clear()
    geglu.implementations.update(before)


def test_auto_on_cpu_is_the_reference_even_where_something_else_fits(doubled: None) -> None:
    model = Block()
    calls = record(model, lambda: model(torch.randn(2, 8)))
    dispatch = resolve(model, "cpu", "auto", calls)
    assert {s.implementation for s in dispatch.sites.values()} == {"reference"}
    assert set(dispatch.sites) == {"act", "norm"}
    assert "geglu" in dispatch.explain()


def test_explicit_choice_is_bound_into_the_sites(doubled: None) -> None:
    model, x = Block(), torch.randn(2, 8)
    calls = record(model, lambda: model(x))
    resolve(model, "cpu", {"geglu": "doubled"}, calls).bind(model)
    assert torch.equal(model.act(x), 2 * geglu.reference(x))
    resolve(model, "cpu", "auto", calls).bind(model)
    assert torch.equal(model.act(x), geglu.reference(x))


def test_auto_takes_what_fits_on_another_device(doubled: None) -> None:
    fits, odd = Call("cuda", {"x": geglu.describe(torch.randn(2, 8)).tensors["x"]}, {}), torch.randn(2, 6)
    assert choose(geglu, fits, "auto").name == "doubled"
    assert choose(geglu, Call("cuda", geglu.describe(odd).tensors, {}), "auto").name == "reference"
    assert choose(geglu, Call("cuda", fits.tensors, {}, requires_grad=True), "auto").name == "reference"


def test_unsupported_explicit_choice_raises_with_the_reason(doubled: None) -> None:
    with pytest.raises(UnsupportedCallError, match="no multiple of 4"), policy({"geglu": "doubled"}):
        geglu(torch.randn(2, 6))
    with pytest.raises(UnsupportedCallError, match=r"no implementation 'fast'; valid: auto, .*doubled, .*reference"):
        resolve(Block(), "cpu", "fast")
    with pytest.raises(UnsupportedCallError, match="no op 'conv'"):
        resolve(Block(), "cpu", {"conv": "reference"})


def test_policy_holds_in_its_thread_only(doubled: None) -> None:
    x, seen = torch.randn(2, 8), []
    with policy("doubled"):
        worker = threading.Thread(target=lambda: seen.append(geglu(x)))
        worker.start()
        worker.join()
        assert torch.equal(geglu(x), 2 * geglu.reference(x))
        with reference_only():
            assert torch.equal(geglu(x), geglu.reference(x))
    assert torch.equal(seen[0], geglu.reference(x))


def test_an_implementation_with_another_signature_is_refused() -> None:
    with pytest.raises(TypeError, match="another signature"):
        geglu.implement("wrong", lambda call: None)(lambda x, extra: x)
    assert "wrong" not in geglu.implementations


gpu = gpu_fixture
TUNED = Config(8, 256, Options(4, 1))


def dispatch_of(gpu: Path, call: Call, *entries: launch_configs.Entry) -> Dispatch:
    """What a block on Some_GPU uses where its geglu makes `call`, and the record of geglu has `entries`."""
    if entries:
        launch_configs.write(gpu / "geglu-Some_GPU.json", "geglu", "Some_GPU", entries)
    norm = replace(layer_norm.describe(torch.empty(2, 4096, 1280, device="meta"), None, None, 1e-5), device="cuda")
    return resolve(Block(), "cuda", "auto", {"act": call, "norm": norm})


def test_a_measured_line_decides_and_is_the_reason(gpu: Path) -> None:
    call = on_gpu(2, 4096, 2560)
    entry = replace(line(call, "triton", TUNED, 8192, 1280), evidence={"workload": "a", "warm_s": 12.34e-6})
    dispatch = dispatch_of(gpu, call, entry)
    act, norm = dispatch.sites["act"], dispatch.sites["norm"]
    assert (act.implementation, act.measured) == ("triton", True)
    assert act.reason == "record, exact shape, measured 12.3 us"
    assert act.shape == "x 2x4096x2560 bfloat16"
    assert act.launch is not None
    assert act.launch.config == TUNED == launch_configs.launch_config("geglu", heuristic, 8192, 1280)
    assert (norm.implementation, norm.measured) == ("triton", False)
    assert norm.reason == "not in the record: first that fits"
    first, *table = dispatch.explain().splitlines()
    file = gpu / "geglu-Some_GPU.json"
    missing = "none for layer_norm: heuristics; run `python -m stepfuse.kernels.tune --ops layer_norm`"
    assert first == f"record for Some_GPU: {file}; {missing}"
    assert table[0].split()[:4] == ["geglu", "triton", "1", "sites"]
    launch = "block_m 8, block_n 256, num_warps 4, num_stages 1 (record, exact shape, measured 12.3 us)"
    assert f"x 2x4096x2560 bfloat16; {launch}; {act.reason} (measured: true)" in table[0]
    assert "num_stages 1 (heuristic); not in the record: first that fits (measured: false)" in table[1]


def test_a_near_line_that_was_never_timed_says_so(gpu: Path) -> None:
    entry = line(on_gpu(2, 1024, 2560), "reference", None, 2048, 1280)
    dispatch = dispatch_of(gpu, on_gpu(2, 4096, 2560), replace(entry, measured=False, evidence={"workload": "b: x"}))
    act = dispatch.sites["act"]
    assert (act.implementation, act.measured, act.launch) == ("reference", False, None)
    assert act.reason == "record, nearest shape (b: x), not measured"


def test_a_line_that_cannot_be_used_is_named(gpu: Path) -> None:
    call = on_gpu(2, 64, 640)
    gone = dispatch_of(gpu, call, line(call, "gone", None, 1, 1)).sites["act"]
    assert (gone.implementation, gone.measured) == ("triton", False)
    assert gone.reason == "the record's gone does not exist: first that fits"


def test_without_any_record_the_command_is_named(gpu: Path) -> None:
    explained = dispatch_of(gpu, on_gpu(2, 64, 640)).explain()
    assert explained.startswith("no record for Some_GPU: heuristics; run `python -m stepfuse.kernels.tune`\n")


def test_an_equal_shape_is_preferred_to_one_at_the_same_distance(gpu: Path) -> None:
    none, one = (line(on_gpu(rows, 64), name, None, 1, 1) for rows, name in ((0, "reference"), (1, "triton")))
    assert launch_configs.distance(none.shape, one.shape) == 0
    assert dispatch_of(gpu, on_gpu(1, 64), none, one).sites["act"].implementation == "triton"


def test_an_explicit_choice_is_launched_with_the_configuration_of_the_record(gpu: Path) -> None:
    call = on_gpu(2, 4096, 2560)
    dispatch_of(gpu, call, line(call, "reference", None, 0, 0), line(call, "triton", TUNED, 8192, 1280))
    forced = resolve(Block(), "cuda", {"geglu": "triton"}, {"act": call}).sites["act"]
    assert forced.reason == "chosen by the user"
    assert forced.launch is not None
    assert forced.launch.config == TUNED


def test_doctor_prints_what_the_record_says(gpu: Path) -> None:
    call = on_gpu(2, 4096, 2560)
    first = replace(line(call, "triton", TUNED, 8192, 1280), evidence={"workload": "a: x[1]", "warm_s": 1e-5})
    entries = first, replace(first, evidence={"workload": "b: x[2]", "warm_s": 1e-5})
    other = replace(line(call, "reference", None, 0, 0), measured=False)
    dispatch_of(gpu, call, *entries, other)
    records, *found = [finding for finding in examine() if finding.topic.startswith("record")]
    assert records.text.startswith(f"record for Some_GPU: {gpu / 'geglu-Some_GPU.json'}; none for add_layer_norm, ")
    assert [finding.text for finding in found] == [
        "geglu: triton, block_m 8, block_n 256, num_warps 4, num_stages 1; measured: true; a: x[1], b: x[2]",
        "geglu: reference; measured: false; unnamed",
    ]


def test_without_a_gpu_no_record_is_looked_up() -> None:
    model = Block()
    calls = record(model, lambda: model(torch.randn(2, 8)))
    first, *table = resolve(model, "cpu", "auto", calls).explain().splitlines()
    assert first == "no CUDA device: no record is used"
    assert all("CPU: the reference is the implementation (measured: false)" in row for row in table)
