"""The contracts, their examples and their stored snapshots agree."""

import json
import subprocess

import pytest
from jsonschema import Draft202012Validator

from schemas import catalogue, generate
from schemas.base import Payload
from schemas.compatibility import incompatibilities
from schemas.topics import PAYLOADS, TOPICS

EXAMPLES = [(event_type, name, data) for event_type in PAYLOADS for name, data in catalogue.examples(event_type).items()]
EXAMPLE_IDS = [name for _, name, _ in EXAMPLES]


def test_every_payload_class_is_on_exactly_one_topic_and_says_which():
    listed = [(payload, topic.name) for topic in TOPICS for payload in topic.payloads]
    assert len(listed) == len(PAYLOADS)
    assert all(payload.topic == topic for payload, topic in listed)
    assert {payload for payload, _ in listed} == set(_leaves(Payload))


def _leaves(kind: type[Payload]) -> list[type[Payload]]:
    below = kind.__subclasses__()
    return [leaf for each in below for leaf in _leaves(each)] if below else [kind]


def test_types_are_named_after_the_pattern():
    for event_type in PAYLOADS:
        prefix, domain, subject, action, version = event_type.split(".")
        assert (prefix, version) == ("millrace", "v1")
        assert all(part.replace("_", "").isalpha() for part in (domain, subject, action))


@pytest.mark.parametrize("payload", PAYLOADS.values(), ids=PAYLOADS)
def test_every_contract_says_what_it_means(payload):
    assert len(catalogue.meaning(payload)) > 15


@pytest.mark.parametrize(("event_type", "name", "data"), EXAMPLES, ids=EXAMPLE_IDS)
def test_examples_validate_and_survive_a_round_trip(event_type, name, data):
    payload = PAYLOADS[event_type].model_validate_json(json.dumps(data))
    assert payload.entity
    assert PAYLOADS[event_type].model_validate_json(payload.model_dump_json()) == payload
    Draft202012Validator(catalogue.json_schema(PAYLOADS[event_type])).validate(data)


@pytest.mark.parametrize(("event_type", "name", "data"), EXAMPLES, ids=EXAMPLE_IDS)
def test_examples_use_no_field_that_the_contract_does_not_have(event_type, name, data):
    assert set(data) <= set(PAYLOADS[event_type].model_fields)


@pytest.mark.parametrize("event_type", PAYLOADS)
def test_one_example_of_each_type_sets_every_field(event_type):
    assert any(set(data) == set(PAYLOADS[event_type].model_fields) for data in catalogue.examples(event_type).values())


@pytest.mark.parametrize("event_type", catalogue.stored_snapshots())
def test_examples_of_every_stored_version_still_parse(event_type):
    for data in catalogue.examples(event_type).values():
        PAYLOADS[event_type].model_validate_json(json.dumps(data))


def test_there_is_no_example_without_a_type():
    known = {name for _, name, _ in EXAMPLES}
    assert {path.stem for path in catalogue.EXAMPLES.glob("*.json")} == known


def test_stored_snapshots_the_asyncapi_document_and_the_event_page_equal_the_contracts():
    stale = [str(path) for path in generate.stale_files(generate.derived_files())]
    assert stale == [], "run `make schemas` and review the difference as a decision"


def test_the_contracts_are_compatible_with_the_stored_snapshots():
    assert generate.incompatible_types() == {}


@pytest.mark.parametrize("event_type", PAYLOADS)
def test_the_contracts_are_compatible_with_what_was_committed_last(event_type):
    committed = subprocess.run(
        ["git", "show", f"HEAD:schemas/snapshots/{event_type}.json"], cwd=catalogue.DIRECTORY, capture_output=True, check=False
    )
    if committed.returncode:
        pytest.skip("no commit holds a snapshot of this type")
    assert incompatibilities(json.loads(committed.stdout), catalogue.json_schema(PAYLOADS[event_type])) == []


def test_an_incompatible_contract_is_not_written_over_its_snapshot(tmp_path, monkeypatch, capsys):
    event_type, schema = next(iter(catalogue.snapshots().items()))
    richer = {**schema, "properties": {**schema["properties"], "gone": {"type": "string"}}}
    (tmp_path / f"{event_type}.json").write_text(json.dumps(richer))
    (tmp_path / "millrace.old.thing.said.v1.json").write_text("{}")
    monkeypatch.setattr(catalogue, "SNAPSHOTS", tmp_path)
    assert generate.main([]) == 1
    errors = capsys.readouterr().err
    assert f"{event_type} is no longer compatible with its snapshot: gone: the field has gone" in errors
    assert "millrace.old.thing.said.v1 is no longer compatible with its snapshot: the type has gone" in errors
    assert json.loads((tmp_path / f"{event_type}.json").read_text()) == richer


def test_check_says_what_is_stale_and_writes_nothing(tmp_path, monkeypatch, capsys):
    stale = catalogue.DIRECTORY / "snapshots" / "made-up.json"
    monkeypatch.setattr(generate, "derived_files", lambda: {stale: "{}"})
    assert generate.main(["--check"]) == 1
    assert capsys.readouterr().out == "schemas/snapshots/made-up.json is stale; run `make schemas`\n"
    assert not stale.exists()
