"""The systolic array and how a layer folds onto it.

Following SCALE-Sim's analytical model (Samajdar et al., ISPASS 2020, sec. III): a layer occupies
``row_extent`` x ``col_extent`` places for ``steps`` steps; what exceeds the array is folded. It
assumes that resident operands load in parallel and that the skew is one cycle a row and a column.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, get_args

import jax
import numpy as np

from stp_jax.hwmodel.network import Network
from stp_jax.hwmodel.numeric import as_integer, as_real, ceil_div, check_numbers, layer_integers
from stp_jax.hwmodel.pes import PE, BitParallel

Dataflow = Literal["is", "ws", "os"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Array:
    """A systolic array with its buffers; all numbers are pytree leaves, so designs vmap.

    Gradients exist over buffer sizes and bandwidths; rows and columns are counted with and must be
    traced as integers.

    Dataflows, in SCALE-Sim's terms (rows, columns, time), where a PE takes g reduction elements:
    ``is`` inputs resident: K/g, P, M; ``ws`` weights resident: K/g, M, P; ``os`` outputs
    resident: P, M, K/g. The paper's array is ``is``.

    Raises:
      ValueError: a size is not a positive integer below 2**53, rows or columns are traced as
        reals, a bandwidth is not positive, or the dataflow is unknown.
    """

    rows: Any
    cols: Any
    dataflow: Dataflow = dataclasses.field(default="is", metadata={"static": True})
    pe: PE = dataclasses.field(default_factory=BitParallel)
    ifmap_sram: Any = 256 << 10  # bytes; double-buffered: half is active
    filter_sram: Any = 256 << 10
    ofmap_sram: Any = 256 << 10
    dram_bandwidth: Any = math.inf  # bytes per cycle, reads and writes together
    sram_bandwidth: Any = math.inf  # bytes per cycle of each of the three buffers' ports

    def __post_init__(self) -> None:
        """Checks the dataflow and, where they are concrete, the numbers."""
        if self.dataflow not in get_args(Dataflow):
            raise ValueError(
                f"Array: dataflow must be one of {get_args(Dataflow)}, got {self.dataflow!r}"
            )
        buffers = ("ifmap_sram", "filter_sram", "ofmap_sram")
        check_numbers("Array", rows=self.rows, cols=self.cols)
        check_numbers("Array", continuous=True, **{n: getattr(self, n) for n in buffers})
        bandwidths = ("dram_bandwidth", "sram_bandwidth")
        check_numbers("Array", integers=False, **{n: getattr(self, n) for n in bandwidths})


@dataclasses.dataclass(frozen=True)
class Folding:
    """How every layer of a network folds onto an array; real vectors over layers."""

    dataflow: Dataflow
    rows: Any
    cols: Any
    K: Any
    P: Any
    M: Any
    groups: Any  # independent products, run one after the other
    reduction_steps: Any  # PE-sized groups along the reduction
    steps: Any  # along time
    row_folds: Any
    col_folds: Any

    @property
    def folds(self) -> Any:
        """Folds of all products."""
        return self.groups * self.row_folds * self.col_folds

    @property
    def macs(self) -> Any:
        """Multiply-accumulates."""
        return self.groups * self.K * self.P * self.M

    @property
    def fill_cycles(self) -> Any:
        """What is not the streaming itself: loading the resident operand, fill and drain.

        2R + C - 2 a fold; R + C - 2 where outputs are resident, since nothing is loaded first and
        SCALE-Sim 3 lets finished sums leave in parallel (its paper counts R more to drain them).
        """
        load = 0.0 if self.dataflow == "os" else self.rows
        return self.folds * (load + self.rows + self.cols - 2)


def fold(network: Network, array: Array, xp: Any = np) -> Folding:
    """Maps each layer's reduction, positions and filters to rows, columns and time.

    Raises:
      ValueError: ``xp`` is JAX's and a layer's extent is 2**31 or more.
    """
    K, P, M, groups = (layer_integers(network, name, xp) for name in ("K", "P", "M", "groups"))
    reduction = array.pe.reduction_steps(network, xp)
    rows, cols = as_integer(array.rows, xp, "rows"), as_integer(array.cols, xp, "cols")
    extents = {"is": (reduction, P, M), "ws": (reduction, M, P), "os": (P, M, reduction)}
    row_extent, col_extent, steps = extents[array.dataflow]
    integers = {
        "rows": rows,
        "cols": cols,
        "K": K,
        "P": P,
        "M": M,
        "groups": groups,
        "reduction_steps": reduction,
        "steps": steps,
        "row_folds": ceil_div(row_extent, rows),
        "col_folds": ceil_div(col_extent, cols),
    }
    reals = {name: as_real(value, xp) for name, value in integers.items()}
    return Folding(dataflow=array.dataflow, **reals)
