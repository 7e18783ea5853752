"""``loftq quantize``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loftq.cli import options, parse
from loftq.config import BITS, ENGINES, METHODS, SVDS, LoftQConfig

_DEFAULT = LoftQConfig()


def quantize(
    model: options.Source,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder to create; absent, empty, or an earlier run to continue.")
    ],
    bits: Annotated[int, typer.Option(help=f"Bits per weight: {options.choices(BITS)}.")] = _DEFAULT.bits,
    rank: Annotated[int, typer.Option("--rank", "-r", help="Rank of the adapter.")] = _DEFAULT.rank,
    iters: Annotated[
        int,
        typer.Option(
            "--iters", "--iter", help="Alternations T; 0 fits no adapter. QLoRA is `--method qlora --published`."
        ),
    ] = _DEFAULT.num_iter,
    lora_alpha: Annotated[
        float | None, typer.Option(help="LoRA alpha.", show_default="the rank", rich_help_panel=options.ADAPTER)
    ] = None,
    use_rslora: Annotated[
        bool, typer.Option(help="Scale by alpha / sqrt(r).", rich_help_panel=options.ADAPTER)
    ] = False,
    lora_dropout: Annotated[
        float, typer.Option(help="Dropout that fine-tuning will use.", rich_help_panel=options.ADAPTER)
    ] = 0.0,
    method: Annotated[
        str | None,
        typer.Option(
            help=f"{options.choices(METHODS)}.",
            show_default="loftq-data with a text, from 3 bits on loftq-data-zero; loftq without",
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="Text whose inputs decide which errors matter: a UTF-8 or JSONL file, a hub dataset, pydoc, or self.",
            show_default="pydoc for causal language models",
            rich_help_panel=options.CALIBRATION,
        ),
    ] = None,
    calibration_samples: options.CalibrationSamples = 128,
    calibration_length: options.CalibrationLength = 512,
    calibration_gradients: options.CalibrationGradients = 32,
    no_calibration: options.NoCalibration = False,
    statistics: options.Statistics = None,
    propagate: Annotated[
        bool,
        typer.Option(
            "--propagate",
            help="Calibrate each layer behind the quantized layers before it.",
            rich_help_panel=options.CALIBRATION,
        ),
    ] = False,
    damping: options.Damping = None,
    plan: options.PlanFile = None,
    svd: Annotated[
        str, typer.Option(help=f"Truncated SVD: {options.choices(SVDS)}.", rich_help_panel=options.QUANTIZER)
    ] = _DEFAULT.svd,
    codebook: options.Codebook = None,
    block_size: options.BlockSize = _DEFAULT.block_size,
    scale: options.Scale = None,
    scale_dtype: options.ScaleDtype = None,
    double_quant: options.DoubleQuant = False,
    published: options.Published = False,
    target_modules: options.TargetModules = None,
    exclude_modules: options.ExcludeModules = None,
    bits_pattern: options.BitsPattern = None,
    rank_pattern: options.RankPattern = None,
    first_layers_bits: options.FirstLayersBits = None,
    quantize_embeddings: options.QuantizeEmbeddings = False,
    seed: options.Seed = 0,
    engine: Annotated[
        str,
        typer.Option(
            help=f"Who computes: {options.choices(ENGINES)}, the workers of a Ray cluster.",
            rich_help_panel=options.RUNNING,
        ),
    ] = "local",
    address: Annotated[
        str | None,
        typer.Option(
            help="Of the Ray cluster; auto for the one on this machine.",
            show_default="RAY_ADDRESS, or workers on this machine",
            rich_help_panel=options.RUNNING,
        ),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            help="Decompose matrices on: cpu, or cuda. Calibration runs on the CPU.", rich_help_panel=options.RUNNING
        ),
    ] = "cpu",
    resume: Annotated[bool, typer.Option(help="Continue an interrupted run.", rich_help_panel=options.RUNNING)] = True,
    revision: options.Revision = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file.", rich_help_panel=options.RUNNING)] = "50GB",
    json_output: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Turn a checkpoint into a packed k-bit backbone and a PEFT adapter, one tensor at a time."""
    config = LoftQConfig(
        bits=bits,
        rank=rank,
        num_iter=iters,
        lora_alpha=lora_alpha,
        use_rslora=use_rslora,
        lora_dropout=lora_dropout,
        method=method,
        svd=svd,
        block_size=block_size,
        double_quant=double_quant,
        target_modules=parse.module_patterns(["all-linear"] if target_modules is None else target_modules) or (),
        exclude_modules=parse.module_patterns(exclude_modules),
        bits_pattern=parse.int_patterns("--bits-pattern", bits_pattern),
        rank_pattern=parse.int_patterns("--rank-pattern", rank_pattern),
        first_layers_bits=parse.first_layers(first_layers_bits),
        quantize_embeddings=quantize_embeddings,
        calibration=parse.calibration_text(calibration, statistics, no_calibration),
        calibration_samples=calibration_samples,
        calibration_length=calibration_length,
        calibration_gradients=calibration_gradients,
        propagate=propagate,
        damping=damping,
        plan=None if plan is None else str(plan),
        seed=seed,
        **parse.quantizer(published, codebook, scale, scale_dtype),
    )
    shard_bytes = parse.byte_size("--max-shard-size", max_shard_size)

    from loftq.pipeline import quantize_checkpoint
    from loftq.report.tables import print_json, print_report

    report = quantize_checkpoint(
        model,
        out,
        config,
        resume=resume,
        revision=revision,
        max_shard_bytes=shard_bytes,
        command=parse.this_command(),
        statistics=statistics,
        notice=lambda sentence: typer.echo(f"loftq: {sentence}", err=True),
        engine=engine,
        address=address,
        device=device,
    )
    if json_output:
        print_json(report.to_dict())
    else:
        print_report(report, out, modules=False)
