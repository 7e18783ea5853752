"""Compiled CPU loops for products of many rows with a packed matrix, of which a piece at a time is written out.

Arguments as in :mod:`loftq.kernels.cpu_unpack`. A piece has ``STRIP`` rows and ``PIECE`` columns for x Wᵀ, ``PIECE`` rows and
``STRIP`` columns for the gradient; it stays in the first caches until every group of tokens is multiplied with it. The sums
over pieces are added in the order of the pieces, whatever the number of threads.

``x`` is flat: one group of tokens after the other, of each ``[k, t]`` with the features k that are summed over and tokens t,
16 · VECTORS of them and at the end 16; tokens are filled up to a multiple of 16 with zeros. So is ``out``: ``[feature, t]``,
features filled up to a multiple of ``HEIGHT``. With ``share`` = (0,) the numbers of x are float32; with (0, 0) they are
int32, two bfloat16 that follow each other along k.
"""

import numba
import numpy as np

from loftq.kernels.cpu_unpack import OPTIONS, code_at
from loftq.kernels.simd import add16, load16, multiply16, prefetch, scale_at, spread16, store16
from loftq.kernels.simd_levels import codes16, levels16, row_of
from loftq.kernels.simd_tiles import HEIGHT, HEIGHTS, MANY, ONE, VECTORS, multiply_tile, store_pairs16, transpose16

STRIP, PIECE = 64, 256
_AHEAD = 8  # rows


@numba.njit(inline="always")
def _write_row(width, r, packed, scale, tables, zero, block_size, begin, end, target, at):
    """Columns ``begin`` to ``end`` of row r, both multiples of 16, to ``target[at:]``."""
    table = row_of(tables, r)
    row = packed[r]
    ahead = packed[min(r + _AHEAD, packed.shape[0] - 1)]
    for byte in range(begin * len(width) // 8, end * len(width) // 8, 64):
        prefetch(ahead, byte)
    b = begin // block_size
    i = begin
    while i < end:
        stop = min((b + 1) * block_size, end)
        s = spread16(scale_at(scale, r, b))
        z = spread16(scale_at(zero, r, b) * table[1] if zero.shape[0] > 0 else np.float32(0))
        for k in range(i, stop, 16):
            value = levels16(width, table, codes16(width, row, k))
            if zero.shape[0] > 0:
                value = add16(value, z)
            store16(target, at + k - begin, multiply16(value, s))
        i = stop
        b += 1


@numba.njit(**OPTIONS)
def _write_rest(width, r, packed, scale, tables, zero, begin, end, target, at):
    """The less than 16 columns from ``begin`` to the end of the row, filled up with zeros to 16.

    Kept out of :func:`_write_row`, which it makes ten times slower at 3 bits where LLVM sees both at once.
    """
    lanes = np.zeros(16, np.float32)
    table = row_of(tables, r)
    b = scale.shape[1] - 1
    z = scale_at(zero, r, b) * table[1] if zero.shape[0] > 0 else np.float32(0)
    for i in range(begin, end):
        lanes[i - begin] = (table[code_at(packed[r], len(width), i)] + z) * scale_at(scale, r, b)
    store16(target, at, load16(lanes, 0))


@numba.njit(inline="always")
def _multiply(piece, features, row, step, x, k, steps, length, tokens, out, feature, padded):
    """Every group of tokens with a piece: ``features`` features from ``feature`` on, ``steps`` numbers from ``k`` on."""
    many = tokens // (16 * VECTORS) * (16 * VECTORS)
    for group in range(0, many, 16 * VECTORS):
        for j in range(0, features, HEIGHT):
            x_at, out_at = group * length + k * 16 * VECTORS, group * padded + (feature + j) * 16 * VECTORS
            multiply_tile(HEIGHTS, MANY, piece, j * row, row, step, x, x_at, steps, out, out_at)
    for group in range(many, tokens, 16):
        for j in range(0, features, HEIGHT):
            x_at, out_at = group * length + k * 16, group * padded + (feature + j) * 16
            multiply_tile(HEIGHTS, ONE, piece, j * row, row, step, x, x_at, steps, out, out_at)


@numba.njit(**OPTIONS)
def product_strips(
    first, last, width, share, packed, scale, tables, zero, block_size, n, x, length, cells, out, padded
):
    """out[r, t] = sum over k of W[r, k] x[k, t] for the rows of the groups of 16 from ``first`` to ``last``.

    ``cells``: an array of the dtype that the values of a piece are written in, float32, or uint16 for bfloat16's bits.
    """
    written = np.empty(STRIP * PIECE, cells.dtype)
    piece = written.view(x.dtype)
    rows, tokens = packed.shape[0], x.shape[0] // length
    pitch = PIECE // len(share)
    for feature in range(first * 16, last * 16, STRIP):
        features = min(feature + STRIP, last * 16, padded) - feature
        for begin in range(0, n, PIECE):
            end = min(begin + PIECE, n)
            whole = end // 16 * 16
            for j in range(features):
                r = min(feature + j, rows - 1)
                _write_row(width, r, packed, scale, tables, zero, block_size, begin, whole, written, j * PIECE)
                if whole < end:
                    _write_rest(width, r, packed, scale, tables, zero, whole, end, written, j * PIECE + whole - begin)
            steps = (end - begin + len(share) - 1) // len(share)
            k = begin // len(share)
            _multiply(piece, features, pitch, 1, x, k, steps, length, tokens, out, feature, padded)


@numba.njit(**OPTIONS)
def grad_strips(first, last, width, share, packed, scale, tables, zero, block_size, n, x, length, cells, out, padded):
    """out[i, t] = sum over the rows r of W[r, i] x[r, t] for the columns of the groups of 16 from ``first`` to ``last``."""
    written = np.empty(STRIP * PIECE, np.float32)
    piece = written.view(x.dtype)
    rows, tokens = packed.shape[0], x.shape[0] // length
    for feature in range(first * 16, last * 16, STRIP):
        features = min(feature + STRIP, last * 16, padded) - feature
        end_column = min(feature + STRIP, last * 16, n)
        whole = end_column // 16 * 16
        for begin in range(0, rows, PIECE):
            end = min(begin + PIECE, rows)
            for r in range(begin, end):
                at = (r - begin) * STRIP
                _write_row(width, r, packed, scale, tables, zero, block_size, feature, whole, written, at)
                if whole < end_column:
                    at += whole - feature
                    _write_rest(width, r, packed, scale, tables, zero, whole, end_column, written, at)
            if len(share) == 2:
                _pair_rows(written, piece, end - begin)
            steps = (end - begin + len(share) - 1) // len(share)
            k = begin // len(share)
            _multiply(piece, features, 1, STRIP, x, k, steps, length, tokens, out, feature, padded)


@numba.njit(inline="always")
def _pair_rows(written, piece, rows):
    """The rows of a piece two and two as bfloat16, in the same memory, which is read before it is written to."""
    if rows % 2 == 1:
        written[rows * STRIP : (rows + 1) * STRIP] = 0
    for pair in range((rows + 1) // 2):
        for i in range(0, STRIP, 16):
            lower = load16(written, 2 * pair * STRIP + i)
            upper = load16(written, (2 * pair + 1) * STRIP + i)
            store_pairs16(piece, pair * STRIP + i, lower, upper)


@numba.njit(inline="always")
def _place(token, tokens, length):
    """Where the sixteen tokens from ``token`` on begin in a flat array, and how far apart their features are."""
    many = (tokens + 15) // 16 // VECTORS * (16 * VECTORS)
    if token < many:
        group = token // (16 * VECTORS) * (16 * VECTORS)
        return group * length + token - group, 16 * VECTORS
    return token * length, 16


@numba.njit(**OPTIONS)
def group_columns(first, last, x, flat):
    """(tokens, k) to the order of the groups, for the k of the sixteens from ``first`` to ``last``."""
    tokens, length = x.shape
    source = x.reshape(-1)
    for token in range(0, tokens, 16):
        at, pitch = _place(token, tokens, length)
        for k in range(first * 16, min(last * 16, length), 16):
            if token + 16 <= tokens and k + 16 <= length:
                transpose16(source, token * length + k, length, flat, at + k * pitch, pitch)
            else:
                for i in range(k, min(k + 16, length)):
                    for t in range(16):
                        inside = token + t < tokens
                        flat[at + i * pitch + t] = x[token + t, i] if inside else flat.dtype.type(0)


@numba.njit(**OPTIONS)
def ungroup_columns(first, last, flat, padded, out):
    """The inverse for sums, rounded to the dtype of ``out`` (tokens, features), see :func:`store16`."""
    tokens, features = out.shape
    square = np.empty(256, np.float32)
    lanes = np.empty(16, out.dtype)
    for token in range(0, tokens, 16):
        at, pitch = _place(token, tokens, padded)
        for feature in range(first * 16, min(last * 16, features), 16):
            if feature + 16 <= padded:
                transpose16(flat, at + feature * pitch, pitch, square, 0, 16)
            else:
                for t in range(16):
                    for i in range(padded - feature):
                        square[t * 16 + i] = flat[at + (feature + i) * pitch + t]
            for t in range(min(16, tokens - token)):
                if feature + 16 <= features:
                    store16(out[token + t], feature, load16(square, t * 16))
                else:
                    store16(lanes, 0, load16(square, t * 16))
                    for i in range(features - feature):
                        out[token + t, feature + i] = lanes[i]
