"""A model of which every case fits a CPU: what the kernels of the released models need, and no more."""

from dataclasses import replace

from benchmarks.shapes import FLASH

TINY = replace(
    FLASH, model="tiny", hidden_size=256, num_attention_heads=4, q_lora_rank=128, o_groups=2, index_topk=8,
    n_routed_experts=8, moe_intermediate_size=128, head_dim=128, rope_dim=64, o_lora_rank=128, index_n_heads=4,
    index_head_dim=64, num_experts_per_tok=2, vocab_size=300, sliding_window=8, context=1024,
)  # fmt: skip
