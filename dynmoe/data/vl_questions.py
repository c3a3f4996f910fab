"""Sets of questions as a language model is asked them, and what is made of its answers."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dynmoe.data.chat import IMAGE, IdArray, encode_prompts
from dynmoe.data.protocol import IntArray
from dynmoe.errors import ConfigError, DataError
from dynmoe.questions.base import QuestionSet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Answers = Mapping[int, str]
"""By the row of their question."""


class Prompts(Sequence[IdArray]):
    """Token ids [N] of the questions of a set, by their rows.

    `kept` has an image as one `IMAGE`; a row has it `image_tokens` times.
    """

    def __init__(self, kept: Sequence[IdArray], image_tokens: int) -> None:
        self._kept = kept
        self._image_tokens = image_tokens
        self.lengths: IntArray = np.array([self._repeats(ids).sum() for ids in kept])

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, row: int) -> IdArray:  # type: ignore[override]  # no slices
        ids = self._kept[row]
        return np.repeat(ids, self._repeats(ids))

    def _repeats(self, ids: IdArray) -> IntArray:
        return np.where(ids == IMAGE, self._image_tokens, 1)


class AskedQuestions:
    """Sets by their names, and their prompts; an image is `image_tokens` tokens."""

    def __init__(self, image_tokens: int) -> None:
        self.image_tokens = image_tokens
        self.sets: dict[str, QuestionSet] = {}
        self.prompts: dict[str, Prompts] = {}

    def add(
        self, sets: Mapping[str, QuestionSet], tokenizer: PreTrainedTokenizerBase, template: str
    ) -> None:
        """Raises ConfigError: `template` and `tokenizer` do not fit together."""
        for name, questions in sets.items():
            asked = [(question.text, len(question.images)) for question in questions.questions]
            kept = encode_prompts(asked, tokenizer, template, image_tokens=1)
            self.prompts[name] = Prompts(kept, self.image_tokens)
            self.sets[name] = questions

    @property
    def lengths(self) -> dict[str, IntArray]:
        """Of each set the tokens of its prompts."""
        return {name: prompts.lengths for name, prompts in self.prompts.items()}

    @property
    def mean_tokens(self) -> float:
        return float(np.concatenate([*self.lengths.values()]).mean())

    def score(self, name: str, answers: Answers) -> dict[str, float]:
        """Of a set, from the answer to each of its rows; none of a set that is not scored here."""
        questions = self.sets[name]
        return questions.score(_in_order(answers)) if questions.is_scored else {}

    def write(self, name: str, folder: Path, answers: Answers) -> list[Path]:
        """Prediction files of a set, as its official evaluator reads them."""
        return self.sets[name].write(folder, _in_order(answers))

    def describe(self, name: str, row: int) -> dict[str, Any]:
        """A question, its answer if there is one alone, its first image as a PNG file in base64."""
        question, right = self.sets[name].questions[row], self.sets[name].records[row]
        image = None
        if question.images:
            file = io.BytesIO()
            self.sets[name].load_image(question.images[0]).save(file, format="PNG")
            image = base64.b64encode(file.getvalue()).decode()
        return {
            "question": question.text,
            "right": right if isinstance(right, str) else None,
            "image": image,
            "image_tokens": self.image_tokens,
        }

    def refuse_unscored(self, folders: Mapping[str, str]) -> None:
        """`folders` of the published ones among the sets.

        Raises:
            ConfigError: a set that is not scored here.
        """
        for name, questions in self.sets.items():
            if not questions.is_scored:
                raise ConfigError(
                    f"data.benchmarks: {name} has no local score. Leave it out; answer it after "
                    f"training: dynmoe-eval run=FOLDER mode=answer benchmarks.{name}="
                    f"{folders.get(name, 'FOLDER')}"
                )

    def refuse_fewer_than(self, devices: int) -> None:
        """A device without a question would run no batch while the others wait for it.

        Raises:
            DataError: a set with fewer questions than `devices`.
        """
        for name, questions in self.sets.items():
            if (found := len(questions.questions)) < devices:
                raise DataError(
                    f"{name}: expected a question for each of the {devices} devices or more, found "
                    f"{found}. Evaluate on fewer devices (trainer.devices={found}), or leave the "
                    "set out."
                )


def _in_order(answers: Answers) -> list[str]:
    """By row, from the first to the last."""
    return [answers[row] for row in range(len(answers))]
