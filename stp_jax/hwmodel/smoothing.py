"""Smoothed kinks of the differentiable surrogate: maximum, minimum and step.

All are exact for ``smoothing`` 0; above, they are rounded over that fraction of their operands.
"""

from __future__ import annotations

import numpy as np

from stp_jax.hwmodel.numbers import Real, namespace_of


def check_smoothing(smoothing: object) -> None:
    """Raises ValueError unless 0 <= smoothing < 1, TypeError unless it is a concrete number."""
    if isinstance(smoothing, bool) or not isinstance(smoothing, int | float | np.number):
        raise TypeError(f"smoothing must be a number from 0 to below 1, got {smoothing!r}")
    if not 0.0 <= smoothing < 1.0:
        raise ValueError(f"smoothing must be from 0 to below 1, got {smoothing}")


def smooth_maximum(a: Real, b: Real, smoothing: float) -> Real:
    """max(a, b) of non-negative numbers, rounded where they are alike.

    (a + b + sqrt((a - b)^2 + 4 s^2 a b)) / 2 for 0 <= s = ``smoothing`` < 1: above the maximum by
    at most s/2 of the sum, differentiable for s > 0 unless both are zero, and the maximum itself
    where either is zero and for s = 0.
    """
    xp = namespace_of(a, b)
    if smoothing == 0.0:
        return xp.maximum(a, b)
    square = (a - b) ** 2 + 4.0 * smoothing**2 * a * b
    positive = square > 0.0
    # At zero the root's derivative is infinite, which not even an unselected branch may have.
    root = xp.where(positive, xp.sqrt(xp.where(positive, square, 1.0)), 0.0)
    return 0.5 * (a + b + root)


def smooth_minimum(a: Real, b: Real, smoothing: float) -> Real:
    """min(a, b) of non-negative numbers: a + b less `smooth_maximum`."""
    if smoothing == 0.0:
        return namespace_of(a, b).minimum(a, b)
    return a + b - smooth_maximum(a, b, smoothing)


def smooth_step(x: Real, threshold: Real, smoothing: float) -> Real:
    """0 below the threshold and 1 from it on; for smoothing > 0 a logistic step.

    Its width is ``smoothing`` times the threshold.
    """
    xp = namespace_of(x, threshold)
    if smoothing == 0.0:
        return xp.where(x < threshold, 0.0, 1.0)
    return 0.5 * (1.0 + xp.tanh((x - threshold) / (2.0 * smoothing * threshold)))
