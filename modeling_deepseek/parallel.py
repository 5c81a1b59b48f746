"""One model on several devices: what can be split, what cannot, and how the pieces become one state again.

transformers does the splitting, by the plans in configuration_deepseek.py and modeling_deepseek.py, when a model is
loaded with a `DistributedConfig`; `torchrun --nproc-per-node=2` starts the ranks:

    tp_size=2                        each rank has half of the heads, of every MLP's and every expert's width
    tp_size=2, ep_size=2             as above, but each rank has half of the experts, whole
    tp_size=2, ep_size=2, tp_plan={} half of the experts, everything else whole
    fsdp_size=2                      half of every weight; each rank sees another part of the batch
    fsdp_size=2, ep_size=2           half of the experts, half of every other weight; another part of the batch
    pp_size=2                        half of the layers, MTP modules behind the last; for inference

FSDP2 by accelerate or by `torch.distributed.fsdp.fully_shard` works on the same classes. This file has the checks that
the library lacks, and the two places where a gradient or a state crosses ranks.
"""

import hashlib
import os
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.distributed import DistributedConfig
from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard
from transformers.distributed.sharding_utils import DtensorShardOperation
from transformers.distributed.utils import gather_full_state_dict

from .configuration_deepseek import DeepseekConfig

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def check_layout(config: DeepseekConfig, layout: DistributedConfig) -> None:
    """Whether the model of `config` can be spread as `layout` says.

    Raises:
        ValueError: where heads, experts or layers cannot be dealt out evenly, and for a layout that spreads nothing
            although its caller expects it to.
    """
    tp_size, ep_size, pp_size = layout.tp_size or 1, layout.ep_size or 1, layout.pp_size or 1
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    # `tp_plan={}` with one device is all that is left of `enable_expert_parallel=True` alone.
    if max(tp_size, ep_size, layout.dp_size, pp_size) == 1 and (ranks > 1 or layout.tp_plan == {}):
        raise ValueError(
            f"every size of the DistributedConfig is 1, so that each of the {ranks} processes would hold the whole "
            "model: give tp_size, ep_size (a multiple of tp_size that divides fsdp_size * tp_size; "
            "`enable_expert_parallel` alone sets no size), fsdp_size or pp_size, and start as many processes (torchrun)"
        )
    splits_layers = tp_size > 1 and layout.tp_plan != {}
    if splits_layers and config.num_attention_heads % tp_size:
        raise ValueError(
            f"`num_attention_heads` ({config.num_attention_heads}) must be divisible by tp_size ({tp_size}): "
            "attention is split by heads; take a divisor, or `tp_plan={}` to leave attention whole"
        )
    if config.n_routed_experts is None and ep_size > 1:
        raise ValueError(f"ep_size is {ep_size}, but the model has no experts (`n_routed_experts` is None)")
    if config.n_routed_experts is not None and config.n_routed_experts % ep_size:
        raise ValueError(
            f"`n_routed_experts` ({config.n_routed_experts}) must be divisible by ep_size ({ep_size}): each "
            "rank has whole experts, and as many as the others"
        )
    width = config.moe_intermediate_size
    if splits_layers and ep_size == 1 and config.n_routed_experts is not None and width % tp_size:
        raise ValueError(
            f"`moe_intermediate_size` ({width}) must be divisible by tp_size ({tp_size}): each rank has that part of "
            "every expert; set ep_size to spread whole experts"
        )
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    per_stage = layers // pp_size
    if per_stage < 1 or per_stage * (pp_size - 1) > config.num_hidden_layers:
        raise ValueError(
            f"pp_size ({pp_size}) is too large for {config.num_hidden_layers} layers and "
            f"{config.num_nextn_predict_layers} MTP modules: each stage needs a layer, and the last one all modules"
        )


def rules_that_apply(model: nn.Module, plan: dict[str, str] | None) -> dict[str, str]:
    """The rules of a plan that name something in the model. Plans cover query compression, dense and routed layers and
    MTP modules, and the library would warn of each that a configuration does without."""
    names = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
    there = {replace_layer_number_by_wildcard(name) for name in names}
    return {rule: style for rule, style in (plan or {}).items() if rule in there}


def without_labels(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a pipeline, refusing labels: the library would leave the loss out of its output, and no gradient
    crosses from one stage to the one before it."""

    @wraps(forward)
    def inference(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("labels") is not None or kwargs.get("shift_labels") is not None:
            raise ValueError("pipeline stages (pp_size > 1) cannot be trained: use fsdp_size, tp_size or ep_size")
        return forward(*args, **kwargs)

    return inference


def check_generation(model: PreTrainedModel, generation_config: GenerationConfig) -> None:
    """Whether ranks that share a batch would go on with the same tokens.

    Raises:
        ValueError: for sampling from different random states, which would part them without a word, and for drafting
            on the stages of a pipeline.
    """
    meshes = getattr(model, "_mesh_manager", None)
    if meshes is None:
        return
    shared = [mesh for mesh in (meshes.get_mesh("tp"), meshes.get_mesh("pp")) if mesh.size() > 1]
    if hasattr(model, "_pp_stage") and generation_config.use_mtp:
        raise ValueError(
            "`use_mtp=True` needs embedding, MTP modules and head on one rank, and pp_size > 1 parts them: leave "
            "`use_mtp` out, or spread the model by tp_size and ep_size"
        )
    if not generation_config.do_sample or not shared:
        return
    state = (
        torch.get_rng_state() if model.device.type == "cpu" else torch.get_device_module().get_rng_state(model.device)
    )
    digest = int.from_bytes(hashlib.sha256(bytes(state.tolist())).digest()[:7], "big")
    for mesh in shared:
        bounds = torch.tensor([digest, -digest], device=model.device)
        dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=mesh.get_group())
        if bounds[0] != -bounds[1]:
            raise ValueError(
                "ranks that share one batch would sample different tokens, since their random states differ: call "
                "`transformers.set_seed` with the same seed on all of them before `generate`"
            )


@torch.no_grad()
def draw_missing(model: PreTrainedModel) -> None:
    """Draws the parameters that no checkpoint had (a new head, more MTP modules), whole and from one random state, and
    keeps this rank's part. To be called on all ranks.

    The library lets each rank draw what it holds: whole parameters would differ from rank to rank where the random
    states do, and the halves of a split one be copies of each other, on CPU, where they do not.
    """
    seed = torch.randint(2**62, (1,), device=model.device)
    dist.broadcast(seed, src=0)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(seed))
        for module in model.modules():
            own = module._parameters
            missing = {
                name: parameter
                for name, parameter in own.items()
                if parameter is not None and not parameter.is_meta and not hasattr(parameter, "_is_hf_initialized")
            }
            if not missing:
                continue
            wholes = {name: nn.Parameter(torch.empty(one.shape, dtype=one.dtype)) for name, one in missing.items()}
            module._parameters = {**own, **wholes}
            try:
                model._init_weights(module)
            finally:
                module._parameters = own
            for name, parameter in missing.items():
                if is_split(parameter):
                    part = DtensorShardOperation(parameter).shard_tensor(wholes[name].data)
                    assert part is not None  # as for a single expert of others
                    parameter.to_local().copy_(part)
                else:
                    parameter.copy_(wholes[name])
                parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # the library's own mark


def is_split(tensor: Any) -> TypeGuard["DTensor"]:
    """Whether it is a DTensor. Not asked by transformers' `is_dtensor`, whose cached helper torch.compile warns of."""
    return hasattr(tensor, "to_local")


def summed_gradient(x: torch.Tensor, mesh: Any) -> torch.Tensor:
    """`x`, equal on all ranks of the mesh, whose gradient is the sum over ranks: for what feeds each rank's own heads
    without passing through a split layer."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    if not (torch.is_grad_enabled() and x.requires_grad):
        return x
    return DTensor.from_local(x, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that is split over ranks, on each of them."""
    return tensor.full_tensor() if is_split(tensor) else tensor


def is_spread(model: nn.Module) -> bool:
    """Whether no single rank holds the whole state of the model."""
    return hasattr(model, "_pp_stage") or any(is_split(parameter) for parameter in model.parameters())


def whole_state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The state of a model that is spread over ranks as full tensors on the CPU of rank 0, and {} on the others. To be
    called on all."""
    stage = getattr(model, "_pp_stage", None)
    if stage is None:
        state = gather_full_state_dict(model)
        # One tensor again, as in the model: gathering has made copies.
        state.update({tied: state[source] for tied, source in model.all_tied_weights_keys.items() if source in state})
        return state
    own = {name: full(tensor).cpu() for name, tensor in model.state_dict().items()}
    stages: list[Any] | None = [None] * stage.pp_size if stage.pp_is_first_stage else None
    dist.gather_object(own, stages, group=stage.pp_group, group_dst=0)
    if dist.get_rank() != 0:
        return {}
    state = {name: tensor for state in stages or () for name, tensor in state.items()}
    if model.config.tie_word_embeddings and "lm_head.weight" in state:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    return state
