"""The packed embedding against a dense one that holds the same table."""

import copy

import pytest
import torch
from torch import nn

from loftq import QuantEmbedding, QuantSpec, WeightError


@pytest.mark.parametrize("spec", [QuantSpec(2), QuantSpec(3), QuantSpec(8), QuantSpec(4, codebook="uniform")], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lookup_equals_dense(spec, dtype):
    source = nn.Embedding(50, 70, padding_idx=3, dtype=dtype)
    packed = QuantEmbedding.from_embedding(source, spec)
    ids = torch.tensor([[0, 3, 49], [7, 7, 1]])
    rows = packed(ids)
    assert rows.dtype == dtype
    assert rows.shape == (2, 3, 70)
    assert torch.equal(rows, packed.dequantize(dtype)[ids])
    assert packed.padding_idx == 3


def test_casting_changes_the_output_only():
    packed = QuantEmbedding.from_embedding(nn.Embedding(50, 64), QuantSpec(4))
    before = packed.dequantize()
    half = copy.deepcopy(packed).to(torch.bfloat16)
    assert half(torch.tensor([1])).dtype == torch.bfloat16
    assert torch.equal(half.dequantize(), before)


def test_other_layers_are_refused():
    with pytest.raises(WeightError, match=r"expected a dense torch\.nn\.Embedding"):
        QuantEmbedding.from_embedding(nn.Linear(4, 4), QuantSpec(4))


@pytest.mark.parametrize("index", [-1, 50])
@pytest.mark.parametrize("codebook", ["lloyd", "lloyd-channel", "uniform"])
def test_an_index_beyond_the_table_is_refused(codebook, index):
    """-1, or -100 as labels have it, is no row counted from the end."""
    source = nn.Embedding(50, 64)
    packed = QuantEmbedding.from_embedding(source, QuantSpec(4, codebook))
    for layer in (source, packed):
        with pytest.raises(IndexError, match="out of range"):
            layer(torch.tensor([3, index]))


def test_indices_of_any_dtype_and_shape():
    packed = QuantEmbedding.from_embedding(nn.Embedding(50, 64), QuantSpec(4, double_quant=True))
    table = packed.dequantize()
    assert torch.equal(packed(torch.tensor([7, 49], dtype=torch.int32)), table[[7, 49]])
    assert torch.equal(packed(torch.tensor(3)), table[3])
    assert packed(torch.empty(2, 0, dtype=torch.long)).shape == (2, 0, 64)
