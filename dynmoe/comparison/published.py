"""Published results on GLUE's dev sets, for the foot of a table of ours.

Source: the table of the UniF-MoE paper (arXiv 2608.10392), for BERT-large (cased) fine-tuned in
full with one MoE layer. It stands in for the papers of the other methods, which were not read.
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
