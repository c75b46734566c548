"""FP8 products as Hopper's tensor cores compute them, in fp64 on the CPU.

An instruction (wgmma m64nNk32 of E4M3) adds 32 products and the sum of the instructions before as fixed-point numbers:
each addend is cut off 13 bits below the largest of their exponents (of a product: the sum of its factors'), and the sum
13 bits below its own. So it loses less than 33 * 2^-13 of its largest addend and 2^-13 of the sum; a chain of n
instructions, all of whose addends and sums sum|a b| bounds, less than n * 34 * 2^-13 * sum|a b|.
"""

import torch
from torch import Tensor

from dsv4_ops.ops.norm import swiglu_reference
from dsv4_ops.ops.quant import quant_fp8_reference
from graph_tests.ops.operands import fp4_values, ue8m0

KEPT_BITS = 13  # behind the leading one
STAGE = 128  # columns whose sum a prefill of MXFP4 experts adds to its fp32 accumulators
FOLD_SPAN = 11  # powers of two between the scales of a row that one product takes


def exponent(x: Tensor) -> Tensor:
    return torch.frexp(x)[1] - 1


def cut_off(x: Tensor, exponents: Tensor) -> Tensor:
    """Towards zero, to multiples of 2^(exponent - 13)."""
    unit = torch.ldexp(torch.ones((), dtype=torch.float64), (exponents - KEPT_BITS).double())
    return torch.trunc(x / unit) * unit


def truncated_product(a: Tensor, b: Tensor, steps: Tensor) -> Tensor:
    """a [N, K], b [C, K] fp64 -> [N, C] fp64; steps [n, 32] names the columns that each of n instructions takes."""
    total = torch.zeros(a.shape[0], b.shape[0], dtype=torch.float64)
    for columns in steps:
        products = a[:, None, columns] * b[None, :, columns]
        addends = torch.cat((products, total[..., None]), dim=-1)
        factors = exponent(a)[:, None, columns] + exponent(b)[None, :, columns]
        exponents = torch.cat((factors, exponent(total)[..., None]), dim=-1)
        largest = exponents.masked_fill(addends == 0, -1000).amax(-1, keepdim=True)
        total = cut_off(addends, largest).sum(-1)
        total = cut_off(total, exponent(total))
    return total


def fold_steps() -> Tensor:
    """[4, 32]: the columns of a stage that each instruction of csrc/moe/prefill_fold.cuh takes."""
    step, thread, column = torch.meshgrid(torch.arange(4), torch.arange(4), torch.arange(8), indexing="ij")
    return (32 * thread + 8 * step + column).flatten(1)


def folded_product(x: Tensor, x_scale: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    """x [N, K] E4M3, x_scale [N, K/128], MXFP4 [C, K/2] with scale [C, K/32] -> [N, C], the fp32 sum of the stages.

    Groups of a row whose scales are too far apart for one product are multiplied one after the other, largest first.
    """
    total = x.new_zeros(x.shape[0], packed.shape[0], dtype=torch.float64)
    values, factors, steps = x.double(), ue8m0(x_scale), fold_steps()
    for stage in range(x.shape[1] // STAGE):
        columns = slice(stage * STAGE, (stage + 1) * STAGE)
        scales = scale[:, stage * 4 : stage * 4 + 4].int()
        weight = fp4_values(packed[:, stage * STAGE // 2 : (stage + 1) * STAGE // 2]).unflatten(1, (4, 32))
        while (scales >= 0).any():
            taken = (scales >= 0) & (scales >= scales.amax(1, keepdim=True) - FOLD_SPAN)
            of_window = (weight * (ue8m0(scales) * taken)[..., None]).flatten(1)
            product = truncated_product(values[:, columns], of_window, steps) * factors[:, stage, None]
            total = (total + product).float().double()
            scales = scales.masked_fill(taken, -1)
    return total.float()


def folded_experts(
    x: Tensor,
    x_scale: Tensor,
    ids: Tensor,
    route: Tensor,
    w1: Tensor,
    w1_scale: Tensor,
    w3: Tensor,
    w3_scale: Tensor,
    w2: Tensor,
    w2_scale: Tensor,
    limit: float,
) -> Tensor:
    """moe_mxfp4 with these products, and the reference's roundings between them."""
    results = torch.zeros(*ids.shape, x.shape[1])
    for expert in range(len(w1)):
        rows, slots = (ids == expert).nonzero(as_tuple=True)
        operands = x[rows], x_scale[rows]
        pairs = (w1[expert], w1_scale[expert]), (w3[expert], w3_scale[expert])
        gate_up = torch.cat([folded_product(*operands, *pair) for pair in pairs], dim=-1).bfloat16()
        h = quant_fp8_reference(swiglu_reference(gate_up, route[rows, slots], limit), STAGE)
        results[rows, slots] = folded_product(*h, w2[expert], w2_scale[expert]).bfloat16().float()
    return sum(results.unbind(1), torch.zeros_like(results[:, 0]))
