from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from loftq.data.rows import read_rows
from loftq.errors import ConfigError, SourceError


def texts(*arguments, **options) -> list[str]:
    return [row.values["text"] for row in read_rows(*arguments, **options)]


def test_a_folder_has_one_file_a_split(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "a"}')
    (tmp_path / "dev.jsonl").write_text('{"text": "b"}')
    (tmp_path / "SOURCE.md").write_text("notes")
    assert texts(tmp_path) == ["a"]
    assert texts(tmp_path, split="validation") == ["b"]


def test_a_longer_name_will_do_where_it_is_the_only_one(tmp_path):
    (tmp_path / "valid.unk.txt").write_text("b")
    assert texts(tmp_path, split="validation") == ["b"]
    (tmp_path / "valid.raw.txt").write_text("c")
    with pytest.raises(SourceError, match="expected one; name the file itself"):
        texts(tmp_path, split="validation")


@pytest.mark.parametrize(
    ("split", "names"),
    [
        ("train", ("train.csv", "train.jsonl")),
        ("validation", ("dev.jsonl", "validation.jsonl")),
        ("train", ("train-00000-of-00001.jsonl", "train.jsonl")),
    ],
)
def test_of_two_files_for_a_split_none_is_chosen(tmp_path, split, names):
    for name in names:
        (tmp_path / name).write_text('{"text": "a"}')
    with pytest.raises(SourceError) as raised:
        texts(tmp_path, split=split)
    words = f"{tmp_path} has {names[0]} and {names[1]} for the split {split!r}, expected one; name the file itself"
    assert str(raised.value) == words
    (tmp_path / names[0]).unlink()
    assert texts(tmp_path, split=split) == ["a"]


def test_limit(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' * 3 + "broken")
    assert texts(path, limit=2) == ["a", "a"]


@pytest.mark.parametrize("name", ["missing.jsonl", "no such thing", "folder/missing.csv"])
def test_what_is_not_there(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match="does not exist, expected a file, a folder of splits or a hub data set"):
        texts(name)


def test_a_split_that_is_not_there(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "a"}')
    with pytest.raises(
        SourceError, match=r"has no file for the split 'test', expected test.jsonl or the like; it has train"
    ):
        texts(tmp_path, split="test")


def hub(monkeypatch, load_dataset) -> None:
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))


def test_hub_data_sets_by_id_config_and_split(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    asked = []

    def load_dataset(identifier, config, *, split, streaming):
        asked.append((identifier, config, split, streaming))
        return [{"text": "a", "label": 1}, {"text": "b", "label": -1}]

    hub(monkeypatch, load_dataset)
    found = list(read_rows("nyu-mll/glue:rte", split="validation"))
    assert asked == [("nyu-mll/glue", "rte", "validation", True)]
    assert [row.values["label"] for row in found] == [1, -1]
    assert found[1].where == "nyu-mll/glue:rte validation, row 1"


def test_a_sum_of_splits_is_one_after_the_other(monkeypatch, tmp_path):
    """ANLI's three rounds; not every version of the package streams them together."""
    monkeypatch.chdir(tmp_path)
    hub(monkeypatch, lambda identifier, *, split, streaming: [{"text": split}])
    found = list(read_rows("facebook/anli", split="train_r1+train_r2+train_r3"))
    assert [row.values["text"] for row in found] == ["train_r1", "train_r2", "train_r3"]


def test_hub_that_does_not_answer(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def load_dataset(*arguments, **options):
        raise ConnectionError("no route\nto host")

    hub(monkeypatch, load_dataset)
    with pytest.raises(
        SourceError, match=r"data set glue could not be read \(no route\); check its name, its split 'train'"
    ):
        list(read_rows("glue"))


def test_without_the_package(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r'pip install "loftq\[train\]"'):
        list(read_rows("glue"))


def test_the_real_library_reads_local_files_as_it_would_the_hub(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    folder = tmp_path / "owner" / "set"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    monkeypatch.chdir(tmp_path)
    from loftq.data.rows import _hub_rows

    assert [row.values for row in _hub_rows("owner/set", "train")] == [{"text": "a"}, {"text": "b"}]


def test_shards_of_a_split(tmp_path):
    for number in (0, 1):
        (tmp_path / f"train-0000{number}-of-00002.jsonl").write_text(f'{{"text": "{number}"}}\n')
    assert texts(tmp_path) == ["0", "1"]
    assert texts(tmp_path / "train-*.jsonl") == ["0", "1"]
    assert list(read_rows(tmp_path))[1].where == f"{tmp_path / 'train-00001-of-00002.jsonl'}, line 1"
    (tmp_path / "train-00001-of-00002.jsonl").unlink()
    with pytest.raises(SourceError, match=r"lacks 1 of the files of which train-00000-of-00002\.jsonl is one"):
        texts(tmp_path)
    with pytest.raises(SourceError, match="does not exist, expected a file"):
        texts(tmp_path / "other-*.jsonl")
