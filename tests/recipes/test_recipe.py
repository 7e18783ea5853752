"""Reading a recipe: what a file may say, and one sentence for each thing that it may not."""

from __future__ import annotations

import copy

import pytest

from loftq.config import PUBLISHED
from loftq.errors import ConfigError
from loftq.recipes import list_recipes, load_recipe
from loftq.recipes.recipe import REFERENCES, RUNNABLE, parse_recipe

GOOD = {
    "table": "a table",
    "model": "some/model",
    "task": "classification",
    "data": {
        "id": "some/data",
        "train": "train",
        "evaluate": {"a": "test_a", "b": "test_b"},
        "map": {"sentence": "text", "label": "label"},
    },
    "training": {"epochs": 3, "batch_size": 8, "learning_rate": 1e-4},
    "metrics": ["accuracy", "f1"],
    "published": {"loftq": {"a/accuracy": 90.1, "f1": None}},
    "quantization": {"bits": 2, "rank": 8},
}


def changed(path: str, value: object) -> dict:
    values = copy.deepcopy(GOOD)
    inner = values
    *parents, last = path.split("|")
    for key in parents:
        inner = inner.setdefault(key, {})
    inner[last] = value
    return values


def test_values_and_defaults():
    recipe = parse_recipe("mine", GOOD, "mine.yaml")
    assert (recipe.name, recipe.data.name, recipe.seeds, recipe.notes) == ("mine", "some/data", None, ())
    assert recipe.data.evaluate == {"a": "test_a", "b": "test_b"}
    assert (recipe.training.schedule, recipe.training.warmup_ratio, recipe.training.max_length) == ("linear", 0.0, None)
    assert recipe.published == {"loftq": {"a/accuracy": 90.1, "f1": None}}
    one = parse_recipe("mine", changed("data|evaluate", "test") | {"published": {"loftq": {"f1": 1}}}, "mine.yaml")
    assert one.data.evaluate == {"test": "test"}


def test_columns_by_number_and_exponents_without_a_dot():
    values = changed("training|learning_rate", "5e-4")  # what PyYAML makes of 5e-4
    values["data"]["local_maps"] = [{3: "text", 1: "label"}]
    recipe = parse_recipe("mine", values, "mine.yaml")
    assert recipe.training.learning_rate == 0.0005
    assert recipe.data.local_maps == ({"3": "text", "1": "label"},)


# path and value -> what the sentence says behind the file's name
BAD = {
    "unknown key": ("epochs", 3, "has no option 'epochs'"),
    "unknown training key": ("training|epoch", 3, "training has no option 'epoch', did you mean 'epochs'?"),
    "unknown data key": ("data|splits", "x", "data has no option 'splits'"),
    "unknown size": ("published_size|ratio", 3, "published_size has no option 'ratio'"),
    "missing": ("table", None, "lacks table; add it"),
    "missing in data": ("data|train", None, "data lacks train"),
    "missing in training": ("training|batch_size", None, "training lacks batch_size"),
    "text for a mapping": ("training", "fast", "training is 'fast', expected a mapping"),
    "list for a mapping": ("published", [90], "published is [90], expected a mapping"),
    "number for a text": ("model", 7, "model is 7, expected text"),
    "empty text": ("table", " ", "table is ' ', expected text"),
    "task typo": ("task", "clasification", "task is 'clasification'; did you mean classification?"),
    "schedule": ("training|schedule", "polynomial", "training: schedule is 'polynomial'; expected one of linear"),
    "epochs in words": ("training|epochs", "five", "training: epochs is 'five', expected a positive number"),
    "epochs true": ("training|epochs", True, "epochs is True, expected a positive number"),
    "learning rate 0": ("training|learning_rate", 0, "learning_rate is 0, expected a positive number"),
    "learning rate nan": ("training|learning_rate", float("nan"), "learning_rate is nan"),
    "batch size half": ("training|batch_size", 8.5, "batch_size is 8.5, expected an integer of at least 1"),
    "warm-up 1": ("training|warmup_ratio", 1, "warmup_ratio is 1, expected a number from 0 to below 1"),
    "warm-up nothing": ("training|warmup_ratio", None, "warmup_ratio is None"),
    "metrics text": ("metrics", "accuracy", "metrics is 'accuracy', expected a list of texts"),
    "metrics empty": ("metrics", [], "metrics is [], expected a list of texts"),
    "no evaluation": ("data|evaluate", {}, "evaluate is {}, expected a mapping from text to text"),
    "no columns": ("data|map", {}, "map is {}, expected a mapping from text to text"),
    "column without role": ("data|map", {"a": 1}, "map is {'a': 1}"),
    "local text": ("data|local", {"train": "a.tsv"}, "local.train is 'a.tsv', expected a list of texts"),
    "local maps mapping": (
        "data|local_maps",
        {"a": "text"},
        "local_maps is {'a': 'text'}, expected a list of mappings",
    ),
    "labels numbers": ("data|labels", [0, 1], "labels is [0, 1], expected a list of texts"),
    "method typo": ("published|lofq", {"f1": 1}, "a method of published is 'lofq'; did you mean loftq?"),
    "metric unknown": ("published|loftq", {"rouge1": 1}, "a metric of published.loftq is 'rouge1'"),
    "evaluation unknown": ("published|loftq", {"c/f1": 1}, "an evaluation of published.loftq is 'c'"),
    "number in words": ("published|loftq", {"f1": "N.A."}, "published.loftq.f1 is 'N.A.', expected a positive number"),
    "numbers missing": ("published|loftq", None, "published.loftq is None, expected a mapping"),
    "bits 5": ("quantization|bits", 5, "quantization: bits is 5, expected one of 2, 3, 4, 8"),
    "first layers": ("quantization|first_layers_bits", 16, "quantization: first_layers_bits is 16"),
    "quantization typo": ("quantization|num_iters", 5, "quantization: LoftQConfig has no option 'num_iters', did you"),
    "quantization method": ("quantization|method", "loftq", "quantization: method is chosen when a recipe is run"),
    "unstated typo": ("unstated|training.decay", "x", "unstated: training has no option 'decay'"),
    "unstated section": (
        "unstated|metrics",
        "x",
        "unstated has 'metrics', expected a key such as training.weight_decay",
    ),
    "seeds 0": ("seeds", 0, "seeds is 0, expected an integer of at least 1"),
    "notes text": ("notes", "a note", "notes is 'a note', expected a list of texts"),
}


@pytest.mark.parametrize(("path", "value", "message"), BAD.values(), ids=BAD)
def test_refuses(path, value, message):
    with pytest.raises(ConfigError) as error:
        parse_recipe("mine", changed(path, value), "mine.yaml")
    assert str(error.value).startswith("mine.yaml"), error.value
    assert message in str(error.value), error.value
    assert "\n" not in str(error.value)


def test_configuration_is_the_published_one():
    config = load_recipe("glue/mnli-nf2-r16").loftq_config("loftq")
    assert {key: getattr(config, key) for key in PUBLISHED} == PUBLISHED
    assert (config.bits, config.rank, config.num_iter, config.svd, config.method) == (2, 16, 5, "exact", "loftq")
    assert config.quantize_embeddings
    mixed = load_recipe("gsm8k/llama2-13b-nf2.25-r64").loftq_config("qlora")
    assert (mixed.bits, mixed.first_layers_bits, mixed.method) == (2, (4, 4), "qlora")
    uniform = load_recipe("cnn_dailymail/bart-uniform4-r16").loftq_config("loftq")
    assert (uniform.codebook, uniform.scale, uniform.bits, uniform.num_iter) == ("uniform", "absmax", 4, 1)


def test_full_fine_tuning_has_no_configuration():
    with pytest.raises(ConfigError, match="glue/mnli-full is full fine-tuning and says nothing of quantization"):
        load_recipe("glue/mnli-full").loftq_config("loftq")


def test_what_runs_without_being_asked():
    """Methods with a published number that loftq has; not those that did not converge, nor what is only compared with."""
    assert load_recipe("glue/mnli-nf2-r16").runnable() == ("qlora", "loftq")
    assert load_recipe("glue/cola-nf2-r16").runnable() == ("loftq",)
    assert load_recipe("glue/mnli-pruning-15").runnable() == ("loftq",)
    assert load_recipe("xsum/bart-full").runnable() == ("full",)
    assert load_recipe("glue/qnli-svd-first-uniform2-r32").runnable() == ("loftq-svd-first", "loftq")
    for name in list_recipes():
        recipe = load_recipe(name)
        assert recipe.runnable(), name
        assert set(recipe.published) <= {*RUNNABLE, *REFERENCES}, name
