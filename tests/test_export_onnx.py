"""ONNX exports against diffusers and transformers in float64, at sizes they were not recorded at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import onnx
import onnx.inliner
import onnxruntime
import pytest
import torch
from reference.exports import NETWORKS, build_network, build_pipeline, build_refiner, build_upscaler
from reference.parity import error
from reference.random_weights import normal, randomize
from torch import Tensor, nn

from stepfuse.engine.artifact import Manifest
from stepfuse.export.folder import Options, export_onnx

LIMIT = 2e-5  # of the largest value, float32
SHAPES = ((128, 128),)
PIPELINES = {"pipeline": build_pipeline, "refiner": build_refiner, "upscaler": build_upscaler}
Exports = Callable[..., tuple[Any, Path]]


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """(name, graphs, options) -> the reference and the folder of its export; names are of NETWORKS or PIPELINES."""
    sources: dict[str, tuple[Any, Path]] = {}
    made: dict[Any, Path] = {}

    def get(name: str, *graphs: str, **options: Any) -> tuple[Any, Path]:
        if name not in sources:
            folder = tmp_path_factory.mktemp(name)
            sources[name] = (PIPELINES[name](folder) if name in PIPELINES else build_network(name, folder), folder)
        key = (name, graphs, *sorted(options.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("export") / "artefact"
            export_onnx(sources[name][1], made[key], Options(components=graphs, shapes=SHAPES, **options))
        return sources[name][0], made[key]

    return get


def run(folder: Path, graph: str, **inputs: Tensor) -> list[Tensor]:
    """The outputs of a graph in ONNX Runtime alone: what a user without this package gets."""
    session = onnxruntime.InferenceSession(str(folder / graph / "model.onnx"), providers=["CPUExecutionProvider"])
    kinds = {port.name: port.type for port in session.get_inputs()}
    names = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16, "tensor(int32)": torch.int32}
    given = {name: value.to(names.get(kinds[name], value.dtype)).numpy() for name, value in inputs.items()}
    return [torch.from_numpy(value) for value in session.run(None, given)]


def latents(rows: int, channels: int, size: tuple[int, int]) -> Tensor:
    return normal(f"x{rows}{size}", rows, channels, *size).half().double()


def prompt(rows: int, width: int, length: int = 5) -> Tensor:
    return normal(f"prompt{rows}", rows, length, width).half().double()


def times(rows: int) -> Tensor:
    return torch.tensor([981.0, 250.5, 3.0])[:rows]


SIZES = [(1, (9, 13)), (3, (20, 6))]  # recorded at two rows of 16 x 24


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "size"), SIZES)
@torch.inference_mode()
def test_sd15_unet(rows: int, size: tuple[int, int], exports: Exports) -> None:
    pipe, folder = exports("pipeline")
    sample, hidden = latents(rows, 4, size), prompt(rows, 32)
    (got,) = run(folder, "unet", sample=sample, timestep=times(rows), encoder_hidden_states=hidden)
    truth = pipe.unet.double()(sample, times(rows), hidden).sample
    assert error(got.double(), truth) <= LIMIT
    (shared,) = run(folder, "unet", sample=sample, timestep=times(1), encoder_hidden_states=hidden)
    assert error(shared.double(), pipe.unet(sample, times(1), hidden).sample) <= LIMIT
    pipe.unet.float()


@pytest.mark.parametrize(("rows", "size"), SIZES)
@pytest.mark.parametrize("source", ["vae", pytest.param("pipeline", marks=pytest.mark.slow)])
@torch.inference_mode()
def test_vae(source: str, rows: int, size: tuple[int, int], exports: Exports) -> None:
    """Two levels, linked weights; four levels, copied ones."""
    if source == "vae":
        truth, folder = exports("vae", "vae_decoder", "vae_encoder", where="link")
    else:
        pipe, folder = exports("pipeline")
        truth = pipe.vae.double()
    factor = 2 ** (len(truth.config.block_out_channels) - 1)
    z, image = latents(rows, 4, size), latents(rows, 3, (factor * size[0], factor * size[1]))
    (got,) = run(folder, "vae_decoder", latent_sample=z)
    moments = run(folder, "vae_encoder", sample=image)[0].double()
    assert error(got.double(), truth.decode(z).sample) <= LIMIT
    expected = truth.encode(image).latent_dist
    assert error(moments, torch.cat([expected.mean, expected.logvar], 1)) <= LIMIT


def check_text(model: nn.Module, found: list[Tensor], names: list[str], ids: Tensor) -> None:
    """Every output against transformers."""
    expected = model(ids, output_hidden_states=True)
    for name, got in zip(names, found, strict=True):
        kind, _, index = name.partition(".")
        truth = expected[kind] if not index else expected[kind][int(index)]
        assert error(got.double(), truth) <= LIMIT, name


@pytest.mark.slow
@torch.inference_mode()
def test_clip_text_model(exports: Exports) -> None:
    pipe, folder = exports("pipeline")
    texts = ["a photo of a cat", "", "to the cat"]
    ids = pipe.tokenizer(texts, padding="max_length", max_length=77, return_tensors="pt").input_ids
    names = ["last_hidden_state", "pooler_output", *(f"hidden_states.{i}" for i in range(6))]
    check_text(pipe.text_encoder.double(), run(folder, "text_encoder", input_ids=ids), names, ids)
    pipe.text_encoder.float()


@torch.inference_mode()
def test_clip_text_model_with_projection(exports: Exports) -> None:
    model, folder = exports("text_projection")
    ids = torch.randint(0, 500, (3, 77), generator=torch.Generator().manual_seed(1))
    ids[:, -1] = model.config.vocab_size - 1
    names = ["text_embeds", "last_hidden_state", *(f"hidden_states.{i}" for i in range(6))]
    check_text(model, run(folder, "text_encoder", input_ids=ids), names, ids)


def sdxl_inputs(rows: int, size: tuple[int, int]) -> dict[str, Tensor]:
    ids = (normal("ids", rows, 6) * 100).round().abs()
    pooled = normal("pooled", rows, 32).half().double()
    return {"sample": latents(rows, 4, size), "timestep": times(rows), "encoder_hidden_states": prompt(rows, 64),
            "text_embeds": pooled, "time_ids": ids}  # fmt: skip


def sdxl(module: Any, given: dict[str, Tensor]) -> Tensor:
    added = {"text_embeds": given["text_embeds"], "time_ids": given["time_ids"]}
    return module(*list(given.values())[:3], added_cond_kwargs=added).sample


@pytest.mark.slow
@torch.inference_mode()
def test_sdxl_unet(exports: Exports) -> None:
    module, folder = exports("sdxl", "unet")
    for rows, size in SIZES:
        given = sdxl_inputs(rows, size)
        assert error(run(folder, "unet", **given)[0].double(), sdxl(module, given)) <= LIMIT


@torch.inference_mode()
def test_sdxl_unet_in_float16_is_as_good_as_torch(exports: Exports) -> None:
    """Twice the error that torch has in the same dtype, plus 1e-7; the size ids keep the graph's types apart."""
    module, folder = exports("sdxl", "unet", dtype="float16")
    given = sdxl_inputs(3, (9, 13))
    truth = sdxl(module, given)
    half = {name: value if name in ("timestep", "time_ids") else value.half() for name, value in given.items()}
    own = error(sdxl(module.half(), half).double(), truth)
    module.double()
    (got,) = run(folder, "unet", **given)
    assert got.dtype == torch.float16
    assert error(got.double(), truth) <= 2 * own + 1e-7


@pytest.mark.slow
@torch.inference_mode()
def test_inpainting_unet_of_nine_channels(exports: Exports) -> None:
    """Latents, mask and the masked image's latents."""
    module, folder = exports("inpaint9", "unet")
    for rows, size in SIZES:
        given = {"sample": latents(rows, 9, size), "timestep": times(rows), "encoder_hidden_states": prompt(rows, 32)}
        truth = module(*given.values()).sample
        assert truth.shape[1] == 4
        assert error(run(folder, "unet", **given)[0].double(), truth) <= LIMIT


@pytest.mark.slow
@torch.inference_mode()
def test_sdxl_refiner(exports: Exports) -> None:
    """The second text encoder alone, and five ids: size, crop, aesthetic score."""
    pipe, folder = exports("refiner", "unet", "text_encoder_2")
    manifest = Manifest.load(folder)
    assert manifest.architecture == "sdxl_refiner"
    ports = {port.name: port.shape for port in manifest.graph("unet").inputs}
    assert ports["time_ids"] == ("rows", 5)
    assert ports["text_embeds"] == ("rows", 32)
    for rows, size in SIZES:
        given = sdxl_inputs(rows, size)
        given |= {"time_ids": given["time_ids"][:, :5], "encoder_hidden_states": prompt(rows, 32)}
        truth = sdxl(pipe.unet.double(), given)
        assert error(run(folder, "unet", **given)[0].double(), truth) <= LIMIT
    ids = pipe.tokenizer_2(["a cat", ""], padding="max_length", max_length=77, return_tensors="pt").input_ids
    names = ["text_embeds", "last_hidden_state", *(f"hidden_states.{i}" for i in range(6))]
    check_text(pipe.text_encoder_2.double(), run(folder, "text_encoder_2", input_ids=ids), names, ids)


@pytest.mark.slow
@torch.inference_mode()
def test_x4_upscaler_pipeline(exports: Exports) -> None:
    """Latents beside the small image, its noise level, and latents of a quarter of the image's size."""
    pipe, folder = exports("upscaler", "unet")
    manifest = Manifest.load(folder)
    assert manifest.architecture == "sd_x4_upscaler"
    assert manifest.graph("unet").options["scale"] == 4
    assert manifest.graph("unet").profiles[0].axes["width"].opt == 128 // 4
    assert (folder / "low_res_scheduler" / "scheduler_config.json").is_file()
    noise_level = torch.tensor([20, 0, 350])
    for rows, size in SIZES:
        small, level = normal("small", rows, 3, *size).half().double(), noise_level[:rows]
        given = {"sample": torch.cat([latents(rows, 4, size), small], 1), "timestep": times(rows)}
        given["encoder_hidden_states"] = prompt(rows, 32)
        truth = pipe.unet.double()(*given.values(), class_labels=level).sample
        assert error(run(folder, "unet", **given, class_labels=level)[0].double(), truth) <= LIMIT


@pytest.mark.slow
@torch.inference_mode()
def test_sdxl_controlnet(exports: Exports) -> None:
    module, folder = exports("sdxl_controlnet")
    given = sdxl_inputs(3, (10, 14))
    image, scale = normal("i", 3, 3, 80, 112).sigmoid().half().double(), torch.tensor([0.5])
    found = run(folder, "controlnet", **given, controlnet_cond=image, conditioning_scale=scale.expand(3))
    added = {"text_embeds": given["text_embeds"], "time_ids": given["time_ids"]}
    options = {"conditioning_scale": 0.5, "added_cond_kwargs": added, "return_dict": False}
    down, middle = module(*list(given.values())[:3], image, **options)
    assert len(found) == len(down) + 1
    assert max(error(got.double(), truth) for got, truth in zip(found, (*down, middle), strict=True)) <= LIMIT


@pytest.mark.slow
@torch.inference_mode()
def test_sd2_unet(exports: Exports) -> None:
    module, folder = exports("sd2", "unet")
    given = {"sample": latents(3, 4, (9, 13)), "timestep": times(3), "encoder_hidden_states": prompt(3, 32)}
    assert error(run(folder, "unet", **given)[0].double(), module(*given.values()).sample) <= LIMIT


@torch.inference_mode()
def test_controlnet(exports: Exports) -> None:
    module, folder = exports("controlnet")
    sample, hidden, image = latents(3, 4, (10, 14)), prompt(3, 32), normal("i", 3, 3, 80, 112).sigmoid().half().double()
    scale = torch.tensor([0.5])
    given = {"sample": sample, "timestep": times(3), "encoder_hidden_states": hidden}
    found = run(folder, "controlnet", **given, controlnet_cond=image, conditioning_scale=scale.expand(3))
    down, middle = module(*given.values(), image, conditioning_scale=0.5, return_dict=False)
    assert len(found) == len(down) + 1
    assert max(error(got.double(), truth) for got, truth in zip(found, (*down, middle), strict=True)) <= LIMIT


@torch.inference_mode()
def test_linked_weights_are_the_users_own_file(exports: Exports) -> None:
    """No copy: both graphs point into hard links of the checkpoint's file, and ONNX Runtime reads them there."""
    module, folder = exports("vae", "vae_decoder", "vae_encoder", where="link")
    assert {graph.options["weights"] for graph in Manifest.load(folder).graphs.values()} == {"link"}
    files = [next((folder / graph).glob("*.safetensors")) for graph in ("vae_decoder", "vae_encoder")]
    assert files[0].samefile(files[1])
    assert files[0].stat().st_nlink == 3
    z = latents(3, 4, (9, 13))
    assert error(run(folder, "vae_decoder", latent_sample=z)[0].double(), module.decode(z).sample) <= LIMIT


def test_every_parameter_has_its_key_of_the_checkpoint(exports: Exports) -> None:
    module, folder = exports("sdxl", "unet", dtype="float16")
    model = onnx.load(str(folder / "unet" / "model.onnx"), load_external_data=False)
    (file,) = (folder / "unet").glob("*.safetensors")
    external = {t.name: {e.key: e.value for e in t.external_data} for t in model.graph.initializer if t.external_data}
    assert set(external) == set(module.state_dict())
    assert {entry["location"] for entry in external.values()} == {file.name}
    inline = [t for t in model.graph.initializer if not t.external_data]
    assert sum(len(t.raw_data) for t in inline) < 2000, "only constants of the graph lie in it"
    onnx.checker.check_model(str(folder / "unet" / "model.onnx"), full_check=True)


def test_the_decoder_is_exported_without_the_encoder(exports: Exports) -> None:
    _, folder = exports("vae", "vae_decoder")
    model = onnx.load(str(folder / "vae_decoder" / "model.onnx"), load_external_data=False)
    names = {t.name for t in model.graph.initializer if t.external_data}
    assert {name.split(".")[0] for name in names} == {"decoder", "post_quant_conv"}
    (file,) = (folder / "vae_decoder").glob("*.safetensors")
    assert file.stat().st_nlink == 1


def test_no_path_of_this_machine_is_in_a_graph(exports: Exports) -> None:
    for name, graph in (("sdxl", "unet"), ("text_projection", "text_encoder")):
        _, folder = exports(name, "unet", dtype="float16") if name == "sdxl" else exports(name)
        data = (folder / graph / "model.onnx").read_bytes()
        for trace in (str(folder).encode(), b"site-packages", b".py", str(Path(__file__).parent).encode()):
            assert trace not in data, f"{graph}: {trace!r}"


def ops(folder: Path, graph: str) -> Counter[str]:
    model = onnx.load(str(folder / graph / "model.onnx"), load_external_data=False)
    return Counter(f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in model.graph.node)


def test_nothing_is_concatenated_to_be_taken_apart(exports: Exports) -> None:
    """The keys, values and time projections of all layers lie side by side in the engine's loop, not in the graph."""
    _, folder = exports("sdxl", "unet", dtype="float16")
    found = ops(folder, "unet")
    model = onnx.load(str(folder / "unet" / "model.onnx"), load_external_data=False)
    widest = max(len(node.input) for node in model.graph.node if node.op_type == "Concat")
    assert widest <= 5, "more than the sizes of one tensor are concatenated"
    assert found["Slice"] <= 1  # one timestep for all rows
    assert found["GatherElements"] == 0


@pytest.mark.parametrize(
    ("opset", "has", "lacks"),
    [
        (18, ["InstanceNormalization"], ["GroupNormalization", "Attention"]),
        (21, ["GroupNormalization"], ["Attention", "InstanceNormalization"]),
        (23, ["GroupNormalization", "Attention"], ["InstanceNormalization", "Softmax"]),
    ],
)
@torch.inference_mode()
def test_opsets(opset: int, has: list[str], lacks: list[str], exports: Exports) -> None:
    module, folder = exports("vae", "vae_decoder", opset=opset)
    found = ops(folder, "vae_decoder")
    assert all(found[op] for op in has)
    assert not any(found[op] for op in lacks)
    z = latents(3, 4, (9, 13))
    assert error(run(folder, "vae_decoder", latent_sample=z)[0].double(), module.decode(z).sample) <= LIMIT


@pytest.mark.parametrize("opset", [21, 23])
@torch.inference_mode()
def test_kept_ops_are_nodes_with_a_function_of_the_same_meaning(opset: int, exports: Exports) -> None:
    module, folder = exports("vae", "vae_decoder", opset=opset, keep=("attention", "group_norm_silu"))
    found = ops(folder, "vae_decoder")
    assert found["stepfuse::GroupNormSiLU"] >= 10
    assert found["stepfuse::Attention"] == 1
    z = latents(3, 4, (9, 13))
    assert error(run(folder, "vae_decoder", latent_sample=z)[0].double(), module.decode(z).sample) <= LIMIT
    model = onnx.load(str(folder / "vae_decoder" / "model.onnx"))
    plain = onnx.inliner.inline_local_functions(model)
    assert not [node for node in plain.graph.node if node.domain == "stepfuse"]


@pytest.mark.slow
@torch.inference_mode()
def test_all_kept_ops_in_a_unet(exports: Exports) -> None:
    pipe, folder = exports("pipeline", "unet", opset=21, keep=("attention", "geglu", "group_norm_silu"))
    found = ops(folder, "unet")
    assert min(found[f"stepfuse::{name}"] for name in ("GroupNormSiLU", "GEGLU", "Attention")) >= 4
    sample, hidden = latents(3, 4, (9, 13)), prompt(3, 32)
    (got,) = run(folder, "unet", sample=sample, timestep=times(3), encoder_hidden_states=hidden)
    assert error(got.double(), pipe.unet.double()(sample, times(3), hidden).sample) <= LIMIT
    pipe.unet.float()


@pytest.mark.slow
@torch.inference_mode()
def test_a_unet_that_takes_the_residuals_of_a_controlnet(tmp_path: Path) -> None:
    """Both graphs, one after the other, are diffusers' U-Net with its ControlNet."""
    parts = build_pipeline(tmp_path / "plain").components
    control: Any = NETWORKS["controlnet"]()
    randomize(control, "export.controlnet")
    pipe = diffusers.StableDiffusionControlNetPipeline(**parts, controlnet=control, requires_safety_checker=False)
    pipe.save_pretrained(tmp_path / "both")
    graphs = ("controlnet", "controlled_unet")
    export_onnx(tmp_path / "both", tmp_path / "made", Options(components=graphs, shapes=SHAPES))
    given = {"sample": latents(3, 4, (10, 14)), "timestep": times(3), "encoder_hidden_states": prompt(3, 32)}
    image, scale = normal("i", 3, 3, 80, 112).sigmoid().half().double(), torch.tensor([0.5])
    found = run(tmp_path / "made", "controlnet", **given, controlnet_cond=image, conditioning_scale=scale.expand(3))
    names = [*(f"down_residual_{i}" for i in range(len(found) - 1)), "mid_residual"]
    (got,) = run(tmp_path / "made", "controlled_unet", **given, **dict(zip(names, found, strict=True)))
    down, middle = control.double()(*given.values(), image, conditioning_scale=0.5, return_dict=False)
    extra = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
    truth = pipe.unet.double()(*given.values(), **extra).sample
    assert error(got.double(), truth) <= LIMIT
    assert error(truth, pipe.unet(*given.values()).sample) > 1e-2


@pytest.mark.slow
@torch.inference_mode()
def test_diffusers_reads_the_folder(exports: Exports) -> None:
    """diffusers' own ONNX pipeline makes the image its torch pipeline makes."""
    pipeline = getattr(diffusers, "OnnxStableDiffusionPipeline", None)
    if pipeline is None:
        pytest.skip("this diffusers has no ONNX pipelines any more")
    pipe, folder = exports("pipeline")
    start = latents(1, 4, (16, 16)).float()
    options: dict[str, Any] = {"num_inference_steps": 4, "output_type": "np", "height": 128, "width": 128}
    expected = pipe.to(torch.float32)("a cat", latents=start, **options).images[0]
    theirs = pipeline.from_pretrained(folder, provider="CPUExecutionProvider")
    found = theirs("a cat", latents=start.numpy(), **options).images[0]
    assert np.abs(expected - found).max() <= 1 / 255
    assert expected.std() > 0.05
