"""A tokenizer of single bytes, whose ids and offsets can be worked out by hand, with a chat template and special tokens."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from loftq.data.examples import IGNORED, Example

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<pad>", "<s>", "</s>", "<sep>", "<|im_start|>", "<|im_end|>"]


def letters(*, chat: bool = True, pair: bool = False) -> PreTrainedTokenizerFast:
    """One token a byte, ids from 6 on; ``pair``: BERT's ``<s> a <sep> b <sep>``, otherwise ``<s> a``."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if pair:
        tokenizer.post_processor = processors.BertProcessing(("<sep>", 3), ("<s>", 1))
    else:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        sep_token="<sep>",
        additional_special_tokens=SPECIAL[4:],
        model_input_names=["input_ids", "token_type_ids", "attention_mask"]
        if pair
        else ["input_ids", "attention_mask"],
    )
    if chat:
        fast.chat_template = CHATML
    return fast


def learned(example: Example) -> str:
    """The text a model learns to write."""
    kept = [int(i) for i, label in zip(example.input_ids, example.labels, strict=True) if label != IGNORED]
    assert kept == [int(label) for label in example.labels if label != IGNORED]
    return letters().decode(kept)
