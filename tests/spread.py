"""What each rank does in the tests of several devices: a model spread over ranks beside the same model whole."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

from modeling_deepseek import DeepseekV2ForCausalLM, DeepseekV3ForCausalLM
from tests.tiny import tokens

CLASSES = {"deepseek_v2": DeepseekV2ForCausalLM, "deepseek_v3": DeepseekV3ForCausalLM}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp": {"tp_size": 2},
    "ep": {"tp_size": 2, "ep_size": 2, "tp_plan": {}},
    "tp+ep": {"tp_size": 2, "ep_size": 2},
    "fsdp": {"fsdp_size": 2},
    "fsdp+ep": {"fsdp_size": 2, "ep_size": 2},
}


def load(checkpoint: Path, layout: str | None = None, **kwargs):
    kwargs["distributed_config"] = DistributedConfig(**LAYOUTS[layout]) if layout else None
    family = CLASSES["deepseek_v2" if "v2" in checkpoint.name else "deepseek_v3"]
    return family.from_pretrained(checkpoint, **kwargs)


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def mine(ids: torch.Tensor, layout: str) -> torch.Tensor:
    """The rows of the batch that this rank sees: all of them, or, where weights are sharded by FSDP, its share."""
    return ids.chunk(2)[dist.get_rank()] if "fsdp" in layout else ids


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


def compare_steps(spread, whole, layout: str, steps: int = 2) -> None:
    """Logits, the parts of the loss, every gradient, the weights after the optimizer, and the bias update with what it
    counted."""
    optimizers = sgd(spread), sgd(whole)  # first: a forward pass without gradients leaves some weights of FSDP gathered
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


def same_model(folder: Path, checkpoint: str, layout: str) -> None:
    """Loads to the same, saves to the same, takes the same steps, and saves what loads to the same again."""
    spread, whole = load(folder / checkpoint, layout), load(folder / checkpoint)
    close_states(spread, whole, "loaded")
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


def absorbed(folder: Path, layout: str) -> None:
    """Gradients, too, where the latents feed the heads of each rank without passing through kv_b_proj."""
    spread, whole = load(folder / "v3", layout), load(folder / "v3")
    spread.config.mla_path = whole.config.mla_path = "absorbed"
    compare_steps(spread, whole, layout, steps=1)


def halves(folder: Path, layout: str, names: set[str] | None) -> None:
    """Half of each parameter that ends in one of `names` (of all, if None) is on this rank, and the whole of others."""
    for name, parameter in load(folder / "v3", layout).named_parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        split = names is None or name.removesuffix(".weight").endswith(tuple(f".{ending}" for ending in names))
        split = split or (name == "lm_head.weight" and "lm_head" in (names or ()))
        assert local.numel() * (2 if split else 1) == parameter.numel(), name
