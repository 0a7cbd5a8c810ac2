"""Number handling that the model shares: one code for exact NumPy and for traced JAX.

Evaluated on concrete numbers the model computes in float64, exact for integers up to 2**53; under
``jit``, ``vmap`` or ``grad`` it computes in float32, exact up to 2**24 and within a few 1e-7 above.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stp_jax.hwmodel.network import Network

INT32_END = 1 << 31
EXACT_END = 1 << 53  # from here on float64 skips integers


def namespace(*trees: Any) -> Any:
    """``jax.numpy`` if any leaf is traced, else ``numpy``."""
    leaves = jax.tree.leaves(trees)
    return jnp if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves) else np


def as_real(x: Any, xp: Any) -> Any:
    """float64 in NumPy, float32 in JAX."""
    if xp is np:
        return np.asarray(x).astype(np.float64)
    if not isinstance(x, jax.Array):
        x = np.asarray(x).astype(np.float32)  # JAX would first make it an int32, which wraps
    return jnp.asarray(x).astype(np.float32)


def as_integer(x: Any, xp: Any, what: str = "an integer") -> Any:
    """int64 in NumPy, int32 in JAX; ValueError that says ``what`` does not fit the latter."""
    if xp is np:
        return np.asarray(x).astype(np.int64)
    if not isinstance(x, jax.Array):
        x = np.asarray(x)
        if x.size and x.max() >= INT32_END:
            raise ValueError(f"{what} is {x.max()}; traced evaluations count in 32 bits")
        x = x.astype(np.int32)
    return jnp.asarray(x).astype(np.int32)


def layer_integers(network: Network, attribute: str, xp: Any) -> Any:
    """An extent of every layer as integers, shape (layers,).

    Raises:
      ValueError: traced evaluations count in 32 bits, and the extent of a layer needs more.
    """
    extents = network.extents(attribute)
    if xp is not np and extents.max() >= INT32_END:
        layer = network.names[int(extents.argmax())]
        raise ValueError(
            f"{layer}: {attribute} = {extents.max()} is 2**31 or more, beyond the 32 bits of a "
            "traced evaluation; evaluate concrete numbers, or split the batch"
        )
    return as_integer(extents, xp)


def ceil_div(numerator: Any, denominator: Any) -> Any:
    """Integer division that rounds up."""
    return -(-numerator // denominator)


def check_numbers(
    owner: str, *, integers: bool = True, continuous: bool = False, **values: Any
) -> None:
    """Raises ValueError unless every number is positive (and a whole one below 2**53).

    Of traced numbers only the dtype is known: it must be an integer's where the model counts with
    the number, since its gradient would be zero, and may be real where the model is
    ``continuous`` in it.
    """
    what = "a positive integer" if integers else "positive"
    for name, value in values.items():
        if isinstance(value, jax.core.Tracer):
            if not integers or continuous or jnp.issubdtype(value.dtype, jnp.integer):
                continue
            raise ValueError(
                f"{owner}: {name} is counted with and must be traced as an integer, got "
                f"{value.dtype}; gradients are taken over budgets, bandwidths, buffer sizes and "
                "table entries"
            )
        if isinstance(value, int | float | np.number | np.ndarray | jax.Array):
            number = np.asarray(value)
            if _is_positive(number) and (not integers or _is_whole(number)):
                continue
        elif not isinstance(value, str | bytes | complex | list | tuple | dict | type | None):
            continue  # what JAX puts in place of leaves while it handles trees
        raise ValueError(f"{owner}: {name} must be {what}, got {value!r}")


def _is_positive(number: np.ndarray) -> bool:
    return number.dtype != bool and number.size > 0 and bool((number > 0).all())


def _is_whole(number: np.ndarray) -> bool:
    """Whether a positive number is a whole one that float64 holds exactly; infinity is not."""
    return bool((number < EXACT_END).all()) and bool((number == np.floor(number)).all())


def check_smoothing(smoothing: Any) -> None:
    """Raises ValueError unless 0 <= smoothing < 1, TypeError unless it is a concrete number."""
    if isinstance(smoothing, bool) or not isinstance(smoothing, int | float | np.number):
        raise TypeError(f"smoothing must be a number from 0 to below 1, got {smoothing!r}")
    if not 0.0 <= smoothing < 1.0:
        raise ValueError(f"smoothing must be from 0 to below 1, got {smoothing}")


def smooth_maximum(a: Any, b: Any, smoothing: float, xp: Any) -> Any:
    """max(a, b) of non-negative numbers, rounded where they are alike.

    (a + b + sqrt((a - b)^2 + 4 s^2 a b)) / 2 for 0 <= s = ``smoothing`` < 1: above the maximum by
    at most s/2 of the sum, differentiable for s > 0 unless both are zero, and the maximum itself
    where either is zero and for s = 0.
    """
    if smoothing == 0.0:
        return xp.maximum(a, b)
    square = (a - b) ** 2 + 4.0 * smoothing**2 * a * b
    positive = square > 0.0
    # At zero the root's derivative is infinite, which not even an unselected branch may have.
    root = xp.where(positive, xp.sqrt(xp.where(positive, square, 1.0)), 0.0)
    return 0.5 * (a + b + root)


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
