"""Products with packed terms as a Pallas kernel, which decodes the terms where it multiplies them.

Memory holds wire slots {valid, sign, exponent, index} (`stp_jax.terms.slots`): a byte each for int8
in groups of eight, so that a weight takes k/g bytes where an int8 one takes 1. The kernel reads the
slots of a block of groups, adds up their terms to the weights of the block, and multiplies it with
the inputs: what it saves against the dense product is memory traffic, at fewer than g slots a
group; the multiplications are the same.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from stp_jax.terms.groups import GroupLayout
from stp_jax.terms.packing import PackedTerms, read_slots, unpack
from stp_jax.terms.slots import slot_format

_ROWS, _OUTPUTS, _GROUPS = 128, 128, 16  # of a block


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("codes",),
    meta_fields=("length", "group_size", "bits", "fits_int8"),
)
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class WireSlots:
    """The wire slots of a dense kernel, laid out for `packed_matmul`; a pytree."""

    codes: jax.Array  # uint8 or uint16 [groups, slots, outputs]
    length: int  # of the reduction
    group_size: int
    bits: int  # of the integers
    fits_int8: bool  # whether no weight is 128, which 8-bit packing allows

    @property
    def outputs(self) -> int:
        """The number of outputs."""
        return self.codes.shape[2]


def wire_slots(packed: PackedTerms) -> WireSlots:
    """The wire slots of a packed dense kernel.

    Raises:
      ValueError: the stream is no matrix, is damaged, or its slots are wider than 16 bits.
    """
    slots = read_slots(packed)
    if len(packed.shape) != 2:
        raise ValueError(f"a dense kernel has two axes, the stream has shape {packed.shape}")
    length, outputs = packed.shape[packed.axis], packed.shape[1 - packed.axis]
    form = packed.format
    if form.wire_bits > 16:
        raise ValueError(f"slots of {form.wire_bits} bits are too wide; 16 is the most")
    minus, valid = slots.sign < 0, slots.sign != 0
    code = (minus << form.exponent_bits | slots.exponent) << form.index_bits | slots.member
    code = np.where(valid, code | 1 << (form.wire_bits - 1), 0)
    by_output = code.reshape(outputs, packed.layout.along, -1).transpose(1, 2, 0)
    return WireSlots(
        codes=jnp.asarray(by_output, jnp.uint8 if form.wire_bits <= 8 else jnp.uint16),
        length=length,
        group_size=packed.group_size,
        bits=packed.bits,
        fits_int8=int(np.abs(unpack(packed)).max(initial=0)) <= np.iinfo(np.int8).max,
    )


def _decode(codes: jax.Array, group_size: int, bits: int) -> jax.Array:
    """Wire slots [groups, slots, outputs] as integers, int32 [groups * group_size, outputs]."""
    form = slot_format(group_size, 2, bits)
    groups, slots, outputs = codes.shape
    members = jax.lax.broadcasted_iota(jnp.int32, (1, group_size, 1), 1)
    weights = jnp.zeros((groups, group_size, outputs), jnp.int32)
    for slot in range(slots):
        code = codes[:, slot].astype(jnp.int32)[:, None]
        index = code & ((1 << form.index_bits) - 1)
        code = code >> form.index_bits
        exponent = code & ((1 << form.exponent_bits) - 1)
        minus, valid = (code >> form.exponent_bits) & 1, code >> (form.exponent_bits + 1)
        term = jnp.left_shift(valid * (1 - 2 * minus), exponent)
        weights += jnp.where(index == members, term, 0)
    return weights.reshape(groups * group_size, outputs)


def _kernel(x_ref, codes_ref, out_ref, *, group_size: int, bits: int):
    blocks, span = codes_ref.shape[0] // _GROUPS, _GROUPS * group_size

    def add(block: jax.Array, total: jax.Array) -> jax.Array:
        codes = codes_ref[pl.ds(block * _GROUPS, _GROUPS)]
        x = x_ref[:, pl.ds(block * span, span)]
        weights = _decode(codes, group_size, bits).astype(x.dtype)
        return total + jnp.dot(x, weights, preferred_element_type=jnp.int32)

    out_ref[...] = jax.lax.fori_loop(0, blocks, add, jnp.zeros(out_ref.shape, jnp.int32))


def _filled(x: jax.Array, axis: int, multiple: int) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths)


@functools.partial(jax.jit, static_argnames="interpret")
def _matmul(x: jax.Array, slots: WireSlots, interpret: bool) -> jax.Array:
    rows, outputs, size = len(x), slots.outputs, slots.group_size
    x = GroupLayout(size * _GROUPS, (1,)).pad(_filled(x, 0, _ROWS))
    codes = _filled(_filled(slots.codes, 0, _GROUPS), 2, _OUTPUTS)
    total = pl.pallas_call(
        functools.partial(_kernel, group_size=size, bits=slots.bits),
        grid=(x.shape[0] // _ROWS, codes.shape[2] // _OUTPUTS),
        in_specs=[
            pl.BlockSpec((_ROWS, x.shape[1]), lambda i, j: (i, 0)),
            pl.BlockSpec((*codes.shape[:2], _OUTPUTS), lambda i, j: (0, 0, j)),
        ],
        out_specs=pl.BlockSpec((_ROWS, _OUTPUTS), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], codes.shape[2]), jnp.int32),
        interpret=interpret,
    )(x, codes)
    return total[:rows, :outputs]


def packed_matmul(
    x: jax.typing.ArrayLike, slots: WireSlots, *, interpret: bool | None = None
) -> jax.Array:
    """The product of integers with packed terms, decoded in a Pallas kernel.

    The sums are those of ``x @ unpack(packed)`` and of `packed_dot`, bit for bit. Inputs of int8
    are multiplied as int8 where the weights fit it, all others as int32. The kernel has been run
    interpreted only; it has not been compiled for a GPU or TPU, nor timed on one.

    Args:
      x: integers [..., K]; may be traced.
      slots: of the kernel, by `wire_slots`.
      interpret: whether JAX interprets the kernel; by default on a CPU, which cannot compile it.

    Returns:
      int32 [..., outputs].

    Raises:
      TypeError: slots are of another kind.
      ValueError: x does not hold integers of the kernel's length.

    >>> from stp_jax.terms import pack
    >>> kernel = wire_slots(pack([[7, 1], [-8, 0]], group_size=2, budget=3, axis=0))
    >>> packed_matmul([3, 1], kernel).tolist()
    [13, 3]
    """
    if not isinstance(slots, WireSlots):
        raise TypeError(f"expected WireSlots, as wire_slots makes them, got {type(slots).__name__}")
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.integer) or x.ndim < 1 or x.shape[-1] != slots.length:
        raise ValueError(f"x must hold integers [..., {slots.length}], got {x.dtype}{x.shape}")
    shape, empty = (*x.shape[:-1], slots.outputs), 0 in (x.size, slots.codes.size)
    if empty:
        return jnp.zeros(shape, jnp.int32)
    operand = jnp.int8 if x.dtype == jnp.int8 and slots.fits_int8 else jnp.int32
    rows = x.astype(operand).reshape(math.prod(x.shape[:-1]), slots.length)
    if interpret is None:
        interpret = jax.default_backend() == "cpu"
    return _matmul(rows, slots, interpret).reshape(shape)
