"""Compiled loops over rows of logits: log-partition functions and divergences in one pass, without a copy of a row.

exp(x) = 2^k · 2^f with k + f = x / ln 2 and f in [-1/2, 1/2]. 2^f is its Taylor polynomial of degree 7, which is off by
at most 5e-9 there, below float32's own rounding; 2^k is the float32 with exponent field k + 127. Both vectorise, which a
call of exp does not. Sums run in float32 within ``_BLOCK`` columns and in float64 over the blocks.

NaN and infinite logits give NaN, as they would with plain torch.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np

# no "nnan": a broken model's NaN must come through
_OPTIONS = {"nogil": True, "cache": True, "error_model": "numpy", "fastmath": {"contract", "reassoc", "nsz", "arcp"}}
_BLOCK = 1024

_LOG2E = np.float32(1.4426950408889634)
_LN2 = np.float32(0.6931471805599453)
_LEAST = np.float32(-126)  # the smallest normal exponent: what is below counts as 2^-126, nothing to a float32 sum
# ln(2)^n / n!
_C1, _C2, _C3, _C4, _C5, _C6, _C7 = (np.float32(math.log(2) ** n / math.factorial(n)) for n in range(1, 8))
_ONE, _HALF = np.float32(1), np.float32(0.5)


@numba.njit(inline="always")
def _power(t: Any) -> Any:
    """2^f and k as the bits of 2^k, for t = k + f."""
    t = _LEAST if t < _LEAST else t
    k = np.floor(t + _HALF)
    f = t - k
    value = ((((((_C7 * f + _C6) * f + _C5) * f + _C4) * f + _C3) * f + _C2) * f + _C1) * f + _ONE
    return value, (np.int32(k) + np.int32(127)) << np.int32(23)


@numba.njit(inline="always")
def _largest(row: Any, lanes: Any) -> Any:
    n = row.shape[0]
    for j in range(lanes.shape[0]):
        lanes[j] = row[0]
    for start in range(0, n, lanes.shape[0]):
        for j in range(min(lanes.shape[0], n - start)):
            x = row[start + j]
            lanes[j] = x if x > lanes[j] else lanes[j]
    top = lanes[0]
    for j in range(lanes.shape[0]):
        top = lanes[j] if lanes[j] > top else top
    return top


@numba.njit(**_OPTIONS)
def log_partition_rows(first: int, last: int, logits: Any, out: Any) -> None:
    """out[r] = ln Σ_j exp(logits[r, j]); logits (rows, vocabulary) float32, out (rows,) float64."""
    n = logits.shape[1]
    bits = np.empty(_BLOCK, np.int32)
    exponent = bits.view(np.float32)
    value = np.empty(_BLOCK, np.float32)
    for r in range(first, last):
        row = logits[r]
        top = _largest(row, value)
        total: Any = 0.0
        for start in range(0, n, _BLOCK):
            width = min(_BLOCK, n - start)
            for j in range(width):
                value[j], bits[j] = _power((row[start + j] - top) * _LOG2E)
            part = np.float32(0)
            for j in range(width):
                part += value[j] * exponent[j]
            total += part
        out[r] = np.float64(top) + math.log(total)


@numba.njit(**_OPTIONS)
def divergence_rows(first: int, last: int, logits_p: Any, logits_q: Any, out: Any, divergence: Any) -> None:
    """out[r] = ln Σ_j exp(q_j) and divergence[r] = KL(softmax p ‖ softmax q), from the rows p, q of the logits.

    With p and q measured from their largest elements: KL = Σ eᵖ (p - q) / Σ eᵖ - ln Σ eᵖ + ln Σ e^q. A token that p gives
    no more than 2^-126 of its largest probability is left out, so that logits of minus infinity do no harm in p.
    """
    n = logits_p.shape[1]
    bits_p, bits_q = np.empty(_BLOCK, np.int32), np.empty(_BLOCK, np.int32)
    exponent_p, exponent_q = bits_p.view(np.float32), bits_q.view(np.float32)
    value_p, value_q = np.empty(_BLOCK, np.float32), np.empty(_BLOCK, np.float32)
    gap = np.empty(_BLOCK, np.float32)
    for r in range(first, last):
        p, q = logits_p[r], logits_q[r]
        top_p, top_q = _largest(p, value_p), _largest(q, value_q)
        total_p: Any = 0.0
        total_q: Any = 0.0
        total: Any = 0.0
        for start in range(0, n, _BLOCK):
            width = min(_BLOCK, n - start)
            for j in range(width):
                tp = (p[start + j] - top_p) * _LOG2E
                tq = (q[start + j] - top_q) * _LOG2E
                gap[j] = np.float32(0) if tp <= _LEAST else tp - tq
                value_p[j], bits_p[j] = _power(tp)
                value_q[j], bits_q[j] = _power(tq)
            part_p = part_q = part = np.float32(0)
            for j in range(width):
                mass = value_p[j] * exponent_p[j]
                part_p += mass
                part_q += value_q[j] * exponent_q[j]
                part += mass * gap[j]
            total_p += part_p
            total_q += part_q
            total += part
        out[r] = np.float64(top_q) + math.log(total_q)
        divergence[r] = total / total_p * _LN2 - math.log(total_p) + math.log(total_q)
