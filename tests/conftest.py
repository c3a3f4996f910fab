"""The same on every machine, a busy one too: threads, and the examples of hypothesis."""

import os

from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tensors are tiny: one thread is faster than several

settings.register_profile("tests", deadline=None, derandomize=True)
settings.load_profile("tests")
