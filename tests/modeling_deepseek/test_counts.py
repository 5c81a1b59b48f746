"""Counts against the model itself: its tensors, torch's FLOP counter, its cache, its saved files."""

import json
import re
from collections import Counter

import pytest
import torch
import transformers
from safetensors import safe_open
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, DynamicCache, StaticCache

from modeling_deepseek import PRESETS, DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM
from modeling_deepseek.counts import (
    attention_flops,
    cache_bytes_per_token,
    correction_bias_values,
    count_parameters,
    forward_flops,
    linear_flops,
    load_config,
    training_flops,
    weight_bytes,
    weights,
)
from modeling_deepseek.mla import choose_mla_path
from modeling_deepseek.quantization import statistics_bytes
from tests.tiny import FAMILIES, tiny_config, tiny_model, tokens


def preset(name: str, **overrides):
    config_class = DeepseekV2Config if PRESETS[name]["model_type"] == "deepseek_v2" else DeepseekV3Config
    return config_class.from_preset(name, **overrides)


def on_meta(config):
    model_class = DeepseekV2ForCausalLM if config.model_type == "deepseek_v2" else DeepseekV3ForCausalLM
    with torch.device("meta"):
        return model_class(config)


def parameters_of(model) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.named_parameters()}


VARIANTS = {
    "biased": {"attention_bias": True},
    "tied": {"tie_word_embeddings": True},
    "no query compression": {"q_lora_rank": None},
    "every other layer routes": {"num_hidden_layers": 5, "moe_layer_freq": 2},
    "dense": {"n_routed_experts": None, "n_shared_experts": None},
    "no shared experts": {"n_shared_experts": None},
    "three MTP modules": {"num_nextn_predict_layers": 3},
    "sigmoid without a bias": {"topk_method": "greedy"},
}
CONFIGS = {name: (preset, name, {}) for name in PRESETS}
CONFIGS |= {
    f"{family}, {name}": (tiny_config, family, overrides)
    for family in FAMILIES
    for name, overrides in VARIANTS.items()
    if not (family == "v2" and "MTP" in name)
}


@pytest.fixture(params=CONFIGS)
def config(request):
    make, name, overrides = CONFIGS[request.param]
    return make(name, **overrides)


def test_every_tensor_of_the_model_is_listed_with_its_shape(config):
    model = on_meta(config)
    real = Counter()
    for name, shape in parameters_of(model).items():
        found = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", name)
        layer = int(found[1]) if found else -1
        real[found[2] if found else name.removeprefix("model."), tuple(shape), layer >= config.num_hidden_layers] += 1
    listed = Counter()
    for weight in weights(config):
        listed[weight.name, weight.shape, weight.mtp] += weight.layers
    assert listed == real

    count = count_parameters(config)
    assert count.total == sum(parameter.numel() for parameter in model.parameters())
    modules = sum(
        weight.numel() for layer in model.model.layers[config.num_hidden_layers :] for weight in layer.parameters()
    )
    assert count.mtp == modules
    assert count.main == count.total - modules
    experts = count.routed_experts
    met = experts * config.num_experts_per_tok // config.n_routed_experts if experts else 0
    # Tied, the embedding's table is the head that multiplies.
    table = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    assert count.active == count.main - experts + met - table
    biases = [buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]
    assert correction_bias_values(config) == sum(bias.numel() for bias in biases)


def test_parts_are_the_modules_they_are_named_after():
    config = tiny_config("v3")
    model = on_meta(config)
    main = {
        name: shape.numel() for name, shape in parameters_of(model).items() if not name.startswith("model.layers.3.")
    }
    count = count_parameters(config)
    for part, pattern in {
        "embedding": "embed_tokens",
        "attention": r"self_attn\.\w+_proj",
        "dense_mlp": r"layers\.0\.mlp\.",
        "gate": r"mlp\.gate\.",
        "routed_experts": r"mlp\.experts\.",
        "shared_experts": "shared_experts",
        "norms": "norm",
        "head": "lm_head",
    }.items():
        assert getattr(count, part) == sum(n for name, n in main.items() if re.search(pattern, name)), part
    # By hand: of each MoE layer's eight experts, of 3 x 64 x 32 values, a token meets three.
    assert count.active == count.main - count.embedding - 2 * (8 - 3) * 3 * 64 * 32
    assert count.active_mtp == count.mtp - (8 - 3) * 3 * 64 * 32


# Published: totals and active parameters in billions (V2 and V3 papers, README of DeepSeek-V3's weights; Kimi-K2's and
# Moonlight's model cards), and what the counts may differ by, which is the rounding of the published number.
PUBLISHED = [
    ("deepseek-v3", "main", 671, 0.5),
    ("deepseek-v3", "active", 36.7, 0.1),
    ("deepseek-v2", "main", 236, 0.5),
    ("deepseek-v2", "active", 21, 0.5),
    ("deepseek-v2-lite", "main", 15.7, 0.05),
    ("deepseek-v2-lite", "active", 2.4, 0.06),  # 2.45, which the paper cuts
    ("moonlight-16b-a3b", "main", 16, 0.5),
    ("moonlight-16b-a3b", "active", 3, 0.5),
    ("kimi-k2", "main", 1000, 50),
    ("kimi-k2", "active", 32, 0.5),
]


@pytest.mark.parametrize(("name", "what", "billions", "rounding"), PUBLISHED)
def test_published_counts(name, what, billions, rounding):
    assert getattr(count_parameters(preset(name)), what) / 1e9 == pytest.approx(billions, abs=rounding)


def test_published_counts_without_embedding_and_head():
    """Moonlight's card: 15.29B and 2.24B without both. The README of V3's weights: 11.5B and 2.4B for the MTP module,
    which leave out `eh_proj` (0.1B) and, of the latter, count embedding and head."""
    moonlight = count_parameters(preset("moonlight-16b-a3b"))
    assert (moonlight.main - moonlight.embedding - moonlight.head) / 1e9 == pytest.approx(15.29, abs=0.005)
    assert (moonlight.active - moonlight.head) / 1e9 == pytest.approx(2.24, abs=0.005)
    config = preset("deepseek-v3")
    v3, eh_proj = count_parameters(config), 2 * 7168 * 7168
    assert (v3.mtp - eh_proj) / 1e9 == pytest.approx(11.5, abs=0.05)
    assert (v3.active_mtp - eh_proj + v3.embedding + v3.head) / 1e9 == pytest.approx(2.4, abs=0.05)


# FLOPs. Experts one by one and attention written out, so that torch's counter sees every product.


def measured(model, call) -> int:
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        call(model)
    return counter.get_total_flops()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("path", ["expanded", "absorbed"])
@pytest.mark.parametrize("overrides", [{}, {"q_lora_rank": None, "num_nextn_predict_layers": 0}], ids=["", "direct"])
def test_decode_flops_are_torchs(family, path, overrides):
    model = tiny_model(family, mla_path=path, **overrides)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens(1, 20), past_key_values=cache)
        step = measured(model, lambda model: model(tokens(1, 1), past_key_values=cache))
    assert forward_flops(model.config, 1, 21, path) == step


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("path", ["expanded", "absorbed"])
def test_prefill_flops_are_torchs(family, path):
    """Written out, attention computes the whole square; what is counted is its causal half."""
    model = tiny_model(family, mla_path=path)
    with torch.no_grad():
        prefill = measured(model, lambda model: model(tokens(1, 32), logits_to_keep=1))
    masked = model.config.num_hidden_layers * attention_flops(model.config, path, pairs=32 * 31 / 2)
    assert forward_flops(model.config, 32, 32, path) == prefill - masked


def test_training_flops_are_torchs():
    """Forward and backward of loss and MTP loss, without the masked half. The backward pass leaves out nothing but the
    gradient of the embeddings, which no product feeds."""
    ids = tokens(3, 32)
    for modules, passes, every in ((2, 3, 2), (2, 1, 1), (1, 3, 1)):  # of the first two modules one is dense
        model = tiny_model("v3", num_nextn_predict_layers=modules, mtp_passes=passes, moe_layer_freq=every).train()
        step = measured(model, lambda model: model(ids, labels=ids, use_cache=False).loss.backward())
        assert training_flops(model.config, 32, causal=False) * 96 == step
    without = tiny_model("v3", num_nextn_predict_layers=0).train()
    step = measured(without, lambda model: model(ids, labels=ids, use_cache=False).loss.backward())
    assert training_flops(model.config, 32, causal=False, mtp=False) * 96 == step


def test_flops_of_training_over_frozen_weights_are_torchs():
    """Gradients reach the embedding through all of the model, and are asked of nothing else."""
    model = tiny_model("v3", num_nextn_predict_layers=0).train().requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)
    ids = tokens(3, 32)
    step = measured(model, lambda model: model(ids, labels=ids, use_cache=False).loss.backward())
    assert training_flops(model.config, 32, causal=False, frozen=True) * 96 == step


def test_auto_is_the_path_that_the_model_takes():
    config = preset("deepseek-v3")
    for context in (64, 512, 8192):
        for new in (1, 16, 64, 160, 180, 400, 8192):
            if new > context:
                continue
            path = choose_mla_path(config, new, context)
            assert forward_flops(config, new, context) == forward_flops(config, new, context, path), (new, context)


def test_six_flops_for_each_active_parameter():
    """The rule of thumb, with what it leaves out: norms multiply nothing here."""
    config = preset("deepseek-v3")
    count = count_parameters(config)
    active_matrices = count.active - count.norms
    assert linear_flops(config) == 2 * active_matrices
    assert training_flops(config, 1, mtp=False) == pytest.approx(6 * count.active, rel=1e-3)


# Bytes


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_cache_bytes_are_those_of_its_tensors(kind, name):
    model = tiny_model("v3").to(DTYPES[name])
    cache = kind(model.config, max_cache_len=24) if kind is StaticCache else kind(config=model.config)
    with torch.no_grad():
        model(tokens(2, 24), past_key_values=cache)
    layers = [layer for layer in cache.layers if layer.is_initialized]
    held = sum(tensor.nbytes for layer in layers for tensor in (layer.keys, layer.values))
    assert cache_bytes_per_token(model.config, name) * 2 * 24 == held


def test_cache_bytes_published():
    """V3: 61 x 576 values. V2: 93.3 % less than DeepSeek 67B (95 layers, 8 groups of keys and values of 128)."""
    assert cache_bytes_per_token(preset("deepseek-v3")) == 70272
    assert cache_bytes_per_token(preset("deepseek-v3"), mtp=True) == 62 * 576 * 2
    # The paper's own line quantises V2's cache to 6 bits on average.
    ours, dense = cache_bytes_per_token(preset("deepseek-v2")) * 6 / 16, 95 * 2 * 8 * 128 * 2
    assert 1 - ours / dense == pytest.approx(0.933, abs=0.001)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_weight_bytes_are_those_of_the_tensors(family, name):
    model = tiny_model(family).to(DTYPES[name])
    held = sum(parameter.nbytes for parameter in model.parameters())
    held += sum(buffer.nbytes for name, buffer in model.named_buffers() if "bias" in name)
    assert weight_bytes(model.config, name) == held


@pytest.mark.parametrize("sizes", [{}, {"moe_intermediate_size": 136, "hidden_size": 200, "intermediate_size": 300}])
def test_fp8_bytes_are_those_of_the_saved_file(tmp_path, sizes):
    """Widths that 128 does not divide among them: the scales of gate and up are counted apart."""
    model = tiny_model("v3", **sizes).to(torch.bfloat16)
    model.save_pretrained(tmp_path, fp8=True)
    stored = 0
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118  # not a dict
            if not re.search(r"layers\.3\.(embed_tokens|shared_head\.head)", name):
                stored += file.get_tensor(name).nbytes
    assert weight_bytes(model.config, "fp8") == stored


QUANTISED = {
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-dq": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
}


@pytest.mark.parametrize("dtype", QUANTISED)
@pytest.mark.parametrize("family", FAMILIES)
def test_quantised_bytes_are_those_that_bitsandbytes_holds(tmp_path, family, dtype, caplog):
    """Of widths that blocks of 64 values divide, and of 96, which leave a part of one."""
    sizes = {"moe_intermediate_size": 96, "q_lora_rank": 64, "kv_lora_rank": 64, "num_hidden_layers": 3}
    tiny_model(family, **sizes).to(torch.bfloat16).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=BitsAndBytesConfig(**QUANTISED[dtype])
    )
    held = sum(parameter.nbytes for parameter in model.parameters()) + statistics_bytes(model)
    held += sum(buffer.nbytes for name, buffer in model.named_buffers() if not name.endswith("inv_freq"))
    assert weight_bytes(model.config, dtype) == held


def test_unknown_dtypes_are_refused():
    with pytest.raises(ValueError, match="unknown weight dtype 'int3', did you mean 'int8'; one of fp32, bf16"):
        weight_bytes(tiny_config(), "int3")
    with pytest.raises(ValueError, match="unknown cache dtype 'nf4'; one of fp32, bf16"):
        cache_bytes_per_token(tiny_config(), "nf4")


# What is asked about


def test_configurations_are_found(tmp_path):
    config = tiny_config("v2")
    config.save_pretrained(tmp_path)
    found = load_config(tmp_path)
    assert isinstance(found, DeepseekV2Config)
    assert found.hidden_size == 64
    assert load_config(config) is config
    kimi = json.loads((tmp_path / "config.json").read_text()) | {"model_type": "kimi_k2", "topk_method": "noaux_tc"}
    (tmp_path / "config.json").write_text(json.dumps(kimi))
    assert isinstance(load_config(tmp_path), DeepseekV3Config)
    assert isinstance(load_config(tmp_path / "config.json"), DeepseekV3Config)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="is a 'llama'; this package knows deepseek_v2"):
        load_config(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has no config\.json that names"):
        load_config(tmp_path)
    for name in ("./mistyped", "/mistyped", "~/mistyped"):  # no Hub id
        with pytest.raises(ValueError, match=rf"unknown model '{name}'; one of .* or a folder or Hub id with"):
            load_config(name)


def test_transformers_own_configurations_are_read():
    theirs = transformers.DeepseekV3Config(num_nextn_predict_layers=1, n_routed_experts=64)
    ours = DeepseekV3Config(num_nextn_predict_layers=1, n_routed_experts=64)
    assert count_parameters(theirs) == count_parameters(ours)
    with pytest.raises(ValueError, match="LlamaConfig is a 'llama'; this package knows"):
        count_parameters(transformers.LlamaConfig())


def test_flops_of_impossible_shapes_are_refused():
    for new, context in ((0, 8), (9, 8)):
        with pytest.raises(ValueError, match=rf"`new_tokens` must lie in \[1, `context_tokens` 8\], got {new}"):
            forward_flops(tiny_config(), new, context)
    with pytest.raises(ValueError, match="unknown path 'absorb', did you mean 'absorbed'"):
        forward_flops(tiny_config(), 1, 8, "absorb")
