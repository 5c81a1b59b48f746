"""Rows of the benchmark table: a training step of LoRA on routed experts against PEFT's own wrapper of stacked weights
on transformers' class, with the same adapter (saved there, loaded here); and what is adapted where a set is named."""

import tempfile
import warnings
from collections.abc import Iterator

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rows import DEVICE, TRAINED, Row, both, timed

from tests.modeling_deepseek import test_adapters
from tests.tiny import tiny_model


def kept_bytes(step, model: torch.nn.Module) -> int:
    """What autograd keeps for the backward pass of `step`, without parameters; on CUDA its peak of memory."""
    if DEVICE == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(kept.values())


def expert_adapters(alternate) -> Iterator[Row]:
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    base, their_base = both(TRAINED, dtype)
    config = LoraConfig(r=16, target_modules=["gate_proj", "up_proj", "down_proj"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of patterns that PEFT itself has put into the configuration
        theirs = get_peft_model(their_base, config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.02)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = PeftModel.from_pretrained(base, folder, is_trainable=True, autocast_adapter_dtype=False)
    for shape in ((4, 512), (1, 128)):
        batch = torch.randint(0, 8192, shape, generator=torch.Generator().manual_seed(3)).to(DEVICE)

        def step(model, batch=batch) -> float:
            model.zero_grad()
            loss = model.train()(input_ids=batch, labels=batch, use_cache=False).loss
            loss.backward()
            return loss.item()

        losses = step(ours), step(theirs)
        assert abs(losses[0] - losses[1]) < (1e-3 if dtype == torch.float32 else 5e-2), losses
        name = f"LoRA on 32 experts, {shape[0]} x {shape[1]} tokens"
        timing = alternate(lambda step=step: step(ours), lambda step=step: step(theirs), runs=7, warmup=1)
        yield timed(f"training step, {name}", timing, "not slower")
        memory = kept_bytes(lambda step=step: step(ours), ours), kept_bytes(lambda step=step: step(theirs), theirs)
        ours_mib, theirs_mib = (f"{one / 2**20:.0f} MiB" for one in memory)
        yield Row(f"kept for its backward pass, {name}", ours_mib, theirs_mib, f"{memory[1] / memory[0]:.2f}x", "less")


def named_sets(alternate) -> Iterator[Row]:
    for targets in (*test_adapters.SETS, "all-linear"):
        model = test_adapters.adapt(tiny_model(), targets)
        names = test_adapters.adapted(model)
        assert names == test_adapters.SETS.get(targets, test_adapters.ALL)
        unmerged = test_adapters.outputs(model)
        gap = (test_adapters.outputs(model.merge_and_unload()) - unmerged).abs().max()
        name = f"LoRA on {targets}, {len(names)} layers, merged - unmerged"
        yield Row(name, f"{gap:.1e}", "", "", "<= 1e-5, these only")


ROWS = {"expert adapters": expert_adapters, "adapter sets": named_sets}
