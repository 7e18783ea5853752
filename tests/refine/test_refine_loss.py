"""The chunked distillation loss and the layers against plain float64 autograd."""

from __future__ import annotations

import pytest
import torch

from loftq.codec import quantize
from loftq.config import QuantSpec
from loftq.modules import QuantLinear
from loftq.refine.layers import AdaptedLinear, FrozenMatrix
from loftq.refine.loss import Head, distillation

N, WIDTH, VOCABULARY = 37, 24, 101


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("chunk", [1, 16, 37, 1000])
@pytest.mark.parametrize("shared", [True, False], ids=["one head", "two heads"])
@pytest.mark.parametrize(("kl", "ce"), [(1.0, 0.0), (0.0, 0.5), (0.7, 0.3)])
def test_loss_and_gradient_equal_autograd(chunk, shared, kl, ce):
    h, g = random(N, WIDTH, seed=0), random(N, WIDTH, seed=1)
    weight, bias = random(VOCABULARY, WIDTH, seed=2), random(VOCABULARY, seed=3)
    other = weight if shared else weight + 0.1 * random(VOCABULARY, WIDTH, seed=4)
    targets = torch.randint(0, VOCABULARY, (N,), generator=torch.Generator().manual_seed(5))
    targets[::5] = -1

    student = g.clone().requires_grad_(True)
    log_p = torch.log_softmax(0.7 * (h @ weight.T + bias), 1)
    log_q = torch.log_softmax(0.7 * (student @ other.T + bias), 1)
    expected_kl = (log_p.exp() * (log_p - log_q)).sum(1).mean()
    expected_ce = -log_q[targets >= 0].gather(1, targets[targets >= 0, None]).mean()
    expected = kl * expected_kl + ce * expected_ce
    expected.backward()

    full = Head(weight.float(), bias.float(), 0.7)
    own = full if shared else Head(other.float(), bias.float(), 0.7)
    actual = g.float().requires_grad_(True)
    loss, parts = distillation(actual, h.float(), own, full, targets, kl=kl, ce=ce, chunk=chunk)
    (3 * loss).backward()
    # float32 logits of size 10 have errors of 1e-6, and so have the probabilities relative to their size
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert parts["kl"] == pytest.approx(float(expected_kl), rel=1e-5)
    assert parts["ce"] == pytest.approx(float(expected_ce), rel=1e-5)
    worst = float((actual.grad.double() - 3 * student.grad).abs().max() / student.grad.abs().max())
    assert worst < 3e-5, f"{worst:.1e}"


def test_equal_models_have_no_divergence_even_in_bfloat16():
    h, weight = random(N, WIDTH, seed=0).bfloat16(), random(VOCABULARY, WIDTH, seed=2).bfloat16()
    head = Head(weight)
    student = h.clone().requires_grad_(True)
    loss, _ = distillation(student, h, head, head)
    loss.backward()
    assert float(loss) == 0
    assert not student.grad.any()


def adapted(spec: QuantSpec, dense: bool, columns: int = 100, scaling: float = 0.5) -> AdaptedLinear:
    weight = random(12, columns, seed=6).float()
    packed = QuantLinear.from_quantized(quantize(weight, spec), random(12, seed=7).float())
    frozen = FrozenMatrix(packed, torch.float32, dense)
    return AdaptedLinear(
        frozen, random(3, columns, seed=8).float(), random(12, 3, seed=9).float(), scaling, packed.bias
    )


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "packed"])
@pytest.mark.parametrize("codebook", ["lloyd", "uniform"])
@pytest.mark.parametrize("scales", [True, False], ids=["scales", "adapters"])
def test_layer_and_its_gradients_equal_autograd(dense, codebook, scales):
    layer = adapted(QuantSpec(bits=2, codebook=codebook, block_size=64), dense)
    factor = torch.ones(12, 2, dtype=torch.float64)
    if scales:
        layer.train_scales()
        with torch.no_grad():
            layer.factor.copy_(1 + 0.1 * random(12, 2, seed=10).float())
        factor = layer.factor.detach().double()
    factor.requires_grad_(True)
    x = random(2, 5, 100, seed=11)
    a, b = (p.detach().double().requires_grad_(True) for p in (layer.lora_A, layer.lora_B))
    reference = x.clone().requires_grad_(True)
    q = layer.frozen.exact(None).double() * factor.repeat_interleave(64, 1)[:, :100]
    expected = reference @ (q + 0.5 * b @ a).T + layer.bias.double()
    (expected * random(2, 5, 12, seed=12)).sum().backward()

    inputs = x.float().requires_grad_(True)
    y = layer(inputs)
    (y * random(2, 5, 12, seed=12).float()).sum().backward()
    pairs = [(y, expected), (inputs.grad, reference.grad), (layer.lora_A.grad, a.grad), (layer.lora_B.grad, b.grad)]
    if scales:
        pairs.append((layer.factor.grad, factor.grad))
    for actual, wanted in pairs:
        worst = float((actual.detach().double() - wanted.detach()).abs().max() / wanted.detach().abs().max())
        assert worst < 1e-5, f"{worst:.1e}"


def test_rounded_factors_are_what_is_stored():
    layer = adapted(QuantSpec(bits=2), dense=True)
    layer.train_scales()
    with torch.no_grad():
        layer.factor.copy_(1 + 0.3 * random(12, 2, seed=10).float())
    factor = layer.frozen.exact_factor(layer.factor)
    stored = layer.frozen.new_scale(layer.factor)
    assert stored.dtype == torch.float16
    assert torch.equal(layer.frozen.new_scale(factor), stored)
    torch.testing.assert_close(layer.frozen.scaled(factor), layer.frozen.exact(layer.factor))
