"""The systolic array, and the folding of a network onto it.

A layer occupies ``row_extent`` x ``col_extent`` places for ``steps`` steps; what exceeds the array
is folded. It is assumed that resident operands load in parallel and that the skew is one cycle a
row and a column.
"""

from __future__ import annotations

import dataclasses
import math
from types import ModuleType
from typing import get_args

import jax
import numpy as np

from stp_jax.hwmodel.folding import Dataflow, Extents, Folding
from stp_jax.hwmodel.network import Network
from stp_jax.hwmodel.numbers import INTEGER, Real, as_real, ceil_div, check_numbers
from stp_jax.hwmodel.pes import PE, BitParallel
from stp_jax.hwmodel.widths import Widths, changed, check_widths


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Array:
    """A systolic array with its buffers; all numbers are pytree leaves, so designs vmap.

    Gradients exist over buffer sizes and bandwidths; rows and columns are counted with and must be
    traced as integers.

    Dataflows, in SCALE-Sim's terms (rows, columns, time), where a PE takes g reduction elements:
    ``is`` inputs resident: K/g, P, M; ``ws`` weights resident: K/g, M, P; ``os`` outputs
    resident: P, M, K/g. The paper's array is ``is``.

    With a ``count`` above 1 several arrays of this kind, each with its own buffers, share a layer:
    its column folds are dealt out to them, since these depend on nothing of each other. They
    take the same operands in lockstep, which DRAM delivers to all of them at once.

    An ``activation_sram`` lies between DRAM and the three buffers, one for all arrays. It keeps the
    output of a layer until the last layer or addition that reads it, if there is room for all of
    it; which outputs have precedence, see `Tensors.room`. These are then neither written to DRAM
    nor read from it. The network's ``links`` say who reads what.

    Raises:
      ValueError: a size is not a positive integer below 2**53 (``activation_sram`` may be 0), rows,
        columns or count are traced as reals, a bandwidth is not positive, the dataflow is unknown,
        or registers have a width of outputs, which leave the array as partial sums.
      TypeError: widths are a number.
    """

    rows: Real = dataclasses.field(metadata=INTEGER)
    cols: Real = dataclasses.field(metadata=INTEGER)
    dataflow: Dataflow = dataclasses.field(default="is", metadata={"static": True})
    pe: PE = dataclasses.field(default_factory=BitParallel)
    ifmap_sram: Real = 256 << 10  # bytes; double-buffered: half is active
    filter_sram: Real = 256 << 10
    ofmap_sram: Real = 256 << 10
    activation_sram: Real = 0  # bytes for outputs that stay until their last reader; 0: none
    dram_bits: Widths = dataclasses.field(default_factory=Widths)  # of a word in DRAM
    sram_bits: Widths = dataclasses.field(default_factory=Widths)  # in the buffers
    register_bits: Widths = dataclasses.field(default_factory=Widths)  # in and between the PEs
    dram_bandwidth: Real = math.inf  # bytes per cycle, reads and writes together
    sram_bandwidth: Real = math.inf  # bytes per cycle of each of the three buffers' ports
    count: Real = dataclasses.field(default=1, metadata=INTEGER)  # equal arrays beside each other

    def __post_init__(self) -> None:
        """Checks the dataflow and, where they are concrete, the numbers."""
        if self.dataflow not in get_args(Dataflow):
            raise ValueError(
                f"Array: dataflow must be one of {get_args(Dataflow)}, got {self.dataflow!r}"
            )
        buffers = ("ifmap_sram", "filter_sram", "ofmap_sram")
        check_numbers("Array", rows=self.rows, cols=self.cols, count=self.count)
        check_numbers("Array", continuous=True, **{n: getattr(self, n) for n in buffers})
        check_numbers("Array", continuous=True, zero=True, activation_sram=self.activation_sram)
        for name in ("dram_bits", "sram_bits", "register_bits"):
            check_widths(f"Array: {name}", getattr(self, name))
        if {"outputs"} & changed(self.register_bits):
            raise ValueError(
                "Array: register_bits has another width of outputs, which leave the array as "
                "partial sums; set partial_sums"
            )
        bandwidths = ("dram_bandwidth", "sram_bandwidth")
        check_numbers("Array", integers=False, **{n: getattr(self, n) for n in bandwidths})


def fold(network: Network, array: Array, xp: ModuleType = np) -> Folding:
    """Maps each layer's reduction, positions and filters to rows, columns and time.

    Raises:
      ValueError: ``xp`` is JAX's, which counts in 32 bits, and a layer's extent is 2**31 or more.
    """
    extents = Extents.of(network, xp)
    reduction = array.pe.reduction_steps(extents)
    row_extent, col_extent, steps = {
        "is": (reduction, extents.P, extents.M),
        "ws": (reduction, extents.M, extents.P),
        "os": (extents.P, extents.M, reduction),
    }[array.dataflow]
    col_folds = ceil_div(col_extent, array.cols)
    integers = {
        "rows": array.rows,
        "cols": array.cols,
        "K": extents.K,
        "P": extents.P,
        "M": extents.M,
        "groups": extents.groups,
        "reduction_steps": reduction,
        "steps": steps,
        "row_folds": ceil_div(row_extent, array.rows),
        "col_folds": col_folds,
        "rounds": ceil_div(extents.groups * col_folds, array.count),
        "col_rounds": ceil_div(col_folds, array.count),
    }
    reals = {name: as_real(value, xp) for name, value in integers.items()}
    return Folding(dataflow=array.dataflow, extents=extents, **reals)
