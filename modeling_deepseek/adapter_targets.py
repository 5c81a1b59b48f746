"""Which layers of a model an adapter is asked for: names and sets of names in, full names out, or a refusal.

    target_modules(model, ["attention"])     the names of a set's layers
    settle_targets(config, model)            a PeftConfig made to name what PEFT finds; experts made ready for it

The rules are PEFT's (a name is an ending, a string an expression, and so on), asked of PEFT itself; here they also hold
for routed experts, which lie in stacks and have no modules of their own.
"""

import copy
import dataclasses
import difflib
import importlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from .adapted_experts import PROJECTIONS, AdaptedExperts, ExpertProjection, let_peft_adapt
from .decoder_layer import DeepseekDecoderLayer
from .moe import DeepseekGate, DeepseekMoE
from .mtp import DeepseekMTPLayer
from .parallel import is_split

SETS = ("attention", "dense_mlp", "shared_experts", "routed_experts", "mtp")
"""The sets that can be named. They do not overlap: "mtp" is all of the MTP modules, and the others leave these out."""

_EXPERT = re.compile(rf"(^|\.)experts\.\d+\.({'|'.join(PROJECTIONS)})$")


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
    routed experts that are asked for, or that PEFT has to see. Called before PEFT looks for them, and
    `unwrap_unadapted` after that; a config that is settled stays as it is.

    Raises:
        ValueError: for what routed experts and routers cannot have; nothing is changed then.
    """
    if not getattr(config, "target_modules", None) and not getattr(config, "target_parameters", None):
        return
    _refuse_split_layers(model)
    is_lora = config.peft_type == "LORA"
    mixtures = {f"{name}.experts": module for name, module in model.named_modules() if isinstance(module, DeepseekMoE)}
    settled = copy.copy(config)
    if is_lora:
        _settle_parameters(settled, mixtures)
    _settle_sets(settled, model, mixtures)

    asked = [name for name, mixture in mixtures.items() for name in _asked(settled, name, mixture)]
    if asked and not is_lora:
        raise ValueError(
            f"{config.peft_type.value} cannot adapt routed experts, and {_some(config.target_modules)} names them too. "
            "For the other layers pass target_modules=modeling_deepseek.target_modules(model, ['attention', "
            "'dense_mlp', 'shared_experts']), or use LoRA"
        )
    if isinstance(settled.target_modules, str):
        _settle_expression(settled, model, asked)
    else:
        _refuse_routers(settled, model)
        # Neither the module of all experts nor a single one is anything that PEFT can adapt.
        kept = {one for one in settled.target_modules or () if not _EXPERT.search(one)}
        kept -= {one for one in kept for name in mixtures if _ends(name, one)}
        settled.target_modules = kept
        settled.target_modules |= {name for name in asked if not _exists(settled, name)}
    if is_lora:
        _refuse_variants(config, with_experts=bool(asked))
        if config.lora_bias and any(_exists(settled, f"{name}.kv_b_proj") for name, _ in model.named_modules()):
            raise ValueError(
                "`lora_bias=True` with kv_b_proj: absorbed attention knows no bias there; leave one of them out"
            )
    for name, mixture in mixtures.items():
        if any(one.startswith(f"{name}.") for one in asked):
            _refuse_sharded(name, mixture.experts)

    # PEFT shortens a long list to endings that no other module has, and warns of exclusions that exclude none: it must
    # see the projections to know of them.
    all_seen = not isinstance(settled.target_modules, str) and len(settled.target_modules or ()) >= 20
    for name, mixture in mixtures.items():
        own = [f"{name}.{projection}" for projection in PROJECTIONS]
        seen = all_seen or any(one in asked or _excluded(settled, one) for one in own)
        if seen and not isinstance(mixture.experts, AdaptedExperts):
            mixture.experts = AdaptedExperts(mixture.experts)  # type: ignore[assignment]  # it stands in for them
    for field in ("target_modules", "exclude_modules", "target_parameters", "rank_pattern", "alpha_pattern"):
        if hasattr(config, field):
            setattr(config, field, getattr(settled, field))
    if is_lora:
        let_peft_adapt(config)


def unwrap_unadapted(model: nn.Module) -> None:
    """Takes out what `settle_targets` has put in only for PEFT to see."""
    for mixture in [module for module in model.modules() if isinstance(module, DeepseekMoE)]:
        experts = mixture.experts
        if isinstance(experts, AdaptedExperts) and not experts.adapted():
            mixture.experts = experts.base_layer


def _settle_sets(config: Any, model: nn.Module, mixtures: Mapping[str, DeepseekMoE]) -> None:
    """Full names for "all-linear" and for the sets' names among targets and exclusions."""
    targets = config.target_modules or []
    if isinstance(targets, str):
        if targets.lower() == "all-linear":
            config.target_modules = {name for names in linear_sets(model).values() for name in names}
        elif targets in SETS:
            config.target_modules = set(target_modules(model, [targets]))
    else:
        named = {one for one in targets if one in SETS}
        members = {name for name in target_modules(model, named) if _in_layers(config, name)}
        config.target_modules = {*targets, *members} - named
        names = [name for name, _ in model.named_modules()]
        for one in set(targets) - named:
            near = difflib.get_close_matches(one.lower(), SETS, 1, cutoff=0.8)
            if near and not any(_ends(name, one) for name in names):  # PEFT passes over what it does not find
                raise ValueError(f"target_modules: {one!r} is no module and no set, meant {near[0]!r}?")

    excluded = getattr(config, "exclude_modules", None) or []
    if excluded in SETS:
        excluded = [excluded]
    if excluded and not isinstance(excluded, str):
        named = {one for one in excluded if one in SETS}
        whole = {name for name in mixtures if any(_ends(name, one) for one in excluded)}
        projections = {f"{name}.{projection}" for name in whole for projection in PROJECTIONS}
        config.exclude_modules = ({*excluded, *target_modules(model, named)} - named) | projections


def _in_layers(config: Any, name: str) -> bool:
    """`layers_to_transform` for a full name, which PEFT would take whatever its layer."""
    layers = getattr(config, "layers_to_transform", None)
    if layers is None or layers == []:
        return True
    index = re.search(r"\.(\d+)\.", name)
    return index is not None and int(index[1]) in ([layers] if isinstance(layers, int) else layers)


def _ends(name: str, ending: str) -> bool:
    """PEFT's rule for the names of a list."""
    return f".{name}".endswith(f".{ending}")


def _excluded(config: Any, name: str) -> bool:
    excluded = getattr(config, "exclude_modules", None) or []
    if isinstance(excluded, str):
        return re.fullmatch(excluded, name) is not None
    return any(_ends(name, one) for one in excluded)


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
        if _excluded(config, f"{experts}.{projection}"):
            continue
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


def _refuse_variants(config: Any, with_experts: bool) -> None:
    if config.layer_replication:
        raise ValueError(
            f"layer_replication={config.layer_replication!r}: copies would take the places of the MTP modules, without "
            "adapters; leave it out"
        )
    if not with_experts:
        return
    variants = [
        field.name
        for field in dataclasses.fields(config)
        if field.metadata.get("is_lora_variant") and getattr(config, field.name)
    ]
    variants += [name for name in ("lora_bias", "fan_in_fan_out") if getattr(config, name)]
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
    if any(is_split(parameter) for parameter in experts.parameters()):
        raise ValueError(
            f"{name} is spread over devices already, and an adapter of routed experts would not be; adapt the model "
            "before accelerate shards it, or leave routed experts out of target_modules"
        )


def _some(targets: Any) -> str:
    return repr(targets) if isinstance(targets, str) else repr(sorted(targets)[:6])
