"""Compiled CPU loops that round a matrix under a full second moment of its inputs: a row at a time, every row alone.

Codebooks and thresholds have a row for each row of the matrix, or one for all.
"""

import numba
import numpy as np

from loftq.kernels.simd_levels import row_of

_OPTIONS = {"nogil": True, "cache": True, "error_model": "numpy", "fastmath": {"contract", "reassoc", "nsz"}}
_WORTHWHILE = np.float32(2.0**-10)  # float16 keeps 11 bits of a scale
_FEW = 15  # up to this many thresholds, counting those exceeded is faster than a binary search


@numba.njit(inline="always")
def _code(x, thresholds):
    """The number of thresholds below x: the code of the nearest level."""
    count = thresholds.shape[0]
    if count <= _FEW:
        code = 0
        for k in range(count):
            code += 1 if x > thresholds[k] else 0
        return code
    low = 0
    high = count
    while low < high:
        middle = (low + high) // 2
        if x > thresholds[middle]:
            low = middle + 1
        else:
            high = middle
    return low


@numba.njit(**_OPTIONS)
def feedback_rows(
    first,
    last,
    work,
    inverse,
    order,
    scale,
    zero,
    codebooks,
    borders,
    block_size,
    begin,
    end,
    codes,
    dense,
    errors,
):
    """See :func:`loftq.kernels.feedback`."""
    has_zero = zero.shape[0] > 0
    for r in range(first, last):
        codebook, thresholds = row_of(codebooks, r), row_of(borders, r)
        middle = np.argmin(np.abs(codebook))
        for j in range(begin, end):
            i = order[j]
            b = i // block_size
            s = scale[r, b]
            z = zero[r, b] * codebook[1] if has_zero else np.float32(0)
            w = work[r, j]
            code = middle if s == 0 else _code(w / s - z, thresholds)
            value = s * (codebook[code] + z)
            codes[r, i] = code
            dense[r, i] = value
            error = (w - value) / inverse[j, j]
            errors[r, j - begin] = error
            for k in range(j + 1, end):
                work[r, k] -= error * inverse[j, k]


@numba.njit(inline="always")
def _descend_row(
    r, g, hessian, scale, zero, codebook, thresholds, block_size, codes, dense, sweeps, refit, has_zero, levels
):
    n = g.shape[0]
    for _ in range(sweeps):
        for b in range(scale.shape[1]):
            begin = b * block_size
            end = min(begin + block_size, n)
            s = scale[r, b]
            if s == 0:
                continue
            z = zero[r, b] * codebook[1] if has_zero else np.float32(0)
            for j in range(begin, end):
                wanted = dense[r, j] + g[j] / hessian[j, j]
                code = _code(wanted / s - z, thresholds)
                if code != codes[r, j]:
                    value = s * (codebook[code] + z)
                    step = value - dense[r, j]
                    codes[r, j] = code
                    dense[r, j] = value
                    for k in range(n):
                        g[k] -= step * hessian[j, k]
            if refit:
                num = np.float32(0)
                den = np.float32(0)
                for j in range(begin, end):
                    levels[j - begin] = codebook[codes[r, j]] + z
                    num += levels[j - begin] * g[j]
                for j in range(begin, end):
                    product = np.float32(0)
                    for k in range(begin, end):
                        product += hessian[j, k] * levels[k - begin]
                    den += product * levels[j - begin]
                # a change below the resolution of a stored scale is not worth the pass over the gradient
                if den > 0 and abs(num) > _WORTHWHILE * abs(s) * den:
                    change = num / den
                    scale[r, b] = s + change
                    for j in range(begin, end):
                        step = change * levels[j - begin]
                        dense[r, j] += step
                        for k in range(n):
                            g[k] -= step * hessian[j, k]


@numba.njit(**_OPTIONS)
def descend_rows(
    first, last, gradient, hessian, scale, zero, codebooks, borders, block_size, codes, dense, sweeps, refit
):
    """See :func:`loftq.kernels.descend`."""
    has_zero = zero.shape[0] > 0
    levels = np.empty(block_size, np.float32)
    for r in range(first, last):
        _descend_row(
            r,
            gradient[r],
            hessian,
            scale,
            zero,
            row_of(codebooks, r),
            row_of(borders, r),
            block_size,
            codes,
            dense,
            sweeps,
            refit,
            has_zero,
            levels,
        )


@numba.njit(**_OPTIONS)
def descend_coupled(
    first,
    last,
    gradient,
    coupling,
    product,
    hessian,
    scale,
    zero,
    codebooks,
    borders,
    block_size,
    codes,
    dense,
    refit,
):
    """See :func:`loftq.kernels.descend_coupled`: rows from first to last one after the other."""
    has_zero = zero.shape[0] > 0
    levels = np.empty(block_size, np.float32)
    n = hessian.shape[0]
    for r in range(first, last):
        g = gradient[r - first]
        before = g.copy()
        codebook, thresholds = row_of(codebooks, r), row_of(borders, r)
        _descend_row(
            r, g, hessian, scale, zero, codebook, thresholds, block_size, codes, dense, 1, refit, has_zero, levels
        )
        for k in range(n):
            before[k] = g[k] - before[k]
            product[r, k] += before[k]
        for later in range(r + 1, last):
            share = coupling[later, r] / coupling[later, later]
            row = gradient[later - first]
            for k in range(n):
                row[k] += share * before[k]
