import tempfile

import numpy as np
import pytest
from PIL import Image

from stp_jax import data


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    return data.load("digits", data_dir=tmp_path_factory.mktemp("tfds"))


def write_image(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def make_tree(tmp_path):
    """Writes train/ (`train` images a class) and test/ (`test` images a class) of noise."""

    def make(
        *, test_name="test", train=4, test=3, size=(8, 6), suffix=".png", classes="ab", gray=False
    ):
        rng = np.random.default_rng(0)
        shape = size if gray else (*size, 3)
        for split, count in (("train", train), (test_name, test)):
            for name in classes:
                for index in range(count):
                    pixels = rng.integers(0, 256, shape, np.uint8)
                    write_image(tmp_path / split / name / f"{index}{suffix}", pixels)
        return tmp_path

    return make


@pytest.fixture(autouse=True)
def temporary_folder(tmp_path, monkeypatch):
    """TFDS leaves a folder behind for each builder that is made before it is prepared."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
