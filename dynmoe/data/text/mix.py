"""GlueMixData: several tasks of GLUE at once, each with a head of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from rich.console import Console

from dynmoe.data.text.batches import (
    Collate,
    EpochDraw,
    Key,
    MixedDraw,
    TextExamples,
    in_parts,
    steps_per_epoch,
)
from dynmoe.data.text.module import GlueData
from dynmoe.data.text.sets import TextSet
from dynmoe.data.text.tasks import TASKS, GlueTask
from dynmoe.errors import DataError
from dynmoe.seeding import IntArray


@dataclass(eq=False, kw_only=True)
class GlueMixData(GlueData):
    """The tasks `tasks` of GLUE, learnt together by one model with a head for each.

    Their training sets, `<task>/train`, are the sources that a mixture draws from; without one, an
    epoch sees every example of all of them once. The evaluated sets are `<task>` (dev) of each
    task in turn, then `mnli/mismatched`; with `holdout_fraction`, `<task>/heldout` too.
    """

    task: str = ""
    """Not used: `tasks` are."""
    tasks: Sequence[str] = field(default_factory=list)
    """Keys of the tasks in `TASKS`, two or more."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.tasks = list(self.tasks)
        self.test_envs = list(range(len(self.tasks)))
        given = {each.name: getattr(self, each.name) for each in fields(GlueData) if each.init}
        self.parts = {
            name: GlueData(**{**given, "task": name, "name": f"{self.name}, {TASKS[name].title}"})
            for name in self.tasks
        }

    @property
    def _glue_tasks(self) -> list[GlueTask]:
        return [TASKS[name] for name in self.tasks]

    @property
    def has_pairs(self) -> bool:
        return any(part.has_pairs for part in self.parts.values())

    def setup(self, stage: str | None = None) -> None:
        """Read and tokenize all tasks; a second call does nothing.

        Raises:
            DataError: some cannot be trained on; lists every problem.
            ConfigError: no such tokenizer, or a `max_length` that leaves no text.
        """
        if self.sets:
            return
        found: dict[str, dict[str, TextSet]] = {}
        problems: list[str] = []
        for name, part in self.parts.items():
            try:
                found[name] = part.read_labelled()
            except DataError as error:
                problems.append(str(error))
            for what, count in part.left_out.items():
                self.left_out[f"{name}, {what}"] = count
        if problems:
            raise DataError("\n".join(problems))
        trains = [sets["train"] for sets in found.values()]
        self.tokenizer = self.made_tokenizer(
            lambda: [text for each in trains for text in [*each.first, *(each.second or [])]]
        )
        for name, part in self.parts.items():
            part.take(found[name], self.tokenizer)
        for name, part in self.parts.items():
            for each in part.sets:
                whole = name if each == "dev" else f"{name}/{each}"
                self.sets[whole], self._encoded[whole] = part.sets[each], part._encoded[each]

    @property
    def env_names(self) -> list[str]:
        others = [each for each in self.sets if each.endswith("/mismatched")]
        return [*self.tasks, *others]

    @property
    def _trained(self) -> dict[str, str]:
        """The training sets by task."""
        return {name: f"{name}/train" for name in self.tasks}

    @property
    def _heads(self) -> dict[str, int]:
        """The number of the head of each set."""
        return {each: self.tasks.index(each.partition("/")[0]) for each in self.sets}

    @property
    def class_names(self) -> list[str]:
        if any(task.regression for task in self._glue_tasks):
            return []
        return [f"{task.name} {label}" for task in self._glue_tasks for label in task.labels]

    @property
    def backbone_arguments(self) -> dict[str, Any]:
        outputs = sum(max(1, len(task.labels)) for task in self._glue_tasks)
        first = self.parts[self.tasks[0]].backbone_arguments
        return {**first, "num_classes": outputs}

    def check_backbone(self, backbone: Any) -> None:
        for part in self.parts.values():
            part.check_backbone(backbone)

    @property
    def task_arguments(self) -> dict[str, Any]:
        heads, first = [], 0
        for task in self._glue_tasks:
            heads.append((first, len(task.labels), task.metrics))
            first += max(1, len(task.labels))
        return {
            "num_classes": len(self.class_names),
            "metrics": (),
            "env_names": self.env_names,
            "heads": heads,
            "head_of": {each: self._heads[each] for each in self._evaluated},
        }

    @property
    def _evaluated(self) -> list[str]:
        return [each for each in self.sets if not each.endswith("/train")]

    @property
    def mean_tokens(self) -> float:
        return float(self._lengths.mean())

    @property
    def _lengths(self) -> IntArray:
        """Tokens of the training examples of all tasks, one after the other."""
        return np.concatenate([self._encoded[each].lengths for each in self._trained.values()])

    @property
    def sizes(self) -> dict[str, Any]:
        evaluated = {name: len(self.sets[name]) for name in self._evaluated}
        return {"train": len(self._lengths), **evaluated}

    @property
    def facts(self) -> dict[str, Any]:
        return {
            "measure": "mean score of the tasks",
            "mean_tokens": self.mean_tokens,
            "samples_per_step": self.batch_size,
        }

    def baseline(self) -> dict[str, Any] | None:
        found = {name: part.baseline() for name, part in self.parts.items()}
        made = {name: each for name, each in found.items() if each is not None}
        if not made:
            return None
        scores = {name: each["scores"]["dev"] for name, each in made.items()}
        return {"name": next(iter(made.values()))["name"], "scores": scores}

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(len(self._lengths), self.batch_size)

    def print_check(self, console: Console | None = None) -> None:
        """Print a table for each task."""
        for part in self.parts.values():
            part.print_check(console)

    def train_dataloader(self) -> Any:
        if self.mixture is not None:
            mixed = MixedDraw(self.mixture, self._train_rows, self.plan.seed, self._trained)
            batches = self._step_batches(mixed)
            return self._in_windows(self._text_loader(batches), batches)
        return self._text_loader(self._step_batches(self._union_draw()))

    def _union_draw(self) -> Callable[[int, int], list[list[Key]]]:
        """Epochs of all training examples."""
        draw = EpochDraw(self._lengths, self.batch_size, self.plan.seed)
        names = [*self._trained.values()]
        ends = np.cumsum([len(self.sets[name]) for name in names])

        def drawn(step: int, parts: int) -> list[list[Key]]:
            (whole,) = draw(step, 1)
            picks = []
            for row in sorted(key.row for key in whole):
                place = int(np.searchsorted(ends, row, side="right"))
                picks.append((names[place], row - int(ends[place - 1] if place else 0)))
            return in_parts(picks, None, parts)

        return drawn

    def sources(self) -> dict[str, tuple[IntArray, IntArray | None]]:
        """The training sets, by the names of their tasks."""
        found = {name: self._encoded[each].lengths for name, each in self._trained.items()}
        return {name: (np.arange(len(lengths)), lengths) for name, lengths in found.items()}

    def _examples(self) -> TextExamples:
        return TextExamples(self.sets, self._encoded, self._heads)

    def _probed(self) -> tuple[TextExamples, Callable[[Any], Any]]:
        return self._examples(), Collate(self.tokenizer)

    def _probe_keys(self, source: str, rows: IntArray) -> list[Key]:
        return [Key(self._trained[source], row) for row in rows.tolist()]
