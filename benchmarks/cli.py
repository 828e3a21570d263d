"""`stepfuse bench ...`: measurements of this machine. Imports torch only when a measurement runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ..engine.errors import RequestError

if TYPE_CHECKING:
    from ..engine.engine import Engine

app = typer.Typer(help="Measure this machine.", no_args_is_help=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

Model = Annotated[str, typer.Option("--model", "-m", help="'shapes', a checkpoint folder, or a hub name org/name.")]
Prompt = Annotated[str, typer.Option(help="Prompt of every request.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Sampler steps.")]
Size = Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels.")]
Sampler = Annotated[str | None, typer.Option(help="Sampler; the checkpoint's own by default.")]
Device = Annotated[str | None, typer.Option(help="cuda, cuda:1, cpu.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bf16, fp16.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the records instead of tables.")]
Save = Annotated[Path | None, typer.Option(help="Append the records to this file of JSON lines.")]
Note = Annotated[str | None, typer.Option(help="Said with every record, such as 'shared machine'.")]
Images = Annotated[int, typer.Option("--n", min=1, help="Images per request.")]
Load = Annotated[
    str, typer.Option(help="'mixed', 'sizes', 'loras', 'mixed_loras', 'alike', or a JSON file of field -> values.")
]
DRAWN = "a red circle above a blue square"


@app.callback()
def bench() -> None:
    """Measure this machine. Rules of measuring, and what was never measured: docs/benchmarks.md."""


@app.command()
def latency(
    model: Model = "shapes",
    prompt: Prompt = DRAWN,
    repeats: Annotated[int, typer.Option(min=1, help="Requests that are timed.")] = 10,
    warmup: Annotated[int, typer.Option(min=0, help="Requests before them that are not.")] = 2,
    n: Images = 1,
    rows: Annotated[str | None, typer.Option(help="Images in one batch: '1-8', or '1,2,4'; in place of --n.")] = None,
    steps: Steps = None,
    size: Size = None,
    sampler: Sampler = None,
    device: Device = None,
    dtype: Dtype = None,
    ceiling: Annotated[
        float | None, typer.Option(min=0, help="Seconds of the matrix product that is the roof; 0: none. CUDA: 10.")
    ] = None,
    startup: Annotated[bool, typer.Option("--startup", help="Also time processes from start to first image.")] = False,
    as_json: AsJson = False,
    save: Save = None,
    note: Note = None,
) -> None:
    """Time requests one after the other: every phase and end to end, by images in one batch."""
    counts = _counts(rows) if rows else [n]
    chosen = {k: v for k, v in {"steps": steps, "sampler": sampler, **_pixels(size)}.items() if v is not None}

    from . import latencies
    from .latency import Workload

    workload = Workload(model=model, prompt=prompt, repeats=repeats, warmup=warmup, options=tuple(chosen.items()))
    with _engine(model, device, dtype, max_rows=max(8, *counts)) as engine, _Progress() as progress:
        records = _saved(latencies.records(engine, workload, counts, ceiling, progress.notice), save, note)
    if startup:
        with err.status("starting processes"):
            given = {"steps": steps, "size": size, "sampler": sampler, "device": device, "dtype": dtype}
            records += _saved([latencies.startup_record(model, given, records[0]["fingerprint"])], save, note)
    _show(records, as_json, latencies.lines(records))


@app.command()
def throughput(
    model: Model = "shapes",
    mix: Load = "mixed",
    requests: Annotated[int, typer.Option(min=4, help="Requests of one run.")] = 60,
    clients: Annotated[int, typer.Option(min=1, help="Clients of the closed loop.")] = 8,
    rates: Annotated[
        str | None, typer.Option(help="Requests per second, '2,4,6'; default: from the closed loop.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each front at every rate.")] = 2,
    max_rows: Annotated[int, typer.Option(min=1, help="Most images in one batch, of both fronts.")] = 8,
    wait: Annotated[float, typer.Option(min=0, help="Milliseconds that a static batch waits for more.")] = 50.0,
    slo: Annotated[float | None, typer.Option(min=0, help="The 95th percentile compared at, seconds.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the requests and their arrival times.")] = 0,
    device: Device = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
    save: Save = None,
    note: Note = None,
) -> None:
    """Rows against static batching: a closed loop, then Poisson arrivals of unlike requests at several rates."""
    from . import harness
    from .mix import Mix
    from .throughput import Plan, records, table

    plan = Plan(
        mix=Mix.load(mix), requests=requests, clients=clients, rates=_numbers("--rates", rates), rounds=rounds,
        seed=seed, wait_s=1e-3 * wait, slo_s=slo,
    )  # fmt: skip
    with _engine(model, device, dtype, max_rows=max_rows, loras=plan.mix.loras) as engine, _Progress() as progress:
        machine = harness.fingerprint(str(engine.components.config.device))
        made = _saved(records(engine, plan, machine, progress.notice), save, note)
    _show(made, as_json, table(made))
    raise typer.Exit(int(not all(gate["green"] for gate in made[-1]["gates"].values())))


@app.command()
def cascade(
    cascade: Annotated[str, typer.Option(help="A built-in cascade or a YAML file of one.")] = "shapes-x4",
    model: Model = "shapes",
    mix: Load = "mixed",
    requests: Annotated[int, typer.Option(min=2, help="Requests of one run, all there from the start.")] = 8,
    rounds: Annotated[int, typer.Option(min=3, help="Runs of each way.")] = 5,
    budget: Annotated[float, typer.Option(min=0.1, help="Seconds of timing, after three rounds.")] = 120.0,
    max_rows: Annotated[int, typer.Option(min=1, help="Most images in one update, of every way.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Of the requests.")] = 0,
    timeline: Annotated[Path | None, typer.Option(help="PNG of when every request was updated.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
    save: Save = None,
    note: Note = None,
) -> None:
    """Requests through a cascade: re-batched at every stage, one after the other, and stage after stage."""
    from ..engine.cascade import Cascade
    from . import cascades, figures, harness
    from .mix import Mix

    plan = cascades.Plan(cascade=Cascade.of(cascade), mix=Mix.load(mix), requests=requests, rounds=rounds,
                         budget_s=budget, seed=seed)  # fmt: skip
    with _engine(model, device, dtype, max_rows=max_rows, loras=plan.mix.loras) as engine, _Progress() as progress:
        machine = harness.fingerprint(str(engine.components.config.device))
        made = _saved([cascades.record(engine, plan, machine, progress.notice)], save, note)
    if timeline:
        figures.cascade_timelines(made, timeline)
    _show(made, as_json, cascades.table(made[0]))
    raise typer.Exit(int(not all(facts["gate"]["green"] for facts in made[0]["variants"].values())))


@app.command()
def compare(
    arch: Annotated[
        str, typer.Option(help="shapes, sd15, sd2, sdxl (random weights, made in place), tiny.")
    ] = "shapes",
    size: Size = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Images in one update; two rows each.")] = 1,
    phases: Annotated[str, typer.Option(help="Of update, decode, end-to-end (shapes only).")] = "",
    steps: Annotated[int, typer.Option(min=1, help="Sampler steps, end to end.")] = 20,
    rounds: Annotated[int, typer.Option(min=3, help="Rounds of every variant.")] = 12,
    budget: Annotated[float, typer.Option(min=0.1, help="Seconds of timing per phase, after three rounds.")] = 60.0,
    compiled: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="torch.compile as a rival; default on CUDA only.")
    ] = None,
    exported: Annotated[
        bool | None, typer.Option("--onnx/--no-onnx", help="Our ONNX export by ONNX Runtime; default for shapes only.")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
    save: Save = None,
    note: Note = None,
) -> None:
    """Ours against diffusers, and our ONNX export, on the same weights, interleaved, with errors beside times."""
    from . import comparison

    options = {"arch": arch, "device": device, "dtype": dtype, "images": n, "rounds": rounds, "budget_s": budget,
               "compiled": compiled, "exported": exported, "steps": steps, **_pixels(size)}  # fmt: skip
    wanted = tuple(part for part in phases.split(",") if part)
    with err.status("loading") as status:
        made = _saved(comparison.records(wanted, notice=status.update, **options), save, note)
    _show(made, as_json, comparison.table(made))
    raise typer.Exit(int(any(comparison.red(record) for record in made)))


@app.command()
def profile(
    trace: Annotated[
        Path | None, typer.Option(help="Write a Chrome trace (chrome://tracing, ui.perfetto.dev).")
    ] = None,
    nvtx_only: Annotated[bool, typer.Option("--nvtx-only", help="Ranges only, to run under nsys; CUDA.")] = False,
    model: Model = "shapes",
    prompt: Prompt = DRAWN,
    n: Images = 1,
    steps: Steps = None,
    size: Size = None,
    sampler: Sampler = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
    save: Save = None,
    note: Note = None,
) -> None:
    """Where the time of one request goes, by kind of kernel; NVTX ranges name the networks and their blocks."""
    chosen = {k: v for k, v in {"steps": steps, "sampler": sampler, **_pixels(size)}.items() if v is not None}

    from . import harness, profiling
    from .latency import Workload

    workload = Workload(model=model, prompt=prompt, n=n, warmup=2, options=tuple(chosen.items()))
    with _engine(model, device, dtype, max_rows=max(8, n)) as engine, err.status("warming up") as status:
        if nvtx_only and engine.components.config.device.type != "cuda":
            raise RequestError("--nvtx-only: got a CPU, expected a CUDA device; leave it out for shares by operation")
        if nvtx_only:
            return profiling.mark_only(engine, workload)
        found = profiling.measure(engine, workload, trace, status.update)
        machine = harness.fingerprint(str(engine.components.config.device))
    conditions = {"model": model, "n": n, **chosen}
    record = harness.measurement("profile", f"{model} n={n}", None, "", machine, conditions, **found)
    _show(_saved([record], save, note), as_json, profiling.table(found))


@app.command()
def report(
    results: Annotated[list[Path], typer.Argument(help="Files of JSON lines, from --save.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Markdown to write; pictures go beside it.")] = Path(
        "report.md"
    ),
) -> None:
    """Turn saved records into Markdown and pictures: latency, knee, timeline, fractions of roofs."""
    from . import harness
    from .report import write

    records = []
    for path in results:
        if not path.is_file():
            raise RequestError(f"{path} is not a file; give files that --save of a measurement wrote")
        records += harness.read(path)
    for path in write(records, output):
        err.print(f"wrote {path}")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)
def kernels(context: typer.Context) -> None:
    """Time every op against its rivals; options as of `python -m stepfuse.benchmarks.kernels`, see --help."""
    from .kernels import main

    raise typer.Exit(main(context.args))


class _Progress:
    """A bar for whatever runs; nothing where standard error is no terminal."""

    def __enter__(self) -> _Progress:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=err, disable=not err.is_terminal, transient=True)
        self._bar.start()
        self._task = self._bar.add_task("starting", total=None)
        self._what = ""
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def notice(self, what: str, done: int, total: int) -> None:
        """`done` of `total` of `what`."""
        if what != self._what:
            self._what = what
            self._bar.reset(self._task)
        self._bar.update(self._task, description=what, completed=done, total=total)


def _engine(
    model: str, device: str | None, dtype: str | None, max_rows: int, loras: Mapping[str, str] | None = None
) -> Engine:
    from ..engine.engine import Engine

    with err.status(f"loading {model}"):
        return Engine.load(model, device=device, dtype=dtype, max_rows=max_rows, loras=loras or {})


def _saved(records: Iterable[dict[str, Any]], save: Path | None, note: str | None) -> list[dict[str, Any]]:
    """The records, each appended to `save` as soon as it is measured: what is there survives whatever comes."""
    from . import harness

    made = []
    for record in records:
        if note:
            record["conditions"] |= {"note": note}
        if save:
            harness.append(save, record)
        made.append(record)
    return made


def _show(records: Iterable[dict[str, Any]], as_json: bool, lines: Iterable[str]) -> None:
    shown = (json.dumps(record, default=str) for record in records) if as_json else lines
    sys.stdout.write("\n".join(shown) + "\n")


def _pixels(size: str | None) -> dict[str, int]:
    if size is None:
        return {}
    width, cross, height = size.lower().partition("x")
    if not (cross and width.isdecimal() and height.isdecimal()):
        raise typer.BadParameter(f"got {size!r}, expected WIDTHxHEIGHT such as 768x512", param_hint="--size")
    return {"width": int(width), "height": int(height)}


def _counts(text: str) -> list[int]:
    low, dash, high = text.partition("-")
    parts = [low, high] if dash else text.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts) or (dash and int(high) < int(low)):
        raise typer.BadParameter(
            f"got {text!r}, expected a range such as 1-8 or numbers such as 1,2,4", param_hint="--rows"
        )
    return list(range(int(low), int(high) + 1)) if dash else [int(part) for part in parts]


def _numbers(name: str, text: str | None, to: Callable[[str], float] = float) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        values = tuple(to(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or min(values) <= 0:
        raise typer.BadParameter(f"got {text!r}, expected positive numbers such as 2,4,6", param_hint=name)
    return values
