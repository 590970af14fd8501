"""The V1 protocol of KServe, which is TensorFlow Serving's but for its metadata.

References
----------
KServe, "V1 Inference Protocol" and "CloudEvents"; CloudEvents 1.0, "HTTP Protocol Binding".
"""

import json

import numpy as np

from tests.conformance.checks import V1, Level, NotApplicable, check, expect, expect_ok, expect_refusal
from tests.conformance.subject import Subject

MUST, SHOULD = Level.MUST, Level.SHOULD
_EVENT = {"specversion": "1.0", "id": "an-event", "source": "/conformance", "type": "a.request", "time": "2026-01-01T00:00:00Z"}


def _instances(subject: Subject, rows: int = 2) -> list[object]:
    if subject.http.get("/v1/models").status_code == 404:
        raise NotApplicable("the server does not offer V1")
    arrays = subject.arrays(rows)
    if len(arrays) == 1:
        (array,) = arrays.values()
        return list(array.tolist())
    return [{name: array[row].tolist() for name, array in arrays.items()} for row in range(rows)]


def _predictions(answer: object) -> list[object]:
    expect(isinstance(answer, dict) and isinstance(answer.get("predictions"), list), "there are no predictions")
    return list(answer["predictions"])  # type: ignore[index]


@check("v1.alive", SHOULD, V1, "Liveness")
def alive(subject: Subject) -> None:
    """`GET /` says that the server is alive."""
    _instances(subject)
    expect(expect_ok(subject.http.get("/")).json() == {"status": "alive"}, "another body")


@check("v1.list", MUST, V1, "List Models")
def models(subject: Subject) -> None:
    """`GET v1/models` lists the model."""
    _instances(subject)
    expect(subject.model in expect_ok(subject.http.get("/v1/models")).json()["models"], "it is not there")


@check("v1.ready", MUST, V1, "Model Ready")
def ready(subject: Subject) -> None:
    """`GET v1/models/{m}` tells the model's name and that it is ready."""
    _instances(subject)
    document = expect_ok(subject.http.get(f"/v1/models/{subject.model}")).json()
    expect(document["name"] == subject.model and document["ready"] in (True, "true", "True"), f"says {document}")


@check("v1.ready.unknown", MUST, V1, "Model Ready")
def unknown_ready(subject: Subject) -> None:
    """For an unknown model it is a 404 with an `error` string."""
    _instances(subject)
    answer = subject.http.get("/v1/models/no-such-model")
    expect_refusal(answer)
    expect(answer.status_code == 404, f"answers {answer.status_code}")


@check("v1.predict", MUST, V1, "Predict")
def predict(subject: Subject) -> None:
    """`instances` are answered by as many `predictions`."""
    answer = expect_ok(subject.predict({"instances": _instances(subject, 3)})).json()
    expect(len(_predictions(answer)) == 3, "there are more or fewer than the instances")


@check("v1.predict.v2", SHOULD, V1, "Predict")
def agrees_with_v2(subject: Subject) -> None:
    """Predictions are the values of the first output in V2."""
    predictions = _predictions(expect_ok(subject.predict({"instances": _instances(subject, 3)})).json())
    first = next(iter(subject.outputs(expect_ok(subject.infer({"inputs": subject.json_inputs(3)}))).values()))
    expect(np.array_equal(np.array(predictions), first), "they differ")


@check("v1.predict.inputs", SHOULD, V1, "Predict")
def inputs(subject: Subject) -> None:
    """`inputs` may stand for `instances`."""
    rows = _instances(subject)
    expect(
        _predictions(expect_ok(subject.predict({"inputs": rows})).json())
        == _predictions(expect_ok(subject.predict({"instances": rows})).json()),
        "the answers differ",
    )


def _error(id: str, sentence: str, body: object) -> None:  # noqa: A002
    def run(subject: Subject) -> None:
        _instances(subject)
        answer = subject.predict(body)
        expect_refusal(answer)
        expect(answer.status_code < 500, f"answers {answer.status_code}")

    run.__doc__ = f"{sentence}: a 4xx with an `error` string."
    check(f"v1.error.{id}", MUST, V1, "Predict")(run)


_error("json", "A body that is not JSON", b'{"instances": [')
_error("no-instances", "A request without `instances`", {"rows": [[1]]})
_error("scalar", "`instances` that are no list", {"instances": 7})
_error("ragged", "Rows of different lengths", {"instances": [[1, 2], [1]]})
_error("text", "Text where numbers belong", {"instances": [["x", "y"]]})


@check("v1.error.model", MUST, V1, "Predict")
def unknown_model(subject: Subject) -> None:
    """An unknown model is a 404 with an `error` string."""
    answer = subject.http.post("/v1/models/no-such-model:predict", json={"instances": _instances(subject)})
    expect_refusal(answer)
    expect(answer.status_code == 404, f"answers {answer.status_code}")


@check("v1.cloudevent.binary", SHOULD, V1, "CloudEvents, binary mode")
def binary_event(subject: Subject) -> None:
    """An event whose attributes are headers is answered by one."""
    headers = {f"ce-{name}": value for name, value in _EVENT.items()}
    answer = expect_ok(subject.predict({"instances": _instances(subject)}, headers))
    missing = [name for name in ("specversion", "id", "source", "type") if f"ce-{name}" not in answer.headers]
    expect(not missing, f"the answer has no ce-{', ce-'.join(missing)}")
    expect(len(_predictions(answer.json())) == 2, "other predictions")


@check("v1.cloudevent.structured", SHOULD, V1, "CloudEvents, structured mode")
def structured_event(subject: Subject) -> None:
    """An event with its data inside is answered by one."""
    event = {**_EVENT, "data": {"instances": _instances(subject)}}
    answer = expect_ok(subject.predict(json.dumps(event).encode(), {"content-type": "application/cloudevents+json"}))
    expect(answer.headers.get("content-type", "").startswith("application/cloudevents+json"), "the content type is another")
    document = answer.json()
    expect(all(name in document for name in ("specversion", "id", "source", "type")), f"the event has only {sorted(document)}")
    expect(len(_predictions(document["data"])) == 2, "other predictions")
