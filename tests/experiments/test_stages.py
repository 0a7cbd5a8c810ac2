"""Stages: their order is data, and a stage of one's own is one entry."""

import json

import jax
import numpy as np
import optax
import pytest
from rich.console import Console

import stp_jax
from experiments import configs, stages, train
from experiments.config import STAGE_NAMES, ConfigError, override
from experiments.context import data_seed, make_context, make_model
from stp_jax import export

SMALL = [
    "model_options.hidden=8",
    "float_epochs=0.5",
    "guided_epochs=0",
    "retrain_epochs=0.25",
    "bn_batches=2",
]


def make(tmp_path, folder, *settings):
    config = override(configs.load("stp_mlp").CONFIG, [*SMALL, f"data_dir={folder}", *settings])
    return make_context(config, tmp_path / "run", Console(quiet=True))


@pytest.fixture(autouse=True)
def usual_promotion():
    """Optax's schedules need it."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tfds")


def test_the_default_stages_exist():
    assert set(STAGE_NAMES) <= set(stages.STAGES)


def test_the_teacher_is_an_argument_of_the_step(tmp_path, folder):
    """Its weights are no constants of the program, and its labels enter the loss."""
    context = make(tmp_path, folder)
    model, teachers = make_model(context), [make_model(context), make_model(context)]
    teachers[1].layers[0].kernel[...] *= -1.0
    stage = train.Training("float_retrained", 1.0, 0.01, in_float=True, distill=0.5)
    batch = context.to_devices(next(context.train_iterator("float")))
    losses = []
    for teacher in teachers:
        _, state, step, taught = train.prepare_stage(context, model, stage, teacher)
        constants = step.trace(state, batch, taught).jaxpr.consts
        assert all(np.ndim(constant) < 2 for constant in constants)  # no kernel
        losses.append(float(step(state, batch, taught)[1]["loss"]))
    assert losses[0] != losses[1]


def test_a_tabulated_schedule_is_the_schedule():
    schedule = optax.warmup_cosine_decay_schedule(0.0, 0.1, 3, 20)
    table = jax.jit(train.tabulated(schedule, 20))
    steps = [0, 1, 3, 11, 19, 20, 25]
    np.testing.assert_allclose(
        [table(step) for step in steps], [schedule(step) for step in steps], rtol=1e-6, atol=1e-9
    )


def test_a_stage_of_one_s_own_is_one_entry(tmp_path, folder, monkeypatch):
    """It runs where the configuration says, and its accuracy is reported under its name."""
    seen = []

    def halved(run):
        seen.append(dict(run.budgets))
        run.budgets = {path: np.maximum(1, k // 2) for path, k in run.budgets.items()}
        stp_jax.set_budgets(run.model, run.budgets)
        return run.model

    monkeypatch.setitem(stages.STAGES, "halved", stages.Stage(halved, needs=("projected",)))
    order = "float,int8,allocated,projected,halved,retrained"
    context = make(tmp_path, folder, f"stages={order}")
    stages.check_stages(context.config)
    outcome = stages.train(context)
    reported = ["float", "int8", "projected", "halved", "retrained"]
    assert list(outcome.validation) == list(outcome.test) == reported
    for path, k in seen[0].items():
        np.testing.assert_array_equal(outcome.budgets[path], np.maximum(1, k // 2))
        np.testing.assert_array_equal(stp_jax.budgets(outcome.model)[path], outcome.budgets[path])
    known = json.loads((tmp_path / "run" / "stages.json").read_text())
    assert (known["validation"], known["test"]) == (outcome.validation, outcome.test)


def test_the_test_examples_are_read_at_the_end_or_not_at_all(tmp_path, folder, monkeypatch):
    """Choices need them not: a run without them measures the same validation accuracies."""
    splits = []
    measure = stages.evaluate

    def noted(context, model, split):
        splits.append(split)
        return measure(context, model, split)

    monkeypatch.setattr(stages, "evaluate", noted)
    context = make(tmp_path, folder)
    outcome = stages.train(context)
    measured = len(splits) // 2
    assert splits == ["validation"] * measured + ["test"] * measured
    splits.clear()
    unread = stages.train(make(tmp_path / "unread", folder, "test=false"))
    assert set(splits) == {"validation"} and unread.test == {}
    assert unread.validation == outcome.validation
    # A finished run that is asked for them reads them, and repeats nothing else.
    splits.clear()
    later = stages.train(make(tmp_path / "unread", folder))
    assert splits == ["test"] * measured
    assert later.test == outcome.test


def test_reconstruction_brings_the_projected_model_nearer_to_the_float_one(tmp_path, folder):
    order = "stages=float,int8,allocated,projected"
    errors = {}
    for fit in ("none", "reconstruct"):
        settings = [order, f"fit={fit}", "terms_per_weight=0.5", "test=false"]
        context = make(tmp_path / fit, folder, *settings)
        stp = stages.train(context).model
        float_model = make_model(context)
        export.load_variables(float_model, tmp_path / fit / "run" / "float.safetensors")
        float_model.eval()
        x = next(context.dataset.eval_batches(batch_size=128, split="validation"))["input"]
        errors[fit] = float(np.mean((stp(x) - float_model(x)) ** 2))
    assert errors["reconstruct"] < 0.7 * errors["none"]


@pytest.mark.parametrize("weighting", ["outputs", "none", "gradients"])
def test_a_run_allocates_as_the_library_does(tmp_path, folder, weighting):
    order = "stages=float,int8,allocated"
    settings = [order, "terms_per_weight=0.25", "test=false", f"error_weighting={weighting}"]
    context = make(tmp_path, folder, *settings)
    outcome = stages.train(context)
    model, example = outcome.model, context.dataset.example_input()
    costs = stp_jax.term_costs(model, example, per="energy")
    inputs = [batch["input"] for batch in context.calibration_batches()]
    importance = stages.squared_gradients(context, model) if weighting == "gradients" else None
    float_model = make_model(context)
    export.load_variables(float_model, tmp_path / "run" / "float.safetensors")
    float_model.eval()
    int8 = stages.int8_stage(stages.Run(context, stages.Record(context), float_model))
    if weighting == "outputs":
        expected = stp_jax.allocate_by_divergence(int8, 0.25, inputs, costs=costs)
    else:
        options = {"costs": costs, "importance": importance, "by": "filter"}
        expected = stp_jax.allocate(int8, 0.25, **options)
    for path, budget in expected.items():
        np.testing.assert_array_equal(outcome.budgets[path], budget)


def test_the_last_stage_may_be_in_integers_throughout(tmp_path, folder):
    outcome = stages.train(make(tmp_path, folder, "integer_network=true", "test=false"))
    assert outcome.validation["integer"] == outcome.validation["retrained"]
    layers = stp_jax.quantized_layers(outcome.model).values()
    assert all(layer.rule.power_of_two_scales for layer in layers)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ("float,int8,pruned", "there is no 'pruned'; there are float"),
        ("float,int8,int8", "int8 stands twice"),
        ("float,allocated", "allocated needs int8 before it"),
        ("float,int8,allocated,budgeted", "budgeted needs projected"),
        ("float,int8", "a run needs float, int8 and allocated"),
    ],
)
def test_wrong_orders_are_refused(order, message):
    config = override(configs.load("stp_mlp").CONFIG, [f"stages={order}"])
    with pytest.raises(ConfigError, match=message):
        stages.check_stages(config)


def test_every_stage_draws_its_own_order():
    names = [*STAGE_NAMES, "batch_norm", "halved"]
    seeds = {data_seed(seed, name) for seed in (0, 1, 2) for name in names}
    assert len(seeds) == 3 * len(names)
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_budgets_by_filter_are_stored_and_read_back(tmp_path, folder):
    """Each filter has a budget of its own, which a resumed run reads back."""
    outcomes = {}
    half = "terms_per_weight=0.5"
    for by in ("layer", "filter"):
        outcomes[by] = stages.train(make(tmp_path / by, folder, f"budgets_by={by}", half))
    filters = outcomes["filter"].budgets
    assert all(len(budget) == 8 for path, budget in filters.items() if path == "layers.0")
    again = stages.train(
        make(tmp_path / "filter", folder, "budgets_by=filter", "terms_per_weight=0.5")
    )
    for path, budget in filters.items():
        np.testing.assert_array_equal(again.budgets[path], budget)
        np.testing.assert_array_equal(stp_jax.budgets(again.model)[path], budget)
    assert again.test == outcomes["filter"].test


def test_budgets_by_hand_may_be_by_filter(tmp_path, folder):
    path = tmp_path / "budgets.json"
    by_filter = [1, 2, 3, 4, 5, 6, 7, 8]
    path.write_text(json.dumps({"layers.0": by_filter}))
    outcome = stages.train(make(tmp_path, folder, f"budgets={path}"))
    assert outcome.budgets["layers.0"].tolist() == by_filter
    path.write_text(json.dumps({"layers.0": by_filter[1:]}))
    with pytest.raises(ConfigError, match="a list of them for its 8 filters"):
        stages.train(make(tmp_path / "wrong", folder, f"budgets={path}"))
