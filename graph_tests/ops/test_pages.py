"""Paged pools, byte by byte, against Python loops written from the page layout."""

import math
import struct
from fractions import Fraction

import pytest
import torch

from dsv4_ops.ops import pages
from graph_tests.checks import assert_bits_equal
from graph_tests.ops import scalar

POISON = 0xA5
HEAD_DIM, ROPE_DIM, NOPE = 512, 64, 448
DATA, SCALES = 576, 8  # bytes of one KV entry: 448 + 2 * 64, and 7 scales and a zero
TABLE = torch.tensor([[3, 0, 5], [4, 1, 2]], dtype=torch.int32)
ENTRIES = torch.tensor([[0, 2, 3, 8], [7, -1, 1, 4]], dtype=torch.int32)
PAGE_SIZE = 3


def kv_rows(dtype: torch.dtype, dim: int = HEAD_DIM) -> torch.Tensor:
    """[2, 4, dim]: normal rows, one with groups whose amax is max * 2^k or one bf16 step above, one of zeros."""
    kv = torch.randn(2, 4, dim, generator=torch.Generator().manual_seed(0))
    kv[0, 1] *= torch.logspace(-8, 8, dim)
    for group, amax in enumerate((448.0, 450.0, 6.0 * 2**-3, 7.0 * 2**-4, 224.0, 1e-4, 1e-6)[: dim // 32]):
        kv[1, 0, 32 * group : 32 * group + 32].clamp_(-amax, amax)[5] = -amax
    kv[1, 2] = 0
    return kv.to(dtype)


def poisoned(page_bytes: int, count: int = 6) -> torch.Tensor:
    return torch.full((count, page_bytes), POISON, dtype=torch.uint8)


def places(entries: torch.Tensor):
    """(sequence, row, page, offset) of every entry that is written."""
    for sequence, row in enumerate(entries.tolist()):
        for index, entry in enumerate(row):
            if entry >= 0:
                yield sequence, index, int(TABLE[sequence, entry // PAGE_SIZE]), entry % PAGE_SIZE


def bf16_bytes(values: list[float]) -> bytes:
    return b"".join(struct.pack("<f", scalar.bf16(value))[2:] for value in values)


def test_kv_page_sizes_are_those_of_flashmla():
    assert pages.kv_entry_bytes(512, 64) == (576, 8)
    assert pages.kv_page_bytes(64, 512, 64) == 37440  # 64 * 584 = 37376, up to a multiple of 576
    assert pages.kv_page_bytes(256, 512, 64) == 149760
    assert pages.kv_page_bytes(2, 512, 64) == 1728


def test_index_page_sizes():
    assert pages.index_page_bytes(64, 128, fp8=True) == 64 * 132
    assert pages.index_page_bytes(64, 128, fp8=False) == 64 * 68


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_write_kv_lays_out_every_byte_of_the_page(dtype):
    kv = kv_rows(dtype)
    pool = poisoned(pages.kv_page_bytes(PAGE_SIZE, HEAD_DIM, ROPE_DIM))
    expected = [bytearray(page) for page in pool.tolist()]
    for sequence, index, page, offset in places(ENTRIES):
        row = kv[sequence, index].tolist()
        codes, scales = scalar.quant_fp8(row[:NOPE], 64)
        expected[page][offset * DATA : (offset + 1) * DATA] = bytes(codes) + bf16_bytes(row[NOPE:])
        start = PAGE_SIZE * DATA + offset * SCALES
        expected[page][start : start + SCALES] = bytes([*scales, 0])
    pages.write_kv(pool, TABLE, ENTRIES, PAGE_SIZE, kv, ROPE_DIM)
    assert_bits_equal(pool, torch.tensor([list(page) for page in expected], dtype=torch.uint8))


def test_read_kv_decodes_every_byte_of_the_page():
    generator = torch.Generator().manual_seed(1)
    pool = torch.randint(0, 256, (6, PAGE_SIZE * (DATA + SCALES) + 40), generator=generator).to(torch.uint8)
    pool[(pool & 0x7F) == 0x7F] = 3  # no NaN codes; also keeps bf16 and the scales finite
    pool[:, PAGE_SIZE * DATA :] = pool[:, PAGE_SIZE * DATA :].clamp(60, 190)
    entries = ENTRIES.clamp_min(0)
    expected = torch.empty(2, 4, HEAD_DIM)
    for sequence, index, page, offset in places(entries):
        page = bytes(pool[page].tolist())
        data, scales = page[offset * DATA :][:DATA], page[PAGE_SIZE * DATA + offset * SCALES :][:SCALES]
        nope = [float(Fraction(scalar.e4m3_value(data[i])) * scalar.ue8m0_value(scales[i // 64])) for i in range(NOPE)]
        nope = [math.copysign(value, -1.0 if data[i] & 0x80 else 1.0) for i, value in enumerate(nope)]
        rope = [struct.unpack("<f", b"\0\0" + data[i : i + 2])[0] for i in range(NOPE, DATA, 2)]
        expected[sequence, index] = torch.tensor(nope + rope)
    assert_bits_equal(pages.read_kv(pool, TABLE, entries, PAGE_SIZE, HEAD_DIM, ROPE_DIM), expected)


def test_kv_pages_of_another_head_size():
    """96 = 64 + 32: one group of 64, its scale in the first of 8 bytes."""
    kv = kv_rows(torch.bfloat16, 96)
    pool = poisoned(PAGE_SIZE * (128 + 8))
    pages.write_kv(pool, TABLE, ENTRIES, PAGE_SIZE, kv, 32)
    for sequence, index, page, offset in places(ENTRIES):
        row = kv[sequence, index].tolist()
        codes, scales = scalar.quant_fp8(row[:64], 64)
        page = bytes(pool[page].tolist())
        assert page[offset * 128 :][:128] == bytes(codes) + bf16_bytes(row[64:])
        assert page[PAGE_SIZE * 128 + offset * 8 :][:8] == bytes([*scales, 0, 0, 0, 0, 0, 0, 0])


def test_plain_kv_pool_keeps_fp32():
    kv = kv_rows(torch.float32)
    pool = torch.full((6, PAGE_SIZE * HEAD_DIM + 7), torch.nan)
    expected = pool.clone()
    for sequence, index, page, offset in places(ENTRIES):
        expected[page, offset * HEAD_DIM : (offset + 1) * HEAD_DIM] = kv[sequence, index]
    pages.write_kv(pool, TABLE, ENTRIES, PAGE_SIZE, kv, ROPE_DIM)
    assert_bits_equal(pool, expected)
    read = pages.read_kv(pool, TABLE, ENTRIES[:, :1], PAGE_SIZE, HEAD_DIM, ROPE_DIM)
    assert_bits_equal(read, kv[:, :1])


def test_write_index_keys_fp8_lays_out_every_byte_of_the_page():
    keys = kv_rows(torch.bfloat16, 128)
    pool = poisoned(PAGE_SIZE * 132 + 5)
    expected = [bytearray(page) for page in pool.tolist()]
    for sequence, index, page, offset in places(ENTRIES):
        codes, (scale,) = scalar.quant_fp8_fp32_scale(keys[sequence, index].tolist(), 128)
        expected[page][offset * 128 : (offset + 1) * 128] = bytes(codes)
        start = PAGE_SIZE * 128 + offset * 4
        expected[page][start : start + 4] = struct.pack("<f", scale)
    pages.write_index_keys_fp8(pool, TABLE, ENTRIES, PAGE_SIZE, keys)
    assert_bits_equal(pool, torch.tensor([list(page) for page in expected], dtype=torch.uint8))


def test_write_index_keys_fp4_lays_out_every_byte_of_the_page():
    keys = kv_rows(torch.bfloat16, 128)
    pool = poisoned(PAGE_SIZE * 68 + 5)
    expected = [bytearray(page) for page in pool.tolist()]
    for sequence, index, page, offset in places(ENTRIES):
        codes, scales = scalar.quant_mxfp4(keys[sequence, index].tolist())
        expected[page][offset * 64 : (offset + 1) * 64] = bytes(codes)
        start = PAGE_SIZE * 64 + offset * 4
        expected[page][start : start + 4] = bytes(scales)
    pages.write_index_keys_fp4(pool, TABLE, ENTRIES, PAGE_SIZE, keys)
    assert_bits_equal(pool, torch.tensor([list(page) for page in expected], dtype=torch.uint8))


def test_read_index_keys_fp8_multiplies_codes_with_the_scale_of_the_key():
    pool = poisoned(PAGE_SIZE * 132)
    scale, codes = scalar.f32(0.0123), [byte % 127 + 128 * (byte % 2) for byte in range(128)]
    pool[4, 128:256] = torch.tensor(codes, dtype=torch.uint8)
    pool[4, PAGE_SIZE * 128 + 4 : PAGE_SIZE * 128 + 8] = torch.tensor(list(struct.pack("<f", scale)))
    read = pages.read_index_keys_fp8(pool, TABLE, torch.tensor([[1], [1]]), PAGE_SIZE, 128)
    expected = torch.tensor([scalar.f32(scalar.e4m3_value(code) * scale) for code in codes])
    assert_bits_equal(read[1, 0], expected)


def test_read_index_keys_fp4_takes_the_low_nibble_first():
    pool = poisoned(PAGE_SIZE * 68)
    pool[4, 64:128] = torch.arange(64, dtype=torch.uint8) * 4
    scales = [127, 100, 140, 1]
    pool[4, PAGE_SIZE * 64 + 4 : PAGE_SIZE * 64 + 8] = torch.tensor(scales)
    read = pages.read_index_keys_fp4(pool, TABLE, torch.tensor([[1], [1]]), PAGE_SIZE, 128)
    codes = [nibble for byte in range(64) for nibble in (byte * 4 % 16, byte * 4 // 16)]
    expected = [scalar.e2m1_value(code) * 2.0 ** (scales[i // 32] - 127) for i, code in enumerate(codes)]
    assert_bits_equal(read[1, 0], torch.tensor(expected))


def test_a_pool_may_be_a_column_range_of_a_wider_buffer():
    kv = kv_rows(torch.bfloat16)
    size = pages.kv_page_bytes(PAGE_SIZE, HEAD_DIM, ROPE_DIM)
    wide, alone = poisoned(size + 576), poisoned(size)
    pages.write_kv(wide[:, :size], TABLE, ENTRIES, PAGE_SIZE, kv, ROPE_DIM)
    pages.write_kv(alone, TABLE, ENTRIES, PAGE_SIZE, kv, ROPE_DIM)
    assert_bits_equal(wide[:, :size].contiguous(), alone)
    assert (wide[:, size:] == POISON).all()


def test_entries_beyond_2_to_the_31_bytes():
    """The pool is virtual memory: only the pages that are written become real."""
    page_bytes = pages.kv_page_bytes(64, HEAD_DIM, ROPE_DIM)
    pool = torch.empty((1 << 31) // page_bytes + 2, page_bytes, dtype=torch.uint8)
    table = torch.tensor([[pool.shape[0] - 1]], dtype=torch.int32)
    kv = kv_rows(torch.bfloat16)[:1, :1]
    entries = torch.tensor([[63]], dtype=torch.int32)
    pages.write_kv(pool, table, entries, 64, kv, ROPE_DIM)
    codes, _ = scalar.quant_fp8(kv[0, 0, :NOPE].tolist(), 64)
    assert pool[-1, 63 * DATA : 63 * DATA + NOPE].tolist() == codes


def test_an_entry_outside_the_block_table_is_an_error():
    pool = poisoned(pages.kv_page_bytes(PAGE_SIZE, HEAD_DIM, ROPE_DIM))
    entries = torch.tensor([[9], [0]], dtype=torch.int32)
    with pytest.raises((IndexError, RuntimeError), match="out of (bounds|range)"):
        pages.read_kv(pool, TABLE, entries, PAGE_SIZE, HEAD_DIM, ROPE_DIM)
