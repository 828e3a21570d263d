"""The definition of `sampler_step` in plain torch, and of the noise it draws (Philox-4x32-10, Box-Muller).

Fused by the kernel: guidance sum, denoised estimate, clamp, linear update of state and base, history push, noise, the
blend with a known image, and the scaled network input of the next update. Every row has its own table and its own
position in it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..op import is_channels_last
from .columns import HISTORY, Column

_MASK = 0xFFFFFFFF
_KEY = (0x9E3779B9, 0xBB67AE85)
_ROUND = (0xD2511F53, 0xCD9E8D57)
_UNIFORM = 4.6566127342e-10  # just below 2^-31, so that the largest int32 stays below 1 in float32
_TWO_PI = 6.283185307179586


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
    """One update of every row; formulas in `columns.Column`.

    x             float32 or float64 [R, C, H, W]: the state. All arithmetic is in its dtype
    base          like x: the state kept by multi-stage methods
    history       like x [R, 3, C, H, W], newest first
    model_output  any float [R, J, C, H, W]: the network's output for every guidance branch. Of 2 C channels the second
                  C are the learned variance v; the one of branch 0, the prompt's, is used where a line asks for it
    table         float [R, U, len(Column)]: each row's plan, padded with lines of zeros
    update        int64 [R]: the line each row is at
    weights       like table [R, J]: guidance weight of every branch, any rescaling included
    seeds         int64 [R]: noise is Philox(seed, element // 4, update, noise_stream, 0)[element % 4] as normals,
                  elements counted over [C, H, W] in that order
    extra_noise   like x [R, 2, C, H, W] or None: the noise of this and of the previous update, instead of Philox
    draws         how many noises any row can need: 2 this and the previous update's, 1 this one's, 0 none (a saving for
                  batches known to be deterministic; the rows' tables are trusted to agree)

    mask          like x [R, 1, H, W]: 1 where the image is new, 0 where it is known, or a strength for every pixel
    known         like x [R, 2, C, H, W]: the known image and the noise that covers it. With `mask` or not at all;
                  without them KNOWN, KNOWN_NOISE and THRESHOLD mean nothing
    model_rows    int64 [R, J]: the network's rows are not [R, J] but [M], only the branches that rows have, and this is
                  where each branch is. Then model_output is [M, C or 2 C, H, W], and so is the network input, in
                  the dtype and memory format of model_output: what the network takes. A branch of weight 0 may share
                  the model row of another of its row. A model row that two rows name gets the input of either, one that
                  nobody names is left undefined: only padding may be such
    first_line    int64 [R]: `table` is a window of the row's plan, whose line 0 is this update's. A row needs its line
                  and the next; the noise still counts updates
    limit         like x [R]: where positive, D is clamp(D_raw, -limit, limit) / limit and CLAMP is not read (dynamic
                  thresholding, Saharia et al. 2022, section 2.3); at 0 and below the row uses CLAMP

    Returns (x, base, history, network input of the next update c_in x, nonfinite bool [R]), all new tensors. A row
    whose plan is over (a line of zeros, or an index outside the table) comes back unchanged, with c_in = 1. A term
    whose coefficient is 0 is not read: NaN in an unused branch, base or history entry does no harm. No row depends on
    another, and nothing waits for the device. Raises ValueError for a mask without a known image (or the reverse) and
    for another number of channels than C or 2 C.
    """
    channels = check(x, model_output, mask, known)
    at = update if first_line is None else update - first_line
    line, live = _line(table, at)
    c = dict(zip(Column, _columns(line, x.dtype), strict=True))
    keep = ~live.reshape(-1, 1, 1, 1)

    outputs = (model_output if model_rows is None else model_output[model_rows]).to(x.dtype)
    F = torch.zeros_like(x)
    for j, weight in enumerate(_columns(weights, x.dtype)):
        F = F + term(weight, outputs[:, j, :channels])
    raw = term(c[Column.P], x) + term(c[Column.Q], F)
    bound, divisor = c[Column.CLAMP], None
    if limit is not None:
        s = limit.to(x.dtype)[:, None, None, None]
        bound, divisor = torch.where(s > 0, s, bound), torch.where(s > 0, s, 1.0)
    D = torch.minimum(torch.maximum(raw, -bound), bound)
    if divisor is not None:
        D = D / divisor

    noise = _noise(x, seeds, update, extra_noise, noise_stream, draws)
    if outputs.shape[2] > channels and noise:
        noise = (_deviation(c, outputs[:, 0, channels:]) * noise[0], *noise[1:])
    past = history.unbind(1)
    x_new = term(c[Column.A], x) + term(c[Column.B], D) + term(c[Column.B_RAW], raw) + term(c[Column.G], base)
    base_new = term(c[Column.A2], x) + term(c[Column.B2], D) + term(c[Column.G2], base)
    for k in range(HISTORY):
        x_new = x_new + term(c[Column(Column.C1 + k)], past[k])
        base_new = base_new + term(c[Column(Column.C21 + k)], past[k])
    for coefficient, xi in zip((Column.S, Column.SP), noise, strict=False):
        x_new = x_new + term(c[coefficient], xi)
    for xi in noise[1:]:
        base_new = base_new + term(c[Column.SP2], xi)
    if mask is not None and known is not None:
        x_new = _blend(c, x_new, mask, known)
    entry = term(c[Column.EX], x) + term(c[Column.ED], D)

    x_new = torch.where(keep, x, x_new)
    base_new = torch.where(keep | (c[Column.KEEP_BASE] != 0), base, base_new)
    pushed = torch.stack((entry, *past[: HISTORY - 1]), dim=1)
    history_new = torch.where((keep | (c[Column.PUSH] == 0)).unsqueeze(1), history, pushed)

    following, more = _line(table, at + 1)
    c_in = torch.where(live & more, following[:, Column.C_IN], 1.0).to(x.dtype).reshape(-1, 1, 1, 1)
    nonfinite = live & ~torch.isfinite(x_new).flatten(1).all(dim=1)
    model_input = c_in * x_new
    if model_rows is not None:
        model_input = _scatter(model_input, model_rows, model_output)
    return x_new, base_new, history_new, model_input, nonfinite


def check(x: Tensor, model_output: Tensor, mask: Tensor | None, known: Tensor | None) -> int:
    """The channels C of the state; raises ValueError for arguments that do not go together."""
    if (mask is None) != (known is None):
        raise ValueError(f"got {'known' if mask is None else 'mask'} alone; give mask and known, or neither")
    channels, found = x.shape[1], model_output.shape[-3]
    if found not in (channels, 2 * channels):
        raise ValueError(
            f"model_output has {found} channels, the state {channels}; expected as many, or {2 * channels} with a "
            "learned variance"
        )
    return channels


def _line(table: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's line [R, len(Column)], and whether there is one."""
    lines = table.shape[1]
    index = update.clamp(0, lines - 1).reshape(-1, 1, 1).expand(-1, 1, table.shape[2])
    line = table.gather(1, index).squeeze(1)
    return line, (update >= 0) & (update < lines) & (line[:, Column.LIVE] != 0)


def _columns(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Every column of [R, K] as [R, 1, 1, 1]; cast together, because a cast per column costs more than the update."""
    return values.to(dtype)[:, :, None, None, None].unbind(1)


def term(coefficient: Tensor, value: Tensor) -> Tensor:
    """coefficient * value, and 0 where the coefficient is 0 whatever the value."""
    return torch.where(coefficient == 0, 0.0, coefficient * value)


def _deviation(c: dict[Column, Tensor], v: Tensor) -> Tensor:
    """The factor s(v) of the noise."""
    root = torch.where(c[Column.V_ROOT] == 0, 1.0, c[Column.V_ROOT] * torch.sqrt(v))
    return torch.where(c[Column.V_LOG] == 0, root, torch.exp(c[Column.V_LOG] * v))


def _blend(c: dict[Column, Tensor], x: Tensor, mask: Tensor, known: Tensor) -> Tensor:
    """x where the mask is 1, the known image at the level of x where it is 0."""
    image, noise = known.to(x.dtype).unbind(1)
    image = term(c[Column.KNOWN], image) + term(c[Column.KNOWN_NOISE], noise)
    m = torch.where(c[Column.THRESHOLD] > 0, (mask >= c[Column.THRESHOLD]).to(x.dtype), mask.to(x.dtype))
    keeps = (c[Column.KNOWN] == 0) & (c[Column.KNOWN_NOISE] == 0)
    return torch.where(keeps, x, term(m, x) + term(1.0 - m, image))


def _scatter(rows: Tensor, model_rows: Tensor, like: Tensor) -> Tensor:
    """`rows` [R, C, H, W] at every model row that names them: [M, C, H, W] in dtype and memory format of `like`."""
    shape = (like.shape[0], *rows.shape[1:])
    layout = torch.channels_last if is_channels_last(like) else torch.contiguous_format
    made = torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)
    copies = rows.to(like.dtype).repeat_interleave(model_rows.shape[1], dim=0)
    return made.index_copy_(0, model_rows.flatten(), copies)


def _noise(
    x: Tensor, seeds: Tensor, update: Tensor, extra: Tensor | None, stream: int, draws: int
) -> tuple[Tensor, ...]:
    if extra is not None:
        return extra.to(x.dtype).unbind(1)[:draws]
    size = list(x.shape[1:])
    return tuple(philox_normal(seeds, update - k, size, stream).to(x.dtype) for k in range(draws))


def philox(seeds: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32-10 (Salmon et al. 2011) keyed by the two halves of `seeds`, bit for bit Triton's `tl.philox`.

    All arguments int64, broadcastable; counters are taken modulo 2^32. Returns four int64 tensors in [0, 2^32).
    """
    k0, k1 = seeds & _MASK, (seeds >> 32) & _MASK
    c0, c1, c2, c3 = (c & _MASK for c in torch.broadcast_tensors(c0, c1, c2, c3))
    for _ in range(10):
        high_a, low_a = _multiply(c0, _ROUND[0])
        high_b, low_b = _multiply(c2, _ROUND[1])
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + _KEY[0]) & _MASK, (k1 + _KEY[1]) & _MASK
    return c0, c1, c2, c3


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b for 32-bit a, b in int64. In two halves: the full product overflows int64."""
    low = (a & 0xFFFF) * b
    rest = (a >> 16) * b + (low >> 16)
    return rest >> 16, ((rest & 0xFFFF) << 16) | (low & 0xFFFF)


def uniform(bits: Tensor) -> Tensor:
    """int64 in [0, 2^32) to float32 in [0, 1), Triton's `uint_to_uniform_float`: fold the sign of the int32, scale."""
    signed = torch.where(bits >= 1 << 31, (1 << 32) - 1 - bits, bits)
    return signed.to(torch.float32) * _UNIFORM


def box_muller(u1: Tensor, u2: Tensor) -> tuple[Tensor, Tensor]:
    """Two uniforms to two normals, float32, as Triton's `pair_uniform_to_normal`."""
    radius = torch.sqrt(-2.0 * torch.log(u1.clamp_min(1.0e-7)))
    angle = _TWO_PI * u2
    return radius * torch.cos(angle), radius * torch.sin(angle)


def philox_normal(seeds: Tensor, update: Tensor, size: list[int], stream: int = 0) -> Tensor:
    """Unit normals float32 [R, *size] of row seeds int64 [R] at update int64 [R]; element e of a row is lane e % 4 of
    counter (e // 4, update, stream, 0)."""
    count = 1
    for n in size:
        count *= n
    blocks = torch.arange((count + 3) // 4, device=seeds.device).unsqueeze(0)
    zero = torch.zeros_like(blocks)
    bits = philox(seeds.unsqueeze(1), blocks, update.unsqueeze(1), zero + stream, zero)
    u = [uniform(b) for b in bits]
    lanes = (*box_muller(u[0], u[1]), *box_muller(u[2], u[3]))
    flat = torch.stack(lanes, dim=-1).flatten(1)
    return flat[:, :count].reshape(seeds.shape[0], *size)
