"""Triton functions of the normalisations: addresses of image tiles, and means and variances that survive an offset.

No sum of raw squares appears anywhere: with mean >> standard deviation, E[x^2] - E[x]^2 has no correct digit left.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_start(b, first_site, first_channel, sites, channels, CHANNELS_LAST: tl.constexpr):
    """Offset (int64) of the first element of a tile in a [B, channels, sites] image; b and first_site are int64."""
    if CHANNELS_LAST:
        return (b * sites + first_site) * channels + first_channel
    else:
        return (b * channels + first_channel) * sites + first_site


@triton.jit
def tile_offsets(s, c, sites, channels, CHANNELS_LAST: tl.constexpr):
    """Offsets within a tile; s and c are broadcastable. int64 where a tile may span more than 2^31 elements."""
    if CHANNELS_LAST:
        return s * channels + c
    else:  # Triton compiles what follows an early return, too, and asks for one type
        return c.to(tl.int64) * sites + s


@triton.jit
def source_of(block, x, x2, channels1, channels2, BLOCK_C: tl.constexpr):
    """Where a block of channels of cat(x, x2) lies; blocks do not straddle the seam.

    Returns the image, its number of channels, the block's first channel in it, and the channels before the image.
    """
    source, width, first, before = x, channels1, block * BLOCK_C, 0
    if x2 is not None:
        blocks1 = tl.cdiv(channels1, BLOCK_C)
        if block >= blocks1:
            source, width, first, before = x2, channels2, (block - blocks1) * BLOCK_C, channels1
    return source, width, first, before


@triton.jit
def welford(mean, squares, v, inside, count):
    """One more value per lane (Welford 1962); `count` includes it. Lanes that are not inside stay as they are."""
    apart = tl.where(inside, v - mean, 0.0)
    moved = mean + apart / count
    return moved, squares + apart * (v - moved)


@triton.jit
def merge_lanes(mean, squares, length, BLOCK_S: tl.constexpr):
    """Mean and M2 over axis 0 of lanes that took `length` values in turn (Chan et al. 1983, eq. 2.1)."""
    lane = tl.arange(0, BLOCK_S)
    counts = (tl.maximum(length - lane + BLOCK_S - 1, 0) // BLOCK_S).to(tl.float32)[:, None]
    centre = tl.sum(mean * counts, 0) / length
    apart = tl.where(counts > 0, mean - centre[None, :], 0.0)
    return centre, tl.sum(squares + counts * apart * apart, 0)


@triton.jit
def normalise_rows(v, inside, columns, eps):
    """(v - mean) / sqrt(var + eps) over axis 1 of a tile held in registers, by the corrected two-pass algorithm."""
    centre = tl.sum(tl.where(inside, v, 0.0), 1) / columns
    apart = tl.where(inside, v - centre[:, None], 0.0)
    rest = tl.sum(apart, 1) / columns
    var = tl.maximum(tl.sum(apart * apart, 1) / columns - rest * rest, 0.0)
    return (apart - rest[:, None]) * tl.rsqrt(var + eps)[:, None]
