"""Multi-layer perceptron: dense layers with ReLU between them."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from stp_jax.models.layers import linear


class MLP(nnx.Module):
    """Dense layers on the flattened input, with ReLU between them.

    Named as a torch.nn.Sequential `layers` that has its ReLUs at the odd places.
    """

    @property
    def exempt_layers(self) -> tuple[str, ...]:
        """The last layer keeps all terms.

        The first one sees whole groups and holds a large share of the weights: it gets a budget.
        """
        return (rf"layers\.{len(self.layers) - 1}",)

    def __init__(
        self,
        *,
        num_classes: int,
        rngs: nnx.Rngs,
        in_features: int,
        hidden: Sequence[int] = (256, 256),
        dtype: Any = None,
    ):
        """Builds the network.

        Args:
          num_classes: outputs of the last layer.
          rngs: random streams for the initial weights.
          in_features: values of one example (H·W·C of an image).
          hidden: outputs of each hidden layer.
          dtype: type to compute in; parameters stay float32.

        Raises:
          ValueError: if a width is not positive.
        """
        widths = (in_features, *hidden)
        if min(widths) < 1:
            raise ValueError(f"in_features and hidden widths must be positive, got {widths}")
        layers: list[Any] = []
        for before, after in itertools.pairwise(widths):
            layers += [linear(before, after, rngs=rngs, dtype=dtype), nnx.relu]
        self.layers = nnx.List([*layers, linear(widths[-1], num_classes, rngs=rngs, dtype=dtype)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (N, …) of in_features values each to logits (N, num_classes)."""
        x = x.reshape(x.shape[0], -1)
        for layer in self.layers:
            x = layer(x)
        return x


def mlp(**options: Any) -> MLP:
    """Multi-layer perceptron; options as for `MLP`."""
    return MLP(**options)
