"""The ImageNet recipe, every line of it, on a small stand-in: 224×224 JPEGs of generated textures.

    python benchmarks/imagenet_standin.py [--epochs 1] [--workdir DIR]

`stp_resnet18_imagenet` runs as it is (full width, random crops, label smoothing, bfloat16, stages,
schedules) but for its length, on two (virtual) devices. It is killed after its first checkpoint and
started again. What it prints shows that the recipe works and what the accelerator makes of 224×224
layers with weights trained that little; it says nothing about ImageNet.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("rings", "stripes", "checks", "blobs")
SIZES = ((256, 256), (240, 320), (300, 230))  # height, width: crops must cope with all


def texture(kind: str, height: int, width: int, chance: np.random.Generator) -> np.ndarray:
    """One image of a class, uint8 [height, width, 3]."""
    y, x = np.mgrid[:height, :width] / 224.0
    angle, wave, shift = chance.uniform(0, np.pi), chance.uniform(20, 50), chance.uniform(0, 6)
    along = np.cos(angle) * x + np.sin(angle) * y
    across = np.cos(angle) * y - np.sin(angle) * x
    value = {
        "rings": np.sin(wave * np.hypot(x - 0.5, y - 0.5) + shift),
        "stripes": np.sin(wave * along + shift),
        "checks": np.sign(np.sin(wave * along) * np.sin(wave * across)),
        "blobs": np.sin(wave * along / 3 + shift) + np.sin(wave * across / 3),
    }[kind]
    colour = chance.uniform(40, 110, size=3)
    noise = chance.normal(0, 15, size=(height, width, 3))
    return np.clip(128 + colour * value[..., None] + noise, 0, 255).astype(np.uint8)


def make_images(folder: Path, per_class: dict[str, int]) -> None:
    chance = np.random.default_rng(0)
    for split, count in per_class.items():
        for kind in CLASSES:
            place = folder / split / kind
            place.mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray(texture(kind, *SIZES[i % len(SIZES)], chance))
                image = image.convert("L") if i == 0 else image  # ImageNet has some gray ones
                image.save(place / f"{i}.jpg", quality=90)


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--epochs", type=float, default=1.0, help="of each stage")
    options.add_argument("--workdir", type=Path)
    options = options.parse_args()
    workdir = options.workdir or Path(tempfile.mkdtemp()) / "standin"
    images = workdir.parent / f"{workdir.name}_images"
    if not images.exists():
        make_images(images, {"train": 32, "test": 16})
    epochs = {key: options.epochs for key in ("float_epochs", "guided_epochs", "retrain_epochs")}
    settings = {"data": "folder", "data_dir": images, "batch_size": 16, "eval_batch_size": 16}
    settings |= epochs | {"float_lr": 0.02, "bn_batches": 2, "calibration_batches": 1}
    settings |= {"checkpoint_every": 2, "log_every": 1, "check_integers": "false"}
    command = [sys.executable, "-m", "experiments.run", "--exp=stp_resnet18_imagenet"]
    command += [f"--workdir={workdir}", "--set", *(f"{k}={v}" for k, v in settings.items())]
    devices = "--xla_force_host_platform_device_count=2"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": devices}
    begin = time.time()
    process = subprocess.Popen(command, env=environment)
    saved = workdir / "checkpoints" / "float"
    while process.poll() is None and not any(p.name.isdigit() for p in saved.glob("*")):
        time.sleep(0.1)
    process.kill()
    killed = process.wait() < 0
    print(f"killed after the first checkpoint: {killed}; again:", flush=True)
    status = subprocess.run(command, env=environment, check=False).returncode
    if status or not killed:
        print(f"the recipe failed: status {status}, killed {killed}")
        return 1
    results = json.loads((workdir / "results.json").read_text())
    kept = ("dataset", "device", "top1_percent", "terms_per_weight", "computational_energy_saving")
    shown = {key: results[key] for key in kept}
    shown["terms_per_weight"] = results["terms_per_weight"]["budgeted_layers"]
    shown["cycles"] = {
        pe: results["accelerator"][pe]["cycles"] for pe in ("int8_bit_parallel", "group_pe")
    }
    print(json.dumps(shown, indent=2, ensure_ascii=False))
    print(f"{time.time() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
