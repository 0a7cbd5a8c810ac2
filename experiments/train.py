"""Training and evaluation of a model: a plain loop over a jit-compiled step, with checkpoints.

`experiments.stages` has the order of the trainings of a run, and the steps between them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import stp_jax
from experiments.config import Config
from experiments.context import Context
from experiments.runtime import processes, sharding
from experiments.runtime.checkpoints import StageCheckpoints
from experiments.runtime.finite import Watch, name_nonfinite, nonfinite, paths
from experiments.runtime.log import NoLog, StageLog
from experiments.runtime.processes import is_first
from stp_jax.terms import budget_schedule


class TrainState(NamedTuple):
    """The training state: everything that a step changes."""

    params: nnx.State
    rest: nnx.State  # BatchNorm statistics, budgets and fixed scales
    opt_state: optax.OptState


class Watched(NamedTuple):
    """Values that must stay finite; fields are the first part of the names in messages."""

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


def evaluate(context: Context, model: nnx.Module, split: str) -> float:
    """Top-1 accuracy in percent over all examples of a split."""
    model.eval()
    graphdef, state = nnx.split(model)
    state = jax.device_put(state, sharding.replicated(context.mesh))
    total = 0.0
    for batch in context.dataset.eval_batches(
        batch_size=context.config.eval_batch_size,
        split=split,
        shard_index=jax.process_index(),
        shard_count=jax.process_count(),
    ):
        total += float(_correct(graphdef, state, context.to_devices(batch)))
        processes.check()
    return 100.0 * total / len(getattr(context.dataset, split))


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
    for batch in itertools.islice(context.train_iterator("batch_norm"), number):
        statistics = forward(model, context.to_devices(batch)["input"])
        total = statistics if total is None else jax.tree.map(jnp.add, total, statistics)
        processes.check()
    nnx.update(model, jax.tree.map(lambda x: x / number, total))
    for norm, momentum in zip(norms, kept, strict=True):
        norm.momentum = momentum
    model.eval()
    nnx.update(model, sharding.gather(nnx.state(model)))


# --- One stage ------------------------------------------------------------------------------------


def make_optimizer(
    config: Config,
    *,
    lr: float,
    steps: int,
    guidance: optax.GradientTransformation | None = None,
    learned_scales: bool = False,
    budgets: bool = False,
) -> Any:
    """SGD with Nesterov momentum, or AdamW; warm-up and cosine; guidance last.

    Learned scales take relative steps with AdamW; relaxed budgets move by Adam.
    """
    warm = max(1, round(config.warmup * steps))
    schedule = optax.warmup_cosine_decay_schedule(0.0, lr, warm, max(steps, warm + 1))
    schedule = tabulated(schedule, steps)

    def kernels(params: nnx.State) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "kernel" in jax.tree_util.keystr(path), params
        )

    if config.optimizer == "adamw":
        descent = optax.adamw(schedule, weight_decay=config.weight_decay, mask=kernels)
        if learned_scales:
            descent = optax.chain(descent, stp_jax.relative_scale_steps())
    else:
        descent = optax.chain(
            optax.add_decayed_weights(config.weight_decay, mask=kernels),
            optax.sgd(schedule, momentum=config.momentum, nesterov=True),
        )
    if budgets:
        moves = optax.adam(optax.linear_schedule(config.budget_lr, 0.0, steps))
        descent = optax.partition({"weights": descent, "budgets": moves}, _budget_labels)
    return optax.chain(descent, *([] if guidance is None else [guidance]))


def tabulated(schedule: optax.Schedule, steps: int) -> optax.Schedule:
    """The schedule as a table of its values at 0 to ``steps``; the last one holds on.

    XLA fuses a schedule into the update of every leaf, where a cosine is slow to compile.
    """
    values = jax.vmap(schedule)(jnp.arange(steps + 1))
    return lambda count: values[jnp.clip(count, 0, steps)]


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
        imitation = jnp.mean(optax.losses.kl_divergence_with_log_targets(student, teacher))
        return (1.0 - distill) * hard + distill * t * t * imitation

    return loss


def make_train_step(
    graphdef: nnx.GraphDef,
    tx: optax.GradientTransformationExtraArgs,
    loss: Callable[..., jax.Array],
    teacher: nnx.GraphDef | None,
    price: Callable[[nnx.Module], tuple[jax.Array, dict[str, jax.Array]]] | None,
    shardings: TrainState,
) -> Any:
    """The jit-compiled step; budgets are traced, so that annealing them compiles nothing.

    Args:
      graphdef: of the model.
      tx: the optimizer.
      loss: (logits, labels, soft labels) → loss.
      teacher: of the model whose logits are the soft labels, if there is one.
      price: model → what its budgets add to the loss, and metrics of theirs.
      shardings: of the state, before and after the step.

    Returns:
      (state, batch, the teacher's state) → the new state, metrics, and which leaves of `Watched`
      are not finite. Without a teacher its state is None.
    """

    def step(state: TrainState, batch: dict[str, jax.Array], taught: nnx.State | None):
        soft = None
        if teacher is not None:
            soft = jax.lax.stop_gradient(nnx.merge(teacher, taught)(batch["input"]))

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
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        hits = (jnp.argmax(logits, axis=-1) == batch["label"]).astype(jnp.float32)
        metrics = {"loss": value, "accuracy": jnp.mean(hits), **priced}
        flags = nonfinite(Watched(value, grads, params, rest, opt_state))
        return TrainState(params, rest, opt_state), metrics, flags

    whole = sharding.replicated(jax.tree.leaves(shardings)[0].mesh)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, whole, whole))


class Training(NamedTuple):
    """A training stage: how long, how fast, and what it adds to plain training."""

    name: str
    epochs: float
    lr: float  # peak
    lr_key: str = "retrain_lr"  # of its learning rate in the configuration, for messages
    in_float: bool = False  # of a model without budgets
    distill: float = 0.0
    guide_to: Mapping[str, Any] | None = None  # layer → terms per group to be pulled to
    price: Callable | None = None  # of relaxed budgets, which are trained then (`energy_price`)

    def steps(self, context: Context) -> int:
        """The number of its steps."""
        return round(self.epochs * context.steps_per_epoch)


def _terms_per_weight(context: Context, model: nnx.Module, stage: Training, steps: int):
    """step → mean terms per weight that the budgets allow at that step, by weights of layers."""
    layers = stp_jax.quantized_layers(model)
    sizes = {path: layers[path].kernel.size for path in stp_jax.budgets(model)}
    schedules = _target_schedules(context.config, stage, steps)
    fixed = stp_jax.budgets(model)

    def mean(step: int) -> float:
        values = {path: s(step) for path, s in schedules.items()} or fixed
        terms = sum(float(np.mean(values[path])) * size for path, size in sizes.items())
        return terms / (sum(sizes.values()) * context.config.group_size)

    return mean


def _target_schedules(config: Config, stage: Training, steps: int) -> dict[str, optax.Schedule]:
    """Budgets that fall from all terms to the target over the first half of the stage."""
    return {
        path: budget_schedule(config.max_budget, k, max(1, steps // 2))
        for path, k in (stage.guide_to or {}).items()
    }


def _guidance(
    config: Config, model: nnx.Module, stage: Training, steps: int
) -> optax.GradientTransformation | None:
    """The stage's guidance, which grows over the stage while the budgets of its targets fall."""
    if stage.guide_to is None:
        return None
    schedules = _target_schedules(config, stage, steps)
    return stp_jax.guidance(
        model,
        optax.linear_schedule(0.0, config.guidance, steps),
        # The optimizer counts the updates before this one.
        budgets=lambda updates: {path: s(updates + 1) for path, s in schedules.items()},
    )


def state_shardings(context: Context, state: TrainState) -> TrainState:
    """Sharding of the training state."""
    whole = jax.tree.map(lambda _: sharding.replicated(context.mesh), state)
    if context.config.sharding == "data":
        return whole
    params, opt_state = sharding.along_outputs(context.mesh, (state.params, state.opt_state))
    return TrainState(params, whole.rest, opt_state)


class Prepared(NamedTuple):
    """What a stage starts from."""

    graphdef: nnx.GraphDef  # of the model in training mode
    state: TrainState  # on the devices
    step: Any  # as by `make_train_step`
    teacher: nnx.State | None  # on the devices: a step's argument, since XLA is slow on constants


def prepare_stage(
    context: Context, model: nnx.Module, stage: Training, teacher: nnx.Module | None = None
) -> Prepared:
    """The step of a stage of at least one step, and what it takes."""
    c = context.config
    steps = stage.steps(context)
    model.train()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)  # type: ignore[misc]
    tx = make_optimizer(
        c,
        lr=stage.lr,
        steps=steps,
        guidance=_guidance(c, model, stage, steps),
        learned_scales=not stage.in_float,
        budgets=stage.price is not None,
    )
    state = TrainState(params, rest, tx.init(params))
    state = jax.tree.map(jnp.copy, state)  # steps donate it, and the caller keeps its model
    shardings = state_shardings(context, state)
    taught_by, taught = None, None
    if teacher is not None and stage.distill > 0:
        teacher.eval()
        taught_by, taught = nnx.split(teacher)
        taught = jax.device_put(taught, sharding.replicated(context.mesh))
    loss = make_loss(c, distill=stage.distill)
    train_step = make_train_step(graphdef, tx, loss, taught_by, stage.price, shardings)
    return Prepared(graphdef, jax.device_put(state, shardings), train_step, taught)


def train_stage(
    context: Context, model: nnx.Module, stage: Training, teacher: nnx.Module | None = None
) -> nnx.Module:
    """Trains the model for one stage, or as much of it as is not in its checkpoints yet.

    Raises:
      TrainingError: the loss, a gradient, a weight or the optimizer is not finite; step and layer
        are named. No such state is saved.
      Interrupted: a signal asked the run to end; the step is finished and saved.
    """
    c = context.config
    steps = stage.steps(context)
    if steps == 0:
        return model
    graphdef, state, train_step, taught = prepare_stage(context, model, stage, teacher)
    # A float model has no budgets, and a price comes with metrics of its own.
    shows_terms = not stage.in_float and stage.price is None
    terms = _terms_per_weight(context, model, stage, steps) if shows_terms else None
    batches = context.train_iterator(stage.name)
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
                state, metrics, flags = train_step(state, batch, taught)
                watch.note(step, flags)
                log.step(step)
                stop = processes.pending()
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
                    raise processes.Interrupted(stop)
    model = nnx.merge(graphdef, *sharding.gather((state.params, state.rest)))
    model.eval()
    reestimate_batch_norm(context, model)
    return model


def _refuse_nonfinite(stage: Training, start: int, state: TrainState) -> None:
    names = paths(state)
    found = name_nonfinite(names, jax.jit(nonfinite)(state))
    if found:
        raise TrainingError(f"{stage.name}, before step {start + 1}: not finite: {found}")
