"""The processes of one run: which one speaks and writes, what they agree on, and how they share a batch.

``torchrun`` and ``accelerate launch`` start the same command several times, one process for each GPU. All of them read,
train and measure; only the main one writes the run's folder, prints, and shows a bar. A step is of the same examples as with
one process: ``batch_size`` is that of the run, and every process takes its share of each batch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from loftq.data.collate import Collator
from loftq.data.examples import IGNORED, Examples
from loftq.data.tasks import task
from loftq.errors import ConfigError
from loftq.modules import PackedModule

if TYPE_CHECKING:
    from torch import nn

Value = TypeVar("Value")


def count() -> int:
    """How many processes the launcher has started."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def is_main() -> bool:
    """Whether this is the one that writes."""
    return int(os.environ.get("RANK") or 0) == 0


@contextmanager
def connected() -> Iterator[None]:
    """Find the other processes, where there are any; the Trainer would, but only after what they have to agree on.

    After a mistake or an interrupt nobody is waited for, since others may have ended.
    """
    if count() == 1 or torch.distributed.is_initialized():
        yield
        return
    from accelerate import PartialState  # type: ignore[import-untyped]

    prepare_spreading()
    PartialState(cpu=not torch.cuda.is_available())
    yield
    wait()
    torch.distributed.destroy_process_group()  # its threads may keep a process from ending


def agreed(value: Value) -> Value:
    """The main process's value, in all of them."""
    if count() == 1:
        return value
    held = [value]
    torch.distributed.broadcast_object_list(held)
    return held[0]


def wait() -> None:
    """Until every process is here."""
    if count() > 1:
        torch.distributed.barrier()


def check_batch(batch_size: int) -> None:
    """A :class:`ConfigError` where a batch cannot be shared."""
    if batch_size < count():
        raise ConfigError(
            f"batch_size is {batch_size}, expected at least {count()}, one example for each process; raise it or start fewer"
        )


class Shares(Sampler[list[int]]):
    """Every batch cut into a share for each process, one after the other: process k takes each k-th.

    The last batch of an epoch may have fewer examples than there are processes. The others then get one that counts for
    nothing, since all must take part in the step: its index is complemented (``~i``).

    Args:
        sampler: the order of the examples, the same in every process.
    """

    def __init__(self, sampler: Any, batch_size: int, processes: int) -> None:
        self.sampler = sampler
        self.size = batch_size
        self.processes = processes

    def __len__(self) -> int:
        return -(-len(self.sampler) // self.size) * self.processes

    def __iter__(self) -> Iterator[list[int]]:
        batch: list[int] = []
        for index in self.sampler:
            batch.append(index)
            if len(batch) == self.size:
                yield from self._cut(batch)
                batch = []
        if batch:
            yield from self._cut(batch)

    def _cut(self, batch: list[int]) -> Iterator[list[int]]:
        edges = [len(batch) * k // self.processes for k in range(self.processes + 1)]
        yield from (batch[begin:end] or [~batch[0]] for begin, end in pairwise(edges))


class Shared(Dataset[tuple[Any, bool]]):
    """Examples by the indices of :class:`Shares`, each with whether it counts."""

    def __init__(self, examples: Examples) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[Any, bool]:
        return self.examples[max(index, ~index)], index >= 0


def counted(batch: dict[str, Any], name: str) -> Tensor:
    """What a batch of the task of that name counts in a mean over several: learned tokens, or else examples; () int64."""
    labels = batch.get("labels")
    if labels is not None and labels.dim() == 2:
        # a causal model's first token has none before it to be predicted from
        return (labels[:, 1:] if task(name).is_causal else labels).ne(IGNORED).sum()
    return torch.tensor(len(batch["input_ids"]), device=batch["input_ids"].device)


def collated(collator: Collator, share: list[tuple[Any, bool]], *, by_token: bool) -> dict[str, Any]:
    """A share as the model takes it.

    Under ``counted`` is what it counts in the mean over the step, see :func:`counted`, unless the loss is a sum over tokens
    (``by_token``) that is divided by those of all processes.
    """
    batch = collator([example for example, _ in share])
    counts = all(counts for _, counts in share)
    if not by_token:
        batch["counted"] = counted(batch, collator.task) if counts else torch.tensor(0)
    elif not counts:
        batch["labels"] = torch.full_like(batch["labels"], IGNORED)
    return batch


def is_spread() -> bool:
    """Whether the launcher asks for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def prepare_spreading() -> None:
    """What FSDP's settings must be with packed layers.

    Raises:
        ConfigError: for its first version, which flattens parameters of one dtype into one.
    """
    if not is_spread():
        return
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise ConfigError(f"fsdp_version is {version}, expected 2; set it in the file of `accelerate config`")
    # scales and codebooks are buffers, which the main process could not hand to the others
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    # checkpoints that can be checked and, for a device's own backend, one that can gather them; read when processes connect
    os.environ["FSDP_STATE_DICT_TYPE"] = "FULL_STATE_DICT"


def spread_here(accelerator: Any, model: nn.Module) -> None:
    """Make sure that FSDP is used where it is asked for, and for packed weights as well.

    Accelerate leaves FSDP out on CPUs without a word. Adapters are gathered as float32: products run under autocast, as with
    one process.
    """
    from accelerate import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin  # type: ignore[import-untyped]

    state = accelerator.state
    if state.distributed_type == DistributedType.MULTI_CPU:
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
        state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    state.fsdp_plugin.mixed_precision_policy = None
    for module in model.modules():
        if isinstance(module, PackedModule):
            module.make_shardable()


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """The model with whole parameters where FSDP has spread them: a measurement does not call the modules as training does."""
    from torch.distributed.fsdp import FSDPModule

    spread = [m for m in model.modules() if isinstance(m, FSDPModule)]
    for module in spread:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        again = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false"
        for module in spread:
            module.reshard()
            module.set_reshard_after_forward(again and module is not model, recurse=False)
