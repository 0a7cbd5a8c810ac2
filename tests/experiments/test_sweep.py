"""Sweeps: every member is run once, failed ones are told and left to the next call, one table."""

import importlib.util
import json
import os
import shutil
import signal
import sys
import threading
import time

import pandas as pd
import pytest

from experiments import sweep
from experiments.config import ConfigError
from experiments.run import main
from experiments.sweep import Member, parse_sweep

# Stands for a run: notes that it ran, fails for seed 1, waits for a signal for seed 7.
STAND_IN = """
import json, os, pathlib, signal, sys, time
folder, *settings = sys.argv[1:]
settings = dict(text.split("=") for text in settings)
folder = pathlib.Path(folder)
folder.mkdir(exist_ok=True)
with (folder / "ran").open("a") as file:
    file.write("x")
if settings["seed"] == "1" and not (folder.parent / "repaired").exists():
    sys.exit("error: the disk is on fire")
if settings["seed"] == "7":
    signal.signal(signal.SIGTERM, lambda *_: ((folder / "saved").touch(), os._exit(143)))
    time.sleep(60)
top1 = {"float": 90.0 + int(settings["seed"])}
results = {"top1_percent": top1, "budgets": {"fc": 3}, "config": settings}
(folder / "results.json").write_text(json.dumps(results))
"""


@pytest.fixture
def stand_in(monkeypatch):
    def command(name, workdir, settings):
        return [sys.executable, "-c", STAND_IN, str(workdir), *settings]

    monkeypatch.setattr(sweep, "_command", command)
    return command


def run(workdir, *arguments):
    return main(["--exp=stp_mlp", f"--workdir={workdir}", *arguments])


def test_members_are_every_combination_in_order():
    members = parse_sweep(["seed=0,1", "terms_per_weight=0.5,1"])
    assert [dict(member.settings) for member in members] == [
        {"seed": "0", "terms_per_weight": "0.5"},
        {"seed": "0", "terms_per_weight": "1"},
        {"seed": "1", "terms_per_weight": "0.5"},
        {"seed": "1", "terms_per_weight": "1"},
    ]


def test_a_file_lists_members_one_by_one(tmp_path):
    path = tmp_path / "members.json"
    path.write_text('[{"seed": 3, "width": null}, {"model_options.hidden": [64, 32]}]')
    assert [member.arguments for member in parse_sweep([str(path)])] == [
        ["seed=3", "width=none"],
        ["model_options.hidden=64,32"],
    ]


def test_names_are_distinct_and_safe_as_folders():
    values = ["../../etc", "..\\x", "a/b", "a_b", "x" * 300, "y" * 300, "ü", ""]
    names = [Member({"data_dir": value}).name for value in values]
    assert len(set(names)) == len(names)
    for name in names:
        assert "/" not in name and "\\" not in name and len(name) < 200 and name[0] != "."


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["seed"], "cannot read seed"),
        (["seed=0", "budget"], "takes KEY=V1,V2"),
        (["seed=0", "seed=1"], "--sweep has seed twice"),
        (["seed=0,0"], "has the member seed=0 twice"),
        (["=3"], "takes KEY=V1,V2"),
    ],
)
def test_wrong_sweeps_are_named(texts, message):
    with pytest.raises(ConfigError, match=message):
        parse_sweep(texts)


@pytest.mark.parametrize("content", ["", "{}", "[]", "[3]", "[{}]", '{"seed": [1, 2]}'])
def test_files_that_are_no_list_of_settings_are_refused(content, tmp_path):
    path = tmp_path / "members.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"a list such as|no members"):
        parse_sweep([str(path)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sweep", "bugdet=3"], "member bugdet=3: unknown key 'bugdet'; did you mean budget"),
        (["--sweep", "seed=0,x"], "member seed=x: seed must be a whole number"),
        (["--sweep", "seed=0,1", "--set", "seed=3"], "seed stands in --set and in --sweep"),
        (["--sweep", "seed=0", "--jobs=0"], "--jobs must be 1 or more"),
        (["--sweep", "seed=0", "--distributed"], "starts processes of its own"),
    ],
)
def test_no_member_starts_before_all_are_sound(arguments, message, tmp_path, capsys, stand_in):
    assert run(tmp_path / "sweep", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


def test_failed_members_are_told_and_only_they_run_again(tmp_path, capsys, stand_in, monkeypatch):
    workdir = tmp_path / "sweep"
    arguments = ("--sweep", "seed=0,1,2", "--jobs=2")
    assert run(workdir, *arguments) == 1
    out, err = capsys.readouterr()
    assert "seed=1: failed: error: the disk is on fire" in out
    assert "1 of 3 members failed" in err
    table = pd.read_csv(workdir / "sweep.csv")
    assert table["seed"].tolist() == [0, 1, 2]
    assert table["status"][1].startswith("failed") and table["status"][2] == "finished"
    assert table["top1_percent.float"].tolist()[::2] == [90.0, 92.0]
    assert not any("config" in name or "budgets" in name for name in table)

    monkeypatch.setattr(sweep, "_command", lambda *_: [sys.executable, "-c", "raise SystemExit(9)"])
    assert run(workdir, *arguments) == 1
    assert "on fire" not in capsys.readouterr().out  # that was another attempt
    monkeypatch.undo()
    monkeypatch.setattr(sweep, "_command", stand_in)

    (workdir / "repaired").touch()
    assert run(workdir, *arguments) == 0
    ran = [(workdir / f"seed={seed}" / "ran").read_text() for seed in range(3)]
    assert ran == ["x", "xx", "x"]
    assert pd.read_csv(workdir / "sweep.csv")["top1_percent.float"].tolist() == [90.0, 91.0, 92.0]


def test_a_sweep_may_grow(tmp_path, stand_in):
    assert run(tmp_path / "sweep", "--sweep", "seed=0") == 0
    shutil.rmtree(tmp_path / "sweep" / "logs")  # nothing is lost with them
    assert run(tmp_path / "sweep", "--sweep", "seed=0,2") == 0
    assert (tmp_path / "sweep" / "seed=0" / "ran").read_text() == "x"


def test_a_signal_lets_members_save_and_starts_no_other(tmp_path, capsys, stand_in):
    workdir = tmp_path / "sweep"

    def interrupt():
        for _ in range(600):
            if (workdir / "seed=7" / "ran").exists():
                break
            time.sleep(0.05)
        time.sleep(0.3)  # until its handler is there
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert run(workdir, "--sweep", "seed=7,8") == 143
    thread.join()
    assert (workdir / "seed=7" / "saved").exists()
    assert not (workdir / "seed=8").exists()
    assert "run the same command again" in capsys.readouterr().err


def test_folders_of_something_else_are_refused(tmp_path, capsys, stand_in):
    (tmp_path / "thesis.tex").write_text("precious")
    assert run(tmp_path, "--sweep", "seed=0") == 2
    assert "is not a sweep's folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_finished_members_of_other_settings_are_refused(tmp_path, capsys, stand_in):
    assert run(tmp_path / "sweep", "--sweep", "seed=0") == 0
    stored = {"experiment": "stp_mlp", "config": {"seed": 0, "float_lr": 123.0}}
    (tmp_path / "sweep" / "seed=0" / "config.json").write_text(json.dumps(stored))
    assert run(tmp_path / "sweep", "--sweep", "seed=0") == 2
    assert "float_lr: 123.0" in capsys.readouterr().err


@pytest.mark.skipif(not importlib.util.find_spec("submitit"), reason="needs submitit")
def test_members_run_as_cluster_jobs(tmp_path, capsys, stand_in):
    """Through submitit's own stand-in for a cluster, which starts processes here."""
    workdir = tmp_path / "sweep"
    slurm = ("--slurm", "cluster=local", "timeout_min=2")
    assert run(workdir, "--sweep", "seed=0,1", *slurm) == 1
    assert "seed=1: failed" in capsys.readouterr().out
    table = pd.read_csv(workdir / "sweep.csv")
    assert table["status"][0] == "finished" and "on fire" in table["status"][1]


def test_a_member_is_a_run_of_the_command_line(tmp_path, capsys):
    """One that ends early, on data that are not there, which the configuration cannot know."""
    assert run(tmp_path / "sweep", "--set", "data=no_such_set", "--sweep", "seed=4") == 1
    told = capsys.readouterr().out
    assert "seed=4: failed: error: no data set is called 'no_such_set'" in told
