"""``loftq generate``"""

from __future__ import annotations

from typing import Annotated

import typer

from loftq.cli import options
from loftq.cli.quiet import quiet_transformers


def generate(
    model: Annotated[
        str, typer.Argument(help="Run of `loftq train`, quantized folder, or a model's folder or hub id.")
    ],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to continue.")],
    revision: options.Revision = None,
    init_from: options.InitFrom = None,
    adapter: options.Adapter = None,
    no_adapter: Annotated[bool, typer.Option("--no-adapter", help="Use the backbone alone.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Longest continuation.", min=1)] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy decoding.", min=0.0)] = 0.0,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap the prompt in the model's chat template.")] = False,
    seed: Annotated[int, typer.Option(help="Of the sampling.", min=0)] = 0,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, float16, or auto.", show_default="the run's, or auto")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print prompt and continuation as JSON.")] = False,
) -> None:
    """Continue a prompt."""
    quiet_transformers()
    from loftq.evaluate.generation import chat_prompt, generate_texts
    from loftq.evaluate.models import load_tokenizer
    from loftq.finetune.load import load_causal
    from loftq.report.tables import print_json

    loaded = load_causal(
        model, adapter=adapter, use_adapter=not no_adapter, dtype=dtype, revision=revision, init_from=init_from
    )
    tokenizer = load_tokenizer(model, revision)
    (text,) = generate_texts(
        loaded,
        tokenizer,
        [chat_prompt(tokenizer, prompt)] if chat else [prompt],
        max_new_tokens=max_new_tokens,
        batch_size=1,
        temperature=temperature,
        seed=seed,
        chat=chat,
    )
    if json_output:
        print_json({"model": model, "prompt": prompt, "continuation": text})
    else:
        typer.echo(text)
