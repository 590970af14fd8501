"""The gRPC side of the Open Inference Protocol, its streaming and repository extensions, and what gRPC itself says of servers.

References
----------
Open Inference Protocol, ``open_inference_grpc.proto``; Triton, ``grpc_service.proto``; gRPC, "GRPC Health Checking Protocol", "gRPC Server
Reflection Protocol", "Status codes and their use in gRPC", "Compression".
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
from google.protobuf.message import Message
from grpc import StatusCode
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest, ServerReflectionResponse

from libs.inference import v2_grpc
from libs.inference.oip_proto import open_inference_pb2 as oip
from libs.inference.requests import InferRequest
from tests.conformance.checks import GRPC, Failed, Level, NotApplicable, check, expect
from tests.conformance.subject import Subject, agree

MUST, SHOULD = Level.MUST, Level.SHOULD
SERVICE = "inference.GRPCInferenceService"
_NOBODY = "no-such-model"
_TIMEOUT_S = 15.0
_SENT_BACK = (StatusCode.INVALID_ARGUMENT, StatusCode.FAILED_PRECONDITION, StatusCode.OUT_OF_RANGE)
"""What says that the caller is at fault."""


@dataclass(frozen=True)
class Said:
    """How a call ended: its answer, or its status."""

    code: StatusCode
    details: str = ""
    answer: Any = None
    metadata: Sequence[tuple[str, str]] = ()


@contextmanager
def _channel(subject: Subject, **options: Any) -> Iterator[grpc.Channel]:
    if subject.grpc is None:
        raise NotApplicable("no gRPC address was named")
    with grpc.insecure_channel(subject.grpc, **options) as channel:
        yield channel


def _ask(subject: Subject, method: str, message: Message | bytes, answer: type[Message], service: str = SERVICE, **arguments: Any) -> Said:
    with _channel(subject, compression=arguments.pop("compression", None)) as channel:
        call = channel.unary_unary(f"/{service}/{method}", response_deserializer=answer.FromString)
        body = message if isinstance(message, bytes) else message.SerializeToString()
        try:
            told, ended = call.with_call(body, timeout=_TIMEOUT_S, **arguments)
        except grpc.RpcError as error:
            return Said(error.code(), error.details() or "")
        return Said(StatusCode.OK, "", told, tuple(ended.initial_metadata()))


def _infer(subject: Subject, message: oip.ModelInferRequest | bytes, **arguments: Any) -> Said:
    return _ask(subject, "ModelInfer", message, oip.ModelInferResponse, **arguments)


def _request(subject: Subject, rows: int = 2, raw: bool = False, **fields: str) -> oip.ModelInferRequest:
    body = v2_grpc.write_request(InferRequest(subject.arrays(rows), binary_data_output=raw), subject.model)
    message = oip.ModelInferRequest.FromString(body)
    for name, value in fields.items():
        setattr(message, name, value)
    return message


def _ok(said: Said) -> Any:
    expect(said.code is StatusCode.OK, f"ends with {said.code.name}: {said.details}")
    return said.answer


def _outputs(answer: oip.ModelInferResponse) -> dict[str, np.ndarray]:
    return v2_grpc.read_response(answer.SerializeToString()).outputs


def _refused(said: Said) -> None:
    expect(said.code in _SENT_BACK, f"ends with {said.code.name}: {said.details}")


# Health and metadata


@check("grpc.live", MUST, GRPC, "ServerLive")
def live(subject: Subject) -> None:
    """`ServerLive` tells that the server lives."""
    expect(_ok(_ask(subject, "ServerLive", b"", oip.ServerLiveResponse)).live, "live is false")


@check("grpc.ready", MUST, GRPC, "ServerReady")
def ready(subject: Subject) -> None:
    """`ServerReady` tells that the server is ready."""
    expect(_ok(_ask(subject, "ServerReady", b"", oip.ServerReadyResponse)).ready, "ready is false")


@check("grpc.model.ready", MUST, GRPC, "ModelReady")
def model_ready(subject: Subject) -> None:
    """`ModelReady` tells that the model is ready."""
    said = _ask(subject, "ModelReady", oip.ModelReadyRequest(name=subject.model), oip.ModelReadyResponse)
    expect(_ok(said).ready, "ready is false")


@check("grpc.model.ready.unknown", MUST, GRPC, "ModelReady")
def model_ready_unknown(subject: Subject) -> None:
    """An unknown model is not ready: `ready` is false, or the status is NOT_FOUND."""
    said = _ask(subject, "ModelReady", oip.ModelReadyRequest(name=_NOBODY), oip.ModelReadyResponse)
    expect(said.code is StatusCode.NOT_FOUND or not _ok(said).ready, "ready is true")


@check("grpc.server", MUST, GRPC, "ServerMetadata")
def server_metadata(subject: Subject) -> None:
    """`ServerMetadata` tells the server's name and version."""
    answer = _ok(_ask(subject, "ServerMetadata", b"", oip.ServerMetadataResponse))
    expect(answer.name and answer.version, f"name {answer.name!r}, version {answer.version!r}")


@check("grpc.model", MUST, GRPC, "ModelMetadata")
def model_metadata(subject: Subject) -> None:
    """`ModelMetadata` tells the model's name and platform, and name, datatype and shape of its inputs and outputs."""
    answer = _ok(_ask(subject, "ModelMetadata", oip.ModelMetadataRequest(name=subject.model), oip.ModelMetadataResponse))
    expect(answer.name == subject.model, f"its name is {answer.name!r}")
    expect(answer.inputs and answer.outputs, "no inputs or no outputs")
    for tensor in (*answer.inputs, *answer.outputs):
        expect(tensor.name and tensor.datatype and tensor.shape, f"tensor {tensor.name!r} has no datatype or shape")


@check("grpc.model.same", MUST, GRPC, "ModelMetadata")
def model_metadata_same(subject: Subject) -> None:
    """It tells the same of the inputs as the REST side."""
    answer = _ok(_ask(subject, "ModelMetadata", oip.ModelMetadataRequest(name=subject.model), oip.ModelMetadataResponse))
    found = [(tensor.name, tensor.datatype, list(tensor.shape)) for tensor in answer.inputs]
    expected = [(tensor["name"], tensor["datatype"], tensor["shape"]) for tensor in subject.metadata["inputs"]]
    expect(found == expected, f"{found} and {expected}")


@check("grpc.model.unknown", MUST, GRPC, "Status codes, NOT_FOUND")
def model_metadata_unknown(subject: Subject) -> None:
    """Metadata of an unknown model ends with NOT_FOUND."""
    said = _ask(subject, "ModelMetadata", oip.ModelMetadataRequest(name=_NOBODY), oip.ModelMetadataResponse)
    expect(said.code is StatusCode.NOT_FOUND, f"ends with {said.code.name}: {said.details}")


# Inference


@check("grpc.infer.typed", MUST, GRPC, "ModelInfer, InferTensorContents")
def infer_typed(subject: Subject) -> None:
    """Tensors in typed contents are answered with the model's name and outputs: name, datatype, shape and as much data."""
    answer = _ok(_infer(subject, _request(subject)))
    expect(answer.model_name == subject.model, f"the model's name is {answer.model_name!r}")
    outputs = _outputs(answer)
    expect(outputs and all(len(array) == 2 for array in outputs.values()), "not one row of each output for each row")


@check("grpc.infer.raw", MUST, GRPC, "ModelInfer, raw_input_contents")
def infer_raw(subject: Subject) -> None:
    """Tensors in `raw_input_contents` give the same answer."""
    typed, raw = _outputs(_ok(_infer(subject, _request(subject)))), _outputs(_ok(_infer(subject, _request(subject, raw=True))))
    expect(list(typed) == list(raw), "other outputs")
    for name, array in typed.items():
        expect(np.array_equal(array, raw[name]), f"output {name!r} differs")


@check("grpc.infer.form", MUST, GRPC, "ModelInferResponse, raw_output_contents")
def infer_form(subject: Subject) -> None:
    """An answer is raw or typed as a whole: where there are `raw_output_contents`, one for each output, there are no typed contents."""
    for raw in (True, False):
        answer = _ok(_infer(subject, _request(subject, raw=raw)))
        typed = [tensor.contents.ByteSize() > 0 for tensor in answer.outputs]
        count = len(answer.raw_output_contents)
        expect((count == len(typed) and not any(typed)) or (count == 0 and all(typed)), f"{count} raw, {typed} typed")


@check("grpc.infer.raw-to-raw", SHOULD, GRPC, "clients in use")
def infer_raw_to_raw(subject: Subject) -> None:
    """A raw request is answered raw, a typed one typed."""
    expect(_ok(_infer(subject, _request(subject, raw=True))).raw_output_contents, "raw is answered typed")
    expect(not _ok(_infer(subject, _request(subject))).raw_output_contents, "typed is answered raw")


@check("grpc.infer.id", MUST, GRPC, "ModelInferResponse.id")
def infer_id(subject: Subject) -> None:
    """The request's `id` is returned."""
    answer = _ok(_infer(subject, _request(subject, id="conformance-7")))
    expect(answer.id == "conformance-7", f"the id is {answer.id!r}")


@check("grpc.infer.version", MUST, GRPC, "ModelInferRequest.model_version")
def infer_version(subject: Subject) -> None:
    """A version can be asked for, and the answer names it."""
    if subject.version is None:
        raise NotApplicable("no version was named")
    answer = _ok(_infer(subject, _request(subject, model_version=subject.version)))
    expect(answer.model_version == subject.version, f"the version is {answer.model_version!r}")


@check("grpc.infer.outputs", MUST, GRPC, "ModelInferRequest.outputs")
def infer_outputs(subject: Subject) -> None:
    """Requested outputs are those that are answered, each of them alone."""
    for spec in subject.metadata["outputs"]:
        message = _request(subject)
        message.outputs.add(name=spec["name"])
        found = [tensor.name for tensor in _ok(_infer(subject, message)).outputs]
        expect(found == [spec["name"]], f"asked for {spec['name']!r}, got {found}")


@check("grpc.infer.all", MUST, GRPC, "ModelInferRequest.outputs")
def infer_all(subject: Subject) -> None:
    """Without requested outputs all of the model's are answered."""
    found = [tensor.name for tensor in _ok(_infer(subject, _request(subject))).outputs]
    expected = [spec["name"] for spec in subject.metadata["outputs"]]
    expect(sorted(found) == sorted(expected), f"{found} of {expected}")


@check("grpc.infer.many", MUST, GRPC, "ModelInfer")
def infer_many(subject: Subject) -> None:
    """A thousand rows at once give the answers that each gives alone (the first ten of them are tried)."""
    message = _request(subject, rows=1000, raw=True)
    together = _outputs(_ok(_infer(subject, message)))
    arrays = subject.arrays(1000)
    for row in range(10):
        one = InferRequest({name: array[row : row + 1] for name, array in arrays.items()}, binary_data_output=True)
        alone = _outputs(_ok(_infer(subject, v2_grpc.write_request(one, subject.model))))
        for name, array in alone.items():
            expect(agree(array[0], together[name][row]), f"row {row} of {name!r} differs")


@check("grpc.infer.gzip", SHOULD, GRPC, "Compression")
def infer_gzip(subject: Subject) -> None:
    """Requests compressed with gzip and with deflate are understood."""
    for compression in (grpc.Compression.Gzip, grpc.Compression.Deflate):
        _ok(_infer(subject, _request(subject, rows=200), compression=compression))


@check("grpc.infer.parameters", MUST, GRPC, "ModelInferRequest.parameters")
def infer_parameters(subject: Subject) -> None:
    """Parameters that the server does not know do no harm."""
    message = _request(subject)
    message.parameters["conformance"].string_param = "unknown"
    _ok(_infer(subject, message))


# Errors


@check("grpc.error.model", MUST, GRPC, "Status codes, NOT_FOUND")
def error_model(subject: Subject) -> None:
    """Inference with an unknown model ends with NOT_FOUND."""
    said = _infer(subject, _request(subject, model_name=_NOBODY))
    expect(said.code is StatusCode.NOT_FOUND, f"ends with {said.code.name}: {said.details}")


@check("grpc.error.version", MUST, GRPC, "Status codes, NOT_FOUND")
def error_version(subject: Subject) -> None:
    """Inference with an unknown version ends with NOT_FOUND."""
    if subject.version is None:
        raise NotApplicable("no version was named")
    said = _infer(subject, _request(subject, model_version="4711"))
    expect(said.code is StatusCode.NOT_FOUND, f"ends with {said.code.name}: {said.details}")


@check("grpc.error.input", MUST, GRPC, "Status codes, INVALID_ARGUMENT")
def error_input(subject: Subject) -> None:
    """An input that the model does not have, beside its own, ends with INVALID_ARGUMENT."""
    message = _request(subject)
    message.inputs.add().CopyFrom(message.inputs[0])
    message.inputs[-1].name = "no-such-input"
    if message.raw_input_contents:
        message.raw_input_contents.append(message.raw_input_contents[0])
    _refused(_infer(subject, message))


@check("grpc.error.shape", MUST, GRPC, "InferTensorContents: the size must match the shape")
def error_shape(subject: Subject) -> None:
    """Contents of another size than the shape says end with INVALID_ARGUMENT, typed and raw."""
    for raw in (False, True):
        message = _request(subject, raw=raw)
        message.inputs[0].shape[0] = 3
        _refused(_infer(subject, message))


@check("grpc.error.datatype", MUST, GRPC, "Status codes, INVALID_ARGUMENT")
def error_datatype(subject: Subject) -> None:
    """A datatype that does not exist ends with INVALID_ARGUMENT."""
    message = _request(subject)
    message.inputs[0].datatype = "FP7"
    _refused(_infer(subject, message))


@check("grpc.error.both", MUST, GRPC, "raw_input_contents: contents must not be specified")
def error_both(subject: Subject) -> None:
    """Typed contents beside raw ones end with INVALID_ARGUMENT."""
    message = _request(subject, raw=True)
    message.inputs[0].contents.CopyFrom(_request(subject).inputs[0].contents)
    _refused(_infer(subject, message))


@check("grpc.error.count", MUST, GRPC, "raw_input_contents: one for each input")
def error_count(subject: Subject) -> None:
    """Another number of raw contents than of inputs ends with INVALID_ARGUMENT."""
    message = _request(subject, raw=True)
    message.raw_input_contents.append(b"")
    _refused(_infer(subject, message))


@check("grpc.error.empty", MUST, GRPC, "Status codes, INVALID_ARGUMENT")
def error_empty(subject: Subject) -> None:
    """A request without inputs ends with INVALID_ARGUMENT."""
    _refused(_infer(subject, oip.ModelInferRequest(model_name=subject.model)))


@check("grpc.error.output", MUST, GRPC, "Status codes, INVALID_ARGUMENT")
def error_output(subject: Subject) -> None:
    """A requested output that the model does not have ends with INVALID_ARGUMENT."""
    message = _request(subject)
    message.outputs.add(name="no-such-output")
    _refused(_infer(subject, message))


@check("grpc.error.recovers", MUST, GRPC, "ModelInfer")
def error_recovers(subject: Subject) -> None:
    """A malformed message ends with an error, and the connection goes on."""
    with _channel(subject) as channel:
        call = channel.unary_unary(f"/{SERVICE}/ModelInfer", response_deserializer=oip.ModelInferResponse.FromString)
        first = call.future(b"\xff\xff\xff\xff", timeout=_TIMEOUT_S)
        expect(first.exception() is not None, "nonsense is answered")
        second = call.future(_request(subject).SerializeToString(), timeout=_TIMEOUT_S)
        expect(second.exception() is None, f"the next request ends with {second.code()}")


@check("grpc.error.method", MUST, GRPC, "Status codes, UNIMPLEMENTED")
def error_method(subject: Subject) -> None:
    """A method that does not exist ends with UNIMPLEMENTED."""
    said = _ask(subject, "NoSuchMethod", b"", oip.ServerLiveResponse)
    expect(said.code is StatusCode.UNIMPLEMENTED, f"ends with {said.code.name}")


# Streams, repository, health, reflection


@check("grpc.stream", SHOULD, GRPC, "ModelStreamInfer (Triton)")
def stream(subject: Subject) -> None:
    """Requests on a stream are answered in their order, an error among them is told in `error_message`, and the stream goes on."""
    requests = [_request(subject, id="1"), _request(subject, model_name=_NOBODY, id="2"), _request(subject, id="3")]
    with _channel(subject) as channel:
        call = channel.stream_stream(f"/{SERVICE}/ModelStreamInfer", response_deserializer=oip.ModelStreamInferResponse.FromString)
        try:
            answers = list(call((request.SerializeToString() for request in requests), timeout=_TIMEOUT_S))
        except grpc.RpcError as error:
            if error.code() is StatusCode.UNIMPLEMENTED:
                raise NotApplicable("the server has no ModelStreamInfer") from error
            raise Failed(f"ends with {error.code().name}: {error.details()}") from error
    expect(len(answers) == 3, f"{len(answers)} answers to 3 requests")
    expect([bool(answer.error_message) for answer in answers] == [False, True, False], "not the second alone has an error_message")
    expect((answers[0].infer_response.id, answers[2].infer_response.id) == ("1", "3"), "not in their order")


@check("grpc.repository.index", SHOULD, GRPC, "RepositoryIndex (Triton)")
def repository_index(subject: Subject) -> None:
    """`RepositoryIndex` names the model, and that it is ready."""
    said = _ask(subject, "RepositoryIndex", b"", oip.RepositoryIndexResponse)
    if said.code is StatusCode.UNIMPLEMENTED:
        raise NotApplicable("the server has no RepositoryIndex")
    states = {model.name: model.state for model in _ok(said).models}
    expect(states.get(subject.model) == "READY", f"{states}")


@check("grpc.statistics", SHOULD, GRPC, "ModelStatistics (Triton)")
def statistics(subject: Subject) -> None:
    """`ModelStatistics` has the model alone when it is named, and among all when none is; an unknown one ends with NOT_FOUND."""
    said = _ask(subject, "ModelStatistics", oip.ModelStatisticsRequest(name=subject.model), oip.ModelStatisticsResponse)
    if said.code is StatusCode.UNIMPLEMENTED:
        raise NotApplicable("the server has no ModelStatistics")
    names = [each.name for each in _ok(said).model_stats]
    expect(names == [subject.model], f"of {names}")
    said = _ask(subject, "ModelStatistics", b"", oip.ModelStatisticsResponse)
    expect(subject.model in [each.name for each in _ok(said).model_stats], "not among all")
    said = _ask(subject, "ModelStatistics", oip.ModelStatisticsRequest(name="no-such-model"), oip.ModelStatisticsResponse)
    expect(said.code in (StatusCode.NOT_FOUND, StatusCode.INVALID_ARGUMENT), f"an unknown model ends with {said.code.name}")


@check("grpc.health", SHOULD, GRPC, "GRPC Health Checking Protocol")
def health(subject: Subject) -> None:
    """`grpc.health.v1.Health/Check` of the whole server tells SERVING, and of an unknown service NOT_FOUND."""
    said = _ask(subject, "Check", HealthCheckRequest(), HealthCheckResponse, "grpc.health.v1.Health")
    expect(_ok(said).status == HealthCheckResponse.SERVING, "another status")
    said = _ask(subject, "Check", HealthCheckRequest(service="no.such.Service"), HealthCheckResponse, "grpc.health.v1.Health")
    expect(said.code is StatusCode.NOT_FOUND, f"an unknown service ends with {said.code.name}")


@check("grpc.reflection", SHOULD, GRPC, "gRPC Server Reflection Protocol")
def reflection(subject: Subject) -> None:
    """Server reflection names the service, so that tools need no `.proto` file."""
    for version in ("v1", "v1alpha"):
        services = _reflected(subject, version)
        if services is not None:
            expect(SERVICE in services, f"{services}")
            return
    raise Failed("there is no reflection service")


def _reflected(subject: Subject, version: str) -> list[str] | None:
    with _channel(subject) as channel:
        call = channel.stream_stream(
            f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
            request_serializer=ServerReflectionRequest.SerializeToString,
            response_deserializer=ServerReflectionResponse.FromString,
        )
        try:
            (answer,) = call(iter([ServerReflectionRequest(list_services="")]), timeout=_TIMEOUT_S)
        except grpc.RpcError:
            return None
        return [service.name for service in answer.list_services_response.service]
