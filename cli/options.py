"""Options of the command line: how they are spelled and what `--help` says. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Option("--model", "-m", help="Built-in name, checkpoint folder, or hub id org/name.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N. Default: cuda if there is one.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bf16, fp16. Default: bf16 on CUDA, float32 on CPU.")]
Runtime = Annotated[
    str, typer.Option(help="torch; of a folder that was exported onnxruntime, tensorrt, tensorrt_rtx or aoti.")
]
Variant = Annotated[str | None, typer.Option(help="Weight file variant, e.g. fp16.")]
Download = Annotated[bool, typer.Option("--download", help="Fetch a hub id that is not in the local cache.")]

Prompt = Annotated[str | None, typer.Argument(help="What to draw.")]
Prompts = Annotated[Path | None, typer.Option(help="Text file with one prompt per line.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="PNG to write; with several images NAME-<seed>.png.")]
Json = Annotated[bool, typer.Option("--json", help="Print what was made as JSON on standard output.")]

Negative = Annotated[str | None, typer.Option(help="What to avoid.")]
ClassLabel = Annotated[
    str | None,
    typer.Option(metavar="N[,N...]", help="Class, for models of classes; several: one for every image."),
]
Seed = Annotated[int | None, typer.Option(help="First seed; image i uses seed + i. Default: random, reported.")]
Steps = Annotated[int | None, typer.Option(help="Sampling steps.")]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale; 1 turns guidance off.")]
Sampler = Annotated[str | None, typer.Option(help="ddim, euler, euler_a, heun, dpmpp_2m, ...")]
Schedule = Annotated[str | None, typer.Option(help="karras, exponential, ...")]
Size = Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels.")]
Count = Annotated[int, typer.Option("--n", "-n", help="Images per prompt.")]

Picture = Annotated[Path | None, typer.Option(help="Picture to change, to fill in or to enlarge.")]
Mask = Annotated[Path | None, typer.Option(help="White is painted anew.")]
ChangeMap = Annotated[Path | None, typer.Option(help="Brightness is the strength of every pixel.")]
Strength = Annotated[float | None, typer.Option(help="How much of the schedule is run on --image, up to 1.")]
NoiseLevel = Annotated[int | None, typer.Option(help="Noise on the image that an upscaler enlarges.")]
Blur = Annotated[float | None, typer.Option(help="Gaussian blur of that image before the noise, in its pixels.")]
Outpaint = Annotated[
    str | None, typer.Option(metavar="L,R,T,B", help="Pixels to add to --image: left, right, top, bottom.")
]

ControlNets = Annotated[
    list[str] | None, typer.Option(metavar="NAME=FOLDER", help="Load a ControlNet (or NAME=shapes-silhouette).")
]
Controls = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME:IMAGE[:SCALE]", help="Run it on a picture. May be given several times."),
]
LoRAs = Annotated[
    list[str] | None,
    typer.Option(metavar="PATH[:STRENGTH]", help="Merge a LoRA: a file, or shapes-dome. May be repeated."),
]
Embeddings = Annotated[list[Path] | None, typer.Option(help="A learned word: a file, or shapes-sun. May be repeated.")]
Cascade = Annotated[
    str | None, typer.Option(help="Stages to go through: hires-fix, shapes-x4 or a .yaml file (docs/cascades.md).")
]
Upscale = Annotated[
    str | None,
    typer.Option(metavar="NAME[=FILE][:FACTOR]", help="Enlarge the images: lanczos:2, or a network of a file."),
]
