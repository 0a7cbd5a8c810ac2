import pytest

from stp_jax import hwmodel


def test_grouped_convolution_is_independent_products():
    layer = hwmodel.conv("c", (9, 9), channels=12, filters=8, kernel=(3, 3), groups=4, batch=2)
    assert (layer.K, layer.P, layer.M, layer.groups) == (9 * 3, 2 * 81, 2, 4)
    assert layer.macs == 2 * 81 * 8 * 9 * 3
    assert layer.weight_words == 9 * 3 * 8


def test_a_stride_above_the_kernel_reads_only_the_pixels_it_touches():
    layer = hwmodel.conv("c", (8, 8), channels=3, filters=4, kernel=(1, 1), stride=(2, 2))
    assert layer.input_words == 4 * 4 * 3


@pytest.mark.parametrize("extent", [0, -1, 1.5])
def test_extents_must_be_positive_integers(extent):
    with pytest.raises(ValueError, match="positive integer"):
        hwmodel.dense("d", extent, 4)


def test_channels_must_divide_into_groups():
    with pytest.raises(ValueError, match="do not divide into 3 groups"):
        hwmodel.conv("c", (4, 4), channels=4, filters=4, kernel=(1, 1), groups=3)


def test_layer_names_are_distinct():
    layer = hwmodel.dense("d", 4, 4)
    with pytest.raises(ValueError, match="two layers"):
        hwmodel.Network((layer, layer))


@pytest.mark.parametrize(
    "padding", [((1, 1),), ((-1, 1), (1, 1)), ((0, 0), (0, 0))], ids=["axes", "negative", "few"]
)
def test_a_layer_checks_its_padding(padding):
    with pytest.raises(ValueError, match="layer 'c'"):
        hwmodel.Layer(
            name="c",
            in_size=(8, 8),
            out_size=(8, 8),
            kernel=(3, 3),
            stride=(1, 1),
            channels=1,
            filters=1,
            padding=padding,
        )
