"""Layers from the shapes and arguments of the functions that compute them.

Convolutions as of ``jax.lax.conv_general_dilated``, products as of ``jax.lax.dot_general`` and
``jax.numpy.einsum``, attention as of ``flax.nnx.dot_product_attention``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import opt_einsum

from stp_jax.hwmodel.network import Layer, dense, matmul

Shape = tuple[int, ...]


def convolution(
    name: str,
    lhs: Shape,
    rhs: Shape,
    out: Shape,
    *,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    **others: Any,
) -> Layer:
    """A convolution of the shape ``lhs`` with kernels of ``rhs``, giving ``out``.

    Raises:
      ValueError: a convolution grouped over the batch.
    """
    if batch_group_count != 1:
        raise ValueError(f"{name}: convolutions grouped over the batch are not modelled")
    numbers = jax.lax.conv_dimension_numbers(lhs, rhs, dimension_numbers)
    batch, channels, *in_size = (lhs[axis] for axis in numbers.lhs_spec)
    filters, _, *kernel = (rhs[axis] for axis in numbers.rhs_spec)
    if {*(lhs_dilation or ())} - {1}:
        return transposed(
            name,
            batch,
            in_size,
            kernel,
            channels=channels,
            filters=filters,
            groups=feature_group_count,
        )
    dilation = tuple(rhs_dilation or (1,) * len(kernel))
    if isinstance(padding, str):
        reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
        padding = jax.lax.padtype_to_pads(in_size, reach, window_strides, padding)
    return Layer(
        name=name,
        batch=batch,
        in_size=tuple(in_size),
        out_size=tuple(out[axis] for axis in numbers.out_spec[2:]),
        kernel=tuple(kernel),
        stride=tuple(window_strides),
        channels=channels,
        filters=filters,
        groups=feature_group_count,
        dilation=dilation,
        padding=tuple((int(low), int(high)) for low, high in padding),
    )


def transposed(
    name: str,
    batch: int,
    in_size: Sequence[int],
    kernel: Sequence[int],
    *,
    channels: int,
    filters: int,
    groups: int = 1,
) -> Layer:
    """A transposed convolution: the product of every input pixel with the kernel.

    The sums of what overlaps in its output are not part of it, nor are the zeros between inputs by
    which a convolution would compute the same.
    """
    rows, reduction = batch * math.prod(in_size), channels // groups
    columns = filters // groups * math.prod(kernel)
    if groups > 1:
        return matmul(name, rows, reduction, columns, products=groups)
    return dense(name, reduction, columns, rows=rows)


def product(
    name: str,
    lhs: Shape,
    rhs: Shape,
    contracting: Sequence[Sequence[int]],
    batching: Sequence[Sequence[int]] = ((), ()),
) -> Layer:
    """A product of two shapes, axes as in ``jax.lax.dot_general``; dense without batch axes."""
    products = math.prod(lhs[axis] for axis in batching[0])
    reduction = math.prod(lhs[axis] for axis in contracting[0])
    rows = math.prod(lhs) // (products * reduction)
    columns = math.prod(rhs) // (products * reduction)
    if batching[0]:
        return matmul(name, rows, reduction, columns, products=products)
    return dense(name, reduction, columns, rows=rows)


def einsum(name: str, equation: str, lhs: Shape, rhs: Shape) -> Layer:
    """The product of two shapes that an equation describes."""
    equation = equation.replace(" ", "")
    if "..." in equation or "->" not in equation:
        parsed = opt_einsum.parser.parse_einsum_input((equation, lhs, rhs), shapes=True)
        equation = f"{parsed[0]}->{parsed[1]}"
    operands, result = equation.split("->")
    left, right = operands.split(",")
    shared = [label for label in left if label in right]
    contracted = [label for label in shared if label not in result]
    batched = [label for label in shared if label in result]
    contracting, batching = (
        tuple(tuple(term.index(label) for label in labels) for term in (left, right))
        for labels in (contracted, batched)
    )
    return product(name, lhs, rhs, contracting, batching)


def attention(name: str, query: Shape, key: Shape, value: Shape) -> list[Layer]:
    """The two products of an attention, of shapes (..., length, heads, depth)."""
    *batch, rows, heads, depth = query
    products, length = math.prod(batch) * heads, key[-3]
    return [
        matmul(f"{name}.scores", rows, depth, length, products=products),
        matmul(f"{name}.context", rows, length, value[-1], products=products),
    ]
