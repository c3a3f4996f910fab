#!/usr/bin/env bash
# torchao's weight-only config for torch.int4 keeps as many bytes as for torch.int8: one a weight.
#
# IntxWeightOnlyConfig takes torch.int1 to torch.int8 and is the one stable config of those widths that runs on any CPU.
# One expects int4 weights to take half the bytes of int8 ones, as two of them fit into a byte and torch.int4 is a type of
# PyTorch. The values do have 16 levels, but they are kept as int8 tensors, in memory and in a file of torch.save. Packed
# int4 weights for CPUs are in torchao.prototype. The model's score at 4 bits can be told by this config, its size not.
#
# Seen with torchao 0.18.0, torch 2.14.1 and Python 3.11, 2026-11-29. Exits with 1 if it is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --target "$folder" torch==2.14.1 torchao==0.18.0
PYTHONPATH="$folder" python3 - <<'PYTHON'
import io
import sys

import torch
from torchao.quantization import IntxWeightOnlyConfig, quantize_


def quantised(dtype: torch.dtype) -> tuple[int, int]:
    """The bytes of a file, and the number of different integers in the weight."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(512, 512, bias=False))
    quantize_(model, IntxWeightOnlyConfig(weight_dtype=dtype))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return len(file.getvalue()), len(model[0].weight.qdata.unique())


int8, levels8 = quantised(torch.int8)
int4, levels4 = quantised(torch.int4)
print(f"262,144 weights: int8 {int8:,} bytes, {levels8} values; int4 {int4:,} bytes, {levels4} values")
sys.exit(0 if levels4 <= 16 < levels8 and int4 > 0.95 * int8 else 1)
PYTHON
