"""Small random models with a tokenizer of letters, quantized: a folder ``q`` with the packed one, and ``source`` beside it."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers as tf

import loftq
from letters import letters

_WIDTHS = {"vocab_size": len(letters()), "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def quantized(model: tf.PreTrainedModel, folder: Path, tokenizer=None, **options) -> Path:
    """A model with a tokenizer, by default :func:`letters`, saved and quantized at 4 bits unless the options say otherwise."""
    model.save_pretrained(folder / "source")
    (tokenizer or letters()).save_pretrained(folder / "source")
    config = loftq.LoftQConfig(**{"bits": 4, "rank": 8, "calibration": None, **options})
    loftq.quantize_checkpoint(folder / "source", folder / "q", config, progress=False)
    return folder / "q"


def quantized_llama(folder: Path, **options) -> Path:
    """A decoder."""
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_key_value_heads": 2, "max_position_embeddings": 128}
    return quantized(tf.LlamaForCausalLM(tf.LlamaConfig(**_WIDTHS, **_IDS, **sizes)), folder, **options)


def quantized_mixtral(folder: Path, **options) -> Path:
    """A decoder with four experts a layer, of which a token gets two."""
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_key_value_heads": 2, "max_position_embeddings": 128}
    sizes |= {"num_local_experts": 4, "num_experts_per_tok": 2}
    return quantized(tf.MixtralForCausalLM(tf.MixtralConfig(**_WIDTHS, **_IDS, **sizes)), folder, **options)


def quantized_bert(folder: Path, **options) -> Path:
    """A bare encoder, without any head."""
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "max_position_embeddings": 128}
    return quantized(tf.BertModel(tf.BertConfig(**_WIDTHS, **sizes)), folder, letters(pair=True), **options)


def quantized_roberta(folder: Path, **options) -> Path:
    """A bare encoder whose classifier has a module named as one of its own."""
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "max_position_embeddings": 64, "pad_token_id": 0}
    return quantized(tf.RobertaModel(tf.RobertaConfig(**_WIDTHS, **sizes)), folder, **options)


def quantized_bart(folder: Path, **options) -> Path:
    """An encoder-decoder."""
    torch.manual_seed(0)
    parts = {"layers": 1, "attention_heads": 4, "ffn_dim": 96}
    sizes = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in parts.items()}
    config = tf.BartConfig(
        vocab_size=_WIDTHS["vocab_size"],
        d_model=_WIDTHS["hidden_size"],
        max_position_embeddings=128,
        decoder_start_token_id=2,
        forced_eos_token_id=2,
        **sizes,
        **_IDS,
    )
    return quantized(tf.BartForConditionalGeneration(config), folder, **options)


def quantized_encoder_decoder(folder: Path) -> Path:
    """Two encoders put together, of different widths and positions; as such models come, no config names the tokens with
    which a text begins and ends."""
    torch.manual_seed(0)
    parts = [
        tf.BertConfig(**{**_WIDTHS, "hidden_size": width}, num_hidden_layers=1, max_position_embeddings=positions)
        for width, positions in ((64, 128), (48, 40))
    ]
    config = tf.EncoderDecoderConfig.from_encoder_decoder_configs(*parts)
    config.decoder.is_decoder = config.decoder.add_cross_attention = True
    return quantized(tf.EncoderDecoderModel(config), folder, letters(pair=True))
