"""From a dotted name to the source that defines it: nothing is imported, nothing is executed.

Importing Lightning takes seconds; parsing the one file that defines a class takes milliseconds.
A name is followed through package folders and `from x import y` to its definition.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

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


# A light type check of plain values against an annotation, without importing anything.
#
# Understood: int, float, bool, str, None, Literal, unions, Optional, lists, tuples and mappings.
# Aliases are followed to their definition; everything else (classes, ...) is taken on trust.

_WORDS = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "None": "null",
}
_LISTS = {"list", "List", "Sequence", "Iterable", "tuple", "Tuple", "set", "Set"}
_MAPPINGS = {"dict", "Dict", "Mapping", "MutableMapping"}
_KNOWN = _WORDS.keys() | _LISTS | _MAPPINGS


def mismatch(value: Any, annotation: str | None, module: str) -> str | None:
    """`"expected an integer, found 'abc'"`, or None where `value` may pass as `annotation`.

    `module` is where the annotation is written; its names are looked up there.
    """
    tree = _parse(annotation) if annotation is not None else None
    if tree is None or _accepts(tree, value, trust=False):
        return None
    tree = _expanded(tree, module)
    if _accepts(tree, value, trust=True):
        return None
    return f"expected {' or '.join(dict.fromkeys(_describe(tree)))}, found {shown(value)}"


def shown(value: Any) -> str:
    """`value` as YAML spells it, texts in quotes."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value)


@lru_cache
def _parse(annotation: str) -> ast.expr | None:
    try:
        return ast.parse(annotation, mode="eval").body
    except SyntaxError:
        return None


def _expanded(tree: ast.expr, module: str) -> ast.expr:
    """`tree` with the aliases in it replaced by what they stand for."""
    if isinstance(tree, ast.Subscript):
        arguments = [_expanded(argument, module) for argument in _arguments(tree)]
        return ast.Subscript(tree.value, ast.Tuple(arguments, ast.Load()), ast.Load())
    if isinstance(tree, ast.BinOp):
        return ast.BinOp(_expanded(tree.left, module), tree.op, _expanded(tree.right, module))
    if isinstance(tree, ast.Name) and tree.id not in _KNOWN:
        found = alias(module, tree.id)
        return _expanded(*found) if found else tree
    return tree


def _name(node: ast.expr) -> str:
    """Last part of a name: `List` for `typing.List[int]`."""
    if isinstance(node, ast.Subscript):
        return _name(node.value)
    if isinstance(node, ast.Attribute):
        return node.attr
    if isinstance(node, ast.Constant) and node.value is None:
        return "None"
    return node.id if isinstance(node, ast.Name) else ""


def _arguments(node: ast.expr) -> list[ast.expr]:
    """`[int, str]` of `Union[int, str]`."""
    if not isinstance(node, ast.Subscript):
        return []
    return node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]


def _members(node: ast.expr) -> list[ast.expr]:
    """The alternatives of a union, flat; a single type is its own only alternative."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):  # a quoted annotation
        inner = _parse(node.value)
        return _members(inner) if inner is not None else [node]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _members(node.left) + _members(node.right)
    name = _name(node)
    if name in ("Union", "Optional"):
        members = [m for argument in _arguments(node) for m in _members(argument)]
        return [*members, ast.Constant(None)] if name == "Optional" else members
    return [node]


def _accepts(tree: ast.expr, value: Any, trust: bool) -> bool:
    """Whether an alternative takes `value`; one that is not understood answers `trust`."""
    return any(_member_accepts(member, value, trust) for member in _members(tree))


def _member_accepts(node: ast.expr, value: Any, trust: bool) -> bool:
    match _name(node):
        case "int":
            return isinstance(value, int) and not isinstance(value, bool)
        case "float":
            return isinstance(value, int | float) and not isinstance(value, bool)
        case "bool":
            return isinstance(value, bool)
        case "str":
            return isinstance(value, str)
        case "None":
            return value is None
        case "Literal":
            return any(type(value) is type(choice) and value == choice for choice in _choices(node))
        case name if name in _LISTS:
            if isinstance(value, str) or not isinstance(value, Sequence):
                return False
            items = _arguments(node)[:1]  # the rest is a tuple's ellipsis, or taken on trust
            return all(_accepts(item, element, trust) for item in items for element in value)
        case name if name in _MAPPINGS:
            return isinstance(value, Mapping)
        case _:
            return trust


def _describe(tree: ast.expr) -> list[str]:
    words: list[str] = []
    for node in _members(tree):
        name = _name(node)
        if name == "Literal":
            words += [shown(choice) for choice in _choices(node)]
        elif name in _LISTS:
            words.append("a list")
        elif name in _MAPPINGS:
            words.append("a mapping")
        else:
            words.append(_WORDS.get(name, name))
    return words


def _choices(literal: ast.expr) -> list[Any]:
    return [a.value for a in _arguments(literal) if isinstance(a, ast.Constant)]


# What a `_target_` accepts, read from its source by dynmoe.config.targets.


@dataclass(frozen=True)
class Parameter:
    annotation: str | None
    module: str  # where the names of the annotation are defined
    has_default: bool


@dataclass
class Signature:
    """Parameters by name, without self; `open` where **kwargs takes any other name."""

    parameters: dict[str, Parameter] = field(default_factory=dict)
    open: bool = False


@lru_cache
def signature(target: str) -> Signature | None:
    """Parameters of a class or function, None where no source tells. Raises TargetError."""
    try:
        found = locate(target)
        if isinstance(found.node, ast.ClassDef):
            return _class_signature(found)
        return _function_signature(found.node, found.module)
    except Unreadable:
        return None


@lru_cache
def class_attribute(target: str, name: str) -> object:
    """Constant that a class or its bases assign to `name`; for a function, that its module does.

    None where it is not set or cannot be read. Raises TargetError.
    """
    try:
        for body in _bodies(locate(target)):
            for statement in body:
                if assigned_name(statement) == name:
                    value = getattr(statement, "value", None)
                    return value.value if isinstance(value, ast.Constant) else None
    except Unreadable:
        pass
    return None


def _bodies(found: Located) -> Iterator[list[ast.stmt]]:
    if isinstance(found.node, ast.ClassDef):
        yield from (cls.node.body for cls in lineage(found))
    else:
        yield parsed(found.module).body


def _class_signature(cls: Located) -> Signature:
    """Parameters of __init__ or fields of a dataclass; inherited if the class has neither."""
    fields: dict[str, Parameter] = {}
    for owner in lineage(cls):
        assert isinstance(owner.node, ast.ClassDef)
        for node in statements(owner.node.body):
            if isinstance(node, Function) and node.name == "__init__":
                if fields:  # the __init__ that a dataclass below this base got hides it
                    return Signature(fields)
                return _function_signature(node, owner.module, bound=True)
        if _is_dataclass(owner.node):
            # Depth first meets a subclass before its bases, whose fields come first.
            fields = {**_fields(owner.node, owner.module), **fields}
        elif any(isinstance(n, Function) and n.name == "__new__" for n in owner.node.body):
            raise Unreadable
    return Signature(fields)


def _is_dataclass(node: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)


def _fields(node: ast.ClassDef, module: str) -> dict[str, Parameter]:
    return {
        item.target.id: Parameter(ast.unparse(item.annotation), module, item.value is not None)
        for item in node.body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
        if "ClassVar" not in ast.unparse(item.annotation)
    }


def _function_signature(node: Function, module: str, bound: bool = False) -> Signature:
    names = node.args
    positional = [*names.posonlyargs, *names.args]
    without_default = len(positional) - len(names.defaults)
    parameters = {
        arg.arg: _parameter(arg, module, index >= without_default)
        for index, arg in enumerate(positional)
    }
    if positional and (bound or _is_classmethod(node)):
        del parameters[positional[0].arg]
    for arg, default in zip(names.kwonlyargs, names.kw_defaults, strict=True):
        parameters[arg.arg] = _parameter(arg, module, default is not None)
    return Signature(parameters, open=names.kwarg is not None)


def _parameter(arg: ast.arg, module: str, has_default: bool) -> Parameter:
    annotation = ast.unparse(arg.annotation) if arg.annotation is not None else None
    return Parameter(annotation, module, has_default)


def _is_classmethod(node: Function) -> bool:
    return any(ast.unparse(decorator) == "classmethod" for decorator in node.decorator_list)
