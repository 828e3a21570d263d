"""Graph specs: which graphs a checkpoint has, their named inputs and outputs, and the axes that may vary.

A new kind of network plugs in by adding a function to `SPECS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from ..engine.artifact import Port, Profile
from ..engine.conditioning.text import build_model
from ..engine.errors import RequestError, closest
from ..engine.models.controlnet import ControlNet, ControlNetConfig
from ..engine.models.unet import UNet
from ..engine.models.unet_config import UNetConfig
from ..engine.models.vae import AutoencoderKL, VAEConfig
from ..engine.weights.checkpoint import Checkpoint
from ..engine.weights.detect import TWO_IMAGES
from ..kernels.sampler_step.columns import HISTORY, Column
from . import graphs
from .profiles import declare

MODEL = "model"
"""dtype of a port that has the dtype the graph is exported in."""

ROWS = 64
SITES = 1024
TOKENS = 1024
UPDATES = 2000
POOLED = 1280
"""Width of the pooled prompt of the published SDXL networks: the base has six size ids beside it, the refiner five."""


class Axis(NamedTuple):
    """Sizes an axis may have, and the one it is traced at: two or more, and no two axes alike."""

    min: int
    max: int
    traced: int


@dataclass(frozen=True, kw_only=True)
class GraphSpec:
    """One graph: a module on the meta device whose forward takes `inputs` by name and returns a tuple of `outputs`.

    component: the part of the checkpoint whose weights fill `module.net`; prefixes: the parameters of it that the graph
    has, by the start of their names; () means all. scale: pixels per latent of "height" and "width"; 0: there are none.
    """

    name: str
    component: str
    module: nn.Module
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    axes: Mapping[str, Axis]
    prefixes: tuple[str, ...] = ()
    scale: int = 0
    usual: Mapping[str, int] = field(default_factory=dict[str, int])

    def profiles(self, shapes: Sequence[tuple[int, int]], rows: Sequence[int]) -> tuple[Profile, ...]:
        """One profile per resolution, as `declare` makes them. Raises RequestError for what this graph cannot have."""
        spans = {name: (axis.min, axis.max) for name, axis in self.axes.items()}
        return declare(self.name, spans, self.scale, self.usual, shapes, rows)


def available(checkpoint: Checkpoint) -> list[str]:
    """The graphs a checkpoint, or a single component of one, has, by the names `make_spec` takes."""
    has = set(checkpoint.components.values())
    found: list[str] = []
    for name in SPECS:
        component, classes = SOURCES[name]
        found += [name] if classes & ({checkpoint.components.get(component)} if len(has) > 1 else has) else []
    if "controlnet" not in checkpoint.components and "controlled_unet" in found:
        found.remove("controlled_unet")
    return found


def defaults(checkpoint: Checkpoint) -> list[str]:
    """The graphs that are exported unless others are asked for: all but the fused update."""
    return [name for name in available(checkpoint) if name != "update"]


def make_spec(checkpoint: Checkpoint, name: str) -> GraphSpec:
    """The spec of a graph. Raises RequestError for one the checkpoint does not have."""
    known = available(checkpoint)
    if name not in known:
        raise RequestError(f"--components: {checkpoint.root.name} has no graph {name!r}; {closest(name, known)}")
    return SPECS[name](checkpoint)


def _part(checkpoint: Checkpoint, name: str) -> str:
    """The component's name in this checkpoint: "" where the checkpoint is that component alone."""
    return name if name in checkpoint.components else ""


def _unet(checkpoint: Checkpoint) -> GraphSpec:
    part = _part(checkpoint, "unet")
    net = _network(UNet, UNetConfig.from_diffusers(checkpoint.config(part)))
    config: UNetConfig = net.config
    inputs, axes = _denoiser_inputs(config, checkpoint)
    outputs = (Port("out_sample", MODEL, ("rows", config.out_channels, "height", "width")),)
    return GraphSpec(
        name="unet", component=part, module=graphs.DenoiserGraph(net), inputs=inputs, outputs=outputs, axes=axes,
        scale=_scale(checkpoint), usual=_usual(checkpoint),
    )  # fmt: skip


def _controlled_unet(checkpoint: Checkpoint) -> GraphSpec:
    """The U-Net with what a ControlNet adds as further inputs."""
    plain, control = _unet(checkpoint), _controlnet(checkpoint)
    names = [f"down_residual_{i}" for i in range(len(control.outputs) - 1)] + ["mid_residual"]
    residuals = [Port(name, port.dtype, port.shape) for name, port in zip(names, control.outputs, strict=True)]
    step = control.scale // plain.scale
    ports = [
        tuple(Port(p.name, p.dtype, _multiplied(p.shape, step)) for p in group)
        for group in (plain.inputs, plain.outputs)
    ]
    return GraphSpec(
        name="controlled_unet", component="unet", module=plain.module, inputs=(*ports[0], *residuals), outputs=ports[1],
        axes=control.axes, scale=control.scale, usual=plain.usual,
    )  # fmt: skip


def _controlnet(checkpoint: Checkpoint) -> GraphSpec:
    part = _part(checkpoint, "controlnet")
    net = _network(ControlNet, ControlNetConfig.from_diffusers(checkpoint.config(part)))
    trunk, levels, control = net.config, net.config.down, net.control
    # Residuals stand at the resolution of their level: height and width are those of the innermost, all are multiples.
    step = 1 if control.pool else 2 ** sum(level.resample != "none" for level in levels)
    ports, axes = _denoiser_inputs(trunk, checkpoint)
    axes = {name: _divided(axis, step) if name in ("height", "width") else axis for name, axis in axes.items()}
    ports = tuple(Port(p.name, p.dtype, _multiplied(p.shape, step)) for p in ports)
    image = ("rows", control.image_channels, "height", "width")
    image_port = Port("controlnet_cond", MODEL, _multiplied(image, step * 2 ** (len(control.image_widths) - 1)))
    inputs = (*ports[:3], image_port, Port("conditioning_scale", "float32", ("rows",)), *ports[3:])
    sizes, at = [(levels[0].channels, step)], step
    for level in levels:
        sizes += [(level.channels, at)] * level.layers
        if level.resample != "none":
            at //= 2
            sizes.append((level.channels, at))
    sizes.append((levels[-1].channels, at))
    names = [f"down_block_res_samples_{i}" for i in range(len(sizes) - 1)] + ["mid_block_res_sample"]
    sites = [(1, 1) if control.pool else (_product(k, "height"), _product(k, "width")) for _, k in sizes]
    outputs = tuple(
        Port(name, MODEL, ("rows", channels, *site))
        for name, (channels, _), site in zip(names, sizes, sites, strict=True)
    )
    return GraphSpec(
        name="controlnet", component=part, module=graphs.ControlNetGraph(net), inputs=inputs, outputs=outputs,
        axes=axes, scale=_scale(checkpoint) * step, usual=_usual(checkpoint),
    )  # fmt: skip


def _update(checkpoint: Checkpoint) -> GraphSpec:
    """Denoiser + guidance + sampler: the state of the rows in, the state after one update out."""
    part = _part(checkpoint, "unet")
    net = _network(UNet, UNetConfig.from_diffusers(checkpoint.config(part)))
    conditioning, axes = _denoiser_inputs(net.config, checkpoint)
    second_image = checkpoint.components[part] == "UNet2DModel" and net.config.in_channels in TWO_IMAGES
    if net.config.in_channels != net.config.out_channels or second_image:
        raise RequestError("update: this U-Net reads more channels than it predicts; export 'unet' instead")
    channels = net.config.in_channels
    state = ("rows", channels, "height", "width")
    columns = len(Column)
    inputs = (
        Port("x", "float32", state),
        Port("base", "float32", state),
        Port("history", "float32", ("rows", HISTORY, *state[1:])),
        Port("model_input", "float32", state),
        Port("table", "float32", ("rows", "updates", columns)),
        Port("update", "int64", ("rows",)),
        Port("weights", "float32", ("rows", 2)),
        Port("noise", "float32", ("rows", 2, *state[1:])),
        *(Port(p.name, p.dtype, ("2*rows", *p.shape[1:])) for p in conditioning[2:]),
    )
    outputs = (
        Port("new_x", "float32", state),
        Port("new_base", "float32", state),
        Port("new_history", "float32", ("rows", HISTORY, *state[1:])),
        Port("next_model_input", "float32", state),
        Port("nonfinite", "bool", ("rows",)),
    )
    axes = {name: axis for name, axis in axes.items() if name != "steps"} | {"updates": Axis(1, UPDATES, 5)}
    return GraphSpec(
        name="update", component=part, module=graphs.UpdateGraph(net), inputs=inputs, outputs=outputs, axes=axes,
        scale=_scale(checkpoint), usual=_usual(checkpoint) | {"updates": 50},
    )  # fmt: skip


def _vae_decoder(checkpoint: Checkpoint) -> GraphSpec:
    part = _part(checkpoint, "vae")
    net = _network(AutoencoderKL, VAEConfig.from_diffusers(checkpoint.config(part)))
    config: VAEConfig = net.config
    del net.encoder, net.quant_conv
    factor = config.factor
    image = ("rows", config.out_channels, _product(factor, "height"), _product(factor, "width"))
    return GraphSpec(
        name="vae_decoder", component=part, module=graphs.DecoderGraph(net), prefixes=("decoder.", "post_quant_conv."),
        inputs=(Port("latent_sample", MODEL, ("rows", config.latent_channels, "height", "width")),),
        outputs=(Port("sample", MODEL, image),), axes=_image_axes(2), scale=factor,
    )  # fmt: skip


def _vae_encoder(checkpoint: Checkpoint) -> GraphSpec:
    part = _part(checkpoint, "vae")
    net = _network(AutoencoderKL, VAEConfig.from_diffusers(checkpoint.config(part)))
    config: VAEConfig = net.config
    del net.decoder, net.post_quant_conv
    factor = config.factor
    image = ("rows", config.in_channels, _product(factor, "height"), _product(factor, "width"))
    return GraphSpec(
        name="vae_encoder", component=part, module=graphs.EncoderGraph(net), prefixes=("encoder.", "quant_conv."),
        inputs=(Port("sample", MODEL, image),),
        outputs=(Port("latent_parameters", MODEL, ("rows", 2 * config.latent_channels, "height", "width")),),
        axes=_image_axes(2), scale=factor,
    )  # fmt: skip


def _text_encoder(checkpoint: Checkpoint, name: str) -> GraphSpec:
    part = _part(checkpoint, name)
    net: Any = build_model(checkpoint.components[part], checkpoint.config(part))
    config, projected = net.config, checkpoint.components[part] == "CLIPTextModelWithProjection"
    length, width = config.max_position_embeddings, config.hidden_size
    hidden = ("rows", length, width)
    states = [Port(f"hidden_states.{i}", MODEL, hidden) for i in range(config.num_hidden_layers + 1)]
    last = Port("last_hidden_state", MODEL, hidden)
    first = (
        (Port("text_embeds", MODEL, ("rows", config.projection_dim)), last)
        if projected
        else (last, Port("pooler_output", MODEL, ("rows", width)))
    )
    return GraphSpec(
        name=name, component=part, module=graphs.TextGraph(net, projected),
        inputs=(Port("input_ids", "int32", ("rows", length)),), outputs=(*first, *states),
        axes={"rows": Axis(1, ROWS, 2)},
    )  # fmt: skip


SPECS: dict[str, Callable[[Checkpoint], GraphSpec]] = {
    "unet": _unet,
    "controlled_unet": _controlled_unet,
    "controlnet": _controlnet,
    "update": _update,
    "vae_decoder": _vae_decoder,
    "vae_encoder": _vae_encoder,
    "text_encoder": lambda checkpoint: _text_encoder(checkpoint, "text_encoder"),
    "text_encoder_2": lambda checkpoint: _text_encoder(checkpoint, "text_encoder_2"),
}


_UNETS = {"UNet2DConditionModel", "UNet2DModel"}
_CLIPS = {"CLIPTextModel", "CLIPTextModelWithProjection"}
SOURCES: dict[str, tuple[str, set[str | None]]] = {
    "unet": ("unet", {*_UNETS}),
    "controlled_unet": ("unet", {*_UNETS}),
    "controlnet": ("controlnet", {"ControlNetModel"}),
    "update": ("unet", {*_UNETS}),
    "vae_decoder": ("vae", {"AutoencoderKL"}),
    "vae_encoder": ("vae", {"AutoencoderKL"}),
    "text_encoder": ("text_encoder", {*_CLIPS}),
    "text_encoder_2": ("text_encoder_2", {*_CLIPS}),
}
"""Graph -> the component it is made from, and the classes that component may have."""


def _denoiser_inputs(config: UNetConfig, checkpoint: Checkpoint) -> tuple[tuple[Port, ...], dict[str, Axis]]:
    """Latents, timestep and the conditioning this network reads."""
    ports = [
        Port("sample", MODEL, ("rows", config.in_channels, "height", "width")),
        Port("timestep", "float32", ("steps",)),
    ]
    axes = _image_axes(_smallest(config)) | {"steps": Axis(1, ROWS, 3)}
    if config.blocks.cross_dim:
        width = config.text_dim or config.blocks.cross_dim
        ports.append(Port("encoder_hidden_states", MODEL, ("rows", "tokens", width)))
        axes["tokens"] = Axis(1, TOKENS, 7)
    if config.added_time_dim:
        pooled = _pooled_width(checkpoint, config.added_dim, config.added_time_dim)
        ports.append(Port("text_embeds", MODEL, ("rows", pooled)))
        ports.append(Port("time_ids", "float32", ("rows", (config.added_dim - pooled) // config.added_time_dim)))
    if config.class_embedding in ("table", "timestep"):
        ports.append(Port("class_labels", "int64", ("rows",)))
    elif config.class_embedding != "none":
        ports.append(Port("class_labels", MODEL, ("rows", config.class_dim or config.time_dim)))
    if config.time_cond_dim:
        ports.append(Port("timestep_cond", MODEL, ("rows", config.time_cond_dim)))
    return tuple(ports), axes


def _pooled_width(checkpoint: Checkpoint, added: int, each: int) -> int:
    """Width of the pooled prompt: what the text encoder gives; without one, the usual or what six size ids leave."""
    if "text_encoder_2" in checkpoint.components:
        return int(checkpoint.config("text_encoder_2").get("projection_dim", 512))
    rest = added - POOLED
    return POOLED if rest > 0 and rest % each == 0 else added - 6 * each


def _network(cls: Callable[[Any], Any], config: Any) -> Any:
    with torch.device("meta"):
        return cls(config).eval().requires_grad_(False)


def _smallest(config: UNetConfig) -> int:
    """Latent sites a side must have so that the innermost feature map has more than one: one would be traced apart."""
    return 2 ** sum(level.resample != "none" for level in config.down) + 1


def _image_axes(smallest: int) -> dict[str, Axis]:
    return {
        "rows": Axis(1, ROWS, 2),
        "height": Axis(smallest, SITES, max(16, smallest)),
        "width": Axis(smallest, SITES, max(24, smallest + 1)),
    }


def _scale(checkpoint: Checkpoint) -> int:
    """Pixels per latent; a conditional U-Net without its autoencoder is taken for one of Stable Diffusion.

    Of those the x4 upscaler, which has noise levels for classes, has latents of a quarter of its image's size.
    """
    if checkpoint.components.get("vae") == "AutoencoderKL":
        return VAEConfig.from_diffusers(checkpoint.config("vae")).factor
    if "UNet2DModel" in checkpoint.components.values():
        return 1
    levels = checkpoint.components.get("") == "UNet2DConditionModel" and checkpoint.config("").get("num_class_embeds")
    return 4 if levels else 8


def _usual(checkpoint: Checkpoint) -> dict[str, int]:
    if "text_encoder" not in checkpoint.components:
        return {"tokens": 77}
    return {"tokens": int(checkpoint.config("text_encoder").get("max_position_embeddings", 77))}


def _product(times: int, axis: str) -> str:
    return axis if times == 1 else f"{times}*{axis}"


def _multiplied(shape: tuple[int | str, ...], times: int) -> tuple[int | str, ...]:
    return tuple(_product(times, size) if size in ("height", "width") else size for size in shape)


def _divided(axis: Axis, step: int) -> Axis:
    return axis if step == 1 else Axis(2, axis.max // step, max(2, axis.traced // step))
