"""LoRA on these models by PEFT, in the very modules that were asked for.

    peft.get_peft_model(model, LoraConfig(target_modules=["gate_proj", "up_proj", "down_proj"]))     by PEFT's rules
    peft.get_peft_model(model, LoraConfig(target_modules=["attention", "routed_experts"]))           by named sets
    peft.get_peft_model(model, LoraConfig(target_modules="all-linear"))                               all of the sets

`model.add_adapter`, `PeftModel.from_pretrained` and TRL's `peft_config` come to the same. By itself PEFT would read
these model types as "every gate_proj, up_proj and down_proj is an expert's": it would leave dense and shared MLPs
without an adapter, and put one without dropout on the routed experts. For models of this package alone `teach_peft` has
it ask adapter_targets.py which layers are meant, put the modules of adapted_experts.py in the place of routed experts,
and read and write files by the functions below.

Routed experts lie in stacks. An adapter's factors do too, but each expert has its own, under the names that it would
have alone: `experts.3.gate_proj` is a name to ask for, and in adapter_model.safetensors the factors are

    base_model.model.model.layers.1.mlp.experts.3.gate_proj.lora_A.weight  (r, in), lora_B.weight  (out, r)

as serving engines read them. In the model they are `experts.gate_proj.lora_A.default.weight`, (E, r, in).

PEFT is imported where it is used, never by this file itself: it travels with checkpoints.
"""

import functools
import importlib
import inspect
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import torch
from safetensors.torch import load_file
from torch import nn

from .adapted_experts import PROJECTIONS, AdaptedExperts, AdaptedProjection, ExpertProjection
from .adapter_targets import settle_targets, unwrap_unadapted
from .on_import import OnImport

ELEMENTWISE = ("linear", "dare_linear", "dare_ties")
"""The ways of PEFT's `add_weighted_adapter` that are the same for a stack as for each of its matrices."""

_STACKED = re.compile(rf"(?P<experts>.*\.experts)\.(?P<rest>({'|'.join(PROJECTIONS)})\.lora_[AB]\..*)")
_SINGLE = re.compile(rf"(?P<experts>.*\.experts)\.(?P<expert>\d+)\.(?P<rest>({'|'.join(PROJECTIONS)})\.lora_[AB]\..*)")
_WRAPPED = re.compile(r"(?P<experts>.*\.experts)\.(?P<inner>(base_layer\.)*)lora_(?P<factor>[AB])\.weight")


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
        count, width, hidden = ExpertProjection(experts, "gate_proj").shape
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


_TARGETS, _LAYERS, _LORA = "peft.tuners.tuners_utils", "peft.tuners.lora.layer", "peft.tuners.lora.model"
_CONVERSION = "peft.utils.transformers_weight_conversion"
PEFT_VERSIONS = "0.21"
"""What this was tried with. Most of the following is private to PEFT and may be gone in another version."""
PEFT_NAMES = {
    (_TARGETS, "BaseTuner.inject_adapter"): (
        "self", "model", "adapter_name", "autocast_adapter_dtype", "low_cpu_mem_usage", "state_dict",
    ),
    (_TARGETS, "check_target_module_exists"): ("config", "key"),
    (_TARGETS, "check_adapters_to_merge"): ("module", "adapter_names"),
    (_CONVERSION, "convert_peft_config_for_transformers"): ("peft_config", "model"),
    (_CONVERSION, "convert_peft_adapter_state_dict_for_transformers"): ("model", "peft_config", "adapter_state_dict"),
    (_LORA, "LoraModel._get_adapter_state_dict"): ("model",),
    (_LORA, "LoraModel.add_weighted_adapter"): ("self", "adapters", "weights", "adapter_name", "combination_type"),
    (_LAYERS, "LoraLayer.__init__"): ("self", "base_layer"),
    (_LAYERS, "LoraLayer.update_layer"): ("self", "adapter_name", "r", "lora_alpha", "config"),
    (_LAYERS, "LoraLayer._move_adapter_to_device_of_base_layer"): ("self", "adapter_name"),
    (_LAYERS, "LoraLayer._cast_input_dtype"): ("self", "x", "dtype"),
    ("peft.tuners.lora.config", "LoraConfig._register_custom_module"): ("self", "mapping"),
}  # fmt: skip
"""Names of PEFT's that are called or replaced here and in the files of the targets and the modules, with their first
parameters."""


def teach_peft(model_class: type[nn.Module]) -> None:
    """From now on, and also where PEFT is imported only later, it leaves the targets and the files of adapters on
    models of `model_class` to these files. Other models go on as before."""
    if sys.modules.get("peft") is not None:
        _hook(model_class)
    else:
        sys.meta_path.insert(0, OnImport({"peft": lambda _: _hook(model_class)}))


def _found(module: str, path: str) -> Any:
    """None where there is no such thing."""
    try:
        found: Any = importlib.import_module(module)
    except ImportError:
        return None
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


def unknown_names() -> list[str]:
    """Those of `PEFT_NAMES` that the installed PEFT does not have, or has with other parameters."""
    unknown = []
    for (module, path), parameters in PEFT_NAMES.items():
        found = _found(module, path)
        if not callable(found) or tuple(inspect.signature(found).parameters)[: len(parameters)] != parameters:
            unknown.append(f"{module}.{path}({', '.join(parameters)})")
    return unknown


def _refuse_peft(why: str) -> NoReturn:
    installed = importlib.import_module("peft").__version__
    raise ImportError(
        f"adapters on DeepSeek models were made for PEFT {PEFT_VERSIONS}, and PEFT {installed} is installed, {why}. "
        f"Without it PEFT would adapt other modules than those asked for: install peft=={PEFT_VERSIONS}.*"
    )


def _hook(model_class: type[nn.Module]) -> None:
    unknown = unknown_names()
    tuner = _found(_TARGETS, "BaseTuner")
    if not hasattr(tuner, "inject_adapter"):  # nowhere to say so later
        _refuse_peft(f"which lacks {_TARGETS}.BaseTuner.inject_adapter")

    def ours(model: nn.Module) -> bool:
        return any(isinstance(one, model_class) for one in model.modules())

    inject = tuner.inject_adapter

    @functools.wraps(inject)
    def inject_adapter(self, model, adapter_name, *args, state_dict=None, **kwargs):
        if not ours(model):
            return inject(self, model, adapter_name, *args, state_dict=state_dict, **kwargs)
        if unknown:
            _refuse_peft(f"which lacks {', '.join(unknown)}")
        config = self.peft_config[adapter_name]
        settle_targets(config, model)
        names = None if state_dict is None else stack_experts(state_dict)  # in which PEFT looks for modules
        try:
            result = inject(self, model, adapter_name, *args, state_dict=names, **kwargs)
        finally:
            unwrap_unadapted(model)
        if getattr(config, "target_parameters", None):  # `settle_targets` leaves none
            _refuse_peft("which has converted the targets by rules of its own (take a fresh model)")
        return result

    tuner.inject_adapter = inject_adapter
    if unknown:
        return
    conversion: Any = importlib.import_module(_CONVERSION)
    lora_model = _found(_LORA, "LoraModel")
    convert_config = conversion.convert_peft_config_for_transformers
    convert_state = conversion.convert_peft_adapter_state_dict_for_transformers
    select_state = lora_model._get_adapter_state_dict.__func__
    add_weighted = lora_model.add_weighted_adapter

    def convert_peft_config_for_transformers(peft_config, model, *args, **kwargs):
        if not ours(model):
            convert_config(peft_config, model, *args, **kwargs)

    def convert_peft_adapter_state_dict_for_transformers(model, peft_config, adapter_state_dict, *args, **kwargs):
        if not ours(model):
            return convert_state(model, peft_config, adapter_state_dict, *args, **kwargs)
        return own_layout(model, adapter_state_dict)

    def _get_adapter_state_dict(cls, model, *args, **kwargs):
        selected = select_state(cls, model, *args, **kwargs)
        return split_experts(selected) if ours(model) else selected

    @functools.wraps(add_weighted)
    def add_weighted_adapter(self, adapters, weights, adapter_name, combination_type="svd", *args, **kwargs):
        if len(adapters) > 1 and combination_type not in ELEMENTWISE:
            for name, module in self.model.named_modules():
                if isinstance(module, AdaptedProjection) and set(adapters) & set(module.lora_A):
                    raise ValueError(
                        f"combination_type={combination_type!r} takes the factors of {name} for matrices, and they are "
                        f"stacks of experts; use one of {ELEMENTWISE}"
                    )
        return add_weighted(self, adapters, weights, adapter_name, combination_type, *args, **kwargs)

    conversion.convert_peft_config_for_transformers = convert_peft_config_for_transformers
    conversion.convert_peft_adapter_state_dict_for_transformers = convert_peft_adapter_state_dict_for_transformers
    lora_model._get_adapter_state_dict = classmethod(_get_adapter_state_dict)
    lora_model.add_weighted_adapter = add_weighted_adapter
