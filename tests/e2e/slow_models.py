"""Models whose time to answer is in the request: ONNX graphs that loop as often as the first feature says."""

import numpy as np
import onnx
from onnx import TensorProto, helper


def looping_model() -> bytes:
    """A graph ``[-1, 2] → [-1]``: the sum of each row, after as many turns of an empty loop as the largest first feature says.

    A turn takes about a microsecond: 5 000 make a slow model, 10 000 000 000 one that hangs.
    """
    count = helper.make_tensor_value_info("turn", TensorProto.INT64, [])
    going = helper.make_tensor_value_info("going", TensorProto.BOOL, [])
    still = helper.make_tensor_value_info("still", TensorProto.BOOL, [])
    state_in = helper.make_tensor_value_info("state_in", TensorProto.FLOAT, [])
    state_out = helper.make_tensor_value_info("state_out", TensorProto.FLOAT, [])
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["going"], ["still"]),
            helper.make_node("Identity", ["state_in"], ["state_out"]),
        ],
        "body",
        [count, going, state_in],
        [still, state_out],
    )
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["x", "zero"], ["firsts"], axis=1),
            helper.make_node("ReduceMax", ["firsts"], ["largest"], keepdims=0),
            helper.make_node("Cast", ["largest"], ["turns"], to=TensorProto.INT64),
            helper.make_node("Loop", ["turns", "true", "start"], ["end"], body=body),
            helper.make_node("ReduceSum", ["x", "one"], ["sums"], keepdims=0),
            helper.make_node("Add", ["sums", "end"], ["y"]),
        ],
        "looping",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None])],
        [
            onnx.numpy_helper.from_array(np.array(0, dtype=np.int64), "zero"),
            onnx.numpy_helper.from_array(np.array([1], dtype=np.int64), "one"),
            onnx.numpy_helper.from_array(np.array(True), "true"),
            onnx.numpy_helper.from_array(np.array(0.0, dtype=np.float32), "start"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString()
    return content
