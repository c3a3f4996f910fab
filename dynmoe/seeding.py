"""Seeds, splits and hyper-parameter draws as functions of their purpose, by DomainBed's rules.

Source: Gulrajani and Lopez-Paz, "In Search of Lost Domain Generalization", ICLR 2021;
domainbed/lib/misc.py, domainbed/hparams_registry.py and domainbed/scripts/train.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
Sampled = Callable[[np.random.RandomState], float]

MNIST_SETS = ("RotatedMNIST", "ColoredMNIST", "Debug28")
DIGITS_SETS = ("RotatedDigits", "ColoredDigits")


def seed_hash(*args: object) -> int:
    """Return a seed in [0, 2**31) from the printed tuple of `args`: the same on every machine.

    Arguments must be plain Python values: a NumPy integer prints differently.
    """
    return int(hashlib.md5(str(args).encode()).hexdigest(), 16) % 2**31


def split(n: int, trial_seed: int, env: int, holdout: float) -> tuple[IntArray, IntArray]:
    """Return (in, out) indices of environment `env` with `n` examples; out has int(holdout * n)."""
    order = np.arange(n)
    np.random.RandomState(seed_hash(trial_seed, env)).shuffle(order)
    held_out = int(n * holdout)
    return order[held_out:], order[:held_out]


def sample_hparams(dataset: str, hparams_seed: int, trial_seed: int) -> dict[str, float | int]:
    """Return lr, batch_size and weight_decay: defaults for seed 0, else the n-th draw.

    Each hyper-parameter has its own generator, so draws are shared by algorithms and data sets, and
    do not depend on the hyper-parameters that DomainBed draws beside these (resnet_dropout, ...).
    """
    run = seed_hash(hparams_seed, trial_seed)
    return {
        name: default if hparams_seed == 0 else draw(np.random.RandomState(seed_hash(run, name)))
        for name, (default, draw) in _registry(dataset).items()
    }


def _registry(dataset: str) -> dict[str, tuple[float | int, Sampled]]:
    small = dataset in MNIST_SETS + DIGITS_SETS
    lr_exponents = (-4.5, -2.5) if small else (-5.0, -3.5)
    batch_exponents = (3.0, 9.0) if small else (3.0, 5.5)
    if dataset == "DomainNet":
        batch_exponents = (3.0, 5.0)
    elif dataset in DIGITS_SETS:  # an environment of the embedded digits has a few hundred images
        batch_exponents = (3.0, 7.0)
    return {
        "lr": (1e-3 if small else 5e-5, lambda r: 10 ** r.uniform(*lr_exponents)),
        "batch_size": (64 if small else 32, lambda r: int(2 ** r.uniform(*batch_exponents))),
        "weight_decay": (0.0, lambda r: 0.0 if small else 10 ** r.uniform(-6, -2)),
    }
