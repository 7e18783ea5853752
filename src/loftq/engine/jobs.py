"""What is to be done, and in which order, whoever does it.

An engine gets jobs, a unit with the statistics of its inputs, and gives back what came of them in any order. Jobs are drawn
one at a time, since drawing one runs the calibration up to it. Which matrices are worked on by one thread and which by all
depends on their size alone (:func:`loftq.kernels.threads.is_small`), so that every engine gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor

from loftq.calibrate.choose import Inputs
from loftq.checkpoint.assembly import Parameters
from loftq.checkpoint.source import Source
from loftq.checkpoint.writer import Staging
from loftq.config import ENGINES, LoftQConfig, one_of
from loftq.errors import ConfigError
from loftq.parallel import run_side_by_side
from loftq.units import Known, Unit, largest_factor

Computed = tuple[tuple[dict[str, Tensor], dict[str, Any]], float]
"""A unit's tensors and its record, and the seconds that they took."""


@dataclass(frozen=True)
class Job:
    """A unit to compute, with what is known of its inputs."""

    unit: Unit
    statistics: Known = None

    @property
    def size(self) -> int:
        """Elements of what the job works on: the weights, of all experts together, or a factor of its statistics."""
        return max(self.unit.weights, largest_factor(self.statistics))


class Engine(Protocol):
    """Something that computes."""

    def run(self, jobs: Iterable[Job]) -> Generator[tuple[Unit, Computed], None, None]:
        """What becomes of each job, in any order. Jobs are drawn when there is room for one."""


class LocalEngine:
    """This process, with a thread for each core, or on a GPU, one matrix after the other."""

    def __init__(self, source: Source, parameters: Parameters, config: LoftQConfig, device: torch.device) -> None:
        self.device = device
        self.source = source
        self.parameters = parameters
        self.config = config

    def run(self, jobs: Iterable[Job]) -> Generator[tuple[Unit, Computed], None, None]:
        def calls() -> Iterator[tuple[tuple[Unit, int], Callable[[], Any]]]:
            for job in jobs:
                matrices = job.unit.matrices(self.source, self.parameters)
                compute = partial(job.unit.compute, matrices, self.config, job.statistics, self.device)
                yield (job.unit, job.size), compute

        for (unit, _), computed in run_side_by_side(calls(), lambda key: key[1], self.device):
            yield unit, computed


def check_engine(name: str, address: str | None, device: str = "cpu") -> torch.device:
    """The device to compute on, of which there is one.

    Raises:
        ConfigError: for an engine or a device that does not exist, or an address or a device for an engine without.
    """
    one_of("engine", name, ENGINES)
    if address is not None and name != "ray":
        raise ConfigError(f"address is {address!r}, but the engine is {name}; add --engine ray or leave --address out")
    if name == "ray" and device != "cpu":
        raise ConfigError(f"device is {device!r}, but Ray's workers compute on their processors; leave --device out")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError):
        found = torch.device("meta")
    if found.type == "meta":
        raise ConfigError(
            f"device is {device!r}, expected cpu, or a GPU that torch sees such as cuda; see whether "
            f"`python -c 'import torch; print(torch.cuda.is_available())'` prints True, or leave --device out"
        )
    return found


@contextmanager
def open_engine(
    name: str,
    source: Source,
    parameters: Parameters,
    config: LoftQConfig,
    address: str | None,
    notice: Callable[[str], None],
    device: torch.device,
) -> Iterator[Engine]:
    """The engine of that name, which :func:`check_engine` has let pass with its device.

    Raises:
        ConfigError: Ray is not installed. ClusterError: there is no cluster at the address.
    """
    if name == "local":
        yield LocalEngine(source, parameters, config, device)
        return
    from loftq.engine.cluster import RayEngine, connected

    with connected(address) as ray:
        yield RayEngine(ray, source, config, notice)


def run_all(
    engine: Engine,
    units: list[Unit],
    config: LoftQConfig,
    inputs: Inputs,
    staging: Staging,
    index: Mapping[str, str],
    write: Callable[[Unit, Computed], dict[str, Tensor]],
) -> None:
    """Every unit that is not done: first those that need nothing, then the layers in the order of the calibration.

    A unit is written while the next is computed, except where later inputs need what came of it. What fails here, writing
    among it, ends the engine's work before the engine itself is closed.
    """
    by_name = {unit.name: unit for unit in units}
    waiting = set(inputs.targets)
    todo = [unit for unit in units if unit.name not in staging.done]
    with inputs.open(len(waiting - staging.done.keys()) > 0) as groups:
        free = (Job(unit, inputs.unseen(unit.plan)) for unit in todo if unit.name not in waiting)
        behind = (
            Job(by_name[name], group.experts or group.statistics())
            for group in groups
            for name in group.names
            if name not in staging.done
        )
        if not inputs.propagate:
            with ThreadPoolExecutor(1, "loftq-writer") as writer, closing(engine.run(chain(free, behind))) as results:
                writing: Future[Any] | None = None
                for unit, computed in results:
                    if writing is not None:
                        writing.result()  # one at a time: what waits takes memory
                    writing = writer.submit(write, unit, computed)
                if writing is not None:
                    writing.result()
            return
        with closing(engine.run(free)) as results:
            for unit, computed in results:
                write(unit, computed)
        for group in groups:
            new = [name for name in group.names if name not in staging.done]
            with closing(engine.run(Job(by_name[name], group.statistics()) for name in new)) as results:
                for unit, computed in results:
                    inputs.replace(unit.name, unit.dense(write(unit, computed), config))
            for name in [n for n in group.names if n not in new]:
                unit = by_name[name]
                inputs.replace(name, unit.dense({n: staging.read(index[n]) for n in unit.outputs}, config))
