#!/usr/bin/env bash
# torchmetrics gives a constant binary prediction a Matthews correlation other than 0.
#
# The coefficient is 0/0 there. scikit-learn, GLUE's scorer among its users, calls it 0. torchmetrics puts a small
# number into the denominator instead, and so scores "always 1" on labels as unbalanced as those of CoLA's dev set
# (721 ones, 322 zeros) +0.0256 and "always 0" -0.0256: of two models that have learnt nothing one is better by 5
# points of the task's only metric. With balanced labels both libraries say 0, so that a test on those sees nothing.
# Reported as torchmetrics issue 3355; pull request 3371, which returns 0, is open.
#
# Seen with torchmetrics 1.9.0, torch 2.14.1, scikit-learn 1.9.1 and Python 3.11, 2026-11-29. Exits with 1 if it is no
# longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --target "$folder" torch==2.14.1 torchmetrics==1.9.0 scikit-learn==1.9.1
PYTHONPATH="$folder" python3 - <<'PYTHON'
import torch
from sklearn.metrics import matthews_corrcoef
from torchmetrics.functional.classification import binary_matthews_corrcoef

labels = torch.tensor([1] * 721 + [0] * 322)
found = []
for constant in (0, 1):
    predictions = torch.full_like(labels, constant)
    theirs, scikit = binary_matthews_corrcoef(predictions, labels).item(), matthews_corrcoef(labels, predictions)
    found.append(abs(theirs) > 0.01 and scikit == 0)
    print(f"always {constant}: torchmetrics {theirs:+.4f}, scikit-learn {scikit:+.4f}")
raise SystemExit(not all(found))
PYTHON
