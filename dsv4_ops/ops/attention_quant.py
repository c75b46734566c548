"""Sparse attention whose output is quantised where it is computed: FP8 with a scale for each 128 dimensions of a head.

For a grouped output product that takes FP8 activations. Codes [B, S, H, D] and scales [B, S, H, D/128] are those of
`quant_fp8(o.flatten(-2), 128)`, byte for byte, in the same order: `flatten(-2).unflatten(-1, (groups, -1))` of both,
which copies nothing, are operands of `grouped_linear_fp8`. `o` is rounded to the dtype of q before it is quantised, as
in the two ops one after the other; it is not returned.
"""

from functools import partial

import torch
from torch import Tensor

from dsv4_ops.ops.attention import (
    check_compressed,
    check_selected,
    check_window,
    compressed_reference,
    selected_reference,
    window_reference,
)
from dsv4_ops.ops.attention_workspace import workspace_compressed, workspace_selected, workspace_window
from dsv4_ops.ops.quant import alloc_fp8, quant_fp8_reference
from dsv4_ops.registry import Inline, define, describe, expect

GROUP = 128  # dimensions that share a scale

Quantised = tuple[Tensor, Tensor, Tensor]


def quantise(o: Tensor, lse: Tensor) -> Quantised:
    return *quant_fp8_reference(o, GROUP), lse


def window_quant_fp8_reference(*arguments) -> Quantised:
    """sparse_attention_window, then quant_fp8 of its output in groups of 128."""
    return quantise(*window_reference(*arguments))


def selected_quant_fp8_reference(*arguments) -> Quantised:
    """sparse_attention_selected, then quant_fp8 of its output in groups of 128."""
    return quantise(*selected_reference(*arguments))


def compressed_quant_fp8_reference(*arguments) -> Quantised:
    """sparse_attention_compressed, then quant_fp8 of its output in groups of 128."""
    return quantise(*compressed_reference(*arguments))


def check_quantised(check, op: str, q: Tensor, *others) -> None:
    """`check` of the op without quantiser, and that whole groups fill a head."""
    check(op, q, *others)
    expect(q.shape[-1] % GROUP == 0, op, f"q must be [B, S, H, D] with D a multiple of {GROUP}, got {describe(q)}")


def alloc_quantised(q: Tensor, *others) -> Quantised:
    return *alloc_fp8(q, GROUP, torch.uint8), q.new_empty(q.shape[:-1], dtype=torch.float32)


# Arguments of sparse_attention_window, _selected and _compressed, D a multiple of 128
# -> o_codes [B, S, H, D] E4M3, o_scale [B, S, H, D/128] uint8 (UE8M0), lse [B, S, H] f32
sparse_attention_window_quant_fp8 = define(
    "sparse_attention_window_quant_fp8(Tensor q, Tensor window_pool, Tensor sink, Tensor rope_table, "
    "Tensor window_table, Tensor positions, int window, int window_page_size) -> "
    "(Tensor o_codes, Tensor o_scale, Tensor lse)",
    alloc=alloc_quantised,
    reference=window_quant_fp8_reference,
    check=partial(check_quantised, check_window, "sparse_attention_window_quant_fp8"),
    inline=Inline.STATIC_SHAPES,
    workspace=workspace_window,
)

sparse_attention_selected_quant_fp8 = define(
    "sparse_attention_selected_quant_fp8(Tensor q, Tensor window_pool, Tensor compressed_pool, Tensor sink, "
    "Tensor rope_table, Tensor window_table, Tensor compressed_table, Tensor indices, Tensor positions, int window, "
    "int window_page_size, int compressed_page_size) -> (Tensor o_codes, Tensor o_scale, Tensor lse)",
    alloc=alloc_quantised,
    reference=selected_quant_fp8_reference,
    check=partial(check_quantised, check_selected, "sparse_attention_selected_quant_fp8"),
    inline=Inline.STATIC_SHAPES,
    workspace=workspace_selected,
)

sparse_attention_compressed_quant_fp8 = define(
    "sparse_attention_compressed_quant_fp8(Tensor q, Tensor window_pool, Tensor compressed_pool, Tensor sink, "
    "Tensor rope_table, Tensor window_table, Tensor compressed_table, Tensor positions, int window, int ratio, "
    "int window_page_size, int compressed_page_size) -> (Tensor o_codes, Tensor o_scale, Tensor lse)",
    alloc=alloc_quantised,
    reference=compressed_quant_fp8_reference,
    check=partial(check_quantised, check_compressed, "sparse_attention_compressed_quant_fp8"),
    inline=Inline.STATIC_SHAPES,
    workspace=workspace_compressed,
)
