"""Conversations about images: trained on the assistant's tokens, measured by generated answers.

Shape suffixes: B conversations, N tokens, M scored positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, distributed
from torch.nn import functional as F

from dynmoe.backbones.vlm import Part, VisionLanguageModel, train_only
from dynmoe.data.vl.batches import ConversationBatch, QuestionBatch
from dynmoe.data.vl.chat import IGNORE
from dynmoe.layers.moe import Routed, record_routing
from dynmoe.metrics.routing import TRAIN
from dynmoe.tasks.base import Decode, MoETask, example_record

PARTS = ("prompt", "image", "answer")
"""Of a sequence of tokens. A token's part is an index here."""

Answers = dict[int, str]
"""By the row of their question."""


class VisionLanguage(MoETask):
    """Cross-entropy over the tokens the assistant says, of the ``trains`` parts of the backbone.

    An evaluation has the model answer every question of the sets ``env_names``, greedily, with at
    most ``max_new_tokens`` tokens. ``decode`` makes token ids text; ``score(set, answers)`` gives a
    set's scores, its headline under "score" in [0, 1]; ``describe(set, row)`` tells what a question
    and its image are, for the ``examples`` that are recorded. Routing is told apart by ``PARTS``:
    in generation ``answer`` are the tokens the model said and read again.
    """

    modality: ClassVar[str] = "vision-language"

    def __init__(
        self,
        trains: Sequence[Part],
        env_names: Sequence[str],
        decode: Decode,
        score: Callable[[str, Answers], dict[str, float]],
        describe: Callable[[str, int], dict[str, Any]],
        max_new_tokens: int,
        examples: int,
        **task: Any,
    ) -> None:
        super().__init__(parts=PARTS, **task)
        self.backbone: VisionLanguageModel
        self.env_names = list(env_names)
        self.decode = decode
        self.score = score
        self.describe = describe
        self.max_new_tokens = max_new_tokens
        self.num_examples = examples
        self.answers: dict[str, Answers] = {}
        self.examples: list[dict[str, Any]] = []
        self._scores: dict[str, float] = {}
        train_only(self.backbone, trains)

    def training_step(self, batch: ConversationBatch, batch_idx: int) -> dict[str, Any]:
        scored_M, target_M = batch.scored
        logits, tape = self.routed_forward(batch.tokens, scored_M)
        loss = batch.weight * F.cross_entropy(logits.float(), target_M)
        said_BN = batch.label != IGNORE
        part_BN = torch.where(said_BN, PARTS.index("answer"), batch.tokens["image_mask"].long())
        return self.total_loss(loss, tape, [part_BN])

    def on_validation_epoch_start(self) -> None:
        self.answers = {name: {} for name in self.env_names}
        self.examples = []

    def validation_step(self, batch: QuestionBatch, batch_idx: int) -> None:
        """A batch comes from one set."""
        ids_BN, tape = self.generate(batch.tokens)
        source = f"env{self.env_names.index(batch.source)}"
        self.routing.update(source, tape, part_BN=_parts_of_calls(batch.tokens, ids_BN))
        answers = {
            row: self.decode(ids)
            for row, ids in zip(batch.row.tolist(), ids_BN.tolist(), strict=True)
        }
        self.answers[batch.source] |= answers
        if batch.source == self.env_names[0]:
            for index, (row, answer) in enumerate(answers.items()):
                if row < self.num_examples:
                    described = {**self.describe(batch.source, row), "answer": answer}
                    routed = example_record(batch.tokens, ids_BN, tape, index, self.decode)
                    self.examples.append({"set": batch.source, "row": row, **described, **routed})

    def generate(self, tokens: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, list[Routed]]]:
        """Token ids of the answers, and the routing of the prompts and of each token after them."""
        with record_routing(self.backbone) as tape:
            return self.backbone.generate(tokens, self.max_new_tokens), tape

    def on_validation_epoch_end(self) -> None:
        self._scores = {}
        for name in self.env_names:
            for key, value in self.score(name, self._from_all_ranks(self.answers[name])).items():
                self._scores[f"{name}_{key}"] = value
        self.log_dict({f"val/{key}": value for key, value in self._scores.items()})

    def scores(self) -> dict[str, float]:
        """``<set>_score``, the headline, and what else a set is measured by."""
        return dict(self._scores)

    def example_records(self) -> list[dict[str, Any]]:
        """The first questions of the first set as the model answered them in the last evaluation,
        those of this rank; see ``example.example_record``."""
        return sorted(self.examples, key=lambda example: example["row"])

    def routing_records(self) -> list[dict[str, Any]]:
        sources = [TRAIN, *(f"env{i}" for i in range(len(self.env_names)))]
        return self.routing.records(
            sources, lambda counts: self.trainer.strategy.reduce(counts, reduce_op="sum")
        )

    def _from_all_ranks(self, answers: Answers) -> Answers:
        if self.trainer.world_size == 1:
            return answers
        found: list[Answers] = [{} for _ in range(self.trainer.world_size)]
        distributed.all_gather_object(found, answers)
        return {row: answer for each in found for row, answer in each.items()}


def _parts_of_calls(tokens: Mapping[str, Tensor], ids_BN: Tensor) -> list[Tensor]:
    """Of a layer's calls in generation: the prompts, then token after token of the answers."""
    answer_B1 = torch.full_like(ids_BN[:, :1], PARTS.index("answer"))
    return [tokens["image_mask"].long(), *[answer_B1] * (ids_BN.shape[1] - 1)]
