"""Tiny random models of every architecture the project is proven on, and the dense model a quantized one must equal."""

from __future__ import annotations

import torch
import transformers as tf
from torch import nn

from loftq.modules import PackedWeight, QuantExperts
from loftq.modules.experts import expert_shape, is_fused_experts
from loftq.modules.linear import is_transposed

_SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 100,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def _config(name: str) -> tf.PretrainedConfig:
    if name == "llama":
        return tf.LlamaConfig(**_SIZES, num_key_value_heads=2, max_position_embeddings=64)
    if name == "mistral":
        return tf.MistralConfig(**_SIZES, num_key_value_heads=2, max_position_embeddings=64)
    if name == "qwen2":
        return tf.Qwen2Config(**_SIZES, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True)
    if name == "bert":
        return tf.BertConfig(**_SIZES, max_position_embeddings=64)
    if name == "deberta-v2":
        return tf.DebertaV2Config(
            **_SIZES,
            max_position_embeddings=64,
            relative_attention=True,
            position_buckets=16,
            pos_att_type=["p2c", "c2p"],
            norm_rel_ebd="layer_norm",
            share_att_key=True,
            type_vocab_size=0,
        )
    if name == "bart":
        return tf.BartConfig(
            vocab_size=96,
            d_model=64,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=100,
            decoder_ffn_dim=100,
            max_position_embeddings=64,
        )
    if name == "gpt2":
        return tf.GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64, n_inner=100)
    if name == "t5":
        return tf.T5Config(vocab_size=96, d_model=64, d_kv=16, d_ff=100, num_layers=2, num_heads=4)
    if name == "opt":
        return tf.OPTConfig(
            vocab_size=96,
            hidden_size=64,
            ffn_dim=100,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=48,
        )
    if name in (*MIXTURES, *BESIDE_DENSE):
        sizes = {**_SIZES, "num_key_value_heads": 2, "max_position_embeddings": 64, "num_experts_per_tok": 2}
        if name == "mixtral":
            return tf.MixtralConfig(**sizes, num_local_experts=4)
        if name == "qwen3-moe":
            return tf.Qwen3MoeConfig(**sizes, num_experts=4, moe_intermediate_size=40, head_dim=16)
        if name in BESIDE_DENSE:
            sizes |= {"n_routed_experts": 4, "n_shared_experts": 1, "moe_intermediate_size": 40, "n_group": 2}
            sizes |= {"topk_group": 2, "first_k_dense_replace": 1}
            if name == "glm4-moe":
                return tf.Glm4MoeConfig(**sizes, head_dim=16)
            sizes |= {"num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "v_head_dim": 16}
            sizes |= {"qk_rope_head_dim": 8, "qk_nope_head_dim": 16}
            return tf.DeepseekV3Config(**sizes) if name == "deepseek-v3" else tf.DeepseekV2Config(**sizes)
        return tf.GptOssConfig(**sizes, num_local_experts=4, head_dim=16)
    raise KeyError(name)


CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "bert": "BertModel",
    "deberta-v2": "DebertaV2ForSequenceClassification",
    "bart": "BartForConditionalGeneration",
    "gpt2": "GPT2LMHeadModel",
    "t5": "T5ForConditionalGeneration",
    "opt": "OPTForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3-moe": "Qwen3MoeForCausalLM",
    "gpt-oss": "GptOssForCausalLM",
}

MIXTURES = ("mixtral", "qwen3-moe", "gpt-oss")

# mixtures whose first layer is dense, and the second has a shared expert; see test_mixtures.py
BESIDE_DENSE = {
    "deepseek-v2": "DeepseekV2ForCausalLM",
    "deepseek-v3": "DeepseekV3ForCausalLM",
    "glm4-moe": "Glm4MoeForCausalLM",
}


def tiny_model(name: str, layers: int | None = None, seed: int = 0) -> tf.PreTrainedModel:
    """A random model in float32, with weights large enough that quantization shows."""
    config = _config(name)
    if layers is not None:
        config.num_hidden_layers = layers
    torch.manual_seed(seed)
    model = getattr(tf, {**CLASSES, **BESIDE_DENSE}[name])(config)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear) or is_transposed(module):
                module.weight.normal_(0, module.weight.shape[-1] ** -0.5)
            elif is_fused_experts(module):
                for parameter in module.parameters():
                    parameter.normal_(0, expert_shape(module, "gate_up_proj")[1] ** -0.5)
    return model.eval()


def inputs_for(name: str) -> dict[str, torch.Tensor]:
    """A batch of two random sequences."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 96, (2, 10), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name in ("bart", "t5"):
        inputs["decoder_input_ids"] = ids[:, :7]
    return inputs


def first_output(model: nn.Module, name: str) -> torch.Tensor:
    """Logits, or the last hidden state of a model without a head."""
    with torch.no_grad():
        return model(**inputs_for(name))[0]


def densify(original: nn.Module, peft_model: nn.Module) -> nn.Module:
    """``original`` with every quantized weight replaced by Q + scaling * B A, computed without any packed layer."""
    loaded = peft_model.get_base_model()
    for name, module in original.named_modules():
        try:
            wrapped = loaded.get_submodule(name)
        except AttributeError:
            continue
        base = getattr(wrapped, "base_layer", None)
        if is_fused_experts(module):
            _densify_experts(module, wrapped)
            continue
        if not isinstance(base, PackedWeight):
            continue
        scaling = wrapped.scaling["default"]
        if isinstance(module, nn.Embedding):
            delta = (wrapped.lora_embedding_B["default"] @ wrapped.lora_embedding_A["default"]).T
        else:
            delta = wrapped.lora_B["default"].weight @ wrapped.lora_A["default"].weight
        dense = (base.dequantize() + scaling * delta).detach()
        module.weight.data = dense.T.contiguous() if is_transposed(module) else dense
    return original


def _densify_experts(module: nn.Module, wrapped: nn.Module) -> None:
    """The same for the experts of a layer, with PEFT's own reading of the adapter."""
    while hasattr(wrapped, "base_layer"):
        base, name = wrapped.get_base_layer(), wrapped.parameter_name
        assert isinstance(base, QuantExperts)
        stack = torch.stack([base.dequantize(name, expert) for expert in range(base.num_experts)])
        stack = stack.transpose(1, 2) if base.is_transposed else stack
        getattr(module, name).data = (stack + wrapped.get_delta_weight("default")).detach().contiguous()
        wrapped = wrapped.base_layer
