import asyncio
import json
import struct

import numpy as np
import pytest

from benchmarks import overload
from benchmarks.figures import Load
from benchmarks.generator import Connection, Tally, Target, closed_loop, open_loop
from benchmarks.peers import bodies, ghz, wrk


def test_load_summaries_count_only_success_as_throughput():
    said = {"requests": 110, "duration_us": 2e6, "status_errors": 10, "socket_errors": 1, "timeouts": 2, "p50_us": 1500, "p99_us": 9000}
    assert wrk.read_summary(f"Running 2s test\n\n{json.dumps(said)}\n") == Load(50.0, 1.5, 9.0, 110, 13)


def test_ghz_reports_are_read_in_its_nanoseconds():
    report = {
        "count": 12,
        "total": 2e9,
        "statusCodeDistribution": {"OK": 10, "Unavailable": 2},
        "latencyDistribution": [{"percentage": 50, "latency": 2e6}, {"percentage": 99, "latency": 5e6}],
    }
    assert ghz.read_report(json.dumps(report)) == Load(5.0, 2.0, 5.0, 12, 2)


def test_a_report_without_answers_has_only_errors():
    assert ghz.read_report('{"count": 3, "total": 1000000000}') == Load(0.0, 0.0, 0.0, 3, 3)


def test_overload_shares_count_what_was_never_answered():
    said = {
        "statuses": {"0": 1, "200": 50, "429": 30, "503": 10, "504": 4},
        "timeouts": 5,
        "goodput_per_s": 24.0,
        "p50_us": 1e3,
        "p99_us": 2e3,
    }
    found = overload.read_summary(said, 3.0, 1_000, 2.0)
    assert (found.offered_per_s, found.answered_per_s, found.refused_percent, found.other_percent) == (50.0, 24.0, 40.0, 10.0)


def test_goodput_counts_answers_of_its_window_only():
    tally = Tally(10.0, 20.0)
    for now_s in (9.0, 10.0, 15.0, 20.0, 21.0):
        tally.add(200, now_s - 1, now_s)
    tally.add(429, 15.0, 15.1)
    assert tally.summary(20.0, 0)["goodput_per_s"] == pytest.approx(0.3)


def test_a_binary_request_is_a_head_and_its_tensor():
    rows = np.array([[1.0, 2.0]])
    body, headers = bodies.v2_binary(rows, "input")
    head = json.loads(body[: int(headers[bodies.HEAD_LENGTH])])
    assert head["inputs"][0]["parameters"]["binary_data_size"] == 16
    assert body[int(headers[bodies.HEAD_LENGTH]) :] == struct.pack("<2d", 1.0, 2.0)


def test_labels_are_read_from_binary_answers_and_from_json_ones():
    head = b'{"outputs":[{"name":"predict","datatype":"INT64","shape":[2],"parameters":{"binary_data_size":16}}]}'
    binary = head + struct.pack("<2q", 1, 0)
    assert bodies.v2_binary_labels(binary, {bodies.HEAD_LENGTH: str(len(head))}) == [1, 0]
    assert bodies.v2_binary_labels(b'{"outputs":[{"data":[1,0]}]}', {}) == [1, 0]


def test_a_grpc_message_has_the_fields_of_the_protocol():
    message = bodies.v2_protobuf("iris", np.zeros((1, 300)), "x", "predict")
    assert message.startswith(b"\x0a\x04iris\x2a\x0e\x0a\x01x\x12\x04FP64\x1a\x03\x01\xac\x02\x32\x09\x0a\x07predict\x3a\xe0\x12")
    assert message.endswith(bytes(2_400))


class Server:
    """Answers each request with the next status, the last one again and again; None closes the connection."""

    def __init__(self, *statuses):
        self.statuses = list(statuses)
        self.requests = []

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_):
        self._server.close()

    async def _serve(self, reader, writer):
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                self.requests.append(head + await reader.readexactly(4))
                status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
                if status is None:
                    break
                writer.write(b"HTTP/1.1 %d Whatever\r\nContent-Length: 2\r\n\r\n" % status)
                await writer.drain()
                writer.write(b"{}")
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()

    def target(self):
        return Target(f"http://127.0.0.1:{self.port}/predict", b"body", ["x: y"])


async def test_a_closed_loop_asks_again_when_it_is_answered():
    async with Server(200, 503, 200) as server:
        summary = await closed_loop(server.target(), connections=1, seconds=0.05)
    assert server.requests[0] == b"POST /predict HTTP/1.1\r\nhost: 127.0.0.1:%d\r\ncontent-length: 4\r\nx: y\r\n\r\nbody" % server.port
    assert summary["statuses"]["503"] == summary["status_errors"] == 1
    assert summary["requests"] > 2


async def test_an_open_loop_sends_what_is_due_whatever_the_server_does():
    async with Server(429, 200) as server:
        summary = await open_loop(server.target(), rate_per_s=200, seconds=0.1)
    assert summary["statuses"] == {"200": 19, "429": 1}


async def test_a_broken_connection_is_an_error_not_an_answer():
    async with Server(None, 200) as server:
        summary = await open_loop(server.target(), rate_per_s=100, seconds=0.05)
    assert summary["statuses"] == {"0": 1, "200": 4}
    assert (summary["status_errors"], summary["socket_errors"]) == (0, 1)


async def test_an_answer_may_come_in_pieces():
    answered = []
    connection = Connection()
    connection.connection_made(_Discards())
    connection.ask(b"", answered.append)
    for part in (b"HTTP/1.1 20", b"0 OK\r\ncontent-", b"length: 3\r\n\r", b"\n{}", b" "):
        assert answered == []
        connection.data_received(part)
    assert answered == [200]


def test_a_chunked_answer_ends_with_its_last_chunk():
    answered = []
    connection = Connection()
    connection.connection_made(_Discards())
    connection.ask(b"", answered.append)
    for part in (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", b"2\r\n{}\r\n", b"0\r\n\r\n"):
        assert answered == []
        connection.data_received(part)
    assert answered == [200]


class _Discards:
    def write(self, data):
        pass
