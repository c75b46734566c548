"""Stored weights -> fp32. Exact, but for one rounding where a scale is not a power of two."""

import torch
from torch import Tensor

from dsv4_ops.ops.formats import E2M1_VALUES, decode_ue8m0
from model.weight_formats import DENSE, FP8, FP8_BLOCK, MXFP4, MXFP4_GROUP, NVFP4_GROUP

# byte -> (value of its low nibble, value of its high nibble)
_SIGNED = torch.tensor(E2M1_VALUES + tuple(-value for value in E2M1_VALUES), dtype=torch.float32)
_BYTE_VALUES = torch.stack((_SIGNED.repeat(16), _SIGNED.repeat_interleave(16)), dim=-1)


def dequantize_weight(weight_format: str, weight: Tensor, *scales: Tensor) -> Tensor:
    """[N, K] fp32 from the tensors of one weight, in the order of `weight_formats.PARTS`.

    dense   weight bf16 | fp32 [N, K]
    fp8     weight E4M3 [N, K], scale uint8 (UE8M0) | fp32 [ceil(N/128), ceil(K/128)]
    mxfp4   weight uint8 [N, K/2], scale uint8 (UE8M0) [N, K/32]
    nvfp4   weight uint8 [N, K/2], weight_scale E4M3 [N, K/16], weight_scale_2 fp32 [] | [1]
    """
    if weight_format == DENSE:
        return weight.float()
    if weight_format == FP8:
        return weight.float().mul_(_spread(_decode_scale(scales[0]), *weight.shape))
    values = decode_e2m1_bytes(weight)
    if weight_format == MXFP4:
        return values.unflatten(-1, (-1, MXFP4_GROUP)).mul_(_decode_scale(scales[0])[..., None]).flatten(-2)
    values = values.unflatten(-1, (-1, NVFP4_GROUP)).mul_(scales[0].float()[..., None]).flatten(-2)
    return values.mul_(scales[1].reshape(()))


def decode_e2m1_bytes(packed: Tensor) -> Tensor:
    """[..., K/2] bytes of two E2M1 codes -> [..., K] fp32; one table row per byte is the fastest way on a CPU."""
    table = _BYTE_VALUES.to(packed.device)
    return torch.nn.functional.embedding(packed.int(), table).flatten(-2)


def _decode_scale(scale: Tensor) -> Tensor:
    return scale if scale.dtype == torch.float32 else decode_ue8m0(scale.view(torch.uint8))


def _spread(scale: Tensor, rows: int, columns: int) -> Tensor:
    """One scale per 128x128 block -> one per element; the last blocks may be short."""
    scale = scale.repeat_interleave(FP8_BLOCK, 1)[:, :columns]
    return scale.repeat_interleave(FP8_BLOCK, 0)[:rows]
