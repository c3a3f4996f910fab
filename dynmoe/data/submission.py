"""The files that the GLUE server (gluebenchmark.com) takes: one prediction a line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from dynmoe.data.glue_tasks import GlueTask


def write_submission(
    folder: Path,
    task: GlueTask,
    test_set: str,
    index: npt.NDArray[np.int64],
    prediction: npt.NDArray[np.float32] | npt.NDArray[np.int64],
) -> Path:
    """Write `index` [N] and `prediction` [N] as the server names and spells them, by index.

    A regression's numbers are put into STS-B's range, 0 to 5.
    """
    order = np.argsort(index)
    lines = ["index\tprediction"]
    for row, value in zip(index[order].tolist(), prediction[order].tolist(), strict=True):
        lines.append(f"{row}\t{_spelled(task, value)}")
    file = folder / task.submission[test_set]
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def _spelled(task: GlueTask, value: float) -> str:
    if task.regression:
        return f"{min(5.0, max(0.0, value)):.3f}"
    return task.labels[int(value)] if task.text_labels else str(int(value))
