"""NVFP4: x ~ E2M1 code * E4M3 block scale (one for 16 elements) * fp32 global scale (one for a tensor, or one a row).

The codes are found with the E4M3-rounded block scale, which the consumer multiplies with. Block scales come in two
layouts: linear [rows, K/16], and 128x4, the order in which a tensor core reads them: tiles of 128 rows x 4 scales,
row-major in tiles, and scale (r, c) of a tile at byte (r % 32) * 16 + (r // 32) * 4 + c; padding is zero.
"""

import torch
from torch import Tensor

from dsv4_ops.ops.formats import (
    E2M1_MAX,
    E4M3_MAX,
    FP8,
    cast_e4m3,
    decode_e2m1,
    encode_e2m1,
    pack_e2m1,
    unpack_e2m1,
)
from dsv4_ops.ops.quant import alloc_fp4, alloc_unpacked, expect_groups, row_amax
from dsv4_ops.registry import Inline, define, describe, expect

NVFP4_GROUP = 16
NVFP4_SCALE_FLOOR = 2.0**-126  # keeps the global scale of an all-zero tensor a normal number
AMAX_PARTS = 1024  # kMostPartials of csrc/nvfp4/nvfp4.h: parts of a tensor that look for its amax


def nvfp4_scale_of(amax: Tensor) -> Tensor:
    """Global scale that maps amax to the largest code times the largest block scale."""
    return (amax / (E2M1_MAX * E4M3_MAX)).clamp_min(NVFP4_SCALE_FLOOR)


def nvfp4_global_scale_reference(x: Tensor) -> Tensor:
    """max(amax / 2688, 2^-126) of the whole tensor. The appended zero gives an empty tensor an amax."""
    return nvfp4_scale_of(torch.nn.functional.pad(x.float().abs().flatten(), (0, 1)).amax(0, keepdim=True))


def nvfp4_row_scale_reference(x: Tensor) -> Tensor:
    """max(amax / 2688, 2^-126) of each row: a row's bits do not depend on the rest of the batch."""
    return nvfp4_scale_of(row_amax(x)[..., None]).contiguous()


def quant_nvfp4_reference(x: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor]:
    """scale = e4m3(amax / (6 * global)) for each block of 16, codes = e2m1(x / (scale * global)); scale 0: codes 0."""
    blocks = x.float().contiguous().unflatten(-1, (-1, NVFP4_GROUP))
    scale = cast_e4m3(row_amax(blocks) / (E2M1_MAX * global_scale))
    step = (scale.float() * global_scale)[..., None]
    codes = torch.where(scale.float()[..., None] == 0, 0, encode_e2m1(blocks / step))
    return pack_e2m1(codes.flatten(-2)), scale


def dequant_nvfp4_reference(q: Tensor, scale: Tensor, global_scale: Tensor) -> Tensor:
    """Code times block scale (exact in fp32), then times the global scale: one rounding."""
    blocks = decode_e2m1(unpack_e2m1(q)).unflatten(-1, (-1, NVFP4_GROUP))
    return (blocks * scale.float()[..., None]).flatten(-2) * global_scale


def size_128x4(rows: int, columns: int) -> int:
    """Bytes of the block scales [rows, columns] in the 128x4 layout."""
    return -(-rows // 128) * -(-columns // 4) * 512


def offsets_128x4(rows: int, columns: int, device: torch.device) -> Tensor:
    """Byte offset [rows, columns] of every block scale in the 128x4 layout."""
    row, column = torch.arange(rows, device=device)[:, None], torch.arange(columns, device=device)
    tile = row // 128 * -(-columns // 4) + column // 4
    return tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + column % 4


def nvfp4_scale_to_128x4_reference(scale: Tensor) -> Tensor:
    """Block scales [rows, columns] in the 128x4 layout, flat; padding is zero."""
    layout = scale.new_zeros((size_128x4(*scale.shape),), dtype=torch.uint8)
    offsets = offsets_128x4(*scale.shape, scale.device)
    return layout.scatter(0, offsets.flatten(), scale.view(torch.uint8).flatten()).view(FP8)


def nvfp4_scale_from_128x4_reference(scale: Tensor, rows: int, columns: int) -> Tensor:
    """Block scales [rows, columns] out of the 128x4 layout."""
    layout = scale.view(torch.uint8).view(size_128x4(rows, columns))
    return layout[offsets_128x4(rows, columns, scale.device)].view(FP8)


def quant_nvfp4_128x4_reference(x: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor]:
    """quant_nvfp4, block scales in the 128x4 layout."""
    q, scale = quant_nvfp4_reference(x, global_scale)
    return q, nvfp4_scale_to_128x4_reference(scale)


def dequant_nvfp4_128x4_reference(q: Tensor, scale: Tensor, global_scale: Tensor) -> Tensor:
    """dequant_nvfp4 with block scales in the 128x4 layout."""
    rows, columns = q.shape[0], 2 * q.shape[1] // NVFP4_GROUP
    return dequant_nvfp4_reference(q, nvfp4_scale_from_128x4_reference(scale, rows, columns), global_scale)


def expect_global_scale(op: str, rows: Tensor, global_scale: Tensor) -> None:
    """Raise unless global_scale is [1] or, one for each row, [T, 1] fp32."""
    fits = global_scale.dtype == torch.float32 and global_scale.dim() in (1, rows.dim()) and global_scale.shape[-1] == 1
    expect(fits, op, f"global_scale must be [1] or [T, 1] float32 for {describe(rows)}, got {describe(global_scale)}")


def expect_nvfp4(op: str, x: Tensor, global_scale: Tensor) -> None:
    """Raise unless x [T, K] has whole blocks and global_scale fits."""
    expect_groups(op, x, NVFP4_GROUP)
    expect_global_scale(op, x, global_scale)


def check_quant_nvfp4_128x4(x: Tensor, global_scale: Tensor) -> None:
    expect_nvfp4("quant_nvfp4_128x4", x, global_scale)
    expect(x.dim() == 2, "quant_nvfp4_128x4", f"x must be [T, K], got {describe(x)}; flatten the leading dimensions")


def check_dequant_nvfp4(q: Tensor, scale: Tensor, global_scale: Tensor) -> None:
    fits = q.dtype == torch.uint8 and scale.dtype == FP8 and q.shape[-1] * 2 == scale.shape[-1] * NVFP4_GROUP
    wanted = "q [T, K/2] uint8 and scale [T, K/16] float8_e4m3fn"
    expect(fits, "dequant_nvfp4", f"expected {wanted}, got {describe(q)} and {describe(scale)}")
    expect_global_scale("dequant_nvfp4", q, global_scale)


def check_dequant_nvfp4_128x4(q: Tensor, scale: Tensor, global_scale: Tensor) -> None:
    op = "dequant_nvfp4_128x4"
    fits = q.dim() == 2 and q.dtype == torch.uint8 and q.shape[-1] * 2 % NVFP4_GROUP == 0
    expect(fits, op, f"q must be [T, K/2] uint8 with K a multiple of {NVFP4_GROUP}, got {describe(q)}")
    expect_flat(op, scale)
    expect_global_scale(op, q, global_scale)


def expect_flat(op: str, scale: Tensor) -> None:
    """Raise unless scale is flat E4M3. Its size depends on the batch, so the reference finds out whether it fits."""
    fits = scale.dim() == 1 and scale.dtype == FP8
    expect(fits, op, f"scale must be flat float8_e4m3fn in the 128x4 layout, got {describe(scale)}")


def check_scale_to_128x4(scale: Tensor) -> None:
    fits = scale.dim() == 2 and scale.dtype == FP8
    expect(fits, "nvfp4_scale_to_128x4", f"scale must be [rows, columns] float8_e4m3fn, got {describe(scale)}")


def alloc_quant_nvfp4_128x4(x: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor]:
    q, scale = alloc_fp4(x, NVFP4_GROUP, FP8)
    return q, scale.new_empty((size_128x4(*scale.shape),))


# x [T, K] bf16 | f32 -> scale [1] f32
nvfp4_global_scale = define(
    "nvfp4_global_scale(Tensor x) -> (Tensor scale)",
    alloc=lambda x: x.new_empty((1,), dtype=torch.float32),
    reference=nvfp4_global_scale_reference,
    check=lambda x: expect_groups("nvfp4_global_scale", x, 1),
    inline=Inline.ALWAYS,
    workspace=lambda x: x.new_empty((AMAX_PARTS,), dtype=torch.int32),
)

# x [T, K] bf16 | f32 -> scale [T, 1] f32
nvfp4_row_scale = define(
    "nvfp4_row_scale(Tensor x) -> (Tensor scale)",
    alloc=lambda x: x.new_empty((*x.shape[:-1], 1), dtype=torch.float32),
    reference=nvfp4_row_scale_reference,
    check=lambda x: expect_groups("nvfp4_row_scale", x, 1),
    inline=Inline.ALWAYS,
)

# x [T, K] bf16 | f32, global_scale [1] | [T, 1] f32 -> q [T, K/2] uint8, scale [T, K/16] E4M3
quant_nvfp4 = define(
    "quant_nvfp4(Tensor x, Tensor global_scale) -> (Tensor q, Tensor scale)",
    alloc=lambda x, global_scale: alloc_fp4(x, NVFP4_GROUP, FP8),
    reference=quant_nvfp4_reference,
    check=lambda x, global_scale: expect_nvfp4("quant_nvfp4", x, global_scale),
    inline=Inline.ALWAYS,
)

# x [T, K] bf16 | f32, global_scale [1] | [T, 1] f32 -> q [T, K/2] uint8, scale [ceil(T/128) * ceil(K/64) * 512] E4M3
quant_nvfp4_128x4 = define(
    "quant_nvfp4_128x4(Tensor x, Tensor global_scale) -> (Tensor q, Tensor scale)",
    alloc=alloc_quant_nvfp4_128x4,
    reference=quant_nvfp4_128x4_reference,
    check=check_quant_nvfp4_128x4,
    inline=Inline.ALWAYS,
)

# q [T, K/2] uint8, scale [T, K/16] E4M3, global_scale [1] | [T, 1] f32 -> x [T, K] f32
dequant_nvfp4 = define(
    "dequant_nvfp4(Tensor q, Tensor scale, Tensor global_scale) -> (Tensor x)",
    alloc=lambda q, scale, global_scale: alloc_unpacked(q),
    reference=dequant_nvfp4_reference,
    check=check_dequant_nvfp4,
    inline=Inline.ALWAYS,
)

# q [T, K/2] uint8, scale [ceil(T/128) * ceil(K/64) * 512] E4M3, global_scale [1] | [T, 1] f32 -> x [T, K] f32
dequant_nvfp4_128x4 = define(
    "dequant_nvfp4_128x4(Tensor q, Tensor scale, Tensor global_scale) -> (Tensor x)",
    alloc=lambda q, scale, global_scale: alloc_unpacked(q),
    reference=dequant_nvfp4_128x4_reference,
    check=check_dequant_nvfp4_128x4,
    inline=Inline.ALWAYS,
)

# scale [rows, columns] E4M3 -> layout [ceil(rows/128) * ceil(columns/4) * 512] E4M3
nvfp4_scale_to_128x4 = define(
    "nvfp4_scale_to_128x4(Tensor scale) -> (Tensor layout)",
    alloc=lambda scale: scale.new_empty((size_128x4(*scale.shape),)),
    reference=nvfp4_scale_to_128x4_reference,
    check=check_scale_to_128x4,
    inline=Inline.ALWAYS,
)

# scale [ceil(rows/128) * ceil(columns/4) * 512] E4M3 -> linear [rows, columns] E4M3
nvfp4_scale_from_128x4 = define(
    "nvfp4_scale_from_128x4(Tensor scale, SymInt rows, SymInt columns) -> (Tensor linear)",
    alloc=lambda scale, rows, columns: scale.new_empty((rows, columns)),
    reference=nvfp4_scale_from_128x4_reference,
    check=lambda scale, rows, columns: expect_flat("nvfp4_scale_from_128x4", scale),
    inline=Inline.ALWAYS,
)
