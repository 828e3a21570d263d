"""Thirty minutes on a GPU, planned in advance: three calls of at most ten minutes, each part with its seconds.

`python -m stepfuse.benchmarks.gpu_suite --plan` prints the plan, `--call A` runs a call of it; docs/gpu_windows.md
holds the same text. Rightness comes before speed, and what decides defaults before what describes the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

WINDOW_S = 1800.0
CALL_LIMIT_S = 600.0
MARGIN_S = 45.0  # of each call: imports of the last part, its grace, the bundle and its way home
START_S = 120.0  # of the window: until the machine runs its first command


@dataclass(frozen=True)
class Call:
    """One call: seconds for everything, and the parts that share them with the most each may take."""

    name: str
    about: str
    seconds: float
    parts: Mapping[str, float]


CALLS = (
    Call(
        "A",
        "are kernels and recorded updates right here, and which kernels are fastest",
        540,
        {"ceilings": 40, "launches": 15, "tests": 130, "replays": 50, "sanitizer": 60, "tuning": 245},
    ),
    Call(
        "B",
        "an update and a decoding beside the strongest baseline, by runner, and what each op is worth in it",
        550,
        {"compare": 240, "runners": 140, "update-ablation": 170},
    ),
    Call(
        "C",
        "rows: equality, the knee, a load; then decoding, the ops alone, prompt to pixels, and a compiled package",
        500,
        {
            "equality": 70,
            "knee": 80,
            "rows-static": 80,
            "vae-ablation": 55,
            "kernels": 105,
            "latency": 20,
            "packages": 90,
        },
    ),
)


def call(name: str) -> Call:
    """The call of that name. Raises ValueError for another."""
    found = next((c for c in CALLS if c.name == name.upper()), None)
    if found is None:
        raise ValueError(f"no call {name!r}; valid: {', '.join(c.name for c in CALLS)}")
    return found


def command(name: str) -> str:
    """The shell command of a call; the same one runs it for the first time, and again for what is missing."""
    return f'python -m stepfuse.benchmarks.gpu_suite --call {name} --out "$RUN" --resume'


def plan(about: Mapping[str, str]) -> str:
    """The plan as Markdown; about: what each part of the suite measures, by name."""
    lines = []
    for c in CALLS:
        lines += [f"**Call {c.name}**, {c.seconds:.0f} s: {c.about}.", "", "```bash", command(c.name), "```", ""]
        lines += ["| part | at most | measures |", "|---|---|---|"]
        lines += [f"| {part} | {seconds:.0f} s | {about[part]} |" for part, seconds in c.parts.items()]
        lines.append("")
    rest = [name for name in about if not any(name in c.parts for c in CALLS)]
    lines += [
        f"Together {sum(c.seconds for c in CALLS) / 60:.0f} of {WINDOW_S / 60:.0f} minutes. Left for another window: "
        f"{', '.join(rest)}, and what did not fit:",
        "",
        "```bash",
        'python -m stepfuse.benchmarks.gpu_suite --out "$RUN" --resume',
        "```",
    ]
    return "\n".join(lines) + "\n"
