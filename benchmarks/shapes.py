"""The widths of the two released models: where an operator is timed."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Widths:
    """One model's constants, in the spelling of `ModelConfig` where it has them."""

    model: str
    hidden_size: int
    num_attention_heads: int
    q_lora_rank: int
    o_groups: int
    index_topk: int
    n_routed_experts: int
    moe_intermediate_size: int
    routed_scaling_factor: float
    head_dim: int = 512
    rope_dim: int = 64
    o_lora_rank: int = 1024
    index_n_heads: int = 64
    index_head_dim: int = 128
    num_experts_per_tok: int = 6
    vocab_size: int = 129280
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    sliding_window: int = 128
    csa_ratio: int = 4
    hca_ratio: int = 128
    swiglu_limit: float = 10.0
    page_size: int = 64  # of window pools, and of compressed pools at ratio 4
    context: int = 32768  # tokens of a sequence in decode cases


FLASH = Widths(
    model="flash", hidden_size=4096, num_attention_heads=64, q_lora_rank=1024, o_groups=8, index_topk=512,
    n_routed_experts=256, moe_intermediate_size=2048, routed_scaling_factor=1.5,
)  # fmt: skip
PRO = Widths(
    model="pro", hidden_size=7168, num_attention_heads=128, q_lora_rank=1536, o_groups=16, index_topk=1024,
    n_routed_experts=384, moe_intermediate_size=3072, routed_scaling_factor=2.5,
)  # fmt: skip
MODELS = {"flash": (FLASH,), "pro": (PRO,), "both": (FLASH, PRO)}
TOKENS = (1, 16, 128, 4096)
MOST_DECODE_ROWS = 256  # more tokens than this are one sequence's prefill chunk


def batch_and_rows(tokens: int) -> tuple[int, int]:
    """Sequences and rows of each: a decode step of `tokens` sequences, or one chunk of `tokens` rows."""
    return (tokens, 1) if tokens <= MOST_DECODE_ROWS else (1, tokens)
