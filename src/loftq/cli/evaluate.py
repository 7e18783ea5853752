"""``loftq evaluate``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loftq.cli.quiet import quiet_transformers


def evaluate(
    model: Annotated[str, typer.Argument(help="Quantized folder, or any causal language model's folder or hub id.")],
    text: Annotated[str, typer.Option(help="UTF-8 text file, or `pydoc` for English that every Python has.")] = "pydoc",
    adapter: Annotated[Path | None, typer.Option(help="Another adapter's folder; the fitted one by default.")] = None,
    no_adapter: Annotated[bool, typer.Option("--no-adapter", help="Evaluate the backbone alone.")] = False,
    window: Annotated[
        int | None, typer.Option(help="Tokens the model sees at once.", show_default="1024 or its limit")
    ] = None,
    stride: Annotated[int | None, typer.Option(help="How far the window advances.", show_default="the window")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Score only the text's first tokens.")] = None,
    batch_size: Annotated[int, typer.Option(help="Windows scored together.")] = 1,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto.")] = "auto",
    json_output: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Perplexity ± standard error on a text."""
    quiet_transformers()
    from loftq.evaluate.models import default_window, encode, load_for_inference, load_tokenizer
    from loftq.evaluate.perplexity import perplexity
    from loftq.evaluate.text import read_text
    from loftq.report.progress import bar
    from loftq.report.tables import print_json

    content = read_text(text)
    loaded = load_for_inference(model, adapter=adapter, use_adapter=not no_adapter, dtype=dtype)
    ids = encode(load_tokenizer(model), content, max_tokens)
    size = default_window(loaded, window)
    with bar(max(ids.numel() - 1, 1), "evaluating", "tokens") as advance:
        result = perplexity(loaded, ids, window=size, stride=stride, batch_size=batch_size, advance=advance)
    if json_output:
        print_json({"model": model, "text": text, **result.to_dict()})
    else:
        typer.echo(
            f"perplexity {result.perplexity:.4g} ± {result.standard_error:.2g} "
            f"({result.tokens} tokens, window {result.window}, stride {result.stride})"
        )
