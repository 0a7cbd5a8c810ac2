"""Packed checkpoints: what was saved comes back bit for bit, and what does not fit is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.flax import save_file

import stp_jax
from stp_jax import models
from stp_jax.export.packed import FORMAT, VERSION, load_packed, packed_sizes, save_packed
from stp_jax.terms import slot_format


class Mixed(nnx.Module):
    """One layer of each kind, a float one, statistics, a table and a random stream."""

    def __init__(self, rngs):
        self.table = nnx.Embed(11, 6, rngs=rngs)
        self.conv = nnx.Conv(6, 8, (3,), rngs=rngs)
        self.depthwise = nnx.Conv(8, 8, (3,), feature_group_count=8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.general = nnx.LinearGeneral(8, (2, 5), rngs=rngs)
        self.einsum = nnx.Einsum("btac,acd->btd", (2, 5, 4), bias_shape=(4,), rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.free = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, tokens):
        x = self.norm(self.depthwise(self.conv(self.table(tokens))))
        return self.free(self.dropout(self.einsum(self.general(x))))


class Small(nnx.Module):
    """A depthwise convolution, whose groups are windows, and a float layer."""

    def __init__(self, rngs):
        self.depthwise = nnx.Conv(3, 6, (3,), feature_group_count=3, rngs=rngs)
        self.free = nnx.Linear(6, 2, rngs=rngs)

    def __call__(self, x):
        return self.free(self.depthwise(x))


TOKENS = jnp.arange(22, dtype=jnp.int32).reshape(2, 11) % 11


def mixed(**rule):
    rules = [
        stp_jax.Rule(path="free", keep_float=True),
        stp_jax.Rule(path=".*", embeddings=True, **rule),
    ]
    float_model = Mixed(nnx.Rngs(0))
    model = stp_jax.quantize(float_model, stp_jax.Policy(rules))
    model.eval()
    stp_jax.calibrate(model, [TOKENS])
    return model


X = jax.random.normal(jax.random.key(0), (2, 7, 3))


def small(**rule):
    policy = stp_jax.Policy([stp_jax.Rule(path="depthwise", **rule)])
    model = stp_jax.quantize(Small(nnx.Rngs(0)), policy)
    stp_jax.calibrate(model, [X])
    return model


def fresh():
    model = Mixed(nnx.Rngs(1))
    model.eval()
    return model


def assert_same(ours, theirs, x):
    for path, integers in stp_jax.integer_weights(theirs).items():
        np.testing.assert_array_equal(stp_jax.integer_weights(ours)[path], integers, path)
    assert stp_jax.budgets(ours) == stp_jax.budgets(theirs)
    np.testing.assert_array_equal(ours(x), theirs(x))


@pytest.mark.parametrize(
    "rule",
    [
        {"budget": 5},
        {"budget": 0},
        {"budget": 1, "group_size": 3},
        {"budget": None},
        {"budget": 6, "method": "greedy"},
        {"budget": 7, "encoding": "booth4"},
        {"budget": 9, "encoding": "binary"},
        {"budget": 4, "bits": 6, "activation_bits": 5},
        {"budget": 5, "weight_scale": "max"},
        {"budget": 5, "weight_scale": "search", "activations": "calibrated"},
        {"budget": 5, "activations": "none"},
        {"budget": 5, "activations": "dynamic"},
    ],
    ids=str,
)
def test_every_format_comes_back_bit_for_bit(rule, tmp_path):
    model = small(**rule)
    save_packed(model, tmp_path / "m.safetensors")
    loaded = load_packed(Small(nnx.Rngs(1)), tmp_path / "m.safetensors")
    assert_same(loaded, model, X)
    # What was read is written again as it was.
    save_packed(loaded, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (
        tmp_path / "m.safetensors"
    ).read_bytes()


def by_filter(seed=0, **rule):
    """A model whose layers have budgets by filter, one of them with filters of no slot at all."""
    model, rng = mixed(budget=5, **rule), np.random.default_rng(seed)
    layers = stp_jax.quantized_layers(model)
    budgets = {path: rng.integers(0, 9, layer.filter_count) for path, layer in layers.items()}
    stp_jax.set_budgets(model, budgets | {"conv": 3})
    stp_jax.search_weight_scales(model)
    return model


def test_budgets_by_filter_come_back_in_version_2(tmp_path):
    model = by_filter()
    assert header(model, tmp_path / "m.safetensors")["version"] == 2
    loaded = load_packed(Mixed(nnx.Rngs(1)), tmp_path / "m.safetensors")
    loaded.eval()
    for path, budget in stp_jax.budgets(model).items():
        np.testing.assert_array_equal(stp_jax.budgets(loaded)[path], budget)
    integers = stp_jax.integer_weights(loaded)
    for path, kernel in stp_jax.integer_weights(model).items():
        np.testing.assert_array_equal(integers[path], kernel)
    np.testing.assert_array_equal(loaded(TOKENS), model(TOKENS))
    assert packed_sizes(loaded) == packed_sizes(model)


def test_budgets_by_layer_are_written_as_version_1(tmp_path):
    """So that readers of version 1 read them; equal budgets by filter make the same stream."""
    model = mixed(budget=5)
    written = header(model, tmp_path / "layer.safetensors")
    assert written["version"] == 1
    assert all(isinstance(entry["budget"], int) for entry in written["layers"].values())
    layers = stp_jax.quantized_layers(model)
    equal = {path: np.full(layer.filter_count, 5) for path, layer in layers.items()}
    stp_jax.set_budgets(model, equal)
    save_packed(model, tmp_path / "filter.safetensors")
    with (
        safe_open(tmp_path / "layer.safetensors", "numpy") as one,
        safe_open(tmp_path / "filter.safetensors", "numpy") as other,
    ):
        for name in one.keys():  # noqa: SIM118
            np.testing.assert_array_equal(one.get_tensor(name), other.get_tensor(name))


def header(model, path):
    save_packed(model, path)
    with safe_open(path, "numpy") as file:
        return json.loads(file.metadata()[FORMAT])


def test_every_layer_kind_with_budgets_and_scales_as_trained(tmp_path):
    """Budgets were set after quantizing, and a learned scale has crossed zero."""
    model = mixed(budget=5)
    stp_jax.set_budgets(model, {"conv": 3, "general": 7})
    model.conv.promote_dtype.weight_scale[...] *= -1.0
    model.conv.promote_dtype.activation_scale[...] *= -1.0
    save_packed(model, tmp_path / "m.safetensors")
    loaded = load_packed(fresh(), tmp_path / "m.safetensors")
    assert stp_jax.budgets(loaded)["conv"] == 3
    assert_same(loaded, model, TOKENS)


def test_an_abstract_model_is_enough(tmp_path):
    model = small(budget=5)
    save_packed(model, tmp_path / "m.safetensors")
    abstract = nnx.eval_shape(lambda: Small(nnx.Rngs(1)))
    assert_same(load_packed(abstract, tmp_path / "m.safetensors"), model, X)


def test_a_loaded_model_trains_on(tmp_path):
    save_packed(small(budget=5), tmp_path / "m.safetensors")
    loaded = load_packed(Small(nnx.Rngs(1)), tmp_path / "m.safetensors")
    grads = nnx.grad(lambda model: jnp.sum(model(X) ** 2))(loaded)
    assert float(jnp.abs(grads["depthwise"]["kernel"][...]).max()) > 0


def test_the_file_is_as_small_as_its_streams(tmp_path):
    """ceil(groups · budget · slot bits / 8) bytes a kernel, nothing hidden."""
    model = mixed(budget=5)
    save_packed(model, tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", framework="np") as file:
        entries = json.loads(file.metadata()[FORMAT])["layers"]
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    groups = stp_jax.group_counts(model)
    for path in stp_jax.integer_weights(model):
        terms = stored[f"{entries[path]['kernel']}.terms"]
        assert terms.nbytes == -(-groups[path] * 5 * slot_format(8, 5).stored_bits // 8)
    sizes = packed_sizes(model)
    assert sizes.total.packed == sum(tensor.nbytes for tensor in stored.values())
    scales = 4 * (8 + 1)  # eight output channels and the input
    assert sizes.layers["conv"] == (
        4 * 144,
        144 + scales,
        stored["conv.kernel.terms"].size + scales,
    )


def test_layers_with_all_terms_are_stored_as_integers():
    """32 slots of 7 bits a group would be 3.5 times as much as eight int8 integers."""
    sizes = packed_sizes(small(budget=None)).layers["depthwise"]
    assert sizes.packed == sizes.int8 < sizes.float32


def damage(path, metadata=None, **changes):
    with safe_open(path, framework="flax") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata() if metadata is None else metadata
    tensors |= changes
    save_file({k: v for k, v in tensors.items() if v is not None}, path, metadata)


def test_what_does_not_fit_is_named(tmp_path):
    path = tmp_path / "m.safetensors"
    save_packed(small(budget=5), path)

    with pytest.raises(ValueError, match="no file"):
        load_packed(Small(nnx.Rngs(1)), tmp_path / "other.safetensors")
    other = models.create("mlp", num_classes=3, rngs=nnx.Rngs(0), in_features=4)
    with pytest.raises(ValueError, match=r"of a Small.*does not fit MLP.*no such layers.*depthw"):
        load_packed(other, path)
    with pytest.raises(ValueError, match="no quantized layer"):
        save_packed(other, path)
    with pytest.raises(ValueError, match="quantized already"):
        load_packed(small(budget=5), path)

    wide = Small(nnx.Rngs(1))
    wide.free = nnx.Linear(6, 9, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"free.kernel: file \(6, 2\), model \(6, 9\)"):
        load_packed(wide, path)

    damage(path, **{"free.bias": None, "stray": jnp.zeros(2)})
    with pytest.raises(ValueError, match=r"missing from the file \(1\): free.bias\n.*stray"):
        load_packed(Small(nnx.Rngs(1)), path)


def written_header(**layers):
    return {"metadata": {FORMAT: json.dumps({"version": 1, "layers": layers})}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metadata": {"format": "pt"}}, "holds no packed terms"),
        ({"metadata": {FORMAT: "{"}}, "metadata .* cannot be read"),
        ({"metadata": {FORMAT: "[1]"}}, "metadata .* cannot be read"),
        ({"metadata": {FORMAT: f'{{"version": {VERSION + 1}}}'}}, f"of version {VERSION + 1}"),
        ({"metadata": {FORMAT: '{"version": 1}'}}, "list no layers"),
        (written_header(depthwise={}), "damaged: the rule of layer 'depthwise'"),
        (
            written_header(depthwise={"rule": {"budgets": 3}}),
            "damaged: the rule of layer 'depthwise'",
        ),
        (written_header(other={"rule": {}}), "no such layers"),
        (written_header(depthwise={"rule": {}, "kernel": 3}), "damaged at layer 'depthwise'"),
        (
            {"depthwise.kernel.terms": jnp.zeros(1, jnp.uint8)},
            "damaged at layer 'depthwise'.*takes uint8",
        ),
        ({"depthwise.kernel.terms": None}, "damaged at layer 'depthwise'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damaged_files_are_refused(changes, message, tmp_path):
    path = tmp_path / "m.safetensors"
    save_packed(small(budget=5), path)
    damage(path, **changes)
    with pytest.raises(ValueError, match=message):
        load_packed(Small(nnx.Rngs(1)), path)


def test_a_file_that_is_cut_short_is_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    save_packed(small(budget=5), path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="damaged"):
        load_packed(Small(nnx.Rngs(1)), path)
