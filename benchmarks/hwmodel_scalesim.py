"""Compares the model with SCALE-Sim's output for the same topology.

python benchmarks/hwmodel_scalesim.py TOPOLOGY.csv SCALESIM.csv [--rows 32 --cols 32]

SCALESIM.csv has a row a layer with columns ``closed_form`` (SCALE-Sim's cycles plus the one that
its count leaves out), and any of ``sram_ifmap_rd``, ``sram_filter_rd``, ``sram_ofmap_wr``,
``dram_filter_rd``, ``dram_ifmap_rd``; `scalesim_counts.py` beside this file makes one.
"""

import argparse

import numpy as np
import pandas as pd

from stp_jax import hwmodel

COLUMNS = {
    "sram_ifmap_rd": "sram_ifmap_read",
    "sram_filter_rd": "sram_filter_read",
    "sram_ofmap_wr": "sram_ofmap_write",
    "dram_filter_rd": "dram_filter_read",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("topology")
    parser.add_argument("scalesim")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--cols", type=int, default=32)
    parser.add_argument("--dataflow", default="is")
    args = parser.parse_args()
    network = hwmodel.read_scalesim_topology(args.topology)
    array = hwmodel.Array(rows=args.rows, cols=args.cols, dataflow=args.dataflow)
    report = hwmodel.evaluate(network, array)
    oracle = pd.read_csv(args.scalesim)
    ours = {"closed_form": report.cycles}
    ours |= {k: report.accesses[name] for k, name in COLUMNS.items() if k in oracle}
    if args.dataflow == "os" and "sram_ofmap_wr" in oracle:
        # Its output-stationary system adds rows + columns of the array to each fold's outputs.
        folds = [-(-layer.P // args.rows) * -(-layer.M // args.cols) for layer in network]
        oracle["sram_ofmap_wr"] -= np.array(folds) * (args.rows + args.cols)
        print(f"sram_ofmap_wr without SCALE-Sim's {args.rows + args.cols} more a fold:")
    for column, values in ours.items():
        equal = np.asarray(values) == oracle[column].to_numpy()
        print(f"{column}: {equal.sum()} of {len(equal)} layers equal")
    if "dram_ifmap_rd" in oracle:
        ratio = report.accesses["dram_ifmap_read"] / oracle["dram_ifmap_rd"].to_numpy()
        print(f"dram_ifmap_rd: model / SCALE-Sim from {ratio.min():.3f} to {ratio.max():.3f}")


if __name__ == "__main__":
    main()
