"""Sizes of published models by their names on the hub, so that a plan needs neither network nor
weights. Whatever is trained takes the model's own config.json.

Of each: its ``model_type`` in transformers, and what its config.json says that bears on sizes and
is not that type's default. Sources: the models' cards and config.json on Hugging Face's hub;
MoE-LLaVA's code for what it builds on (``moellava/model/language_model``). MoE-LLaVA's paper
(arXiv 2401.15947, Table 1) gives StableLM Phi-2's numbers; its config.json is right.
"""

from __future__ import annotations

from typing import Any

PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "stabilityai/stablelm-2-1_6b": (
        "stablelm",
        {
            "vocab_size": 100352,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 24,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "use_qkv_bias": True,
        },
    ),
    # Of the sizes of Qwen-1.8B, whose own code has the FFN's two halves as one: 11008.
    "Qwen/Qwen1.5-1.8B": (
        "qwen2",
        {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 5504,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
        },
    ),
    "microsoft/phi-2": (
        "phi",
        {
            "vocab_size": 51200,
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
        },
    ),
    "HuggingFaceTB/SmolLM2-135M-Instruct": (
        "llama",
        {
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "tie_word_embeddings": True,
        },
    ),
    "openai/clip-vit-large-patch14-336": (
        "clip_vision_model",
        {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 336,
            "patch_size": 14,
        },
    ),
}
