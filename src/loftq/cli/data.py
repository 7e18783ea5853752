"""``loftq data check``"""

from __future__ import annotations

from typing import Annotated

import typer

from loftq.cli import counts, options, parse
from loftq.cli.quiet import quiet_transformers
from loftq.config import positive_int

data = typer.Typer(help="Look at training data before training on it.", no_args_is_help=True)


@data.callback()
def _data() -> None:
    """Look at training data before training on it."""


@data.command()
def check(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder or hub id whose tokenizer and chat template are used.")],
    task: Annotated[str, typer.Option(help=parse.TASK_HELP)],
    data: options.Data,
    split: Annotated[str, typer.Option(help="Split of a folder or a hub data set.")] = "train",
    map: options.Map = None,
    labels: options.Labels = None,
    max_length: options.MaxLength = None,
    max_target_length: options.MaxTargetLength = 128,
    doc_stride: options.DocStride = None,
    packing: options.Packing = None,
    join_rows: options.JoinRows = False,
    prompt_template: options.PromptTemplate = "{prompt}",
    limit: options.Limit = None,
    show: Annotated[int, typer.Option(help="Examples to show token by token.")] = 3,
    json_output: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Show what rows become: tokens, which of them a model learns to predict, lengths, labels, and what is cut."""
    from loftq.data.prepare import DataSettings

    counts.refuse_strays(context, counts.of_task(task))
    positive_int("show", show, 0)
    settings = DataSettings(
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
    counts.refuse_split(context, "split", settings)
    quiet_transformers()
    from loftq.data.check import label_text, summary, tokens
    from loftq.data.prepare import prepare, tokenizer_for
    from loftq.evaluate.models import load_config

    tokenizer = tokenizer_for(model, settings)
    examples, names = prepare(settings, tokenizer, load_config(model))
    totals = summary(examples, names)
    shown = [examples[i] for i in range(min(show, len(examples)))]
    if json_output:
        from loftq.report.tables import print_json

        print_json(
            {
                **totals,
                "notes": examples.notes(),
                "shown": [
                    {
                        "where": e.where,
                        "label": label_text(e, tokenizer, task, names),
                        "tokens": [[t.id, t.text, t.learned] for t in tokens(e, tokenizer, task)],
                    }
                    for e in shown
                ],
            }
        )
        return
    from loftq.report.examples import print_example, print_summary

    for example in shown:
        print_example(example.where, tokens(example, tokenizer, task), label_text(example, tokenizer, task, names))
    print_summary(totals, examples.notes())
