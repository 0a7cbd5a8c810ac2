import numpy as np
import pytest
import tensorflow_datasets as tfds

from stp_jax import data


class StpColours(tfds.core.GeneratorBasedBuilder):
    """Four RGB images a split, each of its class's colour."""

    VERSION = tfds.core.Version("2.1.0")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "picture": tfds.features.Tensor(shape=(4, 4, 3), dtype=np.uint8),
                    "colour": tfds.features.ClassLabel(names=["red", "green"]),
                }
            ),
            supervised_keys=("picture", "colour"),
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(), "validation": self._generate_examples()}

    def _generate_examples(self):
        for index in range(4):
            picture = np.zeros((4, 4, 3), np.uint8)
            picture[..., index % 2] = 255
            yield index, {"picture": picture, "colour": index % 2}


class StpNumbers(tfds.core.GeneratorBasedBuilder):
    """A data set without images."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict({"number": np.int64})
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(), "test": self._generate_examples()}

    def _generate_examples(self):
        yield 0, {"number": 1}


def prepare(builder, data_dir):
    builder(data_dir=data_dir, file_format="array_record").download_and_prepare()


def test_any_prepared_image_classification_set_is_read(tmp_path):
    prepare(StpColours, tmp_path)
    dataset = data.load("stp_colours", data_dir=tmp_path)
    assert (dataset.name, dataset.version) == ("stp_colours", "2.1.0")
    assert dataset.class_names == ("red", "green")
    assert dataset.image_shape == (4, 4, 3)
    images, labels = dataset.test.fetch(np.arange(4))
    np.testing.assert_array_equal(images.argmax(-1)[:, 0, 0], labels)


def test_rgb_sets_come_with_the_statistics_of_imagenet(tmp_path):
    prepare(StpColours, tmp_path)
    dataset = data.load("stp_colours", data_dir=tmp_path)
    assert dataset.mean == (0.485, 0.456, 0.406)  # torchvision's reference transforms
    assert dataset.std == (0.229, 0.224, 0.225)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        (
            "cifar10",
            ["cifar10 is not prepared in", "tfds build cifar10 --file_format=array_record"],
        ),
        ("imagenet2012", ["first, by hand", "ILSVRC2012_img_train.tar"]),
        ("cifar11", ["no data set is called 'cifar11'", "cifar10"]),
        ("digit", ["did you mean digits"]),
        ("qqqqqqqq", ["tfds.list_builders"]),
        ("cifar10:0.0.1", ["TFDS cannot find 'cifar10:0.0.1'"]),
    ],
)
def test_what_is_not_there_is_explained(tmp_path, name, parts):
    with pytest.raises(ValueError) as caught:
        data.load(name, data_dir=tmp_path)
    for part in parts:
        assert part in str(caught.value)


def test_sets_of_another_kind_are_refused(tmp_path):
    prepare(StpNumbers, tmp_path)
    with pytest.raises(ValueError, match="not an image classification data set"):
        data.load("stp_numbers", data_dir=tmp_path)
