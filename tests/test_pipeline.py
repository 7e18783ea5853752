"""What a quantized folder holds besides packed weights, and what making it costs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import loftq
from loftq.checkpoint.source import INDEX, SINGLE, SafetensorsSource
from loftq.checkpoint.writer import header_bytes
from loftq.codec.qtensor import TensorInfo
from tiny import CLASSES, first_output, tiny_model

CONFIG = loftq.LoftQConfig(bits=2, rank=4, num_iter=1)


def quantize(source: Path, out: Path, config=CONFIG, **options):
    return loftq.quantize_checkpoint(source, out, config, progress=False, **options)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    source = SafetensorsSource(folder)
    return {name: source.read(name) for name in source.tensors}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype == b.dtype and a.shape == b.shape and a.view(-1).view(torch.uint8).equal(b.view(-1).view(torch.uint8))
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", CLASSES)
def test_everything_else_is_untouched(name, dtype, tmp_path):
    """Embeddings, biases, norms and heads keep their bits and dtype."""
    tiny_model(name).to(dtype).save_pretrained(tmp_path / "source")
    report = quantize(tmp_path / "source", tmp_path / "out")
    before, after = tensors_of(tmp_path / "source"), tensors_of(tmp_path / "out")
    packed = {m.name if m.experts else f"{m.name}.weight" for m in report.modules}
    model = getattr(tf, CLASSES[name])
    whole = {n for n in packed if n in before or n.removeprefix(f"{model.base_model_prefix}.") in before}
    parts = {n for n in before if re.search(r"\.experts\.\d+\.", n)} if len(whole) < len(packed) else set()
    kept = {n for n in before if n not in packed | parts and f"{model.base_model_prefix}.{n}" not in packed}
    assert len(kept) == len(before) - len(whole) - len(parts)
    # what transformers renames when it loads has its new name
    changed = [n for n in kept if not same_bits(before[n], after[n.replace(".block_sparse_moe.", ".mlp.")])]
    assert changed == []
    assert report.other_bytes == sum(before[n].nbytes for n in kept)
    assert all(after[n].dtype == torch.uint8 for n in packed)


@pytest.mark.parametrize("max_shard_bytes", [30_000, 50_000, 1], ids=["30 kB", "50 kB", "one tensor a shard"])
def test_shards(max_shard_bytes, tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "source", max_shard_size="100KB")
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 2
    quantize(tmp_path / "source", tmp_path / "single")
    quantize(tmp_path / "source", tmp_path / "sharded", max_shard_bytes=max_shard_bytes)

    shards = sorted(p.name for p in (tmp_path / "sharded").glob("*.safetensors"))
    index = json.loads((tmp_path / "sharded" / INDEX).read_text())
    assert len(shards) > 1
    assert set(index["weight_map"].values()) == set(shards)
    one, many = tensors_of(tmp_path / "single"), tensors_of(tmp_path / "sharded")
    assert index["weight_map"].keys() == one.keys() == many.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in many.values())
    assert all(same_bits(one[n], many[n]) for n in one)
    expected = first_output(loftq.load(tmp_path / "single"), "llama")
    assert torch.equal(first_output(loftq.load(tmp_path / "sharded"), "llama"), expected)


def test_sharded_source_gives_the_same_bytes(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b", max_shard_size="60KB")
    for name in "ab":
        quantize(tmp_path / name, tmp_path / f"{name}-out")
    assert (tmp_path / "a-out" / SINGLE).read_bytes() == (tmp_path / "b-out" / SINGLE).read_bytes()


def test_files_are_as_safetensors_writes_them(stories_dir, tmp_path):
    quantize(stories_dir, tmp_path / "out")
    for name in (SINGLE, "loftq_init/adapter_model.safetensors"):
        save_file(load_file(tmp_path / "out" / name), tmp_path / "again.safetensors", metadata={"format": "pt"})
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again.safetensors").read_bytes(), name


EXTRAS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
    "generation_config.json",
    "preprocessor_config.json",
)


def test_tokenizer_files_are_copied(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "source")
    for name in EXTRAS:
        (tmp_path / "source" / name).write_text(f'{{"{name}": 1}}')
    for name in ("training_args.bin", "optimizer.pt", "README.md", "modeling_evil.py"):
        (tmp_path / "source" / name).write_text("not to be copied")
    quantize(tmp_path / "source", tmp_path / "out")
    assert all((tmp_path / "out" / n).read_bytes() == (tmp_path / "source" / n).read_bytes() for n in EXTRAS)
    expected = {*EXTRAS, "config.json", SINGLE, "loftq_init", "loftq_report.json"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == expected


def test_real_model(stories_dir, tmp_path):
    """The report's numbers are what the files hold."""
    report = quantize(stories_dir, tmp_path / "out", loftq.LoftQConfig(bits=4, rank=8))
    tensors = tensors_of(tmp_path / "out")
    packed = sum(t.nbytes for n, t in tensors.items() if any(n.startswith(m.name + ".weight") for m in report.modules))
    assert report.weight_bytes == packed
    adapter = load_file(tmp_path / "out" / "loftq_init" / "adapter_model.safetensors")
    assert report.adapter_bytes == sum(t.nbytes for t in adapter.values())
    assert len(report.modules) == 35
    assert all(m.error <= m.quantization_error for m in report.modules)
    assert report.mean_error < 0.1, f"{report.mean_error:.4f}"


def test_progress_counts_every_weight(stories_dir, tmp_path):
    seen: dict[str, int] = {}
    loftq.quantize_checkpoint(stories_dir, tmp_path / "out", CONFIG, progress=seen.__setitem__)
    tensors = SafetensorsSource(stories_dir).tensors.values()
    assert sum(seen.values()) == sum(info.nbytes // info.dtype.itemsize for info in tensors)


def test_first_layers_of_a_checkpoint(tmp_path):
    tiny_model("llama", layers=4).save_pretrained(tmp_path / "source")
    config = loftq.LoftQConfig(bits=2, rank=4, num_iter=1, first_layers_bits=(2, 4))
    report = quantize(tmp_path / "source", tmp_path / "out", config)
    assert [m.bits for m in report.modules if m.name.endswith("up_proj")] == [4, 4, 2, 2]
    assert first_output(loftq.load(tmp_path / "out"), "llama").isfinite().all()


def write_llama(folder: Path, layers: int) -> None:
    """A Llama of width 512 written layer by layer, without a model."""
    folder.mkdir()
    config = tf.LlamaConfig(
        vocab_size=128, hidden_size=512, intermediate_size=1376, num_hidden_layers=layers, num_attention_heads=8
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    mlp = {"mlp.gate_proj": (1376, 512), "mlp.up_proj": (1376, 512), "mlp.down_proj": (512, 1376)}
    shapes = {**{f"self_attn.{x}_proj": (512, 512) for x in "qkvo"}, **mlp}
    weight_map: dict[str, str] = {}

    def write(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))

    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        tensors = {f"{prefix}{n}.weight": torch.randn(s, generator=generator) for n, s in shapes.items()}
        norms = ("input_layernorm", "post_attention_layernorm")
        write(f"layer-{layer}.safetensors", {**tensors, **{f"{prefix}{n}.weight": torch.ones(512) for n in norms}})
    embedding = {"model.embed_tokens.weight": torch.ones(128, 512), "lm_head.weight": torch.ones(128, 512)}
    write("rest.safetensors", {**embedding, "model.norm.weight": torch.ones(512)})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


CHILD = """
import sys, loftq
config = loftq.LoftQConfig(bits=2, rank=8, num_iter=1, codebook="nf", scale="absmax", svd="block")
report = loftq.quantize_checkpoint(sys.argv[1], sys.argv[2], config, progress=False)
print(report.timing["peak_memory_bytes"])
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_depth(tmp_path):
    peaks = {}
    for layers in (6, 24):
        write_llama(tmp_path / f"{layers}", layers)
        command = [sys.executable, "-c", CHILD, str(tmp_path / f"{layers}"), str(tmp_path / f"{layers}-out")]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        peaks[layers] = int(done.stdout)
    megabytes = {layers: f"{peak / 1e6:.1f} MB" for layers, peak in peaks.items()}
    print("peak memory by layers:", megabytes)
    source_bytes = sum(p.stat().st_size for p in (tmp_path / "24").iterdir())
    # holding the 18 further layers would cost this much more, far beyond the tolerance
    assert source_bytes * 18 / 24 > 0.3 * peaks[6]
    assert peaks[24] < 1.1 * peaks[6], megabytes


def test_header_of_the_real_model(stories_dir):
    """A dense checkpoint's header, made from dtypes and shapes alone, is the one that safetensors wrote."""
    infos = {n: TensorInfo(t.dtype, tuple(t.shape)) for n, t in load_file(stories_dir / SINGLE).items()}
    header, _ = header_bytes(infos)
    assert (stories_dir / SINGLE).read_bytes()[: len(header)] == header


@pytest.mark.parametrize("missing", ["model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"])
def test_a_parameter_that_the_source_lacks(tmp_path, missing):

    tiny_model("llama").save_pretrained(tmp_path / "source")
    file = tmp_path / "source/model.safetensors"
    tensors = load_file(file)
    del tensors[missing]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(loftq.SourceError, match=f"lacks {missing}"):
        loftq.quantize_checkpoint(tmp_path / "source", tmp_path / "out", loftq.LoftQConfig(rank=2), progress=False)
    assert not (tmp_path / "out").exists()


def test_layers_that_the_config_does_not_count_are_told(tmp_path):
    told: list[str] = []
    tiny_model("llama", layers=4).save_pretrained(tmp_path / "source")
    config = tmp_path / "source/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_hidden_layers": 3}))
    options = loftq.LoftQConfig(rank=2, num_iter=0)
    loftq.quantize_checkpoint(tmp_path / "source", tmp_path / "out", options, progress=False, notice=told.append)
    assert any("(model.layers.3." in said and "9 in all" in said for said in told), told


def test_a_mask_that_the_model_does_not_know_passes_through(tmp_path):

    tiny_model("llama").save_pretrained(tmp_path / "source")
    file = tmp_path / "source/model.safetensors"
    mask = torch.full((4,), float("-inf"))
    save_file({**load_file(file), "model.mask": mask}, file, metadata={"format": "pt"})
    loftq.quantize_checkpoint(tmp_path / "source", tmp_path / "out", loftq.LoftQConfig(rank=2, num_iter=0))
    assert torch.equal(load_file(tmp_path / "out/model.safetensors")["model.mask"], mask)


def test_reading_a_report_that_lists_nothing(tmp_path):
    for content in ("[]", '{"modules": []}'):
        (tmp_path / "loftq_report.json").write_text(content)
        with pytest.raises(loftq.SourceError, match="is damaged"):
            loftq.QuantizationReport.load(tmp_path)
