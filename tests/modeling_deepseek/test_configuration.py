"""Configurations: published shapes, released config.json files in and out, and what is refused."""

import copy
import json

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import AutoConfig

from modeling_deepseek import (
    PRESETS,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
)
from modeling_deepseek.configuration_deepseek import WITHOUT_EFFECT
from tests.tiny import FAMILIES, tiny_config

CLASSES = {
    "deepseek_v2": (DeepseekV2Config, DeepseekV2ForCausalLM),
    "deepseek_v3": (DeepseekV3Config, DeepseekV3ForCausalLM),
}

# The architecture tables of the papers: V2 (arXiv 2405.04434, 3.1.2 and appendix B), V3 (2412.19437, 4.2), Moonlight
# (2502.16982) and Kimi-K2 (2507.20534). The last row is billions of parameters, as published, without MTP modules.
PUBLISHED_ROWS = (
    "model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "q_lora_rank", "kv_lora_rank",
    "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "first_k_dense_replace", "intermediate_size",
    "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size", "n_group", "topk_group",
    "scoring_func", "topk_method", "norm_topk_prob", "routed_scaling_factor", "num_nextn_predict_layers",
    "vocab_size", "billions",
)  # fmt: skip
PUBLISHED = {
    "deepseek-v2-lite": (
        "deepseek_v2", 27, 2048, 16, None, 512, 128, 64, 128, 1, 10944, 64, 2, 6, 1408, 1, 1,
        "softmax", "greedy", False, 1.0, 0, 102400, 15.7,
    ),
    "deepseek-v2": (
        "deepseek_v2", 60, 5120, 128, 1536, 512, 128, 64, 128, 1, 12288, 160, 2, 6, 1536, 8, 3,
        "softmax", "group_limited_greedy", False, 16.0, 0, 102400, 236,
    ),
    "deepseek-v3": (
        "deepseek_v3", 61, 7168, 128, 1536, 512, 128, 64, 128, 3, 18432, 256, 1, 8, 2048, 8, 4,
        "sigmoid", "noaux_tc", True, 2.5, 1, 129280, 671,
    ),
    "deepseek-r1": (
        "deepseek_v3", 61, 7168, 128, 1536, 512, 128, 64, 128, 3, 18432, 256, 1, 8, 2048, 8, 4,
        "sigmoid", "noaux_tc", True, 2.5, 1, 129280, 671,
    ),
    "moonlight-16b-a3b": (
        "deepseek_v3", 27, 2048, 16, None, 512, 128, 64, 128, 1, 11264, 64, 2, 6, 1408, 1, 1,
        "sigmoid", "noaux_tc", True, 2.446, 0, 163840, 16,
    ),
    "kimi-k2": (
        "deepseek_v3", 61, 7168, 64, 1536, 512, 128, 64, 128, 1, 18432, 384, 1, 8, 2048, 1, 1,
        "sigmoid", "noaux_tc", True, 2.827, 0, 163840, 1026,
    ),
}  # fmt: skip


def yarn(factor, mscale, beta_fast=32, beta_slow=1):
    return {
        "beta_fast": beta_fast, "beta_slow": beta_slow, "factor": factor, "mscale": mscale, "mscale_all_dim": mscale,
        "original_max_position_embeddings": 4096, "type": "yarn",
    }  # fmt: skip


def auto_map(family):
    names = {"AutoModel": "Model", "AutoModelForCausalLM": "ForCausalLM"}
    models = {auto: f"modeling_deepseek.Deepseek{family}{name}" for auto, name in names.items()}
    return {"AutoConfig": f"configuration_deepseek.Deepseek{family}Config", **models}


FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}

# The released config.json files, spelt as they are, by the preset that should equal them.
COMMON = {
    "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02,
    "kv_lora_rank": 512, "moe_layer_freq": 1, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
}  # fmt: skip
V2 = {
    **COMMON, "architectures": ["DeepseekV2ForCausalLM"], "auto_map": auto_map("V2"), "model_type": "deepseek_v2",
    "aux_loss_alpha": 0.001, "seq_aux": True, "bos_token_id": 100000, "eos_token_id": 100001,
    "first_k_dense_replace": 1, "max_position_embeddings": 163840, "n_shared_experts": 2, "norm_topk_prob": False,
    "num_experts_per_tok": 6, "pretraining_tp": 1, "rope_scaling": yarn(40, 0.707), "rope_theta": 10000,
    "scoring_func": "softmax", "vocab_size": 102400,
}  # fmt: skip
V3 = {
    **COMMON, "architectures": ["DeepseekV3ForCausalLM"], "auto_map": auto_map("V3"), "model_type": "deepseek_v3",
    "norm_topk_prob": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
}  # fmt: skip
R1 = {
    **V3, "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3, "hidden_size": 7168,
    "intermediate_size": 18432, "max_position_embeddings": 163840, "moe_intermediate_size": 2048, "n_group": 8,
    "topk_group": 4, "n_routed_experts": 256, "n_shared_experts": 1, "num_attention_heads": 128,
    "num_key_value_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536, "quantization_config": FP8, "rope_scaling": yarn(40, 1.0), "rope_theta": 10000,
    "routed_scaling_factor": 2.5, "transformers_version": "4.46.3", "vocab_size": 129280,
}  # fmt: skip
RELEASED = {
    "deepseek-v2-lite": {
        **V2, "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408, "n_group": 1,
        "topk_group": 1, "n_routed_experts": 64, "num_attention_heads": 16, "num_key_value_heads": 16,
        "num_hidden_layers": 27, "q_lora_rank": None, "routed_scaling_factor": 1.0, "topk_method": "greedy",
    },
    "deepseek-v2": {
        **V2, "hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536, "n_group": 8,
        "topk_group": 3, "n_routed_experts": 160, "num_attention_heads": 128, "num_key_value_heads": 128,
        "num_hidden_layers": 60, "q_lora_rank": 1536, "routed_scaling_factor": 16.0,
        "topk_method": "group_limited_greedy", "transformers_version": "4.39.3",
    },
    # The first revision of the file; the current one has none of the three keys.
    "deepseek-v3": {**R1, "aux_loss_alpha": 0.001, "seq_aux": True, "pretraining_tp": 1},
    "deepseek-r1": R1,
    "moonlight-16b-a3b": {
        **V3, "aux_loss_alpha": 0.001, "seq_aux": True, "bos_token_id": 163584, "eos_token_id": 163585, "ep_size": 1,
        "first_k_dense_replace": 1, "hidden_size": 2048, "intermediate_size": 11264, "max_position_embeddings": 8192,
        "moe_intermediate_size": 1408, "n_group": 1, "topk_group": 1, "n_routed_experts": 64, "n_shared_experts": 2,
        "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27,
        "num_nextn_predict_layers": 0, "pretraining_tp": 1, "q_lora_rank": None, "rms_norm_eps": 1e-5,
        "rope_theta": 50000.0, "routed_scaling_factor": 2.446, "vocab_size": 163840,
    },
    "kimi-k2": {
        **V3, "model_type": "kimi_k2", "aux_loss_alpha": 0.001, "seq_aux": True, "bos_token_id": 163584,
        "eos_token_id": 163585, "first_k_dense_replace": 1, "hidden_size": 7168, "intermediate_size": 18432,
        "max_position_embeddings": 131072, "moe_intermediate_size": 2048, "n_group": 1, "topk_group": 1,
        "n_routed_experts": 384, "n_shared_experts": 1, "num_attention_heads": 64, "num_key_value_heads": 64,
        "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_nextn_predict_layers": 0, "pretraining_tp": 1,
        "q_lora_rank": 1536, "quantization_config": FP8, "rope_scaling": yarn(32.0, 1.0, 1.0, 1.0),
        "rope_theta": 50000.0, "routed_scaling_factor": 2.827, "vocab_size": 163840,
    },
}  # fmt: skip


def write_config(folder, fields):
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def saved(config, folder):
    config.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


def preset(name):
    return CLASSES[PRESETS[name]["model_type"]][0].from_preset(name)


# Presets


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_has_the_published_shape(name):
    config = preset(name)
    for field, value in zip(PUBLISHED_ROWS[:-1], PUBLISHED[name][:-1], strict=True):
        actual = getattr(config, field)
        assert (1 if actual is None and field in ("n_group", "topk_group") else actual) == value, field


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_has_the_published_number_of_parameters(name):
    config_class, model_class = CLASSES[PRESETS[name]["model_type"]]
    with torch.device("meta"):
        model = model_class(config_class.from_preset(name, num_nextn_predict_layers=0))
    billions = PUBLISHED[name][-1]
    count = sum(parameter.numel() for parameter in model.parameters()) / 1e9
    assert round(count, 1 if name == "deepseek-v2-lite" else 0) == billions


def test_cache_of_v3_takes_70272_bytes_a_token_in_bfloat16():
    assert preset("deepseek-v3").cache_values_per_token * torch.bfloat16.itemsize == 70272


@pytest.mark.parametrize("name", RELEASED)
def test_preset_equals_the_released_file(name, tmp_path):
    released = AutoConfig.from_pretrained(write_config(tmp_path, RELEASED[name])).to_dict()
    ours = preset(name).to_dict()
    of_the_file = {"_name_or_path", "architectures", "auto_map", "dtype", "quantization_config", "pretraining_tp"}
    for field in released.keys() - of_the_file:
        expected = released[field]
        if field in ("n_group", "topk_group"):
            assert (ours[field] or 1) == expected, field
        else:
            assert ours[field] == expected, field


@pytest.mark.parametrize("name", ["tiny-v2", "tiny-v3"])
def test_tiny_presets_really_route(name):
    """Otherwise no test built on them would notice a router that chooses wrongly."""
    config = preset(name)
    allowed = config.n_routed_experts // config.n_group * config.topk_group
    assert config.num_experts_per_tok < allowed < config.n_routed_experts


def test_presets_are_not_changed_by_what_is_built_from_them():
    before = copy.deepcopy(PRESETS)
    config = preset("deepseek-v3")
    config.rope_parameters["factor"] = 2
    DeepseekV3Config.from_preset("deepseek-v3", rope_theta=5.0)
    assert before == PRESETS


def test_preset_of_the_wrong_name_or_family():
    with pytest.raises(ValueError, match=r"unknown preset 'deepseek-v33', did you mean 'deepseek-v3'"):
        DeepseekV3Config.from_preset("deepseek-v33")
    with pytest.raises(ValueError, match="preset 'tiny-v2' is a deepseek_v2"):
        DeepseekV3Config.from_preset("tiny-v2")


# Released files


@pytest.mark.parametrize("name", RELEASED)
def test_released_file_loads_unchanged_and_is_written_back(name, tmp_path):
    """Every field is read, has a known meaning, and stands in the saved file under its released name: serving engines
    look for `topk_method`, `scoring_func`, `rope_scaling` and `torch_dtype` there."""
    released = RELEASED[name]
    config = AutoConfig.from_pretrained(write_config(tmp_path, released))
    assert type(config) is CLASSES["deepseek_v2" if "v2" in name else "deepseek_v3"][0]
    assert set(released) <= set(config.__dataclass_fields__) | WITHOUT_EFFECT
    assert config.dtype == torch.bfloat16
    written = saved(config, tmp_path)
    for field in released.keys() - {"model_type", "transformers_version"}:
        assert written[field] == released[field], field
    # kimi_k2 is read, and written, as V3
    assert config.model_type == written["model_type"] == ("deepseek_v2" if "v2" in name else "deepseek_v3")
    assert not written.keys() & {"rope_parameters", "dtype", "head_dim", "qk_head_dim"}


def test_rope_of_released_files(tmp_path):
    moonlight = AutoConfig.from_pretrained(write_config(tmp_path, RELEASED["moonlight-16b-a3b"]))
    assert moonlight.rope_parameters == {"rope_theta": 50000.0, "rope_type": "default"}
    kimi = AutoConfig.from_pretrained(write_config(tmp_path, RELEASED["kimi-k2"]))
    expected = {**yarn(32.0, 1.0, 1.0, 1.0), "rope_type": "yarn", "rope_theta": 50000.0}
    assert kimi.rope_parameters == expected


def test_yarn_without_its_original_length_means_4096():
    """The default of the official code (inference and Hub); transformers would take `max_position_embeddings`."""
    config = tiny_config(rope_scaling={"type": "yarn", "factor": 4.0})
    assert config.rope_parameters["original_max_position_embeddings"] == 4096


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rope_scaling", [None, {"type": "linear", "factor": 2.0}, yarn(40, 0.707)])
def test_round_trip(family, rope_scaling, tmp_path):
    config = tiny_config(
        family, rope_scaling=rope_scaling, rope_theta=5e4, dtype="float16", num_nextn_predict_layers=2,
        router_logits_dtype="activation", mla_path="absorbed", eos_token_id=[1, 2], num_labels=5, n_shared_experts=None,
    )  # fmt: skip
    written = saved(config, tmp_path)
    assert written["rope_scaling"] == rope_scaling
    assert written["rope_theta"] == 5e4
    assert written["torch_dtype"] == "float16"
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is type(config)
    assert {**loaded.to_dict(), "_name_or_path": ""} == config.to_dict()


def test_fresh_configuration_has_the_keys_that_serving_engines_read(tmp_path):
    v3, v2 = saved(DeepseekV3Config(), tmp_path), saved(DeepseekV2Config(), tmp_path)
    assert (v3["topk_method"], v3["scoring_func"], v3["rope_theta"]) == ("noaux_tc", "sigmoid", 10000.0)
    assert (v2["topk_method"], v2["scoring_func"], v2["rope_scaling"]) == ("greedy", "softmax", None)


@pytest.mark.parametrize("family", ["V2", "V3"])
def test_configuration_of_transformers_is_converted(family, tmp_path):
    """Also from a file as transformers writes it, with `rope_parameters` and `dtype`."""
    theirs = getattr(transformers, f"Deepseek{family}Config")(
        hidden_size=128,
        num_experts_per_tok=4,  # their V2's default is none, with which no model of theirs runs either
        rope_parameters={"rope_type": "default", "rope_theta": 77.0},
        dtype="float16",
    )
    converted = CLASSES[theirs.model_type][0].converted(theirs)
    theirs.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    for ours in (converted, loaded):
        assert type(ours) is CLASSES[theirs.model_type][0]
        for field in ("hidden_size", "n_routed_experts", "num_hidden_layers", "q_lora_rank", "dtype"):
            assert getattr(ours, field) == getattr(theirs, field), field
        assert ours.rope_parameters == theirs.rope_parameters
    if family == "V3":
        assert converted.num_nextn_predict_layers == theirs.num_mtp_layers == 1


def test_configuration_of_another_model_is_not_converted():
    with pytest.raises(ValueError, match="deepseek_v3 model from a LlamaConfig"):
        DeepseekV3Config.converted(transformers.LlamaConfig())
    with pytest.raises(ValueError, match="deepseek_v3 model from a DeepseekV2Config"):
        DeepseekV3Config.converted(tiny_config("v2"))


def test_file_of_the_other_family_is_refused(tmp_path):
    """Their routers differ where fields are equal; transformers warns and goes on."""
    folder = write_config(tmp_path, tiny_config("v2").to_diff_dict())
    with pytest.raises(ValueError, match="`model_type` 'deepseek_v2' is not deepseek_v3"):
        DeepseekV3ForCausalLM.from_pretrained(folder)


# Refusals


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        ({"scoring_func": "tanh"}, ["scoring_func", "tanh", "sigmoid"]),
        ({"topk_method": "noaux"}, ["topk_method", "noaux", "group_limited_greedy"]),
        ({"router_logits_dtype": "bfloat16"}, ["router_logits_dtype", "activation"]),
        ({"mtp_hidden_state": "before"}, ["mtp_hidden_state", "before_norm"]),
        ({"mla_path": "absorb"}, ["mla_path", "absorbed"]),
        ({"vocab_size": 0}, ["vocab_size"]),
        ({"hidden_size": 0}, ["hidden_size"]),
        ({"intermediate_size": -1}, ["intermediate_size"]),
        ({"moe_intermediate_size": 0}, ["moe_intermediate_size"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers"]),
        ({"num_attention_heads": 0}, ["num_attention_heads"]),
        ({"kv_lora_rank": 0}, ["kv_lora_rank"]),
        ({"q_lora_rank": 0}, ["q_lora_rank", "None"]),
        ({"qk_nope_head_dim": 0}, ["qk_nope_head_dim"]),
        ({"qk_rope_head_dim": 0}, ["qk_rope_head_dim"]),
        ({"qk_rope_head_dim": 7}, ["qk_rope_head_dim", "even"]),
        ({"v_head_dim": 0}, ["v_head_dim"]),
        ({"max_position_embeddings": 0}, ["max_position_embeddings"]),
        ({"mla_workspace_mib": 0}, ["mla_workspace_mib"]),
        ({"moe_layer_freq": 0}, ["moe_layer_freq"]),
        ({"num_nextn_predict_layers": -1}, ["num_nextn_predict_layers"]),
        ({"first_k_dense_replace": -1}, ["first_k_dense_replace"]),
        ({"aux_loss_alpha": -0.1}, ["aux_loss_alpha"]),
        ({"aux_loss_alpha": float("nan")}, ["aux_loss_alpha"]),
        ({"bias_update_speed": -0.1}, ["bias_update_speed"]),
        ({"mtp_loss_weight": -0.1}, ["mtp_loss_weight"]),
        ({"rms_norm_eps": -1e-6}, ["rms_norm_eps"]),
        ({"initializer_range": -0.02}, ["initializer_range"]),
        ({"num_key_value_heads": 2}, ["num_key_value_heads", "num_attention_heads"]),
        ({"attention_dropout": 1.0}, ["attention_dropout"]),
        ({"hidden_act": "silo"}, ["hidden_act", "silo", "silu"]),
        ({"ep_size": 8}, ["ep_size"]),
        ({"pad_token_id": 256}, ["pad_token_id", "vocab_size"]),
        ({"pad_token_id": -1}, ["pad_token_id", "vocab_size"]),
        ({"n_routed_experts": 0}, ["n_routed_experts", "None"]),
        ({"n_shared_experts": -1}, ["n_shared_experts"]),
        ({"num_experts_per_tok": None}, ["num_experts_per_tok"]),
        ({"num_experts_per_tok": 0}, ["num_experts_per_tok"]),
        ({"n_routed_experts": 10}, ["n_routed_experts", "n_group"]),
        ({"n_group": 0, "topk_group": None}, ["n_group"]),
        ({"n_group": -4, "topk_group": -2}, ["n_group"]),
        ({"topk_group": 0}, ["topk_group"]),
        ({"topk_group": 5}, ["topk_group", "n_group"]),
        ({"n_group": 8, "topk_group": 4}, ["noaux_tc", "n_routed_experts", "n_group"]),  # a group of one has no two
        ({"num_experts_per_tok": 5}, ["num_experts_per_tok", "n_routed_experts", "n_group", "topk_group"]),
        ({"num_experts_per_tok": 9, "topk_method": "greedy"}, ["num_experts_per_tok", "n_routed_experts"]),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["rope_scaling", "dynamic", "yarn"]),
        ({"rope_scaling": {"factor": 2.0}}, ["rope_scaling", "factor"]),  # no type: would have no effect
        ({"rope_scaling": {"type": "yarn"}}, ["rope_scaling", "factor"]),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, ["rope_scaling", "factor", "0.5"]),
        ({"rope_scaling": {"type": "yarn", "factor": "40"}}, ["factor", "40"]),
        ({"rope_scaling": {"type": "yarn", "factor": 40, "mscal": 1.0}}, ["rope_scaling", "mscal"]),
        ({"rope_scaling": {"type": "yarn", "factor": 40, "attention_factor": 1.5}}, ["attention_factor"]),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "mscale": 1.0}}, ["rope_scaling", "linear", "mscale"]),
        ({"rope_scaling": {"type": "yarn", "factor": 40, "mscale": "1"}}, ["mscale", "'1'"]),
        ({"rope_scaling": {"type": "yarn", "factor": 40, "beta_fast": 0}}, ["beta_fast"]),
        ({"rope_theta": 0}, ["rope_theta"]),
        ({"rope_theta": None}, ["rope_theta"]),
        ({"rope_theta": "1e4"}, ["rope_theta", "'1e4'"]),  # what YAML makes of a bare 1e4
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, ["partial_"]),
    ],
    ids=str,
)
def test_refused_with_its_name(overrides, names):
    with pytest.raises(ValueError) as error:  # noqa: PT011  # the names below are the match
        tiny_config(**overrides)
    for name in names:
        assert name in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [("hidden_size", "8"), ("hidden_size", 8.5), ("hidden_size", None), ("norm_topk_prob", 1), ("seq_aux", "no")],
)
def test_wrong_type_is_refused_with_its_name(field, value):
    with pytest.raises(StrictDataclassFieldValidationError, match=field):
        tiny_config(**{field: value})


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("hiden_size", "hidden_size"),
        ("n_routed_expert", "n_routed_experts"),
        ("top_k_method", "topk_method"),
        ("norm_topk_probs", "norm_topk_prob"),
        ("router_aux_loss_coeff", "router_aux_loss_coef"),
        ("rope_scalling", "rope_scaling"),
        ("rope_tetha", "rope_theta"),
        ("num_lables", "num_labels"),
    ],
)
def test_misspelt_field_is_refused_with_the_right_one(wrong, right, tmp_path):
    """Kept as an attribute, as unknown fields are, it would have no effect and nobody would know."""
    fields = {**tiny_config().to_diff_dict(), wrong: 1}
    with pytest.raises(ValueError, match=rf"`{wrong}`: did you mean `{right}`\?"):
        AutoConfig.from_pretrained(write_config(tmp_path, fields))


def test_unknown_field_far_from_any_other_is_kept(tmp_path):
    """As transformers does; files carry notes of their own."""
    assert saved(tiny_config(my_note="x"), tmp_path)["my_note"] == "x"


@pytest.mark.parametrize(
    ("field", "value", "name"),
    [("kv_lora_rank", 0, "kv_lora_rank"), ("num_experts_per_tok", 5, "num_experts_per_tok"), ("ep_size", 2, "ep")],
)
def test_field_changed_after_construction_is_checked_when_a_model_is_built(field, value, name):
    config = tiny_config()
    setattr(config, field, value)
    with pytest.raises(ValueError, match=name), torch.device("meta"):
        DeepseekV3ForCausalLM(config)


@pytest.mark.parametrize(
    "field", ["scoring_func", "topk_method", "router_logits_dtype", "mtp_hidden_state", "mla_path"]
)
def test_choice_is_checked_when_it_is_assigned(field):
    """A path is forced by assignment; a misspelt one would run as another."""
    config = tiny_config()
    with pytest.raises(ValueError, match=rf"`{field}` must be one of .* got 'absorbd'"):
        setattr(config, field, "absorbd")


@pytest.mark.parametrize("field", ["mtp_passes", "mla_workspace_mib", "logits_workspace_mib"])
def test_a_field_to_set_on_a_model_is_checked_when_it_is_assigned(field):
    """The loss would take no further pass, or one token at a time, and say nothing."""
    config = tiny_config()
    with pytest.raises(ValueError, match=rf"`{field}` must be at least 1, got 0"):
        setattr(config, field, 0)
    setattr(config, field, 1)


def test_null_in_rope_scaling_is_as_good_as_absent(tmp_path):
    rope = {"type": "yarn", "factor": 4.0, "beta_fast": None, "original_max_position_embeddings": None}
    config = tiny_config(rope_scaling=rope)
    assert config.rope["original_max_position_embeddings"] == 4096
    assert "beta_fast" not in config.rope


def test_derived_sizes_follow_a_changed_field():
    config = tiny_config()
    config.qk_nope_head_dim = 24
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(config)
    assert config.qk_head_dim == 24 + 8
    assert model.model.layers[0].self_attn.q_b_proj.weight.shape == (4 * 32, 24)


@pytest.mark.parametrize(
    "overrides",
    [
        {"n_group": None, "topk_group": None},
        {"n_shared_experts": None},
        {"n_shared_experts": 0},
        {"n_routed_experts": None, "num_experts_per_tok": None},
        {"q_lora_rank": None},
        {"first_k_dense_replace": 9},
        {"routed_scaling_factor": 16},
        {"aux_loss_alpha": 0},
        {"rms_norm_eps": 0},
        {"topk_method": "greedy", "num_experts_per_tok": 8},
        {"rope_scaling": {"type": "yarn", "factor": 40, "mscale_all_dim": 0, "mscale": None}},
    ],
    ids=str,
)
def test_allowed(overrides):
    """Integers for floats, as JSON files have them, and none for what there is none of."""
    with torch.device("meta"):
        config = DeepseekV3ForCausalLM(tiny_config(**overrides)).config
    overrides = {name: value for name, value in overrides.items() if name != "rope_scaling"}
    assert {name: getattr(config, name) for name in overrides} == overrides


@pytest.mark.parametrize(
    ("overrides", "moe_layers"),
    [
        ({}, [1, 2, 3, 4]),  # layer 4 is the MTP module
        ({"first_k_dense_replace": 0}, [0, 1, 2, 3, 4]),
        ({"moe_layer_freq": 2}, [2, 4]),
        ({"moe_layer_freq": 3, "first_k_dense_replace": 0}, [0, 3]),
        ({"first_k_dense_replace": 5}, []),
        ({"n_routed_experts": None}, []),
    ],
    ids=str,
)
def test_which_layers_route(overrides, moe_layers):
    config = tiny_config(num_hidden_layers=4, **overrides)
    assert [index for index in range(5) if config.is_moe_layer(index)] == moe_layers
    with torch.device("meta"):
        layers = DeepseekV3ForCausalLM(config).model.layers
    assert [index for index, layer in enumerate(layers) if layer.is_moe] == moe_layers


# Overrides at load

LINEAR = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize("layout", ["released", "transformers"])
@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"mla_path": "absorbed"}, {"mla_path": "absorbed"}),
        ({"num_experts": 16}, {"n_routed_experts": 16, "num_local_experts": 16}),
        ({"num_mtp_layers": 0}, {"num_nextn_predict_layers": 0}),
        ({"router_aux_loss_coef": 0.5}, {"aux_loss_alpha": 0.5}),
        ({"num_labels": 5}, {"num_labels": 5}),
        ({"dtype": "bfloat16"}, {"dtype": "bfloat16"}),
        ({"attn_implementation": "eager"}, {"_attn_implementation": "eager"}),
        ({"rope_scaling": None}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, {"rope_parameters": LINEAR | {"rope_theta": 5e4}}),
        ({"rope_theta": 7.0}, {"rope_parameters": yarn(40, 1.0) | {"rope_type": "yarn", "rope_theta": 7.0}}),
        ({"rope_parameters": LINEAR | {"rope_theta": 7.0}}, {"rope_parameters": LINEAR | {"rope_theta": 7.0}}),
    ],
    ids=str,
)
def test_override_at_load(overrides, expected, layout, tmp_path):
    config = tiny_config(rope_scaling=yarn(40, 1.0), rope_theta=5e4)
    fields = config.to_diff_dict()
    if layout == "transformers":
        fields = {name: value for name, value in fields.items() if name not in ("rope_scaling", "rope_theta")}
        fields["rope_parameters"] = config.rope_parameters
    loaded, unused = AutoConfig.from_pretrained(
        write_config(tmp_path, fields), **overrides, other=1, return_unused_kwargs=True
    )
    for field, value in expected.items():
        actual = getattr(loaded, field)
        if field == "rope_parameters":
            actual, value = ({k: v for k, v in rope.items() if k != "type"} for rope in (actual, value))
        assert actual == value
    assert unused.keys() - {"dtype"} == {"other"}


def test_override_at_load_is_checked(tmp_path):
    """transformers sets overrides after the checks."""
    folder = write_config(tmp_path, tiny_config().to_diff_dict())
    with pytest.raises(ValueError, match="num_experts_per_tok"):
        AutoConfig.from_pretrained(folder, num_experts_per_tok=5)
    with pytest.raises(StrictDataclassFieldValidationError, match="hidden_size"):
        AutoConfig.from_pretrained(folder, hidden_size="8")
    # Fewer experts and a smaller top-k are valid together, in either order.
    config = AutoConfig.from_pretrained(folder, n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=4)
    assert (config.n_routed_experts, config.num_experts_per_tok) == (4, 4)


def test_misspelt_override_at_load_is_refused(tmp_path):
    tiny = DeepseekV3ForCausalLM(tiny_config(num_hidden_layers=1, num_nextn_predict_layers=0))
    tiny.save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="mla_pth"):
        DeepseekV3ForCausalLM.from_pretrained(tmp_path, mla_pth="absorbed")
