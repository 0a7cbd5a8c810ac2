"""The stages of a run: float → int8 → guided → projected → retrained → integers, as data.

They follow structured term pruning (Huang et al., IEEE TCAD 42(1), 2023): weights are guided
towards few power-of-two terms, projected onto group budgets, and retrained behind the projection.

A stage is an entry of `STAGES`: a function of the run's state. Which stages a run has, and in which
order, says the key ``stages`` of its configuration; `train` runs them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import stp_jax
from experiments.config import Config, ConfigError
from experiments.context import Context, filters, make_model, make_policy, read_budgets
from experiments.runtime import sharding
from experiments.runtime.log import write_json
from experiments.runtime.processes import from_first, is_first
from experiments.train import Training, evaluate, make_loss, reestimate_batch_norm, train_stage
from stp_jax import export, hwmodel
from stp_jax.terms import round_budgets

# --- The run --------------------------------------------------------------------------------------


@dataclasses.dataclass
class Run:
    """The state of a run, which stages read and change."""

    context: Context
    record: Record
    model: nnx.Module  # what the last stage left
    teacher: nnx.Module | None = None  # the float model, whose soft labels later stages learn
    # Layer → terms per group, one number or an array by filter.
    budgets: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def config(self) -> Config:
        """The run's configuration."""
        return self.context.config

    def train(self, training: Training) -> None:
        """Trains the model for a stage, or as much of it as is not in its checkpoints yet."""
        self.model = train_stage(self.context, self.model, training, self.teacher)

    def gather(self) -> None:
        """Brings the model whole into this process, after work on batches of all processes."""
        nnx.update(self.model, sharding.gather(nnx.state(self.model)))


class Outcome(NamedTuple):
    """Outcome of a run: accuracies by stage in percent, and the final model."""

    validation: dict[str, float]  # empty if no examples are held out
    test: dict[str, float]  # empty unless they were read
    budgets: dict[str, Any]
    model: nnx.Module  # what the last stage left, in evaluation mode


def train(context: Context) -> Outcome:
    """Runs all stages; what an earlier, interrupted call finished is read, not repeated."""
    record = Record(context)
    run = Run(context, record, make_model(context))
    reported = {}
    for name in context.config.stages:
        model = STAGES[name].action(run)
        measured = context.config.measured or context.config.stages
        if model is not None and name in measured:
            reported[name] = nnx.clone(model)  # later stages change their model in place
            record.accuracy("validation", name, model)
    # The test examples are read once, when there is nothing left to choose.
    for name, model in reported.items():
        record.accuracy("test", name, model)
    values = record.values
    return Outcome(
        values["validation"],
        values["test"],
        run.budgets,
        run.model,
    )


# --- The stages -----------------------------------------------------------------------------------
# Each changes the run and returns the model whose accuracy is to be reported, or None.


class IntegerModel(nnx.Module):
    """An integer network as a model that takes and returns floats."""

    def __init__(self, network: stp_jax.IntegerNetwork):
        """Has no variables: the network's integers are constants."""
        self.network = nnx.static(network)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of a batch."""
        network = self.network
        return network.dequantize(network(network.quantize(x)))


def float_stage(run: Run) -> nnx.Module:
    """The baseline, and the teacher of what follows."""
    c = run.config
    run.train(Training("float", c.float_epochs, c.float_lr, "float_lr", in_float=True))
    run.model.eval()
    if is_first():
        export.save_variables(run.model, run.context.workdir / "float.safetensors")
    run.teacher = run.model
    return run.model


def float_retrained_stage(run: Run) -> nnx.Module:
    """The float model trained on by the recipe of the retraining: the baseline of equal steps."""
    c = run.config
    epochs, lr = c.retrain_epochs, c.retrain_lr
    run.train(Training("float_retrained", epochs, lr, in_float=True, distill=c.distill))
    return run.model


def int8_stage(run: Run) -> nnx.Module:
    """Every term kept, inputs calibrated. From here on the model is an STP model."""
    c, example = run.config, run.context.dataset.example_input()
    if c.fold_batch_norm:
        run.model = stp_jax.fold_batch_norm(run.model, example)
    run.model = stp_jax.quantize(run.model, make_policy(c, run.model))
    stp_jax.calibrate(run.model, (b["input"] for b in run.context.calibration_batches()))
    run.gather()
    if c.integer_network:
        stp_jax.integer_network(run.model, example)  # which says now what has no integer form
    return run.model


def allocated_stage(run: Run) -> None:
    """Budgets are chosen, and the weights' scales searched at them; every term is still kept."""
    stored = run.record.value(
        "budgets", lambda: jax.tree.map(plain, choose_budgets(run.context, run.model))
    )
    run.budgets = {path: k if isinstance(k, int) else np.asarray(k) for path, k in stored.items()}
    all_terms = stp_jax.budgets(run.model)
    stp_jax.set_budgets(run.model, run.budgets)
    stp_jax.search_weight_scales(run.model, slack=run.config.scale_slack)
    stp_jax.set_budgets(run.model, all_terms)


def guided_stage(run: Run) -> None:
    """Int8 weights are pulled towards few terms, as budgets fall to their layer's."""
    c = run.config
    run.train(Training("guided", c.guided_epochs, c.guided_lr, "guided_lr", guide_to=run.budgets))


_FITS = {"compensate": stp_jax.compensate, "reconstruct": stp_jax.reconstruct}


def projected_stage(run: Run) -> nnx.Module:
    """Each group keeps its terms, and no weight is trained."""
    fit = run.config.fit
    if fit == "none":
        stp_jax.set_budgets(run.model, run.budgets)
    else:
        _FITS[fit](run.model, whole_inputs(run.context), run.budgets)
    reestimate_batch_norm(run.context, run.model)
    return run.model


def budgeted_stage(run: Run) -> None:
    """Weights and budgets are retrained together, with the array's energy in the loss.

    Budgets start from the given ones and end as whole numbers that take no more energy.
    """
    c, example = run.config, run.context.dataset.example_input()
    if not c.budgeted_epochs:
        return
    costs = stp_jax.term_costs(run.model, example, per="energy", array=_array(c, run.model))
    price = energy_price(run.context, run.model)
    stp_jax.relax_budgets(run.model)
    run.train(Training("budgeted", c.budgeted_epochs, c.retrain_lr, distill=c.distill, price=price))
    total = sum(costs[path] * k for path, k in stp_jax.mean_budgets(run.budgets).items())
    relaxed = stp_jax.budgets(run.model)
    run.budgets = round_budgets(relaxed, costs, total, largest=c.max_budget, step=c.budget_step)
    stp_jax.set_budgets(run.model, run.budgets)
    reestimate_batch_norm(run.context, run.model)


def retrained_stage(run: Run) -> nnx.Module:
    """Training behind the projection, with the float model's soft labels."""
    c = run.config
    run.train(Training("retrained", c.retrain_epochs, c.retrain_lr, distill=c.distill))
    return run.model


def integer_stage(run: Run) -> nnx.Module | None:
    """The accelerator's own arithmetic, inside the layers or from input to logits."""
    if not run.config.check_integers:
        return None
    if not run.config.integer_network:
        return stp_jax.integer_model(run.model)
    example = run.context.dataset.example_input()
    return IntegerModel(stp_jax.integer_network(run.model, example))


class Stage(NamedTuple):
    """A stage of a run."""

    action: Callable[[Run], nnx.Module | None]  # returns the model to report, if any
    needs: tuple[str, ...] = ()  # stages that must come before it


STAGES: dict[str, Stage] = {
    "float": Stage(float_stage),
    "float_retrained": Stage(float_retrained_stage, needs=("float",)),
    "int8": Stage(int8_stage, needs=("float",)),
    "allocated": Stage(allocated_stage, needs=("int8",)),
    "guided": Stage(guided_stage, needs=("allocated",)),
    "projected": Stage(projected_stage, needs=("allocated",)),
    "budgeted": Stage(budgeted_stage, needs=("projected",)),
    "retrained": Stage(retrained_stage, needs=("int8",)),
    "integer": Stage(integer_stage, needs=("int8",)),
}


def check_stages(config: Config) -> None:
    """Raises ConfigError unless all stages exist, once each, behind those that they need."""
    before: set[str] = set()
    for name in config.stages:
        if name not in STAGES:
            raise ConfigError(f"stages: there is no {name!r}; there are {', '.join(STAGES)}")
        if name in before:
            raise ConfigError(f"stages: {name} stands twice")
        missing = [need for need in STAGES[name].needs if need not in before]
        if missing:
            raise ConfigError(f"stages: {name} needs {', '.join(missing)} before it")
        before.add(name)
    if "allocated" not in before:
        raise ConfigError("stages: a run needs float, int8 and allocated, to report on budgets")


# --- Budgets --------------------------------------------------------------------------------------


def plain(budget: Any) -> int | list[int]:
    """A budget by layer or by filter as JSON has it."""
    return np.asarray(budget).tolist()


def choose_budgets(context: Context, model: nnx.Module) -> dict[str, Any]:
    """Terms per group of each layer: by hand, uniform, or allocated by measured sensitivity.

    Raises:
      ConfigError: budgets by hand that do not fit the model's layers.
    """
    c = context.config
    layers = list(stp_jax.budgets(model))
    if c.budgets is not None:
        return read_budgets(c, filters(model))
    if c.budget is not None:
        return dict.fromkeys(layers, c.budget)
    costs = run_costs(context, model)
    options: dict[str, Any] = {"costs": costs, "by": c.budgets_by, "step": c.budget_step}
    if c.error_weighting == "outputs":
        inputs = [batch["input"] for batch in context.calibration_batches()]
        return stp_jax.allocate_by_divergence(model, c.terms_per_weight, inputs, **options)
    if c.error_weighting == "gradients":
        options["importance"] = squared_gradients(context, model)
    return stp_jax.allocate(model, c.terms_per_weight, **options)


def run_costs(context: Context, model: nnx.Module) -> dict[str, float]:
    """What one more term in each group of a layer costs of the resource that is allocated."""
    c, example = context.config, context.dataset.example_input()
    return stp_jax.term_costs(model, example, per=c.allocate_for, array=_array(c, model))


def whole_inputs(context: Context) -> list[jax.Array]:
    """The calibration examples, whole in every process: for what sees all of them at once."""
    return [sharding.gather(batch["input"]) for batch in context.calibration_batches()]


def _array(config: Config, model: nnx.Module) -> hwmodel.Array:
    """The array of group PEs that runs the model."""
    return hwmodel.Array(rows=config.rows, cols=config.cols, pe=stp_jax.group_pe(model))


def energy_price(context: Context, model: nnx.Module) -> Callable[[nnx.Module], tuple]:
    """Energy term of the loss for relaxed budgets: the square of their relative excess.

    The energy is the array's, all slots full, as the accelerator model counts it; what it may be is
    what the whole budgets that the model holds now take.
    """
    c = context.config
    network, array = hwmodel.trace(model, context.dataset.example_input()), _array(c, model)

    @jax.jit
    def energy(budgets: Mapping[str, jax.Array]) -> jax.Array:
        report = hwmodel.evaluate(network, array, budgets=budgets, smoothing=0.01)
        return jnp.sum(report.energy_pj["array"])

    allowed = energy({k: jnp.float32(v) for k, v in stp_jax.budgets(model).items()})

    def price(model: nnx.Module) -> tuple[jax.Array, dict[str, jax.Array]]:
        share = energy(stp_jax.relaxed_budgets(model)) / allowed
        return c.energy_weight * (share - 1.0) ** 2, {"energy_of_allowed": share}

    return price


def squared_gradients(context: Context, model: nnx.Module) -> dict[str, jax.Array]:
    """Squared gradients of the training loss on the calibration examples."""
    plain = make_loss(context.config, distill=0.0)

    def loss(model: Any, batch: dict[str, jax.Array]) -> jax.Array:
        return plain(model(batch["input"]), batch["label"], None)

    return sharding.gather(stp_jax.squared_gradients(model, loss, context.calibration_batches()))


# --- Stored values --------------------------------------------------------------------------------


class Record:
    """Values that a finished part of the run has already found, on disk beside the checkpoints."""

    def __init__(self, context: Context):
        """Reads what there is."""
        self._context = context
        self._path = context.workdir / "stages.json"
        self.values: dict[str, Any] = from_first(self._read)

    def _read(self) -> dict[str, Any]:
        empty: dict[str, Any] = {"validation": {}, "test": {}}
        try:
            values = json.loads(self._path.read_text())
        except FileNotFoundError:
            return empty
        except ValueError:  # what it held is found again from the checkpoints
            print(f"{self._path} is damaged: finding its values again")
            return empty
        return values if isinstance(values, dict) and set(empty) <= set(values) else empty

    def _write(self) -> None:
        if is_first():
            write_json(self._path, self.values)

    def value(self, key: str, find: Callable[[], Any]) -> Any:
        """A value by its key, found now unless it is known."""
        if key not in self.values:
            self.values[key] = find()
            self._write()
        return self.values[key]

    def accuracy(self, split: str, stage: str, model: nnx.Module) -> None:
        """Measures top-1 after a stage, unless it is known or not asked for, and prints it."""
        context, values = self._context, self.values[split]
        asked = context.config.test if split == "test" else len(context.dataset.validation) > 0
        if not asked:
            return
        if stage not in values:
            values[stage] = evaluate(context, model, split)
            self._write()
        context.console.print(f"{stage:>9}: top-1 {values[stage]:.2f} % ({split})")
