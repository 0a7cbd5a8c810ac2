"""Who reads what: found alike in the program of a Flax model and in an ONNX graph."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from stp_jax import hwmodel, models
from stp_jax.hwmodel import Links
from stp_jax.hwmodel.network import dense
from stp_jax.hwmodel.readers.links import OUTSIDE, LinkReader, Value, joined


def links(network):
    return dict(zip(network.names, network.links, strict=True))


def traced(model, *shapes):
    return links(hwmodel.trace(model, *(jnp.zeros(shape) for shape in shapes)))


class Layers(nnx.Module):
    """Square dense layers a, b and c in the arrangement of a function."""

    def __init__(self, arrange, width=8):
        for name in "abc":
            setattr(self, name, nnx.Linear(width, width, rngs=nnx.Rngs(0)))
        self.arrange = arrange

    def __call__(self, *inputs):
        return self.arrange(self, *inputs)


ARRANGED = {
    "chain": (
        lambda m, x: m.c(nnx.relu(m.b(m.a(x)))),
        [Links(), Links(inputs="a"), Links(inputs="b", leaves=True)],
    ),
    "residual": (
        lambda m, x: m.c(m.b(y := m.a(x)) + y),
        [Links(), Links(inputs="a", merged="a"), Links(inputs="b", leaves=True)],
    ),
    "input added": (
        lambda m, x: m.b(m.a(x) + x),
        [Links(), Links(inputs="a", leaves=True)],
    ),
    "shortcut first": (
        lambda m, x: m.c(m.a(x) + m.b(x)),
        [Links(), Links(merged="a"), Links(inputs="b", leaves=True)],
    ),
    "two results": (
        lambda m, x: (y := m.a(x), m.b(y)),
        [Links(leaves=True), Links(inputs="a", leaves=True)],
    ),
    "two readers": (
        lambda m, x: m.b(y := m.a(x)) * m.c(y),
        [Links(), Links(inputs="a"), Links(inputs="a", merged="b", leaves=True)],
    ),
    "product": (
        lambda m, x: m.a(x) @ m.b(x).T,
        [Links(), Links(), Links(inputs="a", operands="b", leaves=True)],
    ),
    "halves": (
        lambda m, x: m.c(jnp.concatenate([m.a(x)[:, :2], m.b(x)[:, :6]], 1)),
        [Links(), Links(), Links(inputs=(("a", 0.25), ("b", 0.75)), leaves=True)],
    ),
    "input beside": (
        lambda m, x: m.c(jnp.concatenate([x[:, :4], m.a(x)[:, :4]], 1)),
        [Links(), Links(inputs=(("a", 0.5),), leaves=True)],
    ),
    "branches": (
        lambda m, x: m.c(jax.lax.cond(x.sum() > 0, lambda y: m.b(y) + y, lambda y: y, m.a(x))),
        [Links(), Links(inputs="a", merged="a"), Links(inputs="b", leaves=True)],
    ),
    "written into": (
        lambda m, x: m.b(jax.lax.dynamic_update_slice(x, m.a(x[:1]), (0, 0))),
        [Links(), Links(inputs=(("a", 0.25),), leaves=True)],
    ),
    "mapped": (
        lambda m, x: m.b(jax.vmap(m.a)(x)),
        [Links(), Links(inputs="a", leaves=True)],
    ),
    "jitted twice": (
        lambda m, x: (f := jax.jit(lambda x: m.a(x)))(f(x)),
        [Links(), Links(inputs="a", leaves=True)],
    ),
    "rematerialised": (
        lambda m, x: m.b(jax.checkpoint(lambda y: m.a(y) + y)(x)),
        [Links(), Links(inputs="a", leaves=True)],
    ),
}


@pytest.mark.parametrize(("arrange", "expected"), ARRANGED.values(), ids=ARRANGED)
def test_links_of_traced_layers(arrange, expected):
    assert list(traced(Layers(arrange), (4, 8)).values()) == expected


def test_what_scales_a_larger_tensor_changes_it_in_place():
    """Squeeze and excitation: the scales are done with once the map is multiplied."""

    class Excited(nnx.Module):
        def __init__(self):
            self.a, self.b = (nnx.Conv(4, 4, (3, 3), rngs=nnx.Rngs(0)) for _ in range(2))
            self.fc = nnx.Linear(4, 4, rngs=nnx.Rngs(0))

        def __call__(self, x):
            y = self.a(x)
            return self.b(y * jax.nn.sigmoid(self.fc(y.mean((1, 2))))[:, None, None])

    assert traced(Excited(), (1, 6, 6, 4)) == {
        "a": Links(),
        "fc": Links(inputs="a", merged="fc"),
        "b": Links(inputs="a", leaves=True),
    }


def test_pooled_outputs_are_added_to_what_comes_later():
    class Pooled(nnx.Module):
        def __init__(self):
            self.stem, self.conv = (nnx.Conv(4, 4, (3, 3), rngs=nnx.Rngs(0)) for _ in range(2))
            self.fc = nnx.Linear(4, 2, rngs=nnx.Rngs(0))

        def __call__(self, x):
            x = nnx.max_pool(self.stem(x), (2, 2), (2, 2))
            return self.fc((self.conv(x) + x).mean((1, 2)))

    assert traced(Pooled(), (1, 6, 6, 4)) == {
        "stem": Links(),
        "conv": Links(inputs="stem", merged="stem"),
        "fc": Links(inputs="conv", leaves=True),
    }


def test_steps_of_a_scan_read_the_state_of_the_one_before():
    assert traced(linen.RNN(linen.SimpleCell(8)), (2, 3, 4)) == {
        "cell.i": Links(),
        "cell.h": Links(merged="cell.i", leaves=True),
        "cell.i@2": Links(),
        "cell.h@2": Links(inputs="cell.h", merged="cell.i@2", leaves=True),
        "cell.i@3": Links(),
        "cell.h@3": Links(inputs="cell.h@2", merged="cell.i@3", leaves=True),
    }


def test_the_state_of_an_lstm_is_added_to_by_the_next_step():
    rnn = nnx.RNN(nnx.OptimizedLSTMCell(4, 8, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    found = traced(rnn, (2, 2, 4))
    assert found["cell.dense_h@2"] == Links(
        inputs="cell.dense_h", merged=("cell.dense_h", "cell.dense_i@2"), leaves=True
    )


def test_attention_reads_query_key_and_value():
    class Attending(nnx.Module):
        def __init__(self):
            self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.attention(x)

    found = traced(Attending(), (1, 5, 8))
    path = "attention"
    assert found[f"{path}.scores"] == Links(inputs=f"{path}.query", operands=f"{path}.key")
    assert found[f"{path}.context"] == Links(inputs=f"{path}.scores", operands=f"{path}.value")
    assert found[f"{path}.out"] == Links(inputs=f"{path}.context", leaves=True)


@pytest.mark.parametrize("past", [0, 18])
def test_a_traced_decoder_has_the_links_of_the_one_by_extents(past):
    sizes = {"width": 32, "depth": 2, "heads": 4, "kv_heads": 2, "hidden": 48}
    lm = models.create("decoder_lm", num_classes=40, rngs=nnx.Rngs(0), context=24, **sizes)

    class Call(nnx.Module):
        def __init__(self):
            self.lm = lm

        def __call__(self, tokens):
            return self.lm.continue_from(tokens, self.lm.empty_cache(3), past)[0]

    # The traced model's cache has room for its whole context of 24.
    network = hwmodel.trace(Call(), jax.ShapeDtypeStruct((3, 6), jnp.int32))
    ours = links(hwmodel.Decoder(**sizes, vocabulary=40).step(tokens=6, past=18, batch=3))
    for name, theirs in links(network).items():
        mine, path = ours[name.removeprefix("lm.")], "lm."
        assert theirs.inputs == tuple((path + n, share) for n, share in mine.inputs)
        assert theirs.operands == tuple((path + n, share) for n, share in mine.operands)
        assert theirs.merged == tuple(path + n for n in mine.merged)


def test_merging_takes_the_largest_and_the_latest_of_equals():
    reader = LinkReader()
    wide, narrow, late = (
        reader.layer(dense(n, 4, width), OUTSIDE) for n, width in (("w", 8), ("n", 2), ("l", 8))
    )
    assert reader.merge([wide, narrow]) == wide
    assert reader.merge([wide, OUTSIDE, late]) == late
    assert reader.merge([OUTSIDE]) == OUTSIDE
    merged = [link.merged for link in reader.network([late], "n").links]
    assert merged == [(), ("n",), ("w",)]


def test_joined_tensors_have_shares_of_elements():
    first, second = Value({0: 1.0}, 6), Value({0: 0.5, 1: 0.5}, 2)
    both = joined([(first, 6), (second, 2), (OUTSIDE, 8)])
    assert both.size == 16
    assert both.parts == {0: 7 / 16, 1: 1 / 16}
    assert joined([(first.within(0), 0)]) == OUTSIDE


class TestOnnx:
    """The same arrangements in graphs of nodes."""

    def read(self, tmp_path, nodes, inputs, output, constants=()):
        from onnx_graphs import helper, write

        made = [
            helper.make_node(op, i.split(), o.split(), name, **more)
            for op, i, o, name, *rest in nodes
            for more in [rest[0] if rest else {}]
        ]
        return links(hwmodel.read_onnx(write(tmp_path, made, inputs, output, constants)))

    def weights(self, *names):
        from onnx_graphs import tensor

        return [tensor(name, 8, 8) for name in names]

    def test_a_residual_addition_and_the_tensors_of_shapes(self, tmp_path):
        nodes = [
            ("MatMul", "x v", "t", "a"),
            ("Relu", "t", "r", "relu"),
            ("Shape", "r", "s", "shape"),
            ("MatMul", "r w", "u", "b"),
            ("Add", "u r", "v2", "add"),
            ("Reshape", "v2 s", "z", "reshape"),
            ("MatMul", "z q", "y", "c"),
        ]
        assert self.read(tmp_path, nodes, {"x": (4, 8)}, (4, 8), self.weights("v", "w", "q")) == {
            "a": Links(),
            "b": Links(inputs="a", merged="a"),
            "c": Links(inputs="b", leaves=True),
        }

    def test_concatenated_and_multiplied_outputs(self, tmp_path):
        nodes = [
            ("MatMul", "x v", "t", "a"),
            ("MatMul", "x w", "u", "b"),
            ("Transpose", "u", "ut", "transpose"),
            ("MatMul", "t ut", "s", "scores"),
            ("Concat", "t u x", "j", "join", {"axis": 0}),
            ("MatMul", "j q", "y", "c"),
        ]
        found = self.read(tmp_path, nodes, {"x": (4, 8)}, (12, 8), self.weights("v", "w", "q"))
        assert found["scores"] == Links(inputs="a", operands="b")
        assert found["c"].leaves
        np.testing.assert_allclose([share for _, share in found["c"].inputs], [1 / 3, 1 / 3])

    def test_steps_of_a_recurrence(self, tmp_path):
        from onnx_graphs import tensor

        constants = [tensor("w", 2, 5, 3), tensor("r", 2, 5, 5)]
        more = {"hidden_size": 5, "direction": "bidirectional"}
        nodes = [("RNN", "x w r", "y", "rnn", more)]
        found = self.read(tmp_path, nodes, {"x": (2, 1, 3)}, (2, 2, 1, 5), constants)
        assert found["rnn.input"] == Links()
        steps = [found[n] for n in ("rnn.recurrent", *(f"rnn.recurrent@{i}" for i in (2, 3, 4)))]
        assert [step.merged for step in steps] == 4 * [("rnn.input",)]
        sources = [step.inputs for step in steps]
        assert sources == [(), (("rnn.recurrent", 1.0),), (), (("rnn.recurrent@3", 1.0),)]
        assert all(step.leaves for step in steps)

    def test_the_larger_branch_is_followed(self, tmp_path):
        from onnx_graphs import FLOAT, helper, tensor, write

        def branch(name, node):
            out = helper.make_tensor_value_info(f"{name}_y", FLOAT, (4, 8))
            return helper.make_graph([node], name, [], [out])

        branches = {
            "then_branch": branch("then", helper.make_node("MatMul", ["t", "w"], ["then_y"], "b")),
            "else_branch": branch("else", helper.make_node("Relu", ["t"], ["else_y"], "r")),
        }
        nodes = [
            helper.make_node("MatMul", ["x", "v"], ["t"], "a"),
            helper.make_node("ReduceMax", ["x"], ["most"], "m", keepdims=0),
            helper.make_node("Less", ["zero", "most"], ["positive"], "l"),
            helper.make_node("If", ["positive"], ["u"], "if", **branches),
            helper.make_node("MatMul", ["u", "q"], ["y"], "c"),
        ]
        constants = [*self.weights("v", "w", "q"), tensor("zero")]
        network = hwmodel.read_onnx(write(tmp_path, nodes, {"x": (4, 8)}, (4, 8), constants))
        assert links(network) == {
            "a": Links(),
            "b": Links(inputs="a"),
            "c": Links(inputs="b", leaves=True),
        }
