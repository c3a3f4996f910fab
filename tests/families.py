"""Tiny models of transformers, one of each type that can have MoE layers."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

# By all the names that configurations have for them.
SIZES: dict[str, Any] = {
    **dict.fromkeys(["hidden_size", "n_embd", "d_model", "dim"], 16),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers"], 2),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "attention_heads"], 2),
    **dict.fromkeys(["intermediate_size", "n_inner", "ffn_dim", "hidden_dim", "dff"], 32),
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 40,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DISENTANGLED = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
HYBRID = {
    **{"linear_num_key_heads": 1, "linear_num_value_heads": 2},
    **{"linear_key_head_dim": 8, "linear_value_head_dim": 8},
    "layer_types": ["linear_attention", "full_attention"],
}
LATENT = {
    **{"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4},
    **{"v_head_dim": 8, "head_dim": 4, "num_key_value_heads": 2},
}
MAMBA = {"mamba_n_heads": 2, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8}
OTHERS: dict[str, dict[str, Any]] = {
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "deberta": DISENTANGLED,
    "deberta-v2": DISENTANGLED,
    "diffllama": {"num_key_value_heads": 2},
    "electra": {"embedding_size": 16},
    "esm": {"mask_token_id": 3},
    "esmc": {"num_key_value_heads": 2},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 32, "mlp_multipliers": [0.5, 0.25]},
    "gemma3n_text": {
        **{"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 4, "laurel_rank": 4},
        **{"vocab_size_per_layer_input": 40, "activation_sparsity_pattern": [0.6, 0.0]},
        "intermediate_size": [32, 32],
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gemma4_text": {
        **{"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 40},
        "per_layer_config": {},
    },
    "gpt_neo": {"attention_layers": ["global", "local"]},
    "gptj": {"rotary_dim": 4},
    "codegen": {"rotary_dim": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "luke": {"entity_vocab_size": 10},
    "minicpm3": LATENT,
    "olmo_hybrid": HYBRID,
    "opt": {"word_embed_proj_dim": 16},
    "qwen3_5_text": HYBRID,
    "recurrent_gemma": {"lru_width": 16, "block_types": ["recurrent", "attention"]},
    "rembert": {"input_embedding_size": 16, "output_embedding_size": 16},
    "xmod": {"default_language": "en_XX"},
    "youtu": LATENT,
}


def tiny(name: str) -> dict[str, Any]:
    """Options of a model of this type with two blocks of width 16, FFNs of width 32, 40 words."""
    config = AutoConfig.for_model(name)
    known = {*dir(config), *config.attribute_map} - ({"head_dim"} if name == "falcon" else set())
    return {key: value for key, value in SIZES.items() if key in known} | OTHERS.get(name, {})
