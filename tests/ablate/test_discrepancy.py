"""Norms of the discrepancy against float64 LAPACK, and the names of modules' kinds."""

import numpy as np
import pytest
import torch

from loftq.ablate.discrepancy import _EXACT, module_kind, spectral_norm

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("shape", [(1, 1), (3, 700), (256, 300), (257, 300), (576, 1536), (700, 400)])
@pytest.mark.parametrize("kind", ["noise", "decaying", "tiny", "huge"])
def test_spectral_norm(shape, kind):
    generator = torch.Generator().manual_seed(sum(shape))
    matrix = torch.randn(shape, generator=generator)
    if kind == "decaying":
        matrix = matrix * 0.97 ** torch.arange(shape[1])
    matrix = matrix * {"tiny": 1e-30, "huge": 1e30}.get(kind, 1.0)
    exact = np.linalg.norm(matrix.double().numpy(), 2)
    # float32 products of n terms: n eps in the worst case, sqrt(n) eps in fact; Lanczos adds half its tolerance, 5e-7
    assert spectral_norm(matrix) == pytest.approx(exact, rel=2e-6)


@pytest.mark.parametrize("size", [8, _EXACT + 1])
def test_zero_and_rank_one(size):
    assert spectral_norm(torch.zeros(size, size)) == 0
    one = torch.ones(size, size)
    assert spectral_norm(one) == pytest.approx(size, rel=1e-6)
    identity = torch.eye(size)
    assert spectral_norm(identity) == pytest.approx(1, rel=1e-6)


def test_the_same_every_time():
    matrix = torch.randn(300, 400, generator=torch.Generator().manual_seed(1))
    assert spectral_norm(matrix) == spectral_norm(matrix.clone())


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.11.mlp.down_proj", "mlp.down_proj"),
        ("encoder.layer.0.attention.output.dense", "attention.output.dense"),
        ("model.layers.1.mlp.experts.7.w1", "mlp.experts.*.w1"),
        ("pooler.dense", "pooler.dense"),
        ("transformer.h.3.attn.c_attn", "attn.c_attn"),
    ],
)
def test_module_kind(name, kind):
    assert module_kind(name) == kind
