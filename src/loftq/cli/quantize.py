"""``loftq quantize``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loftq.cli import parse
from loftq.config import BITS, BLOCK_SIZES, CODEBOOKS, METHODS, SCALE_DTYPES, SCALES, SVDS, LoftQConfig

_DEFAULT = LoftQConfig()


def _choices(values: tuple[object, ...]) -> str:
    return ", ".join(map(str, values))


def quantize(
    model: Annotated[str, typer.Argument(help="Folder with safetensors, .gguf file, or hub id.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder to create; absent, empty, or an earlier run to continue.")
    ],
    bits: Annotated[int, typer.Option(help=f"Bits per weight: {_choices(BITS)}.")] = _DEFAULT.bits,
    rank: Annotated[int, typer.Option("--rank", "-r", help="Rank of the adapter.")] = _DEFAULT.rank,
    iters: Annotated[
        int, typer.Option("--iters", "--iter", help="Alternations T; 0 is plain quantization (QLoRA).")
    ] = _DEFAULT.num_iter,
    lora_alpha: Annotated[float | None, typer.Option(help="LoRA alpha.", show_default="the rank")] = None,
    use_rslora: Annotated[bool, typer.Option(help="Scale by alpha / sqrt(r).")] = False,
    lora_dropout: Annotated[float, typer.Option(help="Dropout that fine-tuning will use.")] = 0.0,
    method: Annotated[
        str | None,
        typer.Option(help=f"{_choices(METHODS)}.", show_default="loftq-data with a calibration text, loftq without"),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="Text whose inputs decide which errors matter: a UTF-8 or JSONL file, a hub dataset, pydoc, or self.",
            show_default="pydoc for causal language models",
        ),
    ] = None,
    calibration_samples: Annotated[int, typer.Option(help="Windows of calibration text.")] = 128,
    calibration_length: Annotated[int, typer.Option(help="Tokens of a window.")] = 512,
    calibration_gradients: Annotated[
        int, typer.Option(help="Windows to run a backward pass on: what errors do to the model's loss; 0 for none.")
    ] = 32,
    no_calibration: Annotated[
        bool, typer.Option("--no-calibration", help="Weight-only: every error of a weight counts alike.")
    ] = False,
    statistics: Annotated[
        Path | None, typer.Option(help="File of `loftq calibrate`: statistics of the inputs, instead of a text.")
    ] = None,
    propagate: Annotated[
        bool, typer.Option("--propagate", help="Calibrate each layer behind the quantized layers before it.")
    ] = False,
    damping: Annotated[
        float | None,
        typer.Option(help="From 0, only outputs count, to 1, only weights count.", show_default="the method's own"),
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(help="File of `loftq plan`: bits, block size and rank of every module.")
    ] = None,
    svd: Annotated[str, typer.Option(help=f"Truncated SVD: {_choices(SVDS)}.")] = _DEFAULT.svd,
    codebook: Annotated[str | None, typer.Option(help=f"{_choices(CODEBOOKS)}.", show_default="lloyd")] = None,
    block_size: Annotated[int, typer.Option(help=f"Weights that share a scale: {_choices(BLOCK_SIZES)}.")] = 64,
    scale: Annotated[str | None, typer.Option(help=f"{_choices(SCALES)}.", show_default="search")] = None,
    scale_dtype: Annotated[str | None, typer.Option(help=f"{_choices(SCALE_DTYPES)}.", show_default="float16")] = None,
    double_quant: Annotated[bool, typer.Option(help="Store scales in 8 bits.")] = False,
    published: Annotated[
        bool, typer.Option("--published", help="The papers' quantizer: nf, absmax, float32 scales.")
    ] = False,
    target_modules: Annotated[
        list[str] | None,
        typer.Option(
            help="all-linear, names (repeatable or with commas), or a regular expression, as in PEFT.",
            show_default="all-linear",
        ),
    ] = None,
    exclude_modules: Annotated[
        list[str] | None, typer.Option(help="Names (repeatable or with commas), or a regular expression.")
    ] = None,
    bits_pattern: Annotated[list[str] | None, typer.Option(help="PATTERN=BITS, repeatable.")] = None,
    rank_pattern: Annotated[list[str] | None, typer.Option(help="PATTERN=RANK, repeatable.")] = None,
    first_layers_bits: Annotated[
        str | None, typer.Option(help="LAYERS:BITS, the paper's mixed precision, e.g. 16:4.")
    ] = None,
    quantize_embeddings: Annotated[bool, typer.Option(help="Quantize the input embedding as well.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of every random choice.")] = 0,
    resume: Annotated[bool, typer.Option(help="Continue an interrupted run.")] = True,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file.")] = "50GB",
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
    )
    if json_output:
        print_json(report.to_dict())
    else:
        print_report(report, out, modules=False)
