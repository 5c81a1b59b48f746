"""The models: DeepSeek V2 and V3 (R1, Moonlight, Kimi-K2) as `PreTrainedModel`s. The only file that knows all others.

One set of classes serves both families; the `DeepseekV2...` and `DeepseekV3...` classes at the end bind it to a
configuration class and to the names that transformers, TRL and serving engines go by.

Legend: B batch, S tokens, D hidden size, T = B x S, E routed experts, K experts per token, N sequences.
"""

import copy
import dataclasses
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
import torch.distributed as dist
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.distributed.pipeline_parallel import PipelineIdentityLayer
from transformers.generation import GenerationMixin
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel, slice_logits_to_keep
from transformers.utils import can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .adapters import own_layout, read_adapter, teach_peft
from .configuration_deepseek import DeepseekConfig, DeepseekV2Config, DeepseekV3Config
from .conversion import (
    BLOCK_SIZE,
    CheckpointError,
    LoadingPlan,
    hub_tensors,
    open_checkpoint,
    some_of,
    stored_mtp_modules,
)
from .decoder_layer import DeepseekDecoderLayer
from .layers import DeepseekRMSNorm
from .losses import token_losses, tokens_at_once
from .mla import DeepseekMLA
from .moe import DeepseekExperts, DeepseekGate, DeepseekMoE, load_balancing_loss
from .mtp import DeepseekMTPLayer, same_document, shift_left, targets_ahead
from .packing import SequenceContext, documents, packed_positions, paged_context, sequence_context
from .paged import LatentBatching
from .parallel import check_generation, check_layout, is_spread, rules_that_apply, whole_state, without_labels
from .quantization import (
    device_of,
    is_bitsandbytes,
    load_quantized,
    one_by_one,
    quantized_experts,
    quantized_while_loaded,
    replace_experts,
    restore_experts,
    skipping_by_default,
    statistics_bytes,
    unquantized,
)
from .rope import rope_angles, rope_frequencies, rope_magnitudes
from .speculation import check_speculation, speculate

logger = logging.get_logger(__name__)

_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
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

# What a checkpoint needs beside it to be loaded by `trust_remote_code=True`: this flat folder's travelling part.
TRAVELLING_FILES = (
    "configuration_deepseek.py",
    "rope.py",
    "layers.py",
    "parallel.py",
    "paged.py",
    "mla.py",
    "moe.py",
    "decoder_layer.py",
    "packing.py",
    "mtp.py",
    "losses.py",
    "adapters.py",
    "conversion.py",
    "quantization.py",
    "row_cache.py",
    "speculation.py",
    "modeling_deepseek.py",
)


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

    `lm_loss` is next-token cross-entropy alone, `mtp_losses` one value a module. All but `loss` carry no gradient.
    """

    lm_loss: torch.Tensor | None = None
    mtp_losses: tuple[torch.Tensor, ...] | None = None


class DeepseekRotaryEmbedding(nn.Module):
    """Turns positions into cos and sin, in float32 whatever the model's dtype."""

    inv_freq: torch.Tensor

    def __init__(self, config: DeepseekConfig):
        super().__init__()
        self.config = config
        self.magnitude = rope_magnitudes(config.rope)[0]
        self.register_buffer("inv_freq", self.frequencies(), persistent=False)

    def frequencies(self) -> torch.Tensor:
        return rope_frequencies(self.config.rope, self.config.qk_rope_head_dim)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if self.inv_freq.dtype != torch.float32:  # `model.to(bfloat16)` must not round the angles
            self.inv_freq = self.frequencies().to(self.inv_freq.device)
        return self

    @torch.no_grad()
    def forward(self, position_ids_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return rope_angles(position_ids_BS, self.inv_freq.float(), self.magnitude)


class DeepseekPreTrainedModel(PreTrainedModel):
    """Loading, saving and balancing, for every model of both families."""

    config: DeepseekConfig
    config_class: type[DeepseekConfig]
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DeepseekDecoderLayer", "DeepseekMTPLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": DeepseekDecoderLayer, "attentions": DeepseekMLA}
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]
    # Copies of the shared embedding and head in each MTP module, where transformers' own loading meets them.
    _keys_to_ignore_on_load_unexpected = [r"layers\.\d+\.(embed_tokens|shared_head\.head)\.weight$"]
    # Prefixes of the parameters of MTP modules that were asked for beyond those of the checkpoint.
    fresh_modules: tuple[str, ...] = ()

    def __init__(self, config: DeepseekConfig, *args: Any, **kwargs: Any):
        if not isinstance(config, DeepseekConfig):
            ours, theirs = self.config_class.__name__, f"{type(config).__module__}.{type(config).__name__}"
            raise ValueError(
                f"{type(self).__name__} takes this package's {ours}, got a {theirs}; pass {ours}.converted(config), or "
                "use an Auto class"
            )
        config.check()
        super().__init__(config, *args, **kwargs)

    @classmethod
    def _from_config(cls, config, **kwargs):  # behind `AutoModel.from_config`
        return super()._from_config(cls.config_class.converted(config), **kwargs)

    # transformers finds out by searching the text of this file for a decorator and a call that are in moe.py and
    # mla.py, and would fall back to a loop over the experts without a word.
    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, DeepseekRMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, DeepseekGate):
            init.normal_(module.weight, mean=0.0, std=std)
            if module.e_score_correction_bias is not None:
                init.zeros_(module.e_score_correction_bias)
        elif isinstance(module, DeepseekExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, DeepseekRotaryEmbedding):
            init.copy_(module.inv_freq, module.frequencies())

    def update_correction_bias(self, group: dist.ProcessGroup | None = None) -> dict[int, torch.Tensor]:
        """Auxiliary-loss-free balancing (V3 2.1.2): call once after each optimizer step.

        Moves every gate's `e_score_correction_bias` by `config.bias_update_speed` against the load counted since the
        last call: all tokens of all micro-batches and processes (`group`, default all), padding left out, tokens
        recomputed by gradient checkpointing counted once. With `config.freeze_correction_bias`, speed 0 or a gate
        without a bias it only reads and resets the counts.

        Returns:
            Tokens per expert, (E,) int64, for each MoE layer's index (MTP modules count on from
            `num_hidden_layers`). `moe.max_violation` makes one number of it.
        """
        # The ranks of a tensor parallel group have all counted the same tokens.
        copies = 1 if group is not None else (self._tp_size or 1)
        return {
            index: mlp.gate.update_correction_bias(group) // copies
            for index, layer in enumerate(self.stack.layers)
            # A layer may be wrapped, or on another stage.
            if isinstance(mlp := getattr(layer, "mlp", None), DeepseekMoE)
        }

    @property
    def stack(self) -> "DeepseekModel":
        """The decoder stack without a head: this model itself, or its `model`."""
        return cast(DeepseekModel, self.base_model)

    # Several devices (parallel.py)

    def init_parallel_plans(self) -> None:
        super().init_parallel_plans()
        self._tp_plan = rules_that_apply(self, self._tp_plan)
        self._ep_plan = rules_that_apply(self, self._ep_plan)

    @classmethod
    def maybe_distribute_model(cls, model, distributed_config, mesh_manager):
        check_layout(model.config, distributed_config)
        if distributed_config.tp_size > 1 and distributed_config.tp_plan == {}:
            # Experts alone. The library says to write it like this, and then finds that there is no plan.
            distributed_config = dataclasses.replace(
                distributed_config, tp_plan=dict.fromkeys(model.tp_plan, "replicate")
            )
        model = super().maybe_distribute_model(model, distributed_config, mesh_manager)
        if distributed_config.pp_size > 1:
            model.forward = without_labels(model.forward)
        return model

    # Loading

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """As transformers', and:

        - FP8 block checkpoints load into `dtype` (the file's own `torch_dtype`, bfloat16 in the releases, by default)
          on any device, exactly: fp8 times scale in float32, rounded once.
        - With `quantization_config=BitsAndBytesConfig(...)` the routed experts are quantised as the linear layers are,
          matrix by matrix, from FP8 checkpoints too (see quantization.py).
        - `num_nextn_predict_layers=0` leaves the MTP modules out; more than the checkpoint has adds fresh ones. A
          checkpoint that promises modules and has no tensor of them (as transformers saves it) loads without, with a
          warning, and its configuration then says so. With a `config` object, set the field there instead.

        Raises:
            CheckpointError (a ValueError): for missing, surplus or misshapen tensors, wrong FP8 grids and truncated
                files, naming the tensor. Only a new classification head may be missing.
        """
        quantization_config = kwargs.pop("quantization_config", None)
        if isinstance(config, PreTrainedConfig):
            config = cls.config_class.converted(config)
        elif pretrained_model_name_or_path is not None:
            # The configuration takes these from kwargs and does not give them back; the weights need them too.
            where = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
            config, kwargs = cls.config_class.from_pretrained(
                config if config is not None else pretrained_model_name_or_path,
                return_unused_kwargs=True,
                **kwargs,
            )
            kwargs = {**where, **kwargs}
        config = copy.deepcopy(config)
        stored_as = getattr(config, "quantization_config", None)
        with_bitsandbytes = is_bitsandbytes(quantization_config)
        if with_bitsandbytes and not is_bitsandbytes(stored_as):
            quantization_config = skipping_by_default(quantization_config)
        if (
            isinstance(stored_as, dict)
            and stored_as.get("quant_method") == "fp8"
            and (quantization_config is None or with_bitsandbytes)
        ):
            block_size = stored_as.get("weight_block_size") or BLOCK_SIZE
            del config.quantization_config  # or transformers would put its own FP8 layers in place of ours
            config._fp8_block_size = tuple(block_size)
            if config.dtype is None:
                config.dtype = torch.bfloat16
        if quantization_config is not None:
            kwargs["quantization_config"] = quantization_config
        return super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)

    def _get_dtype_plan(self, dtype):
        # transformers has put its quantised linear layers in place and is about to size up the model for `device_map`.
        quantization_config = getattr(self.config, "quantization_config", None)
        if self.device.type == "meta" and getattr(self, "is_quantized", False) and is_bitsandbytes(quantization_config):
            replace_experts(self, quantization_config)
        return super()._get_dtype_plan(dtype)

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys=None):
        """transformers' own loading, fed with parameters that are read, stacked and dequantised one at a time.
        Each rank of a model that is spread over devices reads its own part. Where the pieces must come from files
        themselves (layers that quantise on load by other means than bitsandbytes, formats other than safetensors),
        theirs."""
        if getattr(model, "_hf_peft_config_loaded", False):  # `load_adapter`
            adapter = read_adapter(model, checkpoint_files) if state_dict is None else own_layout(model, state_dict)
            return PreTrainedModel._load_pretrained_model(model, adapter, None, load_config, expected_keys)
        config = model.config
        quantizer = load_config.hf_quantizer
        with_bitsandbytes = quantizer is not None and is_bitsandbytes(quantizer.quantization_config)
        block_size = config.__dict__.pop("_fp8_block_size", None)
        plain = (
            checkpoint_files is not None
            and all(file.endswith(".safetensors") for file in checkpoint_files)
            and (quantizer is None or (with_bitsandbytes and load_config.device_mesh is None))
            and not is_deepspeed_zero3_enabled()
        )
        if plain:
            stored = open_checkpoint(checkpoint_files)
            _settle_mtp_modules(model, stored, checkpoint_files[0])
            parameters = unquantized(model)
            ours = quantized_while_loaded(model, quantizer) if with_bitsandbytes else {}
            plan = LoadingPlan(
                config,
                parameters,
                stored,
                block_size or BLOCK_SIZE,
                optional=lambda name: _may_be_missing(model, name),
                any_shape=load_config.ignore_mismatched_sizes,
                quantized=[
                    name
                    for name in parameters
                    if quantizer.pre_quantized and (name in ours or quantizer.param_needs_quantization(model, name))
                ]
                if with_bitsandbytes
                else (),
                elsewhere=lambda name: _is_on_another_stage(model, name),
            )
            plan.check_mtp_copies()
            plan.raise_for_leftovers()
            stored_ours = {name: plan.parameters.pop(name, None) for name in ours}
            state_dict, checkpoint_files = plan.with_statistics(), None
            mapping = quantizer.get_weight_conversions() if with_bitsandbytes else []
            load_config = dataclasses.replace(load_config, weight_mapping=mapping)
        elif block_size is not None:
            raise ValueError(
                "an FP8 checkpoint can be loaded from safetensors files only, and not together with a "
                "quantization other than its own; load it once, save it without `fp8=True`, and load that"
            )
        elif quantized_experts(model):
            raise ValueError(
                "experts in 4 or 8 bits are loaded from safetensors files only, and not together with a device mesh or "
                "DeepSpeed's ZeRO-3; save the model as safetensors first, or leave the experts out by "
                "`llm_int8_skip_modules`"
            )
        result = PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys)
        if plain:
            for path, (module, name) in ours.items():
                lazy = stored_ours[path]
                if lazy is None:
                    raise ValueError(
                        f"{path} is not in the checkpoint, and cannot start from random weights in 4 or 8 bits; add "
                        "its layer to `llm_int8_skip_modules`, or leave it out: `num_nextn_predict_layers`"
                    )
                load_quantized(module, name, lazy, device_of(path, load_config.device_map))
                result[0].missing_keys -= {path, f"{path}_SCB"}
            model._weight_conversions = None  # saving goes by the registered layout, not by what loading used
        elif checkpoint_files is not None or state_dict is not None:
            missing = sorted(name for name in result[0].missing_keys if not _may_be_missing(model, name))
            if missing:  # transformers would go on with random weights
                where = os.path.dirname(checkpoint_files[0]) if checkpoint_files else "the state dict"
                raise CheckpointError(
                    f"{where} lacks {some_of(missing)}, which its configuration calls for; fetch the file again, or "
                    "correct the configuration"
                )
        return result

    def dequantize(self, dtype=None):
        """As transformers', routed experts included."""
        dtype = self.config.dtype if dtype is None else dtype
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # `save_pretrained` leaves its name there
        if quantized_experts(self):
            restore_experts(self, dtype)
        return super().dequantize(dtype)

    def get_memory_footprint(self, return_buffers=True):
        """As transformers', with the scales that bitsandbytes keeps beside its weights."""
        return super().get_memory_footprint(return_buffers) + statistics_bytes(self)

    # Saving

    def save_pretrained(  # type: ignore[override]  # by keyword only, and two keywords more
        self, save_directory, *, state_dict=None, fp8=False, save_code=False, **kwargs
    ):
        """As transformers', in the Hub's layout: one tensor for each expert, MTP modules with their copies of the
        shared embedding and head.

        Args:
            fp8: store the layers' matrices as e4m3 in 128 x 128 blocks with scales, as the releases are. Lossy; runs
                on CPU as well.
            save_code: put the model's code beside the weights and point `auto_map` to it, so that
                `trust_remote_code=True` loads these classes where this package is not installed.
        """
        quantizer = getattr(self, "hf_quantizer", None)
        with_bitsandbytes = quantizer is not None and is_bitsandbytes(quantizer.quantization_config)
        as_it_is = (
            getattr(self, "_hf_peft_config_loaded", False)
            or (quantizer is not None and not with_bitsandbytes)
            or any(parameter.is_meta for parameter in self.parameters())
            or kwargs.get("distributed_checkpoint", False)
        )
        if fp8 and (as_it_is or with_bitsandbytes):
            raise ValueError(
                "`fp8=True` needs a whole model in memory, without adapters, quantisation, offloading or "
                "`distributed_checkpoint`"
            )
        if save_code and kwargs.get("push_to_hub"):
            raise ValueError(
                "`save_code=True` cannot go with `push_to_hub=True`, which uploads before the code is there; save, "
                "then upload the folder (`huggingface_hub.upload_folder`)"
            )
        had_quantization = getattr(self.config, "quantization_config", None)
        had_auto_map = getattr(self.config, "auto_map", None)
        layout = getattr(self.config, "distributed_config", None)
        gathered = not as_it_is and state_dict is None and is_spread(self)
        if not as_it_is:
            if state_dict is None:
                state_dict = whole_state(self) if gathered else self.state_dict()
            state_dict = dict(hub_tensors(self.config, one_by_one(self, state_dict), fp8))
            kwargs["save_original_format"] = False
        try:
            if fp8:
                self.config.quantization_config = {
                    "activation_scheme": "dynamic",
                    "fmt": "e4m3",
                    "quant_method": "fp8",
                    "weight_block_size": list(BLOCK_SIZE),
                }
            elif not as_it_is and not with_bitsandbytes and had_quantization is not None:
                del self.config.quantization_config  # of a file that the configuration was read from: these are floats
            if with_bitsandbytes and not as_it_is:
                delattr(self, "hf_quantizer")  # or transformers would ask it for the tensors, and not take these
            if save_code:
                self.config.auto_map = self._auto_map()
            elif had_auto_map and _names_missing_code(had_auto_map, save_directory):
                del self.config.auto_map  # of the checkpoint that was loaded, whose code stays where it is
            if layout is not None and not as_it_is:
                del self.config.distributed_config  # or it would all be gathered once more
            super().save_pretrained(save_directory, state_dict=state_dict, **kwargs)
        finally:
            if quantizer is not None:
                setattr(self, "hf_quantizer", quantizer)  # noqa: B010  # mypy does not know it
            restored = {"quantization_config": had_quantization, "auto_map": had_auto_map, "distributed_config": layout}
            for name, value in restored.items():
                if value is not None:
                    setattr(self.config, name, value)
                elif hasattr(self.config, name):
                    delattr(self.config, name)
        if save_code and self.should_save_on_this_rank(kwargs.get("is_main_process", True)):
            here = Path(__file__).parent
            for name in TRAVELLING_FILES:
                shutil.copyfile(here / name, Path(save_directory) / name)
        if gathered:
            dist.barrier()  # no rank may load before rank 0 has written

    @classmethod
    def _auto_map(cls) -> dict[str, str]:
        family = cls.config_class.__name__.removesuffix("Config")
        classes = {
            "AutoModel": "Model",
            "AutoModelForCausalLM": "ForCausalLM",
            "AutoModelForSequenceClassification": "ForSequenceClassification",
            "AutoModelForTokenClassification": "ForTokenClassification",
        }
        auto_map = {auto: f"modeling_deepseek.{family}{name}" for auto, name in classes.items()}
        return {"AutoConfig": f"configuration_deepseek.{family}Config", **auto_map}


def _names_missing_code(auto_map: dict[str, Any], folder: str | os.PathLike) -> bool:
    """Whether it points to a file beside the checkpoint that is not there ("--" points to a repository)."""
    files = {value.split(".")[0] for value in auto_map.values() if isinstance(value, str) and "--" not in value}
    return not all((Path(folder) / f"{file}.py").exists() for file in files)


def _may_be_missing(model: "DeepseekPreTrainedModel", name: str) -> bool:
    """New heads, weights tied to another, and MTP modules that were asked for beyond the checkpoint's."""
    if name.startswith("score.") or name in model.all_tied_weights_keys:
        return True
    return name.startswith(model.fresh_modules)


def _is_on_another_stage(model: "DeepseekPreTrainedModel", name: str) -> bool:
    """Whether this stage of a pipeline has an empty module in the place of the one that holds a base model's tensor."""
    first, _, rest = name.partition(".")
    module = getattr(model.stack, first, None)
    if first == "layers" and (index := int(rest.partition(".")[0])) < len(model.stack.layers):
        module = model.stack.layers[index]
    return isinstance(module, PipelineIdentityLayer)


def _settle_mtp_modules(model: "DeepseekPreTrainedModel", stored: dict[str, Any], file: str) -> None:
    """Decides for the MTP modules of which the checkpoint has nothing: dropped if only its configuration promised
    them, fresh if the caller asked for more than it promised. Anything in between is left to be missed."""
    config, base = model.config, model.stack
    first, wanted = config.num_hidden_layers, config.num_nextn_predict_layers
    absent = set(range(wanted)) - stored_mtp_modules(stored, first)
    if not absent:
        return
    config_file = os.path.join(os.path.dirname(file), "config.json")
    promised = wanted
    if os.path.exists(config_file):
        with open(config_file, encoding="utf-8") as stream:
            promised = json.load(stream).get("num_nextn_predict_layers") or 0
    fresh = {module for module in absent if module >= promised}
    if fresh:
        prefix = "" if base is model else f"{model.base_model_prefix}."
        model.fresh_modules = tuple(f"{prefix}layers.{first + module}." for module in fresh)
        logger.warning(f"MTP modules {sorted(fresh)} are not in the checkpoint and start from random weights.")
    elif absent == set(range(wanted)):
        logger.warning(
            f"config.json says num_nextn_predict_layers={promised}, but the checkpoint has no tensor of layer {first}: "
            "it is loaded without MTP modules."
        )
        base.layers = base.layers[:first]
        config.num_nextn_predict_layers = 0


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
            losses_BS = token_losses(self.lm_head, outputs.last_hidden_state, targets_BS, self._tokens_at_once)
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
        return can_skip and in_training and hidden_BSD.shape[:-1].numel() > self._tokens_at_once

    @property
    def _tokens_at_once(self) -> int:
        return tokens_at_once(self.config.logits_workspace_mib, self.config.vocab_size)

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

        Module k predicts at each position the target k positions further on in `targets_BS`.

        Returns:
            For each module the losses (B, S), 0 where there is no target, and where there is one (B, S, bool); and
            the balance losses of the modules' experts, where the stack has computed its own.
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
        for depth, layer in enumerate(self.model.layers[self.config.num_hidden_layers :], start=1):
            hidden_BSD, logits_TE, indices_TK, normed_BSD = layer(
                hidden_BSD,
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
            losses_BS = token_losses(self.lm_head, normed_BSD, ahead_BS, self._tokens_at_once)
            losses.append((losses_BS, ahead_BS.to(losses_BS.device) != -100))
            if logits_TE is not None:
                self.model.record_load(layer, indices_TK, valid_BS)
                if outputs.aux_loss is not None:
                    balance.append(self.model.balance_loss(logits_TE, indices_TK, context, valid_BS))
        return losses, balance

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
