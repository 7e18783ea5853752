"""A model whose weights are in memory only while they are needed: building it, and loading it block by block."""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from loftq.checkpoint.assembly import Assembly
from loftq.checkpoint.naming import architecture, meta_model, missing_parameters, model_names
from loftq.checkpoint.source import Source
from loftq.config import one_of
from loftq.errors import SourceError


def build(source: Source, dtype: torch.dtype = torch.float32) -> Any:
    """The source's architecture in eval mode: parameters on the meta device, buffers (masks, rotary frequencies) real.

    Raises:
        SourceError: if the config names no architecture that transformers can build.
    """
    import transformers
    from accelerate import init_empty_weights  # type: ignore[import-untyped, unused-ignore]

    one_of("dtype", dtype, (torch.float32, torch.float64))
    config = source.config()
    config.use_cache = False
    cls = architecture(config)
    if cls is None and config.architectures:
        meta_model(config)  # says that there is no such architecture
    try:
        with init_empty_weights(include_buffers=False), torch.random.fork_rng(devices=[]):
            model = transformers.AutoModel.from_config(config) if cls is None else cls(config)
    except Exception:
        meta_model(config)  # the same error in one sentence
        raise
    if dtype != torch.float32:
        model.to(dtype)
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")  # the grouped product knows no float64
    for module in model.modules():
        if isinstance(module, transformers.PreTrainedModel):
            _present_on_cpu(module, dtype)
    return model.eval().requires_grad_(False)


def _present_on_cpu(module: nn.Module, dtype: torch.dtype) -> None:
    """Answer ``device`` and ``dtype``, which transformers takes from the first parameter, as if it were loaded."""
    cls = type(module)
    answers = {
        "device": property(lambda self: torch.device("cpu")),
        "dtype": property(lambda self: dtype),
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
    }
    module.__class__ = type(cls.__name__, (cls,), answers)


class Weights:
    """Loads parts of a model built by :func:`build`, and frees them again.

    Raises:
        SourceError: the source lacks a weight of the model, or has it in another shape.
    """

    def __init__(self, source: Source, model: Any, dtype: torch.dtype = torch.float32) -> None:
        self.source = source
        self.model = model
        self.dtype = dtype
        names = model_names(model, source.tensors)
        self._source_name = {output: name for name, output in names.items()}
        tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
        for _ in range(2):  # a chain of ties
            for pair in [*tied.items(), *((b, a) for a, b in tied.items())]:
                if pair[1] in self._source_name:
                    self._source_name.setdefault(pair[0], self._source_name[pair[1]])
        self._assembly = Assembly(source, model, dtype)
        missing = sorted(missing_parameters(model, names, source.tensors) or self._unaccounted())
        if missing:
            raise SourceError(
                f"the checkpoint lacks {missing[0]} (and {len(missing) - 1} more) of {type(model).__name__}'s weights; "
                f"fetch it again, or name the right architecture in config.json"
            )
        self._keys = list(model.state_dict())

    def _unaccounted(self) -> set[str]:
        """Parameters that the source neither has nor has the parts of, and that the architecture cannot compute."""
        optional = self.model._keys_to_ignore_on_load_missing or ()
        return {
            name
            for name, _ in self.model.named_parameters(remove_duplicate=False)
            if name not in self._source_name
            and name not in self._assembly.recipe
            and not any(re.search(pattern, name) for pattern in optional)
        }

    def under(self, modules: Collection[str]) -> list[str]:
        """Names of the tensors in these modules."""
        prefixes = tuple(f"{name}." for name in modules)
        return [key for key in self._keys if key.startswith(prefixes)]

    def outside(self, modules: Collection[str]) -> list[str]:
        """Names of all other tensors."""
        inside = set(self.under(modules))
        return [key for key in self._keys if key not in inside]

    def load(self, keys: Iterable[str]) -> None:
        """Read these tensors; those that share one of the source share it here."""
        read: dict[str, Tensor] = {}
        computed: set[str] = set()
        assembled: list[str] = []
        for key in keys:
            source_name = self._source_name.get(key)
            if source_name is None:
                if key in self._assembly.recipe:
                    assembled.append(key)
                else:
                    computed.add(key.rpartition(".")[0])
                continue
            if source_name not in read:
                tensor = self.source.read(source_name)
                read[source_name] = tensor.to(self.dtype) if tensor.is_floating_point() else tensor
            self._place(key, source_name, read[source_name])
        for key, tensor in self._assembly.make(assembled).items():
            self._place(key, key, tensor)
        for owner in sorted(computed):
            self._compute(owner)

    def _place(self, key: str, source_name: str, tensor: Tensor) -> None:
        owner, _, leaf = key.rpartition(".")
        module = self.model.get_submodule(owner)
        expected = tuple(getattr(module, leaf).shape)
        if tuple(tensor.shape) != expected:
            raise SourceError(
                f"{source_name} has shape {tuple(tensor.shape)}, expected {expected} as config.json says; fetch the "
                f"checkpoint again"
            )
        self._set(module, leaf, tensor)

    def _compute(self, owner: str) -> None:
        """What no checkpoint holds because the architecture computes it: sinusoidal positions."""
        module = self.model.get_submodule(owner)
        empty = [n for n, p in module.named_parameters(recurse=False) if p.device.type == "meta"]
        if not empty:
            return
        loaded = {n: p for n, p in module.named_parameters(recurse=False) if n not in empty}
        for leaf in empty:
            self._set(module, leaf, torch.empty(getattr(module, leaf).shape, dtype=self.dtype))
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            kept = {n: p.clone() for n, p in loaded.items()}
            self.model._init_weights(module)
            for name, value in kept.items():
                loaded[name].copy_(value)

    def unload(self, keys: Iterable[str]) -> None:
        """Free these parameters."""
        for key in keys:
            owner, _, leaf = key.rpartition(".")
            module = self.model.get_submodule(owner)
            parameter = module._parameters.get(leaf)
            if parameter is not None:
                self._set(module, leaf, torch.empty(parameter.shape, dtype=parameter.dtype, device="meta"))
        return_memory()

    @staticmethod
    def _set(module: nn.Module, leaf: str, tensor: Tensor) -> None:
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        else:
            module._buffers[leaf] = tensor


def return_memory() -> None:
    """Give freed memory back to the system, where the C library can.

    glibc keeps what is freed between allocations that live on: measured, four fifths of every block that has passed.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # no glibc
        ctypes.CDLL(None).malloc_trim(0)


def find_blocks(model: Any, targets: Collection[str]) -> list[str]:
    """Names of the modules that are loaded one at a time.

    They are the elements of every outermost ``ModuleList`` with a target in it, each target outside of them, and the
    input embedding, which is large and needed only at the beginning.
    """
    blocks: list[str] = []

    def visit(module: nn.Module, prefix: str) -> None:
        for child_name, child in module.named_children():
            name = prefix + child_name
            if isinstance(child, nn.ModuleList):
                if any(t.startswith(f"{name}.") for t in targets):
                    blocks.extend(f"{name}.{i}" for i, _ in child.named_children())
            else:
                visit(child, f"{name}.")

    visit(model, "")
    inside = tuple(f"{name}." for name in blocks)
    blocks += [t for t in targets if not t.startswith(inside)]
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    name = next((n for n, m in model.named_modules() if m is embedding), None)
    if isinstance(embedding, nn.Embedding) and name and not name.startswith(tuple(f"{b}." for b in blocks)):
        blocks.append(name)
    return blocks


def head_name(model: Any, targets: Collection[str]) -> str | None:
    """The output head, after which nothing of interest comes: its product is the largest of all and is not needed."""
    try:
        head = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    name = next((n for n, m in model.named_modules() if m is head and m is not None), None)
    return None if name is None or any(t == name or t.startswith(f"{name}.") for t in targets) else name
