"""Time to trace, lower and compile the train steps of a run, and to run them.

    python benchmarks/compile_time.py [--exp stp_resnet18] [--set key=value …] [--repeats 3]

The steps are those of the experiment's stages (`experiments.stages`), on its data. `rounded` is the
retraining step with a projection that only rounds: int8 fake quantization alone, without budgets.
`retrained` and `rounded` hold the float teacher of the distillation as well, as `float_retrained`
does. Steps take turns; medians of seconds of wall time, JAX's caches cleared before every trace,
nothing read from disk; ratios to the first step, of wall and of CPU time, since the second is the
steadier one on a busy machine. HLO: instructions as lowered, and as optimised. A call is one step.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console

import stp_jax
from experiments import configs, stages, train
from experiments.config import override
from experiments.context import Context, make_context, make_model, make_policy
from stp_jax import terms
from stp_jax.terms.method import ProjectionMethod

ROUNDED = "rounded"  # the name of the projection that does nothing else
STEPS = ("float", "float_retrained", ROUNDED, "guided", "retrained", "budgeted")


class Times(NamedTuple):
    """Seconds of one compilation."""

    trace: float
    lower: float
    backend: float  # XLA
    wall: float  # of all three
    cpu: float


class Program(NamedTuple):
    """A step with its first arguments."""

    step: Any
    state: train.TrainState
    batch: dict[str, jax.Array]
    teacher: nnx.State | None

    @property
    def arguments(self) -> tuple:
        """Of the step."""
        return self.state, self.batch, self.teacher


def round_groups(groups, budget, importance, encoding, bits, limit) -> jax.Array:
    """The projection that keeps every term, without a look at the budget."""
    return jnp.round(groups).astype(jnp.int32)


def quantized(context: Context, model: nnx.Module, method: str) -> nnx.Module:
    """The STP model at the budgets of its retraining, one for all layers."""
    policy = make_policy(context.config, model)
    rules = [dataclasses.replace(rule, method=method) for rule in policy.rules]
    model = stp_jax.quantize(model, stp_jax.Policy(rules))
    model.eval()
    stp_jax.calibrate(model, [batch["input"] for batch in context.calibration_batches()])
    stp_jax.set_budgets(model, round(context.config.terms_per_weight * context.config.group_size))
    return model


def programs(context: Context, names: list[str]) -> dict[str, Program]:
    """The steps by name."""
    c, float_model = context.config, make_model(context)
    stp = quantized(context, float_model, c.method)
    relaxed = nnx.clone(stp)
    stp_jax.relax_budgets(relaxed)
    terms.METHODS[ROUNDED] = ProjectionMethod(groups=round_groups)
    behind = {"epochs": 1, "lr": 0.01, "distill": c.distill}
    every = {
        "float": (float_model, {"epochs": 1, "lr": 0.01, "in_float": True}),
        "float_retrained": (float_model, {**behind, "in_float": True}),
        ROUNDED: (quantized(context, float_model, ROUNDED), behind),
        "guided": (stp, {"epochs": 1, "lr": 0.01, "guide_to": stp_jax.budgets(stp)}),
        "retrained": (stp, behind),
        "budgeted": (relaxed, {**behind, "price": stages.energy_price(context, stp)}),
    }
    batch = context.to_devices(next(context.train_iterator("float")))
    made = {}
    for name in names:
        model, options = every[name]
        teacher = nnx.clone(float_model)
        stage = train.Training(name, **options)
        _, state, step, taught = train.prepare_stage(context, nnx.clone(model), stage, teacher)
        made[name] = Program(step, state, batch, taught)
    return made


def compile_step(program: Program) -> tuple[Any, Times]:
    """The compiled step and how long its compilation took."""
    jax.clear_caches()
    clock, cpu = [time.perf_counter()], time.process_time()
    traced = program.step.trace(*program.arguments)
    clock.append(time.perf_counter())
    lowered = traced.lower()
    clock.append(time.perf_counter())
    compiled = lowered.compile()
    clock.append(time.perf_counter())
    cpu = time.process_time() - cpu
    return compiled, Times(*np.diff(clock).tolist(), clock[-1] - clock[0], cpu)


def instructions(hlo: str) -> int:
    """The instructions of a program, those of its called computations once."""
    return len(re.findall(r"^ +(?:ROOT )?%?[\w.-]+ = ", hlo, re.MULTILINE))


def run_time(compiled: Any, program: Program) -> float:
    """Seconds of one warm step; a step donates its state."""
    state = jax.block_until_ready(jax.tree.map(jnp.copy, program.state))
    start = time.perf_counter()
    jax.block_until_ready(compiled(state, *program.arguments[1:]))
    return time.perf_counter() - start


def measure(made: dict[str, Program], repeats: int, calls: int) -> None:
    """Compiles and runs the steps in turns and prints a row for each."""
    compilations, calling = collections.defaultdict(list), collections.defaultdict(list)
    compiled = {}
    compile_step(next(iter(made.values())))  # what is loaded once belongs to none of them
    for _ in range(repeats):
        for name, program in made.items():
            compiled[name], times = compile_step(program)
            compilations[name].append(times)
    for _ in range(1 + calls):
        for name, program in made.items():
            calling[name].append(run_time(compiled[name], program))
    print("step               trace   lower     XLA     all  ratio  CPU: s  ratio", end="")
    print("     HLO  optimised  call: s  ratio")
    base = next(iter(made))
    for name, program in made.items():
        # Ratios within a round compare neighbours in time.
        wall, cpu = np.median(np.divide(compilations[name], compilations[base]), axis=0)[3:]
        trace, lower, backend, total, busy = np.median(compilations[name], axis=0)
        before = instructions(program.step.lower(*program.arguments).as_text("hlo"))
        after = instructions(compiled[name].as_text())
        call = np.median(calling[name][1:])
        slower = np.median(np.divide(calling[name][1:], calling[base][1:]))
        print(
            f"{name:16} {trace:7.2f} {lower:7.2f} {backend:7.2f} {total:7.2f} {wall:6.2f} "
            f"{busy:7.2f} {cpu:6.2f} {before:7} {after:10} {call:8.4f} {slower:6.2f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--exp", default="stp_resnet18")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--steps", nargs="+", default=list(STEPS), choices=STEPS)
    parser.add_argument("--repeats", type=int, default=3, help="compilations of each step")
    parser.add_argument("--calls", type=int, default=15, help="warm calls of each step")
    options = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    config = override(configs.load(options.exp).CONFIG, options.set)
    with tempfile.TemporaryDirectory() as folder:
        context = make_context(config, Path(folder), Console(quiet=True))
        made = programs(context, options.steps)
        print(f"{options.exp}, batch {config.batch_size}, load {os.getloadavg()[0]:.1f}")
        measure(made, options.repeats, options.calls)
    print(f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, jax {jax.__version__}")


if __name__ == "__main__":
    main()
