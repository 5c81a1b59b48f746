"""The models: DeepSeek V2 and V3 (R1, Moonlight, Kimi-K2) as `PreTrainedModel`s: a stack, its heads and
their losses. The only file that knows all others.

One set of classes serves both families; the `DeepseekV2...` and `DeepseekV3...` classes at the end bind it to a
configuration class and to the names that transformers, TRL and serving engines go by.

Legend: B batch, S tokens, D hidden size, T = B x S, E routed experts, K experts per token, N sequences.
"""

import copy
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.distributed.pipeline_parallel import PipelineIdentityLayer
from transformers.generation import GenerationMixin
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .adapters import teach_peft
from .configuration_deepseek import DeepseekConfig, DeepseekV2Config, DeepseekV3Config
from .decoder_layer import DeepseekDecoderLayer
from .layers import DeepseekRMSNorm, DeepseekRotaryEmbedding
from .losses import token_losses
from .moe import DeepseekMoE, load_balancing_loss
from .mtp import DeepseekMTPLayer, one_column_further, same_document, shift_left, targets_ahead
from .packing import SequenceContext, documents, packed_positions, paged_context, sequence_context
from .paged import LatentBatching
from .parallel import check_generation
from .pretrained import DeepseekPreTrainedModel
from .speculation import check_speculation, speculate

logger = logging.get_logger(__name__)

# Arguments of the stack's forward that a layer does not take.
_STACK_ARGUMENTS = {
    "input_ids",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "inputs_embeds",
    "use_cache",
    "output_router_logits",
    "output_hidden_states",
    "output_attentions",
    "return_dict",
}


@dataclass
class DeepseekModelOutput(MoeModelOutputWithPast):
    """transformers' output with `aux_loss`, the balance loss summed over layers and not yet times its alpha, and
    `pre_norm_hidden_state` (B, S, D), there only where the MTP modules want the state before the final norm."""

    aux_loss: torch.Tensor | None = None
    pre_norm_hidden_state: torch.Tensor | None = None


@dataclass
class DeepseekCausalLMOutput(MoeCausalLMOutputWithPast):
    """transformers' output with the parts of `loss`:

    loss = lm_loss + mtp_loss_weight * mean(mtp_losses) + aux_loss_alpha * aux_loss

    `lm_loss` is next-token cross-entropy alone, `mtp_losses` one value a module, and one for each further pass through
    the last one (`config.mtp_passes`). All but `loss` carry no gradient.
    """

    lm_loss: torch.Tensor | None = None
    mtp_losses: tuple[torch.Tensor, ...] | None = None


class DeepseekModel(DeepseekPreTrainedModel):
    """The decoder stack. `layers` holds `num_hidden_layers` layers and behind them the MTP modules, as the files do;
    `forward` runs the former, `DeepseekForCausalLM.mtp_token_losses` the latter."""

    def __init__(self, config: DeepseekConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        layers: list[nn.Module] = [DeepseekDecoderLayer(config, index) for index in range(config.num_hidden_layers)]
        layers += [
            DeepseekMTPLayer(config, config.num_hidden_layers + module)
            for module in range(config.num_nextn_predict_layers)
        ]
        self.layers = nn.ModuleList(layers)
        self.norm = DeepseekRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = DeepseekRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        **kwargs: Any,
    ) -> DeepseekModelOutput:
        """(B, S) tokens to (B, S, D) states after the final norm.

        Args:
            attention_mask: (B, past + S) with 0 for padding, or a ready 4-D mask.
            position_ids: (B, S); where it is not its predecessor's plus one, a new packed document begins, which sees
                nothing before it.
            output_router_logits: return the routers' logits, (T, E) for each MoE layer, and `aux_loss`. The latter
                is also there in training when `config.aux_loss_alpha` is not 0.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of `input_ids` and `inputs_embeds`")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        # torch's and accelerate's checkpointing wrap the layers, which would find their own tokens in the cache when
        # they run again; transformers' own leaves the cache away by itself.
        runs_twice = torch.is_grad_enabled() and hasattr(self.layers[0], "_checkpoint_wrapped_module")
        if use_cache and past_key_values is None and not runs_twice:
            past_key_values = DynamicCache(config=self.config)
        if "cache" in kwargs:  # continuous batching
            context, kwargs = paged_context(self.config, position_ids, kwargs)
        else:
            position_ids = packed_positions({"inputs_embeds": inputs_embeds, "position_ids": position_ids, **kwargs})
            context = sequence_context(self.config, inputs_embeds, attention_mask, position_ids, past_key_values)
        position_embeddings = self.rotary_emb(context.position_ids_BS)

        hidden_BSD = inputs_embeds
        routing: list[tuple[torch.Tensor, torch.Tensor]] = []
        layers = self.layers[: self.config.num_hidden_layers]
        if past_key_values is not None and isinstance(layers[0], PipelineIdentityLayer):
            # A later stage of a pipeline: slot 0, which everyone asks for the length, counts with one value a token.
            counter = hidden_BSD.unsqueeze(1)[..., :1]
            past_key_values.update(counter, counter, 0)
        for layer in layers:
            if isinstance(layer, PipelineIdentityLayer):
                continue
            hidden_BSD, logits_TE, indices_TK = layer(
                hidden_BSD,
                position_embeddings=position_embeddings,
                attention_mask=context.attention_mask,
                past_key_values=past_key_values,
                **{**context.attention_kwargs, **kwargs},
            )
            if logits_TE is not None:
                self.record_load(cast(DeepseekDecoderLayer, layer), indices_TK, context.valid_BS)
                routing.append((logits_TE, indices_TK))

        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        aux_loss = None
        if routing and (output_router_logits or (self.training and self.config.aux_loss_alpha > 0)):
            losses = [self.balance_loss(*chosen, context, context.valid_BS) for chosen in routing]
            aux_loss = torch.stack([loss.to(losses[0].device) for loss in losses]).sum()
        wants_pre_norm = self.config.num_nextn_predict_layers and self.config.mtp_hidden_state == "before_norm"
        return DeepseekModelOutput(
            last_hidden_state=self.norm(hidden_BSD),
            past_key_values=past_key_values,
            router_logits=tuple(logits for logits, _ in routing) if output_router_logits else None,  # type: ignore[arg-type]  # annotated there as a tuple of one
            aux_loss=aux_loss,
            pre_norm_hidden_state=hidden_BSD if wants_pre_norm else None,
        )

    def record_load(self, layer: DeepseekDecoderLayer, indices_TK: torch.Tensor, valid_BS: torch.Tensor | None) -> None:
        """Counts a layer's choices for the bias update, while training. Called outside the layers, so that gradient
        checkpointing, which runs a layer twice, counts once."""
        if self.training and torch.is_grad_enabled() and isinstance(layer.mlp, DeepseekMoE):
            valid_T = None if valid_BS is None else valid_BS.flatten().to(indices_TK.device)
            layer.mlp.gate.record_load(indices_TK, valid_T)

    def balance_loss(
        self, logits_TE: torch.Tensor, indices_TK: torch.Tensor, context: SequenceContext, valid_BS: torch.Tensor | None
    ) -> torch.Tensor:
        """One layer's `load_balancing_loss`, over documents (`seq_aux`) or over the whole batch."""
        tokens, device = logits_TE.shape[0], logits_TE.device
        if not self.config.seq_aux:
            sequence_T, n_sequences = torch.zeros(tokens, dtype=torch.int64, device=device), 1
        elif context.documents_BS is None:
            length = context.position_ids_BS.shape[1]
            sequence_T, n_sequences = torch.arange(tokens, device=device) // length, tokens // length
        else:
            rows, length = context.documents_BS.shape
            unique_BS = context.documents_BS.to(device) + torch.arange(rows, device=device)[:, None] * length
            ids, sequence_T = unique_BS.flatten().unique(return_inverse=True)
            n_sequences = len(ids)
        valid_T = None if valid_BS is None else valid_BS.flatten().to(device)
        return load_balancing_loss(logits_TE, indices_TK, self.config.scoring_func, sequence_T, n_sequences, valid_T)


class DeepseekForCausalLM(DeepseekPreTrainedModel, LatentBatching, GenerationMixin):
    """The stack with its head, and with the losses of multi-token prediction and of balance."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan: dict[str, Any] = {"lm_head": (["hidden_states"], ["logits"])}
    stack_class: ClassVar[type[DeepseekModel]]

    def __init__(self, config: DeepseekConfig):
        super().__init__(config)
        self.model = self.stack_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: int | torch.Tensor | None = None,
        skip_logits: bool | None = None,
        **kwargs: Any,
    ) -> DeepseekCausalLMOutput:
        """Logits (B, S, vocabulary), and with `labels` (B, S; -100 is ignored) the loss and its parts.

        No target crosses from one packed document (see `position_ids` of `DeepseekModel.forward`) into the next.

        Args:
            skip_logits: with labels, compute the loss in chunks and return no logits (`logits=None`). By default so
                in training (train mode, gradients on) where float32 logits would exceed
                `config.logits_workspace_mib`, and never in evaluation. `model.loss_function` set by the user and
                `logits_to_keep` want the logits, and get them.
            shift_labels: (B, S) targets already shifted by one, instead of shifting `labels`.
            num_items_in_batch: what the sums of token losses are divided by, instead of each mean of its own
                (`Trainer` under gradient accumulation); the balance loss is then weighted by this batch's share.

        Raises:
            ValueError: for `skip_logits=True` without labels, or where something else wants the logits.
            ValueError: with `labels` and MTP modules when the cache already holds tokens: the modules have not seen
                them.
        """
        # Not in the signature, from which `Trainer` reads the names of the labels that a batch to evaluate must have.
        shift_labels: torch.Tensor | None = kwargs.pop("shift_labels", None)
        outputs: DeepseekModelOutput = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        assert outputs.last_hidden_state is not None
        with_labels = labels is not None or shift_labels is not None
        keeps_all = isinstance(logits_to_keep, int) and logits_to_keep == 0
        if self._skips_logits(skip_logits, with_labels, keeps_all, outputs.last_hidden_state):
            logits = None
        else:
            logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        result = DeepseekCausalLMOutput(
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )
        if not with_labels:
            result.aux_loss = outputs.aux_loss
            return result

        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            **kwargs,
        }
        targets_BS = self.next_targets(labels, shift_labels, inputs)
        device = (outputs.last_hidden_state if logits is None else logits).device
        n_targets = (targets_BS != -100).sum().to(device)
        items = n_targets if num_items_in_batch is None else torch.as_tensor(num_items_in_batch, device=device)
        items = items.clamp(min=1)  # where nothing is to be predicted the loss is 0, not 0 / 0
        if logits is None:
            losses_BS = token_losses(self.lm_head, outputs.last_hidden_state, targets_BS, self.config.logits_at_once)
            lm_loss = losses_BS.sum() / items.to(losses_BS.device)
        else:
            lm_loss = self.loss_function(
                logits=logits,
                labels=None,
                vocab_size=self.config.vocab_size,
                shift_labels=targets_BS,
                num_items_in_batch=items,
            )
        loss, aux_loss = lm_loss, outputs.aux_loss
        if self.config.num_nextn_predict_layers and self.config.mtp_loss_weight > 0:
            each_module, mtp_balance = self.mtp_token_losses(outputs, targets_BS, inputs)
            mtp_losses = []
            for losses_BS, valid_BS in each_module:
                count = valid_BS.sum().clamp(min=1) if num_items_in_batch is None else items
                mtp_losses.append(losses_BS.sum() / count)
            loss = loss + self.config.mtp_loss_weight * torch.stack(mtp_losses).mean().to(loss.device)
            result.mtp_losses = tuple(mtp_loss.detach() for mtp_loss in mtp_losses)
            if aux_loss is not None and mtp_balance:
                aux_loss = aux_loss + torch.stack([value.to(aux_loss.device) for value in mtp_balance]).sum()
        if aux_loss is not None:
            share = 1.0 if num_items_in_batch is None else n_targets / items
            loss = loss + self.config.aux_loss_alpha * share * aux_loss.to(loss.device)
            aux_loss = aux_loss.detach()
        # Who unpacks the output finds what transformers' dense models have, loss and logits, in front.
        result = DeepseekCausalLMOutput(loss=loss, **result, lm_loss=lm_loss.detach())
        result.aux_loss = aux_loss
        return result

    def _skips_logits(
        self, skip_logits: bool | None, with_labels: bool, keeps_all: bool, hidden_BSD: torch.Tensor
    ) -> bool:
        """The rule of `skip_logits` (see `forward`), for states of this many tokens."""
        can_skip = with_labels and keeps_all and self.loss_function is ForCausalLMLoss
        if skip_logits and not can_skip:
            raise ValueError(
                "`skip_logits=True` needs `labels` (or `shift_labels`), no `logits_to_keep` and no `loss_function` of "
                "your own: leave it out to get the logits"
            )
        if skip_logits is not None:
            return skip_logits
        in_training = self.training and torch.is_grad_enabled()
        return can_skip and in_training and hidden_BSD.shape[:-1].numel() > self.config.logits_at_once

    def next_targets(
        self, labels_BS: torch.Tensor | None, shift_labels_BS: torch.Tensor | None, inputs: dict[str, Any]
    ) -> torch.Tensor:
        """The next token of each position (B, S), -100 at the end of a document and where padding would predict it;
        `shift_labels_BS` as it is."""
        if shift_labels_BS is not None:
            return shift_labels_BS
        assert labels_BS is not None
        targets_BS = targets_ahead(labels_BS, documents(packed_positions(inputs), *labels_BS.shape), 1)
        attention_mask = inputs.get("attention_mask")
        if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
            padding_BS = attention_mask[:, -labels_BS.shape[1] :] == 0
            targets_BS = targets_BS.masked_fill(padding_BS.to(targets_BS.device), -100)
        return targets_BS

    def mtp_token_losses(
        self, outputs: DeepseekModelOutput, targets_BS: torch.Tensor, inputs: dict[str, Any]
    ) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], list[torch.Tensor]]:
        """Cross-entropy of each MTP module's predictions (V3 2.2), from the stack's `outputs` for `inputs`.

        Module k predicts at each position the target k positions further on in `targets_BS`. With `config.mtp_passes`
        above 1 the last one does so again and again from its own output, as in drafting.

        Returns:
            For each module, and each further pass, the losses (B, S), 0 where there is no target, and where there is
            one (B, S, bool); and the balance losses of the modules' experts, where the stack has computed its own.
        """
        past, length = inputs.get("past_key_values"), targets_BS.shape[1]
        if past is not None and past.get_seq_length() > length:
            raise ValueError(
                "the multi-token prediction loss needs the whole sequence, but `past_key_values` already held "
                f"{int(past.get_seq_length()) - length} tokens; pass an empty cache, or set "
                "`config.mtp_loss_weight = 0`"
            )
        embeds_BSD = inputs.get("inputs_embeds")
        if embeds_BSD is None:
            embeds_BSD = self.model.embed_tokens(inputs["input_ids"])
        context = sequence_context(
            self.config, embeds_BSD, inputs.get("attention_mask"), packed_positions(inputs), None
        )
        position_embeddings = self.model.rotary_emb(context.position_ids_BS)
        after_norm = self.config.mtp_hidden_state == "after_norm"
        hidden_BSD = outputs.last_hidden_state if after_norm else outputs.pre_norm_hidden_state
        layer_kwargs = {name: value for name, value in inputs.items() if name not in _STACK_ARGUMENTS}
        losses, balance = [], []
        passes = list(enumerate(self.model.layers[self.config.num_hidden_layers :], start=1))
        last = len(passes)
        passes += passes[-1:] * (self.config.mtp_passes - 1)
        assert hidden_BSD is not None
        seen_BSD = hidden_BSD
        for number, (depth, layer) in enumerate(passes, start=1):
            if number > last:
                hidden_BSD = one_column_further(hidden_BSD, seen_BSD, context.documents_BS, context.valid_BS)
            seen_BSD = hidden_BSD
            hidden_BSD, logits_TE, indices_TK, normed_BSD = layer(
                seen_BSD,
                shift_left(embeds_BSD, depth),
                position_embeddings=position_embeddings,
                attention_mask=context.attention_mask,
                **{**context.attention_kwargs, **layer_kwargs},
            )
            hidden_BSD = normed_BSD if after_norm else hidden_BSD
            valid_BS = same_document(context.documents_BS, targets_BS, depth)
            if context.valid_BS is not None:  # neither padding, nor a last token that sees padding ahead
                valid_BS = valid_BS & context.valid_BS & shift_left(context.valid_BS, depth, fill=False)
            ahead_BS = targets_ahead(targets_BS, context.documents_BS, depth).masked_fill(~valid_BS, -100)
            losses_BS = token_losses(self.lm_head, normed_BSD, ahead_BS, self.config.logits_at_once)
            losses.append((losses_BS, ahead_BS.to(losses_BS.device) != -100))
            if logits_TE is not None:
                self.model.record_load(layer, indices_TK, valid_BS)
                if outputs.aux_loss is not None:
                    balance.append(self.model.balance_loss(logits_TE, indices_TK, context, valid_BS))
        return losses, balance

    def adjust_generation_fn(self, generation_config, *args, **kwargs):
        """A checkpoint that drafts by default does not where its MTP modules are left out."""
        super().adjust_generation_fn(generation_config, *args, **kwargs)  # type: ignore[misc]  # a self-type
        if generation_config is None and not self.config.num_nextn_predict_layers:
            self.generation_config.use_mtp = None

    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs):
        check_generation(self, generation_config)
        if generation_config.use_mtp:
            check_speculation(self, generation_config, generation_mode_kwargs)
        else:
            super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)  # type: ignore[misc]  # a self-type

    def _assisted_decoding(  # type: ignore[override]  # what it does not look at, it passes on
        self, input_ids, generation_config, inputs_tensor=None, **kwargs
    ):
        """`use_mtp=True` drafts with this model's own modules; anything else is transformers' own. `generate` reads
        this signature: it passes `inputs_tensor` only where it is named."""
        if not generation_config.use_mtp:
            return super()._assisted_decoding(  # type: ignore[misc]  # a self-type
                input_ids, generation_config=generation_config, inputs_tensor=inputs_tensor, **kwargs
            )
        for name in ("tokenizer", "synced_gpus"):  # stopping criteria have the one, and the other is False
            kwargs.pop(name, None)
        return speculate(self, input_ids, generation_config=generation_config, **kwargs)


class _ClassificationHead(DeepseekPreTrainedModel):
    """What both heads share. They have no use for MTP modules and drop them, from the configuration too; their loss is
    the task's alone, without a balance loss."""

    stack_class: ClassVar[type[DeepseekModel]]

    def _build(self, config: DeepseekConfig) -> None:
        config = copy.deepcopy(config)
        config.num_nextn_predict_layers = 0
        DeepseekPreTrainedModel.__init__(self, config)
        self.num_labels: int = config.num_labels or 2
        self.model = self.stack_class(config)


class DeepseekForSequenceClassification(GenericForSequenceClassification, _ClassificationHead):
    """A label for each sequence, from the state of its last token that is not padding."""

    def __init__(self, config: DeepseekConfig):
        self._build(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()


class DeepseekForTokenClassification(GenericForTokenClassification, _ClassificationHead):
    """A label for each token."""

    def __init__(self, config: DeepseekConfig):
        self._build(config)
        classifier_dropout = getattr(config, "classifier_dropout", None)
        self.dropout = nn.Dropout(0.1 if classifier_dropout is None else classifier_dropout)
        self.score = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()


class DeepseekV2PreTrainedModel(DeepseekPreTrainedModel):
    config: DeepseekV2Config


class DeepseekV2Model(DeepseekV2PreTrainedModel, DeepseekModel):
    pass


class DeepseekV2ForCausalLM(DeepseekV2PreTrainedModel, DeepseekForCausalLM):
    stack_class = DeepseekV2Model


class DeepseekV2ForSequenceClassification(DeepseekV2PreTrainedModel, DeepseekForSequenceClassification):
    stack_class = DeepseekV2Model


class DeepseekV2ForTokenClassification(DeepseekV2PreTrainedModel, DeepseekForTokenClassification):
    stack_class = DeepseekV2Model


class DeepseekV3PreTrainedModel(DeepseekPreTrainedModel):
    config: DeepseekV3Config


class DeepseekV3Model(DeepseekV3PreTrainedModel, DeepseekModel):
    pass


class DeepseekV3ForCausalLM(DeepseekV3PreTrainedModel, DeepseekForCausalLM):
    stack_class = DeepseekV3Model


class DeepseekV3ForSequenceClassification(DeepseekV3PreTrainedModel, DeepseekForSequenceClassification):
    stack_class = DeepseekV3Model


class DeepseekV3ForTokenClassification(DeepseekV3PreTrainedModel, DeepseekForTokenClassification):
    stack_class = DeepseekV3Model


# Without this, transformers would write the stacked experts as they are. The mapping is the library's own for these
# model types; registering says that classes defined outside the library use it too.
for _model_type in (DeepseekV2Config.model_type, DeepseekV3Config.model_type):
    register_checkpoint_conversion_mapping(
        _model_type, get_checkpoint_conversion_mapping(_model_type) or [], overwrite=True
    )

teach_peft(DeepseekPreTrainedModel)
