"""Training-time augmentations, as functions of the images and of uniform random numbers.

Each augmentation says how many uniform numbers in [0, 1) an example takes. So the randomness of a
batch is one array, drawn for the whole batch whatever share of it a process reads.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

Size = tuple[int, int]  # (height, width)

# Evaluation resizes the short side to 256 for a 224 crop (Krizhevsky et al., NeurIPS 2012).
CROP_FRACTION = 224 / 256
# Random-resized crop: share of the area and aspect ratio (Szegedy et al., CVPR 2015, section 6).
CROP_AREA = (0.08, 1.0)
CROP_ASPECT = (3 / 4, 4 / 3)


def _resize(image: np.ndarray, size: Size, box: tuple[float, float, float, float]) -> np.ndarray:
    """Resamples the box (left, top, right, bottom) of a uint8 (H, W, C) image to `size`."""
    pixels = image[..., 0] if image.shape[-1] == 1 else image
    height, width = size
    resized = Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR, box=box)
    return np.atleast_3d(np.asarray(resized))


def center_crop(image: np.ndarray, size: Size) -> np.ndarray:
    """Resizes and crops the middle, as ImageNet's evaluation does; an image of `size` stays as is.

    Args:
      image: uint8 (H, W, C).
      size: (height, width) of the result. Its window covers 224/256 of the resized short side.
    """
    height, width = image.shape[:2]
    if (height, width) == size:
        return image
    scale = CROP_FRACTION * min(height / size[0], width / size[1])
    box_height, box_width = scale * size[0], scale * size[1]
    top, left = (height - box_height) / 2, (width - box_width) / 2
    return _resize(image, size, (left, top, left + box_width, top + box_height))


def random_resized_crop(image: np.ndarray, size: Size, uniform: np.ndarray) -> np.ndarray:
    """Resizes a random window of the image, of 8–100 % of its area and aspect 3/4 … 4/3.

    The window is cut to the image where it would leave it (torchvision draws again instead).

    Args:
      image: uint8 (H, W, C).
      size: (height, width) of the result.
      uniform: (4,) numbers in [0, 1): area, log aspect, top, left.
    """
    height, width = image.shape[:2]
    area = height * width * (CROP_AREA[0] + uniform[0] * (CROP_AREA[1] - CROP_AREA[0]))
    low, high = np.log(CROP_ASPECT)
    aspect = np.exp(low + uniform[1] * (high - low))
    box_width = min(float(np.sqrt(area * aspect)), width)
    box_height = min(float(np.sqrt(area / aspect)), height)
    top, left = uniform[2] * (height - box_height), uniform[3] * (width - box_width)
    return _resize(image, size, (left, top, left + box_width, top + box_height))


def shift(images: np.ndarray, uniform: np.ndarray, *, pixels: int, mode: str) -> np.ndarray:
    """Moves each image by up to `pixels` up, down, left and right (pad, then crop at random).

    Args:
      images: uint8 (N, H, W, C).
      uniform: (N, 2) numbers in [0, 1): vertical and horizontal position.
      pixels: the largest move.
      mode: what comes in at the edge, as in `np.pad`.
    """
    count, height, width, channels = images.shape
    padded = np.pad(images, ((0, 0), (pixels, pixels), (pixels, pixels), (0, 0)), mode=mode)  # type: ignore[call-overload]
    windows = np.lib.stride_tricks.sliding_window_view(
        padded, (height, width, channels), axis=(1, 2, 3)
    )
    top, left = (uniform * (2 * pixels + 1)).astype(np.int64).T
    return windows[np.arange(count), top, left, 0]


def flip(images: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Mirrors left and right the images whose number, of (N,) in [0, 1), is below one half."""
    return np.where((uniform < 0.5)[:, None, None, None], images[:, :, ::-1], images)


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """An augmentation: how an image is brought to size, and a function of the batch."""

    draws: int = 0  # uniform numbers per example
    fit: Callable[[np.ndarray, Size, np.ndarray], np.ndarray] | None = None
    batch: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None


def _crop_and_flip(images: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    return flip(shift(images, uniform[:, :2], pixels=4, mode="reflect"), uniform[:, 2])


AUGMENTATIONS = {
    "none": Augmentation(),
    # ±1 pixel on a black ground, for digits of 8×8.
    "shift": Augmentation(
        draws=2, batch=lambda images, u: shift(images, u, pixels=1, mode="constant")
    ),
    # Pad by 4, crop, flip (He et al., CVPR 2016, section 4.2), the padding by reflection.
    "cifar": Augmentation(draws=3, batch=_crop_and_flip),
    # Random-resized crop and flip (Szegedy et al., CVPR 2015, section 6).
    "imagenet": Augmentation(
        draws=5,
        fit=lambda image, size, u: random_resized_crop(image, size, u[:4]),
        batch=lambda images, u: flip(images, u[:, 4]),
    ),
}
