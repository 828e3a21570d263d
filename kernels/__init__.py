"""Kernels of stepfuse: ops with a torch reference and, where they win, faster implementations.

Nothing is imported until an attribute is used, so a stray `import kernels` from a checkout has no effect.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .add_layer_norm.op import add_layer_norm
    from .attention.op import attention
    from .bias_residual_add.op import bias_residual_add
    from .geglu.op import geglu
    from .group_norm_silu.op import group_norm_silu
    from .guidance_stats.op import guidance_stats
    from .layer_norm.op import layer_norm
    from .sampler_step.op import sampler_step

__all__ = [
    "add_layer_norm",
    "attention",
    "bias_residual_add",
    "geglu",
    "group_norm_silu",
    "guidance_stats",
    "layer_norm",
    "sampler_step",
]


class _Kernels(ModuleType):
    """An op and the folder it lives in share their name; the attribute of this module is the op."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):  # the import system would store the folder
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}; ops: {', '.join(__all__)}")
        op = getattr(import_module(f".{name}.op", __name__), name)
        setattr(self, name, op)
        return op


sys.modules[__name__].__class__ = _Kernels
