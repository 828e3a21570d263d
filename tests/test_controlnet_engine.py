"""ControlNets in the engine: whole pipelines against diffusers, scales as data of rows, rows beside others."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from PIL import Image
from reference.parity import error
from reference.parity import ours as open_network
from reference.random_weights import normal
from reference.recording import DryRecorder

from stepfuse import Control, Engine, EngineConfig, Request
from stepfuse.engine import pipeline
from stepfuse.engine.admission import Admission
from stepfuse.engine.batch import Batch
from stepfuse.engine.calibration import Calibration, Curve, Point
from stepfuse.engine.compile import Compiled
from stepfuse.engine.components import Components
from stepfuse.engine.errors import CheckpointError, RequestError
from stepfuse.engine.loading import load_components
from stepfuse.engine.models.controlled import Controlled
from stepfuse.engine.models.unet import Conditioning
from stepfuse.engine.runner import Runner
from stepfuse.engine.settling import Settled, settle
from stepfuse.engine.ticket import Bucket

PARITY = 1e-4  # relative L2 of the final latents
SIZE: dict[str, Any] = {"width": 96, "height": 64}
PROMPT = "a photo of a cat"


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def picture(seed: int, width: int = 96, height: int = 64) -> np.ndarray:
    """A smooth random picture, uint8 [height, width, 3]."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height)))


LINES, DEPTH = picture(1), picture(2)


@pytest.fixture(scope="module")
def folders(
    reference_pipeline: Callable[[str], Path], reference_network: Callable[[str], Any]
) -> tuple[Path, dict[str, Path]]:
    """The pipeline, and four ControlNets for it."""
    nets = {name: reference_network(f"controlnet/{net}")[1] for name, net in
            {"canny": "sd15", "shuffle": "shuffle", "bgr": "bgr"}.items()}  # fmt: skip
    return reference_pipeline("sd15"), nets | {"depth": reference_pipeline("sd15_controlnet") / "controlnet"}


@pytest.fixture(scope="module")
def parts(folders: tuple[Path, dict[str, Path]]) -> Components:
    return load_components(folders[0], EngineConfig(device="cpu", max_rows=4, controlnets=folders[1]))


@pytest.fixture(scope="module")
def engine(parts: Components) -> Iterator[Engine]:
    with Engine(parts) as made:
        yield made


@pytest.fixture(scope="module")
def theirs(folders: tuple[Path, dict[str, Path]]) -> Callable[..., Any]:
    """(names of ControlNets, options) -> the final latents of diffusers."""
    folder, nets = folders
    loaded = {name: diffusers.ControlNetModel.from_pretrained(path) for name, path in nets.items()}
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    made = diffusers.StableDiffusionControlNetPipeline(
        **pipe.components, controlnet=loaded["canny"], requires_safety_checker=False
    )
    made.set_progress_bar_config(disable=True)

    def run(names: list[str], scheduler: str | None = "DDIMScheduler", **options: Any) -> Any:
        used = [loaded[name] for name in names]
        made.controlnet = used[0] if len(used) == 1 else MultiControlNetModel(used)
        cls = getattr(diffusers, scheduler or type(pipe.scheduler).__name__)
        made.scheduler = cls.from_config(pipe.scheduler.config)
        start = torch.randn((1, 4, 8, 12), generator=torch.Generator().manual_seed(5))
        return made(PROMPT, latents=start, output_type="latent", **options).images

    return run


def ours(engine: Engine, *controls: Control, sampler: str | None = "ddim", **options: Any) -> torch.Tensor:
    return engine.generate(
        PROMPT, controls=controls, seed=5, output="latent", sampler=sampler, **SIZE, **options
    ).latents


CASES: dict[str, tuple[Control, dict[str, Any]]] = {
    "plain": (Control(name="canny", image=LINES), {}),
    "scaled": (Control(name="canny", image=LINES, scale=0.6), {"controlnet_conditioning_scale": 0.6}),
    "window": (
        Control(name="canny", image=LINES, scale=1.3, start=0.2, end=0.8),
        {"controlnet_conditioning_scale": 1.3, "control_guidance_start": 0.2, "control_guidance_end": 0.8},
    ),
    "guess": (
        Control(name="canny", image=LINES, scale=0.9, guess=True),
        {"controlnet_conditioning_scale": 0.9, "guess_mode": True},
    ),
    "averaged": (Control(name="shuffle", image=LINES), {}),
    "blue first": (Control(name="bgr", image=LINES), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_one_controlnet_equals_diffusers(engine: Engine, theirs: Callable[..., torch.Tensor], case: str) -> None:
    control, options = CASES[case]
    expected = theirs(
        [control.name], image=Image.fromarray(LINES), num_inference_steps=5, guidance_scale=6.0, **options
    )
    found = ours(engine, control, steps=5, guidance_scale=6.0)
    assert relative(found, expected) <= PARITY
    assert relative(ours(engine, steps=5, guidance_scale=6.0), expected) > 0.01, "the control must show"


@pytest.mark.parametrize(
    ("sampler", "scheduler"), [(None, None), ("heun", "HeunDiscreteScheduler")], ids=["the checkpoint's own", "heun"]
)
def test_the_window_counts_evaluations_as_diffusers_does(
    engine: Engine, theirs: Callable[..., torch.Tensor], sampler: str | None, scheduler: str | None
) -> None:
    control = Control(name="canny", image=LINES, start=0.25, end=0.65)
    window = {"control_guidance_start": 0.25, "control_guidance_end": 0.65}
    expected = theirs(
        ["canny"], scheduler, image=Image.fromarray(LINES), num_inference_steps=4, guidance_scale=4.0, **window
    )
    assert relative(ours(engine, control, steps=4, guidance_scale=4.0, sampler=sampler), expected) <= PARITY


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("guess", [False, True])
def test_two_controlnets_equal_diffusers(
    engine: Engine, theirs: Callable[..., torch.Tensor], guess: bool, guidance: float
) -> None:
    expected = theirs(
        ["canny", "depth"], image=[Image.fromarray(LINES), Image.fromarray(DEPTH)], num_inference_steps=4,
        guidance_scale=guidance, controlnet_conditioning_scale=[0.7, 1.2], control_guidance_start=[0.0, 0.25],
        control_guidance_end=[0.5, 1.0], guess_mode=guess,
    )  # fmt: skip
    controls = (
        Control(name="canny", image=LINES, scale=0.7, end=0.5, guess=guess),
        Control(name="depth", image=DEPTH, scale=1.2, start=0.25, guess=guess),
    )
    assert relative(ours(engine, *controls, steps=4, guidance_scale=guidance), expected) <= PARITY


@pytest.mark.parametrize("masked", [False, True], ids=["image to image", "inpainting"])
def test_editing_with_a_controlnet_equals_diffusers(
    engine: Engine, folders: tuple[Path, dict[str, Path]], masked: bool
) -> None:
    folder, nets = folders
    plain = diffusers.StableDiffusionPipeline.from_pretrained(folder).components
    kind = "StableDiffusionControlNetInpaintPipeline" if masked else "StableDiffusionControlNetImg2ImgPipeline"
    pipe = getattr(diffusers, kind)(
        **plain, controlnet=diffusers.ControlNetModel.from_pretrained(nets["canny"]), requires_safety_checker=False
    )
    pipe.scheduler = diffusers.DDIMScheduler.from_config(plain["scheduler"].config)  # some change one given before
    pipe.set_progress_bar_config(disable=True)
    mask = np.zeros((64, 96), np.uint8)
    mask[:, 40:] = 255
    more = {"mask_image": Image.fromarray(mask)} if masked else {}
    expected = pipe(
        PROMPT, image=Image.fromarray(DEPTH), control_image=Image.fromarray(LINES), strength=0.7, guidance_scale=4.0,
        num_inference_steps=6, generator=torch.Generator().manual_seed(5), output_type="latent",
        controlnet_conditioning_scale=1.0, control_guidance_end=0.6, **SIZE, **more,
    ).images  # fmt: skip
    control = Control(name="canny", image=LINES, end=0.6)
    more = {"mask": mask} if masked else {}
    options = {"steps": 6, "guidance_scale": 4.0, "image": DEPTH, "strength": 0.7, **more}
    assert relative(ours(engine, control, **options), expected) <= PARITY
    assert relative(ours(engine, **options), expected) > 0.01


def test_sdxl_equals_diffusers(
    reference_pipeline: Callable[[str], Path], reference_network: Callable[[str], Any]
) -> None:
    folder, (_, control) = reference_pipeline("sdxl"), reference_network("controlnet/sdxl")
    net = diffusers.ControlNetModel.from_pretrained(control)
    plain = diffusers.StableDiffusionXLPipeline.from_pretrained(folder)
    pipe = diffusers.StableDiffusionXLControlNetPipeline(**plain.components, controlnet=net, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    start = torch.randn((1, 4, 8, 12), generator=torch.Generator().manual_seed(5))
    expected = pipe(
        PROMPT, image=Image.fromarray(LINES), num_inference_steps=4, latents=start, output_type="latent",
        controlnet_conditioning_scale=0.8, **SIZE,
    ).images  # fmt: skip
    with Engine.load(folder, device="cpu", controlnets={"canny": control}) as engine:
        found = ours(engine, Control(name="canny", image=LINES, scale=0.8), steps=4, sampler=None)
    assert relative(found, expected) <= PARITY


def test_nothing_added_is_nothing_changed(engine: Engine, parts: Components) -> None:
    """Zero convolutions, as before training, and scale 0: the U-Net alone, bit for bit."""
    plain = ours(engine, steps=3)
    assert torch.equal(ours(engine, Control(name="canny", image=LINES, scale=0.0), steps=3), plain)
    net = parts.controlnets["canny"]
    zero = [net.controlnet_mid_block, *net.controlnet_down_blocks]
    saved = [{name: t.clone() for name, t in conv.state_dict().items()} for conv in zero]
    try:
        for conv in zero:
            for t in conv.state_dict().values():
                t.zero_()
        assert torch.equal(ours(engine, Control(name="canny", image=LINES, scale=2.0), steps=3), plain)
    finally:
        for conv, state in zip(zero, saved, strict=True):
            conv.load_state_dict(state)
    assert relative(ours(engine, Control(name="canny", image=LINES), steps=3), plain) > 0.01


def test_one_net_with_two_pictures_is_the_sum(engine: Engine) -> None:
    """The same picture twice at half the scale is the picture once."""
    half = Control(name="canny", image=LINES, scale=0.5)
    once = ours(engine, Control(name="canny", image=LINES), steps=3)
    assert relative(ours(engine, half, half, steps=3), once) <= 1e-5


def test_a_mixed_load_equals_solo_runs(engine: Engine) -> None:
    requests = [
        Request(prompt="cat", seed=1, steps=3, guidance_scale=1.0),
        Request(prompt="of", seed=2, steps=5, controls=(Control(name="canny", image=LINES, scale=0.5),), n=2),
        Request(prompt="a cat", seed=3, steps=4, controls=(Control(name="canny", image=DEPTH, end=0.5),)),
        Request(prompt="photo", seed=4, steps=4, controls=(Control(name="depth", image=DEPTH, guess=True),)),
        Request(prompt="a", seed=5, steps=6, sampler="euler_a", guidance_scale=1.0,
                controls=(Control(name="canny", image=LINES, guess=True),)),
        Request(prompt="cat", seed=6, steps=4, controls=(
            Control(name="canny", image=LINES), Control(name="depth", image=LINES, start=0.5))),
    ]  # fmt: skip
    requests = [dataclasses.replace(request, output="latent", **SIZE) for request in requests]
    for request, found in zip(requests, engine.generate(requests), strict=True):
        assert relative(found.latents, engine.generate(request).latents) <= PARITY, request


def test_every_image_of_a_request_has_its_own_branches(engine: Engine) -> None:
    control = Control(name="canny", image=LINES, guess=True)  # which tells the branches apart
    both = ours(engine, control, steps=3, n=2)
    alone = engine.generate(
        PROMPT, controls=(control,), seed=6, output="latent", sampler="ddim", steps=3, **SIZE
    ).latents
    assert relative(both[1:], alone) <= PARITY


class Lane:
    """One request run by hand."""

    def __init__(self, parts: Components, request: Request) -> None:
        self.parts, self.runner = parts, Runner(parts)
        self.settled: Settled = settle(parts, request)
        with torch.inference_mode():
            ((self.conditioning, _),) = pipeline.encode(parts, [self.settled])

    def batch(self) -> Batch:
        return self.runner.batch("any", self.settled.control_names)

    @torch.inference_mode()
    def join(self, batch: Batch, owner: str = "row") -> Batch:
        batch.join(pipeline.start(self.parts, self.settled, self.conditioning, [0]), [owner])
        return batch

    @torch.inference_mode()
    def run(self, batch: Batch, updates: int) -> Batch:
        for _ in range(updates):
            self.runner.update(batch)
        return batch


SMALL: dict[str, Any] = {"width": 32, "height": 32, "output": "latent"}
LATE = Control(name="canny", image=LINES, scale=0.8, start=0.6, end=0.95)


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "computed again"])
@torch.inference_mode()
def test_a_parked_row_goes_on_with_the_same_bits(parts: Components, keep: bool) -> None:
    lane = Lane(parts, Request(prompt="cat", seed=3, steps=6, sampler="ddim", controls=(LATE,), **SMALL))
    expected = lane.run(lane.join(lane.batch()), 6).state.x[0].clone()
    batch = lane.run(lane.join(lane.batch()), 3)
    saved = batch.save(0, keep)
    batch.leave([0])
    batch.state.prepared.images.fill_(float("nan"))
    prepared = saved.prepared or pipeline.prepare(parts, lane.settled, lane.conditioning, [0])
    other = lane.batch()
    other.restore(saved, prepared)
    assert torch.equal(lane.run(other, 3).state.x[0], expected)


@torch.inference_mode()
def test_scales_move_with_the_window_of_a_long_plan(parts: Components) -> None:
    """70 updates; those beyond the first 64 read scales that only a refill brings. The U-Net by hand is the truth."""
    request = Request(prompt="cat", seed=3, steps=70, sampler="ddim", guidance_scale=1.0, controls=(LATE,), **SMALL)
    lane = Lane(parts, request)
    batch = lane.join(lane.batch())
    network = parts.network(("canny",))
    assert isinstance(network, Controlled)
    prepared = pipeline.prepare(parts, lane.settled, lane.conditioning, [0])
    unet = parts.unet.prepare(lane.conditioning, torch.tensor([lane.settled.plan.timesteps]))
    seen = []
    for i in range(70):
        given = batch.state.model_input[:1].clone()
        lane.runner.update(batch)
        direct = network(given, prepared, torch.tensor([i]))
        plain = parts.unet(given, unet, torch.tensor([i]))
        assert relative(batch.state.outputs[:1], direct) <= 1e-6, i
        seen.append(relative(batch.state.outputs[:1], plain) > 1e-4)
    assert seen == [42 <= i < 66 for i in range(70)], "0.6 and 0.95 of 70 updates"


@pytest.mark.slow
def test_other_scales_replay_the_same_recording(parts: Components) -> None:
    """No recapture: what is recorded once serves every picture, scale and window of the same nets."""
    recorded = dataclasses.replace(parts, config=dataclasses.replace(parts.config, runner="graph"))
    runner = Runner(recorded, DryRecorder(frozen=True))
    captures = runner.captures
    assert captures is not None
    with Engine(parts) as eager, Engine(recorded, runner) as engine:
        for i, control in enumerate(
            (Control(name="canny", image=LINES), LATE, Control(name="canny", image=DEPTH, scale=0, guess=True))
        ):
            request = Request(prompt="cat", seed=i, steps=3, controls=(control,), **SMALL)
            assert relative(engine.generate(request).latents, eager.generate(request).latents) <= 1e-5
            assert captures.captured == 1
        engine.generate("cat", steps=1, **SMALL)
        assert captures.captured == 2, "rows without controls have their own"


@pytest.mark.compile
@torch.inference_mode()
def test_a_controlled_network_is_one_graph(parts: Components) -> None:
    lane = Lane(parts, Request(prompt="cat", seed=3, steps=2, controls=(LATE, LATE), **SMALL))
    network = parts.network(lane.settled.control_names)
    prepared = pipeline.prepare(parts, lane.settled, lane.conditioning, [0])
    given = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1)), prepared, torch.tensor([1, 0])
    compiled = Compiled(network, 1, backend="eager")
    assert relative(compiled(*given), network(*given)) <= 1e-6
    assert compiled.count == 1


@torch.inference_mode()
def test_an_inpainting_unet_shows_its_controlnets_the_latents_only(reference_network: Callable[[str], Any]) -> None:
    unet = open_network(reference_network("unet/sd15_inpaint9")[1])
    net = open_network(reference_network("controlnet/sd15")[1])
    latents, hidden, image = normal("latents", 2, 9, 8, 8), normal("hidden", 2, 7, 32), normal("image", 1, 3, 64, 64)
    steps, update = torch.tensor([[900.0, 400.0]] * 2, dtype=torch.float64), torch.tensor([1, 0])
    given = Conditioning(hidden=hidden)
    network = Controlled(unet, [net])
    prepared = network.prepare(given, steps, [image], [torch.full((2, 2, net.scales), 0.7)])
    residuals = net(latents[:, :4], net.prepare(given, steps), update, net.prepare_image(image), torch.full((2,), 0.7))
    expected = unet(latents, unet.prepare(given, steps), update, residuals=residuals)
    assert error(network(latents, prepared, update), expected) <= 1e-7


def test_deterministic_rows_do_not_depend_on_others(parts: Components) -> None:
    """Two images of one request, prepared one by one, equal each alone."""
    config = dataclasses.replace(parts.config, deterministic=1, max_rows=1)
    control = Control(name="canny", image=LINES, scale=0.7)
    with Engine(dataclasses.replace(parts, config=config)) as engine:
        both = engine.generate("cat", n=2, seed=8, steps=2, controls=(control,), **SMALL).latents
        second = engine.generate("cat", seed=9, steps=2, controls=(control,), **SMALL).latents
    assert torch.equal(both[1:], second)


def test_pictures_are_resized_and_may_be_files(engine: Engine, tmp_path: Path) -> None:
    Image.fromarray(LINES).save(tmp_path / "lines.png")
    given = ours(engine, Control(name="canny", image=tmp_path / "lines.png"), steps=2)
    assert torch.equal(given, ours(engine, Control(name="canny", image=LINES), steps=2))
    result = engine.generate(
        "cat", controls=(dataclasses.replace(LATE, image=tmp_path / "lines.png"),), steps=1, **SIZE
    )
    said = {"name": "canny", "scale": 0.8, "start": 0.6, "end": 0.95, "guess": False}
    assert json.loads(result.parameters(0))["controls"] == [said]
    large = np.asarray(Image.fromarray(LINES).resize((192, 128), Image.Resampling.NEAREST))
    assert relative(ours(engine, Control(name="canny", image=large), steps=2), given) < 0.05


def test_admission_counts_what_controls_hold(parts: Components) -> None:
    admission = Admission(parts)
    control = Control(name="canny", image=LINES)
    requests = [Request(prompt="cat", steps=3, controls=(control,) * n, **SIZE) for n in (0, 1, 2)]
    lanes = [Lane(parts, request) for request in requests]
    with torch.inference_mode():
        held = [pipeline.prepare(parts, lane.settled, lane.conditioning, [0]) for lane in lanes]
    rows = [admission.row(lane.settled) for lane in lanes]
    for row, prepared in zip(rows, held, strict=True):
        assert (row.time_columns, row.prompt_columns) == (prepared.time.shape[2], prepared.kv.shape[2])
        images = getattr(prepared, "images", torch.empty(0, 0, 0, 0, 0))
        assert row.image_columns == images.shape[1] * images.shape[4]
    assert rows[0].activations < rows[1].activations < rows[2].activations


def test_the_knee_of_rows_without_controls_does_not_hold_for_others() -> None:
    calibration = Calibration({})
    calibration.add(Curve(64, 96, (Point(2, 2, 1.0),), True, "now"))
    bucket = Bucket(64, 96, 77, False)
    assert calibration.cap(bucket) == 2
    assert calibration.cap(bucket._replace(controls=("canny",))) is None


BAD: list[tuple[Any, str]] = [
    ((Control(name="cany", image=LINES),), r"controls\[0\]: no ControlNet is called 'cany'; did you mean 'canny'"),
    ((Control(name="canny", image=LINES, scale=-1),), r"controls\[0\].scale: got -1, expected a finite number >= 0"),
    ((Control(name="canny", image=LINES, scale=float("nan")),), r"controls\[0\].scale: got nan"),
    ((Control(name="canny", image=LINES, start=0.5, end=0.5),), "got start=0.5, end=0.5; expected 0 <= start < end"),
    ((Control(name="canny", image=LINES, end=1.5),), "end=1.5; expected 0 <= start < end <= 1"),
    ((Control(name="depth", image=LINES), Control(name="canny", image=7)), r"controls\[1\].image: got int"),
    (Control(name="canny", image=LINES), "controls: got Control, expected a tuple of Control"),
    (("canny",), r"controls\[0\]: got str, expected a Control"),
]


@pytest.mark.parametrize(("controls", "message"), BAD)
def test_controls_that_no_model_could_honour_are_errors(engine: Engine, controls: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        engine.submit(PROMPT, controls=controls, **SIZE)


def test_nets_that_do_not_fit_are_errors_before_anything_is_loaded(
    folders: tuple[Path, dict[str, Path]], reference_network: Callable[[str], Any]
) -> None:
    for name, message in {
        "controlnet/sdxl": "does not fit this model: .*levels",
        "vae/f8": "holds AutoencoderKL; expected a ControlNetModel",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            Engine.load(folders[0], device="cpu", controlnets={"x": reference_network(name)[1]})
    with (
        Engine.load(folders[0], device="cpu") as engine,
        pytest.raises(RequestError, match=r"no ControlNet is loaded; load the model with controlnets="),
    ):
        engine.submit(PROMPT, controls=(Control(name="canny", image=LINES),), **SIZE)


def test_command_line(
    folders: tuple[Path, dict[str, Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from stepfuse import cli

    Image.fromarray(LINES).save(tmp_path / "lines.png")
    arguments = ["cat", "--model", str(folders[0]), "--size", "32x32", "--steps", "1", "--seed", "1"]
    nets = [f"--controlnet={name}={folders[1][name]}" for name in ("canny", "depth")]
    lines = tmp_path / "lines.png"
    files = ["-o", str(tmp_path / "made.png"), "--device", "cpu"]
    controls = [f"--control=canny:{lines}:0.5", f"--control=depth:{lines}"]
    monkeypatch.setattr("sys.argv", ["stepfuse", "generate", *arguments, *nets, *controls, *files])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code in (0, None), capsys.readouterr().err
    said = json.loads(Image.open(tmp_path / "made.png").text["parameters"])["controls"]
    assert [(one["name"], one["scale"]) for one in said] == [("canny", 0.5), ("depth", 1.0)]
