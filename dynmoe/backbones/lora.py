"""Low-rank adapters on attention (LoRA, arXiv 2106.09685), by the peft library."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from dynmoe.errors import ConfigError

# Queries and values by their names in the families of dynmoe/backbones/ffns.py; where one matrix
# makes all three, that one.
TARGETS = (
    r".*\.(query|value|query_proj|value_proj|in_proj|q_lin|v_lin|q_proj|v_proj|attn\.[qv]"
    r"|c_attn|query_key_value)"
)


def add_adapters(
    model: Any, fresh: Collection[str] = (), r: int = 8, alpha: int = 16, dropout: float = 0.1
) -> None:
    """Freeze a transformers classifier but for its head, and add trained adapters, in place.

    ``fresh`` names other parameters to train: those that no pretraining has seen. Defaults are
    EMoE's. MoE layers that come later are trained whole.

    Raises:
        ConfigError: peft is not installed.
        ValueError: a value out of its range, or a model whose attention is not in ``TARGETS``.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError(
            "backbone.lora: needs the package peft: pip install 'dynmoe[lora]', or set "
            "backbone.lora=null"
        ) from error
    conv1d = model.config.model_type == "gpt2"
    config = LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=TARGETS, fan_in_fan_out=conv1d
    )
    inject_adapter_in_model(config, model)
    inside = {id(p) for p in model.base_model.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) not in inside or name in fresh:
            parameter.requires_grad = True
