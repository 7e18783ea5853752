from __future__ import annotations

import json
from pathlib import Path

import pytest

from loftq.data.rows import read_rows
from loftq.errors import SourceError


def written(tmp_path: Path, name: str, text: str) -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def rows(path: Path, **options) -> list[tuple[dict, str]]:
    return [(row.values, row.where.removeprefix(str(path))) for row in read_rows(path, **options)]


def test_jsonl_counts_lines_from_one_and_skips_empty_ones(tmp_path):
    path = written(tmp_path, "a.jsonl", '{"text": "one"}\n\n{"text": "zwö"}\n')
    assert rows(path) == [({"text": "one"}, ", line 1"), ({"text": "zwö"}, ", line 3")]


def test_csv_keeps_quoted_fields_and_names_the_line_a_row_begins_in(tmp_path):
    path = written(tmp_path, "a.csv", 'text,label\n"a, ""b""\nc",1\n\nd,0\n')
    assert rows(path) == [({"text": 'a, "b"\nc', "label": "1"}, ", line 2"), ({"text": "d", "label": "0"}, ", line 5")]


def test_tsv_takes_quotation_marks_as_they_are(tmp_path):
    path = written(tmp_path, "a.tsv", 'sentence\tlabel\n"half a quote\t1\n')
    assert rows(path) == [({"sentence": '"half a quote', "label": "1"}, ", line 2")]


def test_tsv_without_header_has_numbered_columns(tmp_path):
    path = written(tmp_path, "a.tsv", "gj04\t1\t\tThey left.\ngj04\t0\t*\tThem left.\n")
    assert [values["3"] for values, _ in rows(path, numbered=True)] == ["They left.", "Them left."]


def test_parquet(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(arrow.table([[0], [1]], names=["text", "text"]), path)
    with pytest.raises(SourceError, match=r"^\S+a.parquet has the column 'text' twice, expected different names"):
        rows(path)
    parquet.write_table(arrow.table({"text": ["a", "b"], "label": [0, 1]}), path)
    assert rows(path) == [({"text": "a", "label": 0}, ", row 0"), ({"text": "b", "label": 1}, ", row 1")]


def test_text_is_one_row(tmp_path):
    path = written(tmp_path, "a.txt", "one\n\ntwo\n")
    assert rows(path) == [({"text": "one\n\ntwo\n"}, "")]


def test_json_list_names_the_line_an_object_begins_in(tmp_path):
    path = written(tmp_path, "a.json", '[\n {"text": "a"},\n\n {"text":\n  "b"}, {"text": "c"}]')
    assert [where for _, where in rows(path)] == [", line 2", ", line 4", ", line 5"]


@pytest.mark.parametrize(
    ("kind", "instance", "expected"),
    [
        ("text_only", {"text": "a"}, {"text": "a"}),
        ("text2text", {"input": "a", "output": "b"}, {"prompt": "a", "completion": "b"}),
        (
            "conversation",
            {"system": "s", "messages": [{"role": "user", "content": "a"}]},
            {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]},
        ),
    ],
)
def test_lmflow(tmp_path, kind, instance, expected):
    text = json.dumps({"type": kind, "instances": [instance, instance]}, indent=1)
    path = written(tmp_path, "a.json", text)
    found = rows(path)
    assert [values for values, _ in found] == [expected, expected]
    assert found[0][1] == ", line 4"


def test_lines_of_a_list_whose_key_also_occurs_as_a_value(tmp_path):
    path = written(tmp_path, "a.json", '{"version": "data", "x": [0], "data": [{"text": "a"}]}')
    assert rows(path) == [({"text": "a"}, ", item 0")]  # its place in the text is not certain, so it is counted


def test_squad(stories_dir):
    path = stories_dir.parent / "squad" / "dev_xquad_en.json"
    found = rows(path)
    assert len(found) == 1190
    values, where = found[0]
    start = values["answers"]["answer_start"][0]
    assert values["context"][start:].startswith(values["answers"]["text"][0])
    assert where == f", line 3, question {values['id']}"


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": \n', "line 2 is no JSON (Expecting value at column 6); repair"),
        ("a.jsonl", '{"a": 1}\n[1]\n', "line 2 is a list, expected a JSON object"),
        ("a.jsonl", "", "has no rows"),
        ("a.csv", "a,b\n1,2\n3\n", "line 3 has 1 columns, expected 2"),
        ("a.csv", 'a,b\n"1"x,2\n', "line 2 cannot be read"),
        ("a.csv", 'a,b\n1,2\n"3,4\n5,6\n', "line 3 cannot be read"),
        ("a.csv", 'a,b\n"1\n1",2,3\n', "line 2 has 3 columns, expected 2"),
        ("a.csv", "a,b\n", "has no rows"),
        ("a.json", '{"a": 1}\n{"a": 2}', "line 2 is no JSON (Extra data); one object a line is a .jsonl file"),
        ("a.json", '[{"a": 1},\n{"a": }]', "line 2 is no JSON"),
        ("a.json", '{"a": 1}', "expected a list of objects"),
        ("a.json", '[{"a": 1},\n7]', "line 2 is a number"),
        ("a.json", '{"type": "text2text", "instances": [\n{"input": "a"}]}', "line 2 lacks 'output'"),
        ("a.json", '{"type": "image", "instances": [{"a": 1}]}', "expected LMFlow's text_only"),
        ("a.json", '{"data": [{"paragraphs": [{"qas": [{"id": "q"}]}]}]}', "lacks 'answers' of SQuAD's format"),
        ("a.txt", " \n", "has no rows"),
        ("a.parquet", "PAR1 not", "is no readable Parquet file"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_line(tmp_path, name, text, words):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    path = written(tmp_path, name, text)
    with pytest.raises(SourceError) as error:
        rows(path)
    assert words in str(error.value), error.value
    assert str(path) in str(error.value)


def test_not_utf8(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n' * 700 + b'{"a": "\xff"}\n' + b'{"a": 1}\n' * 700)
    with pytest.raises(SourceError, match=r"a.jsonl, line 701 is not UTF-8 \(invalid start byte\); convert"):
        rows(path)


def test_lines_of_qqp_without_all_fields_are_left_out_and_said(tmp_path):
    header = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
    path = written(tmp_path, "a.tsv", f"{header}0\t1\t2\ta\tb\t0\n1\t3\t4\tc\nd\te\t1\n2\t5\t6\tf\tg\t1\n")
    found = []
    assert [values["question1"] for values, _ in rows(path, left_out=found.append)] == ["a", "f"]
    assert found == [f"{path}, line 3", f"{path}, line 4"]
    with pytest.raises(SourceError, match="line 3 has 4 columns, expected 6"):
        rows(written(tmp_path, "b.tsv", path.read_text().replace("qid1", "q1")))


def test_bad_luck_with_files_is_one_sentence(tmp_path, monkeypatch):
    for name, text, words in (
        ("a.csv", "text,label,text\na,0,b\n", r"a.csv, line 1 has the column 'text' twice"),
        ("a.jsonl", "[" * 100_000, "a.jsonl, line 1 is no JSON"),
        ("a.json", "[" * 100_000, "a.json is no JSON that can be read"),
        ("b.json", '[{"text": ' + "1" * 5000 + "}]", "b.json is no JSON that can be read"),
    ):
        with pytest.raises(SourceError, match=words):
            rows(written(tmp_path, name, text))
    path = written(tmp_path, "c.jsonl", "{}")

    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(SourceError, match=r"c.jsonl cannot be read \(Permission denied\)"):
        rows(path)


def test_bom_crlf_and_empty_lines(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbftext,label\r\n\r\na,0\r\n")
    assert rows(path) == [({"text": "a", "label": "0"}, ", line 3")]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}')
    assert rows(path) == [({"text": "a"}, ", line 1"), ({"text": "b"}, ", line 3")]
