"""``loftq generate`` prints what the model adds to a prompt."""

import json

import pytest
import torch
from typer.testing import CliRunner

from byte_tokenizer import byte_tokenizer
from loftq.cli import app
from loftq.errors import ConfigError
from tiny import tiny_model

CHAT = "{% for m in messages %}<{{ m.content }}>{% endfor %}"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model = tiny_model("llama")
    torch.manual_seed(0)
    model.resize_token_embeddings(259, mean_resizing=False)
    model.save_pretrained(folder)
    byte_tokenizer(bos=True, chat_template=CHAT).save_pretrained(folder)
    return folder


def greedy(folder, ids, new):
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder)
    output = model.generate(torch.tensor([ids]), max_new_tokens=new, do_sample=False)[0, len(ids) :]
    return byte_tokenizer().decode(output, skip_special_tokens=True)


def run(*arguments):
    return CliRunner().invoke(app, ["generate", *map(str, arguments)])


def test_continuation(model_dir):
    expected = greedy(model_dir, byte_tokenizer(bos=True)("Once").input_ids, 7)
    options = (model_dir, "-p", "Once", "--max-new-tokens", 7)
    done = run(*options, "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result == {"model": str(model_dir), "prompt": "Once", "continuation": expected}
    assert run(*options).stdout == expected + "\n"


def test_chat(model_dir):
    """The template in place of the tokenizer's own special tokens."""
    expected = greedy(model_dir, byte_tokenizer()("<Hi>").input_ids, 7)
    done = run(model_dir, "-p", "Hi", "--chat", "--max-new-tokens", 7, "--json")
    assert json.loads(done.stdout)["continuation"] == expected


def test_seeds(model_dir):
    drawn = [
        run(model_dir, "-p", "Hi", "--temperature", 1, "--seed", seed, "--max-new-tokens", 9).output
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_too_long(model_dir):
    done = run(model_dir, "-p", "Hi", "--max-new-tokens", 100)
    assert isinstance(done.exception, ConfigError)
    assert "the model has 64 positions; shorten the prompt or choose fewer new tokens" in str(done.exception)
