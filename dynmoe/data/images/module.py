"""DomainData: the environments of one data set as Lightning loaders."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits
from torch.utils.data import DataLoader, Sampler

from dynmoe.data.base import TaskData
from dynmoe.data.images.batches import (
    IN,
    OUT,
    EnvironmentDraw,
    ImageEvalBatches,
    ImageExamples,
    ImageKey,
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
from dynmoe.errors import DataError
from dynmoe.seeding import IntArray, split


@dataclass(eq=False, kw_only=True)
class DomainData(TaskData):
    """A DomainBed data set: every environment split in and out, some kept for testing.

    Training batches come from the training environments' in splits; evaluation covers both splits
    of every environment. `setup` raises one DataError with all problems of the data; the other
    properties hold after it. Loaders give `ImageBatch`.
    """

    modality = "image"
    libraries = ("timm", "torchvision")
    eval_after_first = True

    name: str
    """Name of the data set: the protocol's recipe is chosen by it."""
    environments: Callable[[], list[Environment]]
    """Reads the environments, in `setup`."""
    root: str | None = None
    """Folder that configurations pass on to `environments`; not read here."""
    test_envs: list[int]
    """Environments kept for testing, by index."""
    image_size: int
    """Pixels; images are squeezed to a square."""
    batch_size: int
    """Images per training environment and optimizer step."""
    eval_batch_size: int = 64
    """Images per batch of an evaluation."""
    trial_seed: int
    """Seed of the in/out splits."""
    holdout_fraction: float = 0.2
    """Share of an environment that is its out split."""
    augment_eval: bool = True
    """Evaluate training environments on augmented images, as DomainBed does."""
    class_balanced: bool = False
    """Draw every class of an environment equally often."""
    workers: int | Literal["auto"] = "auto"
    """Loader processes per device; auto: 0 for images in memory, else up to 8."""
    verify: Literal["header", "decode", "none"] = "header"
    """Part of every image file that is read before training."""
    cache: bool | Literal["auto"] = "auto"
    """Keep decoded images in memory; auto: if they need no more than `cache_gb`."""
    cache_gb: float = 2.0
    """GiB per device."""
    linear_baseline: bool = False
    """Fit a linear classifier on pixels to compare with."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.test_envs = list(self.test_envs)
        self.envs: list[Environment] = []
        self.splits: list[tuple[IntArray, IntArray]] = []  # (in, out) indices of each environment

    def setup(self, stage: str | None = None) -> None:
        """Read, check and split the environments; a second call does nothing.

        Raises:
            DataError: the data cannot be trained on; lists every problem.
        """
        if self.envs:
            return
        envs = self.environments()
        splits = [
            split(len(each), self.trial_seed, env, self.holdout_fraction)
            for env, each in enumerate(envs)
        ]
        sizes, unreadable = self._survey(envs)
        problems = [
            *role_problems(envs, self.test_envs),
            *class_problems(envs),
            *batch_problems(
                {
                    each.name: len(in_indices)
                    for env, (each, (in_indices, _)) in enumerate(zip(envs, splits, strict=True))
                    if env not in self.test_envs
                },
                batch_size=self.batch_size,
                parts=self._plan.accumulate * self._world_size,
            ),
            *unreadable,
        ]
        if problems:
            raise DataError(
                "\n  ".join([f"data {self.name}: {len(problems)} problem(s)", *problems])
            )
        fits = decoded_bytes(sizes) <= self.cache_gb * 2**30
        if sizes and (fits if self.cache == "auto" else self.cache):
            envs = list(map(cached, envs, sizes))
        self.envs, self.splits = envs, splits

    def _survey(self, envs: Sequence[Environment]) -> tuple[list[IntArray], list[str]]:
        files = [each for each in envs if isinstance(each, FolderEnvironment)]
        if self.verify == "none" and self.cache is False:
            return [], []
        sizes, unreadable = survey(files, decode=self.verify == "decode")
        return sizes, [] if self.verify == "none" else unreadable

    @property
    def train_envs(self) -> list[int]:
        return [env for env in range(len(self.envs)) if env not in self.test_envs]

    @property
    def env_names(self) -> list[str]:
        return [e.name for e in self.envs]

    @property
    def class_names(self) -> list[str]:
        return list(self.envs[0].class_names)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def channels(self) -> int:
        return self.envs[0].channels

    @property
    def backbone_arguments(self) -> dict[str, Any]:
        return {"num_classes": self.num_classes, "in_chans": self.channels}

    @property
    def task_arguments(self) -> dict[str, Any]:
        return {"num_classes": self.num_classes, "env_names": self.env_names}

    @property
    def sample(self) -> tuple[torch.Tensor]:
        return (torch.empty(1, self.channels, self.image_size, self.image_size),)

    @property
    def facts(self) -> dict[str, Any]:
        return {
            "samples_per_step": self.batch_size * len(self.train_envs),
            "baseline": linear_pixel_baseline(self) if self.linear_baseline else None,
        }

    def epoch_at(self, step: int) -> float:
        """DomainBed's: the epochs that are over before `step`."""
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
        return min(len(splits[IN]) for splits in self.splits) / self.batch_size

    @property
    def data_hash(self) -> str:
        return data_hash(self.envs, self.splits)

    def print_check(self, console: Console | None = None) -> None:
        """Print a table of the environments: role, splits and images per class."""
        table = Table(title=f"{self.name}, data {self.data_hash}")
        table.add_column("")
        for env, name in enumerate(self.env_names):
            table.add_column(f"{env} {name}", justify="right")
        roles = ["test" if env in self.test_envs else "train" for env in range(len(self.splits))]
        table.add_row("role", *roles)
        for part in ("in", "out"):
            sizes = [str(self.sizes[f"{name}/{part}"]) for name in self.env_names]
            table.add_row(part, *sizes, end_section=part == "out")
        for label, name in enumerate(self.class_names):
            table.add_row(name, *[str((e.labels == label).sum()) for e in self.envs])
        (console or Console()).print(table)

    def train_dataloader(self) -> DataLoader[Any]:
        pools = {env: self.splits[env][IN] for env in self.train_envs}
        weights = {
            env: class_balanced_weights(self.envs[env].labels[pool]) for env, pool in pools.items()
        }
        draw = EnvironmentDraw(
            pools, weights if self.class_balanced else None, self.batch_size, self.plan.seed
        )
        return self._image_loader(self._step_batches(draw), keep_workers=True)

    def val_dataloader(self) -> DataLoader[Any]:
        batches = ImageEvalBatches(
            splits=self.splits,
            augmented=frozenset(self.train_envs if self.augment_eval else ()),
            batch_size=self.eval_batch_size,
            seed=self.plan.seed,
            next_step=self._next_step,
            rank=self._rank,
            world_size=self._world_size,
        )
        return self._image_loader(batches, keep_workers=False)

    def _image_loader(self, batches: Sampler[Any], keep_workers: bool) -> DataLoader[Any]:
        examples = ImageExamples(self.envs, self.image_size)
        return self._loader(examples, batches, collate, self.num_workers, keep_workers)

    @property
    def num_workers(self) -> int:
        """Processes of a loader; training's wait while those of an evaluation work."""
        if self.workers != "auto":
            return self.workers
        if isinstance(self.envs[0], ArrayEnvironment):
            return 0
        return min(8, (os.cpu_count() or 1) - 1)


# Checks before training. Each returns its problems; all are reported together.


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


# The baseline that a network must beat: a linear classifier on pixels.

SIDE = 28  # pixels; larger images are shrunk to it


def linear_pixel_baseline(data: DomainData) -> dict[str, Any]:
    """Accuracy in [0, 1] of a logistic regression on both splits of every environment.

    It is fitted on the in splits of the training environments, without augmentation:
    {"name": ..., "scores": {"<environment>/in": {"accuracy": ...}, ...}}. `data` has been set up.
    """
    examples = ImageExamples(data.envs, SIDE)

    def pixels(env: int, part: int) -> npt.NDArray[np.float32]:
        keys = [ImageKey(env, part, index, None) for index in data.splits[env][part].tolist()]
        return np.stack([examples[key].image.flatten().numpy() for key in keys])

    def labels(env: int, part: int) -> IntArray:
        return data.envs[env].labels[data.splits[env][part]]

    # NOTE: the order in which threads add decides where a fit stops, by a point of accuracy.
    with threadpool_limits(1):
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
