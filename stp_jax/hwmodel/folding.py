"""Folding of layers onto an array: what exceeds its rows and columns is done in several folds.

Following SCALE-Sim's analytical model (Samajdar et al., ISPASS 2020, sec. III).
"""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Literal

import numpy as np

from stp_jax.hwmodel.network import Network
from stp_jax.hwmodel.numbers import INT32_END, Real, Vector, as_integer

Dataflow = Literal["is", "ws", "os"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extents:
    """Extents of a network's layers: integers of shape (layers,), see `Layer`.

    int64, or int32 where the evaluation is traced.
    """

    K: np.ndarray
    P: np.ndarray
    M: np.ndarray
    groups: np.ndarray
    window: np.ndarray
    group_channels: np.ndarray

    @classmethod
    def of(cls, network: Network, xp: ModuleType) -> Extents:
        """Those of a network.

        Raises:
          ValueError: ``xp`` is JAX's, which counts in 32 bits, and an extent is 2**31 or more.
        """
        names = (field.name for field in dataclasses.fields(cls))
        return cls(**{name: _extent(network, name, xp) for name in names})


def _extent(network: Network, name: str, xp: ModuleType) -> np.ndarray:
    extents = network.extents(name)
    if xp is not np and extents.max() >= INT32_END:
        layer = network.names[int(extents.argmax())]
        raise ValueError(
            f"{layer}: {name} = {extents.max()} is 2**31 or more, beyond the 32 bits of a "
            "traced evaluation; evaluate concrete numbers, or split the batch"
        )
    return as_integer(extents, xp, name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Folding:
    """Folds of every layer of a network on an array; real vectors over layers."""

    dataflow: Dataflow
    extents: Extents
    rows: Real
    cols: Real
    K: Vector
    P: Vector
    M: Vector
    groups: Vector  # independent products, run one after the other
    reduction_steps: Vector  # PE-sized groups along the reduction
    steps: Vector  # along time
    row_folds: Vector
    col_folds: Vector
    rounds: Vector  # column folds of all products that one of several arrays does
    col_rounds: Vector  # those of one product

    @property
    def parallel_share(self) -> Vector:
        """Share of the folds that the busiest array does: 1 for a single array."""
        return self.rounds / (self.groups * self.col_folds)

    @property
    def folds(self) -> Vector:
        """Folds of all products."""
        return self.groups * self.row_folds * self.col_folds

    @property
    def macs(self) -> Vector:
        """Multiply-accumulates."""
        return self.groups * self.K * self.P * self.M

    @property
    def fill_cycles(self) -> Vector:
        """Cycles beside the streaming: loading the resident operand, filling and draining.

        2R + C - 2 a fold; R + C - 2 where outputs are resident, since nothing is loaded first and
        SCALE-Sim 3 lets finished sums leave in parallel (its paper counts R more to drain them).
        """
        load = 0.0 if self.dataflow == "os" else self.rows
        return self.folds * (load + self.rows + self.cols - 2)
