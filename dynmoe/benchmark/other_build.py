"""The other process of ``against``, run by path: dynmoe of one folder, this folder's benchmark.

Both builds are measured by the same code: this package takes the place of the other's
``dynmoe.benchmark``.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


def take(name: str, folder: Path) -> None:
    """Let ``folder`` be the package ``name``."""
    places = [str(folder)]
    init = folder / "__init__.py"
    spec = spec_from_file_location(name, init, submodule_search_locations=places)
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = module_from_spec(spec)
    spec.loader.exec_module(module)
    parent, _, child = name.rpartition(".")
    setattr(sys.modules[parent], child, module)


def serve(pipe: Connection, module: str, args: Any) -> None:
    """Answer the name of a case and a number of calls with a sample, and None with the names of the
    next cases: those that ``module.elsewhere(args)`` yields."""
    timing: Any = import_module("dynmoe.benchmark.timing")
    every, device = import_module(module).elsewhere(args), timing.device_of(args)
    cases: dict[str, Any] = {}
    while True:
        asked = pipe.recv()
        if asked is None:
            cases.clear()  # before the next ones take memory
            cases = next(every)
            pipe.send(list(cases))
        else:
            name, calls = asked
            pipe.send(timing.sample(cases[name], calls, device))


def main() -> None:
    build, pipe = Path(sys.argv[1]), Connection(int(sys.argv[2]))
    sys.path[0] = str(build)  # in the place of this file's folder
    try:
        dynmoe = import_module("dynmoe")
        if Path(str(dynmoe.__file__)).parents[1] != build:
            raise ImportError(f"found {dynmoe.__file__} instead")
        if (build / "conf").is_dir():  # a checkout; an installed copy has it in its place
            take("dynmoe.conf", build / "conf")
        take("dynmoe.benchmark", Path(__file__).parent)
        pipe.send(import_module("dynmoe.version").version())
        serve(pipe, *pipe.recv())
    except (EOFError, BrokenPipeError):  # the command has ended
        pass
    except Exception as error:  # whatever another build raises
        pipe.send(RuntimeError(repr(error)))


if __name__ == "__main__":
    main()
