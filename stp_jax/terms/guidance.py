"""Guidance: a decoupled pull of weights towards values of few power-of-two terms, and its forms.

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

Targets = Callable[[Any, jax.Array], Any]  # (parameters, step) → a tree like the parameters


def _check_fraction(name: str, value: optax.ScalarOrSchedule) -> None:
    if not callable(value) and not 0.0 <= float(value) <= 1.0:
        raise ValueError(f"{name} must lie in [0, 1], got {value}")


def _find_targets(
    name: str, find: Targets | None, params: Any, step: jax.Array, targets: Any
) -> Any:
    if params is not None and find is not None:
        targets = find(params, step)
    if params is None or targets is None:
        raise ValueError(f"{name} needs params and targets: tx.update(g, s, params, targets=…)")
    return targets


def _pulled(u: jax.Array, p: jax.Array, t: jax.Array, pull: jax.typing.ArrayLike) -> jax.Array:
    """The update u of the parameter p, moved by a fraction of the way that it leaves to t."""
    return u - jnp.asarray(pull, u.dtype) * (p + u - t).astype(u.dtype)


class GuideState(NamedTuple):
    """The number of updates so far, int32 scalar."""

    step: jax.Array


def guide(
    strength: optax.ScalarOrSchedule,
    *,
    targets: Targets | None = None,
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
    _check_fraction("strength", strength)

    def init(params: chex.ArrayTree) -> GuideState:
        del params
        return GuideState(step=jnp.zeros([], jnp.int32))

    find = targets

    def update(updates, state, params=None, *, targets=None, **extra):
        del extra
        targets = _find_targets("guide", find, params, state.step, targets)
        pull = strength(state.step) if callable(strength) else strength
        updates = jax.tree.map(lambda u, p, t: _pulled(u, p, t, pull), updates, params, targets)
        return updates, GuideState(step=optax.safe_increment(state.step))

    return optax.GradientTransformationExtraArgs(init, update)


class DampingState(NamedTuple):
    """What oscillations are told by; trees like the parameters."""

    step: jax.Array  # int32 scalar, the number of updates so far
    targets: Any  # of the last update
    direction: Any  # int8, that of each target's last change
    frequency: Any  # float32, the moving mean of oscillations per step


def damp_oscillations(
    strength: optax.ScalarOrSchedule,
    *,
    threshold: float = 0.02,
    momentum: float = 0.01,
    resolution: float = 1 / 256,
    targets: Targets | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Pulls parameters whose few-term values keep jumping back and forth towards their targets.

    A weight near the boundary of two values crosses it again and again in training. An oscillation
    is a change of the target against the direction of its last change; where their moving mean per
    step, f ← m o + (1 - m) f, exceeds the threshold, the weight moves as `guide` moves it. With
    strength 1 it stays on its value until the mean has fallen again (Nagel et al., "Overcoming
    Oscillations in Quantization-Aware Training", ICML 2022, who freeze such weights for good).
    Chain it last. It keeps 9 bytes a parameter.

    Args:
      strength: the fraction of the distance per step, in [0, 1], or a schedule of it.
      threshold: oscillations per step from which a weight is pulled.
      momentum: m, in (0, 1].
      resolution: the change of a target, relative to its magnitude, from which it counts, so that
        the drift of a trained scale does not; values of 8 bits lie at least 1/127 apart.
      targets: as for `guide`. A parameter that is its own target is never pulled.

    Raises:
      ValueError: a number out of range, or ``update`` without params or targets.
    """
    _check_fraction("strength", strength)
    if not 0.0 < momentum <= 1.0:
        raise ValueError(f"momentum must lie in (0, 1], got {momentum}")
    if not 0.0 <= threshold <= 1.0 or not resolution >= 0.0:
        raise ValueError(
            f"threshold must lie in [0, 1] and resolution be 0 or more, got {threshold} and "
            f"{resolution}"
        )

    def init(params: chex.ArrayTree) -> DampingState:
        def zeros(dtype: Any) -> Any:
            return jax.tree.map(lambda p: jnp.zeros(p.shape, dtype), params)

        step = jnp.zeros([], jnp.int32)
        return DampingState(step, zeros(jnp.float32), zeros(jnp.int8), zeros(jnp.float32))

    find = targets

    def update(updates, state, params=None, *, targets=None, **extra):
        del extra
        targets = _find_targets("damp_oscillations", find, params, state.step, targets)
        pull = strength(state.step) if callable(strength) else strength

        def observe(t, p, last, direction, frequency):
            """(direction, frequency) after this step."""
            t = t.astype(jnp.float32)
            own = t == p.astype(jnp.float32)
            moved = jnp.abs(t - last) > resolution * jnp.maximum(jnp.abs(t), jnp.abs(last))
            changed = moved & ~own & (state.step > 0)
            way = jnp.sign(t - last).astype(jnp.int8)
            back = changed & (way == -direction)
            frequency = frequency + momentum * (back.astype(jnp.float32) - frequency)
            return jnp.where(changed, way, direction), frequency

        trees = (targets, params, state.targets, state.direction, state.frequency)
        seen = jax.tree.map(observe, *trees)
        direction = jax.tree.map(lambda _, pair: pair[0], targets, seen)
        frequency = jax.tree.map(lambda _, pair: pair[1], targets, seen)

        def draw(u: jax.Array, p: jax.Array, t: jax.Array, f: jax.Array) -> jax.Array:
            return jnp.where(f > threshold, _pulled(u, p, t, pull), u)

        updates = jax.tree.map(draw, updates, params, targets, frequency)
        kept = jax.tree.map(lambda t: t.astype(jnp.float32), targets)
        step = optax.safe_increment(state.step)
        return updates, DampingState(step, kept, direction, frequency)

    return optax.GradientTransformationExtraArgs(init, update)


def choice_weights(
    key: jax.Array, shape: tuple[int, ...], temperature: jax.typing.ArrayLike
) -> jax.Array:
    """Random importance that makes a projection choose its terms by chance where they are close.

    Each weight's squared error counts exp(T G) times, with G from the standard Gumbel distribution:
    the Gumbel-max trick on the logarithm of the gains, so that of two gains a and b the first wins
    with probability a^(1/T) / (a^(1/T) + b^(1/T)) (Papandreou & Yuille, "Perturb-and-MAP Random
    Fields", ICCV 2011). At T = 0 nothing is left to chance; a falling T goes from soft to hard.

    Args:
      key: a random key.
      shape: of the weights.
      temperature: T, 0 or more; may be traced.

    Returns:
      float32, positive, for ``importance`` of `stp_jax.terms.project`.
    """
    noise = jax.random.gumbel(key, shape, jnp.float32)
    return jnp.exp(jnp.asarray(temperature, jnp.float32) * noise)


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
