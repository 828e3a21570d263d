"""The commands `stepfuse export ...`, the parity report, the runtime on top, and what all of them refuse."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import pytest
import torch
from diffusers import StableDiffusionPipeline
from reference.exports import invoke
from reference.parity import error, ours
from reference.random_weights import normal

from stepfuse.engine.artifact import MANIFEST, Manifest, Profile, Range, sha256
from stepfuse.engine.config import EngineConfig
from stepfuse.engine.errors import CheckpointError, RequestError
from stepfuse.engine.families import builtin_folder
from stepfuse.engine.loading import load_components
from stepfuse.engine.models.unet import Conditioning, UNet
from stepfuse.engine.models.vae import AutoencoderKL
from stepfuse.engine.runtimes.onnxruntime import Session
from stepfuse.engine.runtimes.opened import Opened
from stepfuse.engine.weights.checkpoint import Checkpoint
from stepfuse.export.spec import available, make_spec
from stepfuse.export.verify import cases, verify

LIMIT = 2e-5


@pytest.fixture(scope="session")
def artefact(exported_shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model as its users export it: all graphs, weights copied because they are stored in float16."""
    return Path(shutil.copytree(exported_shapes, tmp_path_factory.mktemp("export") / "shapes"))


@pytest.fixture
def copied(artefact: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(artefact, tmp_path / "copy"))


def test_the_folder_is_laid_out_as_diffusers_lays_it_out(artefact: Path) -> None:
    index = json.loads((artefact / "model_index.json").read_text())
    assert index["_class_name"] == "OnnxStableDiffusionPipeline"
    for name in ("unet", "vae_decoder", "vae_encoder", "text_encoder"):
        assert index[name] == ["diffusers", "OnnxRuntimeModel"]
        assert (artefact / name / "model.onnx").stat().st_size < 2**20, "the weights are beside the graph"
        assert (artefact / name / "config.json").is_file()
    assert (artefact / "tokenizer" / "vocab.json").is_file()
    assert (artefact / "scheduler" / "scheduler_config.json").is_file()


def test_the_manifest_says_what_was_made(artefact: Path) -> None:
    manifest = Manifest.load(artefact)
    unet = manifest.graph("unet")
    assert (manifest.kind, manifest.architecture, unet.dtype) == ("onnx", "sd", "float32")
    assert [profile.name for profile in unet.profiles] == ["64x64", "96x64"]
    wide = unet.profiles[1].axes
    assert (wide["width"].opt, wide["height"].opt, wide["rows"].min, wide["rows"].max) == (12, 8, 1, 4)
    assert wide["tokens"].opt == 24
    assert unet.options["weights"] == "copy"
    assert {name.split("/")[0] for name in manifest.files} > {*manifest.graphs, "tokenizer", "scheduler"}
    assert str(artefact) not in (artefact / MANIFEST).read_text()


def test_the_parity_report_of_the_built_in_model(artefact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Against the checkpoint, not the artefact's own weights; at two or more sizes that were not recorded."""
    assert invoke("verify", str(artefact), "--model", "shapes") == 0
    assert "| unet |" in capsys.readouterr().out
    found = json.loads((artefact / "parity.json").read_text())
    assert found["passed"]
    manifest = Manifest.load(artefact)
    for name, graph in manifest.graphs.items():
        lines = [line for line in found["lines"] if line["graph"] == name]
        sizes = {json.dumps(line["sizes"], sort_keys=True) for line in lines}
        assert len(sizes) >= 2
        assert json.dumps(dict(graph.traced), sort_keys=True) not in sizes
        assert {line["output"] for line in lines} == {port.name for port in graph.outputs}
        assert max(line["relative"] for line in lines) <= LIMIT
        assert graph.tolerance == LIMIT
    assert min(line["psnr"] for line in found["lines"] if line["psnr"] is not None) > 80
    assert "FAILED" not in (artefact / "parity.md").read_text()


def test_a_wrong_weight_fails_the_report(copied: Path) -> None:
    """A bias of the decoder is changed by a hundredth in the artefact; its hash is made to fit."""
    file = copied / "vae_decoder" / "model.safetensors"
    model = onnx.load(str(copied / "vae_decoder" / "model.onnx"), load_external_data=False)
    (tensor,) = (t for t in model.graph.initializer if t.name == "decoder.conv_out.bias")
    offset = next(int(entry.value) for entry in tensor.external_data if entry.key == "offset")
    data = bytearray(file.read_bytes())
    data[offset : offset + 4] = (
        (torch.frombuffer(data[offset : offset + 4], dtype=torch.float32) + 0.01).numpy().tobytes()
    )
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="is not the file that was exported"):
        verify(copied)
    manifest = Manifest.load(copied)
    name = "vae_decoder/model.safetensors"
    replace(manifest, files={**manifest.files, name: sha256(file)}).save(copied)
    assert invoke("verify", str(copied), "--model", "shapes") == 1
    lines = json.loads((copied / "parity.json").read_text())["lines"]
    assert {line["graph"] for line in lines if not line["passed"]} == {"vae_decoder"}
    assert "**FAILED**" in (copied / "parity.md").read_text()


def test_inspect(artefact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke("inspect", str(artefact), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["architecture"]) == ("onnx", "sd")
    assert set(found["versions"]) == {"stepfuse", "torch", "onnx", "onnxscript"}
    unet = {entry["graph"]: entry for entry in found["graphs"]}["unet"]
    assert unet["ops"]["Conv"] > 10
    assert unet["inputs"]["sample"] == ["float32", "rows", 8, "height", "width"]
    assert {name: (artefact / "unet" / name).stat().st_size for name in ("model.onnx", "model.safetensors")} == unet[
        "files"
    ]
    assert unet["profiles"][1] == {
        "name": "96x64",
        "axes": {
            "rows": {"min": 1, "opt": 4, "max": 4}, "steps": {"min": 1, "opt": 4, "max": 4},
            "height": {"min": 8, "opt": 8, "max": 8}, "width": {"min": 12, "opt": 12, "max": 12},
            "tokens": {"min": 1, "opt": 24, "max": 24},
        },
    }  # fmt: skip
    stored = builtin_folder("shapes") / "unet" / "diffusion_pytorch_model.safetensors"
    assert unet["weights"]["float32"] == pytest.approx(2 * stored.stat().st_size, rel=0.03)  # stored in float16
    assert invoke("inspect", str(artefact)) == 0
    said = capsys.readouterr().out
    assert "GroupNormalization" in said
    assert "96x64: height 8, rows 1..4, steps 1..4, tokens 1..24, width 12" in said


def shift_location(folder: Path, location: str) -> None:
    """Point one weight of the U-Net elsewhere."""
    path = folder / "unet" / "model.onnx"
    model = onnx.load(str(path), load_external_data=False)
    entries = next(t for t in model.graph.initializer if t.external_data).external_data
    next(entry for entry in entries if entry.key == "location").value = location
    path.write_bytes(model.SerializeToString())


@pytest.mark.parametrize("location", ["../unet/model.safetensors", "/etc/hostname"])
def test_weights_outside_the_folder_are_refused(location: str, copied: Path) -> None:
    shift_location(copied, location)
    assert invoke("inspect", str(copied)) == 3
    with pytest.raises(CheckpointError, match="not the file that was exported"):
        Session(copied, "unet")


def test_symlinked_weights_are_refused(copied: Path) -> None:
    file = copied / "unet" / "model.safetensors"
    file.rename(copied / "real")
    os.symlink(copied / "real", file)
    with pytest.raises(CheckpointError, match="is a symlink: refused"):
        Session(copied, "unet")
    assert invoke("inspect", str(copied)) == 3


@torch.inference_mode()
def test_the_built_in_model_against_diffusers(artefact: Path) -> None:
    """U-Net, decoder and text encoder as diffusers and transformers compute them in float64."""
    pipe = StableDiffusionPipeline.from_pretrained(builtin_folder("shapes"), dtype=torch.float64)
    ids = pipe.tokenizer(["a red circle", ""], padding="max_length", max_length=24, return_tensors="pt").input_ids
    hidden = Session(artefact, "text_encoder").run({"input_ids": ids})["last_hidden_state"]
    assert error(hidden.double(), pipe.text_encoder(ids).last_hidden_state) <= LIMIT
    given = {"sample": normal("x", 2, 8, 9, 14).float(), "timestep": torch.tensor([900.0, 30.0])}
    got = Session(artefact, "unet").run({**given, "encoder_hidden_states": hidden})["out_sample"]
    truth = pipe.unet(given["sample"].double(), given["timestep"], hidden.double()).sample
    assert error(got.double(), truth) <= LIMIT
    image = Session(artefact, "vae_decoder").run({"latent_sample": given["sample"]})["sample"]
    assert error(image.double(), pipe.vae.decode(given["sample"].double()).sample) <= LIMIT


@torch.inference_mode()
def test_rows_at_different_updates_as_in_our_own_unet(artefact: Path) -> None:
    net = ours(builtin_folder("shapes"), "unet", torch.float32)
    assert isinstance(net, UNet)
    session = Opened(artefact, "onnxruntime").denoiser("cpu")
    assert session.config == net.config
    assert session.dtype == torch.float32
    given = Conditioning(hidden=normal("p", 3, 24, 128).float())
    table = torch.tensor([[900.0, 500.0, 20.0]]).expand(3, -1)
    update, latents = torch.tensor([2, 0, 1]), normal("x", 3, 8, 9, 12).float()
    got = session(latents, session.prepare(given, table), update)
    assert error(got, net(latents, net.prepare(given, table), update)) <= LIMIT
    assert error(got, net(latents, net.prepare(given, table), torch.zeros(3, dtype=torch.int64))) > 1e-2


@torch.inference_mode()
def test_vae_and_text_encoder_as_in_our_own_pipeline(artefact: Path) -> None:
    parts = load_components("shapes", EngineConfig(device="cpu"))
    opened = Opened(artefact, "onnxruntime")
    own, session = parts.vae, opened.vae("cpu")
    assert isinstance(own, AutoencoderKL)
    latents, image = normal("z", 2, 8, 9, 12).float(), normal("i", 2, 3, 72, 96).float()
    assert error(session.decode(latents), own.decode(latents)) <= LIMIT
    assert error(session.encode(image).logvar, own.encode(image).logvar) <= LIMIT
    encoder = parts.text[0]
    exported = replace(encoder, model=opened.text_model("text_encoder", "cpu"))
    prompts = ("a red circle", "", "a blue square above a red circle")
    tokens = encoder.pack([chunk for prompt in prompts for chunk in encoder.chunks(prompt)])
    for skip in (None, 1, 2):
        assert error(exported.encode(tokens, skip).hidden, encoder.encode(tokens, skip).hidden) <= LIMIT
    with pytest.raises(RequestError, match="clip_skip"):
        exported.encode(tokens, 3)


def test_conditioning_that_does_not_fit_is_an_error(artefact: Path) -> None:
    session, table = Opened(artefact, "onnxruntime").denoiser("cpu"), torch.ones(1, 1)
    with pytest.raises(RequestError, match="encoder_hidden_states is needed"):
        session.prepare(Conditioning(), table)
    hidden = torch.zeros(1, 24, 128)
    with pytest.raises(RequestError, match="text_embeds is not taken"):
        session.prepare(Conditioning(hidden=hidden, pooled=hidden), table)
    with pytest.raises(RequestError, match="one length"):
        session.prepare(Conditioning(hidden=hidden, kv_len=torch.ones(1, dtype=torch.int32)), table)
    many = {"sample": torch.zeros(65, 8, 8, 8), "timestep": torch.ones(65), "encoder_hidden_states": hidden}
    with pytest.raises(RequestError, match="rows: got 65, this graph was exported for 1 to 64"):
        session.session.run(many | {"encoder_hidden_states": hidden.expand(65, -1, -1)})


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["onnx", "shapes", "-o", "x", "--dtype", "int8"], 2, "--dtype: got 'int8'"),
        (["onnx", "shapes", "-o", "x", "--opset", "17"], 2, "--opset: got 17, expected one of 23"),
        (["onnx", "shapes", "-o", "x", "--shapes", "64"], 2, "--shapes: got '64', expected WIDTHxHEIGHT"),
        (["onnx", "shapes", "-o", "x", "--shapes", "60x64"], 2, "expected a multiple of 8 from 24 to 8192"),
        (["onnx", "shapes", "-o", "x", "--shapes", "64x64", "--rows", "0"], 2, "--rows: got '0'"),
        (["onnx", "shapes", "-o", "x", "--shapes", "64x64", "--rows", "65"], 2, "expected whole numbers from 1 to 64"),
        (["onnx", "shapes", "-o", "x", "--rows", ""], 2, "--rows: got [], expected whole numbers from 1 to 64"),
        (["onnx", "shapes", "-o", "x", "--dtype", "bf16"], 2, "ONNX Runtime has no bfloat16 on the CPU"),
        (["onnx", "shapes", "-o", "x", "--components", "unett"], 2, "did you mean 'unet'"),
        (["onnx", "shapes", "-o", "x", "--shapes", "64x64", "--weights", "move"], 2, "expected copy or link"),
        (["onnx", "absent/folder/here", "-o", "x"], 3, "no checkpoint at absent/folder/here"),
        (["verify", "absent"], 3, "is no artefact"),
        (["inspect", "absent"], 3, "is no artefact"),
    ],
)
def test_errors_say_what_to_do(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert invoke(*arguments) == code
    said = " ".join(capsys.readouterr().err.split())
    assert message in said
    assert "Traceback" not in said
    assert not (tmp_path / "x").exists(), "nothing is written before everything is checked"


def test_missing_packages_name_the_command(monkeypatch: pytest.MonkeyPatch, artefact: Path, tmp_path: Path) -> None:
    from stepfuse.engine.runtimes import onnxruntime as runtime
    from stepfuse.export import onnx as exporter

    monkeypatch.setattr(exporter, "find_spec", lambda name: None)
    monkeypatch.setattr(runtime, "find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r"pip install 'stepfuse\[onnx\]'"):
        exporter.require_packages()
    with pytest.raises(RequestError, match=r"onnxruntime, which is not installed: pip install 'stepfuse\[onnx\]'"):
        Session(artefact, "unet")


def test_a_link_needs_the_dtype_of_the_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = invoke("onnx", "shapes", "-o", str(tmp_path / "x"), "--shapes", "64x64", "--weights", "link",
                  "--components", "text_encoder")  # fmt: skip
    assert code == 2
    assert "stored as F16, the graph needs F32: use copy, or export in the dtype" in " ".join(
        capsys.readouterr().err.split()
    )


def test_an_older_artefact_is_replaced(copied: Path) -> None:
    (copied / "parity.md").write_text("of the older one")
    arguments = ["shapes", "-o", str(copied), "--components", "text_encoder", "--dtype", "fp16", "--no-verify"]
    assert invoke("onnx", *arguments) == 0
    manifest = Manifest.load(copied)
    assert set(manifest.graphs) == {"text_encoder"}
    assert manifest.graph("text_encoder").dtype == "float16"
    assert not (copied / "unet" / "model.onnx").exists()
    assert not (copied / "parity.md").exists()
    manifest.check(copied)


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    assert invoke("onnx", "shapes", "-o", str(tmp_path), "--shapes", "64x64") == 2
    assert "neither empty nor an artefact" in " ".join(capsys.readouterr().err.split())
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.slow
def test_a_whole_update_as_one_graph(tmp_path: Path) -> None:
    """Denoiser, guidance and sampler step; noise is an input. Every state of the rows is within the tolerance."""
    arguments = ["shapes", "-o", str(tmp_path / "x"), "--shapes", "64x64", "--components", "update"]
    assert invoke("onnx", *arguments) == 0
    found = json.loads((tmp_path / "x" / "parity.json").read_text())
    assert {line["output"] for line in found["lines"]} == {
        "new_x", "new_base", "new_history", "next_model_input", "nonfinite"
    }  # fmt: skip


def test_cases_leave_out_the_recorded_sizes(artefact: Path) -> None:
    graphs = list(Manifest.load(artefact).graphs.values())
    for graph in list(graphs):
        same = {name: Range(size, size, size) for name, size in graph.traced.items()}
        graphs.append(replace(graph, profiles=(Profile("as recorded", same),)))
    for graph in graphs:
        chosen = cases(graph)
        assert len(chosen) >= 2
        assert not [sizes for sizes in chosen if {**sizes, "steps": 0} == {**graph.traced, "steps": 0}]
        for sizes in chosen:
            assert sizes.get("steps", sizes["rows"]) in (1, sizes["rows"])


def test_specs_of_a_pipeline_and_of_a_single_component() -> None:
    pipeline, alone = Checkpoint.open(builtin_folder("shapes")), Checkpoint.open(builtin_folder("shapes") / "unet")
    assert available(pipeline) == ["unet", "update", "vae_decoder", "vae_encoder", "text_encoder"]
    assert available(alone) == ["unet", "update"]
    assert make_spec(alone, "unet").inputs == make_spec(pipeline, "unet").inputs


def test_promoted_types() -> None:
    """concat and stack of two dtypes are valid ONNX and give torch's result."""
    from stepfuse.export.promote import TABLE

    class Mixed(torch.nn.Module):
        def forward(self, half: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
            return torch.concat([torch.concat([half, full], 1), torch.stack([full[:, 0], half[:, 0]], 1)], 1)

    half, full = torch.rand(2, 3).half(), torch.rand(2, 3)
    made: Any = torch.onnx.export(
        Mixed().eval(), (half, full), dynamo=True, custom_translation_table=TABLE, verbose=False
    )
    onnx.checker.check_model(onnx_ir.to_proto(made.model), full_check=True)
    got = made(half, full)[0]
    assert got.dtype == torch.float32
    assert torch.equal(got, Mixed()(half, full))
