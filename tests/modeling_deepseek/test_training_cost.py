"""What training costs, against published figures, by hand, and against PEFT."""

import pytest
from peft import LoraConfig, get_peft_model

from modeling_deepseek.activation_memory import LORA_SETS, lora_parameters, loss_bytes
from modeling_deepseek.adapter_targets import SETS
from modeling_deepseek.counts import load_config, training_flops, weight_bytes
from modeling_deepseek.hardware import V3_DOLLARS_PER_H800_HOUR, Gpu
from modeling_deepseek.training_cost import estimate_training
from tests.tiny import tiny_config, tiny_model

# V3's published cost. What is predicted, and from what:
# - FLOPs per token, from the architecture alone, against the TFLOP/s that arXiv 2505.09343 (table 4) reports for V3's
#   training on 2,048 H800 at 272.80B tokens a day, with attention counted causally (385) and not (432);
# - hours of pre-training, from these FLOPs, 14.8T tokens, the H800's peak and the MFU in the same table (38.94 %);
# - hours of extending the context, by the same MFU, which longer sequences do not quite reach in truth.
# The 5K hours of post-training and the price are inputs. The utilisation cannot be predicted from the architecture.
TOKENS_PER_DAY = 272.80e9
V3 = {"gpu": "h800", "gpus": 2048, "precision": "fp8", "dollars_per_gpu_hour": V3_DOLLARS_PER_H800_HOUR}


@pytest.mark.parametrize(("causal", "tflops"), [(True, 385), (False, 432)])
def test_v3_flops_per_token_are_those_it_was_timed_by(causal, tflops):
    per_gpu_and_second = TOKENS_PER_DAY / 86400 / 2048
    flops = training_flops(load_config("deepseek-v3"), 4096, mtp=False, causal=causal)
    assert flops * per_gpu_and_second / 1e12 == pytest.approx(tflops, rel=0.005)


def test_v3_costs_what_was_published():
    run = estimate_training("deepseek-v3", tokens=14.8e12, mfu=0.3894, mtp=False, **V3)
    assert run.gpu_hours == pytest.approx(2664e3, rel=0.005)
    # 1,000 steps of 1,920 sequences of 32K, then of 480 of 128K (V3 4.3).
    extension = [
        estimate_training(
            "deepseek-v3", tokens=1000 * sequences * length, context_tokens=length, mfu=0.3894, mtp=False, **V3
        ).gpu_hours
        for length, sequences in ((32768, 1920), (131072, 480))
    ]
    assert 119e3 / 2 < sum(extension) < 119e3
    total = run.gpu_hours + sum(extension) + 5e3
    assert total == pytest.approx(2788e3, rel=0.015)
    assert total * V3_DOLLARS_PER_H800_HOUR == pytest.approx(5.576e6, rel=0.015)


def test_v3_measured_throughput_is_its_published_hours():
    """180K hours for a trillion tokens, and table 1 of the paper, exactly; the MFU that this implies."""
    per_second = 1e12 / (180e3 * 3600) * 2048
    run = estimate_training("deepseek-v3", tokens=14.8e12, tokens_per_second=per_second, mtp=False, **V3)
    assert run.gpu_hours == pytest.approx(2664e3)
    assert (run.gpu_hours + 119e3 + 5e3) * 2 == pytest.approx(5.576e6)
    assert run.dollars == pytest.approx(2 * 2664e3)
    assert run.hours == pytest.approx(2664e3 / 2048)
    assert run.mfu == pytest.approx(0.391, abs=0.001)


def test_time_by_hand():
    """A GPU of 100 FLOP/s at 50 % does 50; with F FLOPs a token, 3,600 tokens take F / 50 hours on one, half on two."""
    gpu = Gpu(10**12, 1.0, 100.0, None, "a test's")
    config = tiny_config()
    flops = training_flops(config, 64)
    for gpus in (1, 2):
        run = estimate_training(
            config, gpu=gpu, gpus=gpus, context_tokens=64, tokens=3600, mfu=0.5, dollars_per_gpu_hour=3.0
        )
        assert run.hours == pytest.approx(flops / 50 / gpus)
        assert run.dollars == pytest.approx(3 * flops / 50)


# Memory beyond one full-precision GPU


def test_bytes_of_a_parameter():
    config = load_config("deepseek-v2-lite")
    parameters = 15.706e9
    for precision, optimizer, each in [
        ("fp32", "adamw", 4 + 4 + 8),
        ("mixed", "adamw", 2 + 4 + 4 + 8),
        ("bf16", "adamw-bf16", 2 + 2 + 4),
        ("fp8", "adamw-bf16", 1 + 4 + 4 + 4),  # V3 3.3: float32 master weights and gradients, bfloat16 moments
        ("bf16", "adamw-8bit", 2 + 2 + 2.03125),
        ("bf16", "sgd", 2 + 2),
    ]:
        memory = estimate_training(config, precision=precision, optimizer=optimizer).memory
        held = memory.weights_bytes + memory.gradients_bytes + memory.optimizer_bytes
        assert held / parameters == pytest.approx(each, rel=1e-3), (precision, optimizer)


def test_sharding_divides_and_accumulation_adds():
    options = {"gpus": 8, "context_tokens": 2048}
    whole = estimate_training("moonlight-16b-a3b", sharded=False, **options).memory
    shared = estimate_training("moonlight-16b-a3b", **options).memory
    for name in ("weights_bytes", "gradients_bytes", "optimizer_bytes"):
        assert getattr(shared, name) == getattr(whole, name) // 8
    assert whole.gathered_bytes == whole.gradients_bytes  # DDP's buckets
    # By hand: two layers' weights and one's gradients, embedding and head, the head's gradient. An expert has three
    # matrices of 2048 x 1408, a layer 64 and 2 of them, a gate, attention and norms.
    layer = 66 * 3 * 2048 * 1408 + 64 * 2048 + 2048 * (16 * 192 + 576 + 16 * 128) + 512 * 16 * 256 + 2 * 2048 + 512
    table = 163840 * 2048
    assert shared.gathered_bytes == (2 * layer + 2 * table) * 2 + (layer + table) * 4
    assert shared.activations_bytes == whole.activations_bytes
    summed = estimate_training("moonlight-16b-a3b", accumulates=True, **options).memory
    assert summed.peak_bytes > shared.peak_bytes


def test_logits_of_the_loss_by_hand():
    """8,192 tokens of V3: 512 MiB hold 1,038 tokens' float32 logits. Whole, its MTP module's wait beside them."""
    config = load_config("deepseek-v3")
    assert loss_bytes(config, 8192) == 1038 * 129280 * (2 + 3 * 4)
    config.logits_workspace_mib = 10**5
    assert loss_bytes(config, 8192) == 8192 * 129280 * (2 + 3 * 4 + 4 + 2)


def test_an_optimizer_that_loops_has_two_copies_of_the_largest_tensor():
    """Over few tokens, where the peak is the step: V2-Lite's stack of gate and up projections, twice in float32."""
    options = {"context_tokens": 1, "precision": "fp32", "checkpointing": False}
    loops, fused = (estimate_training("deepseek-v2-lite", fused=fused, **options).memory for fused in (False, True))
    tensors = [memory.peak_bytes - memory.allowance_bytes for memory in (loops, fused)]
    assert tensors[0] - tensors[1] == 2 * 4 * 64 * 2816 * 2048


def test_lora_trains_little_and_qlora_holds_less():
    full = estimate_training("deepseek-v2-lite", precision="bf16")
    lora = estimate_training("deepseek-v2-lite", lora_rank=16)
    qlora = estimate_training("deepseek-v2-lite", lora_rank=16, base_dtype="nf4", gpu="rtx-4090")
    assert lora.memory.trainable_parameters < 0.001 * full.memory.trainable_parameters
    assert lora.memory.weights_bytes - qlora.memory.weights_bytes == (
        weight_bytes(load_config("deepseek-v2-lite")) - weight_bytes(load_config("deepseek-v2-lite"), "nf4")
    )
    assert qlora.fits
    assert not estimate_training("deepseek-v2-lite", lora_rank=16, gpu="rtx-4090").fits


@pytest.mark.parametrize("overrides", [{}, {"q_lora_rank": None, "num_nextn_predict_layers": 2}], ids=["", "direct"])
@pytest.mark.parametrize("sets", [[name] for name in SETS] + [["attention", "routed_experts"]], ids="+".join)
def test_lora_parameters_are_those_of_peft(sets, overrides):
    model = get_peft_model(tiny_model("v3", **overrides), LoraConfig(r=8, target_modules=sets))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert lora_parameters(model.config, 8, sets) == trained


def test_sets_to_adapt_are_checked():
    assert LORA_SETS == SETS
    with pytest.raises(ValueError, match="unknown set to adapt 'atention', did you mean 'attention'"):
        lora_parameters(tiny_config(), 8, ["atention"])
