import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from stp_jax import models
from stp_jax.models.resnet import BasicBlock, subsample_and_pad


def parameters(model):
    return sum(value.size for value in jax.tree.leaves(nnx.state(model, nnx.Param)))


def abstract(name, **options):
    """The model's shapes, without the time to draw its weights."""
    return nnx.eval_shape(lambda: models.create(name, rngs=nnx.Rngs(0), **options))


@pytest.mark.parametrize(
    ("name", "num_classes", "count"),
    [
        ("resnet18", 1000, 11_689_512),  # torchvision's model table
        ("resnet34", 1000, 21_797_672),  # torchvision's model table
        ("resnet20", 10, 269_722),  # akamaster's table says 0.27M; counted from its weights file
        ("resnet56", 10, 853_018),  # 0.85M in He et al., table 6
    ],
)
def test_parameter_counts_are_the_published_ones(name, num_classes, count):
    assert parameters(abstract(name, num_classes=num_classes)) == count


@pytest.mark.parametrize(("stem", "size"), [("imagenet", 64), ("small", 8)])
def test_logits_have_a_row_per_image(stem, size):
    model = abstract("resnet18", num_classes=7, stem=stem, width=4, in_channels=1)
    logits = nnx.eval_shape(lambda model, x: model(x), model, jnp.zeros((2, size, size, 1)))
    assert logits.shape == (2, 7)


def test_compute_type_is_separate_from_parameter_type():
    model = models.create("resnet20", num_classes=10, rngs=nnx.Rngs(0), width=4, dtype=jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):  # flax's BatchNorm mixes float32 statistics in
        logits = nnx.eval_shape(lambda model, x: model(x), model, jnp.zeros((2, 8, 8, 3)))
    assert logits.dtype == jnp.bfloat16
    assert {v.dtype for v in jax.tree.leaves(nnx.state(model))} == {jnp.dtype(jnp.float32)}


def test_option_a_shortcut_keeps_every_other_pixel_and_adds_zero_channels():
    x = jnp.arange(2 * 5 * 4 * 3, dtype=jnp.float32).reshape(2, 5, 4, 3)
    y = subsample_and_pad(x, stride=2, features=6)
    assert y.shape == (2, 3, 2, 6)
    np.testing.assert_array_equal(y[..., 1:4], x[:, ::2, ::2, :])
    np.testing.assert_array_equal(y[..., jnp.asarray([0, 4, 5])], 0.0)


def convolve(x, kernel, stride):
    """A direct 3×3 or 1×1 convolution in numpy with PyTorch's padding."""
    side = kernel.shape[0]
    pad = side // 2
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (side, side), axis=(1, 2))
    return np.einsum("nhwcij,ijco->nhwo", windows[:, ::stride, ::stride], kernel)


def normalise(x, layer):
    scale = np.asarray(layer.scale[...]) / np.sqrt(np.asarray(layer.var[...]) + 1e-5)
    return (x - np.asarray(layer.mean[...])) * scale + np.asarray(layer.bias[...])


@pytest.mark.parametrize("projection", [True, False])
def test_strided_block_equals_its_definition(projection):
    rng = np.random.default_rng(0)
    block = BasicBlock(4, 8, stride=2, projection=projection, rngs=nnx.Rngs(0))
    for _, layer in nnx.iter_modules(block):
        if isinstance(layer, nnx.BatchNorm):
            for variable in (layer.scale, layer.bias, layer.mean, layer.var):
                value = rng.uniform(0.5, 1.5, variable.shape)
                variable.set_value(jnp.asarray(value, jnp.float32))
    block.eval()
    x = rng.standard_normal((2, 6, 8, 4)).astype(np.float32)

    y = np.maximum(normalise(convolve(x, np.asarray(block.conv1.kernel[...]), 2), block.bn1), 0)
    y = normalise(convolve(y, np.asarray(block.conv2.kernel[...]), 1), block.bn2)
    if projection:
        project, norm = block.downsample
        shortcut = normalise(convolve(x, np.asarray(project.kernel[...]), 2), norm)
    else:
        shortcut = np.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (2, 2)))
    np.testing.assert_allclose(block(jnp.asarray(x)), np.maximum(y + shortcut, 0), atol=1e-4)


def test_eval_uses_running_statistics_and_train_updates_them():
    model = models.create("resnet20", num_classes=3, rngs=nnx.Rngs(0), width=4)
    x = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))
    model.eval()
    before = np.asarray(model.bn1.mean[...])
    alone, together = model(x[:1]), model(x)[:1]
    np.testing.assert_allclose(alone, together, atol=1e-5)
    np.testing.assert_array_equal(model.bn1.mean[...], before)
    model.train()
    model(x)
    assert not np.array_equal(np.asarray(model.bn1.mean[...]), before)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet81", {}, "resnet18"),
        ("alexnet", {}, "known: "),
        ("resnet18", {"stem": "tiny"}, '"imagenet" or "small"'),
        ("resnet18", {"depth": 3}, "depth"),
        ("resnet20", {"width": 0}, "width must be a positive integer"),
        ("resnet20", {"num_classes": -1}, "num_classes must be a positive integer"),
    ],
)
def test_create_refuses_what_it_cannot_build(name, options, message):
    with pytest.raises(ValueError, match=message):
        models.create(name, **{"num_classes": 10, "rngs": nnx.Rngs(0), **options})
