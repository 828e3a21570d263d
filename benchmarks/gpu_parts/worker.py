"""Runs one part in this process: `python -m stepfuse.benchmarks.gpu_parts.worker PART --records FILE --seconds S ...`.

The suite starts it; a part that crashes, hangs or leaves the device in error takes only itself down.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from pathlib import Path

from .. import harness


def main(arguments: list[str] | None = None) -> int:
    """Run a part until it is through or its seconds are over; 0 either way, 1 when it raised."""
    parser = argparse.ArgumentParser(prog="worker")
    parser.add_argument("part")
    parser.add_argument("--module", required=True)
    parser.add_argument("--records", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--packages", type=Path, help="folder of unpacked wheels, first on the import path")
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + options.seconds
    if options.packages:
        sys.path.insert(0, str(options.packages))

    import torch

    from . import canaries
    from .session import Session

    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False  # float32 is the truth that errors are measured against
    torch.backends.cudnn.allow_tf32 = False
    earlier = [r for r in harness.read(options.records) if r.get("part") == options.part and "error" not in r]
    session = Session(
        part=options.part,
        records=options.records,
        device=torch.device(options.device),
        tiny=options.tiny,
        deadline=deadline,
        finished={r["key"] for r in earlier},
    )
    session.write("start", fingerprint=harness.fingerprint(options.device), tiny=options.tiny)
    with torch.no_grad(), harness.ClockLog() as clocks:
        session.write("canaries", **canaries.measure(session))
        importlib.import_module(f".{options.module}", __package__).run(session)
    complete = session.seconds_left() > 0
    session.write("end", complete=complete, clocks=clocks.summary())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
