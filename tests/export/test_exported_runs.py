"""What `loftq export` writes of a run: a checkpoint that plain transformers reads as the model that was trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers as tf

import loftq
from letters import letters
from loftq.data.prepare import DataSettings
from loftq.data.tasks import task
from loftq.errors import BackboneMismatchError, ConfigError, OutputError, SourceError
from loftq.evaluate.models import load_for_inference
from loftq.finetune.load import load_run
from loftq.finetune.run import train
from loftq.finetune.settings import TrainSettings
from small import quantized
from words import write_rows

IDS = torch.arange(6, 26)[None]


@pytest.fixture(scope="module")
def masked(tmp_path_factory) -> Path:
    """A small quantized encoder with its head for masked words, which a task's head replaces, and no pooler."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 1}
    config = tf.BertConfig(vocab_size=len(letters()), max_position_embeddings=64, **sizes)
    return quantized(tf.BertForMaskedLM(config), tmp_path_factory.mktemp("masked"), letters(pair=True))


@pytest.fixture(scope="module")
def rows(tmp_path_factory, sums, letters_a_or_b) -> dict[str, str]:
    """Task -> a file of rows for it."""
    folder = tmp_path_factory.mktemp("rows")
    answer = {"context": "xxbxx", "question": "b?", "answers": {"text": ["b"], "answer_start": [2]}}
    return {
        "completion": sums,
        "classification": letters_a_or_b,
        "regression": write_rows(folder / "values.jsonl", [{"text": "a" * n, "score": n} for n in range(1, 9)]),
        "qa": write_rows(folder / "answers.jsonl", [answer] * 8),
        "summarization": write_rows(folder / "texts.jsonl", [{"text": c * 5, "summary": c * 2} for c in "abcdefgh"]),
    }


def trained(out: Path, name: str, data: str, **where) -> Path:
    """A run of two long steps, after which neither the adapter nor a head is where it began."""
    given = {key: where.pop(key) for key in ("init_from", "model") if key in where}
    short = {"max_target_length": 12} if name == "summarization" else {}
    settings = TrainSettings(DataSettings(name, data, **short), max_steps=2, batch_size=8, learning_rate=2e-2, **where)
    train(out, settings, progress=False, **given)
    return out


def logits(model) -> torch.Tensor:
    """Of a fixed text; for question answering of its starts and ends."""
    more = {"decoder_input_ids": IDS[:, :5]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        out = model.cpu().eval()(input_ids=IDS, **more)
    return torch.stack([out.start_logits, out.end_logits]) if "start_logits" in out else out.logits


def read_plainly(folder: Path, name: str) -> tf.PreTrainedModel:
    """The checkpoint as transformers alone reads it, with every weight in it and none too many."""
    model, info = getattr(tf, task(name).model).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    return model


def check_equal(found: torch.Tensor, run: Path, worst: float = 1e-4) -> None:
    wanted = logits(load_run(run, dtype="float32")[0])
    off = float((found - wanted).abs().max() / wanted.abs().max())
    print(run.name, off)
    assert off < worst


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("completion", "llama"),
        ("completion", "mixture"),
        ("classification", "bert"),
        ("classification", "masked"),
        ("classification", "llama"),
        ("regression", "bert"),
        ("qa", "bert"),
        ("qa", "bart"),
        ("summarization", "bart"),
        ("summarization", "encoder_decoder"),
    ],
)
def test_a_run_is_merged_with_its_head(request, rows, tmp_path, name, folder):
    base = request.getfixturevalue(folder)
    run = trained(tmp_path / "run", name, rows[name], init_from=base)
    loftq.export_dense(run, tmp_path / "dense", dtype="float32")
    model = read_plainly(tmp_path / "dense", name)
    check_equal(logits(model), run)
    assert model.config.architectures == [type(model).__name__]
    assert type(model) is type(load_run(run)[0].get_base_model())
    assert model.config.pad_token_id is not None or folder == "encoder_decoder"
    text = "ab ba"
    assert tf.AutoTokenizer.from_pretrained(tmp_path / "dense")(text) == tf.AutoTokenizer.from_pretrained(run)(text)
    if name == "classification":
        assert model.config.id2label == {0: "first", 1: "second"}
        assert model.config.label2id == {"first": 0, "second": 1}
        assert model.config.problem_type == "single_label_classification"
        assert tf.pipeline("text-classification", str(tmp_path / "dense"))("aaa")[0]["label"] in ("first", "second")
    if name == "regression":
        assert (model.config.num_labels, model.config.problem_type) == (1, "regression")
    if name == "summarization":
        assert model.config.decoder_start_token_id is not None
    assert not {"training.json", "adapter_config.json"} & {p.name for p in (tmp_path / "dense").iterdir()}

    loftq.export_dense(base, tmp_path / "named", adapter=run, dtype="float32")  # the other way to say it
    assert (tmp_path / "named" / "model.safetensors").read_bytes() == (
        tmp_path / "dense" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    "changes", [{"method": "lora"}, {"use_dora": True}, {"method": "lora", "use_dora": True}], ids=str
)
@pytest.mark.parametrize(("name", "folder"), [("completion", "llama"), ("classification", "bert")])
def test_runs_on_a_full_precision_model_and_dora_merge(request, rows, tmp_path, name, folder, changes):
    run = trained(tmp_path / "run", name, rows[name], init_from=request.getfixturevalue(folder), **changes)
    loftq.export_dense(run, tmp_path / "dense", dtype="float32")
    check_equal(logits(read_plainly(tmp_path / "dense", name)), run)


def test_bfloat16_rounds_once(bert, rows, tmp_path):
    run = trained(tmp_path / "run", "classification", rows["classification"], init_from=bert)
    loftq.export_dense(run, tmp_path / "dense")
    model = read_plainly(tmp_path / "dense", "classification")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    check_equal(logits(model.float()), run, worst=2e-2)


def test_a_folder_that_has_moved_is_named(bert, rows, tmp_path):
    shutil.copytree(bert, tmp_path / "q")
    run = trained(tmp_path / "run", "classification", rows["classification"], init_from=tmp_path / "q")
    (tmp_path / "q").rename(tmp_path / "moved")
    with pytest.raises(SourceError, match=r"was trained on .*q, which does not exist here"):
        loftq.export_dense(run, tmp_path / "dense")
    loftq.export_dense(tmp_path / "moved", tmp_path / "dense", adapter=run)
    read_plainly(tmp_path / "dense", "classification")


def test_runs_that_are_not_merged(bert, llama, rows, tmp_path):
    full = trained(
        tmp_path / "full", "completion", rows["completion"], method="full", model=str(llama.parent / "source")
    )
    for arguments in ({"directory": full}, {"directory": llama, "adapter": full}):
        with pytest.raises(ConfigError, match=r"full is a whole model already, .*; there is nothing to merge"):
            loftq.export_dense(out_dir=tmp_path / "dense", **arguments)
    lora = trained(tmp_path / "lora", "completion", rows["completion"], method="lora", init_from=llama)
    with pytest.raises(ConfigError, match=r"lora was trained on the full-precision .*; use `loftq export .*lora`"):
        loftq.export_dense(llama, tmp_path / "dense", adapter=lora)
    with pytest.raises(ConfigError, match=r"lora is a run of `loftq train` with its own adapter"):
        loftq.export_dense(lora, tmp_path / "dense", adapter=lora)
    run = trained(tmp_path / "run", "classification", rows["classification"], init_from=bert)
    with pytest.raises(BackboneMismatchError, match="an adapter only fits the backbone it was trained on"):
        loftq.export_dense(llama, tmp_path / "dense", adapter=run)
    with pytest.raises(SourceError, match=r"is neither a run of `loftq train` nor a quantized folder"):
        loftq.export_dense(bert.parent / "source", tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


@pytest.mark.parametrize("folder", ["bert", "masked", "llama"])
def test_an_adapter_of_another_class_is_never_loaded_in_part(request, rows, tmp_path, folder):
    base = request.getfixturevalue(folder)
    run = trained(tmp_path / "run", "classification", rows["classification"], init_from=base)
    kind = type(loftq.load(base).get_base_model()).__name__
    sentence = (
        rf"run was trained on a \w+ForSequenceClassification and does not fit {kind}: .*; .*`loftq export .*run` itself"
    )
    with pytest.raises(SourceError, match=sentence) as error:
        loftq.load(base, adapter=run)
    print(error.value)
    assert "\n" not in str(error.value)
    adapter = tmp_path / "adapter"  # as PEFT would have saved it: no run
    adapter.mkdir()
    for file in run.glob("adapter_*"):
        shutil.copy(file, adapter)
    with pytest.raises(SourceError, match=rf"ForSequenceClassification and does not fit {kind}: "):
        loftq.export_dense(base, tmp_path / "dense", adapter=adapter)


def test_an_adapter_that_lacks_a_tensor_is_not_loaded(llama, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(llama / "loftq_init", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    gone = sorted(tensors)[0]
    save_file({n: t for n, t in tensors.items() if n != gone}, path)
    with pytest.raises(SourceError, match=rf"does not fit LlamaForCausalLM: it lacks {gone}; "):
        loftq.load(llama, adapter=tmp_path / "adapter")
    save_file({**tensors, "base_model.model.extra.weight": torch.zeros(2)}, path)
    for load in (loftq.load, load_for_inference):
        with pytest.raises(SourceError, match=r"LlamaForCausalLM: there is no place for its .*extra\.weight; "):
            load(llama, adapter=tmp_path / "adapter")


def test_an_adapter_on_a_shared_weight_is_not_merged(bart, rows, tmp_path):
    """Merged into the output's weight it would change the embeddings too."""
    source = str(bart.parent / "source")
    run = trained(
        tmp_path / "run", "summarization", rows["summarization"], method="lora", model=source, target_modules="lm_head"
    )
    with pytest.raises(SourceError, match=r"lm_head, which shares its weight with .*shared"):
        loftq.export_dense(run, tmp_path / "dense")


@pytest.mark.parametrize("suffix", ["gguf", "safetensors", "bin", "PT"])
def test_a_folder_is_not_named_as_a_file_of_weights(llama, tmp_path, suffix):
    with pytest.raises(OutputError, match=rf"out\.{suffix} has the name of a file of weights, but a folder is written"):
        loftq.export_dense(llama, tmp_path / f"out.{suffix}")
    with pytest.raises(OutputError, match="has the name of a file of weights"):
        loftq.quantize_checkpoint(llama.parent / "source", tmp_path / f"out.{suffix}", loftq.LoftQConfig())
    assert not list(tmp_path.iterdir())
