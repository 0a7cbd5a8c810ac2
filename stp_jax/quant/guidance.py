"""Guidance of a whole model as one optax transformation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from stp_jax import hooks
from stp_jax.quant.calibration import project_params
from stp_jax.terms.guidance import guide

Values = Mapping[str, jax.typing.ArrayLike]


def guidance(
    model: Any,
    strength: optax.ScalarOrSchedule,
    *,
    budgets: Values | Callable[[jax.Array], Values] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Pulls an STP model's kernels towards the few-term values they will be projected to.

    `stp_jax.terms.guide` with the targets computed from the parameters at each step, so that the
    train step stays as it is. Chain it last, behind the optimizer.

    Args:
      model: the STP model whose parameters are optimized: `nnx.Param`, or of a Linen model with its
        variables the collection ``params``. What is no parameter, as searched scales, is taken as
        it is now.
      strength: the fraction of the distance per step, in [0, 1], or a schedule of it.
      budgets: terms per group of the targets by layer path, or a schedule of them (see
        `stp_jax.terms.budget_schedule`); the model's own by default.

    Raises:
      ValueError: a constant strength outside [0, 1], a path that is not a quantized layer, or a
        budget out of its range.

    >>> import stp_jax
    >>> from flax import nnx
    >>> model = nnx.Linear(16, 4, rngs=nnx.Rngs(0))
    >>> model = stp_jax.quantize(model, stp_jax.Policy([stp_jax.Rule(path=".*", budget=8)]))
    >>> tx = optax.chain(optax.sgd(0.01), stp_jax.guidance(model, 0.05, budgets={"": 4}))
    >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    """
    # A copy, since the model's own arrays may be donated to a step.
    state, from_state = hooks.functional(model)
    model_params, rebuild = hooks.trainable(from_state(jax.tree.map(jax.numpy.copy, state)))
    structure = jax.tree.structure(model_params)

    def targets(params: Any, step: jax.Array) -> Any:
        values = budgets(step) if callable(budgets) else budgets
        whole = rebuild(jax.tree.unflatten(structure, jax.tree.leaves(params)))
        found = project_params(whole, values)
        return jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(found))

    jax.eval_shape(targets, model_params, jax.ShapeDtypeStruct((), "int32"))
    return guide(strength, targets=targets)
