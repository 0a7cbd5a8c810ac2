"""PEs whose cycles a budget of terms fixes in advance: no lane waits for a slower one.

`GroupPE` is the group processing element of structured term pruning (Huang et al., IEEE TCAD
42(1), 2023): it holds g activations, and each cycle one weight term (sign, exponent, index in the
group) selects one, shifts it and adds it. `TermMac` is the tMAC of term revealing (Kung, McDanel
and Zhang, SC20).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import numpy as np

from stp_jax import terms
from stp_jax.hwmodel import gates
from stp_jax.hwmodel.folding import Extents, Folding
from stp_jax.hwmodel.layer_budgets import LayerBudgets, resolve_budgets
from stp_jax.hwmodel.network import Network
from stp_jax.hwmodel.numbers import (
    INTEGER,
    Real,
    Vector,
    as_real,
    check_numbers,
    namespace_of,
)
from stp_jax.hwmodel.pes import (
    PE,
    Activity,
    Workload,
    composed_area,
    operand_register_bits,
    refuse_unmeasured,
)
from stp_jax.hwmodel.smoothing import smooth_maximum, smooth_minimum
from stp_jax.hwmodel.technology import Technology
from stp_jax.hwmodel.term_histogram import (
    Grouping,
    GroupTerms,
    TermGroups,
    measure_terms,
)
from stp_jax.hwmodel.widths import ACCUMULATOR_BITS, ACTIVATION_BITS
from stp_jax.terms.groups import ragged_size
from stp_jax.terms.slots import SlotFormat, slot_format


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupPE(PE):
    """The group processing element: k cycles for ``group_size`` multiplications.

    Each group of ``group_size`` weights along the reduction holds at most k terms; a step takes k
    cycles whatever the weights, so there is no slowest lane. A slot without a term idles: it costs
    a cycle but switches neither shifter nor adder. n > 0 terms cost n shifts and n int32 adds: the
    first term is loaded rather than added, the last add joins the sum from the row above. Where
    the weights are not known, groups hold k terms, or all that the weights of a ragged one can.

    Inputs resident, filters stream one after the other, so that each may have a budget of its own:
    a fold takes the sum of its filters' k. Other dataflows hold filters side by side, which would
    wait for the largest; they take budgets by layer only.

    With ``lanes`` L above 1 the PE takes L terms a cycle, and a step ceil(k / L) cycles, or passes
    (``rtl/gpe_lanes.v``): what a group's last pass leaves free, no other group fills. Events are
    those of the terms as before.

    Attributes:
      group_size: g, resident activations.
      encoding: of the weights' terms, one of ``stp_jax.terms.ENCODINGS``.
      bits: width of the integer weights.
      grouping: ``flat`` cuts the reduction (row, column, channel) into groups whatever the channel
        count, ceil(K/g) groups; ``channels`` starts anew at each kernel position. They are the
        same where g divides the channels, and for depthwise convolutions, grouped over the window.
      packed: weights are stored as k slots a group (`stp_jax.terms.slots`); otherwise as integers
        that encoders at the array's edge turn into terms, as always for the products of two
        activations (``matmul`` layers whose weights are not given).
      lanes: L, terms a cycle.

    Raises:
      ValueError: group_size, bits or lanes not a positive integer, unknown encoding or grouping.
    """

    measured: ClassVar[str] = "group_size=8 and bits=8, or with lanes=2 or lanes=4 bits=4"

    group_size: Real = dataclasses.field(default=8, metadata=INTEGER)
    encoding: terms.Encoding = dataclasses.field(default="naf", metadata={"static": True})
    bits: int = dataclasses.field(default=8, metadata={"static": True})
    grouping: Grouping = dataclasses.field(default="flat", metadata={"static": True})
    packed: bool = dataclasses.field(default=False, metadata={"static": True})
    lanes: int = dataclasses.field(default=1, metadata={"static": True})

    def __post_init__(self) -> None:
        """Checks encoding, grouping and, where they are concrete, the numbers."""
        check_numbers("GroupPE", group_size=self.group_size, bits=self.bits, lanes=self.lanes)
        _ = self.term_groups  # which checks the others

    @property
    def term_groups(self) -> TermGroups:
        """The groups that share a budget, and how their terms are counted."""
        return TermGroups(
            group_size=self.group_size,
            grouping=self.grouping,
            encoding=self.encoding,
            bits=self.bits,
        )

    @property
    def max_budget(self) -> Real:
        """The most terms that a group of any integers needs: g times the encoding's maximum."""
        return self.group_size * terms.max_terms(self.encoding, self.bits)

    def reduction_steps(self, extents: Extents) -> Vector:
        """Groups along the reduction."""
        return self.term_groups.along_reduction(extents)

    def nominal_macs(self, budget: Real | None = None) -> Real:
        """g multiplications in ceil(k / L) cycles."""
        return self.group_size / self._passes(self.max_budget if budget is None else budget)

    def _passes(self, budgets: Real, smoothing: float = 0.0) -> Real:
        """Cycles of a group with these budgets; relaxed ones are not rounded up."""
        if self.lanes == 1:
            return budgets
        passes = budgets / self.lanes
        return passes if smoothing > 0.0 else namespace_of(budgets).ceil(passes)

    def area_um2(self, technology: Technology) -> Real:
        """Area of one PE: its netlist's by gates, else derived from activations and lanes.

        Interpolated linearly in g through the synthesised points: one term lane with a single
        resident activation, and the PE with 8. PEs of several lanes are interpolated linearly in
        L between 2 and 8 lanes, both with 8 activations; others cost what they do with one lane.
        All of these are for weights of 8 bits, and narrower ones are taken to need as much.
        """
        if technology.basis == "gates":
            if not self._is_measured_size():
                refuse_unmeasured(self, "is")
            entry, _ = gates.group_area_names(self.lanes, self.bits)
            technology.require([entry], kind="area_um2")
            return technology.area_um2[entry]
        technology.require(["term_lane", "group_pe_8"], kind="area_um2")
        lane, eight = (technology.area_um2[name] for name in ("term_lane", "group_pe_8"))
        activation = (eight - lane) / 7
        if self.lanes == 1:
            return lane + activation * (self.group_size - 1)
        names = ["group_pe_8_of_2_lanes", "group_pe_8_of_8_lanes"]
        technology.require(names, kind="area_um2")
        two, full = (technology.area_um2[name] for name in names)
        return two + (full - two) / 6 * (self.lanes - 2) + activation * (self.group_size - 8)

    def slot_format(self, budgets: Real) -> SlotFormat:
        """The slots of groups with these budgets, in real numbers: stored, and on the wires."""
        xp = namespace_of(self.group_size, budgets)
        return slot_format(as_real(self.group_size, xp), as_real(budgets, xp), self.bits)

    def activity(self, work: Workload) -> Activity:
        """A step takes k cycles; the events are those of the terms that the weights hold."""
        folding, network = work.folding, work.network
        xp = namespace_of(folding.K)
        statistics = work.weights
        if not isinstance(statistics, GroupTerms):
            statistics = measure_terms(network, statistics, self)
        statistics.check(self.term_groups, network)
        budgets = self._resolve_budgets(work, statistics)
        k = budgets.k
        if isinstance(k, np.ndarray):
            largest = statistics.largest_of(budgets.counts)
            _check_budgets(network, self, budgets, largest, relaxed=work.smoothing > 0.0)
        known = xp.asarray(statistics.measured)
        # By entry, that is by layer or by filter, until they are summed.
        groups = budgets.share(folding.groups * folding.reduction_steps * folding.M)

        def held(caps: Vector) -> Vector:
            """Terms of each layer's groups, none counted beyond its entry's cap."""
            measured = budgets.total(statistics.within(caps, budgets.counts, work.smoothing)[0])
            capped = dataclasses.replace(budgets, k=caps)
            return xp.where(known, measured, self._full_terms(capped, folding, work.smoothing))

        _, empty = statistics.within(k, budgets.counts, work.smoothing)
        added = held(k) * folding.P
        unused = budgets.total(xp.where(k > 0.0, 0.0, groups))
        empty = xp.where(known, budgets.total(empty), unused)
        passes = budgets.spread(folding.P)
        group_size = as_real(self.group_size, xp)
        slot = self.slot_format(k)
        wire_bits = work.register_bits.weights_or(slot.wire_bits)
        weight_bits: Real = float(self.bits)
        # Nothing packs the second operand of a product of activations, which is computed at run
        # time; weights that are given for such a layer are known beforehand.
        kinds = np.array([layer.kind for layer in network])
        packed = self.packed & ~((kinds == "matmul") & ~statistics.measured)
        if packed.any():
            words = folding.groups * folding.K * folding.M
            weight_bits = xp.where(
                xp.asarray(packed),
                budgets.total(groups * k * slot.stored_bits) / words,
                weight_bits,
            )
        steps = budgets.share(folding.folds * folding.steps)
        cycles = xp.asarray(smooth_maximum(self._passes(k, work.smoothing), 1.0, work.smoothing))
        # With one lane the accumulator is clocked for each term, with several the partial sum for
        # each pass.
        accumulated = added + empty * folding.P
        if self.lanes > 1:
            accumulated = budgets.total(groups * cycles * passes)
        measured = self._is_measured_size() and work.folding.dataflow == "is"
        return Activity(
            cycles=budgets.total(steps * cycles),
            busy=budgets.total(groups * k * passes) / self.lanes,
            terms=added,
            events={"int8_shift": added, "int32_add": added},
            register_bits=operand_register_bits(
                work,
                lanes=group_size,
                weight_stream=budgets.total(groups * k * wire_bits * passes),
                weight_resident=budgets.mean(k * wire_bits),
                sums=accumulated,
            ),
            encoder=None if packed.all() else terms.ENCODINGS[self.encoding].encoder,
            encoded_share=as_real(~packed, xp),
            weight_bits=weight_bits,
            # Two-input multiplexers that select one of g activations; an estimate of the wiring.
            selections=added * (ACTIVATION_BITS * (group_size - 1.0)),
            budgets=budgets.mean(k),
            gates=self._gate_events(work, budgets, groups, cycles, held) if measured else None,
            edge=self._edge_events(budgets, groups, cycles, held, work.smoothing),
        )

    def _gate_events(
        self,
        work: Workload,
        budgets: LayerBudgets,
        groups: Vector,
        passes: Vector,
        held: Callable[[Vector], Vector],
    ) -> dict[str, Vector]:
        """Events of a table by gates, for a PE that can be in one."""
        if self.lanes > 1:
            return gates.lane_events(
                work.folding,
                gates.lane_name(self.lanes, self.bits),
                budgets.total(groups * passes),
                budgets.total(groups * self._slots(budgets.k, passes, work.smoothing)),
                held(budgets.k),
                gates.stored_bits(work.network, work.activations),
            )
        live = gates.live_shares(work.network, work.activations)
        return gates.group_events(
            work.folding,
            budgets.k,
            budgets.total(groups),
            budgets.total(groups * passes),  # a group without a budget has its cycle too
            held,
            live,
            work.smoothing,
        )

    def _is_measured_size(self) -> bool:
        """Whether groups and bits are those of the measured PEs."""
        wide = self.bits == gates.BITS
        known = wide or (self.lanes > 1 and self.bits in gates.GROUP_BITS)
        return _is(self.group_size, gates.GROUP_SIZE) and known

    def _slots(self, budgets: Vector, passes: Vector, smoothing: float) -> Vector:
        """Slots of a group in the lanes that its passes use; terms are spread over the passes."""
        if smoothing > 0.0:
            return budgets
        return namespace_of(budgets).ceil(budgets / passes) * passes

    def _edge_events(
        self,
        budgets: LayerBudgets,
        groups: Vector,
        passes: Vector,
        held: Callable[[Vector], Vector],
        smoothing: float,
    ) -> dict[str, Vector]:
        """Events of a row's edge by gates, means over a layer's groups."""
        if self.lanes > 1:
            total = budgets.total(groups)
            return gates.lane_edge_events(
                self.lanes,
                self.bits,
                budgets.k,
                passes,
                lambda caps: held(caps) / total,
                budgets.mean,
            )
        events = gates.edge_events(budgets.k, smoothing)
        return {name: budgets.mean(count) for name, count in events.items()}

    def _resolve_budgets(self, work: Workload, statistics: GroupTerms) -> LayerBudgets:
        """The budgets; by default what the weights hold, or all that groups can need."""
        xp = namespace_of(work.folding.K)
        limits = as_real(self._layer_limits(work.folding.extents), xp)
        largest = as_real(statistics.largest, xp)
        full = xp.where(xp.asarray(statistics.measured), largest, limits)
        budgets = resolve_budgets(work.network, work.budgets, full)
        if work.folding.dataflow != "is" and not budgets.is_by_layer:
            raise ValueError(
                f"budgets by filter need the input-stationary dataflow, in which filters follow "
                f"each other; the array's is {work.folding.dataflow!r}"
            )
        return budgets

    def _layer_limits(self, extents: Extents) -> Vector:
        """The most terms that a group of any integers needs, integers of shape (layers,)."""
        most = terms.max_terms(self.encoding, self.bits)
        size = self.group_size
        return namespace_of(size).minimum(self.term_groups.extents(extents), size) * most

    def _full_terms(self, budgets: LayerBudgets, folding: Folding, smoothing: float) -> Vector:
        """Terms of a layer whose groups hold k, or all that they can: a ragged one may hold less.

        Returns:
          Real vector over layers, of all products and filters.
        """
        xp = namespace_of(folding.K)
        size = self.group_size
        extent = self.term_groups.extents(folding.extents)
        rest = as_real(ragged_size(extent, size), xp)
        pieces = folding.K / as_real(extent, xp)  # window positions, if groups start anew there
        most = terms.max_terms(self.encoding, self.bits)
        ragged = smooth_minimum(budgets.k, budgets.spread(rest * most), smoothing)
        each = budgets.spread(as_real(extent // size, xp)) * budgets.k + ragged
        return budgets.total(budgets.share(folding.groups * folding.M * pieces) * each)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TermMac(GroupPE):
    """Term revealing's tMAC: one pair of a weight term and a data term a cycle, k * s a group.

    The group's weights hold at most k terms (the budget) and every activation at most
    ``data_terms`` = s, so a step takes k * s cycles (Kung, McDanel and Zhang, SC20). A pair
    adds two exponents and counts into a coefficient vector: two 8-bit additions (derived: the
    paper's adders are narrower). Every activation is taken to hold s terms. By gates, the slots of
    terms that it lacks cost their cycle only, and the row's edge is that of a `GroupPE`.
    """

    measured: ClassVar[str] = "group_size=8, bits=8, lanes=1 and data_terms=3"

    data_terms: Real = 3  # s; assumed, as signed-digit data of 8 bits rarely hold more

    def __post_init__(self) -> None:
        """Checks the data terms as well."""
        super().__post_init__()
        check_numbers("TermMac", continuous=True, data_terms=self.data_terms)

    def nominal_macs(self, budget: Real | None = None) -> Real:
        """g multiplications in k * s cycles."""
        return super().nominal_macs(budget) / self.data_terms

    def area_um2(self, technology: Technology) -> Real:
        """Measured, or derived: exponent adder, eight 8-bit counters, terms of both operands."""
        blocks = {"int8_add": 9.0}
        registers = 2 * ACTIVATION_BITS + 8 * 8 + ACCUMULATOR_BITS
        measured = "term_mac_pe" if self._is_measured_size() else ""
        return composed_area(technology, blocks, registers, measured)

    def activity(self, work: Workload) -> Activity:
        """As `GroupPE`, with s cycles and pairs for each of its terms."""
        single = super().activity(work)
        s = self.data_terms
        pairs = single.terms * s
        return dataclasses.replace(
            single,
            cycles=single.cycles * s,
            busy=single.busy * s,
            terms=pairs,
            events={"int8_add": 2.0 * pairs},
            selections=None,
        )

    def _gate_events(
        self,
        work: Workload,
        budgets: LayerBudgets,
        groups: Vector,
        passes: Vector,
        held: Callable[[Vector], Vector],
    ) -> dict[str, Vector]:
        """Events of a table by gates, for a PE that can be in one."""
        return gates.term_mac_events(
            work.folding,
            budgets.total(groups),
            budgets.total(groups * passes) * self.data_terms,
            held(budgets.k),
            gates.mean_data_terms(work.network, work.activations),
        )

    def _is_measured_size(self) -> bool:
        few = self.lanes == 1 and _is(self.data_terms, gates.DATA_TERMS)
        return few and super()._is_measured_size()


def _is(number: Real, value: int) -> bool:
    """Whether a concrete number has this value."""
    return isinstance(number, int | float | np.number | np.ndarray) and bool(number == value)


def _check_budgets(
    network: Network, pe: GroupPE, budgets: LayerBudgets, held: np.ndarray, *, relaxed: bool
) -> None:
    """Relaxed budgets need not be whole, nor reach what the weights hold, in any group of each."""
    k, largest = np.asarray(budgets.k), held
    outside = ~((k >= 0) & (k <= pe.max_budget))  # NaN too
    if not relaxed:
        outside |= k != np.floor(k)
    if outside.any():
        raise ValueError(
            f"{_entry_name(network, budgets, outside)}: a budget must be a "
            f"{'' if relaxed else 'whole '}number from 0 to {pe.max_budget} (groups of "
            f"{pe.group_size}, {pe.encoding}, {pe.bits} bits), got {k[outside][0]:g}"
        )
    over = k < largest
    if over.any() and not relaxed:
        raise ValueError(
            f"{_entry_name(network, budgets, over)}: a group of its weights holds "
            f"{largest[over][0]} terms, over the budget of {k[over][0]:g}; project the weights "
            f"first, with the groups that the PE's grouping={pe.grouping!r} makes"
        )


def _entry_name(network: Network, budgets: LayerBudgets, which: np.ndarray) -> str:
    """The layer, and the filter where budgets are by filter, of the first entry of a mask."""
    entry = int(np.argmax(which))
    layer = int(budgets.owners[entry])
    first = int(np.argmax(budgets.owners == layer))
    name = network.names[layer]
    return name if budgets.counts[layer] == 1 else f"{name}, filter {entry - first}"
