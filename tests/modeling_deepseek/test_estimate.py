"""Estimates against what real processes allocate, against published figures, and as they are printed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from modeling_deepseek import DeepseekV2Config, DeepseekV3Config, DeepseekV3ForCausalLM, quantization
from modeling_deepseek.adapter_targets import SETS
from modeling_deepseek.counts import training_flops, weight_bytes
from modeling_deepseek.estimate import (
    EXPERT_WORKSPACE_BYTES,
    GPUS,
    LORA_SETS,
    PROCESS_BYTES,
    V3_DOLLARS_PER_H800_HOUR,
    Gpu,
    activation_bytes,
    decode_bytes_read,
    estimate_serving,
    estimate_training,
    load_config,
    longest_context,
    lora_parameters,
    loss_bytes,
    main,
    most_sequences,
    serving_memory,
    what_fits,
)
from modeling_deepseek.moe import route
from tests.tiny import tiny_config, tiny_model

ROOT = Path(__file__).parents[2]

# 31M parameters that route, a quarter of them in MTP module and embeddings: 123 MB in float32.
SIZES = {
    "vocab_size": 4096,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "moe_intermediate_size": 192,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "q_lora_rank": 192,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 16384,
}
FEW_HEADS = {"num_attention_heads": 2, "moe_intermediate_size": 768, "num_hidden_layers": 3, "n_routed_experts": 8}
DENSE = {"n_routed_experts": None, "n_shared_experts": None, "vocab_size": 8192, "intermediate_size": 2048}
TRAINING = {
    "whole": dict(config={"num_nextn_predict_layers": 1}, tokens=512, batch=2),
    "checkpointed, the loss in pieces": dict(
        config={"vocab_size": 16384, "num_nextn_predict_layers": 1, "logits_workspace_mib": 8, "num_hidden_layers": 4},
        tokens=512, batch=1, checkpointing=True,
    ),
    "bfloat16": dict(config=DENSE, tokens=512, batch=2, dtype="bf16"),
}  # fmt: skip
SERVING = {
    "wide attention": dict(config={"num_attention_heads": 32, "num_hidden_layers": 3}, context=2048, piece=2048),
    "wide experts": dict(config=FEW_HEADS, context=4096, piece=4096),
    "in pieces": dict(config={"mla_workspace_mib": 16, "num_hidden_layers": 4}, context=8192, piece=1024),
}
# Each case by itself in one process: resident bytes at their highest, above those before the model was there. Linux
# forgets the highest when it is told to.
ALLOCATE = """
import gc, json, sys, torch
from modeling_deepseek import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers import DynamicCache

def resident(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

def forget():
    open("/proc/self/clear_refs", "w").write("5")

def ids(batch, length):
    return torch.randint(2, 250, (batch, length))

def train(model, batch, tokens, steps=2):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for _ in range(steps):
        forget()
        optimizer.zero_grad()
        x = ids(batch, tokens)
        model(x, labels=x, use_cache=False).loss.backward()
        optimizer.step()
    return resident("VmHWM")

@torch.no_grad()
def serve(model, context, piece):
    cache = DynamicCache(config=model.config)
    forget()
    for _ in range(context // piece):
        model(ids(1, piece), past_key_values=cache, logits_to_keep=1)
    return resident("VmHWM")

def build(case):
    config = DeepseekV3Config(**case["config"])
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[case.get("dtype", "fp32")]
    model = DeepseekV3ForCausalLM(config).to(dtype)
    if case.get("checkpointing"):
        model.activation_checkpointing_enable()
    return model

def run(case):
    gc.collect()
    before = resident("VmRSS")
    model = build(case)
    if "piece" in case:
        return serve(model.eval(), case["context"], case["piece"]) - before
    return train(model.train(), case["batch"], case["tokens"]) - before

cases = json.loads(sys.argv[1])
small = {**next(iter(cases.values()))["config"], "hidden_size": 64, "num_hidden_layers": 2}
run({"config": small, "batch": 1, "tokens": 16})  # what libraries allocate once
run({"config": small, "context": 16, "piece": 8})
print(json.dumps({name: run(case) for name, case in cases.items()}))
"""


LOAD = """
import gc, json, logging, sys, torch
from pathlib import Path
from modeling_deepseek import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers import BitsAndBytesConfig

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
FORMATS = {
    "bf16": None,
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}

def anonymous():  # not the pages of the file, which are mapped
    gc.collect()
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))

def load(folder, name):
    kwargs = {"quantization_config": FORMATS[name]} if FORMATS[name] else {}
    return DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **kwargs)

folder, config = Path(sys.argv[1]), json.loads(sys.argv[2])
for place, sizes in (("small", {"hidden_size": 64, "num_hidden_layers": 2}), ("large", {})):
    # In float32: what needs no conversion would stay a mapped part of the file.
    DeepseekV3ForCausalLM(DeepseekV3Config(**{**config, **sizes})).save_pretrained(folder / place)
held = {}
for name in FORMATS:
    load(folder / "small", name)  # what libraries allocate once
    before = anonymous()
    model = load(folder / "large", name)
    held[name] = anonymous() - before
    del model
print(json.dumps(held))
"""


def child(program: str, *arguments: str) -> dict[str, int]:
    """What a process of its own prints, as JSON. Tensors get pages of their own, which go back when they are freed."""
    pages = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    environment = {**os.environ, **pages, "PYTHONPATH": str(ROOT)}
    process = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


needs_proc = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's account of memory")


DEFAULT = ("checkpointed, the loss in pieces", "wide experts", "in pieces")  # the others are slow tests


def by_default(cases: dict) -> list:
    return [name if name in DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in cases]


def allocated(names) -> dict[str, int]:
    cases = {name: case for name, case in {**TRAINING, **SERVING}.items() if name in names}
    cases = {name: {**case, "config": {**SIZES, **case["config"]}} for name, case in cases.items()}
    return child(ALLOCATE, json.dumps(cases))


@pytest.fixture(scope="module")
def measured():
    """Bytes by case; those of the default ones are asked for together, in one process."""
    together: dict[str, int] = {}

    def of(name: str) -> int:
        if name not in together:
            together.update(allocated(DEFAULT if name in DEFAULT else (name,)))
        return together[name]

    return of


@needs_proc
@pytest.mark.parametrize("name", by_default(TRAINING))
def test_training_memory_is_what_a_process_allocates(name, measured):
    case = TRAINING[name]
    config = DeepseekV3Config(**{**SIZES, **case["config"]})
    half = case.get("dtype") == "bf16"
    memory = estimate_training(
        config, context_tokens=case["tokens"], batch_size=case["batch"], precision="bf16" if half else "fp32",
        optimizer="adamw-bf16" if half else "adamw", checkpointing=case.get("checkpointing", False), fused=False,
    ).memory  # fmt: skip
    assert memory.peak_bytes - memory.allowance_bytes == pytest.approx(measured(name), rel=0.1)


@needs_proc
@pytest.mark.parametrize("name", by_default(SERVING))
def test_serving_memory_is_what_a_process_allocates(name, measured):
    case = SERVING[name]
    config = DeepseekV3Config(**{**SIZES, **case["config"]})
    memory = serving_memory(
        config, case["context"], weights_dtype="fp32", cache_dtype="fp32", prefill_tokens=case["piece"]
    )
    assert memory.bytes_per_gpu - memory.allowance_bytes == pytest.approx(measured(name), rel=0.1)


@needs_proc
@pytest.mark.slow
def test_loaded_weights_are_what_a_process_holds(tmp_path):
    """In 16, 8 and 4 bits, 66M parameters, most of them routed experts."""
    sizes = {**SIZES, "num_hidden_layers": 8, "n_routed_experts": 32}
    held = child(LOAD, str(tmp_path), json.dumps(sizes))
    for name, size in held.items():
        assert weight_bytes(DeepseekV3Config(**sizes), name) == pytest.approx(size, rel=0.08), name
    assert held["nf4"] < 0.4 * held["bf16"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "overrides",
    [{}, {"num_nextn_predict_layers": 2}, {"q_lora_rank": None, "n_group": 1, "topk_group": 1}, DENSE],
    ids=["", "MTP", "no groups", "dense"],
)
def test_activations_are_what_autograd_keeps(dtype, checkpointing, overrides):
    config = DeepseekV3Config(**{**SIZES, "num_hidden_layers": 3, **overrides})
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(config).to(dtype).train()
    if checkpointing:
        model.activation_checkpointing_enable()
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    ids = torch.randint(2, 250, (2, 64))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(ids, labels=ids, use_cache=False)
    log_probabilities = 128 * config.vocab_size * 4
    held = sum(storage.nbytes() for storage in kept.values())
    held -= (1 + config.num_nextn_predict_layers) * log_probabilities
    expected, again = activation_bytes(
        config, 128, checkpointing=checkpointing, dtype_bytes=dtype.itemsize, fused_norms=False
    )
    # What is left out: angles, indices and, under checkpointing, what each call was passed.
    assert held == pytest.approx(expected, rel=0.05 if checkpointing else 0.01)
    assert (again > 0) == checkpointing


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


# Training memory beyond one full-precision GPU


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
    assert shared.gathered_bytes > 0 == whole.gathered_bytes
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


# Serving


@pytest.mark.parametrize("gigabytes", [12, 13, 14, 15, 16, 17])
def test_longest_context_and_most_sequences_are_the_last_that_fit(gigabytes):
    config, memory = load_config("deepseek-v2-lite"), gigabytes * 10**9

    def needed(context, sequences=1):
        return serving_memory(config, context, batch_size=sequences, weights_dtype="nf4").bytes_per_gpu

    longest = longest_context(config, memory, weights_dtype="nf4")
    assert 0 < longest < config.max_position_embeddings
    assert needed(longest) <= memory < needed(longest + 1)
    most = most_sequences(config, memory, 1024, weights_dtype="nf4")
    assert most > 1
    assert needed(1024, most) <= memory < needed(1024, most + 1)


def test_nothing_fits_where_the_weights_do_not():
    config = load_config("deepseek-v2-lite")
    assert longest_context(config, 8 * 10**9, weights_dtype="nf4") == 0
    assert most_sequences(config, 8 * 10**9, 4096, weights_dtype="nf4") == 0


def test_a_16b_model_on_one_24_gb_card():
    for model in ("deepseek-v2-lite", "moonlight-16b-a3b"):
        cells = {
            dtype: fit.context_tokens for dtype in ("bf16", "nf4") for fit in what_fits([model], [dtype], [(1, 24)])
        }
        assert cells == {"bf16": 0, "nf4": load_config(model).max_position_embeddings}
    # V3's 671 GB: not on eight cards of 80 GB, but on eight of 141.
    fits = [fit.context_tokens for fit in what_fits(["deepseek-v3"], ["fp8"], [(8, 80), (8, 141)])]
    assert fits == [0, 163840]


def test_layers_are_dealt_out_and_tensors_are_cut():
    config = load_config("deepseek-v3")
    one = serving_memory(config, 32768, weights_dtype="fp8")
    layers = serving_memory(config, 32768, weights_dtype="fp8", gpus=8)
    tensor = serving_memory(config, 32768, weights_dtype="fp8", gpus=8, split="tensor")
    assert one.weights_bytes == layers.weights_bytes == one.weights_bytes_per_gpu
    assert tensor.weights_bytes_per_gpu == one.weights_bytes // 8
    assert tensor.cache_bytes_per_gpu == one.cache_bytes  # latents have no heads to be split by
    # Dealt out whole, 61 layers give some GPU eight at least; an eighth and one more are 8.6.
    assert 8 / 61 < layers.weights_bytes_per_gpu / one.weights_bytes < 9 / 61
    assert 8 / 61 < layers.cache_bytes_per_gpu / one.cache_bytes < 9 / 61


def test_a_batch_meets_the_experts_that_even_routing_says():
    config = tiny_config("v3", num_nextn_predict_layers=0, n_group=1, topk_group=1)
    generator = torch.Generator().manual_seed(0)
    met = []
    for _ in range(2000):
        scores = torch.rand(4, 8, generator=generator)
        indices = route(scores, None, top_k=3, topk_method="greedy")[1]
        met.append(indices.unique().numel() / 8)
    routed, others = 2 * 3 * 8 * 64 * 32 * 4, decode_bytes_read(config, 0, "fp32")
    share = (decode_bytes_read(config, 4, "fp32") - others) / routed
    assert share == pytest.approx(sum(met) / len(met), abs=0.01)


def test_decoding_is_bound_by_reading_at_small_batches_and_by_computing_at_large_ones():
    gpu = GPUS["h200"]
    one = estimate_serving("deepseek-v3", gpu="h200", gpus=8, weights_dtype="fp8", split="tensor")
    config = load_config("deepseek-v3")
    read = decode_bytes_read(config, 1, "fp8") / 8 + 4096 * 70272
    assert one.decode_tokens_per_second == pytest.approx(gpu.bandwidth_bytes_per_second / read)
    # Enough sequences for every expert to be busy: the peak over the FLOPs of a token.
    tiny = Gpu(10**15, 1e15, 1e9, None, "a test's")
    busy = estimate_serving("tiny-v3", gpu=tiny, batch_size=64, context_tokens=16)
    assert busy.decode_tokens_per_second == pytest.approx(1e9 / busy.decode_flops_per_token)
    # A price is of all GPUs, whether they work or wait.
    priced = estimate_serving(
        "deepseek-v3", gpu="h200", gpus=8, weights_dtype="fp8", split="tensor", dollars_per_gpu_hour=3.0
    )
    per_hour = priced.decode_tokens_per_second * 3600
    assert priced.dollars_per_million_decode_tokens == pytest.approx(8 * 3.0 / per_hour * 1e6)
    assert one.dollars_per_million_decode_tokens is None


# Names, files and values


def test_configurations_are_found(tmp_path):
    config = tiny_config("v2")
    config.save_pretrained(tmp_path)
    found = load_config(tmp_path)
    assert isinstance(found, DeepseekV2Config)
    assert found.hidden_size == 64
    assert load_config(config) is config
    kimi = json.loads((tmp_path / "config.json").read_text()) | {"model_type": "kimi_k2", "topk_method": "noaux_tc"}
    (tmp_path / "config.json").write_text(json.dumps(kimi))
    assert isinstance(load_config(tmp_path), DeepseekV3Config)
    assert isinstance(load_config(tmp_path / "config.json"), DeepseekV3Config)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="is a 'llama'; this package knows deepseek_v2"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: load_config("deepseek-v3-lite"), "unknown model 'deepseek-v3-lite', did you mean 'deepseek-v2-lite'"),
        (lambda: estimate_serving("tiny-v3", gpu="h10"), "unknown GPU 'h10', did you mean 'h100'"),
        (lambda: estimate_serving("tiny-v3", context_tokens=513), "513 is beyond the model's `max_position_embed"),
        (lambda: estimate_serving("tiny-v3", context_tokens=16, gpus=0), "`gpus` must be at least 1, got 0"),
        (lambda: estimate_serving("tiny-v3", context_tokens=16, split="rows"), "`split` must be 'layers' or 'tensor'"),
        (lambda: estimate_serving("tiny-v3", context_tokens=16, weights_dtype="int5"), "unknown weight dtype 'int5'"),
        (lambda: estimate_training("tiny-v3", context_tokens=16, precision="fp64"), "unknown precision 'fp64'"),
        (lambda: estimate_training("tiny-v3", context_tokens=16, optimizer="adam"), "did you mean 'adamw'"),
        (lambda: estimate_training("tiny-v3", context_tokens=16, tokens=1e9), "`tokens` need `mfu` or a measured"),
        (lambda: estimate_training("tiny-v3", context_tokens=16, mfu=39), r"`mfu` must lie in \(0, 1\], got 39"),
        (
            lambda: estimate_training("tiny-v3", context_tokens=16, mfu=0.3, tokens_per_second=5.0),
            "both say how fast it is",
        ),
    ],
)
def test_what_cannot_be_estimated_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# The command line


def printed(capsys, *arguments: str) -> str:
    assert main(arguments) == 0
    return capsys.readouterr().out


def test_count_is_printed_and_says_the_same_as_json(capsys):
    text = printed(capsys, "count", "deepseek-v3")
    assert "671.03B" in text
    assert "36.63B" in text
    assert "70,272" in text
    numbers = json.loads(printed(capsys, "count", "deepseek-v3", "--json"))
    assert numbers["main"] == 671_026_404_352
    assert numbers["cache_bytes_per_token"]["bf16"] == 70272
    assert f"{numbers['training_flops_per_token'] / 1e9:.1f} GFLOPs" in text


def test_serving_is_printed_with_the_way_out(capsys):
    text = printed(capsys, "serve", "deepseek-v3", "--gpu", "H100", "--gpus", "8", "--context", "32K", "--dtype", "fp8")
    assert "does not fit; it would with --dtype nf4 or with --gpus 16" in text
    text = printed(
        capsys, "serve", "deepseek-v3", "--gpu", "h200", "--gpus", "8", "--context", "32K", "--dtype", "fp8",
        "--split", "tensor", "--dollars", "3",
    )  # fmt: skip
    assert "at least" in text
    assert "$" in text
    arguments = ("serve", "deepseek-v2-lite", "--gpu", "rtx-4090", "--dtype", "nf4", "--json")
    numbers = json.loads(printed(capsys, *arguments))
    assert numbers["fits"] is True
    assert numbers["bytes_per_gpu"] < numbers["gpu_memory_bytes"] == 24 * 10**9
    assert numbers["memory"]["weights_bytes"] == weight_bytes(load_config("deepseek-v2-lite"), "nf4")


def test_training_is_printed(capsys):
    arguments = ("train", "deepseek-v3", "--gpu", "h800", "--gpus", "2048", "--tokens", "14.8T", "--mfu", "0.3894")
    text = printed(capsys, *arguments, "--no-mtp", "--precision", "fp8", "--dollars", "2")
    assert "2,672,546" in text
    assert "$5,345,092" in text
    numbers = json.loads(printed(capsys, *arguments, "--no-mtp", "--json"))
    assert numbers["gpu_hours"] == pytest.approx(2_672_546, abs=1)
    assert numbers["tokens"] == 14.8e12


def test_the_table_is_aligned(capsys):
    lines = printed(capsys, "fits", "deepseek-v2-lite", "--dtypes", "bf16", "nf4").splitlines()
    rows = lines[-3:]
    assert rows[0].split()[:4] == ["model", "limit", "weights", "GB"]
    assert len({len(row) for row in rows}) == 1
    assert all(len(line) <= 120 for line in lines)
    assert rows[1].split()[4:] == ["-", "-", "-", *rows[1].split()[7:]]
    cells = json.loads(printed(capsys, "fits", "tiny-v3", "--dtypes", "bf16", "--json"))
    assert {cell["context_tokens"] for cell in cells} == {512}
    sequences = printed(capsys, "fits", "deepseek-v2-lite", "--dtypes", "nf4", "--context", "32K").splitlines()[-1]
    fits = what_fits(["deepseek-v2-lite"], ["nf4"], context_tokens=32768)
    assert sequences.split()[4:] == [f"{fit.batch_size}" if fit.batch_size else "-" for fit in fits]


def test_mistakes_are_said_in_a_line(capsys):
    assert main(["count", "deepseek-v4"]) == 1
    assert capsys.readouterr().err.startswith("error: unknown model 'deepseek-v4', did you mean 'deepseek-v")
    with pytest.raises(SystemExit) as exit_:
        main(["serve", "deepseek-v3", "--gpu", "h10"])
    assert exit_.value.code == 2
    assert "unknown GPU 'h10', did you mean 'h100'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["serve", "deepseek-v3", "--context", "many"])
    assert "'many' is not a count: write 4096, 32K, 20B or 14.8T" in capsys.readouterr().err


def test_nothing_heavy_is_imported_before_a_model_is_named():
    program = (
        "import sys, modeling_deepseek\n"
        "from modeling_deepseek import estimate_serving, estimate_training, what_fits\n"
        "from modeling_deepseek.estimate import main\n"
        "main(['gpus'])\n"
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert process.stdout.splitlines()[-1] == "[]"
    assert process.stdout.startswith("GPU ")


def test_the_bound_on_dequantised_experts_is_theirs():
    assert EXPERT_WORKSPACE_BYTES == quantization.WORKSPACE


def test_every_card_has_a_source_and_sound_numbers():
    for name, gpu in GPUS.items():
        assert gpu.source, name
        assert gpu.memory_bytes > PROCESS_BYTES
        if gpu.fp8_flops_per_second is not None:
            assert gpu.fp8_flops_per_second == pytest.approx(2 * gpu.bf16_flops_per_second, rel=0.02)
