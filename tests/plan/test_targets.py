"""Which modules are quantized, with how many bits and which rank; and that PEFT then adapts exactly those."""

from __future__ import annotations

import copy

import pytest
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import nn

from loftq import ConfigError, LoftQConfig
from loftq.hub.adapter import lora_config
from loftq.plan.targets import minimal_target_names, plan_modules
from tiny import CLASSES, tiny_model

MODELS = {name: tiny_model(name) for name in CLASSES}


def plan(name: str, **options):
    return plan_modules(MODELS[name], LoftQConfig(**options))


def endings(plans) -> set[str]:
    return {name.rsplit(".", 1)[-1] for name in plans}


# architecture -> last parts of the names of what all-linear selects, and how many there are
ALL_LINEAR = {
    "llama": ({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}, 14),
    "mistral": ({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}, 14),
    "qwen2": ({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}, 14),
    "bert": ({"query", "key", "value", "dense"}, 13),
    "deberta-v2": ({"query_proj", "key_proj", "value_proj", "dense"}, 12),
    "bart": ({"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}, 2 * 6 + 2 * 10),
    "gpt2": ({"c_attn", "c_proj", "c_fc"}, 8),
    "t5": ({"q", "k", "v", "o", "wi", "wo"}, 2 * 6 + 2 * 10),
    "opt": ({"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "project_in", "project_out"}, 14),
}


@pytest.mark.parametrize("name", ALL_LINEAR)
def test_all_linear(name):
    names, count = ALL_LINEAR[name]
    plans = plan(name)
    assert endings(plans) == names
    assert len(plans) == count, list(plans)


@pytest.mark.parametrize("name", CLASSES)
def test_heads_and_embeddings_are_left_out(name):
    chosen = set(plan(name))
    output = MODELS[name].get_output_embeddings()
    for module_name, module in MODELS[name].named_modules():
        if module is output or isinstance(module, nn.Embedding) or "classifier" in module_name:
            assert module_name not in chosen


def adapted_by_peft(name: str, config: LoraConfig) -> dict[str, int]:
    """Module name -> rank, after PEFT has put its layers into a copy of the model."""
    model = inject_adapter_in_model(config, copy.deepcopy(MODELS[name]))
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    return {
        f"{n.removesuffix('.base_layer')}.{m.parameter_name}" if isinstance(m, ParamWrapper) else n: m.r["default"]
        for n, m in layers.items()
    }


SELECTIONS = {
    "all": {},
    "one layer": {"target_modules": r".*\b(0|h\.0)\..*"},
    "without layer 1": {"exclude_modules": r".*\.1\..*"},
    "ranks": {"rank": 4, "rank_pattern": {r".*\.0\..*": 2}},
}


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("name", CLASSES)
def test_peft_adapts_what_is_planned(name, selection):
    config = LoftQConfig(**SELECTIONS[selection])
    plans = plan_modules(MODELS[name], config)
    actual = adapted_by_peft(name, lora_config(plans, MODELS[name], config))
    assert actual == {n: p.rank for n, p in plans.items()}


@pytest.mark.parametrize("name", ["bert", "deberta-v2", "llama"])
def test_peft_adapts_embeddings_too(name):
    config = LoftQConfig(quantize_embeddings=True)
    plans = plan_modules(MODELS[name], config)
    assert next(iter(plans.values())).kind == "embedding"
    assert adapted_by_peft(name, lora_config(plans, MODELS[name], config)).keys() == plans.keys()


def test_names_are_as_short_as_they_can_be():
    model = MODELS["llama"]
    assert minimal_target_names(set(plan("llama", target_modules=["q_proj", "v_proj"])), model) == ["q_proj", "v_proj"]
    some = set(plan("llama", target_modules=r".*\.0\..*q_proj"))
    assert minimal_target_names(some, model) == ["model.layers.0.self_attn.q_proj"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, {"q_proj", "v_proj"}),
        ({"target_modules": ("mlp.up_proj",)}, {"up_proj"}),
        ({"target_modules": ["q_proj", "absent"]}, {"q_proj"}),
        ({"target_modules": r".*\.(q|k)_proj"}, {"q_proj", "k_proj"}),
        ({"target_modules": r".*self_attn.*", "exclude_modules": ["o_proj"]}, {"q_proj", "k_proj", "v_proj"}),
        ({"exclude_modules": r".*mlp.*"}, {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ({"target_modules": ["lm_head"]}, {"lm_head"}),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_target_and_exclude(options, expected):
    assert endings(plan("llama", **options)) == expected


def test_a_suffix_begins_at_a_dot():
    assert "proj" not in str(plan("t5", target_modules=["o"]).keys())
    with pytest.raises(ConfigError, match="selects no linear layer"):
        plan("llama", target_modules=["proj"])


def test_bits_and_rank_patterns():
    plans = plan(
        "llama",
        bits=2,
        rank=8,
        bits_pattern={"down_proj": 4, r"layers\.1\..*": 3},
        rank_pattern={"mlp.up_proj": 16, "model.layers.0.self_attn.q_proj": 1},
    )
    assert plans["model.layers.0.mlp.down_proj"].spec.bits == 4
    assert plans["model.layers.1.mlp.down_proj"].spec.bits == 4, "the first pattern that matches counts"
    assert plans["model.layers.1.self_attn.q_proj"].spec.bits == 3
    assert plans["model.layers.0.self_attn.q_proj"].spec.bits == 2
    assert [p.rank for n, p in plans.items() if n.endswith("up_proj")] == [16, 16]
    assert plans["model.layers.0.self_attn.q_proj"].rank == 1
    assert plans["model.layers.1.self_attn.q_proj"].rank == 8


def test_pattern_of_layer_1_is_not_layer_11():
    model = tiny_model("llama", layers=12)
    plans = plan_modules(model, LoftQConfig(bits_pattern={r"layers\.1\..*": 8}))
    assert {n.split(".")[2] for n, p in plans.items() if p.spec.bits == 8} == {"1"}


def bits_of_layers(plans) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {}
    for name, module in plans.items():
        parts = name.split(".")
        at = next((k for k, part in enumerate(parts) if part.isdigit()), None)
        found.setdefault(".".join(parts[: at + 1]) if at is not None else name, set()).add(module.spec.bits)
    return found


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_first_layers(count):
    model = tiny_model("llama", layers=4)
    plans = plan_modules(model, LoftQConfig(bits=2, first_layers_bits=(count, 4)))
    assert bits_of_layers(plans) == {f"model.layers.{k}": {4 if k < count else 2} for k in range(4)}


@pytest.mark.parametrize(
    ("name", "stacks"),
    [("bart", ["model.encoder.layers", "model.decoder.layers"]), ("t5", ["encoder.block", "decoder.block"])],
    ids=["bart", "t5"],
)
def test_first_layers_count_the_encoder_before_the_decoder(name, stacks):
    plans = plan(name, bits=2, first_layers_bits=(3, 4))
    expected = dict(zip([f"{s}.{k}" for s in stacks for k in (0, 1)], [{4}, {4}, {4}, {2}], strict=True))
    assert bits_of_layers(plans) == expected


def test_first_layers_leave_modules_outside_layers_alone():
    plans = plan("bert", bits=2, first_layers_bits=(9, 4))
    assert plans["pooler.dense"].spec.bits == 2
    assert plans["encoder.layer.1.output.dense"].spec.bits == 4


def test_a_pattern_overrides_the_first_layers():
    plans = plan("llama", bits=2, first_layers_bits=(1, 4), bits_pattern={"q_proj": 8})
    assert plans["model.layers.0.self_attn.q_proj"].spec.bits == 8


def test_conv1d_shape_is_out_by_in():
    attention = plan("gpt2")["transformer.h.0.attn.c_attn"]
    assert (attention.kind, attention.shape) == ("conv1d", (192, 64))


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"], r".*(q_proj|lm_head)"], ids=str)
def test_a_tied_head_is_skipped(targets):
    assert "lm_head" not in plan("qwen2", target_modules=targets)


ERRORS = {
    "list matches nothing": ({"target_modules": ["query"]}, r"selects no linear layer of LlamaForCausalLM.*q_proj"),
    "regex matches nothing": ({"target_modules": "q_proj$^"}, "selects no linear layer"),
    "name given as regex": ({"target_modules": "q_proj"}, "selects no linear layer"),
    "all excluded": ({"exclude_modules": ".*"}, "selects no linear layer"),
    "embedding": (
        {"target_modules": ["embed_tokens"]},
        "is a Embedding, expected a linear layer; .*quantize_embeddings",
    ),
    "norm": ({"target_modules": ["q_proj", "norm"]}, "is a LlamaRMSNorm, expected a linear layer"),
    "container": ({"target_modules": ["self_attn"]}, "is a LlamaAttention, expected a linear layer"),
    "bad regex": ({"target_modules": "(q_proj"}, "is no regular expression"),
    "bad exclude": ({"exclude_modules": "*"}, "is no regular expression"),
    "bad bits pattern": ({"bits_pattern": {"[q": 4}}, "is no regular expression"),
    "unused bits pattern": ({"bits_pattern": {"query": 4}}, "'query'.*matches none of the 14 selected"),
    "unused rank pattern": ({"rank_pattern": {"lm_head": 4}}, "'lm_head'.*matches none"),
    "pattern hidden by another": ({"bits_pattern": {".*": 4, "q_proj": 2}}, "'q_proj'"),
    "empty list": ({"target_modules": []}, "target_modules is empty"),
    "empty text": ({"target_modules": ""}, "target_modules is empty"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    options, message = ERRORS[case]
    with pytest.raises(ConfigError, match=message) as raised:
        plan("llama", **options)
    assert "\n" not in str(raised.value)


def test_tied_embeddings_cannot_be_quantized():
    with pytest.raises(ConfigError, match=r"shares its weight with another module.*turn it off"):
        plan("qwen2", quantize_embeddings=True)


def test_no_embedding_to_quantize():
    with pytest.raises(ConfigError, match="has no input embedding"):
        plan_modules(nn.Sequential(nn.Linear(8, 8)), LoftQConfig(quantize_embeddings=True))


def test_no_linear_layer_at_all():
    with pytest.raises(ConfigError, match="it has none"):
        plan_modules(nn.Sequential(nn.ReLU()), LoftQConfig())


def test_a_quantized_model_is_refused():
    from loftq import QuantLinear, QuantSpec

    model = nn.Sequential(QuantLinear.from_linear(nn.Linear(64, 64), QuantSpec()))
    with pytest.raises(ConfigError, match=r"quantized already.*start from its source"):
        plan_modules(model, LoftQConfig())
