"""The engine on exported networks: the same rows, samplers and guidance; what it refuses there, and why."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from reference.parity import error
from reference.random_weights import normal
from reference.recorded_tensorrt import Recorded
from torch import Tensor

from stepfuse import Engine, Request, cli
from stepfuse.engine.artifact import MANIFEST, Manifest
from stepfuse.engine.calibration import identity
from stepfuse.engine.errors import CheckpointError, DeviceError, MemoryBudgetError, RequestError
from stepfuse.engine.runtimes.exported import FINAL_NORM, Denoiser, run_rows
from stepfuse.engine.runtimes.onnxruntime import Session, require_provider
from stepfuse.engine.runtimes.opened import Opened
from stepfuse.engine.runtimes.tensorrt import DTYPES

Seen = list[tuple[int, ...]]


@pytest.fixture(scope="module")
def own() -> Iterator[Engine]:
    with Engine.load("shapes", device="cpu") as engine:
        yield engine


@pytest.fixture(scope="module")
def exported(exported_shapes: Path) -> Iterator[Engine]:
    with Engine.load(exported_shapes, runtime="onnxruntime", device="cpu") as engine:
        yield engine


@pytest.fixture
def copied(exported_shapes: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(exported_shapes, tmp_path / "copy"))


def pixels(engine: Engine, **fields: Any) -> np.ndarray:
    return np.asarray(engine.generate("a red circle above a blue square", seed=3, **fields).images[0], dtype=float)


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"steps": 6}, id="guided, with the model's own defaults"),
        pytest.param({"steps": 4, "sampler": "euler_a", "guidance_scale": 1.0, "width": 72, "height": 80}, id="alone"),
        pytest.param({"steps": 3, "clip_skip": 2, "sampler": "dpmpp_2m"}, id="clip_skip"),
    ],
)
def test_the_same_image(own: Engine, exported: Engine, fields: dict[str, Any]) -> None:
    """Text encoder, denoiser and decoder are graphs; a size no profile has, since these graphs have free sizes."""
    images = [pixels(engine, **fields) for engine in (own, exported)]
    assert np.abs(images[0] - images[1]).max() <= 1  # of 255
    assert images[0].std() > 5
    other = pixels(exported, **fields | {"steps": fields["steps"] + 1})
    assert np.abs(images[1] - other).max() > 1, "the comparison would see another image"


def test_rows_of_all_kinds_share_a_batch_and_equal_themselves_alone(
    exported: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guided and unguided rows, two samplers, different numbers of steps."""
    requests = [
        Request(prompt="a red circle", seed=1, steps=3, sampler="ddim", output="latent"),
        Request(prompt="a blue square", seed=2, steps=4, sampler="euler_a", guidance_scale=1.0, output="latent"),
        Request(prompt="", seed=5, steps=3, sampler="dpmpp_2m", n=2, output="latent"),
    ]
    net, seen = exported.components.denoiser, []
    assert isinstance(net, Denoiser)
    run = net.session.run
    monkeypatch.setattr(net.session, "run", lambda inputs: seen.append(len(inputs["sample"])) or run(inputs))
    together = exported.generate(requests)
    assert seen == [7, 7, 7, 1], "model rows: two of each guided image, one of the other"
    seen.clear()
    for request, found in zip(requests, together, strict=True):
        assert error(found.latents, exported.generate(request).latents) <= 1e-5
    assert max(seen) == 4
    assert error(together[0].latents, together[1].latents) > 0.1


def test_what_it_says_about_itself(own: Engine, exported: Engine) -> None:
    said = exported.explain()
    assert "device cpu, runtime onnxruntime, denoiser float32, VAE float32" in said
    assert "onnx graph run by onnxruntime; its kernels were chosen by the export" in said
    assert "runner eager" in said
    assert "runtime torch" in own.explain()
    keys = [identity(engine.components) for engine in (own, exported)]
    assert {name for name in keys[0] if keys[0][name] != keys[1][name]} == {"runtime"}, "timings are not shared"
    with pytest.raises(RequestError, match="exported networks, whose weights are fixed: load the checkpoint with"):
        _ = exported.components.unet
    assert own.components.unet is own.components.denoiser


def test_memory_is_counted(exported_shapes: Path, exported: Engine) -> None:
    with Engine.load(exported_shapes, runtime="onnxruntime", device="cpu", memory_gb=0.003) as engine:
        assert engine.generate("a red circle", steps=1, width=24, height=24, output="latent").latents.shape[-1] == 3
        with pytest.raises(MemoryBudgetError):
            engine.submit("a red circle", steps=1, width=512, height=512)


def test_calibration_and_previews(exported_shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPFUSE_CACHE", str(tmp_path))
    with Engine.load(exported_shapes, runtime="onnxruntime", device="cpu", max_rows=2) as engine:
        engine.warmup(32, 32, calibrate=True, budget_s=0.01)
        assert "32 x 32: knee at" in engine.explain()
        events = list(engine.stream("a red circle", steps=2, width=32, height=32, preview_every=1))
    assert np.asarray(events[0].preview).shape == (1, 32, 32, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runner": "graph"}, "runner: got 'graph' with runtime='onnxruntime'; exported networks run op by op"),
        ({"runner": "compiled"}, "runner: got 'compiled'"),
        ({"transforms": ("fused_qkv",)}, "transforms: .* the weights of exported networks are fixed"),
        ({"kernels": "reference"}, "kernels: got 'reference' .*; the export chose the kernels"),
        ({"kernels": {"geglu": "reference"}}, "kernels: .*; the export chose the kernels"),
        ({"deterministic": True}, "deterministic: got True .*; nothing is promised of other runtimes"),
        ({"variant": "fp16"}, "variant: got 'fp16' .*; an artefact has one set of weights"),
        ({"dtype": "fp16"}, "dtype: got float16, the unet of .* is float32: leave it out, or export with another"),
        ({"vae_dtype": "bf16"}, "vae_dtype: got bfloat16, the vae_decoder of .* is float32"),
        ({"runtime": "onnx"}, "runtime: got 'onnx', did you mean 'onnxruntime'"),
    ],
)
def test_options_of_exported_networks(options: dict[str, Any], message: str, exported_shapes: Path) -> None:
    with pytest.raises(RequestError, match=message):
        Engine.load(exported_shapes, device="cpu", **{"runtime": "onnxruntime"} | options)


def test_options_that_are_honoured(exported_shapes: Path) -> None:
    options: dict[str, Any] = {"dtype": "fp32", "kernels": {"sampler_step": "reference"}, "runner": "eager"}
    Engine.load(exported_shapes, runtime="onnxruntime", device="cpu", **options).close()


def without_graph(folder: Path) -> None:
    manifest = Manifest.load(folder)
    graphs = {name: graph for name, graph in manifest.graphs.items() if name != "vae_decoder"}
    replace(manifest, graphs=graphs).save(folder)


def one_part(folder: Path) -> None:
    replace(Manifest.load(folder), architecture="").save(folder)


def flip(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)

    return change


def unlist_norm(folder: Path) -> None:
    manifest = Manifest.load(folder)
    files = {name: digest for name, digest in manifest.files.items() if not name.endswith(FINAL_NORM)}
    replace(manifest, files=files).save(folder)


def nothing(folder: Path) -> None:
    """As it was exported."""


@pytest.mark.parametrize(
    ("change", "runtime", "message"),
    [
        (nothing, "torch", "is an artefact of onnx graphs, .*: load it with runtime='onnxruntime', or give the check"),
        (nothing, "aoti", "holds onnx graphs: load it with runtime='onnxruntime', or .* stepfuse export aoti MODEL"),
        (nothing, "tensorrt", "stepfuse export tensorrt MODEL -o FOLDER --flavour tensorrt$"),
        (without_graph, "onnxruntime", "has no graph 'vae_decoder'.* export it, too"),
        (one_part, "onnxruntime", "one part of a checkpoint .* cannot be run yet"),
        (
            flip("scheduler/scheduler_config.json"),
            "onnxruntime",
            "scheduler_config.json .* is not the file that was ex",
        ),
        (flip("tokenizer/vocab.json"), "onnxruntime", "vocab.json .* is not the file that was exported"),
        (flip(f"text_encoder/{FINAL_NORM}"), "onnxruntime", "is not the file that was exported"),
        (unlist_norm, "onnxruntime", "has no text_encoder/final_layer_norm.safetensors: export the model again"),
    ],
)
def test_folders_that_are_not_loaded(change: Callable[[Path], None], runtime: str, message: str, copied: Path) -> None:
    change(copied)
    with pytest.raises(CheckpointError, match=message):
        Engine.load(copied, runtime=runtime, device="cpu")


def test_a_checkpoint_where_an_artefact_is_needed() -> None:
    message = (
        "shapes is no artefact, and runtime='onnxruntime' runs nothing else: stepfuse export onnx shapes -o FOLDER"
    )
    with pytest.raises(CheckpointError, match=message):
        Engine.load("shapes", runtime="onnxruntime", device="cpu")


@torch.inference_mode()
def test_any_number_of_rows(exported_shapes: Path) -> None:
    """A graph of 2 to 3 rows runs one row filled up, and seven in parts; results are those of every row alone."""
    net = Opened(exported_shapes, "onnxruntime").denoiser("cpu")
    sizes: Seen = []
    run, whole = net.session.run, net.session.graph
    net.session.run = lambda inputs: sizes.append(tuple(map(len, inputs.values()))) or run(inputs)  # type: ignore[method-assign]
    inputs: Mapping[str, Tensor] = {
        "sample": normal("x", 7, 8, 4, 5).float(), "timestep": torch.linspace(10, 900, 7),
        "encoder_hidden_states": normal("p", 7, 24, 128).float(),
    }  # fmt: skip
    truth = run(inputs)["out_sample"]
    net.session.graph = replace(whole, axes={**whole.axes, "rows": (2, 3)})
    assert error(run_rows(net.session, inputs)["out_sample"], truth) <= 1e-5
    assert sizes == [(3, 3, 3), (3, 3, 3), (2, 2, 2)]
    alone = run_rows(net.session, {name: value[4:5] for name, value in inputs.items()})["out_sample"]
    assert alone.shape[0] == 1
    assert error(alone, truth[4:5]) <= 1e-5
    assert sizes[-1] == (2, 2, 2)


def test_sizes_of_an_artefact_with_profiles_only(exported_shapes: Path) -> None:
    net = Opened(exported_shapes, "onnxruntime").denoiser("cpu")
    net.require_size(9, 13, 8)
    with pytest.raises(RequestError, match="size: got 16x64, this network runs 24x24 to 8192x8192"):
        net.require_size(8, 2, 8)
    net.session.only_profiles = True
    net.require_size(8, 12, 8)
    with pytest.raises(RequestError, match="size: got 64x96, this artefact was made for 64x64, 96x64: export it with"):
        net.require_size(12, 8, 8)


def test_operators_on_another_device_are_noticed(exported_shapes: Path) -> None:
    """As where the CUDA provider lacks kernels: onnxruntime itself would run them on the CPU without a word."""
    session = Session(exported_shapes, "vae_decoder")
    require_provider(session.session, "CPUExecutionProvider")
    with pytest.raises(DeviceError, match=r"CUDAExecutionProvider has no kernel .*Conv on CPUExecutionProvider"):
        require_provider(session.session, "CUDAExecutionProvider")


def test_devices_that_are_not_there(exported_shapes: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(DeviceError, match=r"onnxruntime has no CUDAExecutionProvider: .* pip install onnxruntime-gpu"):
        Session(exported_shapes, "vae_decoder", "cuda")


@pytest.fixture
def plans(copied: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The artefact with the manifest of plans, and TensorRT as its recorded API has it."""
    manifest = Manifest.load(copied)
    graphs = {
        name: replace(graph, options={"flavour": "tensorrt", "sm": [90]}) for name, graph in manifest.graphs.items()
    }
    replace(manifest, kind="tensorrt", graphs=graphs, versions={"tensorrt": "11.4.0"}).save(copied)
    for folder in (copied, *(copied / name for name in graphs)):
        folder.chmod(0o700)
    trt = Recorded("11.4.0")
    unet = graphs["unet"]
    trt.tensors = [(p.name, p in unet.inputs, DTYPES[p.dtype]) for p in (*unet.inputs, *unet.outputs)]
    trt.profiles = len(unet.profiles)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    return copied


def test_plans_need_their_device_and_their_package(plans: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeviceError, match="plans run on CUDA devices; got cpu"):
        Engine.load(plans, runtime="tensorrt", device="cpu")
    with pytest.raises(CheckpointError, match="are for runtime='tensorrt', got 'tensorrt_rtx': load them with that"):
        Engine.load(plans, runtime="tensorrt_rtx", device="cpu")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(RequestError, match=r"needs tensorrt, .*: pip install"):
        Engine.load(plans, runtime="tensorrt", device="cpu")
    (plans / MANIFEST).parent.chmod(0o755)
    with pytest.raises(CheckpointError, match="is not private"):
        Engine.load(plans, runtime="tensorrt", device="cpu")


def test_networks_of_plans(plans: Path, own: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same networks as of any other runtime, for the sizes of the profiles; no plan is executed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    net = Opened(plans, "tensorrt").denoiser("cuda")
    assert net.config == own.components.denoiser.config
    assert net.session.only_profiles
    with pytest.raises(RequestError, match="this artefact was made for 64x64, 96x64"):
        net.require_size(12, 8, 8)


def test_the_command(exported_shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["generate", "a red circle", "--model", str(exported_shapes), "--steps", "2", "--device", "cpu"]
    for runtime, code in (("onnxruntime", 0), ("aoti", 3)):
        monkeypatch.setattr(sys, "argv", ["stepfuse", *arguments, "--runtime", runtime, "-o", f"{runtime}.png"])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert int(ended.value.code or 0) == code
    assert Image.open(tmp_path / "onnxruntime.png").size == (64, 64)
    assert not (tmp_path / "aoti.png").exists()
