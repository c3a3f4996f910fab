"""Question sets made in memory: an answer is right or wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dynmoe.questions.base import Question, QuestionSet
from dynmoe.questions.predictions import write_lines
from dynmoe.questions.scores import accuracies

if TYPE_CHECKING:
    import PIL.Image


class ExactMatch(QuestionSet):
    """Answers [Q] to questions [Q]; case, outer white space and a final full stop do not count."""

    def __init__(
        self,
        name: str,
        questions: Sequence[Question],
        answers: Sequence[str],
        load_image: Callable[[str], PIL.Image.Image],
    ) -> None:
        super().__init__(name, questions, answers)
        self._load_image = load_image

    def load_image(self, key: str) -> PIL.Image.Image:
        return self._load_image(key)

    def score(self, answers: Sequence[str]) -> dict[str, float]:
        """Shares of right answers: "score" over all and "kind_<kind>" for each kind."""
        right = [float(_plain(answer) == _plain(own)) for _, own, answer in self.pairs(answers)]
        return accuracies(self.questions, right)

    def write(self, folder: Path, answers: Sequence[str]) -> list[Path]:
        """`<name>.jsonl`: question_id, prompt, text (the model's), answer (the right one)."""
        rows = (
            {"question_id": question.id, "prompt": question.text, "text": answer, "answer": own}
            for question, own, answer in self.pairs(answers)
        )
        return [write_lines(folder / f"{self.name}.jsonl", rows)]


def _plain(answer: str) -> str:
    return answer.strip().lower().removesuffix(".").rstrip()
