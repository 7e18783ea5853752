"""Which modules of the paper's models a recipe packs, from their config.json alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers as tf

from loftq.errors import ConfigError, SourceError
from loftq.recipes import list_recipes, load_recipe
from loftq.recipes.dryrun import dry_run, module_summary
from loftq.recipes.steps import Options

# The paper's models, by the sizes in their config.json.
LLAMA = {"vocab_size": 32000, "architectures": ["LlamaForCausalLM"]}
MODELS = {
    "microsoft/deberta-v3-base": tf.DebertaV2Config(
        vocab_size=128100,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        type_vocab_size=0,
        relative_attention=True,
        position_buckets=256,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
    ),
    "facebook/bart-large": tf.BartConfig(architectures=["BartForConditionalGeneration"]),
    "meta-llama/Llama-2-7b-hf": tf.LlamaConfig(**LLAMA),
    "meta-llama/Llama-2-13b-hf": tf.LlamaConfig(
        **LLAMA, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40
    ),
}
# Linear layers in attention and feed-forward networks, and their weights:
# DeBERTa 12 x (4 x 768^2 + 2 x 768 x 3072); BART 12 encoder layers with one attention and 12 decoder layers with two of
# 4 x 1024^2, each with 2 x 1024 x 4096; LLAMA 32 x (4 x 4096^2 + 3 x 4096 x 11008), 40 x (4 x 5120^2 + 3 x 5120 x 13824).
LINEAR = {
    "microsoft/deberta-v3-base": (72, 84_934_656),
    "facebook/bart-large": (192, 352_321_536),
    "meta-llama/Llama-2-7b-hf": (224, 6_476_005_376),
    "meta-llama/Llama-2-13b-hf": (280, 12_687_769_600),
}


@pytest.fixture(scope="module")
def configs(tmp_path_factory) -> dict[str, Path]:
    """Folders that hold a config.json and nothing else."""
    folders = {name: tmp_path_factory.mktemp("config") for name in MODELS}
    for name, folder in folders.items():
        MODELS[name].save_pretrained(folder)
    return folders


SIZED = [name for name in list_recipes() if load_recipe(name).published_size]


def test_modules_of_the_papers_models(configs):
    """Which matrices are packed, at the paper's average bits; the adapter's share is the published trainable ratio."""
    widths = {}
    ratios = 0
    seen: dict[tuple, object] = {}
    for name in list_recipes():
        recipe = load_recipe(name)
        if recipe.model not in configs or not {"loftq"} & set(recipe.runnable()):
            continue
        config = recipe.loftq_config("loftq")
        key = (recipe.model, json.dumps(recipe.quantization, sort_keys=True))
        if key not in seen:
            seen[key] = module_summary(str(configs[recipe.model]), config)
        found = seen[key]
        modules, weights = LINEAR[recipe.model]
        embedding = 128100 * 768 if config.quantize_embeddings else 0
        assert (found.modules, found.weights) == (modules + bool(embedding), weights + embedding), name
        widths[name] = found.code_bits
        trainable = recipe.published_size.get("trainable_ratio")
        if trainable is not None:
            # DeBERTa's and BART's ratio is of the linear layers, without the embedding; LLAMA's of the whole model
            own = found.adapter_parameters - (config.rank * (128100 + 768) if embedding else 0)
            whole = weights + (found.other_weights if recipe.model.startswith("meta-llama") else 0)
            assert 100 * own / whole == pytest.approx(trainable, abs=0.0501), name
            ratios += 1
    assert ratios == len([n for n in SIZED if load_recipe(n).published_size.get("trainable_ratio")])
    for bits in ("4", "3", "2.5", "2.25", "2"):
        assert widths[f"gsm8k/llama2-7b-nf{bits}-r64"] == float(bits)
    # the same counts of layers, of 40: 2 + 2 * 16 / 40, 2 + 2 * 8 / 40, 2 + 2 * 4 / 40
    mixed = [widths[f"wikitext2/llama2-13b-nf{bits}-r64"] for bits in ("3", "2.5", "2.25")]
    assert mixed == pytest.approx([2.8, 2.4, 2.2], abs=1e-12)


def test_summary_counts_by_width(stories_dir):
    """stories260K: 5 layers of 7 linear layers; the first two at 4 bits."""
    recipe = load_recipe("gsm8k/llama2-7b-nf2.5-r64", ["quantization.first_layers_bits=[2, 4]"])
    found = dry_run(recipe, Options(Path("out"), model=str(stories_dir))).modules["loftq"]
    assert (found.modules, found.bits) == (35, {4: 14, 2: 21})
    assert found.code_bits == pytest.approx(2 + 2 * 2 / 5, abs=1e-12)
    assert found.weights + found.other_weights == 260_032


def test_a_model_that_is_not_here(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    recipe = load_recipe("glue/mnli-nf2-r16")
    assert module_summary("nobody/nothing", recipe.loftq_config("loftq")) is None
    with pytest.raises(ConfigError, match="not/a/model does not exist, expected a model's folder or a hub id"):
        module_summary("not/a/model", recipe.loftq_config("loftq"))
    with pytest.raises(SourceError, match=r"has no config\.json"):
        module_summary(str(tmp_path), recipe.loftq_config("loftq"))
