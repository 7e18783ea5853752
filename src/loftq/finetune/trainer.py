"""transformers' Trainer with this project's measurement and shares of a batch; see also :mod:`loftq.finetune.watch`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft.helpers import disable_input_dtype_casting
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainingArguments

from loftq.data.collate import Collator
from loftq.data.examples import Examples
from loftq.data.tasks import task
from loftq.errors import ConfigError, first_line
from loftq.finetune.folder import CHECKPOINTS, writing
from loftq.finetune.model import load_dtype
from loftq.finetune.processes import Shared, Shares, collated, counted, is_spread, spread_here
from loftq.finetune.settings import TrainSettings

Measure = Callable[[nn.Module], dict[str, float]]


def training_arguments(
    settings: TrainSettings, run: Path, best: str | None, larger_is_better: bool
) -> TrainingArguments:
    """The settings in transformers' words.

    Args:
        best: the metric that decides which checkpoint is kept; ``None`` without measurement.
    """
    on_gpu = torch.cuda.is_available()
    dtype = load_dtype(settings.dtype)
    when: dict[str, Any] = {"save_strategy": "epoch", "eval_strategy": "epoch" if best else "no"}
    if settings.eval_steps is not None:
        when = {"save_strategy": "steps", "save_steps": settings.eval_steps}
        when |= {"eval_strategy": "steps" if best else "no", "eval_steps": settings.eval_steps}
    try:
        arguments = TrainingArguments(
            output_dir=str(run / CHECKPOINTS),
            num_train_epochs=settings.epochs,
            max_steps=settings.max_steps or -1,
            per_device_train_batch_size=settings.batch_size,
            per_device_eval_batch_size=settings.eval_batch_size or settings.batch_size,
            gradient_accumulation_steps=settings.gradient_accumulation,
            learning_rate=settings.learning_rate,
            lr_scheduler_type=_SCHEDULERS[settings.schedule],
            warmup_steps=settings.warmup_ratio,
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
            bf16=dtype == torch.bfloat16,
            fp16=dtype == torch.float16 and on_gpu,
            use_cpu=not on_gpu,
            seed=settings.seed,
            data_seed=settings.seed,
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_total_limit=2,
            load_best_model_at_end=best is not None,
            metric_for_best_model=best and f"eval_{best}",
            greater_is_better=larger_is_better if best else None,
            report_to=[],  # see loftq.finetune.reporters
            remove_unused_columns=False,
            label_names=["start_positions", "end_positions"] if settings.data.task == "qa" else ["labels"],
            disable_tqdm=True,
            dataloader_pin_memory=on_gpu,
            ddp_broadcast_buffers=False,  # the packed weights are buffers, and never change
            accelerator_config={"even_batches": False},  # see Shares
            **when,
        )
    except (ImportError, RuntimeError, ValueError) as error:
        raise ConfigError(f"these settings cannot be used here ({first_line(error)}); change them") from None
    if arguments.n_gpu > 1:  # the Trainer would take a batch for each, and steps of other sizes than asked for
        arguments._n_gpu = 1
    return arguments


_SCHEDULERS = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


class TaskTrainer(Trainer):
    """A Trainer that measures with ``measure`` instead of the loss on an evaluation set."""

    def __init__(
        self,
        model: nn.Module,
        arguments: TrainingArguments,
        examples: Examples,
        collator: Collator,
        measure: Measure | None,
        callbacks: list[TrainerCallback],
    ) -> None:
        self.control: TrainerControl
        self.measure = measure
        self.spread_model = model
        self.is_float16_on_cpu = arguments.use_cpu and any(p.dtype == torch.float16 for p in model.parameters())
        arguments.ddp_find_unused_parameters = _may_skip_layers(model)
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=examples,
            eval_dataset=examples if measure else None,  # never read; the Trainer insists on one
            data_collator=collator,
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)
        # the Trainer goes by the signature alone: classifiers take the number of items, and make no use of it
        self.task_name = examples.task
        self.sums_tokens = self.model_accepts_loss_kwargs and task(examples.task).is_causal
        self.loss_is_scaled_for_ga = True  # by the model, or in compute_loss

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if is_spread() and self.args.world_size > 1:
            spread_here(self.accelerator, self.spread_model)
            self.is_fsdp_enabled = True

    def get_train_dataloader(self) -> DataLoader:
        if self.args.world_size == 1:
            return super().get_train_dataloader()
        order = self._get_train_sampler(self.train_dataset)
        loader: Any = DataLoader(
            Shared(self.train_dataset),
            batch_sampler=Shares(order, self.args.per_device_train_batch_size, self.args.world_size),
            collate_fn=partial(collated, self.data_collator, by_token=self.sums_tokens),
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> Any:
        # accelerate puts autocast around the forward pass itself, but not with FSDP2, nor in float16 on the CPU
        if self.is_fsdp_enabled:
            return self.accelerator.autocast()
        return torch.autocast("cpu", torch.float16) if self.is_float16_on_cpu else nullcontext()

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Any:
        if self.sums_tokens or not batch_samples:
            return super()._get_num_items_in_batch(batch_samples, device)
        counted = torch.stack([self._counted(batch) for batch in batch_samples]).sum().to(device)
        return self.accelerator.gather(counted.reshape(1)).sum() if self.args.world_size > 1 else counted

    def _counted(self, batch: dict[str, Any]) -> Tensor:
        """What a batch, or a share of it, counts in the mean over the step: see :func:`loftq.finetune.processes.counted`."""
        return batch["counted"] if "counted" in batch else counted(batch, self.task_name)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self.sums_tokens or num_items_in_batch is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # a mean over this batch, weighted by what it is of all batches of the step; the processes' gradients are averaged
        weight = self._counted(inputs) * self.args.world_size / num_items_in_batch
        inputs.pop("counted", None)
        found = super().compute_loss(model, inputs, return_outputs, None)
        return (found[0] * weight, found[1]) if return_outputs else found * weight

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        # autocast takes each product's input to half precision: PEFT's own cast to the adapter's float32 before it, and
        # that of its gradient, change nothing but the time, a tenth of the step on a CPU
        with disable_input_dtype_casting(model, active=self.args.bf16 or self.args.fp16 or self.is_float16_on_cpu):
            return super().training_step(model, *args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with writing(Path(self.args.output_dir).parent):
            super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with writing(Path(self.args.output_dir).parent):
            super()._load_from_checkpoint(*args, **kwargs)

    def _load_best_model(self) -> None:
        with writing(Path(self.args.output_dir).parent):
            super()._load_best_model()

    def whole_weights(self) -> dict[str, Tensor] | None:
        """The model's, where FSDP has spread them over the processes; all must call."""
        return self.accelerator.get_state_dict(self.model) if self.is_fsdp_enabled else None

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # a run that was interrupted after its last step, or after the measurement that ended it, has nothing left to train
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        assert self.measure is not None
        started = time.perf_counter()
        found = {f"{metric_key_prefix}_{name}": value for name, value in self.measure(self.model).items()}
        best = self.args.metric_for_best_model
        if best is not None and not math.isfinite(found.get(best, math.nan)):
            # undefined, as the correlation of a constant: worse than any number
            found[best] = -math.inf if self.args.greater_is_better else math.inf
        found[f"{metric_key_prefix}_runtime"] = round(time.perf_counter() - started, 3)
        self.log(dict(found))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found


def _may_skip_layers(model: Any) -> bool:
    """Whether a batch may leave parameters without a gradient: looking for them costs a pass over the graph each step."""
    names = (
        "layerdrop",
        "encoder_layerdrop",
        "decoder_layerdrop",
        "num_experts",
        "num_local_experts",
        "n_routed_experts",
    )
    return any(getattr(model.config, name, None) for name in names)


def total_steps(trainer: TaskTrainer, settings: TrainSettings) -> int:
    """Optimizer steps of a run."""
    if settings.max_steps is not None:
        return settings.max_steps
    batches = len(trainer.get_train_dataloader())
    return max(1, int(settings.epochs * -(-batches // settings.gradient_accumulation)))


@contextmanager
def enough_memory() -> Iterator[None]:
    """A :class:`ConfigError` where memory does not suffice, as far as it is torch that finds out."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "can't allocate memory" not in str(error):
            raise
        raise ConfigError(
            f"training ran out of memory ({first_line(error)}); lower --batch-size and raise --gradient-accumulation, use "
            f"--gradient-checkpointing or a smaller --max-length, and start over with --no-resume"
        ) from None


@contextmanager
def as_loaded(model: nn.Module) -> Iterator[None]:
    """The model without the autocast that the Trainer puts around its forward pass, as it is measured before and after."""
    patched = vars(model).pop("forward", None) if hasattr(model, "_original_forward") else None
    try:
        yield
    finally:
        if patched is not None:
            vars(model)["forward"] = patched
