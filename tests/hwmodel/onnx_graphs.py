"""ONNX files of a few nodes."""

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
helper, FLOAT = onnx.helper, onnx.TensorProto.FLOAT


def tensor(name, *shape, dtype=FLOAT):
    return helper.make_tensor(name, dtype, shape, np.zeros(shape, np.int8).ravel())


def integers(name, *values):
    return onnx.numpy_helper.from_array(np.array(values, np.int64), name)


def write(path, nodes, inputs, output, initializers=(), types=FLOAT, functions=(), domains=()):
    """A graph of inputs (name, shape) that ends in the output of a shape."""
    values = [helper.make_tensor_value_info(n, types, shape) for n, shape in inputs.items()]
    result = [helper.make_tensor_value_info("y", FLOAT, output)]
    graph = helper.make_graph(nodes, "net", values, result, list(initializers))
    opsets = [helper.make_opsetid("", 21), *(helper.make_opsetid(d, 1) for d in domains)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=list(functions))
    path = path / "net.onnx"
    onnx.save(model, str(path))
    return path
