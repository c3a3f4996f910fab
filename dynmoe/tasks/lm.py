"""Causal language modelling: every token of a corpus from those before it in its block.

Shape suffixes: B blocks, N tokens, C vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from dynmoe.data.lm.blocks import IGNORE, TokenBatch
from dynmoe.layers.moe import Routed
from dynmoe.tasks.base import Decode, MoETask, Scores, routed_tokens


class LanguageModelling(MoETask):
    """Cross-entropy of the next token.

    An evaluation measures every predicted token of the sets ``env_names`` once: the mean ``loss``
    in nats per token, its exponential, the ``perplexity``, the ``accuracy`` of the most likely
    token, and ``bits_per_byte``, which compares models of other tokenizers too: the loss in bits
    times ``tokens_per_byte[set]``, predicted tokens (ends of documents among them) per UTF-8 byte
    of the documents.

    The first ``examples`` blocks of the first set are recorded token by token, by ``decode``.
    """

    modality: ClassVar[str] = "text-stream"

    def __init__(
        self,
        tokens_per_byte: Mapping[str, float],
        decode: Decode,
        examples: int = 0,
        **task: Any,
    ) -> None:
        super().__init__(**task)
        self.tokens_per_byte = dict(tokens_per_byte)
        self.decode = decode
        self.num_examples = examples
        self.examples: list[dict[str, Any]] = []
        # Not a buffer, as the losses.
        self._correct = torch.zeros(0, dtype=torch.long)

    def training_step(self, batch: TokenBatch, batch_idx: int) -> dict[str, Any]:
        logits, tape = self.routed_forward(batch.tokens)
        return self.total_loss(batch.weight * next_token_losses(logits, batch.label).mean(), tape)

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self._correct = torch.zeros(len(self.sets), dtype=torch.long, device=self.device)
        self.examples = []

    def validation_step(self, batch: TokenBatch, batch_idx: int) -> None:
        """A batch comes from one set."""
        logits, tape = self.routed_forward(batch.tokens)
        self.count_losses(batch.source, next_token_losses(logits, batch.label))
        place = self.sets.index(batch.source)
        self._correct[place] += (logits.argmax(2) == batch.label).sum()
        self.routing.update(batch.source, tape)
        if batch.source != self.env_names[0]:
            return
        for index, row in enumerate(batch.row.tolist()):
            if row < self.num_examples:
                self.examples.append(self._example(batch, tape, index, row))

    def _example(
        self, batch: TokenBatch, tape: Mapping[str, list[Routed]], index: int, row: int
    ) -> dict[str, Any]:
        """A line of ``examples.jsonl``: the keys of an answered question, of which it has none."""
        ids = batch.tokens["input_ids"][index][batch.label[index] != IGNORE].tolist()
        return {
            "set": batch.source,
            "row": row,
            "question": f"{batch.source}, block {row}",
            "answer": "",
            "right": None,
            "image": None,
            "image_tokens": 0,
            "tokens": [self.decode([each]) for each in ids],
            "answer_from": len(ids),
            "experts": {
                name: routed_tokens(calls[0].mask[index][: len(ids)])
                for name, calls in tape.items()
            },
        }

    def measures(self) -> Scores:
        losses = self.sum_over_ranks(self._losses).tolist()
        correct = self.sum_over_ranks(self._correct).tolist()
        found = {}
        for name, (total, count), right in zip(self.sets, losses, correct, strict=True):
            if count:
                loss = total / count
                found[name] = {
                    "accuracy": right / count,
                    "bits_per_byte": loss / math.log(2) * self.tokens_per_byte[name],
                    "perplexity": math.exp(min(loss, 700.0)),  # of a diverging run
                }
        return found

    def example_records(self) -> list[dict[str, Any]]:
        """The first blocks of the first set, those of this rank."""
        return sorted(self.examples, key=lambda example: example["row"])


def next_token_losses(logits: Tensor, label: Tensor) -> Tensor:
    """Negative log-likelihoods [M], float32, of all tokens that are predicted, from logits
    [B, N, C] and labels [B, N]."""
    losses = F.cross_entropy(
        logits.flatten(0, 1).float(), label.flatten(), reduction="none", ignore_index=IGNORE
    )
    return losses[label.flatten() != IGNORE]
