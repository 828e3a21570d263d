"""Launch one Triton kernel on small, awkward shapes and compare it with the reference, for a sanitizer to watch:

    compute-sanitizer --tool memcheck python -m stepfuse.benchmarks.gpu_parts.sanitized NAME

The shapes are the op's contract cases. Inputs and truth are made on the CPU, so that the launches watched are the
kernel's own. Under Triton's interpreter `--device cpu` runs the same calls without a GPU.
"""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any

import torch

from ... import kernels
from ...kernels import launch_configs
from ...kernels.op import REGISTRY, Case, Op, Spec
from .. import gate

KERNELS = {"group_norm_silu two-pass": "group_norm_silu", "attention": "attention", "sampler_step": "sampler_step"}
"""What is watched: a name, and the op whose Triton implementation it is."""


def main(arguments: list[str] | None = None) -> int:
    """Run every case of a kernel; 0 when all are right, 1 when one is wrong."""
    parser = argparse.ArgumentParser(prog="sanitized", description=__doc__)
    parser.add_argument("name", choices=KERNELS)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args(arguments)
    verdicts = dict(run(options.name, torch.device(options.device)))
    wrong = {case: verdict for case, verdict in verdicts.items() if not verdict.green}
    for case, verdict in wrong.items():
        print(f"{options.name}, {case}: error {verdict.error:.3g}, allowed {verdict.allowed:.3g}")
    print(f"{len(verdicts)} cases, {len(wrong)} wrong")
    return int(bool(wrong) or not verdicts)


def run(name: str, device: torch.device) -> Iterator[tuple[str, gate.Gate]]:
    """Name and verdict of every contract case that the kernel `name` takes."""
    op = _op(KERNELS[name])
    implementation = op.implementations["triton"]
    for case in op.cases:
        made = _tensors(case)
        given = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in made.items()}
        if implementation.unsupported(op.describe(**given)):
            continue
        with torch.no_grad(), _configuration(name):
            found = [t.cpu() for t in gate.tensors(implementation.call(**given))]
        yield case.name, gate.judge(found, gate.tensors(op.reference(**made)), gate.truth(op.reference, made))


def _configuration(name: str) -> AbstractContextManager[None]:
    """Two passes with tiles smaller than the images, where one pass would be chosen for images this small."""
    if name != "group_norm_silu two-pass":
        return nullcontext()
    from ...kernels.group_norm_silu.config import TwoPass
    from ...kernels.launch import Options

    return launch_configs.forced({"group_norm_silu": TwoPass(16, 32, Options(num_warps=4, num_stages=1))})


def _op(name: str) -> Op:
    import_module(f"{kernels.__name__}.{name}.op")  # registers it
    return REGISTRY[name]


def _tensors(case: Case) -> Mapping[str, Any]:
    """The arguments of a contract case on the CPU, float32 and seeded by its name."""
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
    made: dict[str, Any] = {}
    for name, value in case.arguments.items():
        spec = Spec(value) if isinstance(value, tuple) else value
        if not isinstance(spec, Spec):
            made[name] = spec
        elif spec.dtype is None:
            made[name] = torch.randn(spec.shape, generator=generator)
        else:
            made[name] = torch.randint(spec.low, spec.high, spec.shape, generator=generator, dtype=spec.dtype)
    return made


if __name__ == "__main__":
    raise SystemExit(main())
