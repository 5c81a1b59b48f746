"""Experts in 4 and 8 bits, against bitsandbytes' own layers, one for each expert's matrix."""

import copy
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig
from transformers.integrations.accelerate import compute_module_sizes
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3ForCausalLM as Theirs

from modeling_deepseek import CheckpointError, DeepseekV3Config, DeepseekV3ForCausalLM, quantization
from modeling_deepseek.moe import DeepseekExperts
from modeling_deepseek.quantization import DeepseekExperts4bit, DeepseekExperts8bit
from tests.tiny import tiny_config, tiny_model, tokens

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
ROOT = Path(__file__).parents[2]
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


@pytest.fixture(scope="module")
def in_4_bits(checkpoint, tmp_path_factory):
    """The same, quantised."""
    folder = tmp_path_factory.mktemp("nf4")
    loaded(checkpoint).save_pretrained(folder)
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


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in FORMATS), ("storage", torch.bfloat16), ("int8", torch.bfloat16)],
)
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


@pytest.mark.parametrize("name", ["double", "int8"])
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


def plain_twin(experts, config):
    """Unquantised experts with the weights that quantised ones stand for."""
    plain = DeepseekExperts(config)
    for name in HALVES:
        weight = torch.stack([experts.dequantized(name, [expert], torch.float32)[0] for expert in range(8)])
        setattr(plain, name, nn.Parameter(weight))
    return plain


def routed(experts, seed=0, n_tokens=24):
    """Rows, choices and weights that leave two of eight experts without a row."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n_tokens, 64, generator=generator)
    choices = torch.stack([torch.randperm(8, generator=generator)[:3] for _ in range(n_tokens)])
    return rows, choices.masked_fill((choices == 2) | (choices == 5), 6), torch.rand(n_tokens, 3, generator=generator)


class Sizes(TorchDispatchMode):
    """Remembers the most values of a floating tensor that an operation made."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.is_floating_point():
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize("name", ["double", "int8"])
@pytest.mark.parametrize("group", [1, 3, 100])
def test_products_and_gradients_by_groups_of_experts(name, group, checkpoint, monkeypatch):
    monkeypatch.setattr(quantization, "CPU_WORKSPACE", group * 128 * 64 * 4)
    model = loaded(checkpoint, name)
    experts = model.model.layers[1].mlp.experts
    plain = plain_twin(experts, model.config)
    rows, choices, weights = routed(experts)
    if name == "int8":
        half = [tensor.half() if tensor.is_floating_point() else tensor for tensor in (20 * rows, choices, weights)]
        expected = plain(20 * rows, choices, weights)
        assert relative(experts(*half).float(), expected) < 5e-3  # 127 times as much would be infinite
    ours, theirs = rows.clone().requires_grad_(), rows.clone().requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x), Sizes() as mode:
        output = experts(ours, choices, weights)
    expected = plain(theirs, choices, weights)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    with mode:
        output.backward(gradient)
    expected.backward(gradient)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)
    assert max(saved) <= 24 * 3 * 128  # rows, never a weight: one expert's has 8,192 values, and there are eight
    assert mode.largest <= max(24 * 3 * 128, min(group, 6) * 128 * 64)
    assert all(parameter.grad is None for parameter in experts.parameters())


@pytest.mark.parametrize("name", ["nf4", "fp4", "double", "storage"])
def test_kernel_for_a_few_rows_gives_the_same(name, checkpoint, monkeypatch):
    """On CPU bitsandbytes has a plain version of it."""
    experts = loaded(checkpoint, name).model.layers[1].mlp.experts
    rows, choices, weights = routed(experts, n_tokens=5)
    expected = experts(rows, choices, weights)
    assert experts.fused_rows("down_proj", torch.device("cuda")) == 4
    assert experts.fused_rows("down_proj", torch.device("cpu")) == 0
    called = []
    fused = DeepseekExperts4bit.fused_product
    monkeypatch.setattr(DeepseekExperts4bit, "fused_rows", lambda *_: 4)
    monkeypatch.setattr(DeepseekExperts4bit, "fused_product", lambda *args: called.append(1) or fused(*args))
    torch.testing.assert_close(experts(rows, choices, weights), expected, rtol=1e-5, atol=1e-5)
    assert called


@pytest.mark.parametrize("shape", [(24, 40), (32, 32), (96, 96), (8, 24)], ids=str)
def test_widths_that_are_no_multiple_of_a_block(shape):
    """Of rows of 32 or 96 values bitsandbytes reads wrong scales on CPUs with AVX-512, and the last block of 24 x 40
    and 8 x 24 values is not full."""
    width, hidden = shape
    config = tiny_config(hidden_size=hidden, moe_intermediate_size=width)
    torch.manual_seed(0)
    plain = DeepseekExperts(config)
    for settings in (NF4, FORMATS["double"]):
        with torch.device("meta"):
            meta = DeepseekExperts(config)
        experts = DeepseekExperts4bit(meta, BitsAndBytesConfig(**settings))
        code = bnb.functional.get_4bit_type("nf4", "cpu")
        for name, halves in HALVES.items():
            for expert in range(8):
                for half, weight in enumerate(getattr(plain, name)[expert].detach().chunk(len(halves))):
                    experts.put(name, expert, half, *experts.quantize(weight))
            ours = experts.dequantized(name, list(range(8)), torch.float32)
            assert relative(ours, getattr(plain, name)) < 0.11
            if settings is NF4:  # by hand: each value's entry of the code times the largest of its block of 64
                packed = getattr(experts, name).data
                values = code[torch.stack([packed >> 4, packed & 15], dim=-1).flatten(2).int()]
                spread = getattr(experts, name).quant_state.absmax.repeat_interleave(64, dim=-1)[
                    ..., : values.shape[-1]
                ]
                torch.testing.assert_close(ours.flatten(), (values * spread).flatten(), rtol=0, atol=1e-7)


def test_workspace_on_cpu_does_not_change_what_is_quantised(checkpoint, monkeypatch):
    states = []
    for chunk in (2**18, 1024):
        monkeypatch.setattr(quantization, "_CHUNK", chunk)
        states.append(loaded(checkpoint, "double").state_dict())
    for key, tensor in states[0].items():
        assert same_bits(tensor, states[1][key]), key


def test_linear_layers_have_the_bits_of_bitsandbytes(checkpoint):
    stored = load_file(checkpoint / "model.safetensors")
    for name in ("nf4", "double", "storage", "int8"):
        for path, module in loaded(checkpoint, name).named_modules():
            if not isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)):
                continue
            expected = linear(stored[f"{path}.weight"], FORMATS[name]).state_dict()
            found = module.state_dict()
            assert found.keys() == expected.keys(), path
            assert all(same_bits(found[suffix], expected[suffix]) for suffix in expected), path


def test_what_is_quantised_and_what_is_not(checkpoint):
    model = loaded(checkpoint)
    kinds = {path: type(module).__name__ for path, module in model.named_modules()}
    assert kinds["lm_head"] == "Linear"
    for index in range(4):
        assert kinds[f"model.layers.{index}.self_attn.kv_b_proj"] == "Linear"
        assert kinds[f"model.layers.{index}.self_attn.o_proj"] == "Linear4bit"
    assert kinds["model.layers.3.eh_proj"] == kinds["model.layers.0.mlp.gate_proj"] == "Linear4bit"
    assert kinds["model.layers.1.mlp.shared_experts.up_proj"] == "Linear4bit"
    gate = model.model.layers[1].mlp.gate
    plain = AutoModelForCausalLM.from_pretrained(checkpoint).model.layers[1].mlp.gate
    assert torch.equal(gate.weight, plain.weight)
    assert torch.equal(gate.e_score_correction_bias, plain.e_score_correction_bias)
    assert model.config.quantization_config.llm_int8_skip_modules == ["lm_head", "score", "kv_b_proj"]


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_absorbed_attention_reads_a_quantised_kv_b_proj(name, checkpoint):
    skip = {"llm_int8_skip_modules": ["lm_head"]}
    model = loaded(checkpoint, name, settings=skip)
    attention = model.model.layers[1].self_attn
    assert type(attention.kv_b_proj).__module__.startswith("bitsandbytes")
    answer = attention.train().kv_b_proj(torch.eye(64)).T  # to the unit vectors
    for _ in range(2):  # the first forward pass of int8 moves its scales
        assert relative(attention.kv_b_weight(torch.device("cpu")).flatten(0, 1), answer) < 1e-6
        model.eval()
        logits(model)
    if name == "nf4":  # int8 rounds the rows, of the latents here and of the queries there
        model.config.mla_path = "expanded"
        expanded = logits(model)
        model.config.mla_path = "absorbed"
        torch.testing.assert_close(logits(model), expanded, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["nf4", "double", "int8"])
def test_bytes(name, checkpoint):
    plain, model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16), loaded(checkpoint, name)
    experts = model.model.layers[1].mlp.experts
    state = experts.state_dict()
    bound = {"nf4": 0.5 + 4 / 64, "double": 0.5 + 1 / 64 + 4 / 64**2, "int8": 1 + 4 / 64}[name]  # bytes of a value
    values = 8 * 3 * 64 * 64
    # Matrices of 64 x 64 have 64 scales, a quarter of a block of scales, with an offset and a scale of their own.
    small = 8 * 3 * (4 + 4 - 4 * 64 / 256 * 1) if name == "double" else 0
    held = sum(tensor.nbytes for tensor in state.values())
    assert held <= bound * values + small + 1
    if name != "int8":
        assert held <= 0.30 * 2 * values
    statistics = 0
    for module in model.modules():
        if isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt, DeepseekExperts4bit)):
            own = {key: tensor for key, tensor in module.state_dict().items() if "absmax" in key or "offset" in key}
            own |= {key: tensor for key, tensor in module.state_dict().items() if key == "SCB"}
            statistics += sum(tensor.nbytes for tensor in own.values())
            if name == "double" and isinstance(module, bnb.nn.Linear4bit):
                statistics += 4  # the offset, which is saved within `quant_state`
    there = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    assert model.get_memory_footprint() == there + statistics
    assert model.num_parameters() >= plain.num_parameters()
    if name != "int8":
        assert model.num_parameters() == plain.num_parameters()


def test_fp8_checkpoint_straight_into_4_and_8_bits(checkpoint, tmp_path):
    """As if the same FP8 values had been stored in bfloat16."""
    fp8, bf16 = tmp_path / "fp8", tmp_path / "bf16"
    AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).save_pretrained(fp8, fp8=True)
    AutoModelForCausalLM.from_pretrained(fp8).save_pretrained(bf16)
    for name in ("double", "int8"):
        one, other = loaded(fp8, name), loaded(bf16, name)
        assert one.dtype == torch.bfloat16
        assert one.config.quantization_config.quant_method == "bitsandbytes"
        states = one.state_dict(), other.state_dict()
        assert states[0].keys() == states[1].keys()
        for key, tensor in states[0].items():
            assert same_bits(tensor, states[1][key]), key
        one.save_pretrained(tmp_path / name)
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / name)), logits(one))


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_dequantized_model_is_a_plain_one(name, checkpoint, tmp_path):
    model = loaded(checkpoint, name)
    before = logits(model)
    model.save_pretrained(tmp_path / "quantized")  # leaves the name of the dtype in the configuration
    experts = {index: plain_twin(model.model.layers[index].mlp.experts, model.config) for index in (1, 2, 3)}
    model.dequantize()
    for index, twin in experts.items():
        for stack in HALVES:
            assert torch.equal(getattr(model.model.layers[index].mlp.experts, stack), getattr(twin, stack))
    if name == "nf4":  # bitsandbytes' int8 layers round what comes in, too
        torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    assert {type(module) for module in model.modules() if isinstance(module, nn.Linear)} == {nn.Linear}
    model.save_pretrained(tmp_path / "plain")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert not hasattr(again.config, "quantization_config")
    assert torch.equal(logits(again), logits(model))


def test_dequantized_in_another_dtype(checkpoint):
    whole = loaded(checkpoint).dequantize().state_dict()
    for dtype in (torch.bfloat16, "bfloat16"):
        model = loaded(checkpoint).dequantize(dtype)
        assert torch.isfinite(logits(model)).all()
        for key, tensor in model.state_dict().items():
            expected = whole[key] if key.endswith("e_score_correction_bias") else whole[key].bfloat16()
            assert same_bits(tensor, expected), key


def test_a_dictionary_says_the_same(checkpoint):
    settings = {"quant_method": "bitsandbytes", **NF4}
    model = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=settings)
    assert torch.equal(logits(model), logits(loaded(checkpoint)))
    assert model.config.quantization_config.llm_int8_skip_modules == ["lm_head", "score", "kv_b_proj"]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")  # PEFT calls it
@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_prepared_for_training_with_adapters(name, checkpoint):
    model = loaded(checkpoint, name, dtype=torch.bfloat16, settings={"bnb_4bit_compute_dtype": "bfloat16"})
    logits(model)  # inference first: bitsandbytes would rearrange its layers, which then pass no gradient on
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    # The only trained part is in the first layer: all its gradient comes through quantised experts and layers.
    config = LoraConfig(r=4, target_modules=["o_proj"], layers_to_transform=[0], layers_pattern="layers")
    model = get_peft_model(model, config).train()
    trained = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    after = model.get_base_model().state_dict()
    for key, tensor in before.items():
        if ".experts." in key:
            assert same_bits(tensor, after[key]), key


def test_inference_leaves_layers_as_they_were(checkpoint, tmp_path):
    """With AVX512-BF16, bitsandbytes' layers are rearranged by inference, are saved with scales in wrong places then,
    and pass no gradient on."""
    model = loaded(checkpoint)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    logits(model)
    for key, tensor in model.state_dict().items():
        assert same_bits(tensor, before[key]), key
    layer = model.model.layers[0].self_attn.o_proj
    rows = torch.randn(3, 64, requires_grad=True)
    layer(rows).sum().backward()
    assert rows.grad is not None


def test_state_dict_goes_into_another_model(checkpoint):
    one = loaded(checkpoint, "double")
    other = loaded(checkpoint, "double").model.layers[2].mlp.experts
    source = one.model.layers[1].mlp.experts
    state = source.state_dict()
    rows, choices, weights = routed(source)
    assert not torch.equal(source(rows, choices, weights), other(rows, choices, weights))
    other.load_state_dict(state)
    assert torch.equal(source(rows, choices, weights), other(rows, choices, weights))
    with pytest.raises(RuntimeError, match=r"down_proj\.nested_absmax"):
        other.load_state_dict({key: tensor for key, tensor in state.items() if key != "down_proj.nested_absmax"})


@pytest.mark.parametrize("name", ["double", "int8"])
def test_copies_and_casts(name, checkpoint):
    model = loaded(checkpoint, name)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model))
    experts = model.model.layers[1].mlp.experts
    before = {key: tensor.clone() for key, tensor in experts.state_dict().items()}
    experts.to(torch.bfloat16)
    for key, tensor in experts.state_dict().items():
        assert same_bits(tensor, before[key]), key
    with pytest.raises(ValueError, match="cannot cast a bitsandbytes model"):
        model.to(torch.bfloat16)


def test_generates_and_trains_mtp_modules(checkpoint):
    model = loaded(checkpoint)
    output = model.generate(tokens(), max_new_tokens=4, do_sample=False, attention_mask=torch.ones_like(tokens()))
    full = logits(model, output[:, :-1])[:, -1].argmax(dim=-1)
    assert torch.equal(full, output[:, -1])
    result = model.train()(tokens(), labels=tokens())
    assert len(result.mtp_losses) == 1
    assert torch.isfinite(result.loss)


def test_sequence_classification_keeps_its_new_head(checkpoint):
    model = AutoModelForSequenceClassification.from_pretrained(
        checkpoint, num_labels=3, quantization_config=BitsAndBytesConfig(**NF4)
    )
    assert type(model.score) is nn.Linear
    assert type(model.model.layers[1].mlp.experts) is DeepseekExperts4bit
    assert model(tokens()[:1]).logits.shape == (1, 3)


def test_experts_that_are_left_out(checkpoint, tmp_path):
    skip = {"llm_int8_skip_modules": ["lm_head", "kv_b_proj", "model.layers.1.mlp.experts"]}
    model = loaded(checkpoint, settings=skip)
    assert type(model.model.layers[1].mlp.experts) is DeepseekExperts
    assert type(model.model.layers[2].mlp.experts) is DeepseekExperts4bit
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))
    for pattern in ("down_proj", "model.layers.1.mlp.experts.3", "experts.0.gate_proj"):
        with pytest.raises(ValueError, match="together or not at all"):
            loaded(checkpoint, settings={"llm_int8_skip_modules": [pattern]})


def test_what_cannot_be(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="llm_int8_has_fp16_weight"):
        loaded(checkpoint, "int8", settings={"llm_int8_has_fp16_weight": True})
    with pytest.raises(ValueError, match="without adapters, quantisation"):
        loaded(checkpoint).save_pretrained(tmp_path, fp8=True)
    with pytest.raises(ValueError, match="cannot start from random weights"):
        loaded(checkpoint, num_nextn_predict_layers=2)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    with pytest.raises(ValueError, match="from safetensors files only"):
        DeepseekV3ForCausalLM.from_pretrained(
            None, config=model.config, state_dict=model.state_dict(), quantization_config=BitsAndBytesConfig(**NF4)
        )


@pytest.mark.parametrize(
    ("device_map", "expected"),
    [
        (None, "cpu"),
        ({"": "cpu"}, "cpu"),
        ({"": 0}, "cuda:0"),
        ({"model.layers.1": 1, "": 0}, "cuda:1"),
        ({"model.layers.1": "cpu", "": 0}, "stay on the device"),
        ({"model.layers.1": "disk", "": "cpu"}, "stay on the device"),
    ],
)
def test_devices(device_map, expected):
    place = "model.layers.1.mlp.experts.down_proj"
    if expected.startswith("c"):
        assert str(quantization.device_of(place, device_map)) == expected
        return
    with pytest.raises(ValueError, match=expected):
        quantization.device_of(place, device_map)


def test_automatic_device_map_counts_quantised_bytes(checkpoint):
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(AutoConfig.from_pretrained(checkpoint))
    model.config.quantization_config = BitsAndBytesConfig(**NF4)
    model.is_quantized = True
    whole = compute_module_sizes(model)[0]["model.layers.1.mlp.experts"]
    model._get_dtype_plan(torch.float32)
    assert compute_module_sizes(model)[0]["model.layers.1.mlp.experts"] == whole / 8
    assert loaded(checkpoint, device_map="auto").device.type in ("cpu", "cuda")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.experts.3.up_proj.weight"), "lacks model.layers.1.mlp.experts.3.up_proj"),
        (lambda t: t.pop("model.layers.1.mlp.experts.3.up_proj.weight.absmax"), "missing or incomplete"),
        (lambda t: t.pop("model.layers.1.self_attn.o_proj.weight.absmax"), "missing or incomplete"),
        (
            lambda t: t.update({"model.layers.1.self_attn.o_proj.weight": torch.zeros(100, 1, dtype=torch.uint8)}),
            r"o_proj.weight in .* has shape \(100, 1\)",
        ),
        (
            lambda t: t.update({"model.layers.1.mlp.experts.3.up_proj.weight": torch.zeros(9, 1, dtype=torch.uint8)}),
            r"experts.3.up_proj.weight in .* has shape \(9, 1\)",
        ),
        (lambda t: t.update({"model.layers.9.weight.absmax": torch.zeros(1)}), "holds model.layers.9.weight.absmax"),
    ],
)
def test_broken_files(edit, message, in_4_bits, tmp_path):
    shutil.copy(in_4_bits / "config.json", tmp_path)
    tensors = load_file(in_4_bits / "model.safetensors")
    edit(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_experts_stored_whole_or_stacked_beside_quantised_layers(checkpoint, tmp_path):
    """As transformers' own class saves a model whose linear layers it has quantised: they are quantised on the way."""
    theirs = Theirs.from_pretrained(checkpoint, quantization_config=BitsAndBytesConfig(**NF4))
    theirs.config.quantization_config.llm_int8_skip_modules = ["lm_head"]
    theirs.save_pretrained(tmp_path)
    stored = {key for file in tmp_path.glob("*.safetensors") for key in load_file(file)}
    assert any(key.endswith("o_proj.weight.absmax") for key in stored)
    assert not any("experts." in key and "absmax" in key and "shared" not in key for key in stored)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, num_nextn_predict_layers=0)
    expected = loaded(checkpoint, settings={"llm_int8_skip_modules": ["lm_head"]}, num_nextn_predict_layers=0)
    assert torch.equal(logits(model), logits(expected))


# In a process that has never heard of this package; prints the kinds of the experts and saves the logits.
STRANGER = """
import sys
sys.modules["modeling_deepseek"] = None
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
root = sys.argv[1]
config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
model = AutoModelForCausalLM.from_pretrained(root + "/whole", trust_remote_code=True, quantization_config=config)
with torch.no_grad():
    torch.save(model(torch.load(root + "/ids.pt")).logits, root + "/quantized_there.pt")
model = AutoModelForCausalLM.from_pretrained(root + "/quantized", trust_remote_code=True)
with torch.no_grad():
    torch.save(model(torch.load(root + "/ids.pt")).logits, root + "/stored.pt")
print(type(model.model.layers[1].mlp.experts).__name__)
"""


def test_code_that_travels_quantises_too(checkpoint, tmp_path):
    torch.save(tokens(), tmp_path / "ids.pt")
    AutoModelForCausalLM.from_pretrained(checkpoint).save_pretrained(tmp_path / "whole", save_code=True)
    model = loaded(checkpoint)
    model.save_pretrained(tmp_path / "quantized", save_code=True)
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""}
    command = [sys.executable, "-I", "-W", "ignore", "-c", STRANGER, str(tmp_path)]
    output = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert output.returncode == 0, output.stderr
    assert output.stdout.split()[-1] == "DeepseekExperts4bit"
    for name in ("quantized_there", "stored"):
        torch.testing.assert_close(torch.load(tmp_path / f"{name}.pt"), logits(model), rtol=0, atol=1e-6)


# Peak of anonymous memory, so that pages of the file that are merely mapped do not count; weights that stay as they
# are in the file are such pages, and are counted on top.
_LOAD = """
import sys, threading, torch
import modeling_deepseek, modeling_deepseek.modeling_deepseek, bitsandbytes, accelerate
import transformers.quantizers.quantizer_bnb_4bit, transformers.integrations.bitsandbytes
from transformers import BitsAndBytesConfig
from transformers.utils import logging
logging.disable_progress_bar()
bitsandbytes.functional.quantize_4bit(torch.randn(64, 64))

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

peak, done = 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous())

start = anonymous()
watcher = threading.Thread(target=watch)
watcher.start()
settings = {"load_in_8bit": True} if sys.argv[2] == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
model = modeling_deepseek.DeepseekV3ForCausalLM.from_pretrained(
    sys.argv[1], device_map={"": "cpu"}, quantization_config=BitsAndBytesConfig(**settings)
)
done.set()
watcher.join()
mapped = sum(p.nbytes for p in model.parameters() if p.dtype == torch.bfloat16) if sys.argv[3] == "True" else 0
print(max(peak, anonymous()) - start + mapped, model.get_memory_footprint())
"""


def peak_and_final(folder, bits, mapped):
    """Bytes at most in use while a checkpoint is loaded in "nf4" or "int8" on CPU, and of the model. `mapped` counts
    the weights that stay in bfloat16 as pages of the file, not as memory of the process."""
    command = [sys.executable, "-c", _LOAD, str(folder), bits, str(mapped)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    peak, final = map(int, output.split()[-2:])
    return peak, final


@pytest.mark.slow  # a model of 380 MB, which one core quantises in 20 s
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
@pytest.mark.parametrize("bits", ["nf4", "int8"])
@pytest.mark.parametrize("fp8", [False, True])
def test_loading_takes_little_more_than_the_result(bits, fp8, tmp_path):
    config = DeepseekV3Config(
        vocab_size=1024, hidden_size=1024, intermediate_size=2048, moe_intermediate_size=512, n_routed_experts=24,
        num_experts_per_tok=4, n_group=1, topk_group=1, first_k_dense_replace=1, num_hidden_layers=6,
        num_attention_heads=16, q_lora_rank=None,
    )  # fmt: skip
    DeepseekV3ForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path, fp8=fp8)
    peak, final = peak_and_final(tmp_path, bits, mapped=not fp8)
    assert peak <= 1.3 * final
