"""Wrong inputs to the public API: each is a clear error before any work, never a wrong result.

Configuration keys have a table of their own in tests/experiments/test_config.py.
"""

import io
import json
import pickle
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import stp_jax
from stp_jax import data, export, hwmodel, models, terms
from stp_jax.hwmodel import Array, GroupPE, Layer, Network, conv, dense, evaluate
from stp_jax.terms import allocate_budgets, budget_schedule, decode, encode, pack, project


def make_mlp():
    return models.create("mlp", num_classes=3, rngs=nnx.Rngs(0), in_features=4, hidden=(4,))


def make_stp():
    return stp_jax.quantize(make_mlp(), policy(budget=4))


def policy(**rule):
    return stp_jax.Policy([stp_jax.Rule(**{"path": ".*", **rule})])


def rule(**attributes):
    return stp_jax.Rule(**{"path": ".*", **attributes})


def projected(w=(1, 2, 3, 4), **arguments):
    return project(np.asarray(w), **{"group_size": 4, "budget": 4, "axis": 0, **arguments})


def packed(v=(7, 0, 0, -8), **arguments):
    return pack(np.asarray(v), **{"group_size": 4, "budget": 4, "axis": 0, **arguments})


def array(**attributes):
    return Array(**{"rows": 4, "cols": 4, **attributes})


def evaluated(**arguments):
    network = Network((dense("fc", 8, 4),))
    return evaluate(network, array(pe=GroupPE()), **arguments)


def convolution(**arguments):
    known = {"channels": 1, "filters": 1, "kernel": (3, 3), **arguments}
    return conv("c", known.pop("in_size", (8, 8)), **known)


def updated_without_targets():
    guidance = terms.guide(0.1)
    params = {"w": jnp.ones(2)}
    return guidance.update(params, guidance.init(params), params)


NAN = float("nan")

# what is wrong: (the call, what its message says)
WRONG = {
    # Encodings.
    "encode: fractions": (lambda: encode([1.5]), "defined on integers, got dtype float32"),
    "encode: truth values": (lambda: encode([True]), "defined on integers, got dtype bool"),
    "encode: text": (lambda: encode("7"), "expected numbers, got"),
    "encode: nothing": (lambda: encode(None), "expected an array of numbers"),
    "project: objects": (
        lambda: projected(w=np.array([1, None, 2, 3])),
        "expected an array of numbers, got one of Python objects",
    ),
    "encode: unknown encoding": (lambda: encode([1], "csd"), "choose one of binary, booth4, naf"),
    "encode: no bits": (lambda: encode([1], bits=0), "bits must be an integer from 1 to 24"),
    "encode: too many bits": (lambda: encode([1], bits=25), "bits must be an integer from 1 to 24"),
    "encode: fractional bits": (lambda: encode([1], bits=8.0), "bits must be an integer"),
    "encode: bits true": (lambda: encode([1], bits=True), "bits must be an integer"),
    "encode: too large": (lambda: encode([300]), "magnitude 300 does not fit bits=8"),
    "encode: beyond int32": (lambda: encode(np.array([2**40])), "does not fit bits=31"),
    "encode: least int32": (lambda: encode(np.array([-(2**31)], np.int32)), "does not fit"),
    "decode: a digit of 2": (lambda: decode([2, 0, 0]), "digits must be -1, 0 or 1"),
    "decode: fractions": (lambda: decode([1.0, 0.0]), "defined on integers"),
    "decode: no axis": (lambda: decode(1), "at least one axis"),
    "count: unknown encoding": (lambda: terms.count([1], "x"), "unknown encoding 'x'"),
    "max_budget: no group": (lambda: terms.max_budget(0), "group_size must be a positive integer"),
    "max_budget: half": (lambda: terms.max_budget(1.5), "group_size must be a positive integer"),
    "values: negative terms": (lambda: terms.few_term_values(-1), "terms must be 0 or more"),
    "values: limit": (lambda: terms.few_term_values(1, limit=1000), "limit must be from 0 to 128"),
    # Projection.
    "project: negative budget": (lambda: projected(budget=-1), r"budget -1 is outside \[0, 16\]"),
    "project: too high a budget": (lambda: projected(budget=99), "has at most 16 terms"),
    "project: fractional budget": (lambda: projected(budget=1.5), "budgets are integers"),
    "project: two budgets": (
        lambda: projected(budget=[1, 2]),
        "use vmap for several sets of budgets",
    ),
    "project: no budget": (lambda: projected(budget=None), "budgets are integers, got None"),
    "project: axis": (lambda: projected(axis=3), r"axis 3 does not exist in weights of shape \(4,"),
    "project: no axis": (lambda: projected(axis=None), "axis must be an integer, got None"),
    "project: a scalar": (
        lambda: projected(3.0),
        r"axis 0 does not exist in weights of shape \(\)",
    ),
    "project: no group": (lambda: projected(group_size=0), "group_size must be a positive"),
    "project: fractional group": (
        lambda: projected(group_size=2.0),
        "group_size must be a positive",
    ),
    "project: method": (lambda: projected(method="best"), "choose one of optimal, greedy"),
    "project: limit": (lambda: projected(limit=5), "limit must be 127"),
    "project: complex": (lambda: projected([1j]), "weights must be real numbers, got complex64"),
    "project: truth values": (lambda: projected([True]), "weights must be real numbers, got bool"),
    "project: NaN": (lambda: projected([NAN, 1.0]), "1 of the 2 weights are NaN"),
    "project: importance's shape": (
        lambda: projected(importance=np.ones(3)),
        r"importance of shape \(3,\) does not broadcast to \(4,\)",
    ),
    "project: negative importance": (
        lambda: projected(importance=-np.ones(4)),
        "importance must be finite and 0 or more",
    ),
    "project: importance NaN": (
        lambda: projected(importance=np.full(4, NAN)),
        "importance must be finite and 0 or more",
    ),
    "project: greedy and booth4": (
        lambda: projected(method="greedy", encoding="booth4"),
        "what is left of a booth4 number can need more",
    ),
    "project: text": (lambda: projected("L"), r"expected numbers, got array\('L'"),
    "project: importance and greedy": (
        lambda: projected(importance=np.ones(4), method="greedy"),
        "use method='optimal'",
    ),
    # Packed terms.
    "pack: fractions": (lambda: packed([1.0]), "packed from integers, got dtype float64"),
    "pack: too many terms": (lambda: packed(budget=2), "holds 3 terms, more than the budget of 2"),
    "pack: too large": (lambda: packed([700]), r"integers must lie in \[-128, 128\]"),
    "pack: no axis": (lambda: packed(axis=None), "axis must be an integer"),
    "pack: no budget": (lambda: packed(budget=0), "a budget of 0 holds zeros only"),
    "stream: too short": (
        lambda: terms.PackedTerms(
            data=np.zeros(1, np.uint8), shape=(4,), axis=0, group_size=4, budget=4
        ),
        r"takes uint8\[3\], got uint8\[1\]",
    ),
    "stream: a list": (
        lambda: terms.PackedTerms(data=[0], shape=(4,), axis=0, group_size=4, budget=4),
        "a NumPy array of uint8, got list",
    ),
    "unpack: nothing": (lambda: terms.unpack(None), "expected PackedTerms"),
    "packed_dot: one axis": (
        lambda: terms.packed_dot([1], packed()),
        "a dense kernel has two axes",
    ),
    # Budgets and guidance.
    "budgets: other layers": (
        lambda: allocate_budgets({"a": [1, 0]}, {"b": 1}, 1),
        "must name the same layers; only one has a, b",
    ),
    "budgets: free terms": (
        lambda: allocate_budgets({"a": [1, 0]}, {"a": 0}, 1),
        "cost of a term must be positive",
    ),
    "budgets: too little": (
        lambda: allocate_budgets({"a": [1, 0]}, {"a": 1}, 0.5),
        "does not reach the minimum budget",
    ),
    "budgets: a total of NaN": (
        lambda: allocate_budgets({"a": [1, 0]}, {"a": 1}, NAN),
        "the total must be a finite number",
    ),
    "budgets: a curve of NaN": (
        lambda: allocate_budgets({"a": [NAN, 0]}, {"a": 1}, 1),
        "its error curve is not finite",
    ),
    "schedule: negative": (lambda: budget_schedule(-1, 2, 3), "budgets must be 0 or more"),
    "schedule: no steps": (lambda: budget_schedule(1, 2, 0), "steps must be 1 or more"),
    "guidance: too strong": (lambda: terms.guide(2.0), r"strength must lie in \[0, 1\]"),
    "guidance: no targets": (updated_without_targets, "guide needs params and targets"),
    # Policies.
    "rule: path": (lambda: rule(path="("), "is no regular expression"),
    "rule: no path": (lambda: rule(path=None), "path must be a regular expression, a string"),
    "rule: budget": (lambda: rule(budget=99), r"budget 99 is outside \[0, 32\]"),
    "rule: group size": (lambda: rule(group_size=0), "group_size must be a positive integer"),
    "rule: encoding": (lambda: rule(encoding="csd"), "unknown encoding 'csd'"),
    "rule: method": (lambda: rule(method="best"), "unknown method 'best'"),
    "rule: bits": (lambda: rule(bits=1), "bits must be 2 or more"),
    "rule: scale": (lambda: rule(weight_scale="x"), "weight_scale must be one of max, search"),
    "rule: activations": (lambda: rule(activations="x"), "activations must be one of none"),
    "rule: activation bits": (
        lambda: rule(activation_bits=2.5),
        "activation_bits must be an integer",
    ),
    "policy: text": (lambda: stp_jax.Policy("abc"), "takes a sequence of Rules, got 'abc'"),
    "policy: a rule alone": (lambda: stp_jax.Policy(rule()), "takes a sequence of Rules"),
    "policy: no rules": (lambda: stp_jax.Policy([3]), "one of them is 3"),
    "quantize: no model": (
        lambda: stp_jax.quantize(3, policy()),
        "takes a Flax NNX or Linen module",
    ),
    "quantize: no policy": (lambda: stp_jax.quantize(make_mlp(), [rule()]), "must be a Policy"),
    "quantize: no such layer": (
        lambda: stp_jax.quantize(make_mlp(), policy(path="conv1")),
        "no layer has such a path; near misses",
    ),
    "quantize: twice": (lambda: stp_jax.quantize(make_stp(), policy()), "quantized already"),
    "calibrate: no batch": (lambda: stp_jax.calibrate(make_stp(), []), "at least one batch"),
    "calibrate: NaN": (
        lambda: stp_jax.calibrate(make_stp(), [jnp.ones((2, 4)), jnp.full((2, 4), jnp.nan)]),
        "batch 1 has 8 values that are NaN or infinite",
    ),
    "set_budgets: no such layer": (
        lambda: stp_jax.set_budgets(make_stp(), {"fc": 3}),
        "no quantized layer at fc; there are: layers.0",
    ),
    "set_budgets: too high": (
        lambda: stp_jax.set_budgets(make_stp(), {"layers.0": 99}),
        "layer 'layers.0': budget 99 is outside",
    ),
    # Models and data.
    "model: name": (
        lambda: models.create("resnet19", num_classes=3, rngs=nnx.Rngs(0)),
        "did you mean resnet18",
    ),
    "model: no classes": (
        lambda: models.create("mlp", num_classes=0, rngs=nnx.Rngs(0), in_features=4),
        "num_classes must be a positive integer",
    ),
    "model: option": (
        lambda: models.create("mlp", num_classes=3, rngs=nnx.Rngs(0), in_features=4, depth=3),
        "has no option 'depth'",
    ),
    "data: name": (lambda: data.load("no_such"), "no data set is called 'no_such'"),
    "packed file: none": (lambda: export.load_packed(make_mlp(), "/no/such"), "there is no file"),
    "weights file: none": (
        lambda: models.load_torch(make_mlp(), "/no/such.pth"),
        "no weights file",
    ),
    # Accelerator model.
    "array: no rows": (lambda: array(rows=0), "rows must be a positive integer, got 0"),
    "array: text": (lambda: array(rows="4"), "rows must be a positive integer, got '4'"),
    "array: NaN": (lambda: array(cols=NAN), "cols must be a positive integer, got nan"),
    "array: dataflow": (lambda: array(dataflow="xs"), "dataflow must be one of"),
    "array: bandwidth": (lambda: array(dram_bandwidth=0), "dram_bandwidth must be positive"),
    "PE: group size": (lambda: GroupPE(group_size=0), "group_size must be a positive integer"),
    "PE: encoding": (lambda: GroupPE(encoding="x"), "unknown encoding"),
    "PE: data terms": (lambda: hwmodel.TermMac(data_terms=0), "data_terms must be a positive"),
    "layer: kind": (
        lambda: Layer(name="a", kind="pool", channels=1, filters=1),
        "kind must be one of conv, dense, matmul, got 'pool'",
    ),
    "layer: no channels": (lambda: dense("a", 0, 1), "every extent must be a positive integer"),
    "layer: huge": (
        lambda: conv("a", (99_999_999_999, 3), channels=1, filters=1, kernel=(3, 3)),
        "spatial extents to 16777216",
    ),
    "layer: too many products": (
        lambda: dense("a", 2**30, 2**30, rows=2**30),
        "multiplications are too many",
    ),
    "layer: groups": (
        lambda: Layer(name="a", kind="dense", channels=3, filters=4, groups=2),
        "do not divide into 2 groups",
    ),
    "conv: no stride": (lambda: convolution(stride=(0, 1)), "strides must be positive integers"),
    "conv: padding": (lambda: convolution(padding="FULL"), "padding must be SAME or VALID"),
    "conv: axes": (lambda: convolution(kernel=(3,)), "must have the same number of axes"),
    "conv: window": (
        lambda: convolution(in_size=(2, 2), padding="VALID"),
        "does not fit an input of",
    ),
    "network: empty": (lambda: Network(()), "at least one layer"),
    "network: text": (lambda: Network("fc"), "takes a sequence of layers, got 'fc'"),
    "network: names": (lambda: Network(("fc",)), "one of them is 'fc'"),
    "network: twice": (
        lambda: Network((dense("a", 1, 2), dense("a", 1, 2))),
        "names must be distinct",
    ),
    "evaluate: swapped": (
        lambda: evaluate(array(), Network((dense("fc", 8, 4),))),
        "network must be a hwmodel.Network, got Array",
    ),
    "evaluate: PE's name": (
        lambda: evaluate(Network((dense("fc", 8, 4),)), array(pe="bit")),
        "pe must be one of hwmodel's PEs, got 'bit'",
    ),
    "evaluate: budget": (lambda: evaluated(budgets=99), "a whole number from 0 to 32"),
    "evaluate: half a budget": (lambda: evaluated(budgets=1.5), "a whole number from 0 to 32"),
    "evaluate: budget as text": (lambda: evaluated(budgets="3"), "budgets are numbers, not text"),
    "evaluate: budgets of others": (lambda: evaluated(budgets={"x": 3}), "name no layer: x"),
    "evaluate: too many budgets": (lambda: evaluated(budgets=[1, 2]), "2 budgets for 1 layers"),
    "evaluate: weights' shape": (
        lambda: evaluated(weights={"fc": np.zeros((3, 3), np.int32)}),
        "do not hold the layer's K=8 by 4 filters",
    ),
    "evaluate: float weights": (
        lambda: evaluated(weights={"fc": np.zeros((8, 4))}),
        "weights must be integers, got float64",
    ),
    "evaluate: technology": (
        lambda: evaluated(technology="45nm"),
        "technology must be a hwmodel.Technology",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_a_clear_error(name):
    call, message = WRONG[name]
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_weights_beyond_int32_are_clipped_as_others_are():
    wide = np.array([2**40, -(2**40), 3, 2**33])
    assert projected(wide, budget=16).tolist() == [128, -128, 3, 128]


def test_the_table_is_as_long_as_it_should_be():
    assert len(WRONG) >= 60


# --- Files of strangers ---------------------------------------------------------------------------


class Bomb:
    """Leaves a trace if it is ever unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return (open, (str(self.trace), "w"))


def write_npz(path, bomb):
    np.savez(path, weight=np.array([bomb], dtype=object))
    path.with_suffix(".pth.npz").rename(path)


def write_pickle(path, bomb):
    path.write_bytes(pickle.dumps({"conv1.weight": bomb}))


def write_torch_zip(path, bomb):
    """PyTorch's container, whose members also try to leave their folder."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"conv1.weight": bomb}))
        archive.writestr("archive/version", "3\n")
        archive.writestr("../escaped", "out")


READERS = {
    "weights": lambda path: models.load_torch(make_mlp(), path),
    "packed": lambda path: export.load_packed(make_mlp(), path),
    "float": lambda path: export.load_variables(make_mlp(), path),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("write", [write_npz, write_pickle, write_torch_zip])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_no_file_is_unpickled_or_unpacked_outside_its_folder(reader, write, suffix, tmp_path):
    folder = tmp_path / "inner"
    folder.mkdir()
    write(folder / "file.pth", Bomb(tmp_path / "exploded"))
    path = (folder / "file.pth").rename(folder / f"file{suffix}")
    with pytest.raises(ValueError, match=str(path)):
        READERS[reader](path)
    assert [p.name for p in tmp_path.rglob("*")] == ["inner", path.name]


def nested(depth):
    return b"[" * depth + b"]" * depth


@pytest.mark.parametrize(
    "content",
    [b"", b"\x00" * 8, b"\xff" * 64, (2**63).to_bytes(8, "little"), nested(10**5)],
    ids=["empty", "zeros", "ones", "a huge header", "brackets"],
)
@pytest.mark.parametrize("reader", READERS)
def test_garbage_is_no_model(reader, content, tmp_path):
    path = tmp_path / "file.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=str(path)):
        READERS[reader](path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no layers"),
        ("name,a\n", "no layers"),
        ("h\nc1,8,8,3,3,1,1", "8, expected|expected a name"),
        ("h\nc1,8,8,3,3,1,x,1,", "c1|invalid literal"),
        ("h\nc1,8,8,3,3,1,1,0,", "strides must be positive"),
        ("h\nc1,2,2,3,3,1,1,1,", "does not fit an input"),
        ("h\nc1,-8,8,3,3,1,1,1,", "does not fit an input|positive"),
        ("h\nc1,8,8,3,3,0,1,1,", "positive integer"),
    ],
)
def test_broken_topologies_name_their_line(content, message, tmp_path):
    path = tmp_path / "net.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        hwmodel.read_scalesim_topology(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no JSON"),
        ("[]", "a table at the top"),
        ("{}", "lacks name, node_nm, energy_pj"),
        ({"name": "x", "node_nm": 45, "energy_pj": []}, "energy_pj must be a table"),
        ({"name": "x", "node_nm": "45", "energy_pj": {}}, "node_nm must be a number"),
        ({"name": "x", "node_nm": 45, "energy_pj": {"a": 3}}, "a needs a value and a source"),
        (
            {"name": "x", "node_nm": 45, "energy_pj": {"a": {"value": "y", "source": ""}}},
            "the value of a must be a number",
        ),
        (
            {"name": "x", "node_nm": 45, "energy_pj": {"a": {"value": -1, "source": ""}}},
            "the value of a must be positive",
        ),
        (
            {"name": "x", "node_nm": 45, "energy_pj": {"a": {"value": NAN, "source": ""}}},
            "the value of a must be positive",
        ),
        (
            {
                "name": "x",
                "node_nm": 45,
                "energy_pj": {"a": {"value": 1, "source": "", "node_nm": 7}},
            },
            "different nodes must not be mixed",
        ),
    ],
)
def test_broken_technology_tables_are_refused(content, message, tmp_path):
    path = tmp_path / "table.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=message) as caught:
        hwmodel.read_technology(path)
    assert str(path) in str(caught.value)


def test_images_are_never_unpickled(tmp_path):
    """A NumPy file among images is passed over by its suffix, and no image by another name."""
    buffer = io.BytesIO()
    np.save(buffer, np.array([Bomb(tmp_path / "exploded")], dtype=object))
    for split in ("train", "test"):
        for name in ("x.npy", "x.png"):
            path = tmp_path / split / "a" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match=r"2 corrupt images:\n.*x\.png"):
        data.load("folder", data_dir=tmp_path)
    assert not (tmp_path / "exploded").exists()
