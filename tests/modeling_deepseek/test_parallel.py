"""Two processes that share a model, against one that has it whole: what they compute, learn, save and load."""

import json
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.distributed import DistributedConfig
from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard

from modeling_deepseek import DeepseekV3ForCausalLM
from modeling_deepseek.parallel import check_layout
from tests import spread
from tests.ranks import on_ranks
from tests.tiny import tiny_config, tiny_model

forkserver.ensure_running()  # which begins its imports while other tests are still being collected

REST = ["ep", "tp+ep", "fsdp+ep"]
TRAINABLE = ["tp", "fsdp", *REST]

# What each rank holds half of, and of nothing else; under FSDP, of everything.
ATTENTION = {"q_b_proj", "kv_b_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}
EXPERTS = {"experts.gate_up_proj", "experts.down_proj"}
SPLIT = {
    "tp": ATTENTION | MLP | EXPERTS | {"eh_proj", "embed_tokens", "lm_head"},
    "ep": EXPERTS,
    "tp+ep": ATTENTION | MLP | EXPERTS | {"eh_proj", "embed_tokens", "lm_head"},
    "fsdp": None,
    "fsdp+ep": None,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints. `v3` has MTP modules; `v2` has no query compression, but biases and tied embeddings."""
    folder = tmp_path_factory.mktemp("spread")
    v3 = tiny_model("v3", num_nextn_predict_layers=2, aux_loss_alpha=0.25)
    v3.save_pretrained(folder / "v3")
    v3.save_pretrained(folder / "v3-fp8", fp8=True)
    v2 = {"q_lora_rank": None, "attention_bias": True, "tie_word_embeddings": True, "aux_loss_alpha": 0.25}
    tiny_model("v2", **v2).save_pretrained(folder / "v2")
    return folder


@pytest.mark.parametrize("layout", TRAINABLE)
def test_spread_models_are_the_whole_one(folder, layout):
    on_ranks(folder, spread.same_model, "v3", layout, SPLIT)


@pytest.mark.parametrize("layout", ["tp", "fsdp", *(pytest.param(name, marks=pytest.mark.slow) for name in REST)])
def test_tied_weights_and_biases_are_spread_too(folder, layout):
    on_ranks(folder, spread.same_model, "v2", layout)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["fsdp+tp", "fsdp+tp+ep"])
def test_two_ways_at_once_on_four_ranks(folder, layout):
    on_ranks(folder, spread.same_model, "v3", layout, ranks=4)


@pytest.mark.parametrize("layout", ["tp", "fsdp"])
def test_recomputed_layers_take_the_same_step(folder, layout):
    on_ranks(folder, spread.recomputed, layout)


def test_the_absorbed_path_learns_the_same(folder):
    on_ranks(folder, spread.absorbed, "tp")


@pytest.mark.parametrize("layout", ["tp", "fsdp"])
def test_the_loss_in_chunks_is_the_same(folder, layout):
    on_ranks(folder, spread.in_chunks, layout)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("layout", ["tp+ep", "pp"])
def test_all_ranks_generate_what_one_process_does(folder, layout, cache):
    on_ranks(folder, spread.generates, layout, cache)


@pytest.mark.parametrize("layout", ["tp", "fsdp+ep", "pp"])
def test_each_rank_dequantises_its_part_of_an_fp8_checkpoint(folder, layout):
    on_ranks(folder, spread.same_logits, "v3-fp8", layout)


def test_the_reference_experts_skip_those_of_other_ranks(folder):
    on_ranks(folder, spread.same_logits, "v3", "tp+ep", {"experts_implementation": "eager"})


@pytest.mark.parametrize("layout", ["tp+ep", "fsdp"])
def test_state_that_is_float32_stays_so(folder, layout):
    on_ranks(folder, spread.in_bfloat16, layout)


@pytest.mark.parametrize("layout", ["tp", "fsdp+ep"])
def test_files_of_each_rank_load_again(folder, layout):
    on_ranks(folder, spread.parts_on_disk, layout)


def test_weights_that_are_drawn_are_the_same_on_all_ranks(folder):
    on_ranks(folder, spread.draws_alike)


@pytest.mark.parametrize("layout", ["tp+ep"])
def test_many_prompts_at_once(folder, layout):
    on_ranks(folder, spread.batched, layout)


def test_adapters_are_trained_on_sharded_weights_and_refused_on_split_ones(folder):
    on_ranks(folder, spread.adapted)


def test_plans_name_only_what_a_model_has():
    """The library warns of a rule that matches nothing."""
    for model in (tiny_model("v3"), tiny_model("v2", q_lora_rank=None), tiny_model("v3", n_routed_experts=None)):
        names = {name for name, _ in [*model.named_modules(), *model.named_parameters()]}
        there = {replace_layer_number_by_wildcard(name) for name in names}
        assert model.tp_plan.keys() | model.ep_plan.keys() <= there
        assert "lm_head" in model.tp_plan


@pytest.mark.parametrize("checkpoint", ["v3", "v2"])
def test_stages_of_a_pipeline_are_the_whole_model(folder, checkpoint):
    on_ranks(folder, spread.staged, checkpoint)


def test_layers_sharded_by_hand_take_the_same_step(folder):
    on_ranks(folder, spread.shards_by_hand)


def test_sharded_files_resume_where_they_were_written(folder):
    on_ranks(folder, spread.resumed_shards)


@pytest.mark.parametrize(
    "settings",
    [pytest.param({}, marks=pytest.mark.slow), {"activation_checkpointing": True}],
    ids=["plain", "recomputed"],
)
def test_accelerate_shards_and_saves(folder, settings):
    on_ranks(folder, spread.through_accelerate, settings, alone=True)


def test_trainer_learns_the_same_from_half_the_batch_on_each_rank(folder):
    """Weights, and the log of the loss, the gradient's norm and the balance, against `Trainer` in one process."""
    for layout, name in ((None, "whole"), ("fsdp", "shared")):
        on_ranks(folder, spread.trains, layout, name, ranks=2 if layout else 1, alone=True)
    whole, shared = (load_file(folder / name / "model.safetensors") for name in ("whole", "shared"))
    torch.testing.assert_close(shared, whole, atol=1e-5, rtol=1e-5)
    logs = [json.loads((folder / name / "state.json").read_text())["log_history"] for name in ("whole", "shared")]
    for theirs, ours in zip(*logs, strict=True):
        assert ours.get("tokens_per_expert") == theirs.get("tokens_per_expert")
        for key in {"loss", "grad_norm", "max_vio"} & theirs.keys():
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5)


@pytest.mark.parametrize(
    ("config", "layout", "message"),
    [
        ({"num_attention_heads": 3}, {"tp_size": 2}, "`num_attention_heads` \\(3\\) must be divisible by tp_size"),
        (
            {"moe_intermediate_size": 33},
            {"tp_size": 2},
            "`moe_intermediate_size` \\(33\\) must be divisible",
        ),
        ({"n_routed_experts": 8}, {"fsdp_size": 3, "ep_size": 3}, "`n_routed_experts` \\(8\\) must be divisible by ep"),
        ({"n_routed_experts": None}, {"tp_size": 2, "ep_size": 2}, "the model has no experts"),
        ({}, {"pp_size": 5}, "pp_size \\(5\\) is too large for 3 layers and 1 MTP modules"),
        ({"num_nextn_predict_layers": 5}, {"pp_size": 2}, "the last one all modules"),
        ({}, {"tp_plan": {}}, "every size of the DistributedConfig is 1"),
    ],
)
def test_what_cannot_be_split_is_refused(config, layout, message):
    with pytest.raises(ValueError, match=message):
        check_layout(tiny_config(**config), DistributedConfig(**layout))


def test_what_can_be_split_is_not():
    check_layout(tiny_config(num_attention_heads=3), DistributedConfig(tp_size=2, ep_size=2, tp_plan={}))
    check_layout(tiny_config(moe_intermediate_size=33), DistributedConfig(tp_size=2, ep_size=2))
    check_layout(tiny_config(num_nextn_predict_layers=0), DistributedConfig(pp_size=3))
    check_layout(tiny_config(), DistributedConfig())


@pytest.mark.filterwarnings("ignore:`enable_expert_parallel` without `ep_size`:FutureWarning")
def test_expert_parallelism_without_processes_is_refused(folder):
    """The library runs the whole model on each process without a word."""
    with pytest.raises(ValueError, match="`enable_expert_parallel` alone sets no size"):
        DeepseekV3ForCausalLM.from_pretrained(
            folder / "v3", distributed_config=DistributedConfig(enable_expert_parallel=True)
        )
