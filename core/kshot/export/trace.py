"""One call of a learner as an ONNX graph whose sizes stay free: traced on tensors without data, gradients and all.

The only module that touches what torch and onnxscript do not promise to keep; both are pinned, and move together.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import onnxscript.optimizer
import onnxscript.rewriter
import torch
from onnxscript import ir
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.export import Dim
from torch.func import functional_call
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    GuardOnDataDependentSymNode,
    ShapeEnv,
    StatelessSymbolicContext,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

from kshot.export.ops import TRANSLATIONS, backward_ops
from kshot.learner import Learner, State
from kshot_runtime.errors import KshotError

OPSET = 20  # above it, MaxPool has no CUDA kernel in onnxruntime 1.31

_TRACED_AT = {"S": 14, "Q": 11, "W": 7}  # any numbers of two or more do, for no operation may look at them


class ExportError(KshotError):
    """A learner that cannot become a bundle, and why."""


@dataclass(frozen=True)
class Spec:
    """The shape of a tensor, with names for the sizes that stay free, and its type."""

    shape: tuple[int | str, ...]
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Piece:
    """One traced call: a graph whose inputs and outputs bear the names they were given."""

    graph: ir.Graph
    inputs: dict[str, Spec]
    outputs: dict[str, Spec]
    unchanged: frozenset[str]  # outputs that are the inputs of the same names

    def used(self) -> set[str]:
        """The inputs that some output depends on."""
        return {value.name or "" for value in self.graph.inputs if value.uses() or value.is_graph_output()}


Call = Callable[[State], State]
"""What is traced: named inputs in, named tensors out, with the learner's weights in between."""


def trace(learner: Learner, what: str, call: Call, inputs: Mapping[str, Spec]) -> Piece:
    """Turn a call of the learner's into a graph; `what` names it in errors. The learner is in eval mode, on the CPU.

    Weights become initializers under their own names. A size that the code turns into a number is an error.
    """
    with _explaining(f"{what} of {learner.name!r}"), _quiet():
        traced, weights, outputs, unchanged = _record(learner, what, call, inputs)
        program = torch.export.export(
            _Program(learner, weights, traced),
            tuple(_example(spec) for spec in inputs.values()),
            dynamic_shapes=(tuple(_dynamic(spec) for spec in inputs.values()),),
            strict=False,
        )
        exported = torch.onnx.export(
            program, (), None, dynamo=True, opset_version=OPSET, verbose=False,
            optimize=False,  # its rewrites take `x + 1e-8` for x, and Adam's division with it
            custom_translation_table=TRANSLATIONS,
        )  # fmt: skip
    assert exported is not None
    model = exported.model
    _simplify(model)
    _name(model.graph, list(inputs), list(outputs))
    return Piece(model.graph, dict(inputs), outputs, unchanged)


class _Called(nn.Module):
    """A call as a module, so that `functional_call` can put other tensors in the place of the learner's."""

    def __init__(self, learner: Learner, call: Call) -> None:
        super().__init__()
        self.learner = learner
        self.call = call

    def forward(self, inputs: State) -> State:
        return self.call(inputs)


class _Program(nn.Module):
    """The recorded operations, given the learner's own tensors again."""

    def __init__(self, learner: Learner, weights: list[str], recorded: GraphModule) -> None:
        super().__init__()
        self.learner = learner
        self.weights = weights
        self.recorded = recorded

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        held = tensors(self.learner)
        outputs: list[Tensor] = self.recorded(*(held[name] for name in self.weights), *inputs)
        return outputs


def tensors(learner: Learner) -> dict[str, Tensor]:
    """The learner's parameters and buffers, by name."""
    return {**dict(learner.named_parameters()), **dict(learner.named_buffers())}


def _record(
    learner: Learner, what: str, call: Call, inputs: Mapping[str, Spec]
) -> tuple[GraphModule, list[str], dict[str, Spec], frozenset[str]]:
    """The operations of a call, the names of the weights it uses, what it gives, and what it only hands on."""
    called, held = _Called(learner, call), tensors(learner)
    outputs: dict[str, Spec] = {}
    unchanged: set[str] = set()
    sizes = ShapeEnv(duck_shape=False)  # equal numbers are not taken for the same size
    fake = FakeTensorMode(shape_env=sizes, allow_non_fake_inputs=True)

    def run(*tensors: Tensor) -> list[Tensor]:
        weights = {f"learner.{name}": tensor for name, tensor in zip(held, tensors, strict=False)}
        given = dict(zip(inputs, tensors[len(held) :], strict=True))
        found = functional_call(called, weights, (given,))
        outputs.update({name: Spec(_shape(tensor, names, sizes), tensor.dtype) for name, tensor in found.items()})
        unchanged.update(name for name, tensor in found.items() if tensor is given.get(name))
        return list(found.values())

    fakes = [_fake(fake, tensor, ()) for tensor in held.values()]
    given = [_fake(fake, _example(spec), spec.shape) for spec in inputs.values()]
    free: list[tuple[Any, str]] = [  # torch.SymInt, which poses as int
        (size, name)
        for tensor, spec in zip(given, inputs.values(), strict=True)
        for size, name in zip(tensor.shape, spec.shape, strict=True)
        if isinstance(name, str)
    ]
    first = {name: size for size, name in reversed(free)}
    for size, name in free:
        torch._check(size == first[name])  # two sizes of one name are one size
    names = {sizes.replace(size.node.expr): name for name, size in first.items()}
    with fake, enable_python_dispatcher(), sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        graph = make_fx(run, decomposition_table=backward_ops(), tracing_mode="real")(*fakes, *given)
    if fixed := sorted({name for size, name in free if sizes.replace(size.node.expr).is_number}):
        raise ExportError(
            f"{what} of {learner.name!r} holds for one {' and one '.join(_MEANING[name] for name in fixed)} only: "
            f"it turns a size into a number. Keep sizes as `x.shape[0]`, unconverted: no len(x), int(...) or .item()."
        )
    weights = _drop_unused(graph, list(held))
    return graph, weights, outputs, frozenset(unchanged)


_MEANING = {"S": "number of support images", "Q": "number of queries", "W": "number of ways"}


def _fake(mode: FakeTensorMode, tensor: Tensor, shape: tuple[int | str, ...]) -> Tensor:
    free = [i < len(shape) and isinstance(shape[i], str) for i in range(tensor.dim())]
    sizes = [DimDynamic.DYNAMIC if yes else DimDynamic.STATIC for yes in free]
    return mode.from_tensor(tensor.detach(), symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))


def _example(spec: Spec) -> Tensor:
    return torch.zeros([_TRACED_AT[d] if isinstance(d, str) else d for d in spec.shape], dtype=spec.dtype)


def _dynamic(spec: Spec) -> dict[int, Dim]:
    return {i: Dim(name, min=1) for i, name in enumerate(spec.shape) if isinstance(name, str)}


def _shape(tensor: Tensor, names: Mapping[object, str], sizes: ShapeEnv) -> tuple[int | str, ...]:
    """A shape in the names of the free sizes; a size that is none of them is spelt out, and judged by the caller."""

    def spelt(size: Any) -> int | str:
        if isinstance(size, int):
            return size
        expression = sizes.replace(size.node.expr)
        return names.get(expression, str(expression))

    return tuple(spelt(size) for size in tensor.shape)


def _drop_unused(graph: GraphModule, names: list[str]) -> list[str]:
    """Take the placeholders of unused weights out of the graph; the names of the others, in order."""
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"][: len(names)]
    used = [name for name, node in zip(names, placeholders, strict=True) if node.users]
    for node in placeholders:
        if not node.users:
            graph.graph.erase_node(node)
    graph.recompile()
    return used


def _simplify(model: ir.Model) -> None:
    """Fold constants, and drop what is double or unused. Nothing here changes a number."""
    onnxscript.optimizer.inline(model)
    with _quiet():
        onnxscript.optimizer.fold_constants(model, onnx_shape_inference=True)
    common = ir.passes.common
    ir.passes.Sequential(
        common.IdentityEliminationPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.ClearMetadataAndDocStringPass(),
    )(model)


def _name(graph: ir.Graph, inputs: list[str], outputs: list[str]) -> None:
    """Give a graph's inputs, outputs and weights their names; an output that nothing computes becomes a node."""
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
def _explaining(whose: str) -> Iterator[None]:
    """Any failure to trace as an ExportError: it is the learner's code that does not fit, in one of a few ways."""
    try:
        yield
    except ExportError:
        raise
    except (DataDependentOutputException, GuardOnDataDependentSymNode) as error:
        raise ExportError(
            f"{whose} turns a tensor's value into a number, and there is none while the graph is made. "
            "Keep values in tensors: no .item(), .tolist() or .numpy(), and no `if` on them (torch.where does it)."
        ) from error
    except torch.onnx.errors.OnnxExporterError as error:
        operation = re.search(r"No ONNX function found for <OpOverload\(op='([\w.]+)'", str(error))
        what = (
            f"{operation[1]}, which has no ONNX form; write it with others" if operation else str(error).splitlines()[0]
        )
        raise ExportError(f"{whose} uses an operation that does not export: {what}") from error
    except Exception as error:  # the tracer, the exporter and the learner's own code may raise anything
        raise ExportError(f"{whose} cannot be traced: {type(error).__name__}: {str(error)[:500]}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of its own upkeep, which its user can do nothing about."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", UserWarning)
        yield
