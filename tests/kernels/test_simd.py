"""Vectors of sixteen: every way of looking up levels gives what indexing gives."""

from __future__ import annotations

import os
import subprocess
import sys

import numba
import numpy as np
import pytest

from loftq.kernels import simd, simd_levels, simd_tiles

BITS = (2, 3, 4)


def ways() -> list[str]:
    """Those that this machine can run."""
    every = ["select", "avx2", "avx512"]
    return every[: every.index(simd_levels.PERMUTATION) + 1]


@pytest.mark.parametrize("way", ways())
@pytest.mark.parametrize("bits", BITS)
def test_levels_by_every_way(bits, way):
    codes, lookup, load16, store16 = simd_levels.codes16, simd_levels.lookup_by(way), simd.load16, simd.store16
    width = simd_levels.WIDTHS[bits]

    @numba.njit
    def levels(row, table, out):
        for i in range(0, out.shape[0], 16):
            store16(out, i, lookup(load16(table, 0), codes(width, row, i)))

    generator = np.random.default_rng(0)
    expected = generator.integers(0, 2**bits, 96)
    stream = sum(int(code) << (bits * i) for i, code in enumerate(expected))
    row = np.frombuffer(stream.to_bytes(96 * bits // 8, "little"), np.uint8)
    table = generator.normal(size=2**bits).astype(np.float32)
    out = np.empty(96, np.float32)
    levels(row, np.tile(table, 16 // 2**bits), out)
    assert np.array_equal(out, table[expected])


@pytest.mark.parametrize("way", ways())
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_nearest_by_every_way(bits, way):
    """The number of borders below, also for numbers on a border, beyond all of them, and between equal ones."""
    nearest, load16, store_codes16 = simd_levels.nearest_by(way), simd.load16, simd_levels.store_codes16
    width = simd_levels.WIDTHS[bits]

    @numba.njit
    def codes(x, borders, out):
        for i in range(0, out.shape[0], 16):
            store_codes16(out, i, nearest(width, borders, load16(x, i)))

    generator = np.random.default_rng(0)
    borders = np.sort(generator.normal(size=2**bits - 1)).astype(np.float32)
    borders[1] = borders[2]
    x = np.concatenate([generator.normal(size=93), borders[:2], [np.inf]]).astype(np.float32)
    out = np.empty(96, np.uint8)
    codes(x, np.pad(borders, (0, max(1, 16 - len(borders))), constant_values=np.inf), out)
    assert np.array_equal(out, (x[:, None] > borders).sum(1))


def test_bfloat16_is_rounded_to_nearest_even():
    load16, store16 = simd.load16, simd.store16

    @numba.njit
    def rounded(values, out):
        store16(out, 0, load16(values, 0))

    halfway = np.float32(1) + np.float32(2.0**-8) * np.arange(16, dtype=np.float32)
    values = np.where(np.arange(16) % 3 == 1, np.nextafter(halfway, np.float32(2)), halfway).astype(np.float32)
    out = np.empty(16, np.uint16)
    rounded(values, out)
    import torch

    expected = torch.from_numpy(values).bfloat16().view(torch.uint16).numpy()
    assert np.array_equal(out, expected)


def test_compiled_loops_are_found_again(tmp_path):
    """A second process compiles nothing: what the first one kept on disk has the same name there."""
    script = (
        "import torch\n"
        "from loftq import QuantLinear, QuantSpec\n"
        "for bits in (2, 3):\n"
        "    layer = QuantLinear.from_linear(torch.nn.Linear(256, 8), QuantSpec(bits))\n"
        "    for tokens in (1, 9):\n"
        "        layer(torch.randn(tokens, 256, requires_grad=True)).sum().backward()\n"
    )
    found = []
    for _ in range(2):
        subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)})
        found.append(sorted(path.name for path in tmp_path.rglob("*.nbc")))
    assert len(found[0]) > 4
    assert found[1] == found[0]


def bfloat16_pairs(x: np.ndarray) -> np.ndarray:
    """(2 k, n) -> (k, n) int32: two rows as bfloat16, the first in the lower half."""
    bits = np.ascontiguousarray(x).view(np.uint32) >> 16
    return (bits[::2] | bits[1::2] << 16).view(np.int32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("height", "vectors"), [(8, 2), (8, 1), (4, 1), (1, 3)])
def test_tile_of_every_shape(height, vectors, dtype):
    """Also those that this machine would not choose; what is there is added to."""
    if dtype == "bfloat16" and not simd_tiles.BFLOAT16:
        pytest.skip("the processor multiplies no bfloat16")
    multiply_tile = simd_tiles.multiply_tile

    @numba.njit
    def multiply(heights, widths, a, x, steps, out):
        multiply_tile(heights, widths, a, 3, steps + 1, 1, x, 5, steps, out, 7)

    generator = np.random.default_rng(0)
    steps = 22
    a, x = generator.normal(size=(height, steps)), generator.normal(size=(steps, 16 * vectors))
    if dtype == "bfloat16":
        a, x = ((each.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32) for each in (a, x))
        stored = np.ascontiguousarray(bfloat16_pairs(a.T).T), bfloat16_pairs(x)
    else:
        a, x = stored = a.astype(np.float32), x.astype(np.float32)
    numbers = stored[0].shape[1]
    flat_a = np.concatenate([np.zeros(3, stored[0].dtype), np.pad(stored[0], ((0, 0), (0, 1))).ravel()])
    flat_x = np.concatenate([np.zeros(5, stored[1].dtype), stored[1].ravel()])
    out = np.ones(7 + height * 16 * vectors, np.float32)
    multiply((0,) * height, (0,) * vectors, flat_a, flat_x, numbers, out)
    assert np.array_equal(out[:7], np.ones(7))
    expected = 1 + a.astype(np.float64) @ x.astype(np.float64)
    np.testing.assert_allclose(out[7:].reshape(height, -1), expected, rtol=1e-5, atol=1e-5)
