#!/usr/bin/env bash
# An average of weights that includes buffers never clears a boolean mask again, or fails at it.
#
# AveragedModel(use_buffers=True) of PyTorch averages every buffer, boolean masks too, and so do Lightning's
# WeightAveraging and EMAWeightAveraging, where use_buffers=True is the default. One expects a mask to be copied, or to
# follow after many updates. With an exponential average the mean of a bool is cast back to bool, so that whatever is not
# exactly 0 is True: an entry that was True once stays True, however often the model's False is averaged in. Without
# avg_fn (the plain mean) the second update raises NotImplementedError, as bool tensors have no difference.
# use_buffers=False copies buffers, masks included.
#
# Seen with torch 2.14.1 and Python 3.11, 2026-11-29. Exits with 1 if it is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --target "$folder" torch==2.14.1
PYTHONPATH="$folder" python3 - <<'PYTHON'
import sys

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn


class Masked(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2))
        self.register_buffer("alive", torch.tensor([True, True]))


def averaged(updates: int, **options) -> list[bool]:
    """The average's mask after so many updates with a model whose first entry is False."""
    model = Masked()
    average = AveragedModel(model, **options)
    average.update_parameters(model)
    model.alive[0] = False
    for _ in range(updates):
        average.update_parameters(model)
    return average.module.alive.tolist()


moving = averaged(1000, use_buffers=True, avg_fn=get_ema_avg_fn(0.5))
copied = averaged(1000, use_buffers=False, avg_fn=get_ema_avg_fn(0.5))
try:
    mean = str(averaged(1, use_buffers=True))
except NotImplementedError as error:
    mean = f"NotImplementedError: {error}"
print("model [False, True]; average after 1000 updates:", moving)
print("with use_buffers=False:", copied)
print("plain mean:", mean)
as_described = moving == [True, True] and copied == [False, True] and "NotImpl" in mean
sys.exit(0 if as_described else 1)
PYTHON
