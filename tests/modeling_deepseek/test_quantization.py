"""Experts in 4 and 8 bits, against bitsandbytes' own layers, one for each expert's matrix."""

import copy
import json
import logging

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from modeling_deepseek.quantization import DeepseekExperts4bit, DeepseekExperts8bit
from tests.tiny import tiny_model, tokens

# Every width is a multiple of 64: of others bitsandbytes' own layers read wrong scales on CPUs with AVX-512.
WIDE = {"moe_intermediate_size": 64, "q_lora_rank": 64, "kv_lora_rank": 64, "num_hidden_layers": 3}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
FORMATS = {
    "nf4": NF4,
    "fp4": {"load_in_4bit": True},
    "double": {**NF4, "bnb_4bit_use_double_quant": True},
    "storage": {**NF4, "bnb_4bit_quant_storage": "bfloat16", "bnb_4bit_compute_dtype": "bfloat16"},
    "int8": {"load_in_8bit": True},
}
HALVES = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


@pytest.fixture(autouse=True)
def quiet():
    """bitsandbytes warns of each int8 product that rounds its input to float16."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder with a plain model in float32."""
    folder = tmp_path_factory.mktemp("plain")
    tiny_model(**WIDE).save_pretrained(folder)
    return folder


def loaded(folder, name="nf4", **kwargs):
    settings = {**FORMATS[name], **kwargs.pop("settings", {})}
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**settings), **kwargs)


def linear(weight, settings):
    """bitsandbytes' own quantised layer for a weight."""
    config = BitsAndBytesConfig(**settings)
    with torch.device("meta"):
        layer = nn.Linear(*weight.shape[::-1], bias=False)
    if config.load_in_8bit:
        layer = bnb.nn.Linear8bitLt(*weight.shape[::-1], bias=False, has_fp16_weights=False, device="meta")
        layer.weight = bnb.nn.Int8Params(weight.clone(), requires_grad=False).to("cpu")
        return layer
    layer = bnb.nn.Linear4bit(
        *weight.shape[::-1], bias=False, compute_dtype=config.bnb_4bit_compute_dtype, device="meta"
    )
    layer.weight = bnb.nn.Params4bit(
        weight.clone(), requires_grad=False, compress_statistics=config.bnb_4bit_use_double_quant,
        quant_type=config.bnb_4bit_quant_type, quant_storage=config.bnb_4bit_quant_storage, module=layer,
    ).to("cpu")  # fmt: skip
    layer.support_avx512bf16_for_cpu = False
    return layer


def by_expert(experts, settings):
    """{(expert, "gate_proj"): layer, ...} for plain experts."""
    layers = {}
    for name, halves in HALVES.items():
        for expert, stack in enumerate(getattr(experts, name).detach()):
            for half, weight in zip(halves, stack.chunk(len(halves)), strict=True):
                layers[expert, half] = linear(weight.contiguous(), settings)
    return layers


class LoopOfLinears(nn.Module):
    """The reference: routed experts as bitsandbytes' layers, called expert by expert."""

    def __init__(self, experts, settings):
        super().__init__()
        self.layers, self.act_fn = by_expert(experts, settings), experts.act_fn
        for layer in self.layers.values():
            layer.train()  # int8: rows are not quantised, as in training on CPU

    def forward(self, hidden, top_k_index, top_k_weights):
        output = torch.zeros_like(hidden)
        for expert in top_k_index.unique().tolist():
            token, slot = torch.where(top_k_index == expert)
            rows = hidden[token]
            inner = self.act_fn(self.layers[expert, "gate_proj"](rows)) * self.layers[expert, "up_proj"](rows)
            rows = self.layers[expert, "down_proj"](inner) * top_k_weights[token, slot, None]
            output = output.index_add(0, token, rows.to(output.dtype))
        return output


def logits(model, ids=None):
    with torch.no_grad():
        return model(tokens() if ids is None else ids).logits


def same_bits(one, other):
    """Equal where packed values that are stored as floats happen to be NaN, too."""
    return one.dtype == other.dtype and torch.equal(
        one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8)
    )


def relative(one, other):
    return ((one - other).norm() / other.norm()).item()


@pytest.mark.parametrize("name", FORMATS)
def test_every_matrix_has_the_bits_of_bitsandbytes(name, checkpoint):
    plain, model = AutoModelForCausalLM.from_pretrained(checkpoint), loaded(checkpoint, name)
    for index in (1, 2, 3):  # the last is the MTP module
        experts = model.model.layers[index].mlp.experts
        assert type(experts) is (DeepseekExperts8bit if name == "int8" else DeepseekExperts4bit)
        for (expert, half), layer in by_expert(plain.model.layers[index].mlp.experts, FORMATS[name]).items():
            stack = "down_proj" if half == "down_proj" else "gate_up_proj"
            place = HALVES[stack].index(half)
            ours = dict(experts.stored_as(stack, expert, place))
            theirs = layer.state_dict()
            assert ours.keys() == theirs.keys()
            for suffix, tensor in theirs.items():
                assert ours[suffix].shape == tensor.shape, suffix
                assert same_bits(ours[suffix], tensor), suffix


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_logits_are_those_of_a_loop_over_linears(name, dtype, checkpoint):
    plain = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    model = loaded(checkpoint, name, dtype=dtype)
    reference = copy.deepcopy(model)
    for index in (1, 2):
        reference.model.layers[index].mlp.experts = LoopOfLinears(plain.model.layers[index].mlp.experts, FORMATS[name])
    expected, ours = logits(reference), logits(model)
    if dtype == torch.float32 and name != "storage":  # which computes in bfloat16
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    exact = logits(plain)
    assert relative(ours, exact) <= 1.02 * relative(expected, exact) + 1e-3


@pytest.mark.parametrize("name", FORMATS)
def test_saved_and_read_again(name, checkpoint, tmp_path):
    model = loaded(checkpoint, name)
    before = logits(model)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    names = {key for file in tmp_path.glob("*.safetensors") for key in load_file(file)}
    statistics = "SCB" if name == "int8" else "weight.absmax"
    assert f"model.layers.1.mlp.experts.5.up_proj.{statistics}" in names
    assert not any("gate_up_proj" in key for key in names)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), before)
    assert torch.equal(logits(model), before)  # saving left it as it was
    assert model.hf_quantizer is not None
    states = model.state_dict(), again.state_dict()
    assert states[0].keys() == states[1].keys()
    for key, tensor in states[0].items():
        assert same_bits(tensor, states[1][key]), key


@pytest.mark.parametrize("name", ["nf4", "double", "int8"])
def test_checkpoints_written_expert_by_expert_by_others(name, checkpoint, tmp_path):
    """Every matrix as the state of one of bitsandbytes' layers; nothing here is written by the code under test."""
    settings = FORMATS[name]
    tensors = {}
    for key, tensor in load_file(checkpoint / "model.safetensors").items():
        if key.endswith("_proj.weight") or "_proj_with_mqa" in key:
            for suffix, value in linear(tensor, settings).state_dict().items():
                tensors[key.removesuffix("weight") + suffix] = value.clone()
        else:
            tensors[key] = tensor
    config = json.loads((checkpoint / "config.json").read_text())
    # kv_b_proj is quantised, as elsewhere, and eh_proj too.
    config["quantization_config"] = BitsAndBytesConfig(**settings).to_dict()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    skip = {"llm_int8_skip_modules": ["lm_head"]}
    assert torch.equal(logits(model), logits(loaded(checkpoint, name, settings=skip)))
