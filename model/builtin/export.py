"""Write a transformers DeepSeek-V4 model under the released key names, and check that it loads back."""

import os
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import DeepseekV4ForCausalLM

RENAMES = [  # transformers name -> released name, applied in order
    (r"^model\.", ""), (r"^embed_tokens\.", "embed."), (r"^lm_head\.", "head."), (r"^hc_head\.hc_", "hc_head_"),
    (r"\.input_layernorm\.", ".attn_norm."), (r"\.post_attention_layernorm\.", ".ffn_norm."),
    (r"\.(attn|ffn)_hc\.", r".hc_\1_"), (r"\.self_attn\.", ".attn."), (r"\.mlp\.", ".ffn."),
    (r"\.sinks$", ".attn_sink"), (r"\.e_score_correction_bias$", ".bias"),
    (r"\.compressor\.indexer\.q_b_proj\.", ".indexer.wq_b."),
    (r"\.compressor\.indexer\.scorer\.", ".indexer."), (r"\.compressor\.indexer\.", ".indexer.compressor."),
    (r"\.compressor\.kv_norm\.", ".compressor.norm."), (r"\.position_bias$", ".ape"), (r"\.q_a_norm\.", ".q_norm."),
    (r"shared_experts\.gate_proj\.", "shared_experts.w1."), (r"shared_experts\.down_proj\.", "shared_experts.w2."),
    (r"shared_experts\.up_proj\.", "shared_experts.w3."), (r"\.kv_proj\.", ".wkv."), (r"\.gate_proj\.", ".wgate."),
    (r"\.(q_a|q_b|o_a|o_b)_proj\.", lambda m: f".w{m[1]}."),
]  # fmt: skip
FP32 = re.compile(r"hc_(attn|ffn|head)_(fn|base|scale)$|\.ape$|\.attn_sink$|\.gate\.bias$")


def released_name(name: str) -> str:
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def released_tensors(model: DeepseekV4ForCausalLM) -> dict[str, torch.Tensor]:
    """State dict under the released names: experts separate, int64 and FP32 names kept, the rest bf16."""
    out = {}
    for name, tensor in model.state_dict().items():
        name = released_name(name)
        if name.endswith("experts.gate_up_proj"):
            for e, gate_up in enumerate(tensor):
                prefix = name.replace("gate_up_proj", str(e))
                out[f"{prefix}.w1.weight"], out[f"{prefix}.w3.weight"] = gate_up.chunk(2)
        elif name.endswith("experts.down_proj"):
            out |= {name.replace("down_proj", f"{e}.w2.weight"): down for e, down in enumerate(tensor)}
        else:
            out[name] = tensor
    for name, tensor in out.items():
        dtype = torch.float32 if FP32.search(name) else torch.bfloat16 if tensor.is_floating_point() else tensor.dtype
        out[name] = tensor.detach().to("cpu", dtype, copy=True).contiguous()
    return out


def export(model: DeepseekV4ForCausalLM, directory: Path) -> None:
    save_file(released_tensors(model), directory / "model.tmp", metadata={"format": "pt"})
    (directory / "model.tmp").chmod(0o644)  # save_file makes it private to the user
    os.replace(directory / "model.tmp", directory / "model.safetensors")


def verify_export(model: DeepseekV4ForCausalLM, directory: Path, ids: torch.Tensor) -> DeepseekV4ForCausalLM:
    """The export, loaded by transformers, must give the logits of the trained model (weights rounded alike).

    `ids` must be short enough that the indexer selects every entry: training attends to all of them.
    """
    loaded, info = DeepseekV4ForCausalLM.from_pretrained(
        directory, dtype=torch.float32, experts_implementation="eager", output_loading_info=True
    )
    problems = {k: v for k, v in info.items() if v}
    assert not problems, problems
    for name, p in model.named_parameters():  # round the trained weights as the file does
        if not FP32.search(released_name(name)):
            p.data = p.data.bfloat16().float()
    with torch.no_grad():
        difference = (model.eval()(ids).logits - loaded.eval()(ids).logits).abs().max().item()
    assert difference < 1e-3, f"export and trained model differ by {difference} in the logits"
    print(f"export loads back: no missing or unexpected keys, logits differ by at most {difference:.1e}")
    return loaded
