"""Evaluates a network on an array: cycles, accesses and energy of every layer at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stp_jax.hwmodel.arrays import Array, fold
from stp_jax.hwmodel.group_pe import Budgets
from stp_jax.hwmodel.memory import memory_cycles, traffic
from stp_jax.hwmodel.network import Network
from stp_jax.hwmodel.numeric import as_real, namespace, smooth_maximum
from stp_jax.hwmodel.pes import PE, Profile, Workload
from stp_jax.hwmodel.report import Report
from stp_jax.hwmodel.statistics import GroupTerms
from stp_jax.hwmodel.technology import HOROWITZ_45NM, Technology


def evaluate(
    network: Network,
    array: Array,
    *,
    budgets: Budgets = None,
    weights: Mapping[str, Any] | GroupTerms | None = None,
    activations: Mapping[str, Any] | None = None,
    technology: Technology = HOROWITZ_45NM,
    smoothing: float = 0.0,
) -> Report:
    """Evaluates every layer of a network on an array.

    Pure and free of loops over elements: jit, vmap and grad apply over ``budgets``, the numbers of
    ``array`` and the entries of ``technology``. Concrete numbers are computed exactly (integers to
    2**53); traced ones in float32.

    Cycles of a layer are ``folds * (2R + C - 2) + folds * T * k`` (k = 1 for `BitParallel`), plus
    what memory adds if bandwidths are finite: the first fold's fill, and what exceeds the
    computation, which double buffering otherwise hides. SCALE-Sim prints one cycle less a layer,
    the index of the last one.

    Args:
      network: the layers.
      array: rows, columns, dataflow, PE, buffers.
      budgets: k of each layer, the most terms in a group, for PEs that have one: a number for all,
        one a layer in order, or by layer name. None, in whole or for a layer, and names left out
        stand for full precision, the layer as it is in int8: the most that a group of its
        ``weights`` holds if they are given, else the most that any group can need,
        ``pe.max_budget`` (32 for NAF, 8 bits, g = 8).
      weights: integer weights by layer name (HWIO, or in by out), or what `measure_terms` made of
        them. Empty slots cost their cycle but switch nothing; without weights every slot is taken
        to be full.
      activations: integer inputs by layer name, for PEs whose cycles depend on them: (N, H, W, C)
        with ``SAME`` padding around them, or patches (P, K).
      technology: energy per event.
      smoothing: 0 for the exact model; above, a differentiable surrogate for relaxed budgets, in
        which every kink is rounded over this fraction of its operands (see `smooth_maximum`).

    Returns:
      A report of vectors over layers.

    Raises:
      ValueError: budgets that are negative, above ``pe.max_budget``, not whole, below what the
        given weights hold, of the wrong number or for an unknown name; budgets for a PE that has
        none; operands that the PE's cycles depend on are missing; a technology without an entry
        that is needed.
      TypeError: an argument is of another kind.

    >>> from stp_jax import hwmodel
    >>> network = hwmodel.Network((hwmodel.dense("fc", 512, 1000),))
    >>> hwmodel.evaluate(network, hwmodel.Array(rows=32, cols=32)).cycles.tolist()
    [17504]
    >>> ours = hwmodel.Array(rows=32, cols=32, pe=hwmodel.GroupPE(group_size=8))
    >>> hwmodel.evaluate(network, ours, budgets={"fc": 8}).cycles.tolist()
    [16188]
    """
    _check_kinds(network, array, technology)
    xp = namespace(array, budgets, technology)
    folding = fold(network, array, xp)
    work = Workload(
        network=network,
        folding=folding,
        budgets=budgets,
        weights=weights,
        activations=activations,
        smoothing=smoothing,
    )
    profile = array.pe.profile(work, xp)
    moved = traffic(network, array, folding, profile.weight_bits, xp, smoothing)
    compute = folding.fill_cycles + profile.cycles
    first_fill = moved.first_fill_bytes / as_real(array.dram_bandwidth, xp)
    memory = memory_cycles(array, moved, xp, smoothing)
    stalls = first_fill + smooth_maximum(memory, compute, smoothing, xp) - compute
    cycles = compute + stalls
    places = folding.rows * folding.cols
    return Report(
        network=network,
        budgets=profile.budgets,
        cycles=cycles,
        stall_cycles=stalls,
        utilization=profile.busy / (places * cycles),
        operations={"macs": folding.macs, "terms": profile.terms},
        accesses=moved.accesses,
        dram_bytes=moved.dram_bytes,
        energy_pj=_energy(array, technology, profile, moved, xp),
    ).rounded()


def _check_kinds(network: object, array: object, technology: object) -> None:
    if not isinstance(network, Network):
        raise TypeError(f"network must be a hwmodel.Network, got {type(network).__name__}")
    if not isinstance(array, Array):
        raise TypeError(f"array must be a hwmodel.Array, got {type(array).__name__}")
    if not isinstance(array.pe, PE):
        raise TypeError(f"the array's pe must be one of hwmodel's PEs, got {array.pe!r}")
    if not isinstance(technology, Technology):
        raise TypeError(
            f"technology must be a hwmodel.Technology (see read_technology), got {technology!r}"
        )


def _energy(array: Array, technology: Technology, profile: Profile, moved: Any, xp: Any) -> dict:
    encoder = [] if profile.encoder is None else [profile.encoder]
    technology.require([*profile.events, *encoder, "register_bit", "dram_64b"])
    pj = technology.energy_pj
    zero = xp.zeros_like(profile.cycles)
    encodes = moved.accesses["sram_filter_read"]
    buffers = {name: getattr(array, f"{name}_sram") for name in moved.sram_bytes}
    return {
        "array": sum((n * pj[event] for event, n in profile.events.items()), zero),
        "encoder": sum((encodes * pj[entry] for entry in encoder), zero),
        "registers": profile.register_bits * pj["register_bit"],
        "sram": sum(
            moved.sram_bytes[name] * technology.sram_pj_per_byte(as_real(size, xp), xp)
            for name, size in buffers.items()
        ),
        "dram": moved.dram_bytes / 8.0 * pj["dram_64b"],
    }
