"""Questions with answers: reading published sets, scoring, files for their own evaluators."""

from __future__ import annotations

from importlib import import_module
from os.path import expanduser
from typing import TYPE_CHECKING

from dynmoe.errors import ConfigError

if TYPE_CHECKING:
    from dynmoe.questions.base import QuestionSet

SETS = {
    "vqav2": "vqa",
    "gqa": "exact",
    "scienceqa": "choices",
    "textvqa": "vqa",
    "pope": "yes_no",
    "mme": "yes_no",
    "vizwiz": "judged",
    "mmbench": "choices",
    "llava_bench": "judged",
    "mm_vet": "judged",
}
"""The module of each published set; its function `read_<set>` reads it."""


def read_question_set(name: str, root: str, images: str | None = None) -> QuestionSet:
    """Read a published set from the folder `root`; `images` is its image folder if elsewhere.

    Both may begin with ~.

    Raises:
        ConfigError: no set of this name.
        DataError: files are missing or damaged; lists every missing one.
    """
    if name not in SETS:
        raise ConfigError(f"no question set {name}. Choose one of {', '.join(SETS)}.")
    module = import_module(f"dynmoe.questions.{SETS[name]}")
    folder, shown = (None if each is None else expanduser(each) for each in (root, images))
    found: QuestionSet = getattr(module, f"read_{name}")(folder, shown)
    return found
