"""A LLaVA-like model: vision tower, projector, and a causal language model that reads both.

Shape suffixes: B conversations, N tokens, I images, P patches of an image, D width of the language
model, M scored positions, C vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from dynmoe.backbones import hub
from dynmoe.backbones.causal import causal_language_model
from dynmoe.backbones.surgery import blocks_of
from dynmoe.errors import ConfigError
from dynmoe.layers.moe import MoELayer, constant_weights, mask_padding, moe_layers

modality = "vision-language"

Part = Literal["vision", "projector", "language_model", "moe_layers", "dense_ffns"]
"""What a stage trains. ``dense_ffns`` are those of decoder blocks without an MoE layer."""


class VisionLanguageModel(nn.Module):
    """Patch tokens take the places of their image in the language model's stream of tokens.

    Inputs are ``{"input_ids": [B, N], "attention_mask": [B, N], "image_mask": bool [B, N],
    "images": [I, 3, H, W]}``; ``image_mask`` marks P places for each image, in their order. There
    may be no images. MoE layers sit in the language model, so that one router sees both kinds of
    tokens, and leave padding out. ``pad_token_id`` fills answers that have ended.
    """

    def __init__(
        self,
        vision: Any,
        projector: nn.Module,
        language_model: Any,
        grad_checkpointing: bool = False,
        pad_token_id: int | None = None,
    ) -> None:
        super().__init__()
        self.vision = vision
        self.projector = projector
        self.language_model = language_model.train()  # from_pretrained leaves evaluation mode
        self.pad_token_id = pad_token_id
        self._token_mask: Tensor | None = None
        if grad_checkpointing:
            language_model.gradient_checkpointing_enable(
                {"use_reentrant": False, "context_fn": self._forward_and_recompute}
            )

    @property
    def config(self) -> PreTrainedConfig:
        """The language model's configuration of transformers."""
        return self.language_model.config

    def check_length(self, tokens: int, asked: int, new_tokens: int) -> None:
        """Check that conversations of ``tokens``, and questions of ``asked`` tokens with answers of
        ``new_tokens``, have a position for each token.

        Raises:
            ConfigError: there are fewer positions. Relative and rotary ones have no end.
        """
        places = hub.positions(self.language_model)
        if places is not None and max(tokens, asked + new_tokens) > places:
            raise ConfigError(
                f"data: the language model has positions for {places} tokens, found "
                f"data.max_length={tokens}, and questions of up to {asked} tokens with answers of "
                f"up to {new_tokens}. Set data.max_length={places} or less, and "
                f"data.max_new_tokens={max(1, places - asked)} or less"
            )

    def train(self, mode: bool = True) -> VisionLanguageModel:
        """A frozen vision tower stays in evaluation mode: no dropout, no stochastic depth."""
        super().train(mode)
        if not any(p.requires_grad for p in self.vision.parameters()):
            self.vision.eval()
        return self

    def forward(self, tokens: Mapping[str, Tensor], scored_M: Tensor | None = None) -> Tensor:
        """Logits of the next token: [M, C] after the positions ``scored_M`` of the flattened
        batch, which spares a large vocabulary's product elsewhere; without them [B, N, C].

        They are the language model's own, with what its forward does before and after its head:
        final norms, projections, scales, soft caps.
        """
        mask = tokens.get("attention_mask")
        self._token_mask = None if mask is None else mask.bool()
        head = self.language_model.get_output_embeddings()
        picked = False

        def pick(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
            nonlocal picked
            picked = True
            return (inputs[0].flatten(0, 1)[scored_M][None],)

        with ExitStack() as stack:
            stack.enter_context(mask_padding(self.language_model, self._token_mask))
            if scored_M is not None and head is not None:
                stack.enter_context(head.register_forward_pre_hook(pick))
            logits: Tensor = self.language_model(
                inputs_embeds=self.embed(tokens), attention_mask=mask, use_cache=False
            ).logits
        if scored_M is None:
            return logits
        # A forward that takes the head's weight, not its module, computes them all.
        return logits[0] if picked else logits.flatten(0, 1)[scored_M]

    def embed(self, tokens: Mapping[str, Tensor]) -> Tensor:
        """Return the language model's input, [B, N, D]: embedded text, and projected patches."""
        text_BND: Tensor = self.language_model.get_input_embeddings()(tokens["input_ids"])
        images = tokens["images"]
        if len(images):
            patches_IPV = self.vision(images)
        else:  # the projector still takes part, with a gradient of zero: ranks have to agree
            patches_IPV = images.new_zeros(0, self.vision.patches, self.vision.width)
        patches_IPD = self.projector(patches_IPV).to(text_BND.dtype)
        return text_BND.masked_scatter(tokens["image_mask"][..., None], patches_IPD)

    @torch.no_grad()
    def generate(
        self, tokens: Mapping[str, Tensor], max_new_tokens: int, exactly: bool = False
    ) -> Tensor:
        """Return the most likely answers, with a KV cache: [B, at most max_new_tokens].

        Prompts are padded on the left. After its end token an answer is filled with padding;
        with ``exactly`` none ends before it has ``max_new_tokens``, for measuring.
        MoE layers are called once for the prompts and once for each further token, in which
        answers that have ended are padding.
        """
        self._token_mask = tokens["attention_mask"].bool()
        # Looked for once: to walk through all modules takes as long as a small layer.
        mask_call = partial(self._mask_call, list(moe_layers(self.language_model).values()))
        calls = self.language_model.register_forward_pre_hook(mask_call, with_kwargs=True)
        constant = constant_weights(self.language_model, stack=True)
        with calls, constant, mask_padding(self.language_model, None):
            out: Tensor = self.language_model.generate(
                inputs_embeds=self.embed(tokens),
                attention_mask=tokens["attention_mask"],
                max_new_tokens=max_new_tokens,
                min_new_tokens=max_new_tokens if exactly else None,
                do_sample=False,
                use_cache=True,
                pad_token_id=self.pad_token_id,
                eos_token_id=self.config.eos_token_id,
            )
        return out

    def unended(self, ids_BN: Tensor) -> Tensor:
        """Whether each answer [B] lacks an end token: it was cut off by its limit."""
        ends = torch.tensor(_as_list(self.config.eos_token_id), device=ids_BN.device)
        return ~torch.isin(ids_BN, ends).any(dim=1)

    def _mask_call(
        self, layers: Sequence[MoELayer], model: nn.Module, _: Any, inputs: dict[str, Any]
    ) -> None:
        """Tell the MoE layers what is padding in a call of ``generate``."""
        ids = inputs.get("input_ids")
        mask = self._token_mask
        if ids is not None:  # after the prompts: answers that have not ended
            assert mask is not None
            ends = torch.tensor(_as_list(self.config.eos_token_id), device=ids.device)
            mask = self._token_mask = mask[:, -1:] & ~torch.isin(ids, ends)
        for layer in layers:
            layer.token_mask = mask

    def _forward_and_recompute(
        self,
    ) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), mask_padding(self.language_model, self._token_mask)


def build_vision_language_model(
    vision: Any,
    projector: Literal["mlp2x_gelu", "linear"],
    template: str,
    model: str | None = None,
    path: str | None = None,
    architecture: str | None = None,
    pretrained: bool = False,
    grad_checkpointing: bool = False,
    options: Mapping[str, Any] | None = None,
    vocab_size: int | None = None,
    pad_token_id: int | None = None,
    eos_token_id: int | None = None,
    image_placement: str = "llava",
) -> VisionLanguageModel:
    """A vision tower before a causal language model of transformers, dense.

    ``model``, ``path``, ``architecture``, ``pretrained`` and ``options`` say which language model,
    as in ``text.build_text_classifier``; its vocabulary is the data's where ``architecture`` is
    given. ``template`` names how its conversations are written (dynmoe/data/vl/chat.py), and
    ``image_placement`` where their images stand (dynmoe/data/vl/readers.py), for the data alone.
    ``projector``: two linear layers around a GELU (LLaVA-1.5), or one.

    Raises:
        ConfigError: a language model that is not there or cannot be built, that sees the tokens
            it predicts, or that has fewer embeddings than the data have tokens.
    """
    language_model = causal_language_model(
        model, path, architecture, pretrained, options, vocab_size, pad_token_id, eos_token_id
    )
    width = language_model.get_input_embeddings().embedding_dim
    return VisionLanguageModel(
        vision,
        build_projector(projector, vision.width, width),
        language_model,
        grad_checkpointing,
        pad_token_id,
    )


def build_projector(kind: str, inputs: int, outputs: int) -> nn.Sequential:
    """Build the projector that LLaVA calls ``mm_projector_type``."""
    layers: list[nn.Module] = [nn.Linear(inputs, outputs)]
    if kind == "mlp2x_gelu":
        layers += [nn.GELU(), nn.Linear(outputs, outputs)]
    return nn.Sequential(*layers)


def train_only(model: VisionLanguageModel, parts: Sequence[Part]) -> None:
    """Freeze all but ``parts``.

    Raises:
        ConfigError: nothing is left to train.
    """
    chosen: list[nn.Module] = []
    if "vision" in parts:
        chosen.append(model.vision)
    if "projector" in parts:
        chosen.append(model.projector)
    if "language_model" in parts:
        chosen.append(model.language_model)
    if {"moe_layers", "dense_ffns"} & set(parts):
        blocks, form = blocks_of(model.language_model)
        for block in blocks:
            if ("moe_layers" if moe_layers(block) else "dense_ffns") in parts:
                chosen += form.modules(block)
    model.requires_grad_(False)
    for module in chosen:
        module.requires_grad_(True)
    for layer in moe_layers(model).values():
        if layer.origin is not None:
            layer.origin.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError(
            f"task.module.trains: {list(parts)} leaves nothing to train in this model. Choose "
            f"among {', '.join(get_args(Part))}"
        )
    model.train()


def _as_list(ids: Any) -> list[int]:
    return list(ids) if isinstance(ids, list | tuple) else [ids]
