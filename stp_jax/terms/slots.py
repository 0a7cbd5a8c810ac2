"""The slot: one term of a group as it is stored, and as it travels through the array.

A **stored** slot is the bits {sign, exponent, index}, most significant first, sign 1 for minus. It
has no bit that says whether it holds a term: within a group, a slot equal to the one before it is
empty (see `stp_jax.terms.packing`). A **wire** slot is {valid, sign, exponent, index}: at the
array's edge, one comparison with the slot before turns a stored slot into it, or a serialiser
behind the encoders makes it from integers. Registers between PEs and the RTL's term images hold
wire slots; streams in memory and files hold stored ones.

Exponents are below ``bits``, since integers reach ``±2**(bits - 1)``, and an index is below the
group's size. A group of a single slot has none before it: there the stored slot of all ones is
empty. Where bits and size are powers of two that code is a term of its own, so the exponent takes
one bit more, which makes the stored slot as wide as the wire slot.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class SlotFormat(NamedTuple):
    """Widths of a slot's fields; integers, or arrays where group size or budget are."""

    exponent_bits: int
    index_bits: Any
    marker_bits: Any  # the exponent's extra bit in stored slots: 1 where all ones is a term, else 0

    @property
    def stored_bits(self) -> Any:
        """Bits of a slot in memory: sign, exponent, index, and the marker of a single slot."""
        return 1 + self.exponent_bits + self.index_bits + self.marker_bits

    @property
    def wire_bits(self) -> Any:
        """Bits of a slot on its way through the array: valid, sign, exponent, index."""
        return 2 + self.exponent_bits + self.index_bits


def slot_format(group_size: Any, budget: Any, bits: int = 8) -> SlotFormat:
    """The slots of groups of ``group_size`` integers of ``bits`` bits that have ``budget`` of them.

    Every encoding has the same. Group size and budget may be arrays or traced; between the whole
    budgets 1 and 2, a group's stored bits are interpolated.

    >>> form = slot_format(group_size=8, budget=12)
    >>> form.stored_bits, form.wire_bits, slot_format(group_size=8, budget=1).stored_bits
    (7, 8, 8)
    """
    exponent_bits = (bits - 1).bit_length()
    index_bits, all_indices = _index_bits(group_size)
    every_code = all_indices * int(bits == 1 << exponent_bits)
    return SlotFormat(exponent_bits, index_bits, every_code * _is_single(budget))


def _index_bits(group_size: Any) -> tuple[Any, Any]:
    """Bits that tell the members of a group apart, ⌈log2 g⌉, and whether every code is in use."""
    if isinstance(group_size, int | np.integer):
        bits = (int(group_size) - 1).bit_length()
        return bits, int(group_size == 1 << bits)
    xp = jnp if isinstance(group_size, jax.Array) else np
    size = xp.asarray(group_size, np.float32)
    # A float's exponent is the bit length of an integer; a logarithm might round across one.
    bits = xp.frexp(size - 1)[1].astype(np.float32)
    return bits, (xp.frexp(size)[0] == 0.5).astype(np.float32)


def _is_single(budget: Any) -> Any:
    """1 where a group has one slot only, else 0; for real budgets the share of a slot."""
    if isinstance(budget, int | np.integer):
        return int(budget == 1)
    xp = jnp if isinstance(budget, jax.Array) else np
    # A group's extra bits rise to 1 at one slot and fall to 0 at two; per slot that is 1, then
    # (2 - k) / k.
    return xp.clip((2.0 - budget) / xp.maximum(budget, 1.0), 0.0, 1.0)
