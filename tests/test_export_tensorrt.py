"""Real TensorRT-RTX plans, built without a GPU: what is in their manifest, and what is refused."""

from __future__ import annotations

import os
import shutil
import stat
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import typer
from onnx import helper
from reference.exports import build_network
from typer.testing import CliRunner

from stepfuse.engine.artifact import MANIFEST, Graph, Manifest, Port, Profile, Range, sha256
from stepfuse.engine.errors import CheckpointError, DeviceError, MemoryBudgetError, RequestError
from stepfuse.engine.families import builtin_folder
from stepfuse.engine.runtimes.exported import FINAL_NORM
from stepfuse.engine.runtimes.tensorrt import Session, choose_profile, load_package
from stepfuse.export import plan, tensorrt
from stepfuse.export.folder import Options, export_onnx
from stepfuse.export.inspect import inspect
from stepfuse.export.plan import Target, build
from stepfuse.export.profiles import redeclare
from stepfuse.export.tensorrt import PlanOptions, build_plans, check_origin, estimate, require_memory
from stepfuse.export.tensorrt_cli import parse_sms
from stepfuse.export.tensorrt_cli import tensorrt as command
from stepfuse.export.verify import cases, runner

trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install tensorrt-rtx")

Invoke = Callable[..., str]
TEXT = Options(components=("text_encoder",), rows=(1, 2, 4), dtype="float16")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The text encoder of the built-in model as an ONNX artefact."""
    folder = tmp_path_factory.mktemp("tensorrt") / "onnx"
    export_onnx("shapes", folder, TEXT)
    return folder


@pytest.fixture(scope="module")
def built(model: Path) -> Path:
    """Plans of it."""
    return build_plans(model, model.parent / "plans", PlanOptions())


@pytest.fixture
def copied(built: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(built, tmp_path / "copy"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache nobody else uses."""
    monkeypatch.setenv("STEPFUSE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_plan_and_its_manifest(model: Path, built: Path) -> None:
    onnx_manifest, manifest = Manifest.load(model), Manifest.load(built)
    graph, options = manifest.graph("text_encoder"), manifest.graph("text_encoder").options
    assert manifest.kind == "tensorrt"
    assert manifest.versions["tensorrt_rtx"] == trt.__version__
    assert (graph.dtype, graph.tolerance) == ("float16", None)
    assert (options["flavour"], options["sm"]) == ("tensorrt_rtx", [86, 89, 120])
    assert options["onnx"] == sha256(model / "text_encoder" / "model.onnx")
    stored = ("model.safetensors", FINAL_NORM)
    assert options["weights"] == {file: sha256(model / "text_encoder" / file) for file in stored}
    assert options["attention"] == {"layers": 3, "head_dims": [32], "decomposed": 0}
    assert graph.inputs == onnx_manifest.graph("text_encoder").inputs
    assert [(p.name, p.axes["rows"].min, p.axes["rows"].max) for p in graph.profiles] == [("all", 1, 4)]
    assert graph.axes["rows"] == (1, 4), "more rows than a profile has are refused before the plan is asked"
    file = built / graph.file
    assert manifest.files[graph.file] == sha256(file)
    weights = (model / "text_encoder" / "model.safetensors").stat().st_size
    assert weights < file.stat().st_size < 10 * weights
    for folder in (built, file.parent):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert str(model.parent) not in (built / MANIFEST).read_text()
    assert {p.name for p in built.iterdir()} == {p.name for p in model.iterdir()} - {"model_index.json"}
    norm = f"text_encoder/{FINAL_NORM}"
    assert manifest.files[norm] == onnx_manifest.files[norm] == sha256(built / norm)
    assert set(onnx_manifest.beside) - set(manifest.beside) == {"model_index.json"}
    check_origin(built, model)


def test_the_plan_is_for_the_targets_asked_for(model: Path, built: Path, tmp_path: Path) -> None:
    """A plan for one GPU is another one, and smaller than one for three."""
    one = build_plans(model, tmp_path / "one", PlanOptions(target=Target(sms=(86,))))
    sizes = [(folder / "text_encoder" / "model.plan").stat().st_size for folder in (one, built)]
    assert sizes[0] < sizes[1]
    assert Manifest.load(one).graph("text_encoder").options["sm"] == [86]


def damage(folder: Path) -> None:
    file = folder / "text_encoder" / "model.plan"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def truncate(folder: Path) -> None:
    file = folder / "text_encoder" / "model.plan"
    file.write_bytes(file.read_bytes()[:-100])


def link(folder: Path) -> None:
    file = folder / "text_encoder" / "model.plan"
    file.rename(folder / "elsewhere")
    os.symlink(folder / "elsewhere", file)


def forget(folder: Path) -> None:
    replace(Manifest.load(folder), files={}).save(folder)


def open_to_all(folder: Path) -> None:
    (folder / "text_encoder").chmod(0o775)


def leave(folder: Path) -> None:
    manifest = Manifest.load(folder)
    graph = replace(manifest.graph("text_encoder"), file="../plan")
    replace(manifest, graphs={"text_encoder": graph}).save(folder)


def age(folder: Path) -> None:
    manifest = Manifest.load(folder)
    replace(manifest, versions={**manifest.versions, "tensorrt_rtx": "1.0.0"}).save(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (damage, "is not the file that was exported"),
        (truncate, "is not the file that was exported"),
        (link, "is a symlink: refused"),
        (forget, "has no hash of text_encoder/model.plan"),
        (open_to_all, "is not private .*mode 0775.*chmod 700"),
        (leave, "points outside the artefact"),
        (age, r"built by tensorrt_rtx 1\.0\.0, installed is "),
    ],
)
def test_plans_that_are_not_loaded(change: Callable[[Path], None], message: str, copied: Path) -> None:
    change(copied)
    with pytest.raises(CheckpointError, match=message):
        Session(copied, "text_encoder")


def test_an_untouched_plan_comes_as_far_as_the_gpu(copied: Path) -> None:
    with pytest.raises(DeviceError, match="plans run on CUDA devices; got cpu"):
        Session(copied, "text_encoder", "cpu")


def test_verifying_takes_the_sizes_of_the_profiles_and_needs_the_gpu(built: Path) -> None:
    manifest = Manifest.load(built)
    for name, graph in manifest.graphs.items():
        chosen = cases(graph)
        assert len(chosen) == 2 * len(graph.profiles)
        assert {choose_profile(graph, sizes) for sizes in chosen} == set(range(len(graph.profiles)))
        with pytest.raises(DeviceError, match="run this on the GPU"):
            runner(manifest, built, name)


def test_a_plan_of_another_model_is_told(model: Path, built: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(model, tmp_path / "other"))
    manifest = Manifest.load(other)
    replace(manifest, files={**manifest.files, "text_encoder/model.safetensors": "0" * 64}).save(other)
    with pytest.raises(CheckpointError, match="was built from another model"):
        check_origin(built, other)
    with pytest.raises(CheckpointError, match="is not the file that was exported"):
        build_plans(other, tmp_path / "plans", PlanOptions())
    assert not (tmp_path / "plans").exists()
    with pytest.raises(CheckpointError, match="holds tensorrt graphs"):
        build_plans(built, tmp_path / "plans", PlanOptions())
    with pytest.raises(CheckpointError, match="holds onnx graphs, not plans"):
        Session(model, "text_encoder")


@pytest.mark.parametrize("location", ["../text_encoder/model.safetensors", "/etc/hostname"])
def test_weights_outside_the_folder_are_refused(location: str, model: Path, tmp_path: Path) -> None:
    """Even where the hashes fit."""
    other = Path(shutil.copytree(model, tmp_path / "other"))
    path = other / "text_encoder" / "model.onnx"
    graph = onnx.load(str(path), load_external_data=False)
    entries = next(tensor for tensor in graph.graph.initializer if tensor.external_data).external_data
    next(entry for entry in entries if entry.key == "location").value = location
    path.write_bytes(graph.SerializeToString())
    manifest = Manifest.load(other)
    replace(manifest, files={**manifest.files, "text_encoder/model.onnx": sha256(path)}).save(other)
    with pytest.raises(CheckpointError, match="points outside the artefact"):
        build_plans(other, tmp_path / "plans", PlanOptions())


def test_plans_in_the_cache_are_built_once(model: Path, own_cache: Path) -> None:
    steps: list[tuple[str, str, int, int]] = []
    folder = build_plans(model, None, PlanOptions(), lambda *given: steps.append(given))
    assert folder.parent == own_cache / "plans"
    assert stat.S_IMODE(folder.parent.stat().st_mode) == stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {step[0] for step in steps} == {"text_encoder"}
    done = [(finished, of) for _, phase, finished, of in steps if phase == "Building engine"]
    assert done[0][0] == 0
    assert done[-1][0] == done[-1][1] > 0
    count = len(steps)
    assert build_plans(model, None, PlanOptions(), lambda *given: steps.append(given)) == folder
    assert len(steps) == count
    assert build_plans(model, None, PlanOptions(target=Target(sms=(86,)))) != folder
    damage(folder)
    with pytest.raises(CheckpointError, match="is not the file that was exported"):
        build_plans(model, None, PlanOptions())


def test_too_little_memory(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gib = 2**30
    assert estimate(2 * gib) == 7.5 * gib
    assert require_memory({"unet": 2**20}) == estimate(2**20), "this machine has that much"
    monkeypatch.setattr(tensorrt, "available_memory", lambda: gib // 4)
    message = r"text_encoder: .* takes about 0\.5 GiB of host memory .* 0\.2 GiB are free: .*--ignore-memory"
    with pytest.raises(MemoryBudgetError, match=message):
        build_plans(model, tmp_path / "plans", PlanOptions())
    assert not (tmp_path / "plans").exists()
    assert build_plans(model, tmp_path / "plans", PlanOptions(ignore_memory=True)).is_dir()


def test_memory_of_this_machine() -> None:
    assert 2**26 < tensorrt.available_memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_a_folder_that_is_in_use_is_left_alone(model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(RequestError, match="is not empty: give a new folder"):
        build_plans(model, tmp_path, PlanOptions())
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("sms", [(90,), (86, 100)])
def test_targets_tensorrt_rtx_does_not_have(sms: tuple[int, ...], model: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=rf"--sm: got {sms[-1]}, tensorrt_rtx .* has 75, 80, 86, 89, 120, 121"):
        build_plans(model, tmp_path / "plans", PlanOptions(target=Target(sms=sms)))


def test_missing_packages_name_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RequestError, match=r"needs tensorrt_rtx, .*: pip install tensorrt-rtx$"):
        load_package("tensorrt_rtx")
    with pytest.raises(RequestError, match=r"needs tensorrt, .*: pip install 'stepfuse\[tensorrt\]'$"):
        load_package("tensorrt")
    with pytest.raises(RequestError, match="--flavour: got 'tensorrt-rtx'; did you mean 'tensorrt_rtx'"):
        load_package("tensorrt-rtx")


def test_compute_capabilities() -> None:
    assert parse_sms("86, 8.9,SM120") == (86, 89, 120)
    for text in ("86,86", "", "ampere"):
        with pytest.raises(RequestError, match="expected different compute capabilities such as 86,89,120"):
            parse_sms(text)


@pytest.fixture
def invoke() -> Invoke:
    """Standard output and error of `stepfuse export tensorrt ARGUMENTS`; errors are raised."""
    app = typer.Typer()
    app.command()(command)

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return " ".join(result.output.split())

    return run


def test_the_command(model: Path, tmp_path: Path, invoke: Invoke) -> None:
    folder = tmp_path / "plans"
    said = invoke(str(model), "-o", str(folder), "--sm", "89", "--workspace", "256")
    assert "text_encoder: float16, SM 89, 1 profile(s)" in said
    assert "Built, not executed. On the target machine:" in said
    assert f"stepfuse export verify {folder} --model MODEL" in said
    assert Manifest.load(folder).graph("text_encoder").options["workspace"] == 256 * 2**20
    for given in (["--dtype", "fp16"], ["--variant", "fp16"], ["--download"]):
        with pytest.raises(RequestError, match="those of an ONNX artefact are fixed"):
            invoke(str(model), *given)


def test_profiles_of_an_artefact_are_declared_again(tmp_path: Path, invoke: Invoke) -> None:
    """Other resolutions and rows than the ONNX graph was exported for; what is not given stays."""
    onnx_folder, folder = tmp_path / "onnx", tmp_path / "plans"
    build_network("vae", tmp_path / "checkpoint")  # two levels: two pixels per latent
    options = Options(components=("vae_decoder",), shapes=((16, 16), (24, 16)), rows=(1, 2), dtype="float16")
    export_onnx(tmp_path / "checkpoint", onnx_folder, options)
    said = invoke(str(onnx_folder), "-o", str(folder), "--sm", "89", "--shapes", "32x16", "--rows", "3,5")
    assert "vae_decoder: float16, SM 89, 1 profile(s)" in said
    graph = Manifest.load(folder).graph("vae_decoder")
    assert graph.profiles == (
        Profile("32x16", {"rows": Range(3, 5, 5), "height": Range(8, 8, 8), "width": Range(16, 16, 16)}),
    )
    assert graph.axes == {"rows": (3, 5), "height": (8, 8), "width": (16, 16)}
    check_origin(folder, onnx_folder)
    own = Manifest.load(onnx_folder).graph("vae_decoder")
    assert redeclare("vae_decoder", own, (), ()) == own
    wide = redeclare("vae_decoder", own, (), (4,)).profiles
    assert [(p.name, p.axes["width"], p.axes["rows"]) for p in wide] == [
        ("16x16", Range(8, 8, 8), Range(4, 4, 4)), ("24x16", Range(12, 12, 12), Range(4, 4, 4))
    ]  # fmt: skip
    kept = redeclare("vae_decoder", own, ((18, 16),), ()).profiles
    assert [(p.axes["width"].opt, p.axes["rows"]) for p in kept] == [(9, Range(1, 2, 2))]
    with pytest.raises(
        RequestError, match=r"--shapes: vae_decoder got width 15, expected a multiple of 2 from 4 to 2048"
    ):
        build_plans(onnx_folder, tmp_path / "x", PlanOptions(shapes=((15, 16),)))
    with pytest.raises(RequestError, match=r"--rows: got \[65\], expected whole numbers from 1 to 64"):
        build_plans(onnx_folder, tmp_path / "x", PlanOptions(rows=(65,)))
    older = replace(own, options={})
    with pytest.raises(RequestError, match="does not say how many pixels a latent has; export the model again"):
        redeclare("vae_decoder", older, ((16, 16),), ())


def test_bfloat16_plans(tmp_path: Path, invoke: Invoke) -> None:
    """Built from a checkpoint; nothing here can run them, so that their ONNX graphs are not proved."""
    folder = tmp_path / "plans"
    arguments = ["shapes", "--components", "text_encoder", "--dtype", "bf16"]
    said = invoke(*arguments, "-o", str(folder), "--sm", "86,120", "--no-verify")
    assert "text_encoder: bfloat16, SM 86, 120, 1 profile(s)" in said
    graph = Manifest.load(folder).graph("text_encoder")
    assert (graph.dtype, graph.options["onnx_tolerance"]) == ("bfloat16", None)
    assert {port.dtype for port in graph.outputs} == {"bfloat16"}
    assert graph.options["attention"] == {"layers": 3, "head_dims": [32], "decomposed": 0}
    precisions = graph.options["precisions"]
    assert "float16" not in precisions
    assert precisions["bfloat16"] > 20 * precisions.get("float32", 0)
    stored = builtin_folder("shapes") / "text_encoder" / "model.safetensors"
    assert (folder / graph.file).stat().st_size > stored.stat().st_size
    with pytest.raises(RequestError, match="no bfloat16 on the CPU: verify a float32 export, and pass --no-verify"):
        invoke(*arguments, "-o", str(tmp_path / "x"))
    with pytest.raises(RequestError, match="--dtype: SM 75 cannot compute in bfloat16, which SM 80 and newer can"):
        invoke(*arguments, "-o", str(tmp_path / "x"), "--sm", "75,86")
    assert not (tmp_path / "x").exists()


def test_a_target_without_bfloat16_is_refused_before_the_build(model: Path, tmp_path: Path) -> None:
    """TensorRT-RTX 1.7.1 itself fails late, with the words of its compiler."""
    graph = replace(attention(tmp_path, 64), dtype="bfloat16")
    with pytest.raises(RequestError, match="--dtype: SM 75 cannot compute in bfloat16"):
        build(trt, tmp_path / "a.onnx", tmp_path / "a.plan", graph, Target(sms=(75, 86)))
    manifest = Manifest.load(model)
    other = Path(shutil.copytree(model, tmp_path / "other"))
    replace(manifest, graphs={"text_encoder": replace(manifest.graph("text_encoder"), dtype="bfloat16")}).save(other)
    with pytest.raises(RequestError, match="--dtype: SM 75 cannot compute in bfloat16"):
        build_plans(other, tmp_path / "plans", PlanOptions(target=Target(sms=(75,))))
    assert not (tmp_path / "plans").exists()


def test_inspecting_plans(built: Path, copied: Path) -> None:
    """The manifest's facts, the network before fusion; what only a GPU can tell is said to be missing."""
    found = inspect(built)
    (plans,) = found.graphs
    options, said = plans.graph.options, "\n".join(found.lines())
    assert found.as_json()["versions"]["tensorrt_rtx"] == trt.__version__
    assert plans.files == {"model.plan": (built / "text_encoder" / "model.plan").stat().st_size}
    assert plans.ops == options["layers"]
    assert plans.ops["MATRIX_MULTIPLY"] >= 3 * 6, "four projections and two of the MLP in each of three layers"
    assert plans.ops["ATTENTION_OUTPUT"] == options["attention"]["layers"] == 3
    assert options["precisions"]["float16"] > 50
    assert found.as_json()["graphs"][0]["profiles"][0]["axes"]["rows"] == {"min": 1, "opt": 4, "max": 4}
    for text in (
        "tensorrt_rtx, SM 86, 89, 120, ONNX opset 23",
        "all: rows 1..4",
        "attentions: 3, 0 without",
        "on a GPU",
    ):
        assert text in said
    (copied / "text_encoder" / "model.plan").unlink()
    with pytest.raises(CheckpointError, match=r"text_encoder/model\.plan of the artefact .* is missing"):
        inspect(copied)
    leave(copied)
    with pytest.raises(CheckpointError, match="points outside the artefact"):
        inspect(copied)


@pytest.mark.slow
def test_the_built_in_unet(tmp_path: Path, invoke: Invoke) -> None:
    """From the checkpoint: ONNX, its proof, and a plan with two profiles for three GPUs."""
    arguments = ["--shapes", "64x64,96x64", "--rows", "1,2,4", "--components", "unet", "--dtype", "fp16"]
    said = invoke("shapes", "-o", str(tmp_path / "plans"), "--sm", "86,89,120", *arguments)
    assert "unet: float16, SM 86, 89, 120, 2 profile(s)" in said
    assert said.endswith(f"stepfuse export verify {tmp_path / 'plans'} --model shapes")
    graph = Manifest.load(tmp_path / "plans").graph("unet")
    assert [profile.axes["width"].opt for profile in graph.profiles] == [8, 12]
    assert graph.axes["width"] == (8, 12)
    assert 0 < graph.options["onnx_tolerance"] < 0.02, "twice the error of torch in float16"
    assert graph.options["attention"] == {"layers": 8, "head_dims": [32, 40], "decomposed": 0}
    stored = builtin_folder("shapes") / "unet" / "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "plans" / graph.file).stat().st_size > stored.stat().st_size


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sdxl", "controlnet"])
def test_small_published_structures(name: str, tmp_path: Path) -> None:
    build_network(name, tmp_path / "checkpoint")
    shapes = {"shapes": ((128, 128),), "rows": (1, 2), "dtype": "float16"}
    export_onnx(tmp_path / "checkpoint", tmp_path / "onnx", Options(**shapes))
    folder = build_plans(tmp_path / "onnx", tmp_path / "plans", PlanOptions())
    manifest = Manifest.load(folder)
    assert set(manifest.graphs) == set(Manifest.load(tmp_path / "onnx").graphs)
    for graph in manifest.graphs.values():
        assert graph.dtype == "float16"
        assert graph.options["attention"]["layers"] > 0
        assert graph.options["opset"] == 23


def attention(folder: Path, head_dim: int) -> Graph:
    """A model that is one float16 attention."""
    names, shape = ("query", "key", "value", "out"), ["rows", 4, 64, head_dim]
    ports = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT16, shape) for name in names]
    graph = helper.make_graph([helper.make_node("Attention", names[:3], names[3:])], "graph", ports[:3], ports[3:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), folder / "a.onnx")
    listed = tuple(Port(name, "float16", ("rows", 4, 64, head_dim)) for name in names)
    return Graph(
        component="", dtype="float16", file="a.onnx", inputs=listed[:3], outputs=listed[3:], axes={"rows": (1, 2)},
        profiles=(Profile("all", {"rows": Range(1, 2, 2)}),), traced={"rows": 2},
    )  # fmt: skip


def test_attention_without_a_kernel_is_decomposed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked to have a kernel all the same, it is an error: ours, and TensorRT's where it knows better."""
    graph, target = attention(tmp_path, 8), Target(sms=(86, 120))
    (found,) = build(trt, tmp_path / "a.onnx", tmp_path / "a.plan", graph, target).attentions
    assert (found.head_dim, found.dtype, found.unfused(target.sms)) == (8, "float16", [86, 120])
    assert (tmp_path / "a.plan").stat().st_size > 10_000
    strict = replace(target, fused_attention=True)
    message = r"--fused-attention: a\.onnx has an attention of head dim 8 in float16, no kernel on SM 86, 120; expected"
    with pytest.raises(RequestError, match=message):
        build(trt, tmp_path / "a.onnx", tmp_path / "b.plan", graph, strict)
    wide = attention(tmp_path, 64)
    build(trt, tmp_path / "a.onnx", tmp_path / "c.plan", wide, strict)
    (tmp_path / "c.plan").unlink()
    graph = attention(tmp_path, 8)
    monkeypatch.setattr(plan, "FUSED_HEAD_DIMS", (8,))
    with pytest.raises(DeviceError, match=r"could not build the plan: .*Attention|could not build the plan: .*Myelin"):
        build(trt, tmp_path / "a.onnx", tmp_path / "b.plan", graph, strict)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.onnx", "a.plan"]
