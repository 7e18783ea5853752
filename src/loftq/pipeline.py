"""A whole model, from a source checkpoint to a finished folder. :mod:`loftq.live` does the same for a live one."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from loftq.calibrate.choose import calibrated
from loftq.checkpoint.assembly import Parameters
from loftq.checkpoint.naming import meta_model, unread_tensors
from loftq.checkpoint.source import INDEX, SINGLE, Source, open_source, sha256_file
from loftq.checkpoint.writer import Staging, check_target, disk_errors, remove_leftovers
from loftq.config import LoftQConfig
from loftq.engine.jobs import Computed, check_engine, open_engine, run_all
from loftq.errors import OutputError
from loftq.hub import adapter as adapters
from loftq.plan.file import load_plan
from loftq.plan.targets import plan_modules
from loftq.report.record import REPORT, ModuleRecord, QuantizationReport
from loftq.report.system import PeakMemory, versions
from loftq.units import Unit, layout, make_units

if TYPE_CHECKING:
    from peft import LoraConfig

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
    from loftq.hub.quantizer import LoftQQuantizationConfig

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
            reporter(progress, weights, staging.done) as advance,
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
            backbone_sha256=digest_of(staging.digests(), adapter=False),
            adapter_sha256=digest_of(staging.digests(), adapter=True),
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
            opened.save_extras(staging.path)
            specs = {name: plan.spec for name, plan in plans.items()}
            model_config.quantization_config = LoftQQuantizationConfig.for_specs(config.spec, specs).to_dict()
            lora = adapters.lora_config(plans, model, config, base=str(out_dir))
            write_metadata(staging.path, model, model_config, lora, report, index)
        staging.finish()
    finally:
        staging.close()
    return report


def _silent(sentence: str) -> None:
    """Where nobody wants to be told."""


def digest_of(digests: Mapping[str, str], *, adapter: bool) -> str:
    """The hash of the backbone, or of the adapter, from those of its tensors as :meth:`Staging.digests` gives them."""
    from loftq.hub.backbone import combine_digests

    named = {k.partition(":")[2]: d for k, d in digests.items() if k.startswith(adapters.INIT_DIR) is adapter}
    return combine_digests(named)


def write_metadata(
    folder: Path,
    model: nn.Module,
    model_config: Any,
    lora: LoraConfig,
    report: QuantizationReport,
    index: Mapping[str, str],
) -> None:
    """The index, the adapter's config, the report and the model's config, which comes last: without it the folder loads
    nowhere.

    Args:
        model_config: with its ``quantization_config``. index: tensor name -> ``file:name``, see :func:`layout`.
    """
    backbone = {n: key.partition(":")[0] for n, key in index.items() if not key.startswith(adapters.INIT_DIR)}
    if set(backbone.values()) != {SINGLE}:
        total = report.weight_bytes + report.other_bytes
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(backbone.items()))}, indent=2)
        (folder / INDEX).write_text(text + "\n", encoding="utf-8")
    adapters.save_adapter_config(lora, folder / adapters.INIT_DIR, model, report.backbone_sha256)
    report.save(folder)
    model_config.save_pretrained(folder)


@contextmanager
def reporter(
    progress: bool | Progress, weights: Mapping[str, int], done: Collection[str] = ()
) -> Iterator[Callable[[str, int], None]]:
    """What is told of each unit as it is done; of those that are done already at once."""
    known = {name: weights[name] for name in weights if name in done}
    if callable(progress):
        for name, count in known.items():
            progress(name, count)
        yield progress
    else:
        from loftq.report.progress import bar

        with bar(sum(weights.values()), done=sum(known.values()), show=progress) as advance:
            yield advance
