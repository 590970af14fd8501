"""``inference.GRPCInferenceService``: predictions go to the data plane; what is told is what V2's REST door tells, as protobuf."""

import asyncio
from collections import deque
from collections.abc import Mapping
from typing import Protocol as Interface
from typing import TypeVar

import orjson
from google.protobuf.json_format import ParseDict
from google.protobuf.message import DecodeError, Message

from libs.errors import DeadlineExceededError, MillraceError, NotFoundError
from libs.inference import v2_grpc
from libs.inference.errors import InvalidInputError
from libs.inference.oip_proto import open_inference_pb2 as oip
from services.gateway.batching import Pending
from services.gateway.doors import grpc_oip
from services.gateway.doors.headers import timeout_ms
from services.gateway.errors import v2_message
from services.gateway.exchange import Incoming, Outgoing
from services.gateway.predictions import Ask, Caller, Done, Handler, Protocol
from services.gateway.refusals import Refused, nobody, reason_of
from services.gateway.rpc.calls import Head, StreamCall, UnaryCall

SERVICE = "inference.GRPCInferenceService"

MOST_ASKED = 64
"""Requests of one stream that are under way at once; further ones wait where they are, and the client with them."""


class DataPlane(Interface):
    """What answers predictions."""

    def submit(self, ask: Ask, caller: Caller, done: Done) -> Pending: ...

    def cancel(self, pending: Pending) -> None: ...


class InferenceService:
    """The methods of the service.

    Parameters
    ----------
    told
        Handlers of V2's REST door, by method and route template.
    refused
        Is told of predict requests that the data plane does not get to see.
    """

    def __init__(self, dataplane: DataPlane, told: Mapping[tuple[str, str], Handler], refused: Refused = nobody) -> None:
        self._dataplane = dataplane
        self._told = told
        self._refused = refused

    def refuse(self, error: MillraceError, endpoint_name: str = "") -> None:
        """Count a predict request that was turned away."""
        self._refused(endpoint_name, Protocol.GRPC, reason_of(error))

    def read(self, message: bytes) -> oip.ModelInferRequest:
        """A predict request; one that cannot be read is counted, and the error raised."""
        try:
            return v2_grpc.read(message)
        except MillraceError as error:
            self.refuse(error)
            raise

    def ask(self, head: Head, request: oip.ModelInferRequest, request_id: str) -> Ask:
        """What a request asks; one that cannot be asked is counted, and the error raised."""
        incoming = Incoming({}, head.headers, request_id=request_id)
        try:
            return grpc_oip.ask(request, incoming, patience_ms(head, incoming))
        except MillraceError as error:
            self.refuse(error, request.model_name)
            raise

    # Predictions

    def infer(self, call: UnaryCall, message: bytes) -> None:
        """One prediction."""
        head = call.head
        asked = self.ask(head, self.read(message), head.request_id)

        def done(result: Outgoing | MillraceError) -> None:
            call.on_gone = None
            if isinstance(result, MillraceError):
                call.fail(result)
            else:
                call.reply(bytes(result.body), result.headers)

        pending = self._dataplane.submit(asked, Caller(head.request_id, head.principal.name, head.traceparent, len(message)), done)
        if call.stream.is_open:
            call.on_gone = lambda: self._dataplane.cancel(pending)

    def infer_stream(self, call: StreamCall) -> "_InferStream":
        """Many predictions on one stream."""
        return _InferStream(self, self._dataplane, call)

    # What is told

    async def server_live(self, _message: bytes) -> bytes:
        """Whether the process answers."""
        return oip.ServerLiveResponse(live=True).SerializeToString()

    async def server_ready(self, _message: bytes) -> bytes:
        """Whether the gateway takes requests."""
        answer = await self._told["GET", "/v2/health/ready"](Incoming({}, {}))
        return oip.ServerReadyResponse(ready=answer.status == 200).SerializeToString()

    async def model_ready(self, message: bytes) -> bytes:
        """Whether an endpoint, or one version at it, can answer; what does not exist cannot."""
        asked = _parsed(oip.ModelReadyRequest, message)
        try:
            answer = await self._ask("/v2/models/{model}/ready", asked.name, asked.version)
        except NotFoundError:
            return oip.ModelReadyResponse(ready=False).SerializeToString()
        return oip.ModelReadyResponse(ready=answer.status == 200).SerializeToString()

    async def server_metadata(self, _message: bytes) -> bytes:
        """Who this is."""
        return _as(oip.ServerMetadataResponse(), await self._told["GET", "/v2"](Incoming({}, {})))

    async def model_metadata(self, message: bytes) -> bytes:
        """What an endpoint takes and gives."""
        asked = _parsed(oip.ModelMetadataRequest, message)
        return _as(oip.ModelMetadataResponse(), await self._ask("/v2/models/{model}", asked.name, asked.version))

    async def model_config(self, message: bytes) -> bytes:
        """The same in the words of Triton's model configuration."""
        asked = _parsed(oip.ModelConfigRequest, message)
        answer = await self._ask("/v2/models/{model}/config", asked.name, asked.version)
        return ParseDict({"config": orjson.loads(answer.body)}, oip.ModelConfigResponse()).SerializeToString()

    async def statistics(self, message: bytes) -> bytes:
        """How many requests and executions there were at an endpoint, or at all, and what they took."""
        asked = _parsed(oip.ModelStatisticsRequest, message)
        if asked.name:
            answer = await self._ask("/v2/models/{model}/stats", asked.name, asked.version)
        elif asked.version:
            raise InvalidInputError("the request names a version and no model")
        else:
            answer = await self._told["GET", "/v2/models/stats"](Incoming({}, {}))
        return _as(oip.ModelStatisticsResponse(), answer)

    async def index(self, message: bytes) -> bytes:
        """All endpoints and versions."""
        asked = _parsed(oip.RepositoryIndexRequest, message)
        answer = await self._told["POST", "/v2/repository/index"](Incoming({}, {}, orjson.dumps({"ready": asked.ready})))
        return ParseDict({"models": orjson.loads(answer.body)}, oip.RepositoryIndexResponse()).SerializeToString()

    async def load(self, message: bytes) -> bytes:
        """Whether what is deployed answers; there is nothing to load that deployments have not loaded."""
        asked = _parsed(oip.RepositoryModelLoadRequest, message)
        name = asked.model_name or asked.repository_name
        await self._ask_repository("load", name)
        return oip.RepositoryModelLoadResponse(model_name=name, isLoaded=True).SerializeToString()

    async def unload(self, message: bytes) -> bytes:
        """Refused while something is deployed: deployments say what is loaded."""
        asked = _parsed(oip.RepositoryModelUnloadRequest, message)
        name = asked.model_name or asked.repository_name
        await self._ask_repository("unload", name)
        return oip.RepositoryModelUnloadResponse(model_name=name, isUnloaded=True).SerializeToString()

    async def _ask(self, template: str, name: str, version: str) -> Outgoing:
        grpc_oip.target_of(name, version)
        parameters = {"model": name, "version": version} if version else {"model": name}
        return await self._told["GET", template](Incoming(parameters, {}))

    async def _ask_repository(self, verb: str, name: str) -> Outgoing:
        grpc_oip.target_of(name, "")
        return await self._told["POST", f"/v2/repository/models/{{model}}/{verb}"](Incoming({"model": name}, {}))


class _InferStream:
    """The predictions of one stream: asked as they come, answered in that order."""

    def __init__(self, service: InferenceService, dataplane: DataPlane, call: StreamCall) -> None:
        self._service = service
        self._dataplane = dataplane
        self._call = call
        self._places: deque[_Place] = deque()
        self._count = 0
        self._has_ended = False

    def message(self, message: bytes) -> None:
        place = _Place()
        self._places.append(place)
        self._call.is_full = len(self._places) >= MOST_ASKED or self._call.stream.is_waiting
        try:
            self._ask(message, place)
        except MillraceError as error:
            self._settle(place, error)

    def _ask(self, message: bytes, place: "_Place") -> None:
        head = self._call.head
        self._count += 1
        request_id = f"{head.request_id}.{self._count}"
        place.request = self._service.read(message)
        asked = self._service.ask(head, place.request, request_id)
        caller = Caller(request_id, head.principal.name, head.traceparent, len(message))
        place.pending = self._dataplane.submit(asked, caller, lambda result: self._settle(place, result))

    def _settle(self, place: "_Place", result: Outgoing | MillraceError) -> None:
        place.answer = _streamed(place.request, result)
        while self._places and self._places[0].answer is not None:
            self._call.send(self._places.popleft().answer or b"")
        if self._call.is_full and len(self._places) < MOST_ASKED and not self._call.stream.is_waiting:
            self.drained()
        self._finish()

    def ended(self) -> None:
        self._has_ended = True
        self._finish()

    def _finish(self) -> None:
        if self._has_ended and not self._places:
            self._call.finish()

    def drained(self) -> None:
        if len(self._places) < MOST_ASKED:
            self._call.is_full = False
            self._call.resume()

    def gone(self) -> None:
        places, self._places = self._places, deque()
        for place in places:
            if place.pending is not None and place.answer is None:
                self._dataplane.cancel(place.pending)


class _Place:
    """A request of a stream in the order it came."""

    __slots__ = ("answer", "pending", "request")

    def __init__(self) -> None:
        self.request: oip.ModelInferRequest | None = None
        self.pending: Pending | None = None
        self.answer: bytes | None = None


def _streamed(request: oip.ModelInferRequest | None, result: Outgoing | MillraceError) -> bytes:
    """A ``ModelStreamInferResponse``; one that tells an error names the request all the same."""
    if isinstance(result, MillraceError):
        response = oip.ModelStreamInferResponse(error_message=v2_message(result) or type(result).__name__)
        if request is not None:
            response.infer_response.id = request.id
            response.infer_response.model_name = request.model_name
        return response.SerializeToString()
    return oip.ModelStreamInferResponse(infer_response=oip.ModelInferResponse.FromString(bytes(result.body))).SerializeToString()


def patience_ms(head: Head, incoming: Incoming) -> int | None:
    """Milliseconds that the caller gives this request from now on: by the call's deadline, and by ``x-request-timeout-ms``.

    Raises
    ------
    DeadlineExceededError
        There are none left.
    """
    asked_ms = timeout_ms(incoming)
    if head.deadline_s is None:
        return asked_ms
    left_ms = (head.deadline_s - asyncio.get_running_loop().time()) * 1000
    if left_ms <= 0:
        raise DeadlineExceededError("the deadline of the call passed before its request was complete")
    return max(1, min(round(left_ms), asked_ms or round(left_ms)))


M = TypeVar("M", bound=Message)


def _parsed(kind: type[M], message: bytes) -> M:
    try:
        return kind.FromString(message)
    except DecodeError as error:
        raise InvalidInputError(f"the request is not a serialised {kind.__name__}") from error


def _as(message: Message, answer: Outgoing) -> bytes:
    """A JSON answer as the message of the same fields."""
    return ParseDict(orjson.loads(answer.body), message, ignore_unknown_fields=True).SerializeToString()
