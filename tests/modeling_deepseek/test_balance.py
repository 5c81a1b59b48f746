"""What the bias update counts: every token of an optimizer step once, however the step is cut into micro-batches,
recomputed, padded or spread over processes. And whether it does what it is for."""

import copy
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.nn.parallel import DistributedDataParallel

from modeling_deepseek import DeepseekV3ForCausalLM, max_violation
from tests.tiny import tiny_config, tiny_model, tokens


def step_model(**overrides) -> DeepseekV3ForCausalLM:
    """In training mode, with one MTP module and a balance loss large enough to be seen in the gradients."""
    return tiny_model(aux_loss_alpha=0.25, **overrides).train()


def as_lists(load: dict[int, torch.Tensor]) -> dict[int, list[int]]:
    return {layer: counts_E.tolist() for layer, counts_E in load.items()}


def biases(model: DeepseekV3ForCausalLM) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers() if "correction_bias" in name}


def backward(model, ids: torch.Tensor, **kwargs) -> None:
    model(ids, labels=ids, **kwargs).loss.backward()


def test_every_choice_of_every_layer_is_counted():
    """Layers 1 and 2 route 3 experts a token; the MTP module, layer 3, has no position for the last token."""
    model = step_model()
    backward(model, tokens(4, 10))
    load = model.update_correction_bias()
    assert {layer: counts_E.sum().item() for layer, counts_E in load.items()} == {1: 120, 2: 120, 3: 108}
    ids = tokens(4, 10)
    model(ids)  # without labels the module does not run
    assert {layer: counts_E.sum().item() for layer, counts_E in model.update_correction_bias().items()} == {
        1: 120, 2: 120, 3: 0,
    }  # fmt: skip


def test_accumulated_micro_batches_are_one_batch():
    ids = tokens(6, 10)
    whole, parts = step_model(), step_model()
    backward(whole, ids)
    for part in ids.split([1, 3, 2]):
        backward(parts, part)
    assert as_lists(whole.update_correction_bias()) == as_lists(parts.update_correction_bias())
    moved = biases(whole)
    assert all(torch.equal(bias, moved[name]) for name, bias in biases(parts).items())
    assert not any(torch.equal(bias, moved[name]) for name, bias in biases(step_model()).items())


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("every_n_layers", [1, 2])
def test_recomputed_tokens_count_once(use_reentrant, every_n_layers):
    ids = tokens(4, 10)
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    plain, checkpointed = step_model(num_nextn_predict_layers=2), step_model(num_nextn_predict_layers=2)
    checkpointed.activation_checkpointing_enable({"use_reentrant": use_reentrant}, every_n_layers=every_n_layers)
    recomputed = []
    checkpointed.model.layers[1].mlp.gate.register_forward_hook(lambda *_: recomputed.append(True))
    for model in (plain, checkpointed):
        backward(model, ids, attention_mask=mask, use_cache=False)
    assert len(recomputed) == (2 if every_n_layers == 1 else 1)  # of every second layer, layer 0 is recomputed
    assert as_lists(checkpointed.update_correction_bias()) == as_lists(plain.update_correction_bias())
    for name, parameter in plain.named_parameters():
        gradient = checkpointed.get_parameter(name).grad
        assert gradient is not None, name
        torch.testing.assert_close(gradient, parameter.grad, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_no_load(side):
    ids = tokens(2, 6)
    pad = torch.full((2, 3), 5)
    ones, zeros = torch.ones_like(ids), torch.zeros_like(pad)
    if side == "left":
        padded, mask = torch.cat([pad, ids], 1), torch.cat([zeros, ones], 1)
    else:
        padded, mask = torch.cat([ids, pad], 1), torch.cat([ones, zeros], 1)
    model = step_model()
    model(padded, attention_mask=mask, labels=padded.masked_fill(mask == 0, -100))
    with_padding = model.update_correction_bias()
    model = step_model()
    model(ids, labels=ids)
    assert as_lists(with_padding) == as_lists(model.update_correction_bias())


def test_only_training_counts():
    model = step_model()
    ids = tokens()
    model.eval()(ids, labels=ids)
    with torch.no_grad():
        model.train()(ids, labels=ids)
    before = biases(model)
    assert not any(counts_E.any() for counts_E in model.update_correction_bias().values())
    assert all(torch.equal(bias, before[name]) for name, bias in biases(model).items())


def test_the_bias_is_no_parameter():
    model = step_model()
    assert len(biases(model)) == 3
    assert not [name for name, _ in model.named_parameters() if "bias" in name]


def test_bias_and_routing_survive_saving(tmp_path):
    model = step_model()
    for _ in range(3):
        backward(model, tokens())
        model.update_correction_bias()
    model.save_pretrained(tmp_path)
    loaded = DeepseekV3ForCausalLM.from_pretrained(tmp_path).train()
    assert len(biases(loaded)) == 3
    assert all(torch.equal(bias, biases(loaded)[name]) for name, bias in biases(model).items())
    for either in (model, loaded):
        either.zero_grad()
        backward(either, tokens(seed=9))
    assert as_lists(loaded.update_correction_bias()) == as_lists(model.update_correction_bias())
    assert all(torch.equal(bias, biases(loaded)[name]) for name, bias in biases(model).items())


# Two processes

STEPS, RANKS, MICRO_BATCHES, ROWS = 3, 2, 2, 2


def micro_batch(step: int, micro: int, rank: int) -> torch.Tensor:
    """Different for each; rank 1 sees few different tokens, so that its load alone would move the bias otherwise."""
    ids = tokens(ROWS, 8, seed=100 * step + 10 * micro + rank)
    return ids % 5 + 2 if rank else ids


def train_under_ddp(rank: int, accumulate: bool) -> dict:
    model = DistributedDataParallel(step_model())  # as by default: buffers broadcast, no search for unused ones
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    loads = []
    for step in range(STEPS):
        for micro in range(MICRO_BATCHES):
            ids = micro_batch(step, micro, rank)
            waits = accumulate and micro < MICRO_BATCHES - 1
            with model.no_sync() if waits else nullcontext():
                (model(ids, labels=ids).loss / MICRO_BATCHES).backward()
        optimizer.step()
        optimizer.zero_grad()
        loads.append(as_lists(model.module.update_correction_bias()))
    return {"state": model.module.state_dict(), "loads": loads}


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    try:
        results = {accumulate: train_under_ddp(rank, accumulate) for accumulate in (True, False)}
        torch.save(results, f"{folder}/rank{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_processes_are_one(tmp_path: Path):
    """Two gloo processes under DDP, synchronising at each backward or (`no_sync`) once a step, against one process on
    all their rows."""
    torch.multiprocessing.spawn(run_rank, (str(tmp_path),), nprocs=RANKS)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(RANKS)]
    results = [rank[accumulate] for rank in ranks for accumulate in (True, False)]

    model = step_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(STEPS):
        rows = [micro_batch(step, micro, rank) for micro in range(MICRO_BATCHES) for rank in range(RANKS)]
        backward(model, torch.cat(rows))
        optimizer.step()
        optimizer.zero_grad()
        load = as_lists(model.update_correction_bias())
        assert [result["loads"][step] for result in results] == [load] * 4
    for name, tensor in model.state_dict().items():
        for result in results:
            if "correction_bias" in name:
                assert torch.equal(result["state"][name], tensor), name
            else:
                torch.testing.assert_close(result["state"][name], tensor, rtol=0, atol=1e-5, msg=name)


def test_load_of_a_group_of_processes(monkeypatch):
    """`group` says over which processes the load is summed; the rest of the call is the same."""
    model = step_model()
    backward(model, tokens())
    alone = {layer: counts_E.clone() for layer, counts_E in copy.deepcopy(model).update_correction_bias().items()}
    group, asked = object(), []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda counts, group: (asked.append(group), counts.mul_(2)))
    load = model.update_correction_bias(group)
    assert asked == [group] * 3
    assert all(torch.equal(load[layer], 2 * counts_E) for layer, counts_E in alone.items())


# What it is for

VOCABULARY, TRAINING_STEPS, LAST = 64, 200, 40


def skewed_text(rows: int, generator: torch.Generator) -> torch.Tensor:
    """Tokens by Zipf's law, half of them decided by their predecessor: frequent tokens make some experts popular."""
    successor = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(9))
    frequency = 1 / torch.arange(1, VOCABULARY + 1).float()
    ids = torch.multinomial(frequency, rows * 32, replacement=True, generator=generator).view(rows, 32)
    follows = torch.rand(rows, 32, generator=generator) < 0.5
    for position in range(1, 32):
        ids[:, position] = torch.where(follows[:, position], successor[ids[:, position - 1]], ids[:, position])
    return ids


def train_on_skewed_text(bias_update_speed: float) -> tuple[float, float]:
    """MaxVio of a batch (mean over layers and the last steps), and the loss on text not trained on."""
    torch.manual_seed(0)
    config = tiny_config(
        vocab_size=VOCABULARY,
        num_hidden_layers=2,
        first_k_dense_replace=0,
        num_nextn_predict_layers=0,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        aux_loss_alpha=0.0,
        initializer_range=0.02,
        bias_update_speed=bias_update_speed,
    )
    model = DeepseekV3ForCausalLM._from_config(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(100)
    violations = []
    for _ in range(TRAINING_STEPS):
        ids = skewed_text(8, generator)
        backward(model, ids, use_cache=False)
        optimizer.step()
        optimizer.zero_grad()
        load = model.update_correction_bias()
        violations.append(sum(max_violation(counts_E) for counts_E in load.values()) / len(load))
    unseen = skewed_text(64, torch.Generator().manual_seed(7))
    with torch.no_grad():
        loss = model.eval()(unseen, labels=unseen).loss.item()
    return sum(violations[-LAST:]) / LAST, loss


def test_bias_update_balances_at_no_cost_to_the_language_loss():
    """Measured: MaxVio 1.98 without and 0.29 with the update, loss 2.398 and 2.399 nats (seed 0); 1.66 and 0.27,
    2.407 and 2.405 with seed 1. `No worse` allows a hundredth of a nat."""
    violation_without, loss_without = train_on_skewed_text(0.0)
    violation_with, loss_with = train_on_skewed_text(0.005)
    assert violation_without > 1
    assert violation_with < violation_without / 4
    assert loss_with < loss_without + 0.01


def test_replicas_of_data_parallel_are_refused():
    """`torch.nn.DataParallel` counts on copies that it throws away; the bias would never move."""
    gate = tiny_model().model.layers[1].mlp.gate._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match="start one process for each GPU"):
        gate.record_load(torch.zeros(4, 3, dtype=torch.int64), None)
