"""Training: float → int8 → guided → projected → retrained → integers, from top to bottom.

The stages follow structured term pruning (Huang et al., IEEE TCAD 42(1), 2023): weights are guided
towards few power-of-two terms, projected onto group budgets, and retrained behind the projection.
Every stage is a plain loop over a jit-compiled step and resumes from its own checkpoints.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import stp_jax
from experiments.config import Config
from experiments.context import Context, make_model, make_policy, read_budgets
from experiments.runtime import interrupts, sharding
from experiments.runtime.checkpoints import StageCheckpoints
from experiments.runtime.distributed import from_first, is_first
from experiments.runtime.finite import Watch, name_nonfinite, nonfinite, paths
from experiments.runtime.log import NoLog, StageLog, write_json
from stp_jax import export, hwmodel
from stp_jax.terms import budget_schedule, guide, round_budgets


class TrainState(NamedTuple):
    """What a step changes."""

    params: nnx.State
    rest: nnx.State  # BatchNorm statistics, budgets and fixed scales
    opt_state: optax.OptState


class Watched(NamedTuple):
    """What must stay finite; its fields are the first part of the names in messages."""

    loss: Any
    gradient: Any
    weights: Any
    rest: Any
    optimizer: Any


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step and why."""


# --- Evaluation -----------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def _correct(graphdef: nnx.GraphDef, state: nnx.State, batch: dict[str, jax.Array]) -> jax.Array:
    logits = nnx.merge(graphdef, state)(batch["input"])
    hit = (jnp.argmax(logits, axis=-1) == batch["label"]).astype(jnp.float32)
    return jnp.sum(hit.reshape(len(hit), -1).mean(axis=1) * batch["mask"])


def evaluate(context: Context, model: nnx.Module) -> float:
    """Top-1 accuracy in percent over all test examples."""
    model.eval()
    graphdef, state = nnx.split(model)
    state = jax.device_put(state, sharding.replicated(context.mesh))
    total = 0.0
    for batch in context.dataset.eval_batches(
        batch_size=context.config.eval_batch_size,
        shard_index=jax.process_index(),
        shard_count=jax.process_count(),
    ):
        total += float(_correct(graphdef, state, context.to_devices(batch)))
        interrupts.check()
    return 100.0 * total / len(context.dataset.test)


def reestimate_batch_norm(context: Context, model: nnx.Module) -> None:
    """Sets BatchNorm's statistics to their mean over training batches, in place.

    Running averages remember few batches, and those of other weights.
    """
    norms = [module for _, module in nnx.iter_modules(model) if isinstance(module, nnx.BatchNorm)]
    number = context.config.bn_batches
    if not norms or not number:
        return
    model.train()
    kept = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0  # the statistics of one batch

    @nnx.jit
    def forward(model: nnx.Module, image: jax.Array) -> nnx.State:
        model(image)  # type: ignore[operator]
        return nnx.state(model, nnx.BatchStat)

    total = None
    for batch in itertools.islice(context.train_iterator(stage=8), number):
        statistics = forward(model, context.to_devices(batch)["input"])
        total = statistics if total is None else jax.tree.map(jnp.add, total, statistics)
        interrupts.check()
    nnx.update(model, jax.tree.map(lambda x: x / number, total))
    for norm, momentum in zip(norms, kept, strict=True):
        norm.momentum = momentum
    model.eval()
    nnx.update(model, sharding.gather(nnx.state(model)))


# --- One stage ------------------------------------------------------------------------------------


def make_optimizer(
    config: Config, *, lr: float, steps: int, guided: bool = False, budgets: bool = False
) -> Any:
    """SGD with Nesterov momentum, or AdamW; warm-up and cosine; guidance last.

    Relaxed budgets, where there are some, move by Adam.
    """
    warm = max(1, round(config.warmup * steps))
    schedule = optax.warmup_cosine_decay_schedule(0.0, lr, warm, max(steps, warm + 1))

    def kernels(params: nnx.State) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "kernel" in jax.tree_util.keystr(path), params
        )

    if config.optimizer == "adamw":
        descent = optax.adamw(schedule, weight_decay=config.weight_decay, mask=kernels)
    else:
        descent = optax.chain(
            optax.add_decayed_weights(config.weight_decay, mask=kernels),
            optax.sgd(schedule, momentum=config.momentum, nesterov=True),
        )
    if budgets:
        moves = optax.adam(optax.linear_schedule(config.budget_lr, 0.0, steps))
        descent = optax.partition({"weights": descent, "budgets": moves}, _budget_labels)
    return optax.chain(
        descent,
        *([guide(optax.linear_schedule(0.0, config.guidance, steps))] if guided else []),
    )


def _budget_labels(params: nnx.State) -> Any:
    def label(_: Any, leaf: Any) -> str:
        return "budgets" if isinstance(leaf, stp_jax.RelaxedBudget) else "weights"

    return jax.tree_util.tree_map_with_path(
        label, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
    )


def make_loss(config: Config, *, distill: float) -> Callable[..., jax.Array]:
    """Cross-entropy, mixed with the teacher's soft labels (Hinton et al., arXiv:1503.02531)."""

    def loss(logits: jax.Array, labels: jax.Array, soft: jax.Array | None) -> jax.Array:
        logits = logits.astype(jnp.float32)
        targets = jax.nn.one_hot(labels, logits.shape[-1])
        targets = optax.smooth_labels(targets, config.label_smoothing)
        hard = jnp.mean(optax.softmax_cross_entropy(logits, targets))
        if soft is None:
            return hard
        t = config.temperature
        teacher = jax.nn.log_softmax(soft.astype(jnp.float32) / t)
        student = jax.nn.log_softmax(logits / t)
        softly = jnp.mean(optax.losses.kl_divergence_with_log_targets(student, teacher))
        return (1.0 - distill) * hard + distill * t * t * softly

    return loss


def make_train_step(
    graphdef: nnx.GraphDef,
    tx: optax.GradientTransformationExtraArgs,
    loss: Callable[..., jax.Array],
    teacher: Callable[[jax.Array], jax.Array] | None,
    target_budgets: Callable[[jax.Array], dict[str, jax.Array]] | None,
    price: Callable[[nnx.Module], tuple[jax.Array, dict[str, jax.Array]]] | None,
    shardings: TrainState,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array], jax.Array]]:
    """The jit-compiled step; budgets are traced, so that annealing them compiles nothing.

    Args:
      graphdef: of the model.
      tx: the optimizer.
      loss: (logits, labels, soft labels) → loss.
      teacher: images → logits for the soft labels.
      target_budgets: step → budgets of the few-term values that guidance draws to.
      price: model → what its budgets add to the loss, and metrics of theirs.
      shardings: of the state, before and after the step.

    Returns:
      (state, batch, number) → the new state, metrics, and which leaves of `Watched` are not finite.
    """

    def step(state: TrainState, batch: dict[str, jax.Array], number: jax.Array):
        soft = None if teacher is None else teacher(batch["input"])

        def forward(params: nnx.State) -> tuple[jax.Array, tuple[jax.Array, nnx.State, dict]]:
            model = nnx.merge(graphdef, params, state.rest, copy=True)
            logits = model(batch["input"])
            rest = nnx.state(model, nnx.Not(nnx.Param))
            value = loss(logits, batch["label"], soft)
            added, priced = (0.0, {}) if price is None else price(model)
            return value + added, (logits, rest, priced)

        (value, (logits, rest, priced)), grads = jax.value_and_grad(forward, has_aux=True)(
            state.params
        )
        extra = {}
        if target_budgets is not None:
            model = nnx.merge(graphdef, state.params, state.rest, copy=True)
            extra["targets"] = stp_jax.project_params(model, target_budgets(number))
        updates, opt_state = tx.update(grads, state.opt_state, state.params, **extra)
        params = optax.apply_updates(state.params, updates)
        hits = (jnp.argmax(logits, axis=-1) == batch["label"]).astype(jnp.float32)
        metrics = {"loss": value, "accuracy": jnp.mean(hits), **priced}
        flags = nonfinite(Watched(value, grads, params, rest, opt_state))
        return TrainState(params, rest, opt_state), metrics, flags

    whole = sharding.replicated(jax.tree.leaves(shardings)[0].mesh)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, whole, whole))


class Stage(NamedTuple):
    """A training stage: how long, how fast, and what it adds to plain training."""

    name: str
    number: int  # for the order of its data
    epochs: float
    lr: float  # peak
    distill: float = 0.0
    guide_to: Mapping[str, int] | None = None  # layer → terms per group to be drawn to
    price: Callable | None = None  # of relaxed budgets, which are trained then (`energy_price`)

    @property
    def lr_key(self) -> str:
        """The key of its learning rate in the configuration."""
        return {"float": "float_lr", "guided": "guided_lr"}.get(self.name, "retrain_lr")


def _terms_per_weight(context: Context, model: nnx.Module, stage: Stage, steps: int):
    """step → mean terms per weight that the budgets allow at that step, by weights of layers."""
    layers = stp_jax.quantized_layers(model)
    sizes = {path: layers[path].kernel.size for path in stp_jax.budgets(model)}
    schedules = _target_schedules(context.config, stage, steps)
    fixed = stp_jax.budgets(model)

    def mean(step: int) -> float:
        values = {path: s(step) for path, s in schedules.items()} or fixed
        terms = sum(float(values[path]) * size for path, size in sizes.items())
        return terms / (sum(sizes.values()) * context.config.group_size)

    return mean


def _target_schedules(config: Config, stage: Stage, steps: int) -> dict[str, optax.Schedule]:
    """Budgets that fall from all terms to the target over the first half of the stage."""
    return {
        path: budget_schedule(config.max_budget, k, max(1, steps // 2))
        for path, k in (stage.guide_to or {}).items()
    }


def state_shardings(context: Context, state: TrainState) -> TrainState:
    """How a training state lies on the devices."""
    whole = jax.tree.map(lambda _: sharding.replicated(context.mesh), state)
    if context.config.sharding == "data":
        return whole
    params, opt_state = sharding.along_outputs(context.mesh, (state.params, state.opt_state))
    return TrainState(params, whole.rest, opt_state)


def train_stage(
    context: Context, model: nnx.Module, stage: Stage, teacher: nnx.Module | None = None
) -> nnx.Module:
    """Trains the model for one stage, or as much of it as is not in its checkpoints yet.

    Raises:
      TrainingError: the loss, a gradient, a weight or the optimizer is not finite; step and layer
        are named. No such state is saved.
      Interrupted: a signal asked the run to end; the step is finished and saved.
    """
    c = context.config
    steps = round(stage.epochs * context.steps_per_epoch)
    if steps == 0:
        return model
    model.train()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)  # type: ignore[misc]
    tx = make_optimizer(
        c,
        lr=stage.lr,
        steps=steps,
        guided=stage.guide_to is not None,
        budgets=stage.price is not None,
    )
    state = TrainState(params, rest, tx.init(params))
    state = jax.tree.map(jnp.copy, state)  # steps donate it, and the caller keeps its model
    shardings = state_shardings(context, state)
    state = jax.device_put(state, shardings)
    schedules = _target_schedules(c, stage, steps)
    train_step = make_train_step(
        graphdef,
        tx,
        make_loss(c, distill=stage.distill),
        _frozen(teacher) if teacher is not None and stage.distill > 0 else None,
        (lambda n: {path: s(n) for path, s in schedules.items()}) if schedules else None,
        stage.price,
        shardings,
    )
    unsaid = stage.name == "float" or stage.price is not None  # a price comes with its metrics
    terms = None if unsaid else _terms_per_weight(context, model, stage, steps)
    batches = context.train_iterator(stage.number)
    with StageCheckpoints(context.workdir / "checkpoints" / stage.name) as checkpoints:
        start, state = checkpoints.restore(state, batches)
        watch = Watch(paths(Watched(jnp.zeros(()), state.params, *state)))
        _refuse_nonfinite(stage, start, state)
        if 0 < start < steps:
            context.console.print(f"{stage.name}: resuming at step {start} of {steps}")
        open_log = StageLog if is_first() else NoLog
        with open_log(
            context.workdir, stage.name, start=start, steps=steps, console=context.console
        ) as log:
            for step in range(start + 1, steps + 1):
                batch = context.to_devices(next(batches))
                state, metrics, flags = train_step(state, batch, jnp.int32(step))
                watch.note(step, flags)
                log.step(step)
                stop = interrupts.pending()
                saves = step == steps or step % c.checkpoint_every == 0
                logs = saves or step % c.log_every == 0
                if (logs or stop) and (found := watch.first()) is not None:
                    raise TrainingError(
                        f"{stage.name}, step {found[0]}: not finite: {found[1]}; the last good "
                        f"checkpoint is kept. A lower {stage.lr_key} may help."
                    )
                if logs:
                    values = {name: float(value) for name, value in metrics.items()}
                    if terms is not None:
                        values["terms_per_weight"] = terms(step)
                    log.metrics(step, values)
                if saves or stop:
                    checkpoints.save(step, state, batches)
                if stop:
                    checkpoints.wait()
                    raise interrupts.Interrupted(stop)
    model = nnx.merge(graphdef, *sharding.gather((state.params, state.rest)))
    model.eval()
    reestimate_batch_norm(context, model)
    return model


def _refuse_nonfinite(stage: Stage, start: int, state: TrainState) -> None:
    names = paths(state)
    found = name_nonfinite(names, jax.jit(nonfinite)(state))
    if found:
        raise TrainingError(f"{stage.name}, before step {start + 1}: not finite: {found}")


def _frozen(model: nnx.Module) -> Callable[[jax.Array], jax.Array]:
    """The model in evaluation mode as a function of its input, with constant parameters."""
    model.eval()
    graphdef, state = nnx.split(model)
    return lambda image: jax.lax.stop_gradient(nnx.merge(graphdef, state)(image))  # type: ignore


# --- Budgets --------------------------------------------------------------------------------------


def choose_budgets(context: Context, model: nnx.Module) -> dict[str, int]:
    """Terms per group of each layer: by hand, uniform, or allocated by measured sensitivity.

    Raises:
      ConfigError: budgets by hand that do not fit the model's layers.
    """
    c = context.config
    layers = list(stp_jax.budgets(model))
    if c.budgets is not None:
        return read_budgets(c, layers)
    if c.budget is not None:
        return dict.fromkeys(layers, c.budget)
    weighted = c.error_weighting == "gradients"
    importance = squared_gradients(context, model) if weighted else None
    costs = stp_jax.term_costs(
        model, context.dataset.example_input(), per=c.allocate_for, array=_array(c, model)
    )
    return stp_jax.allocate(model, c.terms_per_weight, costs=costs, importance=importance)


def _array(config: Config, model: nnx.Module) -> hwmodel.Array:
    """The array of group PEs that runs the model."""
    return hwmodel.Array(rows=config.rows, cols=config.cols, pe=stp_jax.group_pe(model))


def energy_price(context: Context, model: nnx.Module) -> Callable[[nnx.Module], tuple]:
    """What relaxed budgets add to the loss: the square of their energy's distance from the start.

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


def train_budgets(
    context: Context, model: nnx.Module, budgets: Mapping[str, int], teacher: nnx.Module
) -> tuple[nnx.Module, dict[str, int]]:
    """The first part of the retraining, in which the budgets are trained with the weights.

    They start from the given ones and end as whole numbers that take no more energy.

    Returns:
      The model with its budgets set, and those.
    """
    c = context.config
    costs = stp_jax.term_costs(
        model, context.dataset.example_input(), per="energy", array=_array(c, model)
    )
    price = energy_price(context, model)
    stp_jax.relax_budgets(model)
    stage = Stage("budgeted", 3, c.budgeted_epochs, c.retrain_lr, c.distill, price=price)
    model = train_stage(context, model, stage, teacher)
    relaxed = stp_jax.budgets(model)
    total = sum(costs[path] * k for path, k in budgets.items())
    found = round_budgets(relaxed, costs, total, largest=c.max_budget)
    stp_jax.set_budgets(model, found)
    return model, found


def squared_gradients(context: Context, model: nnx.Module) -> dict[str, jax.Array]:
    """Squared gradients of the training loss on the calibration examples."""
    plain = make_loss(context.config, distill=0.0)

    def loss(model: Any, batch: dict[str, jax.Array]) -> jax.Array:
        return plain(model(batch["input"]), batch["label"], None)

    return sharding.gather(stp_jax.squared_gradients(model, loss, context.calibration_batches()))


# --- The whole run --------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What a run leaves: accuracies by stage in percent, and the final model."""

    top1: dict[str, float]
    budgets: dict[str, int]
    model: nnx.Module  # the retrained STP model, in evaluation mode


def train(context: Context) -> Outcome:
    """Runs all stages; what an earlier, interrupted call finished is read, not repeated."""
    c = context.config
    record = _Record(context)

    # Float: the baseline, and the teacher of what follows.
    model = make_model(context)
    model = train_stage(context, model, Stage("float", 0, c.float_epochs, c.float_lr))
    model.eval()
    if is_first():
        export.save_variables(model, context.workdir / "float.safetensors")
    teacher = model
    record.top1("float", model)

    # Int8: every term kept, inputs calibrated. From here on the model is an STP model.
    model = stp_jax.quantize(model, make_policy(c, model))
    stp_jax.calibrate(model, (batch["input"] for batch in context.calibration_batches()))
    nnx.update(model, sharding.gather(nnx.state(model)))
    record.top1("int8", model)

    # Guided: int8 weights drawn towards few terms, as budgets fall to their layer's.
    budgets = record.value("budgets", lambda: choose_budgets(context, model))
    all_terms = stp_jax.budgets(model)
    stp_jax.set_budgets(model, budgets)
    stp_jax.search_weight_scales(model)
    stp_jax.set_budgets(model, all_terms)
    guided = Stage("guided", 1, c.guided_epochs, c.guided_lr, guide_to=budgets)
    model = train_stage(context, model, guided, teacher)

    # Projected: each group keeps its terms, and no weight is trained.
    if c.compensate:
        stp_jax.compensate(model, [b["input"] for b in context.calibration_batches()], budgets)
        nnx.update(model, sharding.gather(nnx.state(model)))
    else:
        stp_jax.set_budgets(model, budgets)
    reestimate_batch_norm(context, model)
    record.top1("projected", model)

    # Budgeted: weights and budgets retrained together, with the array's energy in the loss.
    if c.budgeted_epochs:
        model, budgets = train_budgets(context, model, budgets, teacher)
        reestimate_batch_norm(context, model)

    # Retrained: behind the projection, with the float model's soft labels.
    retrained = Stage("retrained", 2, c.retrain_epochs, c.retrain_lr, distill=c.distill)
    model = train_stage(context, model, retrained, teacher)
    record.top1("retrained", model)

    # Integers: what the accelerator computes.
    if c.check_integers:
        record.top1("integer", stp_jax.integer_model(model))
    return Outcome(record.values["top1"], budgets, model)


class _Record:
    """Values that a finished part of the run has already found, on disk beside the checkpoints."""

    def __init__(self, context: Context):
        self._context = context
        self._path = context.workdir / "stages.json"
        self.values: dict[str, Any] = from_first(self._read)

    def _read(self) -> dict[str, Any]:
        empty: dict[str, Any] = {"top1": {}}
        try:
            values = json.loads(self._path.read_text())
        except FileNotFoundError:
            return empty
        except ValueError:  # what it held is found again from the checkpoints
            print(f"{self._path} is damaged: finding its values again")
            return empty
        return values if isinstance(values, dict) and "top1" in values else empty

    def _write(self) -> None:
        if is_first():
            write_json(self._path, self.values)

    def value(self, key: str, find: Callable[[], Any]) -> Any:
        if key not in self.values:
            self.values[key] = find()
            self._write()
        return self.values[key]

    def top1(self, stage: str, model: nnx.Module) -> None:
        if stage not in self.values["top1"]:
            self.values["top1"][stage] = evaluate(self._context, model)
            self._write()
        self._context.console.print(f"{stage:>9}: top-1 {self.values['top1'][stage]:.2f} %")
