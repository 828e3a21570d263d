"""The op `guidance_stats`: what guidance computes from it, and the interpreted kernel against its reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stepfuse.engine.sampling.guidance import cfg_weights, rescale_weights
from stepfuse.kernels import guidance_stats
from stepfuse.kernels.policy import policy

SHAPES = [
    (2, 2, 4, 16, 16),
    (2, 2, 4, 8, 9),
    (3, 1, 3, 5, 7),
    (1, 3, 4, 6, 6),
    (2, 4, 16, 6, 5),
    (1, 7, 2, 3, 3),
    (2, 2, 4, 72, 64),
    (1, 2, 4, 128, 129),
    (2, 2, 1, 1, 1),
]


def test_rescaled_guidance_follows_from_the_statistics() -> None:
    generator = torch.Generator().manual_seed(2)
    f = torch.randn(3, 2, 4, 9, 8, generator=generator, dtype=torch.float64) + 0.3
    weights, phi = cfg_weights([4.0, 7.5, 2.0]), torch.tensor([0.7, 0.2, 1.0])
    gram, means = guidance_stats(f)
    n, w = f[0, 0].numel(), weights.double()

    def deviation(v: Tensor) -> Tensor:
        norm = torch.einsum("ri,rij,rj->r", v, gram, v)
        return ((norm - n * (v * means).sum(1) ** 2) / (n - 1)).sqrt()

    cond = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(3, 2)
    factor = phi * deviation(cond) / deviation(w) + 1 - phi
    torch.testing.assert_close((w * factor[:, None]).float(), rescale_weights(f, weights, phi), rtol=1e-5, atol=1e-6)


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_equals_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(5)) + 0.1).to(dtype)
    before = x.clone()
    truth = guidance_stats.reference(x.double())
    plain = guidance_stats.reference(x)
    with policy({"guidance_stats": "triton"}):
        found = guidance_stats(x)
        for a, b in zip(guidance_stats(x), found, strict=True):
            assert torch.equal(a, b)
    for ours, torchs, true in zip(found, plain, truth, strict=True):
        assert ours.dtype == torch.float32
        assert ours.shape == true.shape
        largest = true.abs().max()
        assert (ours - true).abs().max() <= 2 * (torchs - true).abs().max() + 1e-6 * largest
    assert torch.equal(x, before)


@pytest.mark.interpret
def test_kernel_rows_and_layouts() -> None:
    x = torch.randn(3, 2, 4, 66, 64)
    interleaved = x.movedim(2, -1).contiguous().movedim(-1, 2)
    wide = torch.full((3, 2, 4, 66, 128), 7.0)
    wide[..., ::2] = x
    with policy({"guidance_stats": "triton"}):
        whole = guidance_stats(x)
        for other in (interleaved, wide[..., ::2]):
            for a, b in zip(guidance_stats(other), whole, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))
        for row in range(3):
            for a, b in zip(guidance_stats(x[row : row + 1]), whole, strict=True):
                assert torch.equal(a[0], b[row])
        assert [t.shape[0] for t in guidance_stats(x[:0])] == [0, 0]
