"""Lanczos against Pillow, tiles against the whole, networks from files, and upscaling as a field of requests."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from reference import recorded_spandrel
from reference.recorded_spandrel import Compact
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from stepfuse import cli
from stepfuse.engine.cascade import Cascade, Stage
from stepfuse.engine.engine import Engine
from stepfuse.engine.errors import CheckpointError, NumericsError, RequestError
from stepfuse.engine.models.tiles import Tiles
from stepfuse.engine.request import Request
from stepfuse.engine.upscaling.lanczos import Lanczos, resample
from stepfuse.engine.upscaling.network import load_upscaler
from stepfuse.engine.upscaling.registry import Resized, Upscalers
from stepfuse.engine.upscaling.upscaler import Tiled, tiled

PROMPT = {"prompt": "a red circle", "seed": 3, "steps": 3, "output": "pt"}
REACH = 5
"""Pixels around one that the network of `weights` sees: one for each of its five convolutions of 3 x 3."""


def noise(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape)))


def pillow(images: Tensor, height: int, width: int) -> Tensor:
    """Every plane by Pillow, in float."""
    planes = [
        np.asarray(Image.fromarray(plane.numpy()).resize((width, height), Image.Resampling.LANCZOS))
        for plane in images.flatten(0, 1)
    ]
    return torch.from_numpy(np.stack(planes)).unflatten(0, images.shape[:2]).clamp(0, 1)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Real-ESRGAN Compact network of factor 2 whose output spreads over 0..1."""
    torch.manual_seed(0)
    net = Compact(features=8, convolutions=3, scale=2)
    path = tmp_path_factory.mktemp("upscalers") / "tiny.safetensors"
    save_file({name: value.detach() for name, value in net.state_dict().items()}, path)
    return path


@pytest.fixture(params=["recorded", "installed"])
def spandrel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recorded API, and the package itself where it can be imported."""
    if request.param == "recorded":
        monkeypatch.setitem(sys.modules, "spandrel", recorded_spandrel.module())
        return
    try:
        importlib.import_module("spandrel")
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision of another build of torch
        pytest.skip(f"spandrel cannot be imported: {error}")


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.load("shapes", device="cpu") as engine:
        yield engine


@pytest.mark.parametrize(
    ("size", "target"),
    [((17, 23), (34, 46)), ((17, 23), (41, 58)), ((1, 5), (3, 5)), ((40, 31), (13, 29)), ((64, 64), (7, 200))],
)
def test_lanczos_is_pillows(size: tuple[int, int], target: tuple[int, int]) -> None:
    images = noise(2, 3, *size)
    assert (resample(images, *target) - pillow(images, *target)).abs().max() <= 2e-6


def test_lanczos_of_a_picture_of_bytes_is_within_one_level_of_pillows() -> None:
    rows, columns = torch.meshgrid(torch.linspace(0, 3, 37), torch.linspace(0, 5, 53), indexing="ij")
    levels = ((0.5 + 0.4 * torch.sin(rows * columns)) * 255).round()
    made = Lanczos(2.5)(levels[None, None] / 255) * 255
    theirs = Image.fromarray(levels.byte().numpy()).resize((132, 92), Image.Resampling.LANCZOS)
    assert made.shape == (1, 1, 92, 132)
    assert (made[0, 0].round() - torch.from_numpy(np.array(theirs)).float()).abs().max() <= 1


def test_lanczos_keeps_flat_images_and_their_range() -> None:
    assert (Lanczos(3.7)(torch.full((1, 3, 9, 11), 0.3)) - 0.3).abs().max() <= 1e-6
    steps = Lanczos(4)((noise(1, 3, 8, 8) > 0.5).double())
    assert steps.dtype == torch.float32
    assert steps.min() == 0
    assert steps.max() == 1


@pytest.mark.parametrize("size", [(20, 20), (61, 83), (128, 40)])
def test_tiles_equal_the_whole_where_the_overlap_holds_what_a_pixel_depends_on(size: tuple[int, int]) -> None:
    net = Compact(features=8, convolutions=3, scale=2)
    images, overlap = noise(2, 3, *size), 2 * REACH + 2
    with torch.no_grad():
        whole = net(images)
        made = tiled(net, images, 32, overlap, feather=2)
        assert made.shape == whole.shape
        assert (made - whole).abs().max() <= 1e-5
        if max(size) > 32:
            seams = (tiled(net, images, 32, 6, feather=2) - whole).abs()
            assert seams.max() > 1e-3, "an overlap that is too small must show"


def test_weights_of_tiles_are_one_in_all_and_nothing_at_their_borders() -> None:
    tiles = Tiles(45, 70, 24, 10, feather=4)
    ones = [torch.ones(1, 1, 48, 48) for _ in range(len(tiles))]
    assert tiles.blend(ones).sub(1).abs().max() <= 1e-6
    spoiled = []
    for top, left in tiles.places:
        part = torch.full((1, 1, 48, 48), torch.inf)
        rows = slice(6 if top else 0, None if top + 24 == 45 else -6)
        columns = slice(6 if left else 0, None if left + 24 == 70 else -6)
        part[..., rows, columns] = 0.25
        spoiled.append(part.nan_to_num(posinf=1e9))
    assert (tiles.blend(spoiled) == 0.25).all()


def test_seams_are_blended_evenly() -> None:
    """Two tiles that disagree meet in a straight ramp over the feather."""
    tiles = Tiles(8, 26, 16, 6, feather=4)
    assert tiles.lefts == [0, 10]
    made = tiles.blend([torch.zeros(1, 1, 8, 16), torch.ones(1, 1, 8, 16)])[0, 0, 3]
    assert made[:11].tolist() == [0] * 11
    assert made[11:15].tolist() == [0.125, 0.375, 0.625, 0.875]
    assert made[15:].tolist() == [1] * 11


def test_tiles_share_calls_up_to_the_bound_and_report_progress() -> None:
    calls: list[int] = []
    seen: list[tuple[int, int]] = []

    def double(images: Tensor) -> Tensor:
        calls.append(len(images))
        assert images.shape[-2:] == (16, 16)
        return F.interpolate(images, scale_factor=2.0)

    images = noise(2, 3, 40, 28)
    made = tiled(double, images, 16, 4, together=4 * 16 * 16, progress=lambda done, of: seen.append((done, of)))
    assert (made - F.interpolate(images, scale_factor=2.0)).abs().max() <= 1e-6
    assert calls == [4, 2, 4, 2]
    assert seen == [(4, 12), (6, 12), (10, 12), (12, 12)]


def test_feathers_and_tiles_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="feather 9 with an overlap of 8: expected 1 to 8"):
        Tiles(64, 64, 32, 8, feather=9)
    with pytest.raises(RequestError, match="overlap: got 20 with tiles of 32"):
        Tiled(Lanczos(2), 32, 20)
    with pytest.raises(RequestError, match=r"scale: got 2\.5"):
        Tiled(Lanczos(2.5))


@pytest.mark.usefixtures("spandrel")
def test_a_network_of_a_file_computes_what_its_weights_say(weights: Path) -> None:
    upscaler = load_upscaler(weights)
    net = Compact(features=8, convolutions=3, scale=2)
    net.load_state_dict(upscaler.descriptor.model.state_dict())
    images = noise(3, 3, 19, 26)
    with torch.no_grad():
        expected = net(images).clamp(0, 1)
    assert upscaler.scale == 2
    made = upscaler(images)
    assert (made - expected).abs().max() <= 1e-6
    assert made.std() > 0.05
    half = load_upscaler(weights, dtype=torch.bfloat16)(images)
    assert half.dtype == torch.float32
    assert 1e-5 < (half - expected).abs().max() < 0.05
    grey = images[:, :1]
    assert torch.equal(upscaler(grey), upscaler(grey.expand(-1, 3, -1, -1)))


@pytest.mark.usefixtures("spandrel")
def test_files_that_are_no_upscalers(weights: Path, tmp_path: Path) -> None:
    pickled = tmp_path / "net.pth"
    torch.save({"body.0.weight": torch.zeros(1)}, pickled)
    with pytest.raises(CheckpointError, match="pickled, which can run code"):
        load_upscaler(pickled)
    with pytest.raises(CheckpointError, match=r"expected a \.safetensors file"):
        load_upscaler(tmp_path / "net.onnx")
    with pytest.raises(CheckpointError, match="no such file"):
        load_upscaler(tmp_path / "net.safetensors")
    renamed = tmp_path / "renamed.safetensors"
    renamed.write_bytes(pickled.read_bytes())
    with pytest.raises(CheckpointError, match="damaged, or no safetensors file"):
        load_upscaler(renamed)
    save_file({"encoder.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="no architecture that spandrel knows"):
        load_upscaler(tmp_path / "other.safetensors")
    stored = Compact(features=8, convolutions=3, scale=2).state_dict()
    save_file({name: value for name, value in stored.items() if name != "body.3.weight"}, tmp_path / "torn.safetensors")
    with pytest.raises(CheckpointError, match="do not fit their architecture"):
        load_upscaler(tmp_path / "torn.safetensors")


def test_without_spandrel_the_error_has_the_command(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "spandrel", None)
    with pytest.raises(RequestError, match=r"pip install 'stepfuse\[upscale\]'"):
        load_upscaler(weights)


@pytest.mark.usefixtures("spandrel")
def test_names_and_factors(weights: Path) -> None:
    known = Upscalers(torch.device("cpu"))
    known.add("tiny", weights, tile=32, overlap=12)
    images = noise(1, 3, 40, 50)
    own = known.find("tiny", 50, 40)
    assert isinstance(own, Tiled)
    other = known.find("tiny:3.5", 50, 40)
    assert isinstance(other, Resized)
    assert torch.equal(other(images), Lanczos(1.75)(own(images)))
    for wanted, message in (
        ("tinny:2", "did you mean 'tiny'"),
        ("tiny:two", "expected NAME or NAME:FACTOR such as tiny:2"),
        ("tiny:-2", "expected NAME or NAME:FACTOR"),
        ("lanczos", "takes any factor: say which"),
        ("lanczos:0", "expected above 0, up to 16"),
        ("lanczos:17", "expected above 0, up to 16"),
        (str(weights), "upscale: got"),
    ):
        with pytest.raises(RequestError, match=message):
            known.find(wanted, 50, 40)
    with pytest.raises(RequestError, match="are more than"):
        known.find("lanczos:16", 4096, 4096)
    for name in ("tiny", "lanczos", "a:b", ""):
        with pytest.raises(RequestError, match="name: "):
            known.add(name, Lanczos(2))


@pytest.mark.usefixtures("spandrel")
def test_requests_are_enlarged_after_decoding(engine: Engine, weights: Path) -> None:
    plain = engine.generate(**PROMPT, n=2)
    engine.upscalers = Upscalers(torch.device("cpu"))
    engine.add_upscaler("tiny", weights, dtype="float32", tile=48, overlap=16)
    jobs = [engine.submit(**PROMPT, n=2, upscale=name) for name in ("lanczos:1.5", "tiny", None)]
    wide, network, same = (job.result() for job in jobs)
    assert torch.equal(same.images, plain.images)
    assert (wide.images - Lanczos(1.5)(plain.images)).abs().max() <= 1e-5
    assert (network.images - load_upscaler(weights)(plain.images)).abs().max() <= 1e-4
    assert (wide.latents - plain.latents).abs().max() <= 1e-4
    assert wide.settings["upscale"] == "lanczos:1.5"
    assert '"upscale": "tiny"' in network.parameters(3)
    assert "upscale" not in same.settings
    assert wide.timings["total"] >= wide.timings["decode"] > 0


def test_bad_requests_are_errors_of_the_caller(engine: Engine) -> None:
    for options, message in (
        ({"upscale": "esrgan"}, "upscale: got 'esrgan'"),
        ({"upscale": 2}, "upscale: got int, expected text"),
        ({"upscale": "lanczos:2", "output": "latent"}, "output='latent' asks for none"),
        ({"upscale": "/etc/weights.safetensors"}, "upscale: got '/etc/weights.safetensors'"),
    ):
        with pytest.raises(RequestError, match=message):
            engine.submit(**PROMPT | options)


def test_what_an_upscaler_spoils_ends_its_own_job_only(engine: Engine) -> None:
    class Broken:
        scale = 2

        def __call__(self, images: Tensor) -> Tensor:
            return F.interpolate(images, scale_factor=2.0) / 0 * 0

    engine.upscalers = Upscalers(torch.device("cpu"))
    engine.add_upscaler("broken", Broken())
    jobs = [engine.submit(**PROMPT, upscale=name) for name in ("broken", None)]
    with pytest.raises(NumericsError, match="the upscaler produced NaN or Inf"):
        jobs[0].result()
    assert jobs[1].result().images.shape == (1, 3, 64, 64)


def test_stages_of_cascades_enlarge_their_images(engine: Engine) -> None:
    """The image of stage one is enlarged, stage two redraws it in that size, and the request's own comes last."""
    redrawn = Stage(request={"strength": 0.4, "steps": 5})
    cascade = Cascade(name="two", stages=(Stage(request={"upscale": "lanczos:1.5"}), redrawn))
    result = engine.generate(Request(**PROMPT, upscale="lanczos:2"), cascade=cascade)
    first, second = result.stages
    assert first.images.shape[-2:] == (96, 96)
    assert (second.settings["width"], second.settings["height"]) == (96, 96)
    assert result.images.shape[-2:] == (192, 192)
    assert (first.images - Lanczos(1.5)(engine.generate(**PROMPT).images)).abs().max() <= 1e-5
    alone = engine.generate(
        **PROMPT | {"seed": second.seeds[0], "steps": 5},
        strength=0.4,
        image=list(first.images.permute(0, 2, 3, 1).numpy()),
    )
    assert (result.images - Lanczos(2)(alone.images)).abs().max() <= 1e-3
    resampled = Cascade(name="plain", stages=(Stage(), Stage(model="lanczos", scale=2)))
    with pytest.raises(RequestError, match="the last stage of 'plain' only resamples"):
        engine.submit(Request(**PROMPT, upscale="lanczos:2"), cascade=resampled)


@pytest.mark.usefixtures("spandrel")
def test_the_command_enlarges_files(weights: Path, tmp_path: Path) -> None:
    picture, made = tmp_path / "in.png", tmp_path / "out.png"
    pixels = (noise(45, 70, 3).numpy() * 255).astype(np.uint8)
    Image.fromarray(pixels).save(picture)
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    for options, expected in (
        (["--scale", "1.5"], Lanczos(1.5)(images)),
        (["--model", str(weights), "--tile", "32", "--overlap", "14"], load_upscaler(weights)(images)),
        (["-m", str(weights), "--scale", "3", "--tile", "32", "--overlap", "14"],
         Lanczos(1.5)(load_upscaler(weights)(images))),
    ):  # fmt: skip
        told = CliRunner().invoke(cli.app, ["upscale", str(picture), "-o", str(made), *options])
        assert told.exit_code == 0, told.output
        with Image.open(made) as image:
            levels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        assert levels.shape == expected.shape
        assert (levels / 255 - expected).abs().max() <= 0.51 / 255
    told = CliRunner().invoke(cli.app, ["upscale", str(picture), "-o", str(made)])
    assert isinstance(told.exception, RequestError)


@pytest.mark.usefixtures("spandrel")
def test_generate_takes_an_upscaler(weights: Path, tmp_path: Path) -> None:
    made = tmp_path / "image.png"
    options = ["--steps", "2", "--seed", "1", "--device", "cpu", "--upscale", f"tiny={weights}:3", "-o", str(made)]
    told = CliRunner().invoke(cli.app, ["generate", "a red circle", *options])
    assert told.exit_code == 0, told.output
    with Image.open(made) as image:
        assert image.size == (192, 192)
    told = CliRunner().invoke(cli.app, ["generate", "a red circle", "--upscale", "=x"])
    assert isinstance(told.exception, RequestError)
