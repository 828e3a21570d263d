"""The network of a comparison as our ONNX export, opened by ONNX Runtime behind the interface of ours."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from ..engine.families import builtin_folder
from ..engine.runtimes.opened import Opened
from ..export.folder import Options, export_onnx
from .architectures import Network

GRAPHS = {"unet": "unet", "vae": "vae_decoder"}


def require() -> None:
    """Raise ImportError where ONNX Runtime, or what the export needs, is not installed."""
    for package in ("onnxruntime", "onnx", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"{package} is not installed; pip install 'stepfuse[onnx]'")


def export(source: str | Path, folder: Path, dtype: torch.dtype, components: tuple[str, ...] = ()) -> Path:
    """Export a built-in model or a folder to ONNX in `folder`, in this dtype; returns `folder`."""
    require()
    options = Options(components=components, shapes=((64, 64),), dtype=str(dtype).removeprefix("torch."))
    export_onnx(source, folder, options)
    return folder


def session(net: Network, folder: Path) -> Any:
    """The network of `net` by ONNX Runtime: `runtimes.exported.Denoiser` or `VAE`. `folder` must stay while it runs.

    The weights are those of `net`. Raises ImportError, RequestError or DeviceError where this machine cannot run it.
    """
    require()
    source = builtin_folder(net.arch.name) / net.kind if net.arch.trained else folder / "weights"
    if not net.arch.trained:
        net.theirs.save_pretrained(source)
    graph = GRAPHS[net.kind]
    opened = Opened(export(source, folder / "onnx", net.dtype, (graph,)), "onnxruntime")
    return opened.denoiser(net.device) if net.kind == "unet" else opened.vae(net.device)
