"""Mean next-token loss on a text, of one checkpoint in several formats: what each format costs in accuracy.

The text is cut into documents of the same number of tokens, each behind a begin-of-sentence token; every token of the
text is predicted once, from its document alone. Conversions are made with `model.convert` in a temporary directory.
"Everything else" in the table is what is not a weight: activations in front of quantised products, caches.
"""

import argparse
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from math import exp
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.record import BUILTIN, RESULTS, header, weights, write
from model.config import ModelConfig
from model.convert import convert
from model.loading import load
from model.tokenizer import Tokenizer
from model.transformer import DeepseekV4

TRAINED, STORED = "as trained", "as stored"


@dataclass(frozen=True)
class Row:
    """source: whose weights, the reference's or the checkpoint's; format: what `convert` makes of them first."""

    weights: str
    rest: str
    source: str
    format: str | None = None
    exact: bool = False
    quantise_activations: bool = True
    index_fp8: bool = False


CACHES = "KV FP8, index keys FP4"
ROWS = (
    Row("bf16, as trained", "fp32, nothing quantised", TRAINED, exact=True),
    Row("bf16, as trained", f"bf16; {CACHES}", TRAINED),
    Row("official (FP8, MXFP4 experts)", "fp32, nothing quantised", STORED, "official", exact=True),
    Row("its bf16 twin", f"bf16; {CACHES}", STORED, "bf16"),
    Row("official", f"bf16; {CACHES}", STORED, "official", quantise_activations=False),
    Row("official", f"FP8; {CACHES}", STORED, "official"),
    Row("official", "FP8; KV FP8, index keys FP8", STORED, "official", index_fp8=True),
    Row("NVFP4 experts, from official", f"FP8, NVFP4 in experts; {CACHES}", STORED, "nvfp4-experts"),
    Row("NVFP4, from official", f"NVFP4; {CACHES}", STORED, "nvfp4"),
    Row("NVFP4 experts, from as trained", f"FP8, NVFP4 in experts; {CACHES}", TRAINED, "nvfp4-experts"),
    Row("NVFP4, from as trained", f"NVFP4; {CACHES}", TRAINED, "nvfp4"),
)


def documents(ids: list[int], length: int, bos: list[int]) -> Iterator[list[int]]:
    """Parts of the text of `length` tokens each, the begin-of-sentence token included."""
    step = length - len(bos)
    for start in range(0, len(ids), step):
        yield bos + ids[start : start + step]


@torch.no_grad()
def document_losses(model: DeepseekV4, batch: list[list[int]]) -> list[float]:
    """Sum of -log p over the tokens of each document, its first left out."""
    rows, length = model.state.sizes.max_batch, max(len(document) for document in batch)
    tokens = torch.zeros(rows, length, dtype=torch.int64)
    positions = torch.full((rows, length), -1, dtype=torch.int32)
    for row, document in enumerate(batch):
        tokens[row, : len(document)] = torch.tensor(document)
        positions[row, : len(document)] = torch.arange(len(document), dtype=torch.int32)
    model.state.reset()
    logits = model.logits(model(tokens, positions))
    ends = [len(document) for document in batch]
    return [float(loss(logits[row, : end - 1], tokens[row, 1:end])) for row, end in enumerate(ends)]


def loss(logits: Tensor, targets: Tensor) -> Tensor:
    """logits [S, vocab], targets [S] -> sum of the cross entropies, float64."""
    return torch.nn.functional.cross_entropy(logits.double(), targets, reduction="sum")


def evaluate(row: Row, directory: Path, texts: list[list[int]], arguments: argparse.Namespace, bar: tqdm) -> Tensor:
    """Loss in nats of each document under one format, float64."""
    model = load(
        directory,
        max_batch=arguments.batch,
        max_seq_len=arguments.tokens,
        max_chunk=arguments.tokens,
        exact=row.exact,
        quantise_activations=row.quantise_activations,
        index_fp8=row.index_fp8,
    )
    losses = []
    for start in range(0, len(texts), arguments.batch):
        batch = texts[start : start + arguments.batch]
        losses += document_losses(model, batch)
        bar.update(len(batch))
    return torch.tensor(losses, dtype=torch.float64)


def summary(row: Row, losses: Tensor, first: Tensor, tokens: int, size: int) -> dict:
    """Means, and the difference to the first row with the standard error that the spread over documents gives."""
    difference = losses - first
    return {
        "weights": row.weights,
        "everything_else": row.rest,
        "nats_per_token": float(losses.sum()) / tokens,
        "nats_per_byte": float(losses.sum()) / size,
        "difference_per_token": float(difference.sum()) / tokens,
        "difference_standard_error": float(difference.std()) * len(losses) ** 0.5 / tokens,
    }


def converted(row: Row, source: Path, work: Path, rounded: dict[str, int]) -> Path:
    """The directory with the weights of a row; made when first asked for."""
    if row.format is None:
        return source
    target = work / f"{row.source} {row.format}"
    if not target.exists():
        rounded[target.name] = len(convert(source, target, row.format, requantize=True, progress=False))
    return target


def markdown(record: dict) -> str:
    """The table of the README; the last column is the difference to the first row and its standard error."""
    lines = [
        "| weights | everything else | nats per token | nats per byte | perplexity | difference per token |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for row in record["rows"]:
        token, byte = row["nats_per_token"], row["nats_per_byte"]
        difference = f"{row['difference_per_token']:+.4f} ± {row['difference_standard_error']:.4f}"
        values = f"{token:.4f} | {byte:.4f} | {exp(token):.2f} | {difference}"
        lines.append(f"| {row['weights']} | {row['everything_else']} | {values} |")
    text, length = record["text"], record["document_tokens"]
    lines += ["", f"{text['tokens']} tokens ({text['bytes']} bytes) in documents of {length} tokens."]
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evaluation_loss",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", nargs="?", type=Path, default=BUILTIN, help="directory (default model/builtin)")
    parser.add_argument("--text", type=Path, default=BUILTIN / "eval.txt", help="default model/builtin/eval.txt")
    parser.add_argument(
        "--reference", type=Path, metavar="DIR", help="the checkpoint before quantisation, for more rows"
    )
    parser.add_argument("--tokens", type=int, default=512, metavar="N", help="of a document (default 512)")
    parser.add_argument("--batch", type=int, default=4, metavar="B", help="documents computed together (default 4)")
    parser.add_argument("--documents", type=int, metavar="N", help="use only the first N")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all CPUs")
    parser.add_argument("--out", type=Path, default=RESULTS / "evaluation_loss.json", metavar="FILE.json")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    record = header("benchmarks.evaluation_loss", arguments.checkpoint)
    tokenizer = Tokenizer(arguments.checkpoint, ModelConfig.from_directory(arguments.checkpoint).bos_token_id)
    ids = tokenizer.encode(arguments.text.read_text(encoding="utf-8"))[len(tokenizer.bos) :]
    texts = list(documents(ids, arguments.tokens, tokenizer.bos))[: arguments.documents]
    predicted = [token for document in texts for token in document[1:]]
    tokens, size = len(predicted), len(tokenizer.decode(predicted).encode())
    sources = {STORED: arguments.checkpoint, TRAINED: arguments.reference}
    rows = [row for row in ROWS if sources[row.source] is not None]
    losses, results, rounded = [], [], {}
    with tempfile.TemporaryDirectory() as work, tqdm(total=len(rows) * len(texts), unit="document") as bar:
        for row in rows:
            bar.set_postfix_str(f"{row.weights} / {row.rest}")
            directory = converted(row, sources[row.source], Path(work), rounded)
            losses.append(evaluate(row, directory, texts, arguments, bar))
            results.append(summary(row, losses[-1], losses[0], tokens, size))
    if arguments.reference is not None:
        record["reference"] = weights(arguments.reference)
    record |= {"text": {"path": str(arguments.text), "tokens": tokens, "bytes": size}}
    record |= {"document_tokens": arguments.tokens, "rounded_mxfp4_weights": rounded, "rows": results}
    print(markdown(record))
    write(arguments.out, record)


if __name__ == "__main__":
    main()
