"""A comparison: equal training for everyone, members that resume, one table, and its page."""

import dataclasses
import json

import jax
import pytest
from rich.console import Console

from experiments import configs
from experiments.comparison import (
    ABLATIONS,
    ALL_TERMS,
    METHODS,
    ComparisonConfig,
    member_config,
    members,
    parse_base,
    run_comparison,
    summary,
)
from experiments.config import ConfigError
from experiments.results_page import DATA, DOCS, page, stored_study

BASE = configs.load("stp_resnet20_cifar10").CONFIG


def test_all_members_train_for_the_same_steps_from_the_same_start(tmp_path):
    config = ComparisonConfig(steps=200, batch_size=64, seeds=2)
    start = tmp_path / "float.safetensors"
    start.touch()
    epoch = 781
    for member in members(config, BASE):
        c = member_config(config, BASE, member, start, epoch)
        stages = (c.float_epochs, c.guided_epochs, c.budgeted_epochs, c.retrain_epochs)
        expected = 0 if "not retrained" in member.method else 200
        assert sum(round(epochs * epoch) for epochs in stages) == expected, member
        assert (c.batch_size, c.init_from, c.seed) == (64, str(start), member.seed)
        if member.terms is not None and c.budget is not None:
            assert c.budget == member.terms * c.group_size
    names = [member.folder for member in members(config, BASE)]
    assert len(set(names)) == len(names)


def test_members_cover_methods_points_and_ablation():
    config = ComparisonConfig(points="1.0,0.5", more_points="2.0", seeds=3, ablation=0.5)
    found = members(config, BASE)
    at = {(m.method, m.terms): [] for m in found if not m.ablation}
    for m in found:
        if not m.ablation:
            at[m.method, m.terms].append(m.seed)
    assert at["STP", 0.5] == at["float", None] == at["int8", None] == [0, 1, 2]
    assert at["STP", 2.0] == [0]
    # A cap of half a term per weight does not exist.
    assert ("term cap per weight", 0.5) not in at and ("term cap per weight", 1.0) in at
    assert {m.method for m in found if m.ablation} == set(ABLATIONS)
    assert {m.method for m in found if not m.ablation} == {"float", "int8", *METHODS}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"points": "1.0,half"}, "points must be numbers"),
        ({"points": f"{ALL_TERMS + 1}"}, "terms per weight"),
        ({"more_methods": "STP,SFP"}, "more_methods must be among .* got SFP"),
        ({"steps": 0}, "steps must be 1 or more"),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        ComparisonConfig(**changes)


def test_a_base_must_be_a_training_experiment():
    with pytest.raises(ConfigError, match="no training experiment"):
        parse_base(ComparisonConfig(base="hw_compare"))


@pytest.fixture(autouse=True, scope="module")
def users_settings():
    """Training runs as it does for users; optax's schedules rely on JAX's usual promotion."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("comparison")
    config = ComparisonConfig(
        base="stp_mlp",
        settings="model_options.hidden=16 calibration_batches=1 bn_batches=0 eval_batch_size=360",
        start_epochs=0.5,
        steps=6,
        points="1.0",
        more_points="",
        seeds=1,
        ablation=None,
    )
    base = parse_base(config)
    console = Console(quiet=True)
    results = run_comparison(config, base, workdir, "compare_methods", console)
    return workdir, config, base, results


def test_results_come_from_the_members_runs(comparison):
    workdir, _, _, results = comparison
    assert results["missing"] == []
    assert [row["method"] for row in results["rows"]] == ["float", "int8", *METHODS]
    for row in results["rows"]:
        name = "_".join("".join(c if c.isalnum() else " " for c in row["method"]).split())
        terms = "" if row["terms"] is None else "-t1"
        run = json.loads(
            (workdir / "members" / f"{name}{terms}-seed0" / "results.json").read_text()
        )
        stage = "float" if row["method"] == "float" else "retrained"
        assert row["top1"] == run["top1_percent"][stage]
        if row["terms"] is not None:
            assert row["terms_held"] <= row["terms"] + 1e-6
    table = summary(results).set_index("method")
    rows = {row["method"]: row for row in results["rows"]}
    lost = rows["float"]["top1"] - rows["STP"]["top1"]
    assert table.loc["STP", "loss"] == pytest.approx(lost)
    assert table.loc["float", "loss"] == 0


def test_finished_members_are_not_run_again_and_lost_ones_are(comparison):
    workdir, config, base, results = comparison
    files = {p: p.stat().st_mtime_ns for p in (workdir / "members").rglob("results.json")}
    lost = workdir / "members" / "uniform_group_budgets-t1-seed0" / "results.json"
    lost.unlink()
    again = run_comparison(config, base, workdir, "compare_methods", Console(quiet=True))
    assert again["rows"] == results["rows"]
    assert lost.exists()
    assert all(p.stat().st_mtime_ns == t for p, t in files.items() if p != lost)


def test_a_member_that_fails_does_not_stop_the_others(comparison, tmp_path):
    _, config, base, _ = comparison
    config = dataclasses.replace(config, steps=2)
    broken = tmp_path / "members" / "int8-seed0"
    broken.mkdir(parents=True)
    (broken / "thesis.tex").write_text("precious")
    results = run_comparison(config, base, tmp_path, "compare_methods", Console(quiet=True))
    assert results["missing"] == ["int8-seed0"]
    assert [p.name for p in broken.iterdir()] == ["thesis.tex"]


def test_the_page_holds_every_row_and_says_what_is_missing(comparison):
    results = comparison[3]
    text = page(results)
    for row in results["rows"]:
        assert row["method"] in text or row["method"] in ("float", "int8")
        assert f"{row['top1']:.2f}" in text
    total = len(results["rows"]) + 1
    assert f"1 of {total} runs of the comparison were not made." in page(
        {**results, "missing": ["x"]}
    )


@pytest.mark.skipif(not DATA.exists(), reason="no stored results")
def test_the_documentation_shows_the_stored_results():
    assert (DOCS / "results.md").read_text() == page(json.loads(DATA.read_text()), stored_study())


def test_projections_are_compared_before_retraining(tmp_path):
    experiment = configs.load("compare_projections")
    config = dataclasses.replace(
        experiment.CONFIG,
        base="stp_mlp",
        settings="model_options.hidden=16 float_epochs=0.1 calibration_batches=1",
        points="1.0",
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
