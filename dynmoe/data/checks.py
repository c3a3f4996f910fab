"""What must hold before training: each check returns its problems, all are reported together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dynmoe.data.environments import Environment


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
