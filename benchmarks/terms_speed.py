"""Time of the projection, and of ResNet-18's train step with it, as ratios from one run.

    python benchmarks/terms_speed.py [--batch 64] [--rounds 7] [--only step]

Steps of the variants take turns, so that a ratio compares neighbours in time; medians over rounds,
of wall and of CPU time. Needs qwix (the ``dev`` extra) for the comparison; without it those rows
are left out.
"""

import argparse
import importlib.util
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import stp_jax
from stp_jax import models, terms

BUDGET = 12  # terms per group of 8


def machine() -> str:
    device = jax.devices()[0].device_kind
    return f"{device}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, jax {jax.__version__}"


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def clocks() -> np.ndarray:
    """Wall and CPU time; on a busy machine the second is the steadier one."""
    return np.array([time.perf_counter(), time.process_time()])


def time_projection(rounds: int) -> None:
    """A 512 × 512 × 3 × 3 kernel, groups of 8 along the input channels, warm."""
    w = jnp.asarray(np.random.default_rng(0).normal(0, 32, (3, 3, 512, 512)), jnp.float32)
    options = {"group_size": 8, "axis": 2}
    print(f"project, 512x512x3x3, g=8, k={BUDGET}")
    for method in terms.METHODS:
        for limit in (None, 127):

            def call(method=method, limit=limit) -> jax.Array:
                return terms.project(w, budget=BUDGET, method=method, limit=limit, **options)

            call()
            median = statistics.median(seconds(call) for _ in range(10 * rounds))
            print(f"  {method:8} limit {limit or 128}: {1e3 * median:6.1f} ms")
    compiled = terms.projection._project._cache_size()
    for budget in range(1, 13):
        terms.project(w, budget=budget, **options)
    print(
        f"  compilations for 12 more budgets: {terms.projection._project._cache_size() - compiled}"
    )


def make_step(model: nnx.Module) -> tuple[Callable, tuple]:
    """A train step (SGD, momentum) as a pure function of its state, and its first state."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    tx = optax.sgd(0.01, momentum=0.9, nesterov=True)

    def step(params, rest, opt_state, image, label):
        def loss(params):
            model = nnx.merge(graphdef, params, rest, copy=True)
            logits = model(image)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, label)
            return jnp.mean(losses), nnx.state(model, nnx.Not(nnx.Param))

        grads, new_rest = jax.grad(loss, has_aux=True)(params)
        updates, new_opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), new_rest, new_opt_state

    return jax.jit(step), (params, rest, tx.init(params))


def stp_model(float_model: nnx.Module, image: jax.Array, activations: str) -> nnx.Module:
    rule = stp_jax.Rule(path=".*", budget=BUDGET, activations=activations)
    model = stp_jax.quantize(float_model, stp_jax.Policy([rule]))
    if activations != "none":
        model.eval()
        stp_jax.calibrate(model, [image[:8]])
        model.train()
    return model


def qwix_model(float_model: nnx.Module, image: jax.Array, act_qtype: Any) -> nnx.Module:
    import qwix

    rule = qwix.QtRule(module_path=".*", weight_qtype=jnp.int8, act_qtype=act_qtype)
    return qwix.quantize_model(nnx.clone(float_model), qwix.QtProvider([rule]), image[:8])


def time_steps(batch: int, rounds: int) -> None:
    rng = np.random.default_rng(0)
    image = jnp.asarray(rng.normal(size=(batch, 32, 32, 3)), jnp.float32)
    label = jnp.asarray(rng.integers(0, 10, batch), jnp.int32)
    float_model = models.create("resnet18", num_classes=10, stem="small", rngs=nnx.Rngs(0))
    variants = {
        "float": lambda: nnx.clone(float_model),
        "STP weights": lambda: stp_model(float_model, image, "none"),
        "STP weights, int8 activations": lambda: stp_model(float_model, image, "learned"),
    }
    if importlib.util.find_spec("qwix"):
        variants |= {
            "Qwix int8 weights": lambda: qwix_model(float_model, image, None),
            "Qwix int8 weights, activations": lambda: qwix_model(float_model, image, jnp.int8),
        }
    print(f"train step, ResNet-18 (small-image stem), batch {batch}")
    steps, states, compiling = {}, {}, {}
    for name, build in variants.items():
        model = build()
        if not steps:  # what a first compilation takes once is no variant's
            make_step(model)[0].lower(*make_step(model)[1], image[:1], label[:1]).compile()
        step, state = make_step(model)
        start = clocks()
        steps[name] = step.lower(*state, image, label).compile()
        compiling[name] = clocks() - start
        states[name] = jax.block_until_ready(steps[name](*state, image, label))
    times: dict[str, list[np.ndarray]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, step in steps.items():
            start = clocks()
            jax.block_until_ready(step(*states[name], image, label))
            times[name].append(clocks() - start)
    print(f"  {'':31} step: s, ratio of wall, of CPU time   compile: s, the same ratios")
    for name in variants:
        ratios = np.median(np.divide(times[name], times["float"]), axis=0)
        compile_ratios = compiling[name] / compiling["float"]
        median = np.median(times[name], axis=0)[0]
        print(
            f"  {name:31} {median:8.3f} {ratios[0]:6.2f} {ratios[1]:6.2f}"
            f"   {compiling[name][0]:14.1f} {compile_ratios[0]:6.2f} {compile_ratios[1]:6.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=("project", "step"))
    args = parser.parse_args()
    print(machine())
    if args.only != "step":
        time_projection(args.rounds)
    if args.only != "project":
        time_steps(args.batch, args.rounds)
    print(machine())


if __name__ == "__main__":
    main()
