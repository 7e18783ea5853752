"""What a user can choose, as frozen dataclasses that check themselves and go to and from plain dicts."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from loftq.errors import ConfigError

BITS = (2, 3, 4, 8)
ENGINES = ("local", "ray")
BLOCK_SIZES = (32, 64, 128, 256)
CODEBOOKS = ("nf", "nf-sym", "uniform", "uniform-sym", "lloyd", "lloyd-channel")
SCALES = ("absmax", "search")
SCALE_DTYPES = ("float32", "float16", "bfloat16")
SVDS = ("auto", "exact", "block")
METHODS = (
    "loftq",
    "loftq-svd-first",
    "qlora",
    "rtn",
    "gptq",
    "pissa",
    "qpissa",
    "lqer",
    "qera-approx",
    "qera",
    "cloq",
    "caldera",
    "lq-lora",
    "srr",
    "loftq-data",
    "loftq-data-zero",
    "auto",
)

T = TypeVar("T")


def default_method(bits: float, calibrated: bool) -> str:
    """The method where none is named: the start that fine-tuning ends best from, as measured in ``benchmarks/finetune``.

    At 2 bits the adapter does best to begin with the principal part of the weights, above with the error of the rest alone.
    """
    return "loftq" if not calibrated else "loftq-data" if bits < 3 else "loftq-data-zero"


def one_of(name: str, value: T, allowed: Iterable[T]) -> T:
    """``value`` if it is allowed, else a :class:`ConfigError` that lists what is."""
    allowed = tuple(allowed)
    if not any(type(value) is type(a) and value == a for a in allowed):
        close = difflib.get_close_matches(str(value), [str(a) for a in allowed], 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(f"{name} is {value!r}, expected one of {', '.join(map(str, allowed))}{hint}")
    return value


def positive_int(name: str, value: Any, least: int = 1) -> int:
    """``value`` if it is an integer of at least ``least``, else a :class:`ConfigError`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} is {value!r}, expected an integer of at least {least}")
    return value


def is_bool(name: str, value: Any) -> bool:
    """``value`` if it is True or False, else a :class:`ConfigError`: a string such as "no" would count as true."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} is {value!r}, expected True or False")
    return value


def reject_unknown(kind: str, given: Iterable[str], known: Iterable[str]) -> None:
    """A :class:`ConfigError` that names a key which is not known and the nearest that is."""
    known = tuple(known)
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(key, known, 1)
            hint = f", did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"
            raise ConfigError(f"{kind} has no option {key!r}{hint}")


@dataclass(frozen=True)
class QuantSpec:
    """How one matrix is stored: value = scale * codebook[code], one scale a block of ``block_size`` input features.

    The affine ``uniform`` codebook has a zero point beside the scale: value = scale * (code + zero).

    Args:
        bits: width of a code, 2, 3, 4 or 8.
        codebook: ``nf`` (NormalFloat as published with QLoRA, asymmetric with an exact 0), ``nf-sym`` (symmetric),
            ``uniform`` (affine between the block's minimum and maximum), ``uniform-sym`` (evenly spaced, symmetric
            about 0), ``lloyd`` (levels fitted to the matrix), ``lloyd-channel`` (levels fitted to each row, that is output
            channel, stored in bfloat16: 16 * 2^bits / in_features bits per weight more).
        block_size: elements of a row that share one scale, 32, 64, 128 or 256. The last block of a row may be shorter.
        scale: ``absmax`` (published) or ``search`` (least squared error, codes and scale fitted to each other).
        scale_dtype: dtype in which scales are stored: ``float32`` (published), ``float16``, ``bfloat16``.
        double_quant: store the scales in 8 bits, in groups of 256 with an offset (QLoRA, section 3).

    The published QLoRA and LoftQ setting is ``codebook="nf", scale="absmax", scale_dtype="float32"``.

    Raises:
        ConfigError: for a value that is not listed above.
    """

    bits: int = 4
    codebook: str = "lloyd"
    block_size: int = 64
    scale: str = "search"
    scale_dtype: str = "float16"
    double_quant: bool = False

    def __post_init__(self) -> None:
        one_of("bits", self.bits, BITS)
        one_of("codebook", self.codebook, CODEBOOKS)
        one_of("block_size", self.block_size, BLOCK_SIZES)
        one_of("scale", self.scale, SCALES)
        one_of("scale_dtype", self.scale_dtype, SCALE_DTYPES)
        is_bool("double_quant", self.double_quant)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QuantSpec:
        reject_unknown("QuantSpec", values, [f.name for f in dataclasses.fields(cls)])
        return cls(**values)

    def replace(self, **changes: Any) -> QuantSpec:
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True)
class LoftQConfig:
    """How a model is turned into a quantized backbone and a LoRA adapter. Names follow PEFT's ``LoraConfig``.

    Args:
        bits, codebook, block_size, scale, scale_dtype, double_quant: see :class:`QuantSpec`.
        rank: rank r of the adapters.
        lora_alpha: LoRA's alpha; ``None`` means the rank, a scaling of 1. The fit accounts for any value.
        use_rslora: scaling = alpha / sqrt(r) instead of alpha / r.
        lora_dropout: dropout that fine-tuning will use; written to the adapter's config.
        num_iter: alternations T. 0 keeps the plain quantization and PEFT's default initialisation (QLoRA).
        method: a name of :data:`loftq.solver.methods.METHODS`; ``None`` means that of :func:`default_method`:
            ``loftq-data`` where there is a calibration text, from 3 bits on (the mean over all weights)
            ``loftq-data-zero``, and ``loftq`` where there is none.
        damping: λ, from 0 (only the outputs' error counts) to 1 (only the weights'); ``None`` for the method's own.
        svd: ``exact`` (LAPACK), ``block`` (block power iteration, warm-started) or ``auto``.
        target_modules: ``all-linear``, a list of module-name suffixes, or a regular expression, as in PEFT. Experts that a
            mixture keeps in three-dimensional parameters are chosen by the names of these, and by ``all-linear``.
        exclude_modules: modules to leave alone, same syntax as in PEFT.
        bits_pattern: module-name pattern -> bits, for the modules it matches (PEFT's ``rank_pattern`` syntax).
        rank_pattern: module-name pattern -> rank.
        first_layers_bits: ``(K, bits)``: the first K layers get these bits (the paper's mixed precision).
        quantize_embeddings: quantize input embeddings as well (the paper does so for DeBERTa).
        calibration: text whose inputs decide which errors matter: a file, a hub dataset, ``pydoc`` (English that every
            Python carries) or ``self`` (the model's own); see :func:`loftq.calibrate.text.calibration_tokens`. ``auto`` is
            ``pydoc`` for causal language models with a tokenizer and nothing for others; ``None`` is weight-only.
        calibration_samples, calibration_length: windows of the text and their tokens.
        calibration_gradients: on how many of the windows to run a backward pass, three times the work of a forward pass, in
            order to weigh the errors of a layer's outputs by how much the model's own loss depends on them; 0 for none.
        propagate: calibrate each layer behind the quantized layers before it rather than in the original model; without
            gradients.
        plan: file that ``loftq plan`` has written; it decides bits, block size and rank of every module.
        seed: seed of every random choice; each module derives its own from this and its name.
    """

    bits: int = 4
    rank: int = 16
    lora_alpha: float | None = None
    use_rslora: bool = False
    lora_dropout: float = 0.0
    num_iter: int = 5
    method: str | None = None
    damping: float | None = None
    svd: str = "auto"
    codebook: str = "lloyd"
    block_size: int = 64
    scale: str = "search"
    scale_dtype: str = "float16"
    double_quant: bool = False
    target_modules: str | tuple[str, ...] = "all-linear"
    exclude_modules: str | tuple[str, ...] | None = None
    bits_pattern: Mapping[str, int] = field(default_factory=dict)
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    first_layers_bits: tuple[int, int] | None = None
    quantize_embeddings: bool = False
    calibration: str | None = "auto"
    calibration_samples: int = 128
    calibration_length: int = 512
    calibration_gradients: int = 32
    propagate: bool = False
    plan: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        positive_int("rank", self.rank)
        positive_int("num_iter", self.num_iter, 0)
        positive_int("seed", self.seed, 0)
        if self.method is not None:
            one_of("method", self.method, METHODS)
        one_of("svd", self.svd, SVDS)
        check_alpha(self.lora_alpha)
        check_damping(self.damping)
        positive_int("calibration_samples", self.calibration_samples)
        positive_int("calibration_length", self.calibration_length, 2)
        positive_int("calibration_gradients", self.calibration_gradients, 0)
        for name in ("calibration", "plan"):
            value = getattr(self, name)
            if isinstance(value, os.PathLike):
                object.__setattr__(self, name, os.fspath(value))
            elif value is not None and (not isinstance(value, str) or not value):
                raise ConfigError(f"{name} is {value!r}, expected a name, a path or None")
        is_bool("propagate", self.propagate)
        is_bool("use_rslora", self.use_rslora)
        is_bool("quantize_embeddings", self.quantize_embeddings)
        if not is_number(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout is {self.lora_dropout!r}, expected a number from 0 to below 1")
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple, set, frozenset)) and all(isinstance(v, str) for v in value):
                # a set has no order of its own, and what is written must not depend on the process
                object.__setattr__(self, name, tuple(sorted(value) if isinstance(value, (set, frozenset)) else value))
            elif value is not None and not isinstance(value, str):
                raise ConfigError(f"{name} is {value!r}, expected a name, a list of names or a regular expression")
        for name in ("bits_pattern", "rank_pattern"):
            value = getattr(self, name)
            if not isinstance(value, Mapping) or not all(isinstance(pattern, str) for pattern in value):
                raise ConfigError(f"{name} is {value!r}, expected a mapping from module-name patterns to numbers")
            object.__setattr__(self, name, dict(value))
        if not self.target_modules:
            raise ConfigError("target_modules is empty, expected 'all-linear', module names or a regular expression")
        for pattern, bits in self.bits_pattern.items():
            one_of(f"bits_pattern[{pattern!r}]", bits, BITS)
        for pattern, rank in self.rank_pattern.items():
            positive_int(f"rank_pattern[{pattern!r}]", rank)
        if self.first_layers_bits is not None:
            value = self.first_layers_bits
            if not isinstance(value, (list, tuple)) or len(value) != 2:
                raise ConfigError(f"first_layers_bits is {value!r}, expected a pair (number of layers, bits)")
            count, bits = value
            positive_int("first_layers_bits[0] (number of layers)", count)
            one_of("first_layers_bits[1] (bits)", bits, BITS)
            object.__setattr__(self, "first_layers_bits", (count, bits))
        self.spec  # noqa: B018 - checks the shared fields

    @property
    def spec(self) -> QuantSpec:
        """The :class:`QuantSpec` of modules without an exception of their own."""
        return QuantSpec(**{f.name: getattr(self, f.name) for f in dataclasses.fields(QuantSpec)})

    def to_dict(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoftQConfig:
        reject_unknown("LoftQConfig", values, [f.name for f in dataclasses.fields(cls)])
        return cls(**values)

    def replace(self, **changes: Any) -> LoftQConfig:
        return dataclasses.replace(self, **changes)


PUBLISHED: dict[str, Any] = {"codebook": "nf", "scale": "absmax", "scale_dtype": "float32"}
"""The quantizer of the papers: ``LoftQConfig(bits=2, **PUBLISHED)``; add ``svd="exact"`` for LoftQ's own SVD."""


def is_number(value: Any) -> bool:
    """Whether ``value`` is a finite int or float."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_alpha(lora_alpha: float | None) -> None:
    """A :class:`ConfigError` unless alpha is ``None`` or a positive number."""
    if lora_alpha is not None and not (is_number(lora_alpha) and lora_alpha > 0):
        raise ConfigError(f"lora_alpha is {lora_alpha!r}, expected a positive number (or nothing, for the rank)")


def check_damping(damping: float | None) -> None:
    """A :class:`ConfigError` unless λ is ``None`` or a number from 0 to 1."""
    if damping is not None and not (is_number(damping) and 0 <= damping <= 1):
        raise ConfigError(f"damping is {damping!r}, expected a number from 0 to 1 (or nothing, for the method's own)")
