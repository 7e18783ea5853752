"""Which modules of a model are quantized, with how many bits and which rank; patterns mean what they do in PEFT."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from loftq.config import LoftQConfig, QuantSpec
from loftq.errors import ConfigError
from loftq.modules import PackedWeight
from loftq.modules.linear import is_transposed
from loftq.plan.file import apply_plan

_LAYER_INDEX = re.compile(r"^(?P<stack>.*?)\.(?P<index>\d+)\.")


@dataclass(frozen=True)
class ModulePlan:
    """What happens to one module.

    Attributes:
        name: dotted path in the model.
        kind: ``linear``, ``conv1d`` (transformers' transposed linear layer) or ``embedding``.
        shape: (out, in) of the matrix; (num_embeddings, embedding_dim) for an embedding.
        spec, rank: how it is stored, and its adapter's rank.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    spec: QuantSpec
    rank: int


def plan_modules(model: nn.Module, config: LoftQConfig) -> dict[str, ModulePlan]:
    """Name -> :class:`ModulePlan` for every module that ``config`` selects, in the model's order.

    ``model`` may live on the meta device. ``all-linear`` selects every linear layer (and GPT-2's ``Conv1D``) inside the
    base model: not the language-model head, nor the head of a task, which is trained or kept in full precision.

    Raises:
        ConfigError: if nothing is selected, a pattern matches nothing, or a selected module cannot be quantized.
    """
    selected = _select(model, config)
    layer_of = layer_positions(list(dict(model.named_modules())))
    used_patterns: set[str] = set()
    plans = {}
    for name, module in selected.items():
        bits = config.bits
        if (
            config.first_layers_bits is not None
            and layer_of.get(name, config.first_layers_bits[0]) < (config.first_layers_bits[0])
        ):
            bits = config.first_layers_bits[1]
        bits = _lookup(config.bits_pattern, name, bits, used_patterns)
        rank = _lookup(config.rank_pattern, name, config.rank, used_patterns)
        kind, shape = _describe(module)
        plans[name] = ModulePlan(name, kind, shape, config.spec.replace(bits=bits), rank)
    unused = [p for p in (*config.bits_pattern, *config.rank_pattern) if p not in used_patterns]
    if unused:
        raise ConfigError(
            f"pattern {unused[0]!r} of bits_pattern or rank_pattern matches none of the {len(plans)} selected modules, "
            f"expected the end of a module's name such as {next(iter(plans))!r}, or a regular expression for it"
        )
    return plans if config.plan is None else apply_plan(plans, config.plan)


def _describe(module: nn.Module) -> tuple[str, tuple[int, int]]:
    weight: Any = module.weight
    rows, columns = weight.shape
    if is_transposed(module):
        return "conv1d", (columns, rows)
    return ("embedding" if isinstance(module, nn.Embedding) else "linear"), (rows, columns)


def _select(model: nn.Module, config: LoftQConfig) -> dict[str, nn.Module]:
    modules = dict(model.named_modules())
    linear = {n: m for n, m in modules.items() if isinstance(m, nn.Linear) or is_transposed(m)}
    packed = [n for n, m in modules.items() if isinstance(m, PackedWeight)]
    if packed or getattr(model, "is_quantized", False):
        raise ConfigError(
            f"the model is quantized already ({packed[0] if packed else model.config.quantization_config}), expected a "  # type: ignore[union-attr]
            f"full-precision one; start from its source"
        )
    if config.target_modules == "all-linear":
        heads = _head_names(model, modules)
        chosen = {n: m for n, m in linear.items() if not any(n == h or n.startswith(h + ".") for h in heads)}
    else:
        chosen = {n: m for n, m in modules.items() if n and _matches(config.target_modules, n)}
        wrong = [n for n in chosen if n not in linear]
        if wrong and isinstance(config.target_modules, tuple):
            raise ConfigError(
                f"target module {wrong[0]!r} is a {type(modules[wrong[0]]).__name__}, expected a linear layer; embeddings "
                f"are chosen with quantize_embeddings"
            )
        chosen = {n: m for n, m in chosen.items() if n in linear}
    if config.exclude_modules:
        chosen = {n: m for n, m in chosen.items() if not _matches(config.exclude_modules, n)}
    tied = _tied_names(model)
    chosen = {n: m for n, m in chosen.items() if n not in tied}
    if not chosen:
        raise ConfigError(
            f"target_modules={config.target_modules!r} selects no linear layer of {type(model).__name__}, whose linear "
            f"layers end in {', '.join(sorted({n.rsplit('.', 1)[-1] for n in linear})) or '(it has none)'}"
        )
    if config.quantize_embeddings:
        chosen = {**_input_embedding(model, tied), **chosen}
    return chosen


def _input_embedding(model: nn.Module, tied: set[str]) -> dict[str, nn.Module]:
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    name = next((n for n, m in model.named_modules() if m is embedding and m is not None), None)
    if name is None or not isinstance(embedding, nn.Embedding):
        raise ConfigError(f"quantize_embeddings is on, but {type(model).__name__} has no input embedding; turn it off")
    if name in tied:
        raise ConfigError(
            f"quantize_embeddings is on, but the embedding {name!r} shares its weight with another module, which would "
            f"not be quantized with it; turn it off"
        )
    return {name: embedding}


def _head_names(model: nn.Module, modules: Mapping[str, nn.Module]) -> set[str]:
    """Modules outside the base model (task heads), and the output embedding wherever it is."""
    heads = set()
    prefix = getattr(model, "base_model_prefix", "")
    if prefix and isinstance(getattr(model, prefix, None), nn.Module):
        heads = {name for name, _ in model.named_children() if name != prefix}
    output = getattr(model, "get_output_embeddings", lambda: None)()
    return heads | {n for n, m in modules.items() if output is not None and m is output}


def _tied_names(model: nn.Module) -> set[str]:
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    return {key.rpartition(".")[0] for pair in tied.items() for key in pair}


def _matches(patterns: str | tuple[str, ...], name: str) -> bool:
    """PEFT's rule: a string is a regular expression for the whole name, a list holds names or their dotted ends."""
    if isinstance(patterns, str):
        try:
            return re.fullmatch(patterns, name) is not None
        except re.error as error:
            raise ConfigError(f"{patterns!r} is no regular expression ({error}); give a list for plain names") from None
    return any(name == p or name.endswith(f".{p}") for p in patterns)


def _lookup(patterns: Mapping[str, Any], name: str, default: Any, used: set[str]) -> Any:
    """The value of the first pattern that matches the end of the name, PEFT's rule for ``rank_pattern``."""
    for pattern, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", name):
                used.add(pattern)
                return value
        except re.error as error:
            raise ConfigError(f"pattern {pattern!r} is no regular expression ({error})") from None
    return default


def layer_positions(names: list[str]) -> dict[str, int]:
    """Module name -> position of its layer, counted through the stacks in order (an encoder's before a decoder's)."""
    positions: dict[tuple[str, int], int] = {}
    result = {}
    for name in names:
        match = _LAYER_INDEX.match(name)
        if match:
            layer = (match["stack"], int(match["index"]))
            result[name] = positions.setdefault(layer, len(positions))
    return result


def minimal_target_names(selected: set[str], model: nn.Module) -> list[str]:
    """Suffixes that name exactly ``selected`` by PEFT's rule, as short as ``["q_proj", ...]`` where that is exact."""
    candidates = {n for n, m in model.named_modules() if n and not any(m.children())}
    suffixes = sorted({n.rsplit(".", 1)[-1] for n in selected})
    if {n for n in candidates if _matches(tuple(suffixes), n)} == selected:
        return suffixes
    return sorted(selected)
