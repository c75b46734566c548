"""What a decode step of a model must read, from the shapes alone: the least time that it can take.

Weights are read once a step, as the released checkpoint stores them; of the routed experts those that some token takes,
E (1 - (1 - k/E)^B) of E in the mean if tokens choose evenly. Of the caches a step reads the window, the selected
or all compressed entries, and in CSA layers the index keys of the whole context.
"""

from dsv4_ops.ops.pages import index_page_bytes, kv_entry_bytes
from model.config import CSA, HCA, ModelConfig
from model.transformer import DeepseekV4


def distinct_experts(config: ModelConfig, batch: int) -> float:
    """Experts of a layer that a step reads, in the mean."""
    count = config.n_routed_experts
    return count * (1 - (1 - config.num_experts_per_tok / count) ** batch)


def weight_bytes(model: DeepseekV4, batch: int) -> int:
    """Without the embedding and the tables of the hash layers, of which a step reads a row a token."""
    share = distinct_experts(model.config, batch) / model.config.n_routed_experts
    total = 0.0
    for name, parameter in model.named_parameters():
        if name not in ("embed", "hash_experts") and not name.startswith("drafts."):
            total += parameter.nbytes * (share if ".experts." in name else 1)
    return round(total)


def cache_bytes(config: ModelConfig, batch: int, context: int) -> int:
    """Packed caches with FP4 index keys."""
    entry = sum(kv_entry_bytes(config.head_dim, config.qk_rope_head_dim))
    key = index_page_bytes(1, config.index_head_dim, fp8=False)
    total = 0
    for kind, ratio in zip(config.layer_kinds, config.compress_ratios, strict=True):
        total += min(context, config.sliding_window) * entry
        if kind == CSA:
            total += min(context // ratio, config.index_topk) * entry + context // ratio * key
        if kind == HCA:
            total += context // ratio * entry
    return batch * total


def step_bytes(model: DeepseekV4, batch: int, context: int) -> int:
    return weight_bytes(model, batch) + cache_bytes(model.config, batch, context)
