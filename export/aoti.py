"""AOT artefacts: graphs compiled by AOTInductor before they are needed, one package per bucket of sizes.

The artefact holds every graph's weights once (under the names of the checkpoint), its packages, and the manifest.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from .. import __version__
from ..engine.artifact import Graph, Manifest, Profile
from ..engine.errors import DeviceError, RequestError, closest
from ..engine.runtimes.aoti import CONSTANTS, PACKAGES, WEIGHTS, target
from ..engine.weights.checkpoint import Checkpoint
from ..engine.weights.detect import detect
from ..kernels.policy import Choice
from . import weights
from .aoti_package import bind, buckets, compile_package, inputs_of, record_program, unbind
from .folder import (
    Options,
    copy_sides,
    dtype_of,
    hashes,
    load_network,
    open_source,
    ports_of,
    require_new,
    resolve_dtype,
    save_final_norm,
)  # fmt: skip
from .program import DTYPES, PREFIX
from .spec import GraphSpec, available, make_spec

COMPONENTS = ("unet", "vae_decoder", "vae_encoder", "text_encoder", "text_encoder_2")
"""Graphs there can be packages of; all but the encoder of the autoencoder are made unless others are asked for."""


def export_aoti(
    source: str | Path,
    output: Path,
    options: Options,
    *,
    device: str = "cpu",
    fixed_rows: bool | None = None,
    kernels: Choice = "auto",
    progress: Callable[[str], None] = lambda text: None,
) -> Manifest:
    """Compile a checkpoint's graphs for `device` into packages in `output`; returns the manifest, also written there.

    options: components, shapes, rows, dtype, variant and download count. fixed_rows: a package per number of rows
    instead of one with free rows; None: on CUDA. kernels: as `EngineConfig.kernels`. Everything is checked before the
    first graph is compiled. Raises RequestError, DeviceError, CheckpointError or, for NaN weights, NumericsError.
    """
    place = _device(device)
    fixed = place.type == "cuda" if fixed_rows is None else fixed_rows
    dtype = resolve_dtype(options.dtype)
    checkpoint = open_source(source, options)
    specs = [make_spec(checkpoint, name) for name in _components(checkpoint, options)]
    profiles = {spec.name: buckets(spec, options.shapes, options.rows, fixed) for spec in specs}
    require_new(output)
    graphs: dict[str, Graph] = {}
    for spec in specs:
        own = dtype_of(checkpoint, spec, dtype)
        made = _Packages(checkpoint, spec, output / spec.name, own, place, kernels, progress)
        graphs[spec.name] = made.graph(profiles[spec.name])
    copy_sides(checkpoint, output)
    manifest = Manifest(
        kind="aoti",
        architecture=detect(checkpoint).architecture if "" not in checkpoint.components else "",
        components=dict(checkpoint.components),
        graphs=graphs,
        versions={"stepfuse": __version__, "torch": torch.__version__},
        files=hashes(output),
        settings=dict(checkpoint.options),
    )
    manifest.save(output)
    return manifest


def cases(graph: Graph) -> list[dict[str, int]]:
    """Sizes the report compares at: every package is code of its own, so each has its smallest and largest rows."""
    chosen: list[dict[str, int]] = []
    for profile in graph.profiles:
        rows = profile.axes["rows"]
        for count in dict.fromkeys((rows.min, rows.max)):
            fixed = {name: size.opt for name, size in profile.axes.items()}
            chosen.append(fixed | {name: count for name in ("rows", "steps") if name in fixed})
    return chosen


class _Packages:
    """The packages of one graph, made one after another in its folder."""

    def __init__(
        self, checkpoint: Checkpoint, spec: GraphSpec, folder: Path, dtype: str, device: torch.device,
        kernels: Choice, progress: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.checkpoint, self.spec, self.folder, self.dtype = checkpoint, spec, folder, dtype
        self.device, self.kernels, self.progress = device, kernels, progress

    def graph(self, profiles: tuple[Profile, ...]) -> Graph:
        """Compile every bucket; what the manifest says about the graph."""
        spec = self.spec
        (self.folder / PACKAGES).mkdir(parents=True, exist_ok=True)
        names = self._weights()
        spec.module.to(self.device)
        constants: dict[str, Tensor] = {}
        chosen: dict[str, dict[str, int]] = {}
        for profile in profiles:
            self.progress(f"{spec.name}: recording and compiling {profile.name}")
            chosen[profile.name], more = self._compile(profile, names)
            constants |= {f"{profile.name}:{name}": value for name, value in more.items()}
        if constants:
            (self.folder / PACKAGES / CONSTANTS).write_bytes(save(constants))
        spec.module.to("meta")  # the next graph needs the memory
        axes = {
            name: (min(p.axes[name].min for p in profiles), max(p.axes[name].max for p in profiles))
            for name in profiles[0].axes
        }
        free = {name: (1, spec.axes[name].max) for name in ("rows", "steps") if name in axes}  # see Session.run
        return Graph(
            component=spec.component,
            dtype=self.dtype,
            file=f"{spec.name}/{WEIGHTS}",
            inputs=ports_of(spec.inputs, self.dtype),
            outputs=ports_of(spec.outputs, self.dtype),
            axes=axes | free,
            profiles=profiles,
            traced={name: size.opt for name, size in profiles[0].axes.items()},
            options={
                "packages": {profile.name: self._file(profile) for profile in profiles},
                "constants": names,
                "target": target(self.device),
                "kernels": chosen,
            },
        )

    def _weights(self) -> dict[str, str]:
        """Load and store the weights and the configuration; the name of every constant -> its key in the file."""
        spec = self.spec
        keys = load_network(self.checkpoint, spec, DTYPES[self.dtype])
        values = spec.module.get_submodule("net").state_dict()
        weights.copy(((key, values[name]) for name, key in keys.items()), self.folder)
        config = self.checkpoint.config(spec.component)
        (self.folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        save_final_norm(spec, self.folder)
        return {PREFIX + name: key for name, key in keys.items()}

    def _compile(self, profile: Profile, names: Mapping[str, str]) -> tuple[dict[str, int], dict[str, Tensor]]:
        """One package; returns the kernels in it, and the constants of the program that are no weights."""
        inputs = inputs_of(self.spec, profile, DTYPES[self.dtype], self.device)
        try:
            chosen = bind(self.spec, inputs, self.kernels)
            program = record_program(self.spec, profile, inputs)
        finally:
            unbind(self.spec)
        compile_package(program, self.folder.parent / self._file(profile))
        found: dict[str, Any] = {**program.state_dict, **program.constants}
        more = {name: value for name, value in found.items() if name not in names and isinstance(value, Tensor)}
        return chosen, {name: value.detach().cpu().contiguous() for name, value in more.items()}

    def _file(self, profile: Profile) -> str:
        return f"{self.spec.name}/{PACKAGES}/{profile.name}.pt2"


def _components(checkpoint: Checkpoint, options: Options) -> list[str]:
    has = [name for name in available(checkpoint) if name in COMPONENTS]
    for name in options.components:
        if name not in has:
            raise RequestError(f"--components: there is no AOT package of {name!r}; {closest(name, has)}")
    return list(options.components) or [name for name in has if name != "vae_encoder"]


def _device(name: str) -> torch.device:
    if name not in ("cpu", "cuda"):
        raise RequestError(f"--device: got {name!r}, expected cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise DeviceError("--device cuda: packages are compiled where they run, and there is no CUDA device here")
    return torch.device(name)
