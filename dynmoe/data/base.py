"""What a run asks of its data module, whatever it holds: images of several domains, or texts."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

from lightning.pytorch import LightningDataModule
from rich.console import Console


class TaskData(LightningDataModule):
    """Sets of labelled examples. All but `name` and `test_envs` holds after `setup`.

    Batches have `inputs`, what the backbone is called with, and `label`.
    """

    modality: ClassVar[str]
    libraries: ClassVar[tuple[str, ...]]
    """Packages whose versions belong to a result."""

    name: str
    test_envs: list[int]
    """Those of `env_names` that results are reported for."""
    _repeated_step: int | None = None

    @abstractmethod
    def setup(self, stage: str | None = None) -> None:
        """Read and check the data; a second call does nothing."""

    @property
    @abstractmethod
    def env_names(self) -> list[str]:
        """The environments or sets that are evaluated, as records name them."""

    @property
    @abstractmethod
    def class_names(self) -> list[str]:
        """Empty for regression."""

    @property
    @abstractmethod
    def backbone_arguments(self) -> dict[str, Any]:
        """What the backbone has to know of the data."""

    @property
    @abstractmethod
    def task_arguments(self) -> dict[str, Any]:
        """What the task has to know of the data."""

    @property
    @abstractmethod
    def sample(self) -> tuple[Any, ...]:
        """The backbone's inputs for a typical batch of one; values do not matter."""

    @property
    @abstractmethod
    def steps(self) -> int:
        """Optimizer steps of the run."""

    @property
    @abstractmethod
    def eval_every(self) -> int:
        """Optimizer steps between two evaluations."""

    @property
    @abstractmethod
    def steps_per_epoch(self) -> float: ...

    @abstractmethod
    def epoch_at(self, step: int) -> float:
        """What records call the epoch of 0-based optimizer step `step`."""

    @property
    @abstractmethod
    def sizes(self) -> dict[str, Any]:
        """Numbers of examples by evaluated set, and what else there is (train)."""

    @property
    @abstractmethod
    def data_hash(self) -> str:
        """Of the examples and their splits."""

    @property
    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What `run.json` says of the data beside the above: `samples_per_step`, `baseline`, ..."""

    @abstractmethod
    def print_check(self, console: Console | None = None) -> None:
        """A table of what there is."""

    def repeat_evaluation_of(self, step: int) -> None:
        """Evaluate as training did at `step`: with the same augmentations, if there are any."""
        self._repeated_step = step

    def _next_step(self) -> int:
        if self._repeated_step is not None:
            return self._repeated_step + 1
        return self.trainer.global_step if self.trainer else 0

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer else 0

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer else 1
