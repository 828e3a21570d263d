"""The command line: what it writes, what it prints, and the exit code of every kind of error."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from reference.pixel_upscalers import NETWORK, save
from safetensors.torch import save_file

from stepfuse import Engine, cli
from stepfuse.cli.arguments import read_control, read_controlnets, read_lora, read_size, read_upscale
from stepfuse.engine.errors import NumericsError, RequestError


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of `stepfuse ARGUMENTS`, in this process."""
    monkeypatch.setattr(sys, "argv", ["stepfuse", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, said.err


@pytest.fixture
def stepfuse(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: run(capsys, monkeypatch, *arguments)


def test_generate_twice_gives_identical_files_with_parameters(stepfuse, tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        code, out, _ = stepfuse("generate", "a red circle", "--seed", "7", "--steps", "3", "-o", name)
        assert (code, out) == (0, "")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    said = json.loads(Image.open(tmp_path / "a.png").text["parameters"])
    assert said["prompt"] == "a red circle"
    assert said["seed"] == 7


def test_several_images_get_their_seed_in_the_name_and_json_lists_them(stepfuse, tmp_path: Path) -> None:
    code, out, _ = stepfuse(
        "generate",
        "a red circle",
        "--seed",
        "3",
        "--steps",
        "2",
        "--n",
        "2",
        "--size",
        "32x64",
        "-o",
        "x.png",
        "--json",
    )
    assert code == 0
    (made,) = json.loads(out)
    assert made["files"] == ["x-3.png", "x-4.png"]
    assert made["settings"]["steps"] == 2
    assert Image.open(tmp_path / "x-4.png").size == (32, 64)


def test_prompt_file(stepfuse, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\n\na blue square\n")
    code, _, _ = stepfuse("generate", "--prompts", "prompts.txt", "--seed", "1", "--steps", "2", "-o", "p.png")
    assert code == 0
    assert (tmp_path / "p-000.png").exists()
    assert (tmp_path / "p-001.png").exists()


def test_pictures_are_changed_filled_in_and_expanded(stepfuse, tmp_path: Path) -> None:
    Image.new("RGB", (32, 24), "red").save(tmp_path / "in.png")
    Image.new("L", (32, 24), 255).save(tmp_path / "white.png")
    common = ("generate", "a blue square", "--image", "in.png", "--steps", "2", "--seed", "1", "--json")
    for more, size in (
        (("--strength", "0.5"), [32, 24]),
        (("--mask", "white.png"), [32, 24]),
        (("--change-map", "white.png"), [32, 24]),
        (("--outpaint", "0,8,4,4"), [40, 32]),
    ):
        code, out, said = stepfuse(*common, *more, "-o", "out.png")
        assert code == 0, said
        settings = json.loads(out)[0]["settings"]
        assert [settings["width"], settings["height"]] == size
        assert list(Image.open(tmp_path / "out.png").size) == size


def test_loras_and_learned_words_change_the_picture(stepfuse, tmp_path: Path) -> None:
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_q"
    with Engine.load("shapes", device="cpu") as engine:
        wide = engine.components.denoiser.get_parameter("down_blocks.0.resnets.0.time_emb_proj.weight").shape[0]
    save_file(
        {f"{layer}.lora_down.weight": torch.ones(1, wide), f"{layer}.lora_up.weight": torch.ones(wide, 1)},
        tmp_path / "style.safetensors",
    )
    save_file({"toy": torch.ones(1, 128)}, tmp_path / "toy.safetensors")
    ways = {"plain": (), "lora": ("--lora", "style.safetensors:0.5"), "word": ("--embedding", "toy.safetensors"),
            "none": ("--lora", "style.safetensors:-0")}  # fmt: skip
    for name, more in ways.items():
        code, _, said = stepfuse("generate", "a red toy", "--seed", "7", "--steps", "2", "-o", f"{name}.png", *more)
        assert code == 0, said
    pixels = {name: Image.open(tmp_path / f"{name}.png").tobytes() for name in ways}
    assert pixels["plain"] == pixels["none"]
    assert len(set(pixels.values())) == 3


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["generate", "x", "--model", "absent/folder/here"], 3, "no checkpoint at absent/folder/here"),
        (["generate", "x", "--sampler", "eulr"], 2, "unknown sampler 'eulr'; did you mean 'euler'"),
        (["generate", "x", "--steps", "0"], 2, "steps: got 0, expected a whole number >= 1"),
        (["generate", "x", "--guidance", "nan"], 2, "guidance_scale: got nan"),
        (["generate", "x", "--size", "63x64"], 2, "width: got 63, expected a multiple of"),
        (["generate", "x", "--size", "big"], 2, "expected WIDTHxHEIGHT"),
        (["generate", "x", "-o", "a.jpg"], 2, "expected a name ending in .png"),
        (["generate", "x", "-o", "no/such/a.png"], 2, "does not exist; create it first"),
        (["generate", "x", "--prompts", "absent.txt"], 2, "give one of them"),
        (["generate", "--prompts", "absent.txt"], 2, "absent.txt is not a file"),
        (["generate"], 2, "give either prompt or prompt_embeds"),
        (["generate", "x", "--device", "mps"], 4, "'mps' is not supported"),
        (["generate", "x", "--lora", "absent.safetensors:0.8"], 3, "LoRA absent.safetensors: no such file"),
        (["generate", "x", "--embedding", "absent.safetensors"], 3, "embedding absent.safetensors: no such file"),
        (["generate", "x", "--lora", "shapes-dom"], 3, "no such file or folder; `stepfuse models` lists the built-in"),
        (["generate", "x", "--lora", "shapes-dome:x"], 2, "--lora: got 'shapes-dome:x', expected a strength such as"),
        (["generate", "x", "--embedding", "shapes-moon"], 3, "no such file; `stepfuse models` lists the built-in ones"),
        (["generate", "x", "--class-label", "3"], 2, "class_labels: shapes is conditioned on text; leave them out"),
        (["generate", "--class-label", "-1"], 2, "--class-label: got '-1', expected a number such as 3"),
        (["generate", "--class-label", "3,"], 2, "--class-label: got '3,', expected a number such as 3"),
        (["generate", "x", "--image", "no.png"], 2, "image: no file 'no.png'"),
        (["generate", "x", "--image", "in.png", "--mask", "no.png"], 2, "mask: no file 'no.png'"),
        (["generate", "x", "--image", "https://a.com/b.png"], 2, "nothing is downloaded"),
        (["generate", "x", "--strength", "0.5"], 2, "strength: got one without an image"),
        (["generate", "x", "--outpaint", "1,2,3"], 2, "expected L,R,T,B in pixels"),
        (["generate", "x", "--outpaint", "0,0,0,0"], 2, "expected L,R,T,B in pixels"),
        (["generate", "x", "--outpaint", "1,2,3,4"], 2, "--outpaint: needs --image"),
        (
            ["generate", "x", "--image", "a.png", "--outpaint", "1,2,3,4", "--change-map", "b.png"],
            2,
            "leave out --mask",
        ),
        (["generate", "x", "--image", "in.png", "--strength", "2"], 2, "expected a number above 0, up to 1"),
        (["generate", "x", "--image", "in.png", "--noise-level", "3"], 2, "noise_level: shapes is no upscaler"),
        (["generate", "x", "--control", "canny:in.png"], 2, "load it with --controlnet canny=FOLDER"),
        (["generate", "x", "--controlnet", "a=b", "--controlnet", "a=c"], 2, "--controlnet: got two called 'a'"),
        (["generate", "x", "--controlnet", "a=absent"], 3, "no checkpoint at absent"),
        (["generate", "x", "--cascade", "hires"], 2, "did you mean 'hires-fix'"),
        (["generate", "x", "--cascade", "broken.yaml"], 2, "broken.yaml is no YAML"),
        (["generate", "x", "--upscale", "lanczos"], 2, "such as 'lanczos:2'"),
        (["generate", "x", "--upscale", "lanczos:17"], 2, "got a factor of 17, expected above 0, up to 16"),
        (["generate", "x", "--upscale", "lanczos:x"], 2, "--upscale: got 'lanczos:x', expected lanczos:FACTOR"),
        (["generate", "x", "--runtime", "onnxruntime"], 3, "stepfuse export onnx shapes -o FOLDER"),
        (["generate", "x", "--n", "0"], 2, "n: got 0, expected a whole number >= 1"),
        (["generate", "x", "--n", "two"], 2, "'--n'"),
        (["generate", "x", "y"], 2, "extra argument"),
        (["generate", "x", "--imagee", "in.png"], 2, "--imagee"),
        (["generat", "x"], 2, "No such command 'generat'"),
        (["generate", "x", "-o", "folder.png"], 2, "folder.png is a folder"),
        (["generate", "--prompts", "latin.txt"], 2, "latin.txt is not UTF-8 text"),
        (["generate", "x", "--model", "[/red]"], 3, "no checkpoint at [/red]"),
        (["generate", "x", "--lora", "a:x:.safetensors"], 3, "LoRA a:x:.safetensors: no such file"),
        (["upscale", "in.png"], 2, "such as --scale 2"),
        (["upscale", "in.png", "--scale", "-2"], 2, "--scale: got -2"),
        (["upscale", "no.png", "--scale", "2"], 2, "image: no file 'no.png'"),
        (["upscale", "in.png", "--model", "x.pth"], 3, "x.pth is pickled"),
    ],
)
def test_errors_are_one_line_with_a_fix_and_an_exit_code(
    stepfuse, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    Image.new("RGB", (32, 24), "red").save(tmp_path / "in.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "broken.yaml").write_text("stages: [\n")
    found, out, err = stepfuse(*arguments)
    assert found == code, err
    assert out == ""
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_an_error_of_no_kind_of_ours_is_one_line_too_and_vv_says_where(stepfuse, monkeypatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("no [route] to :host:")

    monkeypatch.setattr(Engine, "load", fail)
    code, _, err = stepfuse("generate", "x")
    assert (code, err) == (1, "error: ConnectionError: no [route] to :host: (-vv shows where)\n")
    code, _, err = stepfuse("-vv", "generate", "x")
    assert code == 1
    assert "Traceback" in err


def test_pictures_that_were_made_before_an_error_are_there(stepfuse, tmp_path: Path, monkeypatch) -> None:
    from stepfuse.engine import pipeline

    decode, calls = pipeline.decode, []

    def decode_one(*arguments: object, **more: object) -> object:
        calls.append(1)
        if len(calls) > 1:
            raise NumericsError("NaN in the second picture")
        return decode(*arguments, **more)

    monkeypatch.setattr(pipeline, "decode", decode_one)
    (tmp_path / "two.txt").write_text("a red circle\na blue square\n")
    code, _, err = stepfuse("generate", "--prompts", "two.txt", "--steps", "2", "-o", "p.png", "--device", "cpu")
    assert (code, "NaN in the second picture" in err) == (5, True)
    assert [path.name for path in tmp_path.glob("*.png")] == ["p-000.png"]


def test_json_lists_the_stages_of_a_cascade(stepfuse) -> None:
    code, out, err = stepfuse("generate", "a red circle", "--steps", "2", "--size", "32x32", "--cascade", "hires-fix",
                              "--upscale", "lanczos:1.5", "-o", "x.png", "--json")  # fmt: skip
    assert code == 0, err
    (made,) = json.loads(out)
    assert [stage["settings"]["width"] for stage in made["stages"]] == [32, 64]
    assert Image.open("x.png").size == (96, 96)


def test_a_model_without_text_enlarges_a_picture(stepfuse, tmp_path: Path) -> None:
    Image.new("RGB", (32, 24), "red").save(tmp_path / "in.png")
    common = ("generate", "--model", "shapes-x4", "--image", "in.png", "--steps", "1", "-o", "x.png")
    code, _, err = stepfuse(*common, "--noise-level", "0")
    assert code == 0, err
    assert Image.open(tmp_path / "x.png").size == (128, 96)


def test_a_model_of_classes_takes_labels(stepfuse, tmp_path: Path) -> None:
    """One for all images, or one for each, and no prompt."""
    save(tmp_path / "classes", NETWORK | {"num_class_embeds": 4})
    common = ("generate", "--model", "classes", "--seed", "3", "--steps", "1", "--n", "2")
    for labels in ("3", "3,1"):
        code, _, err = stepfuse(*common, "--class-label", labels, "-o", f"{labels}.png")
        assert code == 0, err
    pixels = {(labels, seed): Image.open(tmp_path / f"{labels}-{seed}.png").tobytes()
              for labels in ("3", "3,1") for seed in (3, 4)}  # fmt: skip
    assert pixels["3", 3] == pixels["3,1", 3]
    assert pixels["3", 4] != pixels["3,1", 4]
    code, _, err = stepfuse(*common, "--n", "3", "--class-label", "3,1")
    assert (code, "class_labels: got (3, 1), expected 3 class numbers" in err) == (2, True)


def test_a_warning_is_said_once(stepfuse) -> None:
    code, _, err = stepfuse("generate", "x", "--negative", "y", "--guidance", "1", "--steps", "1", "-o", "x.png")
    assert code == 0
    assert err.count("negative_prompt has no effect") == 1
    assert "no effect" not in stepfuse("-q", "generate", "x", "--negative", "y", "--guidance", "1", "--steps", "1")[2]


def test_what_texts_of_options_mean() -> None:
    given = {"a:b.png": ("a", "b.png", 1.0), "a:C:/b.png:.5": ("a", "C:/b.png", 0.5), "a:b:2": ("a", "b", 2.0)}
    for text, expected in given.items():
        found = read_control(text)
        assert (found.name, found.image, found.scale) == expected
    for wrong in ("a", "a:", ":b.png"):
        with pytest.raises(RequestError, match=r"--control: got .*, expected NAME:IMAGE"):
            read_control(wrong)
    assert read_controlnets(["a=x=y", "b=z"]) == {"a": "x=y", "b": "z"}
    for wrong in ("a", "a=", "=x"):
        with pytest.raises(RequestError, match=f"--controlnet: got '{wrong}', expected NAME=FOLDER"):
            read_controlnets([wrong])
    assert read_lora("C:/a.safetensors:-.5") == ("C:/a.safetensors", -0.5)
    assert read_lora("a:b") == ("a:b", 1.0)
    assert read_upscale("lanczos:1.5") == ("lanczos:1.5", None)
    assert read_upscale("n=C:/x.safetensors:2") == ("n:2", ("n", "C:/x.safetensors"))
    assert read_size("64X96") == {"width": 64, "height": 96}


def test_version_models_and_doctor(stepfuse) -> None:
    from stepfuse import __version__

    assert stepfuse("--version")[1].strip() == f"stepfuse {__version__}"
    code, out, _ = stepfuse("models")
    assert code == 0
    assert "shapes" in out
    assert "sdxl" in out
    code, out, _ = stepfuse("doctor")
    assert code in (0, 4)
    for topic in ("python", "torch", "triton", "xformers", "kernels"):
        assert topic in out


@pytest.mark.slow
def test_quiet_in_a_pipe_and_interruptible(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "stepfuse", "-q", "generate", "a red circle", "--steps", "2", "-o", "q.png"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == ""
    assert done.stderr == ""
    assert (tmp_path / "q.png").exists()
