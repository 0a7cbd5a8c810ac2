"""Kills a small run at random moments, half of them in the middle of a save, and compares its end.

    python benchmarks/kill_resume.py [--kills 30] [--seed 0]

SIGKILL and SIGTERM alternate. A run that reaches its end is compared, bit for bit, with one that
nothing interrupted: weights, optimizer state and BatchNorm of each stage's last checkpoint, the
exported models and the accuracies. Then another run starts, until all kills are used up.
Exit status 1 if a single bit differs, or if a run that SIGTERM ended did not say so.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

SETTINGS = ["float_epochs=3", "guided_epochs=1", "retrain_epochs=1", "calibration_batches=1"]
SETTINGS += ["checkpoint_every=1"]
MODELS = ("float.safetensors", "model.safetensors")


def start(workdir: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "experiments.run", "--exp=stp_mlp", f"--workdir={workdir}"]
    with (workdir.parent / f"{workdir.name}.txt").open("a") as log:
        return subprocess.Popen([*command, "--set", *SETTINGS], stdout=log, stderr=log)


def steps(workdir: Path) -> list[Path]:
    """Checkpoints that are complete: folders named by their step alone."""
    return [path for path in workdir.glob("checkpoints/*/*") if path.name.isdigit()]


def unfinished(workdir: Path) -> bool:
    return any(workdir.glob("checkpoints/*/*tmp*"))


def kill_once(workdir: Path, number: int, in_save: bool, chance: random.Random) -> str | None:
    """Starts the run and kills it some time after it has got further; None if it was faster."""
    process, before = start(workdir), len(steps(workdir))
    newest = max((path.stat().st_mtime for path in steps(workdir)), default=0.0)
    wait, deadline = chance.uniform(0.0, 2.0), None
    while process.poll() is None:
        if deadline is None:
            # Its first own checkpoint: from here on the kill may come at any moment.
            found = [path.stat().st_mtime for path in steps(workdir) if path.exists()]
            if len(found) != before or max(found, default=0.0) > newest:
                deadline = time.monotonic() + wait
        elif time.monotonic() >= deadline and (not in_save or unfinished(workdir)):
            break
        time.sleep(0.001)
    else:
        return None
    saving = unfinished(workdir)
    process.send_signal(number)
    code = process.wait()
    expected = 128 + number if number == signal.SIGTERM else -number
    if code not in (expected, 0):
        raise SystemExit(f"a run that {signal.Signals(number).name} ended has status {code}")
    return "in a save" if saving else "between saves"


def last_states(workdir: Path) -> dict[str, object]:
    """The last checkpoint of each stage, as arrays."""
    found = {}
    with ocp.StandardCheckpointer() as reader:
        for stage in sorted((workdir / "checkpoints").iterdir()):
            step = max(int(path.name) for path in stage.iterdir() if path.name.isdigit())
            state = reader.restore((stage / str(step) / "state").absolute())
            found[f"{stage.name}/{step}"] = jax.tree.map(np.asarray, state)
    return found


def differences(ours: Path, theirs: Path) -> list[str]:
    """What is not the same, bit for bit."""
    different = [n for n in MODELS if (ours / n).read_bytes() != (theirs / n).read_bytes()]
    ours_top1, theirs_top1 = (
        json.loads((folder / "results.json").read_text())["top1_percent"]
        for folder in (ours, theirs)
    )
    if ours_top1 != theirs_top1:
        different.append(f"top-1: {ours_top1} and {theirs_top1}")
    mine, other = last_states(ours), last_states(theirs)
    if mine.keys() != other.keys():
        return [*different, f"checkpoints {list(mine)} and {list(other)}"]
    paths = jax.tree_util.tree_leaves_with_path(mine)
    for (path, a), b in zip(paths, jax.tree.leaves(other), strict=True):
        if a.tobytes() != b.tobytes():
            different.append(jax.tree_util.keystr(path))
    return different


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    folder = Path(tempfile.mkdtemp(prefix="kill_resume_"))
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "cache"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    began = time.monotonic()
    whole = folder / "whole"
    if start(whole).wait() != 0:
        raise SystemExit(f"the uninterrupted run failed: see {folder / 'whole.txt'}")
    print(f"uninterrupted: {time.monotonic() - began:.0f} s, {len(steps(whole))} checkpoints kept")
    kills, runs, tally = 0, 0, {"in a save": 0, "between saves": 0}
    while kills < options.kills:
        runs += 1
        workdir = folder / f"killed{runs}"
        while kills < options.kills:
            number = (signal.SIGKILL, signal.SIGTERM)[kills % 2]
            where = kill_once(workdir, number, kills % 4 < 2, chance)
            if where is None:
                break
            kills += 1
            tally[where] += 1
            print(f"kill {kills}: {signal.Signals(number).name} {where}", flush=True)
        if start(workdir).wait() != 0:
            raise SystemExit(f"the killed run did not go on: see {folder / workdir.name}.txt")
        wrong = differences(workdir, whole)
        if wrong:
            raise SystemExit(f"run {runs} differs in {', '.join(wrong)}; see {folder}")
    told = ", ".join(f"{count} {where}" for where, count in tally.items())
    print(f"{kills} kills ({told}) over {runs} runs: every bit the same, {folder.name} removed")
    print(f"{time.monotonic() - began:.0f} s in all")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
