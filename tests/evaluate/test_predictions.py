"""Predictions come back as they were written, and a file is whole or absent."""

import json
import math

import numpy as np
import pytest
import torch

from loftq.errors import OutputError, SourceError
from loftq.evaluate.predictions import Prediction, read_predictions, write_predictions

ROWS = [
    Prediction("q1", "2 + 2?\nThink.", "#### 4", "4", 1.0),
    Prediction(2, "Où?", "zwölf\u2028½", ["a", "b"], 0.25),
    Prediction("q3", "", 1, 0),
    Prediction("q4", "x", 2.5, 2.75, None),
]


def test_round_trip(tmp_path):
    path = tmp_path / "new" / "predictions.jsonl"
    write_predictions(path, iter(ROWS))
    assert read_predictions(path) == ROWS
    lines = path.read_text(encoding="utf-8").split("\n")
    assert len(lines) == 5
    assert lines[-1] == ""
    first = '{"id": "q1", "input": "2 + 2?\\nThink.", "prediction": "#### 4", "reference": "4", "score": 1.0}'
    assert lines[0] == first
    assert "score" not in json.loads(lines[2])
    assert "Où" in lines[1]
    assert [p.name for p in path.parent.iterdir()] == ["predictions.jsonl"]


def test_other_libraries_numbers(tmp_path):
    rows = [
        Prediction(np.int64(1), "a", np.float32(0.5), torch.tensor(3), np.float64(1)),
        Prediction(2, "b", np.array([1, 2]), (math.inf, -1), math.nan),
    ]
    write_predictions(tmp_path / "p.jsonl", rows)
    expected = [Prediction(1, "a", 0.5, 3, 1.0), Prediction(2, "b", [1, 2], [None, -1], None)]
    assert read_predictions(tmp_path / "p.jsonl") == expected


def test_half_of_a_surrogate_pair(tmp_path):
    write_predictions(tmp_path / "p.jsonl", [Prediction("x", "\ud83d!", "é\\", "y")])
    assert read_predictions(tmp_path / "p.jsonl") == [Prediction("x", "\ud83d!", "é\\", "y")]


def test_an_interrupted_file_is_not_there(tmp_path):
    path = tmp_path / "p.jsonl"
    write_predictions(path, ROWS[:1])

    def rows():
        yield ROWS[1]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_predictions(path, rows())
    assert read_predictions(path) == ROWS[:1]


def test_no_predictions(tmp_path):
    write_predictions(tmp_path / "p.jsonl", [])
    assert read_predictions(tmp_path / "p.jsonl") == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"id": 1, "input": "", "prediction": 1, "reference": 1}\n{"id": 2', r"line 2 of .*p\.jsonl is no JSON"),
        ("[1, 2]", "line 1 of .* is no prediction, expected an object with id"),
        ('{"id": 1, "input": "", "prediction": 1}', "is no prediction"),
        ('{"id": 1, "input": "", "prediction": 1, "reference": 1, "more": 1}', "is no prediction"),
    ],
)
def test_damaged_files(tmp_path, text, message):
    path = tmp_path / "p.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SourceError, match=message):
        read_predictions(path)


def test_missing_and_unwritable(tmp_path):
    with pytest.raises(SourceError, match="cannot be read"):
        read_predictions(tmp_path / "p.jsonl")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(SourceError, match="cannot be read"):
        read_predictions(tmp_path / "bytes")
    with pytest.raises(OutputError, match="bytes is a file, expected a folder"):
        write_predictions(tmp_path / "bytes" / "p.jsonl", ROWS)
