"""Streamed gradients are those of the whole model in memory, computed here with autograd in float64."""

from __future__ import annotations

import pytest
import torch

import loftq
from loftq.calibrate.backward import StreamedGradients
from loftq.calibrate.text import CalibrationTokens
from loftq.checkpoint.source import open_source
from loftq.modules.linear import is_transposed
from loftq.plan.targets import plan_modules
from tiny import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("spill_bytes", [0, 10**9])
@pytest.mark.parametrize("windows", [None, 2])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2", "opt"])
def test_equals_autograd_on_the_whole_model(name, windows, spill_bytes, tmp_path):
    model = tiny_model(name)
    model.save_pretrained(tmp_path)
    targets = list(plan_modules(model, loftq.LoftQConfig()))
    ids = torch.randint(3, 96, (3, 12), generator=torch.Generator().manual_seed(3))
    mask = torch.arange(12) < torch.tensor([12, 5, 9])[:, None]
    tokens = CalibrationTokens.of(ids, mask, "random")
    with StreamedGradients(
        open_source(tmp_path),
        targets,
        tokens,
        windows=windows,
        fisher=True,
        seed=7,
        dtype=torch.float64,
        batch_tokens=12,
        spill_bytes=spill_bytes,
    ) as backward:
        got = {n: g.statistics() for g in backward.groups() for n in g.names}
    differentiated = {None: [0, 1, 2], 2: [0, 2]}[windows]  # evenly from the first to the last

    model = model.double().requires_grad_(True)
    squares = dict.fromkeys(targets, 0)
    inputs: dict[str, list] = {t: [] for t in targets}
    outputs: dict[str, list] = {t: [] for t in targets}

    def keep(module, args, output, t):
        inputs[t].append(args[0].detach().reshape(-1, args[0].shape[-1]))
        output.register_hook(lambda g: outputs[t].append(g.reshape(-1, g.shape[-1])))

    for t in targets:
        model.get_submodule(t).register_forward_hook(lambda m, a, o, t=t: keep(m, a, o, t))
    for index in range(3):
        model.zero_grad()
        logits = model(input_ids=ids[index][mask[index]][None]).logits[0]
        if index not in differentiated:
            continue
        with torch.no_grad():  # F^½ u for random signs u, with the Fisher information F = diag(p) - p pᵀ of the logits
            p = logits.softmax(-1)
            generator = torch.Generator().manual_seed(7 * 1_000_003 + differentiated.index(index))
            signs = torch.randint(0, 2, p.shape, generator=generator, dtype=torch.int8) * 2.0 - 1
            roots = torch.stack([torch.diag(row.sqrt()) - torch.outer(row, row.sqrt()) for row in p])
            for row, root in zip(p, roots, strict=True):
                fisher = torch.diag(row) - torch.outer(row, row)
                assert torch.allclose(root @ root.T, fisher, atol=1e-12)
            probe = torch.einsum("nij,nj->ni", roots, signs.double())
        (logits * probe).sum().backward()
        for t in targets:
            module = model.get_submodule(t)
            gradient = module.weight.grad.T if is_transposed(module) else module.weight.grad
            squares[t] = squares[t] + gradient**2
    for t in targets:
        x, g = torch.cat(inputs[t]), torch.cat(outputs[t])
        guided = torch.cat([inputs[t][i] for i in differentiated]) * g.norm(dim=1, keepdim=True)
        root = (squares[t] / len(g)).sqrt()
        errors = {
            "inputs": relative(got[t].second_moment, x.T @ x / len(x)),
            "guided": relative(got[t].guided_moment, guided.T @ guided / g.square().sum()),
            "outputs": relative(got[t].output_moment, g.T @ g / len(g)),
            "rows": relative(got[t].fisher_rows, root.mean(1)),
            "columns": relative(got[t].fisher_columns, root.mean(0)),
        }
        # the loss is in float32, as are the results
        assert max(errors.values()) < 1e-5, f"{t}: {errors}"
