"""NVFP4: activations [T, hidden_size] bf16 with one global scale a row, block scales in both layouts."""

from collections.abc import Iterator

from benchmarks.case import Case
from benchmarks.floors import Traffic
from benchmarks.inputs import Inputs
from benchmarks.shapes import Widths
from dsv4_ops.ops.nvfp4 import nvfp4_row_scale_reference, nvfp4_scale_to_128x4_reference, size_128x4

GROUP = 16


def nvfp4_bytes(elements: int) -> int:
    """Codes and block scales, linear layout."""
    return elements // 2 + elements // GROUP


def with_row_scale(i: Inputs, *shape: int) -> tuple:
    x = i.normal(*shape)
    return x, nvfp4_row_scale_reference(x)


def quantised_128x4(i: Inputs, *shape: int) -> tuple:
    q, scale, row_scale = i.nvfp4(*shape)
    return q, nvfp4_scale_to_128x4_reference(scale), row_scale


def cases(w: Widths, tokens: int) -> Iterator[Case]:
    dim, elements = w.hidden_size, tokens * w.hidden_size
    columns, scales = dim // GROUP, tokens * dim // GROUP
    tiled, shape, x, row_scales = size_128x4(tokens, columns), f"dim {dim}", 2 * elements, 4 * tokens
    read_tiled = elements // 2 + scales + row_scales  # a reader has no use for the padding
    plain = (
        ("nvfp4_global_scale", Traffic(x, 4), lambda i: (i.normal(tokens, dim),)),
        ("nvfp4_row_scale", Traffic(x, row_scales), lambda i: (i.normal(tokens, dim),)),
        (
            "quant_nvfp4",
            Traffic(x + row_scales, nvfp4_bytes(elements)),
            lambda i: with_row_scale(i, tokens, dim),
        ),
        (
            "quant_nvfp4_128x4",
            Traffic(x + row_scales, elements // 2 + tiled),
            lambda i: with_row_scale(i, tokens, dim),
        ),
        (
            "dequant_nvfp4",
            Traffic(nvfp4_bytes(elements) + row_scales, 4 * elements),
            lambda i: i.nvfp4(tokens, dim),
        ),
        ("dequant_nvfp4_128x4", Traffic(read_tiled, 4 * elements), lambda i: quantised_128x4(i, tokens, dim)),
        ("nvfp4_scale_to_128x4", Traffic(scales, tiled), lambda i: (i.nvfp4(tokens, dim)[1],)),
        (
            "nvfp4_scale_from_128x4",
            Traffic(scales, scales),
            lambda i: (quantised_128x4(i, tokens, dim)[1], tokens, columns),
        ),
    )
    for name, traffic, make in plain:
        yield Case(name, tokens, shape, traffic, make)
