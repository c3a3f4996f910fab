"""Conversations about images: trained on the assistant's tokens, measured by generated answers.

Shape suffixes: B conversations, N tokens, M scored positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, distributed
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from dynmoe.backbones.vlm import Part, VisionLanguageModel, train_only
from dynmoe.data.vl.batches import ConversationBatch, QuestionBatch, scored
from dynmoe.data.vl.chat import IGNORE
from dynmoe.layers.moe import Routed, record_routing
from dynmoe.tasks.base import Decode, MoETask, Scores, example_record

T = TypeVar("T")

PARTS = ("prompt", "image", "answer")
"""Parts of a sequence of tokens. A token's part is an index here."""

Answers = dict[int, str]
"""Texts by the row of their question."""


class VisionLanguage(MoETask):
    """Cross-entropy over the assistant's tokens; trains the ``trains`` parts of the backbone.

    An evaluation lets the model answer every question of the sets ``env_names``, greedily, with at
    most ``max_new_tokens[set]`` tokens. ``decode`` turns token ids into text; ``score(set,
    answers)`` gives a set's scores, its headline under "score" in [0, 1]; ``describe(set, row)``
    describes a question and its image, for the ``examples`` that are recorded. Routing is recorded
    for each of ``PARTS``: in generation ``answer`` are the tokens that the model generated and read
    again.

    The ``loss`` of a set is the mean negative log-likelihood of all tokens of its reference
    answers, their end token included, given image and question: ``references(set, rows)`` gives
    the token ids of each answer, none for a question that has no single reference, and None for a
    set without any.
    """

    modality: ClassVar[str] = "vision-language"

    def __init__(
        self,
        trains: Sequence[Part],
        decode: Decode,
        score: Callable[[str, Answers], dict[str, float]],
        describe: Callable[[str, int], dict[str, Any]],
        references: Callable[[str, Sequence[int]], list[list[int]] | None],
        max_new_tokens: Mapping[str, int],
        examples: int,
        **task: Any,
    ) -> None:
        super().__init__(parts=PARTS, **task)
        self.backbone: VisionLanguageModel
        self.decode = decode
        self.score = score
        self.describe = describe
        self.references = references
        self.max_new_tokens = max_new_tokens
        self.num_examples = examples
        self.answers: dict[str, Answers] = {}
        self.cut: dict[str, int] = {}
        """How many answers of each set were cut off by their limit."""
        self.examples: list[dict[str, Any]] = []
        train_only(self.backbone, trains)

    def training_step(self, batch: ConversationBatch, batch_idx: int) -> dict[str, Any]:
        scored_M, target_M = batch.scored
        logits, tape = self.routed_forward(batch.tokens, scored_M)
        loss = batch.weight * F.cross_entropy(logits.float(), target_M)
        said_BN = batch.label != IGNORE
        part_BN = torch.where(said_BN, PARTS.index("answer"), batch.tokens["image_mask"].long())
        return self.total_loss(loss, tape, [part_BN])

    def probe_step(self, batch: ConversationBatch) -> tuple[Tensor, dict[str, list[Routed]]]:
        scored_M, target_M = batch.scored
        logits, tape = self.routed_forward(batch.tokens, scored_M)
        return F.cross_entropy(logits.float(), target_M, reduction="none"), tape

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self.answers = {name: {} for name in self.env_names}
        self._unended = {name: set[int]() for name in self.env_names}
        self.examples = []

    def validation_step(self, batch: QuestionBatch, batch_idx: int) -> None:
        """A batch comes from one set."""
        ids_BN, tape = self.generate(batch.tokens, batch.source)
        self.routing.update(batch.source, tape, part_BN=_parts_of_calls(batch.tokens, ids_BN))
        references = self.references(batch.source, batch.row.tolist())
        if references is not None:  # NOTE: for all batches of a set: under FSDP ranks run together
            self.count_losses(batch.source, self.reference_losses(batch.tokens, references))
        answers = {
            row: self.decode(ids)
            for row, ids in zip(batch.row.tolist(), ids_BN.tolist(), strict=True)
        }
        self.answers[batch.source] |= answers
        self._unended[batch.source].update(batch.row[self.backbone.unended(ids_BN)].tolist())
        if batch.source == self.env_names[0]:
            for index, (row, answer) in enumerate(answers.items()):
                if row < self.num_examples:
                    described = {**self.describe(batch.source, row), "answer": answer}
                    routed = example_record(batch.tokens, ids_BN, tape, index, self.decode)
                    self.examples.append({"set": batch.source, "row": row, **described, **routed})

    def generate(
        self, tokens: Mapping[str, Tensor], name: str
    ) -> tuple[Tensor, dict[str, list[Routed]]]:
        """Token ids of the answers to questions of a set, and the routing of the prompts and of
        each token after them."""
        with record_routing(self.backbone) as tape:
            return self.backbone.generate(tokens, self.max_new_tokens[name]), tape

    def reference_losses(
        self, tokens: Mapping[str, Tensor], references: Sequence[Sequence[int]]
    ) -> Tensor:
        """Negative log-likelihoods [M], float32, of the tokens of given answers to a batch of
        questions. Their routing is not recorded."""
        with_answers, label_BN = _answered(tokens, references)
        scored_M, target_M = scored(label_BN)
        logits = self.backbone(with_answers, scored_M)
        return F.cross_entropy(logits.float(), target_M, reduction="none")

    def measures(self) -> Scores:
        self.cut = {
            name: len(set().union(*self._from_ranks(rows))) for name, rows in self._unended.items()
        }
        answers = {name: self._from_all_ranks(self.answers[name]) for name in self.env_names}
        return {name: self.score(name, given) for name, given in answers.items() if given}

    def result(self) -> dict[str, Any]:
        return {**super().result(), "cut_answers": dict(self.cut)}

    def example_records(self) -> list[dict[str, Any]]:
        """The first questions of the first set as the model answered them in the last evaluation,
        those of this rank; see ``base.example_record``."""
        return sorted(self.examples, key=lambda example: example["row"])

    def _from_all_ranks(self, answers: Answers) -> Answers:
        return {row: answer for each in self._from_ranks(answers) for row, answer in each.items()}

    def _from_ranks(self, own: T) -> list[T]:
        if self.trainer.world_size == 1:
            return [own]
        found: list[T] = [own] * self.trainer.world_size
        distributed.all_gather_object(found, own)
        return found


def _answered(
    tokens: Mapping[str, Tensor], answers: Sequence[Sequence[int]]
) -> tuple[dict[str, Tensor], Tensor]:
    """Questions followed by answers, padded at the right as in training, and labels [B, N].

    NOTE: the prompts were padded at the left. Moved, every token has the position it has in
    training, also in language models with absolute positions.
    """
    ids, image_masks, labels = [], [], []
    for row, answer in enumerate(answers):
        real_N = tokens["attention_mask"][row].bool()
        prompt = tokens["input_ids"][row][real_N]
        answer_A = torch.tensor(answer, dtype=torch.long, device=prompt.device)
        ids.append(torch.cat([prompt, answer_A]))
        image_masks.append(F.pad(tokens["image_mask"][row][real_N], (0, len(answer))))
        labels.append(torch.cat([torch.full_like(prompt, IGNORE), answer_A]))
    real = [torch.ones_like(each) for each in ids]
    found = {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence(real, batch_first=True),
        "image_mask": pad_sequence(image_masks, batch_first=True),
        "images": tokens["images"],
    }
    return found, pad_sequence(labels, batch_first=True, padding_value=IGNORE)


def _parts_of_calls(tokens: Mapping[str, Tensor], ids_BN: Tensor) -> list[Tensor]:
    """Parts of the tokens in each of a layer's calls in generation: the prompts, then token after
    token of the answers."""
    answer_B1 = torch.full_like(ids_BN[:, :1], PARTS.index("answer"))
    return [tokens["image_mask"].long(), *[answer_B1] * (ids_BN.shape[1] - 1)]
