#!/usr/bin/env bash
# Under Slurm, Lightning's Trainer.fit starts from any hpc_ckpt_*.ckpt in default_root_dir although it was given no
# checkpoint, no SLURM plugin is used and automatic requeueing is off.
#
# One expects fit(model, loader) without ckpt_path to start at step 0, and the files hpc_ckpt_*.ckpt, which
# SLURMEnvironment(auto_requeue=True) writes at a signal, to matter to that plugin alone. The search for them asks for the
# variable SLURM_NTASKS only (any job and any srun has it, a notebook in a job too). So a second training of another
# configuration in the same folder goes on from the first one's weights, optimizer and step.
#
# Seen with lightning 2.6.6, torch 2.14.1 and Python 3.11, 2026-11-29. Exits with 1 if it is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --target "$folder" torch==2.14.1 lightning==2.6.6
PYTHONPATH="$folder" python3 - <<'PYTHON'
import os
import sys
import tempfile
import warnings

os.environ["SLURM_NTASKS"] = "1"
os.environ["SLURM_JOB_NAME"] = "train"
warnings.filterwarnings("ignore")

import lightning as L
import torch
from lightning.fabric.plugins.environments import LightningEnvironment


class Task(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.steps = []

    def training_step(self, batch, index):
        self.steps.append(self.trainer.global_step)
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer(folder, steps):
    return L.Trainer(
        accelerator="cpu", max_steps=steps, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, plugins=[LightningEnvironment()],
    )


loader = torch.utils.data.DataLoader(torch.ones(8, 1), batch_size=1)
with tempfile.TemporaryDirectory() as folder:
    first = trainer(folder, 5)
    first.fit(Task(), loader)
    first.save_checkpoint(os.path.join(folder, "hpc_ckpt_1.ckpt"))
    second, task = trainer(folder, 7), Task()
    second.fit(task, loader)
    print("steps that a training without a checkpoint took:", task.steps)
    sys.exit(0 if task.steps == [5, 6] else 1)
PYTHON
