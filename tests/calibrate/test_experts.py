"""Inputs of the experts of a mixture, against a pass that routes by hand in float64."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import loftq
from loftq.calibrate.experts import fused_experts
from loftq.calibrate.forward import StreamedForward
from loftq.calibrate.text import CalibrationTokens
from loftq.checkpoint.source import open_source

pytestmark = pytest.mark.usefixtures("one_thread")

ATTENTION = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.o_proj"]


def mixture(name: str) -> tf.PreTrainedModel:
    sizes = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "num_experts_per_tok": 2}
    torch.manual_seed(0)
    if name == "mixtral":
        config = tf.MixtralConfig(**sizes, num_local_experts=4, intermediate_size=40)
        model = tf.MixtralForCausalLM(config)
    else:
        config = tf.Qwen3MoeConfig(**sizes, num_experts=4, moe_intermediate_size=40, intermediate_size=48, head_dim=8)
        model = tf.Qwen3MoeForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    return model.eval()


def some_tokens(rows: int = 6) -> CalibrationTokens:
    ids = torch.randint(3, 96, (rows, 14), generator=torch.Generator().manual_seed(5))
    mask = torch.arange(14) < torch.tensor([14, 9, 14, 14, 6, 14][:rows])[:, None]
    return CalibrationTokens.of(ids, mask, "random")


def routed(model: tf.PreTrainedModel, tokens: CalibrationTokens) -> dict[str, list[list[torch.Tensor]]]:
    """Parameter -> expert -> its inputs, one window at a time."""
    model = model.double()
    found: dict[str, list[list[torch.Tensor]]] = {n: [[] for _ in range(4)] for n in fused_experts(model)}

    def hook(name):
        def before(module, args):
            states, index = args[0], args[1]
            for token, experts in zip(states, index, strict=True):
                for e in set(experts.tolist()):
                    found[f"{name}.gate_up_proj"][e].append(token)
                    gate, up = (module.gate_up_proj[e] @ token).split(40)
                    found[f"{name}.down_proj"][e].append(torch.nn.functional.silu(gate) * up)

        return before

    names = sorted({n.rpartition(".")[0] for n in found})
    handles = [model.get_submodule(n).register_forward_pre_hook(hook(n)) for n in names]
    model.set_experts_implementation("eager")
    with torch.no_grad():
        for ids, mask in zip(tokens.ids, tokens.mask, strict=True):
            model(input_ids=ids[mask][None])
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_experts(name, tmp_path):
    model, tokens = mixture(name), some_tokens()
    model.save_pretrained(tmp_path)
    experts = fused_experts(model)
    assert len(experts) == 4
    expected = routed(model, tokens)
    source = open_source(tmp_path)
    seen = {}
    with StreamedForward(
        source, ATTENTION, tokens, experts=experts, min_tokens=1, dtype=torch.float64, batch_tokens=30
    ) as forward:
        for group in forward.groups():
            if group.experts is not None:
                seen[group.names[0]] = (group.statistics(), group.experts)
            else:
                assert group.statistics().tokens == int(tokens.mask.sum())
    assert set(seen) == set(experts)
    for parameter, (together, each) in seen.items():
        for e, statistics in enumerate(each):
            x = torch.stack(expected[parameter][e])
            assert statistics.tokens == len(x), (parameter, e)
            error = float((statistics.second_moment.double() - x.T @ x / len(x)).norm() / (x.T @ x / len(x)).norm())
            assert error < 2**-23, f"{parameter} {e}: {error:.2e}"
        everything = torch.stack([t for inputs in expected[parameter] for t in inputs])
        torch.testing.assert_close(together.second_moment.double(), everything.T @ everything / len(everything))


def test_an_expert_with_few_inputs_gets_the_statistics_of_all(tmp_path):
    model, tokens = mixture("mixtral"), some_tokens(rows=1)
    model.save_pretrained(tmp_path)
    parameter = fused_experts(model)[0]
    counts = [len(x) for x in routed(model, tokens)[parameter]]
    least = sorted(counts)[2]
    with StreamedForward(open_source(tmp_path), [], tokens, experts=[parameter], min_tokens=least) as forward:
        (group,) = forward.groups()
    assert group.experts is not None
    shared = [statistics is group.statistics() for statistics in group.experts]
    assert shared == [count < least for count in counts]
    assert any(shared)
    assert not all(shared)
    assert group.statistics().tokens == sum(counts)


def test_mistakes(tmp_path):
    model, tokens = mixture("mixtral"), some_tokens()
    model.save_pretrained(tmp_path)
    with pytest.raises(loftq.ConfigError, match="is no parameter with the experts"):
        StreamedForward(open_source(tmp_path), [], tokens, experts=["model.layers.0.mlp.gate"])
    with pytest.raises(loftq.ConfigError, match="experts were given with propagate=True"):
        StreamedForward(open_source(tmp_path), [], tokens, experts=fused_experts(model), propagate=True)


def test_a_source_without_one_layers_experts(tmp_path):
    """A random stand-in would give statistics that look right."""
    mixture("mixtral").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    kept = {n: t for n, t in tensors.items() if not (".layers.1." in n and "experts" in n)}
    assert len(kept) < len(tensors)
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(loftq.SourceError, match=r"lacks model.layers.1.mlp.experts"):
        StreamedForward(open_source(tmp_path), ATTENTION, some_tokens())
