"""Milliseconds per decoded token on a CPU, batch 1, greedy: transformers eager beside this model, eager and compiled.

Every engine runs the same weights in a process of its own. The processes take turns, one round (prompt, then decode
steps) each, in an order that rotates, so that other load on the machine hits all of them alike; while one works the
others sleep. A step is timed from one token on the host to the next one on the host.

  transformers fp32, bf16   the checkpoint converted to bf16, which is what transformers makes of a quantised checkpoint
                            on a CPU; experts_implementation="eager", DynamicCache
  fp32, bf16                this model on the same conversion; fp32 is exact mode, bf16 keeps its caches packed
  as stored                 this model on the checkpoint itself, activations quantised as its format asks
  compiled by block         model.compile(): a graph for each kind of block
  compiled as one graph     torch.compile(model.decode_step, backend="dsv4", fullgraph=True)
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.record import BUILTIN, RESULTS, header, write
from model.config import ModelConfig
from model.convert import convert
from model.generation import prefill
from model.loading import load

SEED = 0
WARM_UP_STEPS = 4  # of each round, not counted


@dataclass(frozen=True)
class Engine:
    name: str
    weights: str  # "stored" | "bf16"
    transformers_dtype: torch.dtype | None = None  # None: this model
    compiled: str = ""  # "blocks" | "step"
    exact: bool = False  # fp32, nothing quantised


ENGINES = (
    Engine("transformers eager, fp32", "bf16", torch.float32),
    Engine("compiled by block, fp32", "bf16", compiled="blocks", exact=True),
    Engine("compiled as one graph, fp32", "bf16", compiled="step", exact=True),
    Engine("transformers eager, bf16", "bf16", torch.bfloat16),
    Engine("compiled by block, bf16", "bf16", compiled="blocks"),
    Engine("compiled as one graph, bf16", "bf16", compiled="step"),
    Engine("eager, as stored", "stored"),
    Engine("compiled by block, as stored", "stored", compiled="blocks"),
    Engine("compiled as one graph, as stored", "stored", compiled="step"),
)
Round = Callable[[list[int], int], Iterator[int]]  # prompt, steps -> tokens as they reach the host


def transformers_round(directory: Path, dtype: torch.dtype) -> Round:
    from transformers import DeepseekV4ForCausalLM, DynamicCache

    model = DeepseekV4ForCausalLM.from_pretrained(directory, dtype=dtype, experts_implementation="eager").eval()

    def run(prompt: list[int], steps: int) -> Iterator[int]:
        cache = DynamicCache(config=model.config)
        tokens = torch.tensor([prompt])
        for _ in range(steps + 1):
            logits = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            tokens = logits[:, -1:].argmax(-1)
            yield int(tokens)

    return run


def our_round(directory: Path, engine: Engine, capacity: int) -> Round:
    model = load(directory, max_batch=1, max_seq_len=capacity, exact=engine.exact)
    if engine.compiled == "blocks":
        model.compile()
    step = (
        torch.compile(model.decode_step, backend="dsv4", fullgraph=True)
        if engine.compiled == "step"
        else model.decode_step
    )
    state = model.state

    def run(prompt: list[int], steps: int) -> Iterator[int]:
        state.reset()
        state.eos.fill_(-1)  # never stop
        state.active.fill_(True)
        yield int(model.sample_next(prefill(model, [prompt]), state.active.clone()))
        for _ in range(steps):
            yield int(step())

    return run


@torch.no_grad()
def serve(pipe, engine: Engine, directory: Path, cache: str, threads: int, prompt: list[int], steps: int) -> None:
    """Process of one engine: for every message run a round and answer with the seconds of each token."""
    torch.set_num_threads(threads)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # empty at first: compile times are cold
    if engine.transformers_dtype is not None:
        run = transformers_round(directory, engine.transformers_dtype)
    else:
        run = our_round(directory, engine, len(prompt) + steps + 1)
    pipe.send("loaded")
    while pipe.recv() == "round":
        times = [time.perf_counter()]
        for _ in run(prompt, steps):
            times.append(time.perf_counter())
        pipe.send([end - start for start, end in zip(times[:-1], times[1:], strict=True)])


def measure(directories: dict[str, Path], work: Path, arguments: argparse.Namespace) -> dict[str, dict]:
    """Start all engines, let them take turns, return what each needed."""
    prompt = make_prompt(arguments.checkpoint, arguments.prompt_tokens)
    spawn = multiprocessing.get_context("spawn")
    pipes = {}
    for engine in ENGINES:
        pipes[engine], child = spawn.Pipe()
        cache = tempfile.mkdtemp(dir=work)
        task = (child, engine, directories[engine.weights], cache, arguments.threads, prompt, arguments.steps)
        spawn.Process(target=serve, args=task, daemon=True).start()
        child.close()
        pipes[engine].recv()
    seconds = {engine: [] for engine in ENGINES}
    with tqdm(total=(arguments.rounds + 1) * len(ENGINES), desc="rounds", unit="round") as bar:
        for number in range(arguments.rounds + 1):  # round 0 compiles and warms up
            first = number % len(ENGINES)
            for engine in (*ENGINES[first:], *ENGINES[:first]):
                bar.set_postfix_str(engine.name)
                pipes[engine].send("round")
                seconds[engine].append(pipes[engine].recv())
                bar.update()
    for pipe in pipes.values():
        pipe.send("stop")
    return {engine.name: summary(engine, seconds[engine]) for engine in ENGINES}


def summary(engine: Engine, rounds: list[list[float]]) -> dict:
    """Medians in ms; compile time is what the first round took longer than the others."""
    decode = [[1e3 * step for step in steps[1 + WARM_UP_STEPS :]] for steps in rounds[1:]]
    pooled = [step for steps in decode for step in steps]
    later = statistics.median(sum(steps) for steps in rounds[1:])
    return {
        "weights": engine.weights,
        "ms_per_token": round(statistics.median(pooled), 3),
        "ms_per_token_of_rounds": [round(statistics.median(steps), 3) for steps in decode],
        "ms_prompt": round(1e3 * statistics.median(steps[0] for steps in rounds[1:]), 3),
        "compile_seconds": round(sum(rounds[0]) - later, 1) if engine.compiled else None,
    }


def make_prompt(directory: Path, length: int) -> list[int]:
    """Random tokens behind the begin-of-sentence token: what a step costs does not depend on them."""
    config = ModelConfig.from_directory(directory)
    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(2, config.vocab_size, (length,), generator=generator).tolist()
    return tokens if config.bos_token_id is None else [config.bos_token_id, *tokens[1:]]


def markdown(record: dict) -> str:
    """The table of the README; a row is set against transformers in the same dtype, bf16 for the stored format."""
    engines = record["engines"]
    lines = ["| engine | ms per token | against transformers in the same dtype | compile time |", "|---|--:|--:|--:|"]
    for name, result in engines.items():
        compiling = "" if result["compile_seconds"] is None else f"{result['compile_seconds']:.0f} s"
        judge = engines[f"transformers eager, {'fp32' if name.endswith('fp32') else 'bf16'}"]["ms_per_token"]
        lines.append(f"| {name} | {result['ms_per_token']:.2f} | {result['ms_per_token'] / judge:.2f} | {compiling} |")
    lines += [
        "",
        f"Batch 1, {record['prompt_tokens']} prompt tokens, {record['steps']} steps, {record['rounds']} rounds.",
    ]
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.decode_cpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", nargs="?", type=Path, default=BUILTIN, help="directory (default model/builtin)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all CPUs")
    parser.add_argument("--prompt-tokens", type=int, default=64, metavar="N")
    parser.add_argument("--steps", type=int, default=64, metavar="N", help="decode steps of a round (default 64)")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="of each engine, after one to warm up")
    parser.add_argument("--out", type=Path, default=RESULTS / "decode_cpu.json", metavar="FILE.json")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    record = header("benchmarks.decode_cpu", arguments.checkpoint)
    with tempfile.TemporaryDirectory() as work:
        twin = Path(work) / "bf16"
        convert(arguments.checkpoint, twin, "bf16")
        engines = measure({"stored": arguments.checkpoint, "bf16": twin}, Path(work), arguments)
    record |= {"prompt_tokens": arguments.prompt_tokens, "steps": arguments.steps, "rounds": arguments.rounds}
    record |= {"engines": engines}
    print(markdown(record))
    write(arguments.out, record)


if __name__ == "__main__":
    main()
