import numpy as np
import pytest
from onnx_graphs import FLOAT, helper, onnx, tensor, write

from stp_jax import hwmodel


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
        helper.make_node("DeformConv", ["x", "w", "o"], ["t"], "bent"),
        helper.make_node("Conv", ["t", "w"], ["y"], "c"),
    ]
    inputs = {"x": (1, 3, 8, 8), "o": (1, 18, 6, 6)}
    path = write(tmp_path, nodes, inputs, (1, 3, 4, 4), [tensor("w", 3, 3, 3, 3)])
    with pytest.raises(ValueError, match=r"bent \(DeformConv\)"):
        hwmodel.read_onnx(path)


def test_constants_of_three_axes_and_constants_on_the_left_are_dense_layers(tmp_path):
    node = helper.make_node("MatMul", ["x", "w"], ["y"], "m")
    path = write(tmp_path, [node], {"x": (1, 5, 6)}, (1, 5, 7), [tensor("w", 1, 6, 7)])
    assert described(path) == ("dense", 6, 5, 7, 1)
    node = helper.make_node("MatMul", ["w", "x"], ["y"], "m")
    path = write(tmp_path, [node], {"x": (2, 6, 5)}, (2, 7, 5), [tensor("w", 7, 6)])
    assert described(path) == ("dense", 6, 10, 7, 1)


def test_products_of_constants_are_left_out(tmp_path):
    nodes = [
        helper.make_node("MatMul", ["v", "w"], ["u"], "folded"),
        helper.make_node("MatMul", ["x", "u"], ["y"], "m"),
    ]
    constants = [tensor("v", 6, 3), tensor("w", 3, 7)]
    path = write(tmp_path, nodes, {"x": (5, 6)}, (5, 7), constants)
    assert described(path) == ("dense", 6, 5, 7, 1)


def test_names_that_repeat_are_numbered(tmp_path):
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["u"], "m"),
        helper.make_node("MatMul", ["u", "w"], ["y"], "m"),
    ]
    path = write(tmp_path, nodes, {"x": (5, 6)}, (5, 6), [tensor("w", 6, 6)])
    assert hwmodel.read_onnx(path).names == ("m", "m@2")


@pytest.mark.parametrize(
    ("groups", "expected"), [(1, ("dense", 4, 27, 54, 1)), (2, ("matmul", 2, 27, 54, 2))]
)
def test_transposed_convolutions_are_products_of_every_input_pixel(tmp_path, groups, expected):
    node = helper.make_node("ConvTranspose", ["x", "w"], ["y"], "up", strides=[2, 2], group=groups)
    kernel = tensor("w", 4, 6, 3, 3)  # 6 filters a group
    path = write(tmp_path, [node], {"x": (3, 4, 3, 3)}, (3, 6 * groups, 7, 7), [kernel])
    assert described(path) == expected


INT8, UINT8 = onnx.TensorProto.INT8, onnx.TensorProto.UINT8


@pytest.mark.parametrize(
    ("operator", "kernel", "expected"),
    [
        ("ConvInteger", (4, 3, 3), ("conv", 9, 12, 4, 1)),
        ("QLinearConv", (4, 3, 3), ("conv", 9, 12, 4, 1)),
        ("MatMulInteger", (8, 5), ("dense", 8, 6, 5, 1)),
        ("QLinearMatMul", (8, 5), ("dense", 8, 6, 5, 1)),
    ],
)
def test_quantized_operators_are_the_layers_that_they_stand_for(
    tmp_path, operator, kernel, expected
):
    shape = (2, 3, 8)
    constants = [tensor("w", *kernel, dtype=INT8), tensor("s"), tensor("z", dtype=UINT8)]
    constants.append(tensor("zw", dtype=INT8))
    inputs = ["x", "w", "z", "zw"]
    if operator.startswith("QLinear"):
        inputs = ["x", "s", "z", "w", "s", "zw", "s", "z"]
    node = helper.make_node(operator, inputs, ["y"], "q")
    out = (2, 4, 6) if "Conv" in operator else (2, 3, 5)
    assert described(write(tmp_path, [node], {"x": shape}, out, constants, UINT8)) == expected


@pytest.mark.parametrize(
    ("operator", "gates", "direction", "layout"),
    [
        ("LSTM", 4, "forward", 0),
        ("GRU", 3, "bidirectional", 0),
        ("RNN", 1, "reverse", 1),
        ("DynamicQuantizeLSTM", 4, "bidirectional", 0),
    ],
)
def test_recurrent_layers_are_a_product_of_inputs_and_one_of_the_state_a_step(
    tmp_path, operator, gates, direction, layout
):
    ways = 2 if direction == "bidirectional" else 1
    kernels = [tensor("w", ways, gates * 5, 6), tensor("r", ways, gates * 5, 5)]
    options = {"hidden_size": 5, "direction": direction}
    domains = ["com.microsoft"] if "Quantize" in operator else []
    if not domains:
        options["layout"] = layout
    node = helper.make_node(
        operator, ["x", "w", "r"], ["y"], "r", domain="".join(domains), **options
    )
    x = (7, 2, 6) if layout == 0 else (2, 7, 6)  # seven steps of two examples
    path = write(tmp_path, [node], {"x": x}, (7, ways, 2, 5), kernels, domains=domains)
    network = hwmodel.read_onnx(path)
    first, *rest = ((layer.kind, layer.K, layer.P, layer.M) for layer in network)
    assert first == ("dense", 6, 14, ways * gates * 5)
    assert rest == 7 * ways * [("dense", 5, 2, gates * 5)]
    assert network.names[:3] == ("r.input", "r.recurrent", "r.recurrent@2")


@pytest.mark.parametrize(
    ("equation", "inputs", "expected"),
    [
        ("bik,kj->bij", ["x", "w"], ("dense", 6, 10, 7, 1)),
        ("kj,bik->bij", ["w", "x"], ("dense", 6, 10, 7, 1)),
        ("bik,kj", ["x", "w"], ("dense", 6, 10, 7, 1)),  # letters of the result in their order
        ("bik,bjk->bij", ["x", "x"], ("matmul", 6, 5, 5, 2)),
    ],
)
def test_einsums_of_two_operands(tmp_path, equation, inputs, expected):
    node = helper.make_node("Einsum", inputs, ["y"], "e", equation=equation)
    path = write(tmp_path, [node], {"x": (2, 5, 6)}, (2, 5, None), [tensor("w", 6, 7)])
    assert described(path) == expected


def test_weights_may_stand_first_in_a_product_of_matrices(tmp_path):
    node = helper.make_node("MatMul", ["w", "x"], ["y"], "e")
    path = write(tmp_path, [node], {"x": (4, 8, 6)}, (4, 16, 6), [tensor("w", 4, 16, 8)])
    assert described(path) == ("matmul", 8, 6, 16, 4)


def test_an_einsum_of_three_operands_is_refused_by_name(tmp_path):
    node = helper.make_node("Einsum", ["x", "w", "w"], ["y"], "e", equation="ik,kj,kj->ij")
    path = write(tmp_path, [node], {"x": (5, 6)}, (5, 7), [tensor("w", 6, 7)])
    with pytest.raises(ValueError, match="e: an Einsum of 3 operands"):
        hwmodel.read_onnx(path)


def test_a_broken_file_is_a_value_error(tmp_path):
    path = tmp_path / "net.onnx"
    path.write_bytes(b"\x0a\xff\xff\xff")
    with pytest.raises(ValueError, match=r"net\.onnx: not a valid ONNX model"):
        hwmodel.read_onnx(path)
    with pytest.raises(FileNotFoundError):
        hwmodel.read_onnx(tmp_path / "none.onnx")


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
