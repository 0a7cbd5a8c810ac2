"""LSTM language model (Zaremba et al., "Recurrent neural network regularization", 2014).

The cell is Hochreiter and Schmidhuber's with forget gates, in PyTorch's order (input, forget,
cell, output) and with its two biases. The weights of PyTorch's word_language_model example
(`encoder`, `rnn.weight_ih_l0` …, `decoder`) load.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from stp_jax.models.layers import dropout, linear

State = tuple[jax.Array, jax.Array]  # hidden and cell state of a layer, (N, hidden) each


class LSTMLayer(nnx.Module):
    """One LSTM layer over a sequence; its two products are plain dense layers."""

    def __init__(self, in_features: int, hidden: int, *, rngs: nnx.Rngs, dtype: Any = None):
        """Builds the layer; PyTorch draws all its weights from ±1/√hidden, biases included."""
        self.hidden = hidden
        bound = hidden**-0.5

        def uniform(key: Any, shape: Any, dtype: Any = jnp.float32, **_: Any) -> jax.Array:
            return jax.random.uniform(key, shape, dtype, minval=-bound, maxval=bound)

        options = {"kernel_init": uniform, "bias_init": uniform, "dtype": dtype, "rngs": rngs}
        self.ih = nnx.Linear(in_features, 4 * hidden, **options)
        self.hh = nnx.Linear(hidden, 4 * hidden, **options)

    def __call__(self, x: jax.Array, state: State) -> tuple[jax.Array, State]:
        """Maps (N, T, in_features) and the state before it to (N, T, hidden) and the state after.

        Time is unrolled in the program, which is compiled for the T of the training windows: each
        product is then an ordinary use of its layer, for quantizers and for shape tracing.
        """
        hidden, cell = state
        outputs = []
        for from_input in jnp.unstack(self.ih(x), axis=1):
            gates = from_input + self.hh(hidden)
            take, forget, new, give = jnp.split(gates, 4, axis=-1)
            cell = nnx.sigmoid(forget) * cell + nnx.sigmoid(take) * jnp.tanh(new)
            hidden = nnx.sigmoid(give) * jnp.tanh(cell)
            outputs.append(hidden)
        return jnp.stack(outputs, axis=1), (hidden, cell)


class LSTMLanguageModel(nnx.Module):
    """Embedding, LSTM layers and a dense layer over the vocabulary."""

    # Gates get budgets, input and recurrent alike: sigmoid and tanh bound what their errors do. The
    # embedding is read, not multiplied, and stays float (`Rule.embeddings`).
    exempt_layers = ("decoder",)

    def __init__(
        self,
        *,
        num_classes: int,
        rngs: nnx.Rngs,
        embedding: int = 200,
        hidden: int = 200,
        depth: int = 2,
        dropout_rate: float = 0.0,
        dtype: Any = None,
    ):
        """Builds the network; the defaults are the small model of Zaremba et al., section 4.1.

        Args:
          num_classes: size of the vocabulary.
          rngs: random streams for the initial weights and dropout.
          embedding: channels of a token.
          hidden: channels of each LSTM layer.
          depth: LSTM layers.
          dropout_rate: on the non-recurrent connections (section 3).
          dtype: type to compute in; parameters stay float32.

        Raises:
          ValueError: if a size is not positive or the rate is outside [0, 1).
        """
        if min(embedding, hidden, depth) < 1:
            raise ValueError(
                f"embedding, hidden and depth must be positive, got {embedding}, {hidden}, {depth}"
            )
        options = {"rngs": rngs, "dtype": dtype}
        self.encoder = nnx.Embed(num_classes, embedding, **options)
        self.rnn = nnx.List(
            [
                LSTMLayer(embedding if layer == 0 else hidden, hidden, **options)
                for layer in range(depth)
            ]
        )
        self.dropout = dropout(dropout_rate, rngs=rngs)
        self.decoder = linear(hidden, num_classes, **options)

    def initial_state(self, batch: int) -> list[State]:
        """Zero state of every layer for `batch` sequences."""
        dtype = self.decoder.dtype or jnp.float32
        zeros = [jnp.zeros((batch, layer.hidden), dtype) for layer in self.rnn]
        return [(zero, zero) for zero in zeros]

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps int32 tokens (N, T) to logits (N, T, num_classes) of each next token."""
        return self.continue_from(tokens, self.initial_state(len(tokens)))[0]

    def continue_from(
        self, tokens: jax.Array, states: list[State]
    ) -> tuple[jax.Array, list[State]]:
        """Maps tokens (N, T) and the state before them to logits and the state after them.

        Truncated back-propagation passes each window's state on to the next one.
        """
        x = self.dropout(self.encoder(tokens))
        after = []
        for layer, state in zip(self.rnn, states, strict=True):
            x, state = layer(x, state)
            x = self.dropout(x)
            after.append(state)
        return self.decoder(x), after

    def adapt_torch(self, state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Translates torch.nn.LSTM's names: rnn.weight_ih_l0 is here rnn.0.ih.weight."""
        pattern = re.compile(r"rnn\.(weight|bias)_(ih|hh)_l(\d+)")
        return {pattern.sub(r"rnn.\3.\2.\1", name): value for name, value in state.items()}


def lstm_lm(**options: Any) -> LSTMLanguageModel:
    """LSTM language model; options as for `LSTMLanguageModel`."""
    return LSTMLanguageModel(**options)
