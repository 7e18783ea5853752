"""A quantization killed at any moment: the next run continues, and the finished folder is the same to the byte."""

from __future__ import annotations

import builtins
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import pytest

import loftq
from loftq import pipeline
from loftq.checkpoint import writer
from loftq.checkpoint.writer import JOURNAL
from loftq.report.record import REPORT
from tiny import tiny_model

CONFIG = loftq.LoftQConfig(bits=2, rank=4, num_iter=1)


class Crash(BaseException):
    """No ``except Exception`` may catch it, as none catches a kill."""


class CountedWrites:
    """Replaces the writer's ``open``: after ``limit`` bytes in all, in the middle of a write, ``stop`` is called."""

    def __init__(self, limit: int, stop: Callable[[], None]) -> None:
        self.limit, self.stop, self.written = limit, stop, 0

    def open(self, path, mode="r"):
        stream = builtins.open(path, mode)  # noqa: SIM115 - the writer closes it
        return Stream(stream, self) if "+" in mode else stream


class Stream:
    def __init__(self, stream, count: CountedWrites) -> None:
        self.stream, self.count = stream, count

    def write(self, data) -> None:
        room = self.count.limit - self.count.written
        self.count.written += len(data)
        if len(data) > room:
            self.stream.write(data[: max(room, 0)])
            self.stream.flush()
            self.count.stop()
        self.stream.write(data)

    def __getattr__(self, name):
        return getattr(self.stream, name)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a finished folder, the report without what may differ between runs."""
    files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    report = json.loads(files.pop(REPORT))
    del report["timing"], report["command"]
    return {**files, REPORT: json.dumps(report).encode()}


def differences(actual: dict[str, bytes], expected: dict[str, bytes]) -> list[str]:
    return [name for name in sorted({*actual, *expected}) if actual.get(name) != expected.get(name)]


def quantize(**options):
    return loftq.quantize_checkpoint("source", "out", CONFIG, progress=False, **options)


def header_size(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def tensor_names(path: Path) -> list[str]:
    return [n for n in json.loads(path.read_bytes()[8 : header_size(path)]) if n != "__metadata__"]


def random_moments(rng: random.Random, headers: int, total: int) -> Iterator[int]:
    """Bytes until a crash: one in five within the headers, which every run writes, the others among the tensors."""
    while True:
        yield rng.randrange(headers) if rng.random() < 0.2 else headers + rng.randrange((total - headers) // 6)


class Reference(NamedTuple):
    """An uninterrupted run: its working directory, what it wrote, and how many bytes passed through the writer."""

    folder: Path
    expected: dict[str, bytes]
    headers: int
    total: int


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Reference:
    """One for all tests.

    The adapter's config holds the output's path, so every run writes to ``out`` in a working directory of its own.
    """
    folder = tmp_path_factory.mktemp("reference")
    tiny_model("llama", layers=6).save_pretrained(folder / "source")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        count = CountedWrites(1 << 60, lambda: None)
        patch.setattr(writer, "open", count.open, raising=False)
        quantize()
    headers = sum(header_size(path) for path in (folder / "out").rglob("*.safetensors"))
    return Reference(folder, contents(folder / "out"), headers, count.written)


@pytest.fixture
def workdir(reference, tmp_path, monkeypatch) -> Path:
    (tmp_path / "source").symlink_to(reference.folder / "source")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def crash():
    raise Crash


def test_crash_inside_any_write(reference, workdir, monkeypatch):
    crashes = 0
    for limit in random_moments(random.Random(0), reference.headers, reference.total):
        if Path("out").exists():
            break
        assert crashes < 100, "no progress"
        count = CountedWrites(limit, crash)
        monkeypatch.setattr(writer, "open", count.open, raising=False)
        try:
            quantize()
        except Crash:
            crashes += 1
            assert not Path("out").exists()
            assert not Path("out.incomplete/config.json").exists(), "looks whole"
    assert crashes >= 10, f"{crashes} crashes"
    assert differences(contents(Path("out")), reference.expected) == []
    assert not Path("out.incomplete").exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [(pipeline, "write_metadata"), (writer, "check_target")],
    ids=["before metadata", "between metadata and renaming"],
)
def test_crash_near_the_end(reference, workdir, monkeypatch, module, name):
    original = getattr(module, name)
    calls = []

    def stop(*args):
        calls.append(args)
        if module is pipeline or len(calls) == 2:  # the writer's first call is at its start
            raise Crash
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, stop)
        with pytest.raises(Crash):
            quantize()
    assert not Path("out").exists()
    quantize()
    assert differences(contents(Path("out")), reference.expected) == []


def test_kill_between_renaming_and_removal_of_the_journal(reference, workdir, monkeypatch):
    with monkeypatch.context() as patch:
        unlink = Path.unlink
        patch.setattr(Path, "unlink", lambda path, **k: crash() if path.name == JOURNAL else unlink(path, **k))
        with pytest.raises(Crash):
            quantize()
    assert sorted(os.listdir("out")) == sorted([*os.listdir(reference.folder / "out"), JOURNAL])
    assert loftq.load("out") is not None
    quantize()
    assert differences(contents(Path("out")), reference.expected) == []


def interrupted(monkeypatch, after: int = 3, **options) -> None:
    """Leave an unfinished run with ``after`` units done."""
    original = writer.Staging.write_unit

    def write_unit(self, *args):
        if len(self.done) == after:
            raise KeyboardInterrupt
        original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(writer.Staging, "write_unit", write_unit)
        with pytest.raises(KeyboardInterrupt):
            quantize(**options)


def test_units_already_done_are_not_computed_again(reference, workdir, monkeypatch):
    interrupted(monkeypatch, after=30)
    report = quantize()
    assert len(report.timing["modules"]) == len(tensor_names(Path("source/model.safetensors"))) - 30


@pytest.mark.parametrize("place", ["tensor", "adapter", "journal", "zeros in the journal", "garbage in the journal"])
def test_damage_to_the_unfinished_folder_is_repaired(reference, workdir, monkeypatch, place):
    interrupted(monkeypatch, after=20)
    folder = Path("out.incomplete")
    if place in ("tensor", "adapter"):
        path = folder / ("model.safetensors" if place == "tensor" else "loftq_init/adapter_model.safetensors")
        path.write_bytes(path.read_bytes()[:1000] + bytes(path.stat().st_size - 1000))
    else:
        lines = (folder / JOURNAL).read_bytes().splitlines(keepends=True)
        middle = {"journal": lines[9][:50], "zeros in the journal": bytes(99) + b"\n", "garbage in the journal": b"5\n"}
        (folder / JOURNAL).write_bytes(b"".join([*lines[:9], middle[place], *lines[10:]]))
    quantize()
    assert differences(contents(Path("out")), reference.expected) == []


@pytest.mark.parametrize("first", [1 << 60, 20_000], ids=["one file then shards", "shards then one file"])
def test_another_shard_size_leaves_no_stale_file(reference, workdir, monkeypatch, first):
    second = 20_000 if first > 20_000 else 1 << 60
    interrupted(monkeypatch, after=20, max_shard_bytes=first)
    quantize(max_shard_bytes=second)
    names = sorted(p.name for p in Path("out").glob("*.safetensors"))
    assert (names == ["model.safetensors"]) == (second > 20_000), names
    if second > 20_000:
        assert differences(contents(Path("out")), reference.expected) == []


def test_stopping_keeps_no_lock(reference, workdir, monkeypatch):
    interrupted(monkeypatch)
    other = CONFIG.replace(bits=4)
    with pytest.raises(loftq.OutputError, match=r"config.bits was 2, now 4.*--no-resume") as kept:
        loftq.quantize_checkpoint("source", "out", other, progress=False)
    loftq.quantize_checkpoint("source", "out", other, progress=False, resume=False)
    assert kept.value is not None  # its traceback holds the first attempt's locals until here


# Kills itself with SIGKILL in the middle of a write, after as many bytes as its argument says.
CHILD = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from test_resume import CountedWrites, quantize
from loftq.checkpoint import writer
writer.open = CountedWrites(int(sys.argv[1]), lambda: os.kill(os.getpid(), signal.SIGKILL)).open
quantize()
"""


@pytest.mark.slow
def test_ten_kills(reference, workdir):
    """SIGKILL at ten random moments, the whole chain on one folder."""
    script = CHILD.format(tests=str(Path(__file__).parent))
    moments = random_moments(random.Random(1), reference.headers, reference.total)
    for limit in [*islice(moments, 10), 1 << 60]:
        done = subprocess.run([sys.executable, "-c", script, str(limit)], capture_output=True, text=True, check=False)
        code = 0 if limit == 1 << 60 else -signal.SIGKILL
        assert done.returncode == code, f"{limit} of {reference.total} bytes: {done.stderr[-2000:]}"
        assert Path("out").exists() == (code == 0)
    assert differences(contents(Path("out")), reference.expected) == []
