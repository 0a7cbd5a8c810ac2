"""PEs whose cycles a budget of terms fixes in advance: no lane waits for a slower one.

`GroupPE` is the group processing element of structured term pruning (Huang et al., IEEE TCAD
42(1), 2023): it holds g activations, and each cycle one weight term (sign, exponent, index in the
group) selects one, shifts it and adds it. `TermMac` is the tMAC of term revealing (Kung, McDanel
and Zhang, SC20).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import numpy as np

from stp_jax import terms
from stp_jax.hwmodel import gates
from stp_jax.hwmodel.folding import Extents, Folding
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
    ACCUMULATOR_BITS,
    ACTIVATION_BITS,
    PE,
    Activity,
    Workload,
    composed_area,
    operand_register_bits,
)
from stp_jax.hwmodel.smoothing import smooth_maximum, smooth_minimum
from stp_jax.hwmodel.technology import Technology
from stp_jax.hwmodel.term_histogram import (
    Grouping,
    GroupTerms,
    TermGroups,
    check_names,
    lookup,
    measure_terms,
)
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

    Raises:
      ValueError: group_size or bits not a positive integer, unknown encoding or grouping.
    """

    group_size: Real = dataclasses.field(default=8, metadata=INTEGER)
    encoding: terms.Encoding = dataclasses.field(default="naf", metadata={"static": True})
    bits: int = dataclasses.field(default=8, metadata={"static": True})
    grouping: Grouping = dataclasses.field(default="flat", metadata={"static": True})
    packed: bool = dataclasses.field(default=False, metadata={"static": True})

    def __post_init__(self) -> None:
        """Checks encoding, grouping and, where they are concrete, the numbers."""
        check_numbers("GroupPE", group_size=self.group_size, bits=self.bits)
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
        """g multiplications in k cycles."""
        return self.group_size / (self.max_budget if budget is None else budget)

    def area_um2(self, technology: Technology) -> Real:
        """Area of one PE: derived, a term lane plus its resident activations.

        Interpolated linearly in g through the synthesised points: one term lane with a single
        resident activation, and the PE with 8.
        """
        technology.require(["term_lane", "group_pe_8"], kind="area_um2")
        lane, eight = (technology.area_um2[name] for name in ("term_lane", "group_pe_8"))
        return lane + (eight - lane) / 7 * (self.group_size - 1)

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
        k = resolve_budgets(work, self, statistics)
        if isinstance(k, np.ndarray):
            _check_budgets(network, self, k, statistics, relaxed=work.smoothing > 0.0)
        known = xp.asarray(statistics.measured)
        groups = folding.groups * folding.reduction_steps * folding.M

        def held(caps: Vector) -> Vector:
            """Terms of all groups, none counted beyond its cap."""
            measured = statistics.within(caps, work.smoothing)[0]
            return xp.where(known, measured, self._full_terms(caps, folding, work.smoothing))

        _, empty = statistics.within(k, work.smoothing)
        added = held(k) * folding.P
        empty = xp.where(known, empty, xp.where(k > 0.0, 0.0, groups))
        group_size = as_real(self.group_size, xp)
        slot = self.slot_format(k)
        weight_bits: Real = float(self.bits)
        # Nothing packs the second operand of a product of activations, which is computed at run
        # time; weights that are given for such a layer are known beforehand.
        kinds = np.array([layer.kind for layer in network])
        packed = self.packed & ~((kinds == "matmul") & ~statistics.measured)
        if packed.any():
            words = folding.groups * folding.K * folding.M
            weight_bits = xp.where(
                xp.asarray(packed), groups * k * slot.stored_bits / words, weight_bits
            )
        return Activity(
            cycles=folding.folds * folding.steps * smooth_maximum(k, 1.0, work.smoothing),
            busy=groups * k * folding.P,
            terms=added,
            events={"int8_shift": added, "int32_add": added},
            register_bits=(added + empty * folding.P) * ACCUMULATOR_BITS
            + operand_register_bits(
                folding,
                group_size,
                groups * k * slot.wire_bits * folding.P,
                k * slot.wire_bits,
            ),
            encoder=None if packed.all() else terms.ENCODINGS[self.encoding].encoder,
            encoded_share=as_real(~packed, xp),
            weight_bits=weight_bits,
            # Two-input multiplexers that select one of g activations; an estimate of the wiring.
            selections=added * (ACTIVATION_BITS * (group_size - 1.0)),
            budgets=k,
            gates=self._gate_events(work, k, groups, held),
        )

    def _gate_events(
        self, work: Workload, k: Vector, groups: Vector, held: Callable[[Vector], Vector]
    ) -> dict[str, Vector] | None:
        """Events of a table by gates; None where no such PE was measured."""
        concrete = isinstance(self.group_size, int | float | np.number | np.ndarray)
        alike = concrete and self.group_size == gates.GROUP_SIZE and self.bits == gates.BITS
        if not alike or work.folding.dataflow != "is":
            return None
        live = gates.live_shares(work.network, work.activations)
        return gates.group_events(work.folding, k, groups, held, live, work.smoothing)

    def _layer_limits(self, extents: Extents) -> Vector:
        """The most terms that a group of any integers needs, integers of shape (layers,)."""
        most = terms.max_terms(self.encoding, self.bits)
        size = self.group_size
        return namespace_of(size).minimum(self.term_groups.extents(extents), size) * most

    def _full_terms(self, k: Vector, folding: Folding, smoothing: float) -> Vector:
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
        ragged = smooth_minimum(k, rest * most, smoothing)
        each = as_real(extent // size, xp) * k + ragged
        return folding.groups * folding.M * pieces * each


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TermMac(GroupPE):
    """Term revealing's tMAC: one pair of a weight term and a data term a cycle, k * s a group.

    The group's weights hold at most k terms (the budget) and every activation at most
    ``data_terms`` = s, so a step takes k * s cycles (Kung, McDanel and Zhang, SC20). A pair
    adds two exponents and counts into a coefficient vector: two 8-bit additions (derived: the
    paper's adders are narrower). Every activation is taken to hold s terms.
    """

    data_terms: Real = 3  # s; assumed, as signed-digit data of 8 bits rarely hold more

    def __post_init__(self) -> None:
        """Checks the data terms as well."""
        super().__post_init__()
        check_numbers("TermMac", continuous=True, data_terms=self.data_terms)

    def nominal_macs(self, budget: Real | None = None) -> Real:
        """g multiplications in k * s cycles."""
        return super().nominal_macs(budget) / self.data_terms

    def area_um2(self, technology: Technology) -> Real:
        """Derived: exponent adder, eight 8-bit coefficient counters, terms of both operands."""
        blocks = {"int8_add": 9.0}
        return composed_area(technology, blocks, 2 * ACTIVATION_BITS + 8 * 8 + ACCUMULATOR_BITS)

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
            gates=None,
        )


def resolve_budgets(work: Workload, pe: GroupPE, statistics: GroupTerms) -> Vector:
    """Budgets as a real vector over layers; see `evaluate` for what is accepted and raised."""
    network, budgets = work.network, work.budgets
    xp = namespace_of(work.folding.K)
    limits = as_real(pe._layer_limits(work.folding.extents), xp)
    largest = as_real(statistics.largest, xp)
    full = xp.where(xp.asarray(statistics.measured), largest, limits)
    if isinstance(budgets, Mapping):
        check_names("budgets", budgets, network)
        budgets = [lookup(budgets, layer) for layer in network]
    if budgets is None:
        return full
    if isinstance(budgets, str):
        raise TypeError(f"budgets are numbers, not text, got {budgets!r}")
    if isinstance(budgets, list | tuple):
        if len(budgets) != len(network):
            raise ValueError(f"{len(budgets)} budgets for {len(network)} layers")
        chosen = [full[i] if k is None else as_real(k, xp) for i, k in enumerate(budgets)]
        k = xp.stack(chosen)
    else:
        k = as_real(budgets, xp)
        if k.shape not in ((), (len(network),)):
            raise ValueError(f"budgets of shape {k.shape} for {len(network)} layers")
        k = xp.broadcast_to(k, (len(network),))
    return k


def _check_budgets(
    network: Network, pe: GroupPE, k: np.ndarray, held: GroupTerms, *, relaxed: bool
) -> None:
    """Relaxed budgets need not be whole, nor reach what the weights hold."""
    for layer, budget, largest in zip(network, k, held.largest, strict=True):
        if not 0 <= budget <= pe.max_budget or (budget != np.floor(budget) and not relaxed):
            raise ValueError(
                f"{layer.name}: a budget must be a {'' if relaxed else 'whole '}number from 0 to "
                f"{pe.max_budget} (groups of {pe.group_size}, {pe.encoding}, {pe.bits} bits), got "
                f"{budget:g}"
            )
        if budget < largest and not relaxed:
            raise ValueError(
                f"{layer.name}: a group of its weights holds {largest} terms, over the budget of "
                f"{budget:g}; project the weights first, with the groups that the PE's "
                f"grouping={pe.grouping!r} makes"
            )
