import numpy as np
import pytest

from stp_jax import hwmodel

onnx = pytest.importorskip("onnx")
helper, FLOAT = onnx.helper, onnx.TensorProto.FLOAT


def tensor(name, *shape, dtype=FLOAT):
    return helper.make_tensor(name, dtype, shape, np.zeros(shape, np.int8).ravel())


def write(path, nodes, inputs, output, initializers=(), types=FLOAT):
    """A graph of inputs (name, shape) that ends in the output of a shape."""
    values = [helper.make_tensor_value_info(n, types, shape) for n, shape in inputs.items()]
    result = [helper.make_tensor_value_info("y", FLOAT, output)]
    graph = helper.make_graph(nodes, "net", values, result, list(initializers))
    opset = [helper.make_opsetid("", 21)]
    path = path / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), str(path))
    return path


def described(path):
    (layer,) = hwmodel.read_onnx(path)
    return layer.kind, layer.K, layer.P, layer.M, layer.groups


def test_convolutions_have_pads_and_dilations(tmp_path):
    node = helper.make_node(
        "Conv", ["x", "w"], ["y"], "c", strides=[2, 1], pads=[0, 1, 2, 3], dilations=[1, 2]
    )
    path = write(tmp_path, [node], {"x": (1, 3, 8, 9)}, (1, 4, 4, 9), [tensor("w", 4, 3, 3, 3)])
    (layer,) = hwmodel.read_onnx(path)
    assert layer.padding == ((0, 2), (1, 3))
    assert layer.dilation == (1, 2)
    assert layer.out_size == (4, 9)


@pytest.mark.parametrize(
    ("rule", "padding"),
    [("SAME_UPPER", ((0, 1),)), ("SAME_LOWER", ((1, 0),)), ("VALID", ((0, 0),))],
)
def test_automatic_pads(tmp_path, rule, padding):
    node = helper.make_node("Conv", ["x", "w"], ["y"], "c", strides=[2], auto_pad=rule)
    out = (1, 4, 3 if rule == "VALID" else 4)
    path = write(tmp_path, [node], {"x": (1, 3, 8)}, out, [tensor("w", 4, 3, 3)])
    (layer,) = hwmodel.read_onnx(path)
    assert layer.padding == padding


def test_weights_are_followed_to_their_constants(tmp_path):
    int8 = onnx.TensorProto.INT8
    nodes = [
        helper.make_node("Constant", [], ["q"], value=tensor("v", 7, 6, dtype=int8)),
        helper.make_node("DequantizeLinear", ["q", "scale"], ["d"]),
        helper.make_node("Transpose", ["d"], ["t"], perm=[1, 0]),
        helper.make_node("Identity", ["t"], ["w"]),
        helper.make_node("MatMul", ["x", "w"], ["y"], "fc"),
    ]
    path = write(tmp_path, nodes, {"x": (5, 6)}, (5, 7), [tensor("scale")])
    assert described(path) == ("dense", 6, 5, 7, 1)


@pytest.mark.parametrize(
    ("lhs", "rhs", "out", "expected"),
    [
        ((2, 3, 5, 6), (6, 7), (2, 3, 5, 7), ("dense", 6, 30, 7, 1)),
        ((5, 6), (6, 7), (5, 7), ("matmul", 6, 5, 7, 1)),
        ((2, 5, 6), (2, 6, 7), (2, 5, 7), ("matmul", 6, 5, 7, 2)),
        ((6,), (6, 7), (7,), ("dense", 6, 1, 7, 1)),
        ((5, 6), (6,), (5,), ("matmul", 6, 5, 1, 1)),
        ((6,), (6,), (), ("dense", 6, 1, 1, 1)),
        ((6,), (2, 6, 7), (2, 7), ("matmul", 6, 1, 7, 2)),
    ],
)
def test_products_are_those_of_numpy(tmp_path, lhs, rhs, out, expected):
    node = helper.make_node("MatMul", ["a", "b"], ["y"], "m")
    path = write(tmp_path, [node], {"a": lhs, "b": rhs}, out)
    assert described(path) == expected
    assert np.matmul(np.zeros(lhs), np.zeros(rhs)).shape == out


def test_what_is_not_read_is_refused_by_name(tmp_path):
    nodes = [
        helper.make_node("ConvTranspose", ["x", "w"], ["t"], "up"),
        helper.make_node("Conv", ["t", "w"], ["y"], "c"),
    ]
    path = write(tmp_path, nodes, {"x": (1, 3, 8)}, (1, 3, 8), [tensor("w", 3, 3, 3)])
    with pytest.raises(ValueError, match=r"up \(ConvTranspose\)"):
        hwmodel.read_onnx(path)


def test_a_broken_file_is_a_value_error(tmp_path):
    path = tmp_path / "net.onnx"
    path.write_bytes(b"\x0a\xff\xff\xff")
    with pytest.raises(ValueError, match=r"net\.onnx: not a valid ONNX model"):
        hwmodel.read_onnx(path)
    with pytest.raises(FileNotFoundError):
        hwmodel.read_onnx(tmp_path / "none.onnx")


def open_network(path):
    """A product of a shape that the graph computes, of inputs whose extents are open."""
    nodes = [
        helper.make_node("Shape", ["x"], ["s"], start=1),
        helper.make_node("ReduceProd", ["s", "axis"], ["rest"], keepdims=1),
        helper.make_node("Concat", ["batch", "rest"], ["both"], axis=0),
        helper.make_node("Reshape", ["x", "both"], ["f"]),
        helper.make_node("MatMul", ["f", "w"], ["y"], "fc"),
    ]
    integers = [helper.make_tensor(n, onnx.TensorProto.INT64, [1], [v]) for n, v in
                (("axis", 0), ("batch", -1))]  # fmt: skip
    shapes = {"x": ("batch", 2, "width")}
    return write(path, nodes, shapes, ("batch", 5), [tensor("w", 12, 5), *integers])


def test_open_extents_are_given_as_shapes(tmp_path):
    path = open_network(tmp_path)
    with pytest.raises(ValueError, match=r"open: x \(batch, 2, width\); give them as shapes="):
        hwmodel.read_onnx(path)
    with pytest.raises(ValueError, match=r"no such inputs: z; it has x"):
        hwmodel.read_onnx(path, shapes={"z": (1,)})
    for wrong in [(3, 2), (3, 2, 0)]:
        with pytest.raises(ValueError, match="'x' must be 3 positive extents"):
            hwmodel.read_onnx(path, shapes={"x": wrong})
    with pytest.raises(ValueError, match=r"net\.onnx: "):  # 2 · 7 inputs for 12 rows of weights
        hwmodel.read_onnx(path, shapes={"x": (3, 2, 7)})


def test_shapes_that_the_graph_computes_are_observed(tmp_path):
    pytest.importorskip("onnxruntime")
    (layer,) = hwmodel.read_onnx(open_network(tmp_path), shapes={"x": (3, 2, 6)})
    assert (layer.name, layer.kind, layer.K, layer.P, layer.M) == ("fc", "dense", 12, 3, 5)


def test_shapes_replace_those_of_the_file(tmp_path):
    node = helper.make_node("Conv", ["x", "w"], ["y"], "c", pads=[1, 1])
    path = write(tmp_path, [node], {"x": (1, 3, 8)}, (1, 4, 8), [tensor("w", 4, 3, 3)])
    (layer,) = hwmodel.read_onnx(path, shapes={"x": (2, 3, 16)})
    assert (layer.batch, layer.out_size) == (2, (16,))


@pytest.mark.parametrize(("operator", "gates"), [("RNN", 1), ("GRU", 3), ("LSTM", 4)])
@pytest.mark.parametrize("layout", [0, 1])
def test_recurrent_layers_are_products_of_input_and_state(tmp_path, operator, gates, layout):
    node = helper.make_node(
        operator, ["x", "w", "r"], ["y"], "rnn",
        hidden_size=5, direction="bidirectional", layout=layout,
    )  # fmt: skip
    steps, batch = 3, 2
    weights = [tensor("w", 2, gates * 5, 7), tensor("r", 2, gates * 5, 5)]
    shape, out = ((steps, batch, 7), (steps, 2, batch, 5))
    if layout:
        shape, out = (batch, steps, 7), (batch, steps, 2, 5)
    network = hwmodel.read_onnx(write(tmp_path, [node], {"x": shape}, out, weights))
    assert network.names[:3] == ("rnn.input", "rnn.state", "rnn.state@2")
    (first, *others) = [(layer.K, layer.P, layer.M) for layer in network]
    assert first == (7, steps * batch, 2 * gates * 5)
    assert others == 2 * steps * [(5, batch, gates * 5)]


def test_layers_in_branches_are_refused(tmp_path):
    product = helper.make_node("MatMul", ["x", "w"], ["z"], "inner")
    branch = helper.make_graph(
        [product], "b", [], [helper.make_tensor_value_info("z", FLOAT, (2, 4))]
    )
    node = helper.make_node("If", ["c"], ["y"], "choice", then_branch=branch, else_branch=branch)
    true = helper.make_tensor("c", onnx.TensorProto.BOOL, [], [True])
    path = write(tmp_path, [node], {"x": (2, 3)}, (2, 4), [tensor("w", 3, 4), true])
    with pytest.raises(ValueError, match=r"not modelled: choice \(If\)"):
        hwmodel.read_onnx(path)


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (helper.make_node("MatMul", ["x"], ["y"], "m"), r"m \(MatMul\): it needs two operands"),
        (helper.make_node("Conv", ["x", "w"], ["y"], pads=[1]), "not a valid ONNX model.*pads"),
    ],
)
def test_a_damaged_node_is_named(tmp_path, node, message):
    path = write(tmp_path, [node], {"x": (1, 3, 8)}, (1, 4, 8), [tensor("w", 4, 3, 3)])
    with pytest.raises(ValueError, match=message):
        hwmodel.read_onnx(path)


def test_onnx_graphs_become_networks(tmp_path):
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["y"], "conv", strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("GlobalAveragePool", ["y"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "g"], ["z"], "fc", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", FLOAT, [2, 3, 16, 16])],
        [helper.make_tensor_value_info("z", FLOAT, [2, 10])],
        [
            helper.make_tensor("w", FLOAT, [8, 3, 3, 3], np.zeros(216)),
            helper.make_tensor("g", FLOAT, [10, 8], np.zeros(80)),
        ],
    )
    path = tmp_path / "net.onnx"
    onnx.save(helper.make_model(graph), str(path))
    network = hwmodel.read_onnx(path)
    extents = [(layer.name, layer.K, layer.P, layer.M) for layer in network]
    assert extents == [("conv", 27, 2 * 64, 8), ("fc", 8, 2, 10)]


def bottleneck(opset):
    """A residual block and a head with the attributes and inputs of its opset's operators."""
    rng = np.random.default_rng(0)
    node = helper.make_node
    weights = [
        onnx.numpy_helper.from_array(rng.normal(0, 1, shape).astype(np.float32), name)
        for name, shape in {
            "w1": (8, 3, 3, 3),
            "w2": (8, 1, 3, 3),
            "w3": (8, 8, 1, 1),
            **dict.fromkeys(("scale", "shift", "mean", "var"), (8,)),
            "fc": (10, 8),
        }.items()
    ]
    axes = onnx.numpy_helper.from_array(np.array([2, 3]), "axes")
    if opset < 18:  # axes of reductions became an input
        mean = node("ReduceMean", ["r"], ["p"], axes=[2, 3], keepdims=0)
    else:
        mean = node("ReduceMean", ["r", "axes"], ["p"], keepdims=0)
    nodes = [
        node("Conv", ["x", "w1"], ["a"], "stem", strides=[2, 2], pads=[1, 1, 1, 1]),
        node("BatchNormalization", ["a", "scale", "shift", "mean", "var"], ["b"]),
        node("Clip", ["b"], ["c"]),
        node("Conv", ["c", "w2"], ["d"], "depthwise", group=8, pads=[1, 1, 1, 1]),
        node("Conv", ["d", "w3"], ["e"], "point"),
        node("Add", ["e", "c"], ["s"]),
        node("Relu", ["s"], ["r"]),
        mean,
        node("Gemm", ["p", "fc"], ["y"], "head", transB=1),
    ]
    return nodes, [*weights, axes] if opset >= 18 else weights, (2, 3, 16, 16), (2, 10)


def attention_block(opset):
    """Self-attention as exporters write it: MatMul, Reshape, Transpose, Softmax, Split."""
    rng = np.random.default_rng(0)
    node, array = helper.make_node, onnx.numpy_helper.from_array
    constants = [
        array(rng.normal(0, 1, (16, 48)).astype(np.float32), "qkv_w"),
        array(rng.normal(0, 1, (16, 16)).astype(np.float32), "out_w"),
        array(np.array([2, 6, 4, 4]), "heads"),
        array(np.array([2, 6, 16]), "merged"),
        array(np.float32(0.5), "half"),
    ]
    split: dict = {} if opset < 18 else {"num_outputs": 3}  # required from 18 on
    nodes = [node("MatMul", ["x", "qkv_w"], ["qkv"], "qkv")]
    nodes.append(node("Split", ["qkv"], ["q", "k", "v"], axis=2, **split))
    for name, order in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
        nodes.append(node("Reshape", [name, "heads"], [name + "r"]))
        nodes.append(node("Transpose", [name + "r"], [name + "t"], perm=order))
    nodes += [
        node("MatMul", ["qt", "kt"], ["s"], "scores"),
        node("Mul", ["s", "half"], ["m"]),
        node("Softmax", ["m"], ["p"], axis=-1),
        node("MatMul", ["p", "vt"], ["c"], "context"),
        node("Transpose", ["c"], ["ct"], perm=[0, 2, 1, 3]),
        node("Reshape", ["ct", "merged"], ["cm"]),
        node("MatMul", ["cm", "out_w"], ["y"], "out"),
    ]
    return nodes, constants, (2, 6, 16), (2, 6, 16)


@pytest.mark.parametrize("opset", range(11, 22))
@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (
            bottleneck,
            {
                "stem": ("conv", 27, 128, 8, 1),
                "depthwise": ("conv", 9, 128, 1, 8),
                "point": ("conv", 8, 128, 8, 1),
                "head": ("dense", 8, 2, 10, 1),
            },
        ),
        (
            attention_block,
            {
                "qkv": ("dense", 16, 12, 48, 1),
                "scores": ("matmul", 4, 6, 6, 8),
                "context": ("matmul", 6, 6, 4, 8),
                "out": ("dense", 16, 12, 16, 1),
            },
        ),
    ],
)
def test_every_opset_is_read_alike(tmp_path, opset, build, expected):
    nodes, constants, shape, out = build(opset)
    values = [helper.make_tensor_value_info("x", FLOAT, shape)]
    result = [helper.make_tensor_value_info("y", FLOAT, out)]
    graph = helper.make_graph(nodes, "net", values, result, constants)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=7)
    onnx.checker.check_model(proto, full_check=True)  # the graph is one of its opset
    path = tmp_path / "net.onnx"
    onnx.save(proto, str(path))
    layers = hwmodel.read_onnx(path)
    found = {n.name: (n.kind, n.K, n.P, n.M, n.groups) for n in layers}
    assert found == expected
