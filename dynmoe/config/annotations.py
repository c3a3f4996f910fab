"""A light type check of plain values against the annotations of a target's parameters.

Understood: int, float, bool, str, None, Literal, unions, Optional, lists, tuples and mappings. A
class takes strings alone (an enum's member, a path, a device): it cannot be written in YAML, but as
a node with a `_target_`. The rest is trusted.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any

from dynmoe.config.targets import TargetError, Unreadable, in_module

_MAPPINGS = ("dict", "Dict", "Mapping", "MutableMapping")
_WORDS = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "str": "a string",
    "None": "null",
    **dict.fromkeys(_MAPPINGS, "a mapping"),
    **dict.fromkeys(("list", "List", "Sequence", "Iterable", "tuple", "Tuple", "set"), "a list"),
}
_OBJECT = "an object with a _target_"


def mismatches(key: str, value: Any, annotation: str | None, module: str) -> list[str]:
    """`["data.mean.0: expected a number, found 'a'"]`; empty where `value` fits `annotation`.

    `module` is where the annotation is written; its names are looked up there.
    """
    tree = _parse(annotation) if annotation is not None else None
    return [] if tree is None else list(_mismatches(key, value, tree, module))


def takes_objects(annotation: str | None, module: str) -> bool:
    """Whether a parameter may be an object: it is of a class, a mapping, or says nothing."""
    tree = _parse(annotation) if annotation is not None else None
    names = [_name(member) for member, _ in _members(tree, module)] if tree is not None else [""]
    return any(name in _MAPPINGS or name not in {*_WORDS, "Literal"} for name in names)


def _mismatches(key: str, value: Any, tree: ast.expr, module: str) -> Iterator[str]:
    """One message for the value, or one for each of its elements that does not fit."""
    if _accepts(tree, value, module):
        return
    members = list(_members(tree, module))
    for member, there in members:
        elements = _elements(key, value, member)
        if elements is not None:
            wrong = [text for each in elements for text in _mismatches(*each, there)]
            if wrong:
                yield from wrong
                return
    words: list[str] = []
    for member, there in members:
        name = _name(member)
        if name == "Literal":
            words += map(shown, _choices(member))
        elif name in _WORDS:
            words.append(_list_of(member) if _WORDS[name] == "a list" else _WORDS[name])
        elif not _is_class(name, there):
            words.append(name)
    expected = " or ".join(dict.fromkeys(words)) or _OBJECT
    text = f"{key}: expected {expected}, found {shown(value)}"
    if isinstance(value, int | float | str) and _accepts(tree, [value], module):
        text += f". A list is written '{key}=[{value}]', with the quotes"
    yield text


def _elements(key: str, value: Any, member: ast.expr) -> list[tuple[str, Any, ast.expr]] | None:
    """Key, value and annotation of each element; None where `value` is not such a container."""
    word = _WORDS.get(_name(member))
    if word == "a list" and isinstance(value, Sequence) and not isinstance(value, str):
        types = _element_types(member, len(value))
        return [(f"{key}.{i}", *each) for i, each in enumerate(zip(value, types, strict=False))]
    if word == "a mapping" and isinstance(value, Mapping) and len(_arguments(member)) == 2:
        tree = _arguments(member)[1]
        if _name(tree) == "Any":  # their values may be interpolations that fail
            return []
        return [(f"{key}.{name}", each, tree) for name, each in value.items()]
    return None


def _element_types(node: ast.expr, count: int) -> list[ast.expr]:
    """The annotation of each of `count` elements: `tuple[int, str]` has one for each of two."""
    items = _arguments(node)
    if _is_fixed(node):
        return items
    return items[:1] * count


def _is_fixed(node: ast.expr) -> bool:
    """`tuple[float, float]`, but not `tuple[float, ...]`."""
    items = _arguments(node)
    is_tuple = _name(node) in ("tuple", "Tuple")
    return is_tuple and bool(items) and "..." not in {ast.unparse(each) for each in items}


def _list_of(node: ast.expr) -> str:
    return f"a list of {len(_arguments(node))}" if _is_fixed(node) else "a list"


def shown(value: Any) -> str:
    """`value` as YAML spells it, strings in quotes."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else repr(value)


@lru_cache
def _parse(annotation: str) -> ast.expr | None:
    with suppress(SyntaxError):
        return ast.parse(annotation, mode="eval").body
    return None


def _members(node: ast.expr, module: str) -> Iterator[tuple[ast.expr, str]]:
    """The alternatives of a union, flat, aliases followed; each with the module of its names."""
    name = _name(node)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):  # a quoted annotation
        inner = _parse(node.value)
        yield from _members(inner, module) if inner is not None else [(node, module)]
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        yield from _members(node.left, module)
        yield from _members(node.right, module)
    elif name in ("Union", "Optional"):
        for argument in _arguments(node):
            yield from _members(argument, module)
        if name == "Optional":
            yield ast.Constant(None), module
    elif isinstance(node, ast.Name) and name not in _WORDS and (found := _alias(module, name)):
        yield from _members(*found)
    else:
        yield node, module


def _alias(module: str, name: str) -> tuple[ast.expr, str] | None:
    """Expression that a type alias is assigned; None for anything else."""
    with suppress(TargetError, Unreadable):
        found = in_module(module, name)
        if isinstance(found.node, ast.Subscript | ast.BinOp):
            return found.node, found.module
    return None


def _accepts(tree: ast.expr, value: Any, module: str) -> bool:
    return any(_member_accepts(member, value, there) for member, there in _members(tree, module))


def _member_accepts(node: ast.expr, value: Any, module: str) -> bool:
    name = _name(node)
    match _WORDS.get(name, name):
        case "an integer":
            return isinstance(value, int) and not isinstance(value, bool)
        case "a number":
            return isinstance(value, int | float) and not isinstance(value, bool)
        case "true or false":
            return isinstance(value, bool)
        case "a string":
            return isinstance(value, str)
        case "null":
            return value is None
        case "a mapping" | "a list":
            if not isinstance(value, Mapping if name in _MAPPINGS else Sequence):
                return False
            if isinstance(value, str) or (_is_fixed(node) and len(value) != len(_arguments(node))):
                return False
            elements = _elements("", value, node) or []
            return all(_accepts(tree, each, module) for _, each, tree in elements)
        case "Literal":
            return any(type(value) is type(choice) and value == choice for choice in _choices(node))
        case "Callable" | "Tensor" | "type" | "Type":
            return False
        case _:
            if isinstance(value, Mapping) and "_target_" in value:
                return True  # an element of a list: the keys of nodes are checked by themselves
            return isinstance(value, str) or not _is_class(name, module)


@lru_cache
def _is_class(name: str, module: str) -> bool:
    """Whether an annotation is the name of a class, or of what only Python can make."""
    if name in ("Callable", "Tensor", "type", "Type"):
        return True
    if name in ("Any", "object"):
        return False
    with suppress(TargetError, Unreadable):
        return isinstance(in_module(module, name).node, ast.ClassDef)
    return False


def _name(node: ast.expr) -> str:
    """Last part of a name: `List` for `typing.List[int]`."""
    if isinstance(node, ast.Subscript):
        return _name(node.value)
    if isinstance(node, ast.Constant) and node.value is None:
        return "None"
    return str(getattr(node, "attr", None) or getattr(node, "id", ""))


def _arguments(node: ast.expr) -> list[ast.expr]:
    """`[int, str]` of `Union[int, str]`."""
    if not isinstance(node, ast.Subscript):
        return []
    return node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]


def _choices(literal: ast.expr) -> list[Any]:
    return [each.value for each in _arguments(literal) if isinstance(each, ast.Constant)]
