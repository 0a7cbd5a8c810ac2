import numpy as np
import pytest

from stp_jax.data.augment import center_crop, flip, random_resized_crop, shift


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def test_shift_equals_pad_and_crop_one_by_one():
    images = noise(50, 6, 5, 3)
    uniform = np.random.default_rng(1).random((50, 2))
    shifted = shift(images, uniform, pixels=2, mode="reflect")
    for image, result, (u, v) in zip(images, shifted, uniform, strict=True):
        padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), mode="reflect")
        top, left = int(u * 5), int(v * 5)
        np.testing.assert_array_equal(result, padded[top : top + 6, left : left + 5])


def test_shift_reaches_both_extremes_and_the_middle_is_the_image():
    images = noise(3, 4, 4, 1)
    uniform = np.asarray([[0.0, 0.0], [0.5, 0.5], [0.9999, 0.9999]])
    down, same, up = shift(images, uniform, pixels=1, mode="constant")
    np.testing.assert_array_equal(down[1:, 1:], images[0, :-1, :-1])
    assert not down[0].any()
    np.testing.assert_array_equal(same, images[1])
    np.testing.assert_array_equal(up[:-1, :-1], images[2, 1:, 1:])


def test_flip_mirrors_the_chosen_images_only():
    images = noise(2, 3, 4, 3)
    mirrored, kept = flip(images, np.asarray([0.49, 0.5]))
    np.testing.assert_array_equal(mirrored, images[0][:, ::-1])
    np.testing.assert_array_equal(kept, images[1])


def test_center_crop_is_the_identity_at_its_size():
    image = noise(7, 9, 3)
    assert center_crop(image, (7, 9)) is image


@pytest.mark.parametrize("channels", [1, 3])
def test_center_crop_cuts_the_middle(channels):
    image = np.zeros((256, 300, channels), np.uint8)
    image[16:-16, 38:-38] = 200  # what a 224 crop of the 256 short side sees
    crop = center_crop(image, (224, 224))
    assert crop.shape == (224, 224, channels)
    assert np.all(crop == 200)


def test_random_resized_crop_stays_inside_and_keeps_constant_images():
    rng = np.random.default_rng(0)
    image = np.full((20, 31, 3), 77, np.uint8)
    for uniform in rng.random((100, 4)):
        assert np.all(random_resized_crop(image, (8, 9), uniform) == 77)


def test_largest_square_crop_is_the_whole_image():
    image = noise(16, 16, 3)
    crop = random_resized_crop(image, (16, 16), np.asarray([1.0, 0.5, 0.3, 0.3]))
    np.testing.assert_array_equal(crop, image)
