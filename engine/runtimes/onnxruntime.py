"""ONNX Runtime: the graphs of an artefact behind the interface of our networks.

Inputs and outputs are bound where torch has them; nothing is copied but what must change its dtype or layout. Verified
on CPU; on CUDA the same code binds device pointers, which has not been run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..artifact import Graph, Manifest, inside
from ..errors import CheckpointError, DeviceError, RequestError
from ..models.unet import Conditioning
from ..models.unet_config import UNetConfig
from ..models.vae import Gaussian, VAEConfig

INSTALL = "pip install 'stepfuse[onnx]'"
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16: numpy has no such type


class Session:
    """One graph of an artefact, ready to run on a device.

    The hashes of the graph's files are compared first. Raises CheckpointError for a damaged artefact, RequestError
    where onnxruntime is missing, DeviceError where it cannot use the device (it would run on the CPU without a word).
    """

    def __init__(self, folder: Path, name: str, device: torch.device | str = "cpu") -> None:
        if find_spec("onnxruntime") is None:
            raise RequestError(f"runtime='onnxruntime' needs onnxruntime, which is not installed: {INSTALL}")
        import onnxruntime as ort

        manifest = Manifest.load(folder)
        if manifest.kind != "onnx":
            raise CheckpointError(
                f"{folder} holds {manifest.kind} graphs; runtime='onnxruntime' needs an ONNX artefact"
            )
        self.graph: Graph = manifest.graph(name)
        manifest.check(folder, only=[name])
        self.device = torch.device(device)
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        wanted = PROVIDERS[self.device.type]
        if wanted not in ort.get_available_providers():
            raise DeviceError(
                f"onnxruntime has no {wanted}: for CUDA, pip install onnxruntime-gpu; or use device='cpu'"
            )
        settings: dict[str, Any] = {}
        if self.device.type == "cuda":
            stream = torch.cuda.current_stream(self.device).cuda_stream
            settings = {"device_id": self.device.index or 0, "user_compute_stream": str(stream)}
        path = inside(folder, self.graph.file)
        self.session = ort.InferenceSession(str(path), options, providers=[(wanted, settings)])
        if self.session.get_providers()[0] != wanted:
            raise DeviceError(f"onnxruntime could not load {wanted} and would run on the CPU: check its CUDA libraries")

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the graph. Raises RequestError for shapes it was not exported for."""
        axes = self.graph.measure({name: tuple(tensor.shape) for name, tensor in inputs.items()})
        binding = self.session.io_binding()
        held = []
        for port in self.graph.inputs:
            given = inputs[port.name].to(self.device, getattr(torch, port.dtype)).contiguous()
            held.append(given)
            self._bind(binding.bind_input, port.name, given)
        made = {
            port.name: torch.empty(port.sizes(axes), dtype=getattr(torch, port.dtype), device=self.device)
            for port in self.graph.outputs
        }
        for name, tensor in made.items():
            self._bind(binding.bind_output, name, tensor)
        self.session.run_with_iobinding(binding)
        return made

    def _bind(self, bind: Any, name: str, tensor: Tensor) -> None:
        kind = _BFLOAT16 if tensor.dtype == torch.bfloat16 else np.dtype(str(tensor.dtype).removeprefix("torch."))
        bind(name, self.device.type, self.device.index or 0, kind, tuple(tensor.shape), tensor.data_ptr())


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

    def __init__(self, folder: Path, device: torch.device | str = "cpu", name: str = "unet") -> None:
        self.session = Session(folder, name, device)
        self.config = UNetConfig.from_diffusers(read_config(folder, name))
        self.names = {port.name for port in self.session.graph.inputs} - {"sample", "timestep"}

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
        return self.session.run(inputs)["out_sample"]


class VAE:
    """An exported autoencoder; the interface of `AutoencoderKL`. The encoder is loaded when it is first used."""

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        self.folder, self.device = folder, device
        self.decoder = Session(folder, "vae_decoder", device)
        self.encoder: Any = None  # a session once it is needed
        self.config = VAEConfig.from_diffusers(read_config(folder, "vae_decoder"))

    def decode(self, latents: Tensor) -> Tensor:
        """latents: [R, C, h, w]; returns images [R, 3, H, W], about -1..1, not clamped."""
        return self.decoder.run({"latent_sample": latents})["sample"]

    def encode(self, images: Tensor) -> Gaussian:
        """images: [R, 3, H, W] in -1..1. Raises CheckpointError if the artefact has no encoder."""
        if self.encoder is None:
            self.encoder = Session(self.folder, "vae_encoder", self.device)
        mean, logvar = self.encoder.run({"sample": images})["latent_parameters"].chunk(2, 1)
        return Gaussian(mean, logvar)


@dataclass(frozen=True)
class TextOutput:
    """What a CLIP text model returns, under transformers' names."""

    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...]
    text_embeds: Tensor | None


class TextModel(nn.Module):
    """An exported CLIP text encoder in place of transformers' in `TextEncoder`; its last norm serves `clip_skip`."""

    def __init__(self, folder: Path, name: str = "text_encoder", device: torch.device | str = "cpu") -> None:
        super().__init__()
        from transformers import CLIPTextConfig

        self.session = Session(folder, name, device)
        found = read_config(folder, name)
        self.config = CLIPTextConfig(**{key: value for key, value in found.items() if not key.startswith("_")})
        self.final_layer_norm = _final_norm(folder / name, self.config)
        self.final_layer_norm.to(device, getattr(torch, self.session.graph.dtype))

    def forward(
        self, ids: Tensor, attention_mask: Tensor | None = None, output_hidden_states: bool = True
    ) -> TextOutput:
        """ids: [P, L]. Raises RequestError for a mask: the graph attends to padding, as Stable Diffusion does."""
        if attention_mask is not None:
            raise RequestError(
                "this text encoder wants an attention mask, which exported ones do not take: use 'torch'"
            )
        found = self.session.run({"input_ids": ids})
        states = [name for name in found if name.startswith("hidden_states.")]
        hidden = tuple(found[name] for name in sorted(states, key=lambda name: int(name.rpartition(".")[2])))
        return TextOutput(found["last_hidden_state"], hidden, found.get("text_embeds"))


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """`config.json` of a graph. Raises CheckpointError if it is missing."""
    path = inside(folder, f"{name}/config.json")
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: export the model again")
    return json.loads(path.read_text(encoding="utf-8"))


def _final_norm(folder: Path, config: Any) -> nn.LayerNorm:
    norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps).requires_grad_(False)
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stream:
            for key in list(stream.keys()):
                if key.endswith(("final_layer_norm.weight", "final_layer_norm.bias")):
                    parameter: Tensor = getattr(norm, key.rpartition(".")[2])
                    parameter.copy_(stream.get_tensor(key))
    return norm
