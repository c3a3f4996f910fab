"""ScienceQA (Lu et al., NeurIPS 2022) to train on: asked as the test set is, answered by a letter.

problems.json      pid_splits.json      images/train/<pid>/image.png
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from typing import Any, Literal

from dynmoe.data.conversations import ConversationList, questions_answered
from dynmoe.data.image_files import ImageFolder
from dynmoe.data.json_entries import file_digest
from dynmoe.errors import DataError
from dynmoe.questions.files import image_folder, locate, read_json, read_object
from dynmoe.questions.scienceqa import FIELDS, INSTRUCTION, LETTERS, SOURCE, prompt_text


def science_qa(
    root: str, images: str | None = None, split: Literal["train", "val"] = "train"
) -> ConversationList:
    """One conversation for each problem of a split, with its image where it has one.

    `images` is the folder of <pid>/image.png, else `images/<split>` below `root`.

    Raises:
        DataError: files are missing or damaged.
    """
    wanted = {"problems": ["problems.json"], "splits": ["pid_splits.json"]}
    defaults = image_folder(images, f"images/{split}", split)
    paths = locate("ScienceQA", root, wanted | defaults, SOURCE)
    problems = read_object(paths["problems"], FIELDS)
    splits = read_json(paths["splits"])
    if not isinstance(splits, dict) or not isinstance(splits.get(split), list):
        raise DataError(f"{paths['splits']}: expected an object with an array of ids at {split!r}.")
    ids = [str(id) for id in splits[split]]
    wrong = [id for id in ids if id not in problems or not _has_answer(problems[id])]
    if wrong:
        raise DataError(
            f"{paths['problems']}: of {len(ids):,} problems of {split}, {len(wrong):,} are not "
            f"there or their answer is not the place of a choice; the first is {wrong[0]}."
        )
    made = [
        questions_answered(
            id,
            [(prompt_text(problems[id]) + INSTRUCTION, LETTERS[problems[id]["answer"]])],
            [f"{id}/{problems[id]['image']}"] if problems[id]["image"] else [],
        )
        for id in ids
    ]
    folder = ImageFolder(paths["images"])
    folder.check((key for each in made for key in each.images), str(paths["problems"]))
    content = f"{split} {file_digest(paths['problems'], paths['splits'])}"
    digest = sha256(content.encode()).hexdigest()[:16]
    return ConversationList(f"scienceqa {split}", digest, made, folder.load)


def _has_answer(problem: Mapping[str, Any]) -> bool:
    return problem["answer"] in range(min(len(problem["choices"]), len(LETTERS)))
