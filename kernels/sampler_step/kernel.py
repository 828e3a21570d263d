"""Triton kernel of `sampler_step`: the whole update of every row in one launch.

Fused: guidance sum over the branches, denoised estimate and clamp, the linear updates of state and base, the history
push, Philox noise, the scaled network input and the check for NaN. Bytes moved per element: model output 2J or 4J read,
x 4, base 4 and history 8 to 12 read, 24 written: 44 to 60. FLOPs about 60, and 250 integer operations per drawn noise
of four elements. Bound: the launch below about 10^6 elements, memory above.

A term whose coefficient is zero is not read. Every tensor of a row may be planar (C, H, W) or interleaved (H, W, C);
the noise counts elements in the order C, H, W whichever it is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Compilation, launcher, triton_op
from ..launch_configs import launch_config
from .columns import HISTORY, Column
from .config import Config, heuristic

LIVE = tl.constexpr(int(Column.LIVE))
C_IN = tl.constexpr(int(Column.C_IN))
P = tl.constexpr(int(Column.P))
Q = tl.constexpr(int(Column.Q))
CLAMP = tl.constexpr(int(Column.CLAMP))
A = tl.constexpr(int(Column.A))
B = tl.constexpr(int(Column.B))
B_RAW = tl.constexpr(int(Column.B_RAW))
G = tl.constexpr(int(Column.G))
C1 = tl.constexpr(int(Column.C1))
S = tl.constexpr(int(Column.S))
SP = tl.constexpr(int(Column.SP))
KEEP_BASE = tl.constexpr(int(Column.KEEP_BASE))
A2 = tl.constexpr(int(Column.A2))
B2 = tl.constexpr(int(Column.B2))
G2 = tl.constexpr(int(Column.G2))
C21 = tl.constexpr(int(Column.C21))
SP2 = tl.constexpr(int(Column.SP2))
PUSH = tl.constexpr(int(Column.PUSH))
EX = tl.constexpr(int(Column.EX))
ED = tl.constexpr(int(Column.ED))
COLUMNS = tl.constexpr(len(Column))
PAST = tl.constexpr(HISTORY)


@triton.jit
def term(coefficient, value):
    """coefficient * value, and 0 where the coefficient is 0 whatever the value."""
    return tl.where(coefficient == 0.0, 0.0, coefficient * value)


@triton.jit
def read(pointer, e, elements, needed):
    """Values of elements e < elements, or zeros, not read, if the scalar `needed` is false."""
    return tl.load(pointer, mask=e < tl.where(needed, elements, 0), other=0.0).to(tl.float32)


@triton.jit
def place(e, pixels, CHANNELS: tl.constexpr):
    """Offset in memory of element e of a row, counted C, H, W; CHANNELS is 0 for planar rows."""
    if CHANNELS == 0:
        return e
    else:
        return (e % pixels) * CHANNELS + e // pixels


@triton.jit
def noise_bits(seed, counters, update, stream):
    """Four uint32 blocks: Philox-4x32-10 of (counter, update, stream, 0) with the key `seed`."""
    return tl.philox(seed, counters, update.to(tl.int32), stream, 0)


@triton.jit
def normals(seed, first, update, stream, BLOCK: tl.constexpr):
    """Unit normals of elements first to first + BLOCK of a row; `first` is a multiple of 4."""
    counters = first // 4 + tl.arange(0, BLOCK // 4)
    a, b, c, d = noise_bits(seed, counters, update, stream)  # pyright: ignore[reportGeneralTypeIssues]
    n0, n1 = tl.pair_uniform_to_normal(tl.uint_to_uniform_float(a), tl.uint_to_uniform_float(b))
    n2, n3 = tl.pair_uniform_to_normal(tl.uint_to_uniform_float(c), tl.uint_to_uniform_float(d))
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), [BLOCK])


@triton.jit
def line_of(table, row, at, lines):
    """Pointer to line `at` of a row's table (any line if there is none), and whether there is one."""
    line = table + (row * lines + tl.minimum(tl.maximum(at, 0), lines - 1)) * COLUMNS
    return line, (at >= 0) & (at < lines) & (tl.load(line + LIVE) != 0.0)


@triton.jit
def sampler_step_kernel(
    x, base, history, model_output, table, update, weights, seeds, extra_noise,
    x_out, base_out, history_out, input_out, nonfinite,
    elements, pixels, lines, noise_stream,
    BRANCHES: tl.constexpr, DRAWS: tl.constexpr, EXTRA: tl.constexpr,
    X: tl.constexpr, BASE: tl.constexpr, HIST: tl.constexpr, MODEL: tl.constexpr, NOISE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (i, r): block i of row r. X, BASE, HIST, MODEL, NOISE: channels of interleaved tensors, 0 if planar."""
    row = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * BLOCK
    e = first + tl.arange(0, BLOCK)
    inside = e < elements
    at = tl.load(update + row)
    line, live = line_of(table, row, at, lines)  # pyright: ignore[reportGeneralTypeIssues]
    following, more = line_of(table, row, at + 1, lines)

    F = tl.zeros([BLOCK], tl.float32)
    q = tl.load(line + Q).to(tl.float32)
    model = model_output + row * BRANCHES * elements + place(e, pixels, MODEL)
    for j in tl.static_range(BRANCHES):
        w = tl.load(weights + row * BRANCHES + j).to(tl.float32)
        F += term(w, read(model + j * elements, e, elements, (w != 0.0) & (q != 0.0)))
    state = x + row * elements + place(e, pixels, X)
    x0 = tl.load(state, mask=inside, other=0.0)
    raw = term(tl.load(line + P).to(tl.float32), x0) + term(q, F)
    clamp = tl.load(line + CLAMP).to(tl.float32)
    D = tl.maximum(raw, -clamp, propagate_nan=tl.PropagateNan.ALL)
    D = tl.minimum(D, clamp, propagate_nan=tl.PropagateNan.ALL)

    keep_base = (tl.load(line + KEEP_BASE) != 0.0) | (live == 0)
    push = (tl.load(line + PUSH) != 0.0) & live
    g, g2 = tl.load(line + G).to(tl.float32), tl.load(line + G2).to(tl.float32)
    base_at = row * elements + place(e, pixels, BASE)
    old = read(base + base_at, e, elements, keep_base | (g != 0.0) | (g2 != 0.0))
    x1 = term(tl.load(line + A).to(tl.float32), x0) + term(tl.load(line + B).to(tl.float32), D)
    x1 = x1 + term(tl.load(line + B_RAW).to(tl.float32), raw) + term(g, old)
    base1 = term(tl.load(line + A2).to(tl.float32), x0) + term(tl.load(line + B2).to(tl.float32), D) + term(g2, old)

    # The entries of the new history are the old ones, moved by one place if this update pushes.
    history_at = row * PAST * elements + place(e, pixels, HIST)
    entry = term(tl.load(line + EX).to(tl.float32), x0) + term(tl.load(line + ED).to(tl.float32), D)
    newer = entry
    for k in tl.static_range(PAST):
        c, c2 = tl.load(line + C1 + k).to(tl.float32), tl.load(line + C21 + k).to(tl.float32)
        moves = (k + 1 < PAST) | (push == 0) | (c != 0.0) | (c2 != 0.0)
        past = read(history + history_at + k * elements, e, elements, moves)
        x1 += term(c, past)
        base1 += term(c2, past)
        tl.store(history_out + history_at + k * elements, tl.where(push, newer, past), mask=inside)
        newer = past

    if DRAWS >= 1:
        noise = extra_noise + row * 2 * elements + place(e, pixels, NOISE)
        seed = tl.load(seeds + row)
        s = tl.load(line + S).to(tl.float32)
        if s != 0.0:
            if EXTRA:
                x1 += s * tl.load(noise, mask=inside, other=0.0)
            else:
                x1 += s * normals(seed, first, at, noise_stream, BLOCK)
        if DRAWS >= 2:
            sp, sp2 = tl.load(line + SP).to(tl.float32), tl.load(line + SP2).to(tl.float32)
            if (sp != 0.0) | (sp2 != 0.0):
                if EXTRA:
                    before = tl.load(noise + elements, mask=inside, other=0.0)
                else:
                    before = normals(seed, first, at - 1, noise_stream, BLOCK)
                x1 += term(sp, before)
                base1 += term(sp2, before)

    x1 = tl.where(live, x1, x0)
    c_in = tl.where(live & more, tl.load(following + C_IN).to(tl.float32), 1.0)
    tl.store(x_out + row * elements + place(e, pixels, X), x1, mask=inside)
    tl.store(input_out + row * elements + place(e, pixels, X), c_in * x1, mask=inside)
    tl.store(base_out + base_at, tl.where(keep_base, old, base1), mask=inside)
    infinite = inside & ((tl.abs(x1) < float("inf")) == 0)
    tl.store(nonfinite + row, True, mask=live & (tl.max(infinite.to(tl.int32), 0) != 0))


@triton_op("sampler_step")
def sampler_step(
    x: Tensor,
    base: Tensor,
    history: Tensor,
    model_output: Tensor,
    table: Tensor,
    update: Tensor,
    weights: Tensor,
    seeds: Tensor,
    extra_noise: Tensor | None = None,
    noise_stream: int = 0,
    draws: int = 2,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch with the configuration of the shape; arguments as the reference."""
    rows, elements = x.shape[0], x[0].numel() if x.shape[0] else 0
    channels, pixels, branches = x.shape[1], x.shape[2] * x.shape[3], model_output.shape[1]
    x, in_x = dense(x)
    base, in_base = dense(base)
    history, in_history = dense(history)
    model_output, in_model = dense(model_output)
    noise, in_noise = dense(x if extra_noise is None else extra_noise)
    made = [torch.empty_like(t) for t in (x, base, history, x)]
    nonfinite = torch.zeros(rows, dtype=torch.bool, device=x.device)
    config: Config = launch_config("sampler_step", heuristic, rows, elements)
    if rows and elements:
        launcher(sampler_step_kernel)[(triton.cdiv(elements, config.block), rows)](
            *(x, base, history, model_output, table.contiguous(), update.contiguous(), weights.contiguous()),
            *(seeds.contiguous(), noise, *made, nonfinite, elements, pixels, table.shape[1], noise_stream),
            **_constants(branches, draws, extra_noise is not None, config),
            X=in_x * channels,
            BASE=in_base * channels,
            HIST=in_history * channels,
            MODEL=in_model * channels,
            NOISE=in_noise * channels,
            **config.options.kwargs(),
        )
    return made[0], made[1], made[2], made[3], nonfinite


def dense(t: Tensor) -> tuple[Tensor, bool]:
    """`t` [..., C, H, W] without gaps, and whether its rows are interleaved (H, W, C); copied if it is neither."""
    if not t.is_contiguous() and t.movedim(-3, -1).is_contiguous():
        return t, True
    return t.contiguous(), False


def _constants(branches: int, draws: int, extra: bool, config: Config) -> dict[str, int | bool]:
    return {"BRANCHES": branches, "DRAWS": draws, "EXTRA": extra, "BLOCK": config.block}


def compilations() -> list[Compilation]:
    """Every specialisation that launches on real shapes make."""
    state = ("x", "base", "history", "extra_noise", "x_out", "base_out", "history_out", "input_out")
    floats = dict.fromkeys((*state, "table", "weights"), "*fp32")
    sizes = dict.fromkeys(("elements", "pixels", "lines", "noise_stream"), "i32")
    indices = {"update": "*i64", "seeds": "*i64", "nonfinite": "*i1"}
    made = []
    for dtype, branches, draws, extra, interleaved, latent in (
        ("bf16", 2, 0, False, True, 128),
        ("bf16", 2, 1, False, True, 128),
        ("bf16", 2, 2, False, True, 128),
        ("fp16", 2, 1, False, True, 64),
        ("fp16", 1, 0, False, False, 16),
        ("fp32", 2, 1, False, False, 64),
        ("fp32", 2, 2, True, False, 64),
        ("fp32", 3, 0, False, True, 64),
    ):
        config = heuristic(1, 4 * latent * latent)
        layouts = {"X": 0, "BASE": 0, "HIST": 0, "NOISE": 0, "MODEL": 4 if interleaved else 0}
        made.append(
            Compilation(
                name=f"{dtype}, {branches} branches, draws {'given' if extra else draws}, "
                f"{'interleaved' if interleaved else 'planar'} output, {latent} x {latent}",
                kernel=sampler_step_kernel,
                signature=floats | indices | sizes | {"model_output": f"*{dtype}"},
                constants=_constants(branches, draws, extra, config) | layouts,
                options=config.options,
                divisible=frozenset({*floats, *indices, "model_output", "elements", "pixels"}),
            )
        )
    return made
