"""The bit stream: against Python's integers, and back."""

from __future__ import annotations

import pytest
import torch

from methods.quantization.packing import pack, unpack, words


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("columns", [1, 31, 32, 45, 64])
def test_stream_is_one_long_little_endian_integer(bits, columns):
    codes = torch.randint(0, 2**bits, (3, columns), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (3, words(columns, bits))
    for row, stored in zip(codes.tolist(), packed.tolist(), strict=True):
        number = sum(code << (bits * k) for k, code in enumerate(row))
        assert [word & 0xFFFFFFFF for word in stored] == [(number >> (32 * k)) & 0xFFFFFFFF for k in range(len(stored))]
    assert torch.equal(unpack(packed, bits, columns), codes)


@pytest.mark.parametrize("bits", range(2, 9))
def test_32_codes_fill_exactly_bits_words(bits):
    assert words(32, bits) == bits
    assert words(33, bits) == bits + 1
