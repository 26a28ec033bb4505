"""Shapes of small networks, by Hugging Face's names, and of their batches. Sizes are odd: nothing divides by chance."""

from __future__ import annotations

from typing import Any

B, S, V = 3, 13, 67
LLAMA = {
    "vocab_size": V,
    "hidden_size": 36,
    "intermediate_size": 52,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
GPT2 = {
    "vocab_size": V,
    "n_positions": 17,
    "n_embd": 30,
    "n_layer": 2,
    "n_head": 5,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-gqa": ("llama", LLAMA),
    "llama-mha-tied": ("llama", {**LLAMA, "num_key_value_heads": 6, "tie_word_embeddings": True}),
    "llama-mqa": ("llama", {**LLAMA, "num_key_value_heads": 1}),
    "llama-biases": ("llama", {**LLAMA, "attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": (
        "llama",
        {**LLAMA, "hidden_size": 27, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 10},
    ),
    "llama-rope-theta": ("llama", {**LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}),
    "llama-gelu-eps": ("llama", {**LLAMA, "hidden_act": "gelu", "rms_norm_eps": 0.1, "num_hidden_layers": 1}),
    "gpt2": ("gpt2", GPT2),
    "gpt2-untied": ("gpt2", {**GPT2, "tie_word_embeddings": False, "layer_norm_epsilon": 0.1}),
    "gpt2-inner": ("gpt2", {**GPT2, "n_inner": 41, "n_layer": 3}),
    **{
        f"gpt2-{name}": ("gpt2", {**GPT2, "n_layer": 1, "activation_function": name})
        for name in ("gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "silu", "swish")
    },
}
ONE_OF_EACH = [MODELS["llama-gqa"], MODELS["llama-mha-tied"], MODELS["gpt2"], MODELS["gpt2-untied"]]
MARIAN = {
    "vocab_size": V,
    "d_model": 36,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 6,
    "decoder_attention_heads": 6,
    "encoder_ffn_dim": 52,
    "decoder_ffn_dim": 52,
    "max_position_embeddings": 40,
}
# Heads that are wider than hidden / heads; so few buckets, so near the last, that a row has distances of every kind.
T5 = {
    "vocab_size": V,
    "d_model": 36,
    "d_kv": 10,
    "d_ff": 52,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 6,
    "relative_attention_num_buckets": 11,
    "relative_attention_max_distance": 13,
}
TRANSLATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "marian": ("marian", MARIAN),
    "marian-scaled-relu": ("marian", {**MARIAN, "scale_embedding": True, "activation_function": "relu"}),
    "marian-separate": (
        "marian",
        {
            **MARIAN,
            "share_encoder_decoder_embeddings": False,
            "vocab_size": 71,
            "decoder_vocab_size": V,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "activation_function": "swish",
        },
    ),
    "t5": ("t5", T5),
    "t5-gated-untied": ("t5", {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "t5-gated-tied": (
        "t5",
        {**T5, "feed_forward_proj": "gated-silu", "num_layers": 1, "num_heads": 3, "relative_attention_num_buckets": 24},
    ),
    "t5-untied": ("t5", {**T5, "tie_word_embeddings": False, "layer_norm_epsilon": 0.1, "feed_forward_proj": "gelu"}),
}
BERT = {
    "vocab_size": 97,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
TINY: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2},
    "bert": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
    "marian": {
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
    },
    "t5": {"d_model": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8, "d_ff": 16},
}
TINY_DECODER = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 16,
}
