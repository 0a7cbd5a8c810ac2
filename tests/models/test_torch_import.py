import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from stp_jax import models
from stp_jax.models import load_torch, torch_variables


def small_model(seed=0):
    return models.create("resnet20", num_classes=5, rngs=nnx.Rngs(seed), width=4)


def random_weights(model, seed=0):
    """A state dict in PyTorch's layouts: every kernel goes back to (out, in, …)."""
    rng = np.random.default_rng(seed)
    state = {}
    for name, (variable, _) in torch_variables(model).items():
        shape = variable.shape
        if len(shape) == 4:
            shape = (shape[3], shape[2], shape[0], shape[1])
        elif len(shape) == 2:
            shape = shape[::-1]
        state[name] = rng.uniform(0.1, 1.0, shape).astype(np.float32)
    return state


def leaves(model):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model))]


def test_names_are_those_of_torchvision():
    model = nnx.eval_shape(lambda: models.create("resnet18", num_classes=10, rngs=nnx.Rngs(0)))
    names = torch_variables(model)
    assert len(names) == 102  # 20 convolutions, 20 BatchNorms of 4, and fc
    assert {"conv1.weight", "layer2.0.downsample.0.weight", "fc.bias"} <= names.keys()
    assert {"layer4.1.bn2.running_var", "layer2.0.downsample.1.running_mean"} <= names.keys()


def test_every_weight_arrives_in_flax_layout():
    model = small_model()
    state = random_weights(model)
    assert load_torch(model, state) is model
    kernel = state["layer2.0.conv1.weight"]
    for o, i, h, w in [(0, 0, 0, 0), (7, 3, 2, 1), (5, 1, 0, 2)]:
        assert model.layer2[0].conv1.kernel[...][h, w, i, o] == kernel[o, i, h, w]
    np.testing.assert_array_equal(model.linear.kernel[...].T, state["linear.weight"])
    np.testing.assert_array_equal(model.bn1.var[...], state["bn1.running_var"])
    np.testing.assert_array_equal(model.bn1.scale[...], state["bn1.weight"])


def test_safetensors_and_prefixed_names_load_the_same(tmp_path):
    plain, prefixed = small_model(1), small_model(2)
    state = random_weights(plain)
    load_torch(plain, state)
    counters = {"module.bn1.num_batches_tracked": np.asarray(3)}
    save_file(
        {**{f"module.{name}": value for name, value in state.items()}, **counters},
        tmp_path / "weights.safetensors",
    )
    load_torch(prefixed, tmp_path / "weights.safetensors")
    for a, b in zip(leaves(plain), leaves(prefixed), strict=True):
        np.testing.assert_array_equal(a, b)


def renamed(state):
    state["linearr.weight"] = state.pop("linear.weight")


def reshaped(state):
    state["linear.weight"] = np.zeros((9, 16), np.float32)


def flattened(state):
    state["conv1.weight"] = state["conv1.weight"].reshape(-1)


def shortened(state):
    del state["layer3.2.bn2.running_mean"]


def lengthened(state):
    state["layer9.weight"] = np.zeros(3, np.float32)


def poisoned(state):
    state["bn1.bias"] = np.full_like(state["bn1.bias"], np.nan)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (renamed, r"linear.weight \(near: linearr.weight\)"),
        (reshaped, r"linear.weight: file \(16, 9\), model \(16, 5\)"),
        (flattened, "conv1.weight: file"),
        (shortened, "missing from the weights.*\n.*layer3.2.bn2.running_mean"),
        (lengthened, "not in the model.*\n.*layer9.weight"),
        (poisoned, "NaN or infinity.*\n.*bn1.bias"),
    ],
)
def test_weights_that_do_not_fit_are_named_and_change_nothing(damage, message):
    model = small_model()
    before = leaves(model)
    state = random_weights(model)
    damage(state)
    with pytest.raises(ValueError, match=message):
        load_torch(model, state)
    for a, b in zip(before, leaves(model), strict=True):
        np.testing.assert_array_equal(a, b)


def test_bad_files_are_refused(tmp_path):
    model = small_model()
    with pytest.raises(ValueError, match="no weights file"):
        load_torch(model, tmp_path / "absent.safetensors")
    torn = tmp_path / "torn.safetensors"
    save_file(random_weights(model), torn)
    torn.write_bytes(torn.read_bytes()[:5000])
    with pytest.raises(ValueError, match="not a readable safetensors"):
        load_torch(model, torn)
    (tmp_path / "weights.npz").write_bytes(b"")
    with pytest.raises(ValueError, match="weights come as"):
        load_torch(model, tmp_path / "weights.npz")


def test_pickles_are_refused_without_running_them(tmp_path):
    import pickle

    class Bomb:
        def __reduce__(self):
            return (tmp_path.joinpath("exploded").touch, ())

    path = tmp_path / "weights.pth"
    path.write_bytes(pickle.dumps({"conv1.weight": Bomb()}))
    with pytest.raises(ValueError):
        load_torch(small_model(), path)
    assert not (tmp_path / "exploded").exists()


def torch_twin(state, blocks):
    """Logits of the CIFAR ResNet written with PyTorch's functions, on NCHW input."""
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    state = {name: torch.from_numpy(value) for name, value in state.items()}

    def norm(x, name):
        statistics = (state[f"{name}.{key}"] for key in ("running_mean", "running_var"))
        return functional.batch_norm(
            x, *statistics, state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-5
        )

    def forward(x):
        x = functional.conv2d(torch.from_numpy(x), state["conv1.weight"], padding=1)
        x = functional.relu(norm(x, "bn1"))
        for stage in (1, 2, 3):
            for index in range(blocks):
                name = f"layer{stage}.{index}"
                stride = 2 if stage > 1 and index == 0 else 1
                y = functional.conv2d(x, state[f"{name}.conv1.weight"], stride=stride, padding=1)
                y = functional.relu(norm(y, f"{name}.bn1"))
                y = norm(
                    functional.conv2d(y, state[f"{name}.conv2.weight"], padding=1), f"{name}.bn2"
                )
                extra = (y.shape[1] - x.shape[1]) // 2
                shortcut = functional.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, extra, extra))
                x = functional.relu(y + shortcut)
        return functional.linear(
            x.mean((2, 3)), state["linear.weight"], state["linear.bias"]
        ).numpy()

    return forward


def test_logits_equal_pytorch():
    model = small_model()
    state = {name: value / 8 for name, value in random_weights(model).items()}
    forward = torch_twin(state, blocks=3)
    load_torch(model, state).eval()
    x = np.random.default_rng(1).standard_normal((4, 16, 16, 3)).astype(np.float32)
    expected = forward(x.transpose(0, 3, 1, 2))
    np.testing.assert_allclose(model(jnp.asarray(x)), expected, rtol=1e-4, atol=1e-4)


def test_efficientnet_takes_either_library_s_names():
    """timm's names and lukemelas/EfficientNet-PyTorch's name the same tensors in the same order."""
    model = nnx.eval_shape(
        lambda: models.create("efficientnet_lite0", num_classes=4, rngs=nnx.Rngs(0))
    )
    timm_names = list(torch_variables(model))
    theirs = {
        "_conv_stem.weight": "conv_stem.weight",
        "_bn0.running_var": "bn1.running_var",
        "_blocks.0._depthwise_conv.weight": "blocks.0.0.conv_dw.weight",
        "_blocks.0._bn2.bias": "blocks.0.0.bn2.bias",
        "_blocks.1._expand_conv.weight": "blocks.1.0.conv_pw.weight",
        "_blocks.2._bn0.weight": "blocks.1.1.bn1.weight",
        "_blocks.15._project_conv.weight": "blocks.6.0.conv_pwl.weight",
        "_bn1.bias": "bn2.bias",
        "_fc.weight": "classifier.weight",
    }
    assert set(theirs.values()) <= set(timm_names)
    translated = model.adapt_torch({name: np.zeros(1) for name in theirs})
    assert list(translated) == list(theirs.values())
    assert list(model.adapt_torch(dict.fromkeys(timm_names))) == timm_names


def test_language_model_takes_pytorch_s_lstm_names():
    torch = pytest.importorskip("torch")
    lstm = torch.nn.LSTM(6, 5, 2, batch_first=True)
    encoder, decoder = torch.nn.Embedding(11, 6), torch.nn.Linear(5, 11)
    state = {
        f"{part}.{name}": value.detach().numpy()
        for part, module in (("encoder", encoder), ("rnn", lstm), ("decoder", decoder))
        for name, value in module.state_dict().items()
    }
    model = models.create("lstm_lm", num_classes=11, rngs=nnx.Rngs(0), embedding=6, hidden=5)
    load_torch(model, state)
    tokens = np.arange(8).reshape(2, 4)
    with torch.no_grad():
        expected = decoder(lstm(encoder(torch.from_numpy(tokens)))[0]).numpy()
    np.testing.assert_allclose(model(jnp.asarray(tokens, jnp.int32)), expected, atol=1e-5)
