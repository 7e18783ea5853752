"""Finding recipe files, ``extends`` and changes from the command line."""

from __future__ import annotations

import re

import pytest
import yaml

from loftq.errors import ConfigError, SourceError
from loftq.recipes import list_recipes, load_recipe
from loftq.recipes.files import FOLDER


def write(folder, name: str, text: str):
    file = folder / f"{name}.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def test_names():
    names = list_recipes()
    assert len(names) == len(set(names)) == 120
    assert {name.split("/")[0] for name in names} == {
        *("anli", "cnn_dailymail", "glue", "gsm8k", "squad", "wikitext2", "xsum")
    }
    for expected in ("glue/mnli-nf2-r16", "glue/mnli-lora-r16", "xsum/bart-nf4-r8", "gsm8k/llama2-7b-nf2.5-r64"):
        assert expected in names
    assert list_recipes("xsum/*-r8") == [f"xsum/bart-{n}-r8" for n in ("lora", "nf2", "nf4", "uniform4")]


def test_names_say_what_is_inside():
    """The name's quantizer, bits and rank are the settings', and the task is the data's."""
    for name in list_recipes():
        recipe = load_recipe(name)
        assert recipe.name == name
        rank = re.search(r"-r(\d+)$", name)
        if rank:
            assert recipe.quantization["rank"] == int(rank[1]), name
        codebook = re.search(r"\b(nf|uniform)([\d.]+)", name)
        if codebook:
            fields = recipe.quantization
            layers = {"3": 16, "2.5": 8, "2.25": 4}.get(codebook[2])
            assert fields["codebook"] == codebook[1], name
            assert fields["bits"] == (2 if layers else int(codebook[2])), name
            assert fields.get("first_layers_bits") == ([layers, 4] if layers else None), name
        if name.startswith("glue/"):
            assert recipe.data.config == name.split("/")[1].split("-")[0]


def test_few_lines_each():
    """What recipes have in common stands in the base files, which are no recipes."""
    bases = {file.stem for file in FOLDER.glob("*/_*.yaml")}
    for name in list_recipes():
        file = FOLDER / f"{name}.yaml"
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
        assert values["extends"] in bases or f"{name.split('/')[0]}/{values['extends']}" in list_recipes(), name
        assert len(file.read_text(encoding="utf-8").splitlines()) <= 14, name
    assert not any(name.split("/")[1].startswith("_") for name in list_recipes())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("glue/mnli-nf2-r61", "no recipe is called 'glue/mnli-nf2-r61'; did you mean glue/mnli-nf2-r16"),
        ("glue/_mnli", "no recipe is called 'glue/_mnli'"),
        ("../pyproject", "no recipe is called"),
        ("nothing like it", "`loftq reproduce --list` shows all names"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_recipe(name)
    with pytest.raises(ConfigError, match="no recipe is called 'z\\*'"):
        list_recipes("z*")


def test_a_recipe_of_ones_own(tmp_path):
    """It extends one that comes with loftq; sections are merged key by key, anything inside them is replaced."""
    mine = write(
        tmp_path,
        "mine",
        "extends: glue/mnli-nf2-r16\n"
        "model: my/model\n"
        "data: {id: my/data, config: null, evaluate: test, map: {review: text, stars: label}, labels: null}\n"
        "training: {epochs: 1}\n"
        "published: {loftq: {accuracy: 50.0}}\n"
        "unstated: {training.weight_decay: null}\n"
        "notes: [my note]\n",
    )
    recipe, base = load_recipe(mine), load_recipe("glue/mnli-nf2-r16")
    assert (recipe.name, recipe.model, recipe.data.name) == ("mine", "my/model", "my/data")
    assert recipe.data.map == {"review": "text", "stars": "label"}
    assert recipe.data.evaluate == {"test": "test"}
    assert (recipe.training.epochs, recipe.training.batch_size) == (1, base.training.batch_size)
    assert recipe.published == {"loftq": {"accuracy": 50.0}}
    assert set(base.unstated) - set(recipe.unstated) == {"training.weight_decay"}
    assert (recipe.notes, recipe.published_size, recipe.seeds) == (("my note",), {}, None), "the paper's are not mine"
    assert base.seeds == 4
    same_model = load_recipe(write(tmp_path, "same", "extends: glue/mnli-nf2-r16\nnotes: [my note]"))
    assert same_model.notes == (*base.notes, "my note")
    assert same_model.published == base.published
    assert recipe.quantization == base.quantization


def test_whose_numbers_a_recipe_has(tmp_path):
    """The paper's are of its model and data set: another configuration is another data set, other columns are not."""
    base = load_recipe("glue/mrpc-nf2-r16")
    other = load_recipe(write(tmp_path, "rte", "extends: glue/mrpc-nf2-r16\ndata: {config: rte}"))
    assert (other.published, other.seeds) == ({}, None)
    same = load_recipe(write(tmp_path, "same", "extends: glue/mrpc-nf2-r16\ndata: {local: {train: [mine.tsv]}}"))
    assert (same.published, same.seeds) == (base.published, base.seeds)
    write(tmp_path, "mine", "extends: glue/mrpc-nf2-r16\ntraining: {epochs: 1}")
    assert load_recipe(write(tmp_path, "more", "extends: mine\nmodel: my/model")).published == {}


def test_a_chain_in_one_folder(tmp_path):
    write(tmp_path, "_a", "extends: squad/nf2-r16\nnotes: [a]\ntraining: {epochs: 1}")
    write(tmp_path, "b", "extends: _a\nnotes: [b]")
    recipe = load_recipe(write(tmp_path, "c", "extends: b\ntraining: {batch_size: 2}"))
    assert (recipe.training.epochs, recipe.training.batch_size, recipe.notes) == (1, 2, ("a", "b"))


BAD_FILES = {
    "circle": ("extends: b", "c.yaml extends"),
    "itself": ("extends: c", "a circle; remove one of them"),
    "no base": ("extends: nothing", "extends is 'nothing', but there is no file"),
    "no recipe": ("extends: glue/nothing", "but there is no file glue/nothing.yaml"),
    "path": ("extends: ../../x", "extends is '../../x', expected the name of a file beside it or of a recipe"),
    "list": ("extends: [a, b]", "extends is ['a', 'b'], expected the name"),
    "no yaml": ("a: [1", "is no YAML"),
    "tab": ("a:\n\t- 1", "is no YAML"),
    "a list": ("- 1", "holds a list, expected the keys of a recipe"),
    "empty": ("", "holds a NoneType, expected the keys of a recipe"),
    "code": ("extends: glue/mnli-nf2-r16\nmodel: !!python/name:os.system", "is no YAML"),
}


@pytest.mark.parametrize(("text", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files(tmp_path, text, message):
    write(tmp_path, "b", "extends: c")
    with pytest.raises(ConfigError) as error:
        load_recipe(write(tmp_path, "c", text))
    assert message in str(error.value), error.value
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(SourceError, match=r"nowhere\.yaml cannot be read"):
        load_recipe(tmp_path / "nowhere.yaml")


def test_changes():
    changes = ["training.epochs=1", "training.learning_rate=1e-3", "quantization.quantize_embeddings=false"]
    recipe = load_recipe("glue/mnli-full", [*changes, "training.max_steps=5", "model=my/model"])
    assert (recipe.training.epochs, recipe.training.learning_rate, recipe.training.max_steps) == (1, 0.001, 5)
    assert recipe.quantization == {"quantize_embeddings": False}
    assert recipe.model == "my/model"
    assert load_recipe("glue/mnli-full").training.epochs == 5, "a change must not stay"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("training.epochs", "--set is 'training.epochs', expected KEY=VALUE"),
        ("=1", "--set is '=1', expected KEY=VALUE"),
        ("training..epochs=1", "expected KEY=VALUE"),
        ("training.epoch=1", "training has no option 'epoch', did you mean 'epochs'?"),
        ("training.epochs=[", "--set training.epochs is '[', expected YAML"),
        ("training.epochs=few", "training: epochs is 'few', expected a positive number"),
        ("quantization.bits=5", "quantization: bits is 5"),
    ],
)
def test_bad_changes(change, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_recipe("glue/mnli-nf2-r16", [change])
