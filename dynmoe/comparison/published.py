"""Published results on GLUE's dev sets and on sets of questions, for the foot of tables of ours.

Source of GLUE's: the table of the UniF-MoE paper (arXiv 2608.10392), for BERT-large (cased)
fine-tuned in full with one MoE layer. It stands in for the papers of the other methods, which were
not read. Of the questions: MoE-LLaVA (arXiv 2401.15947), images of 336 pixels.
"""

from __future__ import annotations

MARK = "published"
NOTE = (
    f"Rows marked {MARK}: BERT-large, fine-tuned in full, as the paper of UniF-MoE (arXiv "
    "2608.10392) gives them for all of these methods, the epoch and the learning rate chosen by "
    "the dev score itself; second-hand, and no yardstick for another backbone."
)

TASKS = ("cola", "mrpc", "qnli", "mnli", "rte")
ROWS = {
    "dense": (64.03, 89.36, 92.46, 86.61, 74.37),
    "top-1 of 16": (63.63, 89.81, 92.39, 86.63, 74.01),
    "top-2 of 16": (64.71, 90.18, 92.53, 86.73, 72.32),
    "top-4 of 16": (64.12, 89.74, 92.65, 86.59, 75.33),
    "top-8 of 16": (64.37, 90.35, 92.49, 86.51, 73.53),
    "mean of 8 fixed settings": (64.30, 89.94, 92.49, 86.61, 74.07),
    "DynMoE": (65.17, 90.64, 92.59, 86.37, 73.41),
    "MASS": (65.62, 90.58, 92.62, 86.74, 75.33),
    "UniF-MoE": (66.83, 91.57, 93.10, 86.84, 75.47),
}


def published(method: str, dataset: str) -> float | None:
    """Times 100, in the task's own measure; None for a data set that the table lacks."""
    return dict(zip(TASKS, ROWS[method], strict=True)).get(dataset.lower())


# Sets of questions whose published scores can be computed from files, and the key of a result that
# has the same measure: of ScienceQA the questions with images, of MME the points of perception.
QUESTIONS = {
    "gqa": "score",
    "scienceqa": "img",
    "textvqa": "score",
    "pope": "score",
    "mme": "perception_points",
}
QUESTION_ROWS = {
    "LLaVA-1.5 7B, dense": (62.0, 66.8, 58.2, 85.9, 1510.7),
    "LLaVA-1.5 13B, dense": (63.3, 71.6, 61.3, 85.9, 1531.3),
    "MoE-LLaVA StableLM-1.6B, top-2 of 4": (60.3, 62.6, 50.1, 85.7, 1318.2),
    "MoE-LLaVA Qwen-1.8B, top-2 of 4": (61.5, 63.1, 48.0, 87.0, 1291.6),
    "MoE-LLaVA Phi-2-2.7B, top-2 of 4": (61.4, 68.5, 51.4, 86.3, 1423.0),
}
QUESTION_NOTE = (
    f"Rows marked {MARK}: as the paper of MoE-LLaVA (arXiv 2401.15947) gives them, images of 336 "
    "pixels, LLaVA's data; no yardstick for other backbones or data."
)


def published_answers(model: str) -> dict[str, float]:
    """By set; per cent, of MME points."""
    return dict(zip(QUESTIONS, QUESTION_ROWS[model], strict=True))
