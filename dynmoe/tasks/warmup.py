"""The schedule of LLaVA's learning rate."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_cosine_schedule_with_warmup


def cosine_with_warmup(optimizer: Optimizer, num_training_steps: int, warmup: float) -> LRScheduler:
    """Up over the first ``warmup`` share of the steps (rounded up, as transformers' ratio is), then
    down to 0 along half a cosine."""
    return get_cosine_schedule_with_warmup(
        optimizer, math.ceil(warmup * num_training_steps), num_training_steps
    )
