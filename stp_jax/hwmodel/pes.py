"""The PE interface, and the bit-parallel baseline."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, NoReturn

import jax
import numpy as np

from stp_jax.hwmodel import gates
from stp_jax.hwmodel.folding import Extents, Folding
from stp_jax.hwmodel.network import Layer, Network
from stp_jax.hwmodel.numbers import (
    Budgets,
    Operands,
    Real,
    Vector,
    ceil_div,
    check_numbers,
    namespace_of,
)
from stp_jax.hwmodel.operands import changed_bits, layer_weights, require
from stp_jax.hwmodel.technology import Basis, MissingEntryError, Technology
from stp_jax.hwmodel.term_histogram import GroupTerms, check_names
from stp_jax.hwmodel.widths import ACCUMULATOR_BITS, ACTIVATION_BITS, Widths


@dataclasses.dataclass(frozen=True, kw_only=True)
class Activity:
    """Cycles and events of an array's PEs in each layer: real vectors over layers.

    All products of a layer together.
    """

    cycles: Vector  # streaming cycles of all folds, without fill and drain
    busy: Vector  # PE-cycles in which a PE holds work
    terms: Vector  # terms added, or multiplications done
    events: dict[str, Vector]  # arithmetic, by entry of the technology's energy table
    register_bits: dict[str, Vector]  # register bits clocked, by operand
    encoder: str | None  # entry of the energy table, once per weight read; None: none needed
    weight_bits: Real  # bits of one stored weight
    encoded_share: Real = 1.0  # share of a layer's weight reads that pass the encoder
    selections: Vector | None = None  # two-input multiplexers that select operands, as they switch
    budgets: Vector | None = None  # k of each layer, for PEs that have budgets
    gates: dict[str, Vector] | None = None  # events of a table by gates; None: not measured
    edge: dict[str, Vector] | None = None  # likewise of a row's edge, for each group that enters


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """A network folded onto an array, with its operands; the other fields are `evaluate`'s.

    The folding's vectors are NumPy's, or JAX's where the evaluation is traced.
    """

    network: Network
    folding: Folding
    budgets: Budgets = None
    weights: Operands | GroupTerms | None = None
    activations: Operands | None = None
    smoothing: float = 0.0
    register_bits: Widths = dataclasses.field(default_factory=Widths)  # the array's
    basis: Basis = "table"  # of the technology; `Activity.gates` is read where it is ``gates``


def operand_register_bits(
    work: Workload,
    *,
    lanes: Real,
    weight_stream: Vector,
    weight_resident: Real,
    sums: Vector,
) -> dict[str, Vector]:
    """Register bits by operand: forwarded from PE to PE, or loaded to stay; and partial sums.

    A fold loads what stays in R cycles, in each of which all registers of all R rows shift down by
    one row, as in ``rtl/gpe.v``: R * R * C registers are clocked, ragged rows and columns included.

    Args:
      work: with the folding onto the array, and the widths of its registers.
      lanes: activations that a PE takes at once.
      weight_stream: weight bits over all PEs where weights move through the array.
      weight_resident: weight bits that stay in a PE where weights are resident.
      sums: partial sums that are written.
    """
    folding, widths = work.folding, work.register_bits
    loads = folding.folds * folding.rows * folding.rows * folding.cols
    activation_stream, loaded = folding.macs * widths.inputs, loads * lanes * widths.inputs
    inputs, weights = {
        "is": (loaded, weight_stream),
        "ws": (activation_stream, loads * weight_resident),
        "os": (activation_stream, weight_stream),
    }[folding.dataflow]
    return {"inputs": inputs, "weights": weights, "partial_sums": sums * widths.partial_sums}


class PE:
    """A kind of processing element: how it groups the reduction, its cycles and its events.

    `evaluate` asks a copy whose numbers are arrays: reals, or integers in fields of metadata
    ``stp_jax.hwmodel.numbers.INTEGER``; static fields are as they were.

    Attributes:
      measured: fields of the PEs whose netlists were measured for tables by gates; empty: of none.
    """

    measured: ClassVar[str] = ""

    def reduction_steps(self, extents: Extents) -> Vector:
        """Steps along each layer's reduction, integers of shape (layers,)."""
        raise NotImplementedError

    def activity(self, work: Workload) -> Activity:
        """Cycles and events of every layer; raises ValueError where operands are missing."""
        raise NotImplementedError

    def nominal_macs(self, budget: Real | None = None) -> Real:
        """Multiply-accumulates a cycle at full 8-bit precision, or at a budget of terms a group."""
        raise NotImplementedError

    def area_um2(self, technology: Technology) -> Real:
        """Area of one PE."""
        raise NotImplementedError


def measured_pes() -> str:
    """Kinds of PEs whose netlists were measured, for messages."""

    def kinds(base: type[PE]) -> list[type[PE]]:
        return [kind for sub in base.__subclasses__() for kind in (sub, *kinds(sub))]

    return ", ".join(k.__name__ for k in kinds(PE) if vars(k).get("measured"))


def refuse_unmeasured(pe: PE, dataflow: str) -> NoReturn:
    """Raises MissingEntryError that says which PEs tables by gates are about."""
    kind = type(pe)
    known = f"{kind.__name__} with {kind.measured}" if kind.measured else measured_pes()
    raise MissingEntryError(
        f"energies and areas by gates are those of netlists of {known}, inputs resident; there are "
        f"none of {pe!r} in dataflow {dataflow!r}"
    )


def refuse_budgets(pe: PE, work: Workload) -> None:
    """Raises ValueError if budgets are given to a PE without them."""
    if work.budgets is not None:
        raise ValueError(f"{type(pe).__name__} has no budgets; leave budgets=None")


def composed_area(
    technology: Technology, blocks: Mapping[str, float], register_bits: float, measured: str = ""
) -> Real:
    """Area of a datapath in µm²: ``measured`` where the table has this entry, else from its blocks.

    Derived is the sum of the blocks' and registers' areas, times what synthesis adds to such a sum
    for the bit-parallel PE (multiplier, int32 adder, two operand registers, accumulator): selection
    and control. Dispatchers and schedulers outside the PE are left out, which favours the PE.
    """
    if measured in technology.area_um2:
        return technology.area_um2[measured]
    baseline = {"int8_multiply": 1.0, "int32_add": 1.0}
    technology.require({*blocks, *baseline, "register_bit", "bit_parallel_pe"}, kind="area_um2")
    area = technology.area_um2

    def total(blocks: Mapping[str, float], bits: float) -> Real:
        return sum(n * area[name] for name, n in blocks.items()) + bits * area["register_bit"]

    overhead = area["bit_parallel_pe"] / total(baseline, 2 * ACTIVATION_BITS + ACCUMULATOR_BITS)
    return overhead * total(blocks, register_bits)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class BitParallel(PE):
    """An integer multiply-accumulate a cycle: one multiply of ``bits`` and one int32 add."""

    measured: ClassVar[str] = "bits=8"

    bits: int = dataclasses.field(default=8, metadata={"static": True})

    def __post_init__(self) -> None:
        """Checks the width."""
        check_numbers("BitParallel", bits=self.bits)

    def reduction_steps(self, extents: Extents) -> Vector:
        """One reduction element a PE: K."""
        return extents.K

    def nominal_macs(self, budget: Real | None = None) -> Real:
        """One."""
        return 1.0

    def area_um2(self, technology: Technology) -> Real:
        """Area of one multiply-accumulate PE; of other widths than int8 from its blocks."""
        if self.bits == 8:
            technology.require(["bit_parallel_pe"], kind="area_um2")
            return technology.area_um2["bit_parallel_pe"]
        if technology.basis == "gates":
            refuse_unmeasured(self, "is")
        blocks = {f"int{self.bits}_multiply": 1.0, "int32_add": 1.0}
        return composed_area(technology, blocks, 2 * self.bits + ACCUMULATOR_BITS)

    def activity(self, work: Workload) -> Activity:
        """Every multiply-accumulate is done, zeros included; operand and sum are registered."""
        refuse_budgets(self, work)
        folding = work.folding
        macs, bits = folding.macs, work.register_bits.weights_or(self.bits)
        return Activity(
            cycles=folding.folds * folding.steps,
            busy=macs,
            terms=macs,
            events={f"int{self.bits}_multiply": macs, "int32_add": macs},
            register_bits=operand_register_bits(
                work,
                lanes=1.0,
                weight_stream=macs * bits,
                weight_resident=bits,
                sums=macs,
            ),
            encoder=None,
            weight_bits=float(self.bits),
            gates=gates.mac_events(folding, gates.mean_bits(work.network, work.activations))
            if self.bits == gates.BITS and folding.dataflow == "is"
            else None,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class DotProduct(PE):
    """A dot product a cycle: ``lanes`` multiplications, whose sum joins the partial sum.

    By the table it takes ``lanes`` multiplies, as many int16 additions less one in its tree, and
    one int32 addition a step. By gates it is the int8 PE of least energy among those measured with
    one column (``benchmarks/rtl/verilog/mac_dot.v``): one carry-save tree adds all rows of all
    products. With one lane that is a single product, with 28 bits of partial sum where
    `BitParallel` has 32.

    Weights of fewer bits meet activations of eight, as in a network of int4 weights. Their
    multiplication has an entry of its own, such as ``int8_by_int4_multiply``, which the tables of
    arithmetic here lack. By gates they were measured, and their energy depends on how many bits
    change from one filter to the next, so they need ``weights=``.

    Attributes:
      lanes: multiplications a cycle.
      weight_bits: of a weight, from 2 to 8.

    Raises:
      ValueError: lanes is not a positive integer, or weight_bits not from 2 to 8.
    """

    measured: ClassVar[str] = "lanes=1 or lanes=8, and with lanes=8 weight_bits=4, 3 or 2"

    lanes: int = dataclasses.field(default=8, metadata={"static": True})
    weight_bits: int = dataclasses.field(default=8, metadata={"static": True})

    def __post_init__(self) -> None:
        """Checks the lanes and the width."""
        check_numbers("DotProduct", lanes=self.lanes, weight_bits=self.weight_bits)
        if not 2 <= self.weight_bits <= gates.BITS:
            raise ValueError(
                f"DotProduct.weight_bits must be from 2 to {gates.BITS}, got {self.weight_bits}"
            )

    @property
    def _multiply(self) -> str:
        """The entry of one multiplication."""
        narrow = f"_by_int{self.weight_bits}" if self.weight_bits != gates.BITS else ""
        return f"int{gates.BITS}{narrow}_multiply"

    def reduction_steps(self, extents: Extents) -> Vector:
        """Steps of ``lanes`` elements: ceil(K / lanes)."""
        return ceil_div(extents.K, self.lanes)

    def nominal_macs(self, budget: Real | None = None) -> Real:
        """One a lane."""
        return float(self.lanes)

    def area_um2(self, technology: Technology) -> Real:
        """Measured where the table has it; else derived: multipliers, adder tree, operands."""
        blocks = {self._multiply: float(self.lanes), "int32_add": 1.0}
        if self.lanes > 1:
            blocks["int16_add"] = self.lanes - 1.0
        registers = (ACTIVATION_BITS + self.weight_bits) * self.lanes + ACCUMULATOR_BITS
        measured = f"{gates.dot_name(self.lanes, self.weight_bits)}_pe"
        return composed_area(technology, blocks, registers, measured)

    def activity(self, work: Workload) -> Activity:
        """A step a cycle; a ragged last one takes its cycle, and multiplies what it has."""
        refuse_budgets(self, work)
        folding = work.folding
        macs, bits = folding.macs, work.register_bits.weights_or(self.weight_bits)
        steps = folding.groups * folding.reduction_steps * folding.P * folding.M
        tree = {"int16_add": macs - steps} if self.lanes > 1 else {}
        return Activity(
            cycles=folding.folds * folding.steps,
            busy=macs / self.lanes,
            terms=macs,
            events={self._multiply: macs, **tree, "int32_add": steps},
            register_bits=operand_register_bits(
                work,
                lanes=self.lanes,
                weight_stream=macs * bits,
                weight_resident=self.lanes * bits,
                sums=steps,
            ),
            encoder=None,
            weight_bits=float(self.weight_bits),
            gates=gates.dot_events(
                folding,
                gates.dot_name(self.lanes, self.weight_bits),
                steps,
                self._multiplying(work),
                gates.mean_bits(work.network, work.activations),
            )
            if work.basis == "gates" and self._is_measured and folding.dataflow == "is"
            else None,
        )

    @property
    def _is_measured(self) -> bool:
        """Whether the netlist of a PE like this one was measured."""
        if self.weight_bits == gates.BITS:
            return self.lanes in gates.DOT_LANES
        return self.lanes == max(gates.DOT_LANES) and self.weight_bits in gates.NARROW_WEIGHTS

    def _multiplying(self, work: Workload) -> Vector:
        """What each bit of an activation meets: all weights, or of narrow ones the changed bits.

        Raises:
          ValueError: weights are narrow, and not given or traced.
        """
        if self.weight_bits == gates.BITS:
            return work.folding.macs
        if namespace_of(work.folding.K) is not np:
            raise ValueError(
                f"{self!r} reads real digits by gates and cannot be traced; weight_bits=8 can"
            )
        given = work.weights if isinstance(work.weights, Mapping) else {}
        check_names("weights", given, work.network)

        def count(layer: Layer) -> float:
            weights = require("weights", given, layer, self)
            products = layer_weights(layer, weights, self.weight_bits)
            if products.max(initial=0) >= 1 << (self.weight_bits - 1):
                raise ValueError(
                    f"{layer.name}: weight {products.max()} exceeds int{self.weight_bits}"
                )
            changed = sum(int(changed_bits(w, self.weight_bits).sum()) for w in products)
            return float(changed) * layer.P

        return np.array([count(layer) for layer in work.network])
