"""What every model of both families has: weights that begin, balance, are spread over devices, load and save.

Legend: E routed experts.
"""

import copy
import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import initialization as init
from transformers.configuration_utils import PreTrainedConfig
from transformers.distributed.pipeline_parallel import PipelineIdentityLayer
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from .adapters import own_layout, read_adapter
from .configuration_deepseek import DeepseekConfig
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
from .layers import DeepseekRMSNorm, DeepseekRotaryEmbedding
from .mla import DeepseekMLA
from .moe import DeepseekExperts, DeepseekGate, DeepseekMoE
from .parallel import check_layout, draw_missing, is_spread, rules_that_apply, whole_state, without_labels
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

logger = logging.get_logger(__name__)

_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")

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
    "adapted_experts.py",
    "adapter_targets.py",
    "on_import.py",
    "adapters.py",
    "conversion.py",
    "quantization.py",
    "row_cache.py",
    "drafting.py",
    "pretrained.py",
    "speculation.py",
    "modeling_deepseek.py",
)


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
    def stack(self) -> Any:
        """The decoder stack without a head: this model itself, or its `model`."""
        return self.base_model

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

    def _initialize_missing_keys(self, is_quantized):
        if self._mesh_manager is not None:
            draw_missing(self)
        super()._initialize_missing_keys(is_quantized)

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
            # "auto" is for the weights: the configuration would take it for its own dtype, in place of the file's.
            auto = {name: kwargs.pop(name) for name in ("dtype", "torch_dtype") if kwargs.get(name) == "auto"}
            config, kwargs = cls.config_class.from_pretrained(
                config if config is not None else pretrained_model_name_or_path,
                return_unused_kwargs=True,
                **kwargs,
            )
            kwargs = {**where, **auto, **kwargs}
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
        model = super().dequantize(dtype)
        for parameter in self.parameters():  # the others are as they were loaded
            parameter.data = parameter.data.to(dtype)
        return model

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
            if any(".base_layer." in name for name in state_dict):
                raise ValueError(
                    "there are PEFT's layers in this model, and a checkpoint of it could not be loaded; save the "
                    "PeftModel, which writes the adapter, or merge it first: `peft_model.merge_and_unload()`"
                )
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
