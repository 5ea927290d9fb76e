"""Reads a GGUF file's metadata and finds its tensors; needs the standard library only.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (version 3, little-endian). Anything that does not
read as such is a ValueError.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies. ``shape`` is row-major (numpy's order), ``offset`` counts bytes from the file's start."""

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    offset: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    path: Path
    metadata: dict[str, Any]  # values are what the file's own type tags say
    tensors: tuple[TensorInfo, ...]


def read_gguf(path: Path) -> GgufFile:
    """Header, metadata and tensor table; no tensor data is read."""
    try:
        with path.open("rb") as file:
            magic, version, num_tensors, num_keys = struct.unpack("<4sIQQ", file.read(24))
            if magic != b"GGUF" or version != 3:
                raise ValueError(f"{path} is no GGUF version 3 file")
            metadata = {}
            for _ in range(num_keys):
                key = _string(file)
                metadata[key] = _value(file, *struct.unpack("<I", file.read(4)))
            table = [_tensor(file) for _ in range(num_tensors)]
            alignment = metadata.get("general.alignment", 32)
            data = -(-file.tell() // alignment) * alignment
    except (struct.error, KeyError, UnicodeDecodeError) as e:
        raise ValueError(f"{path} is damaged: {e}") from e
    return GgufFile(path, metadata, tuple(TensorInfo(n, s, t, data + offset) for n, s, t, offset in table))


def _string(file: BinaryIO) -> str:
    (length,) = struct.unpack("<Q", file.read(8))
    return file.read(length).decode()


def _value(file: BinaryIO, tag: int) -> Any:
    if tag == _STRING:
        return _string(file)
    if tag == _ARRAY:
        element, count = struct.unpack("<IQ", file.read(12))
        if element == _STRING:
            return [_string(file) for _ in range(count)]
        layout = f"<{count}{_SCALARS[element]}"
        return list(struct.unpack(layout, file.read(struct.calcsize(layout))))
    layout = "<" + _SCALARS[tag]
    return struct.unpack(layout, file.read(struct.calcsize(layout)))[0]


def _tensor(file: BinaryIO) -> tuple[str, tuple[int, ...], int, int]:
    name = _string(file)
    (dims,) = struct.unpack("<I", file.read(4))
    shape = struct.unpack(f"<{dims}Q", file.read(8 * dims))
    ggml_type, offset = struct.unpack("<IQ", file.read(12))
    return name, tuple(reversed(shape)), ggml_type, offset
