"""One file a family: schema, alloc and reference of every operator. The reference is the specification.

`ops.<name>` is the packet `torch.ops.dsv4.<name>`.
"""

from dsv4_ops.ops import (
    attention,
    compressor,
    fused_quant,
    gemm,
    hyper_connection,
    indexer,
    moe,
    norm,
    quant,
    sample,
)
from dsv4_ops.registry import TABLE

FAMILIES = (quant, fused_quant, norm, hyper_connection, compressor, indexer, attention, gemm, moe, sample)

globals().update({name: op.packet for name, op in TABLE.items()})
