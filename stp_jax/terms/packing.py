"""Packed terms: integers as a stream of stored slots, the weights' form in a group PE's memory.

A group processing element (Huang et al., IEEE TCAD 42(1), 2023) takes one term a cycle: a sign, an
exponent, and the index of the activation in the group. `pack` writes exactly ``budget`` such slots
for each group, so that the stream needs no lengths and any group is found by its number; where
filters have budgets of their own, by the sum of those before it.

The stream. The reduction axis is cut into groups; a ragged last group is a full one whose last
members are zero. Groups follow each other along the reduction axis, and the reductions themselves
in the order of the other axes: for a dense kernel [in, out], output by output. In a group, terms
come largest exponent first, then lowest index. `stp_jax.terms.slots` has the bits of a slot; slots
follow each other without a gap, and the last byte is filled with zeros. Exponents are below
``bits``: Booth's radix-4 form of ``+2**(bits - 1)``, which would need one more
(``2**bits - 2**(bits - 1)``), is stored as its one-term sum.

The empty slot. A group with fewer terms than slots repeats its last slot: *a slot equal to the one
before it in the group is empty*. No encoding writes two terms of one group at the same exponent
and index, so this is unambiguous, takes no bit, and costs the PE one comparison with the slot that
it has just used. A group of zeros is ``+1 - 1`` on its first member, then repeats: two additions
instead of none, in groups that a projection seldom leaves. Where the budget is one slot there is
none before it: then the slot of all ones is empty.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from stp_jax.terms.encodings import Encoding, check_encoding, count_table, digit_planes
from stp_jax.terms.groups import GroupLayout, check_group_size
from stp_jax.terms.projection import align_budget, check_axis, check_budget
from stp_jax.terms.slots import SlotFormat, slot_format


@dataclasses.dataclass(frozen=True)
class StreamLayout:
    """Where the slots of a stream lie. Its rows are the reductions, in the order of the stream."""

    budgets: npt.NDArray[np.int64]  # [rows], slots per group
    along: int  # groups of a row
    group_size: int
    bits: int

    @classmethod
    def of(
        cls, shape: tuple[int, ...], axis: int, budget: Any, group_size: int, bits: int
    ) -> StreamLayout:
        """That of integers of a shape; arguments as for `pack`, the axis 0 or more."""
        once = (*shape[:axis], 1, *shape[axis + 1 :])
        budgets = np.broadcast_to(np.asarray(budget, np.int64), once).reshape(-1)
        return cls(budgets, GroupLayout(group_size, (axis,)).along(shape), group_size, bits)

    def width(self, budget: int) -> int:
        """Bits of a slot in groups of so many slots."""
        return slot_format(self.group_size, budget, self.bits).stored_bits

    def row_bits(self, budget: int) -> int:
        """Bits of a row whose groups have so many slots."""
        return self.along * budget * self.width(budget)

    @property
    def length(self) -> int:
        """Bits of the stream."""
        budgets, rows = np.unique(self.budgets, return_counts=True)
        return sum(self.row_bits(k) * n for k, n in zip(budgets.tolist(), rows, strict=True))

    def parts(self) -> Iterator[tuple[int, npt.NDArray[np.int64], Any]]:
        """Each budget with its rows and an index of their bits, [rows, bits of a row] or all."""
        budgets = np.unique(self.budgets).tolist()
        if len(budgets) == 1:
            yield budgets[0], np.arange(len(self.budgets)), slice(None)
            return
        bits = np.array([self.row_bits(k) for k in budgets], np.int64)
        bits = bits[np.searchsorted(budgets, self.budgets)]
        starts = np.cumsum(bits) - bits
        for k in budgets:
            mine = np.flatnonzero(self.budgets == k)
            yield k, mine, starts[mine, None] + np.arange(self.row_bits(k))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PackedTerms:
    """A tensor of integers as a term stream; see the module's docstring for its layout.

    Raises:
      ValueError: an attribute is out of range, or the data are not of the length they imply.
    """

    data: npt.NDArray[np.uint8]  # the stream
    shape: tuple[int, ...]  # of the integers
    axis: int  # the reduction axis, 0 or more
    group_size: int  # integers that share the slots
    budget: int | npt.NDArray[np.integer]  # slots per group, or with the axes of the integers, 1
    # along the reduction: those of each filter's groups
    encoding: Encoding = "naf"  # whose terms they are
    bits: int = 8  # width: magnitudes up to 2**(bits - 1)

    def __post_init__(self) -> None:  # noqa: D105
        _check_format(self.group_size, self.budget, self.encoding, self.bits)
        if not 0 <= self.axis < len(self.shape):
            raise ValueError(f"axis {self.axis} does not exist in shape {self.shape}")
        if np.ndim(self.budget):
            align_budget(np.asarray(self.budget, np.int32), self.shape, (self.axis,))
        length = -(-self.layout.length // 8)
        if not isinstance(self.data, np.ndarray):
            raise TypeError(f"a stream is a NumPy array of uint8, got {type(self.data).__name__}")
        if self.data.dtype != np.uint8 or self.data.shape != (length,):
            raise ValueError(
                f"a stream of shape {self.shape}, {_described(self.budget)} slots per group of "
                f"{self.group_size}, takes uint8[{length}], got "
                f"{self.data.dtype}{list(self.data.shape)}"
            )

    @property
    def format(self) -> SlotFormat:
        """The fields of a slot, in groups of the largest budget."""
        return slot_format(self.group_size, int(np.max(self.budget, initial=0)), self.bits)

    @property
    def layout(self) -> StreamLayout:
        """Where the slots lie in the stream."""
        return StreamLayout.of(self.shape, self.axis, self.budget, self.group_size, self.bits)

    @property
    def groups(self) -> int:
        """The number of groups."""
        return GroupLayout(self.group_size, (self.axis,)).count(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the stream."""
        return self.data.nbytes

    @property
    def bits_per_weight(self) -> float:
        """Bits of all slots over the number of integers; int8 storage has 8."""
        return self.layout.length / max(1, math.prod(self.shape))


def _described(budget: int | npt.NDArray[np.integer]) -> str:
    if not np.ndim(budget):
        return str(budget)
    return f"{np.min(budget, initial=0)} to {np.max(budget, initial=0)}"


class Slots(NamedTuple):
    """The slots of a stream, int32 arrays [groups, largest budget]."""

    sign: Any  # 1, -1, or 0 where the slot is empty
    exponent: Any
    member: Any  # its index in the group


def _check_format(group_size: int, budget: object, encoding: Encoding, bits: int) -> None:
    check_encoding(encoding, bits)
    check_group_size(group_size)
    check_budget(budget, group_size, encoding, bits)


def _stored_shape(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    """The shape with the reduction put last, as the stream has it."""
    return (*shape[:axis], *shape[axis + 1 :], shape[axis])


def _term_masks(groups: np.ndarray, encoding: Encoding, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Bit masks of the positive and negative terms, all below ``2**bits``."""
    plus, minus = map(np.asarray, digit_planes(groups, encoding, bits))
    beyond = (plus >> bits) & 1  # Booth's 2**bits - 2**(bits - 1)
    half = beyond << (bits - 1)
    return (plus ^ (beyond << bits)) | half, minus ^ half


def _code_bits(codes: npt.NDArray[np.uint32], width: int) -> npt.NDArray[np.uint8]:
    """The lowest ``width`` bits of each code, most significant first: [codes, width]."""
    item = np.dtype(f">u{1 << (max(width - 1, 7).bit_length() - 3)}")
    raw = np.ascontiguousarray(codes.reshape(-1, 1), item).view(np.uint8)
    return np.unpackbits(raw, axis=1)[:, 8 * item.itemsize - width :]


def _read_codes(bits: npt.NDArray[np.uint8], width: int) -> npt.NDArray[np.uint32]:
    """Undoes `_code_bits`."""
    bits = bits.reshape(-1, width)
    number = len(bits)
    raw = np.packbits(np.pad(bits, ((0, 0), (32 - width, 0))), axis=1)
    return raw.view(">u4").astype(np.uint32).reshape(number)


def _check_values(v: np.ndarray, axis: int, bits: int) -> int:
    if not np.issubdtype(v.dtype, np.integer):
        raise ValueError(f"terms are packed from integers, got dtype {v.dtype}; project first")
    check_axis(axis, v.shape)
    top = 1 << (bits - 1)
    if v.size and not -top <= v.min() <= v.max() <= top:
        raise ValueError(
            f"integers must lie in [{-top}, {top}] for bits={bits}, got [{v.min()}, {v.max()}]"
        )
    return axis % v.ndim


def _codes(
    groups: np.ndarray, budget: int, encoding: Encoding, bits: int, places: tuple[np.ndarray, int]
) -> np.ndarray:
    """The slots of each group as codes, uint32 [n, budget].

    Args:
      groups: integers [n, g].
      budget: slots of each, 1 or more.
      encoding: of the terms.
      bits: of the integers.
      places: the groups' numbers in the stream, and how many it has, for messages.
    """
    number, group_size = groups.shape
    plus, minus = _term_masks(groups, encoding, bits)
    # Positions in the order of the slots: [group, exponent from the top, index].
    exponents = np.arange(bits - 1, -1, -1, dtype=np.int32)[:, None]
    present = ((plus | minus)[:, None] >> exponents) & 1
    held = np.count_nonzero(present, axis=(1, 2))
    if held.max(initial=0) > budget:
        first = int(np.argmax(held > budget))
        raise ValueError(
            f"group {places[0][first]} of {places[1]} holds {held[first]} terms, more than the "
            f"budget of "
            f"{budget}: its integers are {groups[first].tolist()}; project them first"
        )
    form = slot_format(group_size, budget, bits)
    group, place, index = np.nonzero(present)
    exponent = bits - 1 - place
    sign = (minus[group, index] >> exponent) & 1
    code = (sign << (form.stored_bits - 1)) | (exponent << form.index_bits) | index
    slot = np.arange(len(group)) - np.repeat(np.cumsum(held) - held, held)
    if budget == 1:
        codes = np.full((number, 1), (1 << form.stored_bits) - 1, np.uint32)
        codes[group, slot] = code
        return codes
    codes = np.zeros((number, budget), np.uint32)
    codes[:, 1:] = 1 << (form.stored_bits - 1)  # a group of zeros
    codes[group, slot] = code
    last = np.where(held == 0, budget, held)[:, None] - 1
    return np.take_along_axis(codes, np.minimum(np.arange(budget)[None], last), axis=1)


def pack(
    v: npt.ArrayLike | jax.Array,
    *,
    group_size: int,
    budget: int | npt.ArrayLike,
    axis: int,
    encoding: Encoding = "naf",
    bits: int = 8,
) -> PackedTerms:
    """Writes integers as a term stream of ``budget`` slots per group; see the module's docstring.

    Args:
      v: integers of any shape, as `project` returns them for the same arguments.
      group_size: integers that share the slots, along ``axis``.
      budget: slots per group, from 0 to `max_budget`; or an array of them that broadcasts to ``v``
        with size 1 along ``axis``, such as one per filter.
      axis: the reduction axis, along which groups lie.
      encoding: whose terms are written.
      bits: width of the integers; their magnitudes reach ``2**(bits - 1)``.

    Raises:
      ValueError: an argument is out of range, an integer does not fit ``bits``, or a group holds
        more terms than the budget (the message names the first).

    >>> packed = pack([7, 0, 0, -8], group_size=4, budget=4, axis=0)
    >>> packed.nbytes, unpack(packed).tolist()
    (3, [7, 0, 0, -8])
    """
    _check_format(group_size, budget, encoding, bits)
    v = np.asarray(v)
    axis = _check_values(v, axis, bits)
    aligned = np.asarray(align_budget(np.asarray(budget, np.int32), v.shape, (axis,)))
    slots = aligned if aligned.ndim else int(aligned)
    layout = StreamLayout.of(v.shape, axis, slots, group_size, bits)
    rows = np.moveaxis(v.astype(np.int32), axis, -1)
    groups = GroupLayout(group_size, (-1,)).split(rows)
    groups = groups.reshape(len(layout.budgets), layout.along, group_size)
    stream = np.zeros(layout.length, np.uint8)
    for k, mine, places in layout.parts():
        if not k and groups[mine].any():
            raise ValueError(
                "a budget of 0 holds zeros only, and some integers are not; project them"
            )
        if not k:
            continue
        numbers = (mine[:, None] * layout.along + np.arange(layout.along)).reshape(-1)
        named = (numbers, len(groups) * layout.along)
        codes = _codes(groups[mine].reshape(-1, group_size), k, encoding, bits, named)
        stream[places] = _code_bits(codes, layout.width(k)).reshape(stream[places].shape)
    return PackedTerms(
        data=np.packbits(stream),
        shape=v.shape,
        axis=axis,
        group_size=group_size,
        budget=slots,
        encoding=encoding,
        bits=bits,
    )


def read_slots(packed: PackedTerms) -> Slots:
    """The slots of a stream, group by group.

    Raises:
      ValueError: a slot names an exponent or a member that does not exist: the stream is damaged.
    """
    if not isinstance(packed, PackedTerms):
        raise TypeError(f"expected PackedTerms, as `pack` makes them, got {type(packed).__name__}")
    layout = packed.layout
    largest = int(layout.budgets.max(initial=0))
    shape = (len(layout.budgets), layout.along, largest)
    found = Slots(*(np.zeros(shape, np.int32) for _ in Slots._fields))
    stream = np.unpackbits(packed.data, count=layout.length)
    for k, mine, places in layout.parts():
        if k:
            codes = _read_codes(stream[places], layout.width(k))
            read = _decode(codes.reshape(-1, k), slot_format(packed.group_size, k, packed.bits))
            for field, values in zip(found, read, strict=True):
                field[mine, :, :k] = values.reshape(len(mine), layout.along, k)
    found = Slots(*(field.reshape(packed.groups, largest) for field in found))
    damaged = (found.member >= packed.group_size) | (found.exponent >= packed.bits)
    if damaged.any():
        group, slot = (int(i[0]) for i in np.nonzero(damaged))
        raise ValueError(
            f"the stream is damaged: slot {slot} of group {group} names exponent "
            f"{found.exponent[group, slot]} (of {packed.bits}), member "
            f"{found.member[group, slot]} (of {packed.group_size})"
        )
    return found


def _decode(codes: npt.NDArray[np.uint32], form: SlotFormat) -> Slots:
    """Codes of groups, [groups, budget], as slots."""
    if codes.shape[1] == 1:
        empty = codes == (1 << form.stored_bits) - 1
    else:
        empty = np.zeros(codes.shape, bool)
        empty[:, 1:] = codes[:, 1:] == codes[:, :-1]
    member = np.where(empty, 0, codes & ((1 << form.index_bits) - 1)).astype(np.int32)
    exponent = (codes >> form.index_bits) & ((1 << form.exponent_bits + form.marker_bits) - 1)
    sign = 1 - 2 * (codes >> (form.stored_bits - 1)).astype(np.int32)
    exponent = np.where(empty, 0, exponent).astype(np.int32)
    return Slots(np.where(empty, 0, sign), exponent, member)


def unpack(packed: PackedTerms) -> npt.NDArray[np.int32]:
    """The integers of a stream, the inverse of `pack`; raises as `read_slots` does."""
    sign, exponent, member = read_slots(packed)
    groups = np.zeros((packed.groups, packed.group_size), np.int32)
    np.add.at(groups, (np.arange(packed.groups)[:, None], member), sign << exponent)
    layout = GroupLayout(packed.group_size, (-1,))
    rows = layout.join(groups, _stored_shape(packed.shape, packed.axis))
    return np.moveaxis(rows, -1, packed.axis)


@jax.jit
def _shift_add(x: jax.Array, slots: Slots) -> jax.Array:
    """x [n, groups, g], slots [budget, outputs, groups] → int32 [n, outputs]."""

    def cycle(total: jax.Array, slot: Slots) -> tuple[jax.Array, None]:
        chosen = jnp.take_along_axis(x[:, None], slot.member[None, :, :, None], axis=-1)
        term = slot.sign[None] * jnp.left_shift(chosen[..., 0], slot.exponent[None])
        return total + jnp.sum(term, axis=-1), None

    total = jnp.zeros((x.shape[0], slots.member.shape[1]), jnp.int32)
    return jax.lax.scan(cycle, total, slots)[0]


def packed_dot(x: jax.typing.ArrayLike, packed: PackedTerms) -> jax.Array:
    """A dense layer straight from the term stream: what an array of group PEs computes.

    In each of ``budget`` cycles (as many as the largest, if filters differ), every group takes its
    next slot: the index selects one of the g activations that it holds, the exponent shifts it
    left, the sign adds or subtracts it. Nothing is multiplied, and the int32 sums are those of the
    integer product ``x @ unpack(packed)``, bit for bit (overflow included: both wrap).

    Args:
      x: integers [..., K].
      packed: a kernel of two axes, one of them (``packed.axis``) the reduction of length K.

    Returns:
      int32 [..., outputs].

    Raises:
      ValueError: the stream is no matrix or is damaged, or x does not hold integers of its length.

    >>> packed = pack([[7, 1], [-8, 0]], group_size=2, budget=3, axis=0)
    >>> packed_dot([3, 1], packed).tolist()
    [13, 3]
    """
    x = jnp.asarray(x)
    if len(packed.shape) != 2:
        raise ValueError(f"a dense kernel has two axes, the stream has shape {packed.shape}")
    length, outputs = packed.shape[packed.axis], packed.shape[1 - packed.axis]
    if not jnp.issubdtype(x.dtype, jnp.integer) or x.ndim < 1 or x.shape[-1] != length:
        raise ValueError(f"x must hold integers [..., {length}], got {x.dtype}{list(x.shape)}")
    rows = x.astype(jnp.int32).reshape(math.prod(x.shape[:-1]), length)
    groups = GroupLayout(packed.group_size, (1,)).split(rows)

    def by_cycle(field: np.ndarray) -> jax.Array:
        fields = field.reshape(outputs, groups.shape[1], field.shape[1])
        return jnp.asarray(fields.transpose(2, 0, 1))

    total = _shift_add(groups, Slots(*map(by_cycle, read_slots(packed))))
    return total.reshape(*x.shape[:-1], outputs)


def stream_lower_bound(
    group_size: int, budget: int, encoding: Encoding = "naf", bits: int = 8
) -> float:
    """The least bits per group of any code of fixed length: log2 of the groups that fit the budget.

    Counts the tuples of ``group_size`` integers of magnitude up to ``2**(bits - 1)`` with at most
    ``budget`` terms in all, exactly: the numbers of integers with t terms are the coefficients of a
    polynomial in t, and its power ``group_size`` counts the tuples.

    Raises:
      ValueError: an argument is out of range.

    >>> stream_lower_bound(group_size=1, budget=1, bits=4)  # 0, ±1, ±2, ±4, ±8
    3.169925001442312
    """
    _check_format(group_size, budget, encoding, bits)
    single: Any = np.bincount(count_table(encoding, bits)).astype(object)
    ways: Any = np.ones(1, object)
    for _ in range(group_size):
        ways = np.convolve(ways, single)[: budget + 1]
    return math.log2(sum(ways.tolist()))
