"""Methods side by side: every (method, bits) is quantized, measured against the same full-precision model, and removed.

One process and one reference: the full-precision model's hidden states, its output head and the statistics of its layers'
inputs are computed once, and every method is measured with them, whatever it saw itself. A finished cell is saved at once
and never computed again by the same command.
"""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import psutil
from torch import nn

from loftq.calibrate.kept import kept_statistics
from loftq.calibrate.statistics import Statistics
from loftq.checkpoint.assembly import Parameters
from loftq.checkpoint.naming import meta_model
from loftq.checkpoint.source import Source, open_source, sha256_file
from loftq.config import BITS, PUBLISHED, LoftQConfig, is_number, positive_int
from loftq.errors import ConfigError, LoftQError, first_line
from loftq.evaluate.divergence import Reference, Score, score
from loftq.evaluate.models import default_window, load_for_inference
from loftq.evaluate.output_error import ErrorMeter
from loftq.evaluate.tokens import check_apart, text_digest, text_tokens
from loftq.hub.adapter import task_type
from loftq.hub.quantizer import dequantize_modules
from loftq.modules import PackedModule
from loftq.pipeline import quantize_checkpoint
from loftq.plan.targets import ModulePlan, plan_modules
from loftq.report.cells import Cell, Results, save_layers
from loftq.report.progress import bar
from loftq.report.record import REPORT
from loftq.report.system import versions
from loftq.solver.methods import method_named

FLOAT = "float"
STATISTICS = "statistics.safetensors"
# Their papers fix the quantizer, and what they are known for depends on it; scales are stored like all others here.
AS_PUBLISHED = ("qlora", "loftq", "loftq-svd-first")
# These take a plan of their own for fractional bits, the others the first-k-layers rule.
PLANNED = ("loftq-data", "loftq-data-zero", "auto")


@dataclass(frozen=True)
class Comparison:
    """What to compare.

    Args:
        model: folder, ``.gguf`` file or hub id. methods: names of :data:`loftq.config.METHODS`.
        bits: width of the codes; between 2, 3, 4 and 8 their average, as the paper counts its mixed precision: the first
            layers get 4 bits (8 above 4), as many as keep the average at most that, and the others the next width below.
        rank, block_size, seed: as for :class:`loftq.LoftQConfig`.
        calibration, calibration_samples, calibration_length: the text whose layer inputs define the output error and feed
            the methods that need them.
        text, max_tokens, window: what perplexity and KL are measured on; see :func:`loftq.evaluate.tokens.text_tokens`.
        refine_tokens: of the calibration text, to refine all adapters jointly after the fit; 0 for none.
        plans: bits -> file of a plan, for ``loftq-data`` and ``auto``.
        keep: keep the quantized folders.

    Raises:
        ConfigError: for a value out of range, an unknown method, or one that needs a calibration text where there is none.
    """

    model: str
    methods: tuple[str, ...]
    bits: tuple[float, ...]
    rank: int = 32
    block_size: int = 64
    seed: int = 0
    calibration: str | None = None
    calibration_samples: int = 128
    calibration_length: int = 512
    text: str = "pydoc"
    max_tokens: int | None = 16384
    window: int | None = None
    refine_tokens: int = 0
    plans: Mapping[float, Path] = field(default_factory=dict)
    keep: bool = False

    def __post_init__(self) -> None:
        positive_int("rank", self.rank)
        positive_int("refine_tokens", self.refine_tokens, 0)
        for name in ("methods", "bits"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise ConfigError(f"{name} is {', '.join(map(str, values)) or 'empty'}, expected different values")
        for value in (*self.bits, *self.plans):
            if not is_number(value) or not BITS[0] <= value <= BITS[-1]:
                raise ConfigError(f"bits is {value!r}, expected a number from {BITS[0]} to {BITS[-1]}")
        for name in self.methods:
            if method_named(name).needs_inputs and self.calibration is None:
                raise ConfigError(
                    f"method {name} works on the layers' inputs, but there is no text; give --calibration"
                )
        if self.refine_tokens and self.calibration is None:
            raise ConfigError("refine_tokens was given, but there is no text to refine on; give --calibration")
        if self.calibration is not None:
            check_apart(self.calibration, self.text)

    def config(self, method: str, bits: float, model: nn.Module) -> LoftQConfig:
        """How ``method`` quantizes ``model`` (which may be on the meta device) to ``bits``."""
        options: dict[str, Any] = {
            "method": method,
            "rank": self.rank,
            "block_size": self.block_size,
            "seed": self.seed,
            "calibration": self.calibration if method_named(method).needs_inputs else None,
            "calibration_samples": self.calibration_samples,
            "calibration_length": self.calibration_length,
        }
        if method in AS_PUBLISHED:
            options.update(codebook=PUBLISHED["codebook"], scale=PUBLISHED["scale"])
        if bits in self.plans and method in PLANNED:
            return LoftQConfig(bits=max(b for b in BITS if b <= bits), plan=str(self.plans[bits]), **options)
        if bits in BITS:
            return LoftQConfig(bits=int(bits), **options)
        return first_layers(model, bits, options)


def first_layers(model: nn.Module, bits: float, options: Mapping[str, Any]) -> LoftQConfig:
    """The config whose first layers have 4 bits (8 above 4), as many as keep the average width at most ``bits``.

    Raises:
        ConfigError: not even one layer can.
    """
    chosen = LoftQConfig(bits=max(b for b in BITS if b < bits), **options)
    high = 4 if bits < 4 else 8
    for count in range(1, len(plan_modules(model, chosen)) + 1):
        config = chosen.replace(first_layers_bits=(count, high))
        plans = plan_modules(model, config)
        if average_bits(plans) > bits:
            break
        chosen = config
        if all(plan.spec.bits == high for plan in plans.values()):
            break
    if chosen.first_layers_bits is None:
        raise ConfigError(
            f"{bits:g} bits are out of reach: with the model's first layer alone at {high} bits the average is "
            f"{average_bits(plans):.3g}; choose {chosen.bits} bits, or an average of at least that"
        )
    return chosen


def average_bits(plans: Mapping[str, ModulePlan]) -> float:
    """Average width of the codes, scales apart."""
    weights = {name: plan.numel for name, plan in plans.items()}
    return sum(plans[name].spec.bits * count for name, count in weights.items()) / sum(weights.values())


def compare(
    settings: Comparison,
    out: str | Path,
    *,
    statistics: Statistics | None = None,
    command: str | None = None,
) -> Iterator[tuple[Cell, bool]]:
    """Yield each cell and whether it was measured just now, the full-precision model first.

    Args:
        settings: what to compare.
        out: folder of ``compare.json``; created. Quantized folders are made in it.
        statistics: of the full-precision model's layer inputs; by default they are collected on ``settings.calibration``.
        command: recorded in every row.

    Raises:
        ConfigError, SourceError: before anything is computed.
        OutputError: if ``out`` holds the results of other settings, or something else.
    """
    source = open_source(settings.model)
    model = meta_model(source.config())
    todo = [(m, b, settings.config(m, b, model)) for b in settings.bits for m in settings.methods]
    causal = task_type(type(model).__name__) == "CAUSAL_LM"
    results = Results(Path(os.path.expanduser(out)), _fingerprint(settings, source))
    session = _Session(settings, source, model, causal, results.folder, statistics, command)
    baseline = next((cell for cell in results.done.values() if cell.method == FLOAT), None)
    yield (results.add(session.full_precision()), True) if baseline is None else (baseline, False)
    for method, bits, config in todo:
        known = results.done.get((method, bits))
        fresh = known is None or known.error is not None
        if fresh:
            results.add(session.measure(method, bits, config))
        yield results.done[method, bits], fresh


class _Session:
    """What is computed once and shared by the cells, when the first of them needs it."""

    def __init__(
        self,
        settings: Comparison,
        source: Source,
        model: nn.Module,
        causal: bool,
        folder: Path,
        statistics: Statistics | None,
        command: str | None,
    ) -> None:
        self.settings, self.source, self.model, self.causal, self.folder = settings, source, model, causal, folder
        self._statistics, self.command = statistics, command
        self._reference: Reference | None = None
        self._meter: ErrorMeter | None = None

    @property
    def statistics(self) -> Statistics | None:
        settings = self.settings
        if self._statistics is None and settings.calibration is not None:
            config = LoftQConfig(
                calibration=settings.calibration,
                calibration_samples=settings.calibration_samples,
                calibration_length=settings.calibration_length,
                seed=settings.seed,
            )
            self._statistics = kept_statistics(self.folder / STATISTICS, self.source, config, settings.methods)
        return self._statistics

    def reference(self) -> Reference | None:
        if self._reference is None and self.causal:
            ids = text_tokens(self.settings.text, self.settings.model, self.settings.max_tokens)
            loaded = load_for_inference(self.settings.model)
            window = default_window(loaded, self.settings.window)
            with bar(max(ids.numel() - 1, 1), "evaluating full precision", "tokens") as advance:
                self._reference = Reference.of(loaded, ids, window, folder=self.folder, advance=advance)
        return self._reference

    def full_precision(self) -> Cell:
        parameters = Parameters(self.source, self.model)
        plans = plan_modules(self.model, LoftQConfig())
        stored = sum(parameters.nbytes(plan.parameter) for plan in plans.values())
        width = 8 * stored / sum(plan.numel for plan in plans.values())
        reference = self.reference()
        found = None if reference is None else reference.score
        return Cell(
            FLOAT,
            round(width),
            bpw=width,
            weight_error=0.0,
            output_error=None if self.statistics is None else 0.0,
            **_scores(found),
            seconds=0.0,
            bytes=stored,
            adapter_bytes=0,
            seed=self.settings.seed,
            command=self.command,
        )

    def measure(self, method: str, bits: float, config: LoftQConfig) -> Cell:
        folder = self.folder / f"{method}-{bits:g}"
        named: dict[str, Any] = {
            "method": method,
            "bits": bits,
            "rank": config.rank,
            "seed": config.seed,
            "command": self.command,
        }
        try:
            shared = self.statistics if method_named(method).needs_inputs else None
            # an interrupted quantization starts over, so that its seconds are those of a whole one
            resume = (folder / REPORT).exists()
            report = quantize_checkpoint(self.source, folder, config, resume=resume, statistics=shared)
            if self.settings.refine_tokens:
                self._refine(folder)
            if self._meter is None:
                self._meter = ErrorMeter(self.source, self.statistics)
            errors = self._meter.measure(folder)
            save_layers(self.folder, method, bits, errors.modules)
            return Cell(
                **named,
                bpw=report.bits_per_weight,
                weight_error=errors.weight_error,
                output_error=errors.output_error,
                **_scores(self._score(folder, f"{method}, {bits:g} bits")),
                seconds=report.timing["seconds"],
                bytes=report.weight_bytes,
                adapter_bytes=report.adapter_bytes,
            )
        except LoftQError as error:
            return Cell(**named, error=str(error))
        except Exception as error:  # the other cells are worth having
            return Cell(**named, error=f"{type(error).__name__}: {first_line(error)}")
        finally:
            if not self.settings.keep:
                shutil.rmtree(folder, ignore_errors=True)
            gc.collect()  # models have cycles, and the next one needs the memory

    def _refine(self, folder: Path) -> None:
        """Tune the adapters on as many tokens of the calibration text as the settings say."""
        from loftq.refine import refine

        length = self.settings.calibration_length
        refine(
            folder,
            self.settings.model,
            text=self.settings.calibration,
            stages=("model",),
            epochs=1,
            samples=max(2, -(-self.settings.refine_tokens * 10 // (9 * length))),  # a tenth is held out
            length=length,
            max_tokens=self.settings.refine_tokens,
            seed=self.settings.seed,
        )

    def _score(self, folder: Path, label: str) -> Score | None:
        reference = self.reference()
        if reference is None:
            return None
        loaded = merged(load_for_inference(folder))
        with bar(reference.ids.numel() - 1, f"evaluating {label}", "tokens") as advance:
            return score(loaded, reference, advance=advance)


def merged(model: Any) -> nn.Module:
    """A quantized model as a dense one, Q + scaling · B A, where memory allows; otherwise as it is.

    Scoring then takes a quarter less time. A weight is rounded to float32 once more, 6e-8 of its size.
    """
    needed = 4 * sum(m.packed_weights for m in model.modules() if isinstance(m, PackedModule))
    if needed == 0 or needed > psutil.virtual_memory().available / 4:
        return model
    return dequantize_modules(model).merge_and_unload()  # type: ignore[operator]


def _scores(found: Score | None) -> dict[str, Any]:
    names = ("perplexity", "perplexity_se", "kl", "kl_se")
    return {name: None if found is None else getattr(found, name) for name in names}


def _fingerprint(settings: Comparison, source: Source) -> dict[str, Any]:
    """What the cells of one folder have in common; methods and bits may be added by a later command."""
    values = {f.name: getattr(settings, f.name) for f in fields(settings) if f.name not in ("methods", "bits", "keep")}
    values["plans"] = {f"{bits:g}": sha256_file(Path(path)) for bits, path in sorted(settings.plans.items())}
    values["loftq"] = versions()["loftq"]
    values["source"] = {file.name: sha256_file(file) for file in source.files}
    values |= {f"{name}_sha256": text_digest(getattr(settings, name)) for name in ("text", "calibration")}
    return values
