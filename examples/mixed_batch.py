"""Eight unlike requests, sent at different times, share one running batch; each equals its solo run.

    python -m stepfuse.examples.mixed_batch [-o timeline.png]

The picture shows when each request was updated: rows join and leave while the others run on. Needs the extra `bench`.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from pathlib import Path

from stepfuse import Engine, Job, Request

REQUESTS = (
    Request(prompt="a red circle", seed=1, steps=40, sampler="ddim", guidance_scale=3.0),
    Request(prompt="a blue square on a yellow background", seed=2, steps=12, sampler="dpmpp_2m", guidance_scale=2.0),
    Request(prompt="a green triangle above a red square", seed=3, steps=25, sampler="euler", schedule="karras"),
    Request(prompt="a pink circle below a blue triangle", seed=4, steps=20, sampler="euler_a", guidance_scale=4.0),
    Request(prompt="a yellow square left of a purple circle", seed=5, steps=30, sampler="heun", guidance_scale=2.5),
    Request(prompt="an orange circle", seed=6, steps=18, sampler="lms", guidance_scale=1.0),
    Request(prompt="a blue circle right of a red circle", seed=7, steps=50, sampler="ddpm", guidance_scale=3.0),
    Request(prompt="a purple triangle on a green background", seed=8, steps=22, sampler="pndm", guidance_rescale=0.3),
)
GAP = 0.15  # seconds between two requests


def main() -> int:
    """Run, compare, draw; returns 1 if a request differs from its solo run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("timeline.png"), help="PNG to write")
    arguments = parser.parse_args()
    with Engine.load("shapes") as engine:
        engine.warmup()
        began, marks, jobs = time.perf_counter(), {}, []
        for number, request in enumerate(REQUESTS):
            jobs.append(engine.submit(request))
            marks[number] = []
            threading.Thread(target=follow, args=(jobs[-1], marks[number]), daemon=True).start()
            time.sleep(GAP)
        results = [job.result() for job in jobs]
        spent = time.perf_counter() - began
        worst = 0.0
        for request, found in zip(REQUESTS, results, strict=True):
            alone = engine.generate(request)
            difference = float((found.latents - alone.latents).norm() / alone.latents.norm())
            worst = max(worst, difference)
            sys.stdout.write(f"{difference:.1e} from its solo run: {request.prompt} ({request.sampler})\n")
    sys.stdout.write(f"{len(REQUESTS)} requests in {spent:.2f} s; largest difference {worst:.1e}\n")
    draw(
        {n: [t - began for t in times] for n, times in marks.items()}, [r.images[0] for r in results], arguments.output
    )
    return int(worst > 1e-4)


def follow(job: Job, times: list[float]) -> None:
    """Note when every event of a job arrived."""
    times.extend(time.perf_counter() for _ in job.events())


def draw(times: dict[int, list[float]], images: list, output: Path) -> None:
    """One line per request: a tick per update, the picture at its end."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.offsetbox import AnnotationBbox, OffsetImage

    figure, axes = plt.subplots(figsize=(11, 5))
    for number, ticks in times.items():
        request = REQUESTS[number]
        axes.hlines(number, ticks[0], ticks[-1], color="0.8", linewidth=6)
        axes.plot(ticks, [number] * len(ticks), "|", color="tab:blue", markersize=9)
        axes.add_artist(AnnotationBbox(OffsetImage(images[number], zoom=0.45), (ticks[-1], number), (18, 0),
                                       boxcoords="offset points", frameon=False))  # fmt: skip
        axes.annotate(f"{request.sampler}, {request.steps} steps", (ticks[0], number), (-6, 0), ha="right", va="center",
                      textcoords="offset points", fontsize=8)  # fmt: skip
    axes.set(xlabel="seconds", yticks=[], title="Unlike requests in one running batch: a tick is an update of the row")
    axes.margins(x=0.12)
    axes.invert_yaxis()
    figure.tight_layout()
    figure.savefig(output, dpi=110)


if __name__ == "__main__":
    raise SystemExit(main())
