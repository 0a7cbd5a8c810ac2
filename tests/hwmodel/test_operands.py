import jax
import numpy as np
import pytest

from stp_jax import hwmodel
from stp_jax.hwmodel.operands import layer_patches

CONVOLUTIONS = {
    "symmetric, stride 2": {"padding": ((3, 3), (3, 3)), "stride": 2, "kernel": 7},
    "SAME, stride 2": {"padding": "SAME", "stride": 2, "kernel": 3},
    "VALID": {"padding": "VALID", "stride": (2, 3), "kernel": (3, 2)},
    "asymmetric": {"padding": ((0, 2), (3, 1)), "stride": (3, 2), "kernel": (4, 3)},
    "dilated": {"padding": ((2, 1), (0, 2)), "dilation": (2, 3), "kernel": (3, 2), "stride": 2},
    "dilated, SAME": {"padding": "SAME", "dilation": 2, "kernel": 3},
}


def pair(extent):
    return (extent, extent) if isinstance(extent, int) else extent


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_patches_are_those_of_the_convolution(name):
    options = CONVOLUTIONS[name]
    layer = hwmodel.conv("c", (11, 13), channels=4, filters=6, groups=2, batch=2, **options)
    x = np.random.default_rng(0).integers(1, 200, (2, 11, 13, 4))
    expected = jax.lax.conv_general_dilated_patches(
        x.astype(np.float32),
        pair(options["kernel"]),
        pair(options.get("stride", 1)),
        options["padding"],
        rhs_dilation=pair(options.get("dilation", 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    assert layer.out_size == expected.shape[1:3]
    by_group = np.asarray(expected).reshape(layer.P, 2, 2, layer.window).transpose(1, 3, 2, 0)
    patches = layer_patches(layer, x, 8)
    np.testing.assert_array_equal(patches, by_group.reshape(2, layer.K, layer.P))
    pixels = np.arange(1, 11 * 13 * 8 + 1).reshape(2, 11, 13, 4)
    read = np.unique(layer_patches(layer, pixels, 12))
    assert layer.input_words == np.count_nonzero(read)


def test_many_lanes_wait_beyond_a_byte():
    """Where neither operand is constant, a product of counts does not wrap either."""
    w = np.array([[300, 2], [1, 1]], np.uint16)
    a = np.array([[1, 2], [3, 1]], np.uint8)
    np.testing.assert_array_equal(hwmodel.operands._largest_products(w, a), [[300, 600], [3, 4]])


def test_inputs_of_dense_layers_may_have_their_reduction_in_axes():
    x = np.arange(2 * 5 * 3 * 4).reshape(2, 5, 3, 4)
    dense = layer_patches(hwmodel.dense("d", 12, 6, rows=10), x, 8)
    np.testing.assert_array_equal(dense, x.reshape(10, 12).T[None])
    conv = hwmodel.conv("c", (2, 5), channels=12, filters=6, kernel=1)
    with pytest.raises(ValueError, match="neither the input"):
        layer_patches(conv, x, 8)
