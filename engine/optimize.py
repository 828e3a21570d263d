"""`stepfuse.optimize(pipe)`: our U-Net, ControlNet and VAE graphs inside a diffusers pipeline, on its own weights.

The pipeline keeps its modules; only what their `forward` computes is replaced. So `pipe.unet.config`, `.dtype`,
`.to(...)`, callbacks and schedulers stay as they are, the parameters are the very same objects, and `restore` is exact.
diffusers is not imported: everything is read from the pipeline that is passed in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .binding import Binder
from .config import EngineConfig, resolve
from .errors import RequestError
from .models.controlnet import ControlNet, ControlNetConfig
from .models.diffusers_calls import Coder, Control, Denoiser
from .models.transforms import check_transforms, transform
from .models.unet import UNet
from .models.unet_config import UNetConfig
from .models.vae import AutoencoderKL, VAEConfig
from .weights.maps import MAPS
from .weights.plain import Watched, check_plain, overridden
from .weights.share import Shared, lay_back, lay_out

BUILDERS: dict[str, Callable[[Mapping[str, Any]], nn.Module]] = {
    "UNet2DConditionModel": lambda config: UNet(UNetConfig.from_diffusers(config)),
    "ControlNetModel": lambda config: ControlNet(ControlNetConfig.from_diffusers(config)),
    "AutoencoderKL": lambda config: AutoencoderKL(VAEConfig.from_diffusers(config)),
}


def optimize(
    pipe: Any, *, kernels: str | Mapping[str, str] = "auto", vae: bool = True, transforms: Sequence[str] = ()
) -> Optimized:
    """Put our networks into a diffusers pipeline of SD 1.x, SD 2.x or SDXL; `pipe(...)` is called as before.

    pipe: any pipeline object around a `UNet2DConditionModel` (text to image, image to image, inpainting, ControlNet
    with one or several nets). kernels: as in EngineConfig. vae: also replace the autoencoder's encoder and decoder.
    transforms: weight transforms; each keeps its own copy of the weights it rearranges. Without them no weight is
    copied. Images agree with those of before within rounding (float32: final latents 1e-4 relative L2).

    Raises RequestError for what our graphs would leave out (LoRA layers, IP-Adapters, attention processors, hooks,
    compiled modules, adapters), CheckpointError for a structure that is not built here. Nothing is changed then.
    """
    check_transforms(transforms)
    sources = _sources(pipe, vae)
    networks = [Network(name, source, kernels, tuple(transforms)) for name, source in sources.items()]
    return Optimized(pipe, networks)


class Optimized:
    """An optimised pipeline. `restore()`, or leaving a `with` block, puts the original networks back."""

    def __init__(self, pipe: Any, networks: Sequence[Network]) -> None:
        self.pipe = pipe
        self.networks: tuple[Network, ...] = tuple(networks)
        self._rearranged = [p for network in networks for p in lay_out(network.source)]
        for network in networks:
            network.refresh()
        self._patches = [patch for network in networks for patch in network.patches]
        self._before = [vars(module).get("forward") for module, _ in self._patches]
        for module, forward in self._patches:
            vars(module)["forward"] = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`pipe(...)`."""
        return self.pipe(*args, **kwargs)

    def restore(self) -> None:
        """Put the originals back, bit for bit; a second call does nothing.

        Raises RequestError where something else was put over our networks in the meantime.
        """
        for module, forward in self._patches:
            if vars(module).get("forward") is not forward:
                raise RequestError(
                    f"the forward of {type(module).__name__} was replaced after optimize() (offloading, hooks); remove "
                    "that first (pipe.remove_all_hooks()), then restore()"
                )
        for (module, _), before in zip(self._patches, self._before, strict=True):
            del vars(module)["forward"]
            if before is not None:
                vars(module)["forward"] = before
        lay_back(self._rearranged)
        self._patches, self._before, self._rearranged, self.networks = [], [], [], ()

    def explain(self) -> str:
        """Which implementation every op of every network uses and why."""
        return "\n".join(f"{network.name}:\n{network.explain()}" for network in self.networks)

    def __enter__(self) -> Optimized:
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()


class Network:
    """One network of the pipeline (`source`) and ours, which runs on its parameters (`module`)."""

    def __init__(self, name: str, source: Any, kernels: str | Mapping[str, str], transforms: tuple[str, ...]) -> None:
        self.name, self.source = name, source
        self._kernels, self._transforms = kernels, transforms
        kind = type(source).__name__
        self._targets = (source.encoder, source.decoder) if kind == "AutoencoderKL" else (source,)
        self._check_free()
        check_plain(name, source, self._targets)
        self._watched = Watched(source, self._targets)
        self.module: Any = self._build()
        self._shared = Shared.match(self.module, source, MAPS[kind], name)
        self._binders = self._bind()
        self._weights: list[tuple[int, int]] = []
        self._forwards: list[Denoiser | Control | Coder] = {
            "UNet2DConditionModel": lambda: [Denoiser(self)],
            "ControlNetModel": lambda: [Control(self)],
            "AutoencoderKL": lambda: [Coder(self, "encoder"), Coder(self, "decoder")],
        }[kind]()

    @property
    def patches(self) -> list[tuple[nn.Module, Denoiser | Control | Coder]]:
        """Modules of the pipeline and what their `forward` becomes."""
        return list(zip(self._targets, self._forwards, strict=True))

    def run(self, part: str, bucket: tuple[Any, ...], *args: Any, **kwargs: Any) -> Any:
        """Our module's submodule `part` ("" for itself) on these arguments, with the kernels bound for the bucket."""
        call = partial(self.module.get_submodule(part), *args, **kwargs)
        self._binders[part].bind(bucket, call)
        return call()

    def ready(self, *inputs: Tensor | None) -> None:
        """Raise RequestError where ours no longer is what the pipeline asks for; follow weights that moved."""
        if torch.is_grad_enabled() and (self.source.training or any(t is not None and t.requires_grad for t in inputs)):
            raise RequestError(f"{self.name}: optimized networks are forward only; restore() before taking gradients")
        if self._watched.changed():
            check_plain(self.name, self.source, self._targets)  # names the reason, if it is one of the usual
            raise RequestError(
                f"{self.name} has other layers than when it was optimized: restore() and optimize() again"
            )
        if self._weights != self._fingerprint():
            self.refresh()

    def explain(self) -> str:
        """The dispatch of every shape seen so far."""
        return "\n".join(f"{part or 'all'}: {binder.explain()}" for part, binder in self._binders.items())

    def _build(self) -> nn.Module:
        kind = type(self.source).__name__
        with torch.device("meta"):
            return BUILDERS[kind](dict(self.source.config) | {"_class_name": kind})

    def refresh(self) -> None:
        """Take the weights as they are now: after loading others in place, or after `.to(device or dtype)`."""
        if self._transforms and self._weights:
            self.module = self._build()
        self._shared.fill(self.module, self.name)
        transform(self.module, self._transforms)
        if self._transforms or self._device != self._bound_device:
            self._binders = self._bind()
        self._weights = self._fingerprint()
        for forward in self._forwards:
            forward.renew()

    def _bind(self) -> dict[str, Binder]:
        self._bound_device = self._device
        config = resolve(EngineConfig(device=str(self._device), kernels=self._kernels, transforms=self._transforms))
        parts = ("encoder", "decoder") if isinstance(self.module, AutoencoderKL) else ("",)
        return {part: Binder(self.module.get_submodule(part), config) for part in parts}

    @property
    def _device(self) -> torch.device:
        return next(self.source.parameters()).device

    def _fingerprint(self) -> list[tuple[int, int]]:
        """Where every parameter lies and how often it was written."""
        return [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in self.source.parameters()]

    def _check_free(self) -> None:
        """Nothing else may stand where our forward goes."""
        for target in self._targets:
            found = vars(target).get("forward")
            if isinstance(found, Denoiser | Control | Coder):
                raise RequestError(
                    f"{self.name} is optimized already, perhaps through another pipeline that shares it: use it as it "
                    "is, or call restore() on what optimize() returned"
                )
            if overridden(target) or target._compiled_call_impl is not None:
                raise RequestError(
                    f"{self.name} is compiled or hooked (offloading, caching): call optimize() on the pipeline as it "
                    "was loaded, and enable_model_cpu_offload() after it"
                )


def _sources(pipe: Any, vae: bool) -> dict[str, Any]:
    """The networks of a pipeline to replace, by name, each once."""
    kind = type(pipe).__name__
    if getattr(pipe, "unet", None) is None:
        raise RequestError(f"pipe: got {kind}, expected a diffusers pipeline of SD 1.x, SD 2.x or SDXL (with a `unet`)")
    if getattr(pipe, "adapter", None) is not None:
        raise RequestError(f"{kind}: T2I-Adapters are not supported; use the pipeline without the adapter")
    expected = {"unet": "UNet2DConditionModel", "controlnet": "ControlNetModel"} | (
        {"vae": "AutoencoderKL"} if vae else {}
    )
    found: dict[str, Any] = {}
    for name, cls in expected.items():
        module = getattr(pipe, name, None)
        nets = getattr(module, "nets", None)  # several ControlNets
        parts = {name: module} if nets is None else {f"{name}.nets.{i}": net for i, net in enumerate(nets)}
        for part, network in parts.items():
            if network is None or any(network is other for other in found.values()):
                continue
            if type(network).__name__ != cls:
                hint = "pass vae=False to keep it as it is" if name == "vae" else "leave this pipeline unoptimized"
                raise RequestError(
                    f"{kind}.{part}: got {type(network).__name__}, expected {cls} as diffusers loads it (not compiled "
                    f"or wrapped); {hint}"
                )
            found[part] = network
    return found
