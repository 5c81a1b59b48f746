"""LoRA on these models by PEFT, in the very modules that were asked for.

    peft.get_peft_model(model, LoraConfig(target_modules=["gate_proj", "up_proj", "down_proj"]))     by PEFT's rules
    peft.get_peft_model(model, LoraConfig(target_modules=["attention", "routed_experts"]))           by named sets
    peft.get_peft_model(model, LoraConfig(target_modules="all-linear"))                               all of the sets

`model.add_adapter`, `PeftModel.from_pretrained` and TRL's `peft_config` come to the same. By itself PEFT would read
these model types as "every gate_proj, up_proj and down_proj is an expert's": it would leave dense and shared MLPs
without an adapter, and put one without dropout on the routed experts. `teach_peft` has it ask `settle_targets` instead,
for models of this package alone.

Routed experts lie in stacks. An adapter's factors do too, but each expert has its own, under the names that it would
have alone: `experts.3.gate_proj` is a name to ask for, and in adapter_model.safetensors the factors are

    base_model.model.model.layers.1.mlp.experts.3.gate_proj.lora_A.weight  (r, in), lora_B.weight  (out, r)

as serving engines read them. In the model they are `experts.gate_proj.lora_A.default.weight`, (E, r, in).

PEFT is imported where it is used, never by this file itself: it travels with checkpoints.

Legend: E routed experts, N rows sorted by expert, I inputs and O outputs of a projection, r rank of an adapter, T
tokens, D hidden size.
"""

import copy
import dataclasses
import difflib
import importlib
import importlib.abc
import importlib.util
import math
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from types import ModuleType
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers.distributed.utils import is_dtensor
from transformers.integrations.moe import _grouped_linear

from .decoder_layer import DeepseekDecoderLayer
from .moe import DeepseekGate, DeepseekMoE, run_experts
from .mtp import DeepseekMTPLayer

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
SETS = ("attention", "dense_mlp", "shared_experts", "routed_experts", "mtp")
"""The sets that can be named. They do not overlap: "mtp" is all of the MTP modules, and the others leave these out."""

_STACKED = re.compile(rf"(?P<experts>.*\.experts)\.(?P<rest>({'|'.join(PROJECTIONS)})\.lora_[AB]\..*)")
_SINGLE = re.compile(rf"(?P<experts>.*\.experts)\.(?P<expert>\d+)\.(?P<rest>({'|'.join(PROJECTIONS)})\.lora_[AB]\..*)")
_EXPERT = re.compile(rf"(^|\.)experts\.\d+\.({'|'.join(PROJECTIONS)})$")
_WRAPPED = re.compile(r"(?P<experts>.*\.experts)\.(?P<inner>(base_layer\.)*)lora_(?P<factor>[AB])\.weight")


# Which modules


def target_modules(model: nn.Module, sets: Iterable[str]) -> list[str]:
    """Names of the linear layers of these `SETS`, for `target_modules` of a LoraConfig (which takes the sets'
    names as well) or of another method of PEFT's.

    Raises:
        ValueError: for a set that is unknown, or that this model has nothing of.
    """
    members = linear_sets(model.get_base_model() if hasattr(model, "get_base_model") else model)  # type: ignore[operator]
    names = []
    for one in sets:
        if one not in members:
            near = difflib.get_close_matches(one, SETS, 1)
            raise ValueError(f"{one!r} is no set of modules{f', meant {near[0]!r}?' if near else ''}; there are {SETS}")
        if not members[one]:
            raise ValueError(f"this model has no modules of the set {one!r}; leave it out")
        names += members[one]
    return names


def linear_sets(model: nn.Module) -> dict[str, list[str]]:
    """Names of all linear layers but the heads, by set. Routed experts appear as `...mlp.experts.gate_proj` and its
    siblings, each of which stands for all experts of its layer."""
    sets: dict[str, list[str]] = {name: [] for name in SETS}
    for prefix, layer in model.named_modules():
        if not isinstance(layer, DeepseekDecoderLayer):
            continue
        for name in _linears(layer):
            where = "attention" if name.startswith("self_attn.") else "dense_mlp"
            if name.startswith("mlp.shared_experts."):
                where = "shared_experts"
            elif name.startswith("mlp.experts."):
                where = "routed_experts"
            sets["mtp" if isinstance(layer, DeepseekMTPLayer) else where].append(f"{prefix}.{name}")
    return sets


def _linears(module: nn.Module) -> Iterator[str]:
    for name, child in module.named_children():
        if isinstance(module, DeepseekMoE) and name == "experts":
            yield from (f"experts.{projection}" for projection in PROJECTIONS)
        elif isinstance(child, nn.Linear) or hasattr(child, "base_layer"):
            yield name
        else:
            yield from (f"{name}.{inner}" for inner in _linears(child))


def settle_targets(config: Any, model: nn.Module) -> None:
    """Makes `config`, a PeftConfig, name modules that PEFT finds in `model`, and the model ready for it: wraps the
    routed experts that are asked for. Called before PEFT looks for them; a config that is settled stays as it is.

    Raises:
        ValueError: for what routed experts and routers cannot have; nothing is changed then.
    """
    if not getattr(config, "target_modules", None) and not getattr(config, "target_parameters", None):
        return
    _refuse_split_layers(model)
    is_lora = config.peft_type == "LORA"
    members = linear_sets(model)
    mixtures = {f"{name}.experts": module for name, module in model.named_modules() if isinstance(module, DeepseekMoE)}
    settled = copy.copy(config)
    if is_lora:
        _settle_parameters(settled, mixtures)
    targets = settled.target_modules or []
    if isinstance(targets, str):
        if targets.lower() == "all-linear":
            settled.target_modules = {name for names in members.values() for name in names}
        elif targets in SETS:
            settled.target_modules = set(target_modules(model, [targets]))
    else:
        named = {one for one in targets if one in SETS}
        members_of = [name for name in target_modules(model, named) if _in_layers(settled, name)]
        settled.target_modules = {*targets, *members_of} - named

    asked = [name for name, mixture in mixtures.items() for name in _asked(settled, name, mixture)]
    if asked and not is_lora:
        raise ValueError(
            f"{config.peft_type.value} cannot adapt routed experts, and {_some(targets)} names them too. For the other "
            "layers pass target_modules=modeling_deepseek.target_modules(model, ['attention', 'dense_mlp', "
            "'shared_experts']), or use LoRA"
        )
    if isinstance(settled.target_modules, str):
        _settle_expression(settled, model, asked)
    else:
        _refuse_routers(settled, model)
        # Neither the module of all experts nor a single one is anything that PEFT can adapt.
        kept = {one for one in settled.target_modules or () if not _EXPERT.search(one)}
        kept -= {one for one in kept for name in mixtures if f".{name}".endswith(f".{one}")}
        settled.target_modules = kept
        settled.target_modules |= {name for name in asked if not _exists(settled, name)}
    if not is_lora:
        config.target_modules = settled.target_modules
        return
    if asked:
        _refuse_variants(config)
    if config.lora_bias and any(_exists(settled, f"{name}.kv_b_proj") for name, _ in model.named_modules()):
        raise ValueError(
            "`lora_bias=True` with kv_b_proj: absorbed attention knows no bias there; leave one of them out"
        )

    # PEFT shortens a long list to endings that no other module has; it must then see the projections to know of them.
    long = not isinstance(settled.target_modules, str) and len(settled.target_modules or ()) >= 20
    asked_of = {name: any(one.startswith(f"{name}.") for one in asked) for name in mixtures}
    for name, mixture in mixtures.items():
        if asked_of[name]:
            _refuse_sharded(name, mixture.experts)
    for name, mixture in mixtures.items():
        if (asked_of[name] or long) and not isinstance(mixture.experts, AdaptedExperts):
            mixture.experts = AdaptedExperts(mixture.experts)  # type: ignore[assignment]  # it stands in for them
    for name in ("target_modules", "target_parameters", "rank_pattern", "alpha_pattern"):
        setattr(config, name, getattr(settled, name))
    config._register_custom_module({ExpertProjection: sys.modules[__name__].LoraExpertProjection})


def _in_layers(config: Any, name: str) -> bool:
    """`layers_to_transform` for a full name, which PEFT would take whatever its layer."""
    layers = getattr(config, "layers_to_transform", None)
    if layers is None or layers == []:
        return True
    index = re.search(r"\.(\d+)\.", name)
    return index is not None and int(index[1]) in ([layers] if isinstance(layers, int) else layers)


def _exists(config: Any, name: str) -> bool:
    """PEFT's own rule, whether `config` asks for a module of this name."""
    return bool(importlib.import_module("peft.tuners.tuners_utils").check_target_module_exists(config, name))


def _asked(config: Any, experts: str, mixture: DeepseekMoE) -> list[str]:
    """The projections of one layer's routed experts that `config` asks for, by their names in the stack or by those
    of each expert."""
    if not config.target_modules:
        return []
    count = mixture.experts.num_experts
    found = []
    for projection in PROJECTIONS:
        each = [_exists(config, f"{experts}.{expert}.{projection}") for expert in range(count)]
        together = _exists(config, f"{experts}.{projection}")
        if together and not any(each):  # `.*\.experts\.gate_proj`
            each = [True] * count
        if any(each) and not all(each):
            raise ValueError(
                f"{experts}.{each.index(True)}.{projection} is asked for, {experts}.{each.index(False)}.{projection} "
                f"is not: all the {count} routed experts of a layer have an adapter, or none"
            )
        # A list that says "experts" or "mlp.experts.3" means all of it.
        whole = not isinstance(config.target_modules, str) and _exists(config, experts)
        if all(each) or whole:
            found.append(f"{experts}.{projection}")
    return found


def _settle_parameters(config: Any, mixtures: Mapping[str, DeepseekMoE]) -> None:
    """PEFT's way of naming routed experts, `target_parameters=["experts.gate_up_proj", ...]`, turned into modules.
    Configurations saved with adapters of transformers' own classes have it."""
    parameters = set(config.target_parameters or ())
    if not parameters:
        return
    modules = config.target_modules
    if isinstance(modules, str):
        raise ValueError(
            f"target_parameters={sorted(parameters)} beside the expression target_modules={modules!r}: name the "
            "projections of routed experts in target_modules too (`...experts.gate_proj`), and leave "
            "target_parameters out"
        )
    fused = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
    found, ranks, alphas = set(modules or ()), dict(config.rank_pattern), dict(config.alpha_pattern)
    used = set()
    for experts in mixtures:
        for stack, projections in fused.items():
            name = f"{experts}.{stack}"
            matching = {one for one in parameters if name == one or name.endswith(f".{one}")}
            if not matching:
                continue
            used |= matching
            found |= {f"{experts}.{projection}" for projection in projections}
            for patterns in (ranks, alphas):
                key = next((key for key in patterns if re.match(rf"(.*\.)?({key})$", name)), None)
                if key is not None and stack == "gate_up_proj":
                    patterns[rf"experts\.({'|'.join(projections)})"] = patterns.pop(key)
    if parameters - used:
        raise ValueError(
            f"target_parameters={sorted(parameters - used)} cannot be adapted: they are none of the routed experts' "
            "`gate_up_proj` and `down_proj`. Name linear layers in target_modules; to train the router, give "
            "modules_to_save=['gate']"
        )
    config.target_modules, config.target_parameters = found, None
    config.rank_pattern, config.alpha_pattern = ranks, alphas


def _settle_expression(config: Any, model: nn.Module, asked: list[str]) -> None:
    """A regular expression stays, unless it matches what PEFT does not find (a single expert) or cannot adapt (norms,
    modules that hold others): then the names of all the layers that it matches."""
    matched = {name: module for name, module in model.named_modules() if name and _exists(config, name)}
    layers = {
        name for name, module in matched.items() if isinstance(module, (nn.Linear, nn.Embedding, ExpertProjection))
    } | {name for name, module in matched.items() if hasattr(module, "base_layer") and not name.endswith(".experts")}
    if not layers and not asked:
        _refuse_routers(config, model)
    elif set(matched) - layers or not all(_exists(config, name) for name in asked):
        config.target_modules = {name for name in layers if ".base_layer" not in name and ".lora_" not in name}
        config.target_modules |= set(asked)


def _refuse_routers(config: Any, model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, DeepseekGate) and _exists(config, name):
            raise ValueError(
                f"{name} is a router and has no low-rank adapter; train it whole with modules_to_save=['gate']"
            )


def _refuse_variants(config: Any) -> None:
    variants = [
        field.name
        for field in dataclasses.fields(config)
        if field.metadata.get("is_lora_variant") and getattr(config, field.name)
    ]
    variants += [name for name in ("lora_bias", "fan_in_fan_out", "layer_replication") if getattr(config, name)]
    if config.init_lora_weights not in (True, False, "gaussian"):
        variants.append(f"init_lora_weights={config.init_lora_weights!r}")
    if variants:
        raise ValueError(
            f"routed experts have plain LoRA only, not {', '.join(variants)}. For the other layers pass target_modules="
            "modeling_deepseek.target_modules(model, ['attention', 'dense_mlp', 'shared_experts'])"
        )


def _refuse_split_layers(model: nn.Module) -> None:
    layout = getattr(getattr(model, "config", None), "distributed_config", None)
    plan = getattr(model, "tp_plan", None) or {}
    if layout is not None and layout.tp_size > 1 and set(plan.values()) - {"replicate"}:
        raise ValueError(
            f"layers are split by tensor parallelism (tp_size={layout.tp_size}), and PEFT cuts the factors of their "
            "adapters wrongly; load the model with fsdp_size, or with `tp_plan={}` to leave layers whole"
        )


def _refuse_sharded(name: str, experts: nn.Module) -> None:
    if any(is_dtensor(parameter) for parameter in experts.parameters()):
        raise ValueError(
            f"{name} is spread over devices already, and an adapter of routed experts would not be; adapt the model "
            "before accelerate shards it, or leave routed experts out of target_modules"
        )


def _some(targets: Any) -> str:
    return repr(targets) if isinstance(targets, str) else repr(sorted(targets)[:6])


# The modules


class ExpertProjection(nn.Module):
    """`gate_proj`, `up_proj` or `down_proj` of all the routed experts of a layer, where PEFT finds it by its name. It
    has no weight of its own, and as long as there is no adapter it changes nothing."""

    experts: Any

    def __init__(self, experts: nn.Module, name: str):
        super().__init__()
        object.__setattr__(self, "experts", experts)  # not a submodule a second time
        self.name = name

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, O, I)"""
        stack, _, parts = self._place
        count, outputs, inputs = self.experts.shapes[stack] if self.is_quantized else getattr(self.experts, stack).shape
        return count, outputs // parts, inputs

    @property
    def is_quantized(self) -> bool:
        return hasattr(self.experts, "dequantized")

    @property
    def weight(self) -> torch.Tensor:
        """The part of the stack (E, O, I) that is this projection's; of quantised experts only device and dtype."""
        if self.is_quantized:
            some = next(iter(self.experts.state_dict(keep_vars=True).values()))
            return torch.empty(0, device=some.device, dtype=self.experts.dtype)
        stack, part, parts = self._place
        return getattr(self.experts, stack).chunk(parts, dim=1)[part]

    def read(self, expert: int) -> torch.Tensor:
        """One expert's weight (O, I) in float32."""
        if not self.is_quantized:
            return self.weight[expert].float()
        stack, half, halves = self._place
        return self.experts.dequantized(stack, [expert], torch.float32)[0].chunk(halves)[half]

    def write(self, expert: int, weight_OI: torch.Tensor) -> None:
        """Puts it back, rounded to the dtype of the stack or quantised."""
        if not self.is_quantized:
            self.weight[expert].copy_(weight_OI)
            return
        stack, half, _ = self._place
        self.experts.put(stack, expert, half, *self.experts.quantize(weight_OI.to(self.experts.dtype)))

    @property
    def _place(self) -> tuple[str, int, int]:
        """Name of the stack, which part of it, of how many."""
        if self.name == "down_proj":
            return "down_proj", 0, 1
        return "gate_up_proj", ("gate_proj", "up_proj").index(self.name), 2

    def forward(self, rows_NI: torch.Tensor, offsets_E: torch.Tensor, product_NO: torch.Tensor) -> torch.Tensor:
        return product_NO


class ExpertFactor(nn.Module):
    """lora_A (E, r, I) or lora_B (E, O, r) of one adapter."""

    def __init__(self, *shape: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))


def low_rank_product(
    rows_NI: torch.Tensor, factor_A: torch.Tensor, factor_B: torch.Tensor, offsets_E: torch.Tensor
) -> torch.Tensor:
    """B A x of each row x, with the factors (E, r, I) and (E, O, r) of its expert: (N, O)."""
    if torch.is_autocast_enabled(rows_NI.device.type):  # grouped products do not heed it themselves
        dtype = torch.get_autocast_dtype(rows_NI.device.type)
        factor_A, factor_B = factor_A.to(dtype), factor_B.to(dtype)
    # Grouped products want rows of multiples of 16 bytes.
    missing = -factor_A.shape[1] % (16 // factor_A.element_size())
    if missing:
        factor_A, factor_B = F.pad(factor_A, (0, 0, 0, missing)), F.pad(factor_B, (0, missing))
    return _grouped_linear(_grouped_linear(rows_NI, factor_A, offsets_E), factor_B, offsets_E)


class AdaptedProjection(nn.Module):
    """An `ExpertProjection` with adapters. PEFT's own LoraLayer, the second base of the class that is made of this
    one, has the rest: which of them are active, trainable, merged, disabled."""

    base_layer: ExpertProjection
    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict
    lora_dropout: nn.ModuleDict
    r: dict[str, int]
    scaling: dict[str, float]
    lora_alpha: dict[str, int]
    use_rslora: dict[str, bool]
    use_dora: dict[str, bool]
    lora_bias: dict[str, bool]
    merged_adapters: list[str]
    active_adapters: list[str]
    disable_adapters: bool
    merged: bool

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, r: int, lora_alpha: int, **kwargs: Any):
        super().__init__()
        super(nn.Module, self).__init__(base_layer, **kwargs)  # type: ignore[call-arg]  # LoraLayer's
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha, config)

    def _get_in_out_features(self, module: ExpertProjection) -> tuple[int, int]:
        _, outputs, inputs = module.shape
        return inputs, outputs

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **_: Any) -> None:
        """Adds an adapter, as LoraLayer's for linear layers does."""
        if r <= 0:
            raise ValueError(f"`r` of {self.base_layer.name} must be positive, got {r}")
        experts, outputs, inputs = self.base_layer.shape
        self.r[adapter_name], self.lora_alpha[adapter_name] = r, lora_alpha
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        self.use_rslora[adapter_name] = config.use_rslora
        self.use_dora[adapter_name] = self.lora_bias[adapter_name] = False
        dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.lora_dropout[adapter_name] = dropout
        self.lora_A[adapter_name] = ExpertFactor(experts, r, inputs)
        self.lora_B[adapter_name] = ExpertFactor(experts, outputs, r)
        self.reset_lora_parameters(adapter_name, config.init_lora_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)  # type: ignore[operator]
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)  # type: ignore[operator]

    @torch.no_grad()
    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: bool | str) -> None:
        """What PEFT does to a linear layer, for each expert: A uniform or gaussian, B zero; both random if False."""
        factor_A, factor_B = self.factors(adapter_name)
        for matrix in factor_A:
            if init_lora_weights == "gaussian":
                nn.init.normal_(matrix, std=1 / self.r[adapter_name])
            else:
                nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
        for matrix in factor_B:
            if init_lora_weights is False:
                nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
            else:
                nn.init.zeros_(matrix)

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """lora_A (E, r, I) and lora_B (E, O, r)"""
        return cast(ExpertFactor, self.lora_A[name]).weight, cast(ExpertFactor, self.lora_B[name]).weight

    def applied(self) -> list[str]:
        """The adapters to add to the products of the weights as they are."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return []
        return [] if self.merged else [name for name in self.active_adapters if name in self.lora_A]

    def forward(
        self,
        rows_NI: torch.Tensor,
        offsets_E: torch.Tensor,
        product_NO: torch.Tensor,
        adapter_names: Any = None,
        **_: Any,
    ) -> torch.Tensor:
        """`product_NO`, the weights' answer to `rows_NI`, plus that of the adapters."""
        if adapter_names is not None:
            raise ValueError(
                "`adapter_names` cannot mix adapters within a batch where routed experts have adapters; run a batch "
                "for each adapter after `set_adapter`"
            )
        result = product_NO
        for name in self.applied():
            factor_A, factor_B = self.factors(name)
            rows = self._cast_input_dtype(rows_NI, factor_A.dtype)  # type: ignore[operator]
            low_rank = low_rank_product(self.lora_dropout[name](rows), factor_A, factor_B, offsets_E)
            result = result + low_rank * self.scaling[name]
        return result.to(product_NO.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        names = importlib.import_module("peft.tuners.tuners_utils").check_adapters_to_merge(self, adapter_names)
        for name in names:
            if name in self.lora_A:
                self._add_to_weight(name, 1.0, safe_merge)
                self.merged_adapters.append(name)

    def unmerge(self) -> None:
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if name in self.lora_A:
                self._add_to_weight(name, -1.0)

    @torch.no_grad()
    def _add_to_weight(self, name: str, sign: float, check: bool = False) -> None:
        factor_A, factor_B = self.factors(name)

        def total(expert: int) -> torch.Tensor:
            delta_OI = factor_B[expert].float() @ factor_A[expert].float() * (sign * self.scaling[name])
            weight_OI = self.base_layer.read(expert)
            return weight_OI + delta_OI.to(weight_OI.device)

        if check and not all(total(expert).isfinite().all() for expert in range(len(factor_A))):
            raise ValueError(
                f"merging the adapter {name!r} into {self.base_layer.name} gives values that are no numbers"
            )
        if self.base_layer.is_quantized:
            warnings.warn(
                "merging adapters into quantised experts rounds what they add; to keep it, load the model without "
                "quantization, put the adapter on it with PeftModel.from_pretrained, and merge there",
                stacklevel=2,
            )
        for expert in range(len(factor_A)):
            self.base_layer.write(expert, total(expert))

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        raise NotImplementedError(
            "adapters of routed experts cannot be combined by their products (`combination_type` with svd); use "
            "'linear'"
        )


class AdaptedExperts(nn.Module):
    """Stands where the routed experts of a layer stood, plain or quantised, and gives their projections names. With
    adapters the products are the experts' own, each plus its low-rank part."""

    base_layer: Any
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def __init__(self, experts: nn.Module):
        super().__init__()
        self.base_layer = experts
        for name in PROJECTIONS:
            self.add_module(name, ExpertProjection(experts, name))

    @property
    def num_experts(self) -> int:
        return self.base_layer.num_experts

    def projections(self) -> list[nn.Module]:
        return [getattr(self, name) for name in PROJECTIONS]

    def forward(self, hidden_TD: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        adapted = [one for one in self.projections() if isinstance(one, AdaptedProjection)]
        if not sum(len(one.applied()) for one in adapted):  # of each, since it also takes merged ones out again
            return self.base_layer(hidden_TD, top_k_index, top_k_weights)
        act_fn, count = self.base_layer.act_fn, self.num_experts
        return run_experts(self.project, act_fn, count, hidden_TD, top_k_index, top_k_weights)

    def project(self, name: str, rows_NI: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
        product = self.base_layer.project(name, rows_NI, offsets_E)
        if name == "down_proj":
            return self.down_proj(rows_NI, offsets_E, product)
        gate, up = product.chunk(2, dim=-1)
        return torch.cat([self.gate_proj(rows_NI, offsets_E, gate), self.up_proj(rows_NI, offsets_E, up)], dim=-1)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """By this name PEFT asks a module for what stood there before."""
        for projection in self.projections():
            if merge and isinstance(projection, AdaptedProjection):
                projection.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.base_layer


# The file


def split_experts(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An adapter's state with one tensor for each routed expert, `...experts.3.gate_proj.lora_A...` (r, in), in place
    of the stack `...experts.gate_proj.lora_A...` (E, r, in)."""
    result = {}
    for name, tensor in state_dict.items():
        found = _STACKED.fullmatch(name)
        if found is None:
            result[name] = tensor
            continue
        for expert, matrix in enumerate(tensor.unbind()):
            # A copy: safetensors refuses tensors that share memory.
            result[f"{found['experts']}.{expert}.{found['rest']}"] = matrix.clone()
    return result


def stack_experts(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of `split_experts`.

    Raises:
        ValueError: where an expert lacks a tensor that another one has, or has one of another shape.
    """
    result: dict[str, torch.Tensor] = {}
    stacks: dict[str, dict[int, torch.Tensor]] = {}
    for name, tensor in state_dict.items():
        found = _SINGLE.fullmatch(name)
        if found is None:
            result[name] = tensor
        else:
            stacks.setdefault(f"{found['experts']}.{found['rest']}", {})[int(found["expert"])] = tensor
    for name, matrices in stacks.items():
        if absent := set(range(max(matrices) + 1)) - set(matrices):
            raise ValueError(f"the adapter has {name} of {len(matrices)} experts and lacks that of {min(absent)}")
        if len({matrix.shape for matrix in matrices.values()}) > 1:
            shapes = sorted({tuple(matrix.shape) for matrix in matrices.values()})
            raise ValueError(f"the experts' parts of {name} have different shapes, {shapes}: all have one rank")
        result[name] = torch.stack([matrices[expert] for expert in range(len(matrices))])
    return result


def own_layout(model: nn.Module, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state of an adapter that `model` has, as it is saved here or elsewhere, with routed experts in stacks."""
    return stack_experts(unwrap_experts(state_dict, model))


def read_adapter(model: nn.Module, files: Iterable[str]) -> dict[str, torch.Tensor]:
    """`own_layout` of what the files of an adapter hold."""
    state_dict: dict[str, torch.Tensor] = {}
    for file in files:
        state_dict |= load_file(file) if file.endswith(".safetensors") else torch.load(file, weights_only=True)
    return own_layout(model, state_dict)


def unwrap_experts(state_dict: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """An adapter's state in which routed experts are as PEFT saves them of transformers' own classes (two matrices for
    all experts of `gate_up_proj`, and two for `down_proj`) in our stacks, which mean the same.

    There lora_A is (E x r, in) with the experts in the outer place, lora_B is (out, r x E) with them in the inner one.
    Gate and up share one lora_A; here each gets its own copy. Which of the two wrappers is inside the other depends on
    the order they were asked for, so shapes tell them apart.

    Raises:
        ValueError: where neither fits this model's experts.
    """
    result: dict[str, torch.Tensor] = {}
    pairs: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
    for name, tensor in state_dict.items():
        found = _WRAPPED.fullmatch(name)
        if found is None:
            result[name] = tensor
        else:
            pairs.setdefault((found["experts"], found["inner"]), {})[found["factor"]] = tensor
    if not pairs:
        return result
    by_name = {name: module for name, module in model.named_modules() if isinstance(module, AdaptedExperts)}
    for (prefix, inner), factors in pairs.items():
        experts = next((module for name, module in by_name.items() if f".{prefix}".endswith(f".{name}")), None)
        if experts is None or set(factors) != {"A", "B"}:
            raise ValueError(f"{prefix}.{inner}lora_A and lora_B: this model has no routed experts there")
        count, width, hidden = ExpertProjection(experts.base_layer, "gate_proj").shape
        factor_A, factor_B = factors["A"], factors["B"]
        A = factor_A.unflatten(0, (count, -1))  # (E, r, in)
        B = factor_B.unflatten(1, (-1, count)).permute(2, 0, 1)  # (E, out, r)
        if (A.shape[2], B.shape[1]) == (hidden, 2 * width):
            gate, up = B.chunk(2, dim=1)
            parts = {"gate_proj": (A, gate), "up_proj": (A, up)}
        elif (A.shape[2], B.shape[1]) == (width, hidden):
            parts = {"down_proj": (A, B)}
        else:
            raise ValueError(
                f"{prefix}.{inner}lora_A {tuple(factor_A.shape)} and lora_B {tuple(factor_B.shape)} fit neither "
                f"gate_up_proj nor down_proj of {count} experts of width {width} on {hidden}"
            )
        for projection, (one_A, one_B) in parts.items():
            result[f"{prefix}.{projection}.lora_A.weight"] = one_A.contiguous()
            result[f"{prefix}.{projection}.lora_B.weight"] = one_B.contiguous()
    return result


# The hook


_CONVERSION = "peft.utils.transformers_weight_conversion"


def teach_peft(model_class: type[nn.Module]) -> None:
    """From now on, and also where PEFT is imported only later, its conversion of targets and files for transformers 5
    leaves models of `model_class` to this file. Other models go on as before."""
    if _CONVERSION in sys.modules:
        _replace_conversion(sys.modules[_CONVERSION], model_class)
    else:
        sys.meta_path.insert(0, _OnImport(model_class))


class _OnImport(importlib.abc.MetaPathFinder):
    """Finds that module as Python would, and hooks it as soon as it has run: importing PEFT here takes seconds."""

    def __init__(self, model_class: type[nn.Module]):
        self.model_class = model_class
        self.searching = False

    def find_spec(self, fullname, path, target=None):
        if fullname != _CONVERSION or self.searching:
            return None
        self.searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.searching = False
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _replace_conversion(module, self.model_class)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]  # of this one import's loader
        return spec


def _replace_conversion(module: Any, model_class: type[nn.Module]) -> None:
    lora_model = importlib.import_module("peft.tuners.lora.model").LoraModel
    convert_config = module.convert_peft_config_for_transformers
    convert_state = module.convert_peft_adapter_state_dict_for_transformers
    select_state = lora_model._get_adapter_state_dict.__func__

    def ours(model: nn.Module) -> bool:
        return any(isinstance(one, model_class) for one in model.modules())

    def convert_peft_config_for_transformers(peft_config, model, *args, **kwargs):
        if not ours(model):
            return convert_config(peft_config, model, *args, **kwargs)
        return settle_targets(peft_config, model)

    def convert_peft_adapter_state_dict_for_transformers(model, peft_config, adapter_state_dict, *args, **kwargs):
        if not ours(model):
            return convert_state(model, peft_config, adapter_state_dict, *args, **kwargs)
        return own_layout(model, adapter_state_dict)

    def _get_adapter_state_dict(cls, model, *args, **kwargs):
        selected = select_state(cls, model, *args, **kwargs)
        return split_experts(selected) if ours(model) else selected

    module.convert_peft_config_for_transformers = convert_peft_config_for_transformers
    module.convert_peft_adapter_state_dict_for_transformers = convert_peft_adapter_state_dict_for_transformers
    lora_model._get_adapter_state_dict = classmethod(_get_adapter_state_dict)


def __getattr__(name: str) -> Any:
    """`LoraExpertProjection`, made once PEFT is there; an attribute of this module, as pickle wants it."""
    if name != "LoraExpertProjection":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    lora_layer = importlib.import_module("peft.tuners.lora.layer").LoraLayer
    made = type(name, (AdaptedProjection, lora_layer), {"__module__": __name__})
    return globals().setdefault(name, made)
