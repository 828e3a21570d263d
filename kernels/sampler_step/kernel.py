"""Triton kernel of `sampler_step`: the whole update of every row in one launch.

Fused: guidance sum over the branches, denoised estimate and clamp, the linear updates of state and base, the history
push, Philox noise and its learned variance, the blend with a known image, the scaled network input for every model row
in the network's dtype, and the check for NaN. Bytes moved per element: model output 2J or 4J read, x 4, base 4 and
history 8 to 12 read, 24 written: 44 to 60. With model rows the input is 2J instead of 4 of the bytes written; the blend
reads 8 more and the mask once per pixel and channel, a learned variance 2 or 4 more; limits 4 per row. FLOPs about
60, and 250 integer operations per drawn noise of four elements. Bound: the launch below about 10^6 elements, memory
above.

A term whose coefficient is zero is not read. Every tensor of a row may be planar (C, H, W) or interleaved (H, W, C);
the noise counts elements in the order C, H, W whichever it is.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Compilation, launcher, triton_op
from ..launch_configs import launch_config
from .columns import HISTORY, Column
from .config import Config, heuristic
from .reference import check

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
KNOWN = tl.constexpr(int(Column.KNOWN))
KNOWN_NOISE = tl.constexpr(int(Column.KNOWN_NOISE))
THRESHOLD = tl.constexpr(int(Column.THRESHOLD))
V_LOG = tl.constexpr(int(Column.V_LOG))
V_ROOT = tl.constexpr(int(Column.V_ROOT))
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
def share(D, limit):
    """D / limit, and D where the limit is not positive."""
    made = D
    if limit > 0.0:
        made = tl.div_rn(D, limit)
    return made


@triton.jit
def branch_at(model_rows, row, j, size, BRANCHES: tl.constexpr, MAPPED: tl.constexpr):
    """Offset of branch j, a model row of `size` elements: from the first of all, or unmapped from the row's first."""
    return tl.load(model_rows + row * BRANCHES + j) * size if MAPPED else j * size


@triton.jit
def deviation(line, variance, e, elements):
    """The factor s(v) of the noise, from a pointer to the learned variance v."""
    log, root = tl.load(line + V_LOG).to(tl.float32), tl.load(line + V_ROOT).to(tl.float32)
    v = read(variance, e, elements, (log != 0.0) | (root != 0.0))
    return tl.where(log != 0.0, tl.exp(log * v), tl.where(root != 0.0, root * tl.sqrt_rn(v), 1.0))


@triton.jit
def blend(line, x, mask, image, noise, e, elements):
    """x where the mask is 1, the known image at the level of x where it is 0; pointers to mask, image and noise."""
    k, k_noise = tl.load(line + KNOWN).to(tl.float32), tl.load(line + KNOWN_NOISE).to(tl.float32)
    made = x
    if (k != 0.0) | (k_noise != 0.0):
        threshold = tl.load(line + THRESHOLD).to(tl.float32)
        m = read(mask, e, elements, True)
        m = tl.where(threshold > 0.0, (m >= threshold).to(tl.float32), m)
        known = term(k, read(image, e, elements, k != 0.0)) + term(k_noise, read(noise, e, elements, k_noise != 0.0))
        made = term(m, x) + term(1.0 - m, known)
    return made


@triton.jit
def sampler_step_kernel(
    x, base, history, model_output, table, update, weights, seeds, extra_noise, mask, known, model_rows, first_line,
    limits, x_out, base_out, history_out, input_out, nonfinite,
    elements, pixels, lines, noise_stream,
    BRANCHES: tl.constexpr, DRAWS: tl.constexpr, EXTRA: tl.constexpr,
    MASKED: tl.constexpr, LEARNED: tl.constexpr, MAPPED: tl.constexpr, WINDOW: tl.constexpr, LIMITED: tl.constexpr,
    X: tl.constexpr, BASE: tl.constexpr, HIST: tl.constexpr, MODEL: tl.constexpr, NOISE: tl.constexpr,
    INPUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (i, r): block i of row r.

    X, BASE, HIST, MODEL, NOISE, INPUT: channels of interleaved tensors, 0 if planar. What MASKED, LEARNED, MAPPED,
    WINDOW and LIMITED say is absent (mask and known, the second half of the model output, model_rows, first_line,
    limits) is not touched.
    """
    row = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * BLOCK
    e = first + tl.arange(0, BLOCK)
    inside = e < elements
    at = tl.load(update + row)
    place_in_table = at - tl.load(first_line + row) if WINDOW else at
    line, live = line_of(table, row, place_in_table, lines)  # pyright: ignore[reportGeneralTypeIssues]
    following, more = line_of(table, row, place_in_table + 1, lines)

    F = tl.zeros([BLOCK], tl.float32)
    q = tl.load(line + Q).to(tl.float32)
    model_elements = elements * 2 if LEARNED else elements
    if not MAPPED:
        model_output += row * BRANCHES * model_elements
    model = model_output + place(e, pixels, MODEL)
    for j in tl.static_range(BRANCHES):
        w = tl.load(weights + row * BRANCHES + j).to(tl.float32)
        branch = model + branch_at(model_rows, row, j, model_elements, BRANCHES, MAPPED)
        F += term(w, read(branch, e, elements, (w != 0.0) & (q != 0.0)))
    state = x + row * elements + place(e, pixels, X)
    x0 = tl.load(state, mask=inside, other=0.0)
    raw = term(tl.load(line + P).to(tl.float32), x0) + term(q, F)
    clamp = tl.load(line + CLAMP).to(tl.float32)
    limit = tl.load(limits + row) if LIMITED else 0.0
    if LIMITED:
        clamp = tl.where(limit > 0.0, limit, clamp)
    D = tl.maximum(raw, -clamp, propagate_nan=tl.PropagateNan.ALL)
    D = tl.minimum(D, clamp, propagate_nan=tl.PropagateNan.ALL)
    if LIMITED:
        D = share(D, limit)

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
            drawn = tl.load(noise, mask=inside, other=0.0) if EXTRA else normals(seed, first, at, noise_stream, BLOCK)
            if LEARNED:
                prompt = model_output + branch_at(model_rows, row, 0, model_elements, BRANCHES, MAPPED)
                drawn = deviation(line, prompt + place(elements + e, pixels, MODEL), e, elements) * drawn
            x1 += s * drawn
        if DRAWS >= 2:
            sp, sp2 = tl.load(line + SP).to(tl.float32), tl.load(line + SP2).to(tl.float32)
            if (sp != 0.0) | (sp2 != 0.0):
                if EXTRA:
                    before = tl.load(noise + elements, mask=inside, other=0.0)
                else:
                    before = normals(seed, first, at - 1, noise_stream, BLOCK)
                x1 += term(sp, before)
                base1 += term(sp2, before)

    if MASKED:
        image = known + row * 2 * elements + e
        x1 = blend(line, x1, mask + row * pixels + e % pixels, image, image + elements, e, elements)
    x1 = tl.where(live, x1, x0)
    c_in = tl.where(live & more, tl.load(following + C_IN).to(tl.float32), 1.0)
    tl.store(x_out + row * elements + place(e, pixels, X), x1, mask=inside)
    fed = (c_in * x1).to(input_out.dtype.element_ty)
    if MAPPED:
        for j in tl.static_range(BRANCHES):
            there = branch_at(model_rows, row, j, elements, BRANCHES, MAPPED)
            tl.store(input_out + there + place(e, pixels, INPUT), fed, mask=inside)
    else:
        tl.store(input_out + row * elements + place(e, pixels, INPUT), fed, mask=inside)
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
    mask: Tensor | None = None,
    known: Tensor | None = None,
    model_rows: Tensor | None = None,
    first_line: Tensor | None = None,
    limit: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch with the configuration of the shape; arguments as the reference."""
    channels = check(x, model_output, mask, known)
    rows, pixels, branches = x.shape[0], x.shape[2] * x.shape[3], weights.shape[1]
    elements = channels * pixels
    x, in_x = dense(x)
    base, in_base = dense(base)
    history, in_history = dense(history)
    model_output, in_model = dense(model_output)
    noise, in_noise = dense(x if extra_noise is None else extra_noise)
    made = [torch.empty_like(t) for t in (x, base, history)]
    fed = torch.empty_like(x) if model_rows is None else _network_input(x, model_output, in_model)
    nonfinite = torch.zeros(rows, dtype=torch.bool, device=x.device)
    config: Config = launch_config("sampler_step", heuristic, rows, elements)
    optional = (x if mask is None else mask, x if known is None else known)
    optional += (update if model_rows is None else model_rows, update if first_line is None else first_line)
    optional += (x if limit is None else limit,)
    flags = {
        "EXTRA": extra_noise is not None,
        "MASKED": mask is not None,
        "LEARNED": model_output.shape[-3] > channels,
        "MAPPED": model_rows is not None,
        "WINDOW": first_line is not None,
        "LIMITED": limit is not None,
    }
    in_input = in_x if model_rows is None else in_model
    layouts = {"X": in_x, "BASE": in_base, "HIST": in_history, "NOISE": in_noise, "INPUT": in_input}
    if rows and elements:
        launcher(sampler_step_kernel)[(triton.cdiv(elements, config.block), rows)](
            *(x, base, history, model_output, table.contiguous(), update.contiguous(), weights.contiguous()),
            *(seeds.contiguous(), noise, *(t.contiguous() for t in optional)),
            *(*made, fed, nonfinite, elements, pixels, table.shape[1], noise_stream),
            **_constants(branches, draws, config, flags),
            **{name: channels if interleaved else 0 for name, interleaved in layouts.items()},
            MODEL=model_output.shape[-3] if in_model else 0,
            **config.options.kwargs(),
        )
    return made[0], made[1], made[2], fed, nonfinite


def _network_input(x: Tensor, model_output: Tensor, interleaved: bool) -> Tensor:
    """Memory for the network's next input: its own rows, dtype and memory format."""
    layout = torch.channels_last if interleaved else torch.contiguous_format
    shape = (model_output.shape[0], *x.shape[1:])
    return torch.empty(shape, dtype=model_output.dtype, device=x.device, memory_format=layout)


def dense(t: Tensor) -> tuple[Tensor, bool]:
    """`t` [..., C, H, W] without gaps, and whether its rows are interleaved (H, W, C); copied if it is neither."""
    if not t.is_contiguous() and t.movedim(-3, -1).is_contiguous():
        return t, True
    return t.contiguous(), False


def _constants(branches: int, draws: int, config: Config, flags: Mapping[str, bool]) -> dict[str, int | bool]:
    return {"BRANCHES": branches, "DRAWS": draws, "BLOCK": config.block, **flags}


LABELS = {
    "MASKED": "known image",
    "LEARNED": "learned variance",
    "MAPPED": "model rows",
    "WINDOW": "window",
    "LIMITED": "dynamic threshold",
}
FLAGS = ("EXTRA", *LABELS)


def compilations() -> list[Compilation]:
    """Every specialisation that launches on real shapes make."""
    made = []
    for dtype, branches, draws, interleaved, latent, flags in (
        ("bf16", 2, 0, True, 128, ()),
        ("bf16", 2, 1, True, 128, ()),
        ("bf16", 2, 2, True, 128, ()),
        ("fp16", 2, 1, True, 64, ()),
        ("fp16", 1, 0, False, 16, ()),
        ("fp32", 2, 1, False, 64, ()),
        ("fp32", 2, 2, False, 64, ("EXTRA",)),
        ("fp32", 3, 0, True, 64, ()),
        ("bf16", 2, 0, True, 128, ("MAPPED",)),
        ("bf16", 2, 2, True, 128, ("MAPPED", "WINDOW")),
        ("fp16", 2, 0, True, 64, ("MASKED", "MAPPED")),
        ("fp16", 2, 2, True, 64, ("MASKED", "MAPPED", "WINDOW")),
        ("fp32", 2, 2, False, 64, ("MASKED",)),
        ("fp16", 1, 1, False, 64, ("LEARNED",)),
        ("bf16", 2, 2, True, 64, ("LEARNED", "MAPPED")),
        ("bf16", 2, 2, True, 64, ("MASKED", "LEARNED", "MAPPED", "WINDOW")),
        ("fp32", 1, 1, False, 64, ("LIMITED",)),
        ("bf16", 2, 0, True, 64, ("MAPPED", "WINDOW", "LIMITED")),
        ("fp16", 2, 2, True, 64, ("MASKED", "MAPPED", "WINDOW", "LIMITED")),
        ("bf16", 2, 2, True, 64, ("MASKED", "LEARNED", "MAPPED", "WINDOW", "LIMITED")),
    ):
        made.append(_compilation(dtype, branches, draws, interleaved, latent, flags))
    return made


def _compilation(
    dtype: str, branches: int, draws: int, interleaved: bool, latent: int, flags: tuple[str, ...]
) -> Compilation:
    """One specialisation: planar state of 4 channels, output planar or interleaved."""
    state = ("x", "base", "history", "extra_noise", "mask", "known", "x_out", "base_out", "history_out")
    floats = dict.fromkeys((*state, "table", "weights", "limits"), "*fp32")
    sizes = dict.fromkeys(("elements", "pixels", "lines", "noise_stream"), "i32")
    indices = dict.fromkeys(("update", "seeds", "model_rows", "first_line"), "*i64") | {"nonfinite": "*i1"}
    mapped = "MAPPED" in flags
    network = {"model_output": f"*{dtype}", "input_out": f"*{dtype}" if mapped else "*fp32"}
    config = heuristic(1, 4 * latent * latent)
    model = (8 if "LEARNED" in flags else 4) if interleaved else 0
    layouts = {"X": 0, "BASE": 0, "HIST": 0, "NOISE": 0, "MODEL": model, "INPUT": 4 if mapped and interleaved else 0}
    parts = [dtype, f"{branches} branches", "draws given" if "EXTRA" in flags else f"draws {draws}"]
    parts += [f"{'interleaved' if interleaved else 'planar'} output", f"{latent} x {latent}"]
    return Compilation(
        name=", ".join([*parts, *(label for flag, label in LABELS.items() if flag in flags)]),
        kernel=sampler_step_kernel,
        signature=floats | indices | sizes | network,
        constants=_constants(branches, draws, config, {f: f in flags for f in FLAGS}) | layouts,
        options=config.options,
        divisible=frozenset({*floats, *indices, *network, "elements", "pixels"}),
    )
