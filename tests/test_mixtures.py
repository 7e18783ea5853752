"""Mixtures of experts from source to export: every expert's matrix for itself, in one adapter that PEFT reads."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

import loftq
import loftq.plan.targets
import loftq.units
from letters import letters
from loftq import kernels, pipeline
from loftq.calibrate.collect import collect, collect_from_model
from loftq.calibrate.text import CalibrationTokens
from loftq.checkpoint.source import SafetensorsSource
from loftq.cli import app
from loftq.data.prepare import DataSettings
from loftq.finetune.load import load_run
from loftq.finetune.run import train
from loftq.finetune.settings import TrainSettings
from loftq.hub.adapter import know_experts
from loftq.hub.load import with_adapter
from loftq.modules import QuantExperts
from loftq.modules.experts import fused_experts
from loftq.plan.errors import grid, measure_checkpoint
from loftq.refine import RefineSettings, refine
from loftq.report.memory.training import TrainingSetup, build_model
from loftq.report.record import QuantizationReport
from loftq.solver.importance import InputStatistics
from tiny import BESIDE_DENSE, densify, first_output, inputs_for, tiny_model
from words import write_rows

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = loftq.LoftQConfig(bits=4, rank=4, num_iter=1, calibration=None)
BOTH = pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
UP, DOWN = "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"


def quantize(name: str, folder: Path, config: loftq.LoftQConfig = CONFIG, **options) -> Path:
    """A tiny model in ``folder / source``, quantized in ``folder / q``."""
    tiny_model(name).save_pretrained(folder / "source", **options)
    loftq.quantize_checkpoint(folder / "source", folder / "q", config, progress=False)
    return folder / "q"


def load(folder: Path, trainable: bool = False) -> PeftModel:
    """As a user without ``loftq.load`` does it."""
    base = tf.AutoModelForCausalLM.from_pretrained(folder)
    return PeftModel.from_pretrained(base, folder, subfolder="loftq_init", is_trainable=trainable)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory) -> Path:
    """A quantized Mixtral that no test changes."""
    return quantize("mixtral", tmp_path_factory.mktemp("mixtral"))


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.safetensors")}


# --- what is stored and computed


@BOTH
@pytest.mark.parametrize(
    "options",
    [{"bits": 8}, {"bits": 4, "double_quant": True}, {"bits": 3, "codebook": "uniform"}, {"bits": 2, "codebook": "nf"}],
    ids=str,
)
def test_every_storage_equals_dense(name, options, tmp_path):
    folder = quantize(name, tmp_path, CONFIG.replace(**options))
    loaded = load(folder)
    expected = first_output(densify(tiny_model(name), loaded), name)
    assert (first_output(loaded, name) - expected).abs().max() < 1e-4


def test_each_expert_is_its_own_decomposition(mixtral):
    """Stored tensors, adapter and report, against the solver called on one matrix."""
    stored = load_file(mixtral / "model.safetensors")
    adapter = load_file(mixtral / "loftq_init" / "adapter_model.safetensors")
    # PEFT: the wrapper of gate_up_proj lies in that of down_proj; A (r E, in) by experts, B (out, r E) with e fastest
    prefix = "base_model.model.model.layers.0.mlp.experts."
    lora_A = adapter[f"{prefix}base_layer.lora_A.weight"].view(4, 4, 64)
    lora_B = adapter[f"{prefix}base_layer.lora_B.weight"].view(200, 4, 4).permute(2, 0, 1)
    record = next(m for m in QuantizationReport.load(mixtral).modules if m.name == UP)
    weights = tiny_model("mixtral").state_dict()[UP]
    for expert, weight in enumerate(weights):
        seed = loftq.units.module_seed(0, f"{UP}.{expert}")
        one = loftq.decompose(weight, CONFIG.spec, rank=4, num_iter=1, seed=seed)
        for suffix in ("", "_scale", "_codebook"):
            assert torch.equal(stored[UP + suffix][expert], one.quantized.tensors["weight" + suffix]), suffix
        assert torch.equal(lora_A[expert], one.lora_A)
        assert torch.equal(lora_B[expert], one.lora_B)
        assert record.experts[expert]["error"] == one.error
    total = sum((m["error"] * float(w.norm())) ** 2 for m, w in zip(record.experts, weights, strict=True))
    assert record.error == pytest.approx((total**0.5) / float(weights.norm()), rel=1e-6)


def test_report_measures_stored_bytes(mixtral):
    report = QuantizationReport.load(mixtral)
    stored = load_file(mixtral / "model.safetensors")
    for record in report.modules:
        own = record.name if record.experts else f"{record.name}.weight"
        nbytes = sum(t.nbytes for n, t in stored.items() if n == own or n.startswith(f"{own}_"))
        assert record.weight_bytes == nbytes
    record = next(m for m in report.modules if m.name == DOWN)
    # 100 columns: 4 bits, two 16-bit scales a row, 16 float32 levels an expert
    assert 8 * record.weight_bytes / record.numel == pytest.approx(4 + 32 / 100 + 16 * 32 / (64 * 100))
    assert record.shape == [4, 64, 100]
    assert record.kind == "experts"


def test_only_the_chosen_experts_are_multiplied_and_one_at_a_time(mixtral, monkeypatch):
    loaded, sizes = load(mixtral), []
    plain = kernels.product

    def counting(x, packed, *rest):
        sizes.append(packed.shape[0])
        return plain(x, packed, *rest)

    monkeypatch.setattr(kernels, "product", counting)
    experts = loaded.get_base_model().model.layers[0].mlp.experts
    hidden = torch.randn(6, 64)
    chosen = torch.tensor([[1, 3]] * 6)
    experts(hidden, chosen, torch.full((6, 2), 0.5))
    assert sizes == [200, 64, 200, 64]


def test_an_index_beyond_the_experts_stands_for_none(mixtral):
    experts = load(mixtral).get_base_model().model.layers[0].mlp.experts
    hidden, weights = torch.randn(5, 64), torch.full((5, 2), 0.5)
    some = torch.tensor([[1, 4], [4, 4], [0, 1], [2, 4], [3, 0]])
    result = experts(hidden, some, weights)
    assert not result[1].any()
    torch.testing.assert_close(result[0], experts(hidden, some[:, :1], weights[:, :1])[0])


# --- training


def step_inputs() -> dict[str, torch.Tensor]:
    inputs = inputs_for("mixtral")
    return {**inputs, "labels": inputs["input_ids"]}


@BOTH
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_training_moves_the_adapters_alone(name, checkpointing, tmp_path):
    model = load(quantize(name, tmp_path), trainable=True).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 5e-3)
    losses = []
    for _ in range(8):
        loss = model(**step_inputs()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.2, losses
    moved = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert moved == {n for n in before if "lora_" in n}

    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "q"), tmp_path / "adapter")
    assert torch.equal(first_output(again.eval(), name), first_output(model.eval(), name))
    loftq.export_dense(tmp_path / "q", tmp_path / "dense", adapter=tmp_path / "adapter", dtype="float32")
    dense, info = type(tiny_model(name)).from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not info["missing_keys"]
    assert (first_output(dense, name) - first_output(again, name)).abs().max() < 1e-4


def test_gradients_are_those_of_the_dense_model(mixtral):
    """Of A and B, through PEFT's own parametrization of dense experts; and of what comes before them."""
    packed = load(mixtral, trainable=True)
    dense = tiny_model("mixtral")
    for name, module in dense.named_modules():
        if isinstance(module, nn.Linear) and "self_attn" in name:
            module.weight.data = packed.get_base_model().get_submodule(name).base_layer.dequantize()
    for index, layer in enumerate(dense.model.layers):
        base = packed.get_base_model().model.layers[index].mlp.experts.get_base_layer()
        for parameter in base.specs:
            stack = torch.stack([base.dequantize(parameter, expert) for expert in range(4)])
            getattr(layer.mlp.experts, parameter).data = stack
    reference = PeftModel.from_pretrained(dense, mixtral, subfolder="loftq_init", is_trainable=True)
    for model in (packed, reference):
        model(**step_inputs()).loss.backward()
    expected = {n: p.grad for n, p in reference.named_parameters() if p.requires_grad}
    actual = {n: p.grad for n, p in packed.named_parameters() if p.requires_grad}
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(actual[name], grad, rtol=1e-3, atol=1e-6, msg=name)


def test_nothing_dense_is_kept_for_the_backward_pass(mixtral):
    model, shapes = load(mixtral, trainable=True), set()

    def keep(tensor):
        if tensor.is_floating_point():
            shapes.add(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**step_inputs())
    assert shapes
    assert not shapes & {(200, 64), (64, 100), (4, 200, 64), (4, 64, 100)}


def test_experts_that_fsdp_may_shard(mixtral):
    """Outputs stay the same, and the packed bytes in memory that can be freed between the passes."""
    model = load(mixtral)
    expected = first_output(model, "mixtral")
    experts = [m for m in model.modules() if isinstance(m, QuantExperts)]
    for module in experts:
        for name in module.specs:  # in memory that numpy has not seen
            setattr(module, name, nn.Parameter(getattr(module, name).detach().clone(), requires_grad=False))
        module.make_shardable()
    torch.testing.assert_close(first_output(model, "mixtral"), expected, rtol=0, atol=0)
    for module in experts:
        for name in module.specs:
            storage = getattr(module, name).untyped_storage()
            storage.resize_(storage.nbytes())  # refused once numpy has seen it


def quantize_with_letters(name: str, folder: Path, config: loftq.LoftQConfig) -> torch.nn.Module:
    """A model that has a tokenizer, in ``source``, and quantized in ``q``."""
    model = tiny_model(name)
    model.resize_token_embeddings(len(letters()))
    model.save_pretrained(folder / "source")
    letters().save_pretrained(folder / "source")
    loftq.quantize_checkpoint(folder / "source", folder / "q", config, progress=False)
    return model


@pytest.mark.slow
def test_loftq_train_and_trainer(tmp_path):
    quantize_with_letters("mixtral", tmp_path, CONFIG)
    data = write_rows(tmp_path / "sums.jsonl", [{"prompt": f"{a}+1=", "completion": str(a + 1)} for a in range(6)])
    held = DataSettings("completion", data)
    settings = TrainSettings(held, eval_data=held, epochs=8, batch_size=6, learning_rate=5e-3)
    record = train(tmp_path / "run", settings, init_from=tmp_path / "q", progress=False)
    assert record.after["perplexity"] < 0.7 * record.before["perplexity"]
    loaded, _ = load_run(tmp_path / "run")
    assert any(isinstance(module, QuantExperts) for module in loaded.modules())
    with pytest.raises(loftq.ConfigError, match=r"lora_dropout is 0.1, but .* has an adapter on experts"):
        train(tmp_path / "other", settings.replace(lora_dropout=0.1), init_from=tmp_path / "q", progress=False)


# --- sources


@BOTH
def test_both_layouts_of_a_source_give_the_same_folder(name, tmp_path):
    """transformers writes one tensor an expert; a source may also have the parameters as the model has them."""
    by_expert = quantize(name, tmp_path / "a")
    whole = quantize(name, tmp_path / "b", save_original_format=False)
    assert UP in SafetensorsSource(tmp_path / "b" / "source").tensors
    assert UP not in SafetensorsSource(tmp_path / "a" / "source").tensors
    assert files(by_expert) == files(whole)


@pytest.mark.parametrize("whole", [False, True], ids=["by expert", "whole"])
def test_one_expert_is_read_at_a_time(whole, tmp_path, monkeypatch):
    largest = []
    plain = SafetensorsSource.read

    def counting(source, name, index=None):
        tensor = plain(source, name, index)
        if ".experts." in name and source.path.name == "source":
            largest.append(tensor.numel())
        return tensor

    monkeypatch.setattr(SafetensorsSource, "read", counting)
    quantize("mixtral", tmp_path, save_original_format=not whole)
    assert max(largest) == (200 * 64 if whole else 100 * 64)


def test_a_source_without_an_expert_is_refused(tmp_path):
    tiny_model("mixtral").save_pretrained(tmp_path / "source")
    from safetensors.torch import save_file

    tensors = load_file(tmp_path / "source" / "model.safetensors")
    lost = next(n for n in tensors if ".experts.2." in n)
    del tensors[lost]
    save_file(tensors, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(loftq.SourceError, match=r"weights, expected .* of 4 experts as config.json"):
        loftq.quantize_checkpoint(tmp_path / "source", tmp_path / "q", CONFIG, progress=False)
    assert not (tmp_path / "q").exists()


def test_a_source_without_a_norm_is_refused(tmp_path):
    """As any other model's: that experts have other names in a checkpoint says nothing of what else is missing."""
    from safetensors.torch import save_file

    tiny_model("mixtral").save_pretrained(tmp_path / "source")
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(loftq.SourceError, match=r"the checkpoint lacks model.norm.weight"):
        loftq.quantize_checkpoint(tmp_path / "source", tmp_path / "q", CONFIG, progress=False)
    assert not (tmp_path / "q").exists()


@BOTH
def test_interrupted_and_continued(name, tmp_path, monkeypatch):
    whole = quantize(name, tmp_path / "whole")
    plain, written = pipeline.Staging.write_unit, []

    def write(staging, unit, *rest):
        if len(written) == 15:
            raise KeyboardInterrupt
        written.append(unit)
        plain(staging, unit, *rest)

    monkeypatch.setattr(pipeline.Staging, "write_unit", write)
    with pytest.raises(KeyboardInterrupt):
        quantize(name, tmp_path / "cut")
    done = list(written)
    written.clear()
    monkeypatch.setattr(pipeline.Staging, "write_unit", lambda *a: (written.append(a[1]), plain(*a)))
    loftq.quantize_checkpoint(tmp_path / "cut" / "source", tmp_path / "cut" / "q", CONFIG, progress=False)
    assert any("experts" in unit for unit in done)
    assert not set(done) & set(written)
    assert files(tmp_path / "cut" / "q") == files(whole)


@BOTH
def test_saving_the_loaded_backbone_gives_the_same_bytes(name, tmp_path):
    folder = quantize(name, tmp_path)
    tf.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_casting_leaves_packed_tensors(mixtral):
    model = tf.AutoModelForCausalLM.from_pretrained(mixtral)
    before = {n: t.dtype for n, t in model.state_dict().items() if ".experts." in n}
    model.to(torch.bfloat16)
    assert {n: t.dtype for n, t in model.state_dict().items() if ".experts." in n} == before
    assert torch.isfinite(first_output(model, "mixtral")).all()


# --- selection


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": ["down_proj"]}, {"down_proj"}),
        ({"exclude_modules": ["gate_up_proj"]}, {"down_proj"}),
        ({"exclude_modules": r".*layers\.1\.mlp.*"}, {"gate_up_proj", "down_proj"}),
        ({"bits_pattern": {"experts.down_proj": 2}, "rank_pattern": {"experts.gate_up_proj": 2}}, None),
    ],
    ids=["by name", "one of two", "one layer", "patterns"],
)
def test_parts_of_the_experts(options, expected, tmp_path):
    folder = quantize("mixtral", tmp_path, CONFIG.replace(**options))
    report = QuantizationReport.load(folder)
    found = {m.name.rpartition(".")[2]: m for m in report.modules if m.kind == "experts"}
    if expected is None:
        assert (found["down_proj"].bits, found["gate_up_proj"].rank) == (2, 2)
    else:
        assert set(found) == expected
    loaded = load(folder)
    reference = first_output(densify(tiny_model("mixtral"), loaded), "mixtral")
    assert (first_output(loaded, "mixtral") - reference).abs().max() < 1e-4
    loftq.export_dense(folder, tmp_path / "dense", dtype="float32")
    exported = tf.MixtralForCausalLM.from_pretrained(tmp_path / "dense")
    assert (first_output(exported, "mixtral") - reference).abs().max() < 1e-4


def test_excluded_experts_keep_their_bits(tmp_path):
    folder = quantize("mixtral", tmp_path, CONFIG.replace(exclude_modules=("gate_up_proj", "down_proj")))
    assert json.loads((folder / "loftq_init" / "adapter_config.json").read_text())["target_parameters"] is None
    loaded = load(folder)
    weights = loaded.get_base_model().model.layers[1].mlp.experts.down_proj
    assert torch.equal(weights, tiny_model("mixtral").model.layers[1].mlp.experts.down_proj)


class OtherExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(4, 16, 8))


def test_what_cannot_be_done_is_said():
    other = nn.ModuleDict({"experts": OtherExperts(), "proj": nn.Linear(8, 8)})
    with pytest.raises(loftq.ConfigError, match=r"experts is a OtherExperts with experts in up_proj.*exclude_modules"):
        loftq.plan.targets.plan_modules(other, CONFIG)
    left = CONFIG.replace(exclude_modules=("up_proj",))
    assert list(loftq.plan.targets.plan_modules(other, left)) == ["proj"]
    with pytest.raises(loftq.ConfigError, match=r"lora_dropout is 0.1, expected 0 with an adapter on"):
        loftq.quantize_model(tiny_model("mixtral"), CONFIG.replace(lora_dropout=0.1))
    broken = tiny_model("mixtral")
    broken.model.layers[1].mlp.experts.down_proj.data[2, 3, 4] = float("nan")
    with pytest.raises(loftq.WeightError, match=r"experts.down_proj: .*NaN"):
        loftq.quantize_model(broken, CONFIG)


@pytest.mark.parametrize("name", BESIDE_DENSE)
def test_a_dense_layer_and_a_shared_expert(name, tmp_path):
    """PEFT reads the names of their layers as those of the experts of an older transformers; here they are adapted too."""
    folder = quantize(name, tmp_path)
    names = {m.name for m in QuantizationReport.load(folder).modules}
    leaves = {"gate_proj", "up_proj", "down_proj"}
    assert names >= {f"model.layers.{where}.{leaf}" for where in ("0.mlp", "1.mlp.shared_experts") for leaf in leaves}
    loaded = load(folder, trainable=True)
    adapted = {n for n, m in loaded.get_base_model().named_modules() if hasattr(m, "lora_A")}
    assert {n for n in names if ".experts." not in n} <= adapted
    expected = first_output(densify(tiny_model(name), loaded.eval()), name)
    assert (first_output(loaded, name) - expected).abs().max() < 1e-4

    before = {n: t.clone() for n, t in loaded.state_dict().items()}
    trained = [p for p in loaded.parameters() if p.requires_grad]
    loaded.train()(**step_inputs()).loss.backward()
    torch.optim.AdamW(trained, 5e-3).step()
    moved = {n for n, t in loaded.state_dict().items() if not torch.equal(t, before[n])}
    assert moved == {n for n in before if "lora_" in n}
    loaded.save_pretrained(tmp_path / "adapter")
    base = tf.AutoModelForCausalLM.from_pretrained(folder)
    again = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.equal(first_output(again, name), first_output(loaded.eval(), name))

    loftq.export_dense(folder, tmp_path / "dense", adapter=tmp_path / "adapter", dtype="float32")
    dense = type(tiny_model(name)).from_pretrained(tmp_path / "dense")
    assert (first_output(dense, name) - first_output(again, name)).abs().max() < 1e-4
    live = loftq.quantize_model(tiny_model(name), CONFIG, progress=False).eval()
    assert (first_output(live, name) - expected).abs().max() < 1e-4


def test_dense_layers_alone_beside_experts_in_full_precision(tmp_path):
    folder = quantize("deepseek-v3", tmp_path, CONFIG.replace(exclude_modules=r".*\.experts\..*"))
    assert not any(m.experts for m in QuantizationReport.load(folder).modules)
    loaded = load(folder)
    expected = first_output(densify(tiny_model("deepseek-v3"), loaded), "deepseek-v3")
    assert (first_output(loaded, "deepseek-v3") - expected).abs().max() < 1e-4
    assert not loaded.peft_config["default"].target_parameters


def test_the_same_adapter_on_a_dense_model(tmp_path):
    """Names and shapes are PEFT's: with Q in dense layers the adapter gives the same outputs."""
    folder = quantize("deepseek-v3", tmp_path)
    packed = load(folder)
    dense = densify(tiny_model("deepseek-v3"), packed)
    expected = first_output(dense, "deepseek-v3")
    for module in packed.modules():
        for factor in getattr(module, "lora_B", {}).values():
            factor.weight.data.zero_()
    only_q = densify(tiny_model("deepseek-v3"), packed)
    adapted = PeftModel.from_pretrained(only_q, folder, subfolder="loftq_init")
    assert (first_output(adapted, "deepseek-v3") - expected).abs().max() < 1e-4


WITHOUT_EXPERTS = CONFIG.replace(exclude_modules=r".*\.experts\..*")
FEED_FORWARD = WITHOUT_EXPERTS.replace(target_modules=("gate_proj", "up_proj", "down_proj"))


def adapted_modules(model: PeftModel) -> set[str]:
    return {n for n, m in model.get_base_model().named_modules() if hasattr(m, "lora_A")}


@pytest.mark.parametrize(("name", "config"), [("deepseek-v3", FEED_FORWARD), ("glm4-moe", WITHOUT_EXPERTS)])
def test_an_adapter_of_dense_layers_alone_on_a_dense_model(name, config, tmp_path):
    folder = quantize(name, tmp_path, config)
    names = {m.name for m in QuantizationReport.load(folder).modules}
    packed = load(folder)
    packed.save_pretrained(tmp_path / "saved")
    expected = first_output(densify(tiny_model(name), packed), name)
    for module in packed.modules():
        for factor in getattr(module, "lora_B", {}).values():
            factor.weight.data.zero_()
    for adapter in (folder / "loftq_init", tmp_path / "saved"):
        adapted = with_adapter(densify(tiny_model(name), packed), adapter)
        assert adapted_modules(adapted) == names
        assert (first_output(adapted, name) - expected).abs().max() < 1e-4


def test_lora_has_the_modules_of_the_folder(tmp_path):
    """On the full-precision model, when the run is loaded again, and in the prediction of its memory."""
    model = quantize_with_letters("deepseek-v3", tmp_path, FEED_FORWARD)
    names = {m.name for m in QuantizationReport.load(tmp_path / "q").modules}
    data = write_rows(tmp_path / "sums.jsonl", [{"prompt": f"{a}+1=", "completion": str(a + 1)} for a in range(4)])
    held = DataSettings("completion", data)
    settings = TrainSettings(held, eval_data=held, method="lora", max_steps=1, batch_size=4, learning_rate=5e-3)
    record = train(tmp_path / "run", settings, init_from=tmp_path / "q", progress=False)
    assert record.after["loss"] < record.before["loss"]
    assert set(load_file(tmp_path / "run" / "adapter_model.safetensors")) == {
        f"base_model.model.{name}.lora_{factor}.weight" for name in names for factor in "AB"
    }
    loaded, _ = load_run(tmp_path / "run")
    assert adapted_modules(loaded) == names
    assert all(m.lora_B["default"].weight.any() for m in loaded.modules() if hasattr(m, "lora_B"))
    predicted = build_model(model.config, FEED_FORWARD, TrainingSetup(method="lora"))
    assert adapted_modules(predicted) == names


def test_adapters_of_older_experts_are_still_converted():
    """What PEFT does for a dense model and a config with the names of an older transformers is left to it."""
    targets = ["gate_proj", "up_proj", "down_proj"]
    read = LoraConfig(r=4, target_modules=list(targets))
    model = tiny_model("qwen3-moe")
    know_experts(model)
    get_peft_model(model, read)
    assert read.target_parameters == {"gate_up_proj", "down_proj"}


def test_no_warning_of_ranks_that_count(tmp_path):
    config = CONFIG.replace(rank_pattern={"experts.down_proj": 2, "q_proj": 3})
    folder = quantize("mixtral", tmp_path, config)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        loaded = load(folder)
    experts = loaded.get_base_model().model.layers[0].mlp.experts
    assert (experts.parameter_name, experts.r["default"]) == ("down_proj", 2)
    absent = LoraConfig(
        r=4, target_parameters=["experts.down_proj"], rank_pattern={"experts.down_proj": 2, "nowhere": 1}
    )
    with pytest.warns(RuntimeWarning, match=r"rank_pattern keys .*nowhere"):
        get_peft_model(tiny_model("mixtral"), absent)


def test_layers_beside_the_experts(tmp_path):
    config = tf.Qwen2MoeConfig(
        vocab_size=96,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
        moe_intermediate_size=40,
        shared_expert_intermediate_size=48,
        num_experts_per_tok=2,
    )
    tf.Qwen2MoeForCausalLM(config).save_pretrained(tmp_path / "source")
    report = loftq.quantize_checkpoint(tmp_path / "source", tmp_path / "q", CONFIG, progress=False)
    assert "model.layers.0.mlp.shared_expert.down_proj" in {m.name for m in report.modules}
    loaded = load(tmp_path / "q")
    expected = first_output(densify(tf.Qwen2MoeForCausalLM.from_pretrained(tmp_path / "source"), loaded), "mixtral")
    assert (first_output(loaded, "mixtral") - expected).abs().max() < 1e-4


def test_merging_into_packed_experts_is_refused(mixtral):
    with pytest.raises(loftq.ConfigError, match="is packed, expected dense weights"):
        load(mixtral).get_base_model().model.layers[0].mlp.experts.merge()


# --- calibration, plan, refinement, command line


def some_tokens(rows: int = 6) -> CalibrationTokens:
    ids = torch.randint(3, 96, (rows, 20), generator=torch.Generator().manual_seed(5))
    return CalibrationTokens.of(ids, torch.ones_like(ids, dtype=torch.bool), "random")


@BOTH
@pytest.mark.parametrize("gradients", [0, 4])
def test_each_expert_is_decomposed_with_its_own_statistics(name, gradients, tmp_path):
    model = tiny_model(name)
    model.save_pretrained(tmp_path / "source")
    experts, linear = fused_experts(model), ["model.layers.0.self_attn.q_proj"]
    found = collect(tmp_path / "source", linear, some_tokens(), gradients=gradients, experts=experts, progress=False)
    found.save(tmp_path / "statistics.safetensors")
    config = loftq.LoftQConfig(bits=2, rank=4, num_iter=1, method="cloq")
    loftq.quantize_checkpoint(
        tmp_path / "source", tmp_path / "q", config, statistics=tmp_path / "statistics.safetensors", progress=False
    )
    report = QuantizationReport.load(tmp_path / "q")
    record = next(m for m in report.modules if m.name == DOWN)
    weights = dict(model.named_parameters())[DOWN]
    counts = set()
    for expert, weight in enumerate(weights.detach()):
        own = found[f"{DOWN}.{expert}"]
        seed = loftq.units.module_seed(0, f"{DOWN}.{expert}")
        one = loftq.decompose(weight, config.spec, rank=4, num_iter=1, method="cloq", importance=own, seed=seed)
        assert record.experts[expert]["objective"] == pytest.approx(one.objective, rel=1e-5)
        assert record.experts[expert]["calibration_tokens"] == own.tokens
        counts.add(own.tokens)
    assert len(counts) > 1
    live = collect_from_model(tiny_model(name), linear, some_tokens(), experts=experts, progress=False)
    assert live.keys() == found.keys()
    torch.testing.assert_close(live[f"{UP}.1"].second_moment, found[f"{UP}.1"].second_moment, rtol=1e-4, atol=1e-6)


def test_calibrated_by_default(tmp_path):
    """The pipeline collects: with gradients for the attention, without for the experts."""
    model = tiny_model("mixtral")
    model.resize_token_embeddings(len(letters()))
    model.save_pretrained(tmp_path / "source")
    letters().save_pretrained(tmp_path / "source")
    text = tmp_path / "text.txt"
    text.write_text("one and two are three, three and four are seven. " * 60)
    config = CONFIG.replace(
        calibration=str(text), calibration_samples=8, calibration_length=32, calibration_gradients=2
    )
    loftq.quantize_checkpoint(tmp_path / "source", tmp_path / "q", config, progress=False)
    report = QuantizationReport.load(tmp_path / "q")
    assert all(m.calibration_tokens > 0 for m in report.modules)
    assert report.calibration["gradients"] == 2
    with pytest.raises(loftq.ConfigError, match=r"--propagate was given for a model with experts"):
        loftq.quantize_checkpoint(tmp_path / "source", tmp_path / "other", config.replace(propagate=True))
    table = measure_checkpoint(tmp_path / "source", config, grid((2, 4), (64,), (4,)), progress=False)
    entry = table.modules[UP]
    low, high = (entry.objectives[c] for c in sorted(entry.objectives))
    assert low > high > 0
    assert entry.experts == 4


def test_cost_of_experts_is_what_a_token_meets(tmp_path):
    """Without gradients: (objective · norm)² · power is the mean squared error of the outputs over all routed tokens."""
    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path / "source")
    generator = torch.Generator().manual_seed(0)
    counts, inputs = (300, 500, 700, 900), []
    statistics = {}
    for expert, count in enumerate(counts):
        x = torch.randn(count, 100, generator=generator) * (expert + 1)
        inputs.append(x)
        statistics[f"{DOWN}.{expert}"] = InputStatistics(x.T @ x / count, tokens=count)
    config = CONFIG.replace(method="cloq", damping=0.0, target_modules=(DOWN,))
    choices = grid((4,), (64,), (4,))
    held = loftq.Statistics(statistics)
    entry = measure_checkpoint(tmp_path / "source", config, choices, statistics=held, progress=False).modules[DOWN]
    squares = 0.0
    for expert, x in enumerate(inputs):
        weight = model.state_dict()[DOWN][expert]
        options = {"method": "cloq", "damping": 0.0, "importance": statistics[f"{DOWN}.{expert}"]}
        seed = loftq.units.module_seed(0, f"{DOWN}.{expert}")
        one = loftq.decompose(weight, config.spec, rank=4, num_iter=1, seed=seed, **options)
        squares += float(((weight - one.dequantize()) @ x.T).double().square().sum())
    predicted = (entry.objectives[choices[0]] * entry.norm) ** 2 * entry.power
    assert predicted == pytest.approx(squares / sum(counts), rel=1e-3)


@pytest.mark.slow
def test_refine_and_the_command_line(tmp_path):
    folder = quantize("mixtral", tmp_path, CONFIG.replace(bits=2))
    before = first_output(load(folder), "mixtral")
    ids = torch.randint(3, 96, (8, 24), generator=torch.Generator().manual_seed(3))
    settings = RefineSettings(batch_tokens=96, block_epochs=2, epochs=2, dtype="float32", learning_rate=3e-3)
    report = refine(folder, tmp_path / "source", text=ids, settings=settings, progress=False)
    assert report.after < report.before
    assert not torch.equal(first_output(load(folder), "mixtral"), before)
    runner = CliRunner()
    for arguments in (
        ["inspect", folder],
        ["inspect", folder, "--memory", "--length", "16"],
        ["inspect", folder, "--json"],
    ):
        result = runner.invoke(app, [*map(str, arguments)])
        assert result.exit_code == 0, result.output
    assert DOWN in runner.invoke(app, ["inspect", str(folder)]).output
