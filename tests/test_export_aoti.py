"""AOT packages: what they compute, what they refuse to run, and the engine on top of them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference.exports import invoke
from reference.parity import error, ours
from reference.random_weights import normal, randomize
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from stepfuse.engine.artifact import Manifest, Range, sha256
from stepfuse.engine.config import EngineConfig
from stepfuse.engine.engine import Engine
from stepfuse.engine.errors import CheckpointError, DeviceError, RequestError
from stepfuse.engine.families import builtin_folder
from stepfuse.engine.loading import load_components
from stepfuse.engine.models.unet import Conditioning, UNet
from stepfuse.engine.models.vae import AutoencoderKL
from stepfuse.engine.runtimes.aoti import Session
from stepfuse.engine.runtimes.opened import Opened
from stepfuse.engine.weights.checkpoint import Checkpoint
from stepfuse.export.aoti import export_aoti
from stepfuse.export.aoti_package import bind, buckets, inputs_of, record_program, unbind
from stepfuse.export.folder import Options, load_network
from stepfuse.export.inspect import inspect
from stepfuse.export.spec import make_spec
from stepfuse.export.verify import verify

LIMIT = 2e-5
TINY = {
    "vocab_size": 99, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 12,
}  # fmt: skip
PACKAGE = "text_encoder/packages/all_rows2.pt2"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A text encoder of one layer in float64, and its artefact: one package, of two rows. It compiles in seconds."""
    net = CLIPTextModel(CLIPTextConfig(**TINY))
    randomize(net, "aoti")
    folder = tmp_path_factory.mktemp("aoti")
    net.save_pretrained(folder / "source")
    export_aoti(
        folder / "source", folder / "artefact", Options(components=("text_encoder",), rows=(2,)), fixed_rows=True
    )
    return net.double().eval(), folder / "artefact"


@pytest.fixture
def copied(tiny: tuple[nn.Module, Path], tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(tiny[1], tmp_path / "copy"))


def test_inspecting_packages(tiny: tuple[nn.Module, Path], copied: Path) -> None:
    """What they were compiled for, their profiles, the weights beside them; nothing of them is loaded."""
    net, folder = tiny
    found = inspect(folder)
    (contents,) = found.graphs
    assert (found.manifest.kind, contents.graph.dtype) == ("aoti", "float32")
    assert contents.tensors == len(net.state_dict())
    assert contents.weights == {"float32": sum(4 * value.numel() for value in net.state_dict().values())}
    package = "packages/all_rows2.pt2"
    assert contents.files[package] == (folder / "text_encoder" / package).stat().st_size
    inside = contents.packages["all_rows2"]
    assert 10_000 < inside["code_bytes"] < inside["bytes"] == contents.files[package]
    assert (inside["gpu_kernels"], inside["kernels"]) == (0, {})
    said = "\n".join(found.lines())
    for text in ("compiled for cpu, ", "all_rows2: rows 2", "package all_rows2:", f"torch {torch.__version__}"):
        assert text in said
    (copied / PACKAGE).write_bytes(b"PK, but no archive")
    with pytest.raises(CheckpointError, match="is no AOT package"):
        inspect(copied)
    (copied / PACKAGE).unlink()
    with pytest.raises(CheckpointError, match="is missing: copy the whole folder again"):
        inspect(copied)


@torch.inference_mode()
def test_a_package_against_float64(tiny: tuple[nn.Module, Path]) -> None:
    """At its own rows, filled up from one, and in parts of two, two and one; the last norm is the model's."""
    net, folder = tiny
    session = Session(folder, "text_encoder")
    ids = torch.arange(60).reshape(5, 12)
    for rows in (1, 2, 5):
        got = session.run({"input_ids": ids[:rows]})
        truth: Any = net(ids[:rows], output_hidden_states=True)
        assert got["last_hidden_state"].shape == (rows, 12, 16)
        assert error(got["last_hidden_state"].double(), truth.last_hidden_state) <= LIMIT
        assert error(got["hidden_states.1"].double(), truth.hidden_states[1]) <= LIMIT
    model = Opened(folder, "aoti").text_model("text_encoder", "cpu")
    own: Any = model(ids)
    assert error(model.final_layer_norm(own.hidden_states[-1]), own.last_hidden_state) <= LIMIT
    with pytest.raises(RequestError, match="expected"):
        session.run({"input_ids": ids[:, :11]})


def test_the_report_and_the_manifest(tiny: tuple[nn.Module, Path]) -> None:
    """Verified against the weights in the artefact; nothing of the weights is in the package."""
    folder = tiny[1]
    assert verify(folder).passed
    manifest = Manifest.load(folder)
    graph = manifest.graph("text_encoder")
    assert (manifest.kind, graph.dtype, graph.tolerance) == ("aoti", "float32", LIMIT)
    assert manifest.versions["torch"] == torch.__version__
    assert graph.options["target"]["device"] == "cpu"
    assert set(graph.options["packages"].values()) == {PACKAGE} < set(manifest.files)
    assert not [name for name in manifest.files if name.endswith(".cpp")]
    found = json.loads((folder / "parity.json").read_text())
    assert {line["graph"] for line in found["lines"]} == {"text_encoder"}
    assert str(folder) not in (folder / "stepfuse_artifact.json").read_text()


def changed(folder: Path, **fields: Any) -> None:
    """Rewrite the manifest with other fields."""
    replace(Manifest.load(folder), **fields).save(folder)


def retargeted(folder: Path, **values: Any) -> None:
    """Rewrite what the packages were compiled for."""
    manifest = Manifest.load(folder)
    graph = manifest.graph("text_encoder")
    options = {**graph.options, "target": {**graph.options["target"], **values}}
    changed(folder, graphs={"text_encoder": replace(graph, options=options)})


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def unlist(folder: Path) -> None:
    """A package that the manifest has no hash of."""
    files = dict(Manifest.load(folder).files)
    del files[PACKAGE]
    changed(folder, files=files)


def link(folder: Path) -> None:
    (folder / PACKAGE).rename(folder / "real.pt2")
    os.symlink(folder / "real.pt2", folder / PACKAGE)


def escape(folder: Path) -> None:
    """A package outside the artefact, with a hash that fits."""
    manifest = Manifest.load(folder)
    graph = manifest.graph("text_encoder")
    outside = folder.parent / "outside.pt2"
    shutil.copy(folder / PACKAGE, outside)
    options = {**graph.options, "packages": {"all_rows2": "../outside.pt2"}}
    files = {**manifest.files, "../outside.pt2": sha256(outside)}
    changed(folder, graphs={"text_encoder": replace(graph, options=options)}, files=files)


def lacking(folder: Path) -> None:
    """A weight that the package needs is not in the file."""
    manifest = Manifest.load(folder)
    graph = manifest.graph("text_encoder")
    names = dict(graph.options["constants"])
    names[next(iter(names))] = "absent"
    changed(folder, graphs={"text_encoder": replace(graph, options={**graph.options, "constants": names})})


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        (lambda folder: flip(folder / PACKAGE), CheckpointError, "all_rows2.pt2 .* is not the file that was exported"),
        (lambda folder: flip(folder / "text_encoder/model.safetensors"), CheckpointError, "is not the file that was"),
        (lambda folder: (folder / PACKAGE).unlink(), CheckpointError, "is missing"),
        (unlist, CheckpointError, "all_rows2.pt2 .* is not the file that was exported"),
        (link, CheckpointError, "is a symlink: refused"),
        (escape, CheckpointError, "points outside the artefact"),
        (lacking, CheckpointError, "lacks module.net"),
        (lambda folder: changed(folder, kind="onnx"), CheckpointError, "holds onnx graphs"),
        (lambda folder: changed(folder, versions={"torch": "2.11.0"}), DeviceError, "compiled with torch 2.11.0"),
        (lambda folder: retargeted(folder, device="cuda"), DeviceError, "compiled for cuda, not for cpu"),
        (lambda folder: retargeted(folder, machine="riscv64"), DeviceError, "compiled for machine riscv64"),
        (lambda folder: retargeted(folder, features=["avx9"]), DeviceError, "this processor lacks avx9"),
    ],
)
def test_what_is_not_run(
    copied: Path, damage: Callable[[Path], Any], kind: type[Exception], message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Nothing of a package is loaded once something does not fit."""
    if damage is not lacking:  # which only the loaded package can tell

        def load(*_: Any, **__: Any) -> None:
            raise AssertionError("the package was loaded")

        monkeypatch.setattr(torch._inductor, "aoti_load_package", load)
    damage(copied)
    with pytest.raises(kind, match=message):
        Session(copied, "text_encoder")


def test_buckets() -> None:
    spec = make_spec(Checkpoint.open(builtin_folder("shapes")), "unet")
    free = buckets(spec, ((64, 64), (96, 64)), (4, 1), fixed_rows=False)
    assert [bucket.name for bucket in free] == ["64x64", "96x64"]
    assert free[1].axes["width"] == Range(12, 12, 12)
    assert free[1].axes["tokens"] == Range(24, 24, 24)
    assert free[1].axes["rows"] == free[1].axes["steps"] == Range(1, 4, 4)
    fixed = buckets(spec, ((64, 64),), (4, 1), fixed_rows=True)
    assert [(bucket.name, bucket.axes["rows"].max) for bucket in fixed] == [("64x64_rows1", 1), ("64x64_rows4", 4)]


def test_the_kernels_of_a_package_are_those_that_were_asked_for() -> None:
    """Triton kernels need their device; what stays opaque to the compiler needs Python, which packages do not have."""
    checkpoint = Checkpoint.open(builtin_folder("shapes"))
    spec = make_spec(checkpoint, "unet")
    load_network(checkpoint, spec, torch.float32)
    (bucket,) = buckets(spec, ((64, 64),), (1,), fixed_rows=True)
    inputs = inputs_of(spec, bucket, torch.float32, torch.device("cpu"))
    chosen = set(bind(spec, inputs, "auto"))
    assert chosen > {"attention: reference", "geglu: reference", "group_norm_silu: reference"}
    assert all(name.endswith(": reference") for name in chosen)
    with pytest.raises(RequestError, match="Triton needs a CUDA device"):
        bind(spec, inputs, {"geglu": "triton"})
    site = next(
        module for module in spec.module.modules() if getattr(getattr(module, "op", None), "name", "") == "geglu"
    )
    site.bound = torch.ops.stepfuse.geglu
    with pytest.raises(RequestError, match="packages cannot run stepfuse::geglu without Python"):
        record_program(spec, bucket, inputs)
    unbind(spec)
    record_program(spec, bucket, inputs)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--device", "tpu"], 2, "--device: got 'tpu'"),
        (["--components", "update"], 2, "there is no AOT package of 'update'"),
        (["--shapes", "60x64"], 2, "expected a multiple of 8"),
        (["--dtype", "int8"], 2, "--dtype: got 'int8'"),
        (["--rows", "65"], 2, "expected whole numbers from 1 to 64"),
    ],
)
def test_errors_say_what_to_do(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert invoke("aoti", "shapes", "-o", str(tmp_path / "x"), "--shapes", "64x64", *arguments) == code
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "x").exists(), "nothing is written before everything is checked"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_packages_are_compiled_where_they_run(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="there is no CUDA device here"):
        export_aoti("shapes", tmp_path / "x", Options(shapes=((64, 64),)), device="cuda")


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model as its users compile it: a package per graph, of 1 to 4 rows."""
    folder = tmp_path_factory.mktemp("export") / "shapes"
    graphs = "unet,vae_decoder,vae_encoder,text_encoder"
    arguments = ["shapes", "-o", str(folder), "--shapes", "64x64", "--rows", "1,4", "--components", graphs]
    assert invoke("aoti", *arguments) == 0
    return folder


@pytest.mark.slow
@torch.inference_mode()
def test_the_built_in_denoiser_equals_eager(shapes: Path) -> None:
    """Rows at different updates; the error to float64 is at most twice that of eager torch, plus 1e-7."""
    truth, eager = (ours(builtin_folder("shapes"), "unet", dtype) for dtype in (torch.float64, torch.float32))
    assert isinstance(truth, UNet)
    assert isinstance(eager, UNet)
    session = Opened(shapes, "aoti").denoiser("cpu")
    assert session.config == eager.config
    for rows in (1, 3, 6):  # 6: in parts of four and two
        hidden, latents = normal("p", rows, 24, 128), normal("x", rows, 8, 8, 8)
        table = torch.tensor([[900.0, 500.0, 20.0]]).expand(rows, -1)
        update = torch.arange(rows) % 3
        wide = truth(latents, truth.prepare(Conditioning(hidden=hidden), table), update)
        single = Conditioning(hidden=hidden.float())
        got = session(latents.float(), session.prepare(single, table), update)
        own = eager(latents.float(), eager.prepare(single, table), update)
        assert error(got.double(), wide) <= 2 * error(own.double(), wide) + 1e-7
        assert error(got, own) <= LIMIT
        assert rows == 1 or error(got, eager(latents.float(), eager.prepare(single, table), update * 0)) > 1e-2
    one = {"sample": latents.float(), "encoder_hidden_states": hidden.float()}
    for_all = session.session.run({**one, "timestep": torch.tensor([500.0])})["out_sample"]
    each = session.session.run({**one, "timestep": torch.full((6,), 500.0)})["out_sample"]
    assert torch.equal(for_all, each)
    tall = {**one, "sample": torch.zeros(6, 8, 9, 8), "timestep": torch.ones(6)}
    with pytest.raises(RequestError, match="height: got 9, this graph was exported for 8 to 8"):
        session.session.run(tall)
    graph = session.session.graph
    session.session.graph = replace(graph, axes={**graph.axes, "height": (8, 12)})  # as if 64x96 had been declared, too
    with pytest.raises(RequestError, match=r"got height 9, tokens 24, width 8; .* height 8, tokens 24, width 8"):
        session.session.run(tall)


@pytest.mark.slow
def test_the_engine_makes_the_same_image_with_packages(shapes: Path) -> None:
    """Rows, samplers and guidance run unchanged on top; two requests of different samplers share the batch."""
    images = []
    for source, runtime in (("shapes", "torch"), (shapes, "aoti")):
        with Engine.load(source, runtime=runtime, device="cpu") as engine:
            assert f"runtime {runtime}" in engine.explain()
            jobs = [
                engine.submit("a red circle", seed=1, steps=4, sampler="ddim"),
                engine.submit("a blue square", seed=2, steps=3, sampler="euler_a", guidance_scale=1.0),
            ]
            images.append([np.asarray(job.result().images[0], dtype=float) for job in jobs])
            if runtime == "aoti":
                with pytest.raises(RequestError, match="got 96x64, this artefact was made for 64x64"):
                    engine.submit("a red circle", width=96)
    for own, other in zip(*images, strict=True):
        assert np.abs(own - other).max() <= 1  # of 255
        assert own.std() > 5


@pytest.mark.slow
@torch.inference_mode()
def test_the_built_in_autoencoder(shapes: Path) -> None:
    own, session = load_components("shapes", EngineConfig(device="cpu")).vae, Opened(shapes, "aoti").vae("cpu")
    assert isinstance(own, AutoencoderKL)
    latents, image = normal("z", 2, 8, 8, 8).float(), normal("i", 1, 3, 64, 64).float()
    assert error(session.decode(latents), own.decode(latents)) <= LIMIT
    assert error(session.encode(image).mean, own.encode(image).mean) <= LIMIT
    assert error(session.encode(image).logvar, own.encode(image).logvar) <= LIMIT
