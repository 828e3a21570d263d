"""Time every op against its rivals: `python -m stepfuse.benchmarks.kernels [--op NAME ...] [--device cpu] [--quick]`.

Roofs first (a sustained matrix product; a copy of the same bytes with every shape), then each op at the shapes of the
models' own graphs: torch eager, torch.compile of the reference and every registered implementation, each with its error
against float64. --out writes JSON lines, --report FILE.md tables and a picture; docs/benchmarks.md has the rules.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from . import harness

DTYPES = ("bfloat16", "float16", "float32")


def main(arguments: list[str] | None = None) -> int:
    """Measure, or with --read only report; 0, or 1 where a shape could not be measured or a gate is red."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.read:
        records = harness.read(options.read)
        try:
            _write_report(records, options.report)
        except ValueError as error:
            parser.error(f"{options.read}: {error}")
        return 0
    records = []
    for record in run(options, parser):
        records.append(record)
        if options.out:
            harness.append(options.out, record)
        if line := summary(record):
            print(line, flush=True)
    from .kernel_report import measurements

    if measurements(records):
        _write_report(records, options.report)
    return int(any("error" in record for record in records) or red(records))


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> Iterator[dict[str, Any]]:
    """Records (`harness.measurement`) as they are measured: the sustained product, then one for every shape."""
    import torch

    from .ceilings import sustained_product
    from .kernel_measurement import VARIANT_ERRORS, Settings, measure

    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: torch sees no CUDA device here; --device cpu proves the code only")
    dtype = getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    torch.backends.cuda.matmul.allow_tf32 = False  # float32 is compared with float64
    torch.backends.cudnn.allow_tf32 = False
    wanted = chosen(options, parser)
    machine = harness.fingerprint(options.device)
    conditions = {"dtype": str(dtype).removeprefix("torch."), "rows": options.rows, "quick": options.quick}
    size, seconds = (256, 0.2) if options.quick else (8192, 10.0)
    product = sustained_product(device, dtype, size, seconds)
    name = f"sustained product {size}"
    yield harness.measurement("kernels", name, product["tflops"], "TFLOP/s", machine, conditions, product=product)
    settings = Settings(
        device=device,
        dtype=dtype,
        compiled=options.compiled,
        rounds=4 if options.quick else 12,
        budget_s=0.1 if options.quick else 1.5,
        product_tflops=product["tflops"],
    )
    for shape in wanted:
        try:
            facts = measure(shape, settings)
        except VARIANT_ERRORS as error:
            text = f"{type(error).__name__}: {error}"[:400]
            facts = {"op": shape.op, "model": shape.model, "shape": shape.name, "error": text}
        yield harness.measurement("kernels", shape.key, facts.get("us"), "us", machine, conditions, **facts)


def chosen(options: argparse.Namespace, parser: argparse.ArgumentParser) -> list[Any]:
    """The shapes that were asked for, costliest first in each op and model."""
    from ..kernels.op import REGISTRY
    from .kernel_shapes import MODELS, TINY, shapes

    if options.rows < 2 or options.rows % 2:
        parser.error(f"--rows {options.rows}: expected an even number, prompt and negative prompt of every image")
    models = options.model or (TINY if options.quick else MODELS)
    unknown = [name for name in models if name not in MODELS + TINY]
    if unknown:
        parser.error(f"unknown model {unknown[0]!r}; valid: {', '.join(MODELS + TINY)}")
    found = [shape for model in models for shape in shapes(model, options.rows)]
    for name in options.op or ():
        if name not in REGISTRY:
            parser.error(f"unknown op {name!r}; valid: {', '.join(sorted(REGISTRY))}")
    found = [shape for shape in found if not options.op or shape.op in options.op]
    found.sort(key=lambda shape: shape.op)
    limit = options.limit or (1 if options.quick else len(found))
    kept = [
        shape
        for index, shape in enumerate(found)
        if sum((s.op, s.model) == (shape.op, shape.model) for s in found[:index]) < limit
    ]
    if not kept:
        parser.error(f"no graph of {', '.join(models)} calls {', '.join(options.op)}; nothing to measure")
    return kept


def red(records: Sequence[dict[str, Any]]) -> bool:
    """Whether a variant of any record is wrong."""
    return any(not v["gate"]["green"] for record in records for v in record.get("variants", {}).values())


def summary(record: dict[str, Any]) -> str:
    """One line for the terminal, "" for a record without a result."""
    if "product" in record:
        return f"sustained product {record['product']['tflops']:.4g} TFLOP/s"
    if "error" in record:
        return f"{record['op']} {record['model']} {record['shape']}: {record['error']}"
    if "variants" not in record:
        return ""
    times = [
        f"{name} {facts['warm']['us']:.4g} us" + ("" if facts["gate"]["green"] else " RED")
        for name, facts in record["variants"].items()
    ]
    return f"{record['op']} {record['model']} {record['shape']}: " + ", ".join(times)


def _write_report(records: list[dict[str, Any]], path: Path | None) -> None:
    from .kernel_picture import draw
    from .kernel_report import markdown

    text = markdown(records)
    if path is None:
        print("\n" + text)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = path.with_suffix(".png")
    try:
        draw(records, picture)
        text += f"\n![speed of every variant, in percent of the roof]({picture.name})\n"
    except ImportError as missing:
        print(missing)
    path.write_text(text)
    print(f"report: {path}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kernels", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--op", nargs="+", metavar="NAME", help="only these ops")
    parser.add_argument(
        "--model", nargs="+", metavar="NAME", help="shapes of these: sdxl, sd15, sdxl-vae, sd15-vae, tiny"
    )
    parser.add_argument("--rows", type=int, default=2, help="rows of a U-Net evaluation; two per guided image")
    parser.add_argument("--limit", type=int, help="at most this many shapes of each op and model, the costliest")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, cpu (proves the code, measures no kernel)")
    parser.add_argument("--dtype", choices=DTYPES, help="bfloat16 on a GPU, float32 on a CPU by default")
    parser.add_argument("--quick", action="store_true", help="tiny shapes and few rounds: seconds, and no result")
    parser.add_argument("--no-compile", dest="compiled", action="store_false", help="leave torch.compile out")
    parser.add_argument("--out", type=Path, metavar="FILE", help="append records to this file of JSON lines")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write FILE (Markdown) and a PNG beside it")
    parser.add_argument("--read", type=Path, metavar="FILE", help="measure nothing: report on these records")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
