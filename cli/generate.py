"""`stepfuse generate`: requests of the options, an engine, files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from . import options
from .arguments import (
    check_output,
    read_class_labels,
    read_controlnets,
    read_controls,
    read_lora,
    read_pictures,
    read_prompts,
    read_size,
    read_upscale,
)
from .terminal import err, watch

if TYPE_CHECKING:
    from ..engine.request import Result


def generate(
    prompt: options.Prompt = None,
    output: options.Output = Path("image.png"),
    model: options.Model = "shapes",
    negative: options.Negative = None,
    class_label: options.ClassLabel = None,
    seed: options.Seed = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    sampler: options.Sampler = None,
    schedule: options.Schedule = None,
    size: options.Size = None,
    n: options.Count = 1,
    image: options.Picture = None,
    mask: options.Mask = None,
    change_map: options.ChangeMap = None,
    strength: options.Strength = None,
    noise_level: options.NoiseLevel = None,
    blur: options.Blur = None,
    outpaint: options.Outpaint = None,
    controlnet: options.ControlNets = None,
    control: options.Controls = None,
    lora: options.LoRAs = None,
    embedding: options.Embeddings = None,
    cascade: options.Cascade = None,
    upscale: options.Upscale = None,
    prompts: options.Prompts = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    runtime: options.Runtime = "torch",
    variant: options.Variant = None,
    download: options.Download = False,
    as_json: options.Json = False,
) -> None:
    """Turn a prompt into a picture."""
    from ..engine.request import build_request

    nets, (enlarge, network) = read_controlnets(controlnet), read_upscale(upscale)
    fields = {"negative_prompt": negative, "class_labels": read_class_labels(class_label), "seed": seed, "steps": steps,
              "guidance_scale": guidance, "sampler": sampler, "schedule": schedule, "n": n, "strength": strength,
              "noise_level": noise_level, "blur": blur, "upscale": enlarge,
              "controls": read_controls(control, list(nets)), **read_size(size),
              **read_pictures(image, mask, change_map, outpaint)}  # fmt: skip
    requests = [build_request(text, fields) for text in read_prompts(prompt, prompts)]
    check_output(output)
    where = {"device": device, "dtype": dtype, "runtime": runtime, "variant": variant, "download": download}
    from ..engine.engine import Engine

    with err.status(Text(f"loading {model}")):
        engine = Engine.load(model, controlnets=nets, **where)
    with engine:
        if network is not None:
            engine.add_upscaler(*network)
        if lora:
            engine.set_loras(list(map(read_lora, lora)))
        if embedding:
            engine.set_embeddings(embedding)
        jobs = [engine.submit(request, cascade=cascade) for request in requests]
        made = [_save(result, output, index, len(jobs)) for index, result in enumerate(watch(jobs))]
    _tell(made, as_json)


def _save(result: Result, output: Path, index: int, count: int) -> dict[str, Any]:
    """Write the pictures of one of `count` prompts; what was made, for JSON."""
    name = output if count == 1 else output.with_name(f"{output.stem}-{index:03d}{output.suffix}")
    paths = result.save(name)
    stages = [_facts(stage) for stage in result.stages]
    entry = {"files": [str(path) for path in paths], "prompt": result.request.prompt, **_facts(result)}
    return entry | {"warnings": list(result.warnings)} | ({"stages": stages} if stages else {})


def _facts(result: Result) -> dict[str, Any]:
    return {
        "seeds": list(result.seeds),
        "settings": dict(result.settings),
        "timings": dict(result.timings),
        "model": result.model,
    }


def _tell(made: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(made, indent=2) + "\n")
    else:
        for entry in made:
            err.print(f"{', '.join(entry['files'])}  ({entry['timings']['total']:.2f} s, seeds {entry['seeds']})")
