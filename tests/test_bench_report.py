"""`stepfuse bench report`: every section and picture is made of saved records; nothing is claimed without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from stepfuse.benchmarks import harness
from stepfuse.benchmarks.cli import app
from stepfuse.benchmarks.report import write
from stepfuse.engine.errors import RequestError

MACHINE = {"id": "0", "processor": "Processor", "threads": 2, "packages": {"torch": "2.13.0"}, "commit": "abc"}


def record(
    kind: str, name: str, value: float | None, unit: str, conditions: dict[str, Any] | None = None, **facts: Any
):
    return harness.measurement(kind, name, value, unit, MACHINE, conditions or {}, **facts)


def latency(n: int, seconds: float) -> dict[str, Any]:
    facts = {"model": "shapes", "n": n, "p50_s": seconds, "p90_s": 1.1 * seconds, "p99_s": 1.2 * seconds,
             "phases_s": {"encode": 0.1 * seconds, "denoise": 0.7 * seconds, "decode": 0.2 * seconds, "rest": 0.0},
             "t_update_s": 0.7 * seconds / 20, "it_per_s": 20 / (0.7 * seconds), "images_per_s": n / seconds,
             "peak_memory": {"gb": 0.5, "what": "resident"}, "launches": {"per_update": 512.0, "unit": "aten calls"},
             "roof": {"product": {"tflops": 0.2, "seconds": 3.0}, "tflop_per_update": 0.1, "tflops": 0.05,
                      "fraction": 0.25}}  # fmt: skip
    return record("latency", f"shapes n={n}", seconds, "s", latency=facts)


def throughput() -> list[dict[str, Any]]:
    conditions = {"mix": "mixed", "max_rows": 8, "wait_s": 0.05}
    gate = {"green": True, "error": 1e-6, "allowed": 1e-4, "checked": 4}
    numbers = {"images_per_s": 3.0, "p50_s": 0.3, "p95_s": 0.6}
    made = []
    for front in ("rows", "static"):
        facts = {"front": front, "gate": gate, **numbers}
        made.append(record("throughput closed", f"mixed {front}", 3.0, "images/s", conditions, **facts))
    for rate in (2.0, 4.0):
        for front, factor in (("rows", 1.0), ("static", 2.5)):
            numbers = {"images_per_s": rate, "p50_s": 0.2 * factor, "p95_s": 0.3 * factor * rate}
            made.append(record("throughput open", f"mixed {rate}/s {front}", numbers["p95_s"], "s (p95)", conditions,
                               front=front, rate=rate, gate=gate, **numbers))  # fmt: skip
    equal = {"slo_s": 1.0, "rows": {"rate": 3.5, "bound": ""}, "static": {"rate": 2.0, "bound": ""}, "ratio": 1.75,
             "reason": ""}  # fmt: skip
    lines = {front: [[0.0, 0.1, 0.5], [0.2, 0.3, 0.9]] for front in ("rows", "static")}
    made.append(
        record("throughput", "mixed", 1.75, "x", conditions, equal_p95=equal, timelines=lines, timeline_rate=4.0)
    )
    return made


def compare() -> dict[str, Any]:
    times = {"median_s": 0.02, "p10_s": 0.019, "p90_s": 0.022, "configuration": {"layout": "contiguous"}}
    green = {"green": True, "error": 1e-6, "allowed": 2e-6}
    red = {"green": False, "error": 3e-6, "allowed": 2e-6}
    variants = {
        "diffusers eager": {**times, "error": 1e-6, "gate": red, "speedup": None},
        "diffusers eager again": {**times, "error": 1e-6},
        "stepfuse eager": {**times, "median_s": 0.015, "error": 1e-6},
        "diffusers channels-last": {**times, "error": 1e-6, "gate": green, "speedup": 1.33},
    }
    return record("compare", "shapes update", 0.015, "s", {"arch": "shapes"}, variants=variants, a_a_spread=0.01,
                  refused={"ONNX Runtime": "onnxruntime is not installed"})  # fmt: skip


def test_every_section_and_picture(tmp_path: Path):
    kinds = {"conv": {"share": 0.6, "calls": 10}, "other": {"share": 0.4, "calls": 99}}
    records = [latency(1, 0.4), latency(2, 0.5), latency(4, 1.2), *throughput(), compare()]
    records.append(record("startup", "shapes", 5.0, "s", first_s=6.0))
    records.append(record("profile", "shapes", None, "", what="operations", kinds=kinds))
    written = write(records, tmp_path / "r.md")
    assert {path.name for path in written} == {
        "r.md", "r-latency.png", "r-knee.png", "r-roofs.png", "r-load.png", "r-timeline.png", "r-compare.png",
        "r-profile.png",
    }  # fmt: skip
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written[1:])
    text = (tmp_path / "r.md").read_text()
    assert "**CPU**: Processor, 2 threads" in text
    assert "Knee of shapes: 2 images" in text
    assert "25 % of a matrix product" in text
    assert "at p95 = 1 s: rows 3.5/s, static 2/s: 1.75x" in text
    assert "| diffusers channels-last | 20 | 19 | 22 | 1.0e-06 | 1.33x |" in text
    assert "none: ours errs 3e-06, allowed 2e-06" in text, "a red gate has no ratio"
    assert "did not run: ONNX Runtime" in text
    assert "| conv | 60.0 % | 10 |" in text


def test_nothing_to_draw_is_left_out(tmp_path: Path):
    alone = latency(1, 0.4)
    for name in ("roof", "peak_memory", "launches"):
        del alone["latency"][name]
    written = write([alone], tmp_path / "r.md")
    assert [path.name for path in written] == ["r.md", "r-latency.png"], "no knee of one point, no roof unmeasured"
    assert "matrix product" not in (tmp_path / "r.md").read_text()


def test_other_records_are_refused(tmp_path: Path):
    with pytest.raises(RequestError, match="none of the records"):
        write([{"op": "geglu"}], tmp_path / "r.md")
    assert not (tmp_path / "r.md").exists()


def test_the_command_reads_what_was_saved(tmp_path: Path):
    harness.append(tmp_path / "a.jsonl", latency(1, 0.4))
    done = CliRunner().invoke(app, ["report", str(tmp_path / "a.jsonl"), "-o", str(tmp_path / "out" / "r.md")])
    assert done.exit_code == 0, done.output
    assert "shapes" in (tmp_path / "out" / "r.md").read_text()
    done = CliRunner().invoke(app, ["report", str(tmp_path / "absent.jsonl")])
    assert "is not a file" in str(done.exception)
