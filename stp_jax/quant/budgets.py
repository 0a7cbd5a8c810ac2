"""Term budgets of a model's layers: reading, setting and relaxing them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stp_jax.quant.layers import check_paths, quantized_layers


def budgets(model: Any) -> dict[str, Any]:
    """Terms per group of each quantized layer that has a budget rule.

    An integer per layer, a real number after `relax_budgets`; (nested) lists of them for layers
    that a transformation stacked. Where budgets are by filter, a NumPy array ``[filters]``, or
    ``[*stack, filters]``.
    """
    found = {}
    for path, layer in quantized_layers(model).items():
        if layer.rule.budget is not None:
            values = np.asarray(layer.flat_budget)
            by_filter = values.ndim > len(layer.stack_axes)
            found[path] = values if by_filter else values.tolist()
    return found


def mean_budgets(values: Mapping[str, Any]) -> dict[str, float]:
    """The mean terms per group of each layer, whatever kind its budget is, for reports.

    Args:
      values: as from `budgets` or `stp_jax.allocate`. All filters of a layer have equally many
        groups, so this over the group size is the layer's terms per weight.

    >>> mean_budgets({"conv": np.array([2, 5]), "fc": 3})
    {'conv': 3.5, 'fc': 3.0}
    """
    return {path: float(np.mean(value)) for path, value in values.items()}


def set_budgets(
    model: Any, values: Mapping[str, jax.typing.ArrayLike] | jax.typing.ArrayLike
) -> None:
    """Sets terms per group, in place; nothing recompiles.

    A relaxed budget becomes a whole one again. Where a layer's budget changes between one number
    and one per filter, its stored shape does: jitted functions compile once more, and checkpoints
    of one kind do not fit the other.

    Args:
      model: an STP model; a Linen one with its variables.
      values: by layer path, or one number for all layers that have a budget rule. One integer, or
        an array ``[filters]`` with one for each output channel of the kernel, in its order. For
        stacked layers also one per layer, or ``[*stack, filters]``.

    Raises:
      ValueError: a path is not a quantized layer, or a budget is out of its range or of a shape
        that does not fit. Nothing is set then.
      TypeError: a budget is no integer.
    """
    layers = quantized_layers(model)
    if not isinstance(values, Mapping):
        values = dict.fromkeys(budgets(model), values)
    check_paths(values, layers)
    new = {}
    for path, value in values.items():
        try:
            new[path] = layers[path].shaped_budget(value)
        except ValueError as error:
            raise ValueError(f"layer {path!r}: {error}") from None
    for path, budget in new.items():
        layers[path].budget = budget


def relax_budgets(model: Any) -> None:
    """Makes the budgets of layers with a budget rule real parameters, in place.

    They keep their shape: set budgets by filter first where each filter's is to be trained.
    An optimizer of the parameters trains them: in NNX they are `RelaxedBudget`, a kind of
    `nnx.Param`; in Linen they stand in the collection ``stp_params`` with the learned scales. Each
    kernel lies between its projections onto the two budgets around its own (see
    `stp_jax.terms.quantize_weights_relaxed`). What they cost must be in the loss, for instance
    `stp_jax.hwmodel.evaluate` at `relaxed_budgets`. `set_budgets` makes them whole again, for
    instance with `stp_jax.terms.round_budgets`.
    """
    for layer in quantized_layers(model).values():
        if layer.rule.budget is not None:
            layer.relax()


def relaxed_budgets(model: Any) -> dict[str, jax.Array]:
    """The relaxed budgets of a model by layer path, to put a price on them in a loss.

    Each is within its layer's range, as the layer takes it: a number, or ``[filters]`` of them. The
    model may be traced.

    Raises:
      ValueError: the model has none; see `relax_budgets`.
    """
    found = {
        path: jnp.clip(layer.flat_budget, 0, layer.rule.format.max_budget)
        for path, layer in quantized_layers(model).items()
        if layer.is_relaxed
    }
    if not found:
        raise ValueError("the model has no relaxed budget; call stp_jax.relax_budgets first")
    return found
