from __future__ import annotations

import json

import pytest
import torch
import transformers as tf

from letters import letters
from loftq.data.check import label_text, summary, tokens
from loftq.data.collate import Collator, padding_id
from loftq.data.prepare import DataSettings, prepare
from loftq.errors import ConfigError, SourceError
from tiny import tiny_model


@pytest.fixture(scope="module")
def data(stories_dir):
    return stories_dir.parent


def written(tmp_path, *rows: dict) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def test_sst2(data, minilm_dir):
    tokenizer = tf.AutoTokenizer.from_pretrained(minilm_dir)
    found, names = prepare(DataSettings("classification", str(data / "glue_sst2"), split="validation"), tokenizer)
    assert names == ["0", "1"]
    # dev.tsv: 6,920 in train, 872 in dev as GLUE publishes it, or a larger carrier file: what the file has
    lines = (data / "glue_sst2" / "dev.tsv").read_text(encoding="utf-8").splitlines()
    assert len(found) == len(lines) - 1
    first, label = lines[1].split("\t")
    assert tokenizer.decode(found[0].input_ids, skip_special_tokens=True) == first.strip()
    assert found[0].labels == int(label)
    assert sum(summary(found, names)["labels"].values()) == len(found)


def test_cola_has_no_header_and_its_columns_are_numbered(data, minilm_dir):
    tokenizer = tf.AutoTokenizer.from_pretrained(minilm_dir)
    settings = DataSettings("classification", str(data / "glue_cola" / "dev.tsv"), map={"3": "text", "1": "label"})
    found, names = prepare(settings, tokenizer)
    assert names == ["0", "1"]
    assert tokenizer.decode(found[0].input_ids, skip_special_tokens=True).startswith("the sailors rode the breeze")


def test_gsm8k(data):
    settings = DataSettings(
        "completion", str(data / "gsm8k"), split="test", prompt_template="{prompt}\n", max_length=4000, limit=20
    )
    found, _ = prepare(settings, letters())
    rows = [json.loads(line) for line in (data / "gsm8k" / "test.jsonl").open(encoding="utf-8")][:20]
    for example, row in zip(found, rows, strict=True):
        text = letters().decode(example.input_ids)
        assert text == f"<s>{row['question']}\n{row['answer']}</s>"
        kept = letters().decode([int(label) for label in example.labels if label != -100])
        assert kept == row["answer"] + "</s>"


def test_squad_windows_hold_the_answers(data, minilm_dir):
    tokenizer = tf.AutoTokenizer.from_pretrained(minilm_dir)
    settings = DataSettings("qa", str(data / "squad" / "train20.json"), limit=60, max_length=128, doc_stride=64)
    found, _ = prepare(settings, tokenizer)
    assert len(found) > 60
    hit = [e for e in found if e.labels[1]]
    assert {e.about["id"] for e in hit} == {e.about["id"] for e in found}  # every answer is whole in some window
    for e in hit:
        (start, end), offsets = e.labels, e.about["offsets"]
        text = e.about["context"][offsets[start][0] : offsets[end][1]]
        assert e.about["answers"][0] in text, (text, e.about["answers"])


def test_xsum(data):
    settings = DataSettings("summarization", str(data / "xsum"), split="test", max_length=200, limit=5)
    found, _ = prepare(settings, letters())
    assert len(found) == found.cut == 5
    assert all(len(e.input_ids) == 200 and len(e.labels) <= 128 for e in found)


def test_positions_of_the_model_bound_the_length(tmp_path):
    path = written(tmp_path, {"text": "abc"})
    config = tf.LlamaConfig(max_position_embeddings=64)
    found, _ = prepare(DataSettings("causal", path), letters(), config)
    assert found.max_length == 64
    with pytest.raises(ConfigError, match="max_length is 65, but the model has 64 positions"):
        prepare(DataSettings("causal", path, max_length=65), letters(), config)
    roberta = tf.RobertaConfig(max_position_embeddings=514)
    assert DataSettings("qa", path, max_length=512).length(roberta) == 512
    with pytest.raises(ConfigError, match="has 512 positions"):
        DataSettings("qa", path, max_length=513).length(roberta)


@pytest.mark.parametrize(
    "changes",
    [
        {"task": "clasification"},
        {"data": ""},
        {"map": "a=b"},
        {"max_length": 1},
        {"limit": 0},
        {"doc_stride": 0},
        {"max_target_length": "long"},
        {"packing": "yes"},
        {"task": "qa", "packing": True},
        {"prompt_template": "Q: {question}"},
    ],
)
def test_settings_that_do_not_fit(changes):
    with pytest.raises(ConfigError):
        DataSettings(**{"task": "completion", "data": "a.jsonl", **changes})


def test_settings_go_to_a_dict_and_back():
    settings = DataSettings("qa", "a.json", map={"a": "context"}, limit=3)
    assert DataSettings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings
    with pytest.raises(ConfigError, match="did you mean 'split'"):
        DataSettings.from_dict({"task": "qa", "data": "a", "splt": "x"})


def test_broken_row_in_the_middle(tmp_path):
    path = written(tmp_path, {"text": "a", "label": "x"}, {"text": "b", "label": "y"}, {"text": None, "label": "y"})
    with pytest.raises(SourceError, match=r"rows.jsonl, line 3: text is None, expected a text"):
        prepare(DataSettings("classification", path), letters())


@pytest.mark.parametrize(
    ("task", "name", "row"),
    [
        ("completion", "llama", {"prompt": "ab", "completion": "cd"}),
        ("summarization", "bart", {"text": "abcd", "summary": "ab"}),
    ],
)
def test_batches_fit_the_models(tmp_path, task, name, row):
    tokenizer = letters()
    path = written(tmp_path, row, {k: v * 2 for k, v in row.items()})
    found, _ = prepare(DataSettings(task, path, max_length=30), tokenizer)
    model = tiny_model(name)
    start = model.prepare_decoder_input_ids_from_labels if task == "summarization" else None
    batch = Collator(task, tokenizer.pad_token_id, multiple_of=4, decoder_start=start)(list(found))
    batch = {k: v.clamp(max=95) if k.endswith("ids") or k == "labels" else v for k, v in batch.items()}
    assert batch["input_ids"].shape[1] % 4 == 0
    loss = model(**batch).loss
    assert torch.isfinite(loss)


def test_padding_changes_nothing(tmp_path):
    path = written(tmp_path, {"prompt": "ab", "completion": "cd"}, {"prompt": "abcdef", "completion": "ghi"})
    found, _ = prepare(DataSettings("completion", path), letters())
    assert torch.equal(
        Collator("completion", 0)([found[0]])["labels"][0], Collator("completion", 0)(list(found))["labels"][0, :6]
    )
    assert (Collator("completion", 0)(list(found))["labels"][0, 6:] == -100).all()


def test_what_check_shows(tmp_path):
    path = written(tmp_path, {"prompt": "ab", "completion": "c"})
    found, _ = prepare(DataSettings("completion", path), letters())
    shown = tokens(found[0], letters(), "completion")
    assert [(t.text, t.learned) for t in shown] == [
        ("<s>", False),
        ("a", False),
        ("b", False),
        ("c", True),
        ("</s>", True),
    ]
    assert label_text(found[0], letters(), "completion", None) is None
    assert summary(found, None)["predicted_tokens"] == 2


def test_settings_that_lack_something_or_do_not_fit_the_decoder(tmp_path):
    with pytest.raises(ConfigError, match="the data settings have no data"):
        DataSettings.from_dict({"task": "qa"})
    with pytest.raises(ConfigError, match="labels is None"):
        DataSettings("classification", "a", labels=None)
    settings = DataSettings("summarization", written(tmp_path, {"text": "a", "summary": "b"}), max_target_length=65)
    with pytest.raises(ConfigError, match="max_target_length is 65, but the model has 64 positions"):
        prepare(settings, letters(), tiny_model("bart").config)


def test_padding_is_a_token_that_the_model_has():
    model = tiny_model("gpt2")
    assert model.config.pad_token_id is None
    tokenizer = letters()
    assert padding_id(model, tokenizer) == model.config.pad_token_id == 0
    model.config.pad_token_id = -1
    tokenizer.pad_token_id, tokenizer.eos_token_id = 96, 2  # the model has 96 embeddings
    assert padding_id(model, tokenizer) == model.config.pad_token_id == 2
    model.config.pad_token_id = 7
    assert padding_id(model, tokenizer) == 7


def test_joined_rows_are_for_running_text(tmp_path):
    data = written(tmp_path, {"text": "a"}, {"text": ""}, {"text": "b"})
    found, _ = prepare(DataSettings("causal", data, join_rows=True), letters())
    assert [letters().decode(e.input_ids) for e in found] == ["<s>a\n\n\n\nb"]
    for wrong in ({"task": "completion"}, {"packing": False}, {"data": "a.safetensors:ids"}):
        with pytest.raises(ConfigError, match="join_rows is on, but"):
            DataSettings(**{"task": "causal", "data": data, "join_rows": True, **wrong})


def test_lines_that_a_known_file_is_read_without_are_said(tmp_path):
    lines = ["id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "0\t1\t2\ta\tb\t0", "1\t3", "2\t5\t6\tf\t\t1"]
    path = tmp_path / "train.tsv"
    path.write_text("\n".join(lines))
    settings = DataSettings("classification", str(path), map={"is_duplicate": "label"})
    found, names = prepare(settings, letters(pair=True))
    assert (names, found.rows) == (["0", "1"], 2)
    assert found.notes() == [
        "1 of 3 lines have fewer fields than the header, as in GLUE's own file of QQP, and were left out, first "
        f"{path}, line 3"
    ]
