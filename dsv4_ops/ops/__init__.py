"""One file a family: schema, alloc and reference of every operator. The reference is the specification.

`ops.<name>` is the packet `torch.ops.dsv4.<name>`.
"""

from dsv4_ops.kernels import load_kernels
from dsv4_ops.ops import (
    attention,
    attention_mixed,
    attention_quant,
    compressor,
    fused_quant,
    gemm,
    gemm_w8a16,
    hyper_connection,
    hyper_connection_quant,
    index_query,
    indexer,
    moe,
    norm,
    nvfp4,
    quant,
    router,
    sampling,
)
from dsv4_ops.registry import TABLE

FAMILIES = (
    quant,
    nvfp4,
    fused_quant,
    norm,
    hyper_connection,
    hyper_connection_quant,
    compressor,
    index_query,
    indexer,
    attention,
    attention_mixed,
    attention_quant,
    gemm,
    gemm_w8a16,
    router,
    moe,
    sampling,
)

globals().update({name: op.packet for name, op in TABLE.items()})

load_kernels()
