"""RMS norms, the gated activation, and the two fused forms around them in attention: queries, and the window KV insert.

Everything is computed in fp32 and rounded once to the dtype of the input; where the model rounds in between, the
reference casts in between. `T` stands for any leading dimensions.
"""

import torch
from torch import Tensor

from dsv4_ops.ops.pages import kv_entry_bytes, write_kv
from dsv4_ops.ops.rope import apply_rope
from dsv4_ops.registry import Inline, define, define_mutating, describe, expect

ACTIVATION_DTYPES = (torch.bfloat16, torch.float32)


def expect_activation(x: Tensor, op: str, name: str, last: int | None = None) -> None:
    """Raise unless x is a bf16 or fp32 tensor with at least one dimension, the last one of size `last` where given."""
    wanted = f"{name} must be [..., {'K' if last is None else last}] bfloat16 or float32, got {describe(x)}"
    expect(x.dim() >= 1 and x.dtype in ACTIVATION_DTYPES and last in (None, x.shape[-1]), op, wanted)


def divide_by_rms(x: Tensor, eps: float) -> Tensor:
    """x / rms(x) over the last dimension, fp32 and contiguous: torch sums other layouts in another order."""
    x32 = x.float().contiguous()
    return x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / rms(x) over the last dimension."""
    return (weight.float() * divide_by_rms(x, eps)).to(x.dtype)


def expect_rms_norm(op: str, x: Tensor, weight: Tensor) -> None:
    """Raise unless x [T, d] and weight [d] are bf16 or fp32."""
    expect_activation(x, op, "x")
    expect_activation(weight, op, "weight", x.shape[-1])
    expect(weight.dim() == 1, op, f"weight must be [{x.shape[-1]}], got {describe(weight)}")


# x [T, d] bf16 | f32, weight [d] bf16 | f32 -> y [T, d] of x's dtype
rms_norm = define(
    "rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor y)",
    alloc=lambda x, weight, eps: x.new_empty(x.shape),
    reference=rms_norm_reference,
    check=lambda x, weight, eps: expect_rms_norm("rms_norm", x, weight),
    inline=Inline.ALWAYS,
)


def swiglu_reference(gate_up: Tensor, route_weight: Tensor, limit: float) -> Tensor:
    """silu(min(gate, limit)) * clamp(up, -limit, limit) * route_weight."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    h = torch.nn.functional.silu(gate.clamp_max(limit)) * up.clamp(-limit, limit)
    return (h * route_weight[..., None]).to(gate_up.dtype).contiguous()


def expect_swiglu(op: str, gate_up: Tensor, route_weight: Tensor) -> None:
    """Raise unless gate_up is [T, 2*I] bf16 or fp32 and route_weight [T] fp32."""
    expect_activation(gate_up, op, "gate_up")
    expect(gate_up.shape[-1] % 2 == 0, op, f"gate_up must be [T, 2*I], gate then up, got {describe(gate_up)}")
    fits = route_weight.dtype == torch.float32 and route_weight.dim() == gate_up.dim() - 1
    wanted = f"one float32 weight for each row of gate_up {describe(gate_up)}"
    expect(fits, op, f"route_weight must be {wanted}, got {describe(route_weight)}; ones for a shared expert")


# gate_up [T, 2*I] bf16 | f32 (gate, then up), route_weight [T] f32 -> h [T, I] of gate_up's dtype
swiglu = define(
    "swiglu(Tensor gate_up, Tensor route_weight, float limit) -> (Tensor h)",
    alloc=lambda gate_up, route_weight, limit: gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2)),
    reference=swiglu_reference,
    check=lambda gate_up, route_weight, limit: expect_swiglu("swiglu", gate_up, route_weight),
    inline=Inline.ALWAYS,
)


def q_norm_rope_reference(q: Tensor, rope_table: Tensor, positions: Tensor, eps: float) -> Tensor:
    """Every head divided by its RMS (no weight), then rotated."""
    return apply_rope(divide_by_rms(q, eps), rope_table, positions).to(q.dtype)


def expect_rope(op: str, x: Tensor, rope_table: Tensor, positions: Tensor) -> None:
    """Raise unless rope_table [max_pos, R] f32 and positions [B, S] int32 fit x [B, S, ..., D]."""
    rope_dim = rope_table.shape[-1]
    fits = rope_table.dim() == 2 and rope_table.dtype == torch.float32 and rope_dim % 2 == 0 and rope_dim <= x.shape[-1]
    wanted = f"[max_pos, R] float32 with R even and at most {x.shape[-1]}"
    expect(fits, op, f"rope_table must be {wanted}, got {describe(rope_table)}")
    fits = positions.dim() == 2 and positions.dtype == torch.int32
    expect(fits, op, f"positions must be [B, S] int32 (-1: no token), got {describe(positions)}")


def expect_heads(op: str, q: Tensor, rope_table: Tensor, positions: Tensor) -> None:
    """Raise unless q is [B, S, H, D] bf16 or fp32 and can be rotated."""
    expect_activation(q, op, "q")
    expect(q.dim() == 4, op, f"q must be [B, S, H, D], got {describe(q)}")
    expect_rope(op, q, rope_table, positions)


# q [B, S, H, D] bf16 | f32, rope_table [max_pos, R] f32, positions [B, S] int32 -> y [B, S, H, D] of q's dtype
q_norm_rope = define(
    "q_norm_rope(Tensor q, Tensor rope_table, Tensor positions, float eps) -> (Tensor y)",
    alloc=lambda q, rope_table, positions, eps: q.new_empty(q.shape),
    reference=q_norm_rope_reference,
    check=lambda q, rope_table, positions, eps: expect_heads("q_norm_rope", q, rope_table, positions),
    inline=Inline.ALWAYS,
)


def kv_norm_rope_append_reference(
    pool: Tensor,
    kv: Tensor,
    weight: Tensor,
    rope_table: Tensor,
    block_table: Tensor,
    positions: Tensor,
    eps: float,
    page_size: int,
) -> None:
    """RMS norm (rounded), rope (rounded), then the insert at entry `position % ring`, which quantises."""
    ring = block_table.shape[1] * page_size
    normed = rms_norm_reference(kv, weight, eps).float()
    roped = apply_rope(normed, rope_table, positions).to(kv.dtype)
    entries = torch.where(positions >= 0, positions % ring, -1)
    write_kv(pool, block_table, entries, page_size, roped, rope_table.shape[1])


def expect_window_rows(
    op: str,
    pool: Tensor,
    kv: Tensor,
    weight: Tensor,
    rope_table: Tensor,
    block_table: Tensor,
    positions: Tensor,
    page_size: int,
) -> None:
    """Raise unless kv [B, S, D] can be normed, rotated and inserted without overwriting itself."""
    expect(kv.dim() == 3, op, f"kv must be [B, S, D], got {describe(kv)}")
    expect_rms_norm(op, kv, weight)
    expect_rope(op, kv, rope_table, positions)
    expect(
        block_table.dim() == 2 and block_table.dtype == torch.int32,
        op,
        f"block_table must be [B, pages] int32, got {describe(block_table)}",
    )
    plain, head_dim = pool.dtype == torch.float32, kv.shape[-1]
    page = page_size * (head_dim if plain else sum(kv_entry_bytes(head_dim, rope_table.shape[1])))
    expect(
        pool.dim() == 2 and pool.dtype in (torch.uint8, torch.float32) and pool.shape[1] >= page,
        op,
        f"pool must be [pages, page stride >= {page}] uint8 (packed) or float32 (plain), got {describe(pool)}",
    )
    ring = block_table.shape[1] * page_size
    fix = "split the chunk or give each sequence more pages"
    expect(kv.shape[1] <= ring, op, f"{kv.shape[1]} rows a sequence overwrite each other in a ring of {ring}: {fix}")


def check_kv_norm_rope_append(pool, kv, weight, rope_table, block_table, positions, eps, page_size) -> None:
    op = "kv_norm_rope_append"
    expect_window_rows(op, pool, kv, weight, rope_table, block_table, positions, page_size)


# pool [pages, page stride] uint8 | f32, kv [B, S, D] bf16 | f32, weight [D], rope_table [max_pos, R] f32,
# block_table [B, pages a sequence] int32, positions [B, S] int32; a row at position -1 writes nothing
kv_norm_rope_append = define_mutating(
    "kv_norm_rope_append(Tensor(a!) pool, Tensor kv, Tensor weight, Tensor rope_table, Tensor block_table, "
    "Tensor positions, float eps, int page_size) -> ()",
    reference=kv_norm_rope_append_reference,
    check=check_kv_norm_rope_append,
)


def qkv_norm_rope_append_reference(
    pool: Tensor,
    q: Tensor,
    kv: Tensor,
    weight: Tensor,
    rope_table: Tensor,
    block_table: Tensor,
    positions: Tensor,
    eps: float,
    page_size: int,
) -> None:
    """q_norm_rope in place, and kv_norm_rope_append."""
    q.copy_(q_norm_rope_reference(q, rope_table, positions, eps))
    kv_norm_rope_append_reference(pool, kv, weight, rope_table, block_table, positions, eps, page_size)


def check_qkv_norm_rope_append(pool, q, kv, weight, rope_table, block_table, positions, eps, page_size) -> None:
    op = "qkv_norm_rope_append"
    expect_heads(op, q, rope_table, positions)
    expect_window_rows(op, pool, kv, weight, rope_table, block_table, positions, page_size)
    dtype = str(q.dtype).removeprefix("torch.")
    fits = kv.dtype == q.dtype and kv.shape[-1] == q.shape[-1]
    expect(fits, op, f"kv must be [B, S, {q.shape[-1]}] {dtype} like q {describe(q)}, got {describe(kv)}")


# pool, kv, weight, rope_table, block_table, positions as above; q [B, S, H, D] of kv's dtype, written in place
qkv_norm_rope_append = define_mutating(
    "qkv_norm_rope_append(Tensor(a!) pool, Tensor(b!) q, Tensor kv, Tensor weight, Tensor rope_table, "
    "Tensor block_table, Tensor positions, float eps, int page_size) -> ()",
    reference=qkv_norm_rope_append_reference,
    check=check_qkv_norm_rope_append,
)
