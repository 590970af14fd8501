"""The gateway's HTTP server in a process of its own, on real sockets: slow, silent, many and rude clients."""

import asyncio
import contextlib
import hashlib
import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from socket import SO_LINGER, SOL_SOCKET

import httpx
import psutil
import pytest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]
PATIENCE_S = 60.0
"""Generous: only a server that does not do its part at all takes so long."""

GET = b"GET /x HTTP/1.1\r\nhost: h\r\n\r\n"


class Server:
    """The process."""

    def __init__(self, **limits: float) -> None:
        command = [sys.executable, "-m", "tests.integration.http_server", json.dumps(limits)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())
        self.url = f"http://127.0.0.1:{self.port}"

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def ask(self, request: bytes) -> bytes:
        """What comes back until the connection ends."""
        reader, writer = await self.connect()
        writer.write(request)
        answer = await read_all(reader)
        await close(writer)
        return answer

    @property
    def memory_bytes(self) -> int:
        return psutil.Process(self.process.pid).memory_info().rss

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def wait(self) -> int:
        try:
            return self.process.wait(PATIENCE_S)
        finally:
            self.process.kill()
            self.process.wait()
            self.process.stdout.close()


@asynccontextmanager
async def serving(**limits: float) -> AsyncIterator[Server]:
    server = Server(**limits)
    try:
        yield server
        assert server.process.poll() is None, "the server died"
    finally:
        server.stop()


async def read_all(reader: asyncio.StreamReader) -> bytes:
    async with asyncio.timeout(PATIENCE_S):
        data = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := await reader.read(65_536):
                data += piece
        return data


async def close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


async def test_normal_requests_are_answered_beside_500_stalled_connections():
    stalled = [b"", b"GET / HT", b"GET / HTTP/1.1\r\nhost: h\r\nx-a: ", b"POST /x HTTP/1.1\r\nhost: h\r\ncontent-length: 100\r\n\r\nabc"]
    stalled.append(b"POST /stream HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n")
    async with serving() as server, httpx.AsyncClient(base_url=server.url, trust_env=False, timeout=PATIENCE_S) as client:
        connections = []
        for number in range(500):
            reader, writer = await server.connect()
            writer.write(stalled[number % len(stalled)])
            connections.append((reader, writer))
        for number in range(200):
            answer = await client.post("/x", content=b"%d" % number)
            assert (answer.status_code, answer.content) == (200, b"%d" % number)
        for _, writer in connections:
            await close(writer)


async def test_silent_and_dripping_clients_are_cut_at_their_deadlines():
    limits = {"first_byte_timeout_s": 3, "idle_timeout_s": 0.2, "head_timeout_s": 3, "body_timeout_s": 0.4}
    async with serving(**limits) as server:
        began = time.monotonic()
        silent, idle, head, body = await asyncio.gather(
            server.ask(b""),
            server.ask(GET),
            drip(server, GET[:-2] + b"x-a: ", b"1" * 10_000),
            drip(server, b"POST /x HTTP/1.1\r\nhost: h\r\ncontent-length: 10000\r\n\r\n", b"x" * 10_000),
        )
        assert silent == b""
        assert idle.startswith(b"HTTP/1.1 200")
        assert idle.count(b"HTTP/1.1") == 1
        assert head.startswith(b"HTTP/1.1 408")
        assert body.startswith(b"HTTP/1.1 408")
        assert time.monotonic() - began < PATIENCE_S


async def drip(server: Server, begin: bytes, rest: bytes) -> bytes:
    """Send the beginning at once and the rest byte by byte, until the server has had enough."""
    reader, writer = await server.connect()
    writer.write(begin)
    answer = asyncio.create_task(read_all(reader))
    for at in range(len(rest)):
        if answer.done():
            break
        writer.write(rest[at : at + 1])
        await asyncio.wait([answer], timeout=0.01)
    await close(writer)
    return await answer


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
async def test_a_client_that_does_not_read_its_answer_is_closed(version):
    async with serving(write_timeout_s=0.4) as server:
        reader, writer = await server.connect()
        writer.write(b"GET /large?50000000 HTTP/%b\r\nhost: h\r\n\r\n" % version)
        async with asyncio.timeout(PATIENCE_S):
            while psutil.Process(server.process.pid).net_connections("tcp") != listening(server):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        assert len(await read_all(reader)) < 50_000_000
        await close(writer)


def listening(server: Server) -> list[object]:
    return [each for each in psutil.Process(server.process.pid).net_connections("tcp") if each.status == psutil.CONN_LISTEN]


async def test_a_client_that_reads_slowly_gets_all_of_its_answer():
    timeout_s, length, took_s = 4.0, 50_000_000, 8.0
    async with serving(write_timeout_s=timeout_s, min_bytes_per_s=1000) as server:
        reader, writer = await server.connect()
        writer.write(b"GET /large?%d HTTP/1.0\r\n\r\n" % length)
        size, began = 0, time.monotonic()
        async with asyncio.timeout(4 * PATIENCE_S):
            while piece := await reader.read(500_000):
                size += len(piece)
                await asyncio.sleep(began + took_s * size / length - time.monotonic())
        assert size > length
        await close(writer)


async def test_a_client_that_went_away_is_noticed():
    async with serving(half_closed_timeout_s=0.2) as server:
        for number, resets in enumerate((True, False)):
            _, writer = await server.connect()
            writer.write(b"GET /slow?1000 HTTP/1.1\r\nhost: h\r\n\r\n")
            await until_counted(server, f"{number + 1} begun, {number} gone")
            if resets:
                writer.get_extra_info("socket").setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
            await close(writer)
            await until_counted(server, f"{number + 1} begun, {number + 1} gone")


async def until_counted(server: Server, expected: str) -> None:
    """Wait until so many slow requests have begun, and lost their client."""
    async with httpx.AsyncClient(base_url=server.url, trust_env=False) as client, asyncio.timeout(PATIENCE_S):
        while (await client.get("/slow/counts")).text != expected:  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.02)


async def test_a_half_closed_client_gets_its_answer():
    async with serving(half_closed_timeout_s=PATIENCE_S) as server:
        reader, writer = await server.connect()
        writer.write(b"GET /slow?0.2 HTTP/1.1\r\nhost: h\r\n\r\n")
        writer.write_eof()
        assert (await read_all(reader)).endswith(b"at last")
        await close(writer)


async def test_a_refused_client_reads_why_although_it_is_still_sending():
    async with serving() as server:
        reader, writer = await server.connect()
        writer.write(b"POST /refused HTTP/1.1\r\nhost: h\r\ncontent-length: 20000000\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            for _ in range(200):
                writer.write(b"x" * 100_000)
                await writer.drain()
        assert (await read_all(reader)).endswith(b"who are you?")
        await close(writer)


async def test_connections_beyond_the_most_are_told_so():
    async with serving(max_connections=10) as server:
        kept = [await server.connect() for _ in range(10)]
        refused = await asyncio.gather(*(server.ask(GET) for _ in range(20)))
        assert all(answer.startswith(b"HTTP/1.1 503") for answer in refused)
        for _, writer in kept[:5]:
            await close(writer)
        async with asyncio.timeout(PATIENCE_S):
            while not (await server.ask(GET[:-2] + b"connection: close\r\n\r\n")).startswith(b"HTTP/1.1 200"):
                pass
        for _, writer in kept[5:]:
            await close(writer)


async def test_a_long_upload_streams_in_little_memory():
    size_bytes, piece = 300 * 2**20, b"0123456789abcdef" * 65_536
    digest = hashlib.sha256()

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(size_bytes // len(piece)):
            digest.update(piece)
            yield piece

    async with serving() as server, httpx.AsyncClient(base_url=server.url, trust_env=False, timeout=PATIENCE_S) as client:
        before = server.memory_bytes
        answer = await client.post("/stream", content=pieces())
        assert answer.text == f"{size_bytes} {digest.hexdigest()}"
        assert server.memory_bytes - before < size_bytes // 4


async def test_pipelined_requests_are_answered_in_order():
    async with serving() as server:
        requests = [b"POST /x HTTP/1.1\r\nhost: h\r\ncontent-length: 4\r\n\r\n%04d" % number for number in range(1000)]
        reader, writer = await server.connect()
        writer.write(b"".join(requests))
        async with asyncio.timeout(PATIENCE_S):
            for number in range(1000):
                assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
                assert await reader.readexactly(4) == b"%04d" % number
        await close(writer)


async def test_rude_bytes_never_stop_the_server():
    rude = [
        b"\x16\x03\x01\x02\x00",
        b"\x00" * 1000,
        b"GET / HTTP/1.1\r\n" * 3000,
        b"\r\n" * 50_000,
        b"A" * 100_000,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ]
    async with serving() as server:
        answers = await asyncio.gather(*(server.ask(each) for each in rude * 5))
        assert {answer[:12] for answer in answers} <= {b"HTTP/1.1 400", b"HTTP/1.1 414", b"HTTP/1.1 431", b"HTTP/1.1 505"}
        assert (await server.ask(GET[:-2] + b"connection: close\r\n\r\n")).startswith(b"HTTP/1.1 200")


async def test_a_terminated_server_answers_what_it_has_begun():
    server = Server()
    try:
        idle, busy = await server.connect(), await server.connect()
        idle[1].write(GET)
        await idle[0].readuntil(b"\r\n\r\n")
        busy[1].write(b"GET /slow?5 HTTP/1.1\r\nhost: h\r\n\r\n")
        await until_counted(server, "1 begun, 0 gone")
        server.process.send_signal(signal.SIGTERM)
        assert await read_all(idle[0]) == b""
        answer = await read_all(busy[0])
        assert b"connection: close" in answer
        assert answer.endswith(b"at last")
        with pytest.raises(ConnectionError):
            await server.connect()
        for _, writer in (idle, busy):
            await close(writer)
    finally:
        code = server.wait()
    assert code == 0
