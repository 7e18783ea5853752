"""Compiled CPU loops that choose codes and scales block by block. Written so that the inner loop over a block's
elements vectorises: the nearest level is found by counting the thresholds an element exceeds, one threshold at a time.

A block w is represented as ``scale * (codebook[codes] + zero * codebook[1])``. For fixed codes the squared error is
quadratic in the scale, so for every candidate scale the loop accumulates ``num = <w, q>`` and ``den = <q, q>``: the best
scale for those codes is ``num / den`` and explains ``num^2 / den`` of the block's energy. The candidate that explains
most wins. With ``importance`` every inner product is weighted by one number per column, what its error counts.

Codebooks and thresholds have a row for each row of the weight, or one for all.
"""

import numba
import numpy as np

_OPTIONS = {"nogil": True, "cache": True, "error_model": "numpy", "fastmath": {"contract", "reassoc", "nsz"}}


@numba.njit(inline="always")
def _levels_of(block, n, inverse, codebook, thresholds, levels):
    """levels[i] = the codebook entry nearest to block[i] * inverse (ties go to the lower entry)."""
    for i in range(n):
        levels[i] = codebook[0]
    for k in range(thresholds.shape[0]):
        t = thresholds[k]
        step = codebook[k + 1] - codebook[k]
        for i in range(n):
            levels[i] += step if block[i] * inverse > t else np.float32(0)


@numba.njit(inline="always")
def _moments(block, n, levels, importance):
    num = np.float32(0)
    den = np.float32(0)
    for i in range(n):
        weighted = levels[i] * importance[i]
        num += block[i] * weighted
        den += levels[i] * weighted
    return num, den


@numba.njit(inline="always")
def _affine_moments(block, n, levels, importance):
    """Least squares of the block on (levels, 1): slope, intercept, explained energy about the mean."""
    sl = np.float32(0)
    sw = np.float32(0)
    total = np.float32(0)
    for i in range(n):
        sl += levels[i] * importance[i]
        sw += block[i] * importance[i]
        total += importance[i]
    ml = sl / total
    mw = sw / total
    num = np.float32(0)
    den = np.float32(0)
    for i in range(n):
        d = levels[i] - ml
        num += (block[i] - mw) * d * importance[i]
        den += d * d * importance[i]
    if den <= 0:
        return np.float32(0), mw, np.float32(0)
    slope = num / den
    return slope, mw - slope * ml, num * slope


@numba.njit(**_OPTIONS)
def search_scale_rows(first, last, weight, importance, codebooks, borders, factors, refine, block_size, scale):
    """scale[r, b] <- the best of ``absmax * factors``, then refitted by least squares ``refine`` times."""
    in_features = weight.shape[1]
    levels = np.empty(block_size, np.float32)
    for r in range(first, last):
        codebook = codebooks[min(r, codebooks.shape[0] - 1)]
        thresholds = borders[min(r, codebooks.shape[0] - 1)]
        top = max(abs(codebook[0]), abs(codebook[codebook.shape[0] - 1]))
        for b in range(scale.shape[1]):
            begin = b * block_size
            n = min(block_size, in_features - begin)
            block = weight[r, begin : begin + n]
            counts = importance[begin : begin + n]
            base = np.float32(0)
            for i in range(n):
                base = max(base, abs(block[i]))
            base /= top
            best = base
            best_score = np.float32(-1)
            if base == 0:
                scale[r, b] = 0
                continue
            for f in range(factors.shape[0]):
                candidate = base * factors[f]
                _levels_of(block, n, np.float32(1) / candidate, codebook, thresholds, levels)
                num, den = _moments(block, n, levels, counts)
                if den > 0 and num * num > best_score * den:
                    best_score = num * num / den
                    best = num / den
            for _ in range(refine):
                if best == 0:
                    break
                _levels_of(block, n, np.float32(1) / best, codebook, thresholds, levels)
                num, den = _moments(block, n, levels, counts)
                if den > 0:
                    best = num / den
            scale[r, b] = best


@numba.njit(**_OPTIONS)
def search_affine_rows(first, last, weight, importance, codebooks, borders, factors, refine, block_size, scale, zero):
    """scale, zero[r, b] <- the best range ``mid ± factor * half_range``, each refitted by least squares.

    The codebook starts at 0. A constant block is exact with code 0: scale |c|, zero ±1.
    """
    in_features = weight.shape[1]
    levels = np.empty(block_size, np.float32)
    shifted = np.empty(block_size, np.float32)
    for r in range(first, last):
        codebook = codebooks[min(r, codebooks.shape[0] - 1)]
        thresholds = borders[min(r, codebooks.shape[0] - 1)]
        span = codebook[codebook.shape[0] - 1] - codebook[0]
        for b in range(scale.shape[1]):
            begin = b * block_size
            n = min(block_size, in_features - begin)
            block = weight[r, begin : begin + n]
            counts = importance[begin : begin + n]
            low = block[0]
            high = block[0]
            for i in range(n):
                low = min(low, block[i])
                high = max(high, block[i])
            if high == low:
                scale[r, b] = abs(low) / codebook[1]
                zero[r, b] = np.float32(1) if low > 0 else np.float32(-1) if low < 0 else np.float32(0)
                continue
            middle = (high + low) * np.float32(0.5)
            best_slope = np.float32(0)
            best_offset = middle
            best_score = np.float32(-1)
            for f in range(factors.shape[0]):
                slope = (high - low) * factors[f] / span
                offset = middle - slope * (codebook[0] + span * np.float32(0.5))
                for i in range(n):
                    shifted[i] = block[i] - offset
                _levels_of(shifted, n, np.float32(1) / slope, codebook, thresholds, levels)
                s, o, score = _affine_moments(block, n, levels, counts)
                if s > 0 and score > best_score:
                    best_score = score
                    best_slope = s
                    best_offset = o
            for _ in range(refine):
                if best_slope <= 0:
                    break
                for i in range(n):
                    shifted[i] = block[i] - best_offset
                _levels_of(shifted, n, np.float32(1) / best_slope, codebook, thresholds, levels)
                s, o, score = _affine_moments(block, n, levels, counts)
                if s > 0 and score >= best_score:
                    best_score = score
                    best_slope = s
                    best_offset = o
            scale[r, b] = best_slope
            zero[r, b] = best_offset / (best_slope * codebook[1])


@numba.njit(**_OPTIONS)
def encode_rows(first, last, weight, scale, zero, codebooks, borders, block_size, codes):
    """codes[r, i] <- index of the level nearest to weight[r, i] under the stored scale (nearest to 0 where the scale is 0)."""
    in_features = weight.shape[1]
    has_zero = zero.shape[0] > 0
    counts = np.empty(block_size, np.int32)
    scaled = np.empty(block_size, np.float32)
    for r in range(first, last):
        codebook = codebooks[min(r, codebooks.shape[0] - 1)]
        thresholds = borders[min(r, codebooks.shape[0] - 1)]
        middle = np.argmin(np.abs(codebook))
        for b in range(scale.shape[1]):
            begin = b * block_size
            n = min(block_size, in_features - begin)
            s = scale[r, b]
            if s == 0:
                for i in range(n):
                    codes[r, begin + i] = middle
                continue
            z = zero[r, b] * codebook[1] if has_zero else np.float32(0)
            # division, not multiplication by the reciprocal: it overflows for denormal scales
            for i in range(n):
                scaled[i] = weight[r, begin + i] / s - z
                counts[i] = 0
            for k in range(thresholds.shape[0]):
                t = thresholds[k]
                for i in range(n):
                    counts[i] += 1 if scaled[i] > t else 0
            for i in range(n):
                codes[r, begin + i] = counts[i]


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
