"""Statistics of inputs for the weights of a real layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from loftq.solver.importance import InputStatistics

_TOKENS = 1700  # more than the FFN's 1536 columns


def statistics_of(inputs: Tensor, clean: Tensor | None = None) -> InputStatistics:
    """Of inputs (tokens, in); ``clean`` are the full-precision model's."""
    x = inputs.double()
    drift = None if clean is None else ((clean.double() - x).T @ x / len(x)).float()
    return InputStatistics((x.T @ x / len(x)).float(), mean_abs=x.abs().mean(0).float(), tokens=len(x), drift=drift)


def with_fisher(statistics: InputStatistics, rows: int) -> InputStatistics:
    """The same inputs, and made-up gradients of a layer."""
    return statistics.of_layer(
        fisher_rows=0.1 + torch.rand(rows, generator=torch.Generator().manual_seed(rows)),
        fisher_columns=0.2 * statistics.diagonal.sqrt() + 0.01,
    )


@pytest.fixture(scope="session")
def minilm_inputs(minilm_dir: Path, minilm_layer2: dict[str, Tensor]) -> dict[str, Tensor]:
    """(tokens, in) inputs of the six weights: normalised word embeddings sent through the layer, without attention."""
    with safe_open(minilm_dir / "model.safetensors", "pt") as checkpoint:
        (name,) = [n for n in checkpoint.keys() if n.endswith("word_embeddings.weight")]  # noqa: SIM118 - not a dict
        words = checkpoint.get_tensor(name)[1000 : 1000 + 16 * _TOKENS : 16].float()
    x = torch.nn.functional.layer_norm(words, words.shape[1:])
    inputs = dict.fromkeys(minilm_layer2, x)
    inputs["attention.output.dense"] = x @ minilm_layer2["attention.self.value"].T
    inputs["output.dense"] = torch.nn.functional.gelu(0.3 * x @ minilm_layer2["intermediate.dense"].T)
    return inputs


@pytest.fixture(scope="session")
def minilm_statistics(minilm_layer2: dict[str, Tensor], minilm_inputs: dict[str, Tensor]) -> dict[str, InputStatistics]:
    """Their statistics, layers with the same input sharing one object."""
    shared = {id(x): statistics_of(x) for x in minilm_inputs.values()}
    return {name: with_fisher(shared[id(x)], len(minilm_layer2[name])) for name, x in minilm_inputs.items()}


@pytest.fixture(scope="session")
def minilm_drifted(
    minilm_layer2: dict[str, Tensor], minilm_inputs: dict[str, Tensor]
) -> dict[str, tuple[Tensor, InputStatistics]]:
    """Inputs as they are behind layers whose errors depend on what they got, and their statistics with the drift."""
    shared = {}
    for clean in minilm_inputs.values():
        if id(clean) in shared:
            continue
        generator = torch.Generator().manual_seed(7)
        n = clean.shape[1]
        mixing = torch.randn(n, n, generator=generator) * (0.15 / n**0.5)
        inputs = 0.95 * clean + clean @ mixing + 0.1 * clean.std() * torch.randn(clean.shape, generator=generator)
        shared[id(clean)] = inputs, statistics_of(inputs, clean)
    return {name: shared[id(clean)] for name, clean in minilm_inputs.items()}
