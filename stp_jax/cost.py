"""Cost of STP models on the accelerator: where models and `stp_jax.hwmodel` meet.

A model knows in which groups it was trained; the array that runs it must cut its weights alike.
These functions take that from the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, Literal, get_args

import numpy as np

import stp_jax.hwmodel as hw
from stp_jax.hwmodel.readers.observe import ROOT
from stp_jax.quant.allocation import normalized_costs, storage_costs
from stp_jax.quant.budgets import budgets
from stp_jax.quant.calibration import integer_weights
from stp_jax.quant.layers import QuantizedLayer, quantized_layers

# Terms to store, cycles or energy of the array, or the mean of terms and energy.
Resource = Literal["terms", "cycles", "energy", "balanced"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelCost:
    """A model on an array of group PEs, and in int8 on an equal array of int8 PEs.

    Budgets and weights are as `hwmodel.evaluate` takes them, for other arrays with the same work.
    """

    network: hw.Network
    baseline: hw.Report  # int8
    report: hw.Report  # the model's integers at its budgets, on group PEs
    budgets: Mapping[str, Any]
    weights: Mapping[str, np.ndarray]

    @property
    def saving(self) -> float:
        """The computational energy saving, `hwmodel.computational_saving`."""
        return float(hw.computational_saving(self.baseline, self.report))

    @property
    def saving_with_encoder(self) -> float:
        """The same with the energy of the encoders."""
        return float(hw.computational_saving(self.baseline, self.report, encoder=True))


def group_pe(model: Any, *, packed: bool = False, lanes: int = 1) -> hw.GroupPE:
    """The group PE that cuts weights into the groups in which a model was trained.

    It is wide enough for the widest weights among the layers.

    Args:
      model: an STP model; a Linen one with its variables.
      packed: whether terms are stored in place of integers; see `hwmodel.GroupPE`.
      lanes: terms that it takes in a cycle.

    Raises:
      ValueError: the model has no budgets, or layers with different groups or encodings.
    """
    rules = {q.path: q.rule for q in quantized_layers(model).values()}
    formats = {
        (rule.group_size, rule.encoding): path
        for path, rule in rules.items()
        if rule.budget is not None
    }
    if not formats:
        raise ValueError("no layer of the model has a budget; give its rule one")
    if len(formats) > 1:
        described = "; ".join(
            f"groups of {size} {encoding} values (layer {path!r})"
            for (size, encoding), path in formats.items()
        )
        raise ValueError(f"one array runs one kind of group, the model has {described}")
    ((group_size, encoding),) = formats
    bits = max(rule.bits for rule in rules.values())
    # `quantize` groups along the input channels of one window position.
    return hw.GroupPE(
        group_size=group_size,
        encoding=encoding,
        bits=bits,
        grouping="channels",
        packed=packed,
        lanes=lanes,
    )


def evaluate_model(
    model: Any,
    *inputs: Any,
    rows: int = 32,
    cols: int = 32,
    activation_sram: int = 0,
    packed: bool = False,
    lanes: int = 1,
    baseline: hw.PE | None = None,
    technology: hw.Technology = hw.HOROWITZ_45NM,
    name: str | None = None,
    **kwargs: Any,
) -> ModelCost:
    """Cycles, traffic and energy of an STP model, beside those of int8 on an array of equal size.

    Layers are traced from the model, terms are counted in its integer weights. For other arrays and
    other PEs, see `hwmodel.evaluate`.

    Args:
      model: an STP model; a Linen one with its variables.
      *inputs: of the model, of which only shape and dtype are used.
      rows: R of both arrays, which are input-stationary.
      cols: C.
      activation_sram: bytes of a buffer on the chip for outputs until their last reader; 0: none.
      packed: whether terms are stored in place of integers; see `hwmodel.GroupPE`.
      lanes: terms that a group PE takes in a cycle.
      baseline: the PE of the int8 array, `hwmodel.BitParallel` by default; `hwmodel.int8_baseline`
        gives the strongest one that was measured by gates.
      technology: energies.
      name: of the network, by default the model's class.
      **kwargs: keyword arguments of the model's call, such as ``train=False``.

    Raises:
      ValueError: as by `group_pe`, `hwmodel.trace` and `hwmodel.evaluate`.

    >>> import jax.numpy as jnp, stp_jax
    >>> from flax import nnx
    >>> model = nnx.Linear(64, 32, rngs=nnx.Rngs(0))
    >>> model = stp_jax.quantize(model, stp_jax.Policy([stp_jax.Rule(path=".*", budget=4)]))
    >>> cost = stp_jax.evaluate_model(model, jnp.ones((1, 64)))
    >>> print(cost.baseline.total_cycles, cost.report.total_cycles, round(cost.saving, 2))
    252 222 4.84
    """
    network = hw.trace(model, *inputs, name=name, **kwargs)
    kinds = {_path(layer.name): layer.kind for layer in network}
    ours = hw.Array(
        rows=rows,
        cols=cols,
        activation_sram=activation_sram,
        pe=group_pe(model, packed=packed, lanes=lanes),
    )
    int8 = dataclasses.replace(ours, pe=baseline or hw.BitParallel())
    budgets = _by_name(_budgets(model, kinds), kinds)
    weights = _by_name(_integers(model, kinds), kinds)
    return ModelCost(
        network=network,
        baseline=hw.evaluate(network, int8, technology=technology),
        report=hw.evaluate(network, ours, budgets=budgets, weights=weights, technology=technology),
        budgets=budgets,
        weights=weights,
    )


def _integers(model: Any, kinds: Mapping[str, str]) -> dict[str, np.ndarray]:
    """The integers of every kernel with its axes as `hw.weight_matrix` takes them.

    Args:
      model: an STP model.
      kinds: of the network's layers, by path.
    """
    found = integer_weights(model)
    for path, quantized in quantized_layers(model).items():
        layer = quantized.layer
        if layer.kind == "conv_transpose" and kinds.get(path) == "conv":  # of stride 1
            found[path] = np.swapaxes(found[path], -1, -2) if layer.transposed else found[path]
        elif layer.kind in ("conv_transpose", "einsum", "embed"):
            found[path] = _reduction_first(found[path], quantized)
    return found


def _budgets(model: Any, kinds: Mapping[str, str]) -> dict[str, Any]:
    """Budgets by path, in the order of the network's filters.

    Those of a transposed convolution stand at every position of its window, and those of an einsum
    are sorted by its products first.
    """
    found = budgets(model)
    for path, quantized in quantized_layers(model).items():
        if quantized.layer.kind == "conv_transpose" and kinds.get(path) != "conv":
            window = int(np.prod(quantized.kernel.shape[:-2]))
            if np.ndim(found.get(path, 0)):
                found[path] = np.tile(found[path], window)
        batch = _shared_with_input(quantized)
        if batch and np.ndim(found.get(path, 0)):
            by_axis = found[path].reshape(quantized.format.filter_shape(quantized.kernel.shape))
            found[path] = np.moveaxis(by_axis, batch, range(len(batch))).reshape(-1)
    return found


def _reduction_first(integers: np.ndarray, quantized: QuantizedLayer) -> np.ndarray:
    """A kernel as (*reduction, *filters), or (products, K, M) where the input shares other axes."""
    reduction, batch = quantized.format.axes.groups, _shared_with_input(quantized)
    filters = [axis for axis in range(integers.ndim) if axis not in (*batch, *reduction)]
    ordered = integers.transpose(*batch, *reduction, *filters)
    if not batch:
        return ordered
    products, terms = (
        int(np.prod([integers.shape[a] for a in axes])) for axes in (batch, reduction)
    )
    return ordered.reshape(products, terms, -1)


def _shared_with_input(quantized: QuantizedLayer) -> tuple[int, ...]:
    """Axes of an einsum's kernel that its input has and it does not sum over."""
    if quantized.layer.equation is None:
        return ()
    of_input, kernel = quantized.layer.equation.replace(" ", "").split("->")[0].split(",")
    return tuple(
        axis
        for axis, letter in enumerate(kernel.removesuffix("..."))
        if letter in of_input and axis not in quantized.format.axes.groups
    )


def _path(name: str) -> str:
    """The path of a traced layer: one that is used again is called ``path@2``."""
    path = name.partition("@")[0]
    return "" if path == ROOT else path


def _by_name(values: Mapping[str, Any], used: Collection[str]) -> dict[str, Any]:
    """Values of the layers that are used, by their names in a traced network."""
    return {path or ROOT: value for path, value in values.items() if path in used}


def term_costs(
    model: Any,
    *inputs: Any,
    per: Resource = "terms",
    array: hw.Array | None = None,
    **kwargs: Any,
) -> dict[str, float]:
    """Cost of one more term per group in each layer that has a budget rule.

    In units of what one term in every weight of these layers costs, so that budgets of a total
    cost t take as much as t terms per weight everywhere. For cycles and energy, the accelerator
    model says what a second term in every group costs.

    Args:
      model: an STP model; a Linen one with its variables.
      *inputs: of the model, of which only shape and dtype are used; needed for all but ``terms``.
      per: ``terms`` (each weight counts once), ``cycles`` or ``energy`` of the array (each use
        counts), or ``balanced``, the mean of terms and energy.
      array: of group PEs; by default 32×32, with the groups of the model.
      **kwargs: keyword arguments of the model's call.

    Returns:
      Layer path → cost per term, without unit, for `stp_jax.allocate`.

    Raises:
      ValueError: per is none of these, inputs are missing where they are needed, or layers are
        stacked or not used.
    """
    if per not in get_args(Resource):
        raise ValueError(f"per must be one of {', '.join(get_args(Resource))}, got {per!r}")
    stored = storage_costs(model)
    if per == "terms":
        return stored
    if not inputs:
        raise ValueError(f"per={per!r} needs an example input, whose shape gives the layers' sizes")
    array = array or hw.Array(rows=32, cols=32, pe=group_pe(model))
    network = hw.trace(model, *inputs, **kwargs)
    resource: Literal["cycles", "energy"] = "cycles" if per == "cycles" else "energy"
    on_array = normalized_costs(model, _array_costs(network, list(stored), array, resource))
    if per == "balanced":
        return {path: (stored[path] + on_array[path]) / 2 for path in stored}
    return on_array


def _array_costs(
    network: hw.Network, paths: list[str], array: hw.Array, resource: Literal["cycles", "energy"]
) -> dict[str, float]:
    def of_budget(budget: int) -> np.ndarray:
        report = hw.evaluate(network, array, budgets=budget)
        return np.asarray(report.cycles if resource == "cycles" else report.energy_pj["array"])

    unused = set(paths) - {_path(name) for name in network.names}
    if unused:
        raise ValueError(f"the model does not use layer {min(unused)!r} on this example")
    # From the first term on, since an array needs a cycle for a group without any as well; over
    # the terms that a PE takes in a cycle, since fewer of them save none.
    step = array.pe.lanes if isinstance(array.pe, hw.GroupPE) else 1
    costs = dict.fromkeys(paths, 0.0)
    for name, more in zip(network.names, of_budget(1 + step) - of_budget(1), strict=True):
        path = _path(name)
        if path in costs:
            costs[path] += float(more) / step
    free = [path for path, cost in costs.items() if not cost]
    if free:
        raise ValueError(
            f"a term more takes layer {free[0]!r} no more {resource} on this array: its memory "
            "limits it; give the array more bandwidth, or allocate for another resource"
        )
    return costs
