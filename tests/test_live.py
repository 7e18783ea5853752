"""A model quantized in memory: trained as one that is loaded, saved, and its adapters kept from other weights."""

import json
import shutil

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Trainer, TrainingArguments

import loftq
from loftq.evaluate.models import load_for_inference
from loftq.hub.backbone import adapter_sha256, backbone_sha256, recorded_backbone
from loftq.hub.load import load_backbone
from loftq.modules import PackedModule
from loftq.refine.teacher import checked_source
from tiny import CLASSES, first_output, tiny_model

CONFIG = loftq.LoftQConfig(bits=2, rank=4, num_iter=1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """``source``, what ``quantize_checkpoint`` makes of it as ``folder``, and ``other``, another backbone of it."""
    root = tmp_path_factory.mktemp("live")
    tiny_model("llama").save_pretrained(root / "source")
    loftq.quantize_checkpoint(root / "source", root / "folder", CONFIG, progress=False)
    loftq.quantize_checkpoint(root / "source", root / "other", CONFIG.replace(bits=3), progress=False)
    return root


def in_memory(folders):
    model = AutoModelForCausalLM.from_pretrained(folders / "source")
    return loftq.quantize_model(model, CONFIG, progress=False)


def train(model, out, steps=4, resume=None, **arguments):
    data = torch.randint(3, 96, (16, 12), generator=torch.Generator().manual_seed(2))
    args = TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
        **{"save_strategy": "no", **arguments},
    )
    trainer = Trainer(model=model, args=args, train_dataset=[{"input_ids": row, "labels": row} for row in data])
    trainer.train(resume_from_checkpoint=resume)
    model.eval()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def config_of(adapter):
    return json.loads((adapter / "adapter_config.json").read_text())


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "gradient-checkpointing"])
def test_trainer_trains_it_as_what_is_loaded(folders, tmp_path, checkpointing):
    live, loaded = in_memory(folders), loftq.load(folders / "folder", trainable=True)
    ours, theirs = live.get_base_model(), loaded.get_base_model()
    for name in ("is_quantized", "quantization_method"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert type(ours.hf_quantizer) is type(theirs.hf_quantizer)
    assert ours.config._is_quantized
    assert ours.config.quantization_config.to_dict() == theirs.config.quantization_config.to_dict()

    losses = train(live, tmp_path / "live", gradient_checkpointing=checkpointing)
    assert losses == train(loaded, tmp_path / "loaded", gradient_checkpointing=checkpointing)
    assert losses[-1] < losses[0]
    assert torch.equal(first_output(live, "llama"), first_output(loaded, "llama"))


def test_training_resumes(folders, tmp_path):
    whole = in_memory(folders)
    train(whole, tmp_path / "whole")
    train(in_memory(folders), tmp_path / "run", steps=2, save_strategy="steps", save_steps=2)
    resumed = in_memory(folders)
    train(resumed, tmp_path / "run", resume=str(tmp_path / "run/checkpoint-2"))
    assert torch.equal(first_output(resumed, "llama"), first_output(whole, "llama"))
    assert recorded_backbone(config_of(tmp_path / "run/checkpoint-2")) == whole.loftq_report.backbone_sha256


@pytest.mark.parametrize("name", CLASSES)
def test_saved_folder_loads_with_equal_outputs(name, tmp_path):
    """It is the folder that ``quantize_checkpoint`` writes, of every architecture: tied heads, experts, T5's int8."""
    tiny_model(name).save_pretrained(tmp_path / "source")
    expected = loftq.quantize_checkpoint(tmp_path / "source", tmp_path / "folder", CONFIG, progress=False)
    live = loftq.quantize_model(tiny_model(name), CONFIG, progress=False)
    live.save_pretrained(tmp_path / "before")
    report = loftq.save(live, tmp_path / "saved")

    assert torch.equal(first_output(loftq.load(tmp_path / "saved"), name), first_output(live, name))
    assert report.backbone_sha256 == backbone_sha256(tmp_path / "saved") == expected.backbone_sha256
    assert report.adapter_sha256 == adapter_sha256(tmp_path / "saved") == expected.adapter_sha256
    assert report.modules == expected.modules
    assert report.to_dict() == loftq.QuantizationReport.load(tmp_path / "saved").to_dict()
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "saved" / file).read_bytes() == (tmp_path / "folder" / file).read_bytes(), file
    ours, theirs = config_of(tmp_path / "saved/loftq_init"), config_of(tmp_path / "folder/loftq_init")
    assert ours.pop("base_model_name_or_path") == str(tmp_path / "saved")
    theirs.pop("base_model_name_or_path")
    assert ours == theirs

    fits = loftq.load(tmp_path / "saved", adapter=tmp_path / "before")
    assert torch.equal(first_output(fits, name), first_output(live, name))


def test_saved_after_training_it_is_as_trained(folders, tmp_path):
    live = in_memory(folders)
    before = first_output(live, "llama")
    train(live, tmp_path / "run")
    live.save_pretrained(tmp_path / "adapter")
    loftq.save(live, tmp_path / "saved")
    after = first_output(live, "llama")
    assert not torch.equal(after, before)
    assert torch.equal(first_output(loftq.load(tmp_path / "saved"), "llama"), after)
    assert torch.equal(first_output(loftq.load(folders / "folder", adapter=tmp_path / "adapter"), "llama"), after)
    loftq.export_dense(tmp_path / "saved", tmp_path / "dense", adapter=tmp_path / "adapter", dtype="float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(first_output(merged, "llama"), after, rtol=0, atol=1e-4)


def test_adapters_saved_later_name_the_folder(folders, tmp_path, monkeypatch):
    """Wherever it is named from: a path from the root, as a run's."""
    live = in_memory(folders)
    monkeypatch.chdir(tmp_path)
    loftq.save(live, "saved")
    live.save_pretrained(tmp_path / "adapter")
    assert config_of(tmp_path / "adapter")["base_model_name_or_path"] == str(tmp_path / "saved")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(first_output(loaded, "llama"), first_output(live, "llama"))


def test_half_precision_is_saved_as_it_is(folders, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folders / "source", dtype=torch.float32)
    live = loftq.quantize_model(model, CONFIG, progress=False).to(torch.bfloat16)
    before = live.loftq_report
    report = loftq.save(live, tmp_path / "saved")
    loaded = loftq.load(tmp_path / "saved")
    assert loaded.get_base_model().lm_head.weight.dtype == torch.bfloat16
    assert report.other_bytes == before.other_bytes / 2
    assert before.backbone_sha256 != report.backbone_sha256 == backbone_sha256(tmp_path / "saved")
    live.save_pretrained(tmp_path / "adapter")
    loftq.load(tmp_path / "saved", adapter=tmp_path / "adapter")


def test_the_base_model_saves_the_backbone_alone(folders, tmp_path):
    """``save_pretrained`` of transformers leaves out what PEFT has put in place, for a model loaded or in memory."""
    for n, model in enumerate((in_memory(folders), loftq.load(folders / "folder"))):
        model.get_base_model().save_pretrained(tmp_path / str(n))
        for file in ("model.safetensors", "config.json"):
            assert (tmp_path / str(n) / file).read_bytes() == (folders / "folder" / file).read_bytes(), file
        loaded = loftq.load(tmp_path / str(n), adapter=folders / "folder/loftq_init")
        assert torch.equal(first_output(loaded, "llama"), first_output(model, "llama"))
        with pytest.raises(loftq.BackboneMismatchError, match="belongs to backbone"):
            loftq.load(tmp_path / str(n), adapter=folders / "other/loftq_init")


def test_copies_that_are_trained_are_not_the_backbone(folders, tmp_path):
    base = load_backbone(folders / "folder")
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    get_peft_model(base, config).get_base_model().save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (folders / "folder/model.safetensors").read_bytes()


def test_saving_is_refused(folders, tmp_path, monkeypatch):
    live = in_memory(folders)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("precious")
    with pytest.raises(loftq.OutputError, match="is not empty"):
        loftq.save(live, tmp_path / "full")
    with pytest.raises(loftq.ConfigError, match=r"loftq.quantize_model has not returned"):
        loftq.save(loftq.load(folders / "folder"), tmp_path / "saved")
    layers = loftq.quantize_model(torch.nn.Sequential(torch.nn.Linear(64, 32)), CONFIG, progress=False)
    with pytest.raises(loftq.ConfigError, match="is a Sequential, expected a class of transformers"):
        loftq.save(layers, tmp_path / "saved")
    live.add_adapter("more", LoraConfig(target_modules=["q_proj"]))
    live.set_adapter("more")
    live.delete_adapter("default")
    with pytest.raises(loftq.ConfigError, match="'default' has 0 tensors, expected the 28"):
        loftq.save(live, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_save_that_fails_leaves_no_folder_and_is_repeated(folders, tmp_path, monkeypatch):
    live = in_memory(folders)

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(loftq.QuantizationReport, "save", full)
        with pytest.raises(loftq.OutputError, match="is full"):
            loftq.save(live, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    with torch.no_grad():
        live.get_base_model().model.layers[0].mlp.up_proj.lora_B["default"].weight.add_(1.0)
    loftq.save(live, tmp_path / "saved")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    assert torch.equal(first_output(loftq.load(tmp_path / "saved"), "llama"), first_output(live, "llama"))


def test_a_save_removes_no_unfinished_work_of_another(folders, tmp_path):
    (tmp_path / "q.incomplete").mkdir()
    (tmp_path / "q.incomplete/journal.jsonl").write_text('{"config": {"bits": 4}}\n')
    with pytest.raises(loftq.OutputError, match="unfinished run with other settings"):
        loftq.save(in_memory(folders), tmp_path / "q")
    assert (tmp_path / "q.incomplete/journal.jsonl").read_text() == '{"config": {"bits": 4}}\n'


@pytest.mark.parametrize("name", ["llama", "deberta-v2"])
def test_adapter_from_memory_fits_its_backbone_only(name, tmp_path):
    """Also of a class for which PEFT writes an ``auto_mapping`` of its own, without the hash."""
    live = loftq.quantize_model(tiny_model(name), CONFIG, progress=False)
    live.save_pretrained(tmp_path / "adapter")
    assert recorded_backbone(config_of(tmp_path / "adapter")) == live.loftq_report.backbone_sha256
    loftq.save(live, tmp_path / "saved")
    loftq.save(loftq.quantize_model(tiny_model(name, seed=1), CONFIG, progress=False), tmp_path / "other")
    loftq.load(tmp_path / "saved", adapter=tmp_path / "adapter")
    loftq.export_dense(tmp_path / "saved", tmp_path / "dense", adapter=tmp_path / "adapter")
    for use in (
        lambda: loftq.load(tmp_path / "other", adapter=tmp_path / "adapter"),
        lambda: loftq.export_dense(tmp_path / "other", tmp_path / "wrong", adapter=tmp_path / "adapter"),
    ):
        with pytest.raises(loftq.BackboneMismatchError, match="belongs to backbone"):
            use()


def test_nothing_puts_the_adapter_on_dense_weights(folders, tmp_path):
    live = in_memory(folders)
    live.save_pretrained(tmp_path / "adapter")
    for load in (AutoPeftModelForCausalLM, AutoModelForCausalLM):
        with pytest.raises(OSError, match=r"left in memory; write it with loftq\.save"):
            load.from_pretrained(tmp_path / "adapter")
    for adapter in (tmp_path / "adapter", folders / "folder/loftq_init"):
        with pytest.raises(loftq.BackboneMismatchError, match="source is dense"):
            load_for_inference(folders / "source", adapter=adapter)
    live.add_adapter("more", LoraConfig(target_modules=["q_proj"]))
    live.save_pretrained(tmp_path / "both")
    assert "left in memory" in config_of(tmp_path / "both/more")["base_model_name_or_path"]


def amended(adapter, target, **changes):
    shutil.copytree(adapter, target)
    (target / "adapter_config.json").write_text(json.dumps({**config_of(adapter), **changes}))
    return target


def test_load_refuses_what_is_not_known_to_fit(folders, tmp_path):
    """Marked by loftq without a hash, or of another quantized folder: refused. Without a mark: PEFT's own, and taken."""
    folder, init = folders / "folder", folders / "folder/loftq_init"
    mark = config_of(init)["auto_mapping"]
    unnamed = {**mark, "loftq_backbone_sha256": None}
    source, other = str(folders / "source"), str(folders / "other")
    nameless = amended(init, tmp_path / "a", auto_mapping=unnamed, base_model_name_or_path=source)
    with pytest.raises(loftq.BackboneMismatchError, match="does not say which backbone it belongs to"):
        loftq.load(folder, adapter=nameless)
    with pytest.raises(loftq.BackboneMismatchError, match="belongs to backbone"):
        loftq.load(folder, adapter=amended(init, tmp_path / "b", auto_mapping=None, base_model_name_or_path=other))
    loftq.load(folder, adapter=amended(init, tmp_path / "c", auto_mapping=unnamed, base_model_name_or_path=str(folder)))

    get_peft_model(
        LlamaForCausalLM.from_pretrained(folders / "source"), LoraConfig(task_type="CAUSAL_LM")
    ).save_pretrained(tmp_path / "plain")
    assert config_of(tmp_path / "plain")["base_model_name_or_path"] == source
    assert isinstance(loftq.load(folder, adapter=tmp_path / "plain"), PeftModel)


def test_report_of_a_model_in_memory(folders):
    report = in_memory(folders).loftq_report
    expected = loftq.QuantizationReport.load(folders / "folder")
    assert report.modules == expected.modules
    assert (report.other_bytes, report.config) == (expected.other_bytes, expected.config)
    assert loftq.quantize_model(tiny_model("llama"), CONFIG, progress=False).loftq_report.source["name"] is None
    assert report.source == {"name": str(folders / "source"), "sha256": {}}
    packed = [m for m in in_memory(folders).modules() if isinstance(m, PackedModule)]
    assert len(packed) == len(report.modules)
    assert len(load_file(folders / "folder/loftq_init/adapter_model.safetensors")) == 2 * len(packed)


def test_without_the_source_it_is_not_refined(folders, tmp_path):
    report = loftq.save(in_memory(folders), tmp_path / "saved")
    with pytest.raises(loftq.SourceError, match="does not say which files were quantized"):
        checked_source(folders / "source", report.source)
