"""Which changes of a contract its readers notice."""

import doctest
from enum import StrEnum

import pytest
from pydantic import BaseModel, Field

from schemas import compatibility
from schemas.compatibility import incompatibilities


def fields(required=(), **properties) -> dict:
    return {"type": "object", "properties": properties, "required": list(required)}


TEXT, NUMBER, COUNT = {"type": "string"}, {"type": "number"}, {"type": "integer"}
OPTIONAL_TEXT = {"anyOf": [TEXT, {"type": "null"}], "default": None}

COMPATIBLE = {
    "nothing changed": (fields(["a"], a=TEXT), fields(["a"], a=TEXT)),
    "an optional field is added": (fields(["a"], a=TEXT), fields(["a"], a=TEXT, b=OPTIONAL_TEXT)),
    "a required field becomes optional": (fields(["a"], a=TEXT), fields(a=TEXT)),
    "null is allowed too": (fields(a=TEXT), fields(a=OPTIONAL_TEXT)),
    "an integer becomes a number": (fields(a=COUNT), fields(a=NUMBER)),
    "a type becomes anything": (fields(a=COUNT), fields(a={})),
    "a value is added to an enumeration": (fields(a={"enum": ["x"]}), fields(a={"enum": ["x", "y"]})),
    "an enumeration becomes free text": (fields(a={"type": "string", "enum": ["x"]}), fields(a=TEXT)),
    "a lower bound falls": (fields(a={**COUNT, "minimum": 1}), fields(a={**COUNT, "minimum": 0})),
    "an upper bound rises": (fields(a={**TEXT, "maxLength": 10}), fields(a={**TEXT, "maxLength": 20})),
    "a bound goes": (fields(a={**COUNT, "maximum": 1}), fields(a=COUNT)),
    "a pattern goes": (fields(a={**TEXT, "pattern": "^a$"}), fields(a=TEXT)),
    "titles and descriptions change": (fields(a={**TEXT, "title": "A"}), fields(a={**TEXT, "description": "b"})),
    "a definition is renamed": (
        {**fields(a={"$ref": "#/$defs/Old"}), "$defs": {"Old": TEXT}},
        {**fields(a={"$ref": "#/$defs/New"}), "$defs": {"New": TEXT}},
    ),
    "a list of types gains one": (fields(a={"type": ["string"]}), fields(a={"type": ["string", "null"]})),
    "elements gain an optional field": (
        fields(a={"type": "array", "items": fields(["b"], b=TEXT)}),
        fields(a={"type": "array", "items": fields(["b"], b=TEXT, c=OPTIONAL_TEXT)}),
    ),
}

INCOMPATIBLE = {
    "a field goes": (fields(a=TEXT, b=TEXT), fields(a=TEXT), "b: the field has gone"),
    "a field is renamed": (fields(a=TEXT), fields(b=TEXT), "a: the field has gone"),
    "a required field is added": (fields(), fields(["a"], a=TEXT), "a: the field is required now"),
    "an optional field becomes required": (fields(a=TEXT), fields(["a"], a=TEXT), "a: the field is required now"),
    "a type changes": (fields(a=TEXT), fields(a=COUNT), "a: string is not accepted any more"),
    "a number becomes an integer": (fields(a=NUMBER), fields(a=COUNT), "a: number is not accepted any more"),
    "null is no longer allowed": (fields(a=OPTIONAL_TEXT), fields(a=TEXT), "a: null is not accepted any more"),
    "anything becomes a type": (fields(a={}), fields(a=TEXT), "a: anything is not accepted any more"),
    "a value goes from an enumeration": (fields(a={"enum": ["x", "y"]}), fields(a={"enum": ["x"]}), "a: 'y' is not accepted any more"),
    "free text becomes an enumeration": (fields(a=TEXT), fields(a={**TEXT, "enum": ["x"]}), "a: only 'x' is accepted now"),
    "a constant changes": (fields(a={"const": 1}), fields(a={"const": 2}), "a: 1 is not accepted any more"),
    "a lower bound rises": (fields(a={**COUNT, "minimum": 0}), fields(a={**COUNT, "minimum": 1}), "a: minimum rose from 0 to 1"),
    "a bound appears": (fields(a=TEXT), fields(a={**TEXT, "maxLength": 9}), "a: maxLength fell from nothing to 9"),
    "a pattern changes": (fields(a={**TEXT, "pattern": "^a$"}), fields(a={**TEXT, "pattern": "^b$"}), "a: pattern changed from ^a$ to ^b$"),
    "elements are narrowed": (
        fields(a={"type": "array", "items": NUMBER}), fields(a={"type": "array", "items": COUNT}), "a[]: number is not accepted any more",
    ),
    "elements of any kind get one": (
        fields(a={"type": "array"}), fields(a={"type": "array", "items": TEXT}), "a[]: elements are restricted now",
    ),
    "a tuple grows": (
        fields(a={"type": "array", "prefixItems": [TEXT]}), fields(a={"type": "array", "prefixItems": [TEXT, TEXT]}),
        "a: had 1 fixed elements, has 2",
    ),
    "values of a map are narrowed": (
        fields(a={"type": "object", "additionalProperties": NUMBER}), fields(a={"type": "object", "additionalProperties": COUNT}),
        "a.*: number is not accepted any more",
    ),
    "other fields are forbidden": (fields(a=TEXT), {**fields(a=TEXT), "additionalProperties": False}, "*: other fields are restricted now"),
    "a field of a definition goes": (
        {**fields(a={"$ref": "#/$defs/D"}), "$defs": {"D": fields(b=TEXT)}}, {**fields(a={"$ref": "#/$defs/D"}), "$defs": {"D": fields()}},
        "a.b: the field has gone",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("old", "new"), COMPATIBLE.values(), ids=COMPATIBLE)
def test_a_change_that_readers_do_not_notice_is_compatible(old, new):
    assert incompatibilities(old, new) == []


@pytest.mark.parametrize(("old", "new", "reason"), INCOMPATIBLE.values(), ids=INCOMPATIBLE)
def test_a_change_that_readers_notice_is_reported_with_its_path(old, new, reason):
    assert incompatibilities(old, new) == [reason]


def test_recursive_definitions_come_to_an_end():
    def tree(leaf):
        node = {"type": "object", "properties": {"leaf": leaf, "children": {"type": "array", "items": {"$ref": "#/$defs/Node"}}}}
        return {"$ref": "#/$defs/Node", "$defs": {"Node": node}}

    assert incompatibilities(tree(NUMBER), tree(NUMBER)) == []
    assert incompatibilities(tree(NUMBER), tree(COUNT)) == ["leaf: number is not accepted any more"]


def test_it_reads_what_pydantic_writes():
    class Colour(StrEnum):
        RED = "red"

    class Before(BaseModel):
        colour: Colour | None = None
        sizes: tuple[int, ...] = ()
        pair: tuple[str, int] = ("", 0)
        labels: dict[str, str] = Field(default_factory=dict)

    class After(Before):
        sizes: tuple[float, ...] = ()
        note: str | None = None

    class Broken(Before):
        colour: Colour
        pair: tuple[str, str] = ("", "")

    before = Before.model_json_schema()
    assert incompatibilities(before, After.model_json_schema()) == []
    assert incompatibilities(before, Broken.model_json_schema()) == [
        "colour: the field is required now",
        "colour: null is not accepted any more",
        "pair[1]: integer is not accepted any more",
    ]


def test_the_examples_of_the_module_hold():
    assert doctest.testmod(compatibility).failed == 0
