"""`DeepseekTrainerCallback`: what `Trainer` and TRL's trainers need to train these models as their papers do.

After each optimizer step it moves the routers' correction bias (moe.py) and notes the load of the experts for the log.
Under TRL it also puts back two losses: TRL's SFT and its kin bypass the model's own loss with a fused head, which
knows neither MTP modules nor DeepSeek's balance loss, and would leave the modules untrained without a word.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from .modeling_deepseek import DeepseekForCausalLM, DeepseekModelOutput
from .moe import max_violation
from .pretrained import DeepseekPreTrainedModel


class DeepseekTrainerCallback(TrainerCallback):
    """Pass it as `callbacks=[DeepseekTrainerCallback()]`, or `DeepseekTrainerCallback.attach(trainer)`.

    Logged with the trainer's own values: `max_vio` (mean over layers) and `max_vio/layer_i`, each a mean over the
    steps since the last log of training. `trainer.state.log_history` also gets `tokens_per_expert`, a list for each
    layer, summed over these steps; layers that routed nothing (MTP modules out of the loss) are left out. The bias
    itself is part of the model's state, saved and resumed with it.

    Reporters (W&B, TensorBoard) that stand before a callback in the trainer's list do not see what it adds to a log;
    `attach` puts this one first.

    Raises:
        ValueError: when training begins on a model that is not one of this package's, or whose MTP modules or balance
            loss would be left out: under label smoothing, or a TRL loss that cannot carry those of the modules.
    """

    def __init__(self) -> None:
        # For each layer since the last log: steps, sum of MaxVio, sum of tokens per expert.
        self._load: dict[int, tuple[int, float, torch.Tensor]] = {}

    @classmethod
    def attach(cls, trainer: Any) -> "DeepseekTrainerCallback":
        """Adds a callback to `trainer`, before its reporters, and returns it."""
        callback = cls()
        trainer.callback_handler.callbacks.insert(0, callback)
        return callback

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        model = deepseek_model(model)
        if isinstance(model, DeepseekForCausalLM):
            check_smoothing(model, args.label_smoothing_factor)
            restore_losses_under_trl(model, getattr(args, "loss_type", None))

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        load = deepseek_model(model).update_correction_bias()
        if not state.is_world_process_zero:  # only that one logs
            return
        for layer, counts_E in load.items():
            if counts_E.any():
                steps, violation, tokens_E = self._load.get(layer, (0, 0.0, torch.zeros_like(counts_E)))
                self._load[layer] = (steps + 1, violation + max_violation(counts_E), tokens_E + counts_E)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not self._load or logs is None or any(name.startswith("eval_") for name in logs):
            return
        per_layer = {layer: violation / steps for layer, (steps, violation, _) in self._load.items()}
        values = {f"max_vio/layer_{layer}": value for layer, value in per_layer.items()}
        values["max_vio"] = sum(per_layer.values()) / len(per_layer)
        logs.update(values)
        tokens = {str(layer): tokens_E.tolist() for layer, (_, _, tokens_E) in self._load.items()}
        state.log_history[-1].update(values, tokens_per_expert=tokens)
        self._load.clear()


def deepseek_model(model: nn.Module | None) -> DeepseekPreTrainedModel:
    """The DeepSeek model inside the wrappers of PEFT, accelerate and DDP.

    Raises:
        ValueError: if there is none.
    """
    for module in model.modules() if model is not None else ():
        if isinstance(module, DeepseekPreTrainedModel):
            return module
    raise ValueError(f"no DeepSeek model of this package in {type(model).__name__}: nothing to balance")


def check_smoothing(model: DeepseekForCausalLM, label_smoothing_factor: float) -> None:
    """Raises:
    ValueError: where `Trainer` would keep the labels from a model that adds to their loss.
    """
    config = model.config
    with_mtp = config.num_nextn_predict_layers > 0 and config.mtp_loss_weight > 0
    with_balance = config.n_routed_experts is not None and config.aux_loss_alpha > 0
    if label_smoothing_factor and (with_mtp or with_balance):
        raise ValueError(
            f"label_smoothing_factor={label_smoothing_factor} takes the labels away from the model, which then has "
            "neither the loss of its MTP modules nor its balance loss; leave it at 0, or set `mtp_loss_weight` and "
            "`aux_loss_alpha` of `model.config` to 0 to train without them"
        )


def restore_losses_under_trl(model: DeepseekForCausalLM, loss_type: str | None = None) -> None:
    """Where TRL has replaced `model.forward` with one that has a fused head, adds to the latter's output what
    `DeepseekForCausalLM.forward` would have added to the loss. Does nothing otherwise, or a second time.

    TRL sums `log_probs` over all tokens, so the log-probabilities of the MTP modules, times lambda / D, are added to
    those of the positions they were predicted at. `aux_loss` becomes DeepSeek's own in place of Mixtral's.

    Raises:
        ValueError: for `loss_type` "dft", which uses `log_probs` in another way, together with MTP modules.
    """
    fused = vars(model).get("forward")
    if fused is None or not _has_fused_head(fused):
        return
    with_mtp = model.config.num_nextn_predict_layers > 0 and model.config.mtp_loss_weight > 0
    if with_mtp and loss_type not in (None, "nll"):
        raise ValueError(
            f"loss_type={loss_type!r} cannot carry the loss of MTP modules; use 'nll', or set "
            "`model.config.mtp_loss_weight = 0` to leave the modules as they are"
        )

    @functools.wraps(fused)  # `generate` checks its arguments against the signature
    def forward(*args: Any, fused_lm_head: bool = False, labels=None, shift_labels=None, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return fused(*args, labels=labels, shift_labels=shift_labels, **kwargs)
        inputs = dict(zip(("input_ids", "attention_mask", "position_ids"), args, strict=False)) | kwargs
        aux_losses: list[torch.Tensor] = []
        token_losses: list[torch.Tensor] = []

        # A hook, because only inside `fused` does the autocast hold that accelerate has wrapped around it.
        def add_losses(module: nn.Module, hook_inputs: Any, stack: DeepseekModelOutput) -> None:
            if stack.aux_loss is not None:
                aux_losses.append(stack.aux_loss)
            if with_mtp:
                targets_BS = model.next_targets(labels, shift_labels, inputs)
                losses, balance = model.mtp_token_losses(stack, targets_BS, inputs)
                token_losses.extend(loss_BS for loss_BS, _ in losses)
                aux_losses.extend(balance)

        hook = model.model.register_forward_hook(add_losses)
        try:
            output = fused(*args, fused_lm_head=True, labels=labels, shift_labels=shift_labels, **kwargs)
        finally:
            hook.remove()
        if token_losses:
            extra_BS = torch.stack(token_losses).mean(0) * model.config.mtp_loss_weight
            output.log_probs = output.log_probs - extra_BS[:, : output.log_probs.shape[1]].to(output.log_probs)
        if output.aux_loss is not None and aux_losses:
            output.aux_loss = torch.stack([loss.to(output.aux_loss.device) for loss in aux_losses]).sum()
        return output

    forward.restores_losses = True  # type: ignore[attr-defined]  # a mark on our own function
    model.forward = forward  # TRL has done the same before


def _has_fused_head(forward: Callable | None) -> bool:
    """Whether TRL's fused head lies in `forward` or below its wrappers (accelerate's autocast), without ours."""
    while forward is not None and not getattr(forward, "restores_losses", False):
        if "fused_lm_head" in inspect.signature(forward, follow_wrapped=False).parameters:
            return True
        forward = getattr(forward, "__wrapped__", None)
    return False
