"""A quantized matrix as tensors: names, exact sizes, state dicts and files."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from loftq.codec import QuantizedTensor, quantize, storage_layout
from loftq.config import BITS, CODEBOOKS, QuantSpec
from loftq.errors import WeightError

SPECS = [
    QuantSpec(bits, codebook, double_quant=double)
    for bits in BITS
    for codebook in CODEBOOKS
    for double in (False, True)
]


def name_of(spec: QuantSpec) -> str:
    return f"{spec.codebook}{spec.bits}" + "-double" * spec.double_quant


every_spec = pytest.mark.parametrize("spec", SPECS, ids=name_of)


@pytest.fixture(scope="module")
def weight() -> torch.Tensor:
    return torch.randn(6, 200, generator=torch.Generator().manual_seed(0))


@every_spec
def test_stores_exactly_the_layout(weight, spec):
    layout = storage_layout(spec, (6, 200))
    stored = {name: (t.dtype, tuple(t.shape)) for name, t in quantize(weight, spec).tensors.items()}
    assert stored == {name: tuple(info) for name, info in layout.items()}
    assert sum(info.nbytes for info in layout.values()) == quantize(weight, spec).nbytes


@pytest.mark.parametrize("n", [1, 2, 64, 65])
@pytest.mark.parametrize("bits", BITS)
def test_packed_codes_never_have_the_dense_shape(bits, n):
    # so that a program which does not know the format cannot take them for weights
    quantized = quantize(torch.ones(3, n), QuantSpec(bits))
    assert quantized.tensors["weight"].shape != (3, n)
    assert quantized.codes().shape == quantized.dequantize().shape == (3, n)


@every_spec
def test_state_dict_round_trip(weight, spec):
    quantized = quantize(weight, spec)
    state = {"other.weight": torch.zeros(3), **quantized.state_dict("model.layer.")}
    again = QuantizedTensor.from_state_dict(state, spec, (6, 200), "model.layer.")
    assert again.tensors.keys() == quantized.tensors.keys()
    assert torch.equal(again.dequantize(), quantized.dequantize())


@every_spec
def test_safetensors_round_trip_is_bitwise(weight, spec, tmp_path):
    quantized = quantize(weight, spec)
    save_file(quantized.state_dict("a."), tmp_path / "q.safetensors")
    again = QuantizedTensor.from_state_dict(load_file(tmp_path / "q.safetensors"), spec, (6, 200), "a.")
    for name, tensor in quantized.tensors.items():
        loaded = again.tensors[name]
        assert loaded.dtype == tensor.dtype
        assert torch.equal(loaded.flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)), name
    assert torch.equal(again.dequantize(), quantized.dequantize())


@pytest.mark.parametrize("scale_dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("block_size", [32, 64, 128, 256])
@pytest.mark.parametrize("bits", BITS)
def test_bits_per_weight_of_whole_blocks(bits, block_size, scale_dtype):
    rows, n = 16, 512
    spec = QuantSpec(bits, "nf", block_size, "absmax", scale_dtype)
    expected = bits + (32 if scale_dtype == "float32" else 16) / block_size + 32 * 2**bits / (rows * n)
    assert quantize(torch.ones(rows, n), spec).bits_per_weight == expected


@pytest.mark.parametrize(
    ("spec", "extra"),
    [
        # per weight: the packed code, per block of 64 a scale (and a zero point), per matrix a float32 codebook
        (QuantSpec(2), 0),
        (QuantSpec(2, "uniform"), 16 / 64),
        # an 8-bit scale instead of 16 bits, a float32 for 256 of them and one a matrix
        (QuantSpec(2, double_quant=True), -8 / 64 + 32 / (64 * 256) + 32 / (256 * 512)),
    ],
    ids=["scale", "scale+zero", "double"],
)
def test_bits_per_weight_of_2_bits(spec, extra):
    expected = 2 + 16 / 64 + 4 * 32 / (256 * 512) + extra
    assert quantize(torch.ones(256, 512), spec).bits_per_weight == expected


def test_bits_per_weight_counts_padding():
    # 3 bits x 5 = 2 bytes a row, one float16 scale a row, 8 float32 levels
    assert quantize(torch.ones(4, 5), QuantSpec(3)).bits_per_weight == 8 * (4 * 2 + 4 * 2 + 8 * 4) / 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dequantize_in_a_dtype_rounds_once(weight, dtype):
    quantized = quantize(weight, QuantSpec())
    assert torch.equal(quantized.dequantize(dtype), quantized.dequantize().to(dtype))


def test_to_device_keeps_everything(weight):
    quantized = quantize(weight, QuantSpec())
    moved = quantized.to("cpu")
    assert torch.equal(moved.dequantize(), quantized.dequantize())
    assert moved.spec == quantized.spec
    assert moved.shape == quantized.shape


def test_all_mismatches_are_reported_at_once(weight):
    tensors = dict(quantize(weight, QuantSpec()).tensors)
    del tensors["weight_codebook"]
    tensors["weight_zero"] = torch.zeros(1)
    tensors["weight_scale"] = tensors["weight_scale"].float()
    with pytest.raises(WeightError) as caught:
        QuantizedTensor(tensors, QuantSpec(), (6, 200))
    message = str(caught.value)
    assert "weight_codebook is missing" in message
    assert "weight_zero is unexpected" in message
    assert "weight_scale is torch.float32 (6, 4), expected torch.float16 (6, 4)" in message


@pytest.mark.parametrize(
    ("spec", "shape"),
    [(QuantSpec(2), (6, 200)), (QuantSpec(block_size=32), (6, 200)), (QuantSpec(), (6, 192)), (QuantSpec(), (5, 200))],
    ids=["bits", "block-size", "columns", "rows"],
)
def test_another_spec_or_shape_is_refused(weight, spec, shape):
    with pytest.raises(WeightError, match="do not form"):
        QuantizedTensor(quantize(weight, QuantSpec()).tensors, spec, shape)


def test_state_dict_without_a_tensor_is_refused(weight):
    state = quantize(weight, QuantSpec()).state_dict("a.")
    with pytest.raises(WeightError, match=r"weight is missing.*weight_codebook is missing.*weight_scale is missing"):
        QuantizedTensor.from_state_dict(state, QuantSpec(), (6, 200), "b.")


@pytest.mark.parametrize(
    "out",
    [torch.empty(5, 69), torch.empty(4, 70), torch.empty(5, 70, dtype=torch.bfloat16), torch.empty(70, 5).T],
    ids=["narrow", "few rows", "dtype", "transposed"],
)
def test_memory_of_another_form_is_refused(out):
    """The loops write where contiguous rows of the right width would be."""
    quantized = quantize(torch.randn(5, 70), QuantSpec(4))
    with pytest.raises(
        WeightError, match=r"out is .*, expected contiguous memory of torch\.float32 and shape \(5, 70\)"
    ):
        quantized.dequantize(out=out)
    memory = torch.empty(5, 70)
    assert quantized.dequantize(out=memory) is memory
    assert torch.equal(memory, quantized.dequantize())
