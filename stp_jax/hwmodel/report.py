"""The report of an evaluation, by layer and in total, and the computational saving."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pandas as pd

from stp_jax.hwmodel.network import Network
from stp_jax.hwmodel.numbers import EXACT_END, Real, Vector
from stp_jax.hwmodel.technology import Basis


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Vectors over the layers of ``network``: NumPy, or JAX where the evaluation was traced.

    Under ``vmap`` the layers are the last axis; totals sum over that axis alone.

    Attributes:
      budgets: k, terms a group; where they are by filter, their mean over a layer's filters. None
        for PEs without budgets.
      cycles: with stalls; integers unless a bandwidth or a budget is fractional.
      stall_cycles: those that wait for memory.
      utilization: fraction of PE-cycles that hold work.
      operations: ``macs`` of the layer and ``terms`` that were really added.
      accesses: words by memory and operand: SRAM and DRAM reads and writes, ``sram_psum_read``;
        ``sram_activation_read`` and ``sram_activation_write`` of outputs that stay on the chip.
      dram_bytes: bytes to and from DRAM.
      dram_operand_bytes: the same by operand: ``ifmap``, ``filter``, ``ofmap``, ``psum``.
      sram_bytes: bytes through the port of each buffer, ``ifmap``, ``filter``, ``ofmap`` and
        ``activation``.
      energy_pj: ``array`` (shift, multiply and add: what the computational saving compares),
        ``encoder``, ``registers`` (operands and sums inside the array), ``sram``, ``dram``.
      select_pj: an estimate of what selecting one of a group's activations takes, for `GroupPE`,
        else 0; in none of the components.
      node_nm: process node of the energies.
      basis: ``table`` if arithmetic, registers and encoders were priced by operation, ``gates`` if
        by what whole PEs took on their netlists; ``array`` is then selection, shift, addition,
        registers and clock together, and ``registers`` is 0.
    """

    network: Network = dataclasses.field(metadata={"static": True})
    node_nm: float = dataclasses.field(metadata={"static": True})
    basis: Basis = dataclasses.field(metadata={"static": True})
    budgets: Vector | None
    cycles: Vector
    stall_cycles: Vector
    utilization: Vector
    operations: dict[str, Vector]
    accesses: dict[str, Vector]
    dram_bytes: Vector
    dram_operand_bytes: dict[str, Vector]
    sram_bytes: dict[str, Vector]
    energy_pj: dict[str, Vector]
    select_pj: Vector

    @property
    def total_cycles(self) -> Real:
        """Cycles of all layers, one after the other."""
        return self.cycles.sum(axis=-1)

    @property
    def compute_cycles(self) -> Vector:
        """Cycles without stalls."""
        return self.cycles - self.stall_cycles

    @property
    def total_energy_pj(self) -> Real:
        """Energy of all components and layers."""
        return sum(energy.sum(axis=-1) for energy in self.energy_pj.values())

    @property
    def terms_per_mac(self) -> Real:
        """Terms added per multiply-accumulate; 1 for a multiplier.

        Each weight counts as often as it is used, so that this is not the mean over weights.
        """
        return self.operations["terms"].sum(axis=-1) / self.operations["macs"].sum(axis=-1)

    @property
    def priced(self) -> str:
        """How energies were priced, for titles: ``45 nm, by gates``."""
        return f"{self.node_nm:g} nm, by {'gates' if self.basis == 'gates' else 'the table'}"

    def rounded(self) -> Report:
        """Concrete whole numbers as int64 where float64 holds them exactly, below 2**53.

        Energies and fractions stay real.
        """

        def whole(x: Vector) -> Vector:
            if not isinstance(x, np.ndarray) or not (np.abs(x) < EXACT_END).all():
                return x
            return x.astype(np.int64) if (x == np.rint(x)).all() else x

        names = ("budgets", "cycles", "stall_cycles", "operations", "accesses")
        transfers = ("dram_bytes", "dram_operand_bytes", "sram_bytes")
        counts = {name: getattr(self, name) for name in (*names, *transfers)}
        return dataclasses.replace(self, **jax.tree.map(whole, counts))

    def to_pandas(self) -> pd.DataFrame:
        """One row a layer; columns carry their unit."""
        columns = {
            "kind": [layer.kind for layer in self.network],
            **{name: self.network.extents(name) for name in ("K", "P", "M", "groups")},
            **({} if self.budgets is None else {"budget": np.asarray(self.budgets)}),
            "cycles": np.asarray(self.cycles),
            "stall_cycles": np.asarray(self.stall_cycles),
            "utilization": np.asarray(self.utilization),
            **{name: np.asarray(n) for name, n in self.operations.items()},
            **{name: np.asarray(n) for name, n in self.accesses.items()},
            "dram_bytes": np.asarray(self.dram_bytes),
            **{f"dram_{name}_bytes": np.asarray(n) for name, n in self.dram_operand_bytes.items()},
            **{f"{name}_sram_bytes": np.asarray(n) for name, n in self.sram_bytes.items()},
            **{f"{name}_pj": np.asarray(n) for name, n in self.energy_pj.items()},
        }
        return pd.DataFrame(columns, index=pd.Index(self.network.names, name="layer"))

    def table(self) -> str:
        """The main figures as text: work and cycles, then energies in µJ, by layer and in total.

        Long names of layers lose their beginning, so that the text fits 80 columns.
        """
        frame = self.to_pandas().rename_axis(None)
        shown = frame[["K", "P", "M"]].astype(object)
        if "budget" in frame:
            shown["k"] = frame["budget"].map("{:.4g}".format)
            shown["terms/MAC"] = (frame["terms"] / frame["macs"]).map("{:.2f}".format)
        shown["cycles"] = frame["cycles"]
        shown["util %"] = (100 * frame["utilization"]).map("{:.1f}".format)
        total: dict[str, object] = dict.fromkeys(shown.columns, "")
        busy = (frame["utilization"] * frame["cycles"]).sum() / frame["cycles"].sum()
        total |= {"cycles": frame["cycles"].sum(), "util %": f"{100 * busy:.1f}"}
        if "budget" in frame:
            total["terms/MAC"] = f"{self.terms_per_mac:.2f}"
        shown = shown.astype(object)  # the total row holds blanks
        shown.loc["total"] = total
        energies = frame[[f"{name}_pj" for name in self.energy_pj]] * 1e-6
        energies.columns = pd.Index([f"{name} µJ" for name in self.energy_pj])
        energies.loc["total"] = energies.sum()
        return f"{_fitting(shown)}\n\n{_fitting(energies.map('{:.3f}'.format))}"


def _fitting(frame: pd.DataFrame) -> str:
    """The table as text of 80 columns, if shortened names of rows can do that."""
    others = len(frame.to_string().partition("\n")[0]) - max(map(len, frame.index))
    room = max(8, 80 - others)
    short = [name if len(name) <= room else f"…{name[1 - room :]}" for name in frame.index]
    return frame.set_axis(short).to_string()


def computational_saving(
    baseline: Report, ours: Report, *, encoder: bool = False, select: bool = False
) -> Real:
    """Array energy of ``baseline`` divided by that of ``ours``: the paper's headline figure.

    ``baseline`` is the int8 bit-parallel input-stationary array, ``ours`` the same network on an
    array of the same throughput class. Memory and registers are not part of it; the encoder is
    only with ``encoder=True``, and both figures should be reported. ``select=True`` adds the
    estimate of selecting activations (``select_pj``).

    Same throughput class means the same number of additions a cycle, that is of PEs: a
    `BitParallel` PE adds one product a cycle, a `GroupPE` one term, and PEs of several lanes belong
    to a `DotProduct`. At k = g, one term per weight, `BitParallel` and `GroupPE` complete one
    multiplication a cycle, and the synthesised areas are equal within 2 % at g = 8 (1014 to
    1030 µm²), so that equal PEs, equal area and equal throughput at one term per weight coincide.
    (Equal peak throughput at another budget means R*C*k/g PEs; `compare` offers it.) Array energy
    depends on the work only, not on the number of PEs, so the ratio is the same in each reading;
    cycles are not. By gates `BitParallel` is a simple PE; `int8_baseline` gives the strongest int8
    PE of the class that was measured.

    Raises:
      ValueError: the networks, the process nodes or what energies are based on differ.
    """
    if baseline.network.layers != ours.network.layers:
        raise ValueError("the two reports are of different networks")
    if baseline.node_nm != ours.node_nm:
        raise ValueError(
            f"the two reports are at {baseline.node_nm:g} nm and {ours.node_nm:g} nm; energies of "
            "different nodes must not be mixed"
        )
    if baseline.basis != ours.basis:
        raise ValueError(
            f"the baseline is by {baseline.basis}, ours by {ours.basis}; evaluate both with one "
            "technology"
        )
    own = ours.energy_pj["array"] + (ours.energy_pj["encoder"] if encoder else 0.0)
    own = own + (ours.select_pj if select else 0.0)
    return baseline.energy_pj["array"].sum(axis=-1) / own.sum(axis=-1)
