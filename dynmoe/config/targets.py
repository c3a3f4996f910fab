"""Parameters of a `_target_`, read from its source: nothing is imported, nothing is executed.

Importing Lightning takes seconds; parsing the one file that defines a class takes milliseconds.
A dotted name is followed through packages, imports and assignments to its definition, whose
parameters and annotations then say which keys and values a node of the configuration may have.
"""

from __future__ import annotations

import ast
import difflib
import pkgutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache, reduce
from importlib.machinery import ModuleSpec
from importlib.util import resolve_name
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class TargetError(LookupError):
    """A dotted name that names nothing; the message says which part of it fails."""


class Unreadable(Exception):
    """The definition exists only at run time, or in no Python source."""


@dataclass(frozen=True)
class Located:
    """A definition, an assigned expression, or a module (None), and the module it lies in."""

    node: Definition | ast.expr | None
    module: str


def did_you_mean(word: str, known: Iterable[str], most: int = 1) -> str:
    """` Did you mean 'num_experts'?`, or nothing where no known word is near."""
    near = difflib.get_close_matches(word, sorted(known), n=most)
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""


# From a dotted name to its definition.


@lru_cache
def locate(target: str) -> Located:
    """Raise TargetError where `target` names nothing, Unreadable where only Python can tell."""
    first, *rest = target.split(".")
    if not rest or not all(part.isidentifier() for part in (first, *rest)):
        raise TargetError(f"'{target}' is not a dotted path such as torch.optim.Adam")
    found = _follow(first, rest)
    if found.node is None:
        raise TargetError(f"'{target}' is a module, not a class or function")
    return found


def _member(owner: Located, name: str) -> Located:
    if owner.node is None:
        return in_module(owner.module, name)
    if not isinstance(owner.node, ast.ClassDef):
        raise Unreadable
    for cls, body in _bodies(owner):
        for node in _statements(body):
            if isinstance(node, Definition) and node.name == name:
                return Located(node, cls.module)
    raise TargetError(f"{owner.module}.{owner.node.name} has no '{name}'.")


def in_module(module: str, name: str) -> Located:
    """The definition of `name` in `module`; imports and other names for the same are followed."""
    if _spec(f"{module}.{name}") is not None:
        return Located(None, f"{module}.{name}")
    known: set[str] = set()
    for node in _statements(_parsed(module)):
        for visible, bound in _bindings(node, module):
            if visible == name:
                if isinstance(bound, Located):
                    return bound
                first, *rest = bound.split(".")
                with _only_python_can_tell():
                    return _follow(first, rest)
            if not _is_lazy(bound):
                known.add(visible)
    if known & {"*", "__getattr__"}:
        raise Unreadable
    known.update(each.name for each in pkgutil.iter_modules(_folders(module)))
    public = {word for word in known if not word.startswith("_")}
    raise TargetError(f"{module} has no '{name}'.{did_you_mean(name, public)}")


def _is_lazy(bound: Located | str) -> bool:
    """A call of `dynmoe.lazy.lazy`, whose names the package also imports for type checkers."""
    node = bound.node if isinstance(bound, Located) else None
    return isinstance(node, ast.Call) and ast.unparse(node.func) == "lazy"


def _bindings(node: ast.stmt, module: str) -> Iterator[tuple[str, Located | str]]:
    """The names that a statement binds, each to a definition or to a dotted path."""
    if isinstance(node, Definition):
        yield node.name, Located(node, module)
    elif isinstance(node, ast.Import):
        for each in node.names:
            top = each.name.partition(".")[0]
            yield (each.asname, each.name) if each.asname else (top, top)
    elif isinstance(node, ast.ImportFrom):
        package = module if _folders(module) else module.rpartition(".")[0]
        source = resolve_name("." * node.level + (node.module or ""), package)
        for each in node.names:
            yield each.asname or each.name, f"{source}.{each.name}"
    elif (name := _assigned_name(node)) is not None:
        value = getattr(node, "value", None) or ast.Constant(None)  # declared without a value
        if isinstance(value, ast.Name) and value.id != name:
            yield name, f"{module}.{value.id}"
        else:
            yield name, Located(value, module)


@contextmanager
def _only_python_can_tell() -> Iterator[None]:
    """A name found in a source leads nowhere: an optional package that is not installed, ..."""
    try:
        yield
    except TargetError as error:
        raise Unreadable from error


def _follow(package: str, rest: list[str]) -> Located:
    if _spec(package) is None:
        raise TargetError(
            f"no package '{package}' is installed. The folder of a module of your own: PYTHONPATH"
        )
    return reduce(_member, rest, Located(None, package))


def _bodies(found: Located) -> Iterator[tuple[Located, list[ast.stmt]]]:
    """A class and its bases, depth first, as far as their sources can be read."""
    assert isinstance(found.node, ast.ClassDef)
    yield found, found.node.body
    for base in found.node.bases:
        # Generic[T] is Generic; a call or another expression has no name to follow.
        name = ast.unparse(base.value if isinstance(base, ast.Subscript) else base)
        with _only_python_can_tell():
            above = reduce(_member, name.split("."), Located(None, found.module))
        if isinstance(above.node, ast.ClassDef):
            yield from _bodies(above)


def _spec(module: str) -> ModuleSpec | None:
    """Where a module lies. importlib.util.find_spec would import the packages above it."""
    return _spec_on(module, tuple(sys.path))


@lru_cache(maxsize=1024)
def _spec_on(module: str, path: tuple[str, ...]) -> ModuleSpec | None:
    """`path` is what the answer holds for: a module that was missing may be on a longer one."""
    parent = module.rpartition(".")[0]
    folders = _folders(parent) if parent else None
    if parent and not folders:
        return None
    found = (finder.find_spec(module, folders) for finder in sys.meta_path)
    return next((spec for spec in found if spec is not None), None)


def _folders(module: str) -> list[str]:
    """Folders of a package; empty for a module that is none."""
    spec = _spec(module)
    return list(spec.submodule_search_locations or []) if spec is not None else []


@lru_cache
def _parsed(module: str) -> list[ast.stmt]:
    spec = _spec(module)
    origin = spec.origin if spec is not None else None
    if origin is None:  # a namespace package
        return []
    if not origin.endswith(".py"):  # built-in, frozen or compiled
        raise Unreadable
    return ast.parse(Path(origin).read_text(encoding="utf-8")).body


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a body, those below `if` and `try` included."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            handlers = node.handlers if isinstance(node, ast.Try) else []
            for inner in (node.body, node.orelse, *(handler.body for handler in handlers)):
                yield from _statements(inner)


def _assigned_name(node: ast.stmt) -> str | None:
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return targets[0].id if len(targets) == 1 and isinstance(targets[0], ast.Name) else None


# Parameters of a target, and constants of its class.


@dataclass(frozen=True)
class Parameter:
    annotation: str | None
    module: str
    """Where the names of the annotation are defined."""
    has_default: bool
    nullable: bool = False
    """The default is None, whether the annotation says so or not."""


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
        if isinstance(found.node, Function):
            return _function_signature(found.node, found.module)
    except Unreadable:
        pass
    return None


@lru_cache
def class_attribute(target: str, name: str) -> object:
    """Constant that a class or its bases assign to `name`; for a function, that its module does.

    None where it is not set or cannot be read. Raises TargetError.
    """
    with suppress(Unreadable):
        found = locate(target)
        is_class = isinstance(found.node, ast.ClassDef)
        for _, body in _bodies(found) if is_class else [(found, _parsed(found.module))]:
            for statement in body:
                if _assigned_name(statement) == name:
                    return getattr(getattr(statement, "value", None), "value", None)
    return None


def _class_signature(cls: Located) -> Signature:
    """Parameters of __init__, or fields of a dataclass; inherited where the class has neither."""
    fields: dict[str, Parameter] = {}
    for owner, body in _bodies(cls):
        for node in _statements(body):
            if isinstance(node, Function) and node.name == "__init__":
                if fields:  # the __init__ that a dataclass below this base got hides it
                    return Signature(fields)
                own = _function_signature(node, owner.module, bound=True)
                return _with_inherited(own, node, owner)
        assert isinstance(owner.node, ast.ClassDef)
        if _is_decorated(owner.node, "dataclass"):
            # Depth first meets a subclass before its bases, whose fields come first.
            fields = {**_fields(body, owner.module), **fields}
        elif any(isinstance(node, Function) and node.name == "__new__" for node in body):
            raise Unreadable
    return Signature(fields)


def _with_inherited(own: Signature, init: Function, owner: Located) -> Signature:
    """The parameters of the base too, where `init` hands its **kwargs on to the base's."""
    taken = init.args.kwarg.arg if init.args.kwarg else None
    for call in ast.walk(init):
        if not isinstance(call, ast.Call) or ast.unparse(call.func) != "super().__init__":
            continue
        passed = {ast.unparse(each.value) for each in call.keywords if each.arg is None}
        if taken is None or taken not in passed:
            continue
        assert isinstance(owner.node, ast.ClassDef)
        base = ast.unparse(owner.node.bases[0])
        with suppress(TargetError, Unreadable):
            above = reduce(_member, base.split("."), Located(None, owner.module))
            if isinstance(above.node, ast.ClassDef):
                inherited = _class_signature(above)
                given = {each.arg for each in call.keywords}
                rest = {k: v for k, v in inherited.parameters.items() if k not in given}
                return Signature({**rest, **own.parameters}, open=inherited.open)
    return own


def _fields(body: list[ast.stmt], module: str) -> dict[str, Parameter]:
    return {
        item.target.id: Parameter(
            ast.unparse(item.annotation), module, item.value is not None, _is_none(item.value)
        )
        for item in body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
        if "ClassVar" not in ast.unparse(item.annotation)
    }


def _function_signature(node: Function, module: str, bound: bool = False) -> Signature:
    names = node.args
    positional = [*names.posonlyargs, *names.args]
    required: list[ast.expr | None] = [None] * (len(positional) - len(names.defaults))
    given = zip(
        [*positional, *names.kwonlyargs],
        [*required, *names.defaults, *names.kw_defaults],
        strict=True,
    )
    parameters = {
        arg.arg: Parameter(
            ast.unparse(arg.annotation) if arg.annotation else None,
            module,
            default is not None,
            _is_none(default),
        )
        for arg, default in given
    }
    if positional and (bound or _is_decorated(node, "classmethod")):
        del parameters[positional[0].arg]
    return Signature(parameters, open=names.kwarg is not None)


def _is_none(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _is_decorated(node: Definition, word: str) -> bool:
    return any(word in ast.unparse(decorator) for decorator in node.decorator_list)
