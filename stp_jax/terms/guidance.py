"""Guidance: a decoupled pull of weights towards values of few power-of-two terms.

STP guides the weights before it prunes their terms, so that the projection finds less to remove
(Huang et al., IEEE TCAD 42(1), 2023). The pull is decoupled, as weight decay is in AdamW:
after the optimizer's own update, each guided weight moves a fraction of its way to its target.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax


class GuideState(NamedTuple):
    """The number of updates so far, int32 scalar."""

    step: jax.Array


def guide(
    strength: optax.ScalarOrSchedule,
    *,
    targets: Callable[[Any, jax.Array], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Pulls parameters towards targets: ``update - strength * (param + update - target)``.

    Chain it last, behind the optimizer. Targets are a tree like the parameters, equal to them where
    nothing is to be guided (`stp_jax.project_params` gives it). With strength 1 the parameters land
    on their targets, with 0 nothing changes.

    Args:
      strength: the fraction of the distance per step, in [0, 1], or a schedule of it.
      targets: (parameters, step) → targets (`stp_jax.guidance` makes it for a model). None: each
        ``update`` takes them as a keyword ``targets``.

    Raises:
      ValueError: a constant strength outside [0, 1], or ``update`` without params or targets.
    """
    if not callable(strength) and not 0.0 <= float(strength) <= 1.0:
        raise ValueError(f"strength must lie in [0, 1], got {strength}")

    def init(params: chex.ArrayTree) -> GuideState:
        del params
        return GuideState(step=jnp.zeros([], jnp.int32))

    find = targets

    def update(updates, state, params=None, *, targets=None, **extra):
        del extra
        if params is not None and find is not None:
            targets = find(params, state.step)
        if params is None or targets is None:
            raise ValueError("guide needs params and targets: tx.update(g, s, params, targets=…)")
        pull = strength(state.step) if callable(strength) else strength

        def draw(u: jax.Array, p: jax.Array, t: jax.Array) -> jax.Array:
            return u - jnp.asarray(pull, u.dtype) * (p + u - t).astype(u.dtype)

        updates = jax.tree.map(draw, updates, params, targets)
        return updates, GuideState(step=optax.safe_increment(state.step))

    return optax.GradientTransformationExtraArgs(init, update)


def budget_schedule(
    start: int, end: int | np.ndarray, steps: int, *, warmup: int = 0
) -> optax.Schedule:
    """A term budget that falls linearly from start to end, as int32 of end's shape per step.

    Args:
      start: terms per group up to step ``warmup``.
      end: terms per group from step ``warmup + steps`` on; an integer, or an array by filter.
      steps: how many steps the fall takes, 1 or more.
      warmup: steps before it begins.

    Raises:
      ValueError: a budget is negative, or steps is less than 1.

    >>> [int(budget_schedule(32, 8, 3)(step)) for step in range(5)]
    [32, 24, 16, 8, 8]
    """
    if start < 0 or np.min(end) < 0:
        raise ValueError(f"budgets must be 0 or more, got start={start}, end={end}")
    if steps < 1:
        raise ValueError(f"steps must be 1 or more, got {steps}")

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        fraction = jnp.clip((jnp.asarray(step, jnp.float32) - warmup) / steps, 0.0, 1.0)
        return jnp.round(start + np.asarray(end - start, np.float32) * fraction).astype(jnp.int32)

    return schedule
