"""Memory and compilations of a long run: a tiny model, thousands of steps, all stages' machinery.

    python benchmarks/long_run.py [--steps 10000]

Trains the smallest perceptron on the handwritten digits, guided, with distillation and budgets that
anneal, checkpoints and logs as every run does. Prints resident memory at every tenth of the run and
what was compiled after the first epoch. Exit status 1 if memory in the second half grows by more
than 1 % and 8 MB, or anything is compiled after the first epoch.
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

import stp_jax
from experiments import configs, train
from experiments.config import override
from experiments.context import make_context, make_model, make_policy

COMPILE = "/jax/core/compile/backend_compile_duration"
SETTINGS = ["model_options.hidden=8", "batch_size=32", "log_every=20", "checkpoint_every=40"]


def resident() -> float:
    """Megabytes of this process in memory now."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize() / 1e6


class Watch:
    """Stands between training and its data: notes memory and compilations as batches pass."""

    def __init__(self, batches, every: int, epoch: int):
        self._batches, self._every, self._epoch = batches, every, epoch
        self.taken, self.compiled, self.memory = 0, 0, []
        self.compiled_between = 0  # up to the last batch, without what ends the stage
        jax.monitoring.register_event_duration_secs_listener(self._note)

    def _note(self, event: str, duration: float, **_: object) -> None:
        self.compiled += event == COMPILE and self.taken > self._epoch

    def __next__(self):
        self.taken += 1
        self.compiled_between = self.compiled
        if self.taken % self._every == 0:
            self.memory.append(resident())
            print(f"step {self.taken}: {self.memory[-1]:.1f} MB", flush=True)
        return next(self._batches)

    def __getattr__(self, name: str):
        return getattr(self._batches, name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10_000)
    steps = parser.parse_args().steps
    config = override(configs.load("stp_mlp").CONFIG, SETTINGS)
    with tempfile.TemporaryDirectory() as folder:
        context = make_context(config, Path(folder), Console(quiet=True))
        teacher = make_model(context)
        model = stp_jax.quantize(teacher, make_policy(config, teacher))
        stp_jax.calibrate(model, [b["input"] for b in context.calibration_batches()])
        targets = dict.fromkeys(stp_jax.budgets(model), 4)
        epochs = steps / context.steps_per_epoch
        stage = train.Training("guided", epochs, 0.01, distill=0.5, guide_to=targets)
        watch = Watch(context.train_iterator(1), max(1, steps // 10), context.steps_per_epoch)
        object.__setattr__(context, "train_iterator", lambda _: watch)
        began = time.monotonic()
        train.train_stage(context, model, stage, teacher)
        seconds = time.monotonic() - began
        lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
        budgets = {json.loads(line)["terms_per_weight"] for line in lines}
    half, end = watch.memory[len(watch.memory) // 2], watch.memory[-1]
    grown = end - half
    print(f"{watch.taken} steps in {seconds:.0f} s, {len(budgets)} different budgets logged")
    print(f"second half: {grown:+.1f} MB ({100 * grown / half:+.2f} %)")
    print(f"compiled after the first epoch: {watch.compiled_between}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(f"peak {peak:.1f} MB, median {np.median(watch.memory):.1f} MB")
    if watch.compiled_between or grown > max(0.01 * half, 8.0):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
