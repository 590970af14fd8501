"""Whether messages written against one JSON Schema can still be read with another.

``incompatibilities(old, new)`` is empty when every message that fits ``old`` also fits ``new``, as far as the keywords that our models
produce can tell, and no field has gone. When in doubt (a changed pattern, say) it reports: a person decides.

>>> old = {"type": "object", "properties": {"size": {"type": "integer", "minimum": 0}}, "required": ["size"]}
>>> incompatibilities(old, {**old, "properties": {**old["properties"], "note": {"type": "string"}}})
[]
>>> incompatibilities(old, {"type": "object", "properties": {"size": {"type": "integer", "minimum": 1}}, "required": ["size"]})
['size: minimum rose from 0 to 1']
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Schema = Mapping[str, Any]

_LOWER_BOUNDS = ("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties")
_UPPER_BOUNDS = ("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties")
_EXACT = ("pattern", "format", "multipleOf", "uniqueItems")
_DEFINITION = "#/$defs/"


def incompatibilities(old: Schema, new: Schema) -> list[str]:
    """Every reason why ``new`` is no compatible successor of ``old``, each with the path of the field."""
    return list(_Comparison(old.get("$defs", {}), new.get("$defs", {}), frozenset()).schemas("", old, new))


@dataclass(frozen=True)
class _Comparison:
    """The definitions of both documents, and the pairs of references being compared, which ends recursion."""

    old_definitions: Schema
    new_definitions: Schema
    open_pairs: frozenset[tuple[str, str]]

    def schemas(self, path: str, old: Schema, new: Schema) -> Iterator[str]:
        pair = (str(old.get("$ref", "")), str(new.get("$ref", "")))
        if all(pair):
            if pair in self.open_pairs:
                return
            inner = _Comparison(self.old_definitions, self.new_definitions, self.open_pairs | {pair})
            yield from inner.alternatives(path, old, new)
        else:
            yield from self.alternatives(path, old, new)

    def alternatives(self, path: str, old: Schema, new: Schema) -> Iterator[str]:
        """Each thing that was allowed must fit one of the things that are allowed now."""
        candidates = _alternatives(new, self.new_definitions)
        for alternative in _alternatives(old, self.old_definitions):
            related = [candidate for candidate in candidates if _takes_type(candidate, alternative)]
            if not related:
                yield f"{path or 'the whole'}: {_type_name(alternative)} is not accepted any more"
                continue
            problems = [list(self.single(path, alternative, candidate)) for candidate in related]
            if all(problems):
                yield from min(problems, key=len)

    def single(self, path: str, old: Schema, new: Schema) -> Iterator[str]:
        yield from _values(path, old, new)
        yield from _bounds(path, old, new)
        yield from self.members(path, old, new)
        yield from self.elements(path, old, new)

    def members(self, path: str, old: Schema, new: Schema) -> Iterator[str]:
        before, after = old.get("properties", {}), new.get("properties", {})
        for name in before.keys() - after.keys():
            yield f"{_join(path, name)}: the field has gone"
        for name in sorted(set(new.get("required", ())) - set(old.get("required", ()))):
            yield f"{_join(path, name)}: the field is required now"
        for name in sorted(before.keys() & after.keys()):
            yield from self.schemas(_join(path, name), before[name], after[name])
        others, others_now = old.get("additionalProperties", True), new.get("additionalProperties", True)
        if isinstance(others, Mapping) and isinstance(others_now, Mapping):
            yield from self.schemas(_join(path, "*"), others, others_now)
        elif others_now is not True and others_now != others:
            yield f"{_join(path, '*')}: other fields are restricted now"

    def elements(self, path: str, old: Schema, new: Schema) -> Iterator[str]:
        before, after = old.get("prefixItems", ()), new.get("prefixItems", ())
        if len(before) != len(after):
            yield f"{path}: had {len(before)} fixed elements, has {len(after)}"
        for number, (element, element_now) in enumerate(zip(before, after, strict=False)):
            yield from self.schemas(f"{path}[{number}]", element, element_now)
        items, items_now = old.get("items", True), new.get("items", True)
        if isinstance(items, Mapping) and isinstance(items_now, Mapping):
            yield from self.schemas(f"{path}[]", items, items_now)
        elif items_now is not True and items_now != items:
            yield f"{path}[]: elements are restricted now"


def _alternatives(schema: Schema, definitions: Schema) -> list[Schema]:
    """The schema as a list of schemas without reference, union or list of types."""
    if "$ref" in schema:
        return _alternatives(definitions[str(schema["$ref"]).removeprefix(_DEFINITION)], definitions)
    for union in ("anyOf", "oneOf"):
        if union in schema:
            return [single for each in schema[union] for single in _alternatives(each, definitions)]
    if isinstance(schema.get("type"), Sequence) and not isinstance(schema["type"], str):
        return [{**schema, "type": each} for each in schema["type"]]
    return [schema]


def _takes_type(new: Schema, old: Schema) -> bool:
    wanted, given = new.get("type"), old.get("type")
    return wanted is None or wanted == given or (wanted == "number" and given == "integer")


def _values(path: str, old: Schema, new: Schema) -> Iterator[str]:
    allowed, allowed_now = _enumeration(old), _enumeration(new)
    if allowed_now is None:
        return
    if allowed is None:
        yield f"{path}: only {_listed(allowed_now)} is accepted now"
    elif gone := [value for value in allowed if value not in allowed_now]:
        yield f"{path}: {_listed(gone)} is not accepted any more"


def _bounds(path: str, old: Schema, new: Schema) -> Iterator[str]:
    for keyword in _LOWER_BOUNDS:
        if keyword in new and (keyword not in old or new[keyword] > old[keyword]):
            yield f"{path}: {keyword} rose from {old.get(keyword, 'nothing')} to {new[keyword]}"
    for keyword in _UPPER_BOUNDS:
        if keyword in new and (keyword not in old or new[keyword] < old[keyword]):
            yield f"{path}: {keyword} fell from {old.get(keyword, 'nothing')} to {new[keyword]}"
    for keyword in _EXACT:
        if keyword in new and new[keyword] != old.get(keyword):
            yield f"{path}: {keyword} changed from {old.get(keyword, 'nothing')} to {new[keyword]}"


def _enumeration(schema: Schema) -> list[Any] | None:
    if "const" in schema:
        return [schema["const"]]
    return list(schema["enum"]) if "enum" in schema else None


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(repr(value) for value in values)


def _type_name(schema: Schema) -> str:
    return str(schema.get("type", "anything"))


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
