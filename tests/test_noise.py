"""Noise: Philox against published vectors and an independent numpy version, its normals, and the initial latents."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from stepfuse.engine.sampling.noise import box_muller, initial_noise, philox, philox_normal, uniform

# Random123's kat_vectors for philox4x32-10: counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def signed(seed: int) -> int:
    """A 64-bit seed as the int64 that has its bits."""
    return seed - (1 << 64) if seed >= 1 << 63 else seed


def numpy_philox(seed: int, counters: np.ndarray) -> np.ndarray:
    """Philox-4x32-10 in uint64, written from the paper: counters uint64 [n, 4] -> [n, 4]."""
    c = counters.astype(np.uint64).T.copy()
    k = [np.uint64(seed & 0xFFFFFFFF), np.uint64((seed >> 32) & 0xFFFFFFFF)]
    low = np.uint64(0xFFFFFFFF)
    shift = np.uint64(32)
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = np.stack([(b >> shift) ^ c[1] ^ k[0], b & low, (a >> shift) ^ c[3] ^ k[1], a & low])
        k = [(k[0] + np.uint64(0x9E3779B9)) & low, (k[1] + np.uint64(0xBB67AE85)) & low]
    return c.T


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_known_answers(counter: str, key: str, expected: str) -> None:
    k0, k1 = words(key)
    seed = torch.tensor([signed(k0 | k1 << 32)])
    result = philox(seed, *(torch.tensor([c]) for c in words(counter)))
    assert [int(r) for r in result] == words(expected)


def test_philox_equals_numpy() -> None:
    generator = np.random.default_rng(0)
    counters = generator.integers(0, 1 << 32, size=(500, 4), dtype=np.uint64)
    for seed in (0, 1, 2**31, 2**40 + 7, 2**63 + 12345, 2**64 - 1):
        ours = philox(torch.tensor([signed(seed)]), *(torch.from_numpy(c.astype(np.int64)) for c in counters.T))
        assert (torch.stack(ours, 1).numpy() == numpy_philox(seed, counters).astype(np.int64)).all()


def test_uniform_folds_the_sign() -> None:
    bits = torch.tensor([0, 1, 2**31 - 1, 2**31, 2**32 - 1])
    u = uniform(bits)
    assert u.dtype == torch.float32
    assert u.tolist() == [0.0, pytest.approx(4.6566127e-10), pytest.approx(1.0), pytest.approx(1.0), 0.0]
    assert u.max() < 1.0


def test_box_muller_survives_zero() -> None:
    zero = torch.zeros(1)
    a, b = box_muller(zero, zero)
    assert a.item() == pytest.approx(math.sqrt(-2 * math.log(1e-7)), rel=1e-6)
    assert b.item() == 0.0


def test_normals_follow_the_documented_layout() -> None:
    """Element e of a row is lane e % 4 of counter (e // 4, update, stream, 0)."""
    seeds, updates = torch.tensor([5, -3]), torch.tensor([2, 11])
    size = [3, 5, 2]
    noise = philox_normal(seeds, updates, size, stream=9).reshape(2, -1)
    for row in range(2):
        for e in (0, 1, 2, 3, 4, 17, 29):
            counter = np.array([[e // 4, int(updates[row]), 9, 0]], dtype=np.uint64)
            bits = numpy_philox(int(seeds[row]) % 2**64, counter)[0].astype(np.int64)
            u = uniform(torch.from_numpy(bits)).double()
            first, second = (0, 1) if e % 4 < 2 else (2, 3)
            radius, angle = math.sqrt(-2 * math.log(max(float(u[first]), 1e-7))), 2 * math.pi * float(u[second])
            expected = radius * (math.cos(angle) if e % 2 == 0 else math.sin(angle))
            assert float(noise[row, e]) == pytest.approx(expected, abs=2e-6)


def test_normals_are_normal_and_independent() -> None:
    n = 200_000
    noise = philox_normal(torch.tensor([123, 124]), torch.tensor([0, 0]), [1, 1, n]).reshape(2, n).double()
    later = philox_normal(torch.tensor([123]), torch.tensor([1]), [1, 1, n]).reshape(n).double()
    for row in (*noise, later):
        assert abs(row.mean()) < 4 / math.sqrt(n)
        assert abs(row.var() - 1) < 4 * math.sqrt(2 / n)
        assert abs((row**3).mean()) < 4 * math.sqrt(15 / n)
        assert abs((row**4).mean() - 3) < 4 * math.sqrt(96 / n)
        below = (row.sort().values.unsqueeze(0) / math.sqrt(2)).erf().squeeze(0) * 0.5 + 0.5
        assert (below - torch.arange(1, n + 1) / n).abs().max() < 1.95 / math.sqrt(n)  # Kolmogorov-Smirnov, p = 0.001
        for lag in (1, 2, 3, 4):
            assert abs((row[:-lag] * row[lag:]).mean()) < 4 / math.sqrt(n)
    assert abs((noise[0] * noise[1]).mean()) < 4 / math.sqrt(n)
    assert abs((noise[0] * later).mean()) < 4 / math.sqrt(n)


def test_a_row_does_not_depend_on_its_neighbours_or_size() -> None:
    seeds, updates = torch.tensor([9, 2**40, 3]), torch.tensor([4, 0, 7])
    together = philox_normal(seeds, updates, [4, 6, 6])
    for row in range(3):
        alone = philox_normal(seeds[row : row + 1], updates[row : row + 1], [4, 6, 6])
        assert torch.equal(together[row : row + 1], alone)
    longer = philox_normal(seeds, updates, [5, 6, 6])
    assert torch.equal(longer.reshape(3, -1)[:, :144], together.reshape(3, -1))


def test_initial_noise_is_what_a_pipeline_draws() -> None:
    noise = initial_noise(7, (4, 8, 8), 3)
    assert noise.shape == (3, 4, 8, 8)
    for i in range(3):
        expected = torch.randn([1, 4, 8, 8], generator=torch.Generator("cpu").manual_seed(7 + i))
        assert torch.equal(noise[i : i + 1], expected)


@pytest.mark.interpret
def test_philox_equals_triton() -> None:
    """Bit for bit, the counters and the uniforms; the normals to the rounding of sin, cos and log."""
    triton = pytest.importorskip("triton")
    tl = triton.language

    @triton.jit
    def kernel(seed, out_bits, out_normal, block: tl.constexpr):  # pyright: ignore[reportInvalidTypeForm]
        index = tl.arange(0, block)
        zero = index * 0
        a, b, c, d = tl.philox(seed, index, zero + 6, zero + 2, zero)
        tl.store(out_bits + index * 4, a.to(tl.int32, bitcast=True))
        tl.store(out_bits + index * 4 + 1, b.to(tl.int32, bitcast=True))
        tl.store(out_bits + index * 4 + 2, c.to(tl.int32, bitcast=True))
        tl.store(out_bits + index * 4 + 3, d.to(tl.int32, bitcast=True))
        n1, n2 = tl.pair_uniform_to_normal(tl.uint_to_uniform_float(a), tl.uint_to_uniform_float(b))
        n3, n4 = tl.pair_uniform_to_normal(tl.uint_to_uniform_float(c), tl.uint_to_uniform_float(d))
        tl.store(out_normal + index * 4, n1)
        tl.store(out_normal + index * 4 + 1, n2)
        tl.store(out_normal + index * 4 + 2, n3)
        tl.store(out_normal + index * 4 + 3, n4)

    seed = 2**40 + 77
    bits, normal = torch.zeros(64, 4, dtype=torch.int32), torch.zeros(64, 4)
    kernel[(1,)](seed, bits, normal, 64)
    index = torch.arange(64)
    ours = philox(torch.tensor([seed]), index, torch.full_like(index, 6), torch.full_like(index, 2), index * 0)
    assert torch.equal(torch.stack(ours, 1), bits.long() & 0xFFFFFFFF)
    expected = philox_normal(torch.tensor([seed]), torch.tensor([6]), [256], stream=2)
    assert (normal.flatten() - expected.flatten()).abs().max() < 2e-6
