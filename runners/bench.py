"""``dynmoe-bench``: the speed of a layer, of steps, inference, generation, epochs and data."""

from __future__ import annotations

import os
import sys

from dynmoe import process
from dynmoe.benchmark import options
from dynmoe.config.arguments import joined
from dynmoe.errors import UserError


def main() -> None:
    """Exit 0, 2 with a message that names what is wrong, or as `process.command` when stopped."""
    # PyTorch's profiler, which counts allocations, reports every start and stop, and memory that
    # it saw freed but not allocated: a text's mask of the step before.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with process.command("dynmoe-bench", "The --json file holds what was finished."):
        words, astray = joined(sys.argv[1:])
        if astray:
            raise UserError("\n".join(astray))
        args = options.parser().parse_args(options.overrides_first(words))
        getattr(options, args.command)(args)


if __name__ == "__main__":
    main()
