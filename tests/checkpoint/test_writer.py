"""The output folder: whole or absent, never over something else, and no surprise on a disk that is full or locked."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import loftq
from loftq.checkpoint import writer
from loftq.checkpoint.writer import JOURNAL, header_bytes
from loftq.codec.qtensor import TensorInfo
from loftq.report.record import REPORT
from tiny import tiny_model

CONFIG = loftq.LoftQConfig(bits=4, rank=4, num_iter=1)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("writer") / "source"
    tiny_model("llama").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expected(source, tmp_path_factory) -> dict[str, bytes]:
    """An undisturbed run's files, relative to a working directory in which the output is called ``out``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("undisturbed"))
        quantize(source)
        return contents(Path("out"))


@pytest.fixture(autouse=True)
def workdir(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


def quantize(source: Path, out: str | Path = "out", config=CONFIG, **options):
    return loftq.quantize_checkpoint(source, out, config, progress=False, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != REPORT}


def refused(source: Path, message: str, out: str | Path = "out", **options) -> None:
    with pytest.raises(loftq.OutputError, match=message) as raised:
        quantize(source, out, **options)
    assert "\n" not in str(raised.value)


def stop_after(units: int, monkeypatch, source: Path, **options) -> None:
    """Leave ``out.incomplete`` with some units done."""
    write_unit = writer.Staging.write_unit

    def stopping(self, *args):
        if len(self.done) == units:
            raise KeyboardInterrupt
        write_unit(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(writer.Staging, "write_unit", stopping)
        with pytest.raises(KeyboardInterrupt):
            quantize(source, **options)


# what stands where the output should go


def test_folder_that_holds_something_else(source):
    Path("out").mkdir()
    Path("out/thesis.tex").write_text("irreplaceable")
    for resume in (True, False):
        refused(source, r"is not empty \(it holds thesis.tex\); choose another folder", resume=resume)
    assert os.listdir("out") == ["thesis.tex"]
    assert not Path("out.incomplete").exists()


def test_the_source_itself(source):
    refused(source, "is not empty", source)


def test_unfinished_folder_that_is_someone_elses(source):
    Path("out.incomplete").mkdir()
    Path("out.incomplete/thesis.tex").write_text("irreplaceable")
    for resume in (True, False):
        refused(source, r"holds something else \(thesis.tex\); move it away", resume=resume)
    assert os.listdir("out.incomplete") == ["thesis.tex"]


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("file", "file is a file, expected a folder"),
        ("file/out", "file is a file, expected a folder"),
        ("taken", "File exists"),
        ("loop", "cannot write to"),
        ("x" * 250, "File name too long"),
        ("x" * 5000, "File name too long"),
        ("/proc/out", "cannot write to /proc/out"),
        ("/dev/null", "is a file"),
        ("/", "is not empty"),
    ],
    ids=lambda value: value[:12],
)
def test_impossible_places(source, out, message):
    Path("file").touch()
    Path("taken.incomplete").touch()
    Path("loop").symlink_to("loop")
    refused(source, message, out)


@pytest.mark.parametrize("out", [".", "empty", "link", "dangling", "new/and/nested", "über Maß", "./a/../out2"])
def test_possible_places(source, out, tmp_path, monkeypatch):
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    if out != ".":
        Path("empty").mkdir()
        Path("real").mkdir()
        Path("link").symlink_to("real")
        Path("dangling").symlink_to("nowhere")
        Path("a").mkdir()
    quantize(source, out)
    written = tmp_path / "cwd" if out == "." else Path(out)
    assert (written / "config.json").is_file()
    assert not list(tmp_path.rglob("*.incomplete"))


def test_home_folder(source, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    quantize(source, "~/out")
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize("shard", [JOURNAL, "model.safetensors", "loftq_init/adapter_model.safetensors"])
def test_folder_in_the_place_of_a_file(source, shard, monkeypatch):
    stop_after(3, monkeypatch, source)
    (Path("out.incomplete") / shard).unlink()
    (Path("out.incomplete") / shard).mkdir()
    refused(source, "Is a directory")


# earlier runs


def test_finished_run_returns_its_report(source, expected, monkeypatch):
    first = quantize(source)
    monkeypatch.setattr(writer.Staging, "__init__", lambda *args: pytest.fail("worked again"))
    assert quantize(source).to_dict() == first.to_dict()
    assert contents(Path("out")) == expected


def test_finished_run_with_other_settings(source, expected):
    quantize(source)
    refused(source, "other settings or of another source, which is never overwritten", config=CONFIG.replace(bits=2))
    refused(source, "finished quantization, which is never overwritten; choose", resume=False)
    refused(source, "finished quantization", max_shard_bytes=50_000)
    assert contents(Path("out")) == expected


def test_finished_run_that_lost_its_weights(source):
    quantize(source)
    Path("out/model.safetensors").unlink()
    refused(source, "choose another folder or remove it")


def test_unfinished_run_with_other_settings(source, expected, monkeypatch):
    stop_after(5, monkeypatch, source, config=CONFIG.replace(rank=8))
    refused(source, r"unfinished run with other settings \(config.rank was 8, now 4\).*--no-resume")
    quantize(source, resume=False)
    assert contents(Path("out")) == expected


def test_unfinished_run_of_another_source(source, tmp_path, monkeypatch):
    tiny_model("llama", seed=1).save_pretrained(tmp_path / "other")
    stop_after(5, monkeypatch, source)
    refused(tmp_path / "other", r"other settings \(source.model.safetensors was")


def test_another_process_is_writing(source, expected, monkeypatch):
    stop_after(5, monkeypatch, source)
    with open(f"out.incomplete/{JOURNAL}", "ab") as journal:
        fcntl.flock(journal, fcntl.LOCK_EX)
        for resume in (True, False):
            refused(source, "another process is writing .*out.incomplete; wait", resume=resume)
    quantize(source)
    assert contents(Path("out")) == expected


def test_file_system_without_locks(source, expected, monkeypatch):
    def unsupported(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    quantize(source)
    assert contents(Path("out")) == expected


# disks


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT], ids=["full", "over quota"])
def test_no_room_to_begin(source, expected, number, monkeypatch):
    def refuse(*args):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", refuse)
        refused(source, r"the disk of .*out is full .*run the same command again")
    assert not Path("out").exists()
    quantize(source)
    assert contents(Path("out")) == expected


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS], ids=["full", "broken", "read-only"])
@pytest.mark.parametrize("when", [1, 7, 30])
def test_disk_fails_on_the_way(source, expected, number, when, monkeypatch):
    calls = []

    def fsync(*args):
        calls.append(args)
        if len(calls) == when:
            raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        refused(source, "full" if number == errno.ENOSPC else os.strerror(number))
    assert not Path("out").exists()
    quantize(source)
    assert contents(Path("out")) == expected


def test_disk_full_at_the_metadata(source, expected, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(loftq.QuantizationReport, "save", full)
        refused(source, "is full")
    assert not Path("out.incomplete/config.json").exists()
    quantize(source)
    assert contents(Path("out")) == expected


@pytest.fixture
def small_disk(tmp_path):
    """A mounted file system and a function that changes its size."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(kilobytes: int, *options: str) -> bool:
        command = ["mount", "-t", "tmpfs", "-o", ",".join([*options, f"size={kilobytes}k"]), "tmpfs", str(folder)]
        try:
            return subprocess.run(command, capture_output=True, check=False).returncode == 0
        except FileNotFoundError:
            return False

    if not mount(64):
        pytest.skip("may not mount a file system here")
    yield folder, mount
    subprocess.run(["umount", str(folder)], check=True)


def test_small_disk_that_grows(source, expected, small_disk, monkeypatch):
    """Space runs out at another place each time: in the weights, the journal, the tokenizer files, the report."""
    folder, mount = small_disk
    monkeypatch.chdir(folder)
    failures = 0
    for kilobytes in range(64, 600, 8):
        assert mount(kilobytes, "remount")
        try:
            quantize(source)
            break
        except loftq.OutputError as error:
            assert "free some space and run the same command again" in str(error)  # noqa: PT017 - one of many attempts
            assert not Path("out").exists()
            failures += 1
    assert failures > 10, f"{failures} failures"
    assert contents(Path("out")) == expected
    monkeypatch.chdir("/")  # or the disk is busy


def test_no_room_for_a_rank_beyond_reason(source):
    """Refused before anything is allocated: half an output would leave the disk full."""
    refused(source, r"the output takes [\d,.]+ GB more; free some space", config=CONFIG.replace(rank=10**9))
    taken = sum(p.stat().st_blocks * 512 for p in Path("out.incomplete").rglob("*"))
    assert taken < 1e6, f"{taken} bytes"


def test_failed_allocation_gives_the_space_back(source, small_disk, monkeypatch):
    """Where free space is unknown, as under a quota, the allocation itself fails."""
    folder, _ = small_disk
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 0))
    refused(source, "is full", folder / "out")
    taken = sum(p.stat().st_blocks * 512 for p in folder.rglob("model.safetensors"))
    assert taken == 0, f"{taken} bytes"


def test_mount_point(source, small_disk):
    folder, _ = small_disk
    refused(source, "is a mount point, which cannot be replaced; choose a folder in it", folder)


def test_read_only_disk(source, small_disk):
    folder, mount = small_disk
    assert mount(64, "remount", "ro")
    refused(source, "Read-only file system", folder / "out")


# bytes


@pytest.mark.parametrize("names", [["b", "a", "ä", "c.weight"], ["x"], []], ids=["several", "one", "none"])
def test_layout_is_safetensors_own(names, tmp_path):
    dtypes = [
        torch.float32,
        torch.uint8,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.bool,
        torch.int32,
        torch.int8,
    ]
    tensors = {f"{n}.{k}": torch.ones(3, k + 1).to(d) for n in names for k, d in enumerate(dtypes)}
    save_file(tensors, tmp_path / "reference.safetensors", metadata={"format": "pt"})
    header, begins = header_bytes({n: TensorInfo(t.dtype, tuple(t.shape)) for n, t in tensors.items()})
    actual = (tmp_path / "reference.safetensors").read_bytes()
    assert actual[: len(header)] == header, json.loads(actual[8 : len(header)])
    assert begins.keys() == tensors.keys()
