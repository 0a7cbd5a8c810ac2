"""Networks that the tests share: four small layers, and ResNet-18's."""

import numpy as np

from stp_jax import hwmodel

SMALL = hwmodel.Network(
    (
        hwmodel.conv("a", (11, 11), channels=5, filters=20, kernel=(3, 3), padding="VALID"),
        hwmodel.conv("b", (15, 15), channels=40, filters=24, kernel=(1, 1), stride=(2, 2)),
        hwmodel.conv("c", (7, 7), channels=64, filters=24, kernel=(1, 1)),
        hwmodel.dense("d", 70, 33),
    )
)


def random_weights(network, scale=20.0, seed=0):
    rng = np.random.default_rng(seed)
    return {
        layer.name: np.clip(np.rint(rng.normal(0, scale, (layer.K, layer.filters))), -127, 127)
        .astype(np.int8)
        .reshape(*layer.kernel, -1, layer.filters)
        for layer in network
    }


def resnet18() -> hwmodel.Network:
    """At 224 x 224 (He et al., CVPR 2016, table 1)."""

    def conv(name, size, channels, filters, kernel=3, stride=1):
        return hwmodel.conv(
            name,
            (size, size),
            channels=channels,
            filters=filters,
            kernel=(kernel, kernel),
            stride=(stride, stride),
        )

    layers = [conv("conv1", 224, 3, 64, kernel=7, stride=2)]
    channels, size = 64, 56
    for stage in range(1, 5):
        filters, stride = 64 << (stage - 1), 1 if stage == 1 else 2
        layers.append(conv(f"layer{stage}.0.conv1", size, channels, filters, stride=stride))
        if stage > 1:
            layers.append(conv(f"layer{stage}.0.down", size, channels, filters, 1, stride))
        size //= stride
        layers += [
            conv(f"layer{stage}.{block}.conv{i}", size, filters, filters)
            for block, i in ((0, 2), (1, 1), (1, 2))
        ]
        channels = filters
    return hwmodel.Network((*layers, hwmodel.dense("fc", 512, 1000)), name="ResNet-18")


def extents(network):
    """K, P, M and the number of products of each layer, by name."""
    return {layer.name: (layer.K, layer.P, layer.M, layer.groups) for layer in network}
