"""lm-evaluation-harness on a packed model, offline: a task of our own, and its scores by hand from the model's logits."""

import json
import logging
import math
import socket

import pytest
import torch

import loftq
from byte_tokenizer import byte_tokenizer
from loftq.errors import ConfigError, SourceError
from tiny import tiny_model

pytest.importorskip("lm_eval", reason="needs lm_eval")

from loftq.evaluate.lm_eval import run_tasks
from loftq.evaluate.predictions import read_predictions

QUESTIONS = [
    {"question": "ab", "choices": ["x", "yy", "zzz"], "answer": 0},
    {"question": "abc d", "choices": ["no", "yes", "it"], "answer": 2},
    {"question": "q", "choices": ["1", "2", "3"], "answer": 1},
    {"question": "the", "choices": ["cat", "dog", "cow"], "answer": 1},
    {"question": "zz", "choices": ["aa", "b", "ccc"], "answer": 1},
    {"question": "k l m", "choices": ["n", "o", "pq"], "answer": 0},
]
TASK = """\
task: own_choice
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: " "
metric_list:
  - {{metric: acc}}
  - {{metric: acc_norm}}
metadata: {{version: 1.5}}
"""


@pytest.fixture(scope="module")
def packed():
    """A tiny Llama at 2 bits with its adapter, and embeddings for every byte."""
    model = tiny_model("llama")
    torch.manual_seed(0)
    model.resize_token_embeddings(259, mean_resizing=False)
    return loftq.quantize_model(model, loftq.LoftQConfig(bits=2, rank=4, num_iter=1, calibration=None))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two tasks; nothing may go out, and the data's cache is here."""

    def refuse(*args, **kwargs):
        raise OSError("no network in this test")

    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS), encoding="utf-8")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "own.yaml").write_text(TASK.format(data=data), encoding="utf-8")
    text = (
        f"task: own_text\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        "output_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{choices[answer]}}'\n"
        "generation_kwargs: {until: ['x'], max_gen_toks: 4}\nmetric_list: [{metric: exact_match}]\n"
    )
    (tasks / "text.yaml").write_text(text, encoding="utf-8")
    (tasks / "broken.yaml").write_text(
        "task: own_broken\ndataset_path: json\ndataset_kwargs: {data_files: {test: /no/such.jsonl}}\ntest_split: test\n"
        "doc_to_text: a\ndoc_to_target: b\n",
        encoding="utf-8",
    )
    return tasks


def log_likelihood(model, tokenizer, context, continuation):
    """log p(continuation | context), from one forward pass over the two."""
    begin, ids = len(tokenizer(context).input_ids), tokenizer(context + continuation).input_ids
    with torch.no_grad():
        logs = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].double(), -1)
    return sum(float(logs[i - 1, ids[i]]) for i in range(begin, len(ids)))


def by_hand(model, questions, examples=""):
    """Shares of questions whose right choice is likeliest, and is likeliest per character."""
    tokenizer, hits, normed = byte_tokenizer(), [], []
    for q in questions:
        scores = [log_likelihood(model, tokenizer, examples + q["question"], " " + c) for c in q["choices"]]
        hits.append(max(range(3), key=scores.__getitem__) == q["answer"])
        per = [s / len(c) for s, c in zip(scores, q["choices"], strict=True)]
        normed.append(max(range(3), key=per.__getitem__) == q["answer"])
    return sum(hits) / len(hits), sum(normed) / len(normed)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_multiple_choice(packed, folder, batch_size, capfd):
    tokenizer = byte_tokenizer(pad_token=None)
    packed.train()
    found = run_tasks(packed, tokenizer, ["own_choice"], batch_size=batch_size, include_path=folder)
    assert packed.training
    assert tokenizer.pad_token is None  # the harness gives its own copy one
    assert capfd.readouterr().err == ""
    packed.eval()
    acc, acc_norm = by_hand(packed, QUESTIONS)
    assert 0 < acc < 1, acc
    assert json.loads(json.dumps(found)) == found
    n = len(QUESTIONS)
    task = found.pop("tasks")["own_choice"]
    assert found == {"lm_eval": found["lm_eval"], "limit": None, "batch_size": batch_size, "seed": 0}
    assert {k: task[k] for k in ("version", "num_fewshot", "samples")} == {
        "version": 1.5,
        "num_fewshot": 0,
        "samples": n,
    }
    for name, value in (("acc", acc), ("acc_norm", acc_norm)):
        metric = task["metrics"][name]
        assert metric["value"] == pytest.approx(value), (name, metric)
        assert metric["stderr"] == pytest.approx(math.sqrt(value * (1 - value) / (n - 1)))
        assert metric["higher_is_better"] is True
    assert set(task["metrics"]) == {"acc", "acc_norm"}


def test_limit_and_generation(packed, folder, tmp_path):
    options = {"limit": 2, "include_path": str(folder), "predictions": tmp_path / "answers.jsonl"}
    found = run_tasks(packed, byte_tokenizer(), ["own_choice", "own_text"], **options)
    rows = read_predictions(tmp_path / "answers.jsonl")
    assert [row.id for row in rows] == ["own_choice/0", "own_choice/1", "own_text/0", "own_text/1"]
    assert [row.input for row in rows] == ["ab", "abc d", "ab", "abc d"]
    likelihoods = [[float(value) for value, _ in row.prediction] for row in rows[:2]]
    chosen = [scores.index(max(scores)) for scores in likelihoods]
    assert [row.score for row in rows[:2]] == [float(c == q["answer"]) for c, q in zip(chosen, QUESTIONS, strict=False)]
    assert all(isinstance(row.prediction, str) for row in rows[2:])
    assert [row.reference for row in rows[2:]] == ["x", "it"]
    assert list(found["tasks"]) == ["own_choice", "own_text"]
    assert found["limit"] == 2
    assert [task["samples"] for task in found["tasks"].values()] == [2, 2]
    assert found["tasks"]["own_choice"]["metrics"]["acc"]["value"] == pytest.approx(by_hand(packed, QUESTIONS[:2])[0])
    (metric,) = found["tasks"]["own_text"]["metrics"].values()
    assert metric["value"] == 0  # a random model writes none of the answers


def test_examples(packed, folder):
    """The only two examples there are, of which the harness leaves out the question itself: one is left, the other.

    Solved, with two line ends behind it, it stands before the question.
    """
    options = {"num_fewshot": 1, "include_path": folder}
    pair = QUESTIONS[:2]
    (folder.parent / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in pair), encoding="utf-8")
    found = run_tasks(packed, byte_tokenizer(), ["own_choice"], **options)["tasks"]["own_choice"]
    assert (found["num_fewshot"], found["samples"]) == (1, 2)
    expected = []
    for question, other in (pair, pair[::-1]):
        example = f"{other['question']} {other['choices'][other['answer']]}\n\n"
        expected.append(by_hand(packed, [question], example)[0])
    assert found["metrics"]["acc"]["value"] == pytest.approx(sum(expected) / 2)


def test_mistakes(packed, folder):
    tokenizer = byte_tokenizer()
    with pytest.raises(ConfigError, match="no tasks were given"):
        run_tasks(packed, tokenizer, [])
    with pytest.raises(ConfigError, match="limit is 0"):
        run_tasks(packed, tokenizer, ["own_choice"], limit=0, include_path=folder)
    with pytest.raises(ConfigError, match=r"include_path is nowhere, which is no folder"):
        run_tasks(packed, tokenizer, ["own_choice"], include_path="nowhere")
    with pytest.raises(SourceError, match=r"own_broken cannot be loaded .*such"):
        run_tasks(packed, tokenizer, ["own_broken"], include_path=folder)
    with pytest.raises(ConfigError, match="num_fewshot is 6, expected at most 5, since own_choice"):
        run_tasks(packed, tokenizer, ["own_choice"], num_fewshot=6, include_path=folder)
    with pytest.raises(SourceError, match="own_broken, own_choice cannot be loaded"):
        run_tasks(packed, tokenizer, ["own_broken", "own_choice"], include_path=folder)
    with pytest.raises(ConfigError, match="a BertModel cannot write texts"):
        run_tasks(tiny_model("bert"), tokenizer, ["own_choice"], include_path=folder)
    assert logging.getLogger("lm_eval").level == logging.NOTSET


@pytest.mark.slow  # lists the harness's 15,000 tasks
def test_unknown_tasks(packed, folder):
    names = ["own_choise", "own_choice", "hellaswagg", "xyzzy"]
    with pytest.raises(ConfigError) as error:
        run_tasks(packed, byte_tokenizer(), names, include_path=folder)
    message = str(error.value)
    assert (
        "no task 'own_choise' (did you mean own_choice or own_broken?), 'hellaswagg' (did you mean hellaswag or"
        in message
    )
    assert "?), 'xyzzy', expected names that" in message


def test_without_lm_eval(packed, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ConfigError, match=r'lm_eval, which is not installed; pip install "loftq\[lm-eval\]"'):
        run_tasks(packed, byte_tokenizer(), ["own_choice"])
