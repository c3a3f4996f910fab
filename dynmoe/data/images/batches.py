"""Which images make the batch of a step: pure functions of (seed, step).

Nothing here has a state to save: a run that was killed continues with the very batches and
augmentations it would have had, on any number of ranks and workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler, default_collate
from torchvision import transforms
from torchvision.transforms import functional

from dynmoe.data.images.environments import Environment
from dynmoe.data.mixing import Mixture
from dynmoe.seeding import IntArray, seed_hash

IN, OUT = 0, 1

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class ImageKey(NamedTuple):
    """Names one example of a batch; `draw_seed` seeds its augmentation, None: not augmented."""

    env: int
    split: int
    item: int
    draw_seed: int | None


class ImageBatch(NamedTuple):
    """image [B, C, H, W] float32; label, env and split (0 in, 1 out) [B] int64."""

    image: Tensor
    label: Tensor
    env: Tensor
    split: Tensor

    @property
    def inputs(self) -> tuple[Tensor]:
        """The backbone's positional arguments."""
        return (self.image,)


class ImageExample(NamedTuple):
    """One row of an ImageBatch before collation."""

    image: Tensor
    label: int
    env: int
    split: int


def collate(examples: list[ImageExample]) -> ImageBatch:
    return ImageBatch(*default_collate(examples))


class ImageExamples(Dataset[ImageExample]):
    """All environments in one dataset, so that one pool of workers serves them all."""

    def __init__(
        self,
        environments: Sequence[Environment],
        image_size: int,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        self.environments = environments
        self.image_size = image_size
        self.augmented = augmented(image_size, mean, std)
        self.plain = plain(image_size, mean, std)

    def __getitem__(self, key: ImageKey) -> ImageExample:
        environment = self.environments[key.env]
        image = environment.load(key.item)
        if isinstance(image, Tensor):
            pixels = scaled(image, self.image_size)
        elif key.draw_seed is None:
            pixels = self.plain(image)
        else:
            # NOTE: torchvision draws from torch's global generator. It is seeded by the key, so
            # that an augmentation depends neither on the worker that makes it nor on what that has
            # made before, and restored: without workers the model draws from it too.
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(key.draw_seed)
                pixels = self.augmented(image)
        return ImageExample(pixels, int(environment.labels[key.item]), key.env, key.split)


@dataclass(frozen=True, eq=False)
class EnvironmentDraw:
    """The batch of a step: `batch_size` examples of every pool, one environment after the other.

    They are drawn with replacement, as DomainBed's InfiniteDataLoader draws them. A pool holds a
    training environment's in split. A draw is cut into equal slices of each environment.

    With a `mixture`, whose sources are the pools' `names`, the batch is as large, and its weights
    say how many examples of it each pool has.
    """

    pools: Mapping[int, IntArray]
    weights: Mapping[int, npt.NDArray[np.float64]] | None
    """Sampling probabilities of the entries of each pool; None: uniform."""
    batch_size: int
    seed: int
    mixture: Mixture | None = None
    names: Mapping[int, str] = field(default_factory=dict)

    def __call__(self, step: int, parts: int) -> list[list[ImageKey]]:
        if self.mixture is not None:
            counts = dict(zip(self.mixture.names, self.mixture.counts_at(step), strict=True))
            keys = [
                key
                for env in self.pools
                for key in self.of_environment(step, env, int(counts[self.names[env]]))
            ]
            return [keys[part::parts] for part in range(parts)]
        draws = [self.of_environment(step, env) for env in self.pools]
        size = self.batch_size // parts
        return [
            [key for keys in draws for key in keys[start : start + size]]
            for start in range(0, size * parts, size)
        ]

    def of_environment(self, step: int, env: int, count: int | None = None) -> list[ImageKey]:
        """The `count` examples of one environment at one step; None: `batch_size` of them."""
        count = self.batch_size if count is None else count
        # NOTE: seeded by the environment's number, not by its place among the pools: another choice
        # of test environments leaves the draws of those that remain as they were.
        rng = np.random.default_rng(seed_hash(self.seed, "batch", step, env))
        weights = None if self.weights is None else self.weights[env]
        items = rng.choice(self.pools[env], count, p=weights)
        # NOTE: one for each draw, not for each image: drawn twice it is augmented in two ways.
        draw_seeds = rng.integers(2**63, size=count)
        return [
            ImageKey(env, IN, item, draw_seed)
            for item, draw_seed in zip(items.tolist(), draw_seeds.tolist(), strict=True)
        ]


@dataclass(frozen=True, eq=False)
class ImageEvalBatches(Sampler[list[ImageKey]]):
    """Every example once, environment by environment, in before out, never mixed in a batch.

    Environments in `augmented` are seen through the training transform (DomainBed evaluates its
    training environments so), seeded by the last optimizer step. Rank r takes batches r, r +
    world_size, ...
    """

    splits: Sequence[tuple[IntArray, IntArray]]
    augmented: frozenset[int]
    batch_size: int
    seed: int
    next_step: Callable[[], int]
    rank: int = 0
    world_size: int = 1

    def __len__(self) -> int:
        return len(self._slices()[self.rank :: self.world_size])

    def __iter__(self) -> Iterator[list[ImageKey]]:
        # NOTE: seeded by the step that the evaluation follows, so that each evaluation sees other
        # augmentations, and a repeated one the same.
        step = self.next_step() - 1
        for env, part, start in self._slices()[self.rank :: self.world_size]:
            items = self.splits[env][part][start : start + self.batch_size].tolist()
            seeds = (
                seed_hash(self.seed, "eval", step, env, item) if env in self.augmented else None
                for item in items
            )
            yield [ImageKey(env, part, *key) for key in zip(items, seeds, strict=True)]

    def _slices(self) -> list[tuple[int, int, int]]:
        return [
            (env, part, start)
            for env, parts in enumerate(self.splits)
            for part in (IN, OUT)
            for start in range(0, len(parts[part]), self.batch_size)
        ]


def class_balanced_weights(labels: IntArray) -> npt.NDArray[np.float64]:
    """Sampling probability [N] that gives every class the same share (domainbed/lib/misc.py)."""
    _, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    weights: npt.NDArray[np.float64] = 1.0 / (counts[inverse] * len(counts))
    return weights


# Image transforms of DomainBed (domainbed/datasets.py), for any image size.
#
# torchvision's v1 transforms on PIL images are kept on purpose: v2 and tensor inputs draw their
# random numbers, or resize, differently.

Transform = Callable[[Any], Tensor]


def augmented(
    image_size: int, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
) -> Transform:
    """Random crop, flip, colour jitter and grey-scale, then normalised: PIL RGB -> [3, S, S]."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(image_size, scale=(0.7, 1.0)),
            transforms.RandomHorizontalFlip(),
            transforms.ColorJitter(0.3, 0.3, 0.3, 0.3),
            transforms.RandomGrayscale(),
            *_normalised(mean, std),
        ]
    )


def plain(
    image_size: int, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
) -> Transform:
    """Squeezed to a square without a crop, then normalised: PIL RGB -> [3, S, S]."""
    resize = transforms.Resize((image_size, image_size))
    return transforms.Compose([resize, *_normalised(mean, std)])


def scaled(image: Tensor, image_size: int) -> Tensor:
    """Pixels in [0, 1], not normalised: uint8 [C, H, W] -> [C, S, S]."""
    pixels = image.float().div_(255)
    if image.shape[-2:] == (image_size, image_size):
        return pixels
    return functional.resize(pixels, [image_size, image_size], antialias=True)


def _normalised(mean: Sequence[float], std: Sequence[float]) -> list[Any]:
    # Tuples of floats: PyTorch reads a list of a configuration item by item in C, slowly, and makes
    # a ValueError of a Ctrl-C that comes meanwhile.
    return [transforms.ToTensor(), transforms.Normalize(tuple(mean), tuple(std))]
