"""JSON bodies: what is an object, and that every name in it is given once."""

import json

import pytest

from libs.inference.bodies import parse_object
from libs.inference.errors import InvalidInputError


def refusal(body: bytes) -> str:
    with pytest.raises(InvalidInputError) as caught:
        parse_object(body)
    return caught.value.message


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the request body is empty"),
        (b"[]", "the request body must be a JSON object"),
        (b"7", "the request body must be a JSON object"),
        (b"{", "the request body is not valid JSON"),
        (b'{"a": NaN}', "the request body is not valid JSON"),
        (b'{"a": -Infinity}', "the request body is not valid JSON"),
        (b'{"a": 1e999}', "the request body is not valid JSON"),
        (b'{"a": "\xff"}', "the request body is not valid JSON"),
        (b'{"a": "\\ud800"}', "the request body is not valid JSON"),
        (b"\xef\xbb\xbf{}", "the request body is not valid JSON"),
        (b'{"a":' * 100_000, "the request body is not valid JSON"),
    ],
)
def test_what_is_no_json_object_is_refused(body: bytes, message: str) -> None:
    assert refusal(body).startswith(message)


@pytest.mark.parametrize(
    "body",
    [
        b'{"instances": [1], "instances": [2]}',
        b'{"a" : 1, "b": {"c": 1, "c" :2}}',
        b'{"inputs": [{"name": "x"}, {"name": "x", "data": [1], "data": [2]}]}',
        b'{"a": "x:y", "a": "x"}',
        b'{"a": "\\u003a", "b": 1, "b": 2}',
        b'{"a": [1, {"b": 1, "b": 2}]}',
        b'{"a": [[{"b": 1, "b": 2}]]}',
        b'{"a": ' * 100 + b'{"b": 1, "b": 1}' + b"}" * 100,
        b'{"a": "' + b":" * 5000 + b'", "a": 1}',
    ],
)
def test_a_name_given_twice_is_refused_wherever_it_is(body: bytes) -> None:
    assert "twice in one object" in refusal(body)


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"a": "x:y", "b": ":::"},
        {"a": [{"b": 1}, {"b": 2}], "c": {"d": {"e": [1, {"f": 2}]}}},
        {"instances": [["12:30", "a:b"], [{"b64": "QQ=="}, "c"]]},
        {":": {":": ":"}},
        {"long": "x:" * 5000, "more": list(range(3000))},
    ],
)
def test_colons_in_text_are_no_names(document: object) -> None:
    assert parse_object(json.dumps(document).encode()) == document


def test_a_duplicate_cannot_hide_behind_nesting_that_is_too_deep() -> None:
    assert refusal(b'{"x:":' * 500 + b"1" + b"}" * 500) == "the request body is nested too deeply"


def test_millions_of_empty_lists_are_refused_before_they_are_parsed() -> None:
    assert refusal(b'{"a": [' + b"[]," * 2_000_000 + b"[]]}") == "the request body has more than 2000000 lists and objects"


def test_millions_of_values_are_refused_before_they_are_parsed() -> None:
    assert refusal(b'{"a": [' + b"1," * 8_000_001 + b"1]}").startswith("the request body has more than 8000000 values")
