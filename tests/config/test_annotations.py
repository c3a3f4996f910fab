"""Values are held against annotations as Python means them, and named as YAML spells them."""

from __future__ import annotations

from pathlib import Path  # noqa: F401 - a class that annotations below name

import pytest

from dynmoe.config.annotations import mismatches

LIST = "A list is written 'key"


@pytest.mark.parametrize(
    ("value", "annotation"),
    [
        (3, "int"),
        (3, "float"),
        (0.5, "float"),
        (None, "int | None"),
        (None, "Optional[int]"),
        ("auto", "int | Literal['auto']"),
        ([1, 2], "list[int]"),
        ([1, 2], "typing.Sequence[int]"),
        ([0.9, 0.99], "tuple[float, float]"),
        ({"a": 1}, "Mapping[str, Any]"),
        ("anything", "Path"),
        ("anything", "int | SomeClass"),
        ("text", "Union[List[int], str]"),
        (2, "Optional['int']"),
        ("anything", "not an annotation("),
        ("anything", None),
    ],
)
def test_values_that_fit(value: object, annotation: str | None) -> None:
    assert mismatches("key", value, annotation, __name__) == []


@pytest.mark.parametrize(
    ("value", "annotation", "message"),
    [
        ("abc", "int", ": expected an integer, found 'abc'"),
        (True, "int", ": expected an integer, found true"),
        (1.5, "int", ": expected an integer, found 1.5"),
        ("1e-3", "float", ": expected a number, found '1e-3'"),
        (1, "bool", ": expected true or false, found 1"),
        (None, "str", ": expected a string, found null"),
        (3, "Literal['a', 'b']", ": expected 'a' or 'b', found 3"),
        (1, "Literal[True]", ": expected true, found 1"),
        ("x", "int | None", ": expected an integer or null, found 'x'"),
        ([1, "x"], "list[int]", ".1: expected an integer, found 'x'"),
        (
            "ab",
            "Sequence[str]",
            ": expected a list, found 'ab'. A list is written 'key=[ab]', with the quotes",
        ),
        ("anything", "Tensor", ": expected an object with a _target_, found 'anything'"),
        ([0.5], "tuple[float, float]", ": expected a list of 2, found [0.5]"),
        ([0.5, "x"], "tuple[float, float]", ".1: expected a number, found 'x'"),
        ({"a": None}, "dict[str, int]", ".a: expected an integer, found null"),
        (
            0,
            "list[int]",
            ": expected a list, found 0. A list is written 'key=[0]', with the quotes",
        ),
        (False, "str | Path", ": expected a string, found false"),
        ({"a": 1}, "float | Tensor", ": expected a number, found {'a': 1}"),
        (None, "Callable[[], int]", ": expected an object with a _target_, found null"),
        ([1], "dict[str, int]", ": expected a mapping, found [1]"),
    ],
)
def test_values_that_do_not(value: object, annotation: str, message: str) -> None:
    assert mismatches("key", value, annotation, __name__) == [
        "key" + message.replace("{LIST}", LIST)
    ]


def test_an_alias_is_followed_to_the_module_that_defines_it() -> None:
    found = mismatches("key", "copy", "Placement | list[int]", "dynmoe.config.schema")
    assert found == [
        "key: expected 'last_two' or 'every_two' or 'sparse' or 'first_half' or 'second_half' or "
        "'all' or 'none' or a list, found 'copy'"
    ]
