"""Train the small built-in DeepSeek-V4 model on the King James Bible, on one CPU core.

The result is a checkpoint directory with the released key names (`model.safetensors` in bf16, `config.json`,
`tokenizer.json`): every mechanism of the architecture at the dimensions the kernels need (head 512, indexer
64 x 128, window 128, ratios 0 / 4 / 128, hash and scored experts, mHC), 9.6 M parameters, English output.

What happens, in order: the text is split into chapters, every 50th chapter is held out (`eval.txt`), a byte-level BPE
tokenizer is trained, the model is trained with Muon (matrices) and AdamW (the rest) under bf16 autocast, exported,
loaded back with transformers and compared, evaluated, sampled.

Choices worth knowing:
* The text stream is cut into windows that start at a verse and get a BOS in front. Batches are 8 x 256 tokens, and
  4 x 512 for the last 30 % of the run so that several ratio-128 entries are visible and trained.
* CSA layers attend to all visible compressed entries during training. transformers gives the indexer no gradient, so
  on every 4th step it learns by KL to predict the attention mass over the compressed entries (inputs detached), as in
  DeepSeek sparse attention. `evaluate` prints what the top-k selection costs against attending to everything.
* Expert balance by the auxiliary-loss-free bias: after each step the bias moves by the sign of the load error.

Time: about 75 minutes on one core with AVX512-BF16 for the shipped model; `--minutes 3` gives words, not sentences.
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


# ---- model
def build_model(config_dir: Path, generator: torch.Generator) -> DeepseekV4ForCausalLM:
    config = DeepseekV4Config.from_pretrained(config_dir)
    rope = config.rope_parameters["compress"]
    assert rope["rope_type"] == "yarn" and rope["factor"] == 16 and rope["attention_factor"] == 1.0, rope
    model = DeepseekV4ForCausalLM._from_config(config, dtype=torch.float32, experts_implementation="eager")
    normal = lambda p, std: p.copy_(torch.randn(p.shape, generator=generator) * std)  # noqa: E731
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("hc.fn", "hc_fn")):
                normal(p, 0.02)
            elif name.endswith(("hc.scale", "hc_scale")):
                p.fill_(0.1)
            elif name.endswith("hc_base"):
                p.fill_(-math.log(3.0))  # sigmoid = 1/4: the head averages the four streams
            elif name.endswith("hc.base"):  # pre averages, post is 1, comb near the identity; noise tells streams apart
                base = torch.cat([torch.full((4,), -math.log(3.0)), torch.zeros(4), 4 * torch.eye(4).flatten()])
                p.copy_(base + 0.3 * torch.randn(24, generator=generator))
            elif name.endswith("embed_tokens.weight"):
                normal(p, 0.5)
            elif name.endswith(("o_b_proj.weight", "down_proj", "down_proj.weight", "lm_head.weight")):
                p.zero_()
            elif p.dim() >= 2 and not name.endswith("position_bias"):
                normal(p, p.shape[-1] ** -0.5)
        for layer in model.model.layers:
            if layer.mlp.is_hash:  # each row two distinct experts, every expert equally often
                table = layer.mlp.gate.tid2eid
                order = torch.randperm(len(table), generator=generator)
                pairs = torch.combinations(torch.arange(config.n_routed_experts), config.num_experts_per_tok)
                pairs = pairs[torch.randperm(len(pairs), generator=generator)]
                table[order] = pairs[torch.arange(len(table)) % len(pairs)]
    return model


def build_optimizers(model: DeepseekV4ForCausalLM, lr: float) -> list[torch.optim.Optimizer]:
    config = model.config
    muon, embedding, head, rest = [], [], [], []
    for name, p in model.named_parameters():
        if name.endswith("embed_tokens.weight"):
            embedding.append(p)
        elif name.endswith("lm_head.weight"):
            head.append(p)
        elif p.dim() < 2 or name.endswith(("hc.fn", "hc_fn", "position_bias", "mlp.gate.weight")):
            rest.append(p)
        else:
            view = p.shape[-2:]
            if name.endswith("self_attn.q_b_proj.weight"):
                view = (config.head_dim, p.shape[1])
            elif name.endswith("indexer.q_b_proj.weight"):
                view = (config.index_head_dim, p.shape[1])
            elif name.endswith("o_a_proj.weight"):
                view = (config.o_lora_rank, p.shape[1])
            elif name.endswith("experts.gate_up_proj"):
                view = (config.moe_intermediate_size, p.shape[2])
            elif "compressor" in name and name.endswith(("kv_proj.weight", "gate_proj.weight")) and p.shape[0] > 512:
                view = (config.head_dim, p.shape[1])
            muon.append({"params": [p], "view": tuple(view)})
    groups = [
        {"params": embedding, "lr": lr * 0.5},
        {"params": head, "lr": lr * 0.1},
        {"params": rest, "lr": lr * 0.15},
    ]
    optimizers = [Muon(muon, lr=lr), torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0)]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


@torch.no_grad()
def evaluate(
    model, tokenizer: Tokenizer, chapters: list[str], length: int = 512, limit: int = 10**9
) -> tuple[float, float]:
    """Next-token loss in nats per token and per byte: each chapter cut into pieces of `length`, BOS before each."""
    total, tokens, size = 0.0, 0, 0
    device = next(model.parameters()).device
    for chapter in chapters[:limit]:
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


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for export/ and checkpoint.pt")
    parser.add_argument("--text", help="plain text file instead of the King James Bible")
    parser.add_argument("--minutes", type=float, default=70, help="budget; the schedule follows the clock")
    parser.add_argument("--steps", type=int, help="budget in steps instead (repeatable: same seed, same model)")
    parser.add_argument("--lr", type=float, default=0.02, help="peak Muon learning rate; the others follow it")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--resume", action="store_true", help="continue from OUT/checkpoint.pt")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    directory = args.out / "export"
    directory.mkdir(parents=True, exist_ok=True)

    train, held_out = split_held_out(read_books(args.text))
    tokenizer = train_tokenizer(train, CONFIG["vocab_size"])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    if not args.text:
        (Path(__file__).parent / "eval.txt").write_text("\n\n".join(held_out) + "\n", encoding="utf-8")
    windows = Windows(train, tokenizer, generator)
    model, plain = (build_model(directory, generator).to(args.device) for _ in range(2))  # plain: transformers' forward
    hooks = TrainingHooks(model)
    accelerate(model)
    optimizers = build_optimizers(model, args.lr)
    held_bytes = sum(len(c.encode()) for c in held_out)
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(windows.stream)} training tokens, "
        f"{sum(len(t.encode()) for t in train) / len(windows.stream):.2f} bytes per token, {held_bytes} bytes held out"
    )

    step, seen, spent, smooth = 0, 0, 0.0, None
    if args.resume:
        state = torch.load(args.out / "checkpoint.pt", weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        generator.set_state(state["generator"])
        step, seen, spent, windows.queue = state["step"], state["seen"], state["spent"], state["queue"]
    begin = time.monotonic() - spent
    saved_at = exported_at = begin + spent
    while True:
        elapsed = time.monotonic() - begin
        progress = step / args.steps if args.steps else elapsed / (60 * args.minutes)
        if progress >= 1:
            break
        scale = min(1.0, (step + 1) / 50, 1.25 * (1 - progress))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * scale
        rows, length = (8, 256) if progress < 0.7 else (4, 512)
        batch = windows.batch(rows, length).to(args.device)
        hooks.train_indexer = step % 4 == 0
        with torch.autocast(args.device, dtype=torch.bfloat16):
            logits = model(batch[:, :-1], use_cache=False).logits
            loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
            extra = hooks.indexer_loss() if hooks.train_indexer else 0.0
        (loss + extra).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        hooks.balance(0.003 * scale)
        step, seen = step + 1, seen + rows * length
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        if hooks.train_indexer:
            indexer_kl = extra.item()
        now = time.monotonic()
        if step % 20 == 0:
            left = (now - begin) * (1 / max(progress, 1e-9) - 1) / 60
            print(
                f"step {step} loss {smooth:.3f} indexer KL {indexer_kl:.3f} lr x{scale:.2f} "
                f"{seen / (now - begin):.0f} tokens/s elapsed {(now - begin) / 60:.1f} min, {left:.1f} min left",
                flush=True,
            )
        if now - exported_at > (120 if step < 300 else 600):
            export(model, directory)
            with torch.autocast(args.device, dtype=torch.bfloat16):
                plain.load_state_dict(model.state_dict())
                nats, per_byte = evaluate(plain, tokenizer, held_out, limit=6)
                print(f"step {step} exported; held-out (6 chapters) {nats:.3f} nats/token {per_byte:.3f} nats/byte")
                print(f"  greedy: {sample(plain, tokenizer, PROMPTS[0], 0.0)!r}", flush=True)
            exported_at = time.monotonic()
        if now - saved_at > 240:
            state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "step": step}
            state |= {"seen": seen, "spent": now - begin, "queue": windows.queue, "generator": generator.get_state()}
            torch.save(state, args.out / "checkpoint.tmp")
            os.replace(args.out / "checkpoint.tmp", args.out / "checkpoint.pt")
            saved_at = now

    print(
        f"trained {step} steps, {seen} tokens in {(time.monotonic() - begin) / 60:.1f} min, training loss {smooth:.3f}"
    )
    export(model, directory)
    ids = windows.batch(1, 4 * CONFIG["index_topk"])[:, :-1]
    model = verify_export(model.cpu(), directory, ids)
    for topk in (CONFIG["index_topk"], 4096):
        model.model.layers[1].self_attn.compressor.indexer.index_topk = topk
        for length in (512, 1024):
            nats, per_byte = evaluate(model, tokenizer, held_out, length)
            print(f"held-out, pieces of {length}, index_topk {topk}: {nats:.4f} nats/token {per_byte:.4f} nats/byte")
    model.model.layers[1].self_attn.compressor.indexer.index_topk = CONFIG["index_topk"]
    for prompt in PROMPTS:
        for temperature in (0.0, 0.8):
            print(f"{prompt!r} at temperature {temperature}: {sample(model, tokenizer, prompt, temperature)!r}")


if __name__ == "__main__":
    main()
