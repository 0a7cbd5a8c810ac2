"""STP on Linen modules: an interceptor puts a quantizer into each layer's `promote_dtype`.

`stp_jax.hooks.intercept` reaches each call of a layer, wherever the user's code built it. The
module and its parameters stay what they were.

The quantizers' state has two collections of its own, laid out as the parameters are:
``stp`` (budgets, and scales that are not trained) and ``stp_params`` (learned scales and relaxed
budgets). Each leaf has the axes of its kernel, with 1 where values are shared: a budget by layer
has a single value, one by filter a value per output channel. While the module
runs, the leaves travel inside ``params``: so they reach every lifted layer (`nn.scan`, `nn.vmap`,
`nn.remat`) as its kernel does, and stacked layers have budgets and scales of their own.

`QuantizedModule` is called as Linen modules are, with variables; `BoundModel` is one with its
variables, on which the functions of `stp_jax` work as on an NNX model.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core.scope import DenyList

from stp_jax import hooks
from stp_jax.hooks import Hooks, KernelLayer, LinenModel, keys_of
from stp_jax.quant import budgets as budget_verbs
from stp_jax.quant import calibration
from stp_jax.quant.layers import (
    LayerFormat,
    QuantizedLayer,
    find_layers,
    kernel_axes,
    of_one_layer,
    without_quantizers,
)
from stp_jax.quant.policy import Policy, Rule

STATE = "stp"  # budgets, and scales that are not trained
LEARNED = "stp_params"  # learned scales, relaxed budgets

Variables = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class _Found:
    """A quantized layer as a trace found it: what the variables alone do not tell."""

    layer: KernelLayer
    format: LayerFormat
    shape: tuple[int, ...]  # of the kernel inside lifted transformations


@dataclasses.dataclass(eq=False)
class _Traced:
    """Layers found by traces of a module, by path; the same for equal modules."""

    layers: dict[str, _Found] = dataclasses.field(default_factory=dict)
    tables: dict[str, bool] = dataclasses.field(default_factory=dict)  # path → is an embedding


def _collection(name: str, rule: Rule) -> str:
    choice = {"weight_scale": rule.weight_scale, "activation_scale": rule.activations}.get(name)
    return LEARNED if choice == "learned" or name == "relaxed_budget" else STATE


def _missing(path: str, name: str) -> ValueError:
    return ValueError(
        f"layer {path!r}: the variables hold no {name}; create what is missing with "
        f"_, state = model.apply(variables, x, mutable=[{STATE!r}, {LEARNED!r}])"
    )


# --- Quantizers in a running module ---------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class _Quantizers:
    """The quantizers of one init or apply."""

    policy: Policy
    traced: _Traced
    create: bool  # whether missing state is created
    observe: Callable | None = None  # takes (slot, scale) of every input instead of quantizing it

    def wrap(self, layer: KernelLayer, promote: Callable) -> Callable | None:
        """The quantizing `promote_dtype` of a layer; None where no rule quantizes it."""
        self.traced.tables[layer.path] = layer.is_table
        rule = self.policy.find(layer.path)
        if rule is None or (layer.is_table and not rule.embeddings):
            return None
        dotted = [name for name in layer.module.path if "." in name]
        if dotted:
            raise ValueError(
                f"layer {layer.path!r}: dots join the names of modules to paths, so the name "
                f"{dotted[0]!r} may hold none; rename it, or keep the layer float"
            )
        return _Quantizer(self, layer, rule, promote)

    @property
    def hooks(self) -> Hooks:
        """Replacing `promote_dtype` only."""
        return Hooks(operands=self.wrap)

    @property
    def trace_key(self) -> Any:
        """Everything that a trace depends on besides the module; equal calls share one."""
        return self.traced, self.create, self.observe


@dataclasses.dataclass(eq=False)
class _Quantizer:
    """Takes the place of `promote_dtype` during one call of one layer."""

    run: _Quantizers
    layer: KernelLayer
    rule: Rule
    promote: Callable

    def __call__(self, operands: tuple[Any, ...], **options: Any) -> Any:
        """Quantizes (input, kernel, …), or (table,), and promotes them as the layer would."""
        if len(operands) == 1:
            format = self._format(operands[0])
            return self.promote((self._quantize_kernel(format, operands[0]),), **options)
        x, kernel, *biases = operands
        format = self._format(kernel)
        quantized = self._quantize_kernel(format, kernel)
        x = self._quantize_input(format, x, kernel.ndim)
        if self.run.observe is None:  # else the input's scale is the number of a slot
            stored, of_input = (self._stored(f"{o}_scale", None) for o in ("weight", "activation"))
            biases = [format.quantize_bias(b, kernel, stored, of_input) for b in biases]
        return self.promote((x, quantized, *biases), **options)

    def _format(self, kernel: jax.Array) -> LayerFormat:
        format = LayerFormat(self.rule, kernel_axes(self.layer, kernel.shape))
        # What is kept must not hold on to the present trace, in which a mask may have been made.
        mask = None if isinstance(self.layer.mask, jax.core.Tracer) else self.layer.mask
        layer = dataclasses.replace(self.layer, module=None, mask=mask)
        self.run.traced.layers[layer.path] = _Found(layer, format, kernel.shape)
        return format

    def _quantize_kernel(self, format: LayerFormat, kernel: jax.Array) -> jax.Array:
        first = jnp.int32(format.first_budget)
        whole = self._stored("budget", lambda: first.reshape((1,) * kernel.ndim))
        relaxed = self._stored("relaxed_budget", None)
        stored = whole if relaxed is None else relaxed
        budget = first if stored is None else of_one_layer(stored)
        scale = None
        if self.rule.weight_scale != "max":
            scale = self._required("weight_scale", lambda: format.best_scale(kernel, budget))
        return format.quantize_kernel(kernel, scale, budget)

    def _quantize_input(self, format: LayerFormat, x: jax.Array, ndim: int) -> jax.Array:
        if not self.rule.stores_input_scale:
            return format.quantize_input(x, None)
        start = lambda: jnp.zeros((1,) * ndim, jnp.float32)  # noqa: E731
        scale = self._required("activation_scale", start)
        if self.run.observe is None:
            return format.quantize_input(x, scale)
        # A callback without effects, for Flax runs a scan's body once more to see what is constant
        # there, and takes what has effects for a dependency. Its zero keeps it alive.
        seen = (scale.reshape(()), format.observe_input(x))
        zero = jax.ShapeDtypeStruct((), jnp.float32)
        zero = jax.pure_callback(self.run.observe, zero, *seen, vmap_method="sequential")
        return x + zero.astype(x.dtype)

    def _stored(self, name: str, start: Callable[[], jax.Array] | None) -> jax.Array | None:
        """A stored value; where it is missing, ``start()`` if state is created, else None."""
        leaf, module = f"{_collection(name, self.rule)}:{name}", self.layer.module
        if not module.has_variable("params", leaf):
            if start is None or not self.run.create:
                return None
            module.put_variable("params", leaf, start())
        return module.get_variable("params", leaf)

    def _required(self, name: str, start: Callable[[], jax.Array]) -> jax.Array:
        value = self._stored(name, start)
        if value is None:
            raise _missing(self.layer.path, name)
        return value


def _merge(variables: Variables) -> dict[str, Any]:
    """The variables with the quantizers' state among the parameters."""
    flat = hooks.flat_variables(variables)
    merged = {}
    for key, leaf in flat.items():
        if key[0] in (STATE, LEARNED):
            if len(key) > 1:  # an empty collection holds nothing
                merged["params", *key[1:-1], f"{key[0]}:{key[-1]}"] = leaf
        else:
            merged[key] = leaf
    return hooks.nested_variables(merged)


def _split(variables: Variables) -> dict[str, Any]:
    """The inverse of `_merge`."""
    split = {}
    for key, leaf in hooks.flat_variables(variables).items():
        collection, found, name = str(key[-1]).partition(":")
        if key[0] == "params" and found and collection in (STATE, LEARNED):
            split[collection, *key[1:-1], name] = leaf
        else:
            split[key] = leaf
    return hooks.nested_variables(split)


# --- The quantized module -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class QuantizedModule:
    """A Linen module as an STP model: called, initialised and checkpointed as the module is.

    `init` returns the module's own variables beside the collections ``stp`` (budgets and fixed
    scales) and ``stp_params`` (learned scales, to be trained with the parameters). Float parameters
    load as they are: ``apply(variables, x, mutable=["stp", "stp_params"])`` creates what is
    missing, from the kernels given. Rules name layers by the module's path joined by dots.

    `bind` gives the model with its variables, which every function of `stp_jax` takes; the methods
    that take and return variables are those functions in Linen's style.

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
        run = _Quantizers(self.policy, self.traced, create=True)
        with hooks.intercept([run.hooks], run.trace_key):
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
        create = hooks.in_filter(mutable, STATE) or hooks.in_filter(mutable, LEARNED)
        result = self.run(
            variables,
            *args,
            create=create,
            rngs=rngs,
            method=method,
            mutable=hooks.union_filters(mutable, "params") if create else mutable,
            capture_intermediates=capture_intermediates,
            **kwargs,
        )
        if create:
            self._check_rules()
        if mutable is False:
            return result
        out, updated = result
        kept = {name: v for name, v in _split(updated).items() if hooks.in_filter(mutable, name)}
        return out, kept

    def run(
        self,
        variables: Variables,
        *args: Any,
        create: bool = False,
        observe: Callable | None = None,
        more: Sequence[Hooks] = (),
        **kwargs: Any,
    ) -> Any:
        """The module's own `apply` with the quantizers in place, and more hooks around them.

        Args:
          variables: as from `init`.
          *args: of the module.
          create: whether missing state is created, in ``params``.
          observe: takes (slot, scale) of every input in place of its quantization.
          more: hooks around the quantizers.
          **kwargs: of `flax.linen.Module.apply`.
        """
        run = _Quantizers(self.policy, self.traced, create, observe)
        with hooks.intercept([run.hooks, *more], (run.trace_key, *more)):
            return self.module.apply(_merge(variables), *args, **kwargs)

    def bind(self, variables: Variables, *inputs: Any, **kwargs: Any) -> BoundModel:
        """The model with its variables, as the functions of `stp_jax` take it.

        Args:
          variables: as from `init`; not changed. The model has its own, ``.variables``.
          *inputs: of the module, to trace it where nothing else has, as after a checkpoint was
            restored, or only methods that use some of its layers; only shape and dtype are used.
          **kwargs: keyword arguments of that call, such as ``train=False``.

        Raises:
          ValueError: the module was not traced yet, so that its layers are not known.
        """
        if inputs:  # a call of another method may have traced a part of the layers
            jax.eval_shape(lambda v, x: self.run(v, *x, **kwargs), dict(variables), inputs)
        if not self.traced.layers:
            raise ValueError(
                "the layers of a Linen module are known once it was traced; call "
                "model.bind(variables, x) with an input, or jax.eval_shape(model.init, key, x)"
            )
        return BoundModel(self.module, dict(variables), stp=self)

    def calibrate(
        self, variables: Variables, batches: Iterable[Any], **options: Any
    ) -> dict[str, Any]:
        """The variables with calibrated input scales; see `stp_jax.calibrate`.

        Args:
          variables: as from `init`; not changed.
          batches: inputs, each given to the module as its only argument.
          **options: for `apply`, as ``train=False``, ``rngs`` or ``method``.
        """
        bound = self.bind(variables)
        calibration.calibrate(bound, batches, call=lambda model, x: model(x, **options))
        return bound.variables

    def budgets(self, variables: Variables) -> dict[str, Any]:
        """As `stp_jax.budgets`."""
        return budget_verbs.budgets(self.bind(variables))

    def set_budgets(
        self, variables: Variables, values: Mapping[str, jax.typing.ArrayLike]
    ) -> dict[str, Any]:
        """The variables with other budgets; see `stp_jax.set_budgets`."""
        bound = self.bind(variables)
        budget_verbs.set_budgets(bound, values)
        return bound.variables

    def search_weight_scales(
        self,
        variables: Variables,
        *,
        importance: Mapping[str, jax.Array] | None = None,
        slack: float = 0.0,
    ) -> dict[str, Any]:
        """The variables with searched kernel scales; see `stp_jax.search_weight_scales`."""
        bound = self.bind(variables)
        calibration.search_weight_scales(bound, importance=importance, slack=slack)
        return bound.variables

    def project_params(
        self, variables: Variables, values: Mapping[str, jax.typing.ArrayLike] | None = None
    ) -> dict[str, Any]:
        """A tree like ``variables["params"]``; see `stp_jax.project_params`."""
        return calibration.project_params(self.bind(variables), values)

    def integer_weights(self, variables: Variables) -> dict[str, np.ndarray]:
        """As `stp_jax.integer_weights`."""
        return calibration.integer_weights(self.bind(variables))

    def _check_rules(self) -> None:
        tables = [path for path, table in self.traced.tables.items() if table]
        self.policy.check(self.traced.tables, tables=tables)


@dataclasses.dataclass(eq=False)
class BoundModel(LinenModel):
    """A `QuantizedModule` with its variables: called on inputs, changed in place by `stp_jax`.

    >>> import stp_jax
    >>> x = jnp.ones((1, 16))
    >>> policy = stp_jax.Policy([stp_jax.Rule(path=".*", budget=6)])
    >>> quantized = stp_jax.quantize(nn.Dense(4), policy)
    >>> model = quantized.bind(quantized.init(jax.random.key(0), x))
    >>> stp_jax.calibrate(model, [x])
    >>> stp_jax.set_budgets(model, 4)
    >>> stp_jax.budgets(model), model(x).shape
    ({'': 4}, (1, 4))
    """

    stp: QuantizedModule = dataclasses.field(kw_only=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output; keyword arguments are those of `flax.linen.Module.apply`."""
        return self.stp.run(self.variables, *args, more=self.hooks, **kwargs)


def quantize_linen(module: nn.Module, policy: Policy) -> QuantizedModule:
    """The module as an STP model; see `QuantizedModule`."""
    if module.scope is not None:
        raise ValueError("quantize takes an unbound Linen module, not one inside init or apply")
    return QuantizedModule(module, policy)


# --- Its layers -----------------------------------------------------------------------------------


class LinenLayer(QuantizedLayer):
    """A layer of a `BoundModel`, whose state stands in the model's variables."""

    def __init__(self, model: BoundModel, found: _Found):
        """Takes a layer that a trace found."""
        self.layer, self.format = found.layer, found.format
        self._model, self._inner = model, found.shape

    def _key(self, collection: str, name: str) -> tuple[str, ...]:
        return (collection, *keys_of(self.path), name)

    def _get(self, collection: str, name: str) -> jax.Array | None:
        return hooks.find_variable(self._model.variables, self._key(collection, name))

    def _set(self, collection: str, name: str, value: jax.Array | None) -> None:
        changed = {self._key(collection, name): value}
        self._model.variables = hooks.replace_variables(self._model.variables, changed)

    @property
    def kernel(self) -> jax.Array:
        """The float kernel, before quantization."""
        kernel = self._get("params", self.layer.kernel_name)
        if kernel is None:
            raise ValueError(f"layer {self.path!r}: the variables hold no kernel")
        return self.layer.masked(kernel)

    @kernel.setter
    def kernel(self, value: jax.Array) -> None:
        self._set("params", self.layer.kernel_name, value)

    def _required(self, name: str) -> jax.Array:
        value = self._get(_collection(name, self.rule), name)
        if value is None:
            raise _missing(self.path, name)
        return value

    @property
    def stored_scale(self) -> jax.Array | None:
        """The scale of the kernel that is stored."""
        return None if self.rule.weight_scale == "max" else self._required("weight_scale")

    @stored_scale.setter
    def stored_scale(self, value: jax.Array) -> None:
        self.check_stored_scale(value)
        self._set(_collection("weight_scale", self.rule), "weight_scale", value)

    @property
    def stored_input_scale(self) -> jax.Array | None:
        """The scale of the input that is stored."""
        if not self.rule.stores_input_scale:
            return None
        return self._single(self._required("activation_scale"))

    def _single(self, leaf: jax.Array) -> jax.Array:
        return leaf if self.is_stacked else leaf.reshape(())

    @property
    def _budget_leaf(self) -> jax.Array | None:
        relaxed = self._get(LEARNED, "relaxed_budget")
        return self._get(STATE, "budget") if relaxed is None else relaxed

    @property
    def budget(self) -> jax.Array:
        """Terms per group; that of the rule where the variables hold none."""
        leaf = self._budget_leaf
        if leaf is None:
            return jnp.asarray(self.format.first_budget, jnp.int32)
        axes = self.stack_axes
        leaf = jnp.moveaxis(leaf, axes, range(len(axes)))
        stack, filters = leaf.shape[: len(axes)], leaf.shape[len(axes) :]
        return leaf if math.prod(filters) > 1 else leaf.reshape(stack)

    @budget.setter
    def budget(self, value: jax.Array) -> None:
        if self._get(STATE, "budget") is None:
            raise ValueError(
                f"the variables have no collection {STATE!r}; take them from model.init"
            )
        leaf = self.beside_kernel(value)
        self._set(LEARNED, "relaxed_budget", None)
        self._set(STATE, "budget", leaf)

    def relax(self) -> None:
        """Puts the budget among the trained values."""
        relaxed = self.beside_kernel(self.budget.astype(jnp.float32))
        self._set(LEARNED, "relaxed_budget", relaxed)

    def beside_kernel(self, budget: jax.Array) -> jax.Array:
        """The budget with the axes of the kernel, stacked where the kernel is."""
        axes = self.stack_axes
        missing = self.kernel.ndim - budget.ndim
        budget = budget.reshape(*budget.shape, *(1,) * missing)
        return jnp.moveaxis(budget, range(len(axes)), axes)

    def map_stack(self, function: Callable, *arrays: jax.Array | None) -> jax.Array:
        """``function(*arrays)``, layer by layer."""
        for axis in self.stack_axes:  # so the last goes first, and the others keep their places
            axes = tuple(None if array is None else axis for array in arrays)
            function = jax.vmap(function, in_axes=axes, out_axes=axis)
        return function(*arrays)

    @property
    def stack_axes(self) -> tuple[int, ...]:
        """The axes along which lifted transformations stack the kernel, ascending."""
        shape, inner, budget = self.kernel.shape, self._inner, self._budget_leaf
        if shape == inner:
            return ()
        if budget is None:
            raise ValueError(
                f"layer {self.path!r} is stacked; its variables need the collection {STATE!r}"
            )
        # Budgets have an entry for each layer of a stack, and 1 along the kernel's own axes or the
        # extents of the filters.
        own = ((1,) * len(inner), self.format.filter_shape(inner))
        for axes in itertools.combinations(range(len(shape)), len(shape) - len(inner)):
            rest = [a for a in range(len(shape)) if a not in axes]
            stacked = all(budget.shape[a] == shape[a] for a in axes)
            fits = tuple(shape[a] for a in rest) == inner
            if stacked and fits and tuple(budget.shape[a] for a in rest) in own:
                return axes
        raise ValueError(
            f"layer {self.path!r}: a budget of shape {budget.shape} does not fit its stacked "
            f"kernel of shape {shape}"
        )


@find_layers.register(BoundModel)
def _find_layers(model: BoundModel) -> dict[str, QuantizedLayer]:
    return {path: LinenLayer(model, found) for path, found in model.stp.traced.layers.items()}


@find_layers.register(QuantizedModule)
def _refuse_unbound(model: QuantizedModule) -> dict[str, QuantizedLayer]:
    raise TypeError(
        "this function takes a model with its variables; a Linen model has them as "
        "model.bind(variables), where model is what stp_jax.quantize returned"
    )


@without_quantizers.register(BoundModel)
def _without_quantizers(model: BoundModel) -> LinenModel:
    own = {name: v for name, v in model.variables.items() if name not in (STATE, LEARNED)}
    return LinenModel(model.module, own, model.hooks)


@calibration.observe_inputs.register(BoundModel)
def _observe_inputs(model: BoundModel, batches: Iterable[Any], call: Callable) -> int:
    # Each stored scale is replaced by the number of its slot, which the layer reports with what
    # it saw: this way scans, vmaps and remats need to know nothing of calibration.
    slots, numbered = _numbered(model.variables)
    best = np.zeros(sum(leaf.size for leaf in slots.values()), np.float32)

    def record(slot: jax.Array, scale: jax.Array) -> np.ndarray:
        best[int(slot)] = max(best[int(slot)], float(scale))
        return np.zeros((), np.float32)

    @jax.jit
    def observe(variables: Any, batch: Any) -> Any:
        outputs = call(_ObservedModel(model.module, variables, stp=model.stp, record=record), batch)
        if not jax.tree.leaves(outputs):
            raise ValueError(
                "call must return the model's outputs: a layer is seen where they depend on it"
            )
        return outputs

    count = 0
    for batch in batches:
        jax.block_until_ready(observe(numbered, batch))
        count += 1
    if count:
        found = {}
        for key, leaf in slots.items():
            stored = hooks.find_variable(model.variables, key)
            assert stored is not None  # it was numbered
            found[key] = jnp.where(best[leaf] > 0, best[leaf], stored)
        model.variables = hooks.replace_variables(model.variables, found)
    return count


@dataclasses.dataclass(eq=False)
class _ObservedModel(BoundModel):
    """A model whose inputs are recorded instead of quantized."""

    record: Callable = dataclasses.field(kw_only=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.stp.run(self.variables, *args, observe=self.record, **kwargs)


def _numbered(variables: Variables) -> tuple[dict[tuple[str, ...], np.ndarray], dict[str, Any]]:
    """The stored input scales' places, and the variables with int32 slot numbers there."""
    slots, count = {}, 0
    for key, leaf in hooks.flat_variables(variables).items():
        if key[0] in (STATE, LEARNED) and key[-1] == "activation_scale":
            slots[key] = count + np.arange(leaf.size, dtype=np.int32).reshape(leaf.shape)
            count += leaf.size
    numbers = {key: jnp.asarray(leaf) for key, leaf in slots.items()}
    return slots, hooks.replace_variables(variables, numbers)
