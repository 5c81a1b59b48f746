"""The memory that is estimated, against what real processes allocate and what autograd keeps."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from modeling_deepseek import DeepseekV3Config, DeepseekV3ForCausalLM
from modeling_deepseek.activation_memory import LORA_SETS, Adapters, activation_bytes
from modeling_deepseek.counts import mtp_passes, weight_bytes
from modeling_deepseek.inference_cost import serving_memory
from modeling_deepseek.training_cost import estimate_training

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
        tokens=256, batch=1, checkpointing=True,
    ),
    "bfloat16": dict(config=DENSE, tokens=512, batch=2, dtype="bf16"),
}  # fmt: skip
SERVING = {
    "wide attention": dict(config={"num_attention_heads": 32, "num_hidden_layers": 3}, context=2048, piece=2048),
    "wide experts": dict(config=FEW_HEADS, context=4096, piece=4096),
    "in pieces": dict(config={"mla_workspace_mib": 8, "num_hidden_layers": 4}, context=4096, piece=1024),
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


# The same of one of two processes that share the model by FSDP2, a unit for each layer and one around them.
SHARE = """
import gc, json, sys, torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from modeling_deepseek import DeepseekV3Config, DeepseekV3ForCausalLM

def resident(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

def run(config):
    gc.collect()
    before = resident("VmRSS")
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**config)).train()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for _ in range(2):
        open("/proc/self/clear_refs", "w").write("5")
        optimizer.zero_grad()
        x = torch.randint(2, 250, (1, 16))
        model(x, labels=x, use_cache=False).loss.backward()
        optimizer.step()
    return resident("VmHWM") - before

dist.init_process_group("gloo")
config = json.loads(sys.argv[1])
run({**config, "hidden_size": 64, "num_hidden_layers": 2})
held = run(config)
if dist.get_rank() == 0:
    print(json.dumps({"held": held}))
dist.destroy_process_group()
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


def child(program: str, *arguments: str, ranks: int = 1) -> dict[str, int]:
    """What a process of its own prints, as JSON; of several that form a group, what the first prints. Tensors get pages
    of their own, which go back when they are freed."""
    pages = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    environment = {**os.environ, **pages, "PYTHONPATH": str(ROOT)}
    start = [sys.executable, "-c", program]
    if ranks > 1:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        start = [*torchrun, "--no-python", *start]
    process = subprocess.run([*start, *arguments], capture_output=True, text=True, cwd=ROOT, env=environment)
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
def test_sharded_memory_is_what_each_process_allocates():
    """75M parameters, of which a layer, embedding and head, and their gradients are whole at a time."""
    sizes = {**SIZES, "vocab_size": 16384, "moe_intermediate_size": 768, "num_hidden_layers": 4}
    memory = estimate_training(
        DeepseekV3Config(**sizes), gpus=2, context_tokens=16, precision="fp32", checkpointing=False, fused=False
    ).memory
    held = child(SHARE, json.dumps(sizes), ranks=2)["held"]
    assert memory.peak_bytes - memory.allowance_bytes == pytest.approx(held, rel=0.1)


@needs_proc
@pytest.mark.slow
def test_loaded_weights_are_what_a_process_holds(tmp_path):
    """In 16, 8 and 4 bits, 66M parameters, most of them routed experts."""
    sizes = {**SIZES, "num_hidden_layers": 8, "n_routed_experts": 32}
    held = child(LOAD, str(tmp_path), json.dumps(sizes))
    for name, size in held.items():
        assert weight_bytes(DeepseekV3Config(**sizes), name) == pytest.approx(size, rel=0.08), name
    assert held["nf4"] < 0.4 * held["bf16"]


def autograd_keeps(model, config) -> int:
    """Bytes of all tensors that wait for the backward pass of 128 tokens, but parameters and what the loss keeps."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    ids = torch.randint(2, 250, (2, 64))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=ids, labels=ids, use_cache=False)
    log_probabilities = 128 * config.vocab_size * 4
    return sum(storage.nbytes() for storage in kept.values()) - (1 + mtp_passes(config)) * log_probabilities


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "overrides",
    [{}, {"num_nextn_predict_layers": 2, "mtp_passes": 2}, {"q_lora_rank": None, "n_group": 1, "topk_group": 1}, DENSE],
    ids=["", "MTP", "no groups", "dense"],
)
def test_activations_are_what_autograd_keeps(dtype, checkpointing, overrides):
    config = DeepseekV3Config(**{**SIZES, "num_hidden_layers": 3, **overrides})
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(config).to(dtype).train()
    if checkpointing:
        model.activation_checkpointing_enable()
    expected, again = activation_bytes(
        config, 128, checkpointing=checkpointing, dtype_bytes=dtype.itemsize, fused_norms=False
    )
    # What is left out: angles, indices and, under checkpointing, what each call was passed.
    assert autograd_keeps(model, config) == pytest.approx(expected, rel=0.05 if checkpointing else 0.01)
    assert (again > 0) == checkpointing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sets", [["attention"], ["routed_experts"], list(LORA_SETS)], ids="+".join)
def test_activations_of_adapters_are_what_autograd_keeps(dtype, sets):
    """PEFT's adapters are float32 and cast what they read: all of them keep more than training everything does."""
    config = DeepseekV3Config(**{**SIZES, "num_hidden_layers": 3, "num_nextn_predict_layers": 1})
    torch.manual_seed(0)
    model = get_peft_model(DeepseekV3ForCausalLM(config).to(dtype).train(), LoraConfig(r=8, target_modules=sets))
    model.enable_input_require_grads()
    options = {"dtype_bytes": dtype.itemsize, "fused_norms": False}
    expected, _ = activation_bytes(config, 128, adapters=Adapters(8, tuple(sets)), **options)
    assert autograd_keeps(model, config) == pytest.approx(expected, rel=0.02)
    if dtype == torch.bfloat16:
        assert (expected > activation_bytes(config, 128, **options)[0]) == (len(sets) > 1)
