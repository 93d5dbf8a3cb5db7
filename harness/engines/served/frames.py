"""Messages between two processes over a socket: a JSON object and named arrays of numbers; never code.

Both sides use this file, so it imports nothing of this project. A frame is

    header length (4 bytes), payload length (8 bytes), little-endian; header, UTF-8 JSON; payload, the arrays' bytes

and the header `{"message": {...}, "arrays": [[name, dtype, shape], ...]}` says what the payload holds, in order.
"""

from __future__ import annotations

import json
import math
import socket
import struct
from typing import Any

import numpy as np

LENGTHS = struct.Struct("<IQ")
DTYPES = ("int64", "float32", "float64")
LONGEST_HEADER = 2**26
LONGEST_PAYLOAD = 2**34

Frame = tuple[dict[str, Any], dict[str, np.ndarray]]


def send(connection: socket.socket, message: dict[str, Any], **arrays: np.ndarray) -> None:
    """Send one frame. Raises ValueError for a number that JSON lacks, TypeError for an array of another dtype."""
    parts, described = [], []
    for name, array in arrays.items():
        if array.dtype.name not in DTYPES:
            raise TypeError(f"{name} is {array.dtype}: frames carry {', '.join(DTYPES)}")
        parts.append(np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
        described.append([name, array.dtype.name, list(array.shape)])
    header = json.dumps({"message": message, "arrays": described}, allow_nan=False).encode()
    payload = b"".join(parts)
    connection.sendall(LENGTHS.pack(len(header), len(payload)) + header + payload)


def receive(connection: socket.socket) -> Frame:
    """The next frame, as soon as it is there.

    Raises EOFError when the other side is gone, ValueError for what is no frame, TimeoutError as the socket does.
    """
    header_bytes, payload_bytes = LENGTHS.unpack(_exactly(connection, LENGTHS.size))
    if header_bytes > LONGEST_HEADER or payload_bytes > LONGEST_PAYLOAD:
        raise ValueError(f"not a frame: lengths of {header_bytes} and {payload_bytes} bytes")
    header = json.loads(_exactly(connection, header_bytes))
    payload = _exactly(connection, payload_bytes)
    arrays, place = {}, 0
    for name, dtype, shape in header["arrays"]:
        if dtype not in DTYPES or any(not isinstance(side, int) or side < 0 for side in shape):
            raise ValueError(f"not a frame: {name} is {dtype} {shape}")
        count = math.prod(shape)
        if place + count * np.dtype(dtype).itemsize > payload_bytes:
            raise ValueError(f"not a frame: {name} {shape} is longer than its bytes")
        array = np.frombuffer(payload, np.dtype(dtype).newbyteorder("<"), count, place)
        arrays[name] = array.astype(dtype).reshape(shape)  # a copy, which may be written to
        place += array.nbytes
    if place != payload_bytes:
        raise ValueError(f"not a frame: {payload_bytes - place} bytes more than its arrays")
    return header["message"], arrays


def _exactly(connection: socket.socket, count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        part = connection.recv(min(count - len(parts), 2**20))
        if not part:
            raise EOFError("the other side closed the connection")
        parts += part
    return bytes(parts)
