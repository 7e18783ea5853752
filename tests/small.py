"""Small random models with a tokenizer of letters, quantized: a folder ``q`` with the packed one, and ``source`` beside it."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers as tf

import loftq
from letters import letters


def _quantized(model: tf.PreTrainedModel, tokenizer, folder: Path, **options) -> Path:
    model.save_pretrained(folder / "source")
    tokenizer.save_pretrained(folder / "source")
    config = loftq.LoftQConfig(**{"bits": 4, "rank": 8, "calibration": None, **options})
    loftq.quantize_checkpoint(folder / "source", folder / "q", config, progress=False)
    return folder / "q"


def quantized_llama(folder: Path) -> Path:
    """A decoder."""
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=len(letters()),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return _quantized(tf.LlamaForCausalLM(config), letters(), folder)


def quantized_bert(folder: Path) -> Path:
    """A bare encoder, without any head."""
    torch.manual_seed(0)
    config = tf.BertConfig(
        vocab_size=len(letters()),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
    )
    return _quantized(tf.BertModel(config), letters(pair=True), folder)


def quantized_bart(folder: Path) -> Path:
    """An encoder-decoder."""
    torch.manual_seed(0)
    config = tf.BartConfig(
        vocab_size=len(letters()),
        d_model=64,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=2,
    )
    return _quantized(tf.BartForConditionalGeneration(config), letters(), folder)
