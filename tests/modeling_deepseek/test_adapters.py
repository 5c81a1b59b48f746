"""LoRA adapts what was asked for. References: PEFT's own linear layers, its own wrapper of stacked experts,
transformers' own DeepSeek-V3, and names counted by hand for the preset tiny-v3: layer 0 is dense, 1 and 2 route among 8
experts, 3 is the MTP module, which routes too."""

import copy
import functools
import json
import os
import re
import subprocess
import sys

import bitsandbytes as bnb
import peft
import pytest
import torch
import torch.distributed as dist
from peft import (
    AutoPeftModelForCausalLM,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import transformers_weight_conversion as conversion
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor, Shard
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.models.deepseek_v3 import DeepseekV3Config as TheirConfig
from transformers.models.deepseek_v3 import DeepseekV3ForCausalLM as Theirs

from modeling_deepseek import DeepseekTrainerCallback, target_modules
from modeling_deepseek.adapted_experts import low_rank_product
from modeling_deepseek.adapters import _hook, split_experts, stack_experts
from modeling_deepseek.moe import DeepseekExperts
from modeling_deepseek.pretrained import DeepseekPreTrainedModel
from tests.modeling_deepseek.test_training import sft_trainer
from tests.tiny import tiny_model, tokens

ATTENTION = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
EXPERTS = 8


def under(layers, where, names) -> set[str]:
    return {f"model.layers.{layer}.{where}{name}" for layer in layers for name in names}


SETS = {
    "attention": under((0, 1, 2), "self_attn.", ATTENTION),
    "dense_mlp": under((0,), "mlp.", MLP),
    "shared_experts": under((1, 2), "mlp.shared_experts.", MLP),
    "routed_experts": under((1, 2), "mlp.experts.", MLP),
    "mtp": {"model.layers.3.eh_proj"}
    | under((3,), "self_attn.", ATTENTION)
    | under((3,), "mlp.shared_experts.", MLP)
    | under((3,), "mlp.experts.", MLP),
}
ALL = set().union(*SETS.values())
MLPS = {name for name in ALL if name.endswith(tuple(MLP))}

ASKED = {
    "set attention": (["attention"], SETS["attention"]),
    "set dense_mlp": (["dense_mlp"], SETS["dense_mlp"]),
    "set shared_experts": ("shared_experts", SETS["shared_experts"]),
    "set routed_experts": (["routed_experts"], SETS["routed_experts"]),
    "set mtp": (["mtp"], SETS["mtp"]),
    "two sets": (["attention", "shared_experts"], SETS["attention"] | SETS["shared_experts"]),
    "all sets": (list(SETS), ALL),
    "set and name": (["dense_mlp", "eh_proj"], SETS["dense_mlp"] | {"model.layers.3.eh_proj"}),
    "list attention": (ATTENTION, {name for name in ALL if ".self_attn." in name}),
    "list dense_mlp": ([f"mlp.{name}" for name in MLP], SETS["dense_mlp"]),
    "list shared_experts": (
        [f"shared_experts.{name}" for name in MLP],
        under((1, 2, 3), "mlp.shared_experts.", MLP),
    ),
    "list routed_experts": ([f"experts.{name}" for name in MLP], under((1, 2, 3), "mlp.experts.", MLP)),
    "list routed_experts whole": (["experts"], under((1, 2, 3), "mlp.experts.", MLP)),
    "list routed_experts one by one": (
        [f"mlp.experts.{expert}.down_proj" for expert in range(EXPERTS)],
        under((1, 2, 3), "mlp.experts.", ["down_proj"]),
    ),
    "list mtp": (["eh_proj"], {"model.layers.3.eh_proj"}),
    "list of full names": (
        sorted(SETS["dense_mlp"] | SETS["shared_experts"]),
        SETS["dense_mlp"] | SETS["shared_experts"],
    ),
    "list of many full names": (
        sorted(SETS["attention"] | SETS["dense_mlp"] | SETS["shared_experts"]),
        SETS["attention"] | SETS["dense_mlp"] | SETS["shared_experts"],
    ),
    "list of projections": (MLP, MLPS),
    "one projection": (["up_proj"], {name for name in ALL if name.endswith("up_proj")}),
    "expression attention": (r"model\.layers\.[0-2]\.self_attn\..*", SETS["attention"]),
    "expression dense_mlp": (r".*\.mlp\.(gate|up|down)_proj", SETS["dense_mlp"]),
    "expression shared_experts": (r"model\.layers\.[12]\..*shared_experts.*", SETS["shared_experts"]),
    "expression routed_experts": (r"model\.layers\.[12]\.mlp\.experts\.\d+\..*_proj", SETS["routed_experts"]),
    "expression routed_experts stacked": (
        r"model\.layers\.1\.mlp\.experts\.up_proj",
        {"model.layers.1.mlp.experts.up_proj"},
    ),
    "expression mtp": (r"model\.layers\.3\..*", SETS["mtp"]),
    "expression projections": (r".*\.(gate|up|down)_proj", MLPS),
    "all-linear": ("all-linear", ALL),
}  # fmt: skip


def adapted(model: nn.Module) -> set[str]:
    prefix = "base_model.model."
    return {name.removeprefix(prefix) for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def in_file(names: set[str]) -> set[str]:
    """The tensors that an adapter on these modules is saved as."""
    single = set()
    for name in names:
        path, _, projection = name.rpartition(".")
        routed = path.endswith(".experts")
        single |= {f"{path}.{expert}.{projection}" for expert in range(EXPERTS)} if routed else {name}
    return {f"base_model.model.{name}.lora_{factor}.weight" for name in single for factor in "AB"}


def randomise(model: nn.Module, seed: int = 5, adapter: str = "default") -> nn.Module:
    """Adapters that do something: B is zero at first."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name and f".{adapter}." in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    return model


def adapt(model: nn.Module, target_modules, **fields) -> PeftModel:
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": target_modules, **fields})
    return randomise(get_peft_model(model, config)).eval()


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(tokens()).logits


@torch.no_grad()
def outputs(model: nn.Module) -> torch.Tensor:
    """All logits, and the losses of the MTP modules, which run only where there are labels."""
    output = model(tokens(), labels=tokens())
    return torch.cat([output.logits.flatten(), torch.stack(output.mtp_losses)])


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


# Which modules have an adapter.


@pytest.mark.parametrize("asked", ASKED)
def test_exactly_what_was_asked_for_is_adapted_saved_and_loaded(asked, tmp_path):
    targets, expected = ASKED[asked]
    model = adapt(tiny_model(), targets)
    assert adapted(model) == expected
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {
        re.sub(r"^base_model\.model\.(.*)\.lora_[AB]\.default\.weight$", r"\1", name) for name in trainable
    } == expected
    assert len(trainable) == 2 * len(expected)
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == in_file(expected)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert adapted(loaded) == expected
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("targets", [*SETS, "all-linear"])
def test_merged_is_unmerged_and_changes_no_other_weight(targets):
    expected = SETS.get(targets, ALL)
    base = tiny_model()
    plain, state = outputs(base), {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = adapt(base, targets)
    unmerged = outputs(model)
    assert (unmerged - plain).abs().max() > 1e-3
    merged = copy.deepcopy(model)
    merged.merge_adapter(safe_merge=True)
    assert_close(outputs(merged), unmerged)
    merged.unmerge_adapter()
    assert_close(outputs(merged), unmerged)
    assert_close(outputs(model.merge_and_unload()), unmerged)
    assert set(base.state_dict()) == set(state)
    changed = {name for name, tensor in base.state_dict().items() if not torch.equal(tensor, state[name])}
    assert changed == {weight_of(name) for name in expected}
    assert outputs(merged.unload()).sub(plain).abs().max() < 1e-5


def weight_of(name: str) -> str:
    if ".mlp.experts." in name:
        return re.sub(r"(gate|up)_proj$", "gate_up_proj", name)
    return f"{name}.weight"


PEFT_S_OWN_PATTERN = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")


@PEFT_S_OWN_PATTERN
@pytest.mark.parametrize("targets", [MLP, "all-linear", r".*shared_experts\..*_proj"])
def test_transformers_own_class_falls_into_the_trap_that_ours_avoids(targets):
    """Goes red with us when PEFT's own conversion is left in place, and with them when they have mended it."""
    config = tiny_model().config
    fields = {name: value for name, value in config.to_dict().items() if name in TheirConfig().to_dict()}
    with torch.random.fork_rng():
        theirs = Theirs(TheirConfig(**fields))
    get_peft_model(theirs, LoraConfig(target_modules=targets))
    mlps = {re.sub(r"\.base_layer$", "", name) for name in adapted(theirs) if ".mlp." in name}
    routed_ones = {f"model.layers.{layer}.mlp.experts" for layer in (1, 2)}
    assert routed_ones <= mlps, "whether they were asked for or not"
    assert not any(name.startswith(tuple(SETS["dense_mlp"] | SETS["shared_experts"])) for name in mlps)
    with pytest.raises(ValueError, match="lora_dropout"):
        get_peft_model(Theirs(TheirConfig(**fields)), LoraConfig(target_modules=targets, lora_dropout=0.1))

    ours = adapted(get_peft_model(tiny_model(), LoraConfig(target_modules=targets, lora_dropout=0.1)))
    wanted = (
        SETS["shared_experts"]
        if targets.__class__ is str and "shared" in targets
        else SETS["dense_mlp"] | SETS["shared_experts"]
    )
    assert wanted <= ours


@PEFT_S_OWN_PATTERN
def test_other_models_are_converted_as_before():
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        num_local_experts=4, vocab_size=64,
    )  # fmt: skip
    model = get_peft_model(MixtralForCausalLM(config), LoraConfig(target_modules=["w1", "w2", "w3"]))
    assert adapted(model) == {f"model.layers.0.mlp.experts{end}" for end in ("", ".base_layer")}


def test_sets_as_names_for_other_methods():
    model = tiny_model()
    assert set(target_modules(model, SETS)) == ALL
    names = target_modules(model, ["attention", "dense_mlp"])
    assert set(names) == SETS["attention"] | SETS["dense_mlp"]
    adapted_model = adapt(model, "all-linear")
    assert set(target_modules(adapted_model, SETS)) == ALL  # the same once they are adapted
    for asked in (names, ["attention", "dense_mlp"]):
        ia3 = get_peft_model(tiny_model(), IA3Config(target_modules=asked, feedforward_modules=[]))
        assert len([name for name, _ in ia3.named_parameters() if "ia3_" in name]) == len(names)


def test_another_method_s_long_list_is_saved_loaded_and_merged(tmp_path):
    """PEFT makes endings of it here too, and must not take those for routed experts when it reads them again."""
    config = LoHaConfig(r=2, target_modules=["attention", "dense_mlp", "shared_experts"], init_weights=False)
    fresh = functools.partial(tiny_model, num_nextn_predict_layers=0)
    model = get_peft_model(fresh(), config).eval()
    assert not torch.equal(logits(model), logits(fresh()))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(fresh(), tmp_path)), logits(model))
    names = set(dict(fresh().named_modules()))
    assert set(dict(model.merge_and_unload().named_modules())) == names


def test_a_long_list_is_not_shortened_to_what_names_routed_experts_too(tmp_path):
    """PEFT makes of 20 names and more the endings that no other module has."""
    model = tiny_model(num_nextn_predict_layers=0)
    names = target_modules(model, ["attention", "dense_mlp", "shared_experts"])
    assert len(names) == 24
    adapt(model, names).save_pretrained(tmp_path)
    assert len(json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]) < 24
    assert adapted(PeftModel.from_pretrained(tiny_model(num_nextn_predict_layers=0), tmp_path)) == set(names)


def test_layers_patterns_and_exclusions_are_peft_s():
    model = adapt(tiny_model(), ["routed_experts", "attention"], layers_to_transform=[1], exclude_modules=["o_proj"])
    assert adapted(model) == {
        name for name in SETS["routed_experts"] | SETS["attention"] if ".1." in name and "o_proj" not in name
    }
    model = adapt(
        tiny_model(), MLP, rank_pattern={r"experts\.down_proj": 2, "mlp.gate_proj": 3}, alpha_pattern={"up_proj": 40},
        use_rslora=True,
    )  # fmt: skip
    layers = dict(model.base_model.model.named_modules())
    r = {name: layers[name].r["default"] for name in MLPS}
    assert {rank for name, rank in r.items() if re.search(r"\.experts\.down_proj", name)} == {2}
    assert r["model.layers.0.mlp.gate_proj"] == 3
    assert {rank for name, rank in r.items() if name.endswith("up_proj")} == {4}
    experts = layers["model.layers.1.mlp.experts"]
    assert experts.up_proj.scaling["default"] == 40 / 2 == layers["model.layers.0.mlp.up_proj"].scaling["default"]
    assert experts.down_proj.scaling["default"] == pytest.approx(8 / 2**0.5)
    assert_close(logits(copy.deepcopy(model).merge_and_unload()), logits(model))


EXPERTS_OF_ALL = {name for name in ALL if ".mlp.experts." in name}
EXCLUDED = {
    "mtp": ("mtp", SETS["mtp"]),
    "routed_experts": (["routed_experts"], SETS["routed_experts"]),
    "sets and a name": (
        ["routed_experts", "mtp", "up_proj"],
        SETS["routed_experts"] | SETS["mtp"] | {name for name in ALL if name.endswith("up_proj")},
    ),
    "experts": (["experts"], EXPERTS_OF_ALL),
    "expression": (r".*\.experts\..*", EXPERTS_OF_ALL),
}


@pytest.mark.parametrize("case", EXCLUDED)
def test_what_is_excluded_has_no_adapter(case, tmp_path):
    """By the sets' names too. PEFT warns where an exclusion excludes nothing, and warnings are errors here."""
    excluded, left_out = EXCLUDED[case]
    model = get_peft_model(tiny_model(), LoraConfig(target_modules="all-linear", exclude_modules=excluded))
    assert adapted(model) == ALL - left_out
    model.save_pretrained(tmp_path)
    assert adapted(PeftModel.from_pretrained(tiny_model(), tmp_path)) == ALL - left_out
    by_name = get_peft_model(tiny_model(), LoraConfig(target_modules=MLP, exclude_modules=excluded))
    assert adapted(by_name) == MLPS - left_out


REFUSED = {
    "router": (dict(target_modules=["q_proj", "gate"]), r"mlp.gate is a router.*modules_to_save=\['gate'\]"),
    "router by expression": (dict(target_modules=r".*mlp\.gate"), "is a router"),
    "one expert": (
        dict(target_modules=["experts.3.up_proj"]),
        r"experts.3.up_proj is asked for, .*experts.0.up_proj is not",
    ),
    "all but one": (
        dict(target_modules=["up_proj"], exclude_modules=["experts.3.up_proj"]),
        r"experts.3.up_proj is not",
    ),
    "an unknown set beside": (dict(target_modules=["routed_experts"], use_dora=True), "plain LoRA only, not use_dora"),
    "initialisation": (dict(target_modules=MLP, init_lora_weights="pissa"), "init_lora_weights='pissa'"),
    "bias": (dict(target_modules=["kv_b_proj"], lora_bias=True), "absorbed attention knows no bias"),
    "parameters": (dict(target_parameters=["gate.weight"]), "none of the routed experts'"),
    "nearly a set": (dict(target_modules=["o_proj", "Routed_expert"]), "no module and no set, meant 'routed_experts'"),
    "copied layers": (dict(target_modules=["attention"], layer_replication=[[0, 2], [1, 3]]), "copies would take"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_adapted_is_refused_and_nothing_is_done(case):
    fields, message = REFUSED[case]
    model = tiny_model()
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, LoraConfig(**fields))
    assert [name for name, _ in model.named_modules()] == before


@pytest.mark.parametrize(
    ("change", "lacks"),
    [
        (lambda patch: patch.delattr(conversion, "convert_peft_config_for_transformers"), "_for_transformers"),
        (lambda patch: patch.setitem(sys.modules, conversion.__name__, None), "_for_transformers"),
        (lambda patch: patch.setattr(LoraLayer, "update_layer", lambda self, r, name: None), "update_layer"),
        (lambda patch: patch.setattr(LoraModel, "_get_adapter_state_dict", None), "_get_adapter_state_dict"),
    ],
)
def test_a_peft_that_lacks_what_is_needed_is_refused_on_our_models_only(change, lacks, monkeypatch):
    monkeypatch.setattr(BaseTuner, "inject_adapter", BaseTuner.inject_adapter)  # to be put back
    change(monkeypatch)
    _hook(DeepseekPreTrainedModel)
    with pytest.raises(ImportError, match=rf"for PEFT 0\.21, and PEFT {peft.__version__} .*{lacks}.*peft==0\.21\.\*"):
        get_peft_model(tiny_model(), LoraConfig(target_modules=["attention"]))
    with pytest.raises(AttributeError):  # PEFT's own, for a tuner that is none
        BaseTuner.inject_adapter(None, nn.Linear(2, 2), "default")


def test_a_peft_that_converts_targets_by_itself_is_refused(monkeypatch):
    def converts(config, model, *_, **__):
        config.target_modules, config.target_parameters = set(), {"experts.down_proj"}

    monkeypatch.setattr(conversion, "convert_peft_config_for_transformers", converts)
    with pytest.raises(ImportError, match="rules of its own"):
        get_peft_model(tiny_model(), LoraConfig(target_modules=MLP))


def test_sets_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match="'mpt' is no set of modules, meant 'mtp'"):
        target_modules(tiny_model(), ["mpt"])
    with pytest.raises(ValueError, match="no modules of the set 'mtp'"):
        get_peft_model(tiny_model(num_nextn_predict_layers=0), LoraConfig(target_modules=["mtp"]))
    with pytest.raises(ValueError, match="IA3 cannot adapt routed experts"):
        get_peft_model(tiny_model(), IA3Config(target_modules=MLP, feedforward_modules=MLP))


# Right results, against PEFT's own layers.


class OneByOne(nn.Module):
    """Experts as linear layers, as published and as PEFT adapts linear layers."""

    def __init__(self, experts: DeepseekExperts):
        super().__init__()
        self.experts = nn.ModuleList()
        for gate_up, down in zip(experts.gate_up_proj, experts.down_proj, strict=True):
            expert = nn.Module()
            for name, weight in zip(MLP, (*gate_up.chunk(2), down), strict=True):
                layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
                layer.weight.data = weight.detach().clone()
                expert.add_module(name, layer)
            self.experts.append(expert)
        self.act_fn = experts.act_fn

    def forward(self, hidden, indices, weights):
        output = torch.zeros_like(hidden)
        for index, expert in enumerate(self.experts):
            for slot in range(indices.shape[1]):
                token = indices[:, slot] == index
                inner = self.act_fn(expert.gate_proj(hidden[token])) * expert.up_proj(hidden[token])
                output[token] += expert.down_proj(inner) * weights[token, slot, None]
        return output


def routed(model):
    return model.base_model.model.model.layers[1].mlp.experts


def test_adapted_experts_are_peft_s_linear_layers_expert_by_expert(tmp_path):
    """Outputs, gradients and the saved file."""
    base = tiny_model()
    one_by_one = OneByOne(base.model.layers[1].mlp.experts)
    names = [f"model.layers.1.mlp.experts.{name}" for name in MLP]
    ours = adapt(base, names)
    theirs = get_peft_model(one_by_one, LoraConfig(r=4, lora_alpha=8, target_modules=MLP)).eval()
    state = {
        name.replace("model.layers.1.mlp.", ""): tensor for name, tensor in split_experts(ours.state_dict()).items()
    }
    factors = {name: parameter for name, parameter in theirs.named_parameters() if "lora_" in name}
    for name, parameter in factors.items():
        parameter.data = state[name].clone()

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 64, generator=generator)
    indices = torch.stack([torch.randperm(6, generator=generator)[:2] for _ in range(7)])  # experts 6 and 7 idle
    weights = torch.rand(7, 2, generator=generator)
    inputs = [hidden.clone().requires_grad_() for _ in range(2)]
    outputs = routed(ours)(inputs[0], indices, weights), theirs(inputs[1], indices, weights)
    assert_close(outputs[0], outputs[1])
    for output in outputs:
        output.square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-5, atol=1e-4)
    gradients = split_experts({name: value.grad for name, value in ours.named_parameters() if value.grad is not None})
    for name, parameter in factors.items():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        actual = gradients[name.replace("experts.", "model.layers.1.mlp.experts.", 1)]
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)

    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    mine = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    file = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    renamed = {name.replace("experts.", "model.layers.1.mlp.experts.", 1): value for name, value in file.items()}
    assert set(mine) == set(renamed)
    assert all(torch.equal(mine[name], value) for name, value in renamed.items())
    assert mine["base_model.model.model.layers.1.mlp.experts.3.gate_proj.lora_A.weight"].shape == (4, 64)
    assert mine["base_model.model.model.layers.1.mlp.experts.3.gate_proj.lora_B.weight"].shape == (32, 4)

    # What was trained one by one elsewhere loads.
    save_file(renamed, tmp_path / "theirs" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    config["target_modules"] = [f"1.mlp.experts.{expert}.{name}" for expert in range(EXPERTS) for name in MLP]
    (tmp_path / "theirs" / "adapter_config.json").write_text(json.dumps(config))
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "theirs")
    assert adapted(loaded) == set(names)
    assert torch.equal(logits(loaded), logits(ours))


@PEFT_S_OWN_PATTERN
@pytest.mark.parametrize("targets", [MLP, ["down_proj"], ["q_b_proj", *MLP]])
def test_adapters_of_transformers_own_class_load(targets, tmp_path):
    """There PEFT has wrapped the stacks of the routed experts, and left the other MLPs alone."""
    ours = tiny_model(num_nextn_predict_layers=0)
    ours.save_pretrained(tmp_path / "base")
    theirs = Theirs.from_pretrained(tmp_path / "base")
    torch.testing.assert_close(logits(theirs.eval()), logits(ours), rtol=0, atol=1e-4)
    adapter = randomise(get_peft_model(theirs, LoraConfig(r=2, lora_alpha=6, target_modules=targets))).eval()
    expected = logits(adapter)
    adapter.save_pretrained(tmp_path / "adapter")
    assert any("base_layer" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == (
        len(targets) > 1
    )
    loaded = PeftModel.from_pretrained(ours, tmp_path / "adapter")
    routed_ones = {name for name in SETS["routed_experts"] if name.endswith(tuple(targets))}
    assert adapted(loaded) == routed_ones | {name for name in SETS["attention"] if name.endswith(tuple(targets))}
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-4)
    with loaded.disable_adapter():
        assert (logits(loaded) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("start", [True, "gaussian"])
def test_fresh_adapters_change_nothing_and_begin_as_peft_s_linear_layers_do(start):
    """The same draws: with one seed an expert's A is that of a linear layer of its size."""
    base = tiny_model()
    plain = logits(base)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["routed_experts"], init_lora_weights=start)).eval()
    assert torch.equal(logits(model), plain)
    linear = get_peft_model(nn.Sequential(nn.Linear(64, 32)), LoraConfig(r=4, target_modules=["0"]))
    torch.manual_seed(3)
    linear.base_model.model[0].reset_lora_parameters("default", start)
    torch.manual_seed(3)
    routed(model).up_proj.reset_lora_parameters("default", start)
    factor_A, factor_B = routed(model).up_proj.factors("default")
    assert torch.equal(factor_A[0], linear.base_model.model[0].lora_A["default"].weight)
    assert not torch.equal(factor_A[0], factor_A[1])
    assert not factor_B.any()


def test_experts_that_are_spread_already_are_refused():
    model = tiny_model()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        experts = model.model.layers[1].mlp.experts
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        experts.down_proj = nn.Parameter(DTensor.from_local(experts.down_proj.detach(), mesh, [Shard(0)]))
        with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts is spread over devices already"):
            get_peft_model(model, LoraConfig(target_modules=["routed_experts"]))
        others = ["attention", "dense_mlp", "shared_experts"]
        assert adapted(get_peft_model(model, LoraConfig(target_modules=others))) == set().union(*map(SETS.get, others))
    finally:
        dist.destroy_process_group()


# Dropout.


def test_dropout_on_experts_is_of_each_row_and_each_projection():
    """Its mean over many draws is what there is without, as for a linear layer; in eval mode there is none."""
    names = ["model.layers.1.mlp.experts.down_proj"]
    model = adapt(tiny_model(), names, lora_dropout=0.5)
    without = adapt(tiny_model(), names)
    assert torch.equal(logits(model), logits(without))
    generator = torch.Generator().manual_seed(0)
    hidden, weights = torch.randn(2, 64, generator=generator).repeat(2000, 1), torch.ones(4000, 1)
    indices = torch.tensor([[3], [5]]).repeat(2000, 1)
    torch.manual_seed(0)
    with torch.no_grad():
        dropped = routed(model.train())(hidden, indices, weights).view(2000, 2, 64)
        expected = routed(without)(hidden, indices, weights).view(2000, 2, 64)
        model.disable_adapter_layers()
        base = routed(model)(hidden, indices, weights).view(2000, 2, 64)
    assert (dropped[0] - dropped[1]).abs().max() > 1e-2  # rows of one expert have masks of their own
    error, deviation = dropped.mean(0) - expected[0], dropped.std(0) / 2000**0.5
    assert (error.abs() / deviation).max() < 4.5
    assert ((base[0] - expected[0]).abs() / deviation).max() > 20, "adapters that do something"


def test_dropout_on_kv_b_proj_is_refused_where_it_would_be_another():
    model = adapt(tiny_model(mla_path="absorbed"), ["kv_b_proj"], lora_dropout=0.1)
    logits(model)
    with pytest.raises(ValueError, match="absorbed attention would drop the same"):
        logits(model.train())
    model.get_base_model().config.mla_path = "auto"
    logits(model)  # training is expanded


# Several adapters.


def test_several_adapters():
    base = tiny_model()
    plain = logits(base)
    model = adapt(base, ["routed_experts", "attention"])
    first = logits(model)
    model.add_adapter("second", LoraConfig(r=2, lora_alpha=2, target_modules=["dense_mlp", "down_proj"]))
    randomise(model, seed=9, adapter="second")
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    second = logits(model)
    assert (second - first).abs().max() > 1e-3
    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    merged = copy.deepcopy(model)
    merged.merge_adapter()
    assert_close(logits(merged), both)
    with merged.disable_adapter():
        assert_close(logits(merged), plain)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    assert all(
        parameter.requires_grad == (".default." in name)
        for name, parameter in model.named_parameters()
        if "lora_" in name
    )
    model.delete_adapter("second")
    assert torch.equal(logits(model), first)
    assert not [name for name, _ in model.named_parameters() if ".second." in name]


def test_a_model_with_adapters_in_it_is_not_saved_as_a_checkpoint(tmp_path):
    """It would have names that nothing loads."""
    model = adapt(tiny_model(), ["o_proj"])
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"merge_and_unload\(\)"):
        model.get_base_model().save_pretrained(tmp_path)
    model.unload().save_pretrained(tmp_path)


def test_adapters_are_added_with_weights():
    model = adapt(tiny_model(), ["routed_experts"])
    first = logits(model)
    model.add_adapter("other", LoraConfig(r=4, lora_alpha=8, target_modules=["routed_experts"]))
    randomise(model, seed=9, adapter="other")
    model.add_weighted_adapter(["default"], [1.0], "same", combination_type="linear")
    model.set_adapter("same")
    torch.testing.assert_close(logits(model), first, rtol=0, atol=1e-4)
    for way in ("cat", "svd", "ties"):
        with pytest.raises(ValueError, match="stacks of experts; use one of"):
            model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "both", combination_type=way)
    assert "both" not in model.peft_config


def test_a_batch_of_several_adapters_is_refused_for_experts_and_not_wrong_for_attention():
    model = adapt(tiny_model(), ["routed_experts"])
    with pytest.raises(ValueError, match="`adapter_names` cannot mix adapters"):
        model(tokens(), adapter_names=["default", "__base__"])

    model = adapt(tiny_model(mla_path="expanded"), ["attention"])
    expected = logits(model)
    with torch.no_grad():
        mixed = model(tokens(), adapter_names=["default", "__base__"]).logits
        with model.disable_adapter():
            plain = logits(model)
    assert_close(mixed[0], expected[0])
    assert_close(mixed[1], plain[1])
    # Absorbed attention has one weight for the whole batch: the unit vectors must not pass for its rows.
    absorbed = adapt(tiny_model(mla_path="absorbed"), ["kv_b_proj"])
    rank = absorbed.get_base_model().config.kv_lora_rank
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        absorbed(tokens(rank, 2), adapter_names=["default", "__base__"] * (rank // 2))


# Files and loading.


def test_every_way_of_loading(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    model = adapt(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), "all-linear", task_type="CAUSAL_LM")
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(base), expected)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")), expected)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")), expected)
    lazily = PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter", low_cpu_mem_usage=True)
    assert torch.equal(logits(lazily), expected)

    # transformers' own way of having adapters
    native = tiny_model()
    native.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    randomise(native)
    assert torch.equal(logits(native), expected)
    native.save_pretrained(tmp_path / "native")
    for one in (tmp_path / "native", tmp_path / "adapter"):
        assert set(load_file(one / "adapter_model.safetensors")) == in_file(ALL)
    state = get_peft_model_state_dict(native)
    assert set(state) == {name.removeprefix("base_model.model.") for name in in_file(ALL)}
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), tmp_path / "native")), expected)
    by_state = inject_adapter_in_model(
        LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"), tiny_model(), state_dict=state
    )
    set_peft_model_state_dict(by_state, state)
    assert torch.equal(logits(by_state), expected)
    fresh = tiny_model()
    fresh.load_adapter(peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"), adapter_state_dict=state)
    assert torch.equal(logits(fresh), expected)


def test_an_adapted_model_can_be_pickled_and_generates_as_when_merged(tmp_path):
    model = adapt(tiny_model(), "all-linear", task_type="CAUSAL_LM")
    torch.save(model, tmp_path / "model.pt")
    assert torch.equal(logits(torch.load(tmp_path / "model.pt", weights_only=False)), logits(model))
    ask = dict(input_ids=tokens(), attention_mask=torch.ones_like(tokens()), max_new_tokens=12, do_sample=False)
    expected = model.generate(**ask)
    assert torch.equal(model.generate(**ask, use_mtp=True), expected)  # drafts of adapted modules
    assert torch.equal(model.merge_and_unload().generate(**ask), expected)


def test_adapted_experts_compile_whole_switched_off_too():
    model = adapt(tiny_model(), ["routed_experts"])
    hidden, indices, weights = torch.randn(6, 64), torch.arange(12).view(6, 2) % EXPERTS, torch.rand(6, 2)
    compiled = torch.compile(routed(model), fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(hidden, indices, weights), routed(model)(hidden, indices, weights))
        with model.disable_adapter():
            assert torch.equal(compiled(hidden, indices, weights), routed(model)(hidden, indices, weights))


def test_a_file_with_gaps_is_refused():
    state = {f"a.experts.{expert}.up_proj.lora_A.weight": torch.zeros(2, 3) for expert in range(4)}
    assert stack_experts(state)["a.experts.up_proj.lora_A.weight"].shape == (4, 2, 3)
    assert split_experts(stack_experts(state)).keys() == state.keys()
    gap = {name: tensor for name, tensor in state.items() if ".2." not in name}
    with pytest.raises(ValueError, match="of 3 experts and lacks that of 2"):
        stack_experts(gap)
    with pytest.raises(ValueError, match=r"different shapes, \[\(1, 3\), \(2, 3\)\]"):
        stack_experts({**state, "a.experts.1.up_proj.lora_A.weight": torch.zeros(1, 3)})


def test_a_router_is_trained_whole_and_saved_with_its_bias(tmp_path):
    """Named for what it is, `modules_to_save`. Its bias then moves, and comes back with it."""
    config = LoraConfig(r=4, target_modules=["o_proj"], modules_to_save=["gate"])
    model = get_peft_model(tiny_model(bias_update_speed=0.25), config).train()
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.1)
    model(tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    load = model.get_base_model().update_correction_bias()
    assert load[1].sum() > 0
    trained, kept = tiny_model().model.layers[1].mlp.gate, model.get_base_model().model.layers[1].mlp.gate
    assert not torch.equal(kept.modules_to_save["default"].weight, trained.weight)
    assert not torch.equal(kept.modules_to_save["default"].e_score_correction_bias, trained.e_score_correction_bias)
    assert torch.equal(kept.original_module.weight, trained.weight)
    expected = logits(model.eval())
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), tmp_path)), expected)
    assert_close(logits(model.merge_and_unload()), expected)


# Training.


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_moves_every_adapter_and_nothing_else(checkpointing):
    model = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1)).train()
    if checkpointing:
        model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    randomise(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=1.0)
    ids = tokens(8, 40)  # enough that every expert is chosen
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    still = {name for name, tensor in model.state_dict().items() if torch.equal(tensor, before[name])}
    assert still == {name for name in before if "lora_" not in name}
    for name, tensor in model.state_dict().items():
        if ".mlp.experts." in name and "lora_" in name:
            assert (tensor != before[name]).flatten(1).any(dim=1).all(), f"each expert of {name}"


def test_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        model = adapt(tiny_model(), "all-linear", lora_dropout=0.1).train()
        if checkpointing:
            model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        model(tokens(), labels=tokens()).loss.backward()
        gradients.append({name: one.grad for name, one in model.named_parameters() if one.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=1e-6)


def test_bfloat16_models_train_adapters_in_float32_and_under_autocast():
    model = adapt(tiny_model().bfloat16(), ["routed_experts"])
    factors = [value for name, value in model.named_parameters() if "lora_" in name]
    assert {value.dtype for value in factors} == {torch.float32}  # PEFT's default
    exact = adapt(tiny_model(), ["routed_experts"])
    hidden, indices = torch.randn(6, 64), torch.arange(12).view(6, 2) % EXPERTS
    with torch.no_grad():
        low = routed(model)(hidden.bfloat16(), indices, torch.ones(6, 2))
        high = routed(exact)(hidden, indices, torch.ones(6, 2))
    assert low.dtype == torch.bfloat16
    assert (low - high).norm() < 0.01 * high.norm()
    factor_A, factor_B = routed(exact).up_proj.factors("default")
    with torch.autocast("cpu", torch.bfloat16):
        assert low_rank_product(hidden, factor_A, factor_B, torch.arange(8, dtype=torch.int32)).dtype == torch.bfloat16
        loss = exact.train()(tokens(), labels=tokens()).loss
    loss.backward()
    assert all(value.grad.dtype == torch.float32 for name, value in exact.named_parameters() if "lora_" in name)


def test_trl_trains_saves_and_resumes(tmp_path):
    """With dropout: a resumed training ends where one that was not interrupted does, also for MTP modules, which only
    their own loss reaches."""
    config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1, task_type="CAUSAL_LM")
    arguments = dict(max_steps=4, save_strategy="steps", save_steps=2, learning_rate=1e-2)
    ends = []
    for name, checkpoint in (("whole", None), ("resumed", tmp_path / "whole" / "checkpoint-2")):
        model = tiny_model(bias_update_speed=0.25)
        callback = DeepseekTrainerCallback()
        trainer = sft_trainer(model, tmp_path / name, [callback], copy.deepcopy(config), **arguments)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        ends.append({name: value for name, value in trainer.model.named_parameters() if "lora_" in name})
    assert adapted(model) == ALL
    assert len(ends[0]) == 2 * len(ALL)
    for name, value in ends[0].items():
        assert "lora_A" in name or value.any(), f"{name} has not moved"
        torch.testing.assert_close(ends[1][name], value, rtol=0, atol=1e-6)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "whole" / "checkpoint-4")
    trained = {name: value for name, value in loaded.named_parameters() if "lora_" in name}
    assert all(torch.equal(trained[name], value) for name, value in ends[0].items())


STRANGER = """
import json, sys
sys.modules["modeling_deepseek"] = None  # not to be imported, even where it is installed
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
adapted = get_peft_model(model, LoraConfig(target_modules=["dense_mlp", "up_proj"], lora_dropout=0.1))
print(json.dumps([name for name, module in adapted.named_modules() if isinstance(module, LoraLayer)]))
with torch.no_grad():
    loaded = PeftModel.from_pretrained(adapted.unload(), sys.argv[2])
    torch.save(loaded(torch.load(sys.argv[3])).logits, sys.argv[3])
"""


def test_code_that_travels_with_a_checkpoint_adapts_the_same(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base", save_code=True)
    model = adapt(tiny_model(), "all-linear")
    model.save_pretrained(tmp_path / "adapter")
    torch.save(tokens(), tmp_path / "tensor.pt")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [
        sys.executable,
        "-c",
        STRANGER,
        *map(str, (tmp_path / "base", tmp_path / "adapter", tmp_path / "tensor.pt")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    names = {name.removeprefix("base_model.model.") for name in json.loads(done.stdout)}
    assert names == SETS["dense_mlp"] | {name for name in ALL if name.endswith("up_proj")}
    torch.testing.assert_close(torch.load(tmp_path / "tensor.pt"), logits(model), rtol=0, atol=1e-6)


# On quantised weights.

WIDE = {"moe_intermediate_size": 64, "q_lora_rank": 64, "kv_lora_rank": 64}
QUANTISED = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "nf4 kv_b_proj too": {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": ["lm_head"],
    },
    "int8": {"load_in_8bit": True},
}  # fmt: skip


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wide")
    tiny_model(**WIDE).save_pretrained(folder)
    return folder


def quantised(folder, name: str, **kwargs):
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**QUANTISED[name]), **kwargs
    )


@pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")
@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_qlora_trains_saves_and_comes_back(name, wide, tmp_path):
    base = prepare_model_for_kbit_training(quantised(wide, name), use_gradient_checkpointing=False)
    config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.05, task_type="CAUSAL_LM")
    model = get_peft_model(base, config).train()
    assert adapted(model) == ALL
    frozen = {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_" not in name}
    optimizer = torch.optim.Adam([one for one in model.parameters() if one.requires_grad], lr=1e-2)
    ids, losses = tokens(4, 24), []
    for _ in range(8):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in frozen.items())
    unmoved = [name for name, value in model.named_parameters() if "lora_B" in name and not value.any()]
    assert unmoved == []

    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == in_file(ALL)
    fresh = prepare_model_for_kbit_training(quantised(wide, name), use_gradient_checkpointing=False)
    expected = logits(model.eval())
    assert torch.equal(logits(PeftModel.from_pretrained(fresh, tmp_path)), expected)


@pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")
@pytest.mark.parametrize("name", QUANTISED)
def test_an_adapter_on_quantised_experts_adds_what_it_adds_to_their_values(name, wide):
    """Against plain experts that hold the dequantised weights."""
    model = adapt(quantised(wide, name), ["routed_experts"])
    experts = routed(model).base_layer
    plain = adapt(tiny_model(**WIDE), ["routed_experts"])
    for stack in ("gate_up_proj", "down_proj"):
        values = experts.dequantized(stack, list(range(EXPERTS)), torch.float32)
        getattr(routed(plain).base_layer, stack).data = values
    hidden, indices = torch.randn(9, 64), torch.arange(18).view(9, 2) % 7
    weights = torch.rand(9, 2)
    assert_close(routed(model)(hidden, indices, weights), routed(plain)(hidden, indices, weights))


@pytest.mark.filterwarnings("ignore:Merge lora module:UserWarning")
@pytest.mark.parametrize("name", QUANTISED)
def test_merging_into_quantised_experts_is_their_sum_quantised(name, wide):
    """By bitsandbytes, expert by expert; PEFT does so with linear layers, and says that it rounds."""
    model = adapt(quantised(wide, name), ["routed_experts", "o_proj"])
    experts, sums = routed(model), []
    for projection in experts.projections():
        pairs = enumerate(zip(*projection.factors("default"), strict=True))
        sums.append([projection.base_layer.read(expert) + 2 * b @ a for expert, (a, b) in pairs])
    with pytest.warns(UserWarning, match="merging adapters into quantised experts rounds"):
        merged = model.merge_and_unload()
    stacks = merged.model.layers[1].mlp.experts
    assert stacks is experts.base_layer
    for expert in range(EXPERTS):
        for stack, parts in {"gate_up_proj": sums[:2], "down_proj": sums[2:]}.items():
            values = stacks.dequantized(stack, [expert], torch.float32)[0].chunk(len(parts))
            for part, value in zip(parts, values, strict=True):
                if name == "int8":
                    packed, scales, _ = bnb.functional.int8_vectorwise_quant(part[expert].half())
                    expected = packed * scales[:, None] / 127
                else:
                    nested = QUANTISED[name].get("bnb_4bit_use_double_quant", False)
                    packed, state = bnb.functional.quantize_4bit(
                        part[expert], quant_type="nf4", compress_statistics=nested
                    )
                    expected = bnb.functional.dequantize_4bit(packed, state)
                torch.testing.assert_close(value, expected, rtol=0, atol=1e-6)


def test_dequantised_below_an_adapter_and_merged(wide):
    model = adapt(quantised(wide, "nf4"), ["routed_experts"])
    expected = logits(model)
    model.get_base_model().dequantize()
    assert_close(logits(model), expected)
    assert_close(logits(model.merge_and_unload()), expected)


@torch.no_grad()
def test_absorbed_attention_reads_a_quantised_and_adapted_kv_b_proj(wide):
    model = adapt(quantised(wide, "nf4 kv_b_proj too"), ["attention"])
    both = []
    for path in ("expanded", "absorbed"):
        model.get_base_model().config.mla_path = path
        both.append(logits(model))
    torch.testing.assert_close(both[0], both[1], rtol=0, atol=1e-4)
