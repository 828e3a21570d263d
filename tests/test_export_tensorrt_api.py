"""The calls `tensorrt` gets when a plan is built and run, against its recorded API: it needs a GPU even to build."""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from reference import recorded_tensorrt
from reference.recorded_tensorrt import Recorded

from stepfuse.engine.artifact import Graph, Manifest, Port, Profile, Range, sha256
from stepfuse.engine.errors import CheckpointError, DeviceError, RequestError
from stepfuse.engine.runtimes.tensorrt import Session, choose_profile
from stepfuse.export.plan import Attention, Target, build
from stepfuse.export.tensorrt import PlanOptions, build_plans, default_opset

WIDE = Profile("96x64", {"rows": Range(1, 2, 4), "width": Range(12, 12, 12), "steps": Range(1, 4, 4)})
GRAPH = Graph(
    component="unet",
    dtype="float16",
    file="unet/model.plan",
    inputs=(Port("sample", "float16", ("rows", 4, "8*width")), Port("timestep", "float32", ("steps",))),
    outputs=(Port("out_sample", "float16", ("rows", 4, "8*width")),),
    axes={"rows": (1, 4), "width": (8, 12), "steps": (1, 4)},
    profiles=(replace(WIDE, name="64x64", axes={**WIDE.axes, "width": Range(8, 8, 8)}), WIDE),
    traced={"rows": 2, "width": 9, "steps": 3},
    options={"flavour": "tensorrt", "sm": [90], "opset": 23},
)
HERE = Target(flavour="tensorrt", sms=())


def recorded(version: str = "11.4.0", attentions: list[tuple[int, ...]] | None = None) -> Recorded:
    trt = Recorded(version, attentions)
    trt.tensors = [("sample", True, "HALF"), ("timestep", True, "FLOAT"), ("out_sample", False, "HALF")]
    trt.profiles = 2
    return trt


def test_the_calls_of_a_build(tmp_path: Path) -> None:
    trt, seen = recorded(attentions=[(-1, 8, -1, 40), (-1, 8, -1, 512)]), []
    target = replace(HERE, workspace=3 * 2**30)
    found = build(trt, tmp_path / "model.onnx", tmp_path / "a.plan", GRAPH, target, lambda *given: seen.append(given))
    assert trt.said("create_network") == [(1 << trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED,)]
    assert trt.said("parse_from_file") == [(str(tmp_path / "model.onnx"),)]
    assert trt.said("set_memory_pool_limit") == [(trt.MemoryPoolType.WORKSPACE, 3 * 2**30)]
    assert trt.said("set_shape") == [
        ("sample", (1, 4, 64), (2, 4, 64), (4, 4, 64)),
        ("timestep", (1,), (4,), (4,)),
        ("sample", (1, 4, 96), (2, 4, 96), (4, 4, 96)),
        ("timestep", (1,), (4,), (4,)),
    ]
    assert found.attentions == (Attention("attention", 40, "float16"), Attention("attention", 512, "float16"))
    assert found.layers == {"ATTENTION_OUTPUT": 2}
    assert found.precisions == {"float16": 2}
    assert [layer.held.decomposable for layer in trt.layers] == [True, True]
    assert seen == [("Building engine", done, 2) for done in (0, 1, 2)]
    assert (tmp_path / "a.plan").read_bytes() == b"plan bytes"
    assert [file.name for file in tmp_path.iterdir()] == ["a.plan"]


def test_a_release_without_attention_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """10.13: nothing to free, and models are exported with the opset that has no attention node."""
    trt = recorded("10.13.3.9")
    assert build(trt, tmp_path / "model.onnx", tmp_path / "a.plan", GRAPH, HERE).attentions == ()
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    assert default_opset("tensorrt") == 21
    monkeypatch.setitem(sys.modules, "tensorrt", recorded(attentions=[]))
    assert default_opset("tensorrt") == 23


@pytest.mark.parametrize(
    ("broken", "kind", "message"),
    [
        (
            "parse_from_file",
            RequestError,
            "Attention 'node_7': No importer registered; export the model with --opset 21",
        ),
        ("add_optimization_profile", RequestError, "profile 64x64 is not possible"),
        ("build_serialized_network_to_stream", DeviceError, "could not build the plan: no implementation for node"),
    ],
)
def test_failures_are_told_in_its_own_words(broken: str, kind: type[Exception], message: str, tmp_path: Path) -> None:
    trt = recorded(attentions=[])
    trt.fail = {broken}
    with pytest.raises(kind, match=re.escape(message)):
        build(trt, tmp_path / "model.onnx", tmp_path / "a.plan", GRAPH, HERE)
    assert list(tmp_path.iterdir()) == []


def test_targets_it_cannot_have(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="--sm: tensorrt builds for the GPU it runs on only; leave --sm out"):
        build(recorded(), tmp_path / "model.onnx", tmp_path / "a.plan", GRAPH, replace(HERE, sms=(90,)))
    with pytest.raises(RequestError, match=r"inputs \['sample', 'timestep'\], not those of its manifest"):
        build(recorded(), tmp_path / "m.onnx", tmp_path / "a", replace(GRAPH, inputs=GRAPH.inputs[:1]), HERE)
    shared = Target(sms=(75, 86), fused_attention=True)
    assert Attention("", 40, "float16").unfused(shared.sms) == []
    assert Attention("", 40, "bfloat16").unfused(shared.sms) == [75]
    assert Attention("", 8, "float16").unfused(shared.sms) == [75, 86]
    assert Attention("", 40, "float32").unfused(shared.sms) == [75, 86]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to build for")
def test_tensorrt_needs_the_gpu_it_builds_for(onnx_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", recorded())
    with pytest.raises(DeviceError, match="tensorrt builds on the GPU it builds for, and there is none"):
        build_plans(onnx_folder, onnx_folder.parent / "plans", PlanOptions(target=HERE))
    assert not (onnx_folder.parent / "plans").exists()


@pytest.fixture
def onnx_folder(tmp_path: Path) -> Path:
    """An ONNX artefact of one node."""
    import onnx
    from onnx import helper

    folder = tmp_path / "onnx"
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "config.json").write_text("{}")
    ports = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT16, ["rows"]) for name in ("sample", "out")]
    graph = helper.make_graph([helper.make_node("Identity", ["sample"], ["out"])], "graph", ports[:1], ports[1:])
    onnx.save(helper.make_model(graph), folder / "unet" / "model.onnx")
    files = {f"unet/{name}": sha256(folder / "unet" / name) for name in ("model.onnx", "config.json")}
    model = replace(GRAPH, file="unet/model.onnx", options={"opset": 23})
    manifest(model, files, kind="onnx").save(folder)
    return folder


def manifest(graph: Graph, files: dict[str, str], kind: str = "tensorrt", version: str = "11.4.0") -> Manifest:
    return Manifest(
        kind=kind, architecture="sd", components={}, graphs={"unet": graph}, versions={"tensorrt": version}, files=files
    )


@pytest.fixture
def plans(tmp_path: Path) -> Path:
    folder = tmp_path / "plans"
    for place in (folder, folder / "unet"):
        place.mkdir(mode=0o700)
    (folder / "unet" / "model.plan").write_bytes(b"a plan")
    manifest(GRAPH, {"unet/model.plan": sha256(folder / "unet" / "model.plan")}).save(folder)
    return folder


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """TensorRT 11.4 on a GPU of SM 90, whose memory is the host's."""
    trt = recorded()
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: SimpleNamespace(cuda_stream=77))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    return trt


def test_the_calls_of_a_run(plans: Path, hopper: Recorded) -> None:
    session = Session(plans, "unet")
    assert hopper.said("deserialize_cuda_engine") == [(b"a plan",)]
    session.device = torch.device("cpu")
    sample = torch.zeros(4, 96, 3, dtype=torch.float32).permute(2, 0, 1)
    hopper.calls.clear()
    made = session.run({"sample": sample, "timestep": torch.ones(1)})["out_sample"]
    assert (made.shape, made.dtype) == ((3, 4, 96), torch.float16)
    names = [name for name, _ in hopper.calls]
    assert names == [
        "set_optimization_profile_async", *["set_input_shape"] * 2, *["set_tensor_address"] * 3, "execute_async_v3"
    ]  # fmt: skip
    assert hopper.said("set_optimization_profile_async") == [(1, 77)]
    assert hopper.said("set_input_shape") == [("sample", (3, 4, 96)), ("timestep", (1,))]
    addresses = dict(hopper.said("set_tensor_address"))
    assert addresses["out_sample"] == made.data_ptr()
    assert addresses["sample"] != sample.data_ptr(), "another type and layout: a copy"
    assert hopper.said("execute_async_v3") == [(77,)]
    session.run({"sample": sample, "timestep": torch.ones(1)})
    assert len(hopper.said("set_optimization_profile_async")) == 1, "the profile stays"
    hopper.fail = {"execute_async_v3"}
    with pytest.raises(DeviceError, match="failed at running the plan"):
        session.run({"sample": sample, "timestep": torch.ones(1)})


def test_sizes_between_profiles_are_refused() -> None:
    assert choose_profile(GRAPH, {"rows": 2, "width": 12, "steps": 1}) == 1
    with pytest.raises(RequestError, match=r"no profile for .*'width': 10.* width 8\.\.8.* width 12\.\.12"):
        choose_profile(GRAPH, {"rows": 2, "width": 10, "steps": 1})
    both = replace(GRAPH, profiles=(WIDE, WIDE))
    assert choose_profile(both, {"rows": 2, "width": 12, "steps": 1}, at=1) == 1


def test_plans_of_others_are_refused(plans: Path, hopper: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    hopper.fail = {"deserialize_cuda_engine"}
    with pytest.raises(CheckpointError, match=r"refuses the plan \(magicTag mismatch\)"):
        Session(plans, "unet")
    hopper.fail = set()
    for tensors, profiles in (
        (hopper.tensors[:2], 2),
        ([("sample", False, "HALF"), *hopper.tensors[1:]], 2),
        ([("sample", True, "BF16"), *hopper.tensors[1:]], 2),
        (hopper.tensors, 1),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(hopper, "tensors", tensors)
            patch.setattr(hopper, "profiles", profiles)
            with pytest.raises(CheckpointError, match="are not the manifest's"):
                Session(plans, "unet")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
    with pytest.raises(DeviceError, match="built for SM 90, the GPU is SM 89"):
        Session(plans, "unet")
    hopper.__version__ = "10.13.3.9"
    with pytest.raises(CheckpointError, match=r"built by tensorrt 11\.4\.0, installed is 10\.13\.3\.9; install"):
        Session(plans, "unet")
    assert len(hopper.said("deserialize_cuda_engine")) == 5, "the version and the GPU are compared before"


def test_the_recorded_api_is_that_of_the_package() -> None:
    """TensorRT-RTX shares it: every function, and the names of its arguments, are there."""
    trt = pytest.importorskip("tensorrt_rtx", reason="pip install tensorrt-rtx")
    theirs = {
        "Builder": trt.Builder, "Network": trt.INetworkDefinition, "OnnxParser": trt.OnnxParser,
        "Config": trt.IBuilderConfig, "Layer": trt.ILayer, "OptimizationProfile": trt.IOptimizationProfile,
        "Runtime": trt.Runtime, "CudaEngine": trt.ICudaEngine, "ExecutionContext": trt.IExecutionContext,
    }  # fmt: skip
    for name, real in theirs.items():
        for method, function in inspect.getmembers(getattr(recorded_tensorrt, name), inspect.isfunction):
            if method.startswith("__"):
                continue
            declared = getattr(real, method).__doc__ or ""
            for argument in list(inspect.signature(function).parameters)[1:]:
                assert re.search(rf"\b{argument}: ", declared), f"{name}.{method} has no argument {argument}"
    for name, members in recorded_tensorrt.ENUMS.items():
        assert set(members) - {"INT4"} <= set(getattr(trt, name).__members__), name
