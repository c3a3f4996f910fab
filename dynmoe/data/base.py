"""The base of every data module, and the optimizer steps that its training batches are made for."""

from __future__ import annotations

import logging
import math
import sys
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler

from dynmoe.data.mixing import Mixing, Mixture, held_out, probe_slices, start_weights
from dynmoe.seeding import IntArray

log = logging.getLogger(__name__)

K = TypeVar("K")

Draw = Callable[[int, int], Sequence[list[K]]]
"""`draw(step, parts)`: the batch of an optimizer step, as the keys of `parts` micro-batches. It is
a pure function: no state has to be saved for a resumed run to train on the very same batches."""


@dataclass(frozen=True)
class StepPlan:
    """The optimizer steps of a run, counted from 0, and the steps that an evaluation follows.

    `training.build.build_data` makes it from the configuration and connects the data module to it,
    which completes it: `TaskData.plan`.
    """

    seed: int
    """Seed of the batches and of their augmentation."""
    steps: int = -1
    """Optimizer steps of the run; -1: `epochs` of the training data."""
    epochs: int | None = None
    """Passes over the training data, where `steps` is -1."""
    eval_every: int | None = None
    """Optimizer steps between two evaluations; None: the data module's default."""
    accumulate: int = 1
    """Micro-batches of a step on each rank (Lightning's accumulate_grad_batches)."""
    eval_after_first: bool = False
    """Whether evaluations are counted from the first step on: see `next_evaluated`."""
    by_source: bool = False
    """Whether the training data are a mixture of sources: `TaskData.mix` follows `setup`."""

    def next_evaluated(self, step: int) -> int:
        """The first step, not before `step`, that an evaluation follows.

        An evaluation follows every `eval_every` steps, that is steps n-1, 2n-1, 3n-1, ...; with
        `eval_after_first` steps 0, n, 2n, ... (domainbed/scripts/train.py); and always the last.
        """
        assert self.eval_every is not None
        counted = step if self.eval_after_first else step + 1
        ahead = -counted % self.eval_every
        return min(step + ahead, self.steps - 1)

    def evaluations_from(self, step: int) -> int:
        """How many evaluations follow `step` or a later one."""
        if step >= self.steps:
            return 0
        assert self.eval_every is not None
        return 1 + math.ceil((self.steps - 1 - self.next_evaluated(step)) / self.eval_every)


@dataclass(eq=False)
class StepBatches(Sampler[list[K]], Generic[K]):
    """Micro-batches of the steps from `next_step()` up to the next evaluation: one Lightning epoch.

    It has no length, since the stretch between two evaluations varies.
    """

    plan: StepPlan
    draw: Draw[K]
    next_step: Callable[[], int]
    rank: int = 0
    world_size: int = 1
    steps: range | None = None
    """The steps of the next pass, where they are others; see `InWindows`."""

    def stretch(self) -> range:
        """The steps up to the next evaluation."""
        # NOTE: Lightning keeps this object and iterates it again after each evaluation, and after a
        # resume: the step it starts at is asked for here, not when it is made.
        first = self.next_step()
        return range(first, self.plan.next_evaluated(first) + 1)

    def __iter__(self) -> Iterator[list[K]]:
        parts = self.plan.accumulate * self.world_size
        for step in self.stretch() if self.steps is None else self.steps:
            # NOTE: every rank draws the whole batch and takes its own micro-batches of it, m *
            # world_size + rank: the batch is the same one however many ranks and micro-batches.
            yield from self.draw(step, parts)[self.rank :: self.world_size]


@dataclass(eq=False)
class InWindows(Generic[K]):
    """A loader of `batches` that looks no further ahead than the weights of `mixture` are known.

    Workers fetch many batches before they are asked for: a pass of the loader ends with a window,
    and the next one begins when the first batch behind it is wanted.
    """

    loader: DataLoader[Any]
    batches: StepBatches[K]
    mixture: Mixture

    def __iter__(self) -> Iterator[Any]:
        stretch = self.batches.stretch()
        first = stretch.start
        while first < stretch.stop:
            end = min(self.mixture.known_until(first) + 1, stretch.stop)
            self.batches.steps = range(first, end)
            yield from self.loader
            first = end


class TaskData(LightningDataModule):
    """Sets of labelled examples. All but `name` and `test_envs` holds after `setup`.

    Subclasses are dataclasses, whose fields are the keys of the configuration's `data` node; `plan`
    is connected before `setup`. Batches have `inputs`, the backbone's positional arguments, and
    `label`.
    """

    modality: ClassVar[str]
    libraries: ClassVar[tuple[str, ...]]
    """Packages whose versions belong to a result."""
    eval_after_first: ClassVar[bool] = False
    """See `StepPlan`."""

    name: str
    batch_size: int
    """Examples per optimizer step; of images per training environment."""
    test_envs: list[Any]
    """Indices of the `env_names` that results are reported for."""
    skip_invalid: bool = False
    """Leave out, and count, what would otherwise be refused: images that cannot be read, entries
    that break a rule."""
    left_out: dict[str, int]
    """Counts of what is there but not used, by what it is; `run.json` holds it."""
    mixture: Mixture | None = None
    """Of a run that draws its sources by weights."""
    _plan: StepPlan
    _repeated_step: int | None = None
    _train_rows: dict[str, IntArray]
    _probe_rows: dict[str, IntArray]

    def __post_init__(self) -> None:
        super().__init__()
        self.left_out = {}

    def leave_out(self, what: str, count: int) -> None:
        """Note, and say, that `count` files or entries are not used."""
        self.left_out[what] = count
        log.warning("data %s: left out: %s: %d", self.name, what, count)

    def connect(self, plan: StepPlan) -> None:
        """Take the plan of the run, before `setup`."""
        self._plan = plan

    def restore(self, folder: Path) -> None:
        """Take what `keep` left in the folder of a run, before `setup`."""

    def keep(self, folder: Path) -> None:
        """Write what was learnt from the data, without which the run's model means nothing."""

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
        """Empty for regression and for answers in words."""

    @property
    @abstractmethod
    def backbone_arguments(self) -> dict[str, Any]:
        """Arguments of the backbone that follow from the data."""

    def check_backbone(self, backbone: nn.Module) -> None:
        """Check that the backbone can read the data.

        Raises:
            ConfigError: the data's texts are longer than the backbone has positions.
        """

    @property
    @abstractmethod
    def task_arguments(self) -> dict[str, Any]:
        """Arguments of the task that follow from the data."""

    @property
    @abstractmethod
    def sample(self) -> tuple[Any, ...]:
        """The backbone's inputs for a typical batch of one; values do not matter."""

    @property
    def plan(self) -> StepPlan:
        """The connected plan, complete."""
        return replace(
            self._plan,
            steps=self.steps,
            eval_every=self.eval_every,
            eval_after_first=self.eval_after_first,
        )

    @property
    def steps(self) -> int:
        """Optimizer steps of the run: those of the plan, else its epochs of this data."""
        if self._plan.steps > 0:
            return self._plan.steps
        assert self._plan.epochs is not None
        return round(self._plan.epochs * self.steps_per_epoch)

    @property
    def eval_every(self) -> int:
        """Optimizer steps between two evaluations: those of the plan, else an epoch."""
        return self._plan.eval_every or round(self.steps_per_epoch)

    @property
    @abstractmethod
    def steps_per_epoch(self) -> float: ...

    def epoch_at(self, step: int) -> float:
        """Epochs that are over after 0-based optimizer step `step`, as records count them."""
        return (step + 1) / self.steps_per_epoch

    @property
    @abstractmethod
    def sizes(self) -> dict[str, Any]:
        """Numbers of examples by evaluated set, and what else there is (train)."""

    @property
    @abstractmethod
    def data_hash(self) -> str:
        """Hash of the examples and their splits."""

    @property
    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Further facts for `run.json`: `samples_per_step`, ..."""

    def baseline(self) -> dict[str, Any] | None:
        """Scores of a simple method to compare with: `name`, `scores`. None: not asked for.

        It is fitted when training has ended: no step waits for it.

        Raises:
            ValueError: it cannot be fitted to these data.
        """
        return None

    @abstractmethod
    def print_check(self, console: Console | None = None) -> None:
        """Print a table of the sets and their sizes."""

    def sources(self) -> dict[str, tuple[IntArray, IntArray | None]]:
        """The training sets by name: their rows, and the tokens of each row; None: those of
        `mix`."""
        return {}

    @property
    def mixed_batch_size(self) -> int:
        """Examples of a step where sources are mixed."""
        return self.batch_size

    def mix(self, mixing: Mixing, tokens: int = 1) -> Mixture:
        """Draw training batches by the weights of a mixture; call it between `setup` and training.

        `tokens`: of an example, where the data do not tell. With probes, some of each source's
        examples are held out of training.

        Raises:
            ConfigError: fewer than two sources, weights that are not theirs, a source too small.
        """
        found = dict(sorted(self.sources().items()))
        seed = self.plan.seed
        self._train_rows, self._probe_rows = {}, {}
        for name, (rows, lengths) in found.items():
            probe = rows[:0]
            if mixing.every is not None:
                own = tokens if lengths is None else lengths
                rows, probe = held_out(rows, own, mixing.probe_tokens, seed, name)
                if lengths is not None:  # batches of similar lengths
                    probe = probe[np.argsort(lengths[probe], kind="stable")]
            self._train_rows[name], self._probe_rows[name] = rows, probe
        sizes = {name: len(rows) for name, rows in self._train_rows.items()}
        self.mixture = Mixture(
            sizes,
            self.mixed_batch_size,
            seed,
            start_weights(mixing, sizes),
            mixing.every if mixing.moves else None,
            {name: len(rows) for name, rows in self._probe_rows.items()},
        )
        return self.mixture

    def probes(self, batch_size: int) -> Iterator[tuple[int, Any]]:
        """Batches of this rank of what `mix` held out, each with the number of its source; None
        for a batch without an example."""
        examples, collate = self._probed()
        sizes = [len(rows) for rows in self._probe_rows.values()]
        names = [*self._probe_rows]
        for source, places in probe_slices(sizes, batch_size, self._rank, self._world_size):
            keys = self._probe_keys(names[source], self._probe_rows[names[source]][places])
            # As a loader does.
            fetch = getattr(examples, "__getitems__", None)
            found = fetch(keys) if fetch and keys else [examples[key] for key in keys]
            yield source, collate(found) if keys else None

    def _probed(self) -> tuple[Dataset[Any], Callable[[Any], Any]]:
        """The training examples, and what makes a batch of some."""
        raise NotImplementedError

    def _probe_keys(self, source: str, rows: IntArray) -> list[Any]:
        """Keys of rows of a source, as `_probed` takes them."""
        raise NotImplementedError

    def repeat_evaluation_of(self, step: int) -> None:
        """Evaluate as training did at `step`: with the same augmentations, if there are any.

        Training batches then begin at the step after it.
        """
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

    def _step_batches(self, draw: Draw[K]) -> StepBatches[K]:
        return StepBatches(self.plan, draw, self._next_step, self._rank, self._world_size)

    def _in_windows(self, loader: DataLoader[Any], batches: StepBatches[K]) -> Any:
        """The loader, or one that waits for weights which move in training."""
        if self.mixture is None or self.mixture.every is None:
            return loader
        return InWindows(loader, batches, self.mixture)

    def _loader(
        self,
        examples: Dataset[Any],
        batches: Sampler[Any],
        collate: Callable[[Any], Any],
        workers: int = 0,
        keep_workers: bool = False,
    ) -> DataLoader[Any]:
        """A loader of `batches` of keys; `keep_workers` from one evaluation to the next."""
        return DataLoader(
            examples,
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=workers,
            persistent_workers=keep_workers and workers > 0,
            pin_memory=self.trainer is not None
            and self.trainer.strategy.root_device.type == "cuda",
            # NOTE: a loader draws a base seed at each pass; without a separate generator it would
            # take it from the one the model uses, and shift all that the model draws.
            generator=torch.Generator(),
            # Forked workers share decoded images and tokens; other ways to start would copy them.
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        )
