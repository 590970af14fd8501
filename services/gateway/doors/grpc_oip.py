"""The gRPC door of the Open Inference Protocol: a serialised ``ModelInferRequest`` in, a serialised ``ModelInferResponse`` out.

References
----------
Open Inference Protocol, "gRPC".
"""

from libs.errors import InvalidArgumentError
from libs.inference import v2_grpc
from libs.inference.errors import printable
from libs.inference.oip_proto.open_inference_pb2 import ModelInferRequest
from services.gateway.doors.headers import timeout_ms, who
from services.gateway.exchange import Incoming, Outgoing
from services.gateway.predictions import Ask, Prediction, Protocol, Target

_PROTOBUF = b"application/grpc+proto"
_MOST_VERSION_DIGITS = 9


def read(incoming: Incoming) -> Ask:
    """What a ``ModelInferRequest`` asks; raises ``InvalidArgumentError``."""
    return ask(v2_grpc.read(bytes(incoming.body)), incoming, timeout_ms(incoming))


def ask(message: ModelInferRequest, incoming: Incoming, patience_ms: int | None) -> Ask:
    """What a parsed request asks, within so many milliseconds."""

    def write(prediction: Prediction) -> Outgoing:
        route = prediction.route
        body = v2_grpc.render(prediction.response, prediction.request, route.endpoint_name, str(route.version), incoming.request_id)
        return Outgoing(body, 200, _PROTOBUF, who(prediction))

    target = target_of(message.model_name, message.model_version)
    return Ask(target, Protocol.GRPC, lambda signature: v2_grpc.from_message(message, signature), write, patience_ms)


def target_of(model_name: str, model_version: str) -> Target:
    """The endpoint that the protocol calls a model, with a version number or an alias if there is one.

    Raises
    ------
    InvalidArgumentError
        No name, or a number that no version has.
    """
    if not model_name:
        raise InvalidArgumentError("the request names no model")
    if not model_version:
        return Target(model_name)
    if not (model_version.isascii() and model_version.isdigit()):
        return Target(model_name, alias=model_version)
    if len(model_version) > _MOST_VERSION_DIGITS or int(model_version) == 0:
        raise InvalidArgumentError(f"'{printable(model_version, 80)}' is not a version: a number from 1 on, or an alias")
    return Target(model_name, int(model_version))
