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

By gates, PEs of 8 lanes that take weights bit by bit were measured (``benchmarks/rtl/verilog``). A
PE that waits for a slower one is taken to cost nothing, and what turns weights into bits at the
array's edge is not counted: both favour these PEs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal, get_args

import jax
import numpy as np

from stp_jax.hwmodel import gates
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
    PE,
    Activity,
    Workload,
    composed_area,
    operand_register_bits,
    refuse_budgets,
    refuse_unmeasured,
)
from stp_jax.hwmodel.technology import Technology
from stp_jax.hwmodel.term_histogram import check_names, lookup
from stp_jax.hwmodel.widths import ACCUMULATOR_BITS, ACTIVATION_BITS
from stp_jax.terms import count_table

WEIGHT_BITS = 8
_SUBGROUP = 8  # of BitVert's lanes, sec. IV-A of its paper
_MEASURED_LANES = 8  # of the PEs in tables by gates

Serial = Literal["activations", "weights"]


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
    gate_name: ClassVar[str] = ""  # how its entries in tables by gates begin

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
        """Measured where the table has it; else derived: the lanes' events as blocks, registers."""
        blocks: dict[str, float] = {}
        for name, n in (
            *((e, n * self.lanes) for e, n in self.lane_events.items()),
            *self.cycle_events.items(),
        ):
            blocks[name] = blocks.get(name, 0.0) + n
        operands = self.lanes * (ACTIVATION_BITS + WEIGHT_BITS)
        measured = f"{self.gate_name}_pe" if self.is_measured else ""
        return composed_area(technology, blocks, operands + ACCUMULATOR_BITS, measured)

    @property
    def is_measured(self) -> bool:
        """Whether the netlist of a PE like this one was measured, see ``measured``."""
        return bool(self.gate_name) and self.lanes == _MEASURED_LANES

    def gate_events(self, layer: Layer, work: Workload) -> Iterable[dict[str, float]]:
        """Events by gates for one output pixel, for each of a layer's ``groups`` products.

        Those named ``bit`` are still to be multiplied with the mean bits of an activation.
        """
        raise NotImplementedError

    def activity(self, work: Workload) -> Activity:
        """Exact cycles from the operands' digits.

        Raises:
          ValueError: traced designs, budgets, operands that the rule needs and lacks, or a
            technology by gates that has no PE like this one.
        """
        refuse_budgets(self, work)
        if namespace_of(work.folding.K) is not np:
            raise ValueError(f"{type(self).__name__} reads real digits and cannot be traced")
        if work.basis == "gates" and not (self.is_measured and work.folding.dataflow == "is"):
            refuse_unmeasured(self, work.folding.dataflow)
        for what in ("weights", "activations"):
            check_names(what, getattr(work, what) or {}, work.network)
        counted = np.array([self._count(layer, work) for layer in work.network], np.float64)
        cycles, additions, pe_cycles = counted.T
        folding, bits = work.folding, work.register_bits.weights_or(WEIGHT_BITS)
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
            register_bits={
                **operand_register_bits(
                    work,
                    lanes=self.lanes,
                    weight_stream=folding.macs * bits,
                    weight_resident=self.lanes * bits,
                    sums={"cycle": pe_cycles, "step": pe_steps}[self.accumulator_clock],
                ),
                "lane_sums": additions * self.lane_register_bits,
            },
            encoder=None,
            weight_bits=float(WEIGHT_BITS),
            gates=self._all_gate_events(work) if work.basis == "gates" else None,
        )

    def _all_gate_events(self, work: Workload) -> dict[str, Vector]:
        """Events of a table by gates, real vectors over layers."""
        totals: dict[str, list[float]] = {}
        bits = gates.stored_bits(work.network, work.activations)
        for layer, mean in zip(work.network, bits, strict=True):
            products = list(self.gate_events(layer, work))
            for event in products[0]:
                each = float(sum(events[event] for events in products)) * layer.P
                each *= float(mean) if event == "bit" else 1.0
                totals.setdefault(f"{self.gate_name}_{event}", []).append(each)
        counted = {name: np.array(counts) for name, counts in totals.items()}
        return {**counted, **gates.bus_events(work.folding, self.gate_name)}

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


def _count_ones(values: np.ndarray) -> np.ndarray:
    """Ones of magnitudes, uint8."""
    return np.bitwise_count(np.abs(values)).astype(np.uint8)


def _check_serial(pe: Stripes | BitPragmatic) -> None:
    if pe.serial not in get_args(Serial):
        raise ValueError(
            f"{type(pe).__name__}: serial must be one of {get_args(Serial)}, got {pe.serial!r}"
        )


def _ones(layer: Layer, operand: str, rows: int) -> np.ndarray:
    """The factor of an operand that does not matter to the cycles."""
    return np.ones((rows, layer.M if operand == "weights" else layer.P), np.uint8)


def _patches(layer: Layer, work: Workload, pe: DigitSerial) -> np.ndarray:
    activations = require("activations", work.activations, layer, pe)
    return layer_patches(layer, activations, ACTIVATION_BITS)


def _weights(layer: Layer, work: Workload, pe: DigitSerial) -> np.ndarray:
    weights = require("weights", work.weights, layer, pe)
    return layer_weights(layer, weights, WEIGHT_BITS)


def _column_changes(weights: np.ndarray, lanes: int, precision: int) -> np.ndarray:
    """Bits that differ from the cycle before, where columns come with the sign first.

    Args:
      weights: (K, M), in two's complement; filters follow each other.
      lanes: of a group along K.
      precision: columns of a weight.

    Returns:
      bool (groups, lanes, M * precision).
    """
    columns = np.arange(precision, dtype=np.int16)[::-1]
    bits = (weights.astype(np.int16)[..., None] >> columns) & 1 == 1
    changed = pad_rows(bits.reshape(len(weights), -1), lanes)
    changed[:, 1:] ^= changed[:, :-1].copy()
    return changed.reshape(-1, lanes, changed.shape[1])


def _precision(x: np.ndarray) -> int:
    """Bits of the integers, in two's complement where one is negative."""
    low, high = int(x.min()), int(x.max())
    magnitude = max(max(high, 0).bit_length(), max(-low - 1, 0).bit_length())
    return max(magnitude + (low < 0), 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Stripes(DigitSerial):
    """One operand bit by bit, the other in parallel: as many cycles as the layer's precision.

    Attributes:
      serial: the operand that comes bit by bit: ``activations``, as in the paper, or ``weights``,
        as where inputs are resident.
      precisions: bits of each layer's serial operand by layer name, as its paper finds them by
        profiling. A layer left out has the precision of the largest value if ``activations`` or
        ``weights`` are given (two's complement where one is negative), else 8.

    Raises:
      ValueError: a precision is not a positive integer, or the serial operand is neither.
    """

    gate_name: ClassVar[str] = "stripes"
    measured: ClassVar[str] = "lanes=8 and serial='weights'"

    serial: Serial = dataclasses.field(default="activations", metadata={"static": True})
    precisions: Mapping[str, int] | tuple[tuple[str, int], ...] = dataclasses.field(
        default=(), metadata={"static": True}
    )

    def __post_init__(self) -> None:
        """Checks the lanes and the precisions, which are kept as a hashable tuple."""
        super().__post_init__()
        _check_serial(self)
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
        precision = self._precision_of(layer, work)
        groups = int(ceil_div(layer.K, self.lanes))
        serial = np.full((groups, layer.M), precision, np.min_scalar_type(precision))
        steps = Steps(
            weight_side=serial,
            activation_side=_ones(layer, "activations", groups),
            lanes=1,
            additions=float(layer.K * layer.P * layer.M * precision),
        )
        return [steps] * layer.groups

    @property
    def is_measured(self) -> bool:
        """With serial weights."""
        return super().is_measured and self.serial == "weights"

    def gate_events(self, layer: Layer, work: Workload) -> Iterable[dict[str, float]]:
        """Groups, their cycles, and bits of weights that change, with those of activations."""
        precision = self._precision_of(layer, work)
        for weights in _weights(layer, work, self):
            changed = _column_changes(weights, self.lanes, precision)
            groups = float(len(changed) * layer.M)
            yield {"group": groups, "cycle": groups * precision, "bit": float(changed.sum())}

    def _precision_of(self, layer: Layer, work: Workload) -> int:
        """Bits of the serial operand, which is checked wherever it is given."""
        by_weights = self.serial == "weights"
        found = None
        if (work.weights if by_weights else work.activations) is not None:
            found = _precision((_weights if by_weights else _patches)(layer, work, self))
        return lookup(dict(self.precisions), layer) or found or ACTIVATION_BITS


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class BitPragmatic(DigitSerial):
    """A value's essential bits one by one; a lane takes as many cycles as it has ones.

    Attributes:
      serial: the operand whose bits are taken: ``activations``, as in the paper, or ``weights``, as
        where inputs are resident.

    Raises:
      ValueError: the serial operand is neither.
    """

    gate_name: ClassVar[str] = "pragmatic"
    measured: ClassVar[str] = "lanes=8 and serial='weights'"

    serial: Serial = dataclasses.field(default="activations", metadata={"static": True})

    lane_events: ClassVar[dict[str, float]] = {"int8_shift": 1.0, "int16_add": 1.0}
    cycle_events: ClassVar[dict[str, float]] = {"int32_add": 1.0}

    def __post_init__(self) -> None:
        """Checks the lanes and the serial operand."""
        super().__post_init__()
        _check_serial(self)

    def steps(self, layer: Layer, work: Workload) -> Iterable[Steps]:
        """Ones of each value of the serial operand."""
        by_weights = self.serial == "weights"
        for values in (_weights if by_weights else _patches)(layer, work, self):
            ones = _count_ones(values)
            other = _ones(layer, "activations" if by_weights else "weights", layer.K)
            yield Steps(
                weight_side=ones if by_weights else other,
                activation_side=other if by_weights else ones,
                lanes=self.lanes,
                additions=float(ones.sum(dtype=np.int64) * other.shape[1]),
            )

    @property
    def is_measured(self) -> bool:
        """With serial weights."""
        return super().is_measured and self.serial == "weights"

    def gate_events(self, layer: Layer, work: Workload) -> Iterable[dict[str, float]]:
        """Groups, their cycles, and terms, with the bits of their activations."""
        for weights in _weights(layer, work, self):
            ones = _count_ones(weights)
            slowest = pad_rows(ones, self.lanes).reshape(-1, self.lanes, layer.M).max(axis=1)
            terms = float(ones.sum(dtype=np.int64))
            cycles = float(np.maximum(slowest, 1).sum(dtype=np.int64))
            yield {"group": float(slowest.size), "cycle": cycles, "term": terms, "bit": terms}


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

    gate_name: ClassVar[str] = "bitwave"
    measured: ClassVar[str] = "lanes=8"

    lanes: int = dataclasses.field(default=8, metadata={"static": True})

    def nominal_macs(self, budget: Real | None = None) -> Real:
        """All lanes in seven magnitude columns."""
        return self.lanes / (WEIGHT_BITS - 1)

    def _columns(self, weights: np.ndarray) -> np.ndarray:
        """Columns of each group that are not zero: (K, M) -> (groups, M)."""
        bits = pad_rows(_magnitude_bits(weights), self.lanes)
        grouped = bits.reshape(-1, self.lanes, *bits.shape[1:])
        return grouped.any(axis=1).sum(axis=-1)

    def gate_events(self, layer: Layer, work: Workload) -> Iterable[dict[str, float]]:
        """Groups, their cycles, and in each of these all activations with their bits."""
        for weights in _weights(layer, work, self):
            cycles = np.maximum(self._columns(weights), 1).sum(axis=1)
            used = np.minimum(layer.K - self.lanes * np.arange(len(cycles)), self.lanes)
            yield {
                "group": float(len(cycles) * layer.M),
                "cycle": float(cycles.sum()),
                "bit": float((cycles * used).sum()),
            }

    def steps(self, layer: Layer, work: Workload) -> Iterable[Steps]:
        """Non-zero columns of each group."""
        for weights in _weights(layer, work, self):
            cycles = self._columns(weights)
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

    gate_name: ClassVar[str] = "bitvert"
    measured: ClassVar[str] = "lanes=8 and pruned_columns=0"

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
        """Measured, or derived: adders for half of the lanes, accumulator, all operands."""
        blocks = {"int16_add": self.lanes / 2 + 1, "int32_add": 1.0, "int8_shift": 1.0}
        operands = self.lanes * (ACTIVATION_BITS + WEIGHT_BITS)
        measured = f"{self.gate_name}_pe" if self.is_measured else ""
        return composed_area(technology, blocks, operands + ACCUMULATOR_BITS, measured)

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

    @property
    def is_measured(self) -> bool:
        """With all columns."""
        return super().is_measured and not self.pruned_columns

    def gate_events(self, layer: Layer, work: Workload) -> Iterable[dict[str, float]]:
        """Groups, their columns unlike the one before, and bits that change, as in `Stripes`."""
        for weights in _weights(layer, work, self):
            changed = _column_changes(weights, self.lanes, WEIGHT_BITS)
            yield {
                "group": float(len(changed) * layer.M),
                "changed_column": float(changed.any(axis=1).sum()),
                "bit": float(changed.sum()),
            }

    def _rarer_digits(self, weights: np.ndarray) -> float:
        """Ones or zeros, whichever are fewer, over the columns of all sub-groups of (K, M)."""
        size = min(_SUBGROUP, self.lanes)
        w = pad_rows(weights, size)
        kept = np.arange(self.pruned_columns, WEIGHT_BITS)
        bits = (w.reshape(-1, size, w.shape[1])[..., None] >> kept) & 1
        ones = bits.sum(axis=1)
        return float(np.minimum(ones, size - ones).sum())
