"""ONNX models out of traced pieces: photos go in as bytes, and the one traced step runs in a Loop."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

import onnx
import onnx.parser
import torch
from onnxscript import ir

from kshot.export.trace import OPSET, Piece, Spec

_TYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.int64: ir.DataType.INT64,
    torch.uint8: ir.DataType.UINT8,
    torch.bool: ir.DataType.BOOL,
}
_NO_SIZE = 1 << 40


def embed_model(embed: Piece) -> onnx.ModelProto:
    """images in, features out."""
    model = _Model("embed")
    return model.finish(model.place("embed", embed, model.inputs(embed, "images")), embed.outputs)


def views_model(image: tuple[int, int, int]) -> onnx.ModelProto:
    """images in, the views of each out: itself and its mirror image."""
    size = ", ".join(map(str, image))
    model: onnx.ModelProto = onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["": {OPSET}]>
        views (uint8[N, {size}] images) => (uint8[N, 2, {size}] views) {{
            width = Constant <value = int64[1] {{3}}> ()
            first = Constant <value = int64[1] {{-1}}> ()
            beyond = Constant <value = int64[1] {{-1000000}}> ()
            one = Constant <value = int64[1] {{1}}> ()
            mirrored = Slice (images, first, beyond, width, first)
            a = Unsqueeze (images, one)
            b = Unsqueeze (mirrored, one)
            views = Concat <axis = 1> (a, b)
        }}""")
    onnx.checker.check_model(model, full_check=True)
    return model


def adapt_model(
    begin: Piece,
    step: Piece | None = None,
    finish: Piece | None = None,
    *,
    first: Piece | None = None,
    wanted: Container[str],
) -> onnx.ModelProto:
    """support, labels and classes in, the wanted state out; with a step also `steps`, the length of its Loop.

    A first step of another form runs in a Loop of its own, of length 0 or 1: alone if there is no other, else with the
    second, so that what both compute of the initial weights is computed once.
    """
    model = _Model("adapt")
    given = model.inputs(begin, "support")
    state = model.place("begin", begin, given)
    specs = begin.outputs
    if step is not None:
        steps = model.input("steps", Spec((), torch.int64))
        start = 0
        if first is not None:
            only = model.add(ir.node("Cast", [model.add(model.whole("Equal", steps, 1))], {"to": ir.DataType.INT64}))
            state = model.loop("first", [first], only, given, state, once=True)
            more = model.add(model.whole("Sub", steps, 1))  # a Loop of length -1 has no iteration
            both = model.add(model.whole("Min", more, 1))
            state = model.loop("first_two", [first, step], both, given, state, once=True)
            start, steps = 2, model.add(model.whole("Sub", steps, 2))
        state = model.loop("step", [step], steps, given, state, start=start)
    if finish is not None:
        state = model.place("finish", finish, {**given, **state})
        specs = finish.outputs
    return model.finish({name: value for name, value in state.items() if name in wanted}, specs)


def classify_model(classify: Piece) -> onnx.ModelProto:
    """query and the state in; logits out, the query's features where images came in, and scores for unknown."""
    model = _Model("classify")
    outputs = model.place("classify", classify, model.inputs(classify, "query", classify.used()))
    return model.finish(outputs, classify.outputs)


class _Model:
    """A model that grows piece by piece."""

    def __init__(self, name: str) -> None:
        self.graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name=name)

    def inputs(self, piece: Piece, photos: str, wanted: Container[str] | None = None) -> dict[str, ir.Value]:
        """Inputs of the model for the wanted of a piece's, of which `photos` takes images or their features."""
        image = len(piece.inputs[photos].shape) > 2
        first = self.input(photos, Spec(piece.inputs[photos].shape, torch.uint8 if image else torch.float32))
        others = {
            name: self.input(name, spec)
            for name, spec in piece.inputs.items()
            if name != photos and (wanted is None or name in wanted)
        }
        return {photos: self.scaled(first) if image else first, **others}

    def input(self, name: str, spec: Spec) -> ir.Value:
        value = _value(name, spec)
        self.graph.inputs.append(value)
        return value

    def scaled(self, images: ir.Value) -> ir.Value:
        """Bytes as floats in 0..1, by the very division that made the training images."""
        floats = ir.node("Cast", [images], {"to": ir.DataType.FLOAT})
        scaled = ir.node("Div", [floats.outputs[0], self.constant("most", 255.0)])
        for name, node in (("as_floats", floats), ("in_0_to_1", scaled)):
            node.outputs[0].name = name
            self.add(node)
        return scaled.outputs[0]

    def place(self, name: str, piece: Piece, given: Mapping[str, ir.Value]) -> dict[str, ir.Value]:
        """Add a piece, fed with `given`; its outputs."""
        nodes, outputs = self._take(name, piece, given)
        self.graph.extend(nodes)
        return outputs

    def add(self, node: ir.Node) -> ir.Value:
        self.graph.append(node)
        return node.outputs[0]

    def whole(self, operation: str, value: ir.Value, number: int) -> ir.Node:
        """An operation on a whole number and a constant one."""
        node = ir.node(operation, [value, self.constant(str(number), number)])
        node.outputs[0].name = f"{value.name}/{operation}/{number}"
        return node

    def constant(self, name: str, number: float) -> ir.Value:
        if name not in self.graph.initializers:
            self.graph.register_initializer(ir.Value(name=name, const_value=ir.tensor(number, name=name)))
        return self.graph.initializers[name]

    def loop(
        self,
        name: str,
        pieces: Sequence[Piece],
        times: ir.Value,
        given: Mapping[str, ir.Value],
        state: Mapping[str, ir.Value],
        *,
        start: int = 0,
        once: bool = False,
    ) -> dict[str, ir.Value]:
        """Add a Loop of `times` turns through `pieces`, each of which maps a state to the next; the last state.

        Steps are numbered from `start`. Tensors that no step changes are captured from outside the Loop, as are the
        support set and the weights; in a Loop of one turn at most, `once`, all are, so that weights stay constants.
        """
        specs = pieces[0].outputs
        changed = [key for key in specs if any(key not in piece.unchanged for piece in pieces)]
        turn, go_on = _value(f"{name}/i", Spec((), torch.int64)), _value(f"{name}/go_on", Spec((), torch.bool))
        carried = {key: _value(f"{name}/{key}", specs[key]) for key in changed}
        now = dict(state) if once else {**state, **carried}
        nodes: list[ir.Node] = []
        for at, piece in enumerate(pieces, start):
            nodes.append(shifted := self.whole("Add", turn, at))
            taken, outputs = self._take(f"{name}/body/{at}", piece, {**given, **now, "i": shifted.outputs[0]})
            nodes += taken
            now |= {key: value for key, value in outputs.items() if key not in piece.unchanged}
        still = ir.node("Identity", [go_on])
        results = [still.outputs[0], *(now[key] for key in changed)]
        for value, spec in zip(results, [Spec((), torch.bool), *(specs[key] for key in changed)], strict=True):
            _describe(value, spec)
        still.outputs[0].name = f"{name}/still"
        body = ir.Graph([turn, go_on, *carried.values()], results, nodes=[*nodes, still], name=name)
        loop = ir.node(
            "Loop", [times, None, *(state[key] for key in changed)], {"body": body}, num_outputs=len(changed), name=name
        )
        self.graph.append(loop)
        for value, key in zip(loop.outputs, changed, strict=True):
            value.name = f"{name}/after/{key}"
        return {**state, **dict(zip(changed, loop.outputs, strict=True))}

    def finish(self, outputs: Mapping[str, ir.Value], specs: Mapping[str, Spec]) -> onnx.ModelProto:
        """The model with these outputs, valid to the checker; an error of onnx if it is not."""
        for name, value in outputs.items():
            node = ir.node("Identity", [value], name=name)
            self.graph.append(node)
            node.outputs[0].name = name
            _describe(node.outputs[0], specs[name])
            self.graph.outputs.append(node.outputs[0])
        model = ir.Model(self.graph, ir_version=10, producer_name="kshot")
        common = ir.passes.common
        common.DeduplicateInitializersPass(size_limit=_NO_SIZE)(model)
        common.IdentityEliminationPass()(model)
        for graph in model.graphs():  # the pass leaves subgraphs out
            common.CommonSubexpressionEliminationPass()(ir.Model(graph, ir_version=10))
        common.RemoveUnusedNodesPass()(model)
        proto = ir.to_proto(model)
        onnx.checker.check_model(proto, full_check=True)
        return proto

    def _take(
        self, prefix: str, piece: Piece, given: Mapping[str, ir.Value]
    ) -> tuple[list[ir.Node], dict[str, ir.Value]]:
        """A piece's nodes and outputs, fed with `given`; its weights come here, and names are made unique."""
        source = piece.graph.clone()
        outputs = dict(zip(piece.outputs, list(source.outputs), strict=True))
        nodes = list(source)
        source.outputs.clear()
        source.remove(nodes)
        for value in list(source.inputs):
            assert value.name is not None
            if value.name not in given:  # nothing uses it
                continue
            ir.convenience.replace_all_uses_with(value, given[value.name])
        for value in list(source.initializers.values()):
            assert value.name is not None
            source.initializers.pop(value.name)
            value.name = f"{prefix}/{value.name}"
            self.graph.register_initializer(value)
        for node in nodes:
            node.name = f"{prefix}/{node.name}"
            for value in node.outputs:
                value.name = f"{prefix}/{value.name}:0"  # a weight may be named like an operation, say `mean`
                value.shape = value.type = None  # in the exporter's names for sizes; onnxruntime infers its own
        return nodes, outputs


def _value(name: str, spec: Spec) -> ir.Value:
    value = ir.Value(name=name)
    _describe(value, spec)
    return value


def _describe(value: ir.Value, spec: Spec) -> None:
    value.type = ir.TensorType(_TYPES[spec.dtype])
    value.shape = ir.Shape(spec.shape)
