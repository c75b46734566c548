"""What training needs from inside the modules: dense CSA attention, the indexer's loss, expert balance."""

import torch
from torch.nn import functional as F


class TrainingHooks:
    """Hooks into a transformers DeepSeek-V4 model.

    CSA layers attend to all visible compressed entries. While `train_indexer` is set, the indexer also scores them (on
    detached inputs) and `indexer_loss` compares its scores with the attention mass. `balance` moves the routers' bias.
    """

    def __init__(self, model):
        self.train_indexer, self.scores, self.mass, self.load = False, None, None, {}
        for layer in model.model.layers:
            if hasattr(layer.mlp.gate, "e_score_correction_bias"):
                layer.mlp.gate.register_forward_hook(self.count_load)
            if hasattr(layer.self_attn.compressor, "indexer"):
                indexer = layer.self_attn.compressor.indexer
                indexer.select, indexer.forward = indexer.forward, self.dense_forward(indexer)
                indexer.scorer.register_forward_hook(self.keep_scores)
                layer.self_attn.register_forward_hook(self.keep_mass)

    def dense_forward(self, indexer):
        def forward(hidden_states, q_residual, position_ids, past_key_values, layer_idx):
            if self.train_indexer:  # leaves its scores with the hook on the scorer
                indexer.select(hidden_states.detach(), q_residual.detach(), position_ids, None, layer_idx)
            entries = torch.arange(hidden_states.shape[1] // indexer.compress_rate, device=hidden_states.device)
            visible = entries < ((position_ids + 1) // indexer.compress_rate).unsqueeze(-1)  # [1, S, T]
            return torch.where(visible, entries, -1).expand(hidden_states.shape[0], -1, -1)

        return forward

    def keep_scores(self, module, args, out) -> None:
        self.scores = out  # [B, S, T]

    def keep_mass(self, module, args, out) -> None:
        probs = out[1]  # [B, S, H, S + T]; the compressed entries are the last T
        self.mass = probs[..., probs.shape[1] :].detach().float().sum(2)

    def count_load(self, module, args, out) -> None:
        self.load[module] = torch.bincount(out[2].flatten(), minlength=module.num_experts).float()

    def indexer_loss(self) -> torch.Tensor:
        """KL(attention mass over visible entries || softmax of the indexer scores), mean over queries."""
        length, entries = self.mass.shape[1:]
        visible = torch.arange(entries) < ((torch.arange(length) + 1) // (length // entries))[:, None]
        rows = visible.sum(-1) > 1
        visible, mass = visible[rows].to(self.mass.device), self.mass[:, rows]
        log_p = self.scores.float()[:, rows].masked_fill(~visible, -1e9).log_softmax(-1)
        target = mass / mass.sum(-1, keepdim=True).clamp(min=1e-9)
        return F.kl_div(log_p, target, reduction="sum") / (target.shape[0] * target.shape[1])

    def balance(self, rate: float) -> None:
        """Auxiliary-loss-free balance: lower the selection bias of experts with more than the mean load."""
        for gate, load in self.load.items():
            gate.e_score_correction_bias += rate * (load.mean() - load).sign()
