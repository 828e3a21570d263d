"""An artefact folder: one ONNX model per graph in the layout of diffusers, and the manifest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from .. import __version__
from ..engine.artifact import MANIFEST, Graph, Manifest, Port, inside, sha256
from ..engine.components import DEFAULTS_FILE, NOISING
from ..engine.errors import RequestError, closest
from ..engine.families import BUILTIN, builtin_folder
from ..engine.models.vae import VAEConfig
from ..engine.runtimes.exported import FINAL_NORM
from ..engine.weights.checkpoint import Checkpoint, TensorInfo
from ..engine.weights.detect import detect
from ..engine.weights.load import check_weights, load_weights
from ..engine.weights.maps import MAPS
from . import onnx, weights
from .program import DTYPES, trace
from .spec import GraphSpec, defaults, make_spec

SIDE_FOLDERS = ("tokenizer", "tokenizer_2", "scheduler", *NOISING)
ALIASES = {"fp32": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16"}
REPORTS = ("parity.md", "parity.json")
PIPELINES = {"StableDiffusionPipeline": "OnnxStableDiffusionPipeline"}
"""Pipeline classes that diffusers has for ONNX folders; others keep their name."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is exported and how.

    components: graphs (spec.py); () means all the checkpoint has. shapes: width x height in pixels, and rows: of the
    network, that profiles and verification use. where: "copy" the weights, or "link" the user's own files. keep: ops
    that stay `stepfuse::` nodes.
    """

    components: tuple[str, ...] = ()
    shapes: tuple[tuple[int, int], ...] = ((512, 512),)
    rows: tuple[int, ...] = (1, 2)
    dtype: str = "float32"
    opset: int = 23
    where: weights.Where = "copy"
    keep: tuple[str, ...] = ()
    variant: str | None = None
    download: bool = False


def open_source(source: str | Path, options: Options) -> Checkpoint:
    """The checkpoint of a built-in name, a folder or a cached hub id."""
    folder = builtin_folder(str(source)) if str(source) in BUILTIN else source
    return Checkpoint.open(folder, variant=options.variant, download=options.download)


def resolve_dtype(name: str) -> str:
    """float32, float16 or bfloat16 from any spelling. Raises RequestError for other types."""
    full = ALIASES.get(name, name)
    if full not in DTYPES:
        raise RequestError(f"--dtype: got {name!r}; {closest(name, [*DTYPES, *ALIASES])}")
    return full


def export_onnx(
    source: str | Path, output: Path, options: Options, progress: Callable[[str], None] = lambda text: None
) -> Manifest:
    """Export a checkpoint's graphs to ONNX models in `output` and return the manifest, which is written there, too.

    Everything is checked before the first graph is made. Raises RequestError, CheckpointError or, for NaN weights,
    NumericsError.
    """
    onnx.require_packages()
    onnx.check_opset(options.opset)
    dtype = resolve_dtype(options.dtype)
    checkpoint = open_source(source, options)
    specs = [make_spec(checkpoint, name) for name in options.components or defaults(checkpoint)]
    profiles = {spec.name: spec.profiles(options.shapes, options.rows) for spec in specs}
    require_new(output)
    graphs: dict[str, Graph] = {}
    for spec in specs:
        progress(f"{spec.name}: recording, converting and checking")
        own = dtype_of(checkpoint, spec, dtype)
        notes = _export_graph(checkpoint, spec, output / spec.name, own, options)
        graphs[spec.name] = Graph(
            component=spec.component,
            dtype=own,
            file=f"{spec.name}/{onnx.FILE}",
            inputs=ports_of(spec.inputs, own),
            outputs=ports_of(spec.outputs, own),
            axes={name: (axis.min, axis.max) for name, axis in spec.axes.items()},
            profiles=profiles[spec.name],
            traced={name: axis.traced for name, axis in spec.axes.items()},
            options={"opset": options.opset, "keep": list(options.keep), "scale": spec.scale, **notes},
        )
    copy_sides(checkpoint, output)
    _write_index(checkpoint, output, list(graphs))
    manifest = Manifest(
        kind="onnx",
        architecture=detect(checkpoint).architecture if "" not in checkpoint.components else "",
        components=dict(checkpoint.components),
        graphs=graphs,
        versions={"stepfuse": __version__, **{name: version(name) for name in ("torch", "onnx", "onnxscript")}},
        files=hashes(output),
        settings=dict(checkpoint.options),
    )
    manifest.save(output)
    return manifest


def load_network(checkpoint: Checkpoint, spec: GraphSpec, dtype: torch.dtype) -> dict[str, str]:
    """Fill `spec.module.net` with its weights; returns parameter name -> key of the checkpoint."""
    tensors = stored(checkpoint, spec)
    keymap = MAPS[checkpoint.components[spec.component].removeprefix("Flax")]
    network: Any = spec.module.get_submodule("net")
    keys = {a.name: a.key for a in check_weights(network, tensors, keymap, spec.name)}
    load_weights(network, tensors, keymap, device="cpu", dtype=dtype, what=spec.name)
    return keys


def stored(checkpoint: Checkpoint, spec: GraphSpec) -> dict[str, TensorInfo]:
    """The tensors of the checkpoint that the graph uses."""
    found = checkpoint.weights(spec.component)
    return {key: info for key, info in found.items() if not spec.prefixes or key.startswith(spec.prefixes)}


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of an artefact but its manifest and its reports, by path relative to `folder`."""
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    return {name: sha256(inside(folder, name)) for name in names if name not in (MANIFEST, *REPORTS)}


def _export_graph(
    checkpoint: Checkpoint, spec: GraphSpec, folder: Path, dtype: str, options: Options
) -> dict[str, Any]:
    """One graph into its folder; returns what the manifest says about its weights."""
    keys = load_network(checkpoint, spec, DTYPES[dtype])
    program = trace(spec, DTYPES[dtype], options.keep)
    model = onnx.convert(program, spec, options.opset, options.keep)
    folder.mkdir(parents=True, exist_ok=True)
    places = _place_weights(checkpoint, spec, keys, folder, options.where)
    attached = onnx.attach_weights(model, keys, places, folder)
    onnx.save(model, folder)
    config = checkpoint.config(spec.component)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_final_norm(spec, folder)
    spec.module.to("meta")  # the weights are in their file; the next graph needs the memory
    return {"weights": options.where, "tensors": attached}


def _place_weights(
    checkpoint: Checkpoint, spec: GraphSpec, keys: Mapping[str, str], folder: Path, where: weights.Where
) -> dict[str, weights.Stored]:
    network = spec.module.get_submodule("net")
    values = {keys[name]: value for name, value in network.state_dict().items() if name in keys}
    if where == "copy":
        return weights.copy(values.items(), folder)
    tensors = stored(checkpoint, spec)
    dtypes = {key: str(value.dtype).removeprefix("torch.") for key, value in values.items()}
    return weights.link({key: tensors[key] for key in dtypes}, dtypes, folder)


def dtype_of(checkpoint: Checkpoint, spec: GraphSpec, dtype: str) -> str:
    """The dtype of a graph: autoencoders that overflow in float16 stay in float32, as in the engine."""
    if dtype == "float16" and spec.name.startswith("vae") and VAEConfig.from_diffusers(
        checkpoint.config(spec.component)
    ).force_upcast:  # fmt: skip
        return "float32"
    return dtype


def ports_of(ports: Sequence[Port], dtype: str) -> tuple[Port, ...]:
    return tuple(Port(port.name, onnx.element_type(port, dtype), port.shape) for port in ports)


def require_new(output: Path) -> None:
    """Make the folder; an older artefact in it is replaced, anything else is left alone."""
    if output.is_symlink():
        raise RequestError(f"--output: {output} is a symlink: refused; give the folder itself")
    if output.exists() and any(output.iterdir()):
        if not (output / MANIFEST).is_file():
            raise RequestError(f"--output: {output} is neither empty nor an artefact; give a new folder")
        for name in (*Manifest.load(output).files, *REPORTS, MANIFEST):
            inside(output, name).unlink(missing_ok=True)
    output.mkdir(parents=True, exist_ok=True)


def save_final_norm(spec: GraphSpec, folder: Path) -> None:
    """The last norm of a text encoder beside its graph: `clip_skip` applies it to a hidden state of another layer."""
    if spec.name.startswith("text_encoder"):
        network: Any = spec.module.get_submodule("net")
        norm = getattr(network, "text_model", network).final_layer_norm
        save_file({"weight": norm.weight, "bias": norm.bias}, folder / FINAL_NORM)


def copy_sides(checkpoint: Checkpoint, output: Path) -> None:
    """Tokenizers, the scheduler and the defaults: what an engine needs beside the graphs."""
    for name in SIDE_FOLDERS:
        if name in checkpoint.components:
            shutil.copytree(checkpoint.folder(name), output / name, dirs_exist_ok=True)
    if (checkpoint.root / DEFAULTS_FILE).is_file():
        shutil.copyfile(checkpoint.root / DEFAULTS_FILE, output / DEFAULTS_FILE)


def _write_index(checkpoint: Checkpoint, output: Path, graphs: Sequence[str]) -> None:
    """`model_index.json`, as diffusers' ONNX pipelines read it."""
    index: dict[str, Any] = {
        "_class_name": PIPELINES.get(checkpoint.class_name, checkpoint.class_name),
        "feature_extractor": [None, None],
        "safety_checker": [None, None],
        "vae_encoder": [None, None],
    }
    if "" in checkpoint.components:
        return
    index |= checkpoint.options
    for name in SIDE_FOLDERS:
        if name in checkpoint.components:
            library = "diffusers" if name.endswith("scheduler") else "transformers"
            index[name] = [library, checkpoint.components[name]]
    index |= {name: ["diffusers", "OnnxRuntimeModel"] for name in graphs if name not in ("update", "controlled_unet")}
    (output / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
