"""Packed codes: the documented bit layout, exact sizes and round trips."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loftq import kernels
from loftq.codec.packing import pack, packed_row_bytes, unpack
from loftq.config import BITS
from loftq.errors import ConfigError, WeightError

RAGGED = [1, 2, 3, 4, 5, 7, 8, 9, 31, 64, 65, 200]


def random_codes(rows: int, n: int, bits: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (rows, n), generator=generator, dtype=torch.uint8)


def bit_stream(codes: list[int], bits: int) -> list[int]:
    """Bytes of one row written one bit at a time: bit j of code i is bit ``i * bits + j`` of the stream."""
    stream = [(code >> j) & 1 for code in codes for j in range(bits)]
    stream += [0] * (-len(stream) % 8)
    return [sum(bit << j for j, bit in enumerate(stream[at : at + 8])) for at in range(0, len(stream), 8)]


@st.composite
def codes_and_bits(draw):
    bits = draw(st.sampled_from(BITS))
    rows, n = draw(st.integers(1, 4)), draw(st.integers(1, 90))
    rows_of_codes = st.lists(st.integers(0, 2**bits - 1), min_size=n, max_size=n)
    codes = draw(st.lists(rows_of_codes, min_size=rows, max_size=rows))
    return torch.tensor(codes, dtype=torch.uint8), bits


@given(codes_and_bits())
def test_round_trip(case):
    codes, bits = case
    assert torch.equal(unpack(pack(codes, bits), bits, codes.shape[1]), codes)


@given(codes_and_bits())
def test_layout_is_the_documented_bit_stream(case):
    codes, bits = case
    assert pack(codes, bits).tolist() == [bit_stream(row, bits) for row in codes.tolist()]


@given(codes_and_bits())
def test_compiled_equals_reference(case):
    codes, bits = case
    packed = pack(codes, bits)
    assert torch.equal(packed, kernels.reference.pack(codes, bits))
    assert torch.equal(unpack(packed, bits, codes.shape[1]), kernels.reference.unpack(packed, bits, codes.shape[1]))


@pytest.mark.parametrize("n", RAGGED)
@pytest.mark.parametrize("bits", BITS)
def test_rows_take_the_fewest_bytes(bits, n):
    packed = pack(random_codes(3, n, bits), bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (3, packed_row_bytes(n, bits))
    assert 0 <= 8 * packed.shape[1] - n * bits < 8


@pytest.mark.parametrize("bits", BITS)
def test_large_matrix_split_over_threads(bits):
    codes = random_codes(300, 501, bits)
    packed = pack(codes, bits)
    assert torch.equal(packed, kernels.reference.pack(codes, bits))
    assert torch.equal(unpack(packed, bits, 501), codes)


@pytest.mark.parametrize("bits", BITS)
def test_transposed_codes(bits):
    codes = random_codes(5, 17, bits).T
    assert torch.equal(unpack(pack(codes, bits), bits, 5), codes)


def test_first_code_is_in_the_lowest_bits():
    codes = torch.tensor([[1, 2, 3, 0]], dtype=torch.uint8)
    assert pack(codes, 2).tolist() == [[0b00_11_10_01]]
    assert pack(codes, 4).tolist() == [[0x21, 0x03]]
    assert pack(codes, 8).tolist() == [[1, 2, 3, 0]]
    assert pack(torch.tensor([[7, 0, 5]], dtype=torch.uint8), 3).tolist() == [[0b01_000_111, 0b1]]


@pytest.mark.parametrize("bits", [0, 1, 5, 16, True, "4"])
def test_unknown_width_is_refused(bits):
    with pytest.raises(ConfigError, match=r"bits is .*expected one of 2, 3, 4, 8"):
        pack(random_codes(1, 8, 2), bits)
    with pytest.raises(ConfigError, match=r"bits is .*expected one of 2, 3, 4, 8"):
        unpack(random_codes(1, 8, 2), bits, 8)


@pytest.mark.parametrize(
    "codes",
    [torch.zeros(2, 8, dtype=torch.int64), torch.zeros(2, 8), torch.zeros(8, dtype=torch.uint8)],
    ids=["int64", "float32", "1-d"],
)
def test_codes_must_be_a_uint8_matrix(codes):
    with pytest.raises(WeightError, match=r"codes are torch\..*expected uint8 of shape \(rows, n\)"):
        pack(codes, 4)


@pytest.mark.parametrize(
    "packed",
    [
        torch.zeros(2, 3, dtype=torch.uint8),
        torch.zeros(2, 5, dtype=torch.uint8),
        torch.zeros(2, 4, dtype=torch.int8),
        torch.zeros(4, dtype=torch.uint8),
    ],
    ids=["too-short", "too-long", "int8", "1-d"],
)
def test_bytes_must_hold_exactly_the_codes(packed):
    with pytest.raises(WeightError, match=r"expected uint8 with 4 bytes a row for 8 codes of 4 bits"):
        unpack(packed, 4, 8)
