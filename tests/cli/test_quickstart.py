"""``loftq quickstart`` on a tiny model with a tokenizer, and what it refuses."""

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from loftq import quickstart
from loftq.cli import app
from loftq.config import default_method
from loftq.errors import OutputError
from tiny import tiny_model


@pytest.fixture
def model_dir(tmp_path):
    model = tiny_model("llama")
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;:()'\"-_ "
    vocabulary = {"<unk>": 0, **{c: i + 3 for i, c in enumerate(dict.fromkeys(letters))}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    return folder


@pytest.mark.slow  # five runs of the command line in processes of their own
def test_rows_and_results(model_dir, tmp_path):
    out = tmp_path / "out"
    arguments = [
        "quickstart",
        "--model",
        str(model_dir),
        "--out",
        str(out),
        "--rank",
        "4",
        "--max-tokens",
        "200",
        "--json",
    ]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    results = json.loads(done.stdout)
    assert results == json.loads((out / quickstart.RESULTS).read_text())
    rows = {row["label"]: row for row in results["rows"]}
    expected = ["full precision"]
    for variant in quickstart.VARIANTS:
        expected += [variant.label, f"{variant.label}, refined"] if variant.data else [variant.label]
    assert list(rows) == expected
    assert rows["LoftQ as published, 2 bits"]["weight_error"] < rows["QLoRA, 2 bits"]["weight_error"]
    errors = [rows[f"{default_method(bits, True)}, {bits} bits"]["weight_error"] for bits in (2, 3, 4)]
    assert errors == sorted(errors, reverse=True)
    assert all(row["peak_memory_bytes"] > 1e8 for row in results["rows"][1:])
    assert sorted(p.name for p in out.iterdir()) == [quickstart.KEPT, quickstart.RESULTS]


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(OutputError, match="holds something else"):
        next(quickstart.run(None, tmp_path))
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_a_row_as_the_table_shows_it():
    row = quickstart.Row(
        "loftq, 2 bits", 2.2501, 86_600_000, 78_200_000, 0.2239, 697.04, 35.77, 14.3, 838_000_000, None
    )
    cells = ["loftq, 2 bits", "2.25", "86.6 MB", "78.2 MB", "0.224", "697 ± 35.77", "14.3", "838.0 MB"]
    assert quickstart.cells(row) == cells
    assert len(quickstart.COLUMNS) == len(cells)
