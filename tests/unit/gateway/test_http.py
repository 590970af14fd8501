"""The HTTP server's protocol, without a network."""

import ast
import asyncio
import contextlib
import re
from collections.abc import Callable
from itertools import pairwise

import h11
import httptools
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.gateway.http import Connections, chunks
from services.gateway.http.asgi import BUFFER_BYTES
from services.gateway.http.connection import LINGER_BYTES, TURN_REQUESTS
from services.gateway.http.connections import client_key
from services.gateway.settings import HttpSettings
from tests.unit.gateway.wires import JSON, Answer, Echo, Line, echo, read_answers

GET = b"GET /a HTTP/1.1\r\nhost: h\r\n\r\n"
POST = (
    b"POST /v1/models/m:predict?x=1&y HTTP/1.1\r\nHost: h:8080\r\nContent-Type: application/json\r\nContent-Length: 11\r\n\r\nhello world"
)
CHUNKED = b"POST /c HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n6;a=b\r\n world\r\n0\r\nx-t: 1\r\n\r\n"
HEAD = b"HEAD /a HTTP/1.1\r\nhost: h\r\n\r\n"
OLD = b"POST /old HTTP/1.0\r\ncontent-length: 2\r\n\r\nab"


def post(*fields: bytes, body: bytes = b"") -> bytes:
    return b"POST /x HTTP/1.1\r\nhost: h\r\n" + b"".join(field + b"\r\n" for field in fields) + b"\r\n" + body


def bytewise(data: bytes) -> list[bytes]:
    return [data[at : at + 1] for at in range(len(data))]


GOOD = {
    "no body": (GET, "GET", "/a", ""),
    "body": (POST, "POST", "/v1/models/m:predict", "hello world"),
    "chunks": (CHUNKED, "POST", "/c", "hello world"),
    "an empty line before": (b"\r\n" + GET, "GET", "/a", ""),
    "empty chunked body": (post(b"transfer-encoding: chunked", body=b"0\r\n\r\n"), "POST", "/x", ""),
    "upper-case coding": (post(b"Transfer-Encoding: CHUNKED", body=b"0A\r\n0123456789\r\n000\r\n\r\n"), "POST", "/x", "0123456789"),
    "quoted chunk extension": (post(b"transfer-encoding: chunked", body=b'1;a="b;c";d\r\nx\r\n0\r\n\r\n'), "POST", "/x", "x"),
    "zeros before the length": (post(b"content-length: 0003", body=b"abc"), "POST", "/x", "abc"),
    "percent-encoded target": (b"GET /%2e%2e/%C3%BC?q=%20 HTTP/1.1\r\nhost: h\r\n\r\n", "GET", "/%2e%2e/%C3%BC", ""),
    "lax target characters": (b'GET /a"<>\\^`{|} HTTP/1.1\r\nhost: h\r\n\r\n', "GET", '/a"<>\\^`{|}', ""),
    "absolute target": (b"GET http://H:80/p?q HTTP/1.1\r\nhost: h:80\r\n\r\n", "GET", "/p", ""),
    "absolute target without a path": (b"GET http://h?q HTTP/1.1\r\nhost: h\r\n\r\n", "GET", "/", ""),
    "upgrade with a body is passed over": (
        post(b"connection: Upgrade, HTTP2-Settings", b"upgrade: h2c", b"content-length: 3", body=b"abc"),
        "POST",
        "/x",
        "abc",
    ),
    "upgrade is passed over": (b"GET /a HTTP/1.1\r\nhost: h\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n", "GET", "/a", ""),
    "IPv6 host": (b"GET /a HTTP/1.1\r\nhost: [::1]:8080\r\n\r\n", "GET", "/a", ""),
    "HTTP/1.0 needs no host": (OLD, "POST", "/old", "ab"),
}


@pytest.mark.parametrize("split", [False, True], ids=["whole", "bytewise"])
@pytest.mark.parametrize(("request_bytes", "method", "path", "body"), GOOD.values(), ids=GOOD)
def test_a_good_request_is_answered_however_it_arrives(request_bytes, method, path, body, split):
    line = Line().send(*(bytewise(request_bytes) if split else [request_bytes]))
    (answer,) = line.answers
    assert answer.status == 200
    assert (answer.json["method"], answer.json["path"], answer.json["body"]) == (method, path, body)


def test_headers_have_lower_case_names_trimmed_values_and_are_joined_when_they_repeat():
    (answer,) = Line().send(b"GET /a HTTP/1.1\r\nHost: h\r\nX-A:  1 \t\r\nx-a:2\r\nX-Empty:\r\nCookie: a=1\r\ncookie: b=2\r\n\r\n").answers
    assert answer.json["headers"] == {"host": "h", "x-a": "1, 2", "x-empty": "", "cookie": "a=1; b=2"}


BAD = {
    # what decides the framing
    "length and coding": (400, post(b"content-length: 5", b"transfer-encoding: chunked", body=b"0\r\n\r\n")),
    "coding and length": (400, post(b"transfer-encoding: chunked", b"content-length: 5", body=b"0\r\n\r\n")),
    "two lengths": (400, post(b"content-length: 3", b"content-length: 3", body=b"abc")),
    "two different lengths": (400, post(b"content-length: 3", b"content-length: 4", body=b"abc")),
    "list of lengths": (400, post(b"content-length: 3, 3", body=b"abc")),
    "length with a plus": (400, post(b"content-length: +3", body=b"abc")),
    "length with a minus": (400, post(b"content-length: -3", body=b"abc")),
    "length with a space": (400, post(b"content-length: 1 1", body=b"abc")),
    "hexadecimal length": (400, post(b"content-length: 0x3", body=b"abc")),
    "length with an underscore": (400, post(b"content-length: 1_1", body=b"abc")),
    "empty length": (400, post(b"content-length:", body=b"abc")),
    "huge length": (413, post(b"content-length: 999999999999999999", body=b"abc")),
    "length beyond 64 bits": (400, post(b"content-length: 18446744073709551619", body=b"abc")),
    "length of many digits": (400, post(b"content-length: " + b"9" * 1000, body=b"abc")),
    "length of many zeros": (413, post(b"content-length: " + b"0" * 1000 + b"3", body=b"abc")),
    "other coding": (400, post(b"transfer-encoding: gzip", body=b"abc")),
    "coding after chunked": (400, post(b"transfer-encoding: chunked, gzip", body=b"0\r\n\r\n")),
    "coding before chunked": (501, post(b"transfer-encoding: gzip, chunked", body=b"0\r\n\r\n")),
    "chunked twice": (400, post(b"transfer-encoding: chunked, chunked", body=b"0\r\n\r\n")),
    "identity": (400, post(b"transfer-encoding: identity", body=b"abc")),
    "two codings": (400, post(b"transfer-encoding: chunked", b"transfer-encoding: identity", body=b"0\r\n\r\n")),
    "nearly chunked": (400, post(b"transfer-encoding: xchunked", body=b"0\r\n\r\n")),
    "quoted chunked": (400, post(b'transfer-encoding: "chunked"', body=b"0\r\n\r\n")),
    "coding after a vertical tab": (400, post(b"transfer-encoding: \x0bchunked", body=b"0\r\n\r\n")),
    "empty coding": (400, post(b"transfer-encoding:", body=b"0\r\n\r\n")),
    "coding in HTTP/1.0": (400, b"POST / HTTP/1.0\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"),
    # lines and fields
    "folded field": (400, post(b"x-a: 1\r\n 2")),
    "folded first field": (400, b"GET / HTTP/1.1\r\n host: h\r\n\r\n"),
    "bare LF everywhere": (400, b"GET / HTTP/1.1\nhost: h\n\n"),
    "bare LF after a field": (400, b"GET / HTTP/1.1\r\nhost: h\nx: y\r\n\r\n"),
    "bare LF at the end": (400, b"GET / HTTP/1.1\r\nhost: h\r\n\n"),
    "bare CR": (400, post(b"x-a: 1\r2")),
    "CR before CRLF": (400, post(b"x-a: 1\r")),
    "NUL in a value": (400, post(b"x-a: 1\x002")),
    "control character in a value": (400, post(b"x-a: 1\x012")),
    "DEL in a value": (400, post(b"x-a: 1\x7f2")),
    "space before the colon": (400, post(b"x-a : 1")),
    "tab before the colon": (400, post(b"x-a\t: 1")),
    "space in a name": (400, post(b"x a: 1")),
    "empty name": (400, post(b": 1")),
    "no colon": (400, post(b"x-a")),
    "quote in a name": (400, post(b'x"a: 1')),
    "byte above 127 in a name": (400, post(b"x-\xc3\xbc: 1")),
    "no host": (400, b"GET / HTTP/1.1\r\n\r\n"),
    "empty host": (400, b"GET / HTTP/1.1\r\nhost:\r\n\r\n"),
    "two hosts": (400, b"GET / HTTP/1.1\r\nhost: h\r\nhost: h\r\n\r\n"),
    "list of hosts": (400, b"GET / HTTP/1.1\r\nhost: h, i\r\n\r\n"),
    "host with a path": (400, b"GET / HTTP/1.1\r\nhost: h/i\r\n\r\n"),
    "host with a user": (400, b"GET / HTTP/1.1\r\nhost: u@h\r\n\r\n"),
    "two hosts in HTTP/1.0": (400, b"GET / HTTP/1.0\r\nhost: h\r\nhost: h\r\n\r\n"),
    # the request line
    "nonsense": (400, b"NONSENSE\r\n\r\n"),
    "TLS": (400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),
    "two empty lines before": (400, b"\r\n\r\n" + GET),
    "HTTP/0.9": (400, b"GET /\r\n\r\n"),
    "HTTP/2.0": (505, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    "HTTP/1.2": (505, b"GET / HTTP/1.2\r\nhost: h\r\n\r\n"),
    "HTTP/11.1": (400, b"GET / HTTP/11.1\r\nhost: h\r\n\r\n"),
    "lower-case version": (400, b"GET / http/1.1\r\nhost: h\r\n\r\n"),
    "RTSP": (400, b"OPTIONS * RTSP/1.0\r\nhost: h\r\n\r\n"),
    "space after the version": (400, b"GET / HTTP/1.1 \r\nhost: h\r\n\r\n"),
    "two spaces": (400, b"GET  / HTTP/1.1\r\nhost: h\r\n\r\n"),
    "tab instead of space": (400, b"GET\t/ HTTP/1.1\r\nhost: h\r\n\r\n"),
    "lower-case method": (501, b"get / HTTP/1.1\r\nhost: h\r\n\r\n"),
    "unknown method": (501, b"BREW / HTTP/1.1\r\nhost: h\r\n\r\n"),
    "WebDAV method": (501, b"PROPFIND / HTTP/1.1\r\nhost: h\r\n\r\n"),
    "CONNECT": (501, b"CONNECT h:80 HTTP/1.1\r\nhost: h\r\n\r\n"),
    "method that is no token": (400, b"G@T / HTTP/1.1\r\nhost: h\r\n\r\n"),
    "byte above 127 in the target": (400, b"GET /\xc3\xbc HTTP/1.1\r\nhost: h\r\n\r\n"),
    "control character in the target": (400, b"GET /\x01 HTTP/1.1\r\nhost: h\r\n\r\n"),
    "fragment": (400, b"GET /a#b HTTP/1.1\r\nhost: h\r\n\r\n"),
    "no slash": (400, b"GET a HTTP/1.1\r\nhost: h\r\n\r\n"),
    "asterisk": (400, b"OPTIONS * HTTP/1.1\r\nhost: h\r\n\r\n"),
    "other scheme": (400, b"GET file:///etc/passwd HTTP/1.1\r\nhost: h\r\n\r\n"),
    "absolute target with a user": (400, b"GET http://u@h/ HTTP/1.1\r\nhost: h\r\n\r\n"),
    "absolute target of another host": (400, b"GET http://i/ HTTP/1.1\r\nhost: h\r\n\r\n"),
    # chunks
    "chunk size with 0x": (400, post(b"transfer-encoding: chunked", body=b"0x1\r\na\r\n0\r\n\r\n")),
    "chunk size with a sign": (400, post(b"transfer-encoding: chunked", body=b"+1\r\na\r\n0\r\n\r\n")),
    "space before a chunk size": (400, post(b"transfer-encoding: chunked", body=b" 1\r\na\r\n0\r\n\r\n")),
    "space after a chunk size": (400, post(b"transfer-encoding: chunked", body=b"1 \r\na\r\n0\r\n\r\n")),
    "no chunk size": (400, post(b"transfer-encoding: chunked", body=b"\r\na\r\n0\r\n\r\n")),
    "chunk size beyond 64 bits": (400, post(b"transfer-encoding: chunked", body=b"10000000000000001\r\na\r\n0\r\n\r\n")),
    "LF after a chunk size": (400, post(b"transfer-encoding: chunked", body=b"1\na\r\n0\r\n\r\n")),
    "LF after a chunk": (400, post(b"transfer-encoding: chunked", body=b"1\r\na\n0\r\n\r\n")),
    "longer chunk than said": (400, post(b"transfer-encoding: chunked", body=b"1\r\nab\r\n0\r\n\r\n")),
    "control character in an extension": (400, post(b"transfer-encoding: chunked", body=b"1;a\x01\r\na\r\n0\r\n\r\n")),
    "LF in an extension": (400, post(b"transfer-encoding: chunked", body=b"1;a\nb\r\na\r\n0\r\n\r\n")),
    "endless extension": (400, post(b"transfer-encoding: chunked", body=b"1;" + b"a" * chunks.MAX_LINE_BYTES)),
    "many extensions": (400, post(b"transfer-encoding: chunked", body=(b"1;" + b"a" * 200 + b"\r\nx\r\n") * 200)),
    "many tiny chunks": (400, post(b"transfer-encoding: chunked", body=b"1\r\nx\r\n" * 10_000)),
    "trailer without a colon": (400, post(b"transfer-encoding: chunked", body=b"0\r\nfoo\r\n\r\n")),
    "space before a trailer's colon": (400, post(b"transfer-encoding: chunked", body=b"0\r\nfoo : 1\r\n\r\n")),
    "LF instead of the last line": (400, post(b"transfer-encoding: chunked", body=b"0\r\n\n")),
    "many trailers": (431, post(b"transfer-encoding: chunked", body=b"0\r\n" + b"a: 1\r\n" * 2000)),
    "endless trailer": (431, post(b"transfer-encoding: chunked", body=b"0\r\na: " + b"1" * chunks.MAX_TRAILER_BYTES)),
    # sizes
    "long target": (414, b"GET /" + b"a" * 8_192 + b" HTTP/1.1\r\nhost: h\r\n\r\n"),
    "endless target": (414, b"GET /" + b"a" * 9_000),
    "long field": (431, post(b"x-a: " + b"1" * 16_384)),
    "many fields": (431, post(*(b"x-%d: 1" % number for number in range(100)))),
    "long head": (431, post(*(b"x-%d: " % number + b"1" * 1_000 for number in range(33)))),
    "endless head": (431, post(*(b"x-%d: " % number + b"1" * 1_000 for number in range(40)))[:-2]),
    "unknown expectation": (417, post(b"expect: a miracle", b"content-length: 1")),
}


@pytest.mark.parametrize("split", [False, True], ids=["whole", "bytewise"])
@pytest.mark.parametrize(("status", "request_bytes"), BAD.values(), ids=BAD)
def test_a_bad_request_is_refused_with_its_status_and_the_connection_closed(status, request_bytes, split):
    line = Line()
    for piece in bytewise(request_bytes) if split else [request_bytes]:
        if line.is_over:
            break
        line.send(piece)
    (answer,) = line.answers
    assert (answer.status, answer.closes, line.is_over) == (status, True, True)
    assert list(answer.json) == ["error"]
    assert answer.headers[b"content-type"] == b"application/json"
    assert line.application.handled == []
    assert re.fullmatch(rb"[0-9a-f]{32}", answer.headers[b"x-request-id"])
    assert line.refused == {status: 1}


@pytest.mark.parametrize(
    "name",
    [
        "authorization",
        "content-encoding",
        "content-type",
        "host",
        "inference-header-content-length",
        "last-event-id",
        "origin",
        "prefer",
        "x-api-key",
        "x-goog-api-key",
        "x-request-id",
        "x-request-timeout-ms",
    ],
)
def test_a_field_that_decides_identity_or_routing_may_come_once(name):
    field = name.title().encode() + b": a"
    line = Line().send(b"GET / HTTP/1.0\r\n" + field + b"\r\n" + field.lower() + b"\r\n\r\n")
    assert (line.statuses, line.answers[0].json) == ([400], {"error": f"the header field {name} was sent more than once"})


def test_two_traceparents_are_no_reason_to_refuse():
    line = Line().send(b"GET / HTTP/1.0\r\nTraceparent: a\r\ntraceparent: b\r\n\r\n")
    assert line.statuses == [200]
    assert line.application.handled[0].headers[b"traceparent"] == b"a, b"


class TestConnections:
    """What becomes of a connection."""

    def test_it_stays_open_between_requests(self):
        line = Line().send(GET).send(POST).send(CHUNKED)
        assert (line.statuses, line.is_over) == ([200, 200, 200], False)

    def test_the_same_head_again_is_the_same_object(self):
        line = Line().send(POST).send(POST).send(GET).send(POST)
        first, second, _, third = (exchange.head for exchange in line.application.handled)
        assert first is second
        assert first is not third

    def test_a_long_head_is_not_kept(self):
        long = post(b"x-a: " + b"1" * 3_000)
        line = Line().send(long).send(long)
        first, second = (exchange.head for exchange in line.application.handled)
        assert first is not second

    def test_it_closes_when_asked(self):
        line = Line().send(b"GET /a HTTP/1.1\r\nhost: h\r\nConnection: Foo, Close\r\n\r\n")
        assert (line.answers[0].closes, line.wire.is_closed) == (True, True)

    @pytest.mark.parametrize(("option", "connection"), [(b"", b"close"), (b"connection: Keep-Alive\r\n", b"keep-alive")])
    def test_http_1_0_closes_unless_asked_otherwise(self, option, connection):
        line = Line().send(b"GET /a HTTP/1.0\r\n" + option + b"\r\n")
        assert (line.answers[0].headers[b"connection"], line.is_over) == (connection, connection == b"close")

    def test_head_has_the_length_and_no_body(self):
        line = Line().send(HEAD, GET)
        first, second = line.answers
        assert (first.body, int(first.headers[b"content-length"])) == (b"", len(second.body) + 1)

    @pytest.mark.parametrize("status", [204, 304])
    def test_an_answer_without_content_has_no_length(self, status):
        line = Line(Echo(later=True)).send(GET)
        line.application.handled[0].respond(status, [], b"not sent")
        assert line.answers == [Answer(status, {}, b"")]

    def test_a_small_answer_is_one_write(self):
        assert Line().send(POST).wire.writes == 1

    def test_a_large_answer_is_whole(self):
        line = Line(Echo(later=True)).send(GET)
        line.application.handled[0].respond(200, [JSON], b"x" * 1_000_000)
        assert line.answers[0].body == b"x" * 1_000_000


class TestPipelining:
    def test_answers_come_in_order(self):
        line = Line().send(GET + POST + CHUNKED + HEAD + GET)
        assert [answer.status for answer in line.answers] == [200] * 5
        assert [exchange.raw_path for exchange in line.application.handled] == [b"/a", b"/v1/models/m:predict", b"/c", b"/a", b"/a"]

    def test_one_request_is_answered_at_a_time(self):
        line = Line(Echo(later=True)).send(GET + POST).send(CHUNKED)
        assert len(line.application.admitted) == 1
        for number in range(3):
            echo(line.application.handled[number])
        assert [answer.json["path"] for answer in line.answers] == ["/a", "/v1/models/m:predict", "/c"]

    def test_reading_pauses_when_too_much_waits(self):
        line = Line(Echo(later=True), max_ahead_bytes=1024).send(POST)
        while line.wire.is_reading:
            line.send(POST)
        waiting = len(line.protocol._buffer)
        assert 1024 < waiting <= 1024 + len(POST)
        while len(line.application.handled) < 1 + waiting // len(POST):
            echo(line.application.handled[-1])
        assert line.wire.is_reading

    def test_many_in_one_packet_leave_others_their_turn(self):
        line = Line()
        line.protocol.data_received(GET * 100)
        assert len(line.application.handled) == TURN_REQUESTS
        line.protocol.data_received(GET) if line.wire.is_reading else None
        line.settle()
        assert line.statuses == [200] * 100
        assert line.wire.is_reading

    def test_what_follows_a_close_is_not_answered(self):
        line = Line().send(b"GET /a HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n" + GET)
        assert (line.statuses, len(line.application.admitted)) == ([200], 1)
        assert line.wire.is_ended


class TestExpectations:
    ASKING = b"POST /x HTTP/1.1\r\nhost: h\r\nexpect: 100-Continue\r\ncontent-length: 3\r\n\r\n"

    def test_the_client_is_told_to_go_on(self):
        assert Line().send(self.ASKING).send(b"abc").statuses == [100, 200]

    def test_it_is_not_told_when_it_has_gone_on(self):
        assert Line().send(self.ASKING + b"a").send(b"bc").statuses == [200]

    def test_it_is_refused_without_sending(self):
        line = Line(Echo(wants=2)).send(self.ASKING)
        assert (line.statuses, line.wire.is_ended) == ([413], True)


class TestEarlyAnswers:
    """Answers that are given before all of the body is there."""

    @staticmethod
    def unauthorized(exchange):
        exchange.respond(401, [JSON], b"{}")

    def test_the_rest_is_thrown_away_then_the_connection_closed(self):
        line = Line(Echo(wants=self.unauthorized)).send(post(b"content-length: 1000000", body=b"x" * 100))
        assert (line.statuses, line.answers[0].closes, line.wire.is_ended) == ([401], True, True)
        line.send(b"x" * 1000)
        assert not line.wire.is_closed
        assert line.end().wire.is_closed

    def test_for_a_bounded_time(self):
        line = Line(Echo(wants=self.unauthorized)).send(post(b"content-length: 1000000"))
        assert line.wait(4).wire.is_aborted

    def test_for_a_bounded_amount(self):
        line = Line(Echo(wants=self.unauthorized)).send(post(b"content-length: 100000000000"))
        for _ in range(LINGER_BYTES // 2**20):
            line.send(b"x" * 2**20)
        assert not line.wire.is_closed
        assert line.send(b"x").wire.is_aborted

    def test_the_connection_stays_when_all_of_the_body_had_come(self):
        line = Line(Echo(wants=self.unauthorized)).send(POST + POST)
        assert (line.statuses, line.is_over) == ([401, 401], False)

    @pytest.mark.parametrize("split", [False, True])
    def test_a_body_over_its_limit(self, split):
        line = Line(Echo(wants=10)).send(*([POST[:-3], POST[-3:]] if split else [POST]))
        (answer,) = line.answers
        assert (answer.status, answer.json) == (413, {"error": "the request body is larger than the 10 bytes accepted"})

    def test_a_chunked_body_over_its_limit(self):
        assert Line(Echo(wants=10)).send(CHUNKED).statuses == [413]

    def test_the_application_refuses_in_its_own_words(self):
        def admit(exchange):
            exchange.on_refused = lambda status, sentence: exchange.respond(status, [], b"mine: " + sentence.encode())
            exchange.on_gone = lambda: gone.append(exchange)
            return 10

        gone = []
        line = Line(Echo(wants=admit)).send(CHUNKED)
        assert line.answers[0].body.startswith(b"mine: the request body is larger")
        assert gone == []

    def test_too_much_memory_for_bodies_is_a_503(self):
        one, other = Line(Echo(wants=2**30), max_buffered_bytes=2**20), None
        one.send(post(b"content-length: 1000000"), b"x" * 900_000)
        other = Line(one.application, one.connections).send(post(b"content-length: 1000000"), b"x" * 200_000)
        assert (other.statuses, other.answers[0].headers[b"retry-after"]) == ([503], b"1")
        one.send(b"x" * 100_000)
        assert (one.statuses, one.connections.held_bytes) == ([200], 0)


class TestLostClients:
    def watched(self, **limits):
        line = Line(Echo(later=True), **limits).send(GET)
        gone = []
        line.application.handled[0].on_gone = lambda: gone.append(True)
        return line, line.application.handled[0], gone

    def test_the_application_hears_that_nobody_waits(self):
        line, exchange, gone = self.watched()
        line.lose()
        assert (gone, exchange.is_gone) == ([True], True)
        exchange.respond(200, [], b"")
        assert line.wire.sent == b""

    def test_a_client_that_ended_its_side_gets_its_answers(self):
        line = Line(Echo(later=True)).send(GET + POST).end()
        echo(line.application.handled[0])
        echo(line.application.handled[1])
        assert (line.statuses, line.answers[0].closes, line.answers[1].closes) == ([200, 200], False, True)
        assert line.wire.is_closed

    def test_unless_they_take_long(self):
        line, exchange, gone = self.watched(half_closed_timeout_s=1)
        line.end().wait(0.5)
        assert gone == []
        line.wait(1)
        assert (gone, exchange.is_gone, line.wire.is_aborted) == ([True], True, True)

    @pytest.mark.parametrize("begun", [POST[:20], POST[:-1], CHUNKED[:-1]])
    def test_a_request_that_ends_before_its_end_is_refused(self, begun):
        line = Line().send(begun).end()
        assert (line.statuses, line.application.handled, line.wire.is_closed) == ([400], [], True)

    def test_an_idle_client_that_ends_its_side_is_let_go(self):
        assert Line().send(GET).end().wire.is_closed

    def test_the_application_hears_of_a_body_that_stays_away(self):
        gone = []

        def admit(exchange):
            exchange.on_gone = lambda: gone.append(exchange)
            return 100

        Line(Echo(wants=admit)).send(POST[:-1]).lose()
        assert len(gone) == 1

    def test_an_answer_while_the_connection_breaks_is_the_end_of_it(self):
        line, exchange, gone = self.watched()
        line.wire.abort()
        echo(exchange)
        line.settle()
        assert (gone, exchange.is_gone, line.wire.sent) == ([], True, b"")

    def test_a_second_answer_is_a_bug_that_harms_nobody(self, caplog):
        line = Line(Echo(later=True)).send(GET)
        echo(line.application.handled[0])
        echo(line.application.handled[0])
        assert line.statuses == [200]
        assert "answered twice" in caplog.text


class TestBugs:
    """An application that does not keep its part."""

    @pytest.mark.parametrize("request_bytes", [POST, POST[:-1]])
    def test_admit_fails(self, request_bytes, caplog):
        def admit(exchange):
            raise RuntimeError("oops")

        line = Line(Echo(wants=admit)).send(request_bytes)
        assert (line.statuses, "oops" in line.wire.sent.decode()) == ([500], False)
        assert "oops" in caplog.text
        assert caplog.records[-1].fields["request_id"].encode() == line.answers[0].headers[b"x-request-id"]

    @pytest.mark.parametrize("request_bytes", [POST, POST[:-1]])
    def test_admit_leaves_the_request(self, request_bytes, caplog):
        assert Line(Echo(wants=None)).send(request_bytes).statuses == [500]

    @pytest.mark.parametrize("pieces", [[POST], [POST[:-1], POST[-1:]]])
    def test_handle_fails(self, pieces, caplog):
        class Failing(Echo):
            def handle(self, exchange):
                raise RuntimeError("oops")

        line = Line(Failing()).send(*pieces)
        assert (line.statuses, line.is_over) == ([500], False)

    def test_a_header_with_a_line_break_is_not_written(self, caplog):
        line = Line(Echo(later=True)).send(b"GET /a HTTP/1.1\r\nhost: h\r\nx-request-id: mine\r\n\r\n")
        line.application.handled[0].respond(200, [(b"x-a", b"1\r\nx-b: 2")], b"")
        assert (line.statuses, line.answers[0].headers[b"x-request-id"]) == ([500], b"mine")

    def test_what_it_hears_with_fails(self, caplog):
        def fail(*_):
            raise RuntimeError("oops")

        line = Line(Echo(later=True)).send(GET)
        line.application.handled[0].on_gone = fail
        line.lose()

        def admit(exchange):
            exchange.on_refused = fail
            return 1

        assert Line(Echo(wants=admit)).send(POST).statuses == [413]


class TestDeadlines:
    def test_a_silent_connection(self):
        line = Line(first_byte_timeout_s=10).wait(9)
        assert not line.is_over
        assert line.wait(2).wire.is_closed
        assert line.wire.sent == b""

    def test_between_requests(self):
        line = Line(first_byte_timeout_s=10, idle_timeout_s=60).wait(9).send(GET).wait(59)
        assert not line.is_over
        line.send(GET).wait(59)
        assert not line.is_over
        assert line.wait(4).wire.is_closed
        assert line.statuses == [200, 200]

    def test_a_dripping_head(self):
        line = Line(head_timeout_s=10)
        for byte in bytewise(POST[:9]):
            line.send(byte).wait(1)
        assert not line.is_over
        line.send(POST[9:10]).wait(2)
        assert (line.statuses, line.is_over) == ([408], True)

    def test_a_dripping_body(self):
        line = Line(body_timeout_s=10, min_bytes_per_s=100).send(post(b"content-length: 100000"))
        for _ in range(11):
            line.send(b"x" * 50).wait(1)
            if line.is_over:
                break
        assert (line.statuses, line.is_over) == ([408], True)
        assert "100 bytes per second" in line.answers[0].json["error"]

    def test_a_slow_body_that_keeps_the_pace(self):
        line = Line(body_timeout_s=10, min_bytes_per_s=100).send(post(b"content-length: 6000"))
        for _ in range(60):
            line.send(b"x" * 100).wait(1)
        assert line.statuses == [200]

    def test_an_answer_may_take_its_time(self):
        line = Line(Echo(later=True)).send(POST).wait(10_000)
        echo(line.application.handled[0])
        assert line.statuses == [200]

    def test_a_client_that_does_not_read(self):
        line = Line(Echo(later=True), write_timeout_s=10, min_bytes_per_s=1000).send(GET)
        line.wire.unsent = 1_000_000
        line.application.handled[0].respond(200, [], b"x" * 1_000_000)
        line.protocol.pause_writing()
        assert not line.wire.is_reading
        line.wire.unsent = 900_000
        line.wait(12)
        assert not line.is_over
        line.wire.unsent = 899_000
        assert line.wait(12).wire.is_aborted

    def stalled(self, unsent: int, beside: Line | None = None) -> Line:
        """A client that does not take so much of its answer; 1 MiB may wait for all clients together."""
        line = Line(Echo(later=True), max_buffered_bytes=2**20) if beside is None else Line(beside.application, beside.connections)
        line.send(GET)
        line.wire.unsent = unsent
        echo(line.application.handled[-1])
        line.protocol.pause_writing()
        return line.settle()

    def test_too_much_that_clients_do_not_take_is_cut(self):
        one = self.stalled(900_000)
        other = self.stalled(200_000, one)
        assert (one.wire.is_aborted, other.wire.is_aborted, one.refused) == (False, True, {503: 1})
        assert one.connections.unsent_bytes == 900_000
        one.wire.unsent = 800_000
        assert not one.wait(22).is_over
        assert not self.stalled(200_000, one).is_over
        one.wire.unsent = 1_000
        one.protocol.resume_writing()
        assert one.connections.unsent_bytes == 200_000

    def test_a_client_that_reads_slowly_may_go_on(self):
        line = Line(Echo(later=True)).send(GET + GET)
        line.protocol.pause_writing()
        echo(line.application.handled[0])
        assert len(line.application.handled) == 1
        line.protocol.resume_writing()
        assert (len(line.application.handled), line.wire.is_reading) == (2, True)

    def test_a_client_that_neither_reads_nor_closes(self):
        line = Line(write_timeout_s=10).send(b"GET / HTTP/1.0\r\n\r\n")
        assert line.wire.is_closed
        line = Line(Echo(later=True), write_timeout_s=10).send(b"GET / HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\nmore")
        line.wire.unsent = 100
        echo(line.application.handled[0])
        assert not line.wire.is_closed
        assert line.wait(12).wire.is_aborted


class TestCaps:
    def test_connections_in_all(self):
        first = Line(max_connections=2)
        second = Line(first.application, first.connections)
        third = Line(first.application, first.connections)
        assert (third.statuses, third.wire.is_ended) == ([503], True)
        third.end()
        second.send(GET).lose()
        assert Line(first.application, first.connections).send(GET).statuses == [200]

    def test_connections_of_one_client(self):
        first = Line(address=("192.0.2.1", 1), max_connections_per_client=1)
        second = Line(first.application, first.connections, ("192.0.2.1", 2))
        other = Line(first.application, first.connections, ("192.0.2.2", 1))
        assert (second.statuses, other.statuses) == ([503], [])
        second.end()
        first.lose()
        assert Line(first.application, first.connections, ("192.0.2.1", 3)).send(GET).statuses == [200]

    def test_what_does_not_fit_at_all_is_closed_without_a_word(self, monkeypatch):
        monkeypatch.setattr("services.gateway.http.connections.SPARE_CONNECTIONS", 1)
        lines = [Line(max_connections=1)]
        lines += [Line(lines[0].application, lines[0].connections) for _ in range(2)]
        assert [line.statuses for line in lines] == [[], [503], []]
        assert lines[2].wire.is_aborted

    @pytest.mark.parametrize(
        ("address", "key"),
        [
            ("192.0.2.1", "192.0.2.1"),
            ("::ffff:192.0.2.1", "192.0.2.1"),
            ("2001:db8::1", "2001:db8::/64"),
            ("2001:db8::2", "2001:db8::/64"),
            ("fe80::1%eth0", "fe80::/64"),
            ("127.0.0.1", None),
            ("::1", None),
            ("::ffff:127.0.0.1", None),
        ],
    )
    def test_clients_are_told_apart_by_address(self, address, key):
        assert client_key((address, 1)) == key
        assert client_key(None) is None


class TestDrain:
    async def drained(self, *lines: Line) -> None:
        connections = lines[0].connections
        connections.loop = asyncio.get_running_loop()
        draining = asyncio.create_task(connections.drain(5))
        await asyncio.sleep(0)
        for line in lines:
            line.settle()
        return draining

    async def test_idle_connections_close_and_requests_in_flight_are_answered(self):
        idle = Line(Echo(later=True)).send(GET)
        echo(idle.application.handled[0])
        busy = Line(idle.application, idle.connections).send(POST)
        begun = Line(idle.application, idle.connections).send(POST[:10])
        draining = await self.drained(idle, busy, begun)
        assert idle.wire.is_closed
        assert not busy.wire.is_closed
        assert not begun.wire.is_closed
        echo(busy.application.handled[1])
        busy.settle()
        begun.send(POST[10:])
        echo(begun.application.handled[2])
        begun.settle()
        assert busy.answers[0].closes
        assert begun.wire.is_closed
        async with asyncio.timeout(5):
            await draining

    async def test_what_does_not_end_is_broken_off(self):
        line = Line(Echo(later=True)).send(GET)
        line.connections.loop = asyncio.get_running_loop()
        line.wire.on_abort = line.settle
        draining = asyncio.create_task(line.connections.drain(0.01))
        async with asyncio.timeout(5):
            await draining
        assert line.wire.is_aborted


def test_what_is_accepted_means_the_same_to_other_servers():
    for name, (request_bytes, *_rest) in GOOD.items():
        if name != "an empty line before":  # h11 does not take it
            _agree(request_bytes, Line().send(request_bytes).answers[0])


FIELDS = st.sampled_from(
    [
        b"x-a: 1",
        b"X-A:2",
        b"x-b: \t",
        b"content-length: 3",
        b"Content-Length:3 ",
        b"content-length: 03",
        b"content-length: +3",
        b"content-length: 3, 3",
        b"transfer-encoding: chunked",
        b"Transfer-Encoding: Chunked",
        b"transfer-encoding : chunked",
        b"transfer-encoding: identity",
        b" folded",
        b"connection: close",
        b"upgrade: websocket",
        b"connection: upgrade",
        b"expect: 100-continue",
        b"host: h",
        b"x\x00: 1",
        b"nothing",
        b"x: \xff",
    ]
)
LINES = st.sampled_from(
    [
        b"GET /a HTTP/1.1",
        b"POST /a?b HTTP/1.1",
        b"POST /a HTTP/1.0",
        b"HEAD / HTTP/1.1",
        b"get / HTTP/1.1",
        b"POST  / HTTP/1.1",
        b"GET / HTTP/2.0",
    ]
)
BODIES = st.sampled_from(
    [
        b"",
        b"abc",
        b"3\r\nabc\r\n0\r\n\r\n",
        b"3;x=y\r\nabc\r\n0\r\na: b\r\n\r\n",
        b"3\nabc\r\n0\r\n\r\n",
        b"0\r\n\r\n",
        b"03\r\nabc\r\n0\r\n\r\n",
    ]
)


@st.composite
def heads_and_bodies(draw) -> bytes:
    fields = draw(st.lists(FIELDS, max_size=4))
    line = draw(LINES)
    return b"\r\n".join([line, b"host: h", *fields, b"", draw(BODIES)])


def _agree(request_bytes: bytes, answer: Answer) -> None:
    """h11 and llhttp see the same request in what we accepted."""
    asked = answer.json
    theirs = h11.Connection(h11.SERVER, max_incomplete_event_size=100_000)
    theirs.receive_data(request_bytes)
    head = theirs.next_event()
    assert isinstance(head, h11.Request)
    body = b""
    while isinstance(event := theirs.next_event(), h11.Data):
        body += bytes(event.data)
    assert isinstance(event, h11.EndOfMessage)
    assert (asked["method"], asked["body"]) == (head.method.decode(), body.decode("latin-1"))
    assert {name.decode() for name, _ in head.headers} == set(asked["headers"])
    if "upgrade" in asked["headers"]:
        return  # httptools then takes the body for another protocol; Java's client offers h2c with every POST
    seen = Seen()
    with contextlib.suppress(httptools.HttpParserError):  # what follows the request may be anything
        httptools.HttpRequestParser(seen).feed_data(request_bytes)
    assert seen.bodies[0].decode("latin-1") == asked["body"]


class Seen:
    """What llhttp tells of requests."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self._body = b""

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        self.bodies.append(self._body)
        self._body = b""


@settings(max_examples=200, deadline=None)
@given(heads_and_bodies())
def test_nobody_reads_another_request_out_of_what_is_accepted(request_bytes):
    line = Line().send(request_bytes)
    if line.application.handled and line.application.handled[0].method != "HEAD":
        _agree(request_bytes, next(answer for answer in line.answers if answer.status != 100))


MUTATIONS = st.lists(st.tuples(st.integers(0, 400), st.sampled_from(["insert", "delete", "replace"]), st.binary(max_size=3)), max_size=3)
REQUESTS = st.lists(
    st.sampled_from(
        [GET, POST, CHUNKED, HEAD, OLD, post(b"content-length: 0"), post(b"expect: 100-continue", b"content-length: 2", body=b"ab")]
    ),
    min_size=1,
    max_size=5,
)
CUTS = st.lists(st.integers(1, 600), max_size=6)


def mutated(data: bytes, changes: list[tuple[int, str, bytes]]) -> bytes:
    for at, kind, new in changes:
        at %= len(data) + 1
        data = (
            data[:at] + new + data[at + (0 if kind == "insert" else max(1, len(new))) :]
            if kind != "delete"
            else data[:at] + data[at + 1 + len(new) :]
        )
    return data


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[begin:end] for begin, end in pairwise(places) if begin < end]


def ask(pieces: list[bytes]) -> Line:
    line = Line(half_closed_timeout_s=4)  # deadlines are looked at every second
    for piece in pieces:
        if line.is_over:
            break
        line.send(piece)
    return line


@settings(max_examples=300, deadline=None)
@given(REQUESTS, CUTS)
def test_how_requests_are_cut_into_packets_changes_nothing(requests, cuts):
    data = b"".join(requests)
    whole, cut = ask([data]), ask(split(data, cuts))
    expected = [answer for answer in whole.answers if answer.status != 100]
    assert [answer for answer in cut.answers if answer.status != 100] == expected
    assert cut.is_over == whole.is_over


@settings(max_examples=200, deadline=None)
@given(REQUESTS, MUTATIONS, CUTS)
def test_whatever_comes_the_answers_are_http_and_the_connection_ends(requests, changes, cuts):
    data = mutated(b"".join(requests), changes)
    whole, cut = ask([data]), ask(split(data, cuts))
    for line in (whole, cut):
        assert all(answer.status in (100, 200) for answer in line.answers[:-1])
        assert line.is_over or all(answer.status in (100, 200) for answer in line.answers)
    assert [s for s in whole.statuses if s == 200] == [s for s in cut.statuses if s == 200]
    for line in (whole, cut):
        if not line.wire.is_closed:
            line.wait(80)
        assert line.wire.is_closed
        assert len(line.connections) == 0
        assert line.connections.held_bytes == 0


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300), CUTS)
def test_noise_is_refused(data, cuts):
    line = ask(split(data, cuts))
    assert line.application.handled == []
    assert not line.wait(80).statuses or line.statuses[0] >= 400
    assert line.wire.is_closed


class TestAsgi:
    """ASGI applications: both bodies stream."""

    @pytest.fixture
    def start(self):
        """A line to an ASGI application, on the running loop."""
        lines = []

        def make(app, **limits) -> Line:
            application = Echo(wants=lambda exchange: app)
            line = Line(application, Connections(application, HttpSettings(**limits), asyncio.get_running_loop()))
            lines.append(line)
            return line

        yield make
        for line in lines:
            line.connections.close()

    @staticmethod
    async def reached(condition: Callable[[], object]) -> None:
        async with asyncio.timeout(10):
            while not condition():  # noqa: ASYNC110 - what is waited for has no event
                await asyncio.sleep(0)

    @staticmethod
    async def whole(receive) -> bytes:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body", False):
                return body

    @staticmethod
    async def plain(send, body: bytes, *headers: tuple[bytes, bytes], status: int = 200) -> None:
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def tell(self, scope, receive, send):
        """An application that answers with its scope and body."""
        told = {key: value for key, value in scope.items() if key not in ("headers", "asgi")}
        told |= {"body": await self.whole(receive), "headers": dict(scope["headers"])}
        body = repr(told).encode()
        await self.plain(send, body, (b"Content-Length", b"%d" % len(body)))

    @pytest.mark.parametrize("pieces", [[POST], bytewise(POST), [CHUNKED], bytewise(CHUNKED)])
    async def test_it_sees_the_request(self, start, pieces):
        line = start(self.tell).send(*pieces)
        await self.reached(lambda: line.wire.sent)
        (answer,) = line.answers
        told = ast.literal_eval(answer.body.decode())
        assert (told["type"], told["method"], told["body"]) == ("http", "POST", b"hello world")
        assert (told["client"], told["server"], told["scheme"]) == (("127.0.0.1", 50_000), ("127.0.0.1", 8080), "http")
        assert (line.wire.writes, answer.closes) == (1, False)

    async def test_its_path_is_decoded(self, start):
        line = start(self.tell).send(b"GET /%C3%BC%2F%ff?a=%20 HTTP/1.1\r\nhost: h\r\n\r\n")
        await self.reached(lambda: line.wire.sent)
        told = ast.literal_eval(line.answers[0].body.decode())
        assert (told["path"], told["raw_path"], told["query_string"]) == ("/\u00fc/\ufffd", b"/%C3%BC%2F%ff", b"a=%20")

    async def test_a_slow_reader_stops_the_sender(self, start):
        go_on = asyncio.Event()
        taken = 0

        async def app(scope, receive, send):
            nonlocal taken
            await go_on.wait()
            while True:
                message = await receive()
                taken += len(message["body"])
                if not message["more_body"]:
                    break
            await self.plain(send, b"")

        line = start(app).send(post(b"content-length: 10000000"))
        sent = 0
        while line.wire.is_reading:
            line.send(b"x" * 65_536)
            sent += 65_536
        assert sent <= BUFFER_BYTES + 65_536
        go_on.set()
        while sent < 10_000_000:
            await self.reached(lambda: line.wire.is_reading)
            piece = b"x" * min(65_536, 10_000_000 - sent)
            sent += len(piece)
            line.send(piece)
        await self.reached(lambda: line.wire.sent)
        assert (line.statuses, taken) == ([200], 10_000_000)

    async def test_a_sender_that_is_stopped_is_not_too_slow(self, start):
        async def app(scope, receive, send):
            await asyncio.Event().wait()

        line = start(app, body_timeout_s=0.01).send(post(b"content-length: 10000000"))
        while line.wire.is_reading:
            line.send(b"x" * 65_536)
        line.protocol.expire()
        assert not line.is_over
        line.lose()
        await self.ended(line)

    @staticmethod
    async def ended(line: Line) -> None:
        """Break off what still runs."""
        await line.connections.drain(0)

    async def test_parts_are_sent_as_they_come(self, start):
        go_on = asyncio.Event()

        async def app(scope, receive, send):
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
            for part in (b"one", b"", b"two"):
                await go_on.wait()
                go_on.clear()
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b""})

        line = start(app).send(GET + GET)
        await self.reached(lambda: line.wire.sent.endswith(b"\r\n\r\n"))
        go_on.set()
        await self.reached(lambda: line.wire.sent.endswith(b"3\r\none\r\n"))
        for _ in range(2):
            go_on.set()
            await self.reached(lambda: not go_on.is_set())
        await self.reached(lambda: len(line.application.admitted) == 2)
        assert read_answers(bytes(line.wire.sent).partition(b"0\r\n\r\n")[0] + b"0\r\n\r\n")[0].body == b"onetwo"
        line.lose()
        await self.ended(line)

    async def test_without_a_length_http_1_0_ends_with_the_connection(self, start):
        async def app(scope, receive, send):
            await self.plain(send, b"all of it")

        line = start(app).send(b"GET / HTTP/1.0\r\nconnection: keep-alive\r\n\r\n")
        await self.reached(lambda: line.wire.is_closed)
        (answer,) = line.answers
        assert (answer.body, answer.closes, b"transfer-encoding" in answer.headers) == (b"all of it", True, False)

    @pytest.mark.parametrize("headers", [(), ((b"content-length", b"5"),)])
    async def test_head_is_answered_without_a_body(self, start, headers):
        async def app(scope, receive, send):
            await self.plain(send, b"hello", *headers)

        line = start(app).send(HEAD)
        await self.reached(lambda: line.wire.sent)
        assert (line.statuses, line.answers[0].body) == ([200], b"")
        assert line.send(HEAD) is line

    async def test_a_stream_is_over_for_head_when_it_begins(self, start):
        heard = []

        async def app(scope, receive, send):
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
            await send({"type": "http.response.body", "body": b"data", "more_body": True})
            heard.append(await receive())

        line = start(app).send(HEAD + HEAD)
        await self.reached(lambda: len(heard) == 2)
        assert ([message["type"] for message in heard], line.is_over) == (["http.disconnect"] * 2, False)
        assert [answer.body for answer in line.answers] == [b"", b""]

    async def test_it_hears_that_the_client_is_gone(self, start):
        heard = []

        async def app(scope, receive, send):
            while True:
                heard.append(await receive())
                if heard[-1]["type"] == "http.disconnect":
                    break
            await self.plain(send, b"to nobody")

        line = start(app).send(GET)
        await self.reached(lambda: heard)
        line.lose()
        await self.reached(lambda: heard[-1]["type"] == "http.disconnect")
        await self.reached(lambda: not line.connections.tasks)
        assert line.wire.sent == b""

    async def test_a_client_that_reads_slowly_slows_the_application(self, start):
        sent = 0

        async def app(scope, receive, send):
            nonlocal sent
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for _ in range(10):
                await send({"type": "http.response.body", "body": b"x" * 1000, "more_body": True})
                sent += 1
                if sent == 3:
                    line.protocol.pause_writing()
            await send({"type": "http.response.body", "body": b""})

        line = start(app).send(GET)
        await self.reached(lambda: sent == 3)
        for _ in range(5):
            await asyncio.sleep(0)
        assert (sent, line.wire.is_reading) == (3, False)
        line.protocol.resume_writing()
        await self.reached(lambda: line.wire.sent.endswith(b"0\r\n\r\n"))
        assert (len(line.answers[0].body), line.wire.is_reading) == (10_000, True)

    async def test_an_early_answer_closes_after_the_rest_was_thrown_away(self, start):
        async def app(scope, receive, send):
            await self.plain(send, b"no", (b"content-length", b"2"), status=413)

        line = start(app).send(post(b"content-length: 1000000"))
        await self.reached(lambda: line.wire.is_ended)
        assert (line.statuses, line.answers[0].closes) == ([413], True)
        line.send(b"x" * 1000).end()
        assert line.wire.is_closed

    async def test_the_client_goes_on_when_the_application_wants_the_body(self, start):
        line = start(self.tell).send(post(b"expect: 100-continue", b"content-length: 3"))
        await self.reached(lambda: line.wire.sent)
        assert line.statuses == [100]
        line.send(b"abc")
        await self.reached(lambda: len(line.wire.sent) > 100)
        assert line.statuses == [100, 200]

    async def test_a_half_closed_client_reads_a_stream_to_its_end(self, start):
        go_on = asyncio.Event()

        async def app(scope, receive, send):
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await go_on.wait()
            await send({"type": "http.response.body", "body": b"all of it"})

        line = start(app).send(GET)
        await self.reached(lambda: line.wire.sent)
        line.end()
        line.protocol.expire()
        go_on.set()
        await self.reached(lambda: line.wire.is_closed)
        assert (line.answers[0].body, line.wire.is_aborted) == (b"all of it", False)

    async def test_a_slow_application_does_not_make_the_client_slow(self, start):
        line = start(lambda *_: asyncio.Event().wait()).send(post(b"expect: 100-continue", b"content-length: 3"))
        line.protocol.expire()
        assert not line.is_over
        await self.ended(line)

    async def test_a_slow_body_is_refused_and_ends_for_the_application(self, start):
        heard = []

        async def app(scope, receive, send):
            while not heard or heard[-1]["type"] != "http.disconnect":
                heard.append(await receive())

        line = start(app).send(post(b"content-length: 1000"), b"abc")
        await self.reached(lambda: heard)
        line.protocol.expire()
        assert (line.statuses, line.wire.is_ended) == ([408], True)
        await self.reached(lambda: heard[-1]["type"] == "http.disconnect")

    @pytest.mark.parametrize("bad", ["raises", "returns", "two starts", "too long", "too short", "line break"])
    async def test_an_application_with_a_bug_is_a_500_or_a_broken_connection(self, start, bad, caplog):
        async def app(scope, receive, send):
            beginning = {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]}
            if bad == "raises":
                raise RuntimeError("oops")
            if bad == "line break":
                await send({"type": "http.response.start", "status": 200, "headers": [(b"x", b"a\nb")]})
            if bad != "returns":
                await send(beginning)
            if bad == "two starts":
                await send(beginning)
            if bad == "too long":
                await send({"type": "http.response.body", "body": b"abc"})
            if bad == "too short":
                await send({"type": "http.response.body", "body": b"a"})

        line = start(app).send(GET)
        await self.reached(lambda: line.wire.sent or line.wire.is_aborted)
        if bad in ("raises", "returns", "line break"):
            assert line.statuses == [500]
            assert line.answers[0].headers[b"x-request-id"]
        else:
            assert line.wire.is_aborted
        assert "a bug" in caplog.text

    async def test_a_pipelined_request_waits_for_the_streamed_answer(self, start):
        line = start(self.tell).send(POST + CHUNKED)
        await self.reached(lambda: len(line.application.admitted) == 2)
        await self.reached(lambda: len(line.answers) == 2)
        assert line.statuses == [200, 200]
