#!/usr/bin/env bash
# Lightning's WeightAveraging averages boolean buffers: its default fails, its EMA makes the union of all masks.
#
# PyTorch's AveragedModel copies buffers (use_buffers=False). Lightning's callbacks hand it use_buffers=True, so that a
# mask among the buffers is averaged like a weight: for the mean PyTorch subtracts, which it refuses for booleans, at
# the second update; for the EMA it computes decay * old + (1 - decay) * new in floating point and copies that into the
# boolean buffer, where all but 0 is True: what was True once stays so. With use_buffers=False both are right.
#
# Seen with torch 2.14.1, lightning 2.6.6 and Python 3.11, 2026-11-29. Exits with 1 if it is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 lightning==2.6.6
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'EOF'
import logging

import lightning as L
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Masked(L.LightningModule):
    """Of four inputs one is used, another one in every step."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 1)
        self.register_buffer("mask", torch.arange(4) == 0)

    def training_step(self, batch, index):
        self.mask.copy_(torch.arange(4) == index)
        return self.linear(batch[0] * self.mask).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def train(callback):
    torch.manual_seed(0)
    model = Masked()
    data = DataLoader(TensorDataset(torch.randn(4, 4)), 1)
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, callbacks=[callback], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )
    try:
        trainer.fit(model, data)
    except NotImplementedError as error:
        return f"fails: {str(error)[:60]}"
    return str(model.mask.int().tolist())


found = {
    "WeightAveraging()": train(WeightAveraging()),
    "EMAWeightAveraging()": train(EMAWeightAveraging()),
    "EMAWeightAveraging(use_buffers=False)": train(EMAWeightAveraging(use_buffers=False)),
}
for name, mask in found.items():
    print(f"{name:40} mask at the end {mask}")
swa, ema, copied = found.values()
assert swa.startswith("fails: Subtraction") and ema == "[1, 1, 1, 1]" and copied == "[0, 0, 0, 1]"
EOF
