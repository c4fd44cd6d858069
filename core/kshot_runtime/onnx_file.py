"""ONNX files without the onnx package, which a serving host lacks: tensors elsewhere, inputs that become constants.

Reads and writes as much of protobuf as that takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

# Where tensors are found, by field number (onnx.proto, unchanged since 2017): field -> the kind of message it holds.
FIELDS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
_GRAPH, _INITIALIZER, _INPUT, _INPUT_NAME = 7, 5, 11, 1
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_RAW, _TENSOR_EXTERNAL, _TENSOR_LOCATION = 1, 2, 8, 9, 13, 14
_TYPES = {np.dtype(np.float32): 1, np.dtype(np.int64): 7}


def with_constants(model: bytes, values: Mapping[str, np.ndarray]) -> bytes:
    """An ONNX file whose inputs of these names have become constants."""
    parts, graph = [], b""
    for number, content, whole in _fields(memoryview(model)):
        if number == _GRAPH:
            assert not isinstance(content, int)
            graph = b"".join(whole for number, inner, whole in _fields(content) if not _is_input(number, inner, values))
        else:
            parts.append(whole)
    graph += b"".join(_field(_INITIALIZER, _tensor(name, value)) for name, value in values.items())
    return b"".join([*parts, _field(_GRAPH, graph)])


def _is_input(number: int, content: memoryview | int, names: Mapping[str, np.ndarray]) -> bool:
    if number != _INPUT or isinstance(content, int):
        return False
    return any(field == _INPUT_NAME and bytes(name).decode() in names for field, name, _ in _fields(content))


def _tensor(name: str, value: np.ndarray) -> bytes:
    dims = b"".join(_field(_TENSOR_DIMS, size) for size in value.shape)
    kind = _field(_TENSOR_TYPE, _TYPES[value.dtype])
    return dims + kind + _field(_TENSOR_NAME, name.encode()) + _field(_TENSOR_RAW, value.tobytes())


def _field(number: int, value: bytes | int) -> bytes:
    if isinstance(value, int):
        return _as_varint(number << 3) + _as_varint(value)
    return _as_varint(number << 3 | 2) + _as_varint(len(value)) + value


def _as_varint(value: int) -> bytes:
    written = bytearray()
    while value >= 0x80:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*written, value])


def external_tensors(message: memoryview, kind: str = "model") -> Iterator[str]:
    """The names of tensors whose data lie outside an ONNX file. A ValueError or IndexError if it is none."""
    if kind == "tensor":
        fields = {number: content for number, content, _ in _fields(message)}
        if _TENSOR_EXTERNAL in fields or fields.get(_TENSOR_LOCATION, 0) != 0:
            name = fields.get(_TENSOR_NAME, b"")
            yield bytes(name).decode(errors="replace") if not isinstance(name, int) else ""
        return
    inner = FIELDS[kind]
    for number, value, _ in _fields(message):
        if number in inner and not isinstance(value, int):
            yield from external_tensors(value, inner[number])


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview | int, memoryview]]:
    """The fields of a protobuf message: number, content or integer, and all of its bytes."""
    at = 0
    while at < len(message):
        start = at
        key, at = _varint(message, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(message, at)
            yield number, value, message[start:at]
            continue
        if wire == 2:
            size, at = _varint(message, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"unknown wire type {wire}")
        if at + size > len(message):
            raise ValueError("it is cut short")
        yield number, message[at : at + size], message[start : at + size]
        at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number of more than ten bytes")
