"""AOT packages: graphs compiled by AOTInductor.

A package is native code and runs with the rights of whoever loads it: only load artefacts you made or trust. What is
compiled lies in one package per bucket of sizes; the weights lie beside them once and are shared by all. Verified on
CPU; on CUDA the same code has not been run.
"""

from __future__ import annotations

import hashlib
import platform
import sys
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..artifact import Graph, Manifest, Profile, inside
from ..errors import CheckpointError, DeviceError, RequestError
from .exported import filled

PACKAGES = "packages"
"""Folder of a graph that holds its packages and the constants that are no weights."""
CONSTANTS = "constants.safetensors"
WEIGHTS = "model.safetensors"
_FEATURES = ("amx", "asimd", "avx", "bf16", "f16c", "fma", "i8mm", "sve")


class Session:
    """One graph of an artefact, ready to run on the device it was compiled for.

    Everything is compared before any of it runs: the kind and the device, the version of torch, the processor, and the
    hash of every file of the graph. Raises CheckpointError or DeviceError for the first that differs.
    """

    only_profiles = True

    def __init__(self, folder: Path, name: str, device: torch.device | str = "cpu") -> None:
        manifest = Manifest.load(folder)
        if manifest.kind != "aoti":
            raise CheckpointError(f"{folder} holds {manifest.kind} graphs; runtime='aoti' needs an AOT artefact")
        self.graph: Graph = manifest.graph(name)
        self.device = torch.device(device)
        _check_versions(manifest.versions)
        check_target(self.graph.options["target"], self.device)
        packages: Mapping[str, str] = self.graph.options["packages"]
        manifest.check(folder, only=[name])
        self._weights = self._tensors(folder, f"{name}/{WEIGHTS}")
        constants = f"{name}/{PACKAGES}/{CONSTANTS}"
        self._constants = self._tensors(folder, constants) if constants in manifest.files else {}
        self._models = [
            (profile, self._load(folder, packages[profile.name], profile.name, manifest))
            for profile in self.graph.profiles
        ]

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the graph. Rows that no package has are filled up or run in parts: rows do not depend on each other.

        Raises RequestError for sizes that no package was compiled for.
        """
        axes = self.graph.measure({name: tuple(tensor.shape) for name, tensor in inputs.items()})
        rows = axes["rows"]
        if axes.get("steps", rows) not in (1, rows):
            raise RequestError(f"timestep: got {axes['steps']} times for {rows} rows, expected one each or one for all")
        fitting = [entry for entry in self._models if _fits(entry[0], axes)]
        if not fitting:
            raise RequestError(self._nothing_for(axes))
        given = []
        for port in self.graph.inputs:
            tensor = inputs[port.name].to(self.device, getattr(torch, port.dtype))
            given.append(tensor.expand(rows) if port.shape[0] == "steps" else tensor)
        parts: list[list[Tensor]] = []
        start = 0
        while start < rows:
            left = rows - start
            profile, model = next((entry for entry in fitting if entry[0].axes["rows"].max >= left), fitting[-1])
            taken = min(left, profile.axes["rows"].max)
            batch = [filled(tensor[start : start + taken], profile.axes["rows"].min) for tensor in given]
            parts.append([out[:taken] for out in model(*batch)])
            start += taken
        whole = parts[0] if len(parts) == 1 else [torch.cat(outs) for outs in zip(*parts, strict=True)]
        return {port.name: out for port, out in zip(self.graph.outputs, whole, strict=True)}

    def _load(self, folder: Path, file: str, bucket: str, manifest: Manifest) -> Any:
        """The compiled model of a package, on the shared weights. What is loaded are the bytes that were hashed."""
        data = inside(folder, file).read_bytes()
        if hashlib.sha256(data).hexdigest() != manifest.files.get(file):
            raise CheckpointError(f"{file} of the artefact {folder} is not the file that was exported: export again")
        index = -1 if self.device.type == "cpu" else self.device.index or 0
        model = torch._inductor.aoti_load_package(BytesIO(data), device_index=index)
        names: Mapping[str, str] = self.graph.options["constants"]
        values: dict[str, Tensor] = {}
        for fqn in model.get_constant_fqns():
            found = self._weights.get(names[fqn]) if fqn in names else self._constants.get(f"{bucket}:{fqn}")
            if found is None:
                raise CheckpointError(f"the artefact {folder} lacks {fqn}, which {file} needs: export again")
            values[fqn] = found
        model.load_constants(values, check_full_update=True, user_managed=True)
        return model

    def _tensors(self, folder: Path, file: str) -> dict[str, Tensor]:
        """The tensors of a file on the device, in the memory layout they were compiled for."""
        found = load_file(inside(folder, file), device=str(self.device))
        return {
            key: value.contiguous(memory_format=torch.channels_last) if value.dim() == 4 else value
            for key, value in found.items()
        }

    def _nothing_for(self, axes: Mapping[str, int]) -> str:
        declared = {
            ", ".join(f"{name} {size.max}" for name, size in sorted(profile.axes.items()) if name in _fixed(profile))
            for profile, _ in self._models
        }
        got = ", ".join(f"{name} {axes[name]}" for name in sorted(_fixed(self._models[0][0])))
        return f"got {got}; packages were compiled for {'; '.join(sorted(declared))}: export with these --shapes, too"


def target(device: torch.device) -> dict[str, Any]:
    """What code compiled on this machine for `device` needs of the machine that runs it."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return {"device": "cuda", "capability": f"sm_{major}{minor}", "cuda": torch.version.cuda}
    return {
        "device": device.type, "platform": sys.platform, "machine": platform.machine(), "features": _cpu_features()
    }  # fmt: skip


def check_target(wanted: Mapping[str, Any], device: torch.device) -> None:
    """Compare what packages were compiled for with this machine. Raises DeviceError naming the first difference."""
    if wanted["device"] != device.type:
        raise DeviceError(
            f"these packages were compiled for {wanted['device']}, not for {device.type}: export with "
            f"--device {device.type}, or load them with device={wanted['device']!r}"
        )
    for name, here in target(device).items():
        needed = wanted.get(name)
        missing = sorted(set(needed or ()) - set(here)) if name == "features" else []
        if missing:
            raise DeviceError(f"this processor lacks {', '.join(missing)}, which these packages use: export here")
        if name != "features" and needed != here:
            raise DeviceError(f"these packages were compiled for {name} {needed}, this machine has {here}: export here")


def _check_versions(versions: Mapping[str, str]) -> None:
    """Compiled code calls into the very libraries it was compiled against."""
    if versions.get("torch") != torch.__version__:
        raise DeviceError(
            f"these packages were compiled with torch {versions.get('torch')}, this is torch {torch.__version__}: "
            "export again, or install that version"
        )


def _cpu_features() -> list[str]:
    """The vector extensions of this processor, as Linux lists them; none elsewhere."""
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text(encoding="utf-8", errors="replace").splitlines() if listed.is_file() else []
    flags = next((line.partition(":")[2] for line in lines if line.startswith(("flags", "Features"))), "")
    return sorted(flag for flag in set(flags.split()) if flag.startswith(_FEATURES))


def _fixed(profile: Profile) -> list[str]:
    """The axes a package has one size of, whatever its rows."""
    return [name for name in profile.axes if name not in ("rows", "steps")]


def _fits(profile: Profile, axes: Mapping[str, int]) -> bool:
    return all(profile.axes[name].max == axes[name] for name in _fixed(profile))
