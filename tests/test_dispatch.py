"""Dispatch and policy: what a site uses is fixed once, explicit choices never fall back silently."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from stepfuse.kernels import geglu, layer_norm
from stepfuse.kernels.dispatch import Site, record, resolve
from stepfuse.kernels.op import Call, UnsupportedCallError
from stepfuse.kernels.policy import choose, policy, reference_only


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act = Site(geglu)
        self.norm = Site(layer_norm)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.act(x), None, None, 1e-5)


@pytest.fixture
def doubled():
    """A second implementation of geglu, visibly different and for some widths only, beside the reference alone."""
    before = dict(geglu.implementations)
    for name in set(before) - {"reference"}:
        del geglu.implementations[name]
    reason = lambda call: None if call.tensors["x"].shape[-1] % 4 == 0 else "the width is no multiple of 4"  # noqa: E731
    geglu.implement("doubled", reason)(lambda x: 2 * geglu.reference(x))
    yield
    geglu.implementations.clear()
    geglu.implementations.update(before)


def test_auto_on_cpu_is_the_reference_even_where_something_else_fits(doubled: None) -> None:
    model = Block()
    calls = record(model, lambda: model(torch.randn(2, 8)))
    dispatch = resolve(model, "cpu", "auto", calls)
    assert {s.implementation for s in dispatch.sites.values()} == {"reference"}
    assert set(dispatch.sites) == {"act", "norm"}
    assert "geglu" in dispatch.explain()


def test_explicit_choice_is_bound_into_the_sites(doubled: None) -> None:
    model, x = Block(), torch.randn(2, 8)
    calls = record(model, lambda: model(x))
    resolve(model, "cpu", {"geglu": "doubled"}, calls).bind(model)
    assert torch.equal(model.act(x), 2 * geglu.reference(x))
    resolve(model, "cpu", "auto", calls).bind(model)
    assert torch.equal(model.act(x), geglu.reference(x))


def test_auto_takes_what_fits_on_another_device(doubled: None) -> None:
    fits, odd = Call("cuda", {"x": geglu.describe(torch.randn(2, 8)).tensors["x"]}, {}), torch.randn(2, 6)
    assert choose(geglu, fits, "auto").name == "doubled"
    assert choose(geglu, Call("cuda", geglu.describe(odd).tensors, {}), "auto").name == "reference"
    assert choose(geglu, Call("cuda", fits.tensors, {}, requires_grad=True), "auto").name == "reference"


def test_unsupported_explicit_choice_raises_with_the_reason(doubled: None) -> None:
    with pytest.raises(UnsupportedCallError, match="no multiple of 4"), policy({"geglu": "doubled"}):
        geglu(torch.randn(2, 6))
    with pytest.raises(UnsupportedCallError, match=r"no implementation 'fast'; valid: auto, .*doubled, .*reference"):
        resolve(Block(), "cpu", "fast")
    with pytest.raises(UnsupportedCallError, match="no op 'conv'"):
        resolve(Block(), "cpu", {"conv": "reference"})


def test_policy_holds_in_its_thread_only(doubled: None) -> None:
    x, seen = torch.randn(2, 8), []
    with policy("doubled"):
        worker = threading.Thread(target=lambda: seen.append(geglu(x)))
        worker.start()
        worker.join()
        assert torch.equal(geglu(x), 2 * geglu.reference(x))
        with reference_only():
            assert torch.equal(geglu(x), geglu.reference(x))
    assert torch.equal(seen[0], geglu.reference(x))


def test_an_implementation_with_another_signature_is_refused() -> None:
    with pytest.raises(TypeError, match="another signature"):
        geglu.implement("wrong", lambda call: None)(lambda x, extra: x)
    assert "wrong" not in geglu.implementations
