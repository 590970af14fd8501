"""A runner that is none: it speaks the wire on a real socket and does what a test wants."""

import asyncio
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from libs.inference.tokens import runner_token
from libs.runner.wire import FrameReader, decode_tensors, describe_tensors, encode_frame, encode_tensors, read_descriptions
from schemas.registry import Replica

KEY = b"the platform's runner key"


class FakeRunner:
    """Speaks the runner's wire and adds ``offset`` to the sum of each row.

    ``behave`` is called for each infer with how many there were; it may return an error ``(kind, message)``, ``"drop"`` (close the
    connection), ``"hang"`` (never answer), or an awaitable to wait for. ``rows`` are the rows of each infer; a ping says ``busy_s``;
    ``cancelled`` are the ids of requests that were called off.
    """

    def __init__(self, replica_id: str, path: Path, offset: float = 0.0) -> None:
        self.replica = Replica(replica_id=replica_id, address=f"unix:{path}")
        self.offset = offset
        self.asked: list[dict[str, Any]] = []
        self.rows: list[Any] = []
        self.busy_s = 0.0
        self.span: Any = None
        self.model_s: Any = None
        self.cancelled: list[int] = []
        self.behave: Callable[[int], Any] = lambda _: None
        self._path = path
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self) -> None:
        self._path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._serve, str(self._path))

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            for writer in self._writers:
                writer.close()
            self._path.unlink(missing_ok=True)
            await asyncio.sleep(0)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        frames = FrameReader()
        try:
            while data := await reader.read(65_536):
                for frame in frames.feed(data):
                    if not await self._answer(frame, writer):
                        return
        except ConnectionError:
            return
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _answer(self, frame: Any, writer: asyncio.StreamWriter) -> bool:
        meta: dict[str, Any] = {"id": frame.meta["id"], "ok": True}
        head, tail = b"", []
        if frame.meta["op"] == "cancel":
            self.cancelled.append(frame.meta["id"])
            return True
        if frame.meta["op"] == "hello" and frame.meta["token"] != runner_token(KEY, self.replica.replica_id):
            meta = {"id": frame.meta["id"], "ok": False, "error": {"kind": "unauthenticated", "message": "no"}}
        elif frame.meta["op"] == "ping":
            meta["busy_s"] = self.busy_s
        elif frame.meta["op"] == "infer":
            rows = decode_tensors(read_descriptions(json.loads(frame.head)["inputs"]), frame.tail)["input"]
            self.asked.append(frame.meta)
            self.rows.append(rows.tolist())
            behaviour = self.behave(len(self.asked))
            if inspect.isawaitable(behaviour):
                behaviour = await behaviour
            if behaviour == "drop":
                return False
            if behaviour == "hang":
                return True
            if behaviour is not None:
                meta = {"id": frame.meta["id"], "ok": False, "error": {"kind": behaviour[0], "message": behaviour[1]}}
            else:
                specs, tail = encode_tensors({"predict": np.asarray(rows.sum(axis=1) + self.offset)})
                head = json.dumps({"outputs": describe_tensors(specs)}).encode()
            if self.model_s is not None:
                meta["model_s"] = self.model_s
            if frame.meta.get("traceparent") or self.span is not None:
                meta["span"] = self.span or {"span_id": "00000000000000aa", "start_ns": 1, "end_ns": 2}
        for part in encode_frame(meta, head, tail):
            writer.write(part)
        await writer.drain()
        return True
