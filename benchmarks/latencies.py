"""The records of `stepfuse bench latency`: one per number of images in a batch, and one for the start of a process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from . import harness
from .latency import Workload, knee, measure

if TYPE_CHECKING:
    from ..engine.engine import Engine

PRODUCT = 8192  # side of the matrix product that is the roof
CUDA_SECONDS = 10.0

Notice = Callable[[str, int, int], None]


def records(
    engine: Engine, workload: Workload, counts: Sequence[int], ceiling: float | None, notice: Notice
) -> Iterator[dict[str, Any]]:
    """Measure `workload` with every number of images; each record holds the fingerprint.

    ceiling: seconds of the sustained product that is the roof; None: ten on CUDA, none on a CPU; 0: none.
    """
    from . import footprint
    from .ceilings import sustained_product

    config = engine.components.config
    cuda = config.device.type == "cuda"
    machine = harness.fingerprint(str(config.device))
    seconds = (CUDA_SECONDS if cuda else 0.0) if ceiling is None else ceiling
    roof = sustained_product(config.device, config.dtype, PRODUCT if cuda else 512, seconds) if seconds else None
    for count in counts:
        one = replace(workload, n=count)
        with footprint.PeakMemory(config.device) as memory:
            facts = measure(engine, one, lambda done, c=count: notice(f"{c} images", done, workload.repeats))
        facts |= {"peak_memory": memory.record(), "launches": footprint.per_update(engine, one)}
        facts["roof"] = _fraction(engine, facts, roof)
        conditions = {"model": workload.model, "n": count, "dtype": str(config.dtype).removeprefix("torch."),
                      "repeats": workload.repeats, **facts["settings"]}  # fmt: skip
        name = f"{workload.model} n={count}"
        yield harness.measurement("latency", name, facts["p50_s"], "s", machine, conditions, latency=facts)


def startup_record(model: str, options: dict[str, Any], machine: Mapping[str, Any]) -> dict[str, Any]:
    """Three processes, from their start to the picture on disk."""
    from . import startup

    found = startup.measure(model, options)
    conditions = {"model": model, **{k: v for k, v in options.items() if v is not None}}
    return harness.measurement("startup", model, found["p50_s"], "s", machine, conditions, **found)


def _fraction(engine: Engine, facts: Mapping[str, Any], roof: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """TFLOP/s while denoising, beside the product that was sustained in the same run; None without one."""
    if roof is None:
        return None
    from . import flops

    parts, settings = engine.components, facts["settings"]
    rows = facts["n"] * (2 if settings["guidance_scale"] > 1 and parts.guided else 1)
    latent = settings["height"] // parts.scale, settings["width"] // parts.scale
    work = 1e-12 * flops.of_update(parts.denoiser.config, rows, *latent)
    rate = work / facts["t_update_s"]
    return {"product": dict(roof), "tflop_per_update": work, "tflops": rate, "fraction": rate / roof["tflops"]}


def lines(records: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """The records for a terminal."""
    records = list(records)
    timed = [record for record in records if record["kind"] == "latency"]
    for index, record in enumerate(timed):
        facts, machine = record["latency"], record["fingerprint"]
        if index == 0:
            settings = ", ".join(f"{k}={v}" for k, v in facts["settings"].items() if v is not None)
            yield f"{facts['model']} on {record['device']}, torch {machine['packages']['torch']}"
            yield f"{settings}; {facts['repeats']} requests each"
        yield f"n={facts['n']}"
        yield f"  latency   p50 {facts['p50_s']:.3f} s   p90 {facts['p90_s']:.3f} s   p99 {facts['p99_s']:.3f} s"
        yield "  phases    " + "   ".join(
            f"{name} {value['p50_s']:.3f}/{value['p90_s']:.3f}/{value['p99_s']:.3f} s"
            for name, value in facts["phase_percentiles"].items()
        )
        yield f"  speed     {facts['it_per_s']:.2f} it/s   {facts['images_per_s']:.2f} images/s"
        memory, calls, roof = facts["peak_memory"], facts["launches"], facts["roof"]
        peak = "not told by this system" if memory["gb"] is None else f"{memory['gb']:.2f} GB"
        yield f"  memory    {peak} ({memory['what']})"
        yield f"  update    {1e3 * facts['t_update_s']:.2f} ms, {calls['per_update']:.0f} {calls['unit']}"
        if roof:
            yield f"  roof      {roof['tflops']:.3g} TFLOP/s, {100 * roof['fraction']:.0f} % of a sustained product"
    if len(timed) > 1:
        rates = {r["latency"]["n"]: r["latency"]["n"] * r["latency"]["it_per_s"] for r in timed}
        yield f"knee      {knee(rates)} images: 90 % of the highest rate while denoising"
    for record in (record for record in records if record["kind"] == "startup"):
        first = f"first time {record['first_s']:.2f} s"
        yield f"start-up  {record['value']:.2f} s from process start to first image ({first})"
