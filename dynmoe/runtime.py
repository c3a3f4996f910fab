"""Settings of the process around a model: worth more on a CPU than the dispatch of tokens.

docs/performance.md has the measurements that every ``auto`` rests on.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import timeit
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dynmoe import process

# malloc.h
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
KEPT = 2**31 - 1

_tuned = False


def apply(runtime: Mapping[str, Any], device_type: str) -> dict[str, Any]:
    """Apply the settings of the ``runtime`` node; best before the first large tensor.

    ``auto`` is the fastest choice at fp32 accuracy: on a CPU oneDNN's products where they are exact
    there, memory kept by malloc, and plain attention; on other devices PyTorch's own defaults.

    Returns:
        The settings that hold now:
        ``{"matmul_precision": str, "malloc": "tuned" or "system", "fused_attention": bool,
        "wait": str}``; the last as ``dynmoe.process.waiting`` says it.
    """
    on_cpu = device_type == "cpu"
    malloc, precision, fused = (
        runtime[key] for key in ("malloc", "matmul_precision", "fused_attention")
    )
    if malloc == "tuned" or (malloc == "auto" and on_cpu):
        tune_malloc()
    malloc = "tuned" if _tuned else "system"
    if precision == "auto":
        precision = "medium" if on_cpu and medium_is_exact() else "highest"
    torch.set_float32_matmul_precision(precision)
    if fused == "auto":
        fused = not on_cpu
    return {
        "matmul_precision": precision,
        "malloc": malloc,
        "fused_attention": fused,
        "wait": process.waiting(),
    }


def medium_is_exact() -> bool:
    """Return whether fp32 products at precision "medium" are true fp32 on this CPU.

    "medium" sends them to oneDNN, which computes in bf16 only where the CPU has matrix units for it
    (AMX). bf16 would be off by about 1e-2 here, fp32 is by about 1e-6.
    """
    before = torch.get_float32_matmul_precision()
    a, b = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0))
    try:
        torch.set_float32_matmul_precision("medium")
        product = a @ b
    finally:
        torch.set_float32_matmul_precision(before)
    exact = a.double() @ b.double()
    return bool((product - exact).norm() < 1e-5 * exact.norm())


def bf16_gain(model: nn.Module) -> float | None:
    """Return how many times faster than in fp32 products of the model's size ran in bf16 just now.

    None on CPUs without matrix units for bf16 (AMX). The size is that of the linear layers with
    most weights together; a fraction of a second.
    """
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if not capabilities.get("amx_bf16", False):
        return None
    sizes: Counter[torch.Size] = Counter()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            sizes[module.weight.shape] += module.weight.numel()
    if not sizes:
        return None
    ((outputs, inputs), _), *_ = sizes.most_common(1)
    rows = min(512, 2**29 // (outputs * inputs) + 32)
    seconds = []
    for dtype in (torch.float32, torch.bfloat16):
        x, w = torch.ones(rows, inputs, dtype=dtype), torch.ones(inputs, outputs, dtype=dtype)
        x @ w  # the first product of a shape compiles its kernel
        seconds.append(min(timeit.repeat(partial(torch.mm, x, w), number=1, repeat=5)))
    return seconds[0] / seconds[1]


def machine() -> dict[str, Any]:
    """Return ``{"cpu": its model name, "cores": n}``: times compare where these are equal."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        model = names[0] if names else model
    return {"cpu": model, "cores": os.cpu_count() or 0}


def set_fused_attention(model: nn.Module, fused: bool) -> None:
    """Choose between PyTorch's fused attention and plain products in models of timm and
    transformers. A model of transformers without fused attention keeps the plain one."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused  # type: ignore[assignment]
        elif hasattr(module, "set_attn_implementation"):
            use: Any = module
            use.set_attn_implementation("sdpa" if fused and use._supports_sdpa else "eager")


def tune_malloc() -> None:
    """Let glibc keep freed memory, for as long as the process lives; elsewhere nothing happens.

    By default blocks above 32 MiB go back to the system as soon as they are freed, and their pages
    are zeroed again at every training step: 20 to 25 % of the time of an FFN on a CPU. The price is
    memory: blocks of many sizes leave gaps.
    """
    global _tuned
    libc = _glibc()
    if libc is None:
        return
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, KEPT), (M_TOP_PAD, 256 * 2**20))
    _tuned = all([libc.mallopt(option, value) == 1 for option, value in settings])


def release_memory() -> None:
    """Give free memory back to the system, gaps included; without glibc nothing happens."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None
