"""Paired differences in accuracy between two models on the same images."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def mcnemar(gained: int, lost: int) -> float:
    """The two-sided exact p-value that gains and losses are equally likely (McNemar, 1947).

    >>> mcnemar(0, 5)
    0.0625
    """
    n = gained + lost
    tail = sum(math.comb(n, k) for k in range(min(gained, lost) + 1)) / 2**n
    return min(1.0, 2 * tail)


def paired_difference(
    ours: np.ndarray, theirs: np.ndarray, *, resamples: int = 10_000, seed: int = 0
) -> dict[str, Any]:
    """Ours minus theirs in points, with a 95 % bootstrap interval over the images.

    Args:
      ours, theirs: whether each image is right, bool ``[N]``, images in the same order.
      resamples: of the bootstrap.
      seed: likewise.

    Returns:
      ``points``, ``low``, ``high``, the images ``gained`` and ``lost``, and ``p`` by `mcnemar`.
    """
    change = ours.astype(int) - theirs.astype(int)
    gained, lost = int((change > 0).sum()), int((change < 0).sum())
    # Sums of resampled changes need only how many of each kind are drawn.
    shares = np.array([gained, lost, len(change) - gained - lost]) / len(change)
    drawn = np.random.default_rng(seed).multinomial(len(change), shares, size=resamples)
    means = 100 * (drawn[:, 0] - drawn[:, 1]) / len(change)
    low, high = np.percentile(means, [2.5, 97.5])
    return {
        "points": float(100 * change.mean()),
        "low": float(low),
        "high": float(high),
        "gained": gained,
        "lost": lost,
        "p": mcnemar(gained, lost),
    }
