"""Guidance and oscillation damping of a whole model, each one optax transformation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from stp_jax import hooks
from stp_jax.quant.calibration import project_params
from stp_jax.quant.layers import quantized_layers
from stp_jax.terms.guidance import Targets, choice_weights, damp_oscillations, guide

Values = Mapping[str, jax.typing.ArrayLike]


def guidance(
    model: Any,
    strength: optax.ScalarOrSchedule,
    *,
    budgets: Values | Callable[[jax.Array], Values] | None = None,
    temperature: optax.ScalarOrSchedule = 0.0,
    samples: int = 1,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Pulls an STP model's kernels towards the few-term values they will be projected to.

    `stp_jax.terms.guide` with the targets computed from the parameters at each step, so that the
    train step stays as it is. Chain it last, behind the optimizer.

    With a temperature, terms that are contested within a group are chosen by chance
    (`stp_jax.terms.choice_weights`): stochastic targets, or, as the mean over several samples, soft
    ones, which a temperature that falls to 0 makes hard.

    Args:
      model: the STP model whose parameters are optimized: `nnx.Param`, or of a Linen model with its
        variables the collection ``params``. Other values, such as searched scales, are constants
        from now on.
      strength: the fraction of the distance per step, in [0, 1], or a schedule of it.
      budgets: terms per group of the targets by layer path, or a schedule of them (see
        `stp_jax.terms.budget_schedule`); the model's own by default.
      temperature: of the choice of terms, 0 or more, or a schedule of it; 0 leaves nothing to
        chance. For rules whose method takes importance.
      samples: projections whose mean is the target, where there is a temperature.
      seed: of the choices; they differ from step to step.

    Raises:
      ValueError: a constant strength outside [0, 1], a negative temperature, no sample, a path that
        is not a quantized layer, or a budget out of its range.

    >>> import stp_jax
    >>> from flax import nnx
    >>> model = nnx.Linear(16, 4, rngs=nnx.Rngs(0))
    >>> model = stp_jax.quantize(model, stp_jax.Policy([stp_jax.Rule(path=".*", budget=8)]))
    >>> tx = optax.chain(optax.sgd(0.01), stp_jax.guidance(model, 0.05, budgets={"": 4}))
    >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    """
    if not callable(temperature) and temperature < 0:
        raise ValueError(f"temperature must be 0 or more, got {temperature}")
    if samples < 1:
        raise ValueError(f"samples must be 1 or more, got {samples}")
    random = callable(temperature) or temperature > 0

    def project(model: Any, values: Values | None, step: jax.Array) -> Any:
        if not random:
            return project_params(model, values)
        heat = temperature(step) if callable(temperature) else temperature
        key = jax.random.fold_in(jax.random.key(seed), step)
        return _mean_of_choices(model, values, jnp.asarray(heat), jax.random.split(key, samples))

    return guide(strength, targets=_targets(model, budgets, project))


def damping(
    model: Any,
    strength: optax.ScalarOrSchedule,
    *,
    threshold: float = 0.02,
    momentum: float = 0.01,
    budgets: Values | Callable[[jax.Array], Values] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Pulls those of an STP model's weights to their few-term values that oscillate between two.

    `stp_jax.terms.damp_oscillations` with the targets computed from the parameters at each step.
    Chain it last, behind the optimizer and any guidance.

    Args:
      model: as for `guidance`, as are budgets.
      strength: the fraction of the distance per step, in [0, 1], or a schedule of it.
      threshold: oscillations per step from which a weight is pulled.
      momentum: of their moving mean.
      budgets: terms per group of the targets; the model's own by default.

    Raises:
      ValueError: a number out of range, a path that is not a quantized layer, or a budget out of
        its range.
    """
    project = lambda model, values, step: project_params(model, values)  # noqa: E731
    return damp_oscillations(
        strength,
        threshold=threshold,
        momentum=momentum,
        targets=_targets(model, budgets, project),
    )


def _targets(
    model: Any,
    budgets: Values | Callable[[jax.Array], Values] | None,
    project: Callable[[Any, Values | None, jax.Array], Any],
) -> Targets:
    """Targets of a model's parameters; ``project`` takes a model with these, budgets, the step."""
    # A copy, since the model's own arrays may be donated to a step.
    state, from_state = hooks.functional(model)
    model_params, rebuild = hooks.trainable(from_state(jax.tree.map(jnp.copy, state)))
    structure, number = jax.tree.structure(model_params), len(jax.tree.leaves(model_params))

    def targets(params: Any, step: jax.Array) -> Any:
        if len(leaves := jax.tree.leaves(params)) != number:
            raise ValueError(
                f"targets need all {number} parameters of the model, got "
                f"{len(leaves)}; kernels alone are pulled, so chain it outside of "
                "optax.masked and multi_transform, and optimize all of nnx.Param"
            )
        values = budgets(step) if callable(budgets) else budgets
        whole = rebuild(jax.tree.unflatten(structure, leaves))
        found = project(whole, values, step)
        return jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(found))

    jax.eval_shape(targets, model_params, jax.ShapeDtypeStruct((), "int32"))
    return targets


def _mean_of_choices(
    model: Any, values: Values | None, temperature: jax.Array, keys: jax.Array
) -> Any:
    """The mean of the parameters projected with terms chosen by chance, one sample a key."""
    shapes = {path: layer.kernel.shape for path, layer in quantized_layers(model).items()}

    def sample(key: jax.Array) -> Any:
        each = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))
        importance = {
            path: choice_weights(each[path], shape, temperature) for path, shape in shapes.items()
        }
        return project_params(model, values, importance=importance)

    if len(keys) == 1:
        return sample(keys[0])
    total, _ = jax.lax.scan(
        lambda total, key: (jax.tree.map(jnp.add, total, sample(key)), None),
        sample(keys[0]),
        keys[1:],
    )
    return jax.tree.map(lambda x: x / len(keys), total)
