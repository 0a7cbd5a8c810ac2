"""The command line and a whole small run: results, resumption after a kill, and refusals."""

import dataclasses
import errno
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from experiments import command_help, configs
from experiments.config import Config, override
from experiments.run import main
from experiments.runtime import checkpoints, processes
from experiments.runtime.manifest import find_damage
from experiments.runtime.workdir import claim_workdir, locked
from stp_jax import models

pytestmark = pytest.mark.usefixtures("compilation_cache")

SMALL = [
    "float_epochs=1",
    "guided_epochs=0.5",
    "budgeted_epochs=0.5",
    "retrain_epochs=0.5",
    "calibration_batches=1",
    "checkpoint_every=2",
]
STAGES = ("float", "guided", "budgeted", "retrained")


def command(*arguments):
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    environment = os.environ | {"XLA_FLAGS": flags}
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.run", *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*arguments):
    process = command(*arguments)
    out, err = process.communicate()
    return process.returncode, out, err


@pytest.fixture
def run_here(capsys):
    """Like `run`, without the seconds that a process needs to start."""

    def run_here(*arguments):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run_here


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    code, out, err = run("--exp=stp_mlp", f"--workdir={workdir}", "--set", *SMALL)
    assert code == 0, err
    return workdir, out


def test_results_hold_what_they_promise(finished):
    workdir, out = finished
    results = json.loads((workdir / "results.json").read_text())
    assert set(results["top1_percent"]) == {"float", "int8", "projected", "retrained", "integer"}
    assert results["top1_percent"]["integer"] == results["top1_percent"]["retrained"]
    assert "143 validation (held out of training) and 360 test images" in results["dataset"]
    assert set(results["validation_top1_percent"]) == set(results["top1_percent"])
    assert results["device"] == "1 × cpu"
    terms = results["terms_per_weight"]
    budgeted = [terms["by_layer"][path] for path in results["budgets"]]
    for value, budget in zip(budgeted, results["budgets"].values(), strict=True):
        assert 0 < value <= budget / 8 + 1e-6
    for path, by_filter in results["budgets_by_filter"].items():
        assert results["budgets"][path] == pytest.approx(np.mean(by_filter))
    assert min(budgeted) <= terms["budgeted_layers"] <= max(budgeted)
    baseline, ours = (
        results["accelerator"][k]["energy_uj"]["array"] for k in ("int8_bit_parallel", "group_pe")
    )
    assert results["computational_energy_saving"] == pytest.approx(baseline / ours)
    cycles = results["accelerator"]["group_pe"]
    assert cycles["cycles"] == sum(cycles["cycles_by_layer"].values())
    assert set(results["budgets"]) < set(cycles["cycles_by_layer"])
    assert "computational energy saving" in out
    for plot in ("accuracy_by_stage", "terms_by_layer", "energy_by_component"):
        assert (workdir / "plots" / f"{plot}.png").stat().st_size > 10_000


@pytest.mark.slow  # its fixture is
def test_metrics_name_every_stage_in_order(finished):
    lines = (finished[0] / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [r["step"] for r in records if r["stage"] == "guided"][-1] == 10
    assert all(np.isfinite(r["loss"]) for r in records)
    assert list(dict.fromkeys(r["stage"] for r in records)) == list(STAGES)


def interrupt(arguments, workdir, stage, number):
    """Starts a run, sends it a signal after its first checkpoint of a stage; status and stderr."""
    saved = workdir / "checkpoints" / stage
    process = command(*arguments)
    # A folder named by its step alone is a checkpoint that is complete.
    while process.poll() is None and not any(p.name.isdigit() for p in saved.glob("*")):
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate()
    return process.returncode, err


def test_an_interrupted_run_ends_as_an_uninterrupted_one(finished, tmp_path):
    workdir = tmp_path / "interrupted"
    arguments = ("--exp=stp_mlp", f"--workdir={workdir}", "--set", *SMALL)
    code, _ = interrupt(arguments, workdir, "float", signal.SIGKILL)
    assert code == -signal.SIGKILL, "the run ended before it could be killed"
    code, err = interrupt(arguments, workdir, "guided", signal.SIGTERM)
    assert code == 128 + signal.SIGTERM, err
    assert "SIGTERM; run the same command again to continue" in err and "Traceback" not in err
    code, _ = interrupt(arguments, workdir, "budgeted", signal.SIGKILL)
    assert code == -signal.SIGKILL, "the run ended before it could be killed"
    code, _ = interrupt(arguments, workdir, "retrained", signal.SIGKILL)
    assert code == -signal.SIGKILL, "the run ended before it could be killed"
    code, out, err = run(*arguments)
    assert code == 0, err
    assert "resuming at step" in out
    keys = ("top1_percent", "terms_per_weight", "budgets", "computational_energy_saving")
    whole, resumed = (
        json.loads((folder / "results.json").read_text()) for folder in (finished[0], workdir)
    )
    assert {k: resumed[k] for k in keys} == {k: whole[k] for k in keys}
    for name in ("metrics.jsonl", "float.safetensors", "model.safetensors"):
        assert (finished[0] / name).read_bytes() == (workdir / name).read_bytes(), name


def start_pair(*arguments):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    together = (f"--coordinator=127.0.0.1:{port}", "--num-processes=2")
    return [command(*together, f"--process-id={i}", *arguments) for i in range(2)]


def test_two_processes_do_what_one_does(finished, tmp_path):
    """Both end by a SIGTERM to one of them, and two others go on to the end."""
    workdir = tmp_path / "two"
    short = ("guided_epochs=0", "retrain_epochs=0", "sharding=fsdp", "error_weighting=outputs")
    arguments = ("--exp=stp_mlp", f"--workdir={workdir}", "--set", *SMALL, *short)
    pair = start_pair(*arguments)
    saved = workdir / "checkpoints" / "float"
    while pair[1].poll() is None and not any(p.name.isdigit() for p in saved.glob("*")):
        time.sleep(0.02)
    pair[1].send_signal(signal.SIGTERM)
    told = [process.communicate() for process in pair]
    assert [process.returncode for process in pair] == [143, 143], told

    pair = start_pair(*arguments)
    told = [process.communicate() for process in pair]
    assert [process.returncode for process in pair] == [0, 0], told
    assert "float: resuming at step" in told[0][0]
    assert "float: top-1" in told[0][0] and "top-1" not in told[1][0], "the first one logs"
    whole, joint = (
        json.loads((folder / "results.json").read_text())["top1_percent"]
        for folder in (finished[0], workdir)
    )
    # An example that is counted twice or left out would show: it is 0.28 points.
    for stage in ("float", "int8"):
        assert joint[stage] == pytest.approx(whole[stage], abs=0.3), stage
    losses = [
        [
            record["loss"]
            for record in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
            if record["stage"] == "float"
        ]
        for folder in (finished[0], workdir)
    ]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--coordinator=localhost:1"], "give --coordinator, --num-processes and --process-id"),
        (
            ["--coordinator=localhost", "--num-processes=2", "--process-id=0"],
            "must be HOST:PORT, got 'localhost'",
        ),
        (
            ["--coordinator=localhost:1", "--num-processes=2", "--process-id=2"],
            "--process-id must be from 0",
        ),
    ],
)
def test_wrong_processes_are_named(arguments, message, capsys):
    assert main(["--exp=stp_mlp", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def interruptible():
    """Ctrl-C raises, as in a terminal; what is started in the background may ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_signal_is_obeyed_at_the_end_of_the_step_and_a_second_one_at_once():
    with processes.deferred_signals():
        assert processes.pending() is None
        signal.raise_signal(signal.SIGINT)
        assert processes.pending() == signal.SIGINT
        with pytest.raises(processes.Interrupted, match="SIGINT"):
            processes.check()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert processes.pending() is None


def test_a_disk_that_fills_up_ends_the_run_with_a_message(tmp_path, monkeypatch, capsys):
    """What a full disk does to a checkpoint in the background, on step 6 of the first stage."""
    real = checkpoints.write_manifest

    def write(folder):
        if folder.name.startswith("6."):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        real(folder)

    monkeypatch.setattr(checkpoints, "write_manifest", write)
    devices = jax.device_count()
    arguments = [
        "--exp=stp_mlp",
        f"--workdir={tmp_path / 'run'}",
        "--set",
        *SMALL,
        f"batch_size={8 * devices}",
        f"eval_batch_size={8 * devices}",
    ]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert main(arguments) == 1
    err = capsys.readouterr().err
    assert f"error: the disk of {tmp_path / 'run'} is full" in err
    assert "run the same command again" in err
    folder = tmp_path / "run" / "checkpoints" / "float"
    whole = [int(p.name) for p in folder.iterdir() if p.name.isdigit() and not find_damage(p)]
    assert max(whole) == 4


@pytest.mark.slow  # its fixture is
def test_another_configuration_is_refused_and_nothing_touched(finished, run_here):
    workdir, _ = finished
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()}
    arguments = ("--exp=stp_mlp", f"--workdir={workdir}", "--set", *SMALL, "seed=5")
    code, _, err = run_here(*arguments)
    assert code == 2
    assert "seed: 0 → 5" in err
    assert before == {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()}


def test_two_runs_do_not_share_a_folder(tmp_path, capsys):
    workdir = tmp_path / "run"
    sizes = [f"{key}={8 * jax.device_count()}" for key in ("batch_size", "eval_batch_size")]
    config = override(configs.load("stp_mlp").CONFIG, sizes)
    claim_workdir(workdir, "stp_mlp", config)
    with locked(workdir):
        assert main(["--exp=stp_mlp", f"--workdir={workdir}", "--set", *sizes]) == 2
    assert f"another run is working in {workdir}" in capsys.readouterr().err


def test_a_kill_in_the_first_write_leaves_a_folder_that_can_be_claimed(tmp_path):
    (tmp_path / "config.json.partial").write_text("{")
    claim_workdir(tmp_path, "stp_mlp", configs.load("stp_mlp").CONFIG)
    assert json.loads((tmp_path / "config.json").read_text())["experiment"] == "stp_mlp"


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    code, _, err = run("--exp=stp_resnet18", f"--workdir={tmp_path}")
    assert code == 2 and "not a run's folder" in err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_experiments_are_listed(run_here):
    code, out, _ = run_here("--exp=")
    assert code == 0 and "stp_resnet18 " in out and "handwritten digits" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--exp=nothing"], "no experiment 'nothing'"),
        (["--exp=stp_resnet18", "--set", "data=no_such_set"], "no_such_set"),
        (["--exp=stp_resnet18", "--set", "data=folder", "data_dir=/no/where"], "/no/where"),
        (
            ["--exp=stp_resnet18", "--set", "batch_size=5000"],
            "more than the 1294 training examples",
        ),
        (["--exp=stp_resnet18", "--set", "model=resnet20"], "stem"),
        (["--exp=stp_resnet18", "--set", "int8_layers=head"], "no layer has such a path"),
    ],
)
def test_wrong_runs_fail_before_any_work(arguments, message, tmp_path, run_here):
    code, _, err = run_here(*arguments, f"--workdir={tmp_path / 'run'}")
    assert code == 2
    assert message in err and "Traceback" not in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ('{"layers.9": 3}', "for these layers: layers.0, layers.2"),
        ('{"layers.0": 3, "layers.2": 33}', "layers.2 must have a whole number of terms"),
    ],
)
def test_wrong_budgets_by_hand_fail_before_any_work(text, message, tmp_path, capsys):
    (tmp_path / "budgets.json").write_text(text)
    workdir = tmp_path / "run"
    setting = f"budgets={tmp_path / 'budgets.json'}"
    assert main(["--exp=stp_mlp", f"--workdir={workdir}", "--set", setting]) == 2
    assert message in capsys.readouterr().err and not workdir.exists()


def shown_help(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        main([*arguments])
    assert end.value.code == 0
    return capsys.readouterr().out


def test_help_describes_the_keys_of_the_experiment(capsys):
    assert "retrain_epochs=8.0" in shown_help(capsys, "--help")
    shown = shown_help(capsys, "--exp=stp_mlp", "--help", "regularization")
    assert "distill=0.5" in shown and "weight of the float model's soft labels" in shown
    shown = shown_help(capsys, "--help", "--exp=hw_compare")
    assert "image_size=224" in shown and "distill" not in shown


def test_help_shows_every_key_in_sections_that_fit_a_screen(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    names = [*command_help.key_sections(Config), "sweeps", "processes"]
    overview = shown_help(capsys, "--help")
    assert all(name in overview.rpartition("by section")[2] for name in names)
    screens = [shown_help(capsys, "--help", name) for name in names]
    for field in dataclasses.fields(Config):
        assert sum(f"\n  {field.name}=" in screen for screen in screens) == 1, field.name
    assert "--slurm" in screens[-2] and "--coordinator" in screens[-1]
    for name in configs.names():
        screens.append(shown_help(capsys, f"--exp={name}", "--help"))
    for screen in [overview, *screens]:
        assert len(screen.splitlines()) < 24  # and the prompt
        assert max(map(len, screen.splitlines())) <= 80, screen


def test_an_unknown_section_of_the_help_is_an_error_that_lists_them(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help", "budget"])
    assert end.value.code == 2
    assert "no section 'budget' of the help; there are data, model" in capsys.readouterr().err


def test_hw_compare_sets_all_processing_elements_side_by_side(tmp_path, run_here, monkeypatch):
    """On a narrow ResNet of one block a stage.

    With the small stem: with the other one the int8 first layer holds the saving below 2.
    """
    options = {"width": 16, "stem": "small", "num_classes": 10}
    narrow = functools.partial(models.ResNet, (1, 1, 1, 1), **options)
    monkeypatch.setattr(models, "create", lambda name, *, num_classes, rngs: narrow(rngs=rngs))
    arguments = ("--exp=hw_compare", f"--workdir={tmp_path / 'hw'}", "--set", "image_size=32")
    code, out, err = run_here(*arguments)
    assert code == 0, err
    results = json.loads((tmp_path / "hw" / "results.json").read_text())
    designs = results["designs"]
    assert next(iter(designs)) == "BitParallel" and designs["BitParallel"]["array_saving"] == 1
    assert designs["GroupPE"]["array_saving"] > 2
    assert len(designs) == 16 and "untrained" in results["weights"] and "Huang" in out
    by_gates = results["designs_by_gates"]
    narrow = [f"DotProduct of 8, int{bits}" for bits in (4, 3, 2)]
    groups = {lanes: f"GroupPE of {lanes} lanes" for lanes in (2, 4)}
    assert [*by_gates] == [*designs, *narrow, *(f"{name}, 4 bits" for name in groups.values())]
    for figure in ("pj_per_mac", "inner_pj_per_mac"):
        costs = [by_gates[name][figure] for name in ("DotProduct of 8", *narrow)]
        assert costs == sorted(costs, reverse=True)
    # The first layer keeps all its terms, which costs group PEs more than the others.
    for name in groups.values():
        row, few_bits = by_gates[name], by_gates[f"{name}, 4 bits"]
        assert row["inner_saving_over_dot_8"] > row["saving_over_dot_8"]
        assert few_bits["inner_pj_per_mac"] < row["inner_pj_per_mac"]
    unknown = {name for name, row in by_gates.items() if row["pj_per_mac"] is None}
    assert unknown == {"Stripes", "BitPragmatic", "Laconic", "Bitlet"}
    assert all(bool(row["reason"]) == (name in unknown) for name, row in by_gates.items())
    assert by_gates["DotProduct of 8"]["saving"] == by_gates["DotProduct of 1"]["saving"] == 1
    assert out.index("by gates") < out.index("by the 45 nm table")
