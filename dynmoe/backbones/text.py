"""Text classifiers of the transformers library: from its hub, from a folder, or from scratch."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
)
from transformers.modeling_layers import GenericForSequenceClassification

from dynmoe.backbones import hub, weights
from dynmoe.backbones.families import FAMILIES
from dynmoe.backbones.weights import Head
from dynmoe.errors import ConfigError
from dynmoe.layers.moe import mask_padding

modality = "text"


class TextModel(nn.Module):
    """A model of transformers that reads texts, and whose MoE layers leave padding out.

    ``grad_checkpointing`` recomputes blocks in the backward pass, with the padding of their own
    forward.
    """

    def __init__(self, model: Any, grad_checkpointing: bool = False) -> None:
        super().__init__()
        self.model = model.train()  # from_pretrained leaves it in evaluation mode
        self._token_mask: Tensor | None = None
        if grad_checkpointing:
            # NOTE: the second is the name in early versions of transformers 5.
            enable = getattr(
                model, "activation_checkpointing_enable", model.gradient_checkpointing_enable
            )
            enable({"use_reentrant": False, "context_fn": self._forward_and_recompute})

    @property
    def config(self) -> PreTrainedConfig:
        """The configuration of transformers."""
        return self.model.config

    def check_length(self, tokens: int, key: str = "data.max_length") -> None:
        """Check that texts of so many tokens, which ``key`` asks for, have a position for each.

        Raises:
            ConfigError: there are fewer positions. Relative and rotary ones have no end.
        """
        places = hub.positions(self.model)
        if places is not None and tokens > places:
            raise ConfigError(
                f"{key}={tokens}: this backbone has positions for {places} tokens. Set "
                f"{key}={places}, or choose another backbone."
            )

    def _forward_and_recompute(
        self,
    ) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), mask_padding(self.model, self._token_mask)


class TextClassifier(TextModel):
    """A sequence classifier: ``{"input_ids": [B, N], "attention_mask": [B, N], ...} -> [B, C]``;
    without a mask nothing is padding."""

    def __init__(self, model: Any, grad_checkpointing: bool = False) -> None:
        super().__init__(model, grad_checkpointing)
        self._arguments = frozenset(inspect.signature(model.forward).parameters)

    def check_pairs(self) -> None:
        """Check that the two texts of a pair may be told apart by ``token_type_ids``.

        Raises:
            ConfigError: the model has an embedding for one type alone, as RoBERTa.
        """
        if getattr(self.config, "type_vocab_size", 2) == 1:
            raise ConfigError(
                "backbone: its tokenizer numbers the texts of a pair (token_type_ids), its model "
                "has one type alone. Leave token_type_ids out of the tokenizer's model_input_names "
                "and save it: backbone.path=FOLDER"
            )

    def forward(self, tokens: Mapping[str, Tensor]) -> Tensor:
        mask = tokens.get("attention_mask")
        self._token_mask = None if mask is None else mask.bool()
        with mask_padding(self.model, self._token_mask):
            # Models without token types need not be told them by a tokenizer that writes them.
            known = {name: each for name, each in tokens.items() if name in self._arguments}
            return self.model(**known).logits


def build_text_classifier(
    model: str | None,
    num_classes: int,
    vocab_size: int | None = None,
    pad_token_id: int | None = None,
    path: str | None = None,
    pretrained: bool = False,
    head: Head = "new",
    architecture: str | None = None,
    grad_checkpointing: bool = False,
    lora: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> TextClassifier:
    """A text classifier; ``num_classes=1`` is regression.

    One of three names the architecture: ``model`` on Hugging Face's hub; ``path``, a folder with
    config.json, weights and tokenizer, which overrides ``model`` and needs no network; or
    ``architecture``, a ``model_type`` of transformers, whose ``vocab_size`` is then the data's.
    ``pretrained``: load the weights too, with a new head, or (``head="keep"``) with their own of as
    many classes. ``pad_token_id`` is the data's, if there is one: decoders look for the last token
    that is not padding.
    ``lora`` (``{r, alpha, dropout}``): see ``hub.add_adapters``. ``options`` change the
    configuration of transformers (num_hidden_layers, hidden_dropout_prob, ...).

    Raises:
        ConfigError: a model, folder or option that is not there, weights or adapters that do not
            fit, or fewer embeddings than the data have tokens.
    """
    weights.check_head(head, pretrained)
    config = hub.configuration(model, path, architecture, options or {})
    config.num_labels = num_classes
    if architecture is not None and vocab_size is not None:
        config.vocab_size = vocab_size
    if pad_token_id is None and architecture is None:
        pad_token_id = config.pad_token_id
    if pad_token_id is None:  # some have several ends, and some neither an end nor None as padding
        ends = getattr(config, "eos_token_id", None)
        pad_token_id = ends[0] if isinstance(ends, list) else ends
    if pad_token_id is not None:
        config.pad_token_id = pad_token_id
    _know_classifier(config)
    fresh: list[str] = []
    if pretrained:
        classifier, fresh = _with_weights(model, path, config, head)
    else:
        try:
            classifier = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        except ValueError as error:
            raise ConfigError(
                f"backbone: transformers cannot build this {type(config).__name__}: "
                f"{str(error).splitlines()[0]}"
            ) from error
    hub.check_vocabulary(classifier, vocab_size, model, path)
    hub.adapt(classifier, fresh, lora)
    return TextClassifier(classifier, grad_checkpointing)


def _know_classifier(config: PreTrainedConfig) -> None:
    """Give a mixture that transformers has no classifier of (OLMoE, ...) the one of other decoders:
    a linear layer on the last token that is not padding."""
    kind = type(config)
    if config.model_type not in FAMILIES or kind in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return
    decoder: Any = MODEL_MAPPING[kind]
    bases = (GenericForSequenceClassification, decoder.__mro__[1])  # its family's PreTrainedModel
    name = decoder.__name__.removesuffix("Model") + "ForSequenceClassification"
    made = type(name, bases, {"__module__": decoder.__module__})
    AutoModelForSequenceClassification.register(kind, made, exist_ok=True)


def _with_weights(
    model: str | None, path: str | None, config: Any, head: Head
) -> tuple[Any, list[str]]:
    """The pretrained model, and the parameters in it that were not pretrained.

    Raises:
        ConfigError: no weights, or weights of another model.
    """
    hub.check_has_weights(model, path)
    try:
        classifier, loaded = AutoModelForSequenceClassification.from_pretrained(
            **hub.where(model, path),
            config=config,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        raise hub.not_found(model, path, None, error) from error
    body = f"{classifier.base_model_prefix}."
    fresh = hub.absent_keys(loaded)
    base = classifier.base_model

    def is_head(name: str) -> bool:
        """Heads lie outside the body, whose names may lack its prefix in a file."""
        inside = name.startswith(body) or hasattr(base, name.split(".")[0])
        return not inside or "pooler" in name

    if head == "keep":
        hub.check_loaded(classifier, loaded, model, path)
        return classifier, []
    hub.check_loaded(classifier, loaded, model, path, may_be_new=is_head)
    outside = [name for name, _ in classifier.named_parameters() if not name.startswith(body)]
    redrawn = [name for name in outside if name not in fresh]  # of another task, as many classes
    for name in redrawn:
        classifier.get_parameter(name)._is_hf_initialized = False
    # Each once, in the model's order: seeds would not say what is drawn.
    for module in dict.fromkeys(name.rpartition(".")[0] for name in redrawn):
        classifier._init_weights(classifier.get_submodule(module))
    return classifier, fresh
