"""Exported networks: graphs behind the interface of our own networks, whatever executes them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..artifact import Graph
from ..errors import RequestError
from ..models.unet import Conditioning
from ..models.unet_config import UNetConfig
from ..models.vae import Gaussian, VAEConfig
from .networks import Session

FINAL_NORM = "final_layer_norm.safetensors"
"""File beside the graph of a text encoder that holds its last norm: `weight` and `bias`."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What the rows of an exported denoiser are evaluated with. All tensors lead with the rows."""

    time: Tensor  # float32 [R, U, 1], the model's time at every update
    encoder_hidden_states: Tensor | None = None  # [R, L, D]
    text_embeds: Tensor | None = None
    time_ids: Tensor | None = None
    class_labels: Tensor | None = None
    timestep_cond: Tensor | None = None


class Denoiser:
    """An exported U-Net; the interface of `UNet`."""

    def __init__(self, session: Session, config: UNetConfig) -> None:
        self.session, self.config = session, config
        self.names = {port.name for port in session.graph.inputs} - {"sample", "timestep"}

    @property
    def dtype(self) -> torch.dtype:
        """dtype latents are taken in."""
        return getattr(torch, self.session.graph.dtype)

    def prepare(self, conditioning: Conditioning, timesteps: Tensor) -> Inputs:
        """Nothing is computed beforehand: the graph holds the projections of the prompt. timesteps: float [R, U].

        Raises RequestError where the conditioning is not what this network takes.
        """
        if conditioning.kv_len is not None:
            raise RequestError("exported graphs take prompts of one length: leave out the lengths of the prompts")
        given = {
            "encoder_hidden_states": conditioning.hidden,
            "text_embeds": conditioning.pooled,
            "time_ids": conditioning.time_ids,
            "class_labels": conditioning.class_labels,
            "timestep_cond": conditioning.timestep_cond,
        }
        for name, value in given.items():
            if (value is None) == (name in self.names):
                problem = "is needed, but was not given" if value is None else "is not taken: leave it out"
                raise RequestError(f"this network's {name} {problem}")
        return Inputs(time=timesteps.float()[:, :, None], **given)

    def __call__(self, latents: Tensor, prepared: Inputs, update: Tensor) -> Tensor:
        """The network's output [R, C, h, w] for latents [R, C_in, h, w] at each row's own update (int64 [R])."""
        inputs = {"sample": latents, "timestep": prepared.time[:, :, 0].gather(1, update[:, None])[:, 0]}
        inputs |= {name: getattr(prepared, name) for name in self.names}
        return run_rows(self.session, inputs)["out_sample"]

    def require_size(self, height: int, width: int, scale: int) -> None:
        """Raise RequestError for latents [h, w] that the graph does not run. scale: pixels per latent site."""
        graph, only = self.session.graph, self.session.only_profiles
        if not runs(graph, only, height=height, width=width):
            got = f"size: got {width * scale}x{height * scale}"
            if only:
                raise RequestError(
                    f"{got}, this artefact was made for {sizes_of(graph, scale)}: export it with that size in --shapes"
                )
            (low_h, high_h), (low_w, high_w) = graph.axes["height"], graph.axes["width"]
            low, high = (f"{w * scale}x{h * scale}" for h, w in ((low_h, low_w), (high_h, high_w)))
            raise RequestError(f"{got}, this network runs {low} to {high}")

    def require_tokens(self, counts: Sequence[int]) -> None:
        """Raise RequestError for prompts of lengths that the graph does not run, or of several. counts: tokens of every
        guidance branch with padding, none where there are no prompts.
        """
        if len(set(counts)) > 1:
            raise RequestError(
                f"prompt: got {' and '.join(map(str, counts))} tokens with its negative, and exported networks take "
                "prompts of one length: make both as long (a chunk ends at BREAK and when it is full), or use "
                "runtime='torch'"
            )
        graph, only = self.session.graph, self.session.only_profiles
        for count in set(counts):
            if not runs(graph, only, tokens=count):
                known = graph.profiles[0].axes["tokens"].max if only else graph.axes["tokens"][1]
                raise RequestError(
                    f"prompt: got {count} tokens, this network was exported for {known}: make it shorter, or use "
                    "runtime='torch'"
                )


class VAE:
    """An exported autoencoder; the interface of `AutoencoderKL`. The encoder is opened when it is first used."""

    def __init__(self, open_graph: Callable[[str], Session], config: VAEConfig, graphs: Mapping[str, Graph]) -> None:
        """open_graph: a session of the graph of that name. Raises CheckpointError if there is no decoder."""
        self._open, self.config, self.graphs = open_graph, config, graphs
        self.decoder, self.encoder = open_graph("vae_decoder"), None

    def require(self, name: str, height: int, width: int, tile: int | None = None) -> None:
        """Raise RequestError where the artefact has not the graph of that name, or not for latents [h, w] or, with a
        tile, for their tiles.
        """
        graph, factor = self.graphs.get(name), self.config.factor
        if graph is None:
            raise RequestError(
                f"image: this artefact has no {name}, which pictures need: name it in --components of the export, too"
            )
        high, wide = (side if tile is None else min(side, tile) for side in (height, width))
        if not runs(graph, self.decoder.only_profiles, height=high, width=wide):
            raise RequestError(
                f"size: the {name} would run {wide * factor}x{high * factor}{' (tiles)' if tile else ''}, and was made "
                f"for {sizes_of(graph, factor)}: export it with that size in --shapes, too"
                + (", or load with vae_tiling=False" if tile else "")
            )

    def decode(self, latents: Tensor) -> Tensor:
        """latents: [R, C, h, w]; returns images [R, 3, H, W], about -1..1, not clamped."""
        return run_rows(self.decoder, {"latent_sample": latents})["sample"]

    def encode(self, images: Tensor) -> Gaussian:
        """images: [R, 3, H, W] in -1..1. Raises CheckpointError if the artefact has no encoder."""
        if self.encoder is None:
            self.encoder = self._open("vae_encoder")
        mean, logvar = run_rows(self.encoder, {"sample": images})["latent_parameters"].chunk(2, 1)
        return Gaussian(mean, logvar)


@dataclass(frozen=True)
class TextOutput:
    """What a CLIP text model returns, under transformers' names."""

    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...]
    text_embeds: Tensor | None


class TextModel(nn.Module):
    """An exported CLIP text encoder in place of transformers' in `TextEncoder`; its last norm serves `clip_skip`."""

    def __init__(self, session: Session, config: Any, norm: Mapping[str, Tensor]) -> None:
        """config: transformers' CLIPTextConfig; norm: `weight` and `bias` of the last norm, on the device."""
        super().__init__()
        self.session, self.config = session, config
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, device="meta")
        self.final_layer_norm.load_state_dict(norm, assign=True)
        self.requires_grad_(False)

    def forward(
        self, ids: Tensor, attention_mask: Tensor | None = None, output_hidden_states: bool = True
    ) -> TextOutput:
        """ids: [P, L]. Raises RequestError for a mask: the graph attends to padding, as Stable Diffusion does."""
        if attention_mask is not None:
            raise RequestError(
                "this text encoder wants an attention mask, which exported ones do not take: use 'torch'"
            )
        found = run_rows(self.session, {"input_ids": ids})
        states = [name for name in found if name.startswith("hidden_states.")]
        hidden = tuple(found[name] for name in sorted(states, key=lambda name: int(name.rpartition(".")[2])))
        return TextOutput(found["last_hidden_state"], hidden, found.get("text_embeds"))


class FixedKernels:
    """What `Binder` is to our networks: the kernels of an exported one were chosen when it was made."""

    def __init__(self, summary: str) -> None:
        self.summary = summary

    def bind(self, bucket: Hashable, run: Callable[[], Any]) -> None:
        """There is nothing to choose."""

    def explain(self) -> str:
        """What executes the network."""
        return self.summary


def runs(graph: Graph, only_profiles: bool, **sizes: int) -> bool:
    """Whether a graph runs these sizes of its axes: those of a profile, where it runs no others."""
    spans = [graph.axes]
    if only_profiles:
        spans = [{name: (size.min, size.max) for name, size in profile.axes.items()} for profile in graph.profiles]
    return any(all(span[name][0] <= size <= span[name][1] for name, size in sizes.items()) for span in spans)


def sizes_of(graph: Graph, scale: int) -> str:
    """The sizes of a graph's profiles in pixels, as text."""
    sides = [(profile.axes["width"].max * scale, profile.axes["height"].max * scale) for profile in graph.profiles]
    return ", ".join(dict.fromkeys("{}x{}".format(*one) for one in sides))


def run_rows(session: Session, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Run a graph with any number of rows: too many go in parts, too few are filled up. Rows do not see each other.

    Raises RequestError for other sizes it cannot run.
    """
    rows = len(next(iter(inputs.values())))
    low, high = session.graph.axes["rows"]
    if low <= rows <= high:
        return session.run(inputs)
    parts: list[dict[str, Tensor]] = []
    for first in range(0, rows, high):
        count = min(high, rows - first)
        made = session.run({name: filled(tensor[first : first + count], low) for name, tensor in inputs.items()})
        parts.append({name: out[:count] for name, out in made.items()})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def filled(tensor: Tensor, rows: int) -> Tensor:
    """`tensor` with at least `rows` rows: the last one is repeated."""
    missing = rows - len(tensor)
    return tensor.contiguous() if missing <= 0 else torch.cat([tensor, tensor[-1:].expand(missing, *tensor.shape[1:])])
