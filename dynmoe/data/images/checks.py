"""Checks of environments before training. Each returns its problems; all are reported together."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np

from dynmoe.data.images.environments import Environment, FolderEnvironment


def positions(test_envs: Sequence[int | str], names: Sequence[str]) -> tuple[list[int], list[str]]:
    """The indices of environments given by index or name; problems of what is neither, or both."""
    named = [env for env in test_envs if isinstance(env, int) and str(env) in names]
    if unclear := [env for env in named if not 0 <= env < len(names) or names[env] != str(env)]:
        quoted = ",".join(f'"{env}"' for env in unclear)
        return [], [
            f"data.test_envs: {_join(unclear)} without quotes is an index, and here also the name "
            f"of an environment; {_listing(names)}. Quote names: 'data.test_envs=[{quoted}]', or "
            "rename the folders"
        ]
    found = [names.index(env) if env in names else env for env in test_envs]
    unknown = [env for env in found if isinstance(env, str)]
    if not unknown:
        return [env for env in found if not isinstance(env, str)], []
    return [], [f"data.test_envs: there is no environment {_join(unknown)}; {_listing(names)}"]


def class_problems(environments: Sequence[Environment], *, union: bool) -> list[str]:
    """Environments must share two or more classes, each with images in every environment; with
    `union` in one of them."""
    every_class = _classes_of(environments)
    problems = []
    if len(every_class) < 2:
        problems.append(f"two or more classes are needed; found {_counted(every_class)}")
    if union:
        missing = [_missing(e) for e in environments]
        empty = [name for name in every_class if all(name in each for each in missing)]
        if empty:
            problems.append(
                f"no environment has images in {_classes(empty)}. Add some, or remove it."
            )
        return problems
    for e in environments:
        lacking = [name for name in every_class if name not in e.class_names]
        if lacking:
            other_case = {name.casefold(): name for name in e.class_names}
            alike = [
                other_case[name.casefold()] for name in lacking if name.casefold() in other_case
            ]
            problems.append(
                f"{e.name} lacks {_classes(lacking)} of the other environments. "
                + (f"It has {_join(alike)}: give both one spelling. " if alike else "")
                + "Add images of it here, remove its folder everywhere, or take the classes of all "
                "with data.class_union=true."
            )
        if empty := [name for name in _missing(e) if name not in lacking]:
            problems.append(
                f"{e.name} has no images in {_classes(empty)}. Add some, remove it, or accept that "
                "with data.class_union=true."
            )
    return problems


def _classes_of(environments: Sequence[Environment]) -> list[str]:
    return sorted({name for e in environments for name in e.class_names})


def _missing(environment: Environment) -> list[str]:
    counts = np.bincount(environment.labels, minlength=len(environment.class_names))
    return [n for n, count in zip(environment.class_names, counts, strict=True) if count == 0]


def unite_classes(environments: Sequence[Environment]) -> list[Environment]:
    """The environments with labels that index the classes of all."""
    every_class = _classes_of(environments)
    place = {name: label for label, name in enumerate(every_class)}
    united = []
    for e in environments:
        labels = np.array([place[name] for name in e.class_names], dtype=np.int64)[e.labels]
        united.append(replace(e, labels=labels, class_names=tuple(every_class)))
    return united


def lacking_classes(
    environments: Sequence[Environment], train_envs: Sequence[int]
) -> Iterator[str]:
    """Warnings where classes of all are not in an environment, or not in any that is trained on."""
    missing = [_missing(e) for e in environments]
    for e, names in zip(environments, missing, strict=True):
        if names:
            yield f"{e.name} has no images of {_classes(names)}; it is measured on the others"
    unseen = [
        name
        for name in environments[0].class_names
        if all(name in missing[env] for env in train_envs)
    ]
    if unseen:
        yield f"no training environment has images of {_classes(unseen)}: it cannot be learnt"


def repeated_files(environments: Sequence[FolderEnvironment]) -> Iterator[str]:
    """Warnings where files of equal bytes lie in several environments or classes.

    Only files of equal size are read.
    """
    places = [
        (e.path(index), e.name, e.class_names[e.labels[index]], size)
        for e in environments
        for index, size in enumerate(e.bytes_N.tolist())
        if size > 0
    ]
    sizes = Counter(size for *_, size in places)
    copies: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for path, name, class_name, size in places:
        if sizes[size] > 1:
            with suppress(OSError), path.open("rb") as file:
                copies[hashlib.file_digest(file, "sha256").hexdigest()].append((name, class_name))
    for what, place in (("environments", 0), ("classes", 1)):
        several = [each for each in copies.values() if len({one[place] for one in each}) > 1]
        if several:
            yield (
                f"{sum(map(len, several))} image files are byte for byte the same as one in "
                f"another of the {what}, e.g. {_join(['/'.join(one) for one in several[0][:2]])}"
            )


def role_problems(environments: Sequence[Environment], test_envs: Sequence[int]) -> list[str]:
    """Test environments must exist, and at least one environment must be left to train on."""
    if len(environments) < 2:
        found = _counted([e.name for e in environments])
        return [
            "two or more environments are needed: one to test on, others to train on; "
            f"found {found}. The layout is environment/class/image"
        ]
    listing = _listing([e.name for e in environments])
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


def _listing(names: Sequence[str]) -> str:
    return "the data set has " + _join([f"{i} ({name})" for i, name in enumerate(names)])


def _classes(names: Sequence[str]) -> str:
    return f"{'class' if len(names) == 1 else 'classes'} {_join(names)}"


def _counted(names: Sequence[str]) -> str:
    return f"{len(names)}: {_join(names)}" if names else "none"


def _join(items: Sequence[object]) -> str:
    return ", ".join(map(str, items))
