"""Peak memory of projecting a tensor of 100 million weights, in bytes a weight.

    python benchmarks/terms_memory.py [--millions 100] [--budget 12]

Two views: what XLA plans for the compiled projection (temporaries and output, without the weights
themselves), and by how much a process's peak resident memory grows over what it held before, in a
subprocess of its own for each case.
"""

import argparse
import resource
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

from stp_jax import terms

ROW = 4096


def make_projection(case: str, budget: int):
    """The function to measure, of the weights alone."""
    if case == "project":
        return lambda w: terms.project(w, group_size=8, budget=budget, axis=0, limit=127)
    scale = jnp.full((1, ROW), 0.01, jnp.float32)
    return lambda w: terms.quantize_weights(w, scale, budget, axes=(0,))


def resident() -> int:
    """Bytes of this process in memory now."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


def measure(case: str, rows: int, budget: int) -> None:
    rng = np.random.default_rng(0)
    run = jax.jit(make_projection(case, budget))
    jax.block_until_ready(run(jnp.ones((8, ROW), jnp.float32)))  # what the first call ever takes
    w = jnp.asarray(rng.standard_normal((rows, ROW), np.float32))
    compiled = run.lower(w).compile()
    plan = compiled.memory_analysis()
    before = resident()
    out = jax.block_until_ready(compiled(w))
    grown = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    size = w.size
    print(
        f"  {case:8} {size / 1e6:.0f} M weights: XLA temporaries "
        f"{plan.temp_size_in_bytes / size:.2f} + output {plan.output_size_in_bytes / size:.2f}, "
        f"peak resident memory grew by {grown / size:.2f} bytes a weight ({out.dtype})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--millions", type=int, default=100)
    parser.add_argument("--budget", type=int, default=12)
    parser.add_argument("--case", choices=("project", "quantize"))
    args = parser.parse_args()
    if args.case:
        measure(args.case, args.millions * 1_000_000 // (8 * ROW) * 8, args.budget)
        return
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, budget {args.budget}")
    for case in ("project", "quantize"):
        subprocess.run([sys.executable, __file__, "--case", case, *sys.argv[1:]], check=True)


if __name__ == "__main__":
    main()
