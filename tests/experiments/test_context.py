"""What a run works with: the examples that it calibrates on."""

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from experiments.config import Config, ConfigError
from experiments.context import check_model, make_context
from stp_jax import data


@pytest.fixture
def sorted_folder(tmp_path):
    """Images of four classes, which a folder lists class by class."""
    for split, number in (("train", 40), ("test", 8)):
        for label in range(4):
            folder = tmp_path / "images" / split / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(number):
                pixels = np.full((8, 8, 3), 60 * label + i, np.uint8)
                Image.fromarray(pixels).save(folder / f"{i:03}.png")
    return tmp_path / "images"


def make(tmp_path, **settings):
    config = Config(batch_size=16, eval_batch_size=16, calibration_batches=3, **settings)
    return make_context(config, tmp_path / "run", Console(quiet=True))


def labels(context):
    return np.concatenate([np.asarray(b["label"]) for b in context.calibration_batches()])


def test_calibration_sees_every_class_of_a_sorted_folder(sorted_folder, tmp_path):
    context = make(tmp_path, data="folder", data_dir=str(sorted_folder), model="resnet20")
    drawn = labels(context)
    assert len(drawn) == 48
    # 48 of 144 at random: twelve of each class are expected, and six or fewer hardly ever seen.
    assert np.bincount(drawn, minlength=4).min() >= 6


@pytest.mark.parametrize("kind", ["digits", data.TEXT])
def test_calibration_is_the_same_in_every_run_and_draws_nothing_twice(
    kind, tmp_path, tmp_path_factory
):
    folder = str(tmp_path_factory.mktemp("tfds"))
    contexts = [make(tmp_path, data=kind, data_dir=folder, seed=seed) for seed in (0, 1)]
    first, second = (
        np.concatenate([np.asarray(b["input"]) for b in context.calibration_batches()])
        for context in contexts
    )
    np.testing.assert_array_equal(first, second)
    assert len(np.unique(first.reshape(len(first), -1), axis=0)) == len(first) == 48


def test_few_examples_are_all_used(sorted_folder, tmp_path):
    config = {"data": "folder", "data_dir": str(sorted_folder), "model": "resnet20"}
    context = make_context(
        Config(batch_size=48, eval_batch_size=16, calibration_batches=9, **config),
        tmp_path / "run",
        Console(quiet=True),
    )
    batches = context.calibration_batches()
    assert sum(int(np.asarray(batch["mask"]).sum()) for batch in batches) == 144


def test_only_tied_embeddings_get_budgets(tmp_path):
    text = {"data": "python_docs", "embeddings": True, "check_integers": False}
    check_model(make(tmp_path, model="decoder_lm", **text))
    with pytest.raises(ConfigError, match="lstm_lm is none: encoder is read by index only"):
        check_model(make(tmp_path, model="lstm_lm", **text))
    with pytest.raises(ConfigError, match="resnet20 is none: it has none"):
        check_model(make(tmp_path, model="resnet20", embeddings=True, check_integers=False))


def test_models_that_cannot_be_reconstructed_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"fit=reconstruct: layer 'rnn.* runs more than once"):
        check_model(make(tmp_path, data="python_docs", model="lstm_lm", fit="reconstruct"))
    with pytest.raises(ConfigError, match="power_of_two_scales"):
        check_model(make(tmp_path, model="mlp", fit="reconstruct", integer_network=True))
