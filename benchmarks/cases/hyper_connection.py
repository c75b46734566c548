"""mHC on n streams of hidden_size, in bf16.

The 24-wide product has fp32 weights and must not lose any of their bits. Three bf16 parts make up one of them, so it
counts as three products in bf16.
"""

from collections.abc import Iterator

from benchmarks.case import Case
from benchmarks.cases.fused_quant import norm_then_quant
from benchmarks.cases.nvfp4 import nvfp4_bytes
from benchmarks.cases.quant import GROUP, fp8_bytes
from benchmarks.floors import Traffic
from benchmarks.inputs import Inputs
from benchmarks.peers import Chain, kernel
from benchmarks.shapes import Widths, batch_and_rows
from dsv4_ops.registry import TABLE

NORM_EPS = HC_EPS = 1e-6
PARTS_OF_FP32 = 3  # of 8 bits of mantissa each


class Streams:
    """What the cases of one shape share: arguments, and bytes of the parts."""

    def __init__(self, w: Widths, tokens: int):
        self.w, self.tokens, self.n, self.dim = w, tokens, w.hc_mult, w.hidden_size
        self.mixes = (2 + self.n) * self.n
        self.row = 2 * tokens * self.dim  # bytes of one bf16 row of each token
        self.streams = self.n * self.row
        self.weights = 4 * (self.mixes * self.n * self.dim + 3 + self.mixes)
        self.post_comb = 4 * tokens * (self.n + self.n**2)

    @property
    def pre(self) -> Traffic:
        """Without the streams, which the ops of a chain hand on: weights in, y, post and comb out."""
        values = self.tokens * self.n * self.dim
        product, rest = PARTS_OF_FP32 * 2 * values * self.mixes, 2 * 2 * values  # the rest: RMS and weighted sum
        return Traffic(self.weights, self.row + self.post_comb, bf16_flops=product, fp32_flops=rest)

    @property
    def post(self) -> Traffic:
        flops = 2 * self.tokens * self.n * self.dim * (self.n + 1)
        return Traffic(self.row + self.streams + self.post_comb, self.streams, fp32_flops=flops)

    def make_streams(self, i: Inputs):
        return i.normal(*batch_and_rows(self.tokens), self.n, self.dim)

    def make_weights(self, i: Inputs) -> tuple:
        width = self.n * self.dim
        scaled = i.normal(self.mixes, width, dtype=i.uniform(1).dtype, scale=width**-0.5)
        return scaled, i.uniform(3), i.normal(self.mixes, dtype=scaled.dtype)

    def make_post(self, i: Inputs) -> tuple:
        """f, streams, post, and comb with rows and columns that sum to 1."""
        rows = batch_and_rows(self.tokens)
        comb = i.uniform(*rows, self.n, self.n).softmax(-1)
        return i.normal(*rows, self.dim), self.make_streams(i), 2 * i.uniform(*rows, self.n), comb

    @property
    def options(self) -> tuple:
        return NORM_EPS, HC_EPS, self.w.hc_sinkhorn_iters


def pre_chains(tokens: int, dim: int, n: int) -> tuple[Chain, ...]:
    """The peers' product, then their kernel for all that comes after it."""
    product = kernel("dg_tf32_hc_prenorm_gemm", m=tokens, k=n * dim)
    return tuple((product, kernel(name, m=tokens, H=dim)) for name in ("fi_mhc_pre_big_fuse", "tk_mhc_pre_fuse_only"))


def post_chains(tokens: int, dim: int) -> tuple[Chain, ...]:
    return tuple((kernel(name, m=tokens, H=dim),) for name in ("fi_mhc_post", "tk_mhc_post"))


def joined(*parts: tuple[Chain, ...]) -> tuple[Chain, ...]:
    """Every alternative of the first part with every one of the second, and so on."""
    chains: tuple[Chain, ...] = ((),)
    for part in parts:
        chains = tuple(chain + more for chain in chains for more in part)
    return chains


def cases(w: Widths, tokens: int) -> Iterator[Case]:
    s = Streams(w, tokens)
    shape = f"dim {s.dim}"
    logits = 4 * tokens * s.n**2
    yield Case(
        "sinkhorn", tokens, f"n {s.n}", Traffic(logits, logits),
        lambda i: (i.normal(*batch_and_rows(tokens), s.n, s.n, dtype=i.uniform(1).dtype), *s.options[1:]),
    )  # fmt: skip
    head = 4 * (s.n * s.n * s.dim + 1 + s.n)
    yield Case(
        "hc_head", tokens, shape, Traffic(s.streams + head, s.row), lambda i: (s.make_streams(i), *head_weights(s, i))
    )
    yield Case("hc_post", tokens, shape, s.post, s.make_post, post_chains(tokens, s.dim))
    yield from pre_cases(s, shape)


def head_weights(s: Streams, i: Inputs) -> tuple:
    fn, scale, base = s.make_weights(i)
    return fn[: s.n].contiguous(), scale[:1].contiguous(), base[: s.n].contiguous(), NORM_EPS, HC_EPS


def pre_cases(s: Streams, shape: str) -> Iterator[Case]:
    """hc_pre alone, behind hc_post, and each with the norm and quantiser that follow."""
    tokens, dim, elements = s.tokens, s.dim, s.tokens * s.dim
    pre, post = pre_chains(tokens, dim, s.n), post_chains(tokens, dim)
    norm: tuple[Chain, ...] = ((kernel("vllm_rms_norm", m=tokens, n=dim),),)
    weight = Traffic(2 * dim, 0)
    followed = (
        ("", Traffic(0, 0), (), ((),)),
        ("_rms_norm", weight, (), norm),
        ("_rms_norm_quant_fp8", weight + Traffic(0, fp8_bytes(elements)), (GROUP,), norm_then_quant(tokens, dim)),
        ("_rms_norm_quant_nvfp4", weight + Traffic(0, nvfp4_bytes(elements) + 4 * tokens), (), ()),
    )
    for suffix, more, last, chains in followed:

        def make_pre(i: Inputs, normed=bool(suffix), last=last) -> tuple:
            return s.make_streams(i), *s.make_weights(i), *([i.norm_weight(dim)] if normed else []), *s.options, *last

        def make_post_pre(i: Inputs, normed=bool(suffix), last=last) -> tuple:
            return *s.make_post(i), *s.make_weights(i), *([i.norm_weight(dim)] if normed else []), *s.options, *last

        if f"hc_pre{suffix}" in TABLE:
            traffic = Traffic(s.streams, 0) + s.pre + more
            yield Case(f"hc_pre{suffix}", tokens, shape, traffic, make_pre, joined(pre, chains))
        if f"hc_post_pre{suffix}" in TABLE:
            chains = joined(post, pre, chains)
            yield Case(f"hc_post_pre{suffix}", tokens, shape, s.post + s.pre + more, make_post_pre, chains)
