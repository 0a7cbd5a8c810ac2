"""ResNet-18's layers at 224 x 224 (He et al., CVPR 2016, table 1), as the tests' workload."""

from stp_jax import hwmodel


def resnet18() -> hwmodel.Network:
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
