"""An image classifier as ONNX, with what its images go through before it.

Shape suffixes: B images, C channels, S pixels of a side.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from dynmoe.convert.runs import TrainedModel

NAME = "model.onnx"
ONE_FILE = 1_500_000_000
"""Bytes of weights up to which they are in model.onnx itself; protobuf ends at 2 GiB."""

IN_MEMORY = ("rotated_digits", "colored_digits", "rotated_mnist", "colored_mnist")
"""Environments whose images are arrays, which are not normalised."""


def write(trained: TrainedModel, folder: Path) -> float:
    """Write model.onnx and preprocessing.json; return the largest relative difference of logits
    between onnxruntime and the run's model, on random images, one and several."""
    size = int(trained.cfg.data.image_size)
    images_BCSS = torch.randn(3, trained.channels, size, size)
    export(trained.model, images_BCSS, folder / NAME)
    text = json.dumps(preprocessing(trained), indent=2)
    (folder / "preprocessing.json").write_text(text + "\n", encoding="utf-8")
    session = onnxruntime.InferenceSession(folder / NAME, providers=["CPUExecutionProvider"])
    return max(
        _difference(trained.model, session, images_BCSS[:count]) for count in (1, len(images_BCSS))
    )


def export(model: torch.nn.Module, images: Tensor, file: Path) -> None:
    """Write a model that takes any number of images of this size, ``image`` to ``logits``."""
    batch = torch.export.Dim("batch", min=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of versions of operators, and of PyTorch's own code
        program = torch.onnx.export(
            model.eval(),
            (images,),
            dynamo=True,
            input_names=["image"],
            output_names=["logits"],
            dynamic_shapes=({0: batch},),
            verbose=False,
        )
    assert program is not None
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    program.save(file, external_data=weights > ONE_FILE)


def preprocessing(trained: TrainedModel) -> dict[str, Any]:
    """Return the path from an image to the input of the model, and the names of its classes."""
    data = trained.cfg.data
    normalised = not str(data.environments._target_).endswith(IN_MEMORY)
    channels, size = trained.channels, int(data.image_size)
    return {
        "input": {"name": "image", "type": "float32", "shape": ["batch", channels, size, size]},
        "output": {"name": "logits", "classes": trained.class_names},
        "steps": ["resize to a square without a crop, bilinear, antialiased", "divide by 255"]
        + ["subtract mean, divide by std"] * normalised,
        "image_size": size,
        "mean": list(data.mean) if normalised else [0.0] * channels,
        "std": list(data.std) if normalised else [1.0] * channels,
    }


@torch.no_grad()
def _difference(model: Any, session: Any, images: Tensor) -> float:
    ours = model(images)
    (theirs,) = session.run(None, {"image": images.numpy()})
    return float(np.abs(ours.numpy() - theirs).max() / max(1.0, float(ours.abs().max())))
