"""DomainData: the environments of one data set as Lightning loaders."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch.utils.data import DataLoader, Sampler

from dynmoe.data.base import TaskData
from dynmoe.data.images.batches import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    IN,
    OUT,
    EnvironmentDraw,
    ImageEvalBatches,
    ImageExamples,
    ImageKey,
    class_balanced_weights,
    collate,
)
from dynmoe.data.images.checks import (
    batch_problems,
    class_problems,
    lacking_classes,
    positions,
    repeated_files,
    role_problems,
    unite_classes,
)
from dynmoe.data.images.environments import (
    ArrayEnvironment,
    Environment,
    FolderEnvironment,
    cached,
    data_hash,
    decoded_bytes,
)
from dynmoe.errors import DataError
from dynmoe.image_files import Survey, remarks, unreadable
from dynmoe.seeding import IntArray, split

HASHED = 20_000
"""Images of a data set of which copies are looked for."""

log = logging.getLogger(__name__)


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
    test_envs: list[int | str]
    """Environments kept for testing, by index or name; indices after `setup`."""
    image_size: int
    """Pixels; images are squeezed to a square."""
    batch_size: int
    """Images per training environment and optimizer step."""
    eval_batch_size: int = 64
    """Images per batch of an evaluation."""
    eval_images: int | None = None
    """Images of each split that are evaluated, the same in each evaluation; None: all."""
    trial_seed: int
    """Seed of the in/out splits."""
    holdout_fraction: float = 0.2
    """Share of an environment that is its out split."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Mean of each channel of photographs, in [0, 1], for the backbone's normalisation."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Standard deviation of each channel, likewise."""
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
    skip_invalid: bool = False
    """Decode every image before training, and leave out those that cannot be read."""
    checks: str | None = None
    """Folder that keeps the findings about image files, shared by all runs; None: none."""
    class_union: bool = False
    """Accept environments that lack classes of others: the classes are those of all."""
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
        test_envs, unknown = positions(self.test_envs, [e.name for e in envs])
        envs, sizes, unreadable = self._survey(envs)
        if self.class_union:
            envs = unite_classes(envs)
        splits = [
            split(len(each), self.trial_seed, env, self.holdout_fraction)
            for env, each in enumerate(envs)
        ]
        problems = [
            *([] if min(self.std) > 0 else [f"data.std: expected more than 0, found {self.std}"]),
            *(unknown or role_problems(envs, test_envs)),
            *class_problems(envs, union=self.class_union),
            *batch_problems(
                {
                    each.name: len(in_indices)
                    for env, (each, (in_indices, _)) in enumerate(zip(envs, splits, strict=True))
                    if env not in test_envs
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
        self.envs, self.splits, self.test_envs = envs, splits, [*test_envs]
        for text in lacking_classes(envs, self.train_envs):
            log.warning("data %s: %s", self.name, text)

    def _survey(
        self, envs: list[Environment]
    ) -> tuple[list[Environment], list[IntArray], list[str]]:
        """The environments, those of files without what is left out; sizes [N, 2] of the images of
        those; problems."""
        for e in envs:
            for what, count in (e.left_out if isinstance(e, FolderEnvironment) else {}).items():
                self.leave_out(f"{e.name}: {what}", count)
        if self.verify == "none" and self.cache is False and not self.skip_invalid:
            return envs, [], []
        kept: list[Environment] = []
        sizes: list[IntArray] = []
        bad: dict[Path, str] = {}
        surveys: list[Survey] = []
        for e in envs:
            if isinstance(e, FolderEnvironment):
                anew = self.checks is None or self.verify == "decode"
                kept_in = None if anew else Path(str(self.checks))
                found = e.survey(decode=self.verify == "decode" or self.skip_invalid, kept=kept_in)
                surveys.append(found)
                if found.bad and self.skip_invalid:
                    self.leave_out(f"{e.name}: images that cannot be read", len(found.bad))
                    e, found = e.without(found.bad), found.without_bad()
                bad |= e.unreadable(found)
                sizes.append(found.sizes)
            kept.append(e)
        for text in remarks(surveys):
            log.warning("data %s: %s", self.name, text)
        folders = [e for e in kept if isinstance(e, FolderEnvironment)]
        if self.verify == "decode" and sum(map(len, folders)) <= HASHED:
            for text in repeated_files(folders):
                log.warning("data %s: %s", self.name, text)
        return kept, sizes, [unreadable(bad)] if bad and self.verify != "none" else []

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
        }

    def baseline(self) -> dict[str, Any] | None:
        return linear_pixel_baseline(self) if self.linear_baseline else None

    def epoch_at(self, step: int) -> float:
        """DomainBed's: the epochs that are over before `step`."""
        return step / self.steps_per_epoch

    @property
    def evaluated(self) -> list[tuple[IntArray, IntArray]]:
        """The indices of `splits` that are evaluated: a split's order is random."""
        first = slice(self.eval_images)
        return [(in_indices[first], out_indices[first]) for in_indices, out_indices in self.splits]

    @property
    def sizes(self) -> dict[str, int]:
        """Evaluated images per split: {"<environment>/in": n, "<environment>/out": n, ...}; where
        these are not all, `train` too."""
        found = {
            f"{name}/{part}": len(indices)
            for name, parts in zip(self.env_names, self.evaluated, strict=True)
            for part, indices in zip(("in", "out"), parts, strict=True)
        }
        if self.eval_images is None:
            return found
        return {"train": sum(len(self.splits[env][IN]) for env in self.train_envs), **found}

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
            table.add_column(f"{env} {escape(name)}", justify="right")
        table.add_column("all", justify="right")
        roles = ["test" if env in self.test_envs else "train" for env in range(len(self.splits))]
        table.add_row("role", *roles)

        def add(name: str, counts: Sequence[int], end: bool = False) -> None:
            table.add_row(name, *map(str, [*counts, sum(counts)]), end_section=end)

        for part, index in (("in", IN), ("out", OUT)):
            add(part, [len(parts[index]) for parts in self.splits])
        if self.eval_images is not None:
            add("evaluated", [sum(map(len, parts)) for parts in self.evaluated])
        add("images", list(map(len, self.envs)), end=True)
        for label, name in enumerate(self.class_names):
            add(escape(name), [int((e.labels == label).sum()) for e in self.envs])
        (console or Console()).print(table)

    def train_dataloader(self) -> Any:
        names = {env: self.env_names[env] for env in self.train_envs}
        pools = {env: self.splits[env][IN] for env in self.train_envs}
        if self.mixture is not None:
            pools = {env: self._train_rows[name] for env, name in names.items()}
        weights = {
            env: class_balanced_weights(self.envs[env].labels[pool]) for env, pool in pools.items()
        }
        draw = EnvironmentDraw(
            pools,
            weights if self.class_balanced else None,
            self.batch_size,
            self.plan.seed,
            self.mixture,
            names,
        )
        batches = self._step_batches(draw)
        return self._in_windows(self._image_loader(batches, keep_workers=True), batches)

    def sources(self) -> dict[str, tuple[IntArray, IntArray | None]]:
        """The in splits of the training environments."""
        return {self.env_names[env]: (self.splits[env][IN], None) for env in self.train_envs}

    @property
    def mixed_batch_size(self) -> int:
        return self.batch_size * len(self.train_envs)

    def _probed(self) -> tuple[ImageExamples, Callable[[Any], Any]]:
        return self._examples(), collate

    def _probe_keys(self, source: str, rows: IntArray) -> list[ImageKey]:
        env = self.env_names.index(source)
        return [ImageKey(env, IN, row, None) for row in rows.tolist()]

    def val_dataloader(self) -> DataLoader[Any]:
        batches = ImageEvalBatches(
            splits=self.evaluated,
            augmented=frozenset(self.train_envs if self.augment_eval else ()),
            batch_size=self.eval_batch_size,
            seed=self.plan.seed,
            next_step=self._next_step,
            rank=self._rank,
            world_size=self._world_size,
        )
        return self._image_loader(batches, keep_workers=False)

    def _image_loader(self, batches: Sampler[Any], keep_workers: bool) -> DataLoader[Any]:
        return self._loader(self._examples(), batches, collate, self.num_workers, keep_workers)

    def _examples(self) -> ImageExamples:
        return ImageExamples(self.envs, self.image_size, self.mean, self.std)

    @property
    def num_workers(self) -> int:
        """Processes of a loader; training's wait while those of an evaluation work."""
        if self.workers != "auto":
            return self.workers
        if isinstance(self.envs[0], ArrayEnvironment):
            return 0
        return min(8, (os.cpu_count() or 1) - 1)


# The baseline that a network must beat: a linear classifier on pixels.

SIDE = 28  # pixels; larger images are shrunk to it


def linear_pixel_baseline(data: DomainData) -> dict[str, Any]:
    """Accuracy in [0, 1] of a logistic regression on what is evaluated of every environment.

    It is fitted on the in splits of the training environments, without augmentation:
    {"name": ..., "scores": {"<environment>/in": {"accuracy": ...}, ...}}. `data` has been set up.
    """
    from sklearn.linear_model import LogisticRegression  # half a second
    from threadpoolctl import threadpool_limits

    examples = ImageExamples(data.envs, SIDE)

    def pixels(env: int, part: int, indices: IntArray) -> npt.NDArray[np.float32]:
        keys = [ImageKey(env, part, index, None) for index in indices.tolist()]
        return np.stack([examples[key].image.flatten().numpy() for key in keys])

    def accuracy(env: int, part: int) -> float:
        indices = data.evaluated[env][part]
        return float(classifier.score(pixels(env, part, indices), data.envs[env].labels[indices]))

    # NOTE: the order in which threads add decides where a fit stops, by a point of accuracy.
    with threadpool_limits(1):
        # Stops earlier than scikit-learn's default: the same accuracy in a quarter of the time.
        classifier = LogisticRegression(tol=1e-3, max_iter=1000).fit(
            np.concatenate([pixels(env, IN, data.splits[env][IN]) for env in data.train_envs]),
            np.concatenate(
                [data.envs[env].labels[data.splits[env][IN]] for env in data.train_envs]
            ),
        )
        scores = {
            f"{name}/{split}": {"accuracy": accuracy(env, part)}
            for env, name in enumerate(data.env_names)
            for part, split in ((IN, "in"), (OUT, "out"))
        }
    return {"name": "linear classifier on pixels", "scores": scores}
