"""Few-term codebooks: the integers that an encoding writes with at most t terms."""

from __future__ import annotations

import functools

import jax
import numpy as np

from stp_jax.terms.encodings import Encoding, check_encoding, count


@functools.cache
def _counts(encoding: Encoding, bits: int) -> np.ndarray:
    top = 1 << (bits - 1)
    with jax.ensure_compile_time_eval():  # a constant, also where it is asked for under a trace
        return np.asarray(count(np.arange(-top, top + 1), encoding, bits))


def few_term_values(
    terms: int, encoding: Encoding = "naf", bits: int = 8, limit: int | None = None
) -> np.ndarray:
    """The integers of at most ``terms`` terms, sorted, as int32.

    Args:
      terms: the most terms of a value, 0 or more.
      encoding: how terms are counted.
      bits: width; values lie in ``[-2**(bits - 1), 2**(bits - 1)]``.
      limit: the largest magnitude, if less than ``2**(bits - 1)``.

    Raises:
      ValueError: terms is negative, limit out of range, or encoding or bits do not exist.

    >>> few_term_values(1, bits=4).tolist()
    [-8, -4, -2, -1, 0, 1, 2, 4, 8]
    """
    check_encoding(encoding, bits)
    if terms < 0:
        raise ValueError(f"terms must be 0 or more, got {terms}")
    top = 1 << (bits - 1)
    if limit is not None and not 0 <= limit <= top:
        raise ValueError(f"limit must be from 0 to {top} for bits={bits}, got {limit}")
    values = np.arange(-top, top + 1, dtype=np.int32)
    return values[
        (_counts(encoding, bits) <= terms) & (np.abs(values) <= (top if limit is None else limit))
    ]
