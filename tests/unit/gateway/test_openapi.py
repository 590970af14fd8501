"""The document that describes all routes."""

import json
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest

from services.gateway.api import create_api
from services.gateway.openapi import OPERATIONS
from services.gateway.openapi_schemas import EXAMPLES, SCHEMAS
from services.gateway.routes import ROUTES, Door


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    management: Any = SimpleNamespace(catalog=None, journal=None)
    return json.loads(json.dumps(create_api(management).openapi()))


def operations(document: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(method.upper(), path): operation for path, methods in document["paths"].items() for method, operation in methods.items()}


def test_every_route_is_described_and_nothing_else(document):
    assert set(operations(document)) == {(route.method, route.template) for route in ROUTES}


def test_the_table_has_no_row_that_is_no_route():
    assert OPERATIONS.keys() <= {(route.method, route.template) for route in ROUTES}
    assert {(route.method, route.template) for route in ROUTES if route.door is Door.PLAIN} <= OPERATIONS.keys()


def test_every_parameter_of_a_path_is_described_with_its_pattern(document):
    for (_, path), operation in operations(document).items():
        described = {each["name"]: each["schema"]["pattern"] for each in operation.get("parameters", []) if each["in"] == "path"}
        assert set(described) == {part.split("}")[0] for part in path.split("{")[1:]}


def test_operations_have_ids_of_their_own_and_say_what_they_answer(document):
    found = list(operations(document).values())
    assert len({operation["operationId"] for operation in found}) == len(found)
    assert all(operation["summary"] and operation["description"] and operation["responses"].keys() >= {"400", "401"} for operation in found)
    assert "HTTPValidationError" not in json.dumps(document)


def test_public_routes_need_no_key_and_others_do(document):
    found = operations(document)
    assert found["GET", "/healthz"]["security"] == []
    assert found["POST", "/v1/models/{model}:predict"]["security"] == [{"bearer": []}, {"google": []}]


def test_predict_routes_tell_their_headers_and_the_errors_of_their_family(document):
    found = operations(document)
    families = {
        "/v1/models/{model}:predict": "Error",
        "/v2/models/{model}/infer": "Error",
        "/v1/projects/{project}/locations/{location}/endpoints/{endpoint}:predict": "GoogleError",
        "/invocations": "ScoringError",
    }
    for path, schema in families.items():
        operation = found["POST", path]
        headers = {each["name"] for each in operation["parameters"] if each["in"] == "header"}
        assert headers >= {"x-request-id", "x-request-timeout-ms", "prefer", "traceparent", "x-millrace-webhook", "x-millrace-expires-s"}
        assert operation["responses"].keys() >= {"200", "202", "400", "404", "429", "500", "503", "504"}
        for status in ("400", "504"):
            assert operation["responses"][status]["content"]["application/json"]["schema"]["$ref"].endswith(f"/{schema}")


def test_all_references_lead_somewhere(document):
    text = json.dumps(document)
    names = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert names <= document["components"]["schemas"].keys()
    assert SCHEMAS.keys() <= names | {"V2Config"}


@pytest.mark.parametrize(("schema", "name"), [(schema, name) for schema, examples in EXAMPLES.items() for name in examples])
def test_examples_are_what_their_schema_says(document, schema, name):
    whole = {"$ref": f"#/components/schemas/{schema}", "components": document["components"]}
    jsonschema.Draft202012Validator(whole).validate(EXAMPLES[schema][name])
