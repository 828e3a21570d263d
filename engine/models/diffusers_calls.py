"""Our networks behind the signatures of diffusers' `forward`: what `stepfuse.optimize` puts into a pipeline."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import RequestError
from .hoisting import Hoisted, Recent, identity
from .unet import Conditioning, Residuals
from .unet_config import UNetConfig


class Host(Protocol):
    """The network a call belongs to: diffusers' (`source`) and ours on the same weights (`module`)."""

    name: str
    source: Any
    module: Any

    def ready(self, *inputs: Tensor | None) -> None:
        """Raise where ours is not what is asked for."""
        ...

    def run(self, part: str, bucket: tuple[Any, ...], *args: Any, **kwargs: Any) -> Any:
        """Call a part of `module`."""
        ...


class Denoiser:
    """`UNet2DConditionModel.forward`."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.renew()

    def renew(self) -> None:
        """Forget what was computed from the weights; called when they have changed."""
        self.hoisted = Hoisted(self.host.module)

    def __call__(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        added_cond_kwargs: Mapping[str, Any] | None = None,
        down_block_additional_residuals: Sequence[Tensor] | None = None,
        mid_block_additional_residual: Tensor | None = None,
        down_intrablock_additional_residuals: Sequence[Tensor] | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """sample: [R, C, h, w]; the rest as diffusers documents it."""
        down, middle = down_block_additional_residuals, mid_block_additional_residual
        refuse(
            self.host,
            attention_mask=attention_mask,
            encoder_attention_mask=encoder_attention_mask,
            cross_attention_kwargs=cross_attention_kwargs or None,
            down_intrablock_additional_residuals=down_intrablock_additional_residuals,
        )
        if (down is None) != (middle is None):
            raise RequestError(f"{self.host.name}: residuals of T2I-Adapters are not supported; restore() to use them")
        self.host.ready(sample, encoder_hidden_states, timestep_cond, middle)
        config = self.host.module.config
        with torch.no_grad():
            conditioning = read_conditioning(
                self.host, config, encoder_hidden_states, class_labels, timestep_cond, added_cond_kwargs
            )
            prepared = self.hoisted.prepared(len(sample), as_tensor(timestep), conditioning)
            residuals = None if down is None or middle is None else Residuals(tuple(down), middle)
            bucket = (tuple(sample.shape), encoder_hidden_states.shape[1], sample.dtype, residuals is None)
            first = sample.new_zeros(len(sample), dtype=torch.int64)
            output = self.host.run("", bucket, sample, prepared, first, residuals=residuals).contiguous()
        return (output,) if not return_dict else _output(self.host, "UNet2DConditionOutput", sample=output)


class Control:
    """`ControlNetModel.forward`."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.renew()

    def renew(self) -> None:
        """Forget what was computed from the weights; called when they have changed."""
        self.hoisted = Hoisted(self.host.module)
        self.images = Recent(2)

    def __call__(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        controlnet_cond: Tensor,
        conditioning_scale: Tensor | float = 1.0,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        attention_mask: Tensor | None = None,
        added_cond_kwargs: Mapping[str, Any] | None = None,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        guess_mode: bool = False,
        return_dict: bool = True,
    ) -> Any:
        """sample: [R, C, h, w]; controlnet_cond: [R, 3, H, W]; the rest as diffusers documents it."""
        refuse(self.host, attention_mask=attention_mask, cross_attention_kwargs=cross_attention_kwargs or None)
        self.host.ready(sample, encoder_hidden_states, timestep_cond, controlnet_cond)
        module, rows = self.host.module, len(sample)
        with torch.no_grad():
            conditioning = read_conditioning(
                self.host, module.config, encoder_hidden_states, class_labels, timestep_cond, added_cond_kwargs
            )
            prepared = self.hoisted.prepared(rows, as_tensor(timestep), conditioning)
            image = self.images.get(
                identity(controlnet_cond), lambda: module.prepare_image(controlnet_cond), controlnet_cond
            )
            scale = _factors(conditioning_scale, sample)
            if guess_mode and not module.control.pool:
                scale = module.guess_scales(scale)
            first = sample.new_zeros(rows, dtype=torch.int64)
            bucket = (tuple(sample.shape), encoder_hidden_states.shape[1], sample.dtype)
            found = self.host.run("", bucket, sample, prepared, first, image, scale)
        outputs = {"down_block_res_samples": list(found.down), "mid_block_res_sample": found.middle}
        return tuple(outputs.values()) if not return_dict else _output(self.host, "ControlNetOutput", **outputs)


class Coder:
    """`forward` of the encoder or decoder of an AutoencoderKL; slicing, tiling and the rest stay with diffusers."""

    def __init__(self, host: Host, part: str) -> None:
        self.host, self.part = host, part

    def renew(self) -> None:
        """Nothing is kept."""

    def __call__(self, sample: Tensor, latent_embeds: Tensor | None = None) -> Tensor:
        """sample: [R, C, h, w]."""
        refuse(self.host, latent_embeds=latent_embeds)
        self.host.ready(sample)
        with torch.no_grad():
            return self.host.run(self.part, (tuple(sample.shape), sample.dtype), sample).contiguous()


def refuse(host: Host, **options: Any) -> None:
    """Raise RequestError for the first option that is given."""
    for name, value in options.items():
        if value is not None:
            raise RequestError(
                f"{host.name}: {name} is not supported by an optimized network: leave it out, or restore() the pipeline"
            )


def read_conditioning(
    host: Host,
    config: UNetConfig,
    hidden: Tensor,
    class_labels: Tensor | None,
    timestep_cond: Tensor | None,
    added: Mapping[str, Any] | None,
) -> Conditioning:
    """diffusers' words for a conditioning in ours. What the network does not read is left out, as diffusers does."""
    given = dict(added or {})
    pooled, time_ids = given.pop("text_embeds", None), given.pop("time_ids", None)
    refuse(host, **{f"added_cond_kwargs[{name!r}]": value for name, value in given.items()})
    if config.added_time_dim is None:
        pooled = time_ids = None
    return Conditioning(
        hidden=hidden,
        pooled=pooled,
        time_ids=time_ids,
        class_labels=None if config.class_embedding == "none" else class_labels,
        timestep_cond=timestep_cond,
    )


def as_tensor(timestep: Tensor | float) -> Tensor:
    """A timestep as a tensor; numbers stay on the host."""
    return timestep if isinstance(timestep, Tensor) else torch.tensor(float(timestep))


def _factors(scale: Tensor | float, sample: Tensor) -> Tensor:
    """A scale for all rows, or one for each, as [R] in at least float32."""
    dtype = torch.promote_types(sample.dtype, torch.float32)
    if isinstance(scale, Tensor):
        return scale.to(sample.device, dtype).flatten().expand(len(sample))
    return sample.new_full((len(sample),), float(scale), dtype=dtype)


def _output(host: Host, name: str, **fields: Any) -> Any:
    """diffusers' own output class, found where its network is defined."""
    return getattr(sys.modules[type(host.source).__module__], name)(**fields)
