"""Energy by gates: counts of the events whose energies were measured on synthesised PEs.

A table of arithmetic prices an addition; a table measured by gates prices what a whole processing
element does in a slot: selector, shifter, adders, registers and clock together
(`benchmarks/rtl_tables.py`). The first terms of a group are its largest and move the most bits, so
they have entries of their own; a term that meets an activation of zero moves fewer. What moves in a
multiplier grows with the bits of its activation.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jax.typing import ArrayLike

from stp_jax import terms
from stp_jax.hwmodel.folding import Folding
from stp_jax.hwmodel.network import Network
from stp_jax.hwmodel.numbers import Operands, Vector, as_real, namespace_of
from stp_jax.hwmodel.smoothing import smooth_minimum
from stp_jax.hwmodel.term_histogram import lookup

BITS = 8
GROUP_SIZE = 8  # of the measured group PE
DOT_LANES = (1, 8)  # of the measured int8 dot products
GROUP_BITS = (BITS, 4)  # of weights in the measured group PEs of several lanes
NARROW_WEIGHTS = (4, 3, 2)  # bits of the other measured dot products' weights; all of 8 lanes
# Of activations where they are not given: half-Gaussian with 40 % zeros, as in the measurements.
LIVE_SHARE = 0.6
MEAN_BITS = 3.0
MEAN_DATA_TERMS = 1.4  # of at most three
DATA_TERMS = 3  # of an activation, in the measured tMAC

MAC_EVENTS = ("mac", "mac_bit", "mac_load")
GROUP_EVENTS = (
    "group",
    "group_second_term",
    "group_third_term",
    "group_further_term",
    "group_live_term",
    "group_live_pair",
    "group_first_empty_slot",
    "group_further_empty_slot",
    "group_load",
)
# Of edges by lanes and bits: those that explain what was measured. In narrow edges little moves, so
# that some cannot be told apart.
_LANE_EDGE_EVENTS = {
    (4, 8): (
        "group",
        "second_term",
        "third_term",
        "further_pass",
        "early_term",
        "vacant_lane",
    ),
    (2, 8): ("group", "early_term", "vacant_lane"),
    (4, 4): ("group", "second_term", "third_term", "early_term"),
    (2, 4): ("group", "second_term", "further_pass", "early_term"),
}
EDGE_EVENTS = ("edge_group", "edge_second_slot", "edge_further_slot")


def dot_name(lanes: int, weight_bits: int = BITS) -> str:
    """How a table's entries for dot products of this many lanes and bits a weight begin."""
    return f"dot_{lane_name(lanes, weight_bits)}"


def lane_name(lanes: int, bits: int = BITS) -> str:
    """What stands in a table's entries for PEs of these lanes and weights of these bits."""
    return f"{lanes}{_width_name(bits)}"


def _width_name(bits: int) -> str:
    return f"_w{bits}" if bits != BITS else ""


def group_area_names(lanes: int = 1, bits: int = BITS) -> tuple[str, str]:
    """Entries of a table for the areas of a group PE and of one row's edge."""
    form = (f"_of_{lanes}_lanes" if lanes > 1 else "") + _width_name(bits)
    return f"group_pe_{GROUP_SIZE}{form}", f"row_edge_{GROUP_SIZE}{form}"


def lane_event_names(lanes: int, bits: int = BITS) -> tuple[str, ...]:
    """Entries of a table for group PEs of several lanes and their edge."""
    name = lane_name(lanes, bits)
    pe = ("", "_moved_lane", "_bit", "_load", "_bus")
    edge = _LANE_EDGE_EVENTS.get((lanes, bits), _LANE_EDGE_EVENTS[4, BITS])
    return (*(f"pass_{name}{part}" for part in pe), *(f"edge_{name}_{part}" for part in edge))


def live_shares(network: Network, activations: Operands | None) -> np.ndarray:
    """Share of each layer's activations that are not zero; 0.6 where they are not given."""
    return _means(network, activations, lambda a: _magnitudes(a) != 0, LIVE_SHARE)


def mean_bits(network: Network, activations: Operands | None) -> np.ndarray:
    """Mean bits of each layer's activations' magnitudes; 3.0 where they are not given."""
    return _means(network, activations, lambda a: _bits(_magnitudes(a)), MEAN_BITS)


def stored_bits(network: Network, activations: Operands | None) -> np.ndarray:
    """As `mean_bits`, of what PEs of several lanes hold: signed activations are stored plus 128."""

    def stored(values: np.ndarray) -> np.ndarray:
        return values + (1 << (BITS - 1)) if values.min() < 0 else _magnitudes(values)

    return _means(network, activations, lambda a: _bits(stored(a)), MEAN_BITS)


def mean_data_terms(network: Network, activations: Operands | None) -> np.ndarray:
    """Mean NAF terms of each layer's activations, none with over three; 1.4 where not given."""

    def held(values: np.ndarray) -> np.ndarray:
        return np.minimum(np.asarray(terms.count(_magnitudes(values))), DATA_TERMS)

    return _means(network, activations, held, MEAN_DATA_TERMS)


def _magnitudes(values: np.ndarray) -> np.ndarray:
    """Magnitudes of activations; those of 8 bits are halved, as PEs take int8."""
    magnitudes = np.abs(values)
    return magnitudes // 2 if values.max() > 127 else magnitudes


def _bits(values: np.ndarray) -> np.ndarray:
    return np.ceil(np.log2(values + 1.0))


def _means(
    network: Network,
    activations: Operands | None,
    of: Callable[[np.ndarray], np.ndarray],
    default: float,
) -> np.ndarray:
    """Means by layer of a function of the activations, int64."""

    def mean(values: ArrayLike | None) -> float:
        return default if values is None else float(of(np.asarray(values).astype(np.int64)).mean())

    return np.array([mean(lookup(activations or {}, layer)) for layer in network])


def load_cycles(folding: Folding) -> Vector:
    """PE-cycles of loading: R * R * C in each fold."""
    return folding.folds * folding.rows * folding.rows * folding.cols


def bus_events(folding: Folding, name: str) -> dict[str, Vector]:
    """Loading where each row takes its activations from the column's bus, for entries of a name.

    In each fold every PE loads once, and sees the bus for as many cycles as the array has rows.
    """
    return {
        f"{name}_load": folding.folds * folding.rows * folding.cols,
        f"{name}_bus": load_cycles(folding),
    }


def mac_events(folding: Folding, bits: np.ndarray) -> dict[str, Vector]:
    """Events of `BitParallel` PEs, real vectors over layers."""
    xp = namespace_of(folding.K)
    return {
        "mac": folding.macs,
        "mac_bit": folding.macs * as_real(bits, xp),
        "mac_load": load_cycles(folding),
    }


def dot_events(
    folding: Folding, name: str, steps: Vector, multiplying: Vector, bits: np.ndarray
) -> dict[str, Vector]:
    """Events of `DotProduct` PEs, real vectors over layers.

    Args:
      folding: of the network onto the array.
      name: how its entries begin, as `dot_name`.
      steps: dot products of all PEs, by layer.
      multiplying: weights, or bits of them, that meet an activation; by layer.
      bits: of the activations, as `mean_bits`.
    """
    return {
        f"{name}_step": steps,
        f"{name}_bit": multiplying * as_real(bits, namespace_of(folding.K)),
        **bus_events(folding, name),
    }


def group_events(
    folding: Folding,
    budgets: Vector,
    groups: Vector,
    slots: Vector,
    held: Callable[[Vector], Vector],
    live: np.ndarray,
    smoothing: float,
) -> dict[str, Vector]:
    """Events of `GroupPE`s, real vectors over layers.

    Args:
      folding: of the network onto the array.
      budgets: k by entry, that is by layer or by filter.
      groups: of all filters and products, each met once by every output pixel; by layer.
      slots: of these groups, by layer.
      held: caps by entry -> terms of all groups by layer, none counted beyond its cap.
      live: share of activations that are not zero.
      smoothing: see `evaluate`.
    """
    xp = namespace_of(folding.K)
    first, second, third = (
        held(xp.asarray(smooth_minimum(budgets, n, smoothing))) for n in (1.0, 2.0, 3.0)
    )
    terms, live = held(budgets), as_real(live, xp)
    # Groups of at least one term whose last slot is empty; a group without any has nothing to end.
    ending = first - (terms - held(xp.maximum(budgets - 1.0, 0.0)))
    mean = terms / groups
    dead = xp.maximum(1.0 - live, 1e-6)  # 0 to a power below 1 has no gradient
    pairs = 1.0 - dead**mean - mean * live * dead ** (mean - 1.0)
    events = {
        "group": groups,
        "group_second_term": second - first,
        "group_third_term": third - second,
        "group_further_term": terms - third,
        "group_live_term": (terms - first) * live,
        "group_live_pair": groups * xp.maximum(pairs, 0.0),
        "group_first_empty_slot": ending,
        # The group's own event has a slot, whether it holds a term or not.
        "group_further_empty_slot": slots - terms - (groups - first) - ending,
    }
    by_pixel = {name: count * folding.P for name, count in events.items()}
    return {**by_pixel, "group_load": load_cycles(folding)}


def lane_events(
    folding: Folding, name: str, passes: Vector, slots: Vector, terms: Vector, bits: np.ndarray
) -> dict[str, Vector]:
    """Events of `GroupPE`s of several lanes, real vectors over layers.

    A lane moves in a pass if it holds a term or held one in the pass before; terms are taken to be
    spread evenly over the slots.

    Args:
      folding: of the network onto the array.
      name: that of its entries, as `lane_name`.
      passes: of all groups, each met once by every output pixel; by layer.
      slots: of these passes, in lanes that the budget uses: ceil(k / passes) in each; by layer.
      terms: in these slots.
      bits: of the activations, as `stored_bits`.
    """
    xp = namespace_of(terms)
    empty = 1.0 - terms / xp.maximum(slots, 1.0)
    each = {
        f"pass_{name}": passes,
        f"pass_{name}_moved_lane": slots * (1.0 - empty * empty),
        f"pass_{name}_bit": terms * as_real(bits, xp),
    }
    by_pixel = {name: count * folding.P for name, count in each.items()}
    return {**by_pixel, **bus_events(folding, f"pass_{name}")}


def term_mac_events(
    folding: Folding, groups: Vector, slots: Vector, held: Vector, data_terms: np.ndarray
) -> dict[str, Vector]:
    """Events of `TermMac` PEs, real vectors over layers.

    Args:
      folding: of the network onto the array.
      groups: of all filters and products, each met once by every output pixel; by layer.
      slots: for pairs in these groups, filled or not.
      held: weight terms in these groups.
      data_terms: mean terms of an activation.
    """
    pairs = held * as_real(data_terms, namespace_of(held))
    each = {"term_mac_group": groups, "term_mac_slot": slots, "term_mac_pair": pairs}
    by_pixel = {name: count * folding.P for name, count in each.items()}
    return {**by_pixel, **bus_events(folding, "term_mac")}


def edge_events(budgets: Vector, smoothing: float) -> dict[str, Vector]:
    """Events of a row's edge, encoders and serialiser, for one group; real vectors like budgets.

    A group with its first slot, then its second, with which the serialiser begins to work, and the
    others; slots without a term cost almost the same.
    """
    xp = namespace_of(budgets)
    first, second = (smooth_minimum(budgets, n, smoothing) for n in (1.0, 2.0))
    return {
        "edge_group": xp.ones_like(budgets),
        "edge_second_slot": second - first,
        "edge_further_slot": budgets - second,
    }


def lane_edge_events(
    lanes: int,
    bits: int,
    budgets: Vector,
    passes: Vector,
    held: Callable[[Vector], Vector],
    mean: Callable[[Vector], Vector],
) -> dict[str, Vector]:
    """As `edge_events`, of an edge that gives ``lanes`` terms a cycle; real vectors over layers.

    What a further pass costs is searching again among the terms that are left: it grows with those
    that earlier passes took (a term taken before the last pass is early), and with lanes that find
    none.

    Args:
      lanes: L, terms a pass.
      bits: of a weight.
      budgets: k by entry, that is by layer or by filter.
      passes: of a group, by entry.
      held: caps by entry -> mean terms of a layer's groups, none counted beyond its cap.
      mean: values by entry -> their means by layer.
    """
    xp = namespace_of(budgets, passes)

    def within(caps: Vector) -> Vector:
        return held(xp.minimum(budgets, caps))

    further = mean(passes - 1.0)
    first, second, third, whole = (
        within(xp.full_like(budgets, float(n))) for n in (1, 2, 3, lanes)
    )
    later = within(budgets) - whole
    name = lane_name(lanes, bits)
    events = {
        f"edge_{name}_group": xp.ones_like(further),
        f"edge_{name}_second_term": second - first,
        f"edge_{name}_third_term": third - second,
        f"edge_{name}_further_pass": further,
        f"edge_{name}_early_term": within((passes - 1.0) * lanes),
        f"edge_{name}_vacant_lane": xp.maximum(further * lanes - later, 0.0),
    }
    return {event: events[event] for event in lane_event_names(lanes, bits) if event in events}
