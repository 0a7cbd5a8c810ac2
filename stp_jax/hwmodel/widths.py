"""Widths of the operands at the levels of the memory hierarchy."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import numpy as np

from stp_jax.hwmodel.numbers import Real, check_numbers

_CONCRETE = int | float | np.number | np.ndarray
ACTIVATION_BITS = 8
ACCUMULATOR_BITS = 32  # what the int32 adds of the energy tables write


class OperandBytes(NamedTuple):
    """Bytes of a word of each operand."""

    inputs: Real
    weights: Real
    outputs: Real
    partial_sums: Real


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Widths:
    """Bits of a word of each operand at one level: DRAM, buffers or registers.

    All are leaves of a pytree, so that they vmap with the design and have gradients.

    Attributes:
      inputs: of a layer's first operand.
      weights: of a weight, or of the second operand of a product of activations; in registers of
        what the PE moves for it, a slot for group PEs. None: as the PE has them.
      outputs: of finished outputs; registers hold none.
      partial_sums: of unfinished ones.

    Raises:
      ValueError: a width is not positive.
    """

    inputs: Real = ACTIVATION_BITS
    weights: Real | None = None
    outputs: Real = ACTIVATION_BITS
    partial_sums: Real = ACCUMULATOR_BITS

    def __post_init__(self) -> None:
        """Checks the widths."""
        given = {n: v for n, v in vars(self).items() if v is not None}
        check_numbers("Widths", integers=False, **given)

    def weights_or(self, bits: Real) -> Real:
        """The width of weights, which is ``bits`` unless it is given."""
        return bits if self.weights is None else self.weights

    def bytes(self, weight_bits: Real) -> OperandBytes:
        """The widths in bytes, with weights of so many bits unless their width is given."""
        weights = self.weights_or(weight_bits)
        bits = (self.inputs, weights, self.outputs, self.partial_sums)
        return OperandBytes(*(width / 8.0 for width in bits))


def check_widths(name: str, widths: object) -> None:
    """Raises TypeError for a number, which does not say of which operand it is."""
    if isinstance(widths, int | float | str):
        raise TypeError(f"{name} must be a hwmodel.Widths, by operand, got {widths!r}")


def changed(widths: Widths) -> set[str]:
    """Operands whose widths are known and not the default; of traced ones nothing is known."""
    if not isinstance(widths, Widths):  # what JAX puts in place of leaves
        return set()
    known = {n: v for n, v in vars(widths).items() if isinstance(v, _CONCRETE)}
    return {n for n, v in known.items() if np.any(np.asarray(v) != getattr(Widths, n))}
