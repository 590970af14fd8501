"""ONNX graphs, by ONNX Runtime on the CPU."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime

from ..errors import InvalidInputError, LoadError, describe_exception
from ..wire import Arrays

_DATATYPES = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(string)": "BYTES",
}
_NOISE = re.compile(
    r"^\[ONNXRuntimeError\] : \d+ : \w+ : "
    r"|Load model from .* failed:"
    r"|\S+\.(?:cc|cpp|h):\d+ (?:[^()\"']*::~?\w+\((?:[^()]|\([^()]*\))*\)(?: const)?|\w+)\s"
    r"|(?:This is an i|I)nvalid model\. "
    r"|\s*Please fix either the inputs/outputs or the model\."
)
"""What ONNX Runtime puts around a reason: its name and code, the file, the place in its source with the function's signature, advice."""

_MOST_CHARACTERS = 1_000
"""Of a reason: which opset a graph has, and which this ONNX Runtime knows, stand far behind its beginning."""

_PROBABILITIES = ("seq(map(int64,tensor(float)))", "seq(map(string,tensor(float)))")


def load(path: str, _declared: Mapping[str, Any]) -> OnnxModel:
    """Open the graph with as many threads as the supervisor says (``OMP_NUM_THREADS``), one by default."""
    options = onnxruntime.SessionOptions()
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    options.intra_op_num_threads = int(threads) if threads.isdigit() else 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        if not type(error).__module__.startswith("onnxruntime"):
            raise
        if "External data path" in str(error):
            raise LoadError("not_a_model", "the graph keeps tensors in files that did not come with it") from error
        raise LoadError("load_failed", f"the graph cannot be loaded: {_reason(error)}") from error
    return OnnxModel(session)


def _reason(error: BaseException) -> str:
    """Return what ONNX Runtime says without what it puts around it."""
    return _NOISE.sub("", describe_exception(error, _MOST_CHARACTERS)).rstrip(".")


class OnnxModel:
    """A session whose inputs and outputs are tensors; the class probabilities of converted classifiers become one too."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._strings = [node.name for node in session.get_inputs() if node.type == "tensor(string)"]
        self._output_types = {node.name: node.type for node in session.get_outputs()}

    def describe(self) -> dict[str, Any]:
        inputs = [self._describe_input(node) for node in self._session.get_inputs()]
        outputs = [spec for spec in map(_describe_output, self._session.get_outputs()) if spec is not None]
        if not inputs or not outputs:
            raise LoadError("not_a_model", "the graph has no input or no output that is a tensor")
        return {"inputs": inputs, "outputs": outputs, "feature_names": None}

    def predict(self, inputs: Arrays, outputs: Sequence[str]) -> Arrays:
        feed = dict(inputs)
        for name in self._strings:
            feed[name] = _texts(name, feed[name])
        try:
            answers = self._session.run(list(outputs), feed)
        except onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument as error:
            raise InvalidInputError(_reason(error)) from error
        except onnxruntime.capi.onnxruntime_pybind11_state.Fail as error:
            if _rows_differ(inputs):
                raise InvalidInputError("the inputs differ in how many rows they have, and the graph cannot join them") from error
            raise
        return {name: self._array(name, answer) for name, answer in zip(outputs, answers)}

    def _array(self, name: str, answer: Any) -> Any:
        if self._output_types[name] in _PROBABILITIES:
            return np.array([[row[label] for label in sorted(row)] for row in answer], dtype=np.float32)
        return np.asarray(answer)

    @staticmethod
    def _describe_input(node: Any) -> dict[str, Any]:
        if node.type not in _DATATYPES:
            raise LoadError("not_a_model", f"input '{node.name}' of the graph is {node.type}, which is not a tensor the platform knows")
        return {"name": node.name, "datatype": _DATATYPES[node.type], "shape": _shape(node)}


def _describe_output(node: Any) -> dict[str, Any] | None:
    if node.type in _PROBABILITIES:
        return {"name": node.name, "datatype": "FP32", "shape": [-1, -1]}
    if node.type not in _DATATYPES:
        return None
    return {"name": node.name, "datatype": _DATATYPES[node.type], "shape": _shape(node)}


def _shape(node: Any) -> list[int]:
    return [size if isinstance(size, int) and size > 0 else -1 for size in node.shape]


def _rows_differ(inputs: Arrays) -> bool:
    """Each input fits the signature by itself; together they may not."""
    return len({array.shape[0] for array in inputs.values() if array.ndim}) > 1


def _texts(name: str, values: Any) -> Any:
    try:
        texts = [value.decode("utf-8") if isinstance(value, bytes) else str(value) for value in values.reshape(-1).tolist()]
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"input '{name}' has an element that is not UTF-8 text") from error
    return np.array(texts, dtype=object).reshape(values.shape)
