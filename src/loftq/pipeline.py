"""A whole model: from a source checkpoint to a finished folder, or in place for a live model."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from loftq.calibrate.choose import calibrated
from loftq.checkpoint.assembly import Parameters
from loftq.checkpoint.naming import meta_model, unread_tensors
from loftq.checkpoint.source import INDEX, SINGLE, Source, open_source, sha256_file
from loftq.checkpoint.writer import Staging, check_target, disk_errors, remove_leftovers
from loftq.codec import QuantizedTensor
from loftq.codec.blockwise import check_weight
from loftq.config import LoftQConfig
from loftq.engine.jobs import Computed, check_engine, open_engine, run_all
from loftq.errors import OutputError, WeightError
from loftq.hub import adapter as adapters
from loftq.modules import QuantEmbedding, QuantExperts, QuantLinear
from loftq.plan.file import load_plan
from loftq.plan.targets import ModulePlan, plan_modules
from loftq.report.record import REPORT, ModuleRecord, QuantizationReport
from loftq.report.system import PeakMemory, versions
from loftq.units import Unit, adapter_state, decompose_matrices, layout, make_units

if TYPE_CHECKING:
    from peft import PeftModel

    from loftq.calibrate.statistics import Statistics

MAX_SHARD_BYTES = 50_000_000_000  # transformers' own default, so that saving a loaded model splits it alike


class Progress(Protocol):
    """Called with the number of weights done since the last call, from the thread that writes."""

    def __call__(self, name: str, weights: int) -> None: ...


def quantize_checkpoint(
    source: str | Path | Source,
    out_dir: str | Path,
    config: LoftQConfig,
    *,
    resume: bool = True,
    progress: bool | Progress = True,
    revision: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    command: str | None = None,
    statistics: Statistics | str | Path | None = None,
    notice: Callable[[str], None] | None = None,
    engine: str = "local",
    address: str | None = None,
    device: str = "cpu",
) -> QuantizationReport:
    """Turn a checkpoint into a folder with a packed backbone and a PEFT adapter, one tensor at a time.

    Args:
        source: folder with safetensors, ``.gguf`` file, or hub id.
        out_dir: created; must be absent or empty. It appears complete or not at all: until then everything is in
            ``OUT_DIR.incomplete`` beside it.
        config: what to do.
        resume: continue an interrupted run with the same settings; otherwise start over.
        progress: a bar on a terminal, a plain line now and then elsewhere; or a callable ``(name, weights)``.
        revision: of a hub id.
        max_shard_bytes: largest weight file.
        command: recorded in the report.
        statistics: of the layers' inputs, collected earlier, or the file they are in; otherwise ``config.calibration``
            says what to collect them on.
        notice: told in one sentence what was chosen where the config leaves it open.
        engine: ``local``, or ``ray`` for the workers of a Ray cluster. The output is the same to the byte, and either
            continues what the other has begun.
        address: of the Ray cluster (``auto``: the one that runs on this machine). By default ``RAY_ADDRESS``, or workers on
            this machine for as long as this call takes.
        device: ``cpu``, or a GPU by torch's name, ``cuda``: where matrices are decomposed. Calibration runs on the CPU. On
            another device the last bits are others.

    Raises:
        SourceError, ConfigError, WeightError, OutputError, ClusterError: each with what was got, expected, and to be done.
    """
    out_dir = Path(os.path.expanduser(out_dir))
    where = check_engine(engine, address, device)
    told = notice or _silent
    with disk_errors(out_dir):  # before hours of work, and before the source is read
        finished = (out_dir / REPORT).exists()
        if not finished:
            check_target(out_dir)
    opened = open_source(source, revision) if isinstance(source, (str, Path)) else source
    model_config = opened.config()
    model = meta_model(model_config)
    plans = plan_modules(model, config)
    parameters = Parameters(opened, model)
    units = make_units(opened, model, plans, parameters)
    unread = unread_tensors(model, [unit.source_name for unit in units if not unit.known])
    if unread:
        told(
            f"{opened.path} holds tensors that are no weights of the {type(model).__name__} in its config.json ({unread[0]}; "
            f"{len(unread)} in all); they are copied as they are"
        )
    hashes = {file.name: sha256_file(file) for file in opened.files}
    if config.plan is not None:
        load_plan(config.plan).check_source(hashes)
    # a folder that is finished is compared with what would be computed now, and nothing is
    inputs = calibrated(opened, model, plans, config, hashes, statistics, _silent if finished else told)
    config = config.replace(method=inputs.method)
    fingerprint = json.loads(
        json.dumps(
            {
                "config": config.to_dict(),
                "source": hashes,
                "calibration": inputs.summary,
                "plan": {n: [p.spec.bits, p.spec.block_size, p.rank] for n, p in plans.items()}
                if config.plan
                else None,
                "format": versions()["loftq"],
            }
        )
    )

    files, index = layout(units, plans, max_shard_bytes)
    if finished:
        report = QuantizationReport.load(out_dir)
        same = (report.config, report.source["sha256"]) == (fingerprint["config"], hashes)
        same = same and report.calibration == fingerprint["calibration"]
        # a plan's file may have changed under the same name
        chosen = {n: (p.spec.bits, p.spec.block_size, p.rank) for n, p in plans.items()}
        same = same and chosen == {m.name: (m.bits, m.block_size, m.rank) for m in report.modules}
        needed = [*files, "config.json", f"{adapters.INIT_DIR}/{adapters.ADAPTER_CONFIG}"]
        if resume and same and all((out_dir / file).exists() for file in needed):
            remove_leftovers(out_dir)
            told(f"{out_dir} is finished already, with these settings; nothing was computed")
            return report
        raise OutputError(
            f"{out_dir} holds a finished quantization{'' if same else ' with other settings or of another source'}, which "
            f"is never overwritten; choose another folder or remove it"
        )

    staging = Staging(out_dir, fingerprint, files, resume)
    memory = PeakMemory().start()
    started = time.perf_counter()
    seconds: dict[str, float] = {}
    try:
        weights = {u.name: u.weights for u in units}
        with (
            open_engine(engine, opened, parameters, config, address, told, where) as opened_engine,
            _reporter(progress, weights, staging.done) as advance,
        ):

            def write(unit: Unit, computed: Computed) -> dict[str, Tensor]:
                (tensors, record), took = computed
                staging.write_unit(unit.name, {index[n]: t for n, t in tensors.items()}, record)
                seconds[unit.name] = round(took, 4)
                advance(unit.name, unit.weights)
                return tensors

            run_all(opened_engine, units, config, inputs, staging, index, write)
        records = [ModuleRecord(**staging.done[name]["record"]) for name in plans]
        report = QuantizationReport(
            modules=records,
            other_bytes=sum(u.nbytes for u in units if u.plan is None),
            config=fingerprint["config"],
            source={"name": str(opened.path), "sha256": hashes},
            backbone_sha256=_digest(staging.digests(), adapter=False),
            adapter_sha256=_digest(staging.digests(), adapter=True),
            versions=versions(),
            command=command,
            calibration=fingerprint["calibration"],
            timing={
                "seconds": round(time.perf_counter() - started, 3),
                "peak_memory_bytes": memory.peak(),
                "modules": seconds,
            },
        )
        with disk_errors(out_dir):
            _write_metadata(staging.path, opened, model, model_config, plans, config, report, index, out_dir)
        staging.finish()
    finally:
        staging.close()
    return report


def _silent(sentence: str) -> None:
    """Where nobody wants to be told."""


def _digest(digests: Mapping[str, str], *, adapter: bool) -> str:
    from loftq.hub.backbone import combine_digests

    named = {k.partition(":")[2]: d for k, d in digests.items() if k.startswith(adapters.INIT_DIR) is adapter}
    return combine_digests(named)


def _write_metadata(
    folder: Path,
    source: Source,
    model: nn.Module,
    model_config: Any,
    plans: Mapping[str, ModulePlan],
    config: LoftQConfig,
    report: QuantizationReport,
    index: Mapping[str, str],
    out_dir: Path,
) -> None:
    """Everything but the weights. The model's config comes last: without it the folder loads nowhere."""
    from loftq.hub.quantizer import LoftQQuantizationConfig

    (folder / "config.json").unlink(missing_ok=True)
    source.save_extras(folder)
    backbone = {n: key.partition(":")[0] for n, key in index.items() if not key.startswith(adapters.INIT_DIR)}
    if set(backbone.values()) != {SINGLE}:
        total = report.weight_bytes + report.other_bytes
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(backbone.items()))}, indent=2)
        (folder / INDEX).write_text(text + "\n", encoding="utf-8")
    lora = adapters.lora_config(plans, model, config, base=str(out_dir))
    adapters.save_adapter_config(lora, folder / adapters.INIT_DIR, model, report.backbone_sha256)
    report.save(folder)
    specs = {name: plan.spec for name, plan in plans.items()}
    model_config.quantization_config = LoftQQuantizationConfig.for_specs(config.spec, specs).to_dict()
    model_config.save_pretrained(folder)


def quantize_model(
    model: nn.Module,
    config: LoftQConfig,
    *,
    statistics: Statistics | None = None,
    progress: bool | Progress = True,
) -> PeftModel:
    """Quantize a live transformers model in place and wrap it with its fitted adapter.

    Every selected layer is replaced by a packed one, one at a time, on the device where it is; the dense weight is freed
    as its layer goes. The adapter is trainable.

    Args:
        model: a transformers model (any ``nn.Module`` that PEFT accepts).
        config: what to do. Its calibration text is not read, since a live model has no tokenizer.
        statistics: of the layers' inputs, from :func:`loftq.calibrate.collect_from_model`; without them, and for layers
            that they leave out, only the weight error counts.
        progress: as for :func:`quantize_checkpoint`.

    Raises:
        ConfigError, WeightError: see :func:`quantize_checkpoint`. All weights are checked first.
    """
    from peft import get_peft_model, set_peft_model_state_dict

    from loftq.hub.quantizer import (
        LoftQQuantizationConfig,
        present_for_dtype_checks,
        replace_module,
        save_experts_whole,
    )

    plans = plan_modules(model, config)
    for plan in plans.values():
        try:
            for matrix in _live_matrices(model, plan):
                check_weight(matrix())
        except WeightError as error:  # before anything is replaced
            raise WeightError(f"{plan.name}: {error}") from None
    lora = adapters.lora_config(plans, model, config)
    adapters.know_experts(model)
    state: dict[str, Tensor] = {}
    experts: dict[str, dict[str, list[QuantizedTensor]]] = {}
    with _reporter(progress, {name: plan.numel for name, plan in plans.items()}) as advance:
        for name, plan in plans.items():
            known = statistics.of_module(plan) if statistics is not None else None
            results, _ = decompose_matrices(_live_matrices(model, plan), plan, config, known)
            state.update(adapter_state(plan, results))
            if plan.experts:
                owner, _, leaf = name.rpartition(".")
                experts.setdefault(owner, {})[leaf] = [result.quantized for result in results]
                if not plan.nested:  # the last parameter of its module
                    dense = model.get_submodule(owner)
                    replace_module(model, owner, QuantExperts.from_quantized(dense, experts.pop(owner)))
            else:
                replace_module(model, name, _packed(model.get_submodule(name), results[0].quantized, plan))
            advance(name, plan.numel)
    save_experts_whole(model)
    present_for_dtype_checks(model)
    if hasattr(model, "config"):
        specs = {name: plan.spec for name, plan in plans.items()}
        model.config.quantization_config = LoftQQuantizationConfig.for_specs(config.spec, specs)  # type: ignore[union-attr]
        model.is_quantized = True  # type: ignore[assignment]
        model.quantization_method = "loftq"  # type: ignore[assignment]
    lora.inference_mode = False
    peft_model = get_peft_model(model, lora)
    set_peft_model_state_dict(peft_model, state)
    return peft_model


def _live_matrices(model: nn.Module, plan: ModulePlan) -> list[Callable[[], Tensor]]:
    """Give the weight of a module, or of each expert, as the module holds it."""
    owner, _, leaf = plan.parameter.rpartition(".")
    weight: Tensor = getattr(model.get_submodule(owner), leaf).detach()
    return [partial(weight.__getitem__, e) for e in range(plan.experts)] if plan.experts else [lambda: weight]


def _packed(module: nn.Module, quantized: QuantizedTensor, plan: ModulePlan) -> nn.Module:
    """The packed layer that takes the place of a dense one."""
    if isinstance(module, nn.Embedding):
        dtype = module.weight.dtype
        return QuantEmbedding.from_quantized(quantized, padding_idx=module.padding_idx, dtype=dtype)
    packed = QuantLinear.from_quantized(quantized, module.bias)  # type: ignore[arg-type]
    packed.was_conv1d = plan.kind == "conv1d"
    return packed


@contextmanager
def _reporter(
    progress: bool | Progress, weights: Mapping[str, int], done: Collection[str] = ()
) -> Iterator[Callable[[str, int], None]]:
    known = {name: weights[name] for name in weights if name in done}
    if callable(progress):
        for name, count in known.items():
            progress(name, count)
        yield progress
    else:
        from loftq.report.progress import bar

        with bar(sum(weights.values()), done=sum(known.values()), show=progress) as advance:
            yield advance
