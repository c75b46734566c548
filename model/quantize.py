"""fp32 weights -> the storage formats, and the exact change of MXFP4 into NVFP4.

UE8M0 scales are the smallest that do not saturate. Quantising what `dequantize_weight` returned for fp8 or mxfp4 gives
back the same values, possibly with smaller scales and larger codes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from dsv4_ops.ops.formats import (
    E2M1_MAX,
    E4M3_MAX,
    cast_e4m3,
    ceil_ue8m0,
    decode_ue8m0,
    encode_e2m1,
    mxfp4_group_scale,
    pack_e2m1,
    pow2,
)
from model.weight_formats import FP8_BLOCK, MXFP4_GROUP, NVFP4_GROUP

SMALLEST_NORMAL = 2.0**-126
# Exponents of the powers of two that E4M3 holds: 2^-9 (the smallest subnormal) to 2^8.
E4M3_LOWEST, E4M3_HIGHEST = -9, 8


def quantize_weight_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[N, K] fp32 -> E4M3 [N, K], uint8 [ceil(N/128), ceil(K/128)]: scale 2^ceil(log2(amax / 448)) of 128x128."""
    rows, columns = weight.shape
    padded = pad(weight, (0, -columns % FP8_BLOCK, 0, -rows % FP8_BLOCK))
    tiles = padded.unflatten(1, (-1, FP8_BLOCK)).unflatten(0, (-1, FP8_BLOCK))  # [rows/128, 128, columns/128, 128]
    scale = ceil_ue8m0((tiles.abs().amax((1, 3)) * (1.0 / E4M3_MAX)).clamp_min(SMALLEST_NORMAL))
    codes = cast_e4m3(tiles / decode_ue8m0(scale)[:, None, :, None])
    return codes.flatten(2).flatten(0, 1)[:rows, :columns].contiguous(), scale


def quantize_weight_mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[N, K] fp32 -> uint8 [N, K/2], uint8 [N, K/32]: scale 2^ceil(log2(amax / 6)) per 32 along K."""
    groups = weight.unflatten(-1, (-1, MXFP4_GROUP))
    scale = mxfp4_group_scale(groups.abs().amax(-1))
    return pack_e2m1(encode_e2m1(groups / decode_ue8m0(scale)[..., None]).flatten(-2)), scale


def nvfp4_weight_scale_2(*weights: Tensor) -> Tensor:
    """The fp32 [] scale of a tensor, or of several that share it (w1 and w3 of an expert): amax / (6 * 448)."""
    amax = torch.stack([weight.abs().amax() for weight in weights]).amax()
    return (amax / (E2M1_MAX * E4M3_MAX)).clamp_min(SMALLEST_NORMAL)


def quantize_weight_nvfp4(weight: Tensor, weight_scale_2: Tensor) -> tuple[Tensor, Tensor]:
    """[N, K] fp32 and its `nvfp4_weight_scale_2` -> uint8 [N, K/2], E4M3 [N, K/16].

    Block scale e4m3(amax / (6 * weight_scale_2)); elements are divided by the rounded scale. A block whose scale rounds
    to zero becomes zero.
    """
    groups = weight.unflatten(-1, (-1, NVFP4_GROUP))
    scale = cast_e4m3(groups.abs().amax(-1) / (E2M1_MAX * weight_scale_2))
    divisor = (scale.float() * weight_scale_2)[..., None]
    codes = encode_e2m1(torch.where(divisor == 0, 0.0, groups / divisor))
    return pack_e2m1(codes.flatten(-2)), scale


def cast_mxfp4_to_nvfp4(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], Tensor] | None:
    """MXFP4 weights that share a weight_scale_2 -> their E4M3 block scales [N, K/16] and the scale fp32 []; codes stay.

    `parts` are (weight uint8 [N, K/2], scale uint8 [N, K/32]). With kmax the largest exponent of a block that is not
    all zeros, weight_scale_2 is 2^(kmax - 8) and the scale 2^k of 32 elements becomes 2^(k - kmax + 8) for both 16.
    None if the exponents span more than the 18 powers of two of E4M3.
    """
    exponents = [scale.to(torch.int32) - 127 for _, scale in parts]
    used = [((weight & 0x77) != 0).unflatten(-1, (-1, MXFP4_GROUP // 2)).any(-1) for weight, _ in parts]
    chosen = torch.cat([exponent[mask] for exponent, mask in zip(exponents, used, strict=True)])
    low, high = (int(bound) for bound in chosen.aminmax()) if chosen.numel() else (0, 0)
    if high - low > E4M3_HIGHEST - E4M3_LOWEST or high > 127:  # 128 is the NaN of UE8M0
        return None
    shift = high - E4M3_HIGHEST
    scales = [pow2((exponent - shift).clamp(E4M3_LOWEST, E4M3_HIGHEST)) for exponent in exponents]
    scales = [scale.to(torch.float8_e4m3fn).repeat_interleave(MXFP4_GROUP // NVFP4_GROUP, -1) for scale in scales]
    return scales, torch.tensor(2.0**shift, dtype=torch.float32)
