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


def quantized_encoder_decoder(folder: Path) -> Path:
    """Two encoders put together, of different widths and positions; as such models come, no config names the tokens with
    which a text begins and ends."""
    torch.manual_seed(0)
    parts = [
        tf.BertConfig(
            vocab_size=len(letters()),
            hidden_size=width,
            intermediate_size=96,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=positions,
        )
        for width, positions in ((64, 128), (48, 40))
    ]
    config = tf.EncoderDecoderConfig.from_encoder_decoder_configs(*parts)
    config.decoder.is_decoder = config.decoder.add_cross_attention = True
    return _quantized(tf.EncoderDecoderModel(config), letters(pair=True), folder)
