"""Bad input over real sockets, real runners behind: never a 5xx, never a hang, and nothing is left of it afterwards."""

import asyncio
import contextlib
import gzip
import io
import json
import re
import socket
import struct
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from socket import SO_LINGER, SOL_SOCKET
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.gateway.routes import ROUTES, Door, find
from tests.integration.real_gateway import MAX_BODY_BYTES, RealGateway, real_gateway

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

PATIENCE_S = 30.0
"""Generous: only what hangs takes so long."""

V1 = "/v1/models/iris:predict"
V2 = "/v2/models/iris/infer"
MIXED = "/v2/models/mixed/infer"
PLACE = "/v1/projects/p/locations/l/endpoints"
VERTEX = f"{PLACE}/iris:predict"
RAW = f"{PLACE}/mixed:rawPredict"
SCORING = "/endpoints/iris/invocations"
PREDICT = (V1, "/v1/models/mixed:predict", V2, MIXED, VERTEX, f"{PLACE}/iris:rawPredict", RAW, SCORING, "/endpoints/mixed/invocations")

GOOD = {"instances": [[5.1, 3.5, 1.4, 0.2]]}
PARAMETERS = {
    "model": "iris",
    "endpoint": "iris",
    "version": "1",
    "alias": "best",
    "project": "p",
    "location": "l",
    "operation_id": "o",
    "deployment_id": "iris.iris.1",
    "letter_id": "x",
    "file": "f",
}
DEEP = 100_000
EXAMPLES = 150


@dataclass(frozen=True)
class Answer:
    """What came back to one request."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return orjson.loads(self.body)


@pytest.fixture(scope="module")
def gateway() -> Iterator[RealGateway]:
    with tempfile.TemporaryDirectory(prefix="mr-") as folder, real_gateway(Path(folder)) as running:
        yield running


def request(path: str, body: bytes = b"", headers: Mapping[str, str] | None = None, method: str = "POST") -> bytes:
    """A request after which the connection ends."""
    fields = {"host": "localhost", "connection": "close", "content-length": str(len(body)), **(headers or {})}
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode("latin-1") + body


async def sent(gateway: RealGateway, raw: bytes, *, eof: bool = False) -> bytes:
    """Everything that comes back until the gateway closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    try:
        async with asyncio.timeout(PATIENCE_S):
            with contextlib.suppress(ConnectionError):
                writer.write(raw)
                if eof:
                    writer.write_eof()
                await writer.drain()
            data = b""
            with contextlib.suppress(ConnectionError):
                while piece := await reader.read(1 << 16):
                    data += piece
            return data
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def answers_in(data: bytes, *, bodiless: bool = False) -> list[Answer]:
    """Answers one after another."""
    found = []
    while data:
        head, _, data = data.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        status = int(re.fullmatch(r"HTTP/1\.1 (\d{3}) .*", first)[1])  # type: ignore[index]
        headers = dict(line.split(": ", 1) for line in lines)
        length = 0 if bodiless or status == 100 else int(headers["content-length"])
        assert len(data) >= length
        found.append(Answer(status, headers, data[:length]))
        data = data[length:]
    return found


async def ask(gateway: RealGateway, raw: bytes, *, eof: bool = False) -> Answer:
    """The one answer to a request."""
    (answer,) = answers_in(await sent(gateway, raw, eof=eof))
    return answer


async def post(gateway: RealGateway, path: str, body: Any, **headers: str) -> Answer:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return await ask(gateway, request(path, content, {name.replace("_", "-"): value for name, value in headers.items()}))


def message_of(answer: Answer, path: str) -> str:
    """The sentence of an error, in the one form that the clients of its path know."""
    assert answer.headers["content-type"] == "application/json"
    document = answer.json()
    if path.startswith(("/v1/projects", "/v1beta1/projects")):
        assert list(document) == ["error"]
        assert document["error"].keys() == {"code", "message", "status"}
        assert document["error"]["code"] == answer.status
        return str(document["error"]["message"])
    if path.startswith(("/invocations", "/endpoints", "/ping")):
        assert document.keys() == {"error_code", "message"}
        return str(document["message"])
    assert list(document) == ["error"]
    return str(document["error"])


async def assert_refused(gateway: RealGateway, path: str, body: Any, status: int = 400, says: str = "", **headers: str) -> None:
    answer = await post(gateway, path, body, **headers)
    assert answer.status == status, answer.body[:500]
    assert says in message_of(answer, path)
    assert answer.headers["x-request-id"]


async def assert_good(gateway: RealGateway) -> None:
    answer = await post(gateway, V1, GOOD)
    assert (answer.status, answer.json()) == (200, {"predictions": [0]})


def instances(text: str) -> bytes:
    return b'{"instances": %b}' % text.encode()


def iris(**changes: Any) -> dict[str, Any]:
    return {"inputs": [{"name": "input", "shape": [1, 4], "datatype": "FP64", "data": [5.1, 3.5, 1.4, 0.2], **changes}]}


def mixed(changed: str = "", **changes: Any) -> dict[str, Any]:
    """A good request with one of its inputs changed."""
    inputs = [
        {"name": "wide", "shape": [1, 2], "datatype": "FP32", "data": [1.5, 2.5]},
        {"name": "count", "shape": [1], "datatype": "INT64", "data": [2**61]},
        {"name": "flag", "shape": [1], "datatype": "BOOL", "data": [True]},
        {"name": "text", "shape": [1], "datatype": "BYTES", "data": ["ü"]},
    ]
    return {"inputs": [{**each, **changes} if each["name"] == changed else each for each in inputs]}


def binary(name: str, content: bytes, announced: int | None = None, **changes: Any) -> tuple[bytes, dict[str, str]]:
    """A good request with one input in binary form."""
    size = len(content) if announced is None else announced
    document = mixed(name, parameters={"binary_data_size": size}, **changes)
    for each in document["inputs"]:
        if each["name"] == name:
            each.pop("data")
    head = json.dumps(document).encode()
    return head + content, {"inference_header_content_length": str(len(head))}


JSON_BODIES = {
    "empty": b"",
    "only space": b" \n",
    "cut off": b'{"instances": [[1, 2',
    "not json": b"hello",
    "a list": b"[[1, 2, 3, 4]]",
    "a string": b'"x"',
    "null": b"null",
    "an empty object": b"{}",
    "a comment": b'{"instances": [[1,2,3,4]]} // good',
    "two documents": b'{"instances": [[1,2,3,4]]}{"instances": [[1,2,3,4]]}',
    "single quotes": b"{'instances': [[1,2,3,4]]}",
    "a trailing comma": b'{"instances": [[1,2,3,4],]}',
    "nan": instances("[[1, 2, 3, NaN]]"),
    "infinity": instances("[[1, 2, 3, Infinity]]"),
    "minus infinity": instances("[[1, 2, 3, -Infinity]]"),
    "beyond a float": instances("[[1, 2, 3, 1e999]]"),
    "hexadecimal": instances("[[1, 2, 3, 0x10]]"),
    "a leading zero": instances("[[1, 2, 3, 01]]"),
    "given twice": b'{"instances": [[1,2,3,4]], "instances": [[5,6,7,8]]}',
    "nested too deeply": instances("[" * DEEP + "]" * DEEP),
    "nested and cut off": instances("[" * DEEP)[:-1],
    "objects nested too deeply": b'{"instances": %b1%b}' % (b'{"a":' * DEEP, b"}" * DEEP),
    "not utf-8": b'{"instances": [[1,2,3,4]], "\xff\xfe": 1}',
    "utf-16": json.dumps(GOOD).encode("utf-16"),
    "half a character": b'{"instances": [["\\ud800", 1, 2, 3]]}',
    "a nul": b'{"instances": [[1,2,3,\x004]]}',
    "compressed without saying so": gzip.compress(json.dumps(GOOD).encode()),
}


@pytest.mark.parametrize("path", [V1, V2, VERTEX])
@pytest.mark.parametrize("case", JSON_BODIES)
async def test_what_is_no_json_is_refused(gateway, path, case):
    await assert_refused(gateway, path, JSON_BODIES[case])


@pytest.mark.parametrize("case", sorted(JSON_BODIES.keys() - {"nan", "infinity", "minus infinity"}))
async def test_what_is_no_json_is_refused_where_forms_are_told_by_content(gateway, case):
    await assert_refused(gateway, RAW, JSON_BODIES[case])
    await assert_refused(gateway, SCORING, JSON_BODIES[case], content_type="application/json")


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ("null", "non-empty list"),
        ("[]", "non-empty list"),
        ("{}", "non-empty list"),
        ("7", "non-empty list"),
        ("[[]]", "4 numbers"),
        ("[[1, 2, 3]]", "4 numbers"),
        ("[[1, 2, 3, 4, 5]]", "4 numbers"),
        ("[1, 2, 3, 4]", "4 numbers"),
        ("[[[1, 2, 3, 4]]]", "4 numbers"),
        ("[[1, 2, 3, 4], [1, 2, 3]]", "instances[1]"),
        ("[[1, 2, 3, 4], 5]", "instances[1]"),
        ("[[1, 2, 3, [4]]]", "input 'input'"),
        ('[["a", "b", "c", "d"]]', "'a'"),
        ('[[1, 2, 3, "4"]]', "'4'"),
        ('[[1, 2, 3, {"b64": "AA=="}]]', "an object"),
        ("[[1, 2, 3, null]]", "NaN"),
        (f"[[1, 2, 3, 1{'0' * 400}]]", ""),
        ('[{"a": 1}]', "'input'"),
        ('[{"input": [1, 2, 3, 4], "other": 1}]', "'other'"),
        ('[{"input": [1, 2, 3, 4]}, {"input": [1]}]', "instances[1]"),
    ],
)
async def test_rows_that_do_not_fit_are_refused_with_the_place(gateway, rows, says):
    for path in (V1, VERTEX, SCORING):
        await assert_refused(gateway, path, instances(rows), 400, says, content_type="application/json")


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ({"instances": [[1, 2, 3, 4]], "inputs": [[1, 2, 3, 4]]}, "exactly one"),
        ({"instances": [[1, 2, 3, 4]], "outputs": ["nonsense"]}, "nonsense"),
        ({"instances": [[1, 2, 3, 4]], "outputs": "predict"}, "list of output names"),
        ({"instances": [[1, 2, 3, 4]], "outputs": [{"name": "predict"}]}, "list of output names"),
        ({"instances": [[1, 2, 3, 4]], "parameters": []}, "'parameters'"),
        ({"inputs": {"nonsense": [[1]]}}, "nonsense"),
        ({"inputs": {}}, "missing"),
        ({"inputs": 3}, "list"),
        (iris(), "/v2"),
    ],
)
async def test_v1_documents_that_make_no_sense_are_refused(gateway, document, says):
    await assert_refused(gateway, V1, document, 400, says)


HUGE = 2**62


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("wide", {"datatype": "FP99"}, "datatype"),
        ("wide", {"datatype": None}, "datatype"),
        ("wide", {"datatype": 5}, "datatype"),
        ("wide", {"datatype": ["FP32"]}, "datatype"),
        ("wide", {"datatype": "BYTES", "data": ["1", "2"]}, "expects FP32"),
        ("wide", {"shape": None}, "shape"),
        ("wide", {"shape": "2"}, "shape"),
        ("wide", {"shape": []}, "shape"),
        ("wide", {"shape": [2]}, "shape"),
        ("wide", {"shape": [1, -2]}, "non-negative"),
        ("wide", {"shape": [-1, -2]}, "non-negative"),
        ("wide", {"shape": [1, 2.0]}, "non-negative"),
        ("wide", {"shape": [1, True]}, "non-negative"),
        ("wide", {"shape": [1, None]}, "non-negative"),
        ("wide", {"shape": [[1], [2]]}, "non-negative"),
        ("wide", {"shape": [1, 0], "data": []}, "empty"),
        ("wide", {"shape": [0, 2], "data": []}, "empty"),
        ("wide", {"shape": [HUGE, HUGE]}, "needs"),
        ("wide", {"shape": [2**63, 2]}, "non-negative"),
        ("wide", {"shape": [2**64, 2]}, "non-negative"),
        ("wide", {"shape": [1] * 20}, "shape"),
        ("wide", {"shape": [1] * DEEP}, "shape"),
        ("wide", {"shape": [1, 3]}, "3"),
        ("wide", {"data": [1.5, 2.5, 3.5]}, "3 elements"),
        ("wide", {"data": None}, "data"),
        ("wide", {"data": {}}, "data"),
        ("wide", {"data": "1.5"}, "data"),
        ("wide", {"data": ["1.5", 2.5]}, "string"),
        ("wide", {"data": [1e39, 1]}, "range"),
        ("wide", {"data": [[1.5], [2.5]]}, "nested"),
        ("wide", {"data": [[1.5, 2.5], [3.5]]}, "wide"),
        ("wide", {"parameters": []}, "parameters"),
        ("wide", {"name": "narrow"}, "narrow"),
        ("wide", {"name": "count"}, "count"),
        ("wide", {"name": None}, "name"),
        ("count", {"data": [1.5]}, "whole number"),
        ("count", {"data": [2**63]}, "range"),
        ("count", {"data": [1e19]}, "range"),
        ("count", {"data": ["1"]}, "string"),
        ("count", {"data": [None]}, "null"),
        ("count", {"datatype": "UINT64", "data": [2**64 - 1]}, "range"),
        ("count", {"datatype": "FP64", "data": [0.5]}, "whole number"),
        ("flag", {"data": [2]}, "neither true nor false"),
        ("flag", {"data": ["true"]}, "string"),
        ("flag", {"data": [None]}, "null"),
        ("text", {"data": [1]}, "BYTES"),
        ("text", {"data": [None]}, "BYTES"),
        ("text", {"data": [["a"], ["b"]]}, "text"),
        ("text", {"data": [{"b64": "!"}]}, "base64"),
        ("text", {"data": [{"b64": 1}]}, "BYTES"),
        ("text", {"data": [{"b64": "/w=="}]}, "UTF-8"),
        ("text", {"datatype": "FP32", "data": [1]}, "BYTES"),
    ],
)
async def test_v2_inputs_that_do_not_fit_are_refused(gateway, name, changes, says):
    for path in (MIXED, RAW):
        await assert_refused(gateway, path, mixed(name, **changes), 400, says)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"inputs": None}, "inputs"),
        ({"inputs": []}, "inputs"),
        ({"inputs": {}}, "inputs"),
        ({"inputs": [1]}, "name"),
        ({"inputs": [{}]}, "name"),
        ({"inputs": mixed()["inputs"] * 2}, "twice"),
        ({"inputs": mixed()["inputs"][:3]}, "'text' is missing"),
        ({"outputs": {}}, "outputs"),
        ({"outputs": ["sum"]}, "outputs"),
        ({"outputs": [{"name": 5}]}, "outputs"),
        ({"outputs": [{"name": "nonsense"}]}, "nonsense"),
        ({"outputs": [{"name": "sum", "parameters": {"binary_data": "yes"}}]}, "binary_data"),
        ({"outputs": [{"name": "sum", "parameters": 1}]}, "parameters"),
        ({"parameters": 3}, "parameters"),
        ({"parameters": {"binary_data_output": 3}}, "binary_data_output"),
        ({"id": 3}, "id"),
    ],
)
async def test_v2_documents_that_make_no_sense_are_refused(gateway, changes, says):
    await assert_refused(gateway, MIXED, {**mixed(), **changes}, 400, says)


async def test_inputs_that_do_not_fit_each_other_are_refused(gateway):
    def inputs(a: int, b: int) -> dict[str, Any]:
        return {"inputs": [{"name": name, "shape": [n], "datatype": "FP32", "data": [1] * n} for name, n in (("a", a), ("b", b))]}

    await assert_refused(gateway, "/v2/models/join/infer", inputs(2, 3), 400, "how many rows")
    answer = await post(gateway, "/v2/models/join/infer", inputs(3, 3))
    assert answer.json()["outputs"][0]["data"] == [2.0, 2.0, 2.0]


FLOATS = np.array([1.5, 2.5], "<f4").tobytes()
BINARY = {
    "a negative size": (*binary("wide", FLOATS, -8), "announces -8"),
    "a size beyond the body": (*binary("wide", FLOATS, 9), "announces 9"),
    "a size beyond any body": (*binary("wide", FLOATS, 2**62), "announces"),
    "a size that is no number": (*binary("wide", FLOATS, "8"), "announces"),  # type: ignore[arg-type]
    "a size that is true": (*binary("wide", FLOATS, True), "announces"),
    "a size that the shape does not have": (*binary("wide", FLOATS + FLOATS), "takes 8"),
    "a shape beyond the size": (*binary("wide", FLOATS, shape=[HUGE, 4]), "takes"),
    "bytes that belong to nothing": (*binary("wide", FLOATS + b"x", 8), "1 bytes follow"),
    "a bool of 2": (*binary("flag", b"\x02"), "neither 0 nor 1"),
    "text that is cut off": (*binary("text", struct.pack("<I", 9) + b"abc"), "ends inside"),
    "text of 4 GB": (*binary("text", struct.pack("<I", 2**32 - 1) + b"abc"), "ends inside"),
    "text without a length": (*binary("text", b"ab"), "text"),
    "text with a rest": (*binary("text", struct.pack("<I", 1) + b"abc"), "after its last"),
    "text that is not utf-8": (*binary("text", struct.pack("<I", 1) + b"\xff"), "UTF-8"),
    "text of very many elements": (*binary("text", b"", shape=[2**40]), "elements"),
    "a head longer than the body": (json.dumps(mixed()).encode(), {"inference_header_content_length": "100000"}, "said to have"),
    "a head of nothing": (json.dumps(mixed()).encode(), {"inference_header_content_length": "0"}, "said to have 0"),
    "a head of less than nothing": (json.dumps(mixed()).encode(), {"inference_header_content_length": "-1"}, "whole number"),
    "a head of words": (json.dumps(mixed()).encode(), {"inference_header_content_length": "all"}, "whole number"),
    "a head of very many digits": (json.dumps(mixed()).encode(), {"inference_header_content_length": "9" * 5_000}, "whole number"),
    "a head that is cut": (json.dumps(mixed()).encode(), {"inference_header_content_length": "20"}, "not valid JSON"),
}


@pytest.mark.parametrize("case", BINARY)
async def test_binary_tensors_that_do_not_add_up_are_refused(gateway, case):
    body, headers, says = BINARY[case]
    await assert_refused(gateway, MIXED, body, 400, says, **headers)


def npy(array: Any, **changes: Any) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, **changes)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content_type", "body", "status", "says"),
    [
        ("text/csv", b"1,2,3\n", 400, "4"),
        ("text/csv", b"1,2,3,4\n1,2\n", 400, "row 2"),
        ("text/csv", b"1,2,3,x\n1,2,3,x\n", 400, ""),
        ("text/csv", b'1,2,3,"4\n', 400, "CSV"),
        ("text/csv", b"\xff,2,3,4\n", 400, "UTF-8"),
        ("text/csv", b"1,2,3,\x004\n", 400, ""),
        ("text/csv", b"," * 1_500_000, 413, "cells"),
        ("text/csv; header=maybe", b"1,2,3,4\n", 400, "header"),
        ("text/csv; charset=utf-7", b"1,2,3,4\n", 415, "utf-7"),
        ("application/xml", b"<a/>", 415, "application/xml"),
        ("nonsense", b"{}", 415, "nonsense"),
        ("application/x-npy", b"\x93NUMPY", 400, ""),
        ("application/x-npy", npy(np.ones((1, 3))), 400, "shape"),
        ("application/x-npy", npy(np.ones((1, 4)))[:-1], 400, ""),
        ("application/x-npy", npy(np.ones((1, 4))) + b"x", 400, ""),
        ("application/x-npy", npy(np.array([[{}]], dtype=object), allow_pickle=True), 400, "objects"),
        ("application/x-npy", npy(np.ones((1, 4))).replace(b"(1, 4)", b"(9**9**9)"[:6]), 400, ""),
        ("application/x-npy", npy(np.ones((1, 4))).replace(b"(1, 4), }          ", b"(4611686018427387904, 4), }"), 400, ""),
        ("application/json", b'{"dataframe_split": {"columns": ["a"], "data": [[1, 2]]}}', 400, "row 1"),
        ("application/json", b'{"dataframe_split": {"columns": [["a"]], "data": [[1]]}}', 400, "names"),
        ("application/json", b'{"dataframe_records": [{"a": 1}, 2]}', 400, "objects"),
        ("application/json", b'{"inputs": NaN, "instances": []}', 400, "exactly one"),
    ],
)
async def test_tables_that_do_not_fit_are_refused(gateway, content_type, body, status, says):
    await assert_refused(gateway, SCORING, body, status, says, content_type=content_type)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b'{"id": "\\ud800", "inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [NaN]}]}', "surrogates"),
        (b'{"inputs": [{"name": "wide", "datatype": "FP32", "shape": [%b, %b], "data": [NaN]}]}' % (b"9" * 4_000, b"9" * 4_000), "shape"),
        (b'{"httpBody": 3}', "httpBody"),
        (b'{"httpBody": {"contentType": "application/json", "data": "%"}}', "base64"),
        (b'{"httpBody": {"contentType": "application/json", "data": "AAAA"}}', ""),
        (b'{"httpBody": {"contentType": ["x"], "data": ""}}', "strings"),
    ],
)
async def test_raw_bodies_that_make_no_sense_are_refused(gateway, body, says):
    await assert_refused(gateway, RAW, body, 400, says)


def deflated(content: bytes) -> bytes:
    return zlib.compress(content, 9)


def raw_deflated(content: bytes) -> bytes:
    stream = zlib.compressobj(9, wbits=-15)
    return stream.compress(content) + stream.flush()


PLAIN = json.dumps(GOOD).encode()
BOMB = b'{"instances": [[%b]]}' % (b" " * (100 * 2**20))
ENCODED = {
    "no gzip": ("gzip", PLAIN, 400),
    "gzip that is cut off": ("gzip", gzip.compress(PLAIN)[:-9], 400),
    "gzip with a wrong checksum": ("gzip", gzip.compress(PLAIN)[:-8] + b"\0" * 8, 400),
    "gzip with a rest": ("gzip", gzip.compress(PLAIN) + b"rest", 400),
    "gzip of nothing": ("gzip", gzip.compress(b""), 400),
    "very many pieces of gzip": ("gzip", gzip.compress(b" ") * 100_000, 400),
    "gzip twice": ("gzip, gzip", gzip.compress(gzip.compress(PLAIN)), 400),
    "no deflate": ("deflate", PLAIN, 400),
    "deflate without its frame": ("deflate", raw_deflated(PLAIN), 400),
    "deflate that is cut off": ("deflate", deflated(PLAIN)[:-5], 400),
    "an unknown encoding": ("br", PLAIN, 400),
    "no encoding": ("nonsense", PLAIN, 400),
    "a gzip bomb": ("gzip", gzip.compress(BOMB), 413),
    "a deflate bomb": ("deflate", deflated(BOMB), 413),
}


@pytest.mark.parametrize("case", ENCODED)
async def test_encoded_bodies_that_are_bad_or_too_large_are_refused(gateway, case):
    encoding, body, status = ENCODED[case]
    for path in (V1, MIXED, VERTEX, SCORING):
        await assert_refused(gateway, path, body, status, content_encoding=encoding)


async def test_good_encoded_bodies_are_taken(gateway):
    for encoding, body in (("gzip", gzip.compress(PLAIN)), ("deflate", deflated(PLAIN)), ("identity", PLAIN)):
        assert (await post(gateway, V1, body, content_encoding=encoding)).status == 200


async def test_bodies_beyond_the_limit_are_refused(gateway):
    await assert_refused(gateway, V1, b"x" * (MAX_BODY_BYTES + 1), 413)
    chunk = b"100000\r\n" + b"x" * 2**20 + b"\r\n"
    head = request(V1, headers={"transfer-encoding": "chunked"}).replace(b"content-length: 0\r\n", b"")
    assert (await ask(gateway, head + chunk * 5)).status == 413


@pytest.mark.parametrize(
    ("name", "value", "status"),
    [
        *[
            ("x-request-timeout-ms", value, 400)
            for value in ("0", "-1", "1.5", "1e3", "soon", "", "9" * 30, "٣".encode().decode("latin-1"))
        ],
        *[("traceparent", value, 200) for value in ("", "nonsense", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "ff-" * 2_000, "\xff\xfe")],
        ("tracestate", "=,=,;" * 100, 200),
        ("baggage", "a=%ff;" * 100, 200),
        *[("x-request-id", value, 200) for value in ("", "a b", "\xff", "x" * 500, "{}")],
        *[("prefer", value, 200) for value in ("", ";;;,,,", "respond", "\xff", "wait=9999999999")],
        *[("accept-encoding", value, 200) for value in ("", ";q", "gzip;q=nan", "*;q=1e999", "\xff", "," * 5_000)],
        *[("accept", value, 200) for value in ("", "nonsense", "\xff", ";" * 5_000)],
        *[("content-type", value, 200) for value in ("", "nonsense", "text/plain; charset=utf-7", "\xff", "application/json" * 500)],
        ("authorization", "Basic \xff", 200),
        ("cookie", "=" * 8_000, 200),
        ("origin", "null", 403),
        ("origin", "http://example.org", 403),
        ("origin", "http://[", 403),
        ("sec-fetch-site", "cross-site", 403),
        ("host", "example.org", 403),
        ("host", "[::", 400),
        ("host", "", 400),
        ("content-length", "-1", 400),
        ("content-length", "+5", 400),
        ("content-length", "0x10", 400),
        ("content-length", "1, 1", 400),
        ("content-length", "9" * 19, 413),
        ("expect", "a miracle", 417),
        ("upgrade", "websocket", 200),
        ("connection", "close, upgrade, nonsense", 200),
    ],
)
async def test_headers_that_make_no_sense_are_refused_or_passed_over(gateway, name, value, status):
    answer = await ask(gateway, request(V1, PLAIN, {name: value}))
    assert answer.status == status, answer.body
    if status == 200:
        assert answer.json() == {"predictions": [0]}
        assert re.fullmatch(r"[\x21-\x7e]{1,128}", answer.headers["x-request-id"])
    else:
        message_of(answer, V1)


async def test_an_answer_in_no_known_form_is_not_given(gateway):
    await assert_refused(gateway, SCORING, GOOD, 406, "nonsense", accept="nonsense", content_type="application/json")


CHUNKED = b"POST /v1/models/iris:predict HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ntransfer-encoding: chunked\r\n"
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nhost: localhost\r\n\r\n"
HTTP = {
    "both lengths": (CHUNKED + b"content-length: 5\r\n\r\n0\r\n\r\n" + SMUGGLED, 400),
    "two lengths": (request(V1, PLAIN).replace(b"connection", b"content-length: 3\r\nconnection") + SMUGGLED, 400),
    "a space before the colon": (request(V1, PLAIN).replace(b"content-length:", b"content-length :") + SMUGGLED, 400),
    "an encoding in disguise": (CHUNKED.replace(b": chunked", b": xchunked") + b"\r\n0\r\n\r\n", 400),
    "two encodings": (CHUNKED.replace(b": chunked", b": gzip, chunked") + b"\r\n0\r\n\r\n", 501),
    "an encoding with a tab": (CHUNKED.replace(b": chunked", b": chunked\x0b") + b"\r\n0\r\n\r\n", 400),
    "chunks that do not end": (CHUNKED + b"\r\n5\r\nhello0\r\n\r\n", 400),
    "chunks without sizes": (CHUNKED + b"\r\nhello\r\n", 400),
    "chunks of negative size": (CHUNKED + b"\r\n-5\r\nhello\r\n0\r\n\r\n", 400),
    "chunks of very large size": (CHUNKED + b"\r\nffffffffffffffffff\r\nhello\r\n", 400),
    "chunk extensions without end": (CHUNKED + b"\r\n1;" + b"a" * 10_000 + b"\r\nx\r\n0\r\n\r\n", 400),
    "line feeds alone": (request(V1, PLAIN).replace(b"\r\n", b"\n"), 400),
    "a folded header": (request(V1, PLAIN).replace(b"connection: close", b"x: a\r\n b\r\nconnection: close"), 400),
    "a nul in a header": (request(V1, PLAIN).replace(b"localhost", b"local\0host"), 400),
    "no host": (b"GET / HTTP/1.1\r\nconnection: close\r\n\r\n", 400),
    "two hosts": (b"GET / HTTP/1.1\r\nhost: localhost\r\nhost: localhost\r\nconnection: close\r\n\r\n", 400),
    "another host in the target": (b"GET http://example.org/ HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n", 400),
    "a header without a name": (b"GET / HTTP/1.1\r\nhost: localhost\r\n: x\r\n\r\n", 400),
    "http/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    "http/0.9": (b"GET /\r\n\r\n", 400),
    "tls": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 100, 400),
    "a proxy's method": (b"CONNECT localhost:80 HTTP/1.1\r\nhost: localhost\r\n\r\n", 501),
    "an unknown method": (b"BREW /pot HTTP/1.1\r\nhost: localhost\r\n\r\n", 501),
    "a method in small letters": (b"post /v1/models/iris:predict HTTP/1.1\r\nhost: localhost\r\n\r\n", 501),
    "too many headers": (request(V1, PLAIN, {f"x-{number}": "1" for number in range(200)}), 431),
    "a very long header": (request(V1, PLAIN, {"x": "1" * 20_000}), 431),
    "a very long head": (request(V1, PLAIN, {f"x-{number}": "1" * 1_000 for number in range(50)}), 431),
    "a very long path": (request("/" + "a" * 9_000, method="GET"), 414),
    "a very long query": (request("/v2?" + "a" * 9_000, method="GET"), 414),
    "a large body with GET": (request("/v2", b"hello" * 50_000, method="GET"), 413),
    "spaces in the target": (b"GET /v1/models/a b HTTP/1.1\r\nhost: localhost\r\n\r\n", 400),
    "a fragment": (b"GET /v2#top HTTP/1.1\r\nhost: localhost\r\n\r\n", 400),
    "bytes beyond ascii in the target": (b"GET /v1/models/\xc3\xbc HTTP/1.1\r\nhost: localhost\r\n\r\n", 400),
}


@pytest.mark.parametrize("case", HTTP)
async def test_malformed_and_ambiguous_http_is_refused_once_and_the_connection_closed(gateway, case):
    raw, status = HTTP[case]
    answers = answers_in(await sent(gateway, raw))
    assert [answer.status for answer in answers] == [status]
    message_of(answers[0], "")


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v1/models/..:predict", 400),
        ("/v1/models/../../etc/passwd", 404),
        ("/v1/models/%2e%2e:predict", 400),
        ("/v1/models/%2e%2e%2f%2e%2e:predict", 400),
        ("/v1/models/iris%00:predict", 400),
        ("/v1/models/%ff:predict", 400),
        ("/v1/models/%:predict", 400),
        ("/v1/models/%zz:predict", 400),
        ("/v1/models/%C0%AE:predict", 400),
        ("/v1/models/iris%0d%0ax:predict", 400),
        ("//v1/models/iris:predict", 404),
        ("/v1//models/iris:predict", 404),
        ("/v1/models/iris:predict/", 404),
        ("/v1/models/:predict", 400),
        ("/v1/models/iris:explode", 405),
        ("/v1/models/nobody:predict", 404),
        ("/v1/models/" + "a" * 5_000 + ":predict", 400),
        ("/v1/models/" + "a:predict" * 500, 400),
        ("/v1/models/iris/versions/0:predict", 400),
        ("/v1/models/iris/versions/-1:predict", 400),
        ("/v1/models/iris/versions/1.0:predict", 400),
        ("/v1/models/iris/versions/99999999999999999999:predict", 400),
        ("/v1/models/iris/versions/%D9%A1:predict", 400),
        ("/v1/models/iris/versions/9:predict", 404),
        ("/v1/models/iris/labels/BEST:predict", 400),
        ("/v1/models/iris/labels/best:predict", 404),
        ("/v2/models/iris/versions/9/infer", 404),
        ("/v2/models/iris/infer/../../../../../etc", 404),
        ("/v1/projects/../locations/l/endpoints/iris:predict", 400),
        ("/v1/projects/p/locations/l/endpoints/nobody:predict", 404),
        ("/endpoints/../invocations", 400),
        ("/endpoints/nobody/invocations", 404),
        ("/api/v1/predictions/..%2f..:cancel", 400),
        ("/api/v1/predictions/none:cancel", 404),
        ("/static-offline-docs/..%2f..%2fetc%2fpasswd", 405),
        ("/" * 5_000, 404),
        ("/?" + "&" * 5_000, 405),
    ],
)
async def test_path_tricks_lead_nowhere(gateway, path, status):
    answer = await post(gateway, path, GOOD)
    assert answer.status == status, answer.body
    message_of(answer, path)


async def test_http_1_0_is_answered_and_the_connection_closed(gateway):
    body = json.dumps(GOOD).encode()
    answer = await ask(gateway, b"POST %b HTTP/1.0\r\ncontent-length: %d\r\n\r\n%b" % (V1.encode(), len(body), body))
    assert (answer.status, answer.json()) == (200, {"predictions": [0]})


def path_of(template: str) -> str:
    return re.sub(r"\{(\w+)\}", lambda match: PARAMETERS[match[1]], template)


async def test_no_method_on_any_route_is_an_accident(gateway):
    taken = {(route.method, path_of(route.template)) for route in ROUTES}
    for path in sorted({path_of(route.template) for route in ROUTES}):
        for method in ("HEAD", "OPTIONS", "PUT", "PATCH", "DELETE", "TRACE"):
            if (method, path) in taken:
                continue
            data = await sent(gateway, request(path, method=method))
            (answer,) = answers_in(data, bodiless=method == "HEAD")
            if method == "HEAD":
                assert data.endswith(b"\r\n\r\n")
            if method == "HEAD" and find("GET", path).route is not None:
                assert answer.status in (200, 400, 404, 409), (path, answer)
                continue
            assert answer.status == 405, (method, path, answer)
            assert method not in answer.headers["allow"].split(", ")


async def test_informational_routes_pass_bodies_and_queries_over_or_refuse_them(gateway):
    bodies = (b"\xff\x00{", b'{"ready": 3}', b"[" * 10_000)
    plain = [(route.method, path_of(route.template)) for route in ROUTES if route.door is Door.PLAIN]
    asked = [ask(gateway, request(f"{path}?a=%ff&b[]=1&%00", body, method=method)) for method, path in plain for body in bodies]
    for answer in await asyncio.gather(*asked):
        assert answer.status in (200, 400, 404, 409), answer
        assert b'"detail"' not in answer.body


async def test_bodies_in_chunks_are_read_as_others_are(gateway):
    content, headers = binary("wide", FLOATS)[:2]
    good = [
        (V1, json.dumps(GOOD).encode(), {}),
        (MIXED, json.dumps(mixed()).encode(), {}),
        (MIXED, content, headers),
        (SCORING, b"5.1,3.5,1.4,0.2\n", {"content_type": "text/csv"}),
        (SCORING, npy(np.ones((1, 4))), {"content_type": "application/x-npy"}),
        (f"{PLACE}/iris:rawPredict", gzip.compress(PLAIN), {"content_encoding": "gzip"}),
    ]
    for path, body, extra in good:
        head = request(path, headers={"transfer-encoding": "chunked", **{name.replace("_", "-"): value for name, value in extra.items()}})
        chunks = b"".join(b"%x\r\n%b\r\n" % (len(body[at : at + 7]), body[at : at + 7]) for at in range(0, len(body), 7))
        answer = await ask(gateway, head.replace(b"content-length: 0\r\n", b"") + chunks + b"0\r\n\r\n")
        assert answer.status == 200, (path, answer)


async def test_asynchronous_requests_that_can_never_be_answered_are_refused_at_once(gateway):
    later = {"prefer": "respond-async"}
    await assert_refused(gateway, V1, {"instances": [[1]]}, 400, "4 numbers", **later)
    await assert_refused(gateway, V1, b"{", 400, "JSON", **later)
    await assert_refused(gateway, "/v1/models/nobody:predict", GOOD, 404, "nobody", **later)
    await assert_refused(gateway, V1, GOOD, 400, "webhooks are off", x_millrace_webhook="http://localhost/", **later)
    for seconds in ("0", "-1", "soon", "9" * 20):
        await assert_refused(gateway, V1, GOOD, 400, "x-millrace-expires-s", x_millrace_expires_s=seconds, **later)
    accepted = await post(gateway, V1, GOOD, **later)
    assert accepted.status == 202
    async with asyncio.timeout(PATIENCE_S):
        while (answer := await ask(gateway, request(accepted.json()["result_url"], method="GET"))).status == 202:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    assert (answer.status, answer.json()) == (200, {"predictions": [0]})


async def test_a_thousand_pipelined_requests_are_answered_in_order_bad_ones_too(gateway):
    rows = [[[5.1, 3.5, 1.4, 0.2]], [[7.0, 3.2, 4.7, 1.4]], [[1]], [[6.3, 3.3, 6.0, 2.5]], "x"]
    bodies = [json.dumps({"instances": rows[number % 5]}).encode() for number in range(1_000)]
    head = b"POST %b HTTP/1.1\r\nhost: localhost\r\nx-request-id: %d\r\ncontent-length: %d\r\n\r\n%b"
    pipeline = [head % (V1.encode(), number, len(body), body) for number, body in enumerate(bodies)]
    pipeline[-1] = pipeline[-1].replace(b"host: localhost", b"host: localhost\r\nconnection: close")
    answers = answers_in(await sent(gateway, b"".join(pipeline)))
    assert [answer.headers["x-request-id"] for answer in answers] == [str(number) for number in range(1_000)]
    assert [answer.status for answer in answers] == [200, 200, 400, 200, 400] * 200
    assert [answer.json()["predictions"] for answer in answers if answer.status == 200] == [[0], [1], [2]] * 200


async def test_half_closed_clients_are_answered(gateway):
    assert (await ask(gateway, request(V1, PLAIN).replace(b"connection: close\r\n", b""), eof=True)).status == 200
    assert (await ask(gateway, request(V1, PLAIN)[:-5], eof=True)).status == 400
    assert (await ask(gateway, b"POST /v1/models/iris:pred", eof=True)).status == 400
    assert (await ask(gateway, CHUNKED + b"\r\n5\r\nhel", eof=True)).status == 400
    assert await sent(gateway, b"", eof=True) == b""


async def test_clients_that_ask_before_they_send_are_told_to_or_why_not(gateway):
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    writer.write(request(V1, PLAIN, {"expect": "100-continue"})[: -len(PLAIN)])
    async with asyncio.timeout(PATIENCE_S):
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100")
        writer.write(PLAIN)
        assert (await reader.read()).startswith(b"HTTP/1.1 200")
    writer.close()
    await writer.wait_closed()
    refused = {
        request(V1, headers={"expect": "100-continue", "content-length": str(MAX_BODY_BYTES + 1)}): 413,
        request("/nowhere", headers={"expect": "100-continue", "content-length": "10"}): 404,
        request(V1, headers={"expect": "100-continue", "content-length": "10", "origin": "http://example.org"}): 403,
    }
    for raw, status in refused.items():
        assert (await ask(gateway, raw)).status == status


async def leave(gateway: RealGateway, raw: bytes, *, accepted: int | None = None) -> None:
    """Send something and break the connection off; ``accepted``: once so many requests are in flight."""
    _, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    writer.write(raw)
    await writer.drain()
    if accepted is not None:
        await asyncio.to_thread(gateway.until, "millrace_requests_in_flight", accepted, endpoint="slow")
    writer.get_extra_info("socket").setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


async def test_clients_that_leave_free_their_places(gateway):
    failed = gateway.metric("millrace_requests_total", endpoint="slow", outcome="failed")
    whole = request("/v1/models/slow:predict", b'{"instances": [[2, 1, 1]]}')
    for cut in (10, len(whole) - 3):
        await leave(gateway, whole[:cut])
    await leave(gateway, whole, accepted=1)
    await asyncio.to_thread(gateway.until, "millrace_requests_in_flight", 0, endpoint="slow")
    await asyncio.gather(*(leave(gateway, whole) for _ in range(50)))
    await asyncio.to_thread(gateway.until, "millrace_requests_in_flight", 0, endpoint="slow")
    answer = await post(gateway, "/v1/models/slow:predict", {"instances": [[0, 1, 2]]})
    assert (answer.status, answer.json()) == (200, {"predictions": [3.0]})
    assert gateway.metric("millrace_requests_total", endpoint="slow", outcome="failed") > failed


async def test_a_model_that_takes_too_long_is_not_waited_for(gateway):
    await assert_refused(gateway, "/v1/models/slow:predict", {"instances": [[0.5, 1, 1]]}, 504, "100 ms", x_request_timeout_ms="100")


async def test_good_requests_among_many_bad_ones_get_their_own_answers(gateway):
    rng = np.random.default_rng(0)
    rows = rng.uniform(0, 8, (100, 4)).round(3).tolist()
    good = [{"instances": [row], "outputs": ["predict_proba"]} for row in rows]
    alone = [(await post(gateway, V1, document)).json()["predictions"] for document in good]
    bad: list[Any] = [*JSON_BODIES.values(), {"instances": [[1, 2, 3, None]]}, {"instances": [[1]]}, {"instances": [[1, 2, 3, 1e308]]}]
    asked = [post(gateway, V1, document) for document in good] + [post(gateway, V1, bad[number % len(bad)]) for number in range(200)]
    order = rng.permutation(len(asked))
    answers = dict(zip(order.tolist(), await asyncio.gather(*(asked[index] for index in order)), strict=True))
    for number, expected in enumerate(alone):
        np.testing.assert_allclose(answers[number].json()["predictions"], expected, rtol=1e-9)
    assert {answers[number].status for number in range(100, 300)} <= {200, 400}


async def test_a_millisecond_is_enough_or_is_not(gateway):
    bodies = {MIXED: mixed(), RAW: mixed(), V2: iris()}
    for path in PREDICT:
        document = bodies.get(path, GOOD)
        answers = await asyncio.gather(*(post(gateway, path, document, x_request_timeout_ms="1") for _ in range(40)))
        assert {answer.status for answer in answers} <= {200, 400, 429, 504}
        for answer in answers:
            if answer.status != 200:
                message_of(answer, path)


async def test_connections_by_the_hundred_that_say_nothing_good_cost_nobody_anything(gateway):
    floods = [request(V1, PLAIN, {f"x-{number}": "1" * 100 for number in range(99)}), b"\r\n" * 10_000, b"A" * 100_000, b"\0" * 10_000]
    await asyncio.gather(*(sent(gateway, floods[number % 4]) for number in range(300)), *(assert_good(gateway) for _ in range(20)))


def posted(connection: HTTPConnection, path: str, body: bytes, headers: Mapping[str, str]) -> Answer:
    """The answer to a request over a connection that is kept."""
    connection.request("POST", path, body, {"host": "localhost", **headers})
    response = connection.getresponse()
    return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, response.read())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=5),
    max_leaves=12,
)
NAMES = st.sampled_from(["name", "shape", "datatype", "data", "parameters", "id", "inputs", "outputs", "instances", "binary_data_size"])


@st.composite
def documents(draw: Any) -> bytes:
    """A good document with something in it replaced by something else."""
    document = draw(st.sampled_from([GOOD, iris(), mixed(), {"dataframe_split": {"data": [[1, 2, 3, 4]]}}, {"inputs": [[1, 2, 3, 4]]}]))
    document = json.loads(json.dumps(document))
    at: Any = document
    for _ in range(draw(st.integers(0, 3))):
        members = [each for each in (at.values() if isinstance(at, dict) else at) if isinstance(each, (dict, list)) and each]
        if not members:
            break
        at = draw(st.sampled_from(members))
    if isinstance(at, dict):
        at[draw(st.sampled_from(sorted(at)) | NAMES)] = draw(JSON)
    else:
        at[draw(st.integers(0, len(at) - 1))] = draw(JSON)
    return json.dumps(document, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")


@st.composite
def damaged(draw: Any) -> bytes:
    """A good body with a few bytes changed, cut out or put in."""
    body = bytearray(json.dumps(draw(st.sampled_from([GOOD, iris(), mixed()]))).encode())
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(body)))
        body[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return bytes(body)


HEADERS = st.fixed_dictionaries(
    {},
    optional={
        "content-type": st.sampled_from(["application/json", "text/csv", "application/x-npy", "application/octet-stream", "x"]),
        "content-encoding": st.sampled_from(["gzip", "deflate", "identity"]),
        "accept": st.sampled_from(["*/*", "text/csv", "application/x-npy", "x"]),
        "inference-header-content-length": st.integers(0, 300).map(str),
        "ce-specversion": st.sampled_from(["1.0", "9"]),
    },
)


MANAGEMENT = {
    "an integer beyond 64 bits": b"9" * 400,
    "nan": b"NaN",
    "half a character": b'"\\ud800"',
    "nested too deeply": b"[" * DEEP + b"]" * DEEP,
    "given twice": b'{"a": 1, "a": 2}',
}


@pytest.mark.parametrize("case", MANAGEMENT)
async def test_what_could_not_be_shown_again_does_not_get_into_the_state(gateway, case):
    path = "/api/v1/models/hostile/versions"
    artifact = json.dumps((await post(gateway, "/api/v1/artifacts", b"x")).json()).encode()
    for place in (b'"lineage": {"parameters": {"a": %b}}', b'"example": {"instances": %b}', b'"labels": {"a": %b}'):
        await assert_refused(gateway, path, b'{"artifact": %b, %b}' % (artifact, place % MANAGEMENT[case]))
    assert (await ask(gateway, request(path, method="GET"))).status == 404


@pytest.mark.parametrize("path", PREDICT)
def test_no_bytes_bring_about_a_fault(gateway, path):
    connection = HTTPConnection("127.0.0.1", gateway.port, timeout=PATIENCE_S)

    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.binary(max_size=500) | documents() | damaged(), HEADERS)
    def check(body: bytes, headers: dict[str, str]) -> None:
        answer = posted(connection, path, body, headers)
        assert answer.status in (200, 400, 406, 413, 415), (answer.status, answer.body[:500])
        if answer.status != 200:
            message_of(answer, path)

    with contextlib.closing(connection):
        check()


def test_no_bytes_on_a_connection_bring_about_a_fault(gateway):
    parts = st.sampled_from([b"GET ", b"POST ", V1.encode(), b" HTTP/1.1\r\n", b"host: localhost\r\n", b"content-length: 3\r\n", b"\r\n"])
    chunked = st.sampled_from([b"transfer-encoding: chunked\r\n", b"3\r\nabc\r\n", b"0\r\n\r\n"])

    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(parts | chunked | st.binary(max_size=20), max_size=12).map(b"".join))
    def check(raw: bytes) -> None:
        with socket.create_connection(("127.0.0.1", gateway.port), PATIENCE_S) as connection, contextlib.suppress(ConnectionError):
            connection.sendall(raw)
            connection.shutdown(socket.SHUT_WR)
            data = b""
            while piece := connection.recv(1 << 16):
                data += piece
            assert not re.search(rb"HTTP/1\.1 50[02]", data), data

    check()


async def test_bad_input_leaves_nothing_in_memory(gateway):
    cases: list[tuple[str, Any, dict[str, str]]] = [(path, body, {}) for path in (V1, RAW) for body in JSON_BODIES.values()]
    cases += [(MIXED, body, headers) for body, headers, _ in BINARY.values()]
    cases += [(V1, body, {"content_encoding": encoding}) for encoding, body, _ in ENCODED.values()]

    async def round_of_all() -> int:
        for start in range(0, len(cases), 20):
            await asyncio.gather(*(post(gateway, path, body, **headers) for path, body, headers in cases[start : start + 20]))
        return gateway.memory_bytes

    for _ in range(3):
        before = await round_of_all()
    for _ in range(10):
        after = await round_of_all()
    assert after - before < 48 * 2**20


async def test_after_all_of_it_the_gateway_answers_and_its_books_are_in_order(gateway):
    await assert_good(gateway)
    answer = await post(gateway, MIXED, mixed())
    assert answer.json()["outputs"][0]["data"] == [4.0]
    assert len(answer.json()["outputs"]) == 4
    await asyncio.to_thread(gateway.until, "millrace_requests_in_flight", 0)
    accepted = gateway.metric("millrace_requests_accepted_total")
    ended = {outcome: gateway.metric("millrace_requests_total", outcome=outcome) for outcome in ("completed", "failed", "expired")}
    assert accepted == sum(ended.values()) > 1_000
    assert min(ended.values()) > 0
    assert gateway.metric("millrace_batches_in_flight") == 0
    assert gateway.metric("millrace_requests_queued") == 0
    log = gateway.log.read_text()
    assert "Traceback" not in log, log[log.index("Traceback") - 500 :][:3_000]
    assert "a bug" not in log
    assert "Task exception was never retrieved" not in log
