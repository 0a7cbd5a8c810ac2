"""Second-order projection of a whole model: every layer fitted to the float model's outputs.

The model as float and the model as projected run side by side, layer after layer, on the same
examples: every batch is doubled, and what the two halves hold parts at the first quantized layer.
Where a layer runs, its inputs are known in the projected model (X) and in the float one (Z), and
its kernel is decided before the next layer runs: the few-term values, scales and bias for which X V
is nearest to Z W. So a layer makes up for what the layers before it did to its inputs, as in GPTAQ
(Li et al., arXiv 2504.02692) and QEP (Arai & Ichikawa, arXiv 2504.09629). With H = X'X it is the
projection of W + H⁻¹X'(Z - X)W under the curvature H (`stp_jax.terms.project_second_order`).

Means are left to the bias, or to the running mean of the BatchNorm that follows. There the scale of
every filter is then raised until its outputs vary as in the float model: a least-squares fit of few
terms varies less, which adds up from layer to layer (BatchNorm tuning of Hubara et al., arXiv
2006.10518, takes it up in BatchNorm's variance).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from stp_jax import hooks
from stp_jax.hooks import Hooks, KernelLayer
from stp_jax.quant.bias import find_batch_norms
from stp_jax.quant.budgets import set_budgets
from stp_jax.quant.calibration import call_model, check_batches, sound_batches
from stp_jax.quant.kernel_rows import KernelRows
from stp_jax.quant.layers import (
    QuantizedLayer,
    check_own_kernels,
    check_scale_by_filter,
    check_stores_scales,
    quantized_layers,
)
from stp_jax.terms.compensation import check_damping, damped_gram
from stp_jax.terms.lattice import check_search
from stp_jax.terms.quantizers import WeightFormat, max_scale
from stp_jax.terms.second_order import (
    check_sweeps,
    project_second_order,
    search_output_scale,
)

_BLOCK = 256  # outputs that are projected at a time
_DAMPINGS = (0.1, 1.0, 10.0)  # tried beside the least one
_ROWS = (1 << 12, 1 << 15)  # least and most pixels that moments are taken over
_ROWS_PER_INPUT = 64


class Moments(NamedTuple):
    """Mean moments of a layer's inputs, for each of its channel groups."""

    mean: jax.Array  # [groups, K] of X
    drift: jax.Array  # [groups, K] of Z - X
    gram: jax.Array  # [groups, K, K]: X'X
    cross: jax.Array  # [groups, K, K]: X'(Z - X)

    def centred(self) -> Moments:
        """The same without the means, which a bias makes up for."""
        gram = self.gram - self.mean[:, :, None] * self.mean[:, None]
        cross = self.cross - self.mean[:, :, None] * self.drift[:, None]
        return self._replace(gram=gram, cross=cross)


@jax.jit
def _mean_moments(x: jax.Array, z: jax.Array) -> Moments:
    """Mean moments of rows [n, G, K]."""
    drift = z - x
    product = functools.partial(jnp.einsum, "ngk,ngl->gkl", precision="highest")
    return Moments(
        jnp.mean(x, axis=0),
        jnp.mean(drift, axis=0),
        product(x, x) / len(x),
        product(x, drift) / len(x),
    )


class _Seen(NamedTuple):
    """Moments over all examples, and over two halves of them for cross-validation."""

    whole: Moments
    halves: tuple[Moments, ...] | None  # None where there is one example only


def _input_rows(
    layer: KernelLayer, x: jax.Array, pixels: np.ndarray, kernel: jax.Array, *args: Any, **kwargs
) -> jax.Array:
    """Inputs of output pixels, float32 [n, G, K], K in the order of the kernel's axes but one."""
    if layer.kind == "dense":
        patches = x.reshape(-1, x.shape[-1])[pixels][:, None]
    else:
        strides, padding, *_ = args
        patches = hooks.conv_patches(x, kernel, strides, padding, pixels, **kwargs)
    by_group = patches.reshape(*patches.shape[:2], layer.feature_groups, -1)
    rows = jnp.swapaxes(by_group, 1, 2).reshape(len(patches), layer.feature_groups, -1)
    return rows.astype(jnp.float32)


def _draw(positions: tuple[int, ...], inputs: int) -> list[np.ndarray]:
    """Pixels of even and of odd examples, enough for the moments of so many inputs."""
    every = np.arange(int(np.prod(positions)))
    example = every // max(1, int(np.prod(positions[1:])))
    wanted = int(np.clip(_ROWS_PER_INPUT * inputs, *_ROWS)) // 2
    rng, drawn = np.random.default_rng(0), []
    for parity in range(min(2, positions[0])):
        part = every[example % 2 == parity]
        drawn.append(np.sort(rng.choice(part, min(wanted, len(part)), replace=False)))
    return drawn


def _moments(rows: Callable, x, z, positions: tuple[int, ...], inputs: int) -> _Seen:
    """Moments over pixels drawn at random; ``rows(x, pixels)`` gives their inputs."""
    parts = []
    for pixels in _draw(positions, inputs):
        parts.append(_mean_moments(rows(x, pixels), rows(z, pixels)))
    share = 1 / len(parts)
    whole = jax.tree.map(lambda *xs: share * functools.reduce(jnp.add, xs), *parts)
    return _Seen(whole, tuple(parts) if len(parts) > 1 else None)


# --- One layer ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Search:
    """How a layer is searched; see `reconstruct`."""

    damping: float
    beam: int
    neighbours: int
    sweeps: int


class _Fit(NamedTuple):
    """The new kernel, scale and bias of a layer."""

    kernel: jax.Array
    scale: jax.Array  # broadcastable to the kernel


def _bucket(extent: int) -> int:
    """The extent that a matrix is filled up to, so that layers share compiled programs."""
    return _BLOCK if extent <= _BLOCK else extent + -extent % (2 * _BLOCK)


def _filled(x: jax.Array, *extents: int) -> jax.Array:
    return jnp.pad(x, [(0, extent - n) for n, extent in zip(x.shape, extents, strict=True)])


def _project_block(w, gram, budget, fmt: WeightFormat, search: _Search):
    """Integers and scales of few-term values for real weights ``[K', M]`` under a gram."""
    groups = w.reshape(-1, fmt.group_size, w.shape[1])
    scale = search_output_scale(groups, gram, budget, fmt=fmt, damping=search.damping)
    options = dataclasses.asdict(search)
    fit = project_second_order(groups, scale, gram, budget, fmt=fmt, **options)
    return fit.integers.reshape(w.shape), fit.scale


@functools.partial(jax.jit, static_argnames=("fmt", "search"))
def _project_groups(w, gram, budget, fmt: WeightFormat, search: _Search):
    """The same for every channel group, ``[G, K', M]``: one program for all layers of a shape."""
    each = functools.partial(_project_block, fmt=fmt, search=search)
    return jax.vmap(each)(w, gram, budget)


def _project(w, gram, budget, fmt: WeightFormat, search: _Search) -> tuple[jax.Array, jax.Array]:
    """The same for every channel group: ``[G, K', M]``, ``[G, M]``; budgets are ``[G, M]``."""
    if len(w) > 1:
        return _project_groups(w, gram, budget, fmt, search)
    inputs, outputs = w.shape[1:]
    rows = _bucket(inputs)
    gram = _filled(gram[0], rows, rows)
    integers, scales = [], []
    for start in range(0, outputs, _BLOCK):
        part = slice(start, start + _BLOCK)
        block = _filled(w[0, :, part], rows, _BLOCK)
        v, scale = _project_block(block, gram, _filled(budget[0, part], _BLOCK), fmt, search)
        kept = min(_BLOCK, outputs - start)
        integers.append(v[:inputs, :kept])
        scales.append(scale[:kept])
    return jnp.concatenate(integers, axis=1)[None], jnp.concatenate(scales)[None]


def _round(w: jax.Array, fmt: WeightFormat) -> tuple[jax.Array, jax.Array]:
    """Integers with all their terms, which is next to no change."""
    scale = max_scale(w, axes=(1,), bits=fmt.bits)
    return jnp.round(w / scale).astype(jnp.int32), scale[:, 0]


def _correction(gram: np.ndarray, cross: np.ndarray, w: np.ndarray, damping: float) -> np.ndarray:
    """(H + damping)⁻¹ X'(Z - X) W: how weights make up for the drift of their inputs."""
    damp = jax.vmap(damped_gram, in_axes=(0, None))
    damped = np.array(damp(jnp.asarray(gram), jnp.float32(damping)))
    return np.linalg.solve(damped, cross @ w)


def _gain(gram: np.ndarray, cross: np.ndarray, w: np.ndarray, change: np.ndarray) -> float:
    """By how much a change of the weights lowers the squared error of the outputs."""
    return float(np.sum(change * (2 * (cross @ w) - gram @ change)))


def _shrunk(gram: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The gram matrix with its off-diagonal drawn to 0 by the share of it that is noise.

    That share is the least squared error's (Ledoit & Wolf, "A well-conditioned estimator for
    large-dimensional covariance matrices", J. Multivar. Anal. 88, 2004), with the variance of the
    mean taken from its two halves, since neighbouring pixels are no independent samples.
    """
    apart = ~np.eye(gram.shape[-1], dtype=bool)
    noise = np.sum(((first - second) * apart) ** 2, axis=(1, 2), keepdims=True) / 4
    power = np.sum((gram * apart) ** 2, axis=(1, 2), keepdims=True)
    share = np.minimum(noise / np.maximum(power, 1e-30), 1)
    return np.where(apart, (1 - share) * gram, gram)


class _Problem(NamedTuple):
    """A layer's fit as matrices, each ``[G, …]``."""

    gram: np.ndarray  # [G, K', K']
    target: np.ndarray  # [G, K', M]: the real weights that are to be projected


def _problem(
    rows: KernelRows, seen: _Seen, has_bias: bool, w: np.ndarray, damping: float
) -> _Problem:
    """The projection problem of a layer of weights ``[G, K', M]``: its target and Gram matrix.

    The damping of the correction is chosen on other examples than those that it is fitted to,
    since with few examples of many inputs it would otherwise fit their noise.
    """

    def padded(moments: Moments) -> tuple[np.ndarray, np.ndarray]:
        used = moments.centred() if has_bias else moments
        return np.array(rows.pad_square(used.gram)), np.array(rows.pad_square(used.cross))

    gram, cross = padded(seen.whole)
    if seen.halves is None:
        return _Problem(gram, w)
    first, second = (padded(half) for half in seen.halves)
    gains = {}
    for d in (damping, *(d for d in _DAMPINGS if d > damping)):
        there, back = _correction(*first, w, d), _correction(*second, w, d)
        gains[d] = _gain(*second, w, there) + _gain(*first, w, back)
    best = max(gains, key=lambda d: gains[d])
    target = w + _correction(gram, cross, w, best) if gains[best] > 0 else w
    return _Problem(_shrunk(gram, first[0], second[0]), target)


def _fit_layer(layer: QuantizedLayer, seen: _Seen, has_bias: bool, search: _Search) -> _Fit:
    rows, fmt = KernelRows.of(layer), layer.rule.format
    w = np.array(rows.split(layer.kernel.astype(jnp.float32)))
    gram, target = map(jnp.asarray, _problem(rows, seen, has_bias, w, search.damping))
    if layer.rule.budget is None:
        integers, scale = _round(target, fmt)
    else:
        budget = jnp.broadcast_to(layer.flat_budget, (rows.shape[-1],)).reshape(rows.groups, -1)
        integers, scale = _project(target, gram, budget, fmt, search)
    scale = scale.reshape((1,) * (len(rows.shape) - 1) + (-1,))
    return _Fit(scale * rows.join(integers).astype(jnp.float32), scale)


# --- The whole model ------------------------------------------------------------------------------


def _takes_part(layer: KernelLayer) -> bool:
    return layer.kind in ("dense", "conv") and layer.has_plain_product


def _check_layers(layers: Mapping[str, QuantizedLayer]) -> None:
    """Raises ValueError for layers that cannot run beside a second model, or cannot be fitted."""
    for path, layer in layers.items():
        kind = layer.layer.kind
        if kind != "embed" and (layer.layer.product is None or layer.is_stacked):
            raise ValueError(
                f"layer {path!r} ({layer.layer.type_name}) offers no product to run in float and "
                "quantized side by side; keep it float, or use stp_jax.compensate"
            )
    fitted = {path: layer for path, layer in layers.items() if _takes_part(layer.layer)}
    if not fitted:
        raise ValueError("no quantized layer is dense or a convolution")
    check_stores_scales(fitted, "reconstruct")
    for path, layer in fitted.items():
        if layer.rule.power_of_two_scales:
            raise ValueError(
                f"layer {path!r}: power_of_two_scales does not let its scale be fitted; use "
                "stp_jax.compensate"
            )
    check_scale_by_filter(layers, "reconstruct")
    check_own_kernels(layers, "reconstruct")


def _side_by_side(
    layers: Mapping[str, QuantizedLayer],
    decide: Callable[..., jax.Array],
    correct: Callable[[KernelLayer, jax.Array, jax.Array], jax.Array],
) -> Hooks:
    """Lets doubled batches run in float in their first half and quantized in their second.

    Args:
      layers: those that are quantized.
      decide: (layer, x, z, positions, kernel, *arguments of the product) → the kernel of the second
        half; x and z are the inputs of the second and the first half, positions the shape of their
        outputs without the channels.
      correct: (layer, outputs in float, outputs quantized) → the latter as they will be.
    """
    quantized: dict[str, jax.Array] = {}  # kernels as the quantizers give them

    def operands(layer: KernelLayer, promote: Callable) -> Callable | None:
        if layer.path not in layers or layer.is_table:
            return None

        def promoted(operands: tuple[Any, ...], **kwargs: Any) -> tuple[Any, ...]:
            x, kernel, *rest = operands
            if isinstance(x, jax.core.Tracer):
                raise ValueError(
                    f"layer {layer.path!r} runs inside a scan, vmap or jit; its inputs cannot be "
                    "seen"
                )
            half = len(x) // 2
            if _takes_part(layer):
                # Compiled, so that the kernel that it would quantize is left out.
                few = jax.jit(lambda x, kernel: promote((x, kernel, *rest), **kwargs)[0])(
                    x[half:], kernel
                )
            else:
                few, quantized[layer.path], *rest = promote((x[half:], kernel, *rest), **kwargs)
            whole = jnp.concatenate([x[:half].astype(few.dtype), few])
            return (whole, kernel.astype(few.dtype), *rest)

        return promoted

    def product(layer: KernelLayer, product: Callable) -> Callable | None:
        if layer.path not in layers or layer.is_table:
            return None
        equations = 1 if layer.kind == "einsum" else 0  # an einsum's product has it first

        def compute(*args: Any, **kwargs: Any) -> jax.Array:
            first, (x, kernel, *rest) = args[:equations], args[equations:]
            half = len(x) // 2
            z, x = x[:half], x[half:]
            exact = product(*first, z, kernel, *rest, **kwargs)
            if _takes_part(layer):
                new = decide(layer, x, z, exact.shape[:-1], kernel, *rest, **kwargs)
            else:
                new = quantized[layer.path]
            out = product(*first, x, new.astype(kernel.dtype), *rest, **kwargs)
            return jnp.concatenate([exact, correct(layer, exact, out)])

        return compute

    return Hooks(operands=operands, product=product)


def _doubled(batches: list[Any]) -> Any:
    return jax.tree.map(lambda *xs: jnp.concatenate([*xs, *xs]), *batches)


def reconstruct(
    model: Any,
    batches: Iterable[Any],
    values: Mapping[str, jax.typing.ArrayLike],
    *,
    damping: float = 0.01,
    beam: int = 8,
    neighbours: int = 2,
    sweeps: int = 3,
    call: Callable[[Any, Any], Any] = call_model,
) -> dict[str, float]:
    """Sets budgets and fits every layer to the float model's outputs, in place.

    Dense layers and convolutions of any channel groups get new few-term kernels, scales and biases,
    each on the inputs that it has once the layers before it have theirs; those that keep every term
    make up for earlier layers too. No labels, gradients or training. The whole calibration set runs
    through the model at once, twice: a few hundred examples do, and their activations must fit
    into memory.

    Args:
      model: an STP model in evaluation mode (a Linen one with its variables), with calibrated
        inputs and the float model's kernels. Its outputs for an example must not depend on others.
      batches: inputs with examples along the first axis, each given to the model as its only
        argument.
      values: terms per group by layer path, as for `stp_jax.set_budgets`.
      damping, beam, neighbours, sweeps: as for `stp_jax.terms.project_second_order`.
      call: how to call the model on a batch otherwise.

    Returns:
      Layer path → the squared error of its outputs, over their variance in the float model.

    Raises:
      ValueError: there is no batch, or one is empty or holds NaN or infinity; no layer takes part;
        a layer cannot be run side by side with its float one, or runs more than once; an argument
        is out of range. Nothing is changed then.
      TypeError: batches is an array.
    """
    check_batches(batches)
    batches = list(sound_batches(batches))
    if not batches:
        raise ValueError("reconstruction needs at least one batch of inputs")
    check_damping(damping)
    check_sweeps(sweeps)
    layers = quantized_layers(model)
    _check_layers(layers)
    search = _Search(damping=damping, beam=beam, neighbours=neighbours, sweeps=sweeps)
    for layer in layers.values():
        if layer.rule.budget is not None:
            check_search(layer.rule.format, beam, neighbours)
    trial = hooks.copy_model(model)
    set_budgets(trial, values)
    followers = find_batch_norms(model, layers, batches[0], call)
    fits, shifts, losses = _fit_all(trial, batches, followers, search, call)
    set_budgets(model, values)
    _apply(model, layers, fits, shifts, followers)
    return losses


def check_reconstruction(model: Any, example: Any) -> None:
    """Runs a model without fitting it, to find what `reconstruct` would refuse.

    Args:
      model: an STP model, calibrated or not; it is left as it is.
      example: a batch of inputs, the model's only argument.

    Raises:
      ValueError: as `reconstruct` does for layers that it cannot fit.
    """
    layers = quantized_layers(model)
    _check_layers(layers)
    run: set[str] = set()

    def decide(layer: KernelLayer, x, z, positions, kernel, *rest: Any, **kwargs: Any):
        _check_once(layer.path, run)
        run.add(layer.path)
        return kernel

    hooked = hooks.attach(model, _side_by_side(layers, decide, lambda layer, exact, out: out))
    call_model(hooked, _doubled([example]))


def _check_once(path: str, run: Container[str]) -> None:
    if path in run:
        raise ValueError(f"layer {path!r} runs more than once; use stp_jax.compensate")


def _fit_all(model, batches, followers, search: _Search, call):
    layers = quantized_layers(model)
    fits: dict[str, _Fit] = {}
    shifts: dict[str, jax.Array] = {}  # what mean outputs are too large by, without new biases
    losses: dict[str, float] = {}

    def has_bias(path: str) -> bool:
        return path in followers or hooks.get_variable(model, path, "bias") is not None

    def decide(layer: KernelLayer, x, z, positions, kernel, *rest: Any, **kwargs: Any):
        path = layer.path
        _check_once(path, fits)

        def rows(x: jax.Array, pixels: np.ndarray) -> jax.Array:
            return _input_rows(layer, x, pixels, kernel, *rest, **kwargs)

        inputs = kernel.size // kernel.shape[-1]
        seen = _moments(rows, x, z, positions, inputs)
        fits[path] = _fit_layer(layers[path], seen, has_bias(path), search)
        return fits[path].kernel

    def correct(layer: KernelLayer, exact: jax.Array, out: jax.Array) -> jax.Array:
        if layer.path in fits and has_bias(layer.path):
            if layers[layer.path].rule.budget is not None:
                factor = _spread(exact, out)
                kernel, scale = fits[layer.path]
                fits[layer.path] = _Fit(kernel * factor, scale * factor)
                out = out * factor.astype(out.dtype)
            shifts[layer.path] = jnp.mean(out - exact, axis=tuple(range(out.ndim - 1)))
            out = out - shifts[layer.path].reshape((1,) * (out.ndim - 1) + (-1,))
        losses[layer.path] = float(_loss(exact, out))
        return out

    call(hooks.attach(model, _side_by_side(layers, decide, correct)), _doubled(batches))
    return fits, shifts, losses


@jax.jit
def _spread(exact: jax.Array, out: jax.Array) -> jax.Array:
    """The factors of channels by which ``out`` varies as ``exact`` does, float32 [channels]."""
    axes = tuple(range(out.ndim - 1))
    wanted, found = (jnp.std(x.astype(jnp.float32), axis=axes) for x in (exact, out))
    return jnp.where((found > 0) & (wanted > 0), wanted / jnp.where(found > 0, found, 1), 1)


@jax.jit
def _loss(exact: jax.Array, out: jax.Array) -> jax.Array:
    """Squared error over variance, of outputs whose last axis holds the channels."""
    mean = jnp.mean(exact, axis=tuple(range(exact.ndim - 1)), keepdims=True)
    return jnp.sum((out - exact) ** 2) / jnp.maximum(jnp.sum((exact - mean) ** 2), 1e-30)


def _apply(model, layers, fits: Mapping[str, _Fit], shifts, followers: Mapping[str, str]) -> None:
    for path, fit in fits.items():
        layers[path].kernel = fit.kernel.astype(layers[path].kernel.dtype)
        layers[path].stored_scale = fit.scale
    for path, shift in shifts.items():
        bias = hooks.get_variable(model, path, "bias")
        if bias is not None:
            hooks.set_variable(model, path, "bias", bias - shift.astype(bias.dtype))
        else:
            mean = hooks.get_variable(model, followers[path], "mean")
            assert mean is not None
            hooks.set_variable(model, followers[path], "mean", mean + shift.astype(mean.dtype))
