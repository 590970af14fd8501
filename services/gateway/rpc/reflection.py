"""Server reflection: what services there are, and the files that describe them, for tools such as grpcurl.

The messages of ``grpc.reflection.v1`` and ``v1alpha`` are the same on the wire; only the name of the package differs.

References
----------
gRPC, "gRPC Server Reflection Protocol".
"""

from collections.abc import Iterable

from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.message import DecodeError, Message
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest, ServerReflectionResponse

from libs.errors import InvalidArgumentError
from services.gateway.rpc.calls import StreamCall
from services.gateway.rpc.statuses import Status

SERVICES = ("grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection")


class Reflection:
    """Answers questions about the files given, and about reflection itself.

    Parameters
    ----------
    files
        Descriptors of generated modules (``DESCRIPTOR``), with no dependencies beyond each other.
    """

    def __init__(self, files: Iterable[object]) -> None:
        described = [_proto(file) for file in (*files, reflection_pb2.DESCRIPTOR)]
        described.append(_renamed(described[-1], "grpc.reflection.v1"))
        self._files = {file.name: file.SerializeToString() for file in described}
        self._by_symbol = {symbol: file.name for file in described for symbol in _symbols(file)}
        self._services = sorted(f"{file.package}.{service.name}" for file in described for service in file.service)

    def open(self, call: StreamCall) -> "_Session":
        """Begin a stream of questions."""
        return _Session(self, call)

    def answer(self, asked: ServerReflectionRequest) -> ServerReflectionResponse:
        """The answer to one question."""
        response = ServerReflectionResponse(valid_host=asked.host, original_request=asked)
        match asked.WhichOneof("message_request"):
            case "list_services":
                for name in self._services:
                    response.list_services_response.service.add(name=name)
            case "file_by_filename":
                self._add(response, asked.file_by_filename, self._files.get(asked.file_by_filename))
            case "file_containing_symbol":
                name = self._by_symbol.get(asked.file_containing_symbol, "")
                self._add(response, asked.file_containing_symbol, self._files.get(name))
            case "file_containing_extension" | "all_extension_numbers_of_type":
                self._add(response, "extensions", None)
            case _:
                response.error_response.error_code = Status.INVALID_ARGUMENT
                response.error_response.error_message = "the request asks nothing"
        return response

    def _add(self, response: ServerReflectionResponse, asked: str, file: bytes | None) -> None:
        if file is None:
            response.error_response.error_code = Status.NOT_FOUND
            response.error_response.error_message = f"there is no {asked[:200]!r}"
        else:
            response.file_descriptor_response.file_descriptor_proto.append(file)


class _Session:
    def __init__(self, reflection: Reflection, call: StreamCall) -> None:
        self._reflection = reflection
        self._call = call

    def message(self, message: bytes) -> None:
        try:
            asked = ServerReflectionRequest.FromString(message)
        except DecodeError as error:
            raise InvalidArgumentError("the request is not a serialised ServerReflectionRequest") from error
        self._call.send(self._reflection.answer(asked).SerializeToString())
        self._call.is_full = self._call.stream.is_waiting

    def ended(self) -> None:
        self._call.finish()

    def drained(self) -> None:
        self._call.is_full = False
        self._call.resume()

    def gone(self) -> None: ...


def _proto(file: object) -> FileDescriptorProto:
    proto = FileDescriptorProto()
    file.CopyToProto(proto)  # type: ignore[attr-defined]
    return proto


def _renamed(file: FileDescriptorProto, package: str) -> FileDescriptorProto:
    """A file's copy in another package."""
    renamed = FileDescriptorProto()
    renamed.CopyFrom(file)
    renamed.name, renamed.package = file.name.replace(file.package.replace(".", "/"), package.replace(".", "/")), package
    if renamed.name == file.name:
        renamed.name = f"{package.replace('.', '/')}/{file.name.rpartition('/')[2]}"
    prefix = f".{file.package}."
    for message in renamed.message_type:
        for field in message.field:
            field.type_name = _moved(field.type_name, prefix, package)
    for service in renamed.service:
        for method in service.method:
            method.input_type = _moved(method.input_type, prefix, package)
            method.output_type = _moved(method.output_type, prefix, package)
    return renamed


def _moved(name: str, prefix: str, package: str) -> str:
    return f".{package}.{name[len(prefix) :]}" if name.startswith(prefix) else name


def _symbols(file: FileDescriptorProto) -> Iterable[str]:
    """Full names of what a file defines: services, their methods, and messages with those inside."""
    for service in file.service:
        yield f"{file.package}.{service.name}"
        for method in service.method:
            yield f"{file.package}.{service.name}.{method.name}"
    yield from _nested(file.package, file.message_type)
    for enum in file.enum_type:
        yield f"{file.package}.{enum.name}"


def _nested(scope: str, messages: Iterable[Message]) -> Iterable[str]:
    for message in messages:
        name = f"{scope}.{message.name}"  # type: ignore[attr-defined]
        yield name
        for enum in message.enum_type:  # type: ignore[attr-defined]
            yield f"{name}.{enum.name}"
        yield from _nested(name, message.nested_type)  # type: ignore[attr-defined]
