"""Routed experts with low-rank adapters, as modules that PEFT finds, fills and merges (`adapters.py` says what for).

PEFT adapts a module that it finds by its name; routed experts are stacks. `AdaptedExperts` takes their place and gives
`gate_proj`, `up_proj` and `down_proj` a module each, an `ExpertProjection`, in whose place PEFT puts a
`LoraExpertProjection`: `AdaptedProjection` with PEFT's LoraLayer, a class that is made once PEFT is there.

    out = run_experts(...)      with product = base_layer.project(...) + B A x * scaling, for the rows x of each expert

PEFT is imported where it is used, never by this file itself: it travels with checkpoints.

Legend: E routed experts, N rows sorted by expert, I inputs and O outputs of a projection, r rank of an adapter, T
tokens, D hidden size.
"""

import importlib
import math
import sys
import warnings
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F
from transformers.integrations.moe import _grouped_linear

from .moe import run_experts

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class ExpertProjection(nn.Module):
    """`gate_proj`, `up_proj` or `down_proj` of all the routed experts of a layer, where PEFT finds it by its name. It
    has no weight of its own, and as long as there is no adapter it changes nothing."""

    _owner: "AdaptedExperts"

    def __init__(self, owner: "AdaptedExperts", name: str):
        super().__init__()
        object.__setattr__(self, "_owner", owner)  # not a submodule of it and above it
        self.name = name

    @property
    def experts(self) -> Any:
        """Asked for each time: `dequantize` puts others in their place."""
        return self._owner.base_layer

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
            self.add_module(name, ExpertProjection(self, name))

    @property
    def num_experts(self) -> int:
        return self.base_layer.num_experts

    def projections(self) -> list[nn.Module]:
        return [getattr(self, name) for name in PROJECTIONS]

    def adapted(self) -> list["AdaptedProjection"]:
        return [one for one in self.projections() if isinstance(one, AdaptedProjection)]

    def forward(self, hidden_TD: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        if not sum(len(one.applied()) for one in self.adapted()):  # of each, since it also takes merged ones out again
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
        for projection in self.adapted() if merge else ():
            projection.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.base_layer


def __getattr__(name: str) -> Any:
    """`LoraExpertProjection`, made once PEFT is there; an attribute of this module, as pickle wants it."""
    if name != "LoraExpertProjection":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    lora_layer = importlib.import_module("peft.tuners.lora.layer").LoraLayer
    made = type(name, (AdaptedProjection, lora_layer), {"__module__": __name__})
    return globals().setdefault(name, made)


def let_peft_adapt(config: Any) -> None:
    """Has the LoraConfig put a `LoraExpertProjection` in the place of an `ExpertProjection`."""
    config._register_custom_module({ExpertProjection: sys.modules[__name__].LoraExpertProjection})
