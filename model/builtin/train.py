"""Train the small built-in DeepSeek-V4 model on the King James Bible, on one CPU core.

The result is OUT/export, a checkpoint with the released key names (`model.safetensors` in bf16, `config.json`,
`tokenizer.json`): every mechanism of the architecture at the dimensions the kernels need (head 512, indexer 64 x 128,
window 128, ratios 0 / 4 / 128, hash and scored experts, mHC), 9.75 M parameters, English output.

What happens, in order: the text is split into chapters, every 50th chapter is held out (`eval.txt`), a byte-level BPE
tokenizer is trained, the model is trained with Muon (matrices) and AdamW (the rest) under bf16 autocast, exported,
loaded back with transformers and compared, evaluated, sampled.

Choices worth knowing:
* The text stream is cut into windows that start at a verse and get a BOS in front. Batches are 8 x 256 tokens, and
  4 x 512 for the last 30 % of the run so that several ratio-128 entries are visible and trained.
* CSA layers attend to all visible compressed entries during training. transformers gives the indexer no gradient, so
  on every 4th step it learns by KL to predict the attention mass over the compressed entries (inputs detached), as in
  DeepSeek sparse attention. The final evaluation prints what top-k selection costs against attending to everything.
* Expert balance by the auxiliary-loss-free bias: after each step the bias moves by the sign of the load error.

The default takes 75 minutes on one core with AVX512-BF16; `--minutes 15` already gives phrases. With glibc, the
environment MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8000000000 avoids most page faults.
"""

import argparse
import json
import math
import os
import time
from pathlib import Path

import torch
from corpus import BOS_ID, EOS_ID, Windows, read_books, split_held_out, train_tokenizer
from export import export, verify_export
from fast import accelerate
from hooks import TrainingHooks
from muon import Muon
from tokenizers import Tokenizer
from torch.nn import functional as F
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

PROMPTS = ["In the beginning", "And the LORD said", "The king"]
CONFIG = {
    "architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4", "vocab_size": 2048, "hidden_size": 256,
    "moe_intermediate_size": 128, "num_hidden_layers": 3, "num_hash_layers": 1, "num_nextn_predict_layers": 0,
    "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 512, "qk_rope_head_dim": 64, "q_lora_rank": 128,
    "o_groups": 2, "o_lora_rank": 128, "sliding_window": 128, "compress_ratios": [0, 4, 128], "index_n_heads": 64,
    "index_head_dim": 128, "index_topk": 64, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1,
    "scoring_func": "sqrtsoftplus", "topk_method": "noaux_tc", "norm_topk_prob": True, "routed_scaling_factor": 1.5,
    "swiglu_limit": 10.0, "hc_mult": 4, "hc_sinkhorn_iters": 20, "hc_eps": 1e-6, "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0, "compress_rope_theta": 160000.0,
    "rope_scaling": {"type": "yarn", "factor": 16, "original_max_position_embeddings": 65536,
                     "beta_fast": 32, "beta_slow": 1},
    "max_position_embeddings": 4096, "bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}  # fmt: skip


def build_model(config_dir: Path, generator: torch.Generator) -> DeepseekV4ForCausalLM:
    """The model in fp32 with our initialisation, from the hub-spelled config.json."""
    config = DeepseekV4Config.from_pretrained(config_dir)
    rope = config.rope_parameters["compress"]
    assert rope["rope_type"] == "yarn" and rope["factor"] == 16 and rope["attention_factor"] == 1.0, rope
    model = DeepseekV4ForCausalLM._from_config(config, dtype=torch.float32, experts_implementation="eager")
    with torch.no_grad():
        for name, p in model.named_parameters():
            initialise(name, p, generator)
        for layer in model.model.layers:
            if layer.mlp.is_hash:
                fill_hash_table(layer.mlp.gate.tid2eid, config.n_routed_experts, generator)
    return model


def initialise(name: str, p: torch.Tensor, generator: torch.Generator) -> None:
    """Matrices at 1/sqrt(fan in), outputs of sub-layers and the head at zero, mHC so that the streams start as one."""
    quarter = -math.log(3.0)  # sigmoid = 1/4: the average of the four streams
    if name.endswith(("hc.fn", "hc_fn")):
        p.copy_(torch.randn(p.shape, generator=generator) * 0.02)
    elif name.endswith(("hc.scale", "hc_scale")):
        p.fill_(0.1)
    elif name.endswith("hc_base"):
        p.fill_(quarter)
    elif name.endswith("hc.base"):  # pre averages, post is 1, comb is near the identity; noise tells streams apart
        base = torch.cat([torch.full((4,), quarter), torch.zeros(4), 4 * torch.eye(4).flatten()])
        p.copy_(base + 0.3 * torch.randn(24, generator=generator))
    elif name.endswith("embed_tokens.weight"):
        p.copy_(torch.randn(p.shape, generator=generator) * 0.5)
    elif name.endswith(("o_b_proj.weight", "down_proj", "down_proj.weight", "lm_head.weight")):
        p.zero_()
    elif p.dim() >= 2 and not name.endswith("position_bias"):
        p.copy_(torch.randn(p.shape, generator=generator) * p.shape[-1] ** -0.5)


def fill_hash_table(table: torch.Tensor, experts: int, generator: torch.Generator) -> None:
    """tid2eid [vocab, top_k]: distinct experts per token, every combination (nearly) equally often."""
    order = torch.randperm(len(table), generator=generator)
    choices = torch.combinations(torch.arange(experts), table.shape[1])
    choices = choices[torch.randperm(len(choices), generator=generator)]
    table[order] = choices[torch.arange(len(table)) % len(choices)]


def build_optimizers(model: DeepseekV4ForCausalLM, lr: float) -> list[torch.optim.Optimizer]:
    config = model.config
    fused_rows = {  # stacks of matrices inside one parameter, by the rows of one of them
        "self_attn.q_b_proj.weight": config.head_dim,
        "indexer.q_b_proj.weight": config.index_head_dim,
        "o_a_proj.weight": config.o_lora_rank,
        "experts.gate_up_proj": config.moe_intermediate_size,
        "self_attn.compressor.kv_proj.weight": config.head_dim,
        "self_attn.compressor.gate_proj.weight": config.head_dim,
    }
    muon, embedding, head, rest = [], [], [], []
    for name, p in model.named_parameters():
        if name.endswith("embed_tokens.weight"):
            embedding.append(p)
        elif name.endswith("lm_head.weight"):
            head.append(p)
        elif p.dim() < 2 or name.endswith(("hc.fn", "hc_fn", "position_bias", "mlp.gate.weight")):
            rest.append(p)
        else:
            rows = next((rows for suffix, rows in fused_rows.items() if name.endswith(suffix)), p.shape[-2])
            muon.append({"params": [p], "view": (rows, p.shape[-1])})
    adamw = [{"params": embedding, "lr": lr / 2}, {"params": head, "lr": lr / 10}, {"params": rest, "lr": 0.15 * lr}]
    optimizers = [Muon(muon, lr=lr), torch.optim.AdamW(adamw, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0)]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


@torch.no_grad()
def evaluate(model, tokenizer: Tokenizer, chapters: list[str], length: int = 512) -> tuple[float, float]:
    """Next-token loss in nats per token and per byte: each chapter cut into pieces of `length`, BOS before each."""
    total, tokens, size = 0.0, 0, 0
    device = next(model.parameters()).device
    for chapter in chapters:
        ids = tokenizer.encode(chapter).ids
        size += len(chapter.encode())
        for begin in range(0, len(ids), length):
            piece = torch.tensor([[BOS_ID] + ids[begin : begin + length]], device=device)
            logits = model(piece[:, :-1], use_cache=False).logits.float()
            total += F.cross_entropy(logits[0], piece[0, 1:], reduction="sum").item()
            tokens += piece.shape[1] - 1
    return total / tokens, total / size


def sample(model, tokenizer: Tokenizer, prompt: str, temperature: float, tokens: int = 48) -> str:
    device = next(model.parameters()).device
    ids = torch.tensor([[BOS_ID] + tokenizer.encode(prompt).ids], device=device)
    options = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=tokens, pad_token_id=EOS_ID, **options)
    return tokenizer.decode(out[0].tolist())


def report(model, tokenizer: Tokenizer, held_out: list[str]) -> None:
    """Held-out loss with and without the indexer's selection, then samples."""
    indexer = model.model.layers[1].self_attn.compressor.indexer
    for topk in (4096, CONFIG["index_topk"]):
        indexer.index_topk = topk
        for length in (512, 1024):
            nats, per_byte = evaluate(model, tokenizer, held_out, length)
            print(f"held-out, pieces of {length}, index_topk {topk}: {nats:.4f} nats/token {per_byte:.4f} nats/byte")
    for prompt in PROMPTS:
        for temperature in (0.0, 0.8):
            print(f"{prompt!r} at temperature {temperature}: {sample(model, tokenizer, prompt, temperature)!r}")


class Run:
    """The state of a training run: models, optimisers, counters, files."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.directory = args, args.out / "export"
        self.directory.mkdir(parents=True, exist_ok=True)
        self.generator = torch.Generator().manual_seed(args.seed)
        train, self.held_out = split_held_out(read_books(args.text))
        self.tokenizer = train_tokenizer(train, CONFIG["vocab_size"])
        self.tokenizer.save(str(self.directory / "tokenizer.json"))
        (self.directory / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
        eval_dir = args.out if args.text else Path(__file__).parent
        (eval_dir / "eval.txt").write_text("\n\n".join(self.held_out) + "\n", encoding="utf-8")
        self.windows = Windows(train, self.tokenizer, self.generator)
        self.model, self.plain = (build_model(self.directory, self.generator).to(args.device) for _ in range(2))
        self.hooks = TrainingHooks(self.model)
        accelerate(self.model)  # `plain` keeps transformers' forward, for evaluation
        self.optimizers = build_optimizers(self.model, args.lr)
        self.step, self.seen, self.spent, self.loss, self.indexer_kl = 0, 0, 0.0, None, 0.0
        print(
            f"{sum(p.numel() for p in self.model.parameters()) / 1e6:.2f} M parameters, {len(self.windows.stream)} "
            f"training tokens, {sum(len(c.encode()) for c in self.held_out)} bytes held out"
        )

    def train_step(self, progress: float) -> None:
        scale = min(1.0, (self.step + 1) / 50, 1.25 * (1 - progress))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * scale
        rows, length = (8, 256) if progress < 0.7 else (4, 512)
        batch = self.windows.batch(rows, length).to(self.args.device)
        self.hooks.train_indexer = self.step % 4 == 0
        with torch.autocast(self.args.device, dtype=torch.bfloat16):
            logits = self.model(batch[:, :-1], use_cache=False).logits
            loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
            total = loss
            if self.hooks.train_indexer:
                indexer_loss = self.hooks.indexer_loss()
                total, self.indexer_kl = loss + indexer_loss, indexer_loss.item()
        total.backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.hooks.balance(0.003 * scale)
        self.step, self.seen = self.step + 1, self.seen + rows * length
        self.loss = loss.item() if self.loss is None else 0.98 * self.loss + 0.02 * loss.item()

    def print_progress(self, progress: float) -> None:
        left = self.spent * (1 / max(progress, 1e-9) - 1) / 60
        print(
            f"step {self.step} loss {self.loss:.3f} indexer KL {self.indexer_kl:.3f} "
            f"{self.seen / self.spent:.0f} tokens/s elapsed {self.spent / 60:.1f} min, {left:.1f} min left",
            flush=True,
        )

    def export_and_evaluate(self) -> None:
        export(self.model, self.directory)
        self.plain.load_state_dict(self.model.state_dict())
        with torch.autocast(self.args.device, dtype=torch.bfloat16):
            nats, per_byte = evaluate(self.plain, self.tokenizer, self.held_out[:6])
            text = sample(self.plain, self.tokenizer, PROMPTS[0], 0.0)
        print(f"step {self.step} exported; held-out (6 chapters) {nats:.3f} nats/token {per_byte:.3f} nats/byte")
        print(f"  greedy: {text!r}", flush=True)

    def save(self) -> None:
        state = {"model": self.model.state_dict(), "optimizers": [o.state_dict() for o in self.optimizers]}
        state |= {"step": self.step, "seen": self.seen, "spent": self.spent, "loss": self.loss}
        torch.save(state | {"generator": self.generator.get_state()}, self.args.out / "checkpoint.tmp")
        os.replace(self.args.out / "checkpoint.tmp", self.args.out / "checkpoint.pt")

    def resume(self) -> None:
        """Continue after the last `save`, with a new pass over the text."""
        state = torch.load(self.args.out / "checkpoint.pt", weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.generator.set_state(state["generator"])
        self.step, self.seen, self.spent, self.loss = (state[k] for k in ("step", "seen", "spent", "loss"))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for export/ and checkpoint.pt")
    parser.add_argument("--text", help="plain text file (paragraphs between blank lines) instead of the Bible")
    parser.add_argument("--minutes", type=float, default=75, help="budget; the schedule follows the clock")
    parser.add_argument("--steps", type=int, help="budget in steps instead (same seed and machine: same model)")
    parser.add_argument("--lr", type=float, default=0.03, help="peak Muon learning rate; the others follow it")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--resume", action="store_true", help="continue from OUT/checkpoint.pt")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    run = Run(args)
    if args.resume:
        run.resume()
    begin = time.monotonic() - run.spent
    saved_at = exported_at = run.spent
    while (progress := run.step / args.steps if args.steps else run.spent / (60 * args.minutes)) < 1:
        run.train_step(progress)
        run.spent = time.monotonic() - begin
        if run.step % 20 == 0:
            run.print_progress(progress)
        if run.spent - exported_at > (120 if run.step < 300 else 600):
            run.export_and_evaluate()
            exported_at = time.monotonic() - begin
        if run.spent - saved_at > 240:
            run.save()
            saved_at = run.spent
    print(f"trained {run.step} steps, {run.seen} tokens in {run.spent / 60:.1f} min, training loss {run.loss:.3f}")
    export(run.model, run.directory)
    ids = run.windows.batch(1, 4 * CONFIG["index_topk"])[:, :-1]
    report(verify_export(run.model.cpu(), run.directory, ids), run.tokenizer, run.held_out)


if __name__ == "__main__":
    main()
