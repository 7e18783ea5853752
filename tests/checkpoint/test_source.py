"""Whatever a broken download or a confused user may point at: one sentence, and no output."""

from __future__ import annotations

import errno
import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loftq
from loftq.checkpoint import source as source_module
from loftq.checkpoint.source import INDEX, SINGLE, SafetensorsSource, open_source
from tiny import tiny_model

CONFIG = loftq.LoftQConfig(bits=4, rank=4, num_iter=1)
QUERY = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pristine")
    model = tiny_model("llama")
    model.save_pretrained(folder / "single")
    model.save_pretrained(folder / "sharded", max_shard_size="100KB")
    return {"single": folder / "single", "sharded": folder / "sharded"}


@pytest.fixture
def single(pristine, tmp_path) -> Path:
    return Path(shutil.copytree(pristine["single"], tmp_path / "source"))


@pytest.fixture
def sharded(pristine, tmp_path) -> Path:
    return Path(shutil.copytree(pristine["sharded"], tmp_path / "source"))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace tensors (their dots written as double underscores), or drop those that are None."""
    tensors = load_file(folder / SINGLE)
    tensors.update({name.replace("__", "."): value for name, value in changes.items()})
    save_file({n: t for n, t in tensors.items() if t is not None}, folder / SINGLE, metadata={"format": "pt"})


def write_header(path: Path, text: bytes, data: bytes = b"") -> None:
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def refused(source: Path | str, out: Path, kind: type[loftq.LoftQError] = loftq.SourceError) -> str:
    """The message, which must be one line; nothing that loads may be left behind."""
    with pytest.raises(loftq.LoftQError) as raised:
        loftq.quantize_checkpoint(source, out, CONFIG, progress=False)
    message = str(raised.value)
    assert type(raised.value) is kind, f"{type(raised.value).__name__}: {message}"
    assert "\n" not in message, message
    assert any(sign in message for sign in ("; ", " or ", ", ")), f"no next step in {message!r}"
    assert not out.exists()
    assert not (out.parent / (out.name + ".incomplete") / "config.json").exists()
    return message


# damage to a folder with one file -> what the message names
SINGLE_DAMAGE = {
    "truncated": (lambda f: cut(f / SINGLE, (f / SINGLE).stat().st_size - 9), "truncated or damaged"),
    "one byte short": (lambda f: cut(f / SINGLE, (f / SINGLE).stat().st_size - 1), "truncated or damaged"),
    "cut inside the header": (lambda f: cut(f / SINGLE, 100), "header is longer than the file"),
    "cut inside the length": (lambda f: cut(f / SINGLE, 5), "no intact safetensors file"),
    "empty file": (lambda f: cut(f / SINGLE, 0), "no intact safetensors file"),
    "all zeros": (lambda f: (f / SINGLE).write_bytes(bytes(5000)), "no intact safetensors file"),
    "html page": (lambda f: (f / SINGLE).write_text("<!DOCTYPE html><html>404</html>"), "longer than the file"),
    "git lfs pointer": (
        lambda f: (f / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n"),
        "header is longer than the file",
    ),
    "header is a list": (lambda f: write_header(f / SINGLE, b"[]"), "no intact safetensors file"),
    "header nested deeply": (lambda f: write_header(f / SINGLE, b"[" * 99_999), "no intact safetensors file"),
    "header entry lacks its dtype": (
        lambda f: write_header(f / SINGLE, b'{"w":{"shape":[1],"data_offsets":[0,4]}}', bytes(4)),
        "dtype",
    ),
    "offsets before the data": (
        lambda f: write_header(f / SINGLE, b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[-8,0]}}'),
        "w has bytes -8 to 0",
    ),
    "negative shape": (
        lambda f: write_header(f / SINGLE, b'{"w":{"dtype":"F32","shape":[-1,-1],"data_offsets":[0,4]}}', bytes(4)),
        "shape",
    ),
    "unknown dtype": (
        lambda f: write_header(f / SINGLE, b'{"w":{"dtype":"F4","shape":[8],"data_offsets":[0,4]}}', bytes(4)),
        "holds w as F4, expected one of F64, F32",
    ),
    "weights are a folder": (lambda f: ((f / SINGLE).unlink(), (f / SINGLE).mkdir()), "cannot be read"),
    "pickled only": (lambda f: (f / SINGLE).rename(f / "pytorch_model.bin"), "only pickled weights"),
    "no weights": (lambda f: (f / SINGLE).unlink(), "neither model.safetensors"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "broken config": (lambda f: cut(f / "config.json", 50), "cannot be read as JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "expected a JSON object"),
    "config is no text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "cannot be read as JSON"),
    "config is a folder": (lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()), "cannot be read"),
    "quantized already": (
        lambda f: edit_json(f / "config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
        "quantized already (quant_method 'gptq')",
    ),
    "quantized somehow": (lambda f: edit_json(f / "config.json", quantization_config="awq"), "quantized already"),
    "unknown model type": (lambda f: edit_json(f / "config.json", model_type="lama"), "`lama`"),
    "unknown class": (lambda f: edit_json(f / "config.json", architectures=["LamaModel"]), "LamaModel"),
    "class is a number": (lambda f: edit_json(f / "config.json", architectures=[5]), "cannot build"),
    "class is no model": (lambda f: edit_json(f / "config.json", architectures=["logging"]), "cannot build"),
    "size is text": (lambda f: edit_json(f / "config.json", hidden_size="64"), "hidden_size"),
    "size is negative": (lambda f: edit_json(f / "config.json", hidden_size=-4), "negative dimension -4"),
    "no heads": (lambda f: edit_json(f / "config.json", num_attention_heads=0), "cannot read"),
    "unknown activation": (lambda f: edit_json(f / "config.json", hidden_act="swishy"), "swishy"),
    "more layers than weights": (lambda f: edit_json(f / "config.json", num_hidden_layers=3), "lacks model.layers.2"),
    "wrong shape": (lambda f: edit_json(f / "config.json", intermediate_size=104), "expected (64, 104)"),
    "wrong vocabulary": (lambda f: edit_json(f / "config.json", vocab_size=97), "expected (97, 64)"),
    "module is missing": (lambda f: edit_tensors(f, **{f"{QUERY}.weight": None}), f"lacks {QUERY}.weight"),
    "module has 8 bits": (
        lambda f: edit_tensors(f, **{f"{QUERY}.weight": torch.zeros(64, 64, dtype=torch.float8_e4m3fn)}),
        f"{QUERY}.weight is torch.float8_e4m3fn",
    ),
    "module has integers": (
        lambda f: edit_tensors(f, **{f"{QUERY}.weight": torch.zeros(64, 64, dtype=torch.int32)}),
        f"{QUERY}.weight is torch.int32",
    ),
    "norm of another length": (lambda f: edit_tensors(f, model__norm__weight=torch.ones(63)), "shape (63,)"),
}


@pytest.mark.parametrize("damage", SINGLE_DAMAGE)
def test_damaged_folder(damage, single, tmp_path):
    apply, named = SINGLE_DAMAGE[damage]
    apply(single)
    assert named in (message := refused(single, tmp_path / "out")), message


SHARD_DAMAGE = {
    "missing shard": (lambda f: shards(f)[1].unlink(), "lacks 1 of"),
    "truncated shard": (lambda f: cut(shards(f)[-1], shards(f)[-1].stat().st_size - 4), "truncated or damaged"),
    "shard cut inside its header": (lambda f: cut(shards(f)[0], 60), "longer than the file"),
    "tensor in no shard": (
        lambda f: edit_json(
            f / INDEX,
            weight_map={**json.loads((f / INDEX).read_text())["weight_map"], "extra.weight": shards(f)[0].name},
        ),
        "lists extra.weight",
    ),
    "index without weight_map": (lambda f: (f / INDEX).write_text("{}"), "has no weight_map"),
    "index names numbers": (lambda f: edit_json(f / INDEX, weight_map={"a": 5}), "has no weight_map"),
    "index is empty": (lambda f: edit_json(f / INDEX, weight_map={}), "lacks model.layers.0"),
    "index cut off": (lambda f: cut(f / INDEX, 99), "cannot be read as JSON"),
    "index names a folder": (lambda f: edit_json(f / INDEX, weight_map={"a": "."}), "cannot be read"),
}


@pytest.mark.parametrize("damage", SHARD_DAMAGE)
def test_damaged_shards(damage, sharded, tmp_path):
    assert len(shards(sharded)) > 2
    apply, named = SHARD_DAMAGE[damage]
    apply(sharded)
    assert named in (message := refused(sharded, tmp_path / "out")), message


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("name", [QUERY, "model.norm"])
def test_not_finite(value, name, single, tmp_path):
    tensor = load_file(single / SINGLE)[f"{name}.weight"]
    tensor.view(-1)[5] = float(value)
    edit_tensors(single, **{f"{name}.weight": tensor})
    message = refused(single, tmp_path / "out", loftq.WeightError)
    assert message.startswith(name), message
    assert "check the source checkpoint" in message


@pytest.mark.parametrize(
    "name",
    ["no/such/folder", "/no/such", "~nobody/model", "a" * 5000, "with space", "", "model.gguf", "../.."],
    ids=lambda name: name[:20] or "empty",
)
def test_no_such_source(name, tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    refused(name, tmp_path / "out")


def test_a_file_is_no_folder(single, tmp_path):
    assert "expected a folder" in refused(single / SINGLE, tmp_path / "out")


def test_hub_id_while_offline(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refused("nobody-at-all/no-such-model", tmp_path / "out")
    assert "check the name, the network" in message


def test_unreadable_disk(single, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(errno.EIO, "Input/output error")

    source = SafetensorsSource(single)
    monkeypatch.setattr(source_module, "open", fail, raising=False)
    for attempt in (lambda: source.read("model.norm.weight"), lambda: SafetensorsSource(single)):
        with pytest.raises(loftq.SourceError, match=r"cannot be read \(Input/output error\); check"):
            attempt()


def test_file_shrinks_while_it_is_read(single):
    source = open_source(single)
    last = list(source.tensors)[-1]
    cut(single / SINGLE, (single / SINGLE).stat().st_size - 1)
    with pytest.raises(loftq.SourceError, match="ends inside tensor"):
        source.read(last)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3.5),
        torch.zeros(0, 3),
        torch.tensor([True, False, True]),
        torch.arange(5, dtype=torch.int16),
        torch.randn(3, 5).to(torch.bfloat16),
        torch.randn(7).half(),
        torch.randn(3).to(torch.float8_e4m3fn),
        torch.arange(3),
    ],
    ids=lambda t: f"{t.dtype} {tuple(t.shape)}".removeprefix("torch."),
)
def test_reads_what_safetensors_writes(tensor, tmp_path):
    save_file({"odd": torch.ones(3, dtype=torch.uint8), "x": tensor}, tmp_path / SINGLE)
    actual = SafetensorsSource(tmp_path).read("x")
    assert (actual.dtype, actual.shape) == (tensor.dtype, tensor.shape)
    assert actual.reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8))
