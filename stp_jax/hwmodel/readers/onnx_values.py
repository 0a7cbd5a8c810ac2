"""What is known of the tensors of an ONNX graph without running it: shapes, and small constants.

Exporters write sizes as a part of the graph (Shape, Gather, Concat, Reshape, …). Nodes are taken
one by one: ONNX's shape inference gives their outputs' shapes, and its reference implementation
computes those that are small and follow from known values, which the next nodes' shapes may need.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

with contextlib.suppress(ImportError):  # an extra, for which `read_onnx` asks
    import onnx
    import onnx.external_data_helper
    import onnx.reference

# Sizes, axes and positions are short; what is longer only costs time.
_MAX_ELEMENTS = 4096
_RANDOM = frozenset(
    {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial"}
)
Shape = tuple[int, ...]


@dataclasses.dataclass
class Values:
    """What is known of the tensors of a graph, by name; `infer` adds a node's outputs."""

    opsets: Mapping[str, int]  # version by domain
    folder: Path  # of the file, where its external data lies
    types: dict[str, onnx.TypeProto] = dataclasses.field(default_factory=dict)
    known: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    constant: set[str] = dataclasses.field(default_factory=set)  # independent of the inputs
    # What the file itself says of tensors, where inference does not.
    declared: dict[str, onnx.TypeProto] = dataclasses.field(default_factory=dict)
    # The node whose output was the first of unknown shape on the way to a tensor.
    unknown_since: dict[str, str] = dataclasses.field(default_factory=dict)

    def within(self) -> Values:
        """A copy for a subgraph, which sees these tensors."""
        copies = {
            field: type(getattr(self, field))(getattr(self, field))
            for field in ("types", "known", "constant", "declared", "unknown_since")
        }
        return dataclasses.replace(self, **copies)

    def shape(self, tensor: str) -> Shape | None:
        """Extents, unless one of them is unknown."""
        kind = self.types.get(tensor)
        if kind is None or not kind.tensor_type.HasField("shape"):
            return None
        extents = kind.tensor_type.shape.dim
        if not all(extent.HasField("dim_value") for extent in extents):
            return None
        return tuple(extent.dim_value for extent in extents)

    def add_inputs(
        self,
        graph: onnx.GraphProto,
        shapes: Mapping[str, Sequence[int]],
        values: Mapping[str, npt.ArrayLike],
    ) -> None:
        """Takes the inputs of a model, with shapes or values for those that are symbolic.

        Raises:
          ValueError: a symbolic input without a shape, or a shape that does not fit.
        """
        constants = {tensor.name for tensor in graph.initializer}
        inputs = {i.name: i.type for i in graph.input if i.name not in constants}
        given = {name: np.asarray(value) for name, value in values.items()}
        shapes = {**shapes, **{name: value.shape for name, value in given.items()}}
        unknown = [name for name in shapes if name not in inputs]
        if unknown:
            raise ValueError(f"there is no input {unknown[0]!r}; the inputs are {list(inputs)}")
        missing: list[str] = []
        for name, kind in inputs.items():
            self.types[name] = kind
            if name in shapes:
                self.types[name] = _with_shape(name, kind, shapes[name])
            elif kind.HasField("tensor_type") and not (
                kind.tensor_type.HasField("shape")
                and all(map(_is_extent, kind.tensor_type.shape.dim))
            ):
                missing.append(f"{name!r}: {_symbolic(kind)}")
            if name in given:
                dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.tensor_type.elem_type)
                self.known[name] = given[name].astype(dtype)
        if missing:
            raise ValueError(
                f"inputs with symbolic extents, {{{', '.join(missing)}}}; give their shapes, such "
                "as shapes={'x': (1, 3, 224, 224)}"
            )

    def add_initializers(self, graph: onnx.GraphProto) -> None:
        """Takes a graph's constants; of external data, only what is small is read."""
        self.declared.update({value.name: value.type for value in graph.value_info})
        for sparse in graph.sparse_initializer:
            self._add(sparse.values.name, sparse.values.data_type, tuple(sparse.dims))
        for tensor in graph.initializer:
            self._add(tensor.name, tensor.data_type, tuple(tensor.dims))
            if math.prod(tensor.dims) <= _MAX_ELEMENTS:
                self._read(tensor)

    def _add(self, name: str, dtype: int, shape: Shape) -> None:
        self.types[name] = onnx.helper.make_tensor_type_proto(dtype, shape)
        self.constant.add(name)

    def _read(self, tensor: onnx.TensorProto) -> None:
        if onnx.external_data_helper.uses_external_data(tensor):
            try:
                onnx.external_data_helper.load_external_data_for_tensor(tensor, str(self.folder))
            except (OSError, onnx.checker.ValidationError):
                return  # its shape is known
        try:
            self.known[tensor.name] = onnx.numpy_helper.to_array(tensor)
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"the constant {tensor.name!r} is damaged: {error}") from error

    def infer(self, node: onnx.NodeProto, name: str) -> None:
        """Adds a node's outputs.

        Args:
          node: without subgraphs, of an operator in `onnx.defs`.
          name: of the node, for errors.

        Raises:
          ValueError: the operator is unknown in its opset, or the inputs do not fit it.
        """
        given = [tensor for tensor in node.input if tensor]
        schema = self._schema(node, name)
        if all(tensor in self.types for tensor in given):
            self.types.update(self._inferred(schema, node, name, given))
        if node.op_type not in _RANDOM and self.constant.issuperset(given):
            self.constant.update(node.output)
        self._compute(node, given)
        since = next((self.unknown_since[t] for t in given if t in self.unknown_since), name)
        for tensor in filter(None, node.output):
            if self.shape(tensor) is None and tensor in self.declared:
                self.types[tensor] = self.declared[tensor]
            if self.shape(tensor) is None:
                self.unknown_since[tensor] = since

    def leave_unknown(self, node: onnx.NodeProto, name: str) -> None:
        """Notes that nothing is known of a node's outputs."""
        self.unknown_since.update(dict.fromkeys(node.output, name))

    def join(
        self,
        tensors: Sequence[str],
        branches: Sequence[Values],
        outputs: Sequence[Sequence[str]],
        name: str,
    ) -> None:
        """Takes the outputs of the branches of a node, where these agree.

        Args:
          tensors: outputs of the node.
          branches: what is known in each branch.
          outputs: their names in each branch.
          name: of the node.
        """
        for tensor, *inner in zip(tensors, *outputs, strict=True):
            found = list(zip(branches, inner, strict=True))
            first, out = found[0]
            shapes = {branch.shape(out) for branch, out in found}
            if len(shapes) > 1 or None in shapes:
                self.unknown_since[tensor] = first.unknown_since.get(out, name)
            if len(shapes) == 1 and out in first.types:
                self.types[tensor] = first.types[out]
            if len(branches) == 1 and out in first.known:
                self.known[tensor] = first.known[out]
            if len(branches) == 1 and out in first.constant:
                self.constant.add(tensor)

    @staticmethod
    def attributes(node: onnx.NodeProto) -> dict[str, Any]:
        """A node's attributes by name."""
        return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}

    @staticmethod
    def subgraphs(node: onnx.NodeProto) -> list[onnx.GraphProto]:
        """The graphs among a node's attributes."""
        return [a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]

    @staticmethod
    def float_lstm(node: onnx.NodeProto) -> onnx.NodeProto:
        """An LSTM of the shapes of onnxruntime's DynamicQuantizeLSTM, whose kernels are integers.

        Its first input stands for the kernels as well, whose shapes nothing follows from.
        """
        new = onnx.NodeProto()
        new.CopyFrom(node)
        new.op_type, new.domain = "LSTM", ""
        new.ClearField("input")
        new.input.extend([node.input[0]] * 3)
        return new

    def _schema(self, node: onnx.NodeProto, name: str) -> onnx.defs.OpSchema:
        domain = "" if node.domain == "ai.onnx" else node.domain
        try:
            return onnx.defs.get_schema(node.op_type, self.opsets[domain], domain)
        except (KeyError, TypeError, onnx.defs.SchemaError) as error:
            operator = f"{node.op_type} of {domain}" if domain else node.op_type
            raise ValueError(
                f"{name}: operator {operator} is not known, nor is what it multiplies"
            ) from error

    def _inferred(
        self, schema: onnx.defs.OpSchema, node: onnx.NodeProto, name: str, given: Sequence[str]
    ) -> dict[str, onnx.TypeProto]:
        known = {t: self.known[t] for t in given if t in self.known}
        try:
            return onnx.shape_inference.infer_node_outputs(
                schema,
                node,
                {tensor: self.types[tensor] for tensor in given},
                {t: onnx.numpy_helper.from_array(value, t) for t, value in known.items()},
                opset_imports=[onnx.helper.make_opsetid(*opset) for opset in self.opsets.items()],
            )
        except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError) as error:
            shapes = {tensor: self.shape(tensor) for tensor in given}
            raise ValueError(
                f"{name}: {node.op_type} does not fit the shapes of its inputs, {shapes}: {error}"
            ) from error

    def _compute(self, node: onnx.NodeProto, given: Sequence[str]) -> None:
        """Values of the outputs, where they are small and follow from known ones."""
        if node.op_type in ("Shape", "Size"):
            shape = self.shape(node.input[0])
            if shape is None:
                return
            # Stands for the input, of which only the shape is read; it takes no memory.
            values = {node.input[0]: np.broadcast_to(np.float32(0), shape)}
        elif all(tensor in self.known for tensor in given):
            values = {tensor: self.known[tensor] for tensor in given}
        else:
            return
        shapes = [self.shape(tensor) for tensor in node.output if tensor]
        if node.op_type in _RANDOM or any(
            shape is None or math.prod(shape) > _MAX_ELEMENTS for shape in shapes
        ):
            return
        try:
            results = _run(node, values, self.opsets)
        except Exception:  # the reference has not every operator of every opset and type
            return  # a layer whose shape needs the value is an error
        for tensor, value in zip(filter(None, node.output), results, strict=True):
            self.known[tensor] = np.asarray(value)


def _run(
    node: onnx.NodeProto, values: Mapping[str, np.ndarray], opsets: Mapping[str, int]
) -> list[Any]:
    def described(name: str) -> onnx.ValueInfoProto:
        return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UNDEFINED, None)

    graph = onnx.helper.make_graph(
        [node], "node", list(map(described, values)), [described(t) for t in node.output if t]
    )
    imports = [onnx.helper.make_opsetid(*opset) for opset in opsets.items()]
    model = onnx.helper.make_model(graph, opset_imports=imports)
    with np.errstate(all="ignore"):  # infinities and the like are the graph's own
        return list(onnx.reference.ReferenceEvaluator(model).run(None, dict(values)))


def _is_extent(extent: onnx.TensorShapeProto.Dimension) -> bool:
    """Whether an input's extent is a number; exporters write 0 and -1 for one that is not."""
    return extent.dim_value > 0


def _with_shape(name: str, kind: onnx.TypeProto, shape: Sequence[int]) -> onnx.TypeProto:
    """The type of an input with another shape.

    Raises:
      ValueError: it contradicts what the file says.
    """
    extents = kind.tensor_type.shape.dim
    fits = all(isinstance(extent, int | np.integer) and extent > 0 for extent in shape)
    if kind.tensor_type.HasField("shape"):
        fits = fits and len(extents) == len(shape)
        fits = fits and all(
            not _is_extent(extent) or extent.dim_value == given
            for extent, given in zip(extents, shape, strict=True)
        )
    if not fits:
        raise ValueError(
            f"input {name!r} is {_symbolic(kind)} in the file, which the shape {tuple(shape)} "
            "does not fit"
        )
    return onnx.helper.make_tensor_type_proto(kind.tensor_type.elem_type, list(map(int, shape)))


def _symbolic(kind: onnx.TypeProto) -> str:
    """A shape as the file gives it."""
    if not kind.tensor_type.HasField("shape"):
        return "of any shape"
    extents = (
        str(e.dim_value) if _is_extent(e) else e.dim_param or "?"
        for e in kind.tensor_type.shape.dim
    )
    return f"({', '.join(extents)})"
