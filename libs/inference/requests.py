"""Requests and responses in memory: named arrays, whatever the form they came in."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from libs.runner.wire import Arrays

Groups = tuple[tuple[str, tuple[str, ...]], ...]
"""Names as a request gave them, each with the outputs that it stands for."""


@dataclass(slots=True)
class InferRequest:
    """A request that fits a signature.

    Attributes
    ----------
    inputs
        One array per input of the signature, in its datatype and shape; ``BYTES`` are object arrays of ``bytes``, in columns
        of tables with ``None`` where the value is missing.
    outputs
        Names of the outputs asked for; ``None`` is V1's default answer, the signature's first output.
    groups
        Names that were asked for with the outputs that each stands for, when one of them is the common name of several (V1); else empty.
    id
        The caller's own id (V2), to be echoed.
    parameters
        The caller's parameters, uninterpreted.
    binary_data_output, binary_data
        Whether outputs go back as raw bytes (V2's binary extension): for all, and for single outputs.
    """

    inputs: Arrays
    outputs: tuple[str, ...] | None = None
    groups: Groups = ()
    id: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    binary_data_output: bool = False
    binary_data: Mapping[str, bool] = field(default_factory=dict)

    def wants_binary(self, output: str) -> bool:
        """Tell whether this output goes back as raw bytes."""
        return self.binary_data.get(output, self.binary_data_output)


@dataclass(frozen=True, slots=True)
class Span:
    """The runner's own span: started by the runner, exported by whoever asked."""

    span_id: str
    start_ns: int
    end_ns: int


@dataclass(slots=True)
class InferResponse:
    """A model's answer: named arrays in the order asked for.

    ``model_s`` are the seconds inside the model, as the runner says; 0 when it does not say, or nothing that makes sense.
    """

    outputs: Arrays
    span: Span | None = None
    model_s: float = 0.0
