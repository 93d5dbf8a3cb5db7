"""Codes of 2 to 8 bits as a dense little-endian bit stream: code k occupies bits [bits*k, bits*k + bits).

32 codes fill exactly `bits` words of 32 bits; this is the layout of GPTQ's 3-bit format and of compressed-tensors'
`pack-quantized`. Eight codes fill `bits` bytes, so the work is done on bytes and nothing straddles.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

CODES_PER_RUN = 32  # rows are padded to whole runs of 32 codes while packing


def words(count: int, bits: int) -> int:
    """32-bit words that hold `count` codes."""
    return -(-count * bits // 32)


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [R, C] -> int32 [R, words(C, bits)], each row a stream of its own."""
    rows, columns = codes.shape
    padded = functional.pad(codes, (0, -columns % CODES_PER_RUN))
    eights = padded.view(rows, -1, 8).to(torch.int64)
    if bits == 8:
        stream = padded
    else:
        joined = (eights << _steps(8, bits, codes.device)).sum(-1, keepdim=True)
        stream = ((joined >> _steps(bits, 8, codes.device)) & 0xFF).to(torch.uint8).view(rows, -1)
    return stream.flatten().view(torch.int32).view(rows, -1)[:, : words(columns, bits)].contiguous()


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack`: int32 [R, words] -> uint8 codes [R, columns]."""
    rows = packed.shape[0]
    stream = functional.pad(packed, (0, -packed.shape[1] % bits)).flatten().view(torch.uint8).view(rows, -1)
    if 8 % bits == 0:
        mask = 2**bits - 1
        codes = (stream[..., None] >> _steps(8 // bits, bits, packed.device).to(torch.uint8)) & mask
    else:
        runs = stream.view(rows, -1, bits).to(torch.int64)
        joined = (runs << _steps(bits, 8, packed.device)).sum(-1, keepdim=True)
        codes = ((joined >> _steps(8, bits, packed.device)) & (2**bits - 1)).to(torch.uint8)
    return codes.view(rows, -1)[:, :columns].contiguous()


def _steps(count: int, step: int, device: torch.device) -> Tensor:
    return torch.arange(0, count * step, step, device=device)
