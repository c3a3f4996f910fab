"""Causal language models of the transformers library: from its hub, from a folder, from scratch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from dynmoe.backbones import hub
from dynmoe.backbones.text import TextModel
from dynmoe.errors import ConfigError
from dynmoe.layers.moe import mask_padding

modality = "text-stream"


class LanguageModel(TextModel):
    """Logits of the token after each: ``{"input_ids": [B, N], "attention_mask": [B, N]} ->
    [B, N, C]``.

    The mask, which may be left out, is for the MoE layers alone: padding stands at the end, where
    no token looks.
    """

    def forward(self, tokens: Mapping[str, Tensor]) -> Tensor:
        mask = tokens.get("attention_mask")
        self._token_mask = None if mask is None else mask.bool()
        with mask_padding(self.model, self._token_mask):
            logits: Tensor = self.model(input_ids=tokens["input_ids"], use_cache=False).logits
        return logits


def build_language_model(
    model: str | None,
    vocab_size: int | None = None,
    eos_token_id: int | None = None,
    path: str | None = None,
    pretrained: bool = False,
    architecture: str | None = None,
    grad_checkpointing: bool = False,
    lora: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> LanguageModel:
    """A causal language model; the arguments are those of ``text.build_text_classifier``.

    ``vocab_size`` and ``eos_token_id`` are the data's.

    Raises:
        ConfigError: as there, or a model that sees the tokens it has to predict.
    """
    found = causal_language_model(
        *(model, path, architecture, pretrained, options, vocab_size, None, eos_token_id)
    )
    hub.adapt(found, [], lora)
    return LanguageModel(found, grad_checkpointing)


def causal_language_model(
    model: str | None,
    path: str | None,
    architecture: str | None,
    pretrained: bool,
    options: Mapping[str, Any] | None,
    vocab_size: int | None,
    pad_token_id: int | None,
    eos_token_id: int | None,
) -> Any:
    """A model of transformers, whose vocabulary is the data's where ``architecture`` is given.

    Raises:
        ConfigError: a language model that is not there or cannot be built, that sees the tokens
            it predicts, or that has fewer embeddings than the data have tokens.
    """
    config = hub.configuration(model, path, architecture, options or {})
    if architecture is not None:
        config.pad_token_id = pad_token_id
        if vocab_size is not None:
            config.vocab_size = vocab_size
    if eos_token_id is not None:
        config.eos_token_id = eos_token_id
    found = _built(model, path, config, pretrained)
    _check_causal(found.config)
    found.generation_config = found.generation_config.__class__()
    hub.check_vocabulary(found, vocab_size, model, path)
    # Padding is masked. Where it is the end token, that one has to learn, which nn.Embedding
    # would keep from it.
    found.get_input_embeddings().padding_idx = None
    return found


def _built(model: str | None, path: str | None, config: Any, pretrained: bool) -> Any:
    if not pretrained:
        try:
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        except ValueError as error:
            raise ConfigError(
                f"backbone: transformers makes no causal language model of a '{config.model_type}' "
                f"({str(error).splitlines()[0]})"
            ) from error
    hub.check_has_weights(model, path)
    return hub.with_weights(AutoModelForCausalLM, model, path, config)


def _check_causal(config: PreTrainedConfig) -> None:
    """transformers makes encoders that see the following tokens, too; it only warns."""
    masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if masked and getattr(config, "is_decoder", None) is False:
        raise ConfigError(
            f"backbone: a '{config.model_type}' sees the tokens that it has to predict. Take a "
            "decoder, e.g. backbone.architecture=llama, or set backbone.options.is_decoder=true."
        )
