"""Memory of fine-tuning: packed backbone with adapters, full-precision LoRA, and all weights.

    peak = weights + optimizer + activations + transient + workspace

- weights: parameters and buffers. Packed modules as stored; what is trained in float32: A and B, heads of tasks (beside the
  untrained copy that PEFT keeps), and all weights with ``full``; everything else in the training dtype.
- optimizer: AdamW's two moments of every trainable parameter, in float32.
- activations: what the forward pass leaves for the backward pass. For a Llama layer in float32, T tokens, width h, keys and
  values of width k, feed-forward f, n heads and adapters of rank r on all seven matrices,

      4 T (6 h + 2 k + 4 f + 7 r + n + 2) bytes:

  the residual stream twice and both norms' results (inputs of A) 4 h, queries and attention's result 2 h, keys and values
  2 k, the feed-forward's four factors 4 f, the inputs of B 7 r, softmax sums n, norms' scales 2. Of a packed matrix nothing is
  kept but what is stored anyway. In 16 bits,

      T (16 h + 4 k + 8 f + 14 r + 4 n + 8) bytes

  under autocast: norms keep their input in float32, 8 h + 8, and their result in 16 bits; and there are 2 bytes for each
  element of A and B, which autocast casts. The loss adds 4 T V for a vocabulary of V, which dominates small models. With
  gradient checkpointing a layer leaves its input alone, 4 T h.
- transient: what the peak has beyond that: gradients; logits, their gradient and the softmax's; one layer again with
  checkpointing; while a packed matrix is multiplied, its dense copy on a GPU, inputs and results in another order on the
  CPU; or, if that takes more, all gradients and AdamW's temporaries.
- workspace: where a CPU's products are handed to torch (many tokens of bfloat16, float64), the largest tile of a packed
  matrix, 8 MiB at most.

Activations and the peak are counted for any architecture, by :mod:`loftq.report.memory.simulate`; the formulas say what
they consist of, and a test holds them against the count, to the byte. Autocast is counted by its rules on the CPU; on a GPU
LayerNorm and softmax compute in float32 too. Not counted: what the process takes before (Python, the libraries, the CUDA
context), what an operation takes inside itself, and memory that an allocator keeps for later.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from loftq.checkpoint.naming import meta_model
from loftq.config import LoftQConfig, is_bool, one_of, positive_int
from loftq.errors import ConfigError, LoftQError, first_line
from loftq.finetune.adapter import head_names
from loftq.hub.adapter import know_experts, lora_config
from loftq.plan.targets import ModulePlan, plan_modules, report_plans
from loftq.report.memory.predict import FLOATS, source_dtype
from loftq.report.memory.simulate import simulate_step, workspace_bytes
from loftq.report.record import QuantizationReport

if TYPE_CHECKING:
    from transformers import PretrainedConfig

METHODS = ("loftq", "lora", "full")
DEVICES = ("cuda", "cpu")
LENGTH = 512


@dataclass(frozen=True)
class TrainingSetup:
    """What is trained, and how.

    Args:
        method: ``loftq`` (packed backbone, adapters), ``lora`` (dense backbone, adapters), ``full`` (all weights).
        batch_size, length: sequences of a step, and their tokens.
        dtype: of the weights that are neither packed nor trained, and of the products; ``None`` for the config's.
        checkpointing: gradient checkpointing.
        device: ``cuda`` or ``cpu``: how packed weights are multiplied with, and how AdamW steps.
        attention: ``eager`` keeps all attention scores; ``None`` is transformers' default, fused where the model has it.

    Raises:
        ConfigError: for a value that is not listed above.
    """

    method: str = "loftq"
    batch_size: int = 1
    length: int = LENGTH
    dtype: str | None = None
    checkpointing: bool = False
    device: str = "cuda"
    attention: str | None = None

    def __post_init__(self) -> None:
        one_of("method", self.method, METHODS)
        positive_int("batch_size", self.batch_size)
        positive_int("length", self.length)
        one_of("device", self.device, DEVICES)
        is_bool("checkpointing", self.checkpointing)
        if self.dtype is not None:
            one_of("dtype", self.dtype, FLOATS)
        if self.attention is not None:
            one_of("attention", self.attention, ("eager", "sdpa"))


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of a training step, see :mod:`loftq.report.memory.training`.

    Attributes:
        setup: of the training.
        trainable: trainable parameters.
        weights, optimizer, activations, transient, workspace: the parts of the peak.
    """

    setup: TrainingSetup
    trainable: int
    weights: int
    optimizer: int
    activations: int
    transient: int
    workspace: int

    @property
    def peak(self) -> int:
        return self.weights + self.optimizer + self.activations + self.transient + self.workspace

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "peak": self.peak}


def position_limit(config: PretrainedConfig) -> int | None:
    """Tokens that the model has positions for, if its configuration says."""
    limit = getattr(config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def check_length(config: PretrainedConfig, length: int) -> None:
    """A :class:`ConfigError` if the model takes fewer tokens."""
    limit = position_limit(config)
    if limit is not None and length > limit:
        raise ConfigError(f"length is {length}, but the model has positions for {limit} tokens; lower --length")


def predict_training(
    config: PretrainedConfig,
    settings: LoftQConfig,
    setup: TrainingSetup,
    plans: Mapping[str, ModulePlan] | None = None,
) -> TrainingMemory:
    """Memory of training a model of this configuration, without weights and in seconds.

    Args:
        config: of transformers; see :func:`loftq.checkpoint.source.open_config`.
        settings: modules, bits, rank and dropout.
        setup: method, batch and dtype.
        plans: of a model that is quantized already, see :func:`folder_plans`; by default those of ``settings``.

    Raises:
        SourceError: transformers cannot build the model.
        ConfigError: a setting selects nothing, PEFT refuses a module, the model takes fewer tokens, or it cannot be run on
            token ids alone.
    """
    check_length(config, setup.length)
    step_of = partial(
        simulate_step,
        batch_size=setup.batch_size,
        length=setup.length,
        checkpointing=setup.checkpointing,
        device=setup.device,
        autocast=autocast_dtype(config, setup),
    )
    model = _build(config, settings, setup, plans)
    trainable = [p for p in model.parameters() if p.requires_grad]
    grown = sum(p.nbytes for p in trainable)
    weights = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    workspace = workspace_bytes(model, setup.device, source_dtype(config, setup.dtype), setup.batch_size * setup.length)
    try:
        step = step_of(model)
    except ConfigError:  # some models compute with their mask whether or not attention needs one
        step = step_of(_build(config, settings, setup, plans), mask=True)
    # torch's AdamW takes all parameters at once on a GPU, with the roots of their second moments beside them; on the CPU
    # one after the other, with that root and its quotient
    adam = grown if setup.device == "cuda" else 2 * max(p.nbytes for p in trainable)
    return TrainingMemory(
        setup=setup,
        trainable=sum(p.numel() for p in trainable),
        weights=weights,
        optimizer=2 * grown,
        activations=step.stored,
        transient=max(step.peak, step.gradients + adam) - step.stored,
        workspace=workspace,
    )


def predict_methods(
    config: PretrainedConfig,
    settings: LoftQConfig,
    setup: TrainingSetup,
    plans: Mapping[str, ModulePlan] | None = None,
) -> tuple[list[TrainingMemory], str | None]:
    """:func:`predict_training` for every method that has a prediction, and why the first of the others has none.

    Raises:
        ConfigError: the model takes fewer tokens.
    """
    check_length(config, setup.length)
    setup = replace(setup, dtype=str(source_dtype(config, setup.dtype)).removeprefix("torch."))
    found, problem = [], None
    for method in METHODS:
        try:
            found.append(predict_training(config, settings, replace(setup, method=method), plans))
        except ConfigError as error:
            problem = problem or f"{method}: {error}"
    return found, problem


def folder_plans(directory: str | Path) -> dict[str, ModulePlan]:
    """What a quantized folder's modules are, from its report and config.

    Raises:
        SourceError: the folder is no quantized one.
    """
    from loftq.hub.backbone import read_quantization_config
    from loftq.hub.quantizer import LoftQQuantizationConfig

    report = QuantizationReport.load(Path(directory))
    specs = LoftQQuantizationConfig(**read_quantization_config(Path(directory))).module_specs()
    return report_plans(report, specs)


def _build(*args: Any) -> nn.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's and transformers' remarks on a model that nobody will use
            return build_model(*args)
    except LoftQError:
        raise
    except Exception as error:
        raise ConfigError(
            f"adapters cannot be put into the model ({first_line(error)}); choose other target modules"
        ) from None


def build_model(
    config: PretrainedConfig,
    settings: LoftQConfig,
    setup: TrainingSetup,
    plans: Mapping[str, ModulePlan] | None = None,
) -> nn.Module:
    """The model to train, on the meta device; arguments as for :func:`predict_training`."""
    from peft import get_peft_model

    from loftq.hub.quantizer import place_packed, present_for_dtype_checks

    config = copy.deepcopy(config)
    if setup.attention is not None:
        config._attn_implementation = setup.attention
    model = meta_model(config)
    if setup.method == "full":  # in float32, in which AdamW's small steps are not lost
        return model.to(torch.float32)
    model.to(source_dtype(config, setup.dtype))
    plans = plan_modules(model, settings) if plans is None else plans
    if setup.method == "loftq":
        place_packed(model, {name: plan.spec for name, plan in plans.items()})
        present_for_dtype_checks(model)
    know_experts(model)
    lora = lora_config(plans, model, settings)
    lora.inference_mode = False
    lora.modules_to_save = task_heads(model) or None
    with torch.device("meta"):
        wrapped = get_peft_model(model, lora)
    if autocast_dtype(config, setup) is not None:  # as loftq.finetune.model does
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return wrapped


def task_heads(model: Any) -> list[str]:
    """What a task trains beside the adapters: all outside the base model, unless the model writes or is that base."""
    is_base = not hasattr(model, model.base_model_prefix)
    return [] if is_base or model.get_output_embeddings() is not None else head_names(model, set())


def autocast_dtype(config: PretrainedConfig, setup: TrainingSetup) -> torch.dtype | None:
    """The 16 bits that the forward pass computes in while what is trained stays in float32; ``None`` in float32."""
    dtype = source_dtype(config, setup.dtype)
    return None if dtype == torch.float32 else dtype
