"""LoRAs of requests: side paths equal merged weights, and rows with different ones run together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference.recording import DryRecorder
from safetensors.torch import load_file, save_file

from stepfuse import Control, Engine, EngineConfig, Request
from stepfuse.engine import pipeline
from stepfuse.engine.admission import weight_bytes
from stepfuse.engine.calibration import Calibration, Curve, Point
from stepfuse.engine.cascade import Cascade, Stage
from stepfuse.engine.compile import Compiled
from stepfuse.engine.components import Components
from stepfuse.engine.config import resolve
from stepfuse.engine.errors import CheckpointError, RequestError
from stepfuse.engine.loading import load_components
from stepfuse.engine.models.layers import Attention
from stepfuse.engine.runner import Runner
from stepfuse.engine.settling import settle
from stepfuse.engine.ticket import Bucket

SMALL: dict[str, Any] = {"width": 32, "height": 32, "steps": 3, "sampler": "ddim", "output": "latent"}
PROMPT = "a photo of a cat"
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
SELF = tuple(f"unet:{BLOCK}.attn1.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0"))
LINEAR = (*SELF, f"unet:{BLOCK}.ff.net.0.proj", f"unet:{BLOCK}.ff.net.2", f"unet:{BLOCK}.attn2.to_q",
          "unet:mid_block.attentions.0.proj_in")  # fmt: skip
CONVOLUTION = ("unet:conv_in", "unet:conv_out", "unet:down_blocks.0.resnets.0.conv1",
               "unet:down_blocks.0.resnets.0.conv2", "unet:up_blocks.1.resnets.0.conv_shortcut",
               "unet:down_blocks.0.downsamplers.0.conv", "unet:up_blocks.0.upsamplers.0.conv")  # fmt: skip
CROSS = tuple(f"unet:{block}.attn2.{name}" for name in ("to_k", "to_v")
              for block in (BLOCK, "mid_block.attentions.0.transformer_blocks.0"))  # fmt: skip
TIME = ("unet:time_embedding.linear_1", "unet:mid_block.resnets.0.time_emb_proj",
        "unet:up_blocks.1.resnets.1.time_emb_proj")  # fmt: skip
TEXT = ("te1:encoder.layers.1.self_attn.q_proj", "te1:encoder.layers.3.mlp.fc1")
KINDS: dict[str, tuple[tuple[str, ...], int]] = {  # layers and rank
    "linear": (LINEAR, 3), "convolution": (CONVOLUTION, 2), "cross": (CROSS, 5), "time": (TIME, 1), "text": (TEXT, 2),
    "all": ((*LINEAR, *CONVOLUTION, *CROSS, *TIME, *TEXT), 4),
}  # fmt: skip
LINES = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def style(parts: Components, path: Path, layers: tuple[str, ...], rank: int, seed: int) -> Path:
    """A LoRA file with alpha 2 * rank; the middle convolution of LoCon where a layer is the first 3x3 one."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name in layers:
        part, _, layer = name.partition(":")
        module = {"unet": parts.unet, **{f"te{i}": one.model for i, one in enumerate(parts.text, 1)}}[part]
        weights = {key.removeprefix("text_model."): tensor for key, tensor in module.named_parameters()}
        shape = weights[f"{layer}.weight"].shape
        middle = layer == "down_blocks.0.resnets.0.conv1"
        kernel = (1, 1) if middle else shape[2:]
        stem = f"lora_{part}_{'' if part == 'unet' else 'text_model_'}{layer.replace('.', '_')}"
        draw = {"lora_down": (rank, shape[1], *kernel), "lora_up": (shape[0], rank, *[1] * len(kernel))}
        draw |= {"lora_mid": (rank, rank, *shape[2:])} if middle else {}
        for role, sides in draw.items():
            tensors[f"{stem}.{role}.weight"] = torch.randn(sides, generator=generator) / 9
        tensors[f"{stem}.alpha"] = torch.tensor(2.0 * rank)
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def folder(reference_pipeline: Callable[[str], Path]) -> Path:
    return reference_pipeline("sd15")


@pytest.fixture(scope="module")
def files(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home, parts = tmp_path_factory.mktemp("styles"), load_components(folder, EngineConfig(device="cpu"))
    return {name: style(parts, home / f"{name}.safetensors", layers, rank, seed)
            for seed, (name, (layers, rank)) in enumerate(KINDS.items())}  # fmt: skip


@pytest.fixture(scope="module")
def lines(reference_network: Callable[[str], Any]) -> Path:
    return reference_network("controlnet/sd15")[1]


@pytest.fixture(scope="module")
def parts(folder: Path, files: dict[str, Path], lines: Path) -> Components:
    return load_components(folder, EngineConfig(device="cpu", max_rows=6, loras=files, controlnets={"lines": lines}))


@pytest.fixture(scope="module")
def engine(parts: Components) -> Any:
    with Engine(parts) as made:
        yield made


@pytest.fixture(scope="module")
def plain(folder: Path, lines: Path) -> Any:
    """The same checkpoint without LoRAs of requests."""
    with Engine.load(folder, device="cpu", controlnets={"lines": lines}) as made:
        yield made


def latents(engine: Engine, loras: Any = (), **fields: Any) -> torch.Tensor:
    return engine.generate(PROMPT, loras=loras, **SMALL | {"seed": 1} | fields).latents


def merged(engine: Engine, files: dict[str, Path], loras: Any, **fields: Any) -> torch.Tensor:
    engine.set_loras([(files[name], strength) for name, strength in loras])
    try:
        return latents(engine, **fields)
    finally:
        engine.set_loras([])


@pytest.fixture(scope="module")
def exact(folder: Path, files: dict[str, Path], lines: Path) -> Any:
    nets = {"lines": lines}
    with Engine.load(folder, device="cpu", dtype="float64", loras=files, controlnets=nets) as made:
        yield made


@pytest.mark.parametrize("loras", [*(((kind, 0.7),) for kind in KINDS), (("all", 0.7), ("cross", -1.3), ("linear", 2))])
def test_side_paths_equal_merged_weights(exact: Engine, files: dict[str, Path], loras: Any) -> None:
    found = latents(exact, loras)
    assert relative(found, latents(exact)) > 1e-3, "it must show"
    assert relative(found, merged(exact, files, loras)) <= 1e-12


def test_they_do_so_in_float32(engine: Engine, plain: Engine, files: dict[str, Path]) -> None:
    loras = (("all", 0.3), ("linear", -0.5))
    assert relative(latents(engine, loras, steps=1), merged(plain, files, loras, steps=1)) <= 1e-5


def test_both_text_encoders_of_sdxl(reference_pipeline: Callable[[str], Path], tmp_path: Path) -> None:
    layers = ("te1:encoder.layers.1.self_attn.q_proj", "te2:encoder.layers.0.mlp.fc2", "unet:add_embedding.linear_1")
    folder, config = reference_pipeline("sdxl"), EngineConfig(device="cpu", dtype="float64")
    parts, given = load_components(folder, config), {}
    for i, name in enumerate(layers):
        given[f"lora{i}"] = style(parts, tmp_path / f"{i}.safetensors", (name,), 3, i)
    with Engine.load(folder, config=config, loras=given) as engine:
        found = [latents(engine, ((name, 0.8),)) for name in given]
        assert min(relative(one, latents(engine)) for one in found) > 1e-4
        for name, one in zip(given, found, strict=True):
            assert relative(one, merged(engine, given, ((name, 0.8),))) <= 1e-12


def test_without_loras_nothing_changes(engine: Engine, plain: Engine) -> None:
    """Bit for bit; and a strength of 0 is none, up to rounding."""
    assert torch.equal(latents(engine), latents(plain))
    assert relative(latents(engine, (("all", 0), ("cross", 0.0)), steps=1), latents(plain, steps=1)) <= 1e-5


def test_loras_of_the_engine_and_of_the_request_add_up(exact: Engine, files: dict[str, Path]) -> None:
    exact.set_loras([(files["linear"], 0.4)])
    try:
        found = exact.generate(PROMPT, loras=[("all", 0.3)], **SMALL, seed=1)
        alone = latents(exact)
    finally:
        exact.set_loras([])
    assert found.settings["loras"] == [["linear", 0.4], ["all", 0.3]]
    assert relative(found.latents, merged(exact, files, (("linear", 0.4), ("all", 0.3)))) <= 1e-12
    assert torch.equal(alone, merged(exact, files, (("linear", 0.4),)))


@pytest.mark.parametrize("guess", [False, True])
def test_beside_a_controlnet(exact: Engine, files: dict[str, Path], guess: bool) -> None:
    loras, controls = (("all", 0.3),), (Control(name="lines", image=LINES, scale=0.8, guess=guess),)
    found = latents(exact, loras, controls=controls)
    assert relative(found, latents(exact, loras)) > 1e-2
    assert relative(found, merged(exact, files, loras, controls=controls)) <= 1e-12


def test_a_mixed_load_equals_solo_runs(engine: Engine) -> None:
    """Rows with equally many LoRAs share batches, whichever they have."""
    mask = np.zeros((32, 32), dtype=np.uint8)
    mask[:, 12:] = 255
    control = (Control(name="lines", image=LINES, scale=0.5),)
    kinds: list[dict[str, Any]] = [
        {"loras": (("linear", 0.8),)},
        {"loras": (("convolution", -0.5),), "steps": 5, "n": 2},
        {"loras": (("text", 1.2),), "guidance_scale": 1.0},
        {"loras": (("cross", 1.0), ("all", 0.4)), "sampler": "euler_a", "steps": 4},
        {"loras": (("time", 1.0), ("linear", 0.3)), "negative_prompt": "dog"},
        {"loras": (("all", 0.5),), "image": LINES, "strength": 0.6, "steps": 5},
        {"loras": (("all", -0.5),), "image": LINES, "mask": mask, "steps": 4},
        {"loras": (("cross", 0.9),), "controls": control},
        {"loras": (("cross", 0.9),), "prompt": "a (cat:1.3) " + "and a dog " * 30},
        {"controls": control},
        {},
    ]
    requests = [Request(**{"prompt": PROMPT, "seed": 9 + i, **SMALL, **kind}) for i, kind in enumerate(kinds)]
    for request, found in zip(requests, engine.generate(requests), strict=True):
        assert relative(found.latents, engine.generate(request).latents) <= 1e-4, request


def test_rows_with_other_loras_share_a_batch(engine: Engine) -> None:
    """Counted: five requests with one LoRA each run in as many updates as one does."""
    updates = []
    worker = engine._worker
    update = worker._models[None].runner.update
    try:
        worker._models[None].runner.update = lambda batch, preview=False: (
            updates.append(len(batch)) or update(batch, preview)
        )
        requests = [Request(prompt=PROMPT, loras=((kind, 0.1 * i),), seed=i, **SMALL) for i, kind in enumerate(KINDS)]
        engine.generate(requests)
    finally:
        del worker._models[None].runner.update
    assert updates == [len(KINDS)] * SMALL["steps"]


def test_a_cascade_keeps_them_or_has_its_own(engine: Engine) -> None:
    def run(stage: dict[str, Any], **fields: Any) -> Any:
        cascade = Cascade(name="twice", stages=(Stage(), Stage(request={"strength": 0.5, **stage})))
        return engine.generate(PROMPT, cascade=cascade, seed=3, **SMALL, **fields)

    kept, own = run({}, loras=(("all", 0.4),)), run({"loras": [["all", 0.4]]})
    assert [stage.settings.get("loras") for stage in kept.stages] == [[["all", 0.4]]] * 2
    assert [stage.settings.get("loras") for stage in own.stages] == [None, [["all", 0.4]]]


@pytest.mark.slow
def test_other_loras_and_strengths_replay_the_same_recording(parts: Components) -> None:
    recorded = dataclasses.replace(parts, config=dataclasses.replace(parts.config, runner="graph"))
    runner = Runner(recorded, DryRecorder(frozen=True))
    captures = runner.captures
    assert captures is not None
    with Engine(parts) as eager, Engine(recorded, runner) as engine:
        for loras in ((("linear", 0.5),), (("linear", -1.0),), (("convolution", 0.3),)):
            assert relative(latents(engine, loras), latents(eager, loras)) <= 1e-5
            assert captures.captured == 1
        assert relative(latents(engine), latents(eager)) <= 1e-5
        assert captures.captured == 2, "rows without LoRAs have their own"


def test_rows_with_loras_are_warmed_up_by_their_number(parts: Components) -> None:
    recorded = dataclasses.replace(parts, config=dataclasses.replace(parts.config, runner="graph"))
    runner = Runner(recorded, DryRecorder())
    captures = runner.captures
    assert captures is not None
    with Engine(recorded, runner) as engine:
        engine.warmup(32, 32, loras=2, rows=1)
        made = captures.captured
        latents(engine, (("linear", 0.5), ("text", 1.0)))
        assert captures.captured == made > 0
        with pytest.raises(RequestError, match="loras: got 7, expected a number up to 6"):
            engine.warmup(32, 32, loras=7)
        with pytest.raises(RequestError, match="calibrate: measures updates without LoRAs, got loras=1"):
            engine.warmup(32, 32, loras=1, calibrate=True)


@pytest.mark.compile
@pytest.mark.slow
@torch.inference_mode()
def test_networks_with_and_without_loras_are_one_graph_each(parts: Components) -> None:
    x, update = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([1, 0])
    assert parts.adapted() is parts.adapted(), "made once, not in every update"
    networks = {True: parts.adapted(), False: parts.network()}
    compiled = {adapted: Compiled(network, 1, backend="eager") for adapted, network in networks.items()}
    seen = []
    for loras in ((("linear", 0.5),), (), (("all", 1.0),), ()):
        settled = settle(parts, Request(prompt="cat", loras=loras, **SMALL))
        ((conditioning, _),) = pipeline.encode(parts, [settled])
        given = x, pipeline.prepare(parts, settled, conditioning, [0]), update
        seen.append(networks[bool(loras)](*given))
        assert relative(compiled[bool(loras)](*given), seen[-1]) <= 1e-6
    assert min(relative(seen[0], seen[1]), relative(seen[2], seen[1]), relative(seen[0], seen[2])) > 1e-3
    assert [one.count for one in compiled.values()] == [1, 1]


@pytest.mark.parametrize("images", [1, 3])
def test_deterministic_rows_do_not_depend_on_others(parts: Components, images: int) -> None:
    """Two images of one request, prepared one by one, beside one with another LoRA, equal each alone."""
    config = dataclasses.replace(parts.config, deterministic=images, max_rows=images)
    with Engine(dataclasses.replace(parts, config=config)) as engine:
        other = Request(prompt="dog", loras=(("linear", -1.0),), **SMALL, seed=3)
        both = Request(prompt=PROMPT, loras=(("all", 0.5),), **SMALL, n=2, seed=8)
        found = engine.generate([other, both])[1].latents
        assert torch.equal(found[1:], latents(engine, (("all", 0.5),), seed=9))


def test_projections_that_were_fused_have_side_paths(folder: Path, files: dict[str, Path], exact: Engine) -> None:
    how: dict[str, Any] = {"device": "cpu", "dtype": "float64", "transforms": ("fused_qkv",)}
    with Engine.load(folder, loras={"a": files["linear"]}, **how) as engine:
        layer = engine.components.unet.get_submodule(f"{BLOCK}.attn1")
        assert isinstance(layer, Attention)
        assert layer.to_qkv is not None
        assert relative(latents(engine, (("a", 0.5),)), merged(exact, files, (("linear", 0.5),))) <= 1e-12
    with pytest.raises(RequestError, match=r"upsamplers.0.conv has a second copy made by .*folded_upsample"):
        Engine.load(folder, device="cpu", transforms=("folded_upsample",), loras={"a": files["convolution"]})


def test_what_is_said_of_them(engine: Engine, parts: Components, plain: Engine) -> None:
    found = engine.generate(PROMPT, loras=[("text", 1), ("linear", 0.5)], **SMALL, seed=1)
    assert found.settings["loras"] == [["linear", 0.5], ["text", 1.0]]
    assert "LoRAs of requests: linear, convolution, cross, time, text, all; " in engine.explain()
    more = weight_bytes(parts) - weight_bytes(plain.components)
    assert more == sum(path.bytes for path in parts.loras.paths) > 0


def test_the_knee_of_rows_without_loras_does_not_hold_for_others() -> None:
    calibration = Calibration({})
    calibration.add(Curve(64, 96, (Point(2, 2, 1.0),), True, "now"))
    bucket = Bucket(64, 96, 77, False)
    assert calibration.cap(bucket) == 2
    assert calibration.cap(bucket._replace(loras=1)) is None


BAD: list[tuple[Any, str]] = [
    ((("linaer", 1.0),), "loras: none is called 'linaer'; did you mean 'linear'"),
    ((("linear", float("nan")),), "loras: linear: got strength nan, expected a finite number"),
    ((("linear", "1"),), "loras: linear: got strength '1', expected a finite number"),
    ((("linear", True),), "loras: linear: got strength True"),
    ((("linear", 1.0), ("linear", 0.5)), "loras: got 'linear' twice; give it once, with the sum"),
    (("linear",), r"loras: got 'linear', expected a pair \(name, strength\)"),
    ("linear", r"loras: got 'linear', expected pairs \(name, strength\)"),
]


@pytest.mark.parametrize(("loras", "message"), BAD)
def test_loras_that_no_model_could_honour_are_errors(engine: Engine, loras: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        engine.submit(PROMPT, loras=loras, **SMALL)


def test_without_loaded_ones_the_error_says_how(plain: Engine) -> None:
    with pytest.raises(RequestError, match=r"loras: none is loaded; load the model with loras=\{name: file\}"):
        plain.submit(PROMPT, loras=(("a", 1.0),), **SMALL)
    with (
        Engine.from_module(lambda x, t: x, 4) as engine,
        pytest.raises(RequestError, match=r"loras: .* is a network of its own; leave them out"),
    ):
        engine.submit(loras=(("a", 1.0),))


def test_files_that_do_not_fit_are_errors(folder: Path, files: dict[str, Path], tmp_path: Path) -> None:
    strange = load_file(files["cross"]) | {"lora_unet_absent.lora_down.weight": torch.zeros(1, 4)}
    strange["lora_unet_absent.lora_up.weight"] = torch.zeros(4, 1)
    save_file(strange, tmp_path / "partial.safetensors")
    with pytest.raises(CheckpointError, match=r"2 of 14 keys fit no layer: lora_unet_absent.lora_down"):
        Engine.load(folder, device="cpu", loras={"a": tmp_path / "partial.safetensors"})
    with pytest.raises(CheckpointError, match="no such file"):
        Engine.load(folder, device="cpu", loras={"a": tmp_path / "absent.safetensors"})
    for wrong in ("controlnets", "loras"):
        with pytest.raises(RequestError, match=rf"{wrong}: got \['a'\], expected names and their sources"):
            resolve(EngineConfig(device="cpu", **{wrong: ["a"]}))
    with pytest.raises(RequestError, match=r"loras: got '': .*, expected name: file or folder"):
        Engine.load(folder, device="cpu", loras={"": files["cross"]})
    with pytest.raises(RequestError, match=r"loras: got .* with runtime='onnxruntime'; the weights of exported"):
        resolve(EngineConfig(device="cpu", runtime="onnxruntime", loras={"a": files["cross"]}))
    with pytest.raises(RequestError, match=r"loras: got .*; a network of yours has none"):
        Engine.from_module(lambda x, t: x, 4, loras={"a": files["cross"]})
