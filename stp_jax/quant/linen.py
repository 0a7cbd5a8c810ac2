"""STP on Linen modules: an interceptor puts a quantizer into each layer's `promote_dtype`.

Every Linen layer with a kernel passes its operands through its attribute `promote_dtype` before it
computes. `flax.linen.intercept_methods` sees each call of such a layer, wherever the user's code
built it, and sets that attribute for the call. The module and its parameters stay what they were.

What the quantizers keep stands in two collections of its own, laid out as the parameters are:
``stp`` (budgets, and scales that are not trained) and ``stp_params`` (learned scales). Each leaf
has the axes of its kernel, with 1 where values are shared. While the module runs, the leaves travel
inside ``params``: so they reach every lifted layer (`nn.scan`, `nn.vmap`, `nn.remat`) as its kernel
does, and layers stacked by `nn.scan` have budgets and scales of their own.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core import meta, unfreeze
from flax.core.scope import DenyList, in_filter, union_filters
from flax.traverse_util import flatten_dict, unflatten_dict

from stp_jax.quant.layers import (
    KernelAxes,
    LayerFormat,
    conv_axes,
    dense_axes,
    einsum_axes,
    embedding_axes,
)
from stp_jax.quant.policy import Policy, Rule

STATE = "stp"  # budgets, and scales that are not trained
SCALES = "stp_params"  # learned scales

Variables = Mapping[str, Any]

_KERNEL_LAYERS = (
    nn.Conv,
    nn.ConvLocal,
    nn.ConvTranspose,
    nn.Dense,
    nn.DenseGeneral,
    nn.Einsum,
    nn.Embed,
)
# `nn.jit` keeps traces by module, arguments and JAX's contexts, and knows nothing of interceptors:
# without a context of its own, a run could be given the trace of the float module.
_trace_key = jax.make_user_context(None)

_GATES = tuple(side + gate for side in "ih" for gate in "ifgo")


class _Layer(NamedTuple):
    """A quantized layer as a trace found it: what the variables alone do not tell."""

    format: LayerFormat
    shape: tuple[int, ...]  # of the kernel inside lifted transformations
    name: str  # of the kernel among the layer's parameters


@dataclasses.dataclass(eq=False)
class _Traced:
    """What traces of a module found, by path; the same for equal modules."""

    layers: dict[str, _Layer] = dataclasses.field(default_factory=dict)
    tables: dict[str, bool] = dataclasses.field(default_factory=dict)  # path → is an embedding


def _collection(name: str, rule: Rule) -> str:
    choice = {"weight_scale": rule.weight_scale, "activation_scale": rule.activations}.get(name)
    return SCALES if choice == "learned" else STATE


def _kernel_axes(layer: nn.Module, shape: tuple[int, ...], equation: str | None) -> KernelAxes:
    if isinstance(layer, nn.Einsum):
        return einsum_axes(equation or "")
    if isinstance(layer, nn.DenseGeneral):
        axes = (layer.axis,) if isinstance(layer.axis, int) else tuple(layer.axis)
        batch = len(layer.batch_dims)
        return dense_axes(tuple(range(batch, batch + len(axes))))
    if isinstance(layer, nn.Embed):
        return embedding_axes()
    if isinstance(layer, nn.ConvTranspose):
        return conv_axes(shape, transposed=layer.transpose_kernel)
    if isinstance(layer, nn.Conv):
        return conv_axes(shape)
    return dense_axes((len(shape) - 2,))


@dataclasses.dataclass(eq=False)
class _Hook:
    """Takes the place of `promote_dtype` during one call of one layer."""

    run: _Run
    layer: nn.Module
    path: str
    rule: Rule
    equation: str | None
    promote: Callable

    def __call__(self, *operands: Any, **options: Any) -> Any:
        """Quantizes (input, kernel, …), or (table,), and promotes them as the layer would."""
        if len(operands) == 1:
            format = self._format(operands[0])
            return self.promote(self._quantize_kernel(format, operands[0]), **options)
        x, kernel, *rest = operands
        format = self._format(kernel)
        kernel = self._quantize_kernel(format, kernel)
        return self.promote(self._quantize_input(format, x, kernel.ndim), kernel, *rest, **options)

    def _format(self, kernel: jax.Array) -> LayerFormat:
        try:
            axes = _kernel_axes(self.layer, kernel.shape, self.equation)
        except ValueError as error:
            raise ValueError(f"layer {self.path!r}: {error}") from None
        format = LayerFormat(self.rule, axes)
        name = "embedding" if isinstance(self.layer, nn.Embed) else "kernel"
        self.run.model.traced.layers[self.path] = _Layer(format, kernel.shape, name)
        return format

    def _quantize_kernel(self, format: LayerFormat, kernel: jax.Array) -> jax.Array:
        first = jnp.int32(format.first_budget)
        stored = self._stored("budget", lambda: first.reshape((1,) * kernel.ndim))
        budget = first if stored is None else stored.reshape(())
        scale = None
        if self.rule.weight_scale != "max":
            scale = self._required("weight_scale", lambda: format.best_scale(kernel, budget))
        return format.quantize_kernel(kernel, scale, budget)

    def _quantize_input(self, format: LayerFormat, x: jax.Array, ndim: int) -> jax.Array:
        if self.rule.activations not in ("learned", "calibrated"):
            return format.quantize_input(x, None)
        start = lambda: jnp.zeros((1,) * ndim, jnp.float32)  # noqa: E731
        scale = self._required("activation_scale", start)
        if self.run.observe is None:
            return format.quantize_input(x, scale)
        jax.debug.callback(self.run.observe, scale.reshape(()), format.observe_input(x))
        return x

    def _stored(self, name: str, start: Callable[[], jax.Array]) -> jax.Array | None:
        leaf = f"{_collection(name, self.rule)}:{name}"
        if not self.layer.has_variable("params", leaf):
            if not self.run.create:
                return None
            self.layer.put_variable("params", leaf, start())
        return self.layer.get_variable("params", leaf)

    def _required(self, name: str, start: Callable[[], jax.Array]) -> jax.Array:
        value = self._stored(name, start)
        if value is None:
            raise _missing(self.path, name)
        return value


def _missing(path: str, name: str) -> ValueError:
    return ValueError(
        f"layer {path!r}: the variables hold no {name}; create what is missing with "
        f"_, state = model.apply(variables, x, mutable=[{STATE!r}, {SCALES!r}])"
    )


@dataclasses.dataclass(eq=False)
class _Run:
    """The interceptor of one init or apply."""

    model: QuantizedModule
    create: bool  # whether missing state is created
    observe: Callable | None = None  # takes (slot, scale) of every input instead of quantizing it

    def __call__(self, call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        layer = context.module
        if layer.scope is None or context.method_name == "setup":
            return call(*args, **kwargs)
        if isinstance(layer, nn.OptimizedLSTMCell) and context.method_name == "__call__":
            call = self._unoptimized(layer, call)
        if not isinstance(layer, _KERNEL_LAYERS):
            return call(*args, **kwargs)
        path, table = ".".join(layer.path), isinstance(layer, nn.Embed)
        self.model.traced.tables[path] = table
        rule = self.model.policy.find(path)
        if rule is None or (table and not rule.embeddings):
            return call(*args, **kwargs)
        equation = None
        if isinstance(layer, nn.Einsum):
            equation = layer.einsum_str or kwargs.get("einsum_str") or args[1]
        held: Any = layer.promote_dtype
        # A lifted layer is called twice, outside and inside; only the inner one may read variables.
        promote = held.promote if isinstance(held, _Hook) else held
        hook = _Hook(self, layer, path, rule, equation, promote)
        # Linen freezes attributes, but this module is the call's own copy, restored after it.
        object.__setattr__(layer, "promote_dtype", hook)
        try:
            return call(*args, **kwargs)
        finally:
            object.__setattr__(layer, "promote_dtype", held)

    @contextlib.contextmanager
    def intercept(self) -> Iterator[None]:
        """Runs Linen modules with the quantizers in place."""
        key = (self.model.traced, self.create, self.observe)
        with _trace_key(key), nn.intercept_methods(self):
            yield

    def _unoptimized(self, cell: nn.OptimizedLSTMCell, call: Callable) -> Callable:
        """The LSTMCell whose parameters the optimized cell shares: its products have hooks."""
        paths = [".".join((*cell.path, gate)) for gate in _GATES]
        self.model.traced.tables.update(dict.fromkeys(paths, False))
        if not any(self.model.policy.find(path) for path in paths):
            return call
        if type(cell) is not nn.OptimizedLSTMCell:
            raise ValueError(
                f"layer {'.'.join(cell.path)!r}: {type(cell).__name__} computes without hooks for "
                "a quantizer; derive it from nn.LSTMCell or keep its gates float"
            )
        fields = {f.name: getattr(cell, f.name) for f in dataclasses.fields(nn.LSTMCell)}
        return nn.LSTMCell(**{**fields, "parent": cell.scope})


def _merge(variables: Variables) -> dict[str, Any]:
    """The variables with the quantizers' state among the parameters."""
    merged = _plain(variables)
    params = flatten_dict(merged.get("params", {}), keep_empty_nodes=True)
    for collection in (STATE, SCALES):
        for path, leaf in flatten_dict(merged.pop(collection, {})).items():
            params[(*path[:-1], f"{collection}:{path[-1]}")] = leaf
    if params:
        merged["params"] = unflatten_dict(params)
    return merged


def _split(variables: Variables) -> dict[str, Any]:
    """The inverse of `_merge`."""
    split = _plain(variables)
    parts: dict[str, dict] = {"params": {}, STATE: {}, SCALES: {}}
    for path, leaf in flatten_dict(split.pop("params", {}), keep_empty_nodes=True).items():
        collection, found, name = path[-1].partition(":")
        if found and collection in (STATE, SCALES):
            parts[collection][(*path[:-1], name)] = leaf
        else:
            parts["params"][path] = leaf
    return split | {name: unflatten_dict(part) for name, part in parts.items() if part}


@dataclasses.dataclass(frozen=True)
class QuantizedModule:
    """A Linen module as an STP model: called, initialised and checkpointed as the module is.

    `init` returns the module's own variables beside the collections ``stp`` (budgets and fixed
    scales) and ``stp_params`` (learned scales, to be trained with the parameters). Float parameters
    load as they are: ``apply(variables, x, mutable=["stp", "stp_params"])`` creates what is
    missing, from the kernels given. Rules name layers by the module's path joined by dots.

    >>> import jax, flax.linen as nn, stp_jax
    >>> x = jax.numpy.ones((1, 16))
    >>> policy = stp_jax.Policy([stp_jax.Rule(path=".*", budget=6)])
    >>> model = stp_jax.quantize(nn.Dense(4), policy)
    >>> variables = model.init(jax.random.key(0), x)
    >>> variables = model.calibrate(variables, [x])
    >>> y = model.apply(model.set_budgets(variables, {"": 4}), x)
    """

    module: nn.Module
    policy: Policy
    traced: _Traced = dataclasses.field(
        default_factory=_Traced, init=False, repr=False, compare=False
    )

    def __getattr__(self, name: str) -> Any:
        """Hyperparameters and methods of the user's module, as ``method=model.encode``."""
        if name.startswith("_") or name == "module" or hasattr(nn.Module, name):
            raise AttributeError(f"an STP model of a Linen module has no attribute {name!r}")
        return getattr(self.module, name)

    def init_with_output(
        self,
        rngs: Any,
        *args: Any,
        method: Any = None,
        mutable: Any = DenyList("intermediates"),  # noqa: B008
        **kwargs: Any,
    ) -> tuple[Any, dict[str, Any]]:
        """As `flax.linen.Module.init_with_output`, with the quantizers' own variables.

        Raises:
          UnmatchedRuleError: a rule decides no layer; the message lists near misses.
          ValueError: a layer that a rule names has no reduction axis to group along.
        """
        with _Run(self, create=True).intercept():
            out, variables = self.module.init_with_output(
                rngs, *args, method=method, mutable=mutable, **kwargs
            )
        self._check_rules()
        return out, _split(variables)

    def init(self, rngs: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As `flax.linen.Module.init`; see `init_with_output`."""
        return self.init_with_output(rngs, *args, **kwargs)[1]

    def apply(
        self,
        variables: Variables,
        *args: Any,
        rngs: Any = None,
        method: Any = None,
        mutable: Any = False,
        capture_intermediates: Any = False,
        **kwargs: Any,
    ) -> Any:
        """As `flax.linen.Module.apply`; ``stp`` among the mutable creates what is missing.

        Raises:
          ValueError: a stored scale is missing. Missing budgets are those of the rules.
          UnmatchedRuleError: as by `init_with_output`, where state is created.
        """
        create = in_filter(mutable, STATE) or in_filter(mutable, SCALES)
        with _Run(self, create=create).intercept():
            result = self.module.apply(
                _merge(variables),
                *args,
                rngs=rngs,
                method=method,
                mutable=union_filters(mutable, "params") if create else mutable,
                capture_intermediates=capture_intermediates,
                **kwargs,
            )
        if create:
            self._check_rules()
        if mutable is False:
            return result
        out, updated = result
        kept = {name: v for name, v in _split(updated).items() if in_filter(mutable, name)}
        return out, kept

    def calibrate(
        self, variables: Variables, batches: Iterable[Any], **options: Any
    ) -> dict[str, Any]:
        """The variables with the scale of every layer's input set from example batches.

        Each scale is the one of least squared error on its batch, the largest over the batches
        (and over the steps of a scan). Kernels are quantized and inputs float meanwhile.

        Args:
          variables: as from `init`; not changed.
          batches: inputs, each given to the module as its only argument.
          **options: for `apply`, as ``train=False``, ``rngs`` or ``method``.

        Raises:
          ValueError: there is no batch.
        """
        # Each stored scale is replaced by the number of its slot, which the layer reports with what
        # it saw: this way scans, vmaps and remats need to know nothing of calibration.
        variables = _plain(variables)
        slots, numbered = _number(variables)
        best = np.zeros(sum(leaf.size for leaf in slots.values()), np.float32)

        def record(slot: jax.Array, scale: jax.Array) -> None:
            best[int(slot)] = max(best[int(slot)], float(scale))

        @jax.jit
        def observe(variables: Any, batch: Any) -> None:
            with _Run(self, create=False, observe=record).intercept():
                self.module.apply(_merge(variables), batch, **options)

        count = 0
        for batch in batches:
            observe(numbered, batch)
            count += 1
        if not count:
            raise ValueError("calibration needs at least one batch of inputs")
        jax.effects_barrier()
        return _replace(variables, {key: jnp.asarray(best[leaf]) for key, leaf in slots.items()})

    def budgets(self, variables: Variables) -> dict[str, Any]:
        """Terms per group by layer path, for layers with a budget rule.

        An integer per layer; nested lists of them for layers that `nn.scan` or `nn.vmap` stack.
        """
        found = {}
        for path, leaf in _budget_leaves(variables).items():
            rule = self.policy.find(path)
            if rule is not None and rule.budget is not None:
                found[path] = np.squeeze(np.asarray(leaf)).tolist()
        return found

    def set_budgets(
        self, variables: Variables, values: Mapping[str, jax.typing.ArrayLike]
    ) -> dict[str, Any]:
        """The variables with other budgets by layer path; nothing recompiles.

        Args:
          variables: as from `init`; not changed.
          values: layer path → terms per group; for stacked layers one integer or one per layer.

        Raises:
          ValueError: a path is not a quantized layer, or a budget is out of its range.
        """
        leaves = _budget_leaves(variables)
        unknown = sorted(set(values) - set(leaves))
        if unknown:
            raise ValueError(
                f"no quantized layer at {', '.join(unknown)}; there are: {', '.join(leaves)}"
            )
        changed = {}
        for path, value in values.items():
            changed[STATE, *_keys(path), "budget"] = self._new_budget(path, value, leaves[path])
        return _replace(variables, changed)

    def _new_budget(self, path: str, value: Any, leaf: jax.Array) -> jax.Array:
        rule = self.policy.find(path)
        if rule is None:
            raise ValueError(f"layer {path!r} has state, but no rule quantizes it")
        try:
            return LayerFormat(rule, KernelAxes((), ())).budgets_like(value, leaf)
        except ValueError as error:
            raise ValueError(f"layer {path!r}: {error}") from None

    def search_weight_scales(self, variables: Variables) -> dict[str, Any]:
        """The variables with every stored kernel scale the best one at the present budget."""
        changed = {}
        for path, layer in self._traced_layers().items():
            if layer.format.rule.weight_scale == "max":
                continue
            key = _collection("weight_scale", layer.format.rule), *_keys(path), "weight_scale"
            changed[key] = self._each(
                variables, path, lambda f, kernel, _, budget: f.best_scale(kernel, budget)
            )
        return _replace(variables, changed)

    def project_params(
        self, variables: Variables, values: Mapping[str, jax.typing.ArrayLike] | None = None
    ) -> dict[str, Any]:
        """The parameters with every quantized kernel on its few-term values.

        Args:
          variables: as from `init`; may be traced.
          values: terms per group by layer path, in place of the present budgets; may be traced.

        Returns:
          A tree like ``variables["params"]``: targets for `stp_jax.terms.guide`, or new parameters.

        Raises:
          ValueError: no trace has shown the module's layers yet, or as by `set_budgets`.
        """
        if values:
            variables = self.set_budgets(variables, values)
        changed = {}
        for path, layer in self._traced_layers().items():
            projected = self._each(variables, path, LayerFormat.project_kernel)
            changed["params", *_keys(path), layer.name] = projected
        return _replace(variables, changed)["params"]

    def integer_weights(self, variables: Variables) -> dict[str, np.ndarray]:
        """The integers of every quantized kernel at the present budgets: int32 by layer path."""
        return {
            path: np.asarray(self._each(variables, path, LayerFormat.integer_kernel))
            for path in self._traced_layers()
        }

    def _check_rules(self) -> None:
        tables = [path for path, table in self.traced.tables.items() if table]
        self.policy.check(self.traced.tables, tables=tables)

    def _traced_layers(self) -> dict[str, _Layer]:
        if not self.traced.layers:
            raise ValueError(
                "the layers of a Linen module are known once it was traced; call "
                "jax.eval_shape(model.init, key, x) first"
            )
        return self.traced.layers

    def _each(self, variables: Variables, path: str, function: Callable) -> jax.Array:
        """``function(format, kernel, stored scale, budget)``, over stacked layers one by one."""
        layer = self.traced.layers[path]
        flat = flatten_dict(_plain(variables))
        kernel = meta.unbox(flat["params", *_keys(path), layer.name])
        budget = flat.get((STATE, *_keys(path), "budget"))
        stacked = _stacked_axes(path, kernel.shape, layer.shape, budget)
        if budget is None:
            budget = jnp.full((1,) * kernel.ndim, layer.format.first_budget, jnp.int32)
        collection = _collection("weight_scale", layer.format.rule)
        scale = flat.get((collection, *_keys(path), "weight_scale"))
        if scale is None and layer.format.rule.weight_scale != "max":
            raise _missing(path, "weight_scale")

        def one(kernel: jax.Array, scale: jax.Array | None, budget: jax.Array) -> jax.Array:
            return function(layer.format, kernel, scale, budget.reshape(()))

        for axis in stacked:  # the last axis goes first, so that the others keep their places
            in_axes = (axis, None if scale is None else axis, axis)
            one = jax.vmap(one, in_axes=in_axes, out_axes=axis)
        return one(kernel, scale, budget)


def quantize_linen(module: nn.Module, policy: Policy) -> QuantizedModule:
    """The module as an STP model; see `QuantizedModule`."""
    if module.scope is not None:
        raise ValueError("quantize takes an unbound Linen module, not one inside init or apply")
    return QuantizedModule(module, policy)


def _plain(variables: Variables) -> dict[str, Any]:
    """A copy of the nested dictionaries, which may be frozen."""
    return unfreeze(dict(variables))


def _keys(path: str) -> tuple[str, ...]:
    return tuple(path.split(".")) if path else ()


def _replace(variables: Variables, changed: Mapping[tuple[str, ...], jax.Array]) -> dict[str, Any]:
    flat = flatten_dict(_plain(variables), keep_empty_nodes=True)
    for key, value in changed.items():
        flat[key] = meta.replace_boxed(flat[key], value)
    return unflatten_dict(flat)


def _budget_leaves(variables: Variables) -> dict[str, jax.Array]:
    state = flatten_dict(_plain(variables).get(STATE, {}))
    leaves = {".".join(key[:-1]): leaf for key, leaf in state.items() if key[-1] == "budget"}
    if not leaves:
        raise ValueError(f"the variables have no collection {STATE!r}; take them from model.init")
    return leaves


def _number(variables: Variables) -> tuple[dict[tuple[str, ...], np.ndarray], dict[str, Any]]:
    """The stored input scales' places, and the variables with int32 slot numbers there."""
    slots, count = {}, 0
    for key, leaf in flatten_dict(variables).items():
        if key[0] in (STATE, SCALES) and key[-1] == "activation_scale":
            slots[key] = count + np.arange(leaf.size, dtype=np.int32).reshape(leaf.shape)
            count += leaf.size
    return slots, _replace(variables, {key: jnp.asarray(leaf) for key, leaf in slots.items()})


def _stacked_axes(
    path: str, shape: tuple[int, ...], inner: tuple[int, ...], budget: jax.Array | None
) -> tuple[int, ...]:
    """The axes along which lifted transformations stack a layer's kernel, ascending."""
    if shape == inner:
        return ()
    if budget is None:
        raise ValueError(f"layer {path!r} is stacked; its variables need the collection {STATE!r}")
    axes = tuple(a for a, size in enumerate(budget.shape) if size > 1)
    missing = len(shape) - len(inner) - len(axes)
    for axis in range(len(shape)):  # stacks of one layer
        rest = tuple(n for a, n in enumerate(shape) if a not in (*axes, axis))
        if missing == 1 and axis not in axes and rest == inner:
            return tuple(sorted((*axes, axis)))
    return axes
