"""Double quantization of scales against bitsandbytes' nested statistics."""

from __future__ import annotations

import pytest
import torch

from loftq.codec import quantize
from loftq.codec.codebook import dynamic_map
from loftq.codec.scales import GROUP, double_dequantize, double_quantize
from loftq.config import PUBLISHED, QuantSpec


def random_scales(rows: int, blocks: int) -> torch.Tensor:
    return torch.rand(rows, blocks, generator=torch.Generator().manual_seed(0)) + 0.5


@pytest.mark.parametrize("shape", [(1, 1), (1, 255), (16, 16), (1, 257), (7, 100)], ids=str)
def test_error_is_at_most_half_a_gap_of_the_map(shape):
    scale = random_scales(*shape)
    codes, absmax, offset = double_quantize(scale)
    assert codes.dtype == torch.uint8
    assert codes.shape == shape
    assert absmax.shape == (-(-scale.numel() // GROUP),)
    difference = (double_dequantize(codes, absmax, offset) - scale).abs().flatten()
    limit = absmax.repeat_interleave(GROUP)[: scale.numel()] * dynamic_map().diff().max() / 2 + 2**-22
    assert bool((difference <= limit).all()), f"largest excess {(difference - limit).max():.2e}"


@pytest.mark.parametrize("value", [0.0, 1.5])
def test_equal_scales_are_exact(value):
    scale = torch.full((3, 100), value)
    assert torch.equal(double_dequantize(*double_quantize(scale)), scale)


@pytest.mark.parametrize("name", ["attention.self.query", "attention.output.dense", "output.dense"])
def test_equals_bitsandbytes_nested_statistics(bnb, minilm_layer2, name):
    weight = minilm_layer2[name]
    _, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    tensors = quantize(weight, QuantSpec(4, **PUBLISHED, double_quant=True)).tensors

    # a mean of thousands of float32 numbers, summed in another order
    offset, expected = float(tensors["weight_scale_offset"]), float(state.offset)
    assert offset == pytest.approx(expected, rel=1e-6)
    # differences from that mean
    torch.testing.assert_close(tensors["weight_scale_absmax"], state.state2.absmax, rtol=0, atol=1e-6 * expected)
    # bitsandbytes' search for the nearest level is approximate: a few codes are its neighbour, which is farther away
    ours, theirs = tensors["weight_scale"].flatten().long(), state.absmax.flatten().long()
    different = (ours != theirs).nonzero().flatten()
    assert len(different) < 0.005 * len(ours), f"{len(different)} of {len(ours)} codes differ"
    assert bool(((ours - theirs).abs() <= 1).all())
    scale = quantize(weight, QuantSpec(4, **PUBLISHED)).scale().flatten()
    normalised = (scale - offset) / tensors["weight_scale_absmax"].repeat_interleave(GROUP)[: len(ours)]
    our_distance, their_distance = ((dynamic_map()[c] - normalised).abs()[different] for c in (ours, theirs))
    assert bool((our_distance <= their_distance + 2**-22).all())


def test_values_equal_bitsandbytes(bnb, minilm_layer2):
    weight = minilm_layer2["attention.self.query"]
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    theirs = bnb.dequantize_4bit(packed, state)
    quantized = quantize(weight, QuantSpec(4, **PUBLISHED, double_quant=True))
    # bitsandbytes codes weights under exact scales, this project under the stored ones: compare the errors
    ours, bnbs = ((weight - w).double().norm().item() for w in (quantized.dequantize(), theirs))
    assert ours <= bnbs, f"error {ours:.5f}, bitsandbytes {bnbs:.5f}"
    assert ours == pytest.approx(bnbs, rel=0.01)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_costs_little_error(minilm_layer2, bits):
    weight = minilm_layer2["intermediate.dense"]
    spec = QuantSpec(bits, **PUBLISHED)
    plain, double = (
        float((weight - quantize(weight, s).dequantize()).norm() / weight.norm())
        for s in (spec, spec.replace(double_quant=True))
    )
    # the scale's 8 bits err by a few per cent of its deviation, a small part of the weight's own quantization error
    assert double <= 1.005 * plain, f"{double:.5f} against {plain:.5f} with float32 scales"
