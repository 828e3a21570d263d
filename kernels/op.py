"""The op registry. An op is defined by its torch reference: signature, CPU implementation, test truth, export lowering.

Every op is registered once with `torch.library` (namespace `stepfuse`). Calling the `Op` object picks an implementation
by the current thread's policy; models do not do that: their call sites are bound once by a `Dispatch` (dispatch.py).
"""

if not __name__.startswith("stepfuse.kernels."):
    # torch.library silently replaces a second registration, so a second copy of this module must not load.
    raise ImportError(f"the op registry must be imported as stepfuse.kernels.op, got {__name__!r}: import stepfuse")

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

NAMESPACE = "stepfuse"


class UnsupportedCallError(ValueError):
    """An implementation that was asked for by name cannot run the call."""


@dataclass(frozen=True)
class TensorInfo:
    """What dispatch may look at in a tensor argument: shape, dtype, and whether it is channels-last."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    channels_last: bool = False


@dataclass(frozen=True)
class Call:
    """The signature of one op call: device type, tensors and options by argument name. Holds no data."""

    device: str
    tensors: Mapping[str, TensorInfo]
    options: Mapping[str, Any]
    requires_grad: bool = False


@dataclass(frozen=True)
class Implementation:
    """One way to run an op: `call` has the reference's signature.

    `unsupported(call)` gives a reason, or None if it fits.
    """

    name: str
    call: Callable[..., Any]
    unsupported: Callable[[Call], str | None] = lambda call: None


@dataclass(frozen=True)
class Case:
    """Arguments of one contract test.

    A tuple of ints (or a `Spec`) is a random tensor of that shape, anything else a constant.
    """

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Spec:
    """A tensor argument with its own dtype and value range.

    Integers in [low, high), or normal values if dtype is None.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None
    low: int = 0
    high: int = 2


@dataclass(eq=False)
class Op:
    """An op.

    Its reference, the arguments that carry the row dimension first, its test cases and its implementations.
    """

    name: str
    reference: Callable[..., Any]
    rows: tuple[str, ...]
    cases: tuple[Case, ...]
    implementations: dict[str, Implementation] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.signature = inspect.signature(self.reference)
        self.implementations["reference"] = Implementation("reference", self.reference)
        self.__doc__ = self.reference.__doc__
        _register(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the op with the implementation that the current thread's policy chooses for these arguments."""
        from .policy import choose

        return choose(self, self.describe(*args, **kwargs)).call(*args, **kwargs)

    def describe(self, *args: Any, **kwargs: Any) -> Call:
        """The signature of a call with these arguments."""
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        tensors = {k: v for k, v in bound.arguments.items() if isinstance(v, torch.Tensor)}
        first = next(iter(tensors.values()))
        return Call(
            device=first.device.type,
            tensors={k: TensorInfo(tuple(v.shape), v.dtype, is_channels_last(v)) for k, v in tensors.items()},
            options={k: v for k, v in bound.arguments.items() if k not in tensors},
            requires_grad=torch.is_grad_enabled() and any(v.requires_grad for v in tensors.values()),
        )

    def implement(self, name: str, unsupported: Callable[[Call], str | None]) -> Callable[..., Any]:
        """Decorator: add an implementation. Its signature must equal the reference's."""

        def add(call: Callable[..., Any]) -> Callable[..., Any]:
            if list(inspect.signature(call).parameters) != list(self.signature.parameters):
                raise TypeError(f"{self.name}: {name} has another signature than the reference {self.signature}")
            self.implementations[name] = Implementation(name, call, unsupported)
            return call

        return add

    def pick(self, name: str, call: Call) -> Implementation:
        """The implementation `name` for `call`; raises UnsupportedCallError if it does not exist or does not fit."""
        found = self.implementations.get(name)
        if found is None:
            raise UnsupportedCallError(
                f"{self.name}: no implementation {name!r}; valid: {', '.join(self.implementations)}"
            )
        if reason := found.unsupported(call):
            raise UnsupportedCallError(f"{self.name}: {name} cannot run this call: {reason}; use 'auto' or 'reference'")
        return found


REGISTRY: dict[str, Op] = {}


def define(*, rows: Sequence[str], cases: Sequence[Case]) -> Callable[[Callable[..., Any]], Op]:
    """Decorator: make the torch reference it decorates an `Op`, named after the function."""

    def make(reference: Callable[..., Any]) -> Op:
        op = Op(reference.__name__, reference, tuple(rows), tuple(cases))
        REGISTRY[op.name] = op
        return op

    return make


def is_channels_last(x: torch.Tensor) -> bool:
    """True for a 4-D tensor stored N, H, W, C and not also contiguous as N, C, H, W."""
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def same_layout(result: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`result` in the memory format of `like`: channels-last in, channels-last out; otherwise contiguous."""
    if is_channels_last(like):
        return result.contiguous(memory_format=torch.channels_last)
    return result.contiguous()


def _register(op: Op) -> None:
    """Register `op` with torch.library: an opaque node whose meaning, meta and gradient are the reference's."""
    custom = torch.library.custom_op(f"{NAMESPACE}::{op.name}", op.reference, mutates_args=())
    custom.register_fake(op.reference)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.is_tensor = [isinstance(value, torch.Tensor) for value in inputs]
        ctx.constants = [None if tensor else value for value, tensor in zip(inputs, ctx.is_tensor, strict=True)]
        ctx.save_for_backward(*[value for value in inputs if isinstance(value, torch.Tensor)])

    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        saved = iter(ctx.saved_tensors)
        values = [next(saved) if tensor else c for tensor, c in zip(ctx.is_tensor, ctx.constants, strict=True)]
        leaves = [
            value.detach().requires_grad_() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for value in values
        ]
        with torch.enable_grad():
            output = op.reference(*leaves)
        outputs = output if isinstance(output, tuple) else (output,)
        pairs = [
            (out, grad) for out, grad in zip(outputs, grads, strict=True) if out.requires_grad and grad is not None
        ]
        wanted = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
        roots, seeds = [out for out, _ in pairs], [grad for _, grad in pairs]
        found = iter(torch.autograd.grad(roots, wanted, seeds, allow_unused=True) if pairs else ())
        return tuple(
            next(found, None) if isinstance(leaf, torch.Tensor) and leaf.requires_grad else None for leaf in leaves
        )

    custom.register_autograd(backward, setup_context=setup)
