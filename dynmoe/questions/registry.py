"""The published question sets by name."""

from __future__ import annotations

from collections.abc import Callable

from dynmoe.errors import ConfigError
from dynmoe.questions.base import QuestionSet
from dynmoe.questions.exact import read_gqa
from dynmoe.questions.judged import read_llava_bench, read_mm_vet, read_vizwiz
from dynmoe.questions.mmbench import read_mmbench
from dynmoe.questions.mme import read_mme
from dynmoe.questions.pope import read_pope
from dynmoe.questions.scienceqa import read_scienceqa
from dynmoe.questions.vqa import read_textvqa, read_vqav2

Reader = Callable[[str, str | None], QuestionSet]

SETS: dict[str, Reader] = {
    "vqav2": read_vqav2,
    "gqa": read_gqa,
    "scienceqa": read_scienceqa,
    "textvqa": read_textvqa,
    "pope": read_pope,
    "mme": read_mme,
    "vizwiz": read_vizwiz,
    "mmbench": read_mmbench,
    "llava_bench": read_llava_bench,
    "mm_vet": read_mm_vet,
}


def read_question_set(name: str, root: str, images: str | None = None) -> QuestionSet:
    """A published set, read from the folder `root`; `images` is its image folder if elsewhere.

    Raises:
        ConfigError: no set of this name.
        DataError: files are missing or damaged; lists every missing one.
    """
    if name not in SETS:
        raise ConfigError(f"no question set {name}. Choose one of {', '.join(SETS)}.")
    return SETS[name](root, images)
