"""Number handling that the model shares: one code for exact NumPy and for traced JAX.

Evaluated on concrete numbers the model computes in float64, exact for integers up to 2**53; under
``jit``, ``vmap`` or ``grad`` it computes in float32, exact up to 2**24 and within a few 1e-7 above.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def namespace(*trees: Any) -> Any:
    """``jax.numpy`` if any leaf is traced, else ``numpy``."""
    leaves = jax.tree.leaves(trees)
    return jnp if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves) else np


def as_real(x: Any, xp: Any) -> Any:
    """float64 in NumPy, float32 in JAX."""
    return xp.asarray(x).astype(np.float64 if xp is np else np.float32)


def as_integer(x: Any, xp: Any) -> Any:
    """int64 in NumPy, int32 in JAX."""
    return xp.asarray(x).astype(np.int64 if xp is np else np.int32)


def ceil_div(numerator: Any, denominator: Any) -> Any:
    """Integer division that rounds up."""
    return -(-numerator // denominator)


def check_numbers(owner: str, *, integers: bool = True, **values: Any) -> None:
    """Raises ValueError unless every concrete number is positive (and whole); traced ones pass."""
    what = "a positive integer" if integers else "positive"
    for name, value in values.items():
        if isinstance(value, jax.core.Tracer):
            continue
        if isinstance(value, int | float | np.number | np.ndarray | jax.Array):
            number = np.asarray(value)
            whole = not integers or bool((number == np.floor(number)).all())
            if number.dtype != bool and number.size and bool((number > 0).all()) and whole:
                continue
        elif not isinstance(value, str | bytes | complex | list | tuple | dict | type | None):
            continue  # what JAX puts in place of leaves while it handles trees
        raise ValueError(f"{owner}: {name} must be {what}, got {value!r}")


def smooth_maximum(a: Any, b: Any, smoothing: float, xp: Any) -> Any:
    """max(a, b) of non-negative numbers, rounded where they are alike.

    (a + b + sqrt((a - b)^2 + (s (a + b))^2)) / 2 for s = ``smoothing``: above the maximum by at
    most s/2 of the sum, differentiable for s > 0, the maximum itself for s = 0.
    """
    if smoothing == 0.0:
        return xp.maximum(a, b)
    total = a + b
    return 0.5 * (total + xp.sqrt((a - b) ** 2 + (smoothing * total) ** 2 + 1e-30))


def smooth_minimum(a: Any, b: Any, smoothing: float, xp: Any) -> Any:
    """min(a, b) of non-negative numbers: a + b less `smooth_maximum`."""
    if smoothing == 0.0:
        return xp.minimum(a, b)
    return a + b - smooth_maximum(a, b, smoothing, xp)


def smooth_step(x: Any, threshold: Any, smoothing: float, xp: Any) -> Any:
    """0 below the threshold and 1 from it on; for smoothing > 0 a logistic step.

    Its width is ``smoothing`` times the threshold.
    """
    if smoothing == 0.0:
        return xp.where(x < threshold, 0.0, 1.0)
    return 0.5 * (1.0 + xp.tanh((x - threshold) / (2.0 * smoothing * threshold)))
