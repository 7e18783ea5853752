"""Files on this machine: which is which split, and whether their columns fit."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from loftq.errors import ConfigError, SourceError
from loftq.recipes import load_recipe
from loftq.recipes.local import columns_of, find_local

SST2 = "glue/sst2-nf2-r16"


def fill(folder: Path, **files: str) -> Path:
    """``train_tsv="..."`` writes ``train.tsv``."""
    for name, text in files.items():
        stem, _, ending = name.rpartition("_")
        (folder / f"{stem}.{ending}").write_text(text, encoding="utf-8")
    return folder


TSV = "sentence\tlabel\ngood\t1\n"


def found(recipe: str, folder: Path, chosen: dict[str, Path] | None = None) -> dict[str, tuple[str, dict[str, str]]]:
    splits = find_local(load_recipe(recipe), folder, chosen)
    return {name: (split.file.relative_to(folder).as_posix(), dict(split.map)) for name, split in splits.items()}


@pytest.fixture
def data(stories_dir) -> Path:
    """The folder with real data sets beside the repository."""
    return stories_dir.parent


def test_real_data(data):
    pair = {"sentence": "text", "label": "label"}
    assert found(SST2, data / "glue_sst2") == {"train": ("train.tsv", pair), "validation": ("dev.tsv", pair)}
    numbered = {"3": "text", "1": "label"}  # no header: source, label, mark, sentence
    expected = {"train": ("train.tsv", numbered), "validation": ("dev.tsv", numbered)}
    assert found("glue/cola-uniform2-r16", data / "glue_cola") == expected
    pair = {"question": "prompt", "answer": "completion"}
    expected = {"train": ("train.jsonl", pair), "test": ("test.jsonl", pair)}
    assert found("gsm8k/llama2-7b-nf4-r64", data / "gsm8k") == expected
    names = {name: name for name in ("id", "context", "question", "answers")}
    expected = {"train": ("train20.json", names), "validation": ("dev_xquad_en.json", names)}
    assert found("squad/nf2-r16", data / "squad") == expected


def test_real_data_by_names_of_ones_own(data):
    chosen = {"train": Path("valid.unk.txt"), "test": data / "wikitext2" / "test.unk.txt"}
    text = {"text": "text"}
    expected = {"train": ("valid.unk.txt", text), "test": ("test.unk.txt", text)}
    assert found("wikitext2/llama2-7b-nf2-r64", data / "wikitext2", chosen) == expected
    summaries = {"document": "text", "summary": "summary"}
    expected = {"train": ("test1000.jsonl", summaries), "test": ("test1000.jsonl", summaries)}
    assert found("xsum/bart-nf4-r8", data / "xsum", {"train": Path("test1000.jsonl")}) == expected


@pytest.mark.parametrize("name", ["validation", "dev", "valid", "val"])
def test_names_of_the_validation_split(tmp_path, name):
    fill(tmp_path, train_tsv=TSV, **{f"{name}_tsv": TSV})
    assert found(SST2, tmp_path)["validation"][0] == f"{name}.tsv"


def test_an_ending_in_capitals(tmp_path):
    fill(tmp_path, train_TSV=TSV, dev_tsv=TSV)
    assert found(SST2, tmp_path)["train"][0] == "train.TSV"


def test_the_first_name_counts(tmp_path):
    fill(tmp_path, train_tsv=TSV, val_tsv=TSV, dev_tsv=TSV)
    assert found(SST2, tmp_path)["validation"][0] == "dev.tsv"
    fill(tmp_path, validation_tsv=TSV)
    assert found(SST2, tmp_path)["validation"][0] == "validation.tsv"


def test_several_evaluations(tmp_path):
    rows = "sentence1\tsentence2\tgold_label\na\tb\tneutral\n"
    fill(tmp_path, train_tsv=rows, dev_matched_tsv=rows, mismatched_tsv=rows)
    columns = {"sentence1": "text", "sentence2": "text_pair", "gold_label": "label"}  # GLUE's own file
    assert found("glue/mnli-nf2-r16", tmp_path) == {
        "train": ("train.tsv", columns),
        "matched": ("dev_matched.tsv", columns),
        "mismatched": ("mismatched.tsv", columns),
    }


def test_names_in_folders_of_the_data_set(tmp_path):
    row = json.dumps({"context": "a", "hypothesis": "b", "label": "e"})
    for number in (1, 2, 3):
        (tmp_path / f"R{number}").mkdir()
        (tmp_path / f"R{number}" / "dev.jsonl").write_text(row)
    fill(tmp_path, train_jsonl=row)
    assert [file for file, _ in found("anli/full", tmp_path).values()] == [
        "train.jsonl",
        *(f"R{n}/dev.jsonl" for n in (1, 2, 3)),
    ]


def test_columns_called_after_roles(tmp_path):
    fill(tmp_path, train_csv="label,text\n1,good\n", dev_csv="label,text\n1,good\n")
    assert found(SST2, tmp_path)["train"] == ("train.csv", {"text": "text", "label": "label"})


def test_a_column_that_is_not_needed_may_lack(tmp_path):
    row = json.dumps({"context": "c", "question": "q", "answers": {"text": ["a"], "answer_start": [0]}})
    fill(tmp_path, train_jsonl=row, validation_jsonl=row)
    names = {name: name for name in ("context", "question", "answers")}  # no id
    assert found("squad/nf2-r16", tmp_path)["train"] == ("train.jsonl", names)


def test_every_problem_at_once(tmp_path):
    fill(tmp_path, train_tsv="text\tlabel\n", dev_matched_tsv="a\tb\n1\t2\n")
    with pytest.raises(SourceError) as error:
        find_local(load_recipe("glue/mnli-nf2-r16"), tmp_path)
    message = str(error.value)
    assert "train.tsv has the columns text, label, expected premise, hypothesis, label or text, text_pair" in message
    assert "dev_matched.tsv has the columns a, b" in message
    assert "has no file for mismatched, expected one called validation_mismatched.*, dev_mismatched.*" in message
    assert "--file mismatched=FILE" in message
    assert "\n" not in message


def test_refusals(tmp_path):
    recipe = load_recipe(SST2)
    with pytest.raises(SourceError, match=r"nowhere is no folder, expected one with glue/sst2-nf2-r16's data"):
        find_local(recipe, tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="--file names 'test', but glue/sst2-nf2-r16 reads train, validation"):
        find_local(recipe, tmp_path, {"test": Path("a.tsv")})
    fill(tmp_path, train_tsv=TSV, train_csv="sentence,label\n", dev_tsv=TSV)
    with pytest.raises(SourceError, match=r"several files for train \(train.csv, train.tsv\), expected one"):
        find_local(recipe, tmp_path)
    assert find_local(recipe, tmp_path, {"train": Path("train.tsv")})["train"].file == tmp_path / "train.tsv"
    with pytest.raises(SourceError, match=r"gone\.tsv cannot be read"):
        find_local(recipe, tmp_path, {"train": Path("gone.tsv")})
    with pytest.raises(SourceError, match=r"ends in '.xml', expected .jsonl, .ndjson, .json, .csv"):
        find_local(recipe, fill(tmp_path, a_xml="<a/>"), {"train": Path("a.xml")})


def test_a_header_is_no_numbered_column(tmp_path):
    """Columns by number are for tables without a header; an object's keys are always names."""
    row = json.dumps({"source": "gj04", "class": 1, "mark": "", "words": "The sailors rode the breeze."})
    fill(tmp_path, train_jsonl=row, dev_jsonl=row)
    with pytest.raises(SourceError, match="has the columns source, class, mark, words"):
        find_local(load_recipe("glue/cola-nf2-r16"), tmp_path)


def test_columns_of_every_kind(tmp_path):
    table = pyarrow.table({"a": [1], "b": ["x"]})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    fill(
        tmp_path,
        t_jsonl='\n{"a": 1, "b": 2}\n',
        t_json='[{"a": 1, "b": 2}]',
        u_json='{"data": [{"a": 1, "b": 2}]}',
        lmflow_json='{"type": "text2text", "instances": [{"input": "1", "output": "2"}]}',
        squad_json='{"data": [{"paragraphs": [{"context": "c", "qas": [{"id": 1, "question": "q", "answers": []}]}]}]}',
        bom_JSONL='\ufeff{"a": 1, "b": 2}\n',
        n_ndjson='{"a": 1, "b": 2}\n',
        bom_tsv='\ufeffa\t"b\n',
        t_csv='a,"b"\n1,2\n',
        t_tsv='a\t"b\n',
        t_txt="words",
    )
    for name in ("t.parquet", "t.jsonl", "t.json", "u.json", "bom.JSONL", "n.ndjson"):
        assert columns_of(tmp_path / name) == (("a", "b"), True), name
    assert columns_of(tmp_path / "squad.json") == (("id", "context", "question", "answers"), True)
    assert columns_of(tmp_path / "lmflow.json") == (("prompt", "completion"), True)
    assert columns_of(tmp_path / "bom.tsv") == (("a", '"b'), False)
    assert columns_of(tmp_path / "t.csv") == (("a", "b"), False)
    assert columns_of(tmp_path / "t.tsv") == (("a", '"b'), False)  # a quotation mark is a character in a TSV
    assert columns_of(tmp_path / "t.txt") == (("text",), True)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("bad_jsonl", "{", "line 1 is no JSON"),
        ("bad_jsonl", "", "holds no example"),
        ("bad_jsonl", "{}", "holds no example"),
        ("bad_jsonl", "[1]", "line 1 is a list, expected a JSON object"),
        ("bad_json", "[]", "holds no example"),
        ("bad_json", "[" * 100_000, "is no JSON that can be read"),
        ("bad_json", '{"rows": []}', "holds an object with rows, expected a list of objects"),
        ("bad_json", "[1]", "line 1 is a number, expected a JSON object"),
        ("bad_csv", "", "holds no example"),
        ("bad_parquet", "no parquet", "is no readable Parquet file"),
        ("bad_txt", "", "holds no example"),
    ],
)
def test_damaged_files(tmp_path, name, text, message):
    fill(tmp_path, **{name: text})
    with pytest.raises(SourceError, match=message):
        columns_of(tmp_path / name.replace("_", "."))
