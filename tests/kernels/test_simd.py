"""Vectors of sixteen: every way of looking up levels gives what indexing gives."""

from __future__ import annotations

import os
import subprocess
import sys

import numba
import numpy as np
import pytest

from loftq.kernels import simd, simd_levels

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
