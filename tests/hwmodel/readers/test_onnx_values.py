"""Files as exporters write them: symbolic sizes, control flow, functions, weights elsewhere."""

import numpy as np
import pytest
from onnx_graphs import FLOAT, helper, integers, onnx, tensor, write

from stp_jax import hwmodel

node = helper.make_node


def attention_of_computed_shapes():
    """One head's split and merge with sizes from Shape, as PyTorch exports a symbolic batch."""
    nodes = [
        node("Shape", ["x"], ["size"]),
        node("Gather", ["size", "zero"], ["batch"], axis=0),
        node("Gather", ["size", "one"], ["length"], axis=0),
        node("Concat", ["batch", "length", "heads", "depth"], ["split"], axis=0),
        node("Reshape", ["x", "split"], ["h"]),
        node("Transpose", ["h"], ["q"], perm=[0, 2, 1, 3]),
        node("Transpose", ["h"], ["k"], perm=[0, 2, 3, 1]),
        node("MatMul", ["q", "k"], ["y"], "scores"),
    ]
    constants = [integers("zero", 0), integers("one", 1), integers("heads", 2)]
    return nodes, [*constants, integers("depth", 8)]


def test_symbolic_extents_are_given_by_the_caller(tmp_path):
    nodes, constants = attention_of_computed_shapes()
    symbolic = {"x": ("batch", "length", 16)}
    path = write(tmp_path, nodes, symbolic, ("batch", 2, "length", "length"), constants)
    (layer,) = hwmodel.read_onnx(path, shapes={"x": (3, 5, 16)})
    assert (layer.kind, layer.K, layer.P, layer.M, layer.groups) == ("matmul", 8, 5, 5, 6)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({}, r"\{'x': \(batch, length, 16\)\}; give their shapes"),
        ({"z": (1,)}, "no input 'z'; the inputs are \\['x'\\]"),
        ({"x": (3, 5)}, r"'x' is \(batch, length, 16\) in the file, .* \(3, 5\) does not fit"),
        ({"x": (3, 5, 17)}, "does not fit"),
        ({"x": (3, 0, 16)}, "does not fit"),
        ({"x": (3, "length", 16)}, "does not fit"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(tmp_path, shapes, message):
    nodes, constants = attention_of_computed_shapes()
    path = write(tmp_path, nodes, {"x": ("batch", "length", 16)}, None, constants)
    with pytest.raises(ValueError, match=message):
        hwmodel.read_onnx(path, shapes=shapes)


def test_nodes_that_do_not_fit_their_inputs_are_named(tmp_path):
    nodes = [node("MatMul", ["x", "w"], ["y"], "m")]
    path = write(tmp_path, nodes, {"x": ("n", "k")}, ("n", 7), [tensor("w", 6, 7)])
    with pytest.raises(ValueError, match=r"m: MatMul does not fit .*'x': \(2, 5\)"):
        hwmodel.read_onnx(path, shapes={"x": (2, 5)})


def test_a_shape_that_depends_on_data_names_its_origin(tmp_path):
    nodes = [
        node("NonZero", ["x"], ["found"], "where"),
        node("Cast", ["found"], ["f"], to=FLOAT),
        node("MatMul", ["w", "f"], ["y"], "m"),
    ]
    path = write(tmp_path, nodes, {"x": (4, 4)}, None, [tensor("w", 3, 2)])
    with pytest.raises(ValueError, match=r"m \(MatMul\): the shape of 'f' .* from 'where' on"):
        hwmodel.read_onnx(path)


def test_what_the_file_says_of_such_a_shape_is_taken(tmp_path):
    nodes = [node("NonZero", ["x"], ["found"]), node("Cast", ["found"], ["f"], to=FLOAT)]
    nodes.append(node("MatMul", ["w", "f"], ["y"], "m"))
    path = write(tmp_path, nodes, {"x": (4, 4)}, None, [tensor("w", 3, 2)])
    model = onnx.load(str(path))
    model.graph.value_info.append(helper.make_tensor_value_info("f", FLOAT, (2, 9)))
    onnx.save(model, str(path))
    assert hwmodel.read_onnx(path).macs == 3 * 2 * 9


def test_operators_of_other_domains_are_refused_by_name(tmp_path):
    nodes = [
        node("FusedConv", ["x", "w"], ["t"], "fused", domain="com.microsoft"),
        node("Conv", ["t", "w"], ["y"], "c"),
    ]
    weights = [tensor("w", 3, 3, 3)]
    path = write(tmp_path, nodes, {"x": (1, 3, 8)}, None, weights, domains=["com.microsoft"])
    with pytest.raises(ValueError, match="fused: operator FusedConv of com"):
        hwmodel.read_onnx(path)


def branches(condition):
    """x @ w of eight filters, or of two, as the condition says."""

    def graph(name, kernel):
        result = [helper.make_tensor_value_info(name, FLOAT, None)]
        product = node("MatMul", ["x", kernel], [name], f"to_{kernel}")
        return helper.make_graph([product], name, [], result)

    choice = node(
        "If",
        ["wide"],
        ["t"],
        "choice",
        then_branch=graph("a", "w8"),
        else_branch=graph("b", "w2"),
    )
    rest = node("ReduceSum", ["t", "axis"], ["y"])
    constants = [tensor("w8", 6, 8), tensor("w2", 6, 2), integers("axis", 1), integers("six", 6)]
    return [*condition, choice, rest], constants


@pytest.mark.parametrize(("columns", "layer"), [(6, "to_w8"), (7, None)])
def test_an_if_of_shapes_takes_its_branch(tmp_path, columns, layer):
    condition = [
        node("Shape", ["z"], ["size"]),
        node("Equal", ["size", "six"], ["same"]),
        node("Squeeze", ["same"], ["wide"]),
    ]
    nodes, constants = branches(condition)
    path = write(tmp_path, nodes, {"x": (5, 6), "z": (columns,)}, None, constants)
    assert hwmodel.read_onnx(path).names == (layer or "to_w2",)


def test_an_if_of_data_takes_the_branch_of_more_work_or_the_given_one(tmp_path):
    nodes, constants = branches([node("Cast", ["rate"], ["wide"], to=onnx.TensorProto.BOOL)])
    path = write(tmp_path, nodes, {"x": (5, 6), "rate": ()}, None, constants)
    assert hwmodel.read_onnx(path).names == ("to_w8",)
    assert hwmodel.read_onnx(path, values={"rate": 0}).names == ("to_w2",)


def loop(body):
    """Three runs of a body that hands on a tensor of four numbers."""
    state = [helper.make_tensor_value_info("in", FLOAT, (4,))]
    counter = helper.make_tensor_value_info("i", onnx.TensorProto.INT64, ())
    going = helper.make_tensor_value_info("go", onnx.TensorProto.BOOL, ())
    out = [going, helper.make_tensor_value_info("out", FLOAT, (4,))]
    graph = helper.make_graph(body, "body", [counter, going, *state], out)
    return node("Loop", ["three", "", "s"], ["last"], "again", body=graph)


def test_layers_in_loops_are_refused_and_loops_without_are_none(tmp_path):
    constants = [integers("three", 3), tensor("s", 4), tensor("w", 4, 4), tensor("v", 6, 7)]
    rest = node("MatMul", ["x", "v"], ["y"], "m")
    inside = loop([node("MatMul", ["in", "w"], ["out"], "inner")])
    path = write(tmp_path, [inside, rest], {"x": (5, 6)}, (5, 7), constants)
    with pytest.raises(ValueError, match=r"again: layers in a Loop are not read: inner \(MatMul\)"):
        hwmodel.read_onnx(path)
    without = loop([node("Relu", ["in"], ["out"])])
    path = write(tmp_path, [without, rest], {"x": (5, 6)}, (5, 7), constants)
    assert hwmodel.read_onnx(path).names == ("m",)


def test_unknown_operators_are_refused_in_loops_and_behind_them(tmp_path):
    constants = [integers("three", 3), tensor("s", 4), tensor("w", 4, 4), tensor("v", 6, 7)]
    rest = node("MatMul", ["x", "v"], ["y"], "m")
    fused = {"domain": "com.microsoft"}
    inside = loop([node("FusedMatMul", ["in", "w"], ["out"], "inner", **fused)])
    behind = node("FusedMatMul", ["last", "w"], ["t"], "behind", **fused)
    relu = loop([node("Relu", ["in"], ["out"])])
    for nodes, message in (
        ([inside, rest], r"layers in a Loop are not read: inner \(FusedMatMul\)"),
        ([relu, behind, rest], "behind: operator FusedMatMul of com"),
    ):
        path = write(tmp_path, nodes, {"x": (5, 6)}, None, constants, domains=["com.microsoft"])
        with pytest.raises(ValueError, match=message):
            hwmodel.read_onnx(path)


def test_functions_are_inlined(tmp_path):
    body = [node("MatMul", ["a", "b"], ["c"], "inner")]
    opset = [helper.make_opsetid("", 21)]
    function = helper.make_function("local", "Linear", ["a", "b"], ["c"], body, opset)
    nodes = [node("Linear", ["x", "w"], ["y"], "fc", domain="local")]
    path = write(
        tmp_path,
        nodes,
        {"x": (5, 6)},
        (5, 7),
        [tensor("w", 6, 7)],
        functions=[function],
        domains=["local"],
    )
    (layer,) = hwmodel.read_onnx(path)
    assert (layer.kind, layer.K, layer.P, layer.M) == ("dense", 6, 5, 7)


def test_weights_in_another_file_are_not_needed(tmp_path):
    weights = onnx.numpy_helper.from_array(np.zeros((600, 700), np.float32), "w")
    path = write(
        tmp_path, [node("MatMul", ["x", "w"], ["y"], "m")], {"x": (5, 600)}, None, [weights]
    )
    model = onnx.load(str(path))
    onnx.save(model, str(path), save_as_external_data=True, location="weights.bin")
    (tmp_path / "weights.bin").unlink()
    assert hwmodel.read_onnx(path).macs == 5 * 600 * 700


def test_sizes_in_another_file_are_read(tmp_path):
    nodes = [node("Reshape", ["x", "size"], ["r"]), node("MatMul", ["r", "w"], ["y"], "m")]
    constants = [integers("size", 10, 3), tensor("w", 3, 7)]
    path = write(tmp_path, nodes, {"x": (5, 6)}, None, constants)
    onnx.save(
        onnx.load(str(path)),
        str(path),
        save_as_external_data=True,
        location="sizes.bin",
        size_threshold=0,
    )
    assert hwmodel.read_onnx(path).layers[0].P == 10
    (tmp_path / "sizes.bin").unlink()
    with pytest.raises(ValueError, match="the shape of 'r' is not known"):
        hwmodel.read_onnx(path)


@pytest.mark.parametrize("kind", [0, 64])
def test_a_constant_of_no_type_is_named(tmp_path, kind):
    damaged = tensor("w", 3, 4)
    damaged.data_type = kind
    path = write(
        tmp_path, [node("MatMul", ["x", "w"], ["y"], "m")], {"x": (2, 3)}, (2, 4), [damaged]
    )
    with pytest.raises(ValueError, match=r"net\.onnx: the constant 'w' is damaged"):
        hwmodel.read_onnx(path)


def test_a_version_that_no_opset_has_is_refused(tmp_path):
    path = write(tmp_path, [node("Relu", ["x"], ["y"], "r")], {"x": (2, 3)}, (2, 3))
    model = onnx.load(str(path))
    model.opset_import[0].version = 1 << 40
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match="r: operator Relu is not known"):
        hwmodel.read_onnx(path)


@pytest.mark.parametrize(
    "damaged",
    [node("MatMul", ["x"], ["y"], "m"), node("If", [], ["y"], "m"), node("Shape", [], ["y"], "m")],
    ids=["product", "branch", "shape"],
)
def test_a_node_without_its_inputs_is_named(tmp_path, damaged):
    path = write(tmp_path, [damaged], {"x": (2, 3)}, (2, 4))
    with pytest.raises(ValueError, match=r"net\.onnx: m"):
        hwmodel.read_onnx(path)
