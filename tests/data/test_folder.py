import shutil

import numpy as np
import pytest
from PIL import Image

from stp_jax import data
from stp_jax.data import folder


def test_pixels_and_labels_are_those_of_the_files(make_tree):
    root = make_tree(classes="ba")
    dataset = data.load("folder", data_dir=root)
    assert dataset.class_names == ("a", "b")
    assert dataset.image_shape == (8, 6, 3)
    images, labels = dataset.train.fetch(np.arange(8))
    np.testing.assert_array_equal(labels, [0] * 4 + [1] * 4)
    np.testing.assert_array_equal(images[5], np.asarray(Image.open(root / "train/b/1.png")))


@pytest.mark.parametrize("name", ["test", "val", "validation"])
def test_the_test_split_goes_by_three_names(make_tree, name):
    assert len(data.load("folder", data_dir=make_tree(test_name=name)).test) == 6


def test_gray_images_keep_one_channel(make_tree):
    dataset = data.load("folder", data_dir=make_tree(gray=True))
    assert dataset.image_shape == (8, 6, 1)
    pixels = dataset.train.fetch(np.arange(8))[0] / 255
    np.testing.assert_allclose(dataset.mean, pixels.mean())
    np.testing.assert_allclose(dataset.std, pixels.std())


def test_mixed_sizes_are_brought_to_one(make_tree):
    root = make_tree()
    Image.new("RGB", (50, 40), (255, 0, 0)).save(root / "train/a/large.png")
    dataset = data.load("folder", data_dir=root)
    assert not dataset.uniform
    batch = next(
        data.train_iterator(dataset, batch_size=9, seed=0, augment="imagenet", image_size=16)
    )
    assert batch["input"].shape == (9, 16, 16, 3)


def test_other_files_are_passed_over(make_tree):
    root = make_tree()
    (root / "train/a/Thumbs.db").write_bytes(b"not an image")
    (root / "train/readme.txt").write_text("not a class")
    assert len(data.load("folder", data_dir=root).train) == 8


def test_version_follows_the_content(make_tree):
    root = make_tree()
    before = data.load("folder", data_dir=root).version
    assert data.load("folder", data_dir=root).version == before
    (root / "train/a/0.png").rename(root / "train/a/9.png")
    assert data.load("folder", data_dir=root).version != before


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def replace_with_text(path):
    path.write_text("this is no image")


def flip_in_the_middle(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "suffix"),
    [
        (cut, ".png"),
        (cut, ".jpg"),
        (cut, ".bmp"),
        (empty, ".png"),
        (replace_with_text, ".jpg"),
        (flip_in_the_middle, ".png"),
    ],
)
def test_corrupt_images_are_counted_named_and_skipped_on_demand(make_tree, damage, suffix):
    root = make_tree(suffix=suffix, size=(16, 16))
    damage(root / f"train/a/1{suffix}")
    damage(root / f"test/b/2{suffix}")
    with pytest.raises(ValueError, match=rf"2 corrupt images:\n.*train/a/1{suffix}"):
        data.load("folder", data_dir=root)
    with pytest.warns(UserWarning, match="2 corrupt images"):
        dataset = data.load("folder", data_dir=root, on_corrupt="skip")
    assert (len(dataset.train), len(dataset.test)) == (7, 5)
    assert dataset.skipped == (f"train/a/1{suffix}", f"test/b/2{suffix}")
    assert "2 corrupt left out" in dataset.description
    assert dataset.train.fetch(np.arange(7))[0].shape == (7, 16, 16, 3)


def test_whole_images_with_bytes_after_their_end_are_good(make_tree):
    root = make_tree(suffix=".jpg")
    path = root / "train/a/0.jpg"
    path.write_bytes(path.read_bytes() + b"trailing")
    assert len(data.load("folder", data_dir=root).train) == 8


def test_image_of_too_many_pixels_counts_as_corrupt(make_tree, monkeypatch):
    root = make_tree()
    Image.new("RGB", (30, 30)).save(root / "train/a/bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(ValueError, match=r"1 corrupt images:\n.*bomb.png: .*too many"):
        folder.scan(root)


def test_damage_after_the_scan_names_the_file(make_tree):
    root = make_tree()
    dataset = data.load("folder", data_dir=root)
    empty(root / "train/b/3.png")
    with pytest.raises(ValueError, match=r"train/b/3.png cannot be decoded"):
        data.train_iterator(dataset, batch_size=2, seed=0)


def remove(name):
    return lambda root: shutil.rmtree(root / name)


def extra_test_class(root):
    shutil.copytree(root / "test/a", root / "test/c")


def empty_class(root):
    for path in (root / "train/b").iterdir():
        path.unlink()


def empty_test(root):
    for path in root.glob("test/*/*"):
        path.unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove("."), "there is no folder"),
        (remove("train"), "has no train/"),
        (remove("test"), "has no test/, val/, validation/"),
        (extra_test_class, "has classes that .* has not: c"),
        (empty_class, "no images of the classes b"),
        (empty_test, r"test has no images \(.bmp"),
    ],
)
def test_broken_trees_are_refused(make_tree, change, message):
    root = make_tree()
    change(root)
    with pytest.raises(ValueError, match=message):
        data.load("folder", data_dir=root)


def test_folder_needs_its_place_and_a_known_policy(tmp_path):
    with pytest.raises(ValueError, match="needs data_dir"):
        data.load("folder")
    with pytest.raises(ValueError, match='"error" or "skip"'):
        data.load("folder", data_dir=tmp_path, on_corrupt="ignore")
