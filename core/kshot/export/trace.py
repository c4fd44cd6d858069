"""Traces one call of a learner, gradients included, on fake tensors, as an ONNX graph with dynamic sizes.

The only module that uses unstable interfaces of torch and onnxscript; both are pinned, and upgraded together.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import onnxscript.optimizer
import onnxscript.rewriter
import torch
from onnxscript import ir
from onnxscript.version_converter import convert_version
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.func import functional_call
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    GuardOnDataDependentSymNode,
    ShapeEnv,
    StatelessSymbolicContext,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.onnx._internal.exporter._core import _exported_program_to_onnx_program
from torch.onnx._internal.exporter._decomp import (
    create_onnx_friendly_decomposition_table,
    get_onnx_implemented_overloads,
)
from torch.onnx._internal.exporter._fx_passes import insert_type_promotion_nodes, remove_assertion_nodes
from torch.onnx._internal.exporter._registration import ONNXRegistry

from kshot.export.ops import TRANSLATIONS, backward_ops
from kshot.learner import Learner, State
from kshot_runtime.errors import KshotError

OPSET = 20  # above it, MaxPool has no CUDA kernel in onnxruntime 1.31

_TRACED_AT = {"S": 14, "Q": 11, "W": 7}  # arbitrary distinct numbers from 2: no operation may depend on them


class ExportError(KshotError):
    """A learner cannot be exported; the message gives the reason."""


@dataclass(frozen=True)
class Spec:
    """The shape of a tensor, with names for dynamic sizes, and its type."""

    shape: tuple[int | str, ...]
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Piece:
    """One traced call: a graph with named inputs and outputs."""

    graph: ir.Graph
    inputs: dict[str, Spec]
    outputs: dict[str, Spec]
    unchanged: frozenset[str]  # outputs that equal the inputs of the same names

    def used(self) -> set[str]:
        """The inputs that some output depends on."""
        return {value.name or "" for value in self.graph.inputs if value.uses() or value.is_graph_output()}


Call = Callable[[State], State]
"""A function to trace: maps named inputs to named outputs, using the learner's weights."""

_Decompositions = dict[Any, Callable[..., Any]]


def trace(learner: Learner, what: str, call: Call, inputs: Mapping[str, Spec]) -> Piece:
    """Trace a call of a learner, in eval mode on the CPU, as a graph; `what` names the call in errors.

    Weights become initializers under their own names. An ExportError if the code converts a dynamic size to a number,
    or uses anything that ONNX cannot express.
    """
    with _as_export_error(f"{what} of {learner.name!r}"), _warnings_ignored():
        traced, weights, outputs, unchanged = _record(learner, what, call, inputs, _decompositions())
        if in_place := any(_is_in_place(node) for node in traced.graph.nodes):
            traced, weights, outputs, unchanged = _record(learner, what, call, inputs, backward_ops())
        program = torch.export.export(
            _Program(learner, weights, traced),
            tuple(_example(spec) for spec in inputs.values()),
            dynamic_shapes=(tuple(_dynamic(spec) for spec in inputs.values()),),
            strict=False,
        )
        if in_place:  # without the operations in place, at three times the cost
            program = program.run_decompositions(_decompositions())
        model = _translated(program)
    _simplify(model)
    _name(model.graph, list(inputs), list(outputs))
    return Piece(model.graph, dict(inputs), outputs, unchanged)


def _translated(program: ExportedProgram) -> ir.Model:
    """A program of recorded operations in ONNX, with only those changes that keep every result.

    `torch.onnx.export` rebuilds its registry on each call, decomposes a program that `_decompositions()` has decomposed
    already, and folds small constants away: `x + 1e-8` becomes x, as in Adam's denominator.
    """
    insert_type_promotion_nodes(program.graph_module)
    remove_assertion_nodes(program.graph_module)
    model = _exported_program_to_onnx_program(program, registry=_translations()).model
    convert_version(model, OPSET, fallback=True)
    return model


@cache
def _translations() -> ONNXRegistry:
    """The exporter's translations of torch's operations, and ours."""
    registry = ONNXRegistry.from_torchlib(OPSET)
    for operation, translation in TRANSLATIONS.items():
        registry.register_op(operation, translation)
    return registry


@cache
def _decompositions() -> _Decompositions:
    """The table for `make_fx`: torch's decompositions of the operations that have no translation, and ours."""
    translated = set(get_onnx_implemented_overloads(_translations()))
    return create_onnx_friendly_decomposition_table(translated) | backward_ops()


def _is_in_place(node: Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


class _Called(nn.Module):
    """A call as a module, so that `functional_call` can replace the learner's tensors."""

    def __init__(self, learner: Learner, call: Call) -> None:
        super().__init__()
        self.learner = learner
        self.call = call

    def forward(self, inputs: State) -> State:
        return self.call(inputs)


class _Program(nn.Module):
    """The recorded operations, applied to the learner's own tensors."""

    def __init__(self, learner: Learner, weights: list[str], recorded: GraphModule) -> None:
        super().__init__()
        self.learner = learner
        self.weights = weights
        self.recorded = recorded

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        own = tensors(self.learner)
        outputs: list[Tensor] = self.recorded(*(own[name] for name in self.weights), *inputs)
        return outputs


def tensors(learner: Learner) -> dict[str, Tensor]:
    """The learner's parameters and buffers, by name."""
    return {**dict(learner.named_parameters()), **dict(learner.named_buffers())}


def _record(
    learner: Learner, what: str, call: Call, inputs: Mapping[str, Spec], decompositions: _Decompositions
) -> tuple[GraphModule, list[str], dict[str, Spec], frozenset[str]]:
    """The operations of a call, the names of the weights it uses, its outputs, and which of these are its inputs."""
    called, own = _Called(learner, call), tensors(learner)
    outputs: dict[str, Spec] = {}
    unchanged: set[str] = set()
    sizes = ShapeEnv(duck_shape=False)  # two sizes with equal numbers remain independent
    fake = FakeTensorMode(shape_env=sizes, allow_non_fake_inputs=True)

    def run(*tensors: Tensor) -> list[Tensor]:
        weights = {f"learner.{name}": tensor for name, tensor in zip(own, tensors, strict=False)}
        given = dict(zip(inputs, tensors[len(own) :], strict=True))
        found = functional_call(called, weights, (given,))
        outputs.update({name: Spec(_shape(tensor, names, sizes), tensor.dtype) for name, tensor in found.items()})
        unchanged.update(name for name, tensor in found.items() if tensor is given.get(name))
        return list(found.values())

    fakes = [_fake(fake, tensor, ()) for tensor in own.values()]
    given = [_fake(fake, _example(spec), spec.shape) for spec in inputs.values()]
    dynamic: list[tuple[Any, str]] = [  # torch.SymInt, typed as int
        (size, name)
        for tensor, spec in zip(given, inputs.values(), strict=True)
        for size, name in zip(tensor.shape, spec.shape, strict=True)
        if isinstance(name, str)
    ]
    first = {name: size for size, name in reversed(dynamic)}
    for size, name in dynamic:
        torch._check(size == first[name])  # sizes of the same name are equal
    names = {sizes.replace(size.node.expr): name for name, size in first.items()}
    with fake, enable_python_dispatcher(), sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        graph = make_fx(run, decomposition_table=decompositions, tracing_mode="real")(*fakes, *given)
    if fixed := sorted({name for size, name in dynamic if sizes.replace(size.node.expr).is_number}):
        raise ExportError(
            f"{what} of {learner.name!r} works for one {' and one '.join(_SIZE_NAMES[name] for name in fixed)} only: "
            f"it converts a size to a number. Use sizes as `x.shape[0]`, without len(x), int(...) or .item()."
        )
    weights = _drop_unused(graph, list(own))
    return graph, weights, outputs, frozenset(unchanged)


_SIZE_NAMES = {"S": "number of support images", "Q": "number of queries", "W": "number of ways"}


def _fake(mode: FakeTensorMode, tensor: Tensor, shape: tuple[int | str, ...]) -> Tensor:
    dynamic = [i < len(shape) and isinstance(shape[i], str) for i in range(tensor.dim())]
    sizes = [DimDynamic.DYNAMIC if yes else DimDynamic.STATIC for yes in dynamic]
    return mode.from_tensor(tensor.detach(), symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))


def _example(spec: Spec) -> Tensor:
    return torch.zeros([_TRACED_AT[d] if isinstance(d, str) else d for d in spec.shape], dtype=spec.dtype)


def _dynamic(spec: Spec) -> dict[int, Dim]:
    return {i: Dim(name, min=1) for i, name in enumerate(spec.shape) if isinstance(name, str)}


def _shape(tensor: Tensor, names: Mapping[object, str], sizes: ShapeEnv) -> tuple[int | str, ...]:
    """A shape with the names of dynamic sizes; any other symbolic size becomes the text of its expression."""

    def named(size: Any) -> int | str:
        if isinstance(size, int):
            return size
        expression = sizes.replace(size.node.expr)
        return names.get(expression, str(expression))

    return tuple(named(size) for size in tensor.shape)


def _drop_unused(graph: GraphModule, names: list[str]) -> list[str]:
    """Remove the placeholders of unused weights from the graph, and return the names of the others, in order."""
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"][: len(names)]
    used = [name for name, node in zip(names, placeholders, strict=True) if node.users]
    for node in placeholders:
        if not node.users:
            graph.graph.erase_node(node)
    graph.recompile()
    return used


def _simplify(model: ir.Model) -> None:
    """Fold constants, and remove duplicate and unused nodes. No result changes."""
    onnxscript.optimizer.inline(model)
    with _warnings_ignored():
        onnxscript.optimizer.fold_constants(model, onnx_shape_inference=True)
    common = ir.passes.common
    ir.passes.Sequential(
        common.IdentityEliminationPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.ClearMetadataAndDocStringPass(),
    )(model)


def _name(graph: ir.Graph, inputs: list[str], outputs: list[str]) -> None:
    """Name a graph's inputs, outputs and weights; outputs that are inputs or duplicates become Identity nodes."""
    for value, name in zip(graph.inputs, inputs, strict=True):
        value.name = name
    for initializer in list(graph.initializers.values()):
        assert initializer.name is not None
        initializer.name = initializer.name.removeprefix("learner.")
    seen: set[ir.Value] = set()
    for i, (value, name) in enumerate(zip(list(graph.outputs), outputs, strict=True)):
        if value.producer() is None or value in seen:
            node = ir.node("Identity", [value])
            graph.append(node)
            graph.outputs[i] = value = node.outputs[0]
        seen.add(value)
        value.name = name


@contextmanager
def _as_export_error(whose: str) -> Iterator[None]:
    """Turn any failure to trace into an ExportError that explains what in the learner's code to change."""
    try:
        yield
    except ExportError:
        raise
    except (DataDependentOutputException, GuardOnDataDependentSymNode) as error:
        raise ExportError(
            f"{whose} converts a tensor's value to a number, but values are unknown while the graph is traced. "
            "Keep values in tensors: no .item(), .tolist() or .numpy(), and torch.where instead of `if`."
        ) from error
    except torch.onnx.errors.OnnxExporterError as error:
        operation = re.search(r"No ONNX function found for <OpOverload\(op='([\w.]+)'", str(error))
        what = (
            f"{operation[1]} has no ONNX translation; use other operations" if operation else str(error).splitlines()[0]
        )
        raise ExportError(f"{whose} uses an operation that cannot be exported: {what}") from error
    except Exception as error:  # the tracer, the exporter and the learner's own code may raise anything
        raise ExportError(f"{whose} cannot be traced: {type(error).__name__}: {str(error)[:500]}") from error


@contextmanager
def _warnings_ignored() -> Iterator[None]:
    """Ignore the exporter's warnings about its own code, such as deprecations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", UserWarning)
        yield
