"""The REST side of the Open Inference Protocol, its binary extension, and what Triton's clients expect beside it.

References
----------
Open Inference Protocol, ``inference_rest.md`` and ``open_inference_rest.yaml``; KServe, "Binary Tensor Data Extension"; Triton, "Model
Repository Extension"; RFC 9110, section 8.4 ("Content-Encoding").
"""

import json
import time
from collections.abc import Callable
from typing import Any

from tests.conformance.checks import (
    BINARY,
    HTTP,
    OIP,
    REPOSITORY,
    STATISTICS,
    Level,
    NotApplicable,
    check,
    expect,
    expect_ok,
    expect_refusal,
)
from tests.conformance.subject import DTYPES, HEAD_LENGTH, Subject, agree, binary_input, compressed, same

MUST, SHOULD = Level.MUST, Level.SHOULD
Make = Callable[[Subject], object]
_NOBODY = "no-such-model"


def _is_tensor(item: object) -> bool:
    return (
        isinstance(item, dict)
        and isinstance(item.get("name"), str)
        and item.get("datatype") in DTYPES
        and isinstance(item.get("shape"), list)
        and all(isinstance(size, int) for size in item["shape"])
    )


def _version(subject: Subject) -> str:
    if subject.version is None:
        raise NotApplicable("no version was named")
    return subject.version


# Health and metadata


@check("v2.live", MUST, OIP, "Server Live")
def live(subject: Subject) -> None:
    """`GET v2/health/live` answers 200 while the server lives."""
    expect_ok(subject.http.get("/v2/health/live"))


@check("v2.live.body", MUST, OIP, "Server Live Response JSON Object")
def live_body(subject: Subject) -> None:
    """Its body is an object whose `live` is true."""
    expect(expect_ok(subject.http.get("/v2/health/live")).json() == {"live": True}, "another body")


@check("v2.ready", MUST, OIP, "Server Ready")
def ready(subject: Subject) -> None:
    """`GET v2/health/ready` answers 200 when the models are ready."""
    expect_ok(subject.http.get("/v2/health/ready"))


@check("v2.server", MUST, OIP, "Server Metadata Response JSON Object")
def server_metadata(subject: Subject) -> None:
    """`GET v2` tells the server's name, version and extensions."""
    document = expect_ok(subject.http.get("/v2")).json()
    expect(isinstance(document["name"], str) and isinstance(document["version"], str), "name or version is no string")
    expect(all(isinstance(name, str) for name in document["extensions"]), "extensions are no strings")


@check("v2.server.slash", SHOULD, OIP, "open_inference_rest.yaml, /v2/")
def server_metadata_slash(subject: Subject) -> None:
    """`GET v2/` does the same."""
    expect_ok(subject.http.get("/v2/"))


@check("v2.model", MUST, OIP, "Model Metadata Response JSON Object")
def model_metadata(subject: Subject) -> None:
    """`GET v2/models/{m}` tells the model's name and platform, and name, datatype and shape of its inputs and outputs."""
    document = expect_ok(subject.http.get(subject.path)).json()
    expect(document["name"] == subject.model and isinstance(document["platform"], str), "name or platform is missing")
    expect(document["inputs"] and all(map(_is_tensor, document["inputs"])), f"inputs are {document['inputs']}")
    expect(document["outputs"] and all(map(_is_tensor, document["outputs"])), f"outputs are {document['outputs']}")


@check("v2.model.versions", SHOULD, OIP, "Model Metadata Response JSON Object")
def model_versions(subject: Subject) -> None:
    """Metadata names the versions that may be requested."""
    version = _version(subject)
    expect(version in subject.metadata.get("versions", []), f"versions are {subject.metadata.get('versions')}")


@check("v2.model.version", MUST, OIP, "Model Metadata")
def model_version_metadata(subject: Subject) -> None:
    """`GET v2/models/{m}/versions/{v}` tells the same of a version."""
    document = expect_ok(subject.http.get(f"{subject.path}/versions/{_version(subject)}")).json()
    expect(all(map(_is_tensor, document["inputs"])), f"inputs are {document['inputs']}")


@check("v2.model.unknown", MUST, OIP, "Model Metadata Response JSON Error Object")
def unknown_model_metadata(subject: Subject) -> None:
    """Metadata of an unknown model is an HTTP error with an object that has an `error` string."""
    expect_refusal(subject.http.get(f"/v2/models/{_NOBODY}"))


@check("v2.model.ready", MUST, OIP, "Model Ready Response JSON Object")
def model_ready(subject: Subject) -> None:
    """`GET v2/models/{m}/ready` answers 200 with the model's name and `ready`: true."""
    document = expect_ok(subject.http.get(f"{subject.path}/ready")).json()
    expect(document["name"] == subject.model and document["ready"] is True, f"says {document}")


@check("v2.model.ready.version", MUST, OIP, "Model Ready")
def model_version_ready(subject: Subject) -> None:
    """`GET v2/models/{m}/versions/{v}/ready` answers the same for a version."""
    expect_ok(subject.http.get(f"{subject.path}/versions/{_version(subject)}/ready"))


@check("v2.model.ready.unknown", MUST, OIP, "Model Ready")
def unknown_model_ready(subject: Subject) -> None:
    """An unknown model is not ready: another status than 200."""
    expect(subject.http.get(f"/v2/models/{_NOBODY}/ready").status_code != 200, "answers 200")


# Inference


@check("v2.infer", MUST, OIP, "Inference Response JSON Object")
def infer(subject: Subject) -> None:
    """An inference request is answered 200 with the model's name and outputs: name, shape, datatype and as much data as the shape says."""
    answer = expect_ok(subject.infer({"inputs": subject.json_inputs()}))
    document = answer.json()
    expect(document["model_name"] == subject.model, f"model_name is {document['model_name']!r}")
    expect(document["outputs"] and all(map(_is_tensor, document["outputs"])), "outputs are no tensors")
    subject.outputs(answer)


@check("v2.infer.content-type", SHOULD, OIP, "Inference Request Examples")
def content_type(subject: Subject) -> None:
    """The answer's content type is `application/json`."""
    answer = expect_ok(subject.infer({"inputs": subject.json_inputs()}))
    expect(answer.headers.get("content-type", "").startswith("application/json"), f"is {answer.headers.get('content-type')}")


@check("v2.infer.no-content-type", SHOULD, OIP, "Inference (as Triton's client does it)")
def no_content_type(subject: Subject) -> None:
    """A request without a content type is taken for what it is."""
    request = subject.http.build_request("POST", f"{subject.path}/infer", content=json.dumps({"inputs": subject.json_inputs()}).encode())
    request.headers.pop("content-type", None)
    expect_ok(subject.http.send(request))


@check("v2.infer.nested", MUST, OIP, "Tensor Data")
def nested(subject: Subject) -> None:
    """`data` may be nested like the shape, or flat in row-major order: the answers are the same."""
    flat = expect_ok(subject.infer({"inputs": subject.json_inputs()}))
    deep = expect_ok(subject.infer({"inputs": subject.json_inputs(nested=True)}))
    expect(same(subject.outputs(flat), subject.outputs(deep)), "the answers differ")


@check("v2.infer.rows", SHOULD, OIP, "Request Input")
def rows(subject: Subject) -> None:
    """A batch is answered as its rows are alone."""
    arrays = subject.arrays(3)
    together = subject.outputs(expect_ok(subject.infer({"inputs": subject.json_inputs(3)})))
    for row in range(3):
        inputs = [
            {**item, "shape": [1, *item["shape"][1:]], "data": arrays[item["name"]][row].reshape(-1).tolist()}
            for item in subject.json_inputs(3)
        ]
        alone = subject.outputs(expect_ok(subject.infer({"inputs": inputs})))
        expect(all(agree(alone[name][0], together[name][row]) for name in together), f"row {row} differs")


@check("v2.infer.metadata", MUST, OIP, "Model Metadata")
def agrees_with_metadata(subject: Subject) -> None:
    """Outputs have the names and datatypes that the metadata says."""
    known = {item["name"]: item for item in subject.metadata["outputs"]}
    for item in expect_ok(subject.infer({"inputs": subject.json_inputs()})).json()["outputs"]:
        expect(item["name"] in known, f"output {item['name']!r} is not in the metadata")
        expect(item["datatype"] == known[item["name"]]["datatype"], f"{item['name']!r} is {item['datatype']}")
        wanted = known[item["name"]]["shape"]
        fits = len(wanted) == len(item["shape"]) and all(size in (-1, got) for size, got in zip(wanted, item["shape"], strict=True))
        expect(fits, f"{item['name']!r} has shape {item['shape']}, the metadata says {wanted}")


@check("v2.infer.all-outputs", MUST, OIP, "Inference Request JSON Object")
def all_outputs(subject: Subject) -> None:
    """A request that names no outputs gets all that the model produces."""
    given = {item["name"] for item in expect_ok(subject.infer({"inputs": subject.json_inputs()})).json()["outputs"]}
    missing = [item["name"] for item in subject.metadata["outputs"] if item["name"] not in given]
    expect(not missing, f"without {', '.join(missing)}")


@check("v2.infer.output", MUST, OIP, "Request Output")
def selected_output(subject: Subject) -> None:
    """A request that names an output gets that one and no other."""
    for spec in subject.metadata["outputs"]:
        answer = expect_ok(subject.infer({"inputs": subject.json_inputs(), "outputs": [{"name": spec["name"]}]}))
        names = [item["name"] for item in answer.json()["outputs"]]
        expect(names == [spec["name"]], f"asked for {spec['name']}, got {names}")


@check("v2.infer.id", MUST, OIP, "Inference Request JSON Object")
def echoes_id(subject: Subject) -> None:
    """The request's `id` is returned."""
    answer = expect_ok(subject.infer({"id": "the-id-42", "inputs": subject.json_inputs()})).json()
    expect(answer.get("id") == "the-id-42", f"id is {answer.get('id')!r}")


@check("v2.infer.made-id", SHOULD, OIP, "Inference Response JSON Object")
def makes_id(subject: Subject) -> None:
    """An answer has an `id` also when the request has none."""
    answer = expect_ok(subject.infer({"inputs": subject.json_inputs()})).json()
    expect(isinstance(answer.get("id"), str) and answer["id"], f"id is {answer.get('id')!r}")


@check("v2.infer.parameters", SHOULD, OIP, "Inference Request JSON Object")
def unknown_parameters(subject: Subject) -> None:
    """Parameters that the server does not know are passed over."""
    inputs = [{**item, "parameters": {"unknown": "x"}} for item in subject.json_inputs()]
    expect_ok(subject.infer({"inputs": inputs, "parameters": {"unknown": 1}}))


@check("v2.infer.version", MUST, OIP, "Inference")
def version_by_path(subject: Subject) -> None:
    """`POST v2/models/{m}/versions/{v}/infer` is answered by that version, and says so."""
    version = _version(subject)
    answer = expect_ok(subject.infer({"inputs": subject.json_inputs()}, path=f"/versions/{version}"))
    expect(answer.json().get("model_version") == version, f"model_version is {answer.json().get('model_version')!r}")


@check("v2.infer.version.unknown", MUST, OIP, "Inference Response JSON Error Object")
def unknown_version(subject: Subject) -> None:
    """A version that does not exist is an HTTP error with an `error` string."""
    expect_refusal(subject.infer({"inputs": subject.json_inputs()}, path="/versions/987654"))


# Errors


def _error(id: str, sentence: str) -> Callable[[Make], Make]:  # noqa: A002
    """Register a check that such a request is refused: ``make(subject)`` is the document or the bytes to send."""

    def register(make: Make) -> Make:
        def run(subject: Subject) -> None:
            expect_refusal(subject.infer(make(subject)))

        def blames_caller(subject: Subject) -> None:
            answer = subject.infer(make(subject))
            expect(400 <= answer.status_code < 500, f"answers {answer.status_code}")

        run.__doc__ = f"{sentence}: an HTTP error with an `error` string."
        check(f"v2.error.{id}", MUST, OIP, "Inference Response JSON Error Object")(run)
        blames_caller.__doc__ = f"{sentence}: a 4xx, not a failure of the server."
        check(f"v2.error.{id}.4xx", SHOULD, HTTP, "Client Error 4xx")(blames_caller)
        return make

    return register


def _changed(subject: Subject, **members: object) -> dict[str, object]:
    first, *others = subject.json_inputs()
    return {"inputs": [{**first, **members}, *others]}


_error("json", "A body that is not JSON")(lambda _: b'{"inputs": [')
_error("empty", "An empty body")(lambda _: b"")
_error("array", "A body that is not an object")(lambda _: b"[1, 2]")
_error("no-inputs", "A request without `inputs`")(lambda _: {"id": "1"})
_error("input-name", "An input that the model does not have, beside its own")(
    lambda subject: {"inputs": [*subject.json_inputs(), {**subject.json_inputs()[0], "name": "no such input"}]}
)
_error("datatype", "A datatype that does not exist")(lambda subject: _changed(subject, datatype="FP63"))
_error("count", "Data of another length than the shape says")(lambda subject: _changed(subject, data=subject.json_inputs()[0]["data"][:-1]))
_error("rank", "A shape of another rank than the model's")(lambda subject: _changed(subject, shape=[1, *subject.json_inputs()[0]["shape"]]))
_error("negative", "A negative dimension")(lambda subject: _changed(subject, shape=[-1, *subject.json_inputs()[0]["shape"][1:]]))
_error("huge", "A shape whose product is beyond 64 bits")(lambda subject: _changed(subject, shape=[2**62, 2**62]))
_error("text", "Text where numbers belong")(lambda subject: _changed(subject, data=["x"] * len(subject.json_inputs()[0]["data"])))
_error("nested", "Lists nested 900 deep")(
    lambda subject: json.dumps(_changed(subject, data=[])).replace('"data": []', f'"data": {"[" * 900 + "]" * 900}').encode()
)
_error("output-name", "An output that the model does not have")(
    lambda subject: {"inputs": subject.json_inputs(), "outputs": [{"name": "no such output"}]}
)


@check("v2.error.model", MUST, OIP, "Inference Response JSON Error Object")
def unknown_model(subject: Subject) -> None:
    """A model that does not exist is an HTTP error with an `error` string."""
    expect_refusal(subject.http.post(f"/v2/models/{_NOBODY}/infer", json={"inputs": subject.json_inputs()}))


@check("v2.error.still-answers", MUST, OIP, "Inference")
def still_answers(subject: Subject) -> None:
    """After all these requests the server still answers."""
    expect_ok(subject.infer({"inputs": subject.json_inputs()}))


# Binary tensors


def _binary(subject: Subject, rows: int = 2) -> tuple[list[dict[str, object]], bytes]:
    if not subject.has_binary:
        raise NotApplicable("the server does not have the extension")
    pairs = [binary_input(name, array) for name, array in subject.arrays(rows).items()]
    return [item for item, _ in pairs], b"".join(raw for _, raw in pairs)


@check("binary.announced", SHOULD, BINARY, "Overview")
def announced(subject: Subject) -> None:
    """The server's extensions name `binary_tensor_data`."""
    extensions = expect_ok(subject.http.get("/v2")).json()["extensions"]
    expect("binary_tensor_data" in extensions, f"extensions are {extensions}")


@check("binary.input", MUST, BINARY, "binary_data_size")
def binary_inputs(subject: Subject) -> None:
    """Inputs as raw bytes after the JSON are answered as the same inputs in JSON are."""
    items, raw = _binary(subject)
    answer = expect_ok(subject.infer({"inputs": items}, tail=raw))
    expect(
        same(subject.outputs(answer), subject.outputs(expect_ok(subject.infer({"inputs": subject.json_inputs()})))), "the answers differ"
    )


@check("binary.default", MUST, BINARY, "binary_data_output")
def json_by_default(subject: Subject) -> None:
    """Outputs are JSON unless asked for otherwise."""
    items, raw = _binary(subject)
    answer = expect_ok(subject.infer({"inputs": items}, tail=raw))
    expect(HEAD_LENGTH not in answer.headers, "the answer is binary")
    expect(all("data" in item for item in answer.json()["outputs"]), "an output has no data")


@check("binary.output", MUST, BINARY, "binary_data_output")
def binary_outputs(subject: Subject) -> None:
    """With `binary_data_output` all outputs are raw bytes after the JSON, equal to those in JSON, and a header tells the JSON's length."""
    items, raw = _binary(subject)
    answer = expect_ok(subject.infer({"inputs": items, "parameters": {"binary_data_output": True}}, tail=raw))
    expect(HEAD_LENGTH in answer.headers, f"there is no {HEAD_LENGTH}")
    expect(same(subject.outputs(answer), subject.outputs(expect_ok(subject.infer({"inputs": items}, tail=raw)))), "the answers differ")


@check("binary.output.one", MUST, BINARY, "binary_data")
def one_binary_output(subject: Subject) -> None:
    """`binary_data` on an output makes that one binary, and `false` overrides `binary_data_output`."""
    items, raw = _binary(subject)
    names = [item["name"] for item in subject.metadata["outputs"]]
    for wanted, parameters in ((True, {}), (False, {"binary_data_output": True})):
        outputs = [{"name": name, "parameters": {"binary_data": wanted}} for name in names]
        answer = expect_ok(subject.infer({"inputs": items, "outputs": outputs, "parameters": parameters}, tail=raw))
        expect((HEAD_LENGTH in answer.headers) is wanted, f"binary_data: {wanted} with {parameters} is not kept")
        subject.outputs(answer)


@check("binary.output.mixed", MUST, BINARY, "binary_data")
def mixed_outputs(subject: Subject) -> None:
    """An answer may have one output in JSON and another as bytes."""
    names = [item["name"] for item in subject.metadata["outputs"]]
    if len(names) < 2:
        raise NotApplicable("the model has one output")
    items, raw = _binary(subject)
    outputs = [{"name": names[0]}, {"name": names[1], "parameters": {"binary_data": True}}]
    answer = expect_ok(subject.infer({"inputs": items, "outputs": outputs}, tail=raw))
    first, second = json.loads(answer.content[: int(answer.headers[HEAD_LENGTH])])["outputs"]
    expect("data" in first and "binary_data_size" in second.get("parameters", {}), "the forms are others")
    subject.outputs(answer)


@check("binary.output.json-input", MUST, BINARY, "binary_data_output")
def binary_outputs_of_json(subject: Subject) -> None:
    """A request all in JSON may ask for binary outputs."""
    _binary(subject)
    answer = expect_ok(subject.infer({"inputs": subject.json_inputs(), "parameters": {"binary_data_output": True}}))
    expect(HEAD_LENGTH in answer.headers, "the answer is JSON")
    subject.outputs(answer)


@check("binary.input.mixed", MUST, BINARY, "binary_data_size")
def mixed_inputs(subject: Subject) -> None:
    """A request may have one input in JSON and another as bytes."""
    if len(subject.metadata["inputs"]) < 2:
        raise NotApplicable("the model has one input")
    items, raw = _binary(subject)
    first = subject.json_inputs()[0]
    cut = items[0]["parameters"]["binary_data_size"]  # type: ignore[index]
    expect_ok(subject.infer({"inputs": [first, *items[1:]]}, tail=raw[cut:]))


@check("binary.content-type", SHOULD, BINARY, "HTTP Headers")
def binary_content_type(subject: Subject) -> None:
    """A binary answer is `application/octet-stream`."""
    items, raw = _binary(subject)
    answer = expect_ok(subject.infer({"inputs": items, "parameters": {"binary_data_output": True}}, tail=raw))
    expect(answer.headers.get("content-type") == "application/octet-stream", f"is {answer.headers.get('content-type')}")


@check("binary.no-content-type", SHOULD, BINARY, "HTTP Headers (as Triton's client does it)")
def binary_without_content_type(subject: Subject) -> None:
    """A binary request without a content type is told by its header."""
    items, raw = _binary(subject)
    head = json.dumps({"inputs": items}).encode()
    request = subject.http.build_request("POST", f"{subject.path}/infer", content=head + raw, headers={HEAD_LENGTH: str(len(head))})
    request.headers.pop("content-type", None)
    expect_ok(subject.http.send(request))


def _binary_error(id: str, sentence: str, size_change: int, tail_change: int) -> None:  # noqa: A002
    def run(subject: Subject) -> None:
        items, raw = _binary(subject)
        size = items[-1]["parameters"]["binary_data_size"] + size_change  # type: ignore[index]
        items[-1] = {**items[-1], "parameters": {"binary_data_size": size}}
        raw = raw[:tail_change] if tail_change < 0 else raw + b"\0" * tail_change
        answer = subject.infer({"inputs": items}, tail=raw)
        expect_refusal(answer)
        expect(answer.status_code < 500, f"answers {answer.status_code}")

    run.__doc__ = f"{sentence}: a 4xx with an `error` string."
    check(f"binary.error.{id}", MUST, BINARY, "binary_data_size")(run)


_binary_error("short", "A body that ends before the announced bytes do", 0, -8)
_binary_error("long", "A body with more bytes than announced", 0, 8)
_binary_error("size", "A size that the shape does not need", -1, -1)
_binary_error("negative", "A negative size", -(10**6), 0)


@check("binary.error.head", MUST, BINARY, "HTTP Headers")
def wrong_head_length(subject: Subject) -> None:
    """A JSON length beyond the body is a 4xx with an `error` string."""
    items, raw = _binary(subject)
    answer = subject.infer({"inputs": items}, tail=raw, headers={HEAD_LENGTH: "99999999"})
    expect_refusal(answer)
    expect(answer.status_code < 500, f"answers {answer.status_code}")


# Compression


def _compression(encoding: str) -> None:
    def takes(subject: Subject) -> None:
        body = compressed(json.dumps({"inputs": subject.json_inputs()}).encode(), encoding)
        expect_ok(subject.infer(body, headers={"content-encoding": encoding}))

    def takes_binary(subject: Subject) -> None:
        items, raw = _binary(subject)
        head = json.dumps({"inputs": items}).encode()
        headers = {HEAD_LENGTH: str(len(head)), "content-encoding": encoding, "content-type": "application/octet-stream"}
        expect_ok(subject.http.post(f"{subject.path}/infer", content=compressed(head + raw, encoding), headers=headers))

    def gives(subject: Subject) -> None:
        answer = expect_ok(subject.infer({"inputs": subject.json_inputs(2000)}, headers={"accept-encoding": encoding}))
        expect(answer.headers.get("content-encoding") == encoding, f"content-encoding is {answer.headers.get('content-encoding')}")
        subject.outputs(answer)

    takes.__doc__ = f"A request compressed with {encoding} is taken."
    takes_binary.__doc__ = f"So is a binary one, whose header counts the bytes before compression ({encoding})."
    gives.__doc__ = f"A large answer is compressed with {encoding} for who accepts it."
    check(f"http.{encoding}.request", SHOULD, HTTP, "8.4 Content-Encoding")(takes)
    check(f"http.{encoding}.binary", SHOULD, HTTP, "8.4 Content-Encoding")(takes_binary)
    check(f"http.{encoding}.answer", SHOULD, HTTP, "12.5.3 Accept-Encoding")(gives)


_compression("gzip")
_compression("deflate")


@check("http.encoding.broken", MUST, HTTP, "8.4 Content-Encoding")
def broken_compression(subject: Subject) -> None:
    """A body that is not in the encoding it claims is a 4xx with an `error` string."""
    answer = subject.infer({"inputs": subject.json_inputs()}, headers={"content-encoding": "gzip"})
    expect_refusal(answer)
    expect(answer.status_code < 500, f"answers {answer.status_code}")


# Model repository


def _has_repository(subject: Subject) -> None:
    if subject.http.post("/v2/repository/index", json={}).status_code in (404, 405, 501):
        raise NotApplicable("the server does not have the extension's index")


@check("repository.index", SHOULD, REPOSITORY, "Index")
def index(subject: Subject) -> None:
    """`POST v2/repository/index` lists the model as READY."""
    _has_repository(subject)
    entries = expect_ok(subject.http.post("/v2/repository/index", json={})).json()
    found = [entry for entry in entries if entry["name"] == subject.model]
    expect(found and any(entry.get("state") == "READY" for entry in found), f"lists {entries}")


@check("repository.index.ready", SHOULD, REPOSITORY, "Index")
def ready_index(subject: Subject) -> None:
    """With `ready`: true it lists models that are ready only."""
    _has_repository(subject)
    entries = expect_ok(subject.http.post("/v2/repository/index", json={"ready": True})).json()
    expect(entries and all(entry.get("state") == "READY" for entry in entries), f"lists {entries}")


@check("repository.load", SHOULD, REPOSITORY, "Load")
def load(subject: Subject) -> None:
    """`POST v2/repository/models/{m}/load` of a loaded model is 200."""
    expect_ok(subject.http.post(f"/v2/repository/models/{subject.model}/load", json={}))


@check("repository.load.unknown", SHOULD, REPOSITORY, "Load")
def load_unknown(subject: Subject) -> None:
    """Loading an unknown model is a 4xx with an `error` string."""
    answer = subject.http.post(f"/v2/repository/models/{_NOBODY}/load", json={})
    expect_refusal(answer)
    expect(answer.status_code < 500, f"answers {answer.status_code}")


_STATISTICS_S = 3.0
"""Servers of several processes may take so long until all of them know."""


def _statistics(subject: Subject, path: str) -> list[dict[str, Any]]:
    if "statistics" not in subject.http.get("/v2").json().get("extensions", []):
        raise NotApplicable("the server does not announce the extension")
    found = expect_ok(subject.http.get(f"/v2/models{path}/stats")).json()["model_stats"]
    return [each for each in found if each["name"] == subject.model]


@check("statistics.model", MUST, STATISTICS, "Statistics Response JSON Object")
def statistics_form(subject: Subject) -> None:
    """`GET v2/models/{m}/stats` tells counts and durations of the model: whole numbers, of which none is negative."""
    (told,) = _statistics(subject, f"/{subject.model}")
    numbers = [told[name] for name in ("last_inference", "inference_count", "execution_count")]
    parts = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output")
    durations = [told["inference_stats"][part] for part in parts]
    for batch in told["batch_stats"]:
        numbers.append(batch["batch_size"])
        durations += [batch[part] for part in parts[3:]]
    numbers += [number for each in durations for number in (each["count"], each["ns"])]
    expect(all(type(number) is int and number >= 0 for number in numbers), f"numbers are {numbers}")


@check("statistics.counts", MUST, STATISTICS, "Statistics Response JSON Object")
def statistics_counts(subject: Subject) -> None:
    """A request of three rows is one success and three inferences, and one that fails is a failure."""
    (before,) = _statistics(subject, f"/{subject.model}")
    expect_ok(subject.infer({"inputs": subject.json_inputs(3)}))
    expect_refusal(subject.infer({"inputs": subject.json_inputs(), "outputs": [{"name": "no-such-output"}]}))
    deadline = time.monotonic() + _STATISTICS_S
    while True:
        (after,) = _statistics(subject, f"/{subject.model}")
        more = {part: after["inference_stats"][part]["count"] - before["inference_stats"][part]["count"] for part in ("success", "fail")}
        more["inferences"] = after["inference_count"] - before["inference_count"]
        if more == {"success": 1, "fail": 1, "inferences": 3}:
            break
        expect(time.monotonic() < deadline, f"counts {more}")
        time.sleep(0.1)
    expect(after["execution_count"] > before["execution_count"], "no execution is counted")
    expect(after["last_inference"] >= before["last_inference"], "the last inference is earlier than before")
    expect(after["inference_stats"]["success"]["ns"] > before["inference_stats"]["success"]["ns"], "it took no time")


@check("statistics.all", MUST, STATISTICS, "HTTP/REST")
def statistics_of_all(subject: Subject) -> None:
    """`GET v2/models/stats` has the model among all."""
    expect(len(_statistics(subject, "")) >= 1, "the model is not there")


@check("statistics.version", MUST, STATISTICS, "HTTP/REST")
def statistics_of_version(subject: Subject) -> None:
    """`GET v2/models/{m}/versions/{v}/stats` is of that version only."""
    if subject.version is None:
        raise NotApplicable("the model has no versions")
    versions = [each["version"] for each in _statistics(subject, f"/{subject.model}/versions/{subject.version}")]
    expect(versions == [subject.version], f"versions are {versions}")


@check("statistics.unknown", MUST, STATISTICS, "Statistics Response JSON Error Object")
def statistics_of_nobody(subject: Subject) -> None:
    """Statistics of an unknown model are an HTTP error with an object that has an `error` string."""
    _statistics(subject, f"/{subject.model}")
    expect_refusal(subject.http.get(f"/v2/models/{_NOBODY}/stats"))
