#!/usr/bin/env bash
# On a CPU, a bf16 product whose number of rows is new takes several times as long as the same product again: oneDNN
# compiles a kernel for each. The same fp32 products (precision "highest") compile nothing.
#
# One expects the time of x @ w.T to depend on the number of rows, not on whether that number occurred before: no
# torch.compile is involved, and fp32 does not behave so. Batches whose size is new each time (the rows of an expert, of
# a packed batch, of a ragged batch) are therefore slow in bf16 for a long time, up to slower than in fp32, and a
# benchmark that repeats one shape does not see it. oneDNN keeps the last 1024 kernels of all operations.
#
# Seen with torch 2.14.1 on Xeons with AVX-512 and AMX, Python 3.11, 2026-11-29: 3.1 ms for new rows, 0.6 ms again. Needs
# Linux and a CPU whose bf16 products go to oneDNN (AVX-512). Exits with 1 if it is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --target "$folder" torch==2.14.1
cat > "$folder/products.py" <<'PYTHON'
import statistics
import sys
import time

import torch

torch.set_num_threads(1)
dtype = getattr(torch, sys.argv[1])
weight = torch.randn(1024, 384).to(dtype)


def seconds(x: torch.Tensor) -> float:
    start = time.process_time()  # of the processor: others may be busy
    torch.mm(x, weight.t())
    return time.process_time() - start


batches = [torch.randn(rows, 384).to(dtype) for rows in range(512, 832, 8)]
first = statistics.median([seconds(x) for x in batches])
again = statistics.median([seconds(x) for x in batches])
print(f"TIMES {1e3 * first:.2f} {1e3 * again:.2f}")
PYTHON
seen() { ONEDNN_VERBOSE=2 PYTHONPATH="$folder" python3 "$folder/products.py" "$1"; }
ok=1
for dtype in float32 bfloat16; do
    log=$(seen $dtype)
    kernels=$(grep -c 'create:cache_miss' <<<"$log" || true)
    read -r _ first again < <(grep TIMES <<<"$log")
    echo "$dtype: 40 numbers of rows, $kernels kernels compiled, $first ms the first time, $again ms again"
    if [ $dtype = float32 ]; then
        [ "$kernels" = 0 ] || ok=0
    else
        [ "$kernels" = 40 ] && python3 -c "import sys; sys.exit($first < 1.5 * $again)" || ok=0
    fi
done
[ $ok = 1 ]
