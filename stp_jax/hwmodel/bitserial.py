"""Digit-serial PEs of the literature, on the same array, from the digits of real operands.

Each takes its published rule for the cycles of one step of ``lanes`` multiplications:

* `Stripes` (Judd et al., MICRO 2016): activations bit by bit at the layer's precision.
* `BitPragmatic` (Albericio et al., MICRO 2017): an activation's essential (non-zero) bits.
* `Laconic` (Sharify et al., ISCA 2019): pairs of a weight term and an activation term.
* `Bitlet` (Lu et al., MICRO 2021): weights bit by significance; each takes its ones in turn.
* `BitWave` (Shi et al., HPCA 2024): non-zero bit columns of a group, sign and magnitude.
* `BitVert` (Chen et al., MICRO 2024): bit columns, each at most half effectual.

What finishes early waits: all PEs that share a step advance with the slowest lane. The originals
differ in array, buffers and in how far lanes may run ahead; here only the PE differs.

Arithmetic energy is derived: published event counts (additions, shifts) times the table's entries.
Adder trees count one int16 addition a lane, PE accumulators one int32 addition a cycle.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

import jax
import numpy as np

from stp_jax.hwmodel.folding import Extents
from stp_jax.hwmodel.network import Layer
from stp_jax.hwmodel.numbers import Real, Vector, ceil_div, check_numbers, namespace_of
from stp_jax.hwmodel.operands import (
    layer_patches,
    layer_weights,
    lockstep_cycles,
    own_cycles,
    pad_rows,
    require,
)
from stp_jax.hwmodel.pes import (
    ACCUMULATOR_BITS,
    ACTIVATION_BITS,
    PE,
    Activity,
    Workload,
    composed_area,
    operand_register_bits,
    refuse_budgets,
)
from stp_jax.hwmodel.technology import Technology
from stp_jax.hwmodel.term_histogram import check_names, lookup
from stp_jax.terms import count_table

WEIGHT_BITS = 8
_SUBGROUP = 8  # of BitVert's lanes, sec. IV-A of its paper


@dataclasses.dataclass(frozen=True, kw_only=True)
class Steps:
    """One product of a layer on a digit-serial array.

    Attributes:
      weight_side: cycles factor of the weights, (reduction lanes or groups, M).
      activation_side: that of the activations, (reduction lanes or groups, P).
      lanes: rows of the two that one PE holds: its lanes, or 1 where they are per PE.
      additions: effectual digit additions, all PEs.
    """

    weight_side: np.ndarray
    activation_side: np.ndarray
    lanes: int
    additions: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class DigitSerial(PE):
    """Base of the digit-serial PEs.

    Attributes:
      lanes: multiplications side by side in a PE.
    """

    lanes: int = dataclasses.field(default=16, metadata={"static": True})

    lane_events: ClassVar[dict[str, float]] = {"int16_add": 1.0}  # per effectual addition
    cycle_events: ClassVar[dict[str, float]] = {"int8_shift": 1.0, "int32_add": 1.0}  # by each PE
    step_events: ClassVar[dict[str, float]] = {}  # by each PE, once a step
    lane_register_bits: ClassVar[float] = 0.0  # clocked by an effectual addition
    accumulator_clock: ClassVar[Literal["cycle", "step"]] = "cycle"  # when the PE's sum is written

    def __post_init__(self) -> None:
        """Checks the lanes."""
        check_numbers(type(self).__name__, lanes=self.lanes)

    @property
    def adders(self) -> float:
        """Digit additions that a PE can do in a cycle."""
        return self.lanes

    def steps(self, layer: Layer, work: Workload) -> Iterable[Steps]:
        """The rule: what each lane takes, for each of a layer's ``groups`` products."""
        raise NotImplementedError

    def reduction_steps(self, extents: Extents) -> Vector:
        """Groups of lanes along the reduction: ceil(K / lanes)."""
        return ceil_div(extents.K, self.lanes)

    def nominal_macs(self, budget: Real | None = None) -> Real:
        """All lanes in as many cycles as an 8-bit operand has bits."""
        return self.lanes / WEIGHT_BITS

    def area_um2(self, technology: Technology) -> Real:
        """Derived: the lanes' events as blocks, one accumulator, both operands' registers."""
        blocks: dict[str, float] = {}
        for name, n in (
            *((e, n * self.lanes) for e, n in self.lane_events.items()),
            *self.cycle_events.items(),
        ):
            blocks[name] = blocks.get(name, 0.0) + n
        operands = self.lanes * (ACTIVATION_BITS + WEIGHT_BITS)
        return composed_area(technology, blocks, operands + ACCUMULATOR_BITS)

    def activity(self, work: Workload) -> Activity:
        """Exact cycles from the operands' digits.

        Raises:
          ValueError: traced designs, budgets, or operands that the rule needs and lacks.
        """
        refuse_budgets(self, work)
        if namespace_of(work.folding.K) is not np:
            raise ValueError(f"{type(self).__name__} reads real digits and cannot be traced")
        for what in ("weights", "activations"):
            check_names(what, getattr(work, what) or {}, work.network)
        counted = np.array([self._count(layer, work) for layer in work.network], np.float64)
        cycles, additions, pe_cycles = counted.T
        folding = work.folding
        pe_steps = folding.groups * folding.reduction_steps * folding.P * folding.M
        events: dict[str, Vector] = {}
        for rates, count in (
            (self.lane_events, additions),
            (self.cycle_events, pe_cycles),
            (self.step_events, pe_steps),
        ):
            for name, rate in rates.items():
                events[name] = events.get(name, 0.0) + rate * count
        return Activity(
            cycles=cycles,
            busy=additions / self.adders,
            terms=additions,
            events=events,
            register_bits={"cycle": pe_cycles, "step": pe_steps}[self.accumulator_clock]
            * ACCUMULATOR_BITS
            + additions * self.lane_register_bits
            + operand_register_bits(
                folding,
                self.lanes,
                folding.macs * WEIGHT_BITS,
                self.lanes * WEIGHT_BITS,
            ),
            encoder=None,
            weight_bits=float(WEIGHT_BITS),
        )

    def _count(self, layer: Layer, work: Workload) -> tuple[int, float, int]:
        """Streaming cycles, effectual additions, and cycles that PEs work."""
        folding, cycles, additions, worked = work.folding, 0, 0.0, 0
        for steps in self.steps(layer, work):
            cycles += lockstep_cycles(
                steps.weight_side,
                steps.activation_side,
                dataflow=folding.dataflow,
                rows=int(folding.rows),
                cols=int(folding.cols),
                lanes=steps.lanes,
            )
            worked += own_cycles(steps.weight_side, steps.activation_side, steps.lanes)
            additions += steps.additions
        return cycles, additions, worked


def _magnitude_bits(values: np.ndarray) -> np.ndarray:
    """Bits of magnitudes, least significant last axis: values.shape + (8,)."""
    return (np.abs(values)[..., None] >> np.arange(WEIGHT_BITS)) & 1


def _ones(layer: Layer, operand: str, rows: int) -> np.ndarray:
    """The factor of an operand that does not matter to the cycles."""
    return np.ones((rows, layer.M if operand == "weights" else layer.P), np.uint8)


def _patches(layer: Layer, work: Workload, pe: DigitSerial) -> np.ndarray:
    activations = require("activations", work.activations, layer, pe)
    return layer_patches(layer, activations, ACTIVATION_BITS)


def _weights(layer: Layer, work: Workload, pe: DigitSerial) -> np.ndarray:
    weights = require("weights", work.weights, layer, pe)
    return layer_weights(layer, weights, WEIGHT_BITS)


def _precision(x: np.ndarray) -> int:
    """Bits of the integers, in two's complement where one is negative."""
    low, high = int(x.min()), int(x.max())
    magnitude = max(max(high, 0).bit_length(), max(-low - 1, 0).bit_length())
    return max(magnitude + (low < 0), 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Stripes(DigitSerial):
    """Activations bit by bit, weights in parallel: as many cycles as the layer's precision.

    Attributes:
      precisions: bits of each layer's activations by layer name, as its paper finds them by
        profiling. A layer left out has the precision of its largest activation if
        ``activations`` are given (two's complement where one is negative), else 8.

    Raises:
      ValueError: a precision is not a positive integer.
    """

    precisions: Mapping[str, int] | tuple[tuple[str, int], ...] = dataclasses.field(
        default=(), metadata={"static": True}
    )

    def __post_init__(self) -> None:
        """Checks the lanes and the precisions, which are kept as a hashable tuple."""
        super().__post_init__()
        precisions = dict(self.precisions)
        checked: dict[str, Any] = {f"precision of {n!r}": bits for n, bits in precisions.items()}
        check_numbers("Stripes", **checked)
        object.__setattr__(self, "precisions", tuple(sorted(precisions.items())))

    def activity(self, work: Workload) -> Activity:
        """As every digit-serial PE; a precision for no layer is an error as well."""
        check_names("precisions", dict(self.precisions), work.network)
        return super().activity(work)

    def steps(self, layer: Layer, work: Workload) -> Iterable[Steps]:
        """p cycles for every lane; a lane adds in each."""
        precision = lookup(dict(self.precisions), layer)
        if work.activations is not None:
            patches = _patches(layer, work, self)
            precision = precision or _precision(patches)
        precision = precision or ACTIVATION_BITS
        groups = int(ceil_div(layer.K, self.lanes))
        serial = np.full((groups, layer.M), precision, np.min_scalar_type(precision))
        steps = Steps(
            weight_side=serial,
            activation_side=_ones(layer, "activations", groups),
            lanes=1,
            additions=float(layer.K * layer.P * layer.M * precision),
        )
        return [steps] * layer.groups


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class BitPragmatic(DigitSerial):
    """An activation's essential bits one by one; a lane takes as many cycles as it has ones."""

    lane_events: ClassVar[dict[str, float]] = {"int8_shift": 1.0, "int16_add": 1.0}
    cycle_events: ClassVar[dict[str, float]] = {"int32_add": 1.0}

    def steps(self, layer: Layer, work: Workload) -> Iterable[Steps]:
        """Ones of each activation."""
        for patches in _patches(layer, work, self):
            ones = np.bitwise_count(np.abs(patches)).astype(np.uint8)
            yield Steps(
                weight_side=_ones(layer, "weights", layer.K),
                activation_side=ones,
                lanes=self.lanes,
                additions=float(ones.sum(dtype=np.int64) * layer.M),
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Laconic(DigitSerial):
    """Every pair of a weight's and an activation's Booth terms takes a cycle of its lane."""

    # Exponents, and a count into the histogram of exponents.
    lane_events: ClassVar[dict[str, float]] = {"int8_add": 2.0}
    cycle_events: ClassVar[dict[str, float]] = {"int32_add": 1.0}

    def nominal_macs(self, budget: Real | None = None) -> Real:
        """All lanes in 4 x 5 cycles: Booth digits of a signed weight and an unsigned activation."""
        return self.lanes / 20

    def steps(self, layer: Layer, work: Workload) -> Iterable[Steps]:
        """Products of the two operands' term counts."""
        counts = count_table("booth4", 1 + ACTIVATION_BITS).astype(np.uint8)
        zero = 1 << ACTIVATION_BITS  # where the table has the count of 0
        products = zip(_weights(layer, work, self), _patches(layer, work, self), strict=True)
        for weights, patches in products:
            w, a = counts[weights + zero], counts[patches + zero]
            pairs = w.sum(axis=1, dtype=np.int64) @ a.sum(axis=1, dtype=np.int64)
            yield Steps(weight_side=w, activation_side=a, lanes=self.lanes, additions=float(pairs))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Bitlet(DigitSerial):
    """Bit interleaving over 64 weights: each significance adds the activations of its ones.

    Eight accumulators, one a significance, work side by side, so the PE takes as many cycles as
    the significance with the most ones. Weights are sign and magnitude.
    """

    lanes: int = dataclasses.field(default=64, metadata={"static": True})
    cycle_events: ClassVar[dict[str, float]] = {}
    # The eight sums of a step are shifted to their significance and added up.
    step_events: ClassVar[dict[str, float]] = {"int8_shift": 8.0, "int32_add": 8.0}
    lane_register_bits: ClassVar[float] = 16.0
    accumulator_clock: ClassVar[Literal["cycle", "step"]] = "step"

    @property
    def adders(self) -> float:
        """One a significance."""
        return WEIGHT_BITS

    def nominal_macs(self, budget: Real | None = None) -> Real:
        """All weights in as many cycles, were every bit of one significance set."""
        return 1.0

    def area_um2(self, technology: Technology) -> Real:
        """Derived: eight accumulating adders, the final adder, 64 operands each way."""
        blocks = {"int16_add": 8.0, "int32_add": 1.0, "int8_shift": 8.0}
        operands = self.lanes * (ACTIVATION_BITS + WEIGHT_BITS)
        return composed_area(technology, blocks, operands + 8 * 16 + ACCUMULATOR_BITS)

    def steps(self, layer: Layer, work: Workload) -> Iterable[Steps]:
        """Largest count of ones over the significances of a group."""
        for weights in _weights(layer, work, self):
            bits = pad_rows(_magnitude_bits(weights), self.lanes)
            counts = bits.reshape(-1, self.lanes, layer.M, WEIGHT_BITS).sum(axis=1)
            busiest = counts.max(axis=-1)
            yield Steps(
                weight_side=busiest.astype(np.min_scalar_type(self.lanes)),
                activation_side=_ones(layer, "activations", len(busiest)),
                lanes=1,
                additions=float(counts.sum() * layer.P),
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class BitWave(DigitSerial):
    """Bit columns of a group of 8 weights, sign and magnitude; columns of zeros are skipped.

    The signs ride along; the seven magnitude columns take a cycle each unless all weights of the
    group have a zero there. All lanes add in each cycle, zeros within a column included.
    """

    lanes: int = dataclasses.field(default=8, metadata={"static": True})

    def nominal_macs(self, budget: Real | None = None) -> Real:
        """All lanes in seven magnitude columns."""
        return self.lanes / (WEIGHT_BITS - 1)

    def steps(self, layer: Layer, work: Workload) -> Iterable[Steps]:
        """Non-zero columns of each group."""
        for weights in _weights(layer, work, self):
            bits = pad_rows(_magnitude_bits(weights), self.lanes)
            columns = bits.reshape(-1, self.lanes, layer.M, WEIGHT_BITS).any(axis=1)
            cycles = columns.sum(axis=-1)
            yield Steps(
                weight_side=cycles.astype(np.uint8),
                activation_side=_ones(layer, "activations", len(cycles)),
                lanes=1,
                additions=float(cycles.sum() * self.lanes * layer.P),
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class BitVert(DigitSerial):
    """Bi-directional bit sparsity: a column adds its ones, or the sum less its zeros.

    Whichever are fewer, at most four in each sub-group of 8 weights (sec. IV-A), so adders for half
    of the lanes do a column in one cycle. ``pruned_columns`` of the eight are removed from every
    group before (binary pruning; the paper evaluates 2 and 4, at most 6), the same number
    everywhere, so that no PE waits; its sensitive channels, which keep all eight, are left out. The
    weights are taken as given: pruning is not applied to them.
    """

    pruned_columns: int = dataclasses.field(default=0, metadata={"static": True})

    def __post_init__(self) -> None:
        """Checks the lanes and the columns."""
        super().__post_init__()
        if self.pruned_columns not in range(WEIGHT_BITS - 1):
            raise ValueError(f"BitVert: pruned_columns must be 0 to 6, got {self.pruned_columns!r}")

    @property
    def adders(self) -> float:
        """Half of the lanes."""
        return self.lanes / 2

    @property
    def columns(self) -> int:
        """Columns left: the cycles of a step."""
        return WEIGHT_BITS - self.pruned_columns

    def nominal_macs(self, budget: Real | None = None) -> Real:
        """All lanes in the columns left."""
        return self.lanes / self.columns

    def area_um2(self, technology: Technology) -> Real:
        """Derived: adders for half of the lanes, accumulator, all operands."""
        blocks = {"int16_add": self.lanes / 2 + 1, "int32_add": 1.0, "int8_shift": 1.0}
        operands = self.lanes * (ACTIVATION_BITS + WEIGHT_BITS)
        return composed_area(technology, blocks, operands + ACCUMULATOR_BITS)

    def steps(self, layer: Layer, work: Workload) -> Iterable[Steps]:
        """One cycle a column; its rarer digit is added, half of the lanes if weights are unknown.

        The columns that stay are taken to be the most significant ones.
        """
        groups = int(ceil_div(layer.K, self.lanes))
        unknown = groups * layer.M * self.columns * self.lanes / 2
        per_position = [unknown] * layer.groups
        if work.weights is not None:
            per_position = [self._rarer_digits(w) for w in _weights(layer, work, self)]
        for additions in per_position:
            yield Steps(
                weight_side=_ones(layer, "weights", groups) * np.uint8(self.columns),
                activation_side=_ones(layer, "activations", groups),
                lanes=1,
                additions=additions * layer.P,
            )

    def _rarer_digits(self, weights: np.ndarray) -> float:
        """Ones or zeros, whichever are fewer, over the columns of all sub-groups of (K, M)."""
        size = min(_SUBGROUP, self.lanes)
        w = pad_rows(weights, size)
        kept = np.arange(self.pruned_columns, WEIGHT_BITS)
        bits = (w.reshape(-1, size, w.shape[1])[..., None] >> kept) & 1
        ones = bits.sum(axis=1)
        return float(np.minimum(ones, size - ones).sum())
