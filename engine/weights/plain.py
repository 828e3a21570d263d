"""Whether a loaded diffusers network is the plain one its configuration describes, and stays it.

LoRA layers, adapters, attention processors and hooks change what a network computes without changing its configuration.
A graph that replaces the network would leave them out, so they are errors that say how to go on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..errors import RequestError

PROCESSORS = ("AttnProcessor", "AttnProcessor2_0")
"""Attention processors that compute plain attention."""
FREEU = ("s1", "s2", "b1", "b2")
"""What `enable_freeu` sets on the blocks of the way up."""
_HINTS = {
    "IPAdapter": "unload the IP-Adapter: pipe.unload_ip_adapter()",
    "Fused": "call pipe.unfuse_qkv_projections(); optimize(pipe, transforms=('fused_qkv',)) does the same",
    "Custom": "load the custom diffusion weights into the model itself",
}


def check_plain(name: str, network: nn.Module, replaced: tuple[nn.Module, ...]) -> None:
    """Raise RequestError naming the first layer of `network` that is not diffusers' own.

    replaced: the modules whose own `forward` may be another one. name: for messages.
    """
    for path, module in network.named_modules():
        where, package = f"{name}.{path}".rstrip("."), type(module).__module__.partition(".")[0]
        if package == "peft":
            raise RequestError(
                f"{where}: LoRA layers are loaded, which an optimized network would leave out. Merge them first "
                "(pipe.fuse_lora(); pipe.unload_lora_weights()), or call restore() on the optimized pipeline"
            )
        if package not in ("torch", "diffusers"):
            raise RequestError(
                f"{where}: {type(module).__module__}.{type(module).__name__} is not a layer of diffusers; "
                "undo what put it there, or leave this pipeline unoptimized"
            )
        hooked = path and (module._forward_hooks or module._forward_pre_hooks)
        if hooked or (overridden(module) and module not in replaced):
            raise RequestError(
                f"{where}: its forward is hooked or replaced (offloading, caching, a library), and would be left out; "
                "remove the hook (pipe.remove_all_hooks(), or the library's own way)"
            )
        processor = getattr(module, "processor", None)
        kind = type(processor).__name__
        if processor is not None and (kind not in PROCESSORS or not type(processor).__module__.startswith("diffusers")):
            hints = [hint for start, hint in _HINTS.items() if kind.startswith(start)]
            plain = f"pipe.{name.partition('.')[0]}.set_default_attn_processor()"
            raise RequestError(f"{where}: attention processor {kind} is set; {hints[0] if hints else 'call ' + plain}")
        if any(getattr(module, option, None) is not None for option in FREEU):
            raise RequestError(f"{where}: FreeU is on, which is not supported; call pipe.disable_freeu()")


def overridden(module: nn.Module) -> bool:
    """Whether a module's `forward` is not its class's. Hooks that were removed leave that one behind on the module."""
    found = vars(module).get("forward")
    return found is not None and found != type(module).forward.__get__(module)


class Watched:
    """Notices when layers, attention processors or hooks of a network change. A look costs about 0.2 ms for SDXL."""

    def __init__(self, network: nn.Module, replaced: tuple[nn.Module, ...]) -> None:
        """replaced: the modules whose own `forward` may change."""
        self._types = [(module, type(module)) for module in network.modules()]
        self._slots = list(_slots(network, replaced))
        inner = [module for module in network.modules() if module is not network]
        self._hooks = [hooks for m in inner for hooks in (m._forward_hooks, m._forward_pre_hooks)]

    def changed(self) -> bool:
        """Whether anything is not as it was."""
        return (
            any(self._hooks)
            or any(holder.get(key) is not value for holder, key, value in self._slots)
            or any(type(module) is not kind for module, kind in self._types)
        )


def _slots(network: nn.Module, replaced: tuple[nn.Module, ...]) -> Iterator[tuple[dict[str, Any], str, object]]:
    """Dictionaries and keys that hold what must stay, with what they hold."""
    for module in network.modules():
        for key, child in module._modules.items():
            yield module._modules, key, child
        own = vars(module)
        watched = ("processor", *FREEU) if module in replaced else ("processor", *FREEU, "forward")
        for key in watched:
            if key == "forward" or key in own or hasattr(module, "resnets"):
                yield own, key, own.get(key)
