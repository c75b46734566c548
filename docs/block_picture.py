"""Draw docs/block.svg: how one token flows through a block, with the names of the operators.

    python -m docs.block_picture            writes docs/block.svg
    python -m docs.block_picture --check    fails if docs/block.svg is not what this script draws

Boxes are operators of the official format; the colour says what kind. Shapes on arrows are those of one token. Sizes of
state are computed from the page layouts for the released head dimensions.
"""

import sys
from pathlib import Path

from docs.svg import Canvas, publish
from dsv4_ops.ops.pages import index_page_bytes, kv_entry_bytes

TARGET = Path(__file__).with_name("block.svg")
WIDTH, HEIGHT = 900, 1362
PRODUCT, GLUE = ("#dbeafe", "#2563eb"), ("#e7f5ec", "#2f855a")
WRITE, READ, STATE = ("#ffe8cc", "#d9480f"), ("#efe5ff", "#7c3aed"), ("#fff8d9", "#b08900")
PLAIN_LANE, CSA_LANE, BOTH_LANE = "#f5f7fa", "#f3f0fa", "#fbf4ec"

HEAD_DIM, ROPE_DIM, INDEX_DIM = 512, 64, 128
CSA_RATIO, HCA_RATIO = 4, 128
ENTRY_BYTES = sum(kv_entry_bytes(HEAD_DIM, ROPE_DIM))
KEY_BYTES = index_page_bytes(1, INDEX_DIM, fp8=False)

# columns: left edge, width
KV, QUERY, INDEX_QUERY, INDEX_KEY, COMPRESSOR = (40, 156), (212, 126), (360, 132), (508, 186), (712, 164)
LEFT, RIGHT = 40, 876
SPINE = (LEFT, 298)  # mHC and norms, over the columns KV and QUERY
SPINE_X = 189
STREAMS_X, MIX_X = 17, 28  # lines that go round a sub-layer


def centre(column: tuple[int, int]) -> float:
    return column[0] + column[1] / 2


def state_bytes(slots: int, width: int) -> str:
    """Compressor state of a sequence: key/value and score of `slots` tokens, fp32."""
    return f"{slots * 2 * width * 4 // 1024} KiB"


def heading(c: Canvas) -> None:
    c.text((LEFT, 34), "One token through a block", "title", "start")
    entries = (
        (PRODUCT, "matrix product"), (GLUE, "norm, rope, stream mix, quantiser"), (READ, "attends, selects"),
        (WRITE, "writes state"), (STATE, "state: pool or ring"),
    )  # fmt: skip
    x, y = 470, 62
    for number, (colours, label) in enumerate(entries):
        left, top = (x, y + 21 * number) if number < 3 else (x + 232, y + 21 * (number - 3))
        fill, stroke = colours
        c.add("rect", x=left, y=top, width=20, height=13, rx=3, fill=fill, stroke=stroke, stroke_width=1.3)
        c.text((left + 27, top + 10.5), label, anchor="start")
    c.line((x + 232, y + 48.5), (x + 252, y + 48.5), class_="streams")
    c.text((x + 259, y + 52.5), "residual streams", anchor="start")
    c.text((x, 34), "Shapes are per token. d: hidden size, n = 4 streams, H heads, k chosen.", anchor="start")


def before_sub_layer(c: Canvas, y: float, arriving: str) -> float:
    """Streams arrive at y, hc_pre, rms_norm; returns the bottom of rms_norm. The lines that go round start here."""
    c.line((SPINE_X, y), (SPINE_X, y + 36), class_="streams")
    c.text((SPINE_X + 10, y + 15), arriving, "shape", "start")
    c.box((SPINE[0], y + 36, SPINE[1], 40), ("hc_pre · sinkhorn",), GLUE, "n streams to one; weights of the mix")
    c.line((SPINE_X, y + 76), (SPINE_X, y + 102))
    c.text((SPINE_X + 8, y + 93), "[d]", "shape", "start")
    c.box((SPINE[0], y + 102, SPINE[1], 28), ("rms_norm",), GLUE)
    return y + 130


def after_sub_layer(c: Canvas, start: float, y: float) -> None:
    """hc_post at y, where the streams from `start` and the weights of the mix from hc_pre come back."""
    left = LEFT + 112
    c.line((SPINE_X, start + 12), (STREAMS_X, start + 12), (STREAMS_X, y + 31), (left, y + 31), class_="streams")
    c.line((LEFT, start + 56), (MIX_X, start + 56), (MIX_X, y + 9), (left, y + 9), class_="mix")
    c.text((MIX_X + 10, y + 4), "post, comb", "shape", "start")
    c.text((MIX_X + 10, y + 25), "streams [n, d]", "shape", "start")
    c.box((left, y, RIGHT - left, 40), ("hc_post",), GLUE, "new streams = post · f + combᵀ · streams")


def attention_inputs(c: Canvas, norm_bottom: float) -> None:
    """Quantised x to the query and the window key, x itself to the compressors."""
    c.line((SPINE_X, norm_bottom), (SPINE_X, 248))
    c.box((SPINE[0], 248, SPINE[1], 28), ("quant_fp8",), GLUE)
    for column in (KV, QUERY):
        c.line((centre(column), 276), (centre(column), 306))
        c.text((centre(column) + 8, 294), "FP8 [d]", "shape", "start")
    bus = norm_bottom - 14
    c.line((SPINE[0] + SPINE[1], bus), (centre(COMPRESSOR), bus), (centre(COMPRESSOR), 306))
    c.text((SPINE[0] + SPINE[1] + 10, bus - 6), "x [d] bf16", "shape", "start")
    for x in (centre(INDEX_QUERY), centre(INDEX_KEY)):
        c.line((x, bus), (x, 306))
        c.add("circle", cx=x, cy=bus, r=2.6, fill="#475569")


def window_column(c: Canvas) -> None:
    x, width = KV
    c.box((x, 306, width, 40), ("linear_fp8",), PRODUCT, "wkv")
    c.line((centre(KV), 346), (centre(KV), 374))
    c.text((centre(KV) + 8, 364), "kv [512]", "shape", "start")
    c.box((x, 374, width, 40), ("kv_norm_rope_append",), WRITE, "norm, rope, FP8, insert")
    c.line((centre(KV), 414), (centre(KV), 452))
    c.store((x, 452, width, 62), "window_pool", (f"{ENTRY_BYTES} bytes a token", "a ring of window + chunk"), STATE)
    c.line((centre(KV), 514), (centre(KV), 672))


def query_column(c: Canvas) -> None:
    x, width = QUERY
    middle = centre(QUERY)
    c.box((x, 306, width, 40), ("linear_fp8",), PRODUCT, "wq_a")
    c.line((middle, 346), (middle, 374))
    c.text((middle + 8, 364), "[q rank]", "shape", "start")
    c.box((x, 374, width, 40), ("rms_norm", "quant_fp8"), GLUE)
    c.line((middle, 414), (middle, 452))
    c.text((middle + 8, 436), "FP8", "shape", "start")
    c.box((x, 452, width, 40), ("linear_fp8",), PRODUCT, "wq_b")
    c.line((middle, 492), (middle, 520))
    c.text((middle + 8, 510), "[H, 512]", "shape", "start")
    c.box((x, 520, width, 40), ("q_norm_rope",), GLUE, "per head")
    c.line((middle, 560), (middle, 672))
    c.text((middle - 8, 620), "q [H, 512]", "shape", "end")


def index_columns(c: Canvas) -> None:
    """Left: index queries of the token. Right: index keys of the compressed entries. Below: the selection."""
    x, width = INDEX_QUERY
    beside = x + width - 14  # the head weights pass wq_b here
    c.box((x, 306, width, 40), ("linear_fp32",), PRODUCT, "weights_proj")
    c.line((beside, 346), (beside, 452))
    c.text((beside - 6, 364), "[64]", "shape", "end")
    c.line((QUERY[0] + QUERY[1], 394), (x, 394))
    c.box((x, 374, width - 30, 40), ("linear_fp8",), PRODUCT, "wq_b")
    c.line((x + 40, 414), (x + 40, 452))
    c.text((x + 46, 436), "[64, 128]", "shape", "start")
    c.box((x, 452, width, 40), ("index_query_fp4",), GLUE, "rope, Hadamard, FP4")
    c.line((centre(INDEX_QUERY), 492), (centre(INDEX_QUERY), 588))
    c.text((centre(INDEX_QUERY) + 8, 546), "q4, w", "shape", "start")
    x, width = INDEX_KEY
    middle = centre(INDEX_KEY)
    c.box((x, 306, width, 40), ("linear_fp32",), PRODUCT, "compressor wkv, wgate")
    c.line((middle, 346), (middle, 374))
    c.text((middle - 8, 364), "kv, score [256]", "shape", "end")
    c.box((x, 374, width, 40), ("index_compress_append_fp4",), WRITE, "norm, rope, Hadamard, FP4")
    c.line((middle, 414), (middle, 452))
    size = state_bytes(2 * CSA_RATIO, 2 * INDEX_DIM)
    c.store((x, 452, width, 48), "index_state", (f"{size} a sequence",), STATE)
    c.store((x, 510, width, 48), "index_pool", (f"{KEY_BYTES / CSA_RATIO:g} bytes a token",), STATE)
    c.line((middle, 558), (middle, 588))
    left = INDEX_QUERY[0]
    c.box((left, 588, x + width - left, 40), ("index_topk_fp4",), READ, "scores of all visible entries, exact top-k")
    c.line(((left + x + width) / 2, 628), ((left + x + width) / 2, 672))
    c.text(((left + x + width) / 2 + 8, 654), "indices [k]", "shape", "start")


def compressor_column(c: Canvas) -> None:
    x, width = COMPRESSOR
    middle = centre(COMPRESSOR)
    c.box((x, 306, width, 40), ("linear_fp32",), PRODUCT, "compressor wkv, wgate")
    c.line((middle, 346), (middle, 374))
    c.text((middle - 8, 364), "kv, score", "shape", "end")
    c.box((x, 374, width, 54), ("csa_compress_append", "hca_compress_append"), WRITE, "ratio 4 | ratio 128")
    c.line((middle, 428), (middle, 452))
    sizes = [state_bytes(2 * CSA_RATIO, 2 * HEAD_DIM), state_bytes(HCA_RATIO, HEAD_DIM)]
    c.store((x, 452, width, 62), "compressor_state", (f"{sizes[0]} | {sizes[1]}", "a sequence"), STATE)
    sizes = f"{ENTRY_BYTES / CSA_RATIO:g} | {ENTRY_BYTES / HCA_RATIO:.1f} bytes a token"
    c.store((x, 524, width, 48), "compressed_pool", (sizes,), STATE)
    c.line((middle, 572), (middle, 672))


def attention_output(c: Canvas) -> None:
    names = ("sparse_attention_window", "sparse_attention_selected", "sparse_attention_compressed")
    c.box((LEFT, 672, RIGHT - LEFT, 74), (), READ)
    for number, (name, kind) in enumerate(zip(names, ("window block", "CSA block", "HCA block"), strict=True)):
        c.box((LEFT + 12 + 274 * number, 680, 264, 36), (name,), ("#ffffff", READ[1]), f"{kind}")
    note = (
        "one softmax over window entries and, in CSA and HCA, compressed entries; sink in the denominator; rope undone"
    )
    c.text(((LEFT + RIGHT) / 2, 735), note)
    places = ((LEFT, 178, "grouped_linear_w8a16", PRODUCT, "wo_a"), (338, 110, "quant_fp8", GLUE, ""),
              (556, 130, "linear_fp8", PRODUCT, "wo_b"))  # fmt: skip
    c.line((LEFT + 89, 746), (LEFT + 89, 776))
    c.text((LEFT + 97, 764), "o [H, 512]", "shape", "start")
    for x, width, name, colours, note in places:
        c.box((x, 776, width, 40), (name,), colours, note)
    c.line((218, 796), (338, 796))
    c.text((278, 790), "[G · rank]", "shape")
    c.line((448, 796), (556, 796))
    c.text((502, 790), "FP8", "shape")
    c.line((621, 816), (621, 846))
    c.text((629, 834), "f [d]", "shape", "start")


def formats(c: Canvas, y: float) -> None:
    """Which names stand for the boxes where a checkpoint is not in the official format."""
    c.text(
        (372, y),
        "Drawn is the official format: FP8 linears, MXFP4 experts, FP4 index keys. In others:",
        anchor="start",
    )
    rows = (
        ("bf16, fp32", "linear_dense, grouped_linear_dense, moe_dense"),
        ("FP8 experts", "moe_fp8"),
        ("NVFP4", "nvfp4_row_scale, quant_nvfp4, linear_nvfp4,"),
        ("", "grouped_linear_nvfp4, moe_nvfp4"),
        ("FP8 keys", "index_compress_append_fp8, index_query_fp8, index_topk_fp8"),
        ("fp32 keys", "index_compress_append_plain, index_query_plain, index_topk_plain"),
    )
    for number, (label, names) in enumerate(rows):
        c.text((372, y + 18 + 15 * number), label, anchor="start")
        c.text((450, y + 18 + 15 * number), names, "variant", "start")
    c.text((736, y + 18), "and no quantisers", anchor="start")


def moe(c: Canvas, norm_bottom: float) -> None:
    top = norm_bottom + 34
    c.lane((LEFT - 8, top - 24, RIGHT - LEFT + 16, 150), ("mixture of experts",), PLAIN_LANE, "end")
    c.line((SPINE_X, norm_bottom), (SPINE_X, top - 14), (118, top - 14), (118, top))
    c.line((SPINE_X, top - 14), (centre((212, 126)), top - 14), (centre((212, 126)), top))
    c.box((40, top, 156, 40), ("gate",), READ, "best k, or the hash table's")
    c.box((212, top, 126, 40), ("quant_fp8",), GLUE)
    c.line((118, top + 40), (118, top + 76))
    c.text((126, top + 62), "ids, weights [k]", "shape", "start")
    c.line((275, top + 40), (275, top + 76))
    c.text((283, top + 62), "FP8 [d]", "shape", "start")
    c.box((40, top + 76, 298, 40), ("moe_mxfp4",), PRODUCT, "k experts: w1, w3, SwiGLU, FP8, w2; fp32 sum")
    c.line((338, top + 20), (448, top + 20))
    c.text((393, top + 14), "FP8 [d]", "shape")
    chain = ((448, 100, "linear_fp8", PRODUCT, "w1, w3"), (588, 76, "swiglu", GLUE, ""),
             (700, 92, "quant_fp8", GLUE, ""))  # fmt: skip
    for x, width, name, colours, note in chain:
        c.box((x, top, width, 40), (name,), colours, note)
    c.line((548, top + 20), (588, top + 20))
    c.line((664, top + 20), (700, top + 20))
    c.line((746, top + 40), (746, top + 76))
    c.box((696, top + 76, 100, 40), ("linear_fp8",), PRODUCT, "w2")
    c.add("circle", cx=520, cy=top + 96, r=12, fill="#ffffff", stroke="#475569", stroke_width=1.4)
    c.line((514, top + 96), (526, top + 96), class_="stem")
    c.line((520, top + 90), (520, top + 102), class_="stem")
    c.line((338, top + 96), (508, top + 96))
    c.line((696, top + 96), (532, top + 96))
    c.text((423, top + 90), "routed [d] fp32", "shape")
    c.text((614, top + 90), "shared [d]", "shape")
    c.line((520, top + 108), (520, top + 148))
    c.text((528, top + 134), "f [d]", "shape", "start")


def ends(c: Canvas, y: float) -> None:
    """What comes before the first and after the last block."""
    c.line((SPINE_X, y - 46), (SPINE_X, y - 14), class_="streams")
    c.text((SPINE_X + 10, y - 28), "streams [n, d], to the next block", "shape", "start")
    c.lane((LEFT - 12, y - 8, RIGHT - LEFT + 24, 74), ("after the last block",), PLAIN_LANE)
    chain = ((40, "hc_head", GLUE, "n streams to one"), (252, "rms_norm", GLUE, ""),
             (464, "linear_fp32", PRODUCT, "head"), (676, "sample", READ, "greedy, top-k, top-p"))  # fmt: skip
    for x, name, colours, note in chain:
        c.box((x, y + 17, 150, 40), (name,), colours, note)
    for x, label in ((190, "[d]"), (402, "[d]"), (614, "logits")):
        c.line((x, y + 37), (x + 62, y + 37))
        c.text((x + 29, y + 31), label, "shape")
    c.line((826, y + 37), (876, y + 37))
    c.text((850, y + 31), "token", "shape")


def draw() -> str:
    c = Canvas(WIDTH, HEIGHT, "How one token flows through a block of DeepSeek-V4, with the operators' names")
    heading(c)
    c.lane((LEFT - 8, 212, 314, 436), ("every block",), PLAIN_LANE)
    c.lane((INDEX_QUERY[0] - 8, 212, 350, 436), ("CSA", "indexer"), CSA_LANE)
    c.lane((COMPRESSOR[0] - 6, 212, 176, 436), ("CSA | HCA", "compressor"), BOTH_LANE)
    norm_bottom = before_sub_layer(c, 56, "streams [n, d], from the block before")
    attention_inputs(c, norm_bottom)
    window_column(c)
    query_column(c)
    index_columns(c)
    compressor_column(c)
    attention_output(c)
    after_sub_layer(c, 56, 846)
    norm_bottom = before_sub_layer(c, 886, "streams [n, d]")
    formats(c, 912)
    moe(c, norm_bottom)
    after_sub_layer(c, 886, norm_bottom + 182)
    ends(c, norm_bottom + 182 + 86)
    return str(c)


def main() -> int:
    return publish(TARGET, draw(), nothing="")


if __name__ == "__main__":
    sys.exit(main())
