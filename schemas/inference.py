"""Tensors and signatures in the terms of the Open Inference Protocol, and the streaming-inference records."""

from enum import StrEnum
from typing import Any

from pydantic import Field

from schemas.base import Contract


class Datatype(StrEnum):
    """Element types of the Open Inference Protocol, version 2."""

    BOOL = "BOOL"
    UINT8 = "UINT8"
    UINT16 = "UINT16"
    UINT32 = "UINT32"
    UINT64 = "UINT64"
    INT8 = "INT8"
    INT16 = "INT16"
    INT32 = "INT32"
    INT64 = "INT64"
    FP16 = "FP16"
    FP32 = "FP32"
    FP64 = "FP64"
    BYTES = "BYTES"


class TensorSpec(Contract):
    """Name, element type and shape of one tensor; -1 stands for a dimension of any size (the first is the batch).

    An input with a ``dtype`` is a column of a table: its shape is ``[-1]``, and the runner gives the model a DataFrame of all columns.
    """

    name: str = Field(min_length=1, max_length=256)
    datatype: Datatype
    shape: tuple[int, ...]
    dtype: str | None = Field(default=None, max_length=64, description="pandas dtype of the column; null: not a column.")
    categories: tuple[bool | int | float | str, ...] | None = Field(default=None, description="Of a column of dtype `category`, in order.")
    optional: bool = Field(default=False, description="Whether a request may leave the column out.")

    @property
    def kind(self) -> str:
        """What it is: a ``column`` of a table, or an ``input``."""
        return "input" if self.dtype is None else "column"

    @property
    def label(self) -> str:
        """How messages name it."""
        return f"{self.kind} '{self.name}'"


class Signature(Contract):
    """The inputs and outputs of a model version.

    ``outputs[0]`` is the default answer of V1: the one a request gets that names no outputs; in V2 it gets all.
    ``feature_names`` are the columns of the single two-dimensional input, if the model was trained with names.
    ``ignored_columns`` are columns of the training table that the model does not use: requests may have them, with any values.
    ``training_columns`` are all columns of that table in order, if some are ignored: values without names may be in this order.
    ``batchable`` says that rows are independent, so requests may be joined and cut; the trial found it so.
    """

    inputs: tuple[TensorSpec, ...] = Field(min_length=1)
    outputs: tuple[TensorSpec, ...] = Field(min_length=1)
    feature_names: tuple[str, ...] | None = None
    ignored_columns: tuple[str, ...] = ()
    training_columns: tuple[str, ...] = ()
    batchable: bool = True

    @property
    def is_table(self) -> bool:
        """Whether the inputs are the typed columns of a table."""
        return self.inputs[0].dtype is not None


class DeclaredSignature(Contract):
    """The inputs of a model version as its uploader declares them; its outputs are found in the trial."""

    inputs: tuple[TensorSpec, ...] = Field(min_length=1, max_length=4096)


class InferenceResult(Contract):
    """One JSON record of ``millrace.inference.<endpoint>.results``: exactly one of ``predictions``, ``outputs`` and ``error`` is set.

    A request in the V1 form is answered with ``predictions``; one in the V2 form with ``outputs``, so that the whole is a V2 response, too
    (its ``model_version`` is text there). A request in protobuf or with binary tensors is answered in kind, unless it failed.
    """

    request_id: str
    endpoint_name: str
    status: str = Field(pattern="^(completed|failed)$")
    model_name: str | None = None
    model_version: int | None = None
    predictions: Any = Field(
        default=None, description="Rows; an object of tensors when several outputs of different lengths were asked for."
    )
    outputs: tuple[dict[str, Any], ...] | None = Field(default=None, description="V2 tensors: name, datatype, shape, data.")
    id: str | None = Field(default=None, description="The id in the body of a V2 request.")
    error: str | None = None
