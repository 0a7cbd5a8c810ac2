"""Design-space sweeps: thousands of arrays on one network in one vectorised call."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stp_jax.hwmodel.arrays import Array, Dataflow
from stp_jax.hwmodel.evaluate import evaluate
from stp_jax.hwmodel.group_pe import GroupPE
from stp_jax.hwmodel.network import Network
from stp_jax.hwmodel.numbers import INT32_END, Real
from stp_jax.hwmodel.pes import PE, BitParallel
from stp_jax.hwmodel.technology import HOROWITZ_45NM, Technology
from stp_jax.hwmodel.term_histogram import check_names, lookup
from stp_jax.hwmodel.widths import Widths

ARRAY_FIELDS = (
    "rows",
    "cols",
    "ifmap_sram",
    "filter_sram",
    "ofmap_sram",
    "activation_sram",
    "dram_bandwidth",
    "sram_bandwidth",
    "count",
)
_WIDTHS = tuple(
    f"{level}.{field.name}"
    for level in ("dram_bits", "sram_bits", "register_bits")
    for field in dataclasses.fields(Widths)
    if (level, field.name) != ("register_bits", "outputs")
)
_PE_FIELDS = ("group_size", "budgets")
_INTEGERS = ("rows", "cols", "count", "group_size")


def sweep(
    network: Network,
    designs: Mapping[str, jax.typing.ArrayLike | Mapping[str, jax.typing.ArrayLike]],
    *,
    pe: PE | None = None,
    dataflow: Dataflow = "is",
    technology: Technology = HOROWITZ_45NM,
    devices: list[jax.Device] | None = None,
) -> dict[str, np.ndarray]:
    """Evaluates N designs of a network at once, in float32, spread over the devices.

    Args:
      network: the layers.
      designs: by field of `Array` (widths as ``dram_bits.weights``), or ``group_size`` and
        ``budgets`` for group PEs, one value a design: shape (N,), ``budgets`` also (N, layers), or
        by layer name (N,) or (N, filters).
        What is left out is 32 rows, 32 columns and the defaults of `Array`. Every group is taken
        to fill its budget.
      pe: the kind of PE, `GroupPE` if ``budgets`` or ``group_size`` vary, else `BitParallel`.
      dataflow: of all designs.
      technology: energy per event.
      devices: over which designs are sharded; all by default.

    Returns:
      ``cycles``, ``utilization``, ``dram_bytes`` and ``energy_pj`` by component in ``array_pj``
      etc., each (N,).

    Raises:
      ValueError: an unknown field, different lengths, values that are not positive, budgets above
        what groups can hold, widths of registers by gates, or a layer's extent, rows, columns or a
        group size from 2**31 on.
    """
    values = {
        name: {layer: np.asarray(k) for layer, k in value.items()}
        if isinstance(value, Mapping)
        else np.asarray(value)
        for name, value in designs.items()
    }
    if pe is None:
        pe = GroupPE() if set(values) & set(_PE_FIELDS) else BitParallel()
    if technology.basis == "gates" and any(name.startswith("register_bits") for name in values):
        raise ValueError("energies by gates are of measured PEs with their registers: no widths")
    count = _check(network, values, pe)
    devices = jax.devices() if devices is None else devices
    spare = -count % len(devices)
    spread = NamedSharding(Mesh(np.array(devices), ("designs",)), PartitionSpec("designs"))

    def place(name: str, x: np.ndarray) -> jax.Array:
        return jax.device_put(
            _narrow(name, np.concatenate([x, x[:1].repeat(spare, axis=0)])), spread
        )

    placed = {
        name: jax.tree.map(functools.partial(place, name), value) for name, value in values.items()
    }
    # Numbers of the PE are constants of the program: energies by gates hold for some of them only.
    pe = jax.tree.map(lambda x: np.asarray(x).item(), pe)
    totals = _evaluator(network, dataflow, tuple(sorted(values)), pe)(placed, technology)
    return {name: np.asarray(total)[:count] for name, total in totals.items()}


def _narrow(name: str, x: np.ndarray) -> np.ndarray:
    """int32 for what is counted with, float32 for the rest; what int32 cannot hold is refused."""
    if name not in _INTEGERS:
        return x.astype(np.float32)
    if x.max() >= INT32_END:
        raise ValueError(f"{name} is {x.max()}; a sweep counts in 32 bits")
    return x.astype(np.int32)


def _check(network: Network, values: Mapping[str, Any], pe: PE) -> int:
    known = ARRAY_FIELDS + _WIDTHS + (_PE_FIELDS if isinstance(pe, GroupPE) else ())
    unknown = sorted(set(values) - set(known))
    if unknown or not values:
        raise ValueError(f"cannot sweep {unknown}; choose among {', '.join(known)}")
    count = {len(x) if x.ndim else 0 for x in jax.tree.leaves(values)}
    if len(count) != 1 or 0 in count:
        raise ValueError(f"every field needs one value a design, got lengths {sorted(count)}")
    if isinstance(values.get("budgets"), Mapping):
        check_names("budgets", values["budgets"], network)
    for name, x, inner in _fields(network, values):
        shapes = [(len(x),), *((len(x), n) for n in inner)]
        if x.shape not in shapes:
            raise ValueError(
                f"{name} has shape {x.shape}, expected {' or '.join(map(str, shapes))}"
            )
        least = x >= 0 if name == "activation_sram" else x > 0
        whole = not (name.endswith("bandwidth") or name in _WIDTHS)
        if not least.all() or (whole and (x != np.floor(x)).any()):
            raise ValueError(
                f"{name} must be positive whole numbers (bandwidths and widths: positive; "
                "activation_sram: 0 or more)"
            )
    if isinstance(pe, GroupPE) and "budgets" in values:
        capacity = GroupPE(group_size=1, encoding=pe.encoding, bits=pe.bits).max_budget
        capacity = capacity * np.asarray(values.get("group_size", pe.group_size))
        for k in jax.tree.leaves(values["budgets"]):
            if (np.moveaxis(k, 0, -1) > capacity).any():
                raise ValueError("budgets exceed the terms that a group can need")
    return count.pop()


def _fields(
    network: Network, values: Mapping[str, Any]
) -> Iterator[tuple[str, np.ndarray, list[int]]]:
    """Each array of the designs with its name and the second extents that it may have."""
    for name, value in values.items():
        if not isinstance(value, Mapping):
            yield name, value, [len(network)] if name == "budgets" else []
            continue
        if name != "budgets":
            raise ValueError(f"{name} is no field of layers; give one value a design")
        for layer in network:
            if (k := lookup(value, layer)) is not None:
                yield f"budgets of {layer.name}", k, [layer.filters]


def _levels(design: Mapping[str, Any]) -> dict[str, Widths]:
    """Fields of `Array` of the widths that a design has."""
    widths: dict[str, dict[str, Real]] = {}
    for name in set(_WIDTHS) & set(design):
        level, operand = name.split(".")
        widths.setdefault(level, {})[operand] = design[name]
    return {level: Widths(**bits) for level, bits in widths.items()}


@functools.lru_cache(maxsize=32)
def _evaluator(network: Network, dataflow: Dataflow, names: tuple[str, ...], pe: PE) -> Callable:
    def one(design: dict[str, jax.Array], technology: Technology) -> dict[str, Real]:
        given: dict[str, Any] = {n: design[n] for n in ARRAY_FIELDS if n in design}
        given = {"rows": 32, "cols": 32, **given, **_levels(design)}
        varied = pe
        if isinstance(pe, GroupPE) and "group_size" in design:
            varied = dataclasses.replace(pe, group_size=design["group_size"])
        array = Array(dataflow=dataflow, pe=varied, **given)
        report = evaluate(network, array, budgets=design.get("budgets"), technology=technology)
        busy = jnp.sum(report.utilization * report.cycles)
        return {
            "cycles": report.total_cycles,
            "utilization": busy / report.total_cycles,
            "dram_bytes": jnp.sum(report.dram_bytes),
            **{f"{name}_pj": energy.sum() for name, energy in report.energy_pj.items()},
        }

    return jax.jit(jax.vmap(one, in_axes=(0, None)))
