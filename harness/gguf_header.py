"""Whether the header of a GGUF file can be true, looked at before a library believes it.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. A count in a torn or hostile file may say 2⁶³: a
reader that believes it never ends. Here every count is held against the bytes that are there, and tensors against the
end of the file. Flipped bits of weights are for the file's hash to tell.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

from harness.errors import RunError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
STRING, ARRAY, UNSIGNED_32, UNSIGNED_64 = 8, 9, 4, 10
BYTES_OF = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # of a value, by its type
DEEPEST_ARRAY = 4
MOST_DIMENSIONS = 8
SMALLEST_ENTRY, SMALLEST_TENSOR = 13, 24  # bytes of a key with its value, of a description of a tensor


def check_gguf(path: Path) -> None:
    """Raise RunError, saying where, unless all that the header counts is in the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        try:
            _Header(file, size).walk()
        except (ValueError, struct.error) as error:
            raise RunError(
                f"{path} could not be read as a GGUF model: {error} (at byte {file.tell()} of {size}); it may be torn: "
                "fetch it again"
            ) from error


class _Header:
    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size
        self.alignment, self.blocks = 32, 0

    def walk(self) -> None:
        if self.file.read(4) != MAGIC:
            raise ValueError("it does not begin with GGUF")
        version = self.number("<I")
        if version not in VERSIONS:
            raise ValueError(f"version {version}; versions {VERSIONS[0]} and {VERSIONS[1]} can be read")
        tensors = self.count(SMALLEST_TENSOR)
        for _ in range(self.count(SMALLEST_ENTRY)):
            self.entry()
        if self.blocks > tensors:
            raise ValueError(f"{self.blocks} blocks of {tensors} tensors")
        ends = [self.tensor() for _ in range(tensors)]
        start = -(-self.file.tell() // self.alignment) * self.alignment
        if ends and start + max(ends) > self.size:
            raise ValueError(f"its tensors end at byte {start + max(ends)}")

    def entry(self) -> None:
        """A key and its value; of the values only two are read."""
        key, kind = self.text(), self.number("<I")
        if kind in (UNSIGNED_32, UNSIGNED_64) and (key == b"general.alignment" or key.endswith(b".block_count")):
            value = self.number("<I" if kind == UNSIGNED_32 else "<Q")
            if key != b"general.alignment":
                self.blocks = max(self.blocks, value)
            elif value == 0 or value & (value - 1):
                raise ValueError(f"alignment {value} is no power of two")
            else:
                self.alignment = value
        else:
            self.value(kind, DEEPEST_ARRAY)

    def value(self, kind: int, depth: int) -> None:
        if kind in BYTES_OF:
            self.skip(BYTES_OF[kind])
        elif kind == STRING:
            self.text()
        elif kind == ARRAY and depth:
            inner = self.number("<I")
            length = self.count(BYTES_OF.get(inner, 8))
            if inner in BYTES_OF:
                self.skip(length * BYTES_OF[inner])
            else:
                for _ in range(length):
                    self.value(inner, depth - 1)
        else:
            raise ValueError(f"unknown type of value {kind}")

    def tensor(self) -> int:
        """Where the data of a tensor end, counted from where all data begin."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        name, dimensions = self.text(), self.number("<I")
        if dimensions > MOST_DIMENSIONS:
            raise ValueError(f"tensor {name[:64]!r} of {dimensions} dimensions")
        elements = 1
        for _ in range(dimensions):
            elements *= self.number("<Q")
        kind, offset = self.number("<I"), self.number("<Q")
        if kind not in GGMLQuantizationType._value2member_map_:
            raise ValueError(f"tensor {name[:64]!r} of unknown type {kind}")
        per_block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        return offset + -(-elements // per_block) * block_bytes

    def text(self) -> bytes:
        return self.read(self.count(1))

    def count(self, smallest: int) -> int:
        """A number of things of at least `smallest` bytes each, which must be in the rest of the file."""
        found, rest = self.number("<Q"), self.size - self.file.tell()
        if found * smallest > rest:
            raise ValueError(f"{found} entries announced, {rest} bytes left")
        return found

    def number(self, layout: str) -> int:
        return struct.unpack(layout, self.read(struct.calcsize(layout)))[0]

    def read(self, length: int) -> bytes:
        found = self.file.read(length)
        if len(found) != length:
            raise ValueError("the file ends")
        return found

    def skip(self, length: int) -> None:
        if self.file.tell() + length > self.size:
            raise ValueError("the file ends")
        self.file.seek(length, 1)
