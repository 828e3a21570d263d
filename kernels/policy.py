"""Which implementation a direct op call takes. Engines do not use this: they bind call sites once (dispatch.py)."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Decision:
    """An implementation for a call, why it was taken, and whether that rests on a timing on this device."""

    implementation: Implementation
    reason: str
    measured: bool = False


def choose(op: Op, call: Call, choice: Choice | None = None) -> Implementation:
    """The implementation that `decide` decides for."""
    return decide(op, call, choice).implementation


def decide(op: Op, call: Call, choice: Choice | None = None) -> Decision:
    """The implementation of `op` for `call` under `choice` (default: the thread's policy), and why.

    `auto` on CPU tensors is always the reference. A single name for all ops falls back to the reference for the ops
    that have no implementation of that name; an op named explicitly never falls back.
    """
    choice = _policy.choice if choice is None else choice
    explicit = isinstance(choice, Mapping)
    name = choice.get(op.name, "auto") if isinstance(choice, Mapping) else choice
    if name == "auto":
        return automatic(op, call)
    if not explicit and name not in op.implementations:
        return Decision(op.implementations["reference"], f"the op has no implementation {name!r}")
    return Decision(op.pick(name, call), "chosen by the user")


def automatic(op: Op, call: Call) -> Decision:
    """The implementation that was fastest on this device (launch_configs.py) if it fits, else the first that fits in
    order of registration, with the reference last; always the reference on CPU and for gradients."""
    reference = op.implementations["reference"]
    if call.device == "cpu":
        return Decision(reference, "CPU: the reference is the implementation")
    if call.requires_grad:
        return Decision(reference, "an input requires a gradient, which only the reference has")
    found = launch_configs.lookup(op.name, call)
    why = "not in the record"
    if found is not None:
        named = found.entry.implementation
        if named not in op.implementations:
            why = f"the record's {named} does not exist"
        elif reason := op.implementations[named].unsupported(call):
            why = f"the record's {named} cannot run this call: {reason}"
        else:
            return Decision(op.implementations[named], f"record, {found}", found.entry.measured)
    for name, implementation in op.implementations.items():
        if name != "reference" and implementation.unsupported(call) is None:
            return Decision(implementation, f"{why}: first that fits")
    return Decision(reference, f"{why}: nothing else fits")
