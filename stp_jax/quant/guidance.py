"""Guidance of a whole model as one optax transformation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from flax import nnx

from stp_jax.quant.nnx import project_params
from stp_jax.terms.guidance import guide

Values = Mapping[str, jax.typing.ArrayLike]


def guidance(
    model: nnx.Module,
    strength: optax.ScalarOrSchedule,
    *,
    budgets: Values | Callable[[jax.Array], Values] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Draws an STP model's kernels towards the few-term values they will be projected to.

    `stp_jax.terms.guide` with the targets computed from the parameters at each step, so that the
    train step stays as it is. Chain it last, behind the optimizer.

    Args:
      model: the STP model whose parameters (`nnx.Param`) are optimized. What is no parameter, as
        searched scales, is taken as it is now.
      strength: the fraction of the distance per step, in [0, 1], or a schedule of it.
      budgets: terms per group of the targets by layer path, or a schedule of them (see
        `stp_jax.terms.budget_schedule`); the model's own by default.

    Raises:
      ValueError: a constant strength outside [0, 1], a path that is not a quantized layer, or a
        budget out of its range.

    >>> import stp_jax
    >>> model = nnx.Linear(16, 4, rngs=nnx.Rngs(0))
    >>> model = stp_jax.quantize(model, stp_jax.Policy([stp_jax.Rule(path=".*", budget=8)]))
    >>> tx = optax.chain(optax.sgd(0.01), stp_jax.guidance(model, 0.05, budgets={"": 4}))
    >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    """
    graphdef, _, rest = nnx.split(model, nnx.Param, ...)  # type: ignore[misc]
    rest = jax.tree.map(jax.numpy.copy, rest)  # the model's own may be donated to a step

    def targets(params: Any, step: jax.Array) -> Any:
        values = budgets(step) if callable(budgets) else budgets
        whole = nnx.merge(graphdef, _as_state(model_params, params), rest, copy=True)
        found = project_params(whole, values)
        return jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(found))

    model_params = nnx.state(model, nnx.Param)
    jax.eval_shape(targets, model_params, jax.ShapeDtypeStruct((), "int32"))
    return guide(strength, targets=targets)


def _as_state(like: nnx.State, params: Any) -> nnx.State:
    return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(params))
