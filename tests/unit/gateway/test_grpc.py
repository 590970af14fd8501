"""The gRPC door before a real gRPC client, with a data plane that is a fake."""

import asyncio
import hashlib
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc
import numpy as np
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest, ServerReflectionResponse

from libs.errors import (
    ConfigurationError,
    ConflictError,
    DeadlineExceededError,
    InvalidArgumentError,
    MillraceError,
    NotFoundError,
    NotReadyError,
    OverloadedError,
)
from libs.inference import v2_grpc
from libs.inference.errors import ModelError, RunnerGoneError
from libs.inference.oip_proto import open_inference_pb2 as oip
from libs.inference.requests import InferRequest, InferResponse
from libs.inference.routing import Route
from schemas.inference import Signature, TensorSpec
from services.gateway.access import AccessControl
from services.gateway.catalog import Catalog
from services.gateway.doors import v2
from services.gateway.health import Health
from services.gateway.predictions import Ask, Caller, Done, Prediction
from services.gateway.rpc import framing, health
from services.gateway.rpc.hpack import encode
from services.gateway.rpc.http2 import PREFACE
from services.gateway.rpc.inference import MOST_ASKED, SERVICE
from services.gateway.rpc.server import GrpcServer, methods
from services.gateway.settings import GrpcSettings
from services.gateway.tracing import Tracing
from tests.unit.gateway.conftest import deployment, endpoint
from tests.unit.gateway.rpc.test_http2 import DATA, HEADERS, SETTINGS, frame

SIGNATURE = Signature(
    inputs=(TensorSpec(name="x", datatype="FP32", shape=(-1, 2)),), outputs=(TensorSpec(name="sum", datatype="FP32", shape=(-1,)),)
)
ROUTE = Route("e", "e.m.3", "m", 3, SIGNATURE, ())
KEY = "a key that is long enough"


@dataclass(eq=False)
class Asked:
    """What the data plane was asked; ``settle`` answers it."""

    ask: Ask
    caller: Caller
    done: Done
    is_cancelled: bool = False

    def settle(self) -> None:
        try:
            request = self.ask.parse(SIGNATURE)
            answer = self.ask.write(Prediction(ROUTE, request, InferResponse({"sum": request.inputs["x"].sum(axis=1)})))
        except MillraceError as error:
            self.done(error)
        else:
            self.done(answer)


@dataclass
class Plane:
    """Adds rows up: at once, or when it is told to."""

    holds: bool = False
    error: MillraceError | None = None
    asked: list[Asked] = field(default_factory=list)

    def submit(self, ask: Ask, caller: Caller, done: Done) -> Asked:
        if ask.target.endpoint_name != "e":
            raise NotFoundError(f"there is no endpoint {ask.target.endpoint_name!r}")
        self.asked.append(Asked(ask, caller, done))
        if self.error is not None:
            done(self.error)
        elif not self.holds:
            self.asked[-1].settle()
        return self.asked[-1]

    def cancel(self, pending: Asked) -> None:
        pending.is_cancelled = True


@dataclass
class Door:
    """A gRPC server, a client's channel to it, and what is behind it."""

    server: GrpcServer
    channel: grpc.aio.Channel
    plane: Plane
    health: Health
    catalog: Catalog
    refused: list[tuple[str, str]]

    def call(self, method: str, answer: type, service: str = SERVICE) -> Callable:
        return self.channel.unary_unary(
            f"/{service}/{method}", request_serializer=lambda message: message.SerializeToString(), response_deserializer=answer.FromString
        )

    def infer(self, rows: object = ((1, 2),), *, model: str = "e", raw: bool = False, **arguments: object) -> grpc.aio.UnaryUnaryCall:
        return self.call("ModelInfer", oip.ModelInferResponse)(request(rows, model, raw), **arguments)

    def stream(self, **arguments: object) -> grpc.aio.StreamStreamCall:
        method = self.channel.stream_stream(
            f"/{SERVICE}/ModelStreamInfer",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=oip.ModelStreamInferResponse.FromString,
        )
        return method(**arguments)


def request(rows: object = ((1, 2),), model: str = "e", raw: bool = False, **fields: str) -> oip.ModelInferRequest:
    body = v2_grpc.write_request(InferRequest({"x": np.array(rows, np.float32)}, binary_data_output=raw), model)
    message = oip.ModelInferRequest.FromString(body)
    for name, value in fields.items():
        setattr(message, name, value)
    return message


@asynccontextmanager
async def opened(
    *, keys: dict[str, str] | None = None, message_bytes: int = 2**20, options: tuple = (), compression: object = None, **settings: object
) -> AsyncIterator[Door]:
    plane, state, catalog = Plane(), Health(), Catalog()
    state.caught_up = True
    access = AccessControl({name: hashlib.sha256(key.encode()).digest() for name, key in (keys or {}).items()})
    told = v2.handlers(catalog, state, batch_rows=100)
    refused: list[tuple[str, str]] = []
    server = GrpcServer(
        access,
        methods(plane, told, state, lambda name, _, reason: refused.append((name, reason))),  # type: ignore[arg-type]
        GrpcSettings(port=0, **settings),
        "127.0.0.1",
        Tracing(0.0),
        message_bytes=message_bytes,
        drain_timeout_s=5.0,
    )
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}", options, compression) as channel:
            yield Door(server, channel, plane, state, catalog, refused)
    finally:
        await server.stop()


@pytest.fixture
async def door() -> AsyncIterator[Door]:
    async with opened() as made:
        yield made


async def status(call: grpc.aio.Call) -> tuple[grpc.StatusCode, str]:
    """How a call ended."""
    return await call.code(), await call.details()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.001)


# Predictions


@pytest.mark.parametrize("raw", [False, True])
async def test_an_answer_comes_in_the_form_of_the_request(door: Door, raw: bool):
    answer = await door.infer([[1, 2], [3, 4]], raw=raw)
    assert (len(answer.raw_output_contents), len(answer.outputs[0].contents.fp32_contents)) == ((1, 0) if raw else (0, 2))
    assert v2_grpc.read_response(answer.SerializeToString()).outputs["sum"].tolist() == [3.0, 7.0]


async def test_every_answer_names_the_version_and_the_request(door: Door):
    call = door.call("ModelInfer", oip.ModelInferResponse)(request(id="mine"), metadata=(("x-request-id", "r-1"),))
    answer = await call
    assert (answer.model_name, answer.model_version, answer.id) == ("e", "3", "mine")
    metadata = dict(await call.initial_metadata())
    assert (metadata["x-request-id"], metadata["x-millrace-model-version"]) == ("r-1", "m@3")
    assert door.plane.asked[0].caller == Caller("r-1", "local", body_bytes=len(request(id="mine").SerializeToString()))


@pytest.mark.parametrize("length", [126, 127, 128])
async def test_a_long_request_id_is_echoed_whole(door: Door, length):
    call = door.infer(metadata=(("x-request-id", "r" * length),))
    await call
    assert dict(await call.initial_metadata())["x-request-id"] == "r" * length


async def test_a_request_without_an_id_gets_one(door: Door):
    call = door.infer()
    made = (await call).id
    assert len(made) == 32
    assert dict(await call.initial_metadata())["x-request-id"] == made == door.plane.asked[0].caller.request_id


async def test_a_version_is_a_number_or_an_alias(door: Door):
    infer = door.call("ModelInfer", oip.ModelInferResponse)
    for version in ("", "7", "champion"):
        await infer(request(model_version=version))
    targets = [asked.ask.target for asked in door.plane.asked]
    assert [(target.version, target.alias) for target in targets] == [(None, None), (7, None), (None, "champion")]


async def test_answers_come_as_they_are_ready_on_one_connection(door: Door):
    door.plane.holds = True
    calls = [door.infer([[number, 0]]) for number in range(100)]
    pending = [asyncio.ensure_future(call) for call in map(_wait, calls)]
    await until(lambda: len(door.plane.asked) == 100)
    for asked in reversed(door.plane.asked):
        asked.settle()
    answers = await asyncio.gather(*pending)
    assert [answer.outputs[0].contents.fp32_contents[0] for answer in answers] == list(range(100))


async def _wait(call: grpc.aio.UnaryUnaryCall) -> oip.ModelInferResponse:
    return await call


async def test_large_tensors_pass_in_both_directions_within_the_peers_windows():
    async with opened(message_bytes=32 * 2**20, options=(("grpc.max_receive_message_length", -1),)) as door:
        rows = np.arange(2_000_000, dtype=np.float32).reshape(-1, 2)
        answers = await asyncio.gather(*(_wait(door.infer(rows, raw=True)) for _ in range(3)))
        for answer in answers:
            assert np.array_equal(v2_grpc.read_response(answer.SerializeToString()).outputs["sum"], rows.sum(axis=1))
        assert door.server._router._limits.budget.held_bytes == 0


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
async def test_a_compressed_request_gets_a_compressed_answer(compression, monkeypatch):
    sent: list[bytes] = []

    def framed(message: bytes, encoding: str | None = None) -> bytes:
        sent.append(plain(message, encoding))
        return sent[-1]

    plain = framing.framed
    monkeypatch.setattr(framing, "framed", framed)
    async with opened(compression=compression) as door:
        assert (await door.infer(np.ones((1000, 2)))).outputs[0].shape == [1000]
        assert (await door.infer()).outputs[0].contents.fp32_contents == [3.0]
    long, short = sent
    assert (long[0], len(long) < 1000, short[0]) == (1, True, 0)


async def test_a_message_that_grows_beyond_the_limit_is_refused():
    async with opened(compression=grpc.Compression.Gzip) as door:
        code, details = await status(door.infer(np.zeros((500_000, 2)), raw=True))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "1048576 bytes" in details
        assert door.plane.asked == []


async def test_a_message_above_the_limit_is_refused_before_all_of_it_came(door: Door):
    code, details = await status(door.infer(np.zeros((1_000_000, 2)), raw=True))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details.endswith("at most 1048576 are accepted")
    assert (await door.infer()).model_name == "e"
    assert door.server._router._limits.budget.held_bytes == 0


async def test_unfinished_messages_share_a_limited_memory():
    async with opened(message_bytes=2**20, max_buffered_bytes=2**20) as door:
        door.server._router._limits.budget.take(2**20)
        code, _ = await status(door.infer(np.zeros((30_000, 2)), raw=True))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await door.infer()).model_name == "e"


# Errors


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidArgumentError("no"), grpc.StatusCode.INVALID_ARGUMENT),
        (NotFoundError("no"), grpc.StatusCode.NOT_FOUND),
        (ConflictError("no"), grpc.StatusCode.FAILED_PRECONDITION),
        (OverloadedError("no"), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (NotReadyError("no"), grpc.StatusCode.UNAVAILABLE),
        (RunnerGoneError("no"), grpc.StatusCode.UNAVAILABLE),
        (DeadlineExceededError("no"), grpc.StatusCode.DEADLINE_EXCEEDED),
        (ModelError("50 % überzählig"), grpc.StatusCode.INTERNAL),
    ],
)
async def test_errors_have_the_status_that_the_table_says(door: Door, error, code):
    door.plane.error = error
    call = door.infer(metadata=(("x-request-id", "r-1"),))
    assert await status(call) == (code, error.message)
    trailers = dict(await call.trailing_metadata())
    assert trailers["x-request-id"] == "r-1"
    assert ("grpc-retry-pushback-ms" in trailers) == error.retryable


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        (b"\xff\xff\xff", "the request is not a serialised ModelInferRequest"),
        (b"", "the request has no model_name"),
        (oip.ModelInferRequest(model_name="e").SerializeToString(), "the request has no inputs"),
        (oip.ModelInferRequest(model_name="e", model_version="0").SerializeToString(), "'0' is not a version"),
        (oip.ModelInferRequest(model_name="e", model_version="9" * 5000).SerializeToString(), "is not a version"),
    ],
)
async def test_bad_requests_are_refused_with_a_sentence(door: Door, message, sentence):
    call = door.channel.unary_unary(f"/{SERVICE}/ModelInfer")(message)
    code, details = await status(call)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert sentence in details


async def test_an_unknown_endpoint_is_not_found_and_an_unknown_method_not_implemented(door: Door):
    assert await status(door.infer(model="nobody")) == (grpc.StatusCode.NOT_FOUND, "there is no endpoint 'nobody'")
    call = door.channel.unary_unary(f"/{SERVICE}/TraceSetting")(b"")
    assert await status(call) == (grpc.StatusCode.UNIMPLEMENTED, f"there is no method /{SERVICE}/TraceSetting")


async def test_a_bug_is_told_as_one_and_its_cause_stays_in_the_log(door: Door, caplog):
    door.plane.submit = lambda *_: 1 / 0  # type: ignore[method-assign]
    code, details = await status(door.infer())
    assert code is grpc.StatusCode.INTERNAL
    assert "division" not in details
    assert "ZeroDivisionError" in caplog.text


async def test_requests_that_the_data_plane_does_not_see_are_counted_as_refused():
    async with opened(keys={"ann": KEY}) as door:
        await status(door.infer())
        await status(door.stream())
        await status(door.call("ServerMetadata", oip.ServerMetadataResponse)(oip.ServerMetadataRequest()))
        assert door.refused == [("", "unauthenticated")] * 2
        door.refused.clear()
        mine = (("authorization", f"Bearer {KEY}"),)
        await status(door.channel.unary_unary(f"/{SERVICE}/ModelInfer")(b"\xff", metadata=mine))
        await status(door.infer(np.zeros((1_000_000, 2)), raw=True, metadata=mine))
        await status(door.infer(metadata=(*mine, ("x-request-timeout-ms", "soon"))))
        await status(door.infer(model="nobody", metadata=mine))
        assert door.refused == [("", "invalid"), ("", "too_large"), ("e", "invalid")]
        door.refused.clear()
        stream = door.stream(metadata=mine)
        await stream.write(oip.ModelInferRequest())
        assert (await stream.read()).error_message == "the request has no model_name"
        assert door.refused == [("", "invalid")]


# Who may do what


async def test_without_its_key_nobody_predicts_or_looks_around():
    async with opened(keys={"ann": KEY}) as door:
        assert await status(door.infer()) == (
            grpc.StatusCode.UNAUTHENTICATED,
            "credentials are needed: send the header Authorization: Bearer <key>",
        )
        assert (await status(door.infer(metadata=(("authorization", "Bearer wrong"),))))[0] is grpc.StatusCode.UNAUTHENTICATED
        assert (await status(door.call("ServerMetadata", oip.ServerMetadataResponse)(oip.ServerMetadataRequest())))[
            0
        ] is grpc.StatusCode.UNAUTHENTICATED
        assert (await status(door.channel.unary_unary("/nothing/there")(b"")))[0] is grpc.StatusCode.UNAUTHENTICATED
        stream = door.stream()
        assert (await status(stream))[0] is grpc.StatusCode.UNAUTHENTICATED
        assert door.plane.asked == []


async def test_with_its_key_one_predicts_and_health_is_for_everybody():
    async with opened(keys={"ann": KEY}) as door:
        assert (await door.infer(metadata=(("authorization", f"Bearer {KEY}"),))).model_name == "e"
        assert door.plane.asked[0].caller.principal == "ann"
        assert (await door.call("ServerLive", oip.ServerLiveResponse)(oip.ServerLiveRequest())).live
        assert (await door.call("ServerReady", oip.ServerReadyResponse)(oip.ServerReadyRequest())).ready


async def test_without_keys_only_a_loopback_name_is_answered():
    async with opened(options=(("grpc.default_authority", "evil.example"),)) as door:
        assert (await status(door.infer()))[0] is grpc.StatusCode.PERMISSION_DENIED


# Deadlines and clients that go away


async def test_the_deadline_of_a_call_is_what_its_request_may_take(door: Door):
    await door.infer(timeout=20)
    await door.infer(timeout=20, metadata=(("x-request-timeout-ms", "500"),))
    await door.infer(metadata=(("x-request-timeout-ms", "700"),))
    await door.infer()
    first, *others = [asked.ask.timeout_ms for asked in door.plane.asked]
    assert 15_000 < first <= 21_000  # the client rounds up
    assert others == [500, 700, None]


async def test_a_caller_that_gives_up_frees_the_place_of_its_request(door: Door):
    door.plane.holds = True
    call = door.infer()
    pending = asyncio.ensure_future(_wait(call))
    await until(lambda: door.plane.asked)
    call.cancel()
    await until(lambda: door.plane.asked[0].is_cancelled)
    with pytest.raises(asyncio.CancelledError):
        await pending
    assert (await asyncio.wait_for(_settled(door), 10)).model_name == "e"


async def _settled(door: Door) -> oip.ModelInferResponse:
    door.plane.holds = False
    return await door.infer()


async def test_a_client_that_closes_frees_the_places_of_all_its_requests(door: Door):
    door.plane.holds = True
    calls = [asyncio.ensure_future(_wait(door.infer())) for _ in range(3)]
    await until(lambda: len(door.plane.asked) == 3)
    await door.channel.close()
    await until(lambda: all(asked.is_cancelled for asked in door.plane.asked))
    await asyncio.gather(*calls, return_exceptions=True)


# Streams


async def test_a_stream_answers_in_order_whatever_is_ready_first(door: Door):
    door.plane.holds = True
    stream = door.stream()
    for number in range(10):
        await stream.write(request([[number, 0]], id=str(number)))
    await until(lambda: len(door.plane.asked) == 10)
    for asked in reversed(door.plane.asked):
        asked.settle()
    answers = [await stream.read() for _ in range(10)]
    assert [answer.infer_response.id for answer in answers] == [str(number) for number in range(10)]
    assert [answer.infer_response.outputs[0].contents.fp32_contents[0] for answer in answers] == list(range(10))
    await stream.done_writing()
    assert await stream.read() is grpc.aio.EOF
    assert await stream.code() is grpc.StatusCode.OK
    assert len({asked.caller.request_id for asked in door.plane.asked}) == 10


async def test_an_error_on_a_stream_is_an_answer_and_the_stream_goes_on(door: Door):
    stream = door.stream()
    await stream.write(request(model="nobody", id="a"))
    await stream.write(oip.ModelInferRequest(model_name="e"))
    await stream.write(request())
    first, second, third = [await stream.read() for _ in range(3)]
    assert (first.error_message, first.infer_response.id) == ("there is no endpoint 'nobody'", "a")
    assert second.error_message == "the request has no inputs"
    assert (third.error_message, third.infer_response.model_version) == ("", "3")
    await stream.done_writing()
    assert await stream.code() is grpc.StatusCode.OK


async def test_a_stream_asks_so_much_at_once_and_no_more(door: Door):
    door.plane.holds = True
    stream = door.stream()
    for number in range(MOST_ASKED + 10):
        await stream.write(request([[number, 0]]))
    await stream.done_writing()
    await until(lambda: len(door.plane.asked) == MOST_ASKED)
    assert (await _wait_plain(door, "ServerLive")).live
    assert len(door.plane.asked) == MOST_ASKED
    door.plane.asked[0].settle()
    await until(lambda: len(door.plane.asked) == MOST_ASKED + 1)
    door.plane.holds = False
    for asked in door.plane.asked[1:]:
        asked.settle()
    answers = [answer async for answer in stream]
    assert [answer.infer_response.outputs[0].contents.fp32_contents[0] for answer in answers] == list(range(MOST_ASKED + 10))


async def _wait_plain(door: Door, method: str) -> oip.ServerLiveResponse:
    return await door.call(method, oip.ServerLiveResponse)(oip.ServerLiveRequest())


async def test_a_stream_that_is_given_up_frees_the_places_of_its_requests(door: Door):
    door.plane.holds = True
    stream = door.stream()
    for _ in range(3):
        await stream.write(request())
    await until(lambda: len(door.plane.asked) == 3)
    stream.cancel()
    await until(lambda: all(asked.is_cancelled for asked in door.plane.asked))


async def test_the_deadline_of_a_stream_ends_it_and_frees_its_places(door: Door):
    door.plane.holds = True
    stream = door.stream(timeout=60)
    await stream.write(request())
    await until(lambda: door.plane.asked)
    assert 30_000 < (door.plane.asked[0].ask.timeout_ms or 0) < 70_000
    (connection,) = door.server._connections
    (served,) = connection._streams.values()
    served.receiver._timer._run()  # type: ignore[union-attr]
    assert await status(stream) == (grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline of the call passed")
    await until(lambda: door.plane.asked[0].is_cancelled)


async def test_a_reader_that_is_slow_gets_everything_in_the_end():
    async with opened(options=(("grpc.http2.lookahead_bytes", 1024),)) as door:
        stream = door.stream()
        rows = np.ones((5_000, 2))
        writing = asyncio.ensure_future(_write(stream, [request(rows, raw=True)] * 100))
        answers = [answer async for answer in stream]
        await writing
        assert [answer.infer_response.outputs[0].shape for answer in answers] == [[5_000]] * 100


async def _write(stream: grpc.aio.StreamStreamCall, messages: list[oip.ModelInferRequest]) -> None:
    for message in messages:
        await stream.write(message)
    await stream.done_writing()


# What is told


async def deployed(door: Door) -> None:
    for snapshot in (deployment("e.m.1", version=1), deployment("e.m.2", 0, version=2), endpoint("e.m.1", "e.m.2", **{"e.m.1": 100})):
        door.catalog._put(snapshot)


async def test_readiness_of_endpoints_and_versions(door: Door):
    await deployed(door)
    ready = door.call("ModelReady", oip.ModelReadyResponse)
    found = [
        (await ready(oip.ModelReadyRequest(name=name, version=version))).ready
        for name, version in (("e", ""), ("e", "1"), ("e", "2"), ("e", "3"), ("nobody", ""))
    ]
    assert found == [True, True, False, False, False]
    assert (await status(ready(oip.ModelReadyRequest())))[0] is grpc.StatusCode.INVALID_ARGUMENT


async def test_metadata_of_the_server_and_of_an_endpoint(door: Door):
    await deployed(door)
    server = await door.call("ServerMetadata", oip.ServerMetadataResponse)(oip.ServerMetadataRequest())
    assert server.name == "millrace"
    metadata = door.call("ModelMetadata", oip.ModelMetadataResponse)
    model = await metadata(oip.ModelMetadataRequest(name="e"))
    assert (model.name, list(model.versions), model.platform) == ("e", ["1", "2"], "sklearn")
    assert [(tensor.name, tensor.datatype, list(tensor.shape)) for tensor in model.inputs] == [("input", "FP64", [-1, 2])]
    assert await status(metadata(oip.ModelMetadataRequest(name="x"))) == (
        grpc.StatusCode.NOT_FOUND,
        "Request for unknown model: there is no endpoint 'x'",
    )


async def test_the_repository_tells_what_is_deployed_and_changes_nothing(door: Door):
    await deployed(door)
    index = door.call("RepositoryIndex", oip.RepositoryIndexResponse)
    everything = await index(oip.RepositoryIndexRequest())
    assert [(model.name, model.version, model.state) for model in everything.models] == [("e", "1", "READY"), ("e", "2", "UNAVAILABLE")]
    assert len((await index(oip.RepositoryIndexRequest(ready=True))).models) == 1
    load = door.call("RepositoryModelLoad", oip.RepositoryModelLoadResponse)
    assert (await load(oip.RepositoryModelLoadRequest(model_name="e"))).isLoaded
    kserves = await load(oip.RepositoryModelLoadRequest(repository_name="e"))
    assert (kserves.model_name, kserves.isLoaded) == ("e", True)
    unload = door.call("RepositoryModelUnload", oip.RepositoryModelUnloadResponse)
    assert (await status(unload(oip.RepositoryModelUnloadRequest(model_name="e"))))[0] is grpc.StatusCode.FAILED_PRECONDITION


async def test_health_of_the_server_and_its_services(door: Door):
    check = door.call("Check", HealthCheckResponse, "grpc.health.v1.Health")
    for name in ("", SERVICE):
        assert (await check(HealthCheckRequest(service=name))).status == HealthCheckResponse.SERVING
    assert (await status(check(HealthCheckRequest(service="other"))))[0] is grpc.StatusCode.NOT_FOUND
    door.health.close()
    assert (await check(HealthCheckRequest())).status == HealthCheckResponse.NOT_SERVING
    assert not (await door.call("ServerReady", oip.ServerReadyResponse)(oip.ServerReadyRequest())).ready


async def test_health_is_watched(door: Door, monkeypatch):
    monkeypatch.setattr(health, "_LOOK_S", 0.01)
    watch = door.channel.unary_stream("/grpc.health.v1.Health/Watch", response_deserializer=HealthCheckResponse.FromString)
    stream, unknown = watch(b""), watch(HealthCheckRequest(service="other").SerializeToString())
    assert (await stream.read()).status == HealthCheckResponse.SERVING
    assert (await unknown.read()).status == HealthCheckResponse.SERVICE_UNKNOWN
    door.health.close()
    assert (await stream.read()).status == HealthCheckResponse.NOT_SERVING
    stream.cancel()
    unknown.cancel()


async def test_one_watch_too_many_is_refused_and_the_others_go_on(door: Door):
    watch = door.channel.unary_stream("/grpc.health.v1.Health/Watch", response_deserializer=HealthCheckResponse.FromString)
    streams = [watch(b"") for _ in range(health.MOST_WATCHES)]
    for stream in streams:
        await stream.read()
    assert await status(watch(b"")) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "a connection has at most 8 watches")
    streams[0].cancel()
    await until(lambda: len(next(iter(door.server._connections))._streams) == health.MOST_WATCHES - 1)
    assert (await watch(b"").read()).status == HealthCheckResponse.SERVING
    for stream in streams:
        stream.cancel()


@pytest.mark.parametrize("package", ["grpc.reflection.v1", "grpc.reflection.v1alpha"])
async def test_reflection_describes_every_service(door: Door, package):
    stream = door.channel.stream_stream(
        f"/{package}.ServerReflection/ServerReflectionInfo",
        request_serializer=ServerReflectionRequest.SerializeToString,
        response_deserializer=ServerReflectionResponse.FromString,
    )()

    async def ask(**question: str) -> ServerReflectionResponse:
        await stream.write(ServerReflectionRequest(**question))
        return await stream.read()

    services = [service.name for service in (await ask(list_services="")).list_services_response.service]
    assert services == [
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
        SERVICE,
    ]
    for name in (*services, "inference.ModelInferRequest.InferInputTensor", f"{SERVICE}.ModelInfer"):
        (file,) = (await ask(file_containing_symbol=name)).file_descriptor_response.file_descriptor_proto
        described = descriptor_pb2.FileDescriptorProto.FromString(file)
        assert name.startswith(described.package)
        again = await ask(file_by_filename=described.name)
        assert again.file_descriptor_response.file_descriptor_proto == [file]
        assert not described.dependency
    assert (await ask(file_containing_symbol="nothing")).error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]
    await stream.done_writing()
    assert await stream.code() is grpc.StatusCode.OK


# The server


async def test_calls_in_flight_are_answered_before_the_server_stops(door: Door):
    door.plane.holds = True
    asked = asyncio.ensure_future(_wait(door.infer()))
    await until(lambda: door.plane.asked)
    stopping = asyncio.ensure_future(door.server.stop())
    await asyncio.sleep(0)
    door.plane.asked[0].settle()
    assert (await asked).model_name == "e"
    async with asyncio.timeout(5):
        await stopping


async def test_calls_that_do_not_end_are_cut_after_the_drain_time(door: Door):
    door.server._drain_timeout_s = 0.05
    door.plane.holds = True
    asked = asyncio.ensure_future(_wait(door.infer()))
    await until(lambda: door.plane.asked)
    async with asyncio.timeout(5):
        await door.server.stop()
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await asked
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
    assert door.plane.asked[0].is_cancelled


async def test_one_connection_too_many_is_unavailable_and_the_others_work():
    async with opened(max_connections=1) as door:
        assert (await door.infer()).model_name == "e"
        async with grpc.aio.insecure_channel(f"127.0.0.1:{door.server.port}", (("grpc.use_local_subchannel_pool", 1),)) as second:
            call = second.unary_unary(f"/{SERVICE}/ServerLive")(b"", timeout=30)
            assert (await status(call))[0] is grpc.StatusCode.UNAVAILABLE
        assert (await door.infer()).model_name == "e"


@pytest.mark.parametrize(
    "method",
    [
        f"{SERVICE}/ModelInfer",
        f"{SERVICE}/ModelStreamInfer",
        f"{SERVICE}/ServerLive",
        *(f"{health.SERVICE}/{name}" for name in ("Check", "Watch")),
    ],
)
async def test_a_request_that_does_not_become_complete_is_given_up(door: Door, method):
    async with spoken(door, method) as (reader, writer):
        writer.write(frame(DATA, b"\0\0\0\0\x10half", 0, 1))
        await until(lambda: held_bytes(door, method) == 9)
        door.server.sweep(asyncio.get_running_loop().time() + 61)
        assert held_bytes(door, method) == 0
        await heard(reader, b"grpc-status\x014")


@pytest.mark.parametrize("method", [f"{SERVICE}/ServerLive", f"{health.SERVICE}/Check", f"{health.SERVICE}/Watch"])
async def test_who_has_no_key_takes_no_memory_that_predictions_need(door: Door, method):
    async with spoken(door, method) as (reader, writer):
        writer.write(frame(DATA, (65_536).to_bytes(5, "big") + bytes(60_000), 0, 1))
        await until(lambda: held_bytes(door, method) == 60_005)
        assert door.server._router._limits.budget.held_bytes == 0
    async with spoken(door, method) as (reader, writer):
        writer.write(frame(DATA, (65_537).to_bytes(5, "big"), 0, 1))
        await heard(reader, b"at most 65536 are accepted")


@asynccontextmanager
async def spoken(
    door: Door, path: str, content_type: str = "application/grpc", method: str = "POST"
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection on which a request has begun, frame by frame."""
    reader, writer = await asyncio.open_connection("127.0.0.1", door.server.port)
    fields = {":method": method, ":scheme": "http", ":path": f"/{path}", "content-type": content_type}
    writer.write(
        PREFACE + frame(SETTINGS) + frame(HEADERS, encode([(name.encode(), value.encode()) for name, value in fields.items()]), 4, 1)
    )
    try:
        yield reader, writer
    finally:
        writer.close()
        await writer.wait_closed()


async def heard(reader: asyncio.StreamReader, wanted: bytes) -> None:
    """Read until it comes."""
    came = b""
    async with asyncio.timeout(5):
        while wanted not in came:
            chunk = await reader.read(65_536)
            assert chunk
            came += chunk


def held_bytes(door: Door, path: str) -> int:
    """What the unfinished messages of a method, and of those that share its limits, hold."""
    router = door.server._router
    return (router._methods[f"/{path}".encode()].limits or router._limits).budget.held_bytes


@pytest.mark.parametrize(
    ("method", "content_type", "answer"),
    [("GET", "application/grpc", b"405"), ("POST", "application/json", b"415")],
)
async def test_what_is_http_2_and_no_grpc_is_told_so(door: Door, method, content_type, answer):
    async with spoken(door, "", content_type, method) as (reader, _):
        await heard(reader, answer)


async def test_a_peer_that_vanished_is_found_out_even_while_a_call_is_open(door: Door):
    async with spoken(door, f"{health.SERVICE}/Watch"):
        await until(lambda: door.server.connections)
        (connection,) = door.server._connections
        accepted = connection._transport.get_extra_info("socket")  # type: ignore[union-attr]
        idle = socket.TCP_KEEPALIVE if sys.platform == "darwin" else socket.TCP_KEEPIDLE
        options = (idle, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert [accepted.getsockopt(socket.IPPROTO_TCP, option) for option in options] == [60, 15, 4]


async def test_a_taken_port_is_one_clear_sentence(door: Door):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        settings = GrpcSettings(port=port)
        server = GrpcServer(AccessControl({}), [], settings, "127.0.0.1", Tracing(0.0), message_bytes=1024, drain_timeout_s=1)
        with pytest.raises(ConfigurationError, match=rf"cannot listen on 127.0.0.1:{port}: .*; set GATEWAY_GRPC_PORT"):
            await server.start()
        await server.stop()


async def test_a_traced_call_hands_its_span_on_and_ends_it_with_its_status(exported):
    async with opened() as door:
        caller = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        await door.infer(metadata=(("traceparent", caller),))
        door.plane.error = NotReadyError("no")
        await status(door.infer(metadata=(("traceparent", caller),)))
        good, bad = exported.get_finished_spans()
        assert good.name == "inference.GRPCInferenceService/ModelInfer"
        assert (good.attributes["rpc.system.name"], good.attributes["rpc.response.status_code"]) == ("grpc", "OK")
        assert (bad.attributes["rpc.response.status_code"], bad.status.description) == ("UNAVAILABLE", "no")
        handed_on = door.plane.asked[0].caller.traceparent
        assert handed_on == f"00-0af7651916cd43dd8448eb211c80319c-{good.context.span_id:016x}-01"
