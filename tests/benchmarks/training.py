"""Rows of the benchmark table on training: memory and time of the loss over a large vocabulary, what checkpointing
keeps, what FP8 does to the loss and, on a GPU that multiplies it, to the time of a step."""

from collections.abc import Iterator
from pathlib import Path

import torch
from rows import DEVICE, TRAINED, Row, timed
from transformers.loss.loss_utils import ForCausalLMLoss

from modeling_deepseek import DeepseekV3Config, DeepseekV3ForCausalLM
from modeling_deepseek.losses import token_losses
from tests.modeling_deepseek.test_losses import peak
from tests.modeling_deepseek.test_training import Kept

VOCABULARY, TOKENS, WORKSPACE_MIB = 129280, 8192, 512


def loss_sides(tokens: int, width: int):
    """Two calls that compute loss and gradients: in chunks, and transformers' own from whole logits."""
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(width, VOCABULARY, bias=False).to(DEVICE)
    hidden = torch.randn(1, tokens, width, generator=generator).to(DEVICE).requires_grad_()
    targets = torch.randint(0, VOCABULARY, (1, tokens), generator=generator).to(DEVICE)

    def backward(loss: torch.Tensor) -> float:
        head.weight.grad = hidden.grad = None
        loss.backward()
        return loss.item()

    chunk_size = DeepseekV3Config(vocab_size=VOCABULARY, logits_workspace_mib=WORKSPACE_MIB).logits_at_once
    return (
        lambda: backward(token_losses(head, hidden, targets, chunk_size).sum() / tokens),
        lambda: backward(ForCausalLMLoss(head(hidden), None, VOCABULARY, shift_labels=targets)),
    )


def loss_memory(alternate) -> Iterator[Row]:
    if DEVICE == "cuda":
        peaks = []
        for call in loss_sides(TOKENS, width=2048):
            call()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call()
            peaks.append(torch.cuda.max_memory_allocated() - before)
        ours, theirs = peaks
    elif Path("/proc/self/status").exists():
        sizes = (TOKENS, VOCABULARY, 64, WORKSPACE_MIB)
        (ours, *found), (theirs, *expected) = peak("chunked", *sizes), peak("whole", *sizes)
        for value, reference in zip(found, expected, strict=True):
            assert abs(value - reference) < 1e-5 * abs(reference), (found, expected)
    else:
        return
    yield Row(
        f"peak memory of the loss, {TOKENS:,} tokens, {VOCABULARY:,} words",
        f"{ours / 2**30:.2f} GiB",
        f"{theirs / 2**30:.2f} GiB",
        f"{theirs / ours:.1f}x",
        "> 5x",
    )


def loss_time(alternate) -> Iterator[Row]:
    tokens = TOKENS if DEVICE == "cuda" else 2048
    calls = loss_sides(tokens, width=256)
    losses = [call() for call in calls]
    assert abs(losses[0] - losses[1]) < 1e-4, losses
    name = f"loss and gradients, {tokens:,} tokens, {VOCABULARY:,} words"
    yield timed(name, alternate(*calls, runs=3, warmup=1), "the price of the memory: the head runs twice")


def checkpointing(alternate) -> Iterator[Row]:
    ids = torch.randint(0, 8192, (2, 512), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    kept, losses = [], []
    for checkpointed in (True, False):
        torch.manual_seed(0)
        model = DeepseekV3ForCausalLM._from_config(DeepseekV3Config(**TRAINED)).to(DEVICE).train()
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        counter = Kept(model)
        with torch.autograd.graph.saved_tensors_hooks(counter.pack, lambda tensor: tensor):
            losses.append(model.model(ids, use_cache=False).last_hidden_state.square().mean().item())
        kept.append(counter.kept)
    assert losses[0] == losses[1], losses
    yield Row(
        "kept for the backward pass, 1,024 tokens, checkpointed",
        f"{kept[0] / 2**20:.0f} MiB",
        f"{kept[1] / 2**20:.0f} MiB",
        f"{kept[1] / kept[0]:.1f}x",
        "> 5x",
    )


def fp8(alternate) -> Iterator[Row]:
    try:
        import torchao.float8  # noqa: F401
    except ImportError:
        return
    from modeling_deepseek.fp8_training import convert_to_fp8_training
    from tests.modeling_deepseek.test_fp8_training import HOPPER, losses

    device = "cuda" if HOPPER else "cpu"
    steps = 1000 if HOPPER else 100
    expected, found = losses("bf16", steps, device), losses("fp8", steps, device)
    error = ((found - expected).abs() / expected).max().item()
    how = "" if HOPPER else ", emulated"
    yield Row(f"relative error of the loss in FP8{how}, {steps} steps", f"{error:.3%}", "", "", "< 0.25 %")
    if not HOPPER:
        return
    ids = torch.randint(0, 8192, (8, 2048), generator=torch.Generator().manual_seed(3)).cuda()
    wide = {**TRAINED, "hidden_size": 2048, "intermediate_size": 8192, "moe_intermediate_size": 1408}
    steps_of = []
    for in_fp8 in (True, False):
        torch.manual_seed(0)
        model = DeepseekV3ForCausalLM._from_config(DeepseekV3Config(**wide), dtype=torch.bfloat16).cuda().train()
        if in_fp8:
            convert_to_fp8_training(model)
        model.compile()
        steps_of.append(lambda model=model: model(ids, labels=ids, use_cache=False).loss.backward())
    yield timed("forward and backward in FP8 (bfloat16), 16,384 tokens", alternate(*steps_of, runs=7, warmup=3), "> 1x")


ROWS = {
    "loss memory": loss_memory,
    "loss time": loss_time,
    "checkpointing": checkpointing,
    "fp8": fp8,
}
