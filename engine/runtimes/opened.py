"""An artefact folder opened for a runtime: its graphs as sessions and as networks, and the files beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors.torch import load_file

from ..artifact import MANIFEST, Kind, Manifest, inside
from ..errors import CheckpointError
from ..models.unet_config import UNetConfig
from ..models.vae import VAEConfig
from . import aoti, exported, onnxruntime, tensorrt
from .networks import Session

KINDS: Mapping[str, Kind] = {
    "onnxruntime": "onnx", "tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt", "aoti": "aoti"
}  # fmt: skip
"""Runtime -> the kind of artefact it runs."""
_SESSIONS = {"onnx": onnxruntime.Session, "tensorrt": tensorrt.Session, "aoti": aoti.Session}


class Opened:
    """An artefact, and the runtime its graphs are executed by. Nothing of a graph is read before it is asked for."""

    def __init__(self, source: str | Path, runtime: str) -> None:
        """Raises CheckpointError for anything but an artefact that this runtime runs, with the command that makes one.

        Tokenizers, the scheduler and the defaults are compared with their hashes here, a graph when it is opened.
        """
        self.folder, self.runtime = Path(source).expanduser(), runtime
        if not (self.folder / MANIFEST).is_file():
            raise CheckpointError(
                f"{source} is no artefact, and runtime={runtime!r} runs nothing else: {command(runtime, str(source))}, "
                f"then load FOLDER"
            )
        self.manifest = Manifest.load(self.folder)
        if self.manifest.kind != KINDS[runtime]:
            raise CheckpointError(
                f"{source} holds {self.manifest.kind} graphs: load it with runtime={runtime_of(self.manifest)!r}, or "
                f"make what runtime={runtime!r} runs: {command(runtime, 'MODEL')}"
            )
        if self.manifest.kind == "tensorrt" and runtime_of(self.manifest) != runtime:
            raise CheckpointError(
                f"the plans of {source} are for runtime={runtime_of(self.manifest)!r}, got {runtime!r}: load them with "
                f"that, or build others: {command(runtime, 'MODEL')}"
            )
        self.manifest.check(self.folder, only={PurePosixPath(name).parts[0] for name in self.manifest.beside})

    def session(self, name: str, device: torch.device | str) -> Session:
        """The graph of that name, ready to run on `device`.

        Raises CheckpointError for a damaged artefact or one without that graph, RequestError where a package is
        missing, DeviceError where the device is not the one the graph was made for.
        """
        return _SESSIONS[self.manifest.kind](self.folder, name, device)

    def denoiser(self, device: torch.device | str) -> exported.Denoiser:
        """The U-Net. Raises as `session`."""
        session = self.session("unet", device)
        return exported.Denoiser(session, UNetConfig.from_diffusers(self.config("unet")))

    def vae(self, device: torch.device | str) -> exported.VAE:
        """The autoencoder. Raises as `session`."""
        config = VAEConfig.from_diffusers(self.config("vae_decoder"))
        return exported.VAE(lambda name: self.session(name, device), config, self.manifest.graphs)

    def text_model(self, name: str, device: torch.device | str) -> exported.TextModel:
        """The text encoder of that name. Raises as `session`."""
        from transformers import CLIPTextConfig

        session = self.session(name, device)
        config = CLIPTextConfig(**{key: value for key, value in self.config(name).items() if not key.startswith("_")})
        norm = self._require(f"{name}/{exported.FINAL_NORM}")
        return exported.TextModel(session, config, load_file(norm, device=str(device)))

    def bytes(self, names: Sequence[str]) -> int:
        """Bytes of the files of these graphs, weights included; of those the artefact does not have, none."""
        files = [name for name in self.manifest.files if PurePosixPath(name).parts[0] in names]
        return sum(inside(self.folder, name).stat().st_size for name in files)

    def config(self, folder: str) -> dict[str, Any]:
        """The configuration in a folder of the artefact. Raises CheckpointError if it is missing."""
        found = "scheduler_config.json" if folder == "scheduler" else "config.json"
        values = json.loads(self._require(f"{folder}/{found}").read_text(encoding="utf-8"))
        graph = self.manifest.graphs.get(folder)
        owner = folder if graph is None else graph.component
        return {"_class_name": self.manifest.components[owner], **values}

    def _require(self, name: str) -> Path:
        """A file the manifest lists; its hash was compared with the folder it is in."""
        if name not in self.manifest.files:
            raise CheckpointError(f"the artefact {self.folder} has no {name}: export the model again")
        return inside(self.folder, name)


def runtime_of(manifest: Manifest) -> str:
    """The runtime that runs an artefact."""
    if manifest.kind == "tensorrt":
        return str(next(iter(manifest.graphs.values())).options["flavour"])
    return next(runtime for runtime, kind in KINDS.items() if kind == manifest.kind)


def command(runtime: str, model: str) -> str:
    """What makes an artefact that the runtime runs."""
    flavour = " --flavour tensorrt" if runtime == "tensorrt" else ""
    return f"stepfuse export {KINDS[runtime]} {model} -o FOLDER{flavour}"


def require_checkpoint(source: str | Path) -> None:
    """Raise CheckpointError for an artefact, which runtime "torch" does not run."""
    folder = Path(source).expanduser()
    if (folder / MANIFEST).is_file():
        manifest = Manifest.load(folder)
        raise CheckpointError(
            f"{source} is an artefact of {manifest.kind} graphs, made by `stepfuse export`: load it with "
            f"runtime={runtime_of(manifest)!r}, or give the checkpoint it was made from"
        )
