"""Fill the generated regions of README.md: the op table, and the tables of measured results.

    python -m docs.readme_tables            rewrites README.md
    python -m docs.readme_tables --check    fails if README.md is not up to date

A region stands between `<!-- generated: NAME -->` and `<!-- end -->`. What an op computes is the first sentence of its
reference's docstring; numbers come from benchmarks/results.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks import attention_gpu, indexer_gpu, peers
from benchmarks.decode_cpu import markdown as decode_table
from benchmarks.decode_gpu import markdown as decode_gpu_table
from benchmarks.decode_gpu import whole_markdown
from benchmarks.evaluation_loss import markdown as evaluation_table
from benchmarks.layer_gpu import markdown as layer_table
from benchmarks.record import RESULTS
from benchmarks.result import markdown as kernel_table
from benchmarks.result import named, product_markdown
from benchmarks.targets import COLD_TARGETS
from docs import attention_chart, op_chart
from docs.block_picture import CSA_RATIO, ENTRY_BYTES, HCA_RATIO, HEAD_DIM, INDEX_DIM, KEY_BYTES, state_bytes
from dsv4_ops import ops
from dsv4_ops.registry import TABLE, Inline, Op

README = Path(__file__).parents[1] / "README.md"
REGION = re.compile(r"(<!-- generated: ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
SENTENCE_END = re.compile(r"(?<=\.)\s+(?=[A-Z])")
WORKING_NAMES = {  # of the design: {op prefix: name it had there}
    "csa_compress_append": "compress_append",
    "hca_compress_append": "compress_append",
    "index_compress_append": "indexer_k",
    "index_query": "indexer_q",
    "index_topk": "indexer_topk",
    "sparse_attention": "sparse_attention",
    "linear_dense": "linear_bf16",
    "grouped_linear": "grouped_output",
}


def op_table() -> str:
    lines = ["| family | op | computes | CPU | CUDA |", "|---|---|---|---|---|"]
    for family in ops.FAMILIES:
        label = family.__name__.rpartition(".")[2]
        for op in TABLE.values():
            if module_of(op) != family.__name__:
                continue
            cpu = "reference" if op.inline is Inline.NEVER else "reference, fused"
            lines.append(f"| {label} | `{op.name}` | {meaning(op)} | {cpu} | {op.runs_on_cuda} |")
            label = ""
    return "\n".join(lines)


def module_of(op: Op) -> str:
    """The file of the op's reference; some references are one function with a part filled in."""
    return getattr(op.reference, "func", op.reference).__module__


def meaning(op: Op) -> str:
    """First sentence of the reference's docstring, and the name that the design calls the op by if that differs."""
    paragraph = " ".join((op.reference.__doc__ or "").strip().split("\n\n")[0].split())
    if not paragraph:
        raise ValueError(f"the reference of dsv4::{op.name} has no docstring")
    text = SENTENCE_END.split(paragraph)[0].replace("|", "\\|").replace("*", "\\*")
    working = next((name for prefix, name in WORKING_NAMES.items() if op.name.startswith(prefix)), None)
    return text if working is None else f"{text} Working name: `{working}`."


def results(name: str, table: Callable[[dict], str]) -> str:
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        return f"Not measured yet: `python -m benchmarks.{name}`."
    record = json.loads(path.read_text(encoding="utf-8"))
    return f"{table(record)}\n\n{provenance(record)}"


def provenance(record: dict) -> str:
    weights = ", ".join(digest[:12] for digest in record["checkpoint"]["sha256"].values())
    threads = f"{record['threads']} thread{'s' if record['threads'] > 1 else ''}"
    return (
        f"{record['cpu']}, {threads}; torch {record['torch']}; {record['date']}; weights sha256 {weights}; "
        f"`{record['command']}`."
    )


def kernels() -> str:
    """The section on what operators take on an H200; nothing before it was measured."""
    record = op_chart.load()
    if record is None:
        return ""
    return f"""## Kernels on an H200

Microseconds of one call: medians of CUDA-graph replays, warm (the same inputs again and again) and cold (L2 flushed
before each call). The floor is what an operator must read and write over the speed of the memory, or its flops over
the rate of the units; "latency" where that is less than a launch. The peers' kernels were timed with the same method on
the same kind of GPU; where they need several for the same work, the sum stands here. The share is of the cold time, the
ratio of the warm ones. All cases that were timed are in
`{op_chart.SOURCE.relative_to(README.parent)}`.

![Times of the operators below, on a logarithmic axis, with floors and peers](docs/{op_chart.TARGET.name})

{kernel_table(record)}

{gpu_provenance(record)}"""


def products() -> str:
    """The section on products with cold weights; nothing before they were measured."""
    record = op_chart.load()
    if record is None or not named(record, COLD_TARGETS):
        return ""
    return f"""## Matrix products and experts on an H200

Microseconds of one call whose weights are not in L2, which is what a decode step finds: a layer's weights are read once
a step. T is the number of tokens. Streamed (up to 64 tokens): calls one behind the other in a CUDA graph, each with
weights of its own, in all several times what L2 holds; a decode step calls them like this. Cold: L2 flushed before each
call, which is how the peers' kernels were timed. A cold call of few tokens takes longer than a streamed one, because
the flush leaves L2 full of lines that are written back while the call reads, and because the call cannot load weights
before the flush has ended. Rate and share of the floor are of the time to the left of them. Peers that were timed warm
alone compare with the warm column.

{product_markdown(record)}

{gpu_provenance(record)}"""


def measured(name: str) -> dict | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def layer_products() -> str:
    """The section on the products of one layer as a chain; nothing before it was measured."""
    record = measured("layer_products_h200")
    if record is None:
        return ""
    return f"""### The products of a layer as a chain

All matrix products of one V4-Flash CSA layer, the gate and the routed experts with them, one after another in a CUDA
graph, through {record["layers"]} layers with weights of their own. A product may load its weights before the one in
front of it has ended; one by one, cold, it cannot.

{layer_table(record)}

{gpu_provenance(record)}"""


def attention_and_index() -> str:
    """The section on attention and index picks; nothing before both were measured."""
    attention, index = measured("attention_h200"), measured("indexer_h200")
    if attention is None or index is None:
        return ""
    return f"""## Attention and index picks on an H200

`H` heads, `B` sequences of `S` query rows, 128 keys of the window and so many compressed entries. The peer is FlashMLA
without its metadata kernel (mixed form: SGLang), in microseconds of a warm call or, in prefill, TFLOP/s; it pads fewer
than 64 heads to 64.

{attention_gpu.markdown(attention)}

What bounds a form, in cycles by stage, and what was tried is on top of its kernel: `sparse_attention_split.cu` (few
rows), `sparse_attention.cu` (tiles of up to 32 heads) and `sparse_attention_wide.cu` (64 heads, and prefill) in
`dsv4_ops/csrc/attention`; which one runs when, in `dsv4_ops/ops/attention_workspace.py`.
{attention_picture(attention)}
{gpu_provenance(attention)}

Index picks: scores of all keys and the exact best k of them. The peers' time is that of three kernels: logits,
metadata and top-k.

{indexer_gpu.markdown(index["rows"])}

{gpu_provenance(index)}"""


def attention_picture(record: dict) -> str:
    """The chart and what it shows; nothing for a record without times at several contexts."""
    if not attention_gpu.curves(record["rows"]):
        return ""
    return f"""
A decode step against the length of context: a CSA layer attends to the best 512 of the entries of 4 tokens each, an HCA
layer to all entries of 128 tokens each. FlashMLA was measured at 32K.

![Time of attention from 1K to 1M tokens for window, CSA and HCA layers](docs/{attention_chart.TARGET.name})
"""


def whole_model() -> str:
    """The section on a decode step of the whole of V4-Flash; nothing before it was measured."""
    record = measured("decode_flash43_h200")
    if record is None:
        return ""
    return f"""### The whole of V4-Flash on one H200

All {len(record["layers"])} layers with {record["experts"]} of the 256 experts, which is what fits:
{record["weight_bytes"] / 1e9:.1f} GB of random weights, made on the device. Context, graph and formats as above. The
floor is what a step must read, at 4.7 TB/s; transformers is the time that its layers take on the same GPU, added up
({peers.load()["layers"]["source"]}).

{whole_markdown(record)}

{gpu_provenance(record)}"""


def decode_gpu() -> str:
    """The section on a decode step of four layers on an H200; nothing before it was measured."""
    record = measured("decode_flash4_h200")
    if record is None:
        return ""
    return f"""## A decode step on an H200

Four layers of V4-Flash ({", ".join(record["layers"])}) with random weights in the official format, embedding, head and
sampling, after {record["context"]} tokens, as one CUDA graph; its blocks as they are written, or each kind compiled
with the backend `dsv4` first. Shares are of the GPU time of a step called directly.

{decode_gpu_table(record)}

{gpu_provenance(record)}"""


def gpu_provenance(record: dict) -> str:
    gpu = record["gpu"]
    state = [f"{label} {gpu[key]}" for key, label in (("driver", "driver"), ("sm_clock", "clock")) if key in gpu]
    facts = [", ".join([gpu["name"], *state]), f"torch {record['torch']}, CUDA {record['cuda']}", record["date"]]
    source = f"csrc sha256 {record['csrc_sha256'][:12]}; `{record['command']}`."
    return f"{'; '.join(facts)}; {source} {record.get('note', '')}".rstrip()


def state_table() -> str:
    """Buffers of a layer in the packed formats, for the released head dimensions."""
    key, ratio = f"{KEY_BYTES / CSA_RATIO:g}", f"{ENTRY_BYTES / CSA_RATIO:g} (CSA), {ENTRY_BYTES / HCA_RATIO:.2f} (HCA)"
    states = f"{state_bytes(2 * CSA_RATIO, 2 * HEAD_DIM)} (CSA), {state_bytes(HCA_RATIO, HEAD_DIM)} (HCA)"
    rows = (
        ("`window_pool`", "all", "ring of the last tokens' KV", f"{ENTRY_BYTES} a token of the ring"),
        ("`compressed_pool`", "CSA, HCA", "one KV entry per 4 or 128 tokens", f"{ratio} a token"),
        ("`index_pool`", "CSA", "FP4 index keys of the same entries", f"{key} a token"),
        ("`compressor_state`", "CSA, HCA", "fp32 projections of the open groups", f"{states} a sequence"),
        ("`index_state`", "CSA", "the same for index keys", f"{state_bytes(2 * CSA_RATIO, 2 * INDEX_DIM)} a sequence"),
        ("`window_table`, `compressed_table`", "as the pools", "block tables, int32", "4 a page"),
    )
    lines = ["| buffer | blocks | holds | bytes |", "|---|---|---|---|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


REGIONS = {
    "state": state_table,
    "ops": op_table,
    "evaluation": lambda: results("evaluation_loss", evaluation_table),
    "decode": lambda: results("decode_cpu", decode_table),
    "kernels": kernels,
    "products": products,
    "layer-products": layer_products,
    "attention": attention_and_index,
    "decode-gpu": decode_gpu,
    "decode-whole": whole_model,
}


def filled(text: str) -> str:
    """README with every region generated anew. KeyError if a region has no generator."""

    def region(match: re.Match) -> str:
        content = REGIONS[match[2]]()
        return f"{match[1]}{content}{chr(10) if content else ''}{match[4]}"

    return REGION.sub(region, text)


def main() -> int:
    old = README.read_text(encoding="utf-8")
    new = filled(old)
    if sys.argv[1:] == ["--check"]:
        if new != old:
            print("README.md is not up to date; run python -m docs.readme_tables", file=sys.stderr)
        return int(new != old)
    README.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
