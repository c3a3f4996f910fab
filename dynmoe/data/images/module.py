"""DomainData: the environments of one data set as Lightning loaders."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table
from sklearn.linear_model import LogisticRegression
from torch.utils.data import DataLoader

from dynmoe.data.base import TaskData
from dynmoe.data.images.batches import (
    IN,
    OUT,
    EvalBatches,
    Example,
    Examples,
    Key,
    TrainBatches,
    class_balanced_weights,
    collate,
)
from dynmoe.data.images.environments import (
    ArrayEnvironment,
    Environment,
    FolderEnvironment,
    cached,
    data_hash,
    decoded_bytes,
    survey,
)
from dynmoe.data.protocol import IntArray, split
from dynmoe.errors import DataError


class DomainData(TaskData):
    """A DomainBed data set: every environment split in and out, some kept for testing.

    Training batches come from the training environments' in splits; evaluation covers both splits
    of every environment. `environments` is called in `setup`, which raises one DataError with all
    problems of the data; the other properties hold after it. Loaders give `sampling.Batch`.
    """

    modality = "image"
    libraries = ("timm", "torchvision")

    def __init__(
        self,
        name: str,
        environments: Callable[[], list[Environment]],
        test_envs: Sequence[int],
        image_size: int,
        batch_size: int,
        steps: int,
        eval_every: int,
        seed: int,
        trial_seed: int,
        holdout_fraction: float = 0.2,
        augment_eval: bool = True,
        accumulate: int = 1,
        class_balanced: bool = False,
        eval_batch_size: int = 64,
        workers: int | Literal["auto"] = "auto",
        root: str | None = None,
        verify: Literal["header", "decode", "none"] = "header",
        cache: bool | Literal["auto"] = "auto",
        cache_gb: float = 2.0,
        linear_baseline: bool = False,
    ) -> None:
        super().__init__()
        self.name = name
        self.root = root
        self.test_envs = list(test_envs)
        self.environments: list[Environment] = []
        self.splits: list[tuple[IntArray, IntArray]] = []
        self._make_environments = environments
        self._image_size = image_size
        self._batch_size = batch_size
        self._eval_batch_size = eval_batch_size
        self._steps = steps
        self._eval_every = eval_every
        self._accumulate = accumulate
        self._seed = seed
        self._trial_seed = trial_seed
        self._holdout_fraction = holdout_fraction
        self._augment_eval = augment_eval
        self._class_balanced = class_balanced
        self._workers = workers
        self._verify = verify
        self._cache = cache
        self._cache_gb = cache_gb
        self.linear_baseline = linear_baseline

    def setup(self, stage: str | None = None) -> None:
        """Reads, checks and splits the environments; a second call does nothing.

        Raises:
            DataError: the data cannot be trained on; lists every problem.
        """
        if self.environments:
            return
        environments = self._make_environments()
        splits = [
            split(len(e), self._trial_seed, env, self._holdout_fraction)
            for env, e in enumerate(environments)
        ]
        sizes, unreadable = self._survey(environments)
        problems = [
            *role_problems(environments, self.test_envs),
            *class_problems(environments),
            *batch_problems(
                {
                    e.name: len(in_indices)
                    for env, (e, (in_indices, _)) in enumerate(
                        zip(environments, splits, strict=True)
                    )
                    if env not in self.test_envs
                },
                batch_size=self._batch_size,
                parts=self._accumulate * self._world_size,
            ),
            *unreadable,
        ]
        if problems:
            raise DataError(
                "\n  ".join([f"data {self.name}: {len(problems)} problem(s)", *problems])
            )
        if self._to_be_cached(sizes):
            environments = list(map(cached, environments, sizes))
        self.environments, self.splits = environments, splits

    def _survey(self, environments: Sequence[Environment]) -> tuple[list[IntArray], list[str]]:
        files = [e for e in environments if isinstance(e, FolderEnvironment)]
        if self._verify == "none" and self._cache is False:
            return [], []
        sizes, unreadable = survey(files, decode=self._verify == "decode")
        return sizes, [] if self._verify == "none" else unreadable

    def _to_be_cached(self, sizes: Sequence[IntArray]) -> bool:
        fits = decoded_bytes(sizes) <= self._cache_gb * 2**30
        return bool(sizes) and (fits if self._cache == "auto" else self._cache)

    @property
    def train_envs(self) -> list[int]:
        return [env for env in range(len(self.environments)) if env not in self.test_envs]

    @property
    def env_names(self) -> list[str]:
        return [e.name for e in self.environments]

    @property
    def class_names(self) -> list[str]:
        return list(self.environments[0].class_names)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def channels(self) -> int:
        return self.environments[0].channels

    @property
    def backbone_arguments(self) -> dict[str, Any]:
        return {"num_classes": self.num_classes, "in_chans": self.channels}

    @property
    def task_arguments(self) -> dict[str, Any]:
        return {
            "num_classes": self.num_classes,
            "env_names": self.env_names,
        }

    @property
    def sample(self) -> tuple[torch.Tensor]:
        return (torch.empty(1, self.channels, self._image_size, self._image_size),)

    @property
    def facts(self) -> dict[str, Any]:
        return {
            "samples_per_step": self._batch_size * len(self.train_envs),
            "baseline": linear_baseline(self) if self.linear_baseline else None,
        }

    @property
    def steps(self) -> int:
        return self._steps

    @property
    def eval_every(self) -> int:
        return self._eval_every

    def epoch_at(self, step: int) -> float:
        return step / self.steps_per_epoch

    @property
    def sizes(self) -> dict[str, int]:
        """Images per split: {"<environment>/in": n, "<environment>/out": n, ...}."""
        return {
            f"{name}/{part}": len(indices)
            for name, splits in zip(self.env_names, self.splits, strict=True)
            for part, indices in zip(("in", "out"), splits, strict=True)
        }

    @property
    def steps_per_epoch(self) -> float:
        """DomainBed's epoch: batches in the smallest in split of all environments."""
        return min(len(splits[IN]) for splits in self.splits) / self._batch_size

    @property
    def data_hash(self) -> str:
        return data_hash(self.environments, self.splits)

    def counts(self) -> dict[str, dict[str, int]]:
        """Images per environment name and class name."""
        return {
            e.name: dict(
                zip(
                    e.class_names,
                    np.bincount(e.labels, minlength=self.num_classes).tolist(),
                    strict=True,
                )
            )
            for e in self.environments
        }

    def print_check(self, console: Console | None = None) -> None:
        """Table with one column per environment: its role, its splits, its images per class."""
        table = Table(title=f"{self.name}, data {self.data_hash}")
        table.add_column("")
        for env, name in enumerate(self.env_names):
            table.add_column(f"{env} {name}", justify="right")
        roles = ["test" if env in self.test_envs else "train" for env in range(len(self.splits))]
        table.add_row("role", *roles)
        for part in ("in", "out"):
            sizes = [str(self.sizes[f"{name}/{part}"]) for name in self.env_names]
            table.add_row(part, *sizes, end_section=part == "out")
        for name in self.class_names:
            table.add_row(name, *[str(per_class[name]) for per_class in self.counts().values()])
        (console or Console()).print(table)

    def train_dataloader(self) -> DataLoader[Example]:
        pools = {env: self.splits[env][0] for env in self.train_envs}
        weights = {
            env: class_balanced_weights(self.environments[env].labels[pool])
            for env, pool in pools.items()
        }
        batches = TrainBatches(
            pools=pools,
            weights=weights if self._class_balanced else None,
            batch_size=self._batch_size,
            seed=self._seed,
            steps=self._steps,
            eval_every=self._eval_every,
            next_step=self._next_step,
            accumulate=self._accumulate,
            rank=self._rank,
            world_size=self._world_size,
        )
        return self._loader(batches, persistent=True)

    def val_dataloader(self) -> DataLoader[Example]:
        batches = EvalBatches(
            splits=self.splits,
            augmented=frozenset(self.train_envs if self._augment_eval else ()),
            batch_size=self._eval_batch_size,
            seed=self._seed,
            next_step=self._next_step,
            rank=self._rank,
            world_size=self._world_size,
        )
        return self._loader(batches, persistent=False)

    def _loader(
        self, batches: TrainBatches | EvalBatches, *, persistent: bool
    ) -> DataLoader[Example]:
        workers = self.num_workers
        return DataLoader(
            Examples(self.environments, self._image_size),
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=workers,
            persistent_workers=persistent and workers > 0,
            pin_memory=self.trainer is not None
            and self.trainer.strategy.root_device.type == "cuda",
            # A loader draws a base seed at each pass: not from the generator the model uses.
            generator=torch.Generator(),
            # Forked workers share the decoded images; other ways to start would copy them.
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        )

    @property
    def num_workers(self) -> int:
        """Processes of a loader; training's wait while those of an evaluation work."""
        if self._workers != "auto":
            return self._workers
        if isinstance(self.environments[0], ArrayEnvironment):
            return 0
        return min(8, (os.cpu_count() or 1) - 1)


# What must hold before training: each check returns its problems, all are reported together.


def class_problems(environments: Sequence[Environment]) -> list[str]:
    """Environments must share two or more classes, each with images in every environment."""
    every_class = sorted({name for e in environments for name in e.class_names})
    problems = []
    if len(every_class) < 2:
        problems.append(f"two or more classes are needed; found {_counted(every_class)}")
    for e in environments:
        lacking = [name for name in every_class if name not in e.class_names]
        if lacking:
            problems.append(
                f"{e.name} lacks {_classes(lacking)} of the other environments. Add images of "
                "it here, or remove its folder everywhere."
            )
        counts = np.bincount(e.labels, minlength=len(e.class_names))
        empty = [name for name, count in zip(e.class_names, counts, strict=True) if count == 0]
        if empty:
            problems.append(f"{e.name} has no images in {_classes(empty)}. Add some, or remove it.")
    return problems


def role_problems(environments: Sequence[Environment], test_envs: Sequence[int]) -> list[str]:
    """Test environments must exist, and at least one environment must be left to train on."""
    if len(environments) < 2:
        found = _counted([e.name for e in environments])
        return [
            "two or more environments are needed: one to test on, others to train on; "
            f"found {found}"
        ]
    listing = "the data set has " + _join([f"{i} ({e.name})" for i, e in enumerate(environments)])
    beyond = [env for env in test_envs if not 0 <= env < len(environments)]
    if beyond:
        return [f"data.test_envs: there is no environment {_join(beyond)}; {listing}"]
    if not test_envs:
        return [f"data.test_envs: empty: name at least one environment; {listing}"]
    if len(set(test_envs)) == len(environments):
        return [
            f"data.test_envs: {list(test_envs)} leaves no environment to train on; {listing}. "
            "Leave at least one out of data.test_envs."
        ]
    return []


def batch_problems(in_sizes: Mapping[str, int], *, batch_size: int, parts: int) -> list[str]:
    """A batch must divide evenly, and fit in the in split of every training environment.

    DomainBed drops incomplete batches and starts over: with a smaller environment it hangs.
    """
    problems = []
    if batch_size % parts:
        problems.append(
            f"data.batch_size: {batch_size} images per environment do not divide into {parts} "
            f"parts (devices x trainer.accumulate_grad_batches). Use a multiple of {parts}."
        )
    small = [f"{name} ({size})" for name, size in in_sizes.items() if size < batch_size]
    if small:
        problems.append(
            f"data.batch_size: {batch_size} is more than the in split of {_join(small)}. "
            "Lower data.batch_size or add images."
        )
    return problems


def _classes(names: Sequence[str]) -> str:
    return f"{'class' if len(names) == 1 else 'classes'} {_join(names)}"


def _counted(names: Sequence[str]) -> str:
    return f"{len(names)}: {_join(names)}" if names else "none"


def _join(items: Sequence[object]) -> str:
    return ", ".join(map(str, items))


# What a network must beat: a linear classifier on pixels.

SIDE = 28  # pixels; larger images are shrunk to it


def linear_baseline(data: DomainData) -> dict[str, Any]:
    """Accuracy in [0, 1] of a logistic regression on both splits of every environment.

    It is fitted on the in splits of the training environments, without augmentation:
    {"name": ..., "scores": {"<environment>/in": {"accuracy": ...}, ...}}. `data` has been set up.
    """
    examples = Examples(data.environments, SIDE)

    def pixels(env: int, part: int) -> npt.NDArray[np.float32]:
        keys = [Key(env, part, index, None) for index in data.splits[env][part].tolist()]
        return np.stack([examples[key].image.flatten().numpy() for key in keys])

    def labels(env: int, part: int) -> IntArray:
        return data.environments[env].labels[data.splits[env][part]]

    # Stops earlier than scikit-learn's default: the same accuracy in a quarter of the time.
    classifier = LogisticRegression(tol=1e-3, max_iter=1000).fit(
        np.concatenate([pixels(env, IN) for env in data.train_envs]),
        np.concatenate([labels(env, IN) for env in data.train_envs]),
    )
    scores = {
        f"{name}/{split}": {
            "accuracy": float(classifier.score(pixels(env, part), labels(env, part)))
        }
        for env, name in enumerate(data.env_names)
        for part, split in ((IN, "in"), (OUT, "out"))
    }
    return {"name": "linear classifier on pixels", "scores": scores}
