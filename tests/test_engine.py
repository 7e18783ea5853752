"""Quantizing on a Ray cluster of this machine's processes: the same bytes as locally, whatever happens to the workers."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import loftq
from letters import letters
from loftq import pipeline, units
from loftq.calibrate.choose import collect_statistics
from loftq.checkpoint.source import hub_snapshot, open_source
from loftq.checkpoint.writer import Staging
from loftq.engine import cluster, jobs, worker
from loftq.kernels import threads
from loftq.solver.importance import InputStatistics
from test_resume import contents, differences
from tiny import tiny_model

ray = pytest.importorskip("ray", reason="needs Ray")

WEIGHTS = loftq.LoftQConfig(bits=2, rank=4, num_iter=1, calibration=None)
TEXT = "the quick brown fox jumps over the lazy dog and then it runs away from all of them\n" * 40


@pytest.fixture(scope="module")
def two_workers() -> Iterator[None]:
    """A cluster of two cores, started as `loftq quantize --engine ray` does it, and the tests' own connection to it."""
    options = cluster._options("local")
    options["runtime_env"]["env_vars"]["PYTHONPATH"] += f":{Path(__file__).parent}"
    ray.init("local", num_cpus=2, object_store_memory=200_000_000, log_to_driver=False, logging_level=40, **options)
    yield
    ray.shutdown()


@pytest.fixture
def workdir(tmp_path, monkeypatch) -> Path:
    """The adapter's config holds the output's path, so every run writes to ``out`` in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def decoder(folder: Path, layers: int = 2, hidden: int = 64) -> Path:
    """A random Llama with a tokenizer, so that it can be calibrated; k and v are smaller than q, which shares their input."""
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=len(letters()),
        hidden_size=hidden,
        intermediate_size=3 * hidden // 2,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    tf.LlamaForCausalLM(config).save_pretrained(folder / "source")
    letters().save_pretrained(folder / "source")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    return folder / "source"


def calibrated(**changes) -> loftq.LoftQConfig:
    options = {"bits": 2, "rank": 4, "num_iter": 2, "calibration": "text.txt", "calibration_samples": 4}
    options |= {"calibration_length": 32, "calibration_gradients": 2}
    return loftq.LoftQConfig(**{**options, **changes})


def quantized(config: loftq.LoftQConfig, engine: str, **options) -> dict[str, bytes]:
    """What a run writes; the folder is removed to make place for the next."""
    loftq.quantize_checkpoint(
        "source", "out", config, progress=options.pop("progress", False), engine=engine, **options
    )
    found = contents(Path("out"))
    Path("out").rename(f"out-{engine}-{time.monotonic_ns()}")
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {"calibration": None},
        {},
        {"propagate": True, "calibration_gradients": 0},
        {"method": "lq-lora"},
        {"method": "lqer", "scale_dtype": "bfloat16"},
    ],
    ids=["weights", "loftq-data", "propagate", "fisher", "lqer"],
)
def test_same_bytes(two_workers, workdir, changes):
    decoder(workdir)
    config = calibrated(**changes)
    assert differences(quantized(config, "ray"), quantized(config, "local")) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "small", [2_000, 5_000], ids=["all large", "q, o large for their input's factor; k, v as well"]
)
def test_same_bytes_where_matrices_are_large(two_workers, workdir, monkeypatch, small):
    """Large matrices are worked on by as many threads as the driver has, and so are the factors that small ones share."""
    monkeypatch.setattr(threads, "SMALL", small)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        decoder(workdir, layers=1, hidden=128)
        config = calibrated()
        local = quantized(config, "local")
        assert differences(quantized(config, "ray"), local) == []
    finally:
        torch.set_num_threads(before)


def test_statistics_of_a_file(two_workers, workdir):
    decoder(workdir)
    collect_statistics("source", calibrated(), progress=False).save("statistics")
    runs = [quantized(calibrated(), engine, statistics="statistics") for engine in ("ray", "local")]
    assert differences(*runs) == []


def mixture(folder: Path, by_expert: bool) -> Path:
    """A random Mixtral with a tokenizer, whose experts are in a tensor each or in whole parameters."""
    torch.manual_seed(0)
    config = tf.MixtralConfig(
        vocab_size=len(letters()),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=3,
        num_experts_per_tok=2,
        max_position_embeddings=128,
    )
    tf.MixtralForCausalLM(config).save_pretrained(folder / "source", save_original_format=by_expert)
    letters().save_pretrained(folder / "source")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    return folder / "source"


@pytest.mark.parametrize(
    ("by_expert", "changes"),
    [
        (True, {"calibration": None}),
        (False, {"calibration": None}),
        (True, {}),
        (True, {"calibration_samples": 1, "calibration_length": 8}),
    ],
    ids=["a tensor each", "whole", "calibrated", "few tokens, so that experts share statistics"],
)
def test_same_bytes_of_experts(two_workers, workdir, by_expert, changes):
    mixture(workdir, by_expert)
    config = calibrated(**changes)
    assert differences(quantized(config, "ray"), quantized(config, "local")) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "small", [5_000, 30_000], ids=["every expert is large", "all together are large, each is small"]
)
def test_same_bytes_of_large_experts(two_workers, workdir, monkeypatch, small):
    monkeypatch.setattr(threads, "SMALL", small)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        mixture(workdir, by_expert=True)
        local = quantized(calibrated(), "local")
        assert differences(quantized(calibrated(), "ray"), local) == []
    finally:
        torch.set_num_threads(before)


def test_experts_that_share_statistics_go_to_a_worker_once():
    few, many = (InputStatistics(torch.rand(4, 4), torch.rand(4), tokens=n) for n in (3, 9))
    packed = worker.pack_experts([many, few, few])
    assert packed.which == [0, 1, 1]
    assert [each["tokens"] for each in packed.distinct] == [9, 3]
    for given, each in zip((many, few), packed.distinct, strict=True):
        torch.testing.assert_close(worker.unpack_statistics(each).second_moment, given.second_moment, rtol=0, atol=0)


def busy_workers() -> list[psutil.Process]:
    """Processes that compute one of our tasks, which Ray puts into their title."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            title = " ".join(process.cmdline())
            if title.startswith("ray::model.layers"):  # others are idle, or Ray's own
                found.append(process)
    return found


def test_a_worker_killed_in_the_middle(two_workers, workdir):
    decoder(workdir, layers=3, hidden=192)
    config = calibrated(calibration=None, num_iter=8, svd="exact")
    expected = quantized(config, "local")
    begun, ended, killed = threading.Event(), threading.Event(), []

    def kill_one() -> None:
        begun.wait()
        while not killed and not ended.is_set():
            for process in busy_workers()[:1]:
                process.kill()
                killed.append(process.pid)

    killer = threading.Thread(target=kill_one)
    killer.start()
    try:
        found = quantized(config, "ray", progress=lambda name, weights: "proj" in name and begun.set())
    finally:
        begun.set()
        ended.set()
        killer.join()
    assert len(killed) == 1, "no worker was busy"
    assert differences(found, expected) == []


def kill_this_process(*args) -> None:
    import signal

    os.kill(os.getpid(), signal.SIGKILL)


def test_a_task_that_kills_its_workers(two_workers, workdir, monkeypatch):
    decoder(workdir, layers=1)
    monkeypatch.setattr(cluster, "RETRIES", 1)
    monkeypatch.setattr(cluster, "compute", kill_this_process)
    with pytest.raises(
        loftq.ClusterError, match=r"_proj could not be computed, its worker was lost 2 times.*run the same"
    ):
        quantized(WEIGHTS, "ray")


@pytest.mark.parametrize("first", ["ray", "local"])
def test_either_engine_continues_what_the_other_began(two_workers, workdir, monkeypatch, first):
    decoder(workdir)
    config = calibrated()
    second = {"ray": "local", "local": "ray"}[first]
    expected = quantized(config, "local")
    write = Staging.write_unit

    def interrupt(self, unit, *rest):
        if sum("proj" in name for name in self.done) == 5:
            raise KeyboardInterrupt
        write(self, unit, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Staging, "write_unit", interrupt)
        with pytest.raises(KeyboardInterrupt):
            quantized(config, first)
    before = [json.loads(line)["unit"] for line in Path("out.incomplete/journal.jsonl").read_text().splitlines()[1:]]
    assert sum("proj" in name for name in before) == 5
    found = quantized(config, second)
    assert differences(found, expected) == []


def test_a_bad_weight_is_the_same_sentence(two_workers, workdir):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    model.save_pretrained("source")
    said = []
    for engine in ("local", "ray"):
        with pytest.raises(loftq.WeightError) as raised:
            quantized(WEIGHTS, engine)
        said.append(str(raised.value))
    assert said[0].startswith("model.layers.1.mlp.up_proj: ")
    assert said[1] == said[0]


def task_for(folder: Path, **changes) -> worker.Task:
    from loftq.checkpoint.assembly import Parameters
    from loftq.checkpoint.naming import meta_model
    from loftq.plan.targets import plan_modules

    source = open_source(folder)
    model = meta_model(source.config())
    plans = plan_modules(model, WEIGHTS)
    unit = next(u for u in units.make_units(source, model, plans, Parameters(source, model)) if u.plan is not None)
    values = {"unit": unit, "origin": worker.Origin.of(source), "config": WEIGHTS, "threads": 1, "shared": None}
    return worker.Task(**{**values, "of_layer": {}, "stack": worker.Stack.here(), **changes})


def test_a_worker_without_the_source(workdir):
    task = task_for(decoder(workdir))
    (workdir / "source").rename(workdir / "elsewhere")
    error = worker.compute(task, None)
    assert isinstance(error, loftq.SourceError)
    assert "source does not exist on" in str(error)
    assert "put the model on storage" in str(error)


def test_a_worker_with_another_source(workdir):
    task = task_for(decoder(workdir))
    weights = workdir / "source" / "model.safetensors"
    tiny_model("llama").save_pretrained(weights.parent)
    error = worker.compute(task, None)
    assert isinstance(error, loftq.SourceError)
    assert "has other files on" in str(error)


def test_a_worker_with_another_fine_tuning_of_the_same_size(workdir):
    """Under the same path on its own disk: nothing but the numbers differ."""
    task = task_for(decoder(workdir))
    weights = workdir / "source" / "model.safetensors"
    size = weights.stat().st_size
    tensors = {name: tensor + 0.01 for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    assert weights.stat().st_size == size
    error = worker.compute(task, None)
    assert isinstance(error, loftq.SourceError)
    assert "has other files on" in str(error)


def test_a_link_to_a_snapshot_of_the_hub(workdir):
    """As a worker has no such link, it must know what it leads to."""
    snapshot = workdir / "cache" / "models--some--model" / "snapshots" / "0123abcd"
    snapshot.parent.mkdir(parents=True)
    decoder(workdir).rename(snapshot)
    (workdir / "linked model").symlink_to(snapshot)
    assert worker.Origin.of(open_source(workdir / "linked model")).hub == ("some/model", "0123abcd")


class ShrinkingCluster:
    """Stands for Ray: a machine of four cores, lost as soon as it has work, and one of two. What asks for more never ends."""

    class exceptions:
        RayError = type("RayError", (Exception,), {})
        RayTaskError = type("RayTaskError", (RayError,), {})

    def __init__(self) -> None:
        self.nodes_left, self.running, self.cancelled = [4, 2], {}, []

    def remote(self, **options):
        return lambda function: self

    def options(self, num_cpus, name):
        self.asked = num_cpus
        return argparse.Namespace(remote=self.start)

    def start(self, task, of_input):
        reference = f"{task.unit.name} on {self.asked}"
        self.running[reference] = (
            self.asked,
            worker.Result({}, {"name": task.unit.name}, 0.0, "here", task.stack.instructions),
        )
        self.nodes_left = [2]
        return reference

    def wait(self, references, num_returns=1, timeout=None):
        assert timeout is not None, "would wait for ever"
        done = [r for r in references if self.running[r][0] <= max(self.nodes_left)]
        return done[:num_returns], references

    def get(self, reference):
        return self.running[reference][1]

    def cancel(self, reference, force):
        self.cancelled.append(reference)

    def put(self, value):
        raise self.exceptions.RayError("the store is full")

    def nodes(self):
        return [{"Alive": True, "Resources": {"CPU": float(cores)}} for cores in self.nodes_left]

    def cluster_resources(self):
        return {"CPU": float(sum(self.nodes_left))}


def test_the_largest_machine_is_lost(workdir, monkeypatch):
    """A large matrix asks for as many cores as the largest machine has; the machines that are left have fewer."""
    monkeypatch.setattr(threads, "SMALL", 10)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    unit, source, shrinking = task_for(decoder(workdir)).unit, open_source("source"), ShrinkingCluster()
    engine = cluster.RayEngine(shrinking, source, WEIGHTS, lambda sentence: None)
    ((done, ((_, record), _)),) = engine.run([jobs.Job(unit)])
    assert done is unit
    assert record == {"name": unit.name}
    assert shrinking.cancelled == [f"{unit.name} on 4"]


def test_statistics_that_do_not_fit_are_said(workdir):
    unit = task_for(decoder(workdir)).unit
    engine = cluster.RayEngine(ShrinkingCluster(), open_source("source"), WEIGHTS, lambda sentence: None)
    statistics = InputStatistics(torch.eye(unit.plan.shape[1]), tokens=7)
    with pytest.raises(loftq.ClusterError, match=r"do not fit into Ray's object store \(the store is full\)"):
        list(engine.run([jobs.Job(unit, statistics)]))


def test_work_ends_before_the_engine_is_closed(workdir, monkeypatch):
    """When writing fails or the user interrupts: not when the traceback is given up, after the cluster is gone."""
    decoder(workdir)
    events, run = [], jobs.LocalEngine.run

    def watched(self, given):
        try:
            yield from run(self, given)
        finally:
            events.append("work ended")

    @contextlib.contextmanager
    def opened(*arguments):
        with jobs.open_engine(*arguments) as engine:
            try:
                yield engine
            finally:
                events.append("engine closed")

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs.LocalEngine, "run", watched)
    monkeypatch.setattr(pipeline, "open_engine", opened)
    monkeypatch.setattr(Staging, "write_unit", interrupt)
    with pytest.raises(KeyboardInterrupt):
        loftq.quantize_checkpoint("source", "out", WEIGHTS, progress=False)
    assert events == ["work ended", "engine closed"]


def test_a_worker_with_another_torch(workdir):
    here = worker.Stack.here()
    stack = here._replace(versions={**here.versions, "torch": "1.0"})
    error = worker.compute(task_for(decoder(workdir), stack=stack), None)
    assert isinstance(error, loftq.ClusterError)
    assert f"has torch {here.versions['torch']}, expected 1.0" in str(error)


def test_a_worker_finds_a_snapshot_of_the_hub_in_its_own_cache(workdir, monkeypatch):
    """The driver's cache is elsewhere than the worker's."""
    snapshot = workdir / "cache" / "models--some--model" / "snapshots" / "0123abcd"
    snapshot.parent.mkdir(parents=True)
    decoder(workdir).rename(snapshot)
    assert hub_snapshot(snapshot) == ("some/model", "0123abcd")
    task = task_for(snapshot)
    (workdir / "cache").rename(workdir / "own-cache")
    own = workdir / "own-cache" / "models--some--model" / "snapshots" / "0123abcd"
    asked = []

    def opened(*arguments):
        asked.append(arguments)
        return open_source(own)

    monkeypatch.setattr(worker, "open_source", opened)
    result = worker.compute(task, None)
    assert isinstance(result, worker.Result), result
    assert asked == [("some/model", "0123abcd")]


def test_packets_keep_every_bit():
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.uint8):
        tensor = torch.randn(3, 5).to(dtype) if dtype.is_floating_point else torch.arange(15, dtype=dtype).view(3, 5)
        found = worker.unpack(worker.pack(tensor.T))
        assert found.dtype == dtype
        assert torch.equal(found, tensor.T)
        assert found.data_ptr() % 64 == 0


def test_layers_that_share_an_input_share_its_factors(monkeypatch):
    """In a worker as well, for as long as they come one after the other."""
    moment = torch.eye(4)
    shared = InputStatistics(moment, tokens=7)
    packed, of_layer = worker.pack_statistics(shared.of_layer(fisher_rows=torch.ones(3)))
    assert set(packed) == {"second_moment", "tokens"}
    assert set(of_layer) == {"fisher_rows"}
    monkeypatch.setattr(worker, "_latest", None)
    first = worker._inputs("a", packed)
    assert first.tokens == 7
    assert worker._inputs("a", packed) is first
    assert worker._inputs("b", packed) is not first


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"engine": "spark"}, loftq.ConfigError, "engine is 'spark', expected one of local, ray"),
        ({"address": "auto"}, loftq.ConfigError, "address is 'auto', but the engine is local; add --engine ray"),
        ({"engine": "ray", "address": "auto"}, loftq.ConfigError, "Ray is connected already; leave it out"),
    ],
    ids=["engine", "address", "connected"],
)
def test_mistakes(two_workers, workdir, options, error, message):
    decoder(workdir)
    with pytest.raises(error, match=message):
        loftq.quantize_checkpoint("source", "out", WEIGHTS, progress=False, **options)


def test_nobody_at_the_address(workdir, monkeypatch):
    decoder(workdir)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with socket.socket() as held:  # bound, but nothing listens
        held.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{held.getsockname()[1]}"
        with pytest.raises(
            loftq.ClusterError, match=rf"no Ray cluster answers at '{address}' .*start one with `ray start"
        ):
            loftq.quantize_checkpoint("source", "out", WEIGHTS, progress=False, engine="ray", address=address)


def test_without_ray(workdir, monkeypatch):
    decoder(workdir)
    monkeypatch.setitem(sys.modules, "ray", None)
    message = r'the engine ray needs Ray, which is not installed; pip install "loftq\[ray\]"'
    with pytest.raises(loftq.ConfigError, match=message):
        loftq.quantize_checkpoint("source", "out", WEIGHTS, progress=False, engine="ray")


def test_jobs_ahead_are_bounded(two_workers, workdir, monkeypatch):
    """Statistics of the layers to come are not computed, and do not fill memory, before there is a worker for them."""
    decoder(workdir, layers=4)
    drawn, written, ahead = [], [], []
    original = jobs.Job

    def job(unit, statistics=None):
        if unit.plan is not None:
            drawn.append(unit.name)
            ahead.append(len(drawn) - len(written))
        return original(unit, statistics)

    monkeypatch.setattr(jobs, "Job", job)
    quantized(calibrated(), "ray", progress=lambda name, weights: written.append(name) if "proj" in name else None)
    assert len(drawn) == 28
    # one more than the two workers have cores, the one just drawn, and the one being written
    assert max(ahead) <= 5, ahead


def test_a_worker_with_another_loftq(workdir):
    """Where the caller has connected Ray, nothing is sent along."""
    error = worker.compute(task_for(decoder(workdir), stack=worker.Stack.here()._replace(code="other")), None)
    assert isinstance(error, loftq.ClusterError)
    assert "has another loftq than where the command runs" in str(error)
    assert "add runtime_env={'py_modules': [loftq]} to the program's ray.init" in str(error)


@pytest.mark.parametrize("call", ["wait", "cluster_resources", "nodes", "start"])
def test_the_cluster_is_lost(workdir, monkeypatch, call):
    """At whichever call to it this shows."""
    monkeypatch.setattr(threads, "SMALL", 10)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    unit, lost = task_for(decoder(workdir)).unit, ShrinkingCluster()

    def fail(*arguments, **options):
        raise lost.exceptions.RayError("the GCS does not answer\nTraceback")

    monkeypatch.setattr(lost, call, fail)
    engine = cluster.RayEngine(lost, open_source("source"), WEIGHTS, lambda sentence: None)
    message = r"^the connection to the Ray cluster is lost \(the GCS does not answer\); .*continues where it stopped$"
    with pytest.raises(loftq.ClusterError, match=message):
        list(engine.run([jobs.Job(unit), jobs.Job(unit)]))


def test_a_worker_without_loftq(two_workers, workdir, monkeypatch):
    decoder(workdir, layers=1)
    absent = types.ModuleType("absent")
    exec("def compute(task, of_input): pass", absent.__dict__)
    monkeypatch.setitem(sys.modules, "absent", absent)  # so that it is pickled by its name, which no worker knows
    monkeypatch.setattr(cluster, "compute", absent.compute)
    with pytest.raises(loftq.ClusterError, match=r"a worker cannot import loftq; install there"):
        quantized(WEIGHTS, "ray")


class Asking:
    """Stands for a cluster that asks for a token: what is sent along, and what is found on this machine."""

    def __init__(self, monkeypatch, mode: str | None, found: str | None, right: str) -> None:
        import ray._raylet

        self.found, self.right = found, right
        if mode is None:
            monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
        else:
            monkeypatch.setenv("RAY_AUTH_MODE", mode)
        loader = argparse.Namespace(has_token=lambda ignore_auth_mode: found is not None)
        monkeypatch.setattr(cluster, "_token_refused", self.refused)
        monkeypatch.setattr(ray._raylet, "AuthenticationTokenLoader", argparse.Namespace(instance=lambda: loader))
        monkeypatch.setattr(ray._raylet, "Config", argparse.Namespace(initialize=lambda config: None))

    def refused(self, module, address) -> bool:
        return (self.found if os.environ.get("RAY_AUTH_MODE") == "token" else None) != self.right


@pytest.mark.parametrize(
    ("mode", "found", "message"),
    [
        (None, "right", None),
        ("token", "right", None),
        (None, "other", r"but it does not accept the one that is here; copy ~/.ray/auth_token .*RAY_AUTH_TOKEN"),
        ("token", None, r"but there is none here; copy ~/.ray/auth_token .*RAY_AUTH_TOKEN"),
        (None, None, r"but there is none here; copy ~/.ray/auth_token .*RAY_AUTH_TOKEN"),
        ("disabled", "right", r"but RAY_AUTH_MODE is 'disabled' here; unset RAY_AUTH_MODE"),
    ],
    ids=["found", "set", "other", "set, none", "none", "disabled"],
)
def test_a_cluster_that_asks_for_a_token(monkeypatch, mode, found, message):
    Asking(monkeypatch, mode, found, "right")
    with cluster._mode_restored(ray):
        if message is None:
            cluster._authenticate(ray, "head:6379")
            assert os.environ["RAY_AUTH_MODE"] == "token"
        else:
            with pytest.raises(
                loftq.ClusterError, match=rf"^the Ray cluster at 'head:6379' asks for a token, {message}"
            ):
                cluster._authenticate(ray, "head:6379")
    assert os.environ.get("RAY_AUTH_MODE") == mode


@pytest.fixture
def head(tmp_path) -> Iterator[tuple[str, dict[str, str]]]:
    """Address of a cluster of its own, started where a local run has left a token, and the environment of such a user."""
    home, short = (
        tmp_path / "home",
        tempfile.mkdtemp(prefix="ray", dir="/tmp"),
    )  # sockets are in it: a path of 107 bytes
    (home / ".ray").mkdir(parents=True)
    (home / ".ray" / "auth_token").write_text("7" * 64)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    source = str(Path(loftq.__file__).parents[1])
    environment |= {"HOME": str(home), "PYTHONPATH": source, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--num-cpus=1", "--include-dashboard=false", f"--temp-dir={short}", "--object-store-memory=100000000"]
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}", *options]
    log = tmp_path / "ray.log"
    with open(log, "w") as stream:
        started = subprocess.Popen(command, env=environment, stdout=stream, stderr=stream)
    family = [psutil.Process(started.pid)]
    try:
        end = time.monotonic() + 180
        while "This command will now block" not in log.read_text():
            assert started.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.5)
        yield f"127.0.0.1:{port}", environment
    finally:
        family += family[0].children(recursive=True) if started.poll() is None else []
        for process in family:
            with contextlib.suppress(psutil.Error):
                process.kill()
        started.wait()
        shutil.rmtree(short, ignore_errors=True)


@pytest.mark.slow
def test_the_documented_command(head, workdir):
    """After a local run, from which on `ray start --head` asks for a token."""
    address, environment = head
    decoder(workdir, layers=1)
    expected = quantized(WEIGHTS, "local")
    command = [sys.executable, "-m", "loftq.cli", "quantize", "source", "--bits=2", "--rank=4", "--iters=1"]
    command += ["--no-calibration", "--engine=ray"]
    options = {"capture_output": True, "text": True, "timeout": 600}
    ran = subprocess.run([*command, "--out=out", "--address", address], env=environment, **options)
    assert ran.returncode == 0, ran.stderr
    assert "InvalidAuthToken" not in ran.stderr
    assert differences(contents(Path("out")), expected) == []
    (Path(environment["HOME"]) / ".ray" / "auth_token").write_text("8" * 64)
    ran = subprocess.run([*command, "--out=other"], env={**environment, "RAY_ADDRESS": address}, **options)
    assert ran.returncode == 2
    assert "asks for a token, but it does not accept the one that is here" in ran.stderr, ran.stderr
    assert len(ran.stderr.strip().splitlines()) == 1, ran.stderr
