"""Layout of one line of a sampler table, shared by the planners (host, float64) and the op (device). No torch."""

from __future__ import annotations

from enum import IntEnum

HISTORY = 3
"""Past values a row keeps. Three, plus the current one, is Adams-Bashforth of order four."""


class Column(IntEnum):
    """Where each coefficient stands in the last axis of a table. A line of zeros (LIVE = 0) is padding.

    With F = sum_j w_j F_j (guidance), H_k the k-th newest history entry and xi_i the noise of update i:

        D_raw = P x + Q F                  D = clamp(D_raw, -CLAMP, CLAMP)
        x+    = A x + B D + B_RAW D_raw + G base + sum_k C_k H_k + S s(v) xi_i + SP xi_{i-1}
        x'    = m x+ + (1 - m) (KNOWN known + KNOWN_NOISE noise)           if KNOWN or KNOWN_NOISE, else x+
        base' = A2 x + B2 D + G2 base + sum_k C2_k H_k + SP2 xi_{i-1}      unless KEEP_BASE
        H'    = (EX x + ED D, H_1, H_2)                                    if PUSH

    s(v) is the factor by which a learned variance v, of every element, changes the noise: exp(V_LOG v) if V_LOG, else
    V_ROOT sqrt(v) if V_ROOT, else 1. m is the mask, 1 where the image is new and 0 where it is known; where THRESHOLD
    is positive the mask holds strengths instead, and m is 1 where mask >= THRESHOLD, else 0. A row with a limit s > 0
    has D = clamp(D_raw, -s, s) / s.
    """

    LIVE = 0
    C_IN = 1
    P = 2
    Q = 3
    CLAMP = 4
    A = 5
    B = 6
    B_RAW = 7
    G = 8
    C1 = 9
    C2 = 10
    C3 = 11
    S = 12
    SP = 13
    KEEP_BASE = 14
    A2 = 15
    B2 = 16
    G2 = 17
    C21 = 18
    C22 = 19
    C23 = 20
    SP2 = 21
    PUSH = 22
    EX = 23
    ED = 24
    TIMESTEP = 25
    ALPHA = 26
    SIGMA = 27
    STEP = 28
    KNOWN = 29
    KNOWN_NOISE = 30
    THRESHOLD = 31
    V_LOG = 32
    V_ROOT = 33
