"""Workspaces of matrix products, by hand: too little is an error of the kernel, too much is memory."""

import pytest
import torch

from dsv4_ops.ops.gemm_workspace import room_for_fp4, room_for_fp8, room_for_sums, room_for_w8a16

FP8 = torch.float8_e4m3fn


def meta(*shape: int, dtype: torch.dtype = FP8) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    ("tokens", "rows", "floats"),
    [(1, 4096, 0), (8, 4096, 0), (17, 4096, 8 * 17 * 4096), (300, 4096, 8 * 64 * 4096), (64, 32768, 0)],
)
def test_sums_of_ranges(tokens, rows, floats):
    """Of few tokens one launch adds them; more than 64 are several launches; wide weights have one range."""
    room = room_for_sums(meta(tokens, 128), meta(rows, 128), 1)
    assert room.shape == (floats,) and room.dtype == torch.float32
    assert room_for_sums(meta(tokens, 2, 128), meta(rows, 128), 2).shape == (floats,)


def test_fp8_scales_of_many_tokens():
    """One fp32 number for 128 columns of a row of x, and for a block of the weight; wide, so that no sums are there."""
    assert room_for_fp8(meta(64, 1024), meta(32768, 1024), 1).numel() == 0
    assert room_for_fp8(meta(2, 50, 1024), meta(32768, 1024), 1).numel() == (100 + 256) * 8
    assert room_for_fp8(meta(100, 4, 1024), meta(32768, 1024), 2).numel() == (400 + 256) * 8


def test_fp4_products_of_many_tokens_spread_x_in_bf16():
    """Rows in multiples of 16, two bytes a value."""
    weight = meta(32768, 512, dtype=torch.uint8)
    assert room_for_fp4(meta(64, 1024), weight).numel() == 0
    assert room_for_fp4(meta(65, 1024), weight).nbytes == 80 * 1024 * 2
    assert room_for_fp4(meta(65, 512, dtype=torch.uint8), weight).nbytes == 80 * 1024 * 2


def test_w8a16_products_of_many_tokens_convert_the_weight_to_bf16():
    weight = meta(8 * 1024, 4096)
    assert room_for_w8a16(meta(8, 8, 4096), weight, 2).numel() == 0
    assert room_for_w8a16(meta(64, 8, 4096), weight, 2).numel() == 8 * 64 * 8192
    assert room_for_w8a16(meta(192, 8, 4096), weight, 2).numel() == 8 * 64 * 8192
    assert room_for_w8a16(meta(193, 8, 4096), weight, 2).nbytes == 8192 * 4096 * 2
    assert room_for_w8a16(meta(193, 512), meta(32768, 512), 1).nbytes == 32768 * 512 * 2
