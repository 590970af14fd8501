"""Signatures that uploaders declare."""

import doctest
from typing import Any

import pytest

from libs.errors import InvalidArgumentError
from libs.inference import declarations


def test_columns_in_mlflows_terms() -> None:
    text = '[{"type": "string", "name": "city", "required": false}, {"type": "double", "name": "age"}]'
    city, age = declarations.read({"inputs": text}).inputs
    assert (city.datatype, city.dtype, city.shape, city.optional) == ("BYTES", "object", (-1,), True)
    assert (age.datatype, age.dtype, age.optional) == ("FP64", "float64", False)


def test_categories_keep_their_order() -> None:
    (size,) = declarations.read([{"name": "size", "dtype": "category", "categories": ["S", "M", "L"]}]).inputs
    assert (size.datatype, size.categories) == ("BYTES", ("S", "M", "L"))


def test_tensors_are_taken_as_they_are() -> None:
    (x,) = declarations.read({"inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]}).inputs
    assert (x.datatype, x.shape, x.dtype) == ("FP32", (-1, 4), None)


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({}, "a list 'inputs'"),
        ([], "a list 'inputs'"),
        ({"inputs": "["}, "not JSON"),
        ([{"type": "string"}], "needs a 'name'"),
        ([{"name": "a", "type": "tensor"}], "type of column 'a' is 'tensor'"),
        ([{"name": "a", "dtype": "complex"}], "dtype of column 'a' is 'complex'"),
        ([{"name": "a", "datatype": "FP9"}], "needs a 'datatype'"),
        ([{"name": "a", "datatype": "FP32"}], "shape"),
        ([{"name": "a", "dtype": "object"}, {"name": "a", "dtype": "object"}], "twice"),
        ([{"name": "a", "dtype": "object"}, {"name": "b", "datatype": "FP32", "shape": [-1]}], "not some of each"),
    ],
)
def test_a_signature_that_is_none_is_refused_with_its_place(document: Any, said: str) -> None:
    with pytest.raises(InvalidArgumentError, match=said):
        declarations.read(document)


def test_the_documented_examples_hold() -> None:
    assert doctest.testmod(declarations).failed == 0
