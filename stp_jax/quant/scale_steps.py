"""Steps of learned scales relative to their size, for optimizers such as Adam."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

_SCALES = ("weight_scale", "activation_scale")


def relative_scale_steps() -> optax.GradientTransformation:
    """Multiplies the update of each learned scale by the scale's magnitude.

    Chain it behind an optimizer whose steps are about as large as its learning rate whatever the
    gradient, such as Adam, RMSProp or Lion. A scale is a weight over an integer of up to 127, hence
    some hundred times smaller than the weights: with a learning rate of 1e-3, Adam moves a scale of
    2e-3 by half in one step. Relative steps are those of the scale's logarithm, as trained
    thresholds take them (Jain et al., "Trained Quantization Thresholds", MLSys 2020). Behind plain
    SGD, whose steps follow the gradient, it is not needed.

    Learned scales are told by their names, of NNX parameters and of Linen's collection
    ``stp_params`` alike; all other updates pass unchanged. It keeps no state.

    Raises:
      ValueError: ``update`` without params, or params that hold no learned scale.

    >>> import optax, stp_jax
    >>> tx = optax.chain(optax.adamw(1e-3), stp_jax.relative_scale_steps())
    """

    def init(params: Any) -> optax.EmptyState:
        if not any(_is_scale(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)):
            raise ValueError(
                "relative_scale_steps found no learned scale among the parameters; quantize the "
                "model first, with weight_scale='learned' or activations='learned', and optimize "
                "nnx.Param, or the collections params and stp_params of a Linen model"
            )
        return optax.EmptyState()

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("relative_scale_steps needs params: tx.update(updates, state, params)")

        def step(path: Any, u: jax.Array, p: jax.Array) -> jax.Array:
            return u * jnp.abs(p).astype(u.dtype) if _is_scale(path) else u

        return jax.tree_util.tree_map_with_path(step, updates, params), state

    return optax.GradientTransformation(init, update)


def _is_scale(path: tuple[Any, ...]) -> bool:
    """Whether a leaf is a learned scale, by the names on its way from the root."""
    return any(getattr(entry, "key", getattr(entry, "name", None)) in _SCALES for entry in path)
