"""Checkpoints in the Hub's layout, in and out: names, FP8 blocks, MTP modules, broken files, memory."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from modeling_deepseek import CheckpointError, DeepseekV3Config, DeepseekV3ForCausalLM
from modeling_deepseek.conversion import dequantize_blocks, quantize_blocks, scale_grid
from tests.tiny import FAMILIES, tiny_config, tiny_model, tokens

FP8 = torch.float8_e4m3fn
ROOT = Path(__file__).parents[2]


def tensors_of(folder):
    """Every tensor of a saved checkpoint, and fails where two files hold the same name."""
    tensors = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            assert tensors.setdefault(name, tensor) is tensor, name
    return tensors


def config_of(folder):
    return json.loads((Path(folder) / "config.json").read_text())


def edited(folder, target, edit_tensors=None, edit_config=None):
    """A copy of a checkpoint of one file with its tensors or its configuration changed in place."""
    shutil.copytree(folder, target, dirs_exist_ok=True)
    tensors, config = tensors_of(folder), config_of(folder)
    for edit, values in ((edit_tensors, tensors), (edit_config, config)):
        if edit is not None:
            edit(values)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps(config))
    return target


def assert_equal_states(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        assert torch.equal(one[name], other[name]), name


def logits(model, input_ids=None):
    with torch.no_grad():
        return model(tokens() if input_ids is None else input_ids).logits


# Names. What the releases hold (DeepSeek-V3's README_WEIGHTS.md and index), written out by hand.


def layer_names(config, index, routed):
    yield from ("input_layernorm.weight", "post_attention_layernorm.weight")
    query = ("q_proj",) if config.q_lora_rank is None else ("q_a_proj", "q_a_layernorm", "q_b_proj")
    for name in (*query, "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj"):
        yield f"self_attn.{name}.weight"
    halves = ("gate_proj", "up_proj", "down_proj")
    if not routed:
        yield from (f"mlp.{half}.weight" for half in halves)
        return
    yield "mlp.gate.weight"
    if config.topk_method == "noaux_tc":
        yield "mlp.gate.e_score_correction_bias"
    yield from (f"mlp.shared_experts.{half}.weight" for half in halves)
    yield from (f"mlp.experts.{expert}.{half}.weight" for expert in range(config.n_routed_experts) for half in halves)


def released_names(config):
    """All names of a causal LM. Every layer from `first_k_dense_replace` on routes here."""
    yield from ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
    last = config.num_hidden_layers + config.num_nextn_predict_layers
    for index in range(last):
        for name in layer_names(config, index, index >= config.first_k_dense_replace):
            yield f"model.layers.{index}.{name}"
    for index in range(config.num_hidden_layers, last):
        for name in ("enorm", "hnorm", "eh_proj", "shared_head.norm", "shared_head.head", "embed_tokens"):
            yield f"model.layers.{index}.{name}.weight"


@pytest.mark.parametrize("modules", [0, 1, 2])
@pytest.mark.parametrize("layers", [4, 27, 61])
def test_save_and_load_tensor_by_tensor(layers, modules, tmp_path):
    """Depths around 61, for which alone transformers finds MTP weights; in shards, of which an index tells."""
    model = tiny_model(
        num_hidden_layers=layers, num_nextn_predict_layers=modules, vocab_size=32, hidden_size=16, q_lora_rank=8,
        kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4, intermediate_size=8,
        moe_intermediate_size=8, first_k_dense_replace=2,
    )  # fmt: skip
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    saved, state = tensors_of(tmp_path), model.state_dict()
    assert set(saved) == set(released_names(model.config))

    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(saved)
    assert set(index["weight_map"].values()) == {file.name for file in tmp_path.glob("*.safetensors")}
    assert len(set(index["weight_map"].values())) > 2
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in saved.values())

    for name, tensor in saved.items():
        expert = re.fullmatch(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", name)
        if expert:
            stacked = state[f"{expert[1]}.{'down_proj' if expert[3] == 'down' else 'gate_up_proj'}"][int(expert[2])]
            expected = {"gate": stacked[:8], "up": stacked[8:], "down": stacked}[expert[3]]
        elif name.endswith("shared_head.head.weight"):
            expected = state["lm_head.weight"]
        elif re.search(r"layers\.\d+\.embed_tokens", name):
            expected = state["model.embed_tokens.weight"]
        else:
            expected = state[name]
        assert torch.equal(tensor, expected), name

    assert_equal_states(model, AutoModelForCausalLM.from_pretrained(tmp_path))


# DeepSeek-V3's inference/convert.py, which renames the released tensors for inference/model.py.
OFFICIAL_NAMES = {
    "embed_tokens": "embed",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "q_proj": "wq",
    "q_a_proj": "wq_a",
    "q_a_layernorm": "q_norm",
    "q_b_proj": "wq_b",
    "kv_a_proj_with_mqa": "wkv_a",
    "kv_a_layernorm": "kv_norm",
    "kv_b_proj": "wkv_b",
    "o_proj": "wo",
    "gate": "gate",
    "gate_proj": "w1",
    "down_proj": "w2",
    "up_proj": "w3",
    "norm": "norm",
    "lm_head": "head",
    "scale": "scale",
}


def official_name(name):
    name = name.removeprefix("model.").replace("self_attn", "attn").replace("mlp", "ffn")
    name = name.replace("weight_scale_inv", "scale").replace("e_score_correction_bias", "bias")
    key = name.split(".")[-2]
    return name.replace(key, OFFICIAL_NAMES[key])


def official_parameters(config, fp8):
    """Names of the parameters of inference/model.py: each of its `Linear`s has a scale in FP8."""
    scaled = ("weight", "scale") if fp8 else ("weight",)
    query = ("wq",) if config.q_lora_rank is None else ("wq_a", "wq_b")
    yield from ("embed.weight", "norm.weight", "head.weight")
    for index in range(config.num_hidden_layers):
        layer = f"layers.{index}"
        norms = ("attn_norm", "ffn_norm", "attn.kv_norm", *(("attn.q_norm",) if config.q_lora_rank else ()))
        yield from (f"{layer}.{norm}.weight" for norm in norms)
        linears = [f"attn.{name}" for name in (*query, "wkv_a", "wkv_b", "wo")]
        if index < config.first_k_dense_replace:
            linears += [f"ffn.{name}" for name in ("w1", "w2", "w3")]
        else:
            yield f"{layer}.ffn.gate.weight"
            if config.scoring_func == "sigmoid":
                yield f"{layer}.ffn.gate.bias"
            experts = [f"experts.{expert}" for expert in range(config.n_routed_experts)] + ["shared_experts"]
            linears += [f"ffn.{expert}.{name}" for expert in experts for name in ("w1", "w2", "w3")]
        yield from (f"{layer}.{linear}.{kind}" for linear in linears for kind in scaled)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(("family", "q_lora_rank"), [("v3", 24), ("v3", None), ("v2", 24), ("v2", None)])
def test_official_conversion_finds_every_name(family, q_lora_rank, fp8, tmp_path):
    model = tiny_model(family, q_lora_rank=q_lora_rank)
    model.save_pretrained(tmp_path, fp8=fp8)
    # convert.py skips model.layers.61, the MTP module.
    names = [name for name in tensors_of(tmp_path) if f"layers.{model.config.num_hidden_layers}." not in name]
    assert {official_name(name) for name in names} == set(official_parameters(model.config, fp8))


# FP8 blocks


def test_dequantize_by_hand():
    weight = torch.tensor([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]]).to(FP8)
    scale = torch.tensor([[1.0, 10], [100, 1000]])
    expected = torch.tensor([[1.0, 2, 30], [4, 5, 60], [700, 800, 9000]])
    assert torch.equal(dequantize_blocks(weight, scale, torch.float32, (2, 2)), expected)
    column_pairs = torch.tensor([[1.0, 10], [100, 1000], [2, 3]])  # blocks of one row and two columns
    expected = torch.tensor([[1.0, 2, 30], [400, 500, 6000], [14, 16, 27]])
    assert torch.equal(dequantize_blocks(weight, column_pairs, torch.float32, (1, 2)), expected)


def test_quantize_by_hand():
    """The largest of a block becomes 448, the largest e4m3; all values here are exact in it."""
    weight = torch.tensor([[0.5, -0.25, 7.0], [0.125, 0.0, -3.5], [0.0, 0.0, 1e30]])
    quantized, scale = quantize_blocks(weight, (2, 2))
    assert quantized.dtype == FP8
    assert quantized.float().tolist() == [[448, -224, 448], [112, 0, -224], [0, 0, 448]]
    expected = torch.tensor([[0.5 / 448, 7 / 448], [0, 1e30 / 448]])
    torch.testing.assert_close(scale[:, [0, 1]] * torch.tensor([[1, 1], [0, 1]]), expected, rtol=1e-6, atol=0)
    assert scale[1, 0] > 0  # a block of zeros must not divide by zero
    assert torch.equal(dequantize_blocks(quantized, scale, torch.float32, (2, 2))[2, :2], torch.zeros(2))


@pytest.mark.parametrize(
    ("shape", "grid"),
    [((128, 128), (1, 1)), ((129, 128), (2, 1)), ((576, 7168), (5, 56)), ((192, 64), (2, 1)), ((1, 1), (1, 1))],
)
def test_scale_grid(shape, grid):
    assert scale_grid(shape) == grid


@pytest.mark.parametrize(
    ("rows", "columns", "boundaries"),
    [
        (576, 64, [(127, 0), (128, 1), (511, 3), (512, 4), (575, 4)]),  # the released kv_a_proj_with_mqa
        (192, 64, [(95, 0), (96, 0), (127, 0), (128, 1), (191, 1)]),  # blocks of 128 and 64, not two of 96
    ],
)
def test_ragged_grid_is_of_blocks_of_128(rows, columns, boundaries):
    scale = torch.arange(1.0, scale_grid((rows, columns))[0] + 1)[:, None]
    weight = dequantize_blocks(torch.ones(rows, columns).to(FP8), scale, torch.float32)
    assert weight.shape == (rows, columns)
    for row, block in boundaries:
        assert weight[row].unique().tolist() == [block + 1], row


@pytest.mark.parametrize("grid", [(4, 1), (6, 1), (5, 2), (1, 5)])
def test_wrong_grid_is_refused(grid):
    with pytest.raises(ValueError, match=re.escape(f"{grid}") + r".*\(576, 64\).*\(5, 1\)"):
        dequantize_blocks(torch.ones(576, 64).to(FP8), torch.ones(grid), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e30])
def test_quantize_and_back(magnitude, dtype):
    """Three bits of mantissa: within 1/16 of each value that is not tiny for its block."""
    weight = (torch.randn(200, 300, generator=torch.Generator().manual_seed(0)) * magnitude).to(dtype)
    quantized, scale = quantize_blocks(weight)
    assert scale.shape == (2, 3)
    assert scale.dtype == torch.float32
    back = dequantize_blocks(quantized, scale, torch.float32)
    smallest_normal = torch.kron(scale, torch.ones(128, 128))[:200, :300] * 2.0**-6
    error = (back - weight.float()).abs()
    assert (error <= torch.maximum(weight.float().abs(), smallest_normal) / 16).all()
    # Once in FP8, a second time changes nothing.
    again, same_scale = quantize_blocks(back)
    assert torch.equal(again.float(), quantized.float())
    torch.testing.assert_close(same_scale, scale, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weight_that_is_not_finite_is_not_quantised(bad, tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.experts.gate_up_proj[3, 40, 2] = bad  # row 40 of 2 x 32: in up_proj
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.experts\.3\.up_proj\.weight.*not finite"):
        model.save_pretrained(tmp_path, fp8=True)
    assert not hasattr(model.config, "quantization_config")  # nothing is left behind


# FP8 checkpoints. Sizes with ragged blocks: 576 rows of kv_a_proj_with_mqa, 192 of each expert's gate_proj.
RAGGED = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "moe_intermediate_size": 192, "num_hidden_layers": 2}
QUANTISED = re.compile(r".*\.(self_attn|experts\.\d+|shared_experts|mlp)\.\w+_proj(_with_mqa)?\.weight")
QUANTIZATION_CONFIG = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}


@pytest.fixture(scope="module")
def fp8_checkpoint(tmp_path_factory):
    """A checkpoint as released, (folder, tensors once dequantised): made here, not by the code that is tested."""
    plain, folder = tmp_path_factory.mktemp("plain"), tmp_path_factory.mktemp("fp8")
    tiny_model(dtype="bfloat16", **RAGGED).to(torch.bfloat16).save_pretrained(plain)
    expected = tensors_of(plain)
    generator = torch.Generator().manual_seed(0)

    def quantise(tensors):
        for name, tensor in list(tensors.items()):
            if not QUANTISED.fullmatch(name):
                continue
            rows, columns = tensor.shape
            grid = (rows + 127) // 128, (columns + 127) // 128
            scale = torch.rand(grid, generator=generator) * 0.01 + 0.001
            spread = torch.kron(scale, torch.ones(128, 128))[:rows, :columns]
            tensors[name] = (tensor.float() / spread).clamp(-448, 448).to(FP8)
            tensors[name + "_scale_inv"] = scale
            expected[name] = tensors[name].float() * spread

    edited(plain, folder, quantise, lambda config: config.update(quantization_config=QUANTIZATION_CONFIG))
    assert tensors_of(folder)["model.layers.1.self_attn.kv_a_proj_with_mqa.weight_scale_inv"].shape == (5, 1)
    assert tensors_of(folder)["model.layers.1.mlp.experts.3.up_proj.weight_scale_inv"].shape == (2, 1)
    return folder, expected


@pytest.mark.parametrize(
    ("dtype", "expected_dtype"),
    [
        ({"dtype": torch.float32}, torch.float32),
        ({"dtype": torch.bfloat16}, torch.bfloat16),
        ({"dtype": "float16"}, torch.float16),
        ({"dtype": "auto"}, torch.bfloat16),  # the file's torch_dtype
        ({}, torch.bfloat16),
    ],
    ids=str,
)
def test_fp8_loads_exactly_into_one_dtype(dtype, expected_dtype, fp8_checkpoint, tmp_path):
    folder, expected = fp8_checkpoint
    model = AutoModelForCausalLM.from_pretrained(folder, **dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {expected_dtype}
    assert model.dtype == model.config.dtype == expected_dtype
    assert not hasattr(model.config, "quantization_config")
    assert torch.isfinite(logits(model)).all()

    model.save_pretrained(tmp_path)  # transformers' own class raises here
    saved = tensors_of(tmp_path)
    assert saved.keys() == expected.keys()
    for name, tensor in saved.items():
        wanted = torch.float32 if name.endswith("e_score_correction_bias") else expected_dtype
        assert tensor.dtype == wanted, name
        assert torch.equal(tensor, expected[name].to(wanted)), name
    assert "quantization_config" not in config_of(tmp_path)
    assert config_of(tmp_path)["torch_dtype"] == str(expected_dtype).removeprefix("torch.")


def test_fp8_without_torch_dtype_loads_into_bfloat16(fp8_checkpoint, tmp_path):
    """Whatever the dtype of the tensors that are not in FP8."""

    def widen(tensors):
        for name, tensor in tensors.items():
            if tensor.dtype == torch.bfloat16:
                tensors[name] = tensor.float()

    folder = edited(fp8_checkpoint[0], tmp_path, widen, lambda config: config.pop("torch_dtype"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForSequenceClassification])
def test_fp8_loads_into_other_models(auto_class, fp8_checkpoint):
    model = auto_class.from_pretrained(fp8_checkpoint[0], dtype=torch.float32)
    stack = getattr(model, "model", model)
    name = "layers.1.self_attn.kv_a_proj_with_mqa.weight"
    assert torch.equal(stack.state_dict()[name], fp8_checkpoint[1][f"model.{name}"])


@pytest.mark.parametrize("family", FAMILIES)
def test_save_in_fp8(family, tmp_path):
    """The matrices of the layers and nothing else, as in the releases: not router, norms, embedding, head, eh_proj."""
    model = tiny_model(family, dtype="bfloat16", **RAGGED).to(torch.bfloat16)
    model.save_pretrained(tmp_path, fp8=True)
    assert config_of(tmp_path)["quantization_config"] == QUANTIZATION_CONFIG
    assert config_of(tmp_path)["torch_dtype"] == "bfloat16"
    assert not hasattr(model.config, "quantization_config")
    saved = tensors_of(tmp_path)
    for name, tensor in saved.items():
        if QUANTISED.fullmatch(name):
            assert tensor.dtype == FP8, name
            grid = tuple((size + 127) // 128 for size in tensor.shape)
            assert saved[name + "_scale_inv"].shape == grid
            assert saved[name + "_scale_inv"].dtype == torch.float32
        elif not name.endswith("_scale_inv"):
            assert tensor.dtype == (torch.float32 if name.endswith("_bias") else torch.bfloat16), name
    assert sum(QUANTISED.fullmatch(name) is not None for name in saved) == sum(
        name.endswith("_scale_inv") for name in saved
    )

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    for name, tensor in model.float().state_dict().items():
        largest = tensor.abs().max()
        assert (loaded[name] - tensor).abs().max() <= largest / 16, name


def test_fp8_in_other_files_is_refused(fp8_checkpoint, tmp_path):
    """Nothing there would read the scales."""
    with pytest.raises(ValueError, match="FP8 checkpoint can be loaded from safetensors files only"):
        AutoModelForCausalLM.from_pretrained(**as_pickle(fp8_checkpoint[0], tmp_path))


# Broken checkpoints


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model().save_pretrained(folder)
    return folder


O_PROJ = "model.layers.1.self_attn.o_proj.weight"
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
MTP = "model.layers.3"


def drop(*names):
    return lambda tensors: [tensors.pop(name) for name in names]


def put(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


def change(name, function):
    return lambda tensors: tensors.update({name: function(tensors[name])})


@pytest.mark.parametrize(
    ("edit", "names"),
    [
        (drop(O_PROJ), [O_PROJ, "lacks"]),
        (drop(EXPERT), [EXPERT, "lacks"]),
        (drop("model.embed_tokens.weight"), ["model.embed_tokens.weight", "lacks"]),
        (drop("lm_head.weight"), ["lacks lm_head.weight"]),
        (drop("model.layers.1.mlp.gate.e_score_correction_bias"), ["layers.1.mlp.gate.e_score_correction_bias"]),
        (drop(f"{MTP}.enorm.weight"), [f"{MTP}.enorm.weight", "lacks"]),
        (drop(f"{MTP}.eh_proj.weight"), [f"{MTP}.eh_proj.weight", "lacks"]),
        (put("model.layers.1.mlp.experts.8.up_proj.weight", torch.zeros(32, 64)), ["mlp.experts.8.up_proj.weight"]),
        (put("model.layers.1.self_attn.o_proj.bias", torch.zeros(64)), ["model.layers.1.self_attn.o_proj.bias"]),
        (put("model.layers.7.input_layernorm.weight", torch.zeros(64)), ["model.layers.7.input_layernorm.weight"]),
        (put("extra", torch.zeros(1)), ["extra"]),
        (put("norm.weight", torch.zeros(64)), ["model.norm.weight", "same tensor"]),
        (change(O_PROJ, lambda tensor: tensor[:-1].clone()), [O_PROJ, "(63, 64)", "(64, 64)"]),
        (change(O_PROJ, lambda tensor: tensor.flatten()), [O_PROJ, "(4096,)", "(64, 64)"]),
        (change(EXPERT, lambda tensor: tensor.T.contiguous()), [EXPERT, "(64, 32)", "(32, 64)"]),
        (change(O_PROJ, lambda tensor: tensor.int()), [O_PROJ, "I32"]),
        (change(O_PROJ, lambda tensor: tensor.to(torch.float8_e5m2)), [O_PROJ, "F8_E5M2"]),
        (change(O_PROJ, lambda tensor: tensor.to(FP8)), [O_PROJ, f"{O_PROJ}_scale_inv", "missing"]),
        (change(f"{MTP}.embed_tokens.weight", lambda tensor: tensor + 1), [f"{MTP}.embed_tokens.weight", "differs"]),
        (
            change(f"{MTP}.shared_head.head.weight", lambda tensor: tensor + 1),
            [f"{MTP}.shared_head.head.weight", "differs", "lm_head.weight"],
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_broken_checkpoint_names_the_tensor(edit, names, checkpoint, tmp_path):
    folder = edited(checkpoint, tmp_path, edit)
    with pytest.raises(CheckpointError) as error:
        AutoModelForCausalLM.from_pretrained(folder)
    for name in (*names, str(tmp_path)):
        assert name in str(error.value)


@pytest.mark.parametrize(
    ("edit", "names"),
    [
        (drop(f"{EXPERT}_scale_inv"), [EXPERT, f"{EXPERT}_scale_inv", "missing"]),
        (drop(EXPERT), [EXPERT, "lacks"]),
        (change(EXPERT, lambda tensor: tensor.float()), [f"{EXPERT}_scale_inv"]),  # scales would be left out
        (put("model.norm.weight_scale_inv", torch.ones(1, 1)), ["model.norm.weight_scale_inv"]),
        (put(f"{EXPERT}_scale_inv", torch.ones(1, 1)), [f"{EXPERT}_scale_inv", "(1, 1)", "(192, 64)", "(2, 1)"]),
        (put(f"{EXPERT}_scale_inv", torch.ones(1, 2)), [f"{EXPERT}_scale_inv", "(1, 2)", "(2, 1)"]),
        (put(f"{EXPERT}_scale_inv", torch.ones(2)), [f"{EXPERT}_scale_inv", "(2,)", "(2, 1)"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_broken_fp8_checkpoint_names_the_tensor(edit, names, fp8_checkpoint, tmp_path):
    folder = edited(fp8_checkpoint[0], tmp_path, edit)
    with pytest.raises(CheckpointError) as error:
        AutoModelForCausalLM.from_pretrained(folder)
    for name in (*names, str(tmp_path)):
        assert name in str(error.value)


def test_block_size_of_the_configuration_is_the_one_that_counts(fp8_checkpoint, tmp_path):
    def halve(config):
        config["quantization_config"]["weight_block_size"] = [64, 64]

    folder = edited(fp8_checkpoint[0], tmp_path, edit_config=halve)
    with pytest.raises(CheckpointError, match=r"_scale_inv .*blocks of \(64, 64\)"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(("length", "names"), [(-1, ["model.norm.weight"]), (100, ["too few"]), (0, ["0 bytes"])])
def test_truncated_file(length, names, checkpoint, tmp_path):
    """One byte short, cut in the header, and empty. The last tensor of the file is the final norm."""
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(CheckpointError) as error:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    for name in ("truncated", str(file), *names):
        assert name in str(error.value)


@pytest.fixture
def shards(tmp_path):
    """(folder, files in order, names by file) of a checkpoint in several files."""
    tiny_model().save_pretrained(tmp_path, max_shard_size="200KB")
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 3
    return tmp_path, files, {file: list(load_file(file)) for file in files}


def test_missing_shard(shards):
    folder, files, names = shards
    files[1].unlink()
    with pytest.raises(CheckpointError) as error:
        AutoModelForCausalLM.from_pretrained(folder)
    assert f"{files[1]} is missing" in str(error.value)
    assert any(name in str(error.value) for name in names[files[1]])


def test_truncated_shard(shards):
    folder, files, names = shards
    files[2].write_bytes(files[2].read_bytes()[:-10])
    with pytest.raises(CheckpointError) as error:
        AutoModelForCausalLM.from_pretrained(folder)
    assert f"{files[2]} is truncated" in str(error.value)
    assert any(name in str(error.value) for name in names[files[2]])


def test_tensor_in_two_shards(shards):
    """Which of the two is right cannot be known: a stale file beside a new one looks like this."""
    folder, files, names = shards
    save_file({**load_file(files[1]), names[files[0]][0]: torch.zeros(1)}, files[1], metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=re.escape(f"{names[files[0]][0]} is in two files")):
        AutoModelForCausalLM.from_pretrained(folder)


def test_index_that_leaves_a_shard_out(shards):
    folder, files, _ = shards
    index_file = folder / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != files[1].name}
    index_file.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="lacks model"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_what_older_and_other_checkpoints_hold_besides_is_left_out(checkpoint, tmp_path):
    """Rotary buffers of early releases, and heads of other tasks."""

    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
        tensors["score.weight"] = torch.zeros(2, 64)

    loaded = AutoModelForCausalLM.from_pretrained(edited(checkpoint, tmp_path, add))
    assert_equal_states(loaded, AutoModelForCausalLM.from_pretrained(checkpoint))


# MTP modules at load


@pytest.fixture(scope="module")
def two_modules(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_modules")
    tiny_model(num_nextn_predict_layers=2).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("modules", [0, 1, 2])
def test_modules_are_dropped_at_will(modules, two_modules, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(two_modules, num_nextn_predict_layers=modules)
    whole = AutoModelForCausalLM.from_pretrained(two_modules)
    assert model.config.num_nextn_predict_layers == modules
    assert len(model.model.layers) == 3 + modules
    state = whole.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert torch.equal(logits(model), logits(whole))
    model.save_pretrained(tmp_path)
    assert config_of(tmp_path)["num_nextn_predict_layers"] == modules
    assert set(tensors_of(tmp_path)) == set(released_names(model.config))


def test_modules_that_the_checkpoint_does_not_have_start_afresh(checkpoint, caplog):
    """One more than there is: initialised as a new model is, and said."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, num_nextn_predict_layers=2)
    assert "MTP modules [1] are not in the checkpoint" in caplog.text
    stored, fresh = model.model.layers[3], model.model.layers[4]
    before = AutoModelForCausalLM.from_pretrained(checkpoint).model.layers[3]
    assert_equal_states(stored, before)
    assert torch.equal(fresh.enorm.weight, torch.ones(64))
    assert torch.equal(fresh.mlp.gate.e_score_correction_bias, torch.zeros(8))
    for weight in (fresh.eh_proj.weight, fresh.mlp.experts.gate_up_proj, fresh.self_attn.o_proj.weight):
        assert weight.std().item() == pytest.approx(model.config.initializer_range, rel=0.1)
    loss = model(input_ids=tokens(), labels=tokens()).loss
    assert torch.isfinite(loss)


def test_modules_promised_and_not_there(checkpoint, tmp_path, caplog):
    """As transformers saves a V3: the configuration promises what the file does not have."""

    def drop_module(tensors):
        for name in [name for name in tensors if name.startswith(MTP)]:
            del tensors[name]

    folder = edited(checkpoint, tmp_path, drop_module)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert "num_nextn_predict_layers=1, but the checkpoint has no tensor of layer 3" in caplog.text
    assert model.config.num_nextn_predict_layers == 0
    assert len(model.model.layers) == 3
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(checkpoint)))


def test_module_promised_and_not_there_beside_one_that_is(checkpoint, tmp_path):
    folder = edited(checkpoint, tmp_path, edit_config=lambda config: config.update(num_nextn_predict_layers=2))
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.4\."):
        AutoModelForCausalLM.from_pretrained(folder)


def test_copies_of_a_module_may_be_missing(checkpoint, tmp_path):
    """Embedding and head are shared in memory, so that nothing is lost."""
    folder = edited(checkpoint, tmp_path, drop(f"{MTP}.embed_tokens.weight", f"{MTP}.shared_head.head.weight"))
    assert_equal_states(AutoModelForCausalLM.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(checkpoint))


# Other classes, other ways in


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("v2", {}),
        ("v2", {"topk_method": "greedy", "n_group": 1, "topk_group": 1, "q_lora_rank": None}),
        ("v3", {"num_nextn_predict_layers": 0}),
        ("v3", {"num_nextn_predict_layers": 1}),
        ("v3", {"num_nextn_predict_layers": 0, "tie_word_embeddings": True, "q_lora_rank": None}),
    ],
    ids=str,
)
def test_read_by_transformers_own_class_and_back(family, overrides, tmp_path):
    """Equal logits both ways. Its class leaves MTP modules out and still promises them when it saves."""
    own_class = getattr(transformers, f"Deepseek{family.upper()}ForCausalLM")
    ours = tiny_model(family, **overrides)
    ours.save_pretrained(tmp_path / "ours")
    theirs, info = own_class.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"]
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=0, atol=1e-5)

    theirs.save_pretrained(tmp_path / "theirs")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    assert type(back) is type(ours)
    assert torch.equal(logits(back), logits(ours))
    assert back.config.num_nextn_predict_layers == 0


def test_fresh_model_of_transformers_is_read(tmp_path):
    """With the defaults of its configuration, among them one MTP module that it does not save."""
    fields = {name: value for name, value in tiny_config().to_dict().items() if name != "model_type"}
    config = transformers.DeepseekV3Config(**{**fields, "num_nextn_predict_layers": 1})
    torch.manual_seed(0)
    theirs = transformers.DeepseekV3ForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    assert config_of(tmp_path).keys() & {"num_mtp_layers", "num_nextn_predict_layers"}
    ours = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("head", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
def test_from_one_head_to_another(head, checkpoint, tmp_path):
    """Causal LM -> base model -> classification -> base model: the stack stays. Only a new classification head may
    be missing; a language model without its head is an error."""
    causal = AutoModelForCausalLM.from_pretrained(checkpoint)
    base = AutoModel.from_pretrained(checkpoint)
    assert_equal_states(base, causal.model)
    base.save_pretrained(tmp_path / "base")
    names = {name.removeprefix("model.") for name in released_names(base.config)}
    assert set(tensors_of(tmp_path / "base")) == names - {"lm_head.weight", "layers.3.shared_head.head.weight"}
    assert_equal_states(AutoModel.from_pretrained(tmp_path / "base"), base)
    with pytest.raises(CheckpointError, match=r"lacks lm_head\.weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "base")

    for source in (checkpoint, tmp_path / "base"):
        classifier = head.from_pretrained(source, num_labels=3)
        assert classifier.score.weight.shape == (3, 64)
        assert classifier.score.weight.std().item() == pytest.approx(0.2, rel=0.2)  # initializer_range
        assert classifier.config.num_nextn_predict_layers == 0
    classifier.save_pretrained(tmp_path / "classifier")
    assert_equal_states(head.from_pretrained(tmp_path / "classifier"), classifier)
    assert_equal_states(
        AutoModel.from_pretrained(tmp_path / "classifier"),
        AutoModel.from_pretrained(checkpoint, num_nextn_predict_layers=0),
    )
    with pytest.raises(CheckpointError, match=r"score\.weight.*\(3, 64\).*\(5, 64\)"):
        head.from_pretrained(tmp_path / "classifier", num_labels=5)
    other = head.from_pretrained(tmp_path / "classifier", num_labels=5, ignore_mismatched_sizes=True)
    assert other.score.weight.shape == (5, 64)


@pytest.mark.parametrize("fp8", [False, True])
def test_tied_embeddings(fp8, tmp_path):
    model = tiny_model(tie_word_embeddings=True)
    state = model.state_dict()
    if not fp8:
        del state["lm_head.weight"]  # there or not, it is the embedding
    model.save_pretrained(tmp_path, state_dict=state, fp8=fp8)
    saved = tensors_of(tmp_path)
    assert "lm_head.weight" not in saved
    assert torch.equal(saved[f"{MTP}.shared_head.head.weight"], saved["model.embed_tokens.weight"])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    if not fp8:
        assert_equal_states(loaded, model)


def test_load_state_dict_takes_saved_files(checkpoint):
    """As `Trainer` resumes. Without help the experts would stay as they are, `strict=False` keeping quiet."""
    source, target = AutoModelForCausalLM.from_pretrained(checkpoint), tiny_model(seed=5)
    report = target.load_state_dict(load_file(checkpoint / "model.safetensors"), strict=False)
    assert report.missing_keys == report.unexpected_keys == []
    assert_equal_states(target, source)


def test_load_state_dict_names_a_missing_expert(checkpoint):
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors[EXPERT]
    assert tiny_model().load_state_dict(tensors, strict=False).missing_keys == [EXPERT]
    with pytest.raises(RuntimeError, match=re.escape(EXPERT)):
        tiny_model().load_state_dict(tensors)
    with pytest.raises(ValueError, match=re.escape(EXPERT) + r".*\(2, 2\).*\(32, 64\)"):
        tiny_model().load_state_dict({**tensors, EXPERT: torch.zeros(2, 2)})


def as_state_dict(folder, tmp_path):
    config = AutoModelForCausalLM.from_pretrained(folder).config
    return {"pretrained_model_name_or_path": None, "config": config, "state_dict": tensors_of(folder)}


def as_pickle(folder, tmp_path):
    torch.save(tensors_of(folder), tmp_path / "pytorch_model.bin")
    shutil.copy(folder / "config.json", tmp_path)
    return {"pretrained_model_name_or_path": tmp_path, "use_safetensors": False}


def with_device_map(folder, tmp_path):
    return {"pretrained_model_name_or_path": folder, "device_map": "cpu"}


@pytest.mark.parametrize("way", [as_state_dict, as_pickle, with_device_map])
def test_other_ways_in(way, checkpoint, tmp_path):
    expected = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert_equal_states(type(expected).from_pretrained(**way(checkpoint, tmp_path)), expected)


def test_missing_tensor_in_other_files(checkpoint, tmp_path):
    """transformers would go on with random weights."""
    tensors = tensors_of(checkpoint)
    del tensors[O_PROJ]
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    shutil.copy(checkpoint / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match="lacks " + re.escape(O_PROJ)):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("source", ["checkpoint", "fp8_checkpoint"])
def test_layers_offloaded_to_disk(source, request, tmp_path):
    folder = request.getfixturevalue(source)
    folder = folder[0] if source == "fp8_checkpoint" else folder
    layers = config_of(folder)["num_hidden_layers"] + 1
    device_map = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    device_map |= {f"model.layers.{index}": "disk" if index == 1 else "cpu" for index in range(layers)}
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path)
    assert model.model.layers[1].mlp.experts.gate_up_proj.is_meta
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(folder)))


def test_saving_where_it_was_loaded_from(checkpoint, tmp_path):
    """Tensors may be views of the file that saving replaces; fewer shards than before must leave none behind."""
    expected = AutoModelForCausalLM.from_pretrained(checkpoint)
    expected.save_pretrained(tmp_path, max_shard_size="100KB")
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    assert_equal_states(model, expected)
    assert_equal_states(AutoModelForCausalLM.from_pretrained(tmp_path), expected)


# Memory

LOAD = """
import sys, torch, modeling_deepseek
from transformers import AutoModelForCausalLM

def anonymous():
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(status["RssAnon"].split()[0]) * 1024

AutoModelForCausalLM.from_pretrained(sys.argv[2])  # imports whatever loading imports
print(anonymous(), flush=True)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(sum(parameter.nbytes for parameter in model.parameters()))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads Linux's /proc")
@pytest.mark.parametrize("fp8", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_loading_allocates_little_more_than_the_model(fp8, checkpoint, tmp_path):
    """Memory of the process that is not a file's, watched from outside, so that no lock can hide a peak: a copy of a
    fifth of the model takes longer to write than the time between two looks."""
    model = tiny_model(
        hidden_size=512, intermediate_size=1024, moe_intermediate_size=512, n_routed_experts=32, num_hidden_layers=5,
        vocab_size=4096, num_nextn_predict_layers=0, dtype="bfloat16",
    ).to(torch.bfloat16)  # fmt: skip
    model.save_pretrained(tmp_path, fp8=fp8, max_shard_size="20MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 5
    command = [sys.executable, "-W", "ignore", "-c", LOAD, str(tmp_path), str(checkpoint)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    with process:
        before, peak = int(process.stdout.readline()), 0
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text()
            anonymous = re.search(r"RssAnon:\s+(\d+)", status)
            peak = max(peak, int(anonymous[1]) * 1024 if anonymous else 0)
            time.sleep(0.001)
        size = int(process.stdout.readline())
    assert process.returncode == 0
    assert size > 200e6
    assert 0.8 * size < peak - before < 1.2 * size


def test_where_to_load_from_reaches_the_weights(tmp_path):
    """The configuration takes `subfolder` and its like from the arguments; the weights need them as well."""
    model = tiny_model("v3")
    model.save_pretrained(tmp_path / "inner")
    again = DeepseekV3ForCausalLM.from_pretrained(tmp_path, subfolder="inner")
    torch.testing.assert_close(again(tokens()).logits, model(tokens()).logits, atol=0, rtol=0)


def test_state_dict_without_a_tensor_is_refused():
    model = tiny_model("v3")
    state = model.state_dict()
    del state["model.layers.0.self_attn.o_proj.weight"]
    with pytest.raises(ValueError, match=r"state dict lacks model\.layers\.0\.self_attn\.o_proj\.weight"):
        DeepseekV3ForCausalLM.from_pretrained(None, config=model.config, state_dict=state)


def test_floats_are_not_saved_under_the_name_of_fp8(tmp_path):
    """A small model built from a released configuration keeps its `quantization_config`, but has no FP8 weight."""
    tiny_model("v3").save_pretrained(tmp_path / "fp8", fp8=True)
    config = DeepseekV3Config.from_pretrained(tmp_path / "fp8")
    assert config.quantization_config["quant_method"] == "fp8"
    DeepseekV3ForCausalLM._from_config(config).save_pretrained(tmp_path / "floats")
    assert "quantization_config" not in json.loads((tmp_path / "floats" / "config.json").read_text())


@pytest.mark.parametrize("fp8", [False, True])
def test_the_dtype_of_the_file_is_found_by_auto(tmp_path, fp8):
    """As `transformers serve` asks for it, of the class itself."""
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path, fp8=fp8)
    model = DeepseekV3ForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert model.dtype == model.config.dtype == torch.bfloat16
