"""Evaluation of a network on an array: cycles, accesses and energy of every layer at once."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from stp_jax.hwmodel.arrays import Array, fold
from stp_jax.hwmodel.folding import Folding
from stp_jax.hwmodel.group_pe import GroupPE
from stp_jax.hwmodel.memory import Traffic, memory_cycles, traffic
from stp_jax.hwmodel.network import Network
from stp_jax.hwmodel.numbers import (
    Budgets,
    Operands,
    Real,
    Vector,
    as_arrays,
    as_real,
    namespace_for,
    namespace_of,
)
from stp_jax.hwmodel.pes import PE, Activity, BitParallel, DotProduct, Workload, refuse_unmeasured
from stp_jax.hwmodel.report import Report
from stp_jax.hwmodel.smoothing import check_smoothing, smooth_maximum
from stp_jax.hwmodel.technology import (
    HOROWITZ_45NM,
    SHIFT_MULTIPLEXERS,
    Technology,
)
from stp_jax.hwmodel.term_histogram import GroupTerms
from stp_jax.hwmodel.widths import changed


def evaluate(
    network: Network,
    array: Array,
    *,
    budgets: Budgets = None,
    weights: Operands | GroupTerms | None = None,
    activations: Operands | None = None,
    technology: Technology = HOROWITZ_45NM,
    smoothing: float = 0.0,
) -> Report:
    """Evaluates every layer of a network on an array.

    Pure and free of loops over elements: jit and vmap apply over ``budgets``, the numbers of
    ``array`` and the entries of ``technology``, and grad over those of them that are continuous,
    budgets, entries, buffer sizes and bandwidths. Concrete numbers are computed exactly (integers
    to 2**53); traced ones in float32, for layers whose extents stay below 2**31.

    Cycles of a layer are ``folds * (2R + C - 2) + folds * T * k`` (k = 1 for `BitParallel`; with
    budgets by filter, the sum of the filters' k in place of T * k), plus
    stalls if bandwidths are finite: the first fold's fill, and max(0, transfers - computation) of
    the other transfers, which double buffering otherwise hides. SCALE-Sim prints one cycle
    less a layer, the index of the last one. Of several arrays (``array.count``) the busiest one
    counts; energies and traffic are those of all.

    Args:
      network: the layers.
      array: rows, columns, dataflow, PE, buffers.
      budgets: k of each layer, the most terms in a group, for PEs that have one: a number for all,
        one a layer in order, or by layer name; in place of a layer's number, an array of one for
        each of its filters, where inputs are resident. None, in whole or for a layer, and names
        left out stand for full precision, the layer as it is in int8: the most that a group of its
        ``weights`` holds if they are given, else the most that any of its groups can need
        (``pe.max_budget``, 32 for NAF, 8 bits, g = 8, or less where the reduction is below g).
      weights: integer weights by layer name (HWIO, or in by out; see `weight_matrix`), or what
        `measure_terms` made of them. Empty slots cost their cycle but switch nothing; without
        weights every slot is taken to be full that the group's weights can fill.
      activations: integer inputs by layer name, for PEs whose cycles depend on them: (N, H, W, C)
        without the layer's padding, or patches (P, groups * K). A technology by gates takes the
        share of zeros from them, 40 % where they are not given.
      technology: energy per event.
      smoothing: 0 for the exact model; above and below 1, a differentiable surrogate for relaxed
        budgets, in which every kink is rounded over this fraction of its operands (see
        `smooth_maximum`).

    Returns:
      A report of vectors over layers.

    Raises:
      ValueError: budgets that are negative, above ``pe.max_budget``, not whole (unless they are
        relaxed), below what the given weights hold, of the wrong number or for an unknown name;
        budgets for a PE that has none; operands that the PE's cycles depend on are missing, in
        another layout or measured on another network; a technology without an entry that is
        needed, or by gates where the array's registers have other widths; smoothing out of range;
        an extent of 2**31 or more in a traced evaluation.
      TypeError: an argument is of another kind.

    >>> from stp_jax import hwmodel
    >>> network = hwmodel.Network((hwmodel.dense("fc", 512, 1000),))
    >>> hwmodel.evaluate(network, hwmodel.Array(rows=32, cols=32)).cycles.tolist()
    [17504]
    >>> ours = hwmodel.Array(rows=32, cols=32, pe=hwmodel.GroupPE(group_size=8))
    >>> hwmodel.evaluate(network, ours, budgets={"fc": 8}).cycles.tolist()
    [16188]
    """
    _check_kinds(network, array, weights, technology)
    check_smoothing(smoothing)
    _check_registers(array, technology)
    xp = namespace_for(array, budgets)
    array = as_arrays(array, xp)
    folding = fold(network, array, xp)
    work = Workload(
        network=network,
        folding=folding,
        budgets=budgets,
        weights=weights,
        activations=activations,
        smoothing=smoothing,
        register_bits=array.register_bits,
        basis=technology.basis,
    )
    activity = array.pe.activity(work)
    moved = traffic(network, array, folding, activity.weight_bits, smoothing)
    energies = _energy(array, technology, activity, moved, folding)
    select_pj = energies.pop("select")
    compute = (folding.fill_cycles + activity.cycles) * folding.parallel_share
    first_fill = moved.first_fill_bytes / array.dram_bandwidth
    memory = memory_cycles(
        array, moved, folding.parallel_share, smoothing
    )  # what the first fill leaves
    stalls = first_fill + smooth_maximum(memory, compute, smoothing) - compute
    cycles = compute + stalls
    places = folding.rows * folding.cols * as_real(array.count, xp)
    report = Report(
        network=network,
        node_nm=technology.node_nm,
        basis=technology.basis,
        budgets=activity.budgets,
        cycles=cycles,
        stall_cycles=stalls,
        utilization=activity.busy / (places * cycles),
        operations={"macs": folding.macs, "terms": activity.terms},
        accesses=moved.accesses,
        dram_bytes=moved.all_dram_bytes,
        dram_operand_bytes=moved.dram_bytes,
        sram_bytes=moved.sram_bytes,
        energy_pj=energies,
        select_pj=select_pj,
    )
    # A transformation would make int32 of whole counts, which wraps.
    traced = namespace_for(report) is not np
    return jax.tree.map(lambda x: as_real(x, jnp), report) if traced else report.rounded()


def _check_kinds(network: object, array: object, weights: object, technology: object) -> None:
    if not isinstance(network, Network):
        raise TypeError(f"network must be a hwmodel.Network, got {type(network).__name__}")
    if not isinstance(array, Array):
        raise TypeError(f"array must be a hwmodel.Array, got {type(array).__name__}")
    if not isinstance(array.pe, PE):
        raise TypeError(f"the array's pe must be one of hwmodel's PEs, got {array.pe!r}")
    if weights is not None and not isinstance(weights, Mapping | GroupTerms):
        raise TypeError(
            "weights must be a mapping from layer names to integers, or what measure_terms "
            f"returns, got {type(weights).__name__}"
        )
    if isinstance(weights, GroupTerms) and not isinstance(
        array.pe, GroupPE | BitParallel | DotProduct
    ):
        raise TypeError(
            f"{type(array.pe).__name__} reads the weights' digits: weights must be a mapping from "
            "layer names to integers, not the GroupTerms of measure_terms, which are for GroupPE"
        )
    if not isinstance(technology, Technology):
        raise TypeError(
            f"technology must be a hwmodel.Technology (see read_technology), got {technology!r}"
        )


def _check_registers(array: Array, technology: Technology) -> None:
    operands = ", ".join(sorted(changed(array.register_bits)))
    if operands and technology.basis == "gates":
        raise ValueError(
            f"register_bits has other widths of {operands}, but energies by gates are of measured "
            "PEs with their registers; leave the default widths, or use a technology by the table"
        )


def _energy(
    array: Array,
    technology: Technology,
    activity: Activity,
    moved: Traffic,
    folding: Folding,
) -> dict[str, Vector]:
    """Energy by component, and of selection; traced where the technology alone is traced."""
    if technology.basis == "gates":
        return _gate_energy(array, technology, activity, moved, folding)
    xp = namespace_of(moved.all_dram_bytes, *technology.energy_pj.values())
    encoder = [] if activity.encoder is None else [activity.encoder]
    selection = [] if activity.selections is None else ["int8_shift"]
    needed = [*activity.events, *encoder, *selection, "register_bit", "dram_64b"]
    technology.require(needed)
    pj = technology.energy_pj
    counts = {
        "events": activity.events,
        "encoded": moved.accesses["sram_filter_read"] * activity.encoded_share,
        "selections": activity.selections,
        "register_bits": sum(activity.register_bits.values()),
        "dram_bytes": moved.all_dram_bytes,
    }
    counts = jax.tree.map(lambda x: as_real(x, xp), counts)
    zero = xp.zeros_like(counts["dram_bytes"])
    return {
        "array": sum((n * pj[event] for event, n in counts["events"].items()), zero),
        "select": sum((counts["selections"] * pj[e] / SHIFT_MULTIPLEXERS for e in selection), zero),
        "encoder": sum((counts["encoded"] * pj[entry] for entry in encoder), zero),
        "registers": counts["register_bits"] * pj["register_bit"],
        **_memory_energy(array, technology, moved),
    }


def _memory_energy(array: Array, technology: Technology, moved: Traffic) -> dict[str, Vector]:
    xp = namespace_of(moved.all_dram_bytes, *technology.energy_pj.values())

    def access_pj(name: str) -> Real:
        capacity = as_real(getattr(array, f"{name}_sram"), xp)
        return technology.sram_pj_per_byte(xp.maximum(capacity, 1.0))  # of 0 bytes none pass

    sram = [as_real(n, xp) * access_pj(name) for name, n in moved.sram_bytes.items()]
    dram = as_real(moved.all_dram_bytes, xp) / 8.0 * technology.energy_pj["dram_64b"]
    return {"sram": sum(sram, xp.zeros_like(dram)), "dram": dram}


def _gate_energy(
    array: Array,
    technology: Technology,
    activity: Activity,
    moved: Traffic,
    folding: Folding,
) -> dict[str, Vector]:
    """As `_energy`, of PEs and edges measured as a whole."""
    if activity.gates is None:
        refuse_unmeasured(array.pe, array.dataflow)
    xp = namespace_of(moved.all_dram_bytes, *technology.energy_pj.values())
    edge: dict[str, Vector] = {}
    if activity.encoder is not None and activity.edge is not None:
        whole = folding.reduction_steps / folding.K  # groups a weight, ragged ones included
        entering = moved.accesses["sram_filter_read"] * activity.encoded_share * whole
        edge = {name: entering * count for name, count in activity.edge.items()}
    technology.require([*activity.gates, *edge, "dram_64b"])
    zero = xp.zeros_like(as_real(moved.all_dram_bytes, xp))

    def price(events: Mapping[str, Vector]) -> Vector:
        energies = technology.energy_pj
        return sum((as_real(n, xp) * energies[name] for name, n in events.items()), zero)

    return {
        "array": price(activity.gates),
        "select": zero,
        "encoder": price(edge),
        "registers": zero,
        **_memory_energy(array, technology, moved),
    }
