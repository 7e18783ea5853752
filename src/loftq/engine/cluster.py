"""Matrices on the workers of a Ray cluster.

The driver, which is the process that the user has started, runs the calibration, gives out tasks, and writes what comes
back. A worker gets the name of a tensor and not the tensor; statistics go through Ray's object store, once for all layers
that share an input. What a lost worker had is done again by another one: a task depends on nothing but its arguments.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

import loftq
from loftq.checkpoint.source import Source
from loftq.config import LoftQConfig
from loftq.engine.jobs import Computed, Job
from loftq.engine.worker import SAME_LOFTQ, Origin, Stack, Task, compute, pack_experts, pack_statistics, unpack
from loftq.errors import ClusterError, ConfigError, LoftQError, first_line
from loftq.kernels.threads import is_small
from loftq.optional import optional_module
from loftq.parallel import timed
from loftq.units import Unit

RETRIES = 5
"""How often a task is begun again whose worker has died; more often, it is the task that kills it."""

PATIENCE = 20.0
"""Seconds without a result until it is looked whether the machines that are left can still do what they were asked for."""


class Asked(NamedTuple):
    """A task that has been given out, with the cores that were asked for."""

    unit: Unit
    cores: int
    task: Task
    of_input: Any


@contextmanager
def connected(address: str | None) -> Iterator[Any]:
    """Ray's module, connected to a cluster; what is started here is shut down in the end.

    Args:
        address: of a running cluster (``auto`` for this machine's), by default ``RAY_ADDRESS``; without either, workers are
            started on this machine, one for each core. A connection that the caller has made already is used as it is.

    Raises:
        ConfigError: Ray is not installed, or is connected elsewhere. ClusterError: no cluster can be reached, or it asks for
            a token that is not the one here.
    """
    ray = optional_module("ray", "the engine ray", "Ray", "ray")
    if ray.is_initialized():
        if address is not None:
            raise ConfigError(
                f"address is {address!r}, but Ray is connected already; leave it out, or shut Ray down first"
            )
        yield ray
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    with _mode_restored(ray):
        try:
            if _knock(address):
                _authenticate(ray, address)
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **_options(address))
        except ClusterError:
            raise
        except Exception as error:  # Ray has no kind of its own for this
            raise ClusterError(
                f"no Ray cluster answers at {address!r} ({first_line(error)}); start one with `ray start --head`, or leave "
                f"the address out to use this machine alone"
            ) from None
        try:
            yield ray
        finally:
            ray.shutdown()


def _knock(address: str) -> bool:
    """Whether it is ``HOST:PORT``; an OSError where nothing listens: Ray itself would try for more than a minute."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in host:
        return False
    with socket.create_connection((host.strip("[]"), int(port)), timeout=10):
        return True


def _authenticate(ray: Any, address: str) -> None:
    """Turn token authentication on where the cluster asks for it; Ray itself does so for ``auto``, not for ``HOST:PORT``.

    Not wherever there is a token: a local run writes one, and a cluster started before does not expect it.
    """
    if not hasattr(ray.exceptions, "AuthenticationError") or not _token_refused(ray, address):
        return
    mode = os.environ.get("RAY_AUTH_MODE")
    found = ray._raylet.AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True)
    if mode is None and found:
        _set_mode(ray, "token")
        if not _token_refused(ray, address):
            return
    if mode is not None and mode.lower() != "token":
        wrong, remedy = f"RAY_AUTH_MODE is {mode!r} here", "unset RAY_AUTH_MODE, or set it to 'token'"
    else:
        wrong = "it does not accept the one that is here" if found else "there is none here"
        remedy = "copy ~/.ray/auth_token from its first machine to this one, or set RAY_AUTH_TOKEN to what it holds"
    raise ClusterError(f"the Ray cluster at {address!r} asks for a token, but {wrong}; {remedy}")


def _token_refused(ray: Any, address: str) -> bool:
    """Whether the cluster turns a request down for its token, or for having none."""
    try:  # with an id made up: a client without one asks for it first, and Ray logs to stderr that this is refused
        client = ray._raylet.GcsClient(address=address, cluster_id="1" * 56)
        client.internal_kv_get(b"", namespace=b"loftq", timeout=5)
    except ray.exceptions.AuthenticationError as error:  # the wrong id is one as well
        return "InvalidAuthToken" in str(error)
    except Exception:  # `ray.init` will say it
        return False
    return False


def _set_mode(ray: Any, mode: str | None) -> None:
    os.environ.pop("RAY_AUTH_MODE", None)
    if mode is not None:
        os.environ["RAY_AUTH_MODE"] = mode
    ray._raylet.Config.initialize("")  # Ray has read the environment before


@contextmanager
def _mode_restored(ray: Any) -> Iterator[None]:
    """Ray leaves the mode of a cluster in the environment, where the next may have another."""
    before = os.environ.get("RAY_AUTH_MODE")
    try:
        yield
    finally:
        if os.environ.get("RAY_AUTH_MODE") != before:
            _set_mode(ray, before)


def _options(address: str) -> dict[str, Any]:
    """Workers import the loftq that runs here."""
    package = Path(loftq.__file__).parent
    if address != "local":
        return {"runtime_env": {"py_modules": [str(package)]}}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # in its place, where the compiled loops are kept from one run to the next
    path = os.pathsep.join([str(package.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {"include_dashboard": False, "runtime_env": {"env_vars": {"PYTHONPATH": path}}}


class RayEngine:
    """Gives out jobs to the workers of a cluster, at most one more than it has cores for.

    Args:
        ray: the connected module. notice: told in one sentence where a worker's results may differ in their last bits.
    """

    def __init__(self, ray: Any, source: Source, config: LoftQConfig, notice: Callable[[str], None]) -> None:
        self.ray = ray
        self.source = source
        self.config = config
        self.notice = notice
        self.origin = Origin.of(source)
        self.stack = Stack.here()
        self.threads = torch.get_num_threads()
        self._compute = ray.remote(max_retries=RETRIES)(compute)
        self._shared: tuple[Any, Any] = (None, None)  # what the latest input's statistics share, and their reference
        self._noticed: set[str] = set()

    def run(self, jobs: Iterable[Job]) -> Generator[tuple[Unit, Computed], None, None]:
        waiting: dict[Any, Asked] = {}
        try:
            for job in jobs:
                if job.unit.plan is None:  # nothing to compute: a worker would only send back what can be read here
                    yield job.unit, timed(partial(job.unit.compute, job.unit.matrices(self.source), self.config))
                    continue
                while waiting and sum(asked.cores for asked in waiting.values()) > self._cores():
                    yield self._next(waiting)
                cores = 1 if is_small(job.size) else max(1, min(self.threads, self._largest_node()))
                self._submit(self._asked(job, cores), waiting)
                while waiting and self._ready(waiting, timeout=0):
                    yield self._next(waiting)
            while waiting:
                yield self._next(waiting)
        finally:
            for reference in waiting:
                with contextlib.suppress(Exception):  # the cluster may be what has failed
                    self.ray.cancel(reference, force=True)

    def _asked(self, job: Job, cores: int) -> Asked:
        key = of_input = None
        of_layer: dict[str, Any] = {}
        if isinstance(job.statistics, Sequence):
            of_input = self._put(pack_experts(job.statistics))
        elif job.statistics is not None:
            shared = job.statistics._metrics
            if self._shared[0] is not shared:
                packed, of_layer = pack_statistics(job.statistics)
                self._shared = (shared, self._put(packed))
            else:
                of_layer = pack_statistics(job.statistics)[1]
            of_input = self._shared[1]
            key = of_input.hex()
        threads = 1 if is_small(job.size) else self.threads
        task = Task(job.unit, self.origin, self.config, threads, key, of_layer, self.stack)
        return Asked(job.unit, cores, task, of_input)

    def _put(self, value: Any) -> Any:
        try:
            return self.ray.put(value)
        except self.ray.exceptions.RayError as error:
            raise ClusterError(
                f"statistics do not fit into Ray's object store ({first_line(error)}); start Ray with a larger "
                f"--object-store-memory, or free disk space, and run the same command again, it continues where it stopped"
            ) from None

    def _submit(self, asked: Asked, waiting: dict[Any, Asked]) -> None:
        remote = self._compute.options(num_cpus=asked.cores, name=asked.unit.name)
        with self._connection():
            reference = remote.remote(asked.task, asked.of_input)
        waiting[reference] = asked

    def _ask_for_less(self, waiting: dict[Any, Asked]) -> None:
        """Give out anew what waits for a machine that is lost, and for which those that are left have too few cores."""
        largest = self._largest_node()
        if largest < 1:
            if "" not in self._noticed:
                self._noticed.add("")
                self.notice("no machine of the Ray cluster has cores left to compute with; waiting for one")
            return
        for reference, asked in [(r, a) for r, a in waiting.items() if a.cores > largest]:
            del waiting[reference]
            with self._connection():
                self.ray.cancel(reference, force=True)
            self._submit(asked._replace(cores=largest), waiting)

    def _next(self, waiting: dict[Any, Asked]) -> tuple[Unit, Computed]:
        while not (ready := self._ready(waiting, PATIENCE)):
            self._ask_for_less(waiting)
        unit = waiting[ready[0]].unit
        del waiting[ready[0]]
        try:
            result = self.ray.get(ready[0])
        except self.ray.exceptions.RayTaskError as error:
            if "failed to import on the worker" not in str(error) and not isinstance(error.cause, ImportError):
                raise
            raise ClusterError(f"a worker cannot import loftq; {SAME_LOFTQ}") from None
        except self.ray.exceptions.RayError as error:
            raise ClusterError(
                f"{unit.name} could not be computed, its worker was lost {RETRIES + 1} times or the cluster with it "
                f"({first_line(error)}); give workers more memory, and run the same command again, it continues where it "
                f"stopped"
            ) from None
        if isinstance(result, LoftQError):
            raise result
        if result.instructions != self.stack.instructions and result.host not in self._noticed:
            self._noticed.add(result.host)
            self.notice(
                f"{result.host} computes with {result.instructions}, this machine with {self.stack.instructions}: the last "
                f"bits of results may differ from those of a run on one kind of machine"
            )
        tensors = {name: unpack(packet) for name, packet in result.tensors.items()}
        return unit, ((tensors, result.record), result.seconds)

    def _ready(self, waiting: dict[Any, Asked], timeout: float) -> list[Any]:
        with self._connection():
            done: list[Any] = self.ray.wait(list(waiting), num_returns=1, timeout=timeout)[0]
        return done

    def _cores(self) -> int:
        with self._connection():
            return int(self.ray.cluster_resources().get("CPU", 1))

    def _largest_node(self) -> int:
        with self._connection():
            return int(max((n["Resources"].get("CPU", 0) for n in self.ray.nodes() if n["Alive"]), default=0))

    @contextmanager
    def _connection(self) -> Iterator[None]:
        try:
            yield
        except (self.ray.exceptions.RayError, OSError, RuntimeError) as error:
            raise ClusterError(
                f"the connection to the Ray cluster is lost ({first_line(error)}); start it anew if its first machine has "
                f"failed, and run the same command again, it continues where it stopped"
            ) from None
