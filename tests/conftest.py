"""Tiny tensors: one thread is faster than several, and the same on a busy machine."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
