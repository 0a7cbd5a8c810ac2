"""Cycles and SRAM accesses of SCALE-Sim 3.0.0 for a topology, without its memory simulation.

In an environment of its own, since SCALE-Sim 3.0.0 fails with numpy 2.4:

    python3 -m venv scalesim && scalesim/bin/pip install scalesim==3.0.0 numpy==2.2.6
    scalesim/bin/python benchmarks/scalesim_counts.py TOPOLOGY.csv ws ws.csv
    python benchmarks/hwmodel_scalesim.py TOPOLOGY.csv ws.csv --dataflow ws

A whole simulation of ResNet-18 takes 18 to 48 minutes; its compute systems alone, which lay out
every operand's demand cycle by cycle, take a minute. The rows of a demand matrix are the cycles.
"""

import csv
import sys

import numpy as np
from scalesim.compute.systolic_compute_is import systolic_compute_is
from scalesim.compute.systolic_compute_os import systolic_compute_os
from scalesim.compute.systolic_compute_ws import systolic_compute_ws

SYSTEMS = {"is": systolic_compute_is, "os": systolic_compute_os, "ws": systolic_compute_ws}
ROWS = COLS = 32


class _Config:
    """What the compute systems ask of SCALE-Sim's configuration."""

    sparsity_support = False
    sparsity_optimized_mapping = False

    def get_array_dims(self) -> tuple[int, int]:
        return ROWS, COLS


def count(dataflow: str, pixels: int, window: int, filters: int) -> list[int]:
    """Cycles, ifmap reads, filter reads, ofmap writes of one layer; addresses do not matter."""
    operands = {
        "ifmap_op_mat": np.zeros((pixels, window)),
        "filter_op_mat": np.zeros((window, filters)),
        "ofmap_op_mat": np.zeros((pixels, filters)),
    }
    if dataflow == "ws":
        operands["ifmap_op_mat_original"] = operands["ifmap_op_mat"]
        operands["sparsity_filter_array"] = np.zeros((1, 1))
        operands |= {"sparsity_ratio_N": 1, "sparsity_ratio_M": 1}
    system = SYSTEMS[dataflow]()
    system.set_params(config_obj=_Config(), **operands)
    system.create_demand_matrices()
    cycles = len(system.ifmap_demand_matrix)
    return [cycles, system.ifmap_reads, system.filter_reads, system.ofmap_writes]


def main(topology: str, dataflow: str, out: str) -> None:
    with open(topology) as source, open(out, "w") as target:
        writer = csv.writer(target)
        names = ["closed_form", "sram_ifmap_rd", "sram_filter_rd", "sram_ofmap_wr"]
        writer.writerow(["layer", *names])
        for line in list(csv.reader(source))[1:]:
            if not line or not line[0].strip():
                continue
            height, width, kernel_h, kernel_w, channels, filters, stride = map(int, line[1:8])
            pixels = -(-(height - kernel_h + stride) // stride)  # as its topology_utils rounds
            pixels *= -(-(width - kernel_w + stride) // stride)
            window = kernel_h * kernel_w * channels
            writer.writerow([line[0].strip(), *count(dataflow, pixels, window, filters)])


if __name__ == "__main__":
    main(*sys.argv[1:4])
