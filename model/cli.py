"""Command line: dsv4 generate | logits | convert | build | bench | info.

What a user can get wrong is a UserError: one line on stderr, exit status 2, nothing written.
"""

import argparse
import os
import sys
from pathlib import Path

import torch

from benchmarks.op_bench import add_bench
from dsv4_ops.registry import MissingKernelError
from model.config import ModelConfig
from model.decoding import make_decoder
from model.errors import UserError
from model.generation import Sampling, check_prompts, generate
from model.info import print_info
from model.loading import DEFAULT_CHUNK, load
from model.logits import compute_logits, read_tokens, write_logits
from model.tokenizer import TextStream, Tokenizer

BUILTIN = Path(__file__).parent / "builtin"


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    try:
        arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the interpreter would flush once more at exit, and complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (UserError, MissingKernelError, OSError) as error:  # an OSError names its file: no permission, disk full
        print(f"dsv4: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dsv4: interrupted", file=sys.stderr)
        return 130
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dsv4", description="DeepSeek-V4 inference: every kernel an operator, one graph."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_generate(commands)
    _add_logits(commands)
    _add_convert(commands)
    _add_build(commands)
    add_bench(commands)
    info = commands.add_parser("info", help="what is installed and built, for which GPU; put it into bug reports")
    info.set_defaults(run=lambda arguments: print_info())
    return parser


def _add_generate(commands) -> None:
    parser = commands.add_parser("generate", help="continue prompts", description="Continue prompts; streams the text.")
    parser.set_defaults(run=run_generate)
    parser.add_argument(
        "checkpoint", nargs="?", type=Path, default=BUILTIN, help="directory (default: the built-in model)"
    )
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="repeat for several sequences")
    parser.add_argument(
        "--prompt-ids", action="append", default=[], metavar="IDS", help="token ids, comma separated, used as they are"
    )
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0 is greedy (default 0.8)")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="keep the K best tokens (default 0: all)")
    parser.add_argument(
        "--top-p", type=float, default=0.95, metavar="P", help="keep this much probability (default 0.95)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--batch", type=int, metavar="B", help="sequences the state holds (default: as many as prompts)"
    )
    parser.add_argument(
        "--max-seq-len", type=int, metavar="N", help="positions the state holds (default: what is needed)"
    )
    _add_model_options(parser)


def _add_logits(commands) -> None:
    parser = commands.add_parser(
        "logits",
        help="logits of given tokens, to compare with other engines",
        description="Read int64 `tokens` [B, T], run N positions as prefill and the rest one decode step at a time, "
        "write float32 `logits` [B, T, vocab].",
    )
    parser.set_defaults(run=run_logits)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--tokens", type=Path, required=True, metavar="IN.safetensors")
    parser.add_argument("--out", type=Path, required=True, metavar="OUT.safetensors")
    parser.add_argument("--prefill", type=int, metavar="N", help="positions to prefill (default: all)")
    parser.add_argument("--batch", type=int, metavar="B", help="sequences the state holds (default: those of the file)")
    parser.add_argument("--max-seq-len", type=int, metavar="N", help="positions the state holds (default: T)")
    _add_model_options(parser)


def _add_convert(commands) -> None:
    parser = commands.add_parser("convert", help="write a checkpoint in another weight format")
    parser.set_defaults(run=run_convert)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path, help="directory to make; must not exist")
    parser.add_argument(
        "--format", required=True, choices=("bf16", "fp32", "official", "nvfp4-experts", "nvfp4"),
        help="official: FP8 linears, MXFP4 experts; nvfp4-experts: FP8 linears, NVFP4 experts; nvfp4: all linears",
    )  # fmt: skip
    parser.add_argument(
        "--requantize",
        action="store_true",
        help="round MXFP4 weights whose exponents do not fit NVFP4 instead of failing",
    )


def _add_build(commands) -> None:
    parser = commands.add_parser(
        "build",
        help="compile the CUDA kernels ahead of time; needs no GPU",
        description="Compile the CUDA kernels into the cache ($DSV4_CACHE, default ~/.cache/dsv4_ops). Without this "
        "they are compiled when the package is first imported on a machine with a GPU.",
    )
    parser.set_defaults(run=run_build)
    parser.add_argument(
        "--archs", metavar="LIST", help="90a, 100a or '90a;100a' (default: $DSV4_ARCHS, else those of the visible GPUs)"
    )


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", default="cpu", help="cpu, cuda or cuda:N (default cpu); on a GPU decode steps are one CUDA graph"
    )
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=False,
        help="torch.compile each kind of block (backend dsv4); takes a minute on a CPU, needs a C++ compiler",
    )  # fmt: skip
    parser.add_argument(
        "--chunk", type=int, default=DEFAULT_CHUNK, metavar="N", help=f"prefill rows (default {DEFAULT_CHUNK})"
    )
    parser.add_argument(
        "--exact", action="store_true", help="fp32, no quantisation of activations, caches and index keys"
    )
    parser.add_argument("--index-fp8", action="store_true", help="keep index keys in FP8 instead of FP4")


def load_model(arguments: argparse.Namespace, batch: int, max_seq_len: int):
    model = load(
        arguments.checkpoint,
        device=arguments.device,
        max_batch=batch,
        max_seq_len=max_seq_len,
        max_chunk=arguments.chunk,
        exact=arguments.exact,
        index_fp8=arguments.index_fp8,
        progress=sys.stderr.isatty(),
    )
    if arguments.compile:
        if model.storage.device.type == "cpu":
            check_compiler()
        model.compile()
    return model


def check_compiler() -> None:
    """On a CPU Inductor writes C++."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise UserError("--compile needs a C++ compiler (g++ or clang++, or CXX set to one)") from None


def run_generate(arguments: argparse.Namespace) -> None:
    config = ModelConfig.from_directory(arguments.checkpoint)
    tokenizer = Tokenizer.find(arguments.checkpoint, config.bos_token_id, required=bool(arguments.prompt))
    prompts = [tokenizer.encode(text) for text in arguments.prompt] + [parse_ids(ids) for ids in arguments.prompt_ids]
    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed)
    longest = max((len(prompt) for prompt in prompts), default=0)
    sizes = (
        max(len(prompts), 1) if arguments.batch is None else arguments.batch,
        longest + max(arguments.max_new_tokens, 1) if arguments.max_seq_len is None else arguments.max_seq_len,
    )
    check_prompts(prompts, arguments.max_new_tokens, config.vocab_size, *sizes)
    model = load_model(arguments, *sizes)
    decoder = make_decoder(model, progress=sys.stderr.isatty())
    tokens = generate(model, prompts, arguments.max_new_tokens, sampling, decoder)
    stream_text(tokens, tokenizer, arguments.prompt, len(prompts))


def stream_text(tokens, tokenizer: Tokenizer | None, texts: list[str], sequences: int) -> None:
    """One sequence is written as it grows, several are written whole, in order, as they become complete."""
    streams = [TextStream(tokenizer) for _ in range(sequences)]
    collected = [texts[index] if index < len(texts) else "" for index in range(sequences)]
    if sequences == 1:
        print(collected[0], end="", flush=True)
    for sequence, token in tokens:
        piece = streams[sequence].push(token)
        collected[sequence] += piece
        if sequences == 1:
            print(piece, end="", flush=True)
    for sequence, stream in enumerate(streams):
        rest = stream.finish()
        print(rest if sequences == 1 else f"[{sequence}] {collected[sequence]}{rest}")


def parse_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise UserError(f"--prompt-ids wants comma-separated integers, got {text!r}") from None


def run_logits(arguments: argparse.Namespace) -> None:
    config = ModelConfig.from_directory(arguments.checkpoint)
    tokens = read_tokens(arguments.tokens, config.vocab_size)
    batch, length = tokens.shape
    prefill = length if arguments.prefill is None else arguments.prefill
    if not 0 <= prefill <= length:
        raise UserError(f"--prefill must be between 0 and the {length} positions of the tokens, got {prefill}")
    sizes = (
        batch if arguments.batch is None else arguments.batch,
        length if arguments.max_seq_len is None else arguments.max_seq_len,
    )
    if batch > sizes[0] or length > sizes[1]:
        raise UserError(
            f"tokens [{batch}, {length}] do not fit into a state of {sizes[0]} sequences of {sizes[1]} positions"
        )
    if not arguments.out.parent.is_dir():
        raise UserError(f"{arguments.out.parent} is not a directory; make it first")
    if arguments.out.is_dir():
        raise UserError(f"{arguments.out} is a directory; --out names the file to write")
    model = load_model(arguments, *sizes)
    write_logits(arguments.out, compute_logits(model, tokens.to(torch.int64), prefill, progress=sys.stderr.isatty()))


def run_build(arguments: argparse.Namespace) -> None:
    from dsv4_ops.build import BuildError, build

    try:
        print(build(arguments.archs.split(";") if arguments.archs else None))
    except BuildError as error:
        raise UserError(str(error)) from None


def run_convert(arguments: argparse.Namespace) -> None:
    from model.convert import convert

    progress = sys.stderr.isatty()
    convert(arguments.source, arguments.target, arguments.format, requantize=arguments.requantize, progress=progress)
