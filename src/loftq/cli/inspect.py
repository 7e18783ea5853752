"""``loftq inspect``"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loftq.cli import counts, options, parse
from loftq.cli.quiet import quiet_transformers

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from loftq.config import LoftQConfig
    from loftq.plan.targets import ModulePlan
    from loftq.report.memory.footprint import Footprint


def inspect(
    context: typer.Context,
    folder: Annotated[Path | None, typer.Argument(help="Folder that `loftq quantize` has written.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Also read all weights and compare their hashes.")] = False,
    memory: Annotated[
        bool, typer.Option("--memory", help="Show what the folder takes, and training, instead of its modules.")
    ] = False,
    config: Annotated[
        str | None,
        typer.Option(
            help="Predict the same without weights: config.json, folder, .gguf file or hub id of a full-precision model."
        ),
    ] = None,
    bits: Annotated[int | None, typer.Option(help="As for `loftq quantize`.", show_default="4")] = None,
    rank: Annotated[int | None, typer.Option("--rank", "-r", help="Rank of the adapter.", show_default="16")] = None,
    codebook: options.Codebook = None,
    block_size: Annotated[int | None, typer.Option(help="Weights that share a scale.", show_default="64")] = None,
    scale_dtype: options.ScaleDtype = None,
    double_quant: options.DoubleQuant = False,
    published: options.Published = False,
    target_modules: options.TargetModules = None,
    exclude_modules: options.ExcludeModules = None,
    bits_pattern: options.BitsPattern = None,
    rank_pattern: options.RankPattern = None,
    first_layers_bits: options.FirstLayersBits = None,
    quantize_embeddings: options.QuantizeEmbeddings = False,
    plan: options.PlanFile = None,
    adapter_dtype: Annotated[
        str | None, typer.Option(help="Dtype that the adapters are stored in.", show_default="float32")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Of weights that are not packed, and of training.", show_default="the config's, or float32"),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences of a training step.", show_default="8")] = None,
    length: Annotated[
        int | None, typer.Option(help="Tokens of a training sequence.", show_default="512 or the model's limit")
    ] = None,
    gradient_checkpointing: options.GradientCheckpointing = False,
    device: Annotated[str | None, typer.Option(help="Train on: cuda or cpu.", show_default="cuda")] = None,
    revision: options.Revision = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Show what a quantized folder holds, or what one would hold: bits, rank, bytes and error, and memory of training."""
    quantizer = {
        "bits": bits,
        "rank": rank,
        "codebook": codebook,
        "block_size": block_size,
        "scale_dtype": scale_dtype,
        "double_quant": double_quant,
        "published": published,
        "target_modules": target_modules,
        "exclude_modules": exclude_modules,
        "bits_pattern": bits_pattern,
        "rank_pattern": rank_pattern,
        "first_layers_bits": first_layers_bits,
        "quantize_embeddings": quantize_embeddings,
        "plan": None if plan is None else str(plan),
        "adapter_dtype": adapter_dtype,
        "revision": revision,
    }
    given = {name: value for name, value in quantizer.items() if value is not None and value is not False}
    if (folder is None) == (config is None):
        raise typer.BadParameter("give a quantized folder, or --config for a model that is not quantized")
    uses = [counts.FOLDER] if config is None else [counts.CONFIG]
    counts.refuse_strays(context, *uses, *([counts.MEMORY] if memory else []))
    if folder is not None and not memory:
        _show_report(folder, check, json_output)
        return
    quiet_transformers()
    if folder is not None:
        checked = _check_hashes(folder) if check else {}
        footprint, model, settings, plans = _of_folder(folder)
    else:
        assert config is not None
        checked = {}
        footprint, model, settings, plans = _of_config(config, given, dtype)
    from loftq.finetune.settings import TrainSettings
    from loftq.report.memory.training import LENGTH, TrainingSetup, position_limit, predict_methods

    setup = TrainingSetup(
        batch_size=TrainSettings.batch_size if batch_size is None else batch_size,
        length=min(LENGTH, position_limit(model) or LENGTH) if length is None else length,
        dtype=dtype,
        checkpointing=gradient_checkpointing,
        device="cuda" if device is None else device,
    )
    training, problem = predict_methods(model, settings, setup, plans)
    if json_output:
        from loftq.report.tables import print_json

        about = {"folder": str(folder)} if folder is not None else {"config": config, "options": given}
        predicted = {m.setup.method: m.to_dict() for m in training}
        print_json(
            {**about, **checked, "memory": footprint.to_dict(), "training": predicted, "training_problem": problem}
        )
        return
    from loftq.report.memory.tables import print_footprint, print_training

    _print_checked(checked)
    print_footprint(footprint)
    if training:
        print_training(training)
    if problem is not None:
        typer.echo(f"no training memory of {problem}")


def _show_report(folder: Path, check: bool, json_output: bool) -> None:
    from loftq.report.record import QuantizationReport
    from loftq.report.tables import print_json, print_report

    report = QuantizationReport.load(folder)
    checked = _check_hashes(folder) if check else {}
    if json_output:
        print_json({**report.to_dict(), **checked})
    else:
        print_report(report, folder)
        _print_checked(checked)


def _print_checked(checked: dict[str, Any]) -> None:
    if checked:
        weights, adapter = (digest[:12] for digest in checked["checked"].values())
        typer.echo(
            f"checked: all weights were read, and their hash ({weights}…) and the fitted adapter's ({adapter}…) are those in "
            f"the report"
        )


def _check_hashes(folder: Path) -> dict[str, Any]:
    """For the output: the hashes that were computed and are those in the report.

    Raises:
        BackboneMismatchError: they are others.
    """
    from loftq.errors import BackboneMismatchError
    from loftq.hub.backbone import adapter_sha256, backbone_sha256
    from loftq.report.record import QuantizationReport

    report = QuantizationReport.load(folder)
    found = {"backbone_sha256": backbone_sha256(folder), "adapter_sha256": adapter_sha256(folder)}
    for what, (name, actual) in zip(("weights", "fitted adapter"), found.items(), strict=True):
        recorded = getattr(report, name)
        if actual != recorded:
            raise BackboneMismatchError(
                f"the {what} in {folder} have hash {actual[:12]}…, but the report says {recorded[:12]}…; they were "
                f"changed or damaged, quantize again"
            )
    return {"checked": found}


def _of_folder(folder: Path) -> tuple[Footprint, PretrainedConfig, LoftQConfig, dict[str, ModulePlan] | None]:
    from loftq.config import LoftQConfig
    from loftq.report.memory.measure import folder_config, measure_footprint
    from loftq.report.memory.training import folder_plans
    from loftq.report.record import QuantizationReport

    settings = LoftQConfig.from_dict(QuantizationReport.load(folder).config)
    return measure_footprint(folder), folder_config(folder), settings, folder_plans(folder)


def _of_config(
    source: str, given: dict[str, Any], dtype: str | None
) -> tuple[Footprint, PretrainedConfig, LoftQConfig, dict[str, ModulePlan] | None]:
    from loftq.checkpoint.source import open_config
    from loftq.config import LoftQConfig
    from loftq.report.memory.predict import predict_footprint

    options = dict(given)
    published, codebook = options.pop("published", False), options.pop("codebook", None)
    fields = parse.quantizer(published, codebook, None, options.pop("scale_dtype", None))
    adapter_dtype, revision = options.pop("adapter_dtype", "float32"), options.pop("revision", None)
    parsers: dict[str, Callable[[Any], Any]] = {
        "target_modules": lambda values: parse.module_patterns(values) or (),
        "exclude_modules": parse.module_patterns,
        "bits_pattern": lambda values: parse.int_patterns("--bits-pattern", values),
        "rank_pattern": lambda values: parse.int_patterns("--rank-pattern", values),
        "first_layers_bits": parse.first_layers,
    }
    settings = LoftQConfig(**fields, **{k: parsers[k](v) if k in parsers else v for k, v in options.items()})
    model = open_config(source, revision)
    return predict_footprint(model, settings, dtype=dtype, adapter_dtype=adapter_dtype), model, settings, None
