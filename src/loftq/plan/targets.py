"""Which modules of a model are quantized, with how many bits and which rank; patterns mean what they do in PEFT."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from loftq.codec.qtensor import TensorInfo, storage_layout
from loftq.config import LoftQConfig, QuantSpec
from loftq.errors import ConfigError
from loftq.modules import PackedModule
from loftq.modules.experts import PARAMETERS, expert_shape, is_fused_experts, stored_name
from loftq.modules.linear import is_transposed
from loftq.plan.file import apply_plan

if TYPE_CHECKING:
    from loftq.report.record import QuantizationReport

_LAYER_INDEX = re.compile(r"^(?P<stack>.*?)\.(?P<index>\d+)\.")


@dataclass(frozen=True)
class ModulePlan:
    """What happens to one module, or to one parameter with the experts of a layer.

    Attributes:
        name: dotted path in the model.
        kind: ``linear``, ``conv1d`` (transformers' transposed linear layer), ``embedding``, or ``experts`` and
            ``experts-transposed``, a parameter with a matrix for each expert.
        shape: (out, in) of each matrix; (num_embeddings, embedding_dim) for an embedding.
        spec, rank: how each matrix is stored, and the rank of its adapter.
        experts: how many matrices there are; 0 for a single one that is no expert's.
        nested: of experts, how many parameters of the same module PEFT wraps after this one.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    spec: QuantSpec
    rank: int
    experts: int = 0
    nested: int = 0

    @property
    def parameter(self) -> str:
        """The name of the weight in the model's state dict."""
        return self.name if self.experts else f"{self.name}.weight"

    @property
    def numel(self) -> int:
        """Weights of all matrices."""
        return max(1, self.experts) * self.shape[0] * self.shape[1]

    @property
    def full_shape(self) -> tuple[int, ...]:
        """(experts, out, in) for experts, :attr:`shape` for others."""
        return (self.experts, *self.shape) if self.experts else self.shape

    @property
    def adapter(self) -> str:
        """Where PEFT puts the module's A and B: its wrappers of two parameters of one module lie within each other."""
        return self.name.rpartition(".")[0] + ".base_layer" * self.nested if self.experts else self.name

    def storage(self) -> dict[str, TensorInfo]:
        """The stored tensors by their names in the state dict."""
        layout = storage_layout(self.spec, self.shape, self.experts)
        return {stored_name(self.parameter, stored): info for stored, info in layout.items()}

    def matrices(self) -> list[ModulePlan]:
        """Each expert's matrix as a plan of its own, named ``NAME.0`` and so on; of others the plan itself."""
        if not self.experts:
            return [self]
        kind = "conv1d" if self.kind == TRANSPOSED_EXPERTS else "linear"
        return [
            dataclasses.replace(self, name=f"{self.name}.{expert}", kind=kind, experts=0, nested=0)
            for expert in range(self.experts)
        ]

    @classmethod
    def of_record(cls, name: str, kind: str, shape: Sequence[int], spec: QuantSpec, rank: int) -> ModulePlan:
        """From what a report says of a module, :attr:`full_shape` among it; :func:`nested_plans` must follow."""
        *experts, rows, columns = shape
        return cls(name, kind, (rows, columns), spec, rank, *experts)


EXPERTS = "experts"
TRANSPOSED_EXPERTS = "experts-transposed"


def nested_plans(plans: Iterable[ModulePlan]) -> dict[str, ModulePlan]:
    """Name -> plan, with :attr:`ModulePlan.nested` as it is when all of them get an adapter."""
    named = {plan.name: plan for plan in plans}

    def wrapped_after(plan: ModulePlan) -> int:
        owner, _, leaf = plan.name.rpartition(".")
        return sum(f"{owner}.{p}" in named for p in PARAMETERS[PARAMETERS.index(leaf) + 1 :])

    return {n: dataclasses.replace(p, nested=wrapped_after(p)) if p.experts else p for n, p in named.items()}


def plan_modules(model: nn.Module, config: LoftQConfig) -> dict[str, ModulePlan]:
    """Name -> :class:`ModulePlan` for every module that ``config`` selects, in the model's order.

    ``model`` may live on the meta device. ``all-linear`` selects every linear layer (and GPT-2's ``Conv1D``) inside the
    base model, and the experts that a mixture keeps in three-dimensional parameters: not the language-model head, nor the
    head of a task, which is trained or kept in full precision.

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
        kind, shape, experts = _describe(name, module)
        plans[name] = ModulePlan(name, kind, shape, config.spec.replace(bits=bits), rank, experts)
    unused = [p for p in (*config.bits_pattern, *config.rank_pattern) if p not in used_patterns]
    if unused:
        raise ConfigError(
            f"pattern {unused[0]!r} of bits_pattern or rank_pattern matches none of the {len(plans)} selected modules, "
            f"expected the end of a module's name such as {next(iter(plans))!r}, or a regular expression for it"
        )
    plans = nested_plans(plans.values())
    return plans if config.plan is None else apply_plan(plans, config.plan)


def report_plans(report: QuantizationReport, specs: Mapping[str, QuantSpec]) -> dict[str, ModulePlan]:
    """Name -> plan of every module of a quantized folder, from its report and how each is stored."""
    records = report.modules
    return nested_plans(ModulePlan.of_record(m.name, m.kind, m.shape, specs[m.name], m.rank) for m in records)


def stored_plan(model: nn.Module, name: str, spec: QuantSpec, rank: int = 0) -> ModulePlan:
    """The plan of a module, or parameter with experts, that is known to be packed.

    Raises:
        AttributeError: ``model`` has none of that name.
    """
    owner = model.get_submodule(name.rpartition(".")[0])
    kind, shape, experts = _describe(name, owner if is_fused_experts(owner) else model.get_submodule(name))
    return ModulePlan(name, kind, shape, spec, rank, experts)


def _describe(name: str, module: nn.Module) -> tuple[str, tuple[int, int], int]:
    if is_fused_experts(module):
        leaf = name.rpartition(".")[2]
        kind = TRANSPOSED_EXPERTS if getattr(module, "is_transposed", False) else EXPERTS
        return kind, expert_shape(module, leaf), int(getattr(module, leaf).shape[0])
    weight: Any = module.weight
    rows, columns = weight.shape
    if is_transposed(module):
        return "conv1d", (columns, rows), 0
    return ("embedding" if isinstance(module, nn.Embedding) else "linear"), (rows, columns), 0


def _candidates(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Name -> module of what can be packed, in the model's order: linear layers, and parameters with experts."""
    found: dict[str, nn.Module] = {}
    for name, module in modules.items():
        if isinstance(module, nn.Linear) or is_transposed(module):
            found[name] = module
        elif is_fused_experts(module):
            found.update({f"{name}.{parameter}": module for parameter in PARAMETERS})
    return found


def _refuse_other_experts(modules: Mapping[str, nn.Module], config: LoftQConfig) -> None:
    """Experts that cannot be packed must not be left out in silence."""
    for name, module in modules.items():
        if "expert" not in type(module).__name__.lower() or is_fused_experts(module):
            continue
        stacked = [n for n, p in module.named_parameters(recurse=False) if p.ndim == 3]
        names = [f"{name}.{n}" for n in stacked]
        if names and not all(config.exclude_modules and _matches(config.exclude_modules, n) for n in names):
            raise ConfigError(
                f"{name} is a {type(module).__name__} with experts in {' and '.join(stacked)}, expected gated experts in "
                f"{' and '.join(PARAMETERS)}; leave them in full precision with exclude_modules={tuple(stacked)!r}"
            )


def _select(model: nn.Module, config: LoftQConfig) -> dict[str, nn.Module]:
    modules = dict(model.named_modules())
    linear = _candidates(modules)
    packed = [n for n, m in modules.items() if isinstance(m, PackedModule)]
    if packed or getattr(model, "is_quantized", False):
        raise ConfigError(
            f"the model is quantized already ({packed[0] if packed else model.config.quantization_config}), expected a "  # type: ignore[union-attr]
            f"full-precision one; start from its source"
        )
    if config.target_modules == "all-linear":
        _refuse_other_experts(modules, config)
        heads = _head_names(model, modules)
        chosen = {n: m for n, m in linear.items() if not any(n == h or n.startswith(h + ".") for h in heads)}
    else:
        chosen = {n: m for n, m in {**modules, **linear}.items() if n and _matches(config.target_modules, n)}
        wrong = [n for n in chosen if n not in linear]
        if wrong and isinstance(config.target_modules, tuple):
            raise ConfigError(
                f"target module {wrong[0]!r} is a {type(modules[wrong[0]]).__name__}, expected a linear layer; embeddings "
                f"are chosen with quantize_embeddings"
            )
        chosen = {n: m for n, m in linear.items() if n in chosen}
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


def minimal_target_parameters(plans: Iterable[ModulePlan], model: nn.Module) -> list[str]:
    """Suffixes that name exactly the parameters with experts, such as ``["experts.gate_up_proj", ...]``."""
    selected = {plan.name for plan in plans if plan.experts}
    suffixes = sorted({".".join(name.split(".")[-2:]) for name in selected})
    matched = {n for n, _ in model.named_parameters() if _matches(tuple(suffixes), n)}
    return suffixes if matched == selected else sorted(selected)


def minimal_target_names(selected: set[str], model: nn.Module) -> list[str]:
    """Suffixes that name exactly ``selected`` by PEFT's rule, as short as ``["q_proj", ...]`` where that is exact."""
    candidates = {n for n, m in model.named_modules() if n and not any(m.children())}
    suffixes = sorted({n.rsplit(".", 1)[-1] for n in selected})
    if {n for n in candidates if _matches(tuple(suffixes), n)} == selected:
        return suffixes
    return sorted(selected)
