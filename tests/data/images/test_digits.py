"""Proves the rotation and colour rules by their statistics on a large synthetic grey source."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dynmoe.config import environments
from dynmoe.data.images.digits import (
    ANGLES,
    colored,
    colored_digits,
    colored_mnist,
    rotated,
    rotated_digits,
    rotated_mnist,
)
from dynmoe.data.images.environments import ArrayEnvironment, Environment
from dynmoe.errors import DataError


def test_the_check_of_a_command_knows_the_names_of_the_environments() -> None:
    images, labels = grey(100)
    assert tuple(e.name for e in rotated(images, labels, 0)) == environments.ANGLES
    assert tuple(e.name for e in colored(images, labels, 0)) == environments.COLOURS


def grey(n: int) -> tuple[Tensor, Tensor]:
    """Images that carry their own digit: a square of grey value 10 * (digit + 1) in the middle."""
    labels = torch.arange(n) % 10
    images = torch.zeros(n, 28, 28, dtype=torch.uint8)
    images[:, 11:17, 11:17] = (10 * (labels + 1)).to(torch.uint8)[:, None, None]
    return images, labels


def arrays(environments: list[Environment]) -> list[ArrayEnvironment]:
    assert all(isinstance(e, ArrayEnvironment) for e in environments)
    return environments  # type: ignore[return-value]


def digits_in(environment: ArrayEnvironment) -> np.ndarray:
    return environment.images[:, :, 13, 13].amax(dim=1).int().numpy() // 10 - 1


def test_mnist_sizes_and_names() -> None:
    images, labels = torch.zeros(70_000, 1, 1, dtype=torch.uint8), torch.zeros(70_000).long()
    turned = rotated(images[:7_000], labels, seed=0)
    assert [len(e) for e in turned] == [1_167] * 4 + [1_166] * 2
    assert [e.name for e in turned] == ["0", "15", "30", "45", "60", "75"]
    painted = colored(images, labels, seed=0)
    assert [len(e) for e in painted] == [23_334, 23_333, 23_333]
    assert [e.name for e in painted] == ["+90%", "+80%", "-90%"]


def test_colour_and_label_agree_as_often_as_published() -> None:
    for e, agreement in zip(arrays(colored(*grey(60_000), seed=0)), (0.9, 0.8, 0.1), strict=True):
        filled = e.images.flatten(2).any(dim=2).numpy()  # [N, 2]: channels that are not empty
        assert (filled.sum(axis=1) == 1).all()
        assert (filled.argmax(axis=1) == e.labels).mean() == pytest.approx(agreement, abs=0.01)
        assert ((digits_in(e) < 5) == e.labels).mean() == pytest.approx(0.75, abs=0.01)


def test_draws_follow_the_order_of_domainbed() -> None:
    images, labels = grey(30)
    generator = torch.Generator().manual_seed(7)
    order = torch.randperm(30, generator=generator)
    for i, (e, flip) in enumerate(
        zip(arrays(colored(images, labels, 7)), (0.1, 0.2, 0.9), strict=True)
    ):
        chosen = order[i::3]
        label = (labels[chosen] < 5).int() ^ (torch.rand(10, generator=generator) < 0.25).int()
        color = label ^ (torch.rand(10, generator=generator) < flip).int()
        assert e.labels.tolist() == label.tolist()
        assert e.images.flatten(2).any(dim=2)[:, 1].int().tolist() == color.tolist()


def test_rotation_is_counter_clockwise_about_the_centre() -> None:
    images = torch.zeros(60, 28, 28, dtype=torch.uint8)
    images[:, 13:15, 20:28] = 255  # a bar to the right of the centre
    environments = arrays(rotated(images, torch.arange(60) % 10, seed=0))
    rows, columns = np.mgrid[:28, :28] - 13.5
    for e, angle in zip(environments, ANGLES, strict=True):
        weight = e.images[0, 0].numpy() / 255
        x, y = (weight * columns).sum(), -(weight * rows).sum()
        assert np.degrees(np.arctan2(y, x)) == pytest.approx(angle, abs=3)


def test_labels_follow_their_images() -> None:
    for e in arrays(rotated(*grey(600), seed=3)):
        assert (digits_in(e) == e.labels).all()


@pytest.mark.parametrize("source", [rotated_digits, colored_digits])
def test_embedded_digits_depend_on_the_seed_alone(source) -> None:  # type: ignore[no-untyped-def]
    hashes = [[e.content_hash() for e in source(seed=seed)] for seed in (0, 0, 1)]
    assert hashes[0] == hashes[1] != hashes[2]
    assert sum(len(e) for e in source(seed=0)) == 1797
    assert arrays(source(seed=0))[0].images.shape[2:] == (28, 28)


def test_missing_mnist_says_where_it_belongs(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(DataError) as error:
        colored_mnist(str(tmp_path), seed=0)
    assert f"expected MNIST's four files in {tmp_path / 'MNIST' / 'raw'}" in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\0\0\x08\x03\0\0", b"\0\0\x08\x01\0\0\0\x09ab"])
def test_damaged_files_of_mnist_are_named(tmp_path: Path, content: bytes) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            (raw / f"{part}-{kind}-ubyte").write_bytes(content)
    with pytest.raises(DataError, match=f"{raw} are damaged .*Fetch them again"):
        rotated_mnist(str(tmp_path), seed=0)
