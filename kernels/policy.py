"""Which implementation a direct op call takes. Engines do not use this: they bind call sites once (dispatch.py)."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from . import launch_configs
from .op import REGISTRY, Call, Implementation, Op, UnsupportedCallError

Choice = str | Mapping[str, str]
"""`"auto"`, an implementation name for every op, or a mapping op name -> implementation name."""


class _Policy(threading.local):
    choice: Choice = "auto"


_policy = _Policy()


@contextmanager
def policy(choice: Choice) -> Iterator[None]:
    """Direct op calls of this thread take `choice` inside the context; an unsupported explicit choice raises."""
    validate(choice)
    before, _policy.choice = _policy.choice, choice
    try:
        yield
    finally:
        _policy.choice = before


def reference_only() -> "contextmanager[None]":  # type: ignore[type-arg]
    """Direct op calls of this thread are plain aten inside the context (what export needs to see)."""
    return policy("reference")  # type: ignore[return-value]


def validate(choice: Choice) -> None:
    """Raise UnsupportedCallError if `choice` names an op or implementation that does not exist."""
    if isinstance(choice, Mapping):
        for name, implementation in choice.items():
            if name not in REGISTRY:
                raise UnsupportedCallError(f"kernels: no op {name!r}; valid: {', '.join(sorted(REGISTRY))}")
            if implementation != "auto" and implementation not in REGISTRY[name].implementations:
                valid = ", ".join(REGISTRY[name].implementations)
                raise UnsupportedCallError(
                    f"kernels: {name} has no implementation {implementation!r}; valid: auto, {valid}"
                )
    elif choice != "auto" and not any(choice in op.implementations for op in REGISTRY.values()):
        valid = sorted({name for op in REGISTRY.values() for name in op.implementations})
        raise UnsupportedCallError(f"kernels: no implementation {choice!r}; valid: auto, {', '.join(valid)}")


def choose(op: Op, call: Call, choice: Choice | None = None) -> Implementation:
    """The implementation of `op` for `call` under `choice` (default: the thread's policy).

    `auto` on CPU tensors is always the reference. A single name for all ops falls back to the reference for the ops
    that have no implementation of that name; an op named explicitly never falls back.
    """
    choice = _policy.choice if choice is None else choice
    explicit = isinstance(choice, Mapping)
    name = choice.get(op.name, "auto") if isinstance(choice, Mapping) else choice
    if name == "auto":
        return automatic(op, call)
    if not explicit and name not in op.implementations:
        return op.implementations["reference"]
    return op.pick(name, call)


def automatic(op: Op, call: Call) -> Implementation:
    """The implementation that was fastest on this device (launch_configs.py) if it fits, else the first that fits in
    order of registration, with the reference last; always the reference on CPU and for gradients."""
    if call.device != "cpu" and not call.requires_grad:
        measured = op.implementations.get(launch_configs.implementation(op.name, call) or "")
        if measured is not None and measured.unsupported(call) is None:
            return measured
        for name, implementation in op.implementations.items():
            if name != "reference" and implementation.unsupported(call) is None:
                return implementation
    return op.implementations["reference"]
