"""What a record of a requests topic asks, and how its result is written."""

import base64
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from libs.errors import InvalidMessage, MillraceError
from libs.inference.errors import ModelError
from libs.inference.requests import InferResponse
from libs.inference.routing import Route
from libs.messaging.records import MAX_RECORD_BYTES, Record
from schemas.inference import InferenceResult
from services.serving.messages import COMPLETED, FAILED, parse, read_request
from tests.unit.serving.conftest import ID, NOW, REQUESTS, RESULTS, signature

ROWS = {"instances": [[1, 2]]}
V2 = {"inputs": [{"name": "input", "shape": [1, 2], "datatype": "FP64", "data": [1, 2]}]}
ROUTE = Route("shop", ID, "iris", 3, signature(), ())
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def record(body: Any, key: bytes | None = None, **headers: str) -> Record:
    value = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    return Record(REQUESTS, key, value, tuple((name, text.encode()) for name, text in headers.items()), 2, 7)


def event(**attributes: Any) -> dict[str, Any]:
    return {"specversion": "1.0", "id": "event-1", "source": "/me", "type": "ask", **attributes}


def read(body: Any, key: bytes | None = None, **headers: str) -> Any:
    return read_request(record(body, key, **headers), "shop")


@pytest.mark.parametrize(
    ("request_", "identity"),
    [
        (record(ROWS, b"key-1", ce_id="event-1", ce_specversion="1.0"), "event-1"),
        (record(event(data=ROWS), b"key-1"), "event-1"),
        (record(ROWS, b"key-1"), "key-1"),
        (record(ROWS), f"{REQUESTS}-2-7"),
        (record(ROWS, b""), f"{REQUESTS}-2-7"),
        (record(ROWS, b"\xff\x00"), "\ufffd\x00"),
        (record(ROWS, b"key-1", ce_id="x" * 2000), "key-1"),
        (record(ROWS, b"k" * 2000), f"{REQUESTS}-2-7"),
        (record(event(id=5, data=ROWS), b"key-1"), "key-1"),
        (record(b"\xff not json", b"key-1"), "key-1"),
        (record({**ROWS, "specversion": "of mine", "id": "no event"}, b"key-1"), "key-1"),
        (record(None), f"{REQUESTS}-2-7"),
    ],
)
def test_the_id_is_the_events_else_the_key_else_the_place(request_, identity):
    assert read_request(request_, "shop").id == identity


@pytest.mark.parametrize(
    "request_",
    [
        record(ROWS),
        record(ROWS, ce_id="1", ce_specversion="1.0", ce_type="ask", ce_source="/me"),
        record(event(data=ROWS)),
        record(event(data_base64=base64.b64encode(json.dumps(ROWS).encode()).decode())),
        record(V2),
        record(event(data=V2)),
    ],
    ids=["plain", "binary", "structured", "base64", "v2", "structured-v2"],
)
def test_a_request_is_read_in_every_form(request_):
    document = read_request(request_, "shop").document()
    assert parse(document, signature()).inputs["input"].tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (None, "has no value"),
        (b"", "has no value"),
        (b"{", "the record's value is not valid JSON"),
        (b"[1]", "the record's value must be a JSON object"),
        (event(), "has no value"),
        (event(data=None), "has no value"),
        (event(data=[1]), "data must be a JSON object"),
        (event(data_base64="***"), "data must be a JSON object"),
    ],
)
def test_what_holds_no_request_is_an_invalid_message(body, says):
    with pytest.raises(InvalidMessage, match=says):
        read(body).document()


def test_a_result_says_what_whose_and_by_whom():
    request = read(ROWS, b"key-1", traceparent=TRACEPARENT)
    result = request.completed(ROUTE, InferResponse({"predict": np.array([3.5])}), NOW)
    body = InferenceResult.model_validate_json(result.value)
    assert (result.topic, result.key) == (RESULTS, b"key-1")
    assert body.model_dump(exclude_none=True) == {
        "request_id": "key-1",
        "endpoint_name": "shop",
        "status": "completed",
        "model_name": "iris",
        "model_version": 3,
        "predictions": [3.5],
    }
    assert result.header("ce_type") == COMPLETED
    assert result.header("ce_time") == "2026-01-01T00:00:00Z"
    assert (result.header("ce_correlationid"), result.header("ce_causationid")) == ("key-1", "key-1")
    assert result.header("traceparent") == TRACEPARENT


def test_a_result_belongs_to_the_story_of_its_request():
    for request in (read(ROWS, ce_id="e", ce_correlationid="story"), read(event(correlationid="story", data=ROWS))):
        assert request.failed(ModelError("no"), NOW).header("ce_correlationid") == "story"


def test_the_id_of_a_result_follows_from_the_request_alone():
    results = [read(body, b"key-1").failed(ModelError("no"), NOW) for body in (ROWS, V2)]
    results.append(read(ROWS, b"key-1").completed(ROUTE, InferResponse({"predict": np.array([1.0])}), NOW))
    assert len({result.header("ce_id") for result in results}) == 1
    assert read(ROWS, b"key-2").failed(ModelError("no"), NOW).header("ce_id") != results[0].header("ce_id")


def test_an_answer_that_fits_no_record_is_refused():
    with pytest.raises(InvalidMessage, match="too large for a record"):
        read(ROWS).completed(ROUTE, InferResponse({"predict": np.random.default_rng(0).random(100_000)}), NOW)


def test_a_failed_result_always_fits_a_record():
    request = read(ROWS, b"k" * MAX_RECORD_BYTES)
    result = request.failed(ModelError("no\n" * MAX_RECORD_BYTES), NOW)
    assert result.size_bytes < 10_000
    assert result.key == request.id.encode()
    assert result.header("ce_type") == FAILED
    assert "\n" not in InferenceResult.model_validate_json(result.value).error


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["instances", "inputs", "data", "name", "shape"]), inner),
    max_leaves=8,
)
bodies = st.dictionaries(
    st.sampled_from(["instances", "inputs", "outputs", "parameters", "id", "data", "data_base64", "specversion", "type"]), values
)


@given(bodies | values, st.none() | st.binary(max_size=8))
def test_whatever_a_record_holds_is_a_request_or_an_error_of_ours(body, key):
    request = read(body, key)
    error = None
    try:
        parse(request.document(), signature())
    except MillraceError as raised:
        error = raised
    if error is not None:
        assert InferenceResult.model_validate_json(request.failed(error, NOW).value).request_id == request.id
