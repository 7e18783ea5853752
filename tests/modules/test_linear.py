"""The packed linear layer against a dense one that holds the same matrix."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from loftq import QuantLinear, QuantSpec, WeightError
from loftq.codec import storage_layout
from loftq.modules import ops
from torch_defaults import DEFAULTS, torch_default

SPECS = [
    QuantSpec(2),
    QuantSpec(3),
    QuantSpec(4, double_quant=True),
    QuantSpec(8),
    QuantSpec(4, codebook="uniform", block_size=32),
    QuantSpec(2, codebook="nf", scale="absmax", scale_dtype="float32"),
]


def spec_id(spec):
    return f"{spec.codebook}{spec.bits}{'-dq' * spec.double_quant}"


def pair(spec, in_features=200, out_features=48, bias=True):
    """A packed layer and the dense layer that computes the same."""
    torch.manual_seed(0)
    source = nn.Linear(in_features, out_features, bias)
    packed = QuantLinear.from_linear(source, spec)
    dense = copy.deepcopy(source)
    dense.weight.data = packed.dequantize()
    return packed, dense


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_and_backward_equal_dense(spec, dtype):
    packed, dense = pair(spec)
    packed, dense = packed.to(dtype), dense.to(dtype)
    x = torch.randn(3, 5, 200, dtype=dtype)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, z = packed(a), dense(b)
    (y * torch.arange(48)).sum().backward()
    (z * torch.arange(48)).sum().backward()
    # the dense layer adds its bias inside the product: one rounding of the result's size apart
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-7}[dtype]
    assert y.dtype == dtype
    torch.testing.assert_close(y, z, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(a.grad, b.grad, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(packed.bias.grad, dense.bias.grad)


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [(1,), (3, 1), ()], ids=str)
def test_few_tokens_have_one_rounding(spec, dtype, tokens):
    """Sums are float32 and the matrix is not rounded, so that only the result is."""
    packed, _ = pair(spec)
    packed.bias = None
    weight = packed.dequantize().double()
    x = torch.randn(*tokens, 200, dtype=dtype, requires_grad=True)
    y = packed(x)
    grad = torch.randn_like(y)
    y.backward(grad)
    half_ulp = {torch.float32: 2**-24, torch.bfloat16: 2**-8}[dtype]
    for found, factor, matrix in ((y, x.detach(), weight.T), (x.grad, grad, weight)):
        exact = factor.double() @ matrix
        terms = factor.double().abs() @ matrix.abs()
        assert found.dtype == dtype
        assert found.shape == exact.shape
        assert bool(((found.double() - exact).abs() <= half_ulp * exact.abs() + 2e-6 * terms).all())


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)], ids=str)
@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "direct"])
def test_no_tokens(shape, recorded):
    packed, dense = pair(QuantSpec(4))
    x = torch.randn(*shape, 200, requires_grad=recorded)
    with torch.set_grad_enabled(recorded):
        y = packed(x)
        assert y.shape == dense(x).shape
    if recorded:
        y.sum().backward()
        assert x.grad.shape == x.shape


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((2, 199), torch.float32), ((9, 199), torch.float32), ((9, 300), torch.float32), ((9, 200), torch.int64)],
    ids=["few", "narrow", "wide", "integers"],
)
def test_an_input_of_another_kind_is_refused(shape, dtype):
    """199 numbers take as many bytes and blocks as 200, and codes beyond a row are another's."""
    packed, _ = pair(QuantSpec(4))
    with pytest.raises(WeightError, match=r"got an input of shape .*, expected floating-point numbers of shape"):
        packed(torch.ones(shape, dtype=dtype))


@pytest.mark.parametrize("default", DEFAULTS, ids=str)
@pytest.mark.parametrize("codebook", ["lloyd", "uniform"])
def test_defaults_of_torch_do_not_matter(default, codebook):
    """Loops that write vectors into memory of another dtype would write beyond it."""
    source = nn.Linear(200, 48)
    inputs = [torch.randn(tokens, 200, requires_grad=True) for tokens in (2, 9)]

    def results():
        packed = QuantLinear.from_linear(source, QuantSpec(4, codebook))
        found = [packed.dequantize(), packed.quantized.codes()]
        for x in inputs:
            x.grad = None
            y = packed(x)
            y.square().sum().backward()
            found += [y.detach(), x.grad]
        return found

    expected = results()
    with torch_default(default):
        found = results()
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def test_weight_is_the_packed_buffer():
    packed, _ = pair(QuantSpec(2))
    assert isinstance(packed, nn.Linear)
    assert packed.weight.dtype == torch.uint8
    assert packed.weight.shape == (48, 50)
    assert "weight" in dict(packed.named_buffers())
    assert [n for n, _ in packed.named_parameters()] == ["bias"]


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_memory_is_the_packed_size(spec):
    packed, _ = pair(spec, bias=False)
    held = sum(b.numel() * b.element_size() for b in packed.buffers())
    assert held == packed.quantized.nbytes == sum(i.nbytes for i in storage_layout(spec, (48, 200)).values())


def test_backward_keeps_no_dense_copy():
    packed, _ = pair(QuantSpec(2), bias=False)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        packed(torch.randn(4, 200, requires_grad=True))
    assert max(t.numel() * t.element_size() for t in saved) < packed.matrix_shape[0] * packed.matrix_shape[1]


def test_no_gradient_is_computed_for_an_input_that_needs_none():
    packed, _ = pair(QuantSpec(2))
    packed(torch.randn(2, 200)).sum().backward()
    assert packed.bias.grad is not None


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_casting_leaves_the_stored_tensors_alone(spec, cast):
    packed, _ = pair(spec)
    before = {n: b.clone() for n, b in packed.named_buffers()}
    cast_layer = copy.deepcopy(packed).to(cast)
    assert cast_layer.bias.dtype == cast
    for name, buffer in cast_layer.named_buffers():
        assert buffer.dtype == before[name].dtype
        assert torch.equal(buffer, before[name])


def test_half_float_double_methods_leave_them_alone_too():
    packed, _ = pair(QuantSpec(4))
    expected = packed.dequantize()
    assert torch.equal(packed.half().float().double().dequantize(), expected)


def test_device_moves():
    packed, _ = pair(QuantSpec(4))
    assert all(b.device.type == "meta" for b in copy.deepcopy(packed).to("meta").buffers())


def test_deepcopy_and_pickle():
    packed, _ = pair(QuantSpec(3))
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(other.dequantize(), packed.dequantize())
        other.weight.zero_()
        assert packed.weight.any(), "the copy shares memory"


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_state_dict_round_trip(spec):
    packed, _ = pair(spec)
    other = QuantLinear(200, 48, spec=spec)
    other.load_state_dict(packed.state_dict())
    assert torch.equal(other.dequantize(), packed.dequantize())
    assert torch.equal(other.bias, packed.bias)


def test_autocast():
    packed, dense = pair(QuantSpec(4))
    x = torch.randn(4, 200)
    with torch.autocast("cpu", torch.bfloat16):
        assert packed(x).dtype == torch.bfloat16
        torch.testing.assert_close(packed(x), dense(x), rtol=2**-6, atol=2**-6)
    assert packed(x).dtype == torch.float32


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant):
    packed, _ = pair(QuantSpec(2))
    x = torch.randn(4, 200, requires_grad=True)
    packed(x).square().sum().backward()
    expected, x.grad = x.grad.clone(), None
    checkpoint(packed, x, use_reentrant=use_reentrant).square().sum().backward()
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_compile_without_graph_breaks(spec):
    packed, _ = pair(spec)
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 200, requires_grad=True)
    y = compiled(x)
    y.sum().backward()
    torch.testing.assert_close(y, packed(x))
    assert x.grad is not None


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_tracing_is_refused():
    """A trace would keep memory that the kernels fill behind its back."""
    packed, _ = pair(QuantSpec(4))
    with torch.no_grad(), pytest.raises(WeightError, match=r"expected torch\.compile or torch\.export"):
        torch.jit.trace(packed, torch.randn(2, 200))


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_the_backward_pass_keeps_buffers_and_no_copies(spec):
    """Scales in float32 for every layer until its backward pass would take 0.4 GB in a model of 7 billion weights."""
    packed, _ = pair(spec)
    packed.bias.requires_grad_(False)
    saved = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    x = torch.randn(7, 200, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = packed(x)
    own = {buffer.untyped_storage().data_ptr() for buffer in packed.buffers()}
    assert len(saved) == len(packed.packed_names)
    assert [t.dtype for t in saved if t.untyped_storage().data_ptr() not in own] == []
    y.square().sum().backward()  # and they are what it needs
    weight = packed.dequantize().double()
    torch.testing.assert_close(y.double(), x.double() @ weight.T + packed.bias.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), (2 * y.detach()).double() @ weight, rtol=1e-5, atol=1e-5)


def test_operator_registration():
    """torch's own checks: fake kernels, autograd registration, no aliasing."""
    packed, _ = pair(QuantSpec(4))
    x = torch.randn(4, 200, requires_grad=True)
    torch.library.opcheck(torch.ops.loftq.packed_linear.default, (x, *packed._operands()))


def test_conv1d_is_transposed():
    from transformers.pytorch_utils import Conv1D

    source = Conv1D(48, 200)
    packed = QuantLinear.from_linear(source, QuantSpec(8))
    x = torch.randn(2, 200)
    assert (packed.in_features, packed.out_features) == (200, 48)
    torch.testing.assert_close(packed(x), source(x), rtol=0, atol=5e-3)


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(3, 4, 3), nn.Embedding(4, 4), "packed"], ids=["conv", "embedding", "packed"]
)
def test_other_layers_are_refused(layer):
    layer = pair(QuantSpec(2))[0] if layer == "packed" else layer
    with pytest.raises(WeightError, match=r"expected a dense torch\.nn\.Linear"):
        QuantLinear.from_linear(layer, QuantSpec(2))


def test_nan_is_refused():
    source = nn.Linear(8, 8)
    source.weight.data[3, 3] = float("nan")
    with pytest.raises(WeightError, match="1 NaN and 0 infinite"):
        QuantLinear.from_linear(source, QuantSpec(2))


def test_presented_as_int8_and_saved_as_uint8():
    packed, _ = pair(QuantSpec(2))
    expected = packed(torch.ones(1, 200))
    packed.present_as_int8()
    assert packed.weight.dtype == torch.int8
    assert packed.state_dict()["weight"].dtype == torch.uint8
    assert torch.equal(packed(torch.ones(1, 200)), expected)


def test_repr_says_how_it_is_stored():
    assert "bits=2, codebook=lloyd, block_size=64" in repr(pair(QuantSpec(2))[0])


def test_layers_share_memory_but_not_results():
    """One thread's workspace serves layers of different sizes, in inference mode and out of it, forward and backward."""
    small, dense_small = pair(QuantSpec(4), in_features=64, out_features=16)
    large, dense_large = pair(QuantSpec(4), in_features=640, out_features=160)
    x, y = torch.randn(2, 64, requires_grad=True), torch.randn(2, 640, requires_grad=True)
    with torch.inference_mode():
        large(y)
    first, second = small(x), large(y)
    torch.testing.assert_close(first, dense_small(x))
    torch.testing.assert_close(second, dense_large(y))
    (first.sum() + second.sum()).backward()
    torch.testing.assert_close(x.grad, dense_small.weight.sum(0).expand(2, -1))
    torch.testing.assert_close(y.grad, dense_large.weight.sum(0).expand(2, -1))


@pytest.mark.parametrize("codebook", ["lloyd", "lloyd-channel", "uniform"])
@pytest.mark.parametrize(("out_features", "in_features"), [(37, 200), (8, 64), (1, 130)])
def test_tiles_of_any_size_give_the_dense_product(monkeypatch, out_features, in_features, codebook):
    """Rows and columns that no tile divides, the shorter last block, levels of each row's own, zeros: y and the gradient."""
    generator = torch.Generator().manual_seed(0)
    layer = QuantLinear.from_linear(nn.Linear(in_features, out_features), QuantSpec(3, codebook))
    x = torch.randn(2, 9, in_features, generator=generator, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(2, 9, out_features, generator=generator, dtype=torch.float64)
    dense = layer.dequantize().double()
    for tile in (1, 8 * 5 * in_features, 1 << 30):
        monkeypatch.setattr(ops, "TILE_BYTES", tile)
        x.grad = None
        y = layer(x)
        y.backward(grad)
        torch.testing.assert_close(y, x @ dense.T + layer.bias.double(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(x.grad, grad @ dense, rtol=1e-12, atol=1e-12)
        held = ops._memory.held.numel()
        assert ops.workspace_bytes((out_features, in_features), 64, torch.float64) <= held


def test_workspace_is_bounded_by_a_tile():
    """A matrix of any size takes a tile; a row, or a block's columns, where even one of them is larger."""
    assert ops.workspace_bytes((4096, 11008), 64, torch.bfloat16) <= ops.TILE_BYTES
    assert ops.workspace_bytes((100, 30), 64, torch.float32) == 4 * 100 * 30
    assert ops.workspace_bytes((50_000, 64), 64, torch.float32) == 4 * 50_000 * 64


@pytest.mark.parametrize("shape", [(5, 200), (2, 5, 200), (1, 200), (2, 1, 200)], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_the_output_may_be_changed_in_place(shape, bias):
    """As a dense layer's: what an autograd function returns may not, where it is a view."""
    packed, dense = pair(QuantSpec(4), bias=bias)
    x, other = (torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    for layer, leaf in ((packed, x), (dense, other)):
        layer(leaf).mul_(3).square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-4, atol=1e-4)


def test_what_needs_no_gradient_records_none():
    packed, _ = pair(QuantSpec(4), bias=False)
    assert packed(torch.randn(6, 200)).grad_fn is None
    assert packed(torch.randn(6, 200).requires_grad_()).grad_fn is not None
