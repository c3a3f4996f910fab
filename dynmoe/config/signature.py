"""What a `_target_` accepts, read from its source by dynmoe.config.source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

from dynmoe.config.source import (
    Function,
    Located,
    TargetError,
    Unreadable,
    assigned_name,
    lineage,
    locate,
    parsed,
    statements,
)

__all__ = ["Parameter", "Signature", "TargetError", "class_attribute", "signature"]


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
    """Of __init__, or of the fields of a dataclass; inherited where the class has neither."""
    fields: dict[str, Parameter] = {}
    for owner in lineage(cls):
        assert isinstance(owner.node, ast.ClassDef)
        for node in statements(owner.node.body):
            if isinstance(node, Function) and node.name == "__init__":
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
