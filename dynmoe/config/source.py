"""From a dotted name to the source that defines it: nothing is imported, nothing is executed.

Importing Lightning takes seconds; parsing the one file that defines a class takes milliseconds.
A name is followed through package folders and `from x import y` to its definition.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class TargetError(LookupError):
    """A dotted name that names nothing; the message says which part of it fails."""


class Unreadable(Exception):
    """The definition exists only at run time, or in no Python source."""


@dataclass(frozen=True)
class Located:
    """A definition, and the module whose names it uses."""

    node: Definition
    module: str


@lru_cache
def locate(target: str) -> Located:
    parts = target.split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise TargetError(f"'{target}' is not a dotted path such as torch.optim.Adam")
    module, rest = parts[0], parts[1:]
    _module_path(module)
    while rest and _exists(f"{module}.{rest[0]}"):
        module, rest = f"{module}.{rest[0]}", rest[1:]
    if not rest:
        raise TargetError(f"'{target}' is a module, not a class or function")
    found = _in_module(module, rest[0])
    for name in rest[1:]:
        found = _member(found, name)
    return found


def _in_module(module: str, name: str) -> Located:
    """Definition of `name` in `module`, imports followed."""
    tree = parsed(module)
    dynamic = False
    names: set[str] = set()
    for node in statements(tree.body):
        if isinstance(node, Definition):
            names.add(node.name)
            if node.name == name:
                return Located(node, module)
            dynamic |= node.name == "__getattr__"
        elif isinstance(node, ast.ImportFrom):
            source = _source_module(node, module)
            for imported in node.names:
                visible = imported.asname or imported.name
                names.add(visible)
                if imported.name == "*":
                    dynamic = True
                elif visible == name:
                    return _imported(source, imported.name)
        elif isinstance(node, ast.Import):
            names.update(imported.asname or imported.name for imported in node.names)
        elif assigned_name(node) is not None:
            names.add(str(assigned_name(node)))
            value = getattr(node, "value", None)
            if assigned_name(node) == name and isinstance(value, ast.Name) and value.id != name:
                return _in_module(module, value.id)
    if dynamic or name in names:
        raise Unreadable
    known = {n for n in names if not n.startswith("_")} | set(_children(module))
    raise TargetError(f"{module} has no '{name}'.{did_you_mean(name, known)}")


def _imported(module: str, name: str) -> Located:
    try:
        return _in_module(module, name)
    except TargetError as error:
        # A module, or an optional package that is not installed: only Python itself can tell.
        raise Unreadable from error


def _member(owner: Located, name: str) -> Located:
    if isinstance(owner.node, ast.ClassDef):
        for cls in lineage(owner):
            for node in statements(cls.node.body):
                if isinstance(node, Definition) and node.name == name:
                    return Located(node, cls.module)
        raise TargetError(f"{owner.module}.{owner.node.name} has no '{name}'.")
    raise Unreadable


def lineage(cls: Located) -> Iterator[Located]:
    """A class and its bases, depth first, as far as their sources can be read."""
    yield cls
    assert isinstance(cls.node, ast.ClassDef)
    for base in cls.node.bases:
        # Generic[T] is Generic; a call or another expression has no name to follow.
        expression = base.value if isinstance(base, ast.Subscript) else base
        found = _resolve(ast.unparse(expression), cls.module)
        if isinstance(found.node, ast.ClassDef):
            yield from lineage(found)


def _resolve(name: str, module: str) -> Located:
    """What `name`, dotted or not, means inside `module`."""
    first, *rest = name.split(".")
    if not rest:
        return _imported(module, first)
    for node in statements(parsed(module).body):
        if isinstance(node, ast.Import):
            for imported in node.names:
                if (imported.asname or imported.name).split(".")[0] == first:
                    root = imported.name if imported.asname else first
                    return locate(".".join([root, *rest]))
        elif isinstance(node, ast.ImportFrom):
            for imported in node.names:
                if (imported.asname or imported.name) == first:
                    return locate(".".join([_source_module(node, module), imported.name, *rest]))
    raise Unreadable


def alias(module: str, name: str) -> tuple[ast.expr, str] | None:
    """What a type alias stands for, and the module it is written in; None for anything else."""
    try:
        for node in statements(parsed(module).body):
            if assigned_name(node) == name:
                value = getattr(node, "value", None)
                return (value, module) if isinstance(value, ast.expr) else None
            if isinstance(node, ast.ImportFrom):
                for imported in node.names:
                    if (imported.asname or imported.name) == name:
                        return alias(_source_module(node, module), imported.name)
    except (TargetError, Unreadable):
        pass
    return None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` Did you mean 'num_experts'?`, or nothing where no known word is near."""
    near = difflib.get_close_matches(word, sorted(known), n=1)
    return f" Did you mean '{near[0]}'?" if near else ""


@lru_cache
def _module_path(module: str) -> Path:
    """File of a module, its __init__.py for a package, its folder for a namespace package."""
    parent, _, name = module.rpartition(".")
    if not parent:
        try:
            spec = importlib.util.find_spec(name)  # imports nothing at the top level
        except ValueError:
            spec = None
        if spec is None:
            raise TargetError(f"no package '{name}' is installed.")
        if spec.submodule_search_locations and not spec.has_location:
            return Path(next(iter(spec.submodule_search_locations)))
        if not spec.has_location or not str(spec.origin).endswith(".py"):
            raise Unreadable  # built-in, frozen or compiled
        return Path(str(spec.origin))
    above = _module_path(parent)
    folder = above.parent if above.name == "__init__.py" else above
    for path in (folder / name / "__init__.py", folder / f"{name}.py", folder / name):
        if path.exists():
            return path
    if list(folder.glob(f"{name}.*.so")) or list(folder.glob(f"{name}.*.pyd")):
        raise Unreadable
    raise TargetError(f"{parent} has no '{name}'.{did_you_mean(name, _children(parent))}")


def _exists(module: str) -> bool:
    try:
        _module_path(module)
    except TargetError:
        return False
    return True


def _children(module: str) -> Iterator[str]:
    path = _module_path(module)
    folder = path.parent if path.name == "__init__.py" else path
    if folder.is_dir():
        yield from (p.stem for p in folder.iterdir() if p.suffix == ".py" or _is_package(p))


def _is_package(path: Path) -> bool:
    return (path / "__init__.py").exists()


@lru_cache
def parsed(module: str) -> ast.Module:
    path = _module_path(module)
    return ast.parse("" if path.is_dir() else path.read_text(encoding="utf-8"))


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a body, those below `if` and `try` included."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            yield from statements(node.body)
            yield from statements(node.orelse)
        if isinstance(node, ast.Try):
            for handler in node.handlers:
                yield from statements(handler.body)


def _source_module(node: ast.ImportFrom, module: str) -> str:
    """Absolute name of the module that `node`, standing in `module`, imports from."""
    if not node.level:
        return str(node.module)
    is_package = _module_path(module).name == "__init__.py"
    parents = module.split(".")
    above = parents[: len(parents) - node.level + is_package]
    return ".".join([*above, node.module] if node.module else above)


def assigned_name(node: ast.stmt) -> str | None:
    if isinstance(node, ast.Assign) and len(node.targets) == 1:
        target = node.targets[0]
    elif isinstance(node, ast.AnnAssign):
        target = node.target
    else:
        return None
    return target.id if isinstance(target, ast.Name) else None
