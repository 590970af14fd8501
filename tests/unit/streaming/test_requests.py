"""What a record of a requests topic asks, and how its result is written."""

import base64
import json
import uuid
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
from services.streaming import requests
from services.streaming.batches import Item
from services.streaming.log import Given, Taken
from services.streaming.requests import Form, Request, result_id
from services.streaming.results import COMPLETED, FAILED, ResultWriter
from tests.unit.streaming.conftest import ID, NOW, REQUESTS, RESULTS, signature

ROWS = {"instances": [[1, 2]]}
V2 = {"inputs": [{"name": "input", "shape": [1, 2], "datatype": "FP64", "data": [1, 2]}]}
ROUTE = Route("shop", ID, "iris", 3, signature(), ())
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
PLACE = f"{REQUESTS}-2-7"


def record(body: Any, key: bytes | None = None, **headers: str) -> Taken:
    value = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    return Taken(2, 7, key, value, tuple((name, text.encode()) for name, text in headers.items()), 0)


def event(**attributes: Any) -> dict[str, Any]:
    return {"specversion": "1.0", "id": "event-1", "source": "/me", "type": "ask", **attributes}


def read(body: Any, key: bytes | None = None, **headers: str) -> Request:
    return of(record(body, key, **headers))


def of(taken: Taken) -> Request:
    return Request(taken, REQUESTS, "shop")


def failed(request: Request, message: str = "no") -> Record:
    return written(ResultWriter("shop", NOW).failed(request, ModelError(message)))


def completed(request: Request, predictions: Any) -> Record:
    (given_,) = ResultWriter("shop", NOW).rows([request], [1], ROUTE, InferResponse({"predict": np.array(predictions)}))
    return written(given_)


def written(result: Given) -> Record:
    return Record(result.topic, result.key, result.value, tuple(result.headers))


@pytest.mark.parametrize(
    ("taken", "identity", "cause"),
    [
        (record(ROWS, b"key-1", ce_id="event-1", ce_specversion="1.0", ce_source="/me"), "event-1", "/me\nevent-1"),
        (record(event(data=ROWS), b"key-1"), "event-1", "/me\nevent-1"),
        (record(ROWS, ce_id="event-1"), "event-1", "\nevent-1"),
        (record(ROWS, b"key-1"), "key-1", PLACE),
        (record(ROWS), PLACE, PLACE),
        (record(ROWS, b""), PLACE, PLACE),
        (record(ROWS, b"\xff\x00"), "\ufffd\x00", PLACE),
        (record(ROWS, b"key-1", ce_id="x" * 2000), "key-1", PLACE),
        (record(ROWS, b"k" * 2000), PLACE, PLACE),
        (record(event(id=5, data=ROWS), b"key-1"), "key-1", PLACE),
        (record(b"\xff not json", b"key-1"), "key-1", PLACE),
        (record({**ROWS, "specversion": "of mine", "id": "no event"}, b"key-1"), "key-1", PLACE),
        (record(None), PLACE, PLACE),
    ],
)
def test_the_id_is_the_events_else_the_key_else_the_place_and_the_results_follows(taken, identity, cause):
    request = of(taken)
    assert (request.id, request.result_id) == (identity, result_id(cause))


@given(st.text())
def test_a_results_id_is_a_uuid_of_version_5(cause):
    namespace = uuid.UUID(bytes=requests._RESULT_NAMESPACE)
    encodable = cause.encode("utf-8", "replace").decode()
    assert result_id(encodable) == str(uuid.uuid5(namespace, encodable))


def test_requests_of_two_sources_have_two_results():
    assert read(ROWS, ce_id="1", ce_source="/a").result_id != read(ROWS, ce_id="1", ce_source="/b").result_id


def test_the_chance_is_spread_evenly_and_stays_the_same():
    chances = [read(ROWS, ce_id=str(number)).chance for number in range(1000)]
    assert 0.45 < sum(chances) / 1000 < 0.55
    assert chances == [read(ROWS, ce_id=str(number)).chance for number in range(1000)]
    assert all(0 <= chance < 1 for chance in chances)


@pytest.mark.parametrize(
    "taken",
    [
        record(ROWS),
        record(ROWS, ce_id="1", ce_specversion="1.0", ce_type="ask", ce_source="/me"),
        record(event(data=ROWS)),
        record(event(data_base64=base64.b64encode(json.dumps(ROWS).encode()).decode())),
        record(V2),
        record(event(data=V2)),
        record(V2, **{"content-type": "text/plain"}),
    ],
    ids=["plain", "binary", "structured", "base64", "v2", "structured-v2", "mislabelled"],
)
def test_a_request_is_read_in_every_form(taken):
    request = of(taken)
    document = request.document()
    assert request.parse(document, signature()).inputs["input"].tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize("name", ["application/x-protobuf", "APPLICATION/GRPC+PROTO; x=1", "application/vnd.oip.v2+protobuf"])
def test_protobuf_is_known_by_its_content_type(name):
    assert read(b"", **{"content-type": name}).form is Form.PROTOBUF
    assert read(event(datacontenttype=name, data_base64="AAAA")).form is Form.PROTOBUF


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


@pytest.mark.parametrize("length", ["", "x", "-1", "9" * 30, "5.0"])
def test_a_head_length_that_is_none_is_an_invalid_message(length):
    with pytest.raises(MillraceError):
        read(b"{}", **{"inference-header-content-length": length}).parse(None, signature())


def test_a_result_says_what_whose_and_by_whom():
    result = completed(read(ROWS, b"key-1", traceparent=TRACEPARENT), [3.5])
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


OTHER = "00-1af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"


def tracing(result: Record) -> dict[str, str]:
    """The headers of a result that belong to tracing."""
    return {name: str(result.header(name)) for name, _ in result.headers if "trace" in name}


@pytest.mark.parametrize(
    ("headers", "carried"),
    [
        ({"ce_traceparent": OTHER}, {"traceparent": OTHER, "ce_traceparent": OTHER}),
        (
            {"ce_traceparent": OTHER, "ce_tracestate": "a=1"},
            {"traceparent": OTHER, "tracestate": "a=1", "ce_traceparent": OTHER, "ce_tracestate": "a=1"},
        ),
        (
            {"traceparent": TRACEPARENT, "tracestate": "b=2", "ce_traceparent": OTHER, "ce_tracestate": "a=1"},
            {"traceparent": TRACEPARENT, "tracestate": "b=2", "ce_traceparent": OTHER, "ce_tracestate": "a=1"},
        ),
        ({"traceparent": TRACEPARENT, "tracestate": "b=2"}, {"traceparent": TRACEPARENT, "tracestate": "b=2"}),
        ({"traceparent": TRACEPARENT, "ce_tracestate": "a=1"}, {"traceparent": TRACEPARENT}),
        ({"tracestate": "b=2", "ce_tracestate": "a=1"}, {}),
        ({"ce_traceparent": "00-nonsense", "ce_tracestate": "a=1"}, {}),
        ({"ce_traceparent": OTHER, "ce_tracestate": "a=" + "x" * 600}, {"traceparent": OTHER, "ce_traceparent": OTHER}),
    ],
)
def test_the_extension_of_distributed_tracing_is_carried_to_the_result(headers, carried):
    for make in (failed, lambda request: completed(request, [3.5])):
        assert tracing(make(read(ROWS, **headers))) == carried


def test_a_structured_event_carries_its_trace_context_as_attributes():
    request = read(event(data=ROWS, traceparent=OTHER, tracestate="a=1"))
    assert tracing(failed(request)) == {"traceparent": OTHER, "tracestate": "a=1", "ce_traceparent": OTHER, "ce_tracestate": "a=1"}


def test_a_malformed_traceparent_is_not_passed_on():
    assert failed(read(ROWS, traceparent="00-nonsense")).header("traceparent") is None


def test_a_result_belongs_to_the_story_of_its_request():
    for request in (read(ROWS, ce_id="e", ce_correlationid="story"), read(event(correlationid="story", data=ROWS))):
        assert failed(request).header("ce_correlationid") == "story"


def test_a_failed_result_always_fits_a_record():
    request = read(ROWS, b"k" * MAX_RECORD_BYTES)
    result = failed(request, "no\n" * MAX_RECORD_BYTES)
    assert result.size_bytes < 10_000
    assert result.key == request.id.encode()
    assert result.header("ce_type") == FAILED
    assert "\n" not in InferenceResult.model_validate_json(result.value).error


@given(st.text(max_size=20))
def test_any_id_is_written_as_valid_json(identity):
    request = read(ROWS, ce_id=identity.encode("utf-8", "replace").decode())
    assert json.loads(completed(request, [1.0]).value)["request_id"] == request.id


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["instances", "inputs", "data", "name", "shape"]), inner),
    max_leaves=8,
)
bodies = st.dictionaries(
    st.sampled_from(
        ["instances", "inputs", "outputs", "parameters", "id", "data", "data_base64", "specversion", "type", "datacontenttype"]
    ),
    values,
)
headers = st.dictionaries(
    st.sampled_from(
        [
            "ce_id",
            "ce_source",
            "ce_dataref",
            "content-type",
            "traceparent",
            "ce_traceparent",
            "ce_tracestate",
            "inference-header-content-length",
        ]
    ),
    st.sampled_from(["", "1", "application/x-protobuf", "application/json", "99999", "\ufffd"]),
)


@given(bodies | values, st.none() | st.binary(max_size=8), headers)
def test_whatever_a_record_holds_is_a_request_or_an_error_of_ours(body, key, named):
    request = read(body, key, **named)
    item = Item(request)
    try:
        item.read()
        item.parse(signature())
    except MillraceError as error:
        result = ResultWriter("shop", NOW).failed(request, error)
        assert InferenceResult.model_validate_json(result.value).request_id == request.id
