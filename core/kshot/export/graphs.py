"""Builds ONNX models from traced pieces: images are uint8 inputs, and the traced step runs in a Loop."""

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
_NO_SIZE_LIMIT = 1 << 40


def embed_model(embed: Piece) -> onnx.ModelProto:
    """The model that maps uint8 images to features."""
    model = _Model("embed")
    return model.finish(model.insert("embed", embed, model.inputs(embed, "images")), embed.outputs)


def views_model(image: tuple[int, int, int]) -> onnx.ModelProto:
    """The model that maps images to their views (N, 2, C, H, W): each image and its mirror image."""
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
    """The model that maps support, labels and classes (and `steps`, if there is a step) to the `wanted` state.

    A `first` step in closed form runs in a separate Loop of length 0 or 1: alone if `steps` is 1, else together with
    the second step, so that what both compute from the initial weights is computed once.
    """
    model = _Model("adapt")
    given = model.inputs(begin, "support")
    state = model.insert("begin", begin, given)
    specs = begin.outputs
    if step is not None:
        steps = model.input("steps", Spec((), torch.int64))
        start = 0
        if first is not None:
            is_one = model.add(model.integer_node("Equal", steps, 1))
            one_step = model.add(ir.node("Cast", [is_one], {"to": ir.DataType.INT64}))
            state = model.loop("first", [first], one_step, given, state, once=True)
            further = model.add(model.integer_node("Sub", steps, 1))  # a Loop of length -1 has no iteration
            two_steps = model.add(model.integer_node("Min", further, 1))
            state = model.loop("first_two", [first, step], two_steps, given, state, once=True)
            start, steps = 2, model.add(model.integer_node("Sub", steps, 2))
        state = model.loop("step", [step], steps, given, state, start=start)
    if finish is not None:
        state = model.insert("finish", finish, {**given, **state})
        specs = finish.outputs
    return model.finish({name: value for name, value in state.items() if name in wanted}, specs)


def classify_model(classify: Piece) -> onnx.ModelProto:
    """The model that maps query and state to logits, the query's features (if it takes images) and evidence scores."""
    model = _Model("classify")
    outputs = model.insert("classify", classify, model.inputs(classify, "query", classify.used()))
    return model.finish(outputs, classify.outputs)


class _Model:
    """An ONNX model under construction."""

    def __init__(self, name: str) -> None:
        self.graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name=name)

    def inputs(self, piece: Piece, images: str, wanted: Container[str] | None = None) -> dict[str, ir.Value]:
        """Add the piece's `wanted` inputs to the model; the input named `images` takes uint8 images or features."""
        is_image = len(piece.inputs[images].shape) > 2
        first = self.input(images, Spec(piece.inputs[images].shape, torch.uint8 if is_image else torch.float32))
        others = {
            name: self.input(name, spec)
            for name, spec in piece.inputs.items()
            if name != images and (wanted is None or name in wanted)
        }
        return {images: self.scaled(first) if is_image else first, **others}

    def input(self, name: str, spec: Spec) -> ir.Value:
        value = _value(name, spec)
        self.graph.inputs.append(value)
        return value

    def scaled(self, images: ir.Value) -> ir.Value:
        """uint8 images as float32 in 0..1, by the same division as in training."""
        floats = ir.node("Cast", [images], {"to": ir.DataType.FLOAT})
        scaled = ir.node("Div", [floats.outputs[0], self.constant("max", 255.0)])
        for name, node in (("as_floats", floats), ("in_0_to_1", scaled)):
            node.outputs[0].name = name
            self.add(node)
        return scaled.outputs[0]

    def insert(self, name: str, piece: Piece, given: Mapping[str, ir.Value]) -> dict[str, ir.Value]:
        """Add a piece with the inputs `given`, and return its outputs."""
        nodes, outputs = self._copy(name, piece, given)
        self.graph.extend(nodes)
        return outputs

    def add(self, node: ir.Node) -> ir.Value:
        self.graph.append(node)
        return node.outputs[0]

    def integer_node(self, operation: str, value: ir.Value, number: int) -> ir.Node:
        """A node with an integer value and an integer constant as inputs."""
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
        """Add a Loop of `times` iterations of `pieces`, each of which maps a state to the next; return the last state.

        Steps are numbered from `start`. Tensors that no step changes, the support set and the weights are captured
        from outside the Loop; in a Loop of at most one iteration (`once`) the whole state is, so that weights are
        constants.
        """
        specs = pieces[0].outputs
        changed = [key for key in specs if any(key not in piece.unchanged for piece in pieces)]
        turn, go_on = _value(f"{name}/i", Spec((), torch.int64)), _value(f"{name}/go_on", Spec((), torch.bool))
        carried = {key: _value(f"{name}/{key}", specs[key]) for key in changed}
        now = dict(state) if once else {**state, **carried}
        nodes: list[ir.Node] = []
        for at, piece in enumerate(pieces, start):
            nodes.append(shifted := self.integer_node("Add", turn, at))
            taken, outputs = self._copy(f"{name}/body/{at}", piece, {**given, **now, "i": shifted.outputs[0]})
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
        """The model with these outputs, simplified; raises onnx's error if it is not valid."""
        for name, value in outputs.items():
            node = ir.node("Identity", [value], name=name)
            self.graph.append(node)
            node.outputs[0].name = name
            _describe(node.outputs[0], specs[name])
            self.graph.outputs.append(node.outputs[0])
        model = ir.Model(self.graph, ir_version=10, producer_name="kshot")
        common = ir.passes.common
        common.DeduplicateInitializersPass(size_limit=_NO_SIZE_LIMIT)(model)
        common.IdentityEliminationPass()(model)
        for graph in model.graphs():  # the pass does not enter subgraphs
            common.CommonSubexpressionEliminationPass()(ir.Model(graph, ir_version=10))
        common.RemoveUnusedNodesPass()(model)
        proto = ir.to_proto(model)
        onnx.checker.check_model(proto, full_check=True)
        return proto

    def _copy(
        self, prefix: str, piece: Piece, given: Mapping[str, ir.Value]
    ) -> tuple[list[ir.Node], dict[str, ir.Value]]:
        """Nodes and outputs of a copy of a piece with the inputs `given`; its weights are added to this graph."""
        source = piece.graph.clone()
        outputs = dict(zip(piece.outputs, list(source.outputs), strict=True))
        nodes = list(source)
        source.outputs.clear()
        source.remove(nodes)
        for value in list(source.inputs):
            assert value.name is not None
            if value.name not in given:  # an unused input
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
                value.name = f"{prefix}/{value.name}:0"  # a weight may have an operation's name, such as `mean`
                value.shape = value.type = None  # they use the exporter's names for sizes; onnxruntime infers them
        return nodes, outputs


def _value(name: str, spec: Spec) -> ir.Value:
    value = ir.Value(name=name)
    _describe(value, spec)
    return value


def _describe(value: ir.Value, spec: Spec) -> None:
    value.type = ir.TensorType(_TYPES[spec.dtype])
    value.shape = ir.Shape(spec.shape)
