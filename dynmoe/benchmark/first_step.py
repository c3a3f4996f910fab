"""Run a module or a script up to its first optimizer step, which ends the process: status 42.

``python -P first_step.py TARGET [argument ...]``
"""

import os
import runpy
import sys
import threading
import time

STEPPED = 42


def watch() -> None:
    """Wait until the program has loaded PyTorch: loading it here would change what is measured."""
    while not hasattr(sys.modules.get("torch.optim"), "SGD"):
        time.sleep(0.02)
    from torch.optim.optimizer import register_optimizer_step_post_hook

    register_optimizer_step_post_hook(lambda *_: os._exit(STEPPED))


if __name__ == "__main__":
    threading.Thread(target=watch, daemon=True).start()
    target, sys.argv = sys.argv[1], sys.argv[1:]
    if target.endswith(".py"):
        runpy.run_path(target, run_name="__main__")
    else:
        runpy.run_module(target, run_name="__main__", alter_sys=True)
