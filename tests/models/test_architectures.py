import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from stp_jax import models
from stp_jax.models.efficientnet import DepthwiseSeparable, MBConv
from stp_jax.models.layers import apply
from stp_jax.models.mobilenet import InvertedResidual, round_channels
from stp_jax.models.vgg import adaptive_average_pool

SMALL = {
    "resnet18": ({"stem": "small", "width": 4}, (2, 8, 8, 3)),
    "resnet20": ({"width": 4}, (2, 8, 8, 3)),
    "vgg16_bn": ({"head": "small", "width": 4}, (2, 32, 32, 3)),
    "mobilenet_v2": ({"stem": "small", "width_multiplier": 0.25}, (2, 16, 16, 3)),
    "efficientnet_lite0": ({"stem": "small"}, (2, 16, 16, 3)),
    "vit_s16": (
        {"image_size": 8, "patch_size": 4, "width": 12, "heads": 3, "depth": 2},
        (2, 8, 8, 3),
    ),
    "mlp": ({"in_features": 48, "hidden": (8,)}, (2, 4, 4, 3)),
}


@pytest.mark.parametrize(
    ("name", "count"),
    [
        # Published parameter counts, 1000 classes: torchvision's and timm's model tables.
        ("vgg16_bn", 138_365_992),
        ("mobilenet_v2", 3_504_872),
        ("efficientnet_lite0", 4_652_008),
        ("vit_s16", 22_050_664),
    ],
)
def test_parameter_counts_are_the_published_ones(name, count):
    model = abstract(name, num_classes=1000)
    assert sum(value.size for value in jax.tree.leaves(nnx.state(model, nnx.Param))) == count


def abstract(name, **options):
    """The model's shapes, without the time to draw its weights."""
    return nnx.eval_shape(
        lambda: models.create(name, **{"num_classes": 5, "rngs": nnx.Rngs(0), **options})
    )


@pytest.mark.parametrize("name", SMALL)
def test_logits_have_a_row_per_image(name):
    options, shape = SMALL[name]
    model = abstract(name, **options)
    logits = nnx.eval_shape(lambda model, x: model(x), model, jnp.zeros(shape))
    assert (logits.shape, logits.dtype) == ((2, 5), jnp.float32)


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda **o: models.create("resnet20", num_classes=5, width=4, **o), (2, 8, 8, 3)),
        (
            lambda **o: models.create("vit_s16", num_classes=5, **SMALL["vit_s16"][0], **o),
            (2, 8, 8, 3),
        ),
        (lambda **o: InvertedResidual(4, 4, stride=1, expansion=6, **o), (2, 6, 6, 4)),
        (lambda **o: InvertedResidual(4, 6, stride=2, expansion=1, **o), (2, 6, 6, 4)),
        (lambda **o: DepthwiseSeparable(4, 6, kernel=3, stride=1, **o), (2, 6, 6, 4)),
        (lambda **o: MBConv(4, 4, kernel=5, stride=1, expansion=6, **o), (2, 6, 6, 4)),
    ],
)
def test_every_parameter_has_a_gradient(build, shape):
    model = build(rngs=nnx.Rngs(0), dtype=None)

    def loss(model, x):
        return jnp.sum(model(x) * weights)

    x = jax.random.normal(jax.random.key(0), shape)
    weights = jax.random.normal(
        jax.random.key(1), nnx.eval_shape(lambda model, x: model(x), model, x).shape
    )
    gradients = nnx.jit(nnx.grad(loss))(model, x)
    for path, gradient in nnx.to_flat_state(gradients):
        value = np.asarray(gradient[...])
        assert np.all(np.isfinite(value)), path
        assert np.any(value != 0), path


def test_adaptive_pooling_averages_pytorch_s_bins():
    x = np.random.default_rng(0).standard_normal((2, 5, 3, 2)).astype(np.float32)
    pooled = adaptive_average_pool(jnp.asarray(x), 4)
    for i in range(4):
        for j in range(4):
            rows = slice(i * 5 // 4, -(-(i + 1) * 5 // 4))
            columns = slice(j * 3 // 4, -(-(j + 1) * 3 // 4))
            mean = x[:, rows, columns].mean((1, 2))
            np.testing.assert_allclose(pooled[:, i, j], mean, rtol=1e-5, atol=1e-6)


def test_vgg_flattens_as_pytorch_does():
    """The first dense layer's published columns run over channel, row, column."""
    model = abstract("vgg16_bn")
    seen = []
    model.features = nnx.List([lambda x: x])
    model.classifier = nnx.List([lambda x: seen.append(x) or x])
    x = np.random.default_rng(0).standard_normal((1, 224, 224, 2)).astype(np.float32)
    model(jnp.asarray(x))
    pooled = adaptive_average_pool(jnp.asarray(x), 7)
    np.testing.assert_array_equal(seen[0][0], np.transpose(pooled[0], (2, 0, 1)).ravel())


@pytest.mark.parametrize(
    ("channels", "rounded"), [(32 * 0.35, 16), (16 * 0.35, 8), (24 * 1.4, 32), (1280 * 1.4, 1792)]
)
def test_widths_round_as_published(channels, rounded):
    # 0.35 starts with 16 and 8 channels, 1.4 ends with 1792, in the authors' released models.
    assert round_channels(channels) == rounded


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_transformer_without_positions_ignores_the_order_of_patches(offset):
    options, _ = SMALL["vit_s16"]
    model = models.create("vit_s16", num_classes=5, rngs=nnx.Rngs(0), **options)
    shape = model.pos_embed.shape
    positions = offset * np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    model.pos_embed.set_value(jnp.asarray(positions))
    x = jax.random.normal(jax.random.key(0), (1, 8, 8, 3))
    swapped = jnp.concatenate([x[:, 4:], x[:, :4]], axis=1)
    same = np.allclose(model(x), model(swapped), atol=1e-5)
    assert same == (offset == 0.0)


def test_mlp_is_its_matrices():
    model = models.create("mlp", num_classes=3, rngs=nnx.Rngs(0), in_features=6, hidden=(5, 4))
    x = np.random.default_rng(0).standard_normal((2, 3, 2)).astype(np.float32)
    first, _, second, _, last = model.layers
    y = x.reshape(2, 6)
    for layer in (first, second):
        y = np.maximum(y @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...]), 0)
    y = y @ np.asarray(last.kernel[...]) + np.asarray(last.bias[...])
    np.testing.assert_allclose(model(jnp.asarray(x)), y, rtol=1e-5, atol=1e-6)


def language_model(**options):
    options = {"num_classes": 11, "embedding": 6, "hidden": 5, **options}
    return models.create("lstm_lm", rngs=nnx.Rngs(0), **options)


def test_lstm_follows_its_equations():
    model = language_model(depth=1)
    tokens = np.asarray([[3, 1, 4, 1]], np.int32)
    layer = model.rnn[0]
    weights = [np.asarray(part.kernel[...]) for part in (layer.ih, layer.hh)]
    bias = np.asarray(layer.ih.bias[...]) + np.asarray(layer.hh.bias[...])

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    hidden, cell = np.zeros(5), np.zeros(5)
    outputs = []
    for token in tokens[0]:
        embedded = np.asarray(model.encoder.embedding[...])[token]
        i, f, g, o = np.split(embedded @ weights[0] + hidden @ weights[1] + bias, 4)
        cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(g)
        hidden = sigmoid(o) * np.tanh(cell)
        outputs.append(hidden)
    expected = np.stack(outputs) @ np.asarray(model.decoder.kernel[...])
    expected = expected + np.asarray(model.decoder.bias[...])
    np.testing.assert_allclose(model(jnp.asarray(tokens))[0], expected, rtol=1e-4, atol=1e-5)


def test_language_model_sees_no_later_token_and_windows_join():
    model = language_model()
    tokens = jax.random.randint(jax.random.key(0), (2, 6), 0, 11)
    logits = model(tokens)
    changed = model(tokens.at[:, 4].set((tokens[:, 4] + 1) % 11))
    np.testing.assert_array_equal(changed[:, :4], logits[:, :4])
    assert np.any(np.asarray(changed[:, 4:] != logits[:, 4:]))
    first, state = model.continue_from(tokens[:, :2], model.initial_state(2))
    second, _ = model.continue_from(tokens[:, 2:], state)
    joined = np.concatenate([first, second], axis=1)
    np.testing.assert_allclose(joined, logits, atol=1e-6)


def test_dropout_acts_in_training_only():
    model = language_model(dropout_rate=0.5)
    tokens = jnp.zeros((1, 3), jnp.int32)
    model.train()
    assert np.any(np.asarray(model(tokens) != model(tokens)))
    model.eval()
    np.testing.assert_array_equal(model(tokens), model(tokens))


def test_nested_lists_apply_in_order():
    layers = nnx.List([lambda x: x + 1, nnx.List([lambda x: x * 2, lambda x: x - 3])])
    assert apply(layers, jnp.asarray(5.0)) == 9.0


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vgg16_bn", {"head": "tiny"}, '"imagenet" or "small"'),
        ("vgg16_bn", {"dropout_rate": 1.0}, r"dropout must be in \[0, 1\)"),
        ("mobilenet_v2", {"stem": "tiny"}, '"imagenet" or "small"'),
        ("mobilenet_v2", {"width_multiplier": 0.0}, "width_multiplier must be positive"),
        ("efficientnet_lite0", {"stem": 3}, '"imagenet" or "small"'),
        ("vit_s16", {"patch_size": 15}, "must divide image_size 224"),
        ("vit_s16", {"heads": 5}, "must divide width 384"),
        ("mlp", {}, "in_features"),
        ("mlp", {"in_features": 0}, "must be positive"),
        ("lstm_lm", {"depth": 0}, "must be positive"),
    ],
)
def test_impossible_options_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        models.create(name, num_classes=10, rngs=nnx.Rngs(0), **options)


@pytest.mark.parametrize(
    ("name", "shape"), [("vgg16_bn", (1, 16, 16, 3)), ("vit_s16", (1, 32, 32, 3))]
)
def test_images_of_an_impossible_size_are_refused(name, shape):
    options, _ = SMALL[name]
    model = abstract(name, **options)
    with pytest.raises(ValueError, match=r"at least 32|8² pixels"):
        model(jnp.zeros(shape))
