"""What users say about an engine (EngineConfig) and what it becomes (ResolvedConfig).

Imports torch only inside functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from . import env
from .errors import DeviceError, RequestError, closest

if TYPE_CHECKING:
    import numpy as np
    import torch

SafetyHook = Callable[["np.ndarray", str], "np.ndarray"]
"""images float32 [n, H, W, 3] in 0..1 and the prompt -> images to return; may raise to refuse."""

DTYPES = {"float32": "float32", "fp32": "float32", "float16": "float16", "fp16": "float16", "half": "float16",
          "bfloat16": "bfloat16", "bf16": "bfloat16", "float64": "float64", "fp64": "float64"}  # fmt: skip

RUNTIMES = ("torch", "onnxruntime", "tensorrt", "tensorrt_rtx", "aoti")
RUNNERS = ("auto", "eager", "graph", "compiled")
REPEATABLE_WORKSPACES = (":4096:8", ":16:8")
"""Values of CUBLAS_WORKSPACE_CONFIG with which cuBLAS repeats its results, by its manual."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Options of an engine; None means chosen for the device and checkpoint.

    device: "cpu", "cuda", "cuda:1". dtype and vae_dtype: a name ("float32", "bf16", ...) or a torch dtype.
    runtime: what executes the networks: "torch", or for a folder that `stepfuse export` made "onnxruntime", "tensorrt",
    "tensorrt_rtx" or "aoti"; their kernels, dtypes and weights were fixed by the export (docs/export.md).
    kernels: "auto", an implementation name for every op, or a mapping op -> implementation.
    max_rows: the most images in one running batch. runner: how an update is executed, "eager" (op by op), "graph" (one
    CUDA graph), "compiled" (the denoiser through torch.compile, captured on CUDA) or "auto" (graph on CUDA, eager on a
    CPU). graph_bytes: what captures may hold, and what buffers kept for them may; by default an eighth of the device's
    memory. forward_rows: the most model rows (images times guidance branches) of one evaluation of the network, an
    update of more is several evaluations; by default all, or what calibration found faster. deterministic: True or a
    number R of images: bit-equal whatever else runs (docs/determinism.md); updates of one image, or of exactly R.
    decode_rows: images the VAE decodes together; by default one on a CPU, on CUDA as many as make a megapixel.
    parked_bytes: what rows that were set aside may keep of their prompts; by default an eighth of the device's memory.
    memory_gb: device memory beside the weights, in 10^9 bytes: requests of which not even one row fits are refused; by
    default what is free on a CUDA device, and a CPU machine's whole memory. queue_seconds: the most unfinished work, in
    estimated seconds, above which submit raises QueueFull; by default no bound. variant: weight file variant ("fp16").
    download: fetch a hub id that is not in the local cache. vae_tiling: decode and encode in overlapping tiles; "auto"
    above 1536 x 1536 pixels. controlnets: name -> built-in name, folder or hub id of a ControlNet, for
    `Request.controls`. loras: name -> built-in name, file or folder of a LoRA, for `Request.loras`. safety: called on
    every batch of images, previews too, before they are handed out.
    """

    device: str | None = None
    dtype: str | torch.dtype | None = None
    vae_dtype: str | torch.dtype | None = None
    runtime: Literal["torch", "onnxruntime", "tensorrt", "tensorrt_rtx", "aoti"] = "torch"
    kernels: str | Mapping[str, str] = "auto"
    max_rows: int | None = None
    runner: Literal["auto", "eager", "graph", "compiled"] = "auto"
    graph_bytes: int | None = None
    forward_rows: int | None = None
    deterministic: bool | int = False
    decode_rows: int | None = None
    parked_bytes: int | None = None
    memory_gb: float | None = None
    queue_seconds: float | None = None
    variant: str | None = None
    download: bool = False
    vae_tiling: bool | Literal["auto"] = "auto"
    transforms: tuple[str, ...] = ()
    controlnets: Mapping[str, str | Path] = field(default_factory=dict)
    loras: Mapping[str, str | Path] = field(default_factory=dict)
    safety: SafetyHook | None = None


@dataclass(frozen=True, kw_only=True)
class ResolvedConfig:
    """EngineConfig with every None decided. decode_rows: 0 for as many as make a megapixel; forward_rows: 0 for all,
    or what was measured; deterministic: the images of every update, 0 for any number.

    memory_bytes: 0 for what is free once the weights are loaded; infinite for no bound, as is queue_seconds.
    """

    device: torch.device
    dtype: torch.dtype
    vae_dtype: torch.dtype
    runtime: Literal["torch", "onnxruntime", "tensorrt", "tensorrt_rtx", "aoti"]
    kernels: str | Mapping[str, str]
    max_rows: int
    runner: Literal["eager", "graph", "compiled"]
    graph_bytes: int
    forward_rows: int
    deterministic: int
    decode_rows: int
    parked_bytes: int
    memory_bytes: float
    queue_seconds: float
    vae_tiling: bool | Literal["auto"]
    transforms: tuple[str, ...]
    safety: SafetyHook | None


def merge(config: EngineConfig | None, overrides: Mapping[str, Any]) -> EngineConfig:
    """`config` with `overrides` put over it; an unknown option is an error naming the closest one."""
    valid = [f.name for f in fields(EngineConfig)]
    for name in overrides:
        if name not in valid:
            raise RequestError(f"unknown engine option {name!r}: {closest(name, valid)}")
    base = config or EngineConfig()
    return EngineConfig(**({name: getattr(base, name) for name in valid} | dict(overrides)))


def resolve(config: EngineConfig, *, vae_force_upcast: bool = False) -> ResolvedConfig:
    """Decide every open option; raises DeviceError / RequestError for what cannot be honoured on this machine."""
    import torch

    if resolve_runtime(config.runtime) != "torch":
        check_exported(config)
    device = resolve_device(config.device)
    half = torch.bfloat16
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        half = torch.float16
    dtype = resolve_dtype("dtype", config.dtype) or (half if device.type == "cuda" else torch.float32)
    vae_dtype = resolve_dtype("vae_dtype", config.vae_dtype)
    if vae_dtype is None:
        vae_dtype = torch.float32 if dtype == torch.float16 and vae_force_upcast else dtype
    elif vae_dtype == torch.float16 and vae_force_upcast:
        raise RequestError("vae_dtype: got float16, but this VAE overflows in it (force_upcast); use bf16 or float32")
    for name in ("max_rows", "graph_bytes", "forward_rows", "decode_rows", "parked_bytes"):
        value = getattr(config, name)
        if value is not None and (not isinstance(value, int) or value < 1):
            raise RequestError(f"{name}: got {value!r}, expected a whole number >= 1")
    for name in ("memory_gb", "queue_seconds"):
        value = getattr(config, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0):
            raise RequestError(f"{name}: got {value!r}, expected a number > 0")
    for name in ("controlnets", "loras"):
        value = getattr(config, name)
        if not isinstance(value, Mapping):
            raise RequestError(f"{name}: got {value!r}, expected names and their sources, e.g. {{'name': 'folder'}}")
    cuda = device.type == "cuda"
    fixed = resolve_deterministic(config, device)
    eighth = torch.cuda.get_device_properties(device).total_memory // 8 if cuda else 2**30
    whole = 0 if cuda else env.physical_memory()
    return ResolvedConfig(
        device=device,
        dtype=dtype,
        vae_dtype=vae_dtype,
        runtime=config.runtime,
        kernels=config.kernels,
        max_rows=fixed or config.max_rows or 8,
        runner=resolve_runner(config.runner, device) if config.runtime == "torch" else "eager",
        graph_bytes=config.graph_bytes or eighth,
        forward_rows=config.forward_rows or 0,
        deterministic=fixed,
        decode_rows=config.decode_rows or (0 if cuda and not fixed else 1),
        parked_bytes=config.parked_bytes or eighth,
        memory_bytes=whole if config.memory_gb is None else config.memory_gb * 1e9,
        queue_seconds=config.queue_seconds or math.inf,
        vae_tiling=config.vae_tiling,
        transforms=tuple(config.transforms),
        safety=config.safety,
    )


def resolve_runtime(name: str) -> str:
    """The name of a runtime. Raises RequestError for another one."""
    if name not in RUNTIMES:
        raise RequestError(f"runtime: got {name!r}, {closest(str(name), RUNTIMES)}")
    return name


def check_exported(config: EngineConfig) -> None:
    """Raise RequestError for the options that exported networks cannot honour."""
    own = {"sampler_step"}  # the one op that is not part of a network
    kernels = config.kernels if isinstance(config.kernels, str) else set(config.kernels) - own or "auto"
    reasons = {
        "runner": (config.runner not in ("auto", "eager"), "exported networks run op by op: use 'eager'"),
        "transforms": (bool(config.transforms), "the weights of exported networks are fixed: leave them out"),
        "kernels": (kernels != "auto", "the export chose the kernels: leave it out, or name sampler_step only"),
        "deterministic": (bool(config.deterministic), "nothing is promised of other runtimes: leave it out"),
        "controlnets": (bool(config.controlnets), "ControlNets run with runtime='torch' only: leave them out"),
        "loras": (bool(config.loras), "the weights of exported networks are fixed: merge them before the export"),
        "variant": (config.variant is not None, "an artefact has one set of weights: leave it out"),
        "download": (config.download, "artefacts are not on the hub: leave it out"),
    }
    for name, (wrong, reason) in reasons.items():
        if wrong:
            raise RequestError(f"{name}: got {getattr(config, name)!r} with runtime={config.runtime!r}; {reason}")


def resolve_runner(name: str, device: torch.device) -> Literal["eager", "graph", "compiled"]:
    """How updates are executed on this device; CUDA graphs are refused elsewhere."""
    if name not in RUNNERS:
        raise RequestError(f"runner: got {name!r}, {closest(str(name), RUNNERS)}")
    if name == "auto":
        return "graph" if device.type == "cuda" else "eager"
    if name == "graph" and device.type != "cuda":
        raise RequestError(f"runner: 'graph' needs CUDA, the device is {device}; use runner='eager' or 'compiled'")
    return name  # type: ignore[return-value]


def resolve_deterministic(config: EngineConfig, device: torch.device) -> int:
    """The images of every update in deterministic mode, 0 without it; what would break its promise is refused."""
    rows = config.deterministic
    if not isinstance(rows, int) or rows < 0:
        raise RequestError(f"deterministic: got {rows!r}, expected True, False or a number of images")
    if not rows:
        return 0
    for name, value, expected in (("max_rows", config.max_rows, int(rows)), ("decode_rows", config.decode_rows, 1)):
        if value not in (None, expected):
            raise RequestError(f"{name}: got {value}, but deterministic={rows!r} fixes it at {expected}; leave it out")
    if config.runner == "compiled":
        raise RequestError(
            "runner: 'compiled' times kernels while it compiles, so a restart may change bits; with deterministic use "
            "'eager' or 'graph'"
        )
    if device.type == "cuda" and env.cublas_workspace() not in REPEATABLE_WORKSPACES:
        raise RequestError(
            f"deterministic: CUBLAS_WORKSPACE_CONFIG is {env.cublas_workspace()!r}; set it to ':4096:8' in the "
            "environment before the process starts"
        )
    return int(rows)


def resolve_device(name: str | None) -> torch.device:
    """A usable torch.device: CUDA if there is one, else CPU, by default.

    mps, xpu and other backends are refused by name.
    """
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DeviceError(f"device: got {name!r}, expected 'cpu', 'cuda' or 'cuda:N'") from None
    if device.type not in ("cpu", "cuda"):
        raise DeviceError(f"device: {device.type!r} is not supported; use 'cuda' (NVIDIA) or 'cpu'")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            built = "this torch has no CUDA build" if torch.version.cuda is None else "no CUDA device is visible"
            raise DeviceError(f"device: got {name!r}, but {built}; use device='cpu', or run `stepfuse doctor`")
        if (device.index or 0) >= torch.cuda.device_count():
            raise DeviceError(f"device: got {name!r}, but there are only {torch.cuda.device_count()} CUDA devices")
    return device


def resolve_dtype(option: str, value: Any) -> torch.dtype | None:
    """A torch dtype from a name, a torch dtype or None."""
    import torch

    if value is None:
        return None
    name = str(value).removeprefix("torch.")
    if name not in DTYPES:
        raise RequestError(f"{option}: got {value!r}, {closest(name, DTYPES)}")
    return getattr(torch, DTYPES[name])
