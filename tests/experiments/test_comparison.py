"""A comparison: one recipe for everyone, members of a sweep, paired statistics, and its page."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import scipy.stats
from rich.console import Console

from experiments import configs, results_page
from experiments.comparison import (
    ALL_TERMS,
    ComparisonConfig,
    Method,
    choose,
    interval,
    members,
    parse_base,
    run_comparison,
    summary,
)
from experiments.config import ConfigError, override
from experiments.configs.compare_methods import METHODS, PARTS
from experiments.results_page import DATA, DOCS, further_page, page, stored_pages

pytestmark = pytest.mark.usefixtures("compilation_cache")

BASE = configs.load("stp_resnet20_cifar10").CONFIG
EVERY = METHODS | PARTS


def everyone(tmp_path, methods=EVERY, **changes):
    start = tmp_path / "float.safetensors"
    start.touch()
    config = ComparisonConfig(**changes)
    return list(members(config, BASE, methods, start, epoch=703))


def test_all_members_have_the_same_steps_start_and_recipe(tmp_path):
    names, recipes = [], set()
    for member in everyone(tmp_path, seeds=(0, 1), steps=(200,)):
        method = EVERY[member.labels["method"]]
        c = override(BASE, [*member.arguments, "batch_size=64"])
        stages = (c.guided_epochs, c.budgeted_epochs, c.retrain_epochs)
        assert sum(round(epochs * 703) for epochs in stages) == (200 if method.trained else 0)
        assert (c.float_epochs, c.seed) == (0, member.labels["seed"])
        assert c.init_from == str(tmp_path / "float.safetensors")
        if "terms" in member.labels and c.budget is not None:
            assert c.budget == member.labels["terms"] * c.group_size
        if method.kind != "part":
            recipes.add((c.retrain_lr, c.distill, c.temperature, c.optimizer, c.weight_decay))
        names.append(member.name)
    assert len(recipes) == 1
    assert len(set(names)) == len(names)


def test_members_cover_methods_points_and_seeds(tmp_path):
    found = everyone(tmp_path, points=(1.0, 0.5), seeds=(0, 1, 2))
    at = {}
    for member in found:
        key = member.labels["method"], member.labels.get("terms")
        at.setdefault(key, []).append(member.labels["seed"])
    assert at["layer", 0.5] == at["float", None] == at["int8", None] == [0, 1, 2]
    # A cap of half a term per weight does not exist.
    assert ("cap", 0.5) not in at and ("cap", 1.0) in at
    assert {method for method, _ in at} == set(EVERY)


def test_every_part_names_what_it_changes():
    for method in PARTS.values():
        assert method.kind == "part" and METHODS[method.reference].kind == "ours"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("points=1.0,half", "points must be a number, got 'half'"),
        (f"points={ALL_TERMS + 1}", "terms per weight"),
        ("points=", "points must have a value"),
        ("steps=0", "steps must be 1 or more"),
        ("jobs=0", "jobs must be 1 or more"),
    ],
)
def test_wrong_settings_are_refused(setting, message):
    with pytest.raises(ConfigError, match=message):
        override(ComparisonConfig(), [setting])


def test_unknown_methods_are_refused():
    with pytest.raises(ConfigError, match=r"methods must be among float, .* got SFP"):
        choose(ComparisonConfig(methods=("layer", "SFP")), EVERY)


def test_a_base_must_be_a_training_experiment():
    with pytest.raises(ConfigError, match="no training experiment"):
        parse_base(ComparisonConfig(base="hw_compare"))


@pytest.fixture(autouse=True, scope="module")
def users_settings():
    """Training runs as it does for users; optax's schedules rely on JAX's usual promotion."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


CHOSEN = {name: EVERY[name] for name in ("float", "uniform", "layer", "filter", "gradients")}


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("comparison")
    config = ComparisonConfig(
        base="stp_mlp",
        settings="model_options.hidden=16 calibration_batches=1 bn_batches=0 eval_batch_size=360",
        start_epochs=0.5,
        steps=(4,),
        points=(1.0,),
        seeds=(0,),
        jobs=2,
    )
    results = run_comparison(config, CHOSEN, workdir, "compare_methods", Console(quiet=True))
    return workdir, config, results


def test_results_come_from_the_members_runs(comparison):
    workdir, _, results = comparison
    assert results["missing"] == []
    assert [row["method"] for row in results["rows"]] == list(CHOSEN)
    for row in results["rows"]:
        terms = "" if row["terms"] is None else "terms=1.0,"
        folder = workdir / "members" / f"method={row['method']},{terms}steps=4,seed=0"
        run = json.loads((folder / "results.json").read_text())
        stage = CHOSEN[row["method"]].stage
        assert row["test"] == run["top1_percent"][stage]
        assert row["validation"] == run["validation_top1_percent"][stage]
        if row["terms"] is not None:
            assert row["terms_held"] <= row["terms"] + 1e-6
    table = summary(results).set_index("method")
    rows = {row["method"]: row for row in results["rows"]}
    lost = rows["float"]["test"] - rows["layer"]["test"]
    assert table.loc["layer", "loss"] == pytest.approx(lost)
    assert table.loc["float", "loss"] == 0
    gained = rows["gradients"]["test"] - rows["filter"]["test"]
    assert table.loc["gradients", "change"] == pytest.approx(gained)


def test_a_comparison_grows_and_a_failed_member_is_named(comparison):
    """Finished members stay as they are, a lost one is run, one whose folder is taken fails."""
    workdir, config, results = comparison
    runs = workdir / "members"
    files = {p: p.stat().st_mtime_ns for p in runs.rglob("results.json")}
    lost = runs / "method=uniform,terms=1.0,steps=4,seed=0" / "results.json"
    lost.unlink()
    taken = runs / "method=layer,terms=1.0,steps=4,seed=1"
    taken.mkdir()
    (taken / "thesis.tex").write_text("precious")
    again = dataclasses.replace(config, methods=("uniform", "layer"), seeds=(0, 1))
    chosen = {name: CHOSEN[name] for name in ("uniform", "layer")}
    grown = run_comparison(again, CHOSEN, workdir, "compare_methods", Console(quiet=True))
    assert grown["missing"] == [taken.name]
    assert [p.name for p in taken.iterdir()] == ["thesis.tex"]
    known = [row for row in grown["rows"] if row["seed"] == 0]
    assert known == results["rows"]
    assert len(grown["rows"]) == len(results["rows"]) + 1
    assert all(p.stat().st_mtime_ns == t for p, t in files.items() if p != lost)
    assert set(chosen) == {row["method"] for row in grown["rows"] if row["seed"] in (0, 1)} - {
        "float",
        "filter",
        "gradients",
    }


@pytest.mark.slow  # its fixture is
def test_members_of_other_settings_are_refused(comparison):
    workdir, config, _ = comparison
    settings = CHOSEN["uniform"].settings + " scale_slack=0.03"
    other = {**CHOSEN, "uniform": dataclasses.replace(CHOSEN["uniform"], settings=settings)}
    told = r"^member method=uniform.*with another configuration \(scale_slack: 0\.0 → 0\.03\)"
    with pytest.raises(ConfigError, match=told):
        run_comparison(config, other, workdir, "compare_methods", Console(quiet=True))


@pytest.mark.slow  # its fixture is
def test_a_member_with_a_damaged_configuration_is_refused(comparison, tmp_path):
    workdir, config, _ = comparison
    damaged = tmp_path / "members" / "method=uniform,terms=1.0,steps=4,seed=0" / "config.json"
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
    damaged.write_text(damaged.read_text()[:100])
    with pytest.raises(ConfigError, match=r"^member method=uniform.*is not a run's configuration"):
        run_comparison(config, CHOSEN, tmp_path, "compare_methods", Console(quiet=True))


def made_up(**accuracies):
    """Results with these test accuracies by method, one a seed."""
    savings = (
        "saving",
        "saving_with_encoder",
        "saving_by_gates",
        "saving_in_layers",
        "saving_in_layers_with_encoder",
    )
    common = dict.fromkeys((*savings, "cycles"), 1.0)
    rows = [
        {
            "method": name,
            "terms": None if name == "float" else 0.5,
            "steps": 10,
            "seed": seed,
            "test": value,
            "validation": value,
            "terms_held": 0.5,
            **common,
        }
        for name, values in accuracies.items()
        for seed, value in enumerate(values)
    ]
    return {"rows": rows, "methods": {n: dataclasses.asdict(m) for n, m in EVERY.items()}}


def test_intervals_are_student_s_and_differences_are_paired():
    float_, layer, guided = [90.0, 92.0, 94.0], [89.0, 91.5, 93.0], [89.5, 92.0, 93.5]
    results = made_up(float=float_, filter=layer, guided=guided)
    table = summary(results).set_index("method")
    low, high = scipy.stats.t.interval(0.95, 2, np.mean(float_), scipy.stats.sem(float_))
    assert table.loc["float", "interval"] == pytest.approx((high - low) / 2)
    paired = scipy.stats.ttest_rel(float_, layer).confidence_interval()
    assert table.loc["filter", "loss"] == pytest.approx((paired.low + paired.high) / 2)
    assert table.loc["filter", "loss_interval"] == pytest.approx((paired.high - paired.low) / 2)
    # Half a point better in every seed: no doubt, although the seeds differ by four points.
    assert table.loc["guided", "change"] == pytest.approx(0.5)
    assert table.loc["guided", "change_interval"] == pytest.approx(0, abs=1e-9)
    assert np.isnan(interval([1.0]))


def test_seeds_without_a_pair_do_not_narrow_an_interval():
    few = made_up(float=[90.0, 92.0], filter=[89.0, 90.0, 91.0, 92.0])
    table = summary(few).set_index("method")
    pairs = made_up(float=[90.0, 92.0], filter=[89.0, 90.0])
    alone = summary(pairs).set_index("method")
    for column in ("loss", "loss_interval"):
        assert table.loc["filter", column] == pytest.approx(alone.loc["filter", column])
    lonely = summary(made_up(filter=[89.0], plain=[88.0, 87.0])).set_index("method")
    assert lonely.loc["plain", "pairs"] == 1 and np.isnan(lonely.loc["plain", "change_interval"])


def test_a_method_whose_budget_is_no_whole_number_does_not_exist():
    method = Method(title="", kind="rival", settings="group_size=4 budget={budget}")
    assert method.at(0.5, 8) == {"group_size": "4", "budget": "2"}
    assert method.at(0.375, 8) is None


@pytest.mark.slow  # its fixture is
def test_the_page_holds_every_row_and_says_what_is_missing(comparison):
    results = comparison[2]
    text = page(results)
    for row in results["rows"]:
        assert EVERY[row["method"]].title in text
        if EVERY[row["method"]].kind != "part":
            assert f"{row['test']:.2f}" in text
    total = len(results["rows"]) + 1
    assert f"1 of {total} runs of the comparison were not made." in page(
        {**results, "missing": ["x"]}
    )


@pytest.mark.skipif(not DATA.exists(), reason="no stored results")
def test_the_documentation_shows_the_stored_results():
    for name, text in stored_pages().items():
        assert (DOCS / name).read_text() == text


@pytest.mark.slow  # its fixture is
def test_a_further_comparison_has_a_section_of_its_own(comparison):
    results, title = comparison[2], "## Reconstruction before retraining"
    assert "(comparisons.md)" not in page(results)
    assert "- Reconstruction before retraining" in page(results, further=["second"])
    rows = [
        {**row, "steps": 7654, "test": 12.34, "saving_in_layers": 5.67} for row in results["rows"]
    ]
    section = further_page({"second": {**results, "rows": rows}}).partition(title)[2]
    assert all(shown in section for shown in ("7,654", "12.34", "5.67×"))


@pytest.mark.slow  # its fixture is
def test_columns_that_say_nothing_are_left_out(comparison):
    results = comparison[2]
    silent = [{**row, "saving_in_layers": None} for row in results["rows"]]
    assert "saving in layers" in page(results)
    assert "saving in layers" not in page({**results, "rows": silent})


def test_a_further_comparison_needs_a_known_name(capsys):
    assert results_page.main(["--further", "nonsense", "runs"]) == 2
    assert "must be among even, long, plain" in capsys.readouterr().out


def test_projections_are_compared_before_retraining(tmp_path):
    experiment = configs.load("compare_projections")
    config = dataclasses.replace(
        experiment.CONFIG,
        base="stp_mlp",
        settings="model_options.hidden=16 float_epochs=0.1 calibration_batches=1",
        points=(1.0,),
    )
    experiment.run(config, tmp_path, Console(quiet=True))
    results = json.loads((tmp_path / "results.json").read_text())
    ways = {"greedy", "exact", "exact, scales searched, errors weighted", "exact, compensated"}
    assert ways < set(results["top1"])
    assert all(0 <= value["1"] <= 100 for value in results["top1"].values())
    with pytest.raises(ConfigError, match="needs init_from"):
        settings = config.settings.replace("float_epochs=0.1", "float_epochs=0")
        experiment.run(
            dataclasses.replace(config, settings=settings), tmp_path, Console(quiet=True)
        )
