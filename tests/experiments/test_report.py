"""Finished runs, printed again and compared."""

import json

import pytest

from experiments.report import main
from experiments.run import main as run


def results(**changes):
    top1 = {"float": 90.0, "retrained": 88.5}
    return {
        "experiment": "stp_mlp",
        "dataset": "digits",
        "device": "1 × cpu",
        "model": "mlp",
        "seed": 0,
        "top1_percent": top1,
        "validation_top1_percent": None,
        "terms_per_weight": {"budgeted_layers": 0.5},
        "by_gates": {"technology": "45 nm by gates", "saving": 1.5, "saving_with_encoder": 1.25},
        "accelerator": {
            "technology": "45 nm",
            "group_pe": {"cycles": 1234, "energy_uj": {"array": 0.25}},
        },
        "computational_energy_saving": 2.5,
        "computational_energy_saving_with_encoder": 2.25,
        "config": {"seed": 0, "retrain_lr": 0.01},
        **changes,
    }


@pytest.fixture
def folder(tmp_path):
    def make(name, content):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(content))
        return str(tmp_path / name)

    return make


@pytest.mark.parametrize(
    ("changes", "narrow", "group_pe"),
    [
        (["weight_bits=3", "terms_per_weight=0.5"], 3, 4),
        (["weight_bits=4", "budget=16"], 4, 4),
        (["terms_per_weight=0.5"], 8, 8),
        (["weight_bits=4", "group_size=4", "budget=8"], 4, None),
    ],
)
def test_layers_with_budgets_are_priced_on_the_pes_that_fit(changes, narrow, group_pe, tmp_path):
    untrained = ["model_options.hidden=16", "float_epochs=0", "retrain_epochs=0"]
    assert run(["--exp=stp_mlp", f"--workdir={tmp_path}", "--set", *untrained, *changes]) == 0
    found = json.loads((tmp_path / "results.json").read_text())["budgeted_layers_by_gates"]
    pes = found["pes"]
    assert f"weight_bits={narrow})" in pes["dot_product"]["pe"]
    lanes = {f"group_pe_of_{lanes}_lanes" for lanes in (2, 4)} if group_pe else set()
    assert pes.keys() == {"dot_product", *lanes}
    assert all(f"bits={group_pe}," in pes[name]["pe"] for name in lanes)
    for pe in pes.values():
        assert pe["saving"] == pytest.approx(found["int8_uj"] / pe["array_uj"])
        assert pe["saving_with_encoder"] <= pe["saving"]
    assert pes["dot_product"]["saving"] > 1 or narrow == 8


def test_a_run_is_printed_again(folder, capsys):
    assert main([folder("a", results())]) == 0
    out = capsys.readouterr().out
    assert "test retrained, %" in out and "88.50" in out and "2.50×" in out
    assert "1.50× (1.25×)" in out
    assert "validation" not in out and "configurations" not in out


def test_several_runs_stand_side_by_side_with_what_differs(folder, capsys):
    a = folder("a", results())
    b = folder("b", results(config={"seed": 0, "retrain_lr": 0.02, "window": 64}))
    assert main([a, b]) == 0
    out = capsys.readouterr().out
    table, different = out.split("configurations: ")
    assert table.count("88.50") == 2
    lines = {line.split()[0]: line.split()[1:] for line in different.splitlines()[2:]}
    assert lines == {"retrain_lr": ["0.01", "0.02"], "window": ["not", "there", "64"]}
    assert main([a, folder("c", results())]) == 0
    assert "configurations: equal" in capsys.readouterr().out


def test_folders_without_a_run_are_named(folder, capsys, tmp_path):
    assert main([str(tmp_path / "none")]) == 2
    assert "holds no finished run" in capsys.readouterr().err
    assert main([folder("sweep", {"experiment": "hw_compare"})]) == 2
    assert "results of hw_compare, no training run" in capsys.readouterr().err
