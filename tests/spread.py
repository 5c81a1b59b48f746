"""What each rank does in the tests of several devices: a model spread over ranks beside the same model whole."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import ContinuousBatchingConfig, Trainer, TrainingArguments
from transformers.distributed import DistributedConfig
from transformers.models.deepseek_v3 import modeling_deepseek_v3

from modeling_deepseek import DeepseekTrainerCallback, DeepseekV2ForCausalLM, DeepseekV3ForCausalLM
from tests.tiny import tokens

CLASSES = {"deepseek_v2": DeepseekV2ForCausalLM, "deepseek_v3": DeepseekV3ForCausalLM}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp": {"tp_size": 2},
    "ep": {"tp_size": 2, "ep_size": 2, "tp_plan": {}},
    "tp+ep": {"tp_size": 2, "ep_size": 2},
    "fsdp": {"fsdp_size": 2},
    "fsdp+ep": {"fsdp_size": 2, "ep_size": 2},
    "pp": {"pp_size": 2},
    "fsdp+tp": {"fsdp_size": 2, "tp_size": 2},
    "fsdp+tp+ep": {"fsdp_size": 2, "tp_size": 2, "ep_size": 4},
}


def load(checkpoint: Path, layout: str | None = None, **kwargs):
    kwargs["distributed_config"] = DistributedConfig(**LAYOUTS[layout]) if layout else None
    family = CLASSES["deepseek_v2" if "v2" in checkpoint.name else "deepseek_v3"]
    return family.from_pretrained(checkpoint, **kwargs)


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def mine(ids: torch.Tensor, layout: str) -> torch.Tensor:
    """The rows of the batch that this rank sees: all of them, or, where weights are sharded by FSDP, its share."""
    return ids.chunk(2)[dist.get_rank() // (dist.get_world_size() // 2)] if "fsdp" in layout else ids


def close(ours: torch.Tensor, theirs: torch.Tensor, what: str) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5, msg=lambda text: f"{what}: {text}")


def mean_over_ranks(value: torch.Tensor) -> torch.Tensor:
    dist.all_reduce(value := value.detach().clone())
    return value / dist.get_world_size()


def close_states(spread, whole, when: str) -> None:
    theirs = whole.state_dict()
    for name, tensor in spread.state_dict().items():
        close(full(tensor), theirs.pop(name), f"{name} {when}")
    assert not theirs


def sgd(model) -> torch.optim.Optimizer:
    """One group for each mesh, as `Trainer` makes them: torch's optimizers refuse to update them together."""
    groups: dict[Any, list] = {}
    for parameter in model.parameters():
        groups.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    return torch.optim.SGD([{"params": group} for group in groups.values()], lr=0.05)


def compare_steps(spread, whole, layout: str, steps: int = 2, optimizer: Any = None) -> None:
    """Logits, the parts of the loss, every gradient, the weights after the optimizer, and the bias update with what it
    counted."""
    optimizers = (
        optimizer or sgd(spread),
        sgd(whole),
    )  # first: a forward pass without gradients leaves some weights of FSDP gathered
    ids = tokens(4, 10)
    rows = mine(ids, layout)
    with torch.no_grad():
        close(spread(rows).logits, mine(whole(ids).logits, layout), "logits")
    spread.train()
    whole.train()
    for step in range(steps):
        ours, theirs = spread(rows, labels=rows), whole(ids, labels=ids)
        for part in ("loss", "lm_loss", "aux_loss"):
            close(mean_over_ranks(ours[part]), theirs[part].detach(), f"{part} of step {step}")
        for our_loss, their_loss in zip(ours.mtp_losses or (), theirs.mtp_losses or (), strict=True):
            close(mean_over_ranks(our_loss), their_loss, f"loss of an MTP module in step {step}")
        ours.loss.backward()
        theirs.loss.backward()
        for (name, parameter), (_, other) in zip(spread.named_parameters(), whole.named_parameters(), strict=True):
            close(full(parameter.grad), other.grad, f"gradient of {name} in step {step}")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        loads, wholes = spread.update_correction_bias(), whole.update_correction_bias()
        # Each rank's whole model has seen the whole batch, and was counted as another part of it.
        assert {layer: (counts_E * dist.get_world_size()).tolist() for layer, counts_E in loads.items()} == {
            layer: counts_E.tolist() for layer, counts_E in wholes.items()
        }
        close_states(spread, whole, f"after step {step}")


def halves(spread, names: set[str] | None) -> None:
    """Half of each parameter that ends in one of `names` (of all, if None) is on this rank, and the whole of others."""
    for name, parameter in spread.named_parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        split = names is None or name.removesuffix(".weight").endswith(tuple(f".{ending}" for ending in names))
        split = split or (name == "lm_head.weight" and "lm_head" in (names or ()))
        assert local.numel() * (2 if split else 1) == parameter.numel(), name


def same_model(folder: Path, checkpoint: str, layout: str, split: dict[str, set[str] | None] | None = None) -> None:
    """Loads to the same, of which each rank holds what `split` says of the layout, saves to the same, takes the same
    steps, and saves what loads to the same again."""
    spread, whole = load(folder / checkpoint, layout), load(folder / checkpoint)
    close_states(spread, whole, "loaded")
    if split is not None:
        halves(spread, split[layout])
    saved = folder / f"{checkpoint}-{layout}"
    spread.save_pretrained(saved)
    theirs, ours = load_file(folder / checkpoint / "model.safetensors"), load_file(saved / "model.safetensors")
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in theirs.items())
    assert (saved / "config.json").read_text() == (folder / checkpoint / "config.json").read_text()

    compare_steps(spread, whole, layout)
    spread.save_pretrained(saved)
    close_states(load(saved, layout), whole, "loaded again")
    close_states(load(saved), whole, "loaded again by one process")


def recomputed(folder: Path, layout: str) -> None:
    spread, whole = load(folder / "v3", layout), load(folder / "v3")
    spread.activation_checkpointing_enable()
    compare_steps(spread, whole, layout, steps=1)


def in_chunks(folder: Path, layout: str) -> None:
    """The logits of a few tokens at a time, through the head that is split or gathered."""
    spread, whole = load(folder / "v3", layout), load(folder / "v3")
    spread.config.logits_workspace_mib = 1
    spread.config.vocab_size, vocab_size = 2**18, spread.config.vocab_size  # one token's logits are the whole workspace
    assert spread.config.logits_at_once == 1
    rows = mine(tokens(4, 10), layout)
    ours = spread.train()(rows, labels=rows)
    assert ours.logits is None
    spread.config.vocab_size = vocab_size
    theirs = whole.train()(rows, labels=rows)
    close(ours.loss, theirs.loss, "loss")
    ours.loss.backward()
    theirs.loss.backward()
    for (name, parameter), (_, other) in zip(spread.named_parameters(), whole.named_parameters(), strict=True):
        gradient = full(parameter.grad)
        close(gradient, mean_over_ranks(other.grad), f"gradient of {name}")


def uneven_chunks(folder: Path, head_alone: bool) -> None:
    """One rank has many targets and the other few, and so another number of chunks: a head that is gathered for each
    of them would wait for ever."""
    gradients = []
    for skip_logits in (False, True):
        model = load(folder / "v3")
        model.config.logits_workspace_mib, model.config.vocab_size = 1, 2**16  # four tokens at a time
        for layer in model.model.layers:
            fully_shard(layer)
        if head_alone:
            fully_shard(model.lm_head)
        fully_shard(model)
        ids = tokens(2, 24, seed=dist.get_rank())
        labels = ids.clone()
        labels[:, : (3, 20)[dist.get_rank()]] = -100
        calls: list[int] = []
        model.lm_head.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        if not skip_logits:
            model.config.vocab_size = 256
        output = model.train()(ids, labels=labels, skip_logits=skip_logits, use_cache=False)
        assert (output.logits is None) == skip_logits
        assert (len(calls) == 3) == (head_alone or not skip_logits)  # the model and two modules
        output.loss.backward()
        gradients.append({name: full(parameter.grad) for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        close(gradients[1][name], gradient, f"gradient of {name}")


def absorbed(folder: Path, layout: str) -> None:
    """Gradients, too, where the latents feed the heads of each rank without passing through kv_b_proj."""
    spread, whole = load(folder / "v3", layout), load(folder / "v3")
    spread.config.mla_path = whole.config.mla_path = "absorbed"
    compare_steps(spread, whole, layout, steps=1)


def generates(folder: Path, layout: str, cache: str) -> None:
    """Left-padded prompts, token for token, greedy and sampled, drafted by MTP modules and not, on every rank; but not
    with random states that differ, nor drafted on the stages of a pipeline."""
    spread, whole = load(folder / "v3", layout), load(folder / "v3")
    ids = tokens(3, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[1, :2] = 0
    kwargs = {"attention_mask": mask, "max_new_tokens": 8, "eos_token_id": None}
    for do_sample in (False, True):
        for use_mtp in (False,) if layout == "pp" else (False, True):
            outputs = []
            for model, own in ((spread, {"cache_implementation": cache}), (whole, {})):
                torch.manual_seed(0)
                own |= {"do_sample": do_sample, "use_mtp": use_mtp}
                outputs.append(model.generate(ids, **own, **kwargs).tolist())
            assert outputs[0] == outputs[1], own
    torch.manual_seed(dist.get_rank())
    spread.generate(ids, do_sample=False, **kwargs)
    with pytest.raises(ValueError, match="their random states differ"):
        spread.generate(ids, do_sample=True, **kwargs)
    if layout == "pp":
        with pytest.raises(ValueError, match="pp_size > 1 parts them"):
            spread.generate(ids, do_sample=False, use_mtp=True, **kwargs)
        with pytest.raises(ValueError, match="pp_size > 1 parts them"):
            spread.generate_batch([[5, 6]], max_new_tokens=2)


def same_logits(folder: Path, checkpoint: str, layout: str, kwargs: dict[str, Any] | None = None) -> None:
    spread, whole = load(folder / checkpoint, layout, **(kwargs or {})), load(folder / checkpoint)
    ids = tokens(2, 10)
    with torch.no_grad():
        close(spread(ids).logits, whole(ids).logits, "logits")
    if "fp8" in checkpoint:
        spread.save_pretrained(folder / "again", fp8=True)
        theirs, ours = (load_file(folder / name / "model.safetensors") for name in (checkpoint, "again"))
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(tensor, ours[name]) for name, tensor in theirs.items())


def draws_alike(folder: Path) -> None:
    """A module more than the checkpoint has, whose weights are drawn: alike in all layouts and on both ranks, although
    their random states differ."""
    states = []
    for layout in ("tp+ep", "fsdp"):
        torch.manual_seed(100 * dist.get_rank())
        spread = load(folder / "v3", layout, num_nextn_predict_layers=3)
        drawn = {name: full(tensor) for name, tensor in spread.model.layers[5].state_dict().items()}
        theirs: list[Any] = [None, None]
        dist.all_gather_object(theirs, drawn)
        states += theirs
    for state in states:
        assert all(torch.equal(tensor, states[0][name]) for name, tensor in state.items())
    for name, tensor in states[0].items():
        if tensor.ndim > 1:
            assert tensor.std().item() == pytest.approx(0.2, rel=0.2), name
            assert not torch.equal(*(half.flatten() for half in tensor.chunk(2))), name


def batched(folder: Path, layout: str) -> None:
    """`generate_batch`, called on every rank."""
    spread, whole = load(folder / "v3", layout), load(folder / "v3")
    prompts = [tokens(1, length, seed=length) for length in (1, 9, 20)]
    kwargs = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = [whole.generate(prompt, **kwargs)[0, prompt.shape[1] :].tolist() for prompt in prompts]
    results = spread.generate_batch(
        [prompt[0] for prompt in prompts], None, ContinuousBatchingConfig(page_size=16, num_blocks=16), **kwargs
    )
    assert [result.generated_tokens for result in results.values()] == expected


def in_bfloat16(folder: Path, layout: str) -> None:
    """Weights; the correction bias and the frequencies stay in float32."""
    spread = load(folder / "v3", layout, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in spread.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in spread.buffers()} == {torch.float32}
    close_states(spread, load(folder / "v3", dtype=torch.bfloat16), "loaded")
    spread(tokens(2, 10), labels=tokens(2, 10)).loss.backward()


def parts_on_disk(folder: Path, layout: str) -> None:
    """transformers' own sharded files, each rank its part."""
    spread, whole = load(folder / "v3", layout), load(folder / "v3")
    spread.save_pretrained(folder / f"parts-{layout}", distributed_checkpoint=True)
    close_states(load(folder / f"parts-{layout}", layout), whole, "loaded again")


def shards_by_hand(folder: Path) -> None:
    """Bare `fully_shard`, a unit for each layer and the rest in the root."""
    spread, whole = load(folder / "v3"), load(folder / "v3")
    for layer in spread.model.layers:
        fully_shard(layer)
    fully_shard(spread)
    compare_steps(spread, whole, "fsdp")
    saved = folder / "by-hand"
    spread.save_pretrained(saved)
    close_states(load(saved), whole, "loaded again")


def staged(folder: Path, checkpoint: str) -> None:
    spread, whole = load(folder / checkpoint, "pp"), load(folder / checkpoint)
    ids = tokens(2, 10)
    with torch.no_grad():
        close(spread(ids).logits, whole(ids).logits, "logits")
    with pytest.raises(ValueError, match="pipeline stages \\(pp_size > 1\\) cannot be trained"):
        spread(ids, labels=ids)
    saved = folder / f"{checkpoint}-pp"
    spread.save_pretrained(saved)
    theirs, ours = load_file(folder / checkpoint / "model.safetensors"), load_file(saved / "model.safetensors")
    assert theirs.keys() == ours.keys(), theirs.keys() ^ ours.keys()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in theirs.items())
    load(saved, "pp")


def accelerate_fsdp2(**settings):
    """An `Accelerator` as recipes/accelerate/fsdp2.yaml makes it. accelerate knows FSDP on accelerators only, and gives
    a CPU plain DDP without a word: what it decides from the device is put in by hand, all else is its own."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap", **settings)
    Accelerator(cpu=True, fsdp_plugin=plugin)
    for state in (PartialState, AcceleratorState):
        state._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
    return Accelerator(cpu=True, fsdp_plugin=plugin)


def through_accelerate(folder: Path, settings: dict[str, Any]) -> None:
    accelerator = accelerate_fsdp2(**settings)
    spread, whole = load(folder / "v3"), load(folder / "v3")
    spread, optimizer = accelerator.prepare(spread, sgd(spread))
    assert all(isinstance(module, FSDPModule) for module in (spread, *spread.model.layers))
    compare_steps(spread, whole, "fsdp", optimizer=optimizer)
    saved = folder / "accelerate"
    state = accelerator.get_state_dict(spread)
    spread.save_pretrained(saved, is_main_process=accelerator.is_main_process, state_dict=state)
    dist.barrier()
    close_states(load(saved), whole, "loaded again")


def trains(folder: Path, layout: str | None, name: str) -> None:
    """Four steps of `Trainer`, four rows each, with the bias update and its log."""
    model = load(folder / "v3", layout)
    shares = model.config.distributed_config.dp_size if layout else 1
    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in tokens(16, 10)]
    arguments = TrainingArguments(
        output_dir=str(folder / name), use_cpu=True, max_steps=4, save_strategy="no", logging_steps=1, report_to=[],
        per_device_train_batch_size=4 // shares, optim="sgd", learning_rate=0.05, lr_scheduler_type="constant",
        disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[DeepseekTrainerCallback()])
    trainer.train()
    trainer.save_model()
    if trainer.is_world_process_zero():
        trainer.state.save_to_json(str(folder / name / "state.json"))


def resumed_shards(folder: Path) -> None:
    """A step, sharded files by torch's own checkpointing, and another step by who has read them."""
    ids = mine(tokens(4, 10), "fsdp")

    def start():
        model = load(folder / "v3")
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        return model.train(), torch.optim.AdamW(model.parameters(), lr=1e-2)

    def step(model, optimizer):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_correction_bias()

    model, optimizer = start()
    step(model, optimizer)
    state, optimizer_state = get_state_dict(model, optimizer)
    checkpoint.save({"model": state, "optimizer": optimizer_state}, checkpoint_id=folder / "shards")
    resumed, resumed_optimizer = start()
    state, optimizer_state = get_state_dict(resumed, resumed_optimizer)
    checkpoint.load({"model": state, "optimizer": optimizer_state}, checkpoint_id=folder / "shards")
    set_state_dict(resumed, resumed_optimizer, model_state_dict=state, optim_state_dict=optimizer_state)
    step(model, optimizer)
    step(resumed, resumed_optimizer)
    theirs = resumed.state_dict()
    assert all(torch.equal(full(tensor), full(theirs[name])) for name, tensor in model.state_dict().items())


def adapted(folder: Path) -> None:
    """LoRA on weights that FSDP shards, and the error where tensor parallelism splits them."""
    import peft  # here, so that the other tests do not wait for it

    spread, whole = load(folder / "v3", "fsdp"), load(folder / "v3")
    for model in (spread, whole):
        torch.manual_seed(0)
        config = peft.LoraConfig(target_modules=["attention", "dense_mlp"], r=4, init_lora_weights=False)
        peft.get_peft_model(model, config)
        model.train()
    ids = tokens(4, 10)
    rows = mine(ids, "fsdp")
    spread(rows, labels=rows).loss.backward()
    whole(ids, labels=ids).loss.backward()
    theirs = dict(whole.named_parameters())
    adapters = {name: parameter for name, parameter in spread.named_parameters() if parameter.requires_grad}
    assert len(adapters) == 2 * (3 * 5 + 3)  # two factors; three layers of attention, one dense MLP
    for name, parameter in adapters.items():
        close(mean_over_ranks(parameter.grad), theirs[name].grad, f"gradient of {name}")
    with pytest.raises(ValueError, match="layers are split by tensor parallelism"):
        peft.get_peft_model(load(folder / "v3", "tp"), config)


def bytes_on_rank(folder: Path, layout: str, family: str) -> None:
    """Writes how much of the model, and of its attention, lies on rank 0 (JSON), and how far its logits are from those
    of one process, in parts of the largest. "theirs" is the library's own class for the same checkpoint."""
    model_class = DeepseekV3ForCausalLM if family == "ours" else modeling_deepseek_v3.DeepseekV3ForCausalLM
    spread = model_class.from_pretrained(folder / "v3", distributed_config=DistributedConfig(**LAYOUTS[layout]))
    sizes: dict[str, list[int]] = {"model": [0, 0], "attention": [0, 0]}
    for name, parameter in spread.named_parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        for part in ("model", "attention") if ".self_attn." in name else ("model",):
            sizes[part][0] += local.nbytes
            sizes[part][1] += parameter.nbytes
    ids = tokens(2, 10)
    with torch.no_grad():
        ours, theirs = spread(ids).logits, model_class.from_pretrained(folder / "v3")(ids).logits
    if dist.get_rank() == 0:
        shares = {part: own / whole for part, (own, whole) in sizes.items()}
        (folder / f"{family}-{layout}.json").write_text(
            json.dumps({**shares, "gap": ((ours - theirs).abs().max() / theirs.abs().max()).item()})
        )
