"""Time of one evaluation and of a sweep, on ResNet-18's layers at 224 x 224.

    python benchmarks/hwmodel_speed.py TOPOLOGY.csv [--designs 10000]

Median of warm calls; compilation is timed apart.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from stp_jax import hwmodel


def seconds(call: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("topology")
    parser.add_argument("--designs", type=int, default=10_000)
    args = parser.parse_args()
    network = hwmodel.read_scalesim_topology(args.topology)
    array = hwmodel.Array(rows=32, cols=32, pe=hwmodel.GroupPE(group_size=8))
    budgets = np.full(len(network), 8)
    eager = seconds(lambda: hwmodel.evaluate(network, array, budgets=budgets), 100)
    print(f"evaluate, exact: {1e3 * eager:.3f} ms")

    jitted = jax.jit(lambda k: hwmodel.evaluate(network, array, budgets=k))
    traced = jnp.asarray(budgets, jnp.float32)
    print(f"evaluate, compile: {seconds(lambda: jitted(traced), 1):.2f} s")
    print(f"evaluate, jitted: {1e3 * seconds(lambda: jitted(traced), 1000):.3f} ms")

    rng, n = np.random.default_rng(0), args.designs
    designs = {
        "rows": rng.integers(4, 129, n),
        "cols": rng.integers(4, 129, n),
        "group_size": rng.integers(4, 17, n),
        "budgets": rng.integers(1, 17, (n, len(network))),
        **{name: 1 << rng.integers(12, 21, n) for name in ("ifmap_sram", "filter_sram")},
    }
    print(f"sweep of {n}, compile: {seconds(lambda: hwmodel.sweep(network, designs), 1):.2f} s")
    print(f"sweep of {n}, warm: {seconds(lambda: hwmodel.sweep(network, designs), 10):.4f} s")

    smooth = {}
    for smoothing in (0.0, 0.01, 0.05):
        slow = hwmodel.Array(rows=32, cols=32, dram_bandwidth=16.0, pe=hwmodel.GroupPE(packed=True))
        report = hwmodel.evaluate(network, slow, budgets=budgets, smoothing=smoothing)
        smooth[smoothing] = (report.total_cycles, report.total_energy_pj)
        errors = [100 * (a / b - 1) for a, b in zip(smooth[smoothing], smooth[0.0], strict=True)]
        print(f"surrogate at {smoothing}: cycles {errors[0]:+.3f} %, energy {errors[1]:+.3f} %")


if __name__ == "__main__":
    main()
