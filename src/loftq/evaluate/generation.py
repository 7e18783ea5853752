"""What a model writes after its prompts, many at a time.

A decoder's prompts are padded on the left, so that each continuation begins right behind its prompt; an encoder's inputs
on the right. Padding is masked: greedy decoding and beam search give the texts that one prompt at a time gives, but for
ties within the rounding of the arithmetic. Prompts of about the same length share a batch, the longest come first, and
the texts come back in the order of the prompts. What is not chosen here, such as a summarizer's length penalty and shortest
length, is as the model's ``generation_config`` says.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from loftq.config import is_number, positive_int
from loftq.data.chat import turn_ends
from loftq.data.prepare import positions
from loftq.errors import ConfigError
from loftq.evaluate.models import eval_mode

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

Advance = Callable[[str, int], None]


def _silent(what: str, texts: int) -> None:
    pass


def generate_texts(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    num_beams: int = 1,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    stop: str | Sequence[str] | None = None,
    seed: int = 0,
    max_prompt_tokens: int | None = None,
    chat: bool = False,
    advance: Advance = _silent,
) -> list[str]:
    """One text a prompt: a decoder's continuation without the prompt, or what an encoder-decoder makes of it.

    A text ends with any token that training or the model's makers end one with: the tokenizer's end-of-text token, those of
    ``generation_config``, and in a chat the end of the assistant's turn.

    Args:
        model: with a ``generate`` of transformers; set to eval mode for the duration.
        tokenizer: left as it is.
        prompts: texts, which get the tokenizer's special tokens; or token ids, which are taken as they are.
        max_new_tokens, batch_size, num_beams, temperature, top_p, top_k, seed, advance: as for :func:`generate_ids`.
        stop: a text ends before the first of these strings.
        max_prompt_tokens: a longer prompt loses its first tokens for a decoder, whose question or instruction comes last,
            and its last for an encoder-decoder; a text keeps its special tokens.
        chat: the prompts are in the tokenizer's chat template, as :func:`chat_prompt` makes them.

    Raises:
        ConfigError: for an empty prompt, options that contradict one another, or more tokens than the model has positions.
    """
    stops = [stop] if isinstance(stop, str) else list(stop or ())
    if "" in stops:
        raise ConfigError("stop holds an empty text, expected texts of at least one character")
    ids = _encode(tokenizer, prompts, max_prompt_tokens, keep_end=not _is_encoder_decoder(model))

    def decode(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=True))

    ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    found = generate_ids(
        model,
        ids,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        num_beams=num_beams,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        pad_token_id=tokenizer.pad_token_id,
        ends=[*ends, *(turn_ends(tokenizer) if chat else ())],
        finished=(lambda tokens: any(s in decode(tokens) for s in stops)) if stops else None,
        advance=advance,
    )
    return [_before(decode(tokens), stops) for tokens in found]


def generate_ids(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    num_beams: int = 1,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    pad_token_id: int | None = None,
    ends: Sequence[int] = (),
    finished: Callable[[list[int]], bool] | None = None,
    advance: Advance = _silent,
) -> list[list[int]]:
    """The new token ids of each prompt, without the prompt and without the token that ends it and what follows.

    Args:
        model: with a ``generate`` of transformers; set to eval mode for the duration.
        prompts: token ids, at least one each.
        max_new_tokens: longest continuation.
        batch_size: prompts at a time.
        num_beams: beams of a beam search; 1 is greedy decoding.
        temperature: 0 takes the likeliest token; above 0 tokens are drawn from softmax(logits / temperature).
        top_p: draw from the likeliest tokens that together have this probability. top_k: draw from this many; 0 is all.
        seed: of the drawing, which leaves torch's own state alone. What is drawn depends on ``batch_size``.
        pad_token_id: for the masked places; by default the model's padding or end token, or 0.
        ends: ids that end a continuation, beside those of the model's ``generation_config``.
        finished: ends a continuation where it is true of its token ids, the last of which are kept; padding may follow.
        advance: called with ``"texts"`` and the number of finished prompts.

    Raises:
        ConfigError: as :func:`generate_texts`.
    """
    positive_int("batch_size", batch_size)
    encoder_decoder = _is_encoder_decoder(model)
    config = _decoding(model, max_new_tokens, num_beams, temperature, top_p, top_k, pad_token_id, ends)
    _check_lengths(model, prompts, max_new_tokens)
    ends = config.eos_token_id or ()
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    results: list[list[int]] = [[] for _ in prompts]
    device = next(model.parameters()).device
    with eval_mode(model), _without_max_length(model), _seeded(seed, device, temperature > 0):
        for begin in range(0, len(order), batch_size):
            rows = order[begin : begin + batch_size]
            ids, mask = _padded([prompts[i] for i in rows], config.pad_token_id, left=not encoder_decoder)
            # a decoder's output begins with its prompt, an encoder-decoder's with the decoder's start token
            skip = 1 if encoder_decoder else ids.shape[1]
            options = {} if finished is None else {"stopping_criteria": [_criterion(finished, skip)]}
            output = model.generate(  # type: ignore[operator]
                input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config, **options
            )
            for row, tokens in zip(rows, output[:, skip:].tolist(), strict=True):
                end = next((at for at, token in enumerate(tokens) if token in ends), len(tokens))
                results[row] = tokens[:end]
            advance("texts", len(rows))
    return results


def chat_prompt(tokenizer: PreTrainedTokenizerBase, message: str) -> list[int]:
    """Token ids of a user's message in the model's chat template, up to where the answer begins.

    Raises:
        ConfigError: if the tokenizer has no chat template.
    """
    if tokenizer.chat_template is None:
        raise ConfigError("--chat was given, but the model's tokenizer has no chat template; leave it out")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": message}], tokenize=False, add_generation_prompt=True
    )
    return tokenizer(text, add_special_tokens=False).input_ids


def check_writes(model: nn.Module) -> None:
    """A :class:`ConfigError` for a model without a head that predicts tokens."""
    if getattr(model, "generation_config", None) is None:
        raise ConfigError(f"a {type(model).__name__} cannot write texts, expected a language model")


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(model.config, "is_encoder_decoder", False))


def _encode(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    longest: int | None,
    keep_end: bool,
) -> list[list[int]]:
    if longest is not None:
        positive_int("max_prompt_tokens", longest)
    if not prompts or not isinstance(prompts[0], str):
        ids = [list(map(int, prompt)) for prompt in prompts]
        return ids if longest is None else [row[-longest:] if keep_end else row[:longest] for row in ids]
    side = tokenizer.truncation_side
    tokenizer.truncation_side = "left" if keep_end else "right"
    try:
        return tokenizer(list(prompts), truncation=longest is not None, max_length=longest, verbose=False).input_ids
    finally:
        tokenizer.truncation_side = side


def _decoding(
    model: nn.Module,
    max_new_tokens: int,
    num_beams: int,
    temperature: float,
    top_p: float,
    top_k: int,
    pad_token_id: int | None,
    ends: Sequence[int],
) -> GenerationConfig:
    positive_int("max_new_tokens", max_new_tokens)
    positive_int("num_beams", num_beams)
    positive_int("top_k", top_k, 0)
    if not is_number(temperature) or temperature < 0:
        raise ConfigError(f"temperature is {temperature!r}, expected a number of at least 0")
    if not is_number(top_p) or not 0 < top_p <= 1:
        raise ConfigError(f"top_p is {top_p!r}, expected a number above 0 and at most 1")
    if num_beams > 1 and temperature > 0:
        raise ConfigError(f"num_beams is {num_beams} and temperature {temperature}; beam search takes temperature 0")
    check_writes(model)
    config: Any = copy.deepcopy(model.generation_config)
    if _is_encoder_decoder(model) and config.decoder_start_token_id is None and config.bos_token_id is None:
        raise ConfigError(
            "the model's generation_config has no decoder_start_token_id; set the id its decoder starts with"
        )
    config.max_new_tokens, config.max_length = max_new_tokens, None
    config.num_beams, config.do_sample = num_beams, temperature > 0
    config.num_return_sequences, config.return_dict_in_generate = 1, False
    # Where nothing is drawn, transformers' defaults: it warns of others, and takes the model's own for None.
    sampling = (temperature, top_p, top_k) if temperature > 0 else (1.0, 1.0, 50)
    config.temperature, config.top_p, config.top_k = sampling
    if num_beams == 1:
        config.early_stopping, config.length_penalty = False, 1.0
    known = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    config.eos_token_id = [e for e in dict.fromkeys([*known, *ends]) if e is not None] or None
    if pad_token_id is not None:
        config.pad_token_id = pad_token_id
    elif config.pad_token_id is None:
        config.pad_token_id = next(iter(config.eos_token_id or ()), 0)
    if config.pad_token_id >= getattr(model.config, "vocab_size", math.inf):
        config.pad_token_id = 0  # a tokenizer's own padding token, which the model has no embedding of; any will do
    return config


def _check_lengths(model: nn.Module, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            which = "the prompt is" if len(prompts) == 1 else f"prompt {number} is"
            raise ConfigError(f"{which} empty, expected some text to continue")
    longest = max(map(len, prompts), default=0)
    reads, writes = positions(model.config), positions(model.config, writing=True)
    if _is_encoder_decoder(model):
        fits = longest <= (reads or math.inf) and max_new_tokens <= (writes or math.inf)
        has = f"{reads} positions" if reads == writes else f"{reads} positions to read and {writes} to write"
        advice = "choose at most that many of each"
    else:
        fits, has = longest + max_new_tokens - 1 <= (reads or math.inf), f"{reads} positions"
        advice = "shorten the prompt or choose fewer new tokens"
    if not fits:
        raise ConfigError(
            f"the longest prompt has {longest} tokens and max_new_tokens is {max_new_tokens}, but the model has {has}; "
            f"{advice}"
        )


def _padded(prompts: Sequence[Sequence[int]], pad: int, left: bool) -> tuple[Tensor, Tensor]:
    """(rows, longest) int64 ids and their mask: 1 for a token, 0 for padding."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        place = slice(width - len(prompt), width) if left else slice(0, len(prompt))
        ids[row, place] = torch.tensor(prompt)
        mask[row, place] = 1
    return ids, mask


def _criterion(finished: Callable[[list[int]], bool], skip: int) -> Callable[..., Tensor]:
    def criterion(input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        rows = [finished(tokens) for tokens in input_ids[:, skip:].tolist()]
        return torch.tensor(rows, dtype=torch.bool, device=input_ids.device)

    return criterion


def _before(text: str, stops: Sequence[str]) -> str:
    return text[: min((text.find(s) for s in stops if s in text), default=len(text))]


@contextmanager
def _without_max_length(model: nn.Module) -> Iterator[None]:
    """The model's own ``max_length`` gives way to ``max_new_tokens`` anyway, but with a warning for every batch."""
    config: Any = model.generation_config
    kept, config.max_length = config.max_length, None
    try:
        yield
    finally:
        config.max_length = kept


@contextmanager
def _seeded(seed: int, device: torch.device, sampling: bool) -> Iterator[None]:
    with torch.random.fork_rng([device] if device.type == "cuda" else [], enabled=sampling), torch.no_grad():
        if sampling:
            torch.manual_seed(seed)
        yield
