"""Finished runs, printed again and compared."""

import json

import pytest

from experiments.report import main


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
