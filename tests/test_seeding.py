"""Proves that seeds, splits and draws are DomainBed's, by values from its code and logs."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynmoe.seeding import sample_hparams, seed_hash, split


def test_split_seeds_of_trial_zero() -> None:
    assert [seed_hash(0, env) for env in range(6)] == [
        894182419,
        1514274641,
        1325548499,
        1796103049,
        1773288162,
        1833038383,
    ]


def test_split_of_ten_examples() -> None:
    in_indices, out_indices = split(10, trial_seed=0, env=0, holdout=0.2)
    assert out_indices.tolist() == [2, 3]
    assert in_indices.tolist() == [8, 1, 4, 5, 0, 9, 6, 7]


def test_split_sizes_of_vlcs() -> None:
    sizes = [1415, 2656, 3282, 3376]
    splits = [split(n, trial_seed=0, env=env, holdout=0.2) for env, n in enumerate(sizes)]
    assert [(len(inside), len(outside)) for inside, outside in splits] == [
        (1132, 283),
        (2125, 531),
        (2626, 656),
        (2701, 675),
    ]


@given(n=st.integers(0, 500), trial_seed=st.integers(0, 99), env=st.integers(0, 9))
def test_a_split_is_a_partition(n: int, trial_seed: int, env: int) -> None:
    in_indices, out_indices = split(n, trial_seed, env, holdout=0.2)
    assert sorted([*in_indices, *out_indices]) == list(range(n))


@pytest.mark.parametrize(
    ("dataset", "hparams_seed", "trial_seed", "expected"),
    [
        ("PACS", 1, 0, (2.7028930742148706e-05, 39, 0.00044832883881609976)),
        ("VLCS", 2, 0, (5.6841898471378446e-05, 25, 0.005100223533962902)),
        ("PACS", 1, 1, (2.2352558725944602e-05, 8, 1.9967320578799288e-06)),
        ("DomainNet", 1, 0, (2.7028930742148706e-05, 28, 0.00044832883881609976)),
        ("DomainNet", 2, 0, (5.6841898471378446e-05, 20, 0.005100223533962902)),
        ("RotatedMNIST", 1, 0, (0.00011906162909279594, 372, 0.0)),
        ("ColoredMNIST", 2, 0, (0.0003207929136369226, 126, 0.0)),
        ("PACS", 0, 0, (5e-5, 32, 0.0)),
        ("RotatedMNIST", 0, 3, (1e-3, 64, 0.0)),
    ],
)
def test_hyper_parameters(
    dataset: str, hparams_seed: int, trial_seed: int, expected: tuple[float, ...]
) -> None:
    hparams = sample_hparams(dataset, hparams_seed, trial_seed)
    assert tuple(hparams[name] for name in ("lr", "batch_size", "weight_decay")) == expected


def test_random_batches_fit_the_embedded_digits() -> None:
    drawn = [sample_hparams("RotatedDigits", seed, 0)["batch_size"] for seed in range(1, 100)]
    assert max(drawn) < 2**7 < split(299, 0, 0, 0.2)[0].size


def test_the_protocol_needs_no_torch() -> None:
    code = "import sys, dynmoe.seeding; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_split_indices_are_int64() -> None:
    assert all(part.dtype == np.int64 for part in split(7, 0, 0, 0.2))
