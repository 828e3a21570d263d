"""What `Engine.load` builds: the parts of a checkpoint, or of an artefact for the runtimes that execute graphs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from .artifact import Graph
from .components import Components, load_components, read_defaults, short, zero_negative
from .conditioning import text as clip
from .config import EngineConfig, resolve, resolve_dtype, resolve_runtime
from .errors import RequestError
from .families import BUILTIN, Family, family_of
from .runtimes.exported import FixedKernels
from .runtimes.opened import Opened, require_checkpoint
from .sampling.scheduler_config import SchedulerConfig


def load(source: str | Path, config: EngineConfig) -> Components:
    """The parts of a checkpoint (`load_components`) or, for a runtime other than "torch", of an artefact.

    Raises CheckpointError for a checkpoint where an artefact is needed and the other way round, and as
    `load_components`; RequestError for options that exported networks cannot honour.
    """
    if resolve_runtime(config.runtime) == "torch":
        if str(source) not in BUILTIN:
            require_checkpoint(source)
        return load_components(source, config)
    opened = Opened(source, config.runtime)
    family = family_of(opened.manifest.architecture or f"one part of a checkpoint ({opened.folder})")
    graphs = _graphs(opened, family)
    resolved = resolve(replace(config, **_dtypes(config, opened, graphs)))
    device, kernels = resolved.device, FixedKernels(_summary(opened))
    return Components(
        name=str(source),
        family=family,
        config=resolved,
        denoiser=opened.denoiser(device),
        scheduler=SchedulerConfig.from_diffusers(opened.config("scheduler")),
        text=tuple(
            clip.TextEncoder(
                opened.text_model(name, device),
                clip.load_tokenizer(opened.folder / name.replace("text_encoder", "tokenizer")),
                family.text == "penultimate",
                bool(opened.config(name).get("use_attention_mask", False)),
            )
            for name in graphs
            if name.startswith("text_encoder")
        ),
        vae=opened.vae(device) if family.latent else None,
        zero_negative=zero_negative(family, opened.manifest.settings),
        defaults=read_defaults(opened.folder),
        binders={"unet": kernels, "vae": kernels} if family.latent else {"unet": kernels},
        artifact_bytes=opened.bytes([*graphs, "vae_encoder"]),
    )


def _graphs(opened: Opened, family: Family) -> dict[str, Graph]:
    """The graphs a request needs. Raises CheckpointError for one that was not exported."""
    names = ["unet", "vae_decoder"] if family.latent else ["unet"]
    if family.text != "none":
        names += [name for name in ("text_encoder", "text_encoder_2") if name in opened.manifest.components]
    return {name: opened.manifest.graph(name) for name in names}


def _dtypes(config: EngineConfig, opened: Opened, graphs: dict[str, Graph]) -> dict[str, Any]:
    """The dtypes of the graphs. Raises RequestError where the configuration asks for others."""
    owners = {"dtype": "unet", "vae_dtype": "vae_decoder" if "vae_decoder" in graphs else "unet"}
    made = {option: resolve_dtype(option, graphs[name].dtype) for option, name in owners.items()}
    for option, name in owners.items():
        asked = resolve_dtype(option, getattr(config, option))
        if asked not in (None, made[option]):
            raise RequestError(
                f"{option}: got {short(asked)}, the {name} of {opened.folder} is {graphs[name].dtype}: leave it out, "
                "or export with another --dtype"
            )
    return made


def _summary(opened: Opened) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in sorted(opened.manifest.versions.items()))
    return f"{opened.manifest.kind} graph run by {opened.runtime}; its kernels were chosen by the export ({versions})"
