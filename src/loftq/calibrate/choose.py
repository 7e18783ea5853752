"""Which calibration a quantization gets: statistics given, a text to collect them on, or none."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from loftq.calibrate.backward import StreamedGradients
from loftq.calibrate.collect import collect, describe
from loftq.calibrate.forward import StreamedForward
from loftq.calibrate.groups import Group, identity
from loftq.calibrate.statistics import OF_LAYER, Statistics
from loftq.calibrate.text import CalibrationTokens, calibration_tokens
from loftq.checkpoint.source import Source
from loftq.config import LoftQConfig, default_method
from loftq.errors import ConfigError, SourceError, counted
from loftq.evaluate.models import default_window
from loftq.evaluate.text import BUILTIN
from loftq.plan.targets import ModulePlan
from loftq.solver.importance import InputStatistics
from loftq.solver.methods import METHODS, Method

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Inputs:
    """Where the statistics of each layer's inputs come from.

    Attributes:
        method: the solver's method, now that it is known whether there are statistics.
        targets: layers, and parameters with experts, that are decomposed when the forward pass (or the saved statistics)
            reaches them.
        summary: what the report says of the calibration, ``None`` if there is none.
        propagate: whether layers see the quantized ones before them.
        experts: of the targets those with experts, and how many.
    """

    method: str
    targets: tuple[str, ...] = ()
    summary: dict[str, Any] | None = None
    propagate: bool = False
    statistics: Statistics | None = None
    source: Source | None = None
    tokens: CalibrationTokens | None = None
    gradients: int = 0
    fisher: bool = False
    seed: int = 0
    experts: Mapping[str, int] = field(default_factory=dict)
    _forward: StreamedForward | None = field(default=None, init=False)

    @contextmanager
    def open(self, needed: bool) -> Iterator[Iterator[Group]]:
        """Groups of layers in forward order; none if not ``needed``, since all are done."""
        if not needed or not self.targets:
            yield iter(())
        elif self.statistics is not None:
            yield _saved(self.statistics, self.targets, self.experts)
        else:
            assert self.source is not None
            assert self.tokens is not None
            layers = [name for name in self.targets if name not in self.experts]
            if self.gradients:
                with StreamedGradients(
                    self.source,
                    layers,
                    self.tokens,
                    windows=self.gradients,
                    fisher=self.fisher,
                    seed=self.seed,
                    experts=self.experts,
                ) as backward:
                    yield backward.groups()
                return
            with StreamedForward(
                self.source, layers, self.tokens, propagate=self.propagate, experts=self.experts
            ) as self._forward:
                yield self._forward.groups()

    def replace(self, name: str, weight: Tensor) -> None:
        """Let later layers see what became of this one."""
        assert self._forward is not None
        self._forward.replace(name, weight)

    def unseen(self, plan: ModulePlan | None) -> InputStatistics | None:
        """What is known of a module that no calibration covers (an embedding): nothing, so only the weight error counts."""
        if plan is None or self.summary is None:
            return None
        return InputStatistics(torch.zeros(plan.shape[1]), torch.zeros(plan.shape[1]), tokens=0)


def _saved(statistics: Statistics, targets: tuple[str, ...], experts: Mapping[str, int]) -> Iterator[Group]:
    """One group a layer. Factors are shared between neighbours with one input, and given up when it has passed."""
    moment: Tensor | None = None
    shared = None
    for name in targets:
        if name in experts:
            each = [statistics[f"{name}.{expert}"] for expert in range(experts[name])]
            yield Group((name,), partial(identity, each[0]), each)
            continue
        found = statistics[name]
        if shared is None or found.second_moment is not moment:
            moment, shared = found.second_moment, replace(found)
        own = {field: getattr(found, field) for field in OF_LAYER}
        yield Group((name,), partial(shared.of_layer, **own))


def _mean_bits(plans: Mapping[str, ModulePlan]) -> float:
    """Bits of a code, over all weights; a plan or the first layers may have others than the config."""
    return sum(p.numel * p.spec.bits for p in plans.values()) / sum(p.numel for p in plans.values())


def calibrated(
    source: Source,
    model: nn.Module,
    plans: Mapping[str, ModulePlan],
    config: LoftQConfig,
    hashes: Mapping[str, str],
    statistics: Statistics | str | Path | None,
    notice: Callable[[str], None],
) -> Inputs:
    """Decide on the calibration of a checkpoint's quantization.

    Raises:
        ConfigError: a method that works on inputs has no calibration. SourceError: a text or statistics that do not fit.
    """
    chosen = METHODS[config.method] if config.method is not None else None
    linear = tuple(name for name, plan in plans.items() if plan.kind != "embedding")
    experts = {name: plan.experts for name, plan in plans.items() if plan.experts}
    if chosen is not None and not chosen.needs_inputs:
        return Inputs(config.method or "loftq")
    if statistics is not None:
        if config.propagate:
            raise ConfigError("saved statistics are of the original model; give a calibration text with --propagate")
        if isinstance(statistics, (str, Path)):
            statistics = Statistics.load(statistics, hashes)
        covered = tuple(n for n in linear if all(part.name in statistics for part in plans[n].matrices()))
        if not covered:
            raise SourceError(f"the statistics cover none of the {len(linear)} layers to quantize; calibrate again")
        known = {name: count for name, count in experts.items() if name in covered}
        method = config.method or default_method(_mean_bits(plans), True)
        return Inputs(method, covered, dict(statistics.summary), statistics=statistics, experts=known)
    name = config.calibration
    if name == "auto":
        name = BUILTIN if _is_causal(model) and (tokenizer := _tokenizer(source)) is not None else None
        if name is None:
            if chosen is not None:
                raise ConfigError(
                    f"method {config.method!r} works on the layers' inputs, and for this model there is no default "
                    f"calibration text; give one with --calibration"
                )
            notice(
                "no calibration: the model is no causal language model with a tokenizer; only the weight error counts"
            )
    if name is None:
        if chosen is not None:
            raise ConfigError(
                f"method {config.method!r} works on the layers' inputs, but calibration is off; give a text with "
                f"--calibration or choose a weight-only method such as 'loftq'"
            )
        if config.propagate:
            raise ConfigError("--propagate was given without a calibration text; give one with --calibration")
        return Inputs("loftq")
    if config.calibration != "auto":
        tokenizer = _tokenizer(source)
    tokens = calibration_tokens(
        name,
        tokenizer,
        samples=config.calibration_samples,
        length=default_window(model, None, config.calibration_length),
        seed=config.seed,
        model=_generator(source) if name == "self" else None,
    )
    if config.calibration == "auto":
        count, length = tokens.ids.shape
        notice(
            f"calibrating on the built-in text ({counted(count, 'window')} of {length} tokens); --calibration takes your own, "
            f"--no-calibration leaves it out"
        )
    method = config.method or default_method(_mean_bits(plans), True)
    if experts and (config.propagate or METHODS[method].needs_gradients):
        raise ConfigError(
            f"{'--propagate' if config.propagate else f'method {method!r}'} was given for a model with experts such as "
            f"{next(iter(experts))}, which it cannot be calibrated with; choose another method or leave the experts out with "
            f"exclude_modules"
        )
    gradients = _gradients(model, config, METHODS[method])
    summary = {**describe(tokens, True, gradients), "propagate": config.propagate}
    return Inputs(
        method,
        linear,
        summary,
        config.propagate,
        source=source,
        tokens=tokens,
        gradients=gradients,
        fisher=METHODS[method].needs_gradients,
        seed=config.seed,
        experts=experts,
    )


def _gradients(model: nn.Module, config: LoftQConfig, method: Method) -> int:
    """On how many windows the backward pass runs: on none where the method makes no use of it."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if method.needs_gradients and (head is None or config.propagate or not config.calibration_gradients):
        raise ConfigError(
            f"method {config.method!r} works on gradients, expected a language model calibrated with them and without "
            f"--propagate"
        )
    wanted = method.needs_gradients or method.row_damping is not None
    return config.calibration_gradients if wanted and head is not None and not config.propagate else 0


def _is_causal(model: nn.Module) -> bool:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return head is not None and type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))


def _tokenizer(source: Source) -> PreTrainedTokenizerBase | None:
    """The source's tokenizer, or ``None`` if it has none that transformers can read."""
    from loftq.evaluate.models import load_tokenizer

    with tempfile.TemporaryDirectory(prefix="loftq-tokenizer-") as folder:
        source.save_extras(Path(folder))
        if not any(Path(folder).glob("*token*")) and not any(Path(folder).glob("*.model")):
            return None
        source.config().save_pretrained(folder)
        try:
            return load_tokenizer(folder)
        except SourceError:
            return None


def _generator(source: Source) -> nn.Module:
    """The whole model in memory, to write its own calibration text."""
    from loftq.calibrate.blocks import Weights, build

    model = build(source)
    weights = Weights(source, model)
    weights.load(weights.outside([]))
    return model


def collect_statistics(
    source: Source | str | Path,
    config: LoftQConfig,
    *,
    full: bool = True,
    fisher: bool = False,
    revision: str | None = None,
    progress: bool = True,
) -> Statistics:
    """The statistics of the inputs of every layer that ``config`` selects, on its calibration text.

    With ``full`` moments, of a language model and unless ``config.calibration_gradients`` is 0 there are gradients too.

    Raises:
        SourceError, ConfigError: see the message.
    """
    from loftq.checkpoint.naming import meta_model
    from loftq.checkpoint.source import open_source
    from loftq.plan.targets import plan_modules

    opened = open_source(source, revision) if isinstance(source, (str, Path)) else source
    model = meta_model(opened.config())
    plans = plan_modules(model, config)
    config = config.replace(method="lq-lora" if fisher else "loftq-data" if full else "qera-approx")
    inputs = calibrated(opened, model, plans, config, {}, None, lambda sentence: None)
    assert inputs.tokens is not None
    return collect(
        opened,
        [name for name in inputs.targets if name not in inputs.experts],
        inputs.tokens,
        full=full,
        gradients=inputs.gradients,
        fisher=fisher,
        experts=inputs.experts,
        progress=progress,
    )
