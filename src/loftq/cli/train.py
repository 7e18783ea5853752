"""``loftq train``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loftq.cli import counts, options, parse
from loftq.cli.quiet import quiet_transformers


def train(
    context: typer.Context,
    out: Annotated[
        Path,
        typer.Argument(
            help="Folder of the run: absent, empty, or one to continue. Or a quantized folder to train in place."
        ),
    ],
    task: Annotated[str, typer.Option(help=parse.TASK_HELP)],
    data: options.Data,
    split: options.TrainSplit = "train",
    eval_data: options.EvalData = None,
    eval_split: options.EvalSplit = None,
    map: options.Map = None,
    init_from: Annotated[
        Path | None, typer.Option(help="Quantized folder to train, or whose adapter settings `lora` takes.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Full-precision model, for lora and full.", show_default="the folder's source")
    ] = None,
    revision: options.Revision = None,
    method: Annotated[str, typer.Option(help="loftq, qlora, lora, full.")] = "loftq",
    epochs: options.Epochs = 3.0,
    max_steps: options.MaxSteps = None,
    batch_size: options.BatchSize = 8,
    eval_batch_size: Annotated[
        int | None,
        typer.Option(
            help="Examples at once when measuring.", show_default="--batch-size", rich_help_panel=options.MEASURING
        ),
    ] = None,
    gradient_accumulation: Annotated[
        int, typer.Option(help="Batches of a step.", rich_help_panel=options.TRAINING)
    ] = 1,
    learning_rate: options.LearningRate = 1e-4,
    schedule: Annotated[
        str, typer.Option(help="linear, cosine, constant.", rich_help_panel=options.TRAINING)
    ] = "linear",
    warmup_ratio: Annotated[
        float, typer.Option(help="Share of the steps in which the rate rises.", rich_help_panel=options.TRAINING)
    ] = 0.0,
    weight_decay: Annotated[float, typer.Option(help="AdamW's.", rich_help_panel=options.TRAINING)] = 0.0,
    max_grad_norm: Annotated[
        float, typer.Option(help="Gradients are clipped to this norm.", rich_help_panel=options.TRAINING)
    ] = 1.0,
    dtype: Annotated[
        str, typer.Option(help="auto, float32, bfloat16, float16.", rich_help_panel=options.TRAINING)
    ] = "auto",
    gradient_checkpointing: options.GradientCheckpointing = False,
    labels: options.Labels = None,
    max_length: options.MaxLength = None,
    max_target_length: options.MaxTargetLength = 128,
    doc_stride: options.DocStride = None,
    packing: options.Packing = None,
    join_rows: options.JoinRows = False,
    prompt_template: options.PromptTemplate = "{prompt}",
    limit: options.Limit = None,
    eval_limit: options.EvalLimit = None,
    eval_steps: Annotated[
        int | None,
        typer.Option(
            help="Steps between measurements and checkpoints.",
            show_default="an epoch",
            rich_help_panel=options.MEASURING,
        ),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(
            help="Stop after so many measurements without improvement.",
            show_default="never",
            rich_help_panel=options.MEASURING,
        ),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            help="With commas; the first picks the checkpoint.",
            show_default="the task's",
            rich_help_panel=options.MEASURING,
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(help="Tokens of a text that a metric needs.", rich_help_panel=options.MEASURING)
    ] = 256,
    num_beams: Annotated[int, typer.Option(help="Beams of such a text.", rich_help_panel=options.MEASURING)] = 1,
    rouge_stem: options.RougeStem = None,
    rank: Annotated[
        int, typer.Option("--rank", "-r", help="Of lora without a quantized folder.", rich_help_panel=options.ADAPTER)
    ] = 16,
    lora_alpha: Annotated[
        float | None, typer.Option(help="Likewise.", show_default="the rank", rich_help_panel=options.ADAPTER)
    ] = None,
    use_rslora: Annotated[
        bool, typer.Option("--use-rslora", help="Likewise: scale by alpha / sqrt(r).", rich_help_panel=options.ADAPTER)
    ] = False,
    target_modules: Annotated[
        list[str] | None, typer.Option(help="Likewise.", show_default="all-linear", rich_help_panel=options.ADAPTER)
    ] = None,
    lora_dropout: Annotated[
        float | None,
        typer.Option(help="Dropout.", show_default="the quantized folder's", rich_help_panel=options.ADAPTER),
    ] = None,
    use_dora: Annotated[
        bool, typer.Option("--use-dora", help="Learn magnitudes apart (DoRA).", rich_help_panel=options.ADAPTER)
    ] = False,
    report_to: Annotated[
        str, typer.Option(help="none, tensorboard, trackio, wandb.", rich_help_panel=options.RUNNING)
    ] = "none",
    seed: Annotated[int, typer.Option(help="Of the data's order, dropout and new weights.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Continue an interrupted run.", rich_help_panel=options.RUNNING)
    ] = True,
    json_output: Annotated[bool, typer.Option("--json", help="Print the record as JSON.")] = False,
) -> None:
    """Fine-tune the adapter of a quantized folder, or a baseline to compare with."""
    from loftq.checkpoint.writer import disk_errors
    from loftq.data.prepare import DataSettings
    from loftq.evaluate.models import is_quantized
    from loftq.finetune.settings import TrainSettings

    with disk_errors(out):  # its name alone may be too long
        has_folder = init_from is not None or is_quantized(out)
    uses = [counts.of_task(task)]
    uses += [counts.NEW_ADAPTER] if method == "lora" and not has_folder else []
    uses += [counts.ADAPTER] if method != "full" else []
    uses += [counts.MEASURED] if eval_data is not None or eval_split is not None else []
    counts.refuse_strays(context, *uses)
    source = DataSettings(
        task=task,
        data=data,
        split=split,
        map=parse.column_map(map),
        labels=parse.names("--labels", labels) or (),
        max_length=max_length,
        max_target_length=max_target_length,
        doc_stride=doc_stride,
        packing=packing,
        join_rows=join_rows,
        prompt_template=prompt_template,
        limit=limit,
    )
    counts.refuse_split(context, "split", source)
    held = None
    if eval_data is not None or eval_split is not None:
        held = source.replace(data=eval_data or data, split=eval_split or "validation", limit=eval_limit).to_measure()
        counts.refuse_split(context, "eval_split", held)
    settings = TrainSettings(
        data=source,
        eval_data=held,
        method=method,
        epochs=epochs,
        max_steps=max_steps,
        batch_size=batch_size,
        eval_batch_size=eval_batch_size,
        gradient_accumulation=gradient_accumulation,
        learning_rate=learning_rate,
        schedule=schedule,
        warmup_ratio=warmup_ratio,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        dtype=dtype,
        gradient_checkpointing=gradient_checkpointing,
        eval_steps=eval_steps,
        patience=patience,
        rank=rank,
        lora_alpha=lora_alpha,
        target_modules=parse.module_patterns(target_modules) or "all-linear",
        use_rslora=use_rslora,
        use_dora=use_dora,
        lora_dropout=lora_dropout,
        metrics=parse.names("--metrics", metrics),
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        rouge_stem=rouge_stem is not False,
        report_to=report_to,
        seed=seed,
    )
    quiet_transformers()
    from loftq.finetune import processes, run

    record = run.train(
        out,
        settings,
        init_from=init_from,
        model=model,
        revision=revision,
        resume=resume,
        command=parse.this_command(),
        notice=lambda sentence: typer.echo(f"loftq: {sentence}", err=True),
    )
    if not processes.is_main():
        return
    if json_output:
        from loftq.report.tables import print_json

        print_json(record.to_dict())
    else:
        from loftq.report.training import print_training

        print_training(record)
