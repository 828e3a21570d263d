"""What this machine can run: versions, devices, optional packages, and the command that adds what is missing."""

from __future__ import annotations

import importlib.util
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

OPTIONAL = {
    "xformers": ("memory-efficient attention for CUDA", "pip install 'stepfuse[xformers]'"),
    "onnx": ("ONNX export", "pip install 'stepfuse[onnx]'"),
    "tensorrt": ("TensorRT plans", "pip install 'stepfuse[tensorrt]'"),
    "diffusers": ("training and comparisons", "pip install 'stepfuse[train]'"),
    "fastapi": ("the HTTP server", "pip install 'stepfuse[server]'"),
    "spandrel": ("upscalers from files", "pip install 'stepfuse[upscale]'"),
    "ray": ("several machines", "pip install 'stepfuse[ray]'"),
}


@dataclass(frozen=True)
class Finding:
    """One line of the report. state: "ok", "absent" (optional), or "problem"; fix: a command, or empty."""

    topic: str
    state: Literal["ok", "absent", "problem"]
    text: str
    fix: str = ""


def examine() -> list[Finding]:
    """Everything worth knowing about this machine, in the order a person would ask. Imports torch."""
    found = [Finding("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")]
    found += [Finding(name, "ok", version(name)) for name in ("numpy", "transformers", "safetensors")]
    return [*found, *_torch(), _triton(), *_optional(), _kernels(), *_records()]


def _torch() -> list[Finding]:
    import torch

    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    found = [Finding("torch", "ok", f"{torch.__version__}, {built}, {torch.get_num_threads()} CPU threads")]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            props = torch.cuda.get_device_properties(index)
            text = f"{props.name}, sm_{props.major}{props.minor}, {props.total_memory / 2**30:.0f} GiB"
            found.append(Finding(f"cuda:{index}", "ok", text))
    elif torch.version.cuda:
        fix = "check `nvidia-smi`: the driver must support CUDA " + torch.version.cuda
        found.append(Finding("cuda", "problem", "torch has CUDA, but no device or driver answers", fix))
    else:
        found.append(
            Finding("cuda", "absent", "no CUDA: images are made on the CPU in float32", "install a CUDA build of torch")
        )
    return found


def _triton() -> Finding:
    import torch

    if importlib.util.find_spec("triton") is None:
        return Finding("triton", "absent", "not installed: every op uses its torch reference", "pip install triton")
    text = version("triton")
    if not torch.cuda.is_available():
        text += " (unused: no CUDA device)"
    return Finding("triton", "ok", text)


def _optional() -> list[Finding]:
    found = []
    for name, (purpose, fix) in OPTIONAL.items():
        try:
            found.append(Finding(name, "ok", f"{version(name)}: {purpose}"))
        except PackageNotFoundError:
            found.append(Finding(name, "absent", f"not installed: {purpose}", fix))
    return found


def _kernels() -> Finding:
    from .. import kernels
    from ..kernels.op import REGISTRY

    for name in kernels.__all__:
        getattr(kernels, name)
    ops = ", ".join(f"{name} ({'/'.join(op.implementations)})" for name, op in sorted(REGISTRY.items()))
    return Finding("kernels", "ok", ops)


def _records() -> list[Finding]:
    """Which record of kernels this device has, and what is in it: one line per op and choice, with its shapes."""
    from .. import kernels
    from ..kernels import device, launch_configs

    found = [Finding("records", "ok", launch_configs.in_use(kernels.__all__))]
    for op in kernels.__all__:
        shapes: dict[str, list[str]] = {}
        for entry in launch_configs.read(launch_configs.path(op, device.name())):
            choice = ", ".join(filter(None, (entry.implementation, launch_configs.in_words(entry.config or {}))))
            key = f"{choice}; measured: {str(entry.measured).lower()}"
            shapes.setdefault(key, []).append(str(entry.evidence.get("workload", "unnamed")))
        found += [Finding("record", "ok", f"{op}: {key}; {', '.join(names)}") for key, names in shapes.items()]
    return found
