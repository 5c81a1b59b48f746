"""DeepSeekMoE: routing as a pure function, experts, balancing with and without an auxiliary loss.

Legend: T tokens (batch x sequence), E routed experts, G groups of experts, K experts per token, D hidden size,
F expert width, N sequences.

The gate's `e_score_correction_bias` is state, not a weight: no gradient reaches it. While training, the model counts
in `tokens_per_expert` how many tokens chose each expert; `update_correction_bias` (called once an optimizer step)
turns the counts into the bias of the next step and starts them anew.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation
from transformers.integrations.moe import _grouped_linear
from transformers.utils.generic import maybe_autocast

from .configuration_deepseek import DeepseekConfig
from .layers import DeepseekMLP


def affinities(logits_TE: torch.Tensor, scoring_func: str) -> torch.Tensor:
    """Scores (T, E) of every expert: sigmoid in the logits' dtype, or softmax in float32, as the official code."""
    if scoring_func == "sigmoid":
        return logits_TE.sigmoid()
    return logits_TE.softmax(dim=-1, dtype=torch.float32)


def route(
    scores_TE: torch.Tensor,
    bias_E: torch.Tensor | None,
    *,
    top_k: int,
    topk_method: str,
    n_group: int = 1,
    topk_group: int = 1,
    norm_topk_prob: bool = False,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (T, K) and experts (T, K, int64) of each token; the order of the K is not defined.

    "greedy": the K best scores. "group_limited_greedy" (V2): only experts of the `topk_group` groups with the best
    expert. "noaux_tc" (V3 2.1.2): chosen by score + bias, groups by the sum of their two best; weights without the
    bias. With two groups of two and one group allowed, a bias can move a token to the other group, not change the
    weights of what it finds there:

        >>> scores = torch.tensor([[0.9, 0.1, 0.5, 0.4]])
        >>> kwargs = dict(top_k=1, topk_method="noaux_tc", n_group=2, topk_group=1)
        >>> route(scores, torch.zeros(4), **kwargs)
        (tensor([[0.9000]]), tensor([[0]]))
        >>> route(scores, torch.tensor([0.0, 0.0, 0.0, 0.2]), **kwargs)
        (tensor([[0.4000]]), tensor([[3]]))
    """
    choice_TE = scores_TE if bias_E is None else scores_TE + bias_E
    if topk_method != "greedy" and n_group > 1:
        grouped_TGe = choice_TE.unflatten(-1, (n_group, -1))
        best = 2 if topk_method == "noaux_tc" else 1
        group_scores_TG = grouped_TGe.topk(best, dim=-1, sorted=False).values.sum(dim=-1)
        allowed_TG = torch.zeros_like(group_scores_TG, dtype=torch.bool)
        allowed_TG.scatter_(1, group_scores_TG.topk(topk_group, dim=-1, sorted=False).indices, True)
        choice_TE = grouped_TGe.masked_fill(~allowed_TG[..., None], float("-inf")).flatten(1)
    indices_TK = choice_TE.topk(top_k, dim=-1, sorted=False).indices
    weights_TK = scores_TE.gather(1, indices_TK)
    if norm_topk_prob:
        weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
    return weights_TK * scale, indices_TK


class DeepseekGate(nn.Module):
    """The router: `weight` (E, D) and, for `noaux_tc`, the buffer `e_score_correction_bias` (E,), always float32."""

    e_score_correction_bias: torch.Tensor | None

    def __init__(self, config: DeepseekConfig):
        super().__init__()
        self.config = config
        assert config.n_routed_experts is not None
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        nn.init.normal_(self.weight, std=config.initializer_range)
        bias_E = torch.zeros(config.n_routed_experts) if config.topk_method == "noaux_tc" else None
        self.register_buffer("e_score_correction_bias", bias_E if bias_E is None else bias_E.float(), persistent=True)
        # Not a buffer: DDP would overwrite every rank's counts with those of rank 0.
        self.tokens_per_expert: torch.Tensor | None = None

    def _apply(self, fn, recurse=True):
        # `model.to(bfloat16)` must not round the bias: its steps of 0.001 would be lost.
        before = self.e_score_correction_bias
        super()._apply(fn, recurse)
        after = self.e_score_correction_bias
        if before is not None and after is not None and after.dtype != torch.float32:
            self.e_score_correction_bias = before.float().to(after.device)
        return self

    def forward(self, hidden_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Router logits (T, E), weights (T, K) and experts (T, K)."""
        config = self.config
        assert config.num_experts_per_tok is not None
        if config.router_logits_dtype == "float32":
            with maybe_autocast(hidden_TD.device.type, enabled=False):  # or it would be bfloat16 after all
                logits_TE = F.linear(hidden_TD.float(), self.weight.float())
        else:
            logits_TE = F.linear(hidden_TD, self.weight.to(hidden_TD.dtype))
        # V2's code scales the weights only where it does not normalise them, and never normalises a single one.
        is_v2 = config.model_type == "deepseek_v2"
        normalise = config.norm_topk_prob and not (is_v2 and config.num_experts_per_tok == 1)
        weights_TK, indices_TK = route(
            affinities(logits_TE, config.scoring_func),
            self.e_score_correction_bias,
            top_k=config.num_experts_per_tok,
            topk_method=config.topk_method,
            n_group=config.n_group or 1,
            topk_group=config.topk_group or 1,
            norm_topk_prob=normalise,
            scale=1.0 if is_v2 and normalise else config.routed_scaling_factor,
        )
        return logits_TE, weights_TK, indices_TK

    @torch.no_grad()
    def record_load(self, indices_TK: torch.Tensor, valid_T: torch.Tensor | None) -> None:
        """Adds the tokens of a micro-batch to `tokens_per_expert` (E,), padding (`valid_T` False) left out.

        Raises:
            RuntimeError: under `torch.nn.DataParallel`, whose replicas forget what they count.
        """
        if getattr(self, "_is_replica", False):
            raise RuntimeError(
                "expert load cannot be counted under torch.nn.DataParallel, whose replicas are thrown away after each "
                "step; start one process for each GPU (torchrun or accelerate launch)"
            )
        counts_E = count_tokens(indices_TK, self.weight.shape[0], valid_T)
        self.tokens_per_expert = counts_E if self.tokens_per_expert is None else self.tokens_per_expert + counts_E

    @torch.no_grad()
    def update_correction_bias(self, group: dist.ProcessGroup | None = None) -> torch.Tensor:
        """Moves the bias by gamma against the load of the step, and returns that load (E,), summed over processes.

        An overloaded expert's bias falls by `config.bias_update_speed`, an underloaded one's rises, one with exactly
        the mean load stays (V3 2.1.2). The counts start anew. A frozen or missing bias stays; the load is returned. A
        router whose weight is frozen keeps its bias too: adapters are saved without the model below them, and would
        otherwise be loaded onto another bias than they were trained with.
        """
        counts_E = self.tokens_per_expert
        if counts_E is None:
            counts_E = torch.zeros(self.weight.shape[0], dtype=torch.int64, device=self.weight.device)
        self.tokens_per_expert = None
        if dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1:
            dist.all_reduce(counts_E, group=group)
        bias = self.e_score_correction_bias
        if bias is not None and self.weight.requires_grad and not self.config.freeze_correction_bias:
            excess_E = counts_E.double() - counts_E.double().mean()
            bias -= self.config.bias_update_speed * excess_E.sign().to(bias)
        return counts_E


def count_tokens(indices_TK: torch.Tensor, n_experts: int, valid_T: torch.Tensor | None) -> torch.Tensor:
    """How many tokens chose each expert, (E,) int64, leaving out tokens whose `valid_T` is False."""
    ones_TK = torch.ones_like(indices_TK)
    if valid_T is not None:
        ones_TK = ones_TK * valid_T[:, None]
    return torch.zeros(n_experts, dtype=torch.int64, device=indices_TK.device).scatter_add_(
        0, indices_TK.flatten(), ones_TK.flatten()
    )


def max_violation(counts_E: torch.Tensor) -> float:
    """MaxVio = max load / mean load - 1 (arXiv 2408.15664, eq. 4): 0 in perfect balance, E / K - 1 at worst, NaN where
    nothing was routed.

    >>> max_violation(torch.tensor([6, 2, 2, 2]))
    1.0
    """
    counts = counts_E.double()
    return (counts.max() / counts.mean() - 1).item()


def load_balancing_loss(
    logits_TE: torch.Tensor,
    indices_TK: torch.Tensor,
    scoring_func: str,
    sequence_T: torch.Tensor,
    n_sequences: int,
    valid_T: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean over sequences of sum_i f_i P_i, one number, without its alpha; 1 in perfect balance.

    f_i = E / (K T) * (tokens of the sequence that choose i), P_i = mean affinity of i in the sequence, affinities
    normalised over the experts (V3 eq. 17-20; with softmax that is V2's). V2's expert-level loss (V2 2.2.3) is the
    same over one sequence made of the whole batch: `n_sequences=1`.

    Args:
        sequence_T: sequence of each token, int64 below `n_sequences`.
        valid_T: False for padding, which counts nowhere. Sequences without tokens do not count either.
    """
    n_experts, top_k = logits_TE.shape[1], indices_TK.shape[1]
    scores_TE = affinities(logits_TE.float(), scoring_func)
    scores_TE = scores_TE / (scores_TE.sum(dim=-1, keepdim=True) + 1e-20)
    valid = torch.ones_like(sequence_T) if valid_T is None else valid_T.to(sequence_T.dtype)
    weight_T = valid.to(scores_TE.dtype)

    tokens_N = scores_TE.new_zeros(n_sequences).index_add_(0, sequence_T, weight_T)
    chosen_TE = torch.zeros_like(scores_TE).scatter_(1, indices_TK, 1.0) * weight_T[:, None]
    chosen_NE = scores_TE.new_zeros(n_sequences, n_experts).index_add_(0, sequence_T, chosen_TE)
    sum_NE = scores_TE.new_zeros(n_sequences, n_experts).index_add(0, sequence_T, scores_TE * weight_T[:, None])

    per_token_N = tokens_N.clamp(min=1)
    f_NE = chosen_NE * (n_experts / top_k) / per_token_N[:, None]
    p_NE = sum_NE / per_token_N[:, None]
    return (f_NE * p_NE).sum() / (tokens_N > 0).sum().clamp(min=1)


def run_experts(
    project: Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor],
    act_fn: Callable[[torch.Tensor], torch.Tensor],
    n_experts: int,
    hidden_TD: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """The mixture (T, D) with its two matrix products left to `project`, for experts that are more than a weight
    (quantised, with adapters).

    `project("gate_up_proj" or "down_proj", rows, offsets)` multiplies each of the rows (T x K, in), which lie in the
    order of their experts, by its expert's matrix; the rows of expert e end before `offsets[e]` (E,) int32.
    """
    top_k = top_k_index.shape[1]
    expert_N, order_N = top_k_index.flatten().sort(stable=True)
    offsets_E = torch.searchsorted(
        expert_N, torch.arange(n_experts, device=expert_N.device), right=True, out_int32=True
    )
    gate, up = project("gate_up_proj", hidden_TD[order_N // top_k], offsets_E).chunk(2, dim=-1)
    rows_ND = project("down_proj", act_fn(gate) * up, offsets_E) * top_k_weights.flatten()[order_N, None]
    # Back into the order of the tokens, and a sum of fixed order there: `index_add` has none on CUDA.
    return rows_ND[order_N.argsort()].unflatten(0, (-1, top_k)).sum(dim=1).to(hidden_TD.dtype)


@use_experts_implementation
class DeepseekExperts(nn.Module):
    """The routed experts as two tensors, `gate_up_proj` (E, 2F, D) and `down_proj` (E, D, F). Which kernel runs is
    `config._experts_implementation` (`experts_implementation=` at load): grouped matrix products by default, and
    "eager", the loop below, as the reference."""

    def __init__(self, config: DeepseekConfig):
        super().__init__()
        assert config.n_routed_experts is not None
        self.num_experts = config.n_routed_experts
        hidden, width = config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, hidden, width))
        nn.init.normal_(self.gate_up_proj, std=config.initializer_range)
        nn.init.normal_(self.down_proj, std=config.initializer_range)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_TD: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        output_TD = torch.zeros_like(hidden_TD)
        for expert in top_k_index.unique().tolist():
            if expert == self.num_experts:  # under expert parallelism, all that belongs to other ranks
                continue
            token, slot = torch.where(top_k_index == expert)
            gate, up = F.linear(hidden_TD[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            expert_output = F.linear(self.act_fn(gate) * up, self.down_proj[expert])
            weighted = expert_output * top_k_weights[token, slot, None]
            output_TD = output_TD.index_add(0, token, weighted.to(output_TD.dtype))
        return output_TD

    def project(self, name: str, rows_ND: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
        """One of the two matrix products, as `run_experts` asks for it."""
        return _grouped_linear(rows_ND, getattr(self, name), offsets_E)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """Accepts the Hub's layout (one tensor for each expert and projection) besides its own, since `Trainer`
        resumes by `load_state_dict` on saved files and would otherwise leave the experts as they are."""
        if not any(name.startswith(prefix) and name.endswith("_proj.weight") for name in state_dict):
            return super()._load_from_state_dict(state_dict, prefix, *args)
        width = self.down_proj.shape[-1]
        found, absent = False, []
        with torch.no_grad():
            for expert in range(self.num_experts):
                targets = {
                    "gate_proj": self.gate_up_proj[expert, :width],
                    "up_proj": self.gate_up_proj[expert, width:],
                    "down_proj": self.down_proj[expert],
                }
                for name, target in targets.items():
                    source = state_dict.pop(f"{prefix}{expert}.{name}.weight", None)
                    if source is None:
                        absent.append(f"{prefix}{expert}.{name}.weight")
                        continue
                    found = True
                    if source.shape != target.shape:
                        raise ValueError(
                            f"{prefix}{expert}.{name}.weight has shape {tuple(source.shape)}, expected "
                            f"{tuple(target.shape)}"
                        )
                    target.copy_(source)
                    fused = "down_proj" if name == "down_proj" else "gate_up_proj"
                    state_dict.setdefault(prefix + fused, getattr(self, fused).data)
        if found:
            missing_keys = args[2]  # after local_metadata and strict
            missing_keys += absent
        super()._load_from_state_dict(state_dict, prefix, *args)


class DeepseekMoE(nn.Module):
    """Routed experts plus the shared ones, which every token passes. No token is dropped."""

    def __init__(self, config: DeepseekConfig):
        super().__init__()
        self.experts = DeepseekExperts(config)
        self.gate = DeepseekGate(config)
        self.shared_experts = None
        if config.n_shared_experts:
            self.shared_experts = DeepseekMLP(config, config.moe_intermediate_size * config.n_shared_experts)

    def forward(self, hidden_BSD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(B, S, D) to (B, S, D), with the router's logits (T, E) and choices (T, K)."""
        hidden_TD = hidden_BSD.flatten(0, 1)
        logits_TE, weights_TK, indices_TK = self.gate(hidden_TD)
        output_BSD = self.experts(hidden_TD, indices_TK, weights_TK).view_as(hidden_BSD)
        if self.shared_experts is not None:
            output_BSD = output_BSD + self.shared_experts(hidden_BSD)
        return output_BSD, logits_TE, indices_TK
