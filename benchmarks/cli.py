"""`stepfuse bench ...`: measurements of this machine. Imports torch only when a measurement runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

app = typer.Typer(help="Measure this machine.", no_args_is_help=True)


@app.callback()
def bench() -> None:
    """Measure this machine."""


@app.command()
def latency(
    model: Annotated[str, typer.Option(help="'shapes', a checkpoint folder, or a hub name org/name.")] = "shapes",
    prompt: Annotated[str, typer.Option(help="Prompt of every request.")] = "a red circle above a blue square",
    repeats: Annotated[int, typer.Option(min=1, help="Requests that are timed.")] = 10,
    warmup: Annotated[int, typer.Option(min=0, help="Requests before them that are not.")] = 2,
    n: Annotated[int, typer.Option("--n", min=1, help="Images per request.")] = 1,
    steps: Annotated[int | None, typer.Option(min=1, help="Sampler steps.")] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels.")] = None,
    sampler: Annotated[str | None, typer.Option(help="Sampler; the checkpoint's own by default.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda, cuda:1, cpu.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bf16, fp16.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record instead of the table.")] = False,
    save: Annotated[Path | None, typer.Option(help="Append the record to this file of JSON lines.")] = None,
) -> None:
    """Time requests one after the other: p50 and p90, updates and images per second."""
    options: dict[str, Any] = {"steps": steps, "sampler": sampler, **_pixels(size)}

    from ..engine.engine import Engine
    from . import harness
    from .latency import Workload, measure

    chosen = tuple((name, value) for name, value in options.items() if value is not None)
    workload = Workload(model=model, prompt=prompt, n=n, repeats=repeats, warmup=warmup, options=chosen)
    with Engine.load(model, device=device, dtype=dtype) as engine:
        facts = measure(engine, workload)
        place = str(engine.components.config.device)
    record = {"time": harness.now(), "fingerprint": harness.fingerprint(place), "latency": facts}
    if save:
        harness.append(save, record)
    if as_json:
        sys.stdout.write(json.dumps(record, indent=2, default=str) + "\n")
    else:
        _show(record, Console())


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)
def kernels(context: typer.Context) -> None:
    """Time every op against its rivals; options as of `python -m stepfuse.benchmarks.kernels`, see --help."""
    from .kernels import main

    raise typer.Exit(main(context.args))


def _pixels(size: str | None) -> dict[str, int]:
    if size is None:
        return {}
    width, cross, height = size.lower().partition("x")
    if not (cross and width.isdecimal() and height.isdecimal()):
        raise typer.BadParameter(f"got {size!r}, expected WIDTHxHEIGHT such as 768x512", param_hint="--size")
    return {"width": int(width), "height": int(height)}


def _show(record: dict[str, Any], console: Console) -> None:
    facts, machine = record["latency"], record["fingerprint"]
    settings = ", ".join(f"{name}={value}" for name, value in facts["settings"].items() if value is not None)
    where = machine.get("gpu") or f"{machine['processor']}, {machine['threads']} threads"
    console.print(f"{facts['model']} on {where}, torch {machine['packages']['torch']}", highlight=False)
    console.print(f"{settings}; {facts['repeats']} requests of n={facts['n']}", highlight=False)
    console.print(f"latency   p50 {facts['p50_s']:.3f} s   p90 {facts['p90_s']:.3f} s")
    console.print("phases    " + "   ".join(f"{name} {value:.3f} s" for name, value in facts["phases_s"].items()))
    console.print(f"speed     {facts['it_per_s']:.2f} it/s   {facts['images_per_s']:.2f} images/s")
