"""Configurations of DeepSeek V2 and V3 (and R1, Moonlight, Kimi-K2, which are V3), first of the files that travel.

Field names are those of the released `config.json` files. Every field of those files is honoured or refused with a
`ValueError` that names it; what is not in them (router precision, MTP loss weight, bias update, attention path) has
the published behaviour as its default.

    >>> config = DeepseekV3Config.from_preset("deepseek-v3")
    >>> config.n_routed_experts, config.num_experts_per_tok, config.cache_values_per_token
    (256, 8, 35136)

This file reads nothing but transformers, so it can lie beside a checkpoint. It has no `from __future__ import
annotations`: with it, `@strict` would not check any type.
"""

import copy
import difflib
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig

# Keys of `rope_scaling` that each type of RoPE honours, beside the type itself.
ROPE_KEYS: dict[str, set[str]] = {"default": set(), "linear": {"factor"}}
ROPE_KEYS["yarn"] = {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"}

# Fields that released or transformers-written files carry and that change no number here: they are kept and ignored.
WITHOUT_EFFECT = {"auto_map", "head_dim", "model_type", "num_labels", "pretraining_tp", "qk_head_dim", "rope_scaling"}
WITHOUT_EFFECT |= {"rope_theta", "torch_dtype", "quantization_config", "gradient_checkpointing", "_name_or_path"}


@strict
class DeepseekConfig(PreTrainedConfig):
    """What V2 and V3 share: every field, its checks, and the layout of the saved file.

    Use `DeepseekV2Config` or `DeepseekV3Config`; they differ in `model_type` and defaults only. Sizes are counts of
    values, not bytes. `None` for `n_group`, `topk_group` reads as 1, for `n_shared_experts` as 0, for
    `n_routed_experts` as "every layer dense", for `q_lora_rank` as "no query compression".

    Args beyond the released fields:
        router_logits_dtype: "float32" (default) multiplies the router in float32; "activation" in the dtype of the
            hidden state, as the official inference code does.
        mtp_loss_weight: lambda of the multi-token prediction loss (V3 2.2); V3 used 0.3, and 0.1 for its last 4.8T
            tokens.
        mtp_hidden_state: whether `hnorm` of an MTP module sees the main model's hidden state "after_norm" (default,
            as in most public code) or "before_norm".
        mtp_passes: how often the last MTP module is applied in the loss. 1 (default) is V3's; further passes see the
            module's own output, which is what it drafts from beyond the first token (our choice).
        bias_update_speed: gamma of the auxiliary-loss-free balancing (V3 2.1.2); V3 used 0.001.
        freeze_correction_bias: leaves `e_score_correction_bias` alone whatever the speed (V3's last 500B tokens).
        mla_path: "expanded", "absorbed", or "auto" (default): whichever costs fewer multiplications for the shapes.
        mla_workspace_mib: upper bound in MiB for the keys and values that inference expands from cached latents at a
            time; heads are processed in blocks below it.
        logits_workspace_mib: upper bound in MiB for the float32 logits that exist at a time in training; a batch with
            more gets its loss chunk by chunk, and no logits in its output (see `skip_logits` of the forward).

    Raises:
        ValueError: for a field that cannot be honoured, or values that exclude each other; the text names the field,
            the value and the way out.
    """

    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "past_key_values",
        "router_logits",
        "aux_loss",
        "lm_loss",
        "mtp_losses",
    ]
    # The names that transformers, TRL and PEFT ask for.
    attribute_map: ClassVar[dict[str, str]] = {
        "num_experts": "n_routed_experts",
        "num_local_experts": "n_routed_experts",
        "num_mtp_layers": "num_nextn_predict_layers",
        "router_aux_loss_coef": "aux_loss_alpha",
    }
    # Attention is split by heads: what has no heads (both down-projections, their norms, the cached latents) is whole
    # on every rank. "mla_kv_a_proj" sums the gradients of the rotary key, which reaches the heads of all ranks without
    # passing through a split layer. `parallel.check_layout` says which numbers must divide.
    base_model_tp_plan: ClassVar[dict[str, str]] = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.q_b_proj": "colwise",
        "layers.*.self_attn.kv_a_proj_with_mqa": "mla_kv_a_proj",
        "layers.*.self_attn.kv_b_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
        "layers.*.mlp.shared_experts.gate_proj": "colwise",
        "layers.*.mlp.shared_experts.up_proj": "colwise",
        "layers.*.mlp.shared_experts.down_proj": "rowwise",
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
        "layers.*.eh_proj": "colwise_gather_output",
    }
    base_model_ep_plan: ClassVar[dict[str, Any]] = {  # the library annotates it as a plan of stages
        "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
        "layers.*.mlp.experts.down_proj": "grouped_gemm",
        "layers.*.mlp.experts": "ep_dispatch_experts",
    }
    base_model_pp_plan: ClassVar[dict[str, Any]] = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 129280
    hidden_size: int = 7168
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    num_hidden_layers: int = 61
    num_nextn_predict_layers: int = 0
    num_attention_heads: int = 128
    num_key_value_heads: int | None = None
    q_lora_rank: int | None = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    n_routed_experts: int | None = 256
    n_shared_experts: int | None = 1
    num_experts_per_tok: int | None = 8
    n_group: int | None = None
    topk_group: int | None = None
    first_k_dense_replace: int = 0
    moe_layer_freq: int = 1
    scoring_func: str = "sigmoid"
    topk_method: str = "noaux_tc"
    norm_topk_prob: bool = True
    routed_scaling_factor: float | int = 1.0
    router_logits_dtype: str = "float32"
    aux_loss_alpha: float | int = 0.001
    seq_aux: bool = True
    bias_update_speed: float | int = 0.001
    freeze_correction_bias: bool = False
    mtp_loss_weight: float | int = 0.3
    mtp_hidden_state: str = "after_norm"
    mtp_passes: int = 1
    mla_path: str = "auto"
    mla_workspace_mib: int = 512
    logits_workspace_mib: int = 512
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    rope_parameters: dict | None = None
    rope_interleave: bool = True
    initializer_range: float | int = 0.02
    rms_norm_eps: float | int = 1e-6
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    tie_word_embeddings: bool = False
    use_cache: bool = True
    output_router_logits: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    ep_size: int = 1

    def __post_init__(self, **kwargs):
        self._refuse_misspelt(kwargs)
        if kwargs.get("model_type") in {"deepseek_v2", "deepseek_v3"} - {self.model_type}:
            raise ValueError(f"`model_type` {kwargs['model_type']!r} is not {self.model_type}; use AutoConfig")
        for derived in ("qk_head_dim", "head_dim", "model_type"):  # kimi_k2 reads as the class it is read by
            kwargs.pop(derived, None)
        if isinstance(kwargs.get("rope_scaling"), dict):
            kwargs["rope_scaling"] = copy.deepcopy(kwargs["rope_scaling"])  # transformers fills defaults in place
        if isinstance(self.rope_parameters, dict):
            self.rope_parameters = copy.deepcopy(self.rope_parameters)
        for rope in (kwargs.get("rope_scaling"), self.rope_parameters):
            if isinstance(rope, dict):
                for name in [name for name, value in rope.items() if value is None]:
                    del rope[name]  # null in a file is as good as not there
            if isinstance(rope, dict) and "yarn" in (rope.get("type"), rope.get("rope_type")):
                rope.setdefault("original_max_position_embeddings", 4096)  # as in the official code, where unsaid
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        super().__post_init__(**kwargs)
        self.check()

    @classmethod
    def _refuse_misspelt(cls, extra: dict[str, Any]) -> None:
        """An unknown key that is nearly a known one would otherwise be kept as an attribute and have no effect."""
        fields = set(cls.__dataclass_fields__) | set(cls.attribute_map)
        for name in extra.keys() - fields - WITHOUT_EFFECT - set(dir(cls)):
            near = difflib.get_close_matches(name, fields | WITHOUT_EFFECT, n=1, cutoff=0.9)
            if near:
                raise ValueError(f"unknown configuration field `{name}`: did you mean `{near[0]}`?")

    def __setattr__(self, name: str, value: Any) -> None:
        # At once, not at the next check: `model.config.mla_path = ...` is how a path is forced.
        choices = self._CHOICES.get(name)
        if choices is not None and value not in choices:
            raise ValueError(f"`{name}` must be one of {choices}, got {value!r}")
        if name in self._SET_LATER and isinstance(value, int) and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}")
        super().__setattr__(name, value)

    _CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {
        "scoring_func": ("sigmoid", "softmax"),
        "topk_method": ("noaux_tc", "greedy", "group_limited_greedy"),
        "router_logits_dtype": ("float32", "activation"),
        "mtp_hidden_state": ("after_norm", "before_norm"),
        "mla_path": ("auto", "expanded", "absorbed"),
    }
    # Of the fields that must be positive, those that a model reads anew each time.
    _SET_LATER: ClassVar[tuple[str, ...]] = ("mtp_passes", "mla_workspace_mib", "logits_workspace_mib")
    # The widths and ranks that must be positive, and the counts that may be zero.
    _POSITIVE: ClassVar[tuple[str, ...]] = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
        "max_position_embeddings",
        "moe_layer_freq",
        "ep_size",
        "mtp_passes",
        "mla_workspace_mib",
        "logits_workspace_mib",
    )
    _NOT_NEGATIVE: ClassVar[tuple[str, ...]] = (
        "num_nextn_predict_layers",
        "first_k_dense_replace",
        "aux_loss_alpha",
        "bias_update_speed",
        "mtp_loss_weight",
        "initializer_range",
        "rms_norm_eps",
    )

    def check(self) -> None:
        """Raises `ValueError` where fields are out of range or exclude each other. Runs at construction and whenever
        a model is built, so that a field changed in between is checked too."""
        # Read by code that sizes caches or RoPE without knowing MLA; derived, so never taken from a file.
        self.qk_head_dim = self.qk_nope_head_dim + self.qk_rope_head_dim
        self.head_dim = self.qk_rope_head_dim
        for name in self._POSITIVE:
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}")
        for name in self._NOT_NEGATIVE:
            if not getattr(self, name) >= 0:  # NaN included
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}")
        if self.q_lora_rank is not None and self.q_lora_rank < 1:
            raise ValueError(f"`q_lora_rank` must be at least 1, got {self.q_lora_rank}; use None for no compression")
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"`qk_rope_head_dim` must be even (RoPE rotates pairs), got {self.qk_rope_head_dim}")
        if self.num_key_value_heads != self.num_attention_heads:
            raise ValueError(
                f"`num_key_value_heads` ({self.num_key_value_heads}) must equal `num_attention_heads` "
                f"({self.num_attention_heads}): latent attention has one key and value a head; leave it out"
            )
        if not 0.0 <= self.attention_dropout < 1.0:
            raise ValueError(f"`attention_dropout` must lie in [0, 1), got {self.attention_dropout}")
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"`pad_token_id` must lie in [0, `vocab_size` {self.vocab_size}), got {self.pad_token_id}; use None "
                "for no padding token"
            )
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"`hidden_act` {self.hidden_act!r} is unknown; one of {sorted(ACT2FN)}")
        if self.ep_size != 1:
            raise ValueError(
                f"`ep_size` must be 1 in a configuration, got {self.ep_size}: how experts are spread over devices is "
                "said when the model is loaded, not in its file"
            )
        if self.n_routed_experts is not None:
            self._check_routing()
        self._check_rope()

    def _check_routing(self) -> None:
        for name in ("n_group", "topk_group"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}; None is for no groups")
        experts, top_k = self.n_routed_experts, self.num_experts_per_tok
        groups, top_groups = self.n_group or 1, self.topk_group or 1
        assert experts is not None
        for name in ("n_routed_experts", "moe_intermediate_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}; None is for a dense model")
        if self.n_shared_experts is not None and self.n_shared_experts < 0:
            raise ValueError(f"`n_shared_experts` must not be negative, got {self.n_shared_experts}")
        if top_k is None or top_k < 1:
            raise ValueError(f"`num_experts_per_tok` must be at least 1 where there are experts, got {top_k}")
        if experts % groups:
            raise ValueError(f"`n_routed_experts` ({experts}) must be divisible by `n_group` ({groups})")
        if top_groups > groups:
            raise ValueError(f"`topk_group` ({top_groups}) must not exceed `n_group` ({groups})")
        if self.topk_method == "noaux_tc" and groups > 1 and experts // groups < 2:
            raise ValueError(
                f"`topk_method` 'noaux_tc' scores a group by its two best experts, but `n_routed_experts` ({experts}) "
                f"over `n_group` ({groups}) leaves {experts // groups}"
            )
        allowed = experts if self.topk_method == "greedy" else experts // groups * top_groups
        if top_k > allowed:
            raise ValueError(
                f"`num_experts_per_tok` ({top_k}) exceeds the {allowed} experts that a token may reach "
                f"(`n_routed_experts` {experts}, `n_group` {groups}, `topk_group` {top_groups})"
            )

    def _check_rope(self) -> None:
        rope = self.rope_parameters or {}
        rope_type = rope.get("rope_type", "default")
        if rope_type not in ROPE_KEYS:
            raise ValueError(f"`rope_scaling` type {rope_type!r} is not supported; one of {tuple(ROPE_KEYS)}")
        for name, value in rope.items():
            if value is None or name in ("type", "rope_type"):
                continue
            if name != "rope_theta" and name not in ROPE_KEYS[rope_type]:
                raise ValueError(
                    f"`rope_scaling` of type {rope_type!r} has no `{name}` ({value!r}); it may hold "
                    f"{sorted(ROPE_KEYS[rope_type])}"
                )
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not (number and (value > 0 or (value == 0 and name.startswith("mscale")))):
                raise ValueError(f"`{name}`, which RoPE reads, must be a positive number, got {value!r}")
        if rope_type != "default" and (rope.get("factor") or 0) < 1:
            raise ValueError(f"`rope_scaling` of type {rope_type!r} needs a `factor` >= 1, got {rope.get('factor')!r}")
        if rope.get("rope_theta") is None:
            raise ValueError("`rope_theta` must be a positive number, got None")

    @property
    def rope(self) -> dict[str, Any]:
        """`rope_parameters` as construction has completed them: `rope_type`, `rope_theta` and what the type needs."""
        assert self.rope_parameters is not None
        return self.rope_parameters

    @property
    def cache_values_per_token(self) -> int:
        """Values that the cache holds for one token over all layers: layers x (kv_lora_rank + qk_rope_head_dim)."""
        return self.num_hidden_layers * (self.kv_lora_rank + self.qk_rope_head_dim)

    @property
    def logits_at_once(self) -> int:
        """How many tokens' float32 logits `logits_workspace_mib` holds, at least one."""
        return max(1, self.logits_workspace_mib * 2**20 // (4 * self.vocab_size))

    def is_moe_layer(self, layer_idx: int) -> bool:
        """Whether decoder layer `layer_idx` (MTP modules count on from `num_hidden_layers`) has routed experts."""
        if self.n_routed_experts is None:
            return False
        return layer_idx >= self.first_k_dense_replace and layer_idx % self.moe_layer_freq == 0

    @classmethod
    def converted(cls, config: PreTrainedConfig) -> "DeepseekConfig":
        """`config` itself, or this class's reading of transformers' own configuration of the same model type."""
        if isinstance(config, cls):
            return config
        if config.model_type != cls.model_type:
            raise ValueError(f"cannot build a {cls.model_type} model from a {type(config).__name__}")
        ours = cls.from_dict({name: value for name, value in config.to_dict().items() if name != "dtype"})
        for internal in ("dtype", "_attn_implementation_internal", "_experts_implementation_internal"):
            if hasattr(config, internal):
                setattr(ours, internal, getattr(config, internal))
        return ours

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As in transformers, but overrides are checked together with the rest instead of being set afterwards."""
        names = set(cls.__dataclass_fields__) | set(cls.attribute_map) | {"rope_scaling", "rope_theta"}
        overrides = {
            cls.attribute_map.get(name, name): kwargs.pop(name)
            for name in list(kwargs)
            if name in names and name != "dtype"
        }
        if "rope_parameters" in overrides:  # or the file's `rope_scaling` would win
            config_dict = {**config_dict, "rope_scaling": None}
        elif overrides.keys() & {"rope_scaling", "rope_theta"} and config_dict.get("rope_parameters"):
            # transformers' layout, which would outweigh a new theta and lose its own to a new scaling
            rope = dict(config_dict["rope_parameters"])
            config_dict = {**config_dict, "rope_theta": rope.pop("rope_theta", 10000.0), "rope_scaling": rope}
            del config_dict["rope_parameters"]
        return super().from_dict({**config_dict, **overrides}, **kwargs)

    def to_diff_dict(self) -> dict[str, Any]:
        """What is written to `config.json`, in the released layout: `rope_theta` and `rope_scaling` (null or with
        `type`) in place of `rope_parameters`, `torch_dtype` in place of `dtype`, no derived fields."""
        output = super().to_diff_dict()
        rope = dict(output.pop("rope_parameters", None) or {})
        output["rope_theta"] = rope.pop("rope_theta", 10000.0)
        rope_type = rope.pop("rope_type", "default")
        rope.pop("type", None)
        output["rope_scaling"] = None if rope_type == "default" else {"type": rope_type, **rope}
        if "dtype" in output:
            output["torch_dtype"] = output.pop("dtype")
        for derived in ("qk_head_dim", "head_dim"):
            output.pop(derived, None)
        return output

    @classmethod
    def from_preset(cls, name: str, **overrides):
        """The configuration of a published model, or of a tiny one that really routes; `overrides` replace fields.

        Raises:
            ValueError: if `name` is not in `PRESETS`, or is of the other family.
        """
        if name not in PRESETS:
            near = difflib.get_close_matches(name, PRESETS, n=1)
            raise ValueError(f"unknown preset {name!r}{f', did you mean {near[0]!r}' if near else ''}; {list(PRESETS)}")
        fields = copy.deepcopy(PRESETS[name])
        family = fields.pop("model_type")
        if family != cls.model_type:
            raise ValueError(f"preset {name!r} is a {family}, not a {cls.model_type}: use the other class")
        if "rope_parameters" in overrides:
            fields.pop("rope_scaling", None)
        return cls(**{**fields, **overrides})


@strict
class DeepseekV2Config(DeepseekConfig):
    """DeepSeek V2: softmax gate, `greedy` or `group_limited_greedy` top-k. The defaults are V2-Lite's shape.
    See `DeepseekConfig` for the fields."""

    model_type: ClassVar[str] = "deepseek_v2"

    vocab_size: int = 102400
    hidden_size: int = 2048
    intermediate_size: int = 10944
    moe_intermediate_size: int = 1408
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    q_lora_rank: int | None = None
    n_routed_experts: int | None = 64
    n_shared_experts: int | None = 2
    num_experts_per_tok: int | None = 6
    first_k_dense_replace: int = 1
    scoring_func: str = "softmax"
    topk_method: str = "greedy"
    norm_topk_prob: bool = False
    bos_token_id: int | None = 100000
    eos_token_id: int | list[int] | None = 100001


@strict
class DeepseekV3Config(DeepseekConfig):
    """DeepSeek V3, R1, Moonlight and Kimi-K2: sigmoid gate, `noaux_tc` top-k, MTP. The defaults are V3's shape, with
    no MTP module. See `DeepseekConfig` for the fields."""

    model_type: ClassVar[str] = "deepseek_v3"

    n_group: int | None = 8
    topk_group: int | None = 4
    first_k_dense_replace: int = 3
    routed_scaling_factor: float | int = 2.5


_YARN_40 = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
}

# Published shapes (papers and released config.json files); the `tiny-` ones are ours. In `tiny-`, top-k < experts
# allowed by the groups < all experts, so that every step of the routing decides something.
PRESETS: dict[str, dict[str, Any]] = {
    "deepseek-v2-lite": {
        "model_type": "deepseek_v2",
        "max_position_embeddings": 163840,
        "rope_scaling": {**_YARN_40, "mscale": 0.707, "mscale_all_dim": 0.707},
    },
    "deepseek-v2": {
        "model_type": "deepseek_v2",
        "hidden_size": 5120,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 60,
        "num_attention_heads": 128,
        "q_lora_rank": 1536,
        "n_routed_experts": 160,
        "n_group": 8,
        "topk_group": 3,
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 16.0,
        "max_position_embeddings": 163840,
        "rope_scaling": {**_YARN_40, "mscale": 0.707, "mscale_all_dim": 0.707},
    },
    "deepseek-v3": {
        "model_type": "deepseek_v3",
        "num_nextn_predict_layers": 1,
        "max_position_embeddings": 163840,
        "rope_scaling": {**_YARN_40, "mscale": 1.0, "mscale_all_dim": 1.0},
    },
    "moonlight-16b-a3b": {
        "model_type": "deepseek_v3",
        "vocab_size": 163840,
        "hidden_size": 2048,
        "intermediate_size": 11264,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "q_lora_rank": None,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 2.446,
        "max_position_embeddings": 8192,
        "rope_theta": 50000.0,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 163584,
        "eos_token_id": 163585,
    },
    "kimi-k2": {
        "model_type": "deepseek_v3",
        "vocab_size": 163840,
        "num_attention_heads": 64,
        "n_routed_experts": 384,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 2.827,
        "max_position_embeddings": 131072,
        "bos_token_id": 163584,
        "eos_token_id": 163585,
        "rope_theta": 50000.0,
        "rope_scaling": {
            "type": "yarn",
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 1.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    },
    "tiny-v2": {
        "model_type": "deepseek_v2",
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "q_lora_rank": 24,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 2.0,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 1,
    },
    "tiny-v3": {
        "model_type": "deepseek_v3",
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_nextn_predict_layers": 1,
        "num_attention_heads": 4,
        "q_lora_rank": 24,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "max_position_embeddings": 512,
    },
}
PRESETS["deepseek-r1"] = PRESETS["deepseek-v3"]
