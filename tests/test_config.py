"""Settings: what is accepted, what is refused with which sentence, and dicts in and out."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loftq.config import (
    BITS,
    BLOCK_SIZES,
    CODEBOOKS,
    METHODS,
    PUBLISHED,
    SCALE_DTYPES,
    SCALES,
    SVDS,
    LoftQConfig,
    QuantSpec,
)
from loftq.errors import ConfigError, LoftQError

spec_fields = {
    "bits": st.sampled_from(BITS),
    "codebook": st.sampled_from(CODEBOOKS),
    "block_size": st.sampled_from(BLOCK_SIZES),
    "scale": st.sampled_from(SCALES),
    "scale_dtype": st.sampled_from(SCALE_DTYPES),
    "double_quant": st.booleans(),
}
names = st.text(st.characters(codec="ascii", categories=("Ll", "Nd"), include_characters="._"), min_size=1)
module_names = names | st.lists(names, min_size=1, max_size=4)
specs = st.builds(QuantSpec, **spec_fields)
configs = st.builds(
    LoftQConfig,
    **spec_fields,
    rank=st.integers(1, 256),
    lora_alpha=st.none() | st.integers(1, 512) | st.floats(0.001, 512),
    use_rslora=st.booleans(),
    lora_dropout=st.floats(0, 0.9),
    num_iter=st.integers(0, 20),
    method=st.sampled_from(METHODS),
    svd=st.sampled_from(SVDS),
    target_modules=module_names,
    exclude_modules=st.none() | module_names,
    bits_pattern=st.dictionaries(names, st.sampled_from(BITS), max_size=3),
    rank_pattern=st.dictionaries(names, st.integers(1, 64), max_size=3),
    first_layers_bits=st.none() | st.tuples(st.integers(1, 40), st.sampled_from(BITS)),
    quantize_embeddings=st.booleans(),
    damping=st.none() | st.floats(0, 1),
    calibration=st.sampled_from(["auto", "pydoc", "text.txt", None]),
    calibration_samples=st.integers(1, 9),
    calibration_gradients=st.integers(0, 9),
    propagate=st.booleans(),
    seed=st.integers(0, 2**32),
)


def through_json(values):
    return json.loads(json.dumps(values))


@given(specs)
def test_quant_spec_round_trip(spec):
    assert QuantSpec.from_dict(spec.to_dict()) == spec
    assert QuantSpec.from_dict(through_json(spec.to_dict())) == spec


@given(configs)
def test_config_round_trip(config):
    assert LoftQConfig.from_dict(config.to_dict()) == config
    assert LoftQConfig.from_dict(through_json(config.to_dict())) == config


@given(specs, st.integers(1, 64))
def test_config_carries_its_spec(spec, rank):
    assert LoftQConfig(rank=rank, **spec.to_dict()).spec == spec


def test_defaults_agree():
    assert LoftQConfig().spec == QuantSpec()


def test_published_settings():
    spec = QuantSpec(2, **PUBLISHED)
    assert (spec.codebook, spec.scale, spec.scale_dtype, spec.block_size) == ("nf", "absmax", "float32", 64)
    assert LoftQConfig(bits=2, **PUBLISHED).spec == spec


@pytest.mark.parametrize("value", [QuantSpec(), LoftQConfig()], ids=["QuantSpec", "LoftQConfig"])
def test_frozen(value):
    with pytest.raises(dataclasses.FrozenInstanceError):
        value.bits = 2


@pytest.mark.parametrize("value", [QuantSpec(), LoftQConfig()], ids=["QuantSpec", "LoftQConfig"])
def test_replace_checks_the_change(value):
    assert value.replace(bits=2).bits == 2
    assert value.bits == 4
    with pytest.raises(ConfigError, match="bits is 5"):
        value.replace(bits=5)


@pytest.mark.parametrize("cls", [QuantSpec, LoftQConfig])
@pytest.mark.parametrize(("typo", "meant"), [("bit", "bits"), ("blocksize", "block_size"), ("code_book", "codebook")])
def test_unknown_option_suggests_the_nearest(cls, typo, meant):
    with pytest.raises(ConfigError, match=rf"{cls.__name__} has no option '{typo}', did you mean '{meant}'\?"):
        cls.from_dict({typo: 2})


def test_unknown_option_without_a_near_one_lists_all():
    with pytest.raises(ConfigError, match=r"has no option 'zzz'; known are bits, codebook, block_size"):
        QuantSpec.from_dict({"zzz": 2})


INVALID_SPEC = [
    ("bits", 5),
    ("bits", 0),
    ("bits", "4"),
    ("bits", True),
    ("bits", None),
    ("bits", 4.0),
    ("codebook", "nf4"),
    ("codebook", "NF"),
    ("codebook", None),
    ("block_size", 48),
    ("block_size", 0),
    ("block_size", "64"),
    ("block_size", 64.0),
    ("scale", "max"),
    ("scale", None),
    ("scale_dtype", "half"),
    ("scale_dtype", "float64"),
    ("double_quant", 1),
    ("double_quant", "yes"),
]

INVALID_CONFIG = [
    ("rank", 0),
    ("rank", -1),
    ("rank", 2.0),
    ("rank", "16"),
    ("rank", True),
    ("num_iter", -1),
    ("num_iter", 1.5),
    ("seed", -1),
    ("seed", "0"),
    ("method", "loft"),
    ("svd", "fast"),
    ("lora_alpha", 0),
    ("lora_alpha", -16),
    ("lora_alpha", True),
    ("lora_alpha", math.nan),
    ("lora_alpha", math.inf),
    ("lora_alpha", "16"),
    ("lora_dropout", 1),
    ("lora_dropout", -0.1),
    ("lora_dropout", math.nan),
    ("lora_dropout", "0.1"),
    ("lora_dropout", None),
    ("use_rslora", "no"),
    ("quantize_embeddings", "no"),
    ("damping", 1.5),
    ("damping", "little"),
    ("calibration", ""),
    ("calibration", 3),
    ("calibration_samples", 0),
    ("calibration_length", 1),
    ("calibration_gradients", -1),
    ("calibration_gradients", "no"),
    ("propagate", 1),
    ("plan", ""),
    ("target_modules", []),
    ("target_modules", ""),
    ("target_modules", None),
    ("target_modules", 5),
    ("target_modules", [5]),
    ("exclude_modules", 5),
    ("bits_pattern", {"a": 5}),
    ("bits_pattern", {"a": "4"}),
    ("bits_pattern", ["a"]),
    ("bits_pattern", None),
    ("rank_pattern", {"a": 0}),
    ("rank_pattern", {"a": 2.0}),
    ("rank_pattern", None),
    ("first_layers_bits", (0, 4)),
    ("first_layers_bits", (4, 5)),
    ("first_layers_bits", (4,)),
    ("first_layers_bits", (4, 4, 4)),
    ("first_layers_bits", 4),
    ("first_layers_bits", "4:4"),
]


@pytest.mark.parametrize(("field", "value"), INVALID_SPEC, ids=[f"{f}={v!r}" for f, v in INVALID_SPEC])
@pytest.mark.parametrize("cls", [QuantSpec, LoftQConfig])
def test_invalid_spec_value_is_refused(cls, field, value):
    assert_refused(cls, field, value)


@pytest.mark.parametrize(("field", "value"), INVALID_CONFIG, ids=[f"{f}={v!r}" for f, v in INVALID_CONFIG])
def test_invalid_config_value_is_refused(field, value):
    assert_refused(LoftQConfig, field, value)


def assert_refused(cls, field, value):
    """With one sentence that names the field and says what was expected."""
    with pytest.raises(ConfigError, match=rf"^{field}.*(is|are) .*expected") as caught:
        cls(**{field: value})
    assert "\n" not in str(caught.value)
    assert ". " not in str(caught.value)


def test_every_field_has_an_invalid_value():
    covered = {field for field, _ in INVALID_SPEC + INVALID_CONFIG}
    assert covered == {field.name for field in dataclasses.fields(LoftQConfig)}


def test_refusal_suggests_the_nearest_value():
    with pytest.raises(ConfigError, match=r"scale_dtype is 'float61', .*; did you mean float16\?"):
        QuantSpec(scale_dtype="float61")


def test_errors_are_value_errors():
    assert issubclass(ConfigError, LoftQError)
    assert issubclass(LoftQError, ValueError)


# --- as in PEFT ----------------------------------------------------------------------------------------------------


def test_all_linear_is_the_default_target():
    assert LoftQConfig().target_modules == "all-linear"
    assert LoftQConfig().exclude_modules is None


@pytest.mark.parametrize("given", [["q_proj", "v_proj"], ("q_proj", "v_proj")], ids=["list", "tuple"])
def test_module_lists_are_kept_in_order(given):
    assert LoftQConfig(target_modules=given).target_modules == ("q_proj", "v_proj")
    assert LoftQConfig(exclude_modules=given).exclude_modules == ("q_proj", "v_proj")
    assert LoftQConfig(target_modules=given).to_dict()["target_modules"] == ["q_proj", "v_proj"]


def test_module_sets_get_an_order_that_no_hash_decides():
    modules = ["down_proj", "gate_proj", "k_proj", "lm_head", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert LoftQConfig(target_modules=set(modules)).target_modules == tuple(modules)


def test_regular_expression_stays_a_string():
    pattern = r".*\.(q|v)_proj"
    assert LoftQConfig(target_modules=pattern).target_modules == pattern


def test_patterns_name_modules():
    config = LoftQConfig(bits_pattern={"lm_head": 8}, rank_pattern={"q_proj": 4})
    assert config.bits_pattern["lm_head"] == 8
    assert config.rank_pattern["q_proj"] == 4


def test_first_layers_from_a_list():
    assert LoftQConfig(first_layers_bits=[4, 8]).first_layers_bits == (4, 8)


def test_alpha_defaults_to_the_rank():
    assert LoftQConfig(rank=32).lora_alpha is None
