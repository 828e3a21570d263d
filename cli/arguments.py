"""What the texts of options mean. Imports no torch; every function raises RequestError naming its option."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..engine.errors import RequestError
from ..engine.families import builtin_file
from ..engine.request import Control

NUMBER = r"\d+(?:\.\d*)?|\.\d+"


def read_prompts(prompt: str | None, file: Path | None) -> list[str | None]:
    """The one prompt, or those of a file, one per line; empty lines are left out."""
    if prompt is not None and file is not None:
        raise RequestError("got a prompt and --prompts; give one of them")
    if file is None:
        return [prompt]
    if not file.is_file():
        raise RequestError(f"--prompts: {file} is not a file; give a text file with one prompt per line")
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise RequestError(f"--prompts: {file} is not UTF-8 text ({error.reason}); save it as UTF-8") from None
    if not any(lines):
        raise RequestError(f"--prompts: {file} has no prompts; write one per line")
    return [line for line in lines if line]


def read_size(text: str | None) -> dict[str, int]:
    """Fields width and height of "512x768"; none for None."""
    if text is None:
        return {}
    width, cross, height = text.lower().partition("x")
    if not (cross and width.isdecimal() and height.isdecimal()):
        raise RequestError(f"--size: got {text!r}, expected WIDTHxHEIGHT such as 512x768")
    return {"width": int(width), "height": int(height)}


def read_class_labels(text: str | None) -> int | tuple[int, ...] | None:
    """Field class_labels of "3", for all images, or of "3,5", one for each."""
    if text is None:
        return None
    labels = text.split(",")
    if not all(label.strip().isdecimal() for label in labels):
        raise RequestError(f"--class-label: got {text!r}, expected a number such as 3, or one for every image: 3,5")
    return int(text) if len(labels) == 1 else tuple(map(int, labels))


def read_pictures(
    image: Path | None, mask: Path | None, change_map: Path | None, outpaint: str | None
) -> dict[str, Any]:
    """Fields image, mask and change_map. outpaint: "LEFT,RIGHT,TOP,BOTTOM", pixels of room, which the mask paints."""
    if outpaint is None:
        return {"image": image, "mask": mask, "change_map": change_map}
    sides = outpaint.split(",")
    if len(sides) != 4 or not all(side.strip().isdecimal() for side in sides) or not any(map(int, sides)):
        raise RequestError(f"--outpaint: got {outpaint!r}, expected L,R,T,B in pixels, such as 64,64,0,0")
    if image is None or mask is not None or change_map is not None:
        raise RequestError("--outpaint: needs --image, and makes the mask itself; leave out --mask and --change-map")
    from ..engine.conditioning.images import expand, load_image

    expanded, painted = expand(load_image(image), *map(int, sides))
    return {"image": expanded, "mask": painted}


def read_controlnets(texts: Sequence[str] | None) -> dict[str, str]:
    """Name -> folder of "NAME=FOLDER"."""
    found: dict[str, str] = {}
    for text in texts or ():
        name, _, folder = text.partition("=")
        if not (name and folder):
            raise RequestError(f"--controlnet: got {text!r}, expected NAME=FOLDER")
        if name in found:
            raise RequestError(f"--controlnet: got two called {name!r}; give each its own name")
        found[name] = folder
    return found


def read_controls(texts: Sequence[str] | None, nets: Sequence[str]) -> tuple[Control, ...]:
    """Of "NAME:IMAGE" or "NAME:IMAGE:SCALE". nets: the names that are loaded."""
    found = tuple(map(read_control, texts or ()))
    for control in found:
        if control.name not in nets:
            raise RequestError(
                f"--control: got {control.name!r}, expected the name of a --controlnet ({', '.join(nets) or 'none'}); "
                f"load it with --controlnet {control.name}=FOLDER"
            )
    return found


def read_control(text: str) -> Control:
    """Of "NAME:IMAGE" or "NAME:IMAGE:SCALE"."""
    found = re.fullmatch(rf"([^:]+):(.+?)(?::({NUMBER}))?", text)
    if found is None:
        raise RequestError(f"--control: got {text!r}, expected NAME:IMAGE or NAME:IMAGE:SCALE")
    name, image, scale = found.groups()
    return Control(name=name, image=image, scale=float(scale or 1))


def read_upscale(text: str | None) -> tuple[str | None, tuple[str, str] | None]:
    """Field upscale of "NAME[=FILE][:FACTOR]", and the name and file of a network to load for it."""
    if text is None:
        return None, None
    found = re.fullmatch(rf"([^=:]+)(?:=(.+?))?(:(?:{NUMBER}))?", text)
    if found is None:
        raise RequestError(f"--upscale: got {text!r}, expected lanczos:FACTOR or NAME=FILE.safetensors or both")
    name, file, factor = found.groups()
    return name + (factor or ""), None if file is None else (name, file)


def read_lora(text: str) -> tuple[str, float]:
    """Path and strength of "PATH" or "PATH:STRENGTH"."""
    path, _, strength = text.rpartition(":")
    if path and re.fullmatch(rf"[+-]?(?:{NUMBER})", strength):
        return path, float(strength)
    if path and Path(builtin_file(path)).exists() and not Path(text).exists():
        raise RequestError(f"--lora: got {text!r}, expected a strength such as 0.8 behind {path}:")
    return text, 1.0


def check_output(output: Path) -> None:
    """Nothing is computed for a picture that cannot be written."""
    if output.suffix.lower() != ".png":
        raise RequestError(f"--output: got {output.name!r}, expected a name ending in .png")
    if not output.resolve().parent.is_dir():
        raise RequestError(f"--output: the folder {output.resolve().parent} does not exist; create it first")
    if output.is_dir():
        raise RequestError(f"--output: {output} is a folder; give the name of a file")
