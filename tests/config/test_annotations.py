"""Values are held against annotations as Python means them, and named as YAML spells them."""

from __future__ import annotations

import pytest

from dynmoe.config.targets import mismatches


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
        ("anything", "Tensor"),
        ("anything", "int | SomeClass"),
        ("text", "Union[List[int], str]"),
        (2, "Optional['int']"),
        ("anything", "not an annotation("),
        ("anything", None),
    ],
)
def test_values_that_fit(value: object, annotation: str | None) -> None:
    assert mismatch(value, annotation, __name__) is None


@pytest.mark.parametrize(
    ("value", "annotation", "message"),
    [
        ("abc", "int", "expected an integer, found 'abc'"),
        (True, "int", "expected an integer, found true"),
        (1.5, "int", "expected an integer, found 1.5"),
        ("1e-3", "float", "expected a number, found '1e-3'"),
        (1, "bool", "expected true or false, found 1"),
        (None, "str", "expected a string, found null"),
        (3, "Literal['a', 'b']", "expected 'a' or 'b', found 3"),
        (1, "Literal[True]", "expected true, found 1"),
        ("x", "int | None", "expected an integer or null, found 'x'"),
        ([1, "x"], "list[int]", "expected a list, found [1, 'x']"),
        ("ab", "Sequence[str]", "expected a list, found 'ab'"),
        ([1], "dict[str, int]", "expected a mapping, found [1]"),
    ],
)
def test_values_that_do_not(value: object, annotation: str, message: str) -> None:
    assert mismatch(value, annotation, __name__) == message


def test_an_alias_is_followed_to_the_module_that_defines_it() -> None:
    found = mismatch("copy", "Placement | list[int]", "dynmoe.config.schema")
    assert found == (
        "expected 'last_two' or 'every_two' or 'sparse' or 'first_half' or 'second_half' or "
        "'all' or 'none' or a list, found 'copy'"
    )
