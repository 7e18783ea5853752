"""What a worker of a cluster does: it opens the source itself, reads its own tensors, and gives back what came of it.

Nothing here knows Ray. Tensors travel as bytes in numpy arrays, which an object store shares without copying, and are copied
into torch's own memory where they arrive: BLAS may round differently at an address of another alignment.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import loftq
from loftq.calibrate.statistics import OF_INPUT, OF_LAYER
from loftq.checkpoint.assembly import Parameters
from loftq.checkpoint.naming import meta_model
from loftq.checkpoint.source import Source, as_bytes, hub_snapshot, open_source, read_errors
from loftq.config import LoftQConfig
from loftq.errors import ClusterError, LoftQError, SourceError
from loftq.parallel import timed
from loftq.report.system import versions
from loftq.solver.importance import InputStatistics
from loftq.units import Known, Unit

SAME_LOFTQ = (
    "install there the loftq that runs here, or add runtime_env={'py_modules': [loftq]} to the program's ray.init"
)


class Packet(NamedTuple):
    """A tensor on its way."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    data: np.ndarray  # uint8


def pack(tensor: Tensor) -> Packet:
    tensor = tensor.detach().cpu().contiguous()
    return Packet(tensor.dtype, tuple(tensor.shape), as_bytes(tensor))


def unpack(packet: Packet) -> Tensor:
    tensor = torch.empty(packet.shape, dtype=packet.dtype)
    as_bytes(tensor)[:] = packet.data
    return tensor


def pack_statistics(statistics: InputStatistics) -> tuple[dict[str, Any], dict[str, Any]]:
    """What belongs to an input, and what to one layer."""
    parts = []
    for names in (OF_INPUT, OF_LAYER):
        found = {name: getattr(statistics, name) for name in names}
        parts.append({name: pack(value) for name, value in found.items() if value is not None})
    return {**parts[0], "tokens": statistics.tokens}, parts[1]


class ExpertPackets(NamedTuple):
    """The statistics of every expert; those with few tokens share one.

    Attributes:
        which: of ``distinct``, by expert.
    """

    which: list[int]
    distinct: list[dict[str, Any]]


def pack_experts(statistics: Sequence[InputStatistics]) -> ExpertPackets:
    distinct = list({id(each): each for each in statistics}.values())
    number = {id(each): k for k, each in enumerate(distinct)}
    packed = [pack_statistics(each) for each in distinct]
    return ExpertPackets([number[id(each)] for each in statistics], [{**a, **b} for a, b in packed])


def unpack_statistics(packed: Mapping[str, Any]) -> InputStatistics:
    tensors = {name: unpack(value) for name, value in packed.items() if name != "tokens"}
    return InputStatistics(tokens=packed["tokens"], **tensors)


class Stack(NamedTuple):
    """What the bytes of a result depend on besides its input.

    Attributes:
        code: of loftq, a digest: a connection that the caller has made does not send the driver's loftq along.
    """

    versions: dict[str, str]
    instructions: str
    code: str

    @classmethod
    def here(cls) -> Stack:
        relevant = {k: v for k, v in versions().items() if k in ("torch", "numpy", "numba")}
        return cls(relevant, torch.backends.cpu.get_cpu_capability(), _code())


@lru_cache(maxsize=1)
def _code() -> str:
    package, digest = Path(loftq.__file__).parent, hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(file.relative_to(package).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


@dataclass(frozen=True)
class Origin:
    """Where a worker finds the source.

    Attributes:
        path: absolute. files: name, bytes and :func:`sample` of each weight file.
        hub: repository and commit, where the path is in the hub's cache.
    """

    path: str
    files: tuple[tuple[str, int, str], ...]
    hub: tuple[str, str] | None

    @classmethod
    def of(cls, source: Source) -> Origin:
        path = source.path.absolute()
        return cls(str(path), _files(source), hub_snapshot(path) or hub_snapshot(path.resolve()))


@dataclass(frozen=True)
class Task:
    """A job without its tensors.

    Attributes:
        threads: to compute with, as many as the local run would have: results depend on it.
        shared: tells the inputs that several layers share apart; ``None`` for experts and without statistics.
        of_layer: statistics that are one layer's. stack: the driver's.
    """

    unit: Unit
    origin: Origin
    config: LoftQConfig
    threads: int
    shared: str | None
    of_layer: Mapping[str, Packet]
    stack: Stack


class Result(NamedTuple):
    tensors: dict[str, Packet]
    record: dict[str, Any]
    seconds: float
    host: str
    instructions: str


def compute(task: Task, of_input: ExpertPackets | Mapping[str, Any] | None) -> Result | LoftQError:
    """Do a task. A mistake of the user is returned, so that it reaches the user as the one sentence that it is."""
    try:
        here = Stack.here()
        other = [n for n, v in task.stack.versions.items() if here.versions.get(n) != v]
        if other:
            raise ClusterError(
                f"the worker on {platform.node()} has {other[0]} {here.versions.get(other[0])}, expected "
                f"{task.stack.versions[other[0]]} as where the command runs, since results would differ; install that version"
            )
        if here.code != task.stack.code:
            raise ClusterError(
                f"the worker on {platform.node()} has another loftq than where the command runs, and results would differ; "
                f"{SAME_LOFTQ}"
            )
        torch.set_num_threads(task.threads)
        parameters = _parameters(task.origin) if task.unit.experts else None  # which takes the architecture to know
        matrices = task.unit.matrices(reopened(task.origin), parameters)
        known = _known(task, of_input)
        (tensors, record), seconds = timed(partial(task.unit.compute, matrices, task.config, known))
        packed = {name: pack(tensor) for name, tensor in tensors.items()}
        return Result(packed, record, seconds, platform.node(), here.instructions)
    except LoftQError as error:
        return error.with_traceback(None)


@lru_cache(maxsize=1)
def reopened(origin: Origin) -> Source:
    """The source, opened once by each worker.

    Raises:
        SourceError: it is not there, or not the same.
    """
    here = platform.node()
    if Path(origin.path).exists():
        source = open_source(origin.path)
    elif origin.hub is not None:
        source = open_source(*origin.hub)
    else:
        raise SourceError(
            f"{origin.path} does not exist on {here}, where a worker runs; put the model on storage that every machine has "
            f"under this path, or name it by its hub id"
        )
    if _files(source) != origin.files:
        raise SourceError(
            f"{origin.path} has other files on {here}, where a worker runs, than where the command runs; copy the model anew"
        )
    return source


@lru_cache(maxsize=1)
def _parameters(origin: Origin) -> Parameters:
    source = reopened(origin)
    return Parameters(source, meta_model(source.config()))


def _files(source: Source) -> tuple[tuple[str, int, str], ...]:
    return tuple((file.name, file.stat().st_size, sample(file)) for file in source.files)


def sample(file: Path, pieces: int = 64, length: int = 4096) -> str:
    """Hex digest of pieces spread evenly over a file: another fine-tuning of the same model has other bytes in all of them.

    Not of the whole, which every worker would have to read.
    """
    digest = hashlib.sha256()
    with read_errors(file), open(file, "rb") as stream:
        step = max(length, file.stat().st_size // pieces)
        for k in range(pieces):
            stream.seek(k * step)
            digest.update(stream.read(length))
    return digest.hexdigest()


def _known(task: Task, of_input: ExpertPackets | Mapping[str, Any] | None) -> Known:
    if of_input is None:
        return None
    if isinstance(of_input, ExpertPackets):
        distinct = [unpack_statistics(each) for each in of_input.distinct]
        return [distinct[k] for k in of_input.which]
    assert task.shared is not None
    statistics = _inputs(task.shared, of_input)
    return statistics.of_layer(**{n: unpack(p) for n, p in task.of_layer.items()}) if task.of_layer else statistics


# The latest input only: the layers that share it come one after the other, and so share the factors computed from it.
_latest: tuple[str, InputStatistics] | None = None


def _inputs(key: str, of_input: Mapping[str, Any]) -> InputStatistics:
    global _latest
    if _latest is None or _latest[0] != key:
        _latest = None  # frees the factors before the next ones are computed
        _latest = (key, unpack_statistics(of_input))
    return _latest[1]
