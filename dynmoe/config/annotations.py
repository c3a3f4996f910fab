"""A light type check of plain values against an annotation, without importing anything.

Understood: int, float, bool, str, None, Literal, unions, Optional, lists, tuples and mappings.
Aliases are followed to their definition; everything else (classes, ...) is taken on trust.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from dynmoe.config.source import alias

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
