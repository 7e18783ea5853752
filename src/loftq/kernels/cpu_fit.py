"""Compiled CPU loops that choose codes and scales block by block, sixteen elements at a time.

A block w is represented as ``scale * (codebook[codes] + zero * codebook[1])``. For fixed codes the squared error is
quadratic in the scale. So for every candidate s, with q the nearest levels and e = w / s - q, the best scale for those codes
is ``s (1 + <e, q> / <q, q>)``, and it leaves ``s^2 (<e, e> - <e, q>^2 / <q, q>)`` of the block's energy: a difference of
small numbers, which float32 resolves where what is explained would be rounded by more than what is left. The candidate
that leaves least wins. With ``importance`` every inner product is weighted by one number per column, what its error counts.

``tables`` (rows or 1, 2^bits) and ``borders`` (rows or 1, at least 16) float32 are the levels and the borders between their
cells, filled up with infinities. What is left of a row that does not divide by sixteen is padded with zeros that count nothing.
"""

import numba
import numpy as np

from loftq.kernels.reference import TINY
from loftq.kernels.simd import (
    add16,
    divide16,
    load16,
    minimum16,
    multiply16,
    multiply_add16,
    smallest16,
    spread16,
    store16,
    subtract16,
    sum16,
)
from loftq.kernels.simd_levels import levels16, nearest16, row_of, store_codes16

_TINY = np.float32(TINY)
_OPTIONS = {"nogil": True, "cache": True, "error_model": "numpy", "fastmath": {"contract", "reassoc", "nsz"}}


@numba.njit(inline="always")
def _block(source, begin, n, buffer):
    """Elements ``begin`` to ``begin + n`` as whole vectors: where they are, or in the buffer with zeros behind them."""
    if n % 16 == 0:
        return source[begin : begin + n]
    buffer[:n] = source[begin : begin + n]
    buffer[n:] = 0
    return buffer


@numba.njit(inline="always")
def _range(block, n):
    """The smallest and the largest of the first n numbers."""
    low = spread16(np.float32(np.inf))
    low_of_negative = low
    none = spread16(np.float32(0))
    whole = n // 16 * 16
    for i in range(0, whole, 16):
        x = load16(block, i)
        low = minimum16(low, x)
        low_of_negative = minimum16(low_of_negative, subtract16(none, x))
    smallest, largest = smallest16(low), -smallest16(low_of_negative)
    for i in range(whole, n):
        smallest = min(smallest, block[i])
        largest = max(largest, block[i])
    return smallest, largest


@numba.njit(inline="always")
def _moments(width, block, counts, n, scale, table, border):
    """<e, q>, <q, q> and <e, e> for the levels q nearest to w / scale, and e = w / scale - q."""
    inverse = spread16(np.float32(1) / scale)
    num = spread16(np.float32(0))
    den = num
    error = num
    for i in range(0, n, 16):
        x = multiply16(load16(block, i), inverse)
        q = levels16(width, table, nearest16(width, border, x))
        h = load16(counts, i)
        rest, weighted = subtract16(x, q), multiply16(q, h)
        num = multiply_add16(rest, weighted, num)
        den = multiply_add16(q, weighted, den)
        error = multiply_add16(rest, multiply16(rest, h), error)
    return sum16(num), sum16(den), sum16(error)


@numba.njit(**_OPTIONS)
def search_scale_rows(first, last, width, weight, importance, tables, borders, factors, refine, block_size, scale):
    """scale[r, b] <- the best of ``absmax * factors``, then refitted by least squares ``refine`` times."""
    in_features = weight.shape[1]
    padded_block, padded_counts = np.empty(block_size, np.float32), np.empty(block_size, np.float32)
    for r in range(first, last):
        table, border = row_of(tables, r), row_of(borders, r)
        top = np.float32(0)
        for k in range(1 << len(width)):
            top = max(top, abs(table[k]))
        for b in range(scale.shape[1]):
            begin = b * block_size
            n = min(block_size, in_features - begin)
            block = _block(weight[r], begin, n, padded_block)
            counts = _block(importance, begin, n, padded_counts)
            low, high = _range(block, n)
            base = max(high, -low) / top
            if base < _TINY:
                scale[r, b] = base
                continue
            best = base
            best_score = np.float32(np.inf)
            for f in range(factors.shape[0]):
                num, den, error = _moments(width, block, counts, n, base * factors[f], table, border)
                score = factors[f] * factors[f] * (error - num / den * num)
                if den > 0 and score < best_score:
                    best_score = score
                    best = base * factors[f] * (np.float32(1) + num / den)
            for _ in range(refine):
                if best == 0:
                    break
                num, den, error = _moments(width, block, counts, n, best, table, border)
                if den > 0:
                    best *= np.float32(1) + num / den
            scale[r, b] = best


@numba.njit(inline="always")
def _line(width, block, counts, n, slope, offset, table, border, levels, total, mean):
    """Least squares of the block on (levels, 1): slope, intercept, explained energy about the mean."""
    inverse, shift = spread16(np.float32(1) / slope), spread16(offset)
    first = spread16(np.float32(0))
    for i in range(0, n, 16):
        q = levels16(width, table, nearest16(width, border, multiply16(subtract16(load16(block, i), shift), inverse)))
        store16(levels, i, q)
        first = multiply_add16(q, load16(counts, i), first)
    middle = sum16(first) / total
    num = spread16(np.float32(0))
    den = num
    for i in range(0, n, 16):
        d = subtract16(load16(levels, i), spread16(middle))
        weighted = multiply16(d, load16(counts, i))
        num = multiply_add16(subtract16(load16(block, i), spread16(mean)), weighted, num)
        den = multiply_add16(d, weighted, den)
    above, below = sum16(num), sum16(den)
    if below <= 0:
        return np.float32(0), mean, np.float32(0)
    found = above / below
    return found, mean - found * middle, above * found


@numba.njit(inline="always")
def _constant(value, step):
    """Scale and zero of a block that is one number."""
    return abs(value) / step, np.float32(1) if value > 0 else np.float32(-1) if value < 0 else np.float32(0)


@numba.njit(**_OPTIONS)
def search_affine_rows(
    first, last, width, weight, importance, tables, borders, factors, refine, block_size, scale, zero
):
    """scale, zero[r, b] <- the best range ``mid ± factor * half_range``, each refitted by least squares.

    The codebook starts at 0. A constant block is exact with code 0: scale |c|, zero ±1.
    """
    in_features = weight.shape[1]
    levels = np.empty(block_size, np.float32)
    padded_block, padded_counts = np.empty(block_size, np.float32), np.empty(block_size, np.float32)
    for r in range(first, last):
        table, border = row_of(tables, r), row_of(borders, r)
        span = table[(1 << len(width)) - 1] - table[0]
        for b in range(scale.shape[1]):
            begin = b * block_size
            n = min(block_size, in_features - begin)
            block = _block(weight[r], begin, n, padded_block)
            counts = _block(importance, begin, n, padded_counts)
            low, high = _range(block, n)
            if high == low:
                scale[r, b], zero[r, b] = _constant(low, table[1])
                continue
            sum_counts = spread16(np.float32(0))
            sum_block = sum_counts
            for i in range(0, n, 16):
                h = load16(counts, i)
                sum_counts = add16(sum_counts, h)
                sum_block = multiply_add16(load16(block, i), h, sum_block)
            total = sum16(sum_counts)
            mean = sum16(sum_block) / total
            middle = (high + low) * np.float32(0.5)
            best_slope = np.float32(0)
            best_offset = middle
            best_score = np.float32(-1)
            for f in range(factors.shape[0]):
                slope = (high - low) * factors[f] / span
                offset = middle - slope * (table[0] + span * np.float32(0.5))
                s, o, score = _line(width, block, counts, n, slope, offset, table, border, levels, total, mean)
                if s > 0 and score > best_score:
                    best_score = score
                    best_slope = s
                    best_offset = o
            for _ in range(refine):
                if best_slope <= 0:
                    break
                s, o, score = _line(
                    width, block, counts, n, best_slope, best_offset, table, border, levels, total, mean
                )
                if s > 0 and score >= best_score:
                    best_score = score
                    best_slope = s
                    best_offset = o
            if best_slope == 0:  # its numbers are too close together for float32 to tell their levels apart
                scale[r, b], zero[r, b] = _constant(middle, table[1])
                continue
            scale[r, b] = best_slope
            zero[r, b] = best_offset / (best_slope * table[1])


@numba.njit(**_OPTIONS)
def encode_rows(first, last, width, weight, scale, zero, tables, borders, block_size, codes):
    """codes[r, i] <- index of the level nearest to weight[r, i] under the stored scale; to 0 where the scale is 0."""
    in_features = weight.shape[1]
    has_zero = zero.shape[0] > 0
    padded, found = np.empty(block_size, np.float32), np.empty(block_size, np.uint8)
    for r in range(first, last):
        table, border = row_of(tables, r), row_of(borders, r)
        middle = np.argmin(np.abs(table[: 1 << len(width)]))
        for b in range(scale.shape[1]):
            begin = b * block_size
            n = min(block_size, in_features - begin)
            s = scale[r, b]
            if s == 0:
                codes[r, begin : begin + n] = middle
                continue
            shift = spread16(zero[r, b] * table[1] if has_zero else np.float32(0))
            block = _block(weight[r], begin, n, padded)
            whole = n % 16 == 0
            target = codes[r, begin : begin + n] if whole else found
            # division, not multiplication by the reciprocal: it overflows for denormal scales
            for i in range(0, n, 16):
                x = subtract16(divide16(load16(block, i), spread16(s)), shift)
                store_codes16(target, i, nearest16(width, border, x))
            if not whole:
                codes[r, begin : begin + n] = found[:n]


@numba.njit(**_OPTIONS)
def level_moments_rows(first, last, weight, importance, scale, codes, block_size, slab, num, den):
    """Per slab of ``slab`` rows: num[k] = sum of h*scale*w, den[k] = sum of h*scale^2 over the elements with code k."""
    in_features = weight.shape[1]
    for g in range(first, last):
        for r in range(g * slab, min((g + 1) * slab, weight.shape[0])):
            for b in range(scale.shape[1]):
                begin = b * block_size
                s = np.float64(scale[r, b])
                for i in range(begin, min(begin + block_size, in_features)):
                    k = codes[r, i]
                    weighted = s * np.float64(importance[i])
                    num[g, k] += weighted * np.float64(weight[r, i])
                    den[g, k] += weighted * s
