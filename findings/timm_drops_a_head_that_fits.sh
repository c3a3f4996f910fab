#!/usr/bin/env bash
# timm leaves the head of a local file out, though it has as many classes as the model that is asked for.
#
# A classifier of 10 classes is saved and loaded again: create_model(name, num_classes=10, pretrained=True,
# pretrained_cfg_overlay=dict(file=...)). Shapes are equal, so one expects all weights. But timm compares num_classes
# with pretrained_cfg["num_classes"], which stays 1000 unless the overlay says 10 too, and drops the classifier without a
# word: the model starts at chance. checkpoint_path= in the place of pretrained=True loads it.
#
# Seen with timm 1.0.31, torch 2.14.1 and Python 3.11, 2026-11-30. Exits with 1 if it is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --target "$folder" timm==1.0.31 torch==2.14.1
PYTHONPATH="$folder" python3 - <<'PYTHON'
import sys
import tempfile
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

NAME, SIZE = "vit_tiny_patch16_224", {"embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 10}
with tempfile.TemporaryDirectory() as folder:
    file = str(Path(folder) / "model.safetensors")
    own = timm.create_model(NAME, **SIZE)
    torch.nn.init.normal_(own.head.weight)
    save_file(own.state_dict(), file)

    def equal(**how):
        found = timm.create_model(NAME, **SIZE, **how)
        body = torch.equal(found.blocks[0].attn.qkv.weight, own.blocks[0].attn.qkv.weight)
        return [body, torch.equal(found.head.weight, own.head.weight)]

    overlay = equal(pretrained=True, pretrained_cfg_overlay={"file": file})
    told = equal(pretrained=True, pretrained_cfg_overlay={"file": file, "num_classes": 10})
    path = equal(checkpoint_path=file)
print("body and head as in the file, by pretrained_cfg_overlay:", overlay)
print("with num_classes in the overlay too:", told)
print("by checkpoint_path:", path)
sys.exit(0 if overlay == [True, False] and told == path == [True, True] else 1)
PYTHON
