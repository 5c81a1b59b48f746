"""FP8 training: which layers, by whose arithmetic, and what it does to the loss. Where there is no GPU that multiplies
FP8, torchao and we round to FP8 and multiply in float32."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from transformers import Trainer, TrainingArguments

from modeling_deepseek import fp8_training
from modeling_deepseek.fp8_training import (
    DeepseekFP8Experts,
    GroupedFP8,
    accelerate_recipe,
    convert_experts,
    convert_to_fp8_training,
    linear_config,
    module_filter,
    to_fp8,
)
from modeling_deepseek.moe import DeepseekExperts
from tests.tiny import tiny_model, tokens

torchao_float8 = pytest.importorskip("torchao.float8", reason="FP8 training is torchao's: pip install torchao")
Float8Linear = pytest.importorskip("torchao.float8.float8_linear").Float8Linear

ALIGNED = {
    "hidden_size": 64,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "moe_intermediate_size": 32,
}  # every size a multiple of 16
PER_LAYER = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
on_hopper = pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0")


def in_fp8(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, Float8Linear)}


# Which layers.


def test_layers_in_fp8_are_the_paper_s():
    """V3 3.3: not the embedding, the head, the gates and the norms; and not eh_proj, which the released files keep."""
    model = convert_to_fp8_training(tiny_model(**ALIGNED), emulate=True)
    converted = in_fp8(model)
    for layer in range(4):  # one of them an MTP module
        assert {name.split(".")[-1] for name in converted if name.startswith(f"model.layers.{layer}.")} == PER_LAYER
    assert len(converted) == 4 * 8
    left = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)} - converted
    assert left == {"lm_head", "model.layers.3.eh_proj"}
    assert [type(module) for name, module in model.named_modules() if name.endswith("experts.act_fn")]
    assert sum(type(module) is DeepseekFP8Experts for module in model.modules()) == 3
    assert not any(type(module) is DeepseekExperts for module in model.modules())


@pytest.mark.parametrize(
    ("name", "sizes", "expected"),
    [
        ("model.layers.0.self_attn.q_a_proj", (64, 32), True),
        ("model.layers.0.self_attn.q_a_proj", (64, 40), False),
        ("model.layers.0.self_attn.q_a_proj", (40, 64), False),
        ("model.layers.61.mlp.shared_experts.down_proj", (64, 64), True),
        ("model.layers.61.eh_proj", (128, 64), False),
        ("lm_head", (64, 256), False),
    ],
)
def test_module_filter_by_hand(name, sizes, expected):
    assert module_filter(nn.Linear(*sizes, bias=False), name) == expected


def test_only_linear_layers_pass():
    assert not module_filter(nn.Embedding(64, 64), "model.layers.0.self_attn.q_a_proj")


@pytest.mark.parametrize(
    ("device", "found"),
    [(None, "no CUDA device"), ((8, 0), r"A100 with 8\.0")],
)
def test_hardware_without_fp8_is_named_with_the_way_out(monkeypatch, device, found):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: device)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A100")
    for call in (linear_config, accelerate_recipe):
        with pytest.raises(ValueError, match=rf"capability 8\.9 or more, found {found}; train in bfloat16.*emulate"):
            call()
    with pytest.raises(ValueError, match=r"of routed experts needs a GPU of compute capability 9\.0"):
        convert_to_fp8_training(tiny_model())


# By whose arithmetic.


def test_rounding_by_hand():
    x = torch.tensor([[448.0, 17.0, -1.0], [449.0, 17.0, 0.0], [0.0, 0.0, 0.0]])
    values, scales = to_fp8(x, 1)
    assert scales[:2].flatten().tolist() == [1.0, 2.0]  # powers of two that bring the row below 448
    # e4m3 has three bits behind the point: 17 lies between 16 and 18, 8.5 between 8 and 9, ties to even; 224.5 is 224.
    assert (values.float() * scales).tolist() == [[448.0, 16.0, -1.0], [448.0, 16.0, 0.0], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_hopper)])
def test_experts_multiply_as_torchao_s_layers_do(dtype, device):
    """Expert by expert, with one that has no row. The gradient of the weight is that of unrounded rows."""
    emulate = device == "cpu"
    generator = torch.Generator().manual_seed(0)
    # Of sizes so far apart that it matters which of them share a scale.
    weight = torch.randn(4, 48, 32, generator=generator) * torch.logspace(-3, 3, 48)[:, None]
    weight = weight.to(device, dtype).requires_grad_()
    rows = (torch.randn(70, 32, generator=generator) * torch.logspace(-3, 3, 70)[:, None]).to(device, dtype)
    rows.requires_grad_()
    upstream = torch.randn(70, 48, generator=generator).to(device, dtype)
    ends = [16, 16, 55, 70]
    product = GroupedFP8.apply(rows, weight, torch.tensor(ends, dtype=torch.int32, device=device), emulate)
    product.backward(upstream)

    for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        linear = nn.Linear(32, 48, bias=False, device=device, dtype=dtype)
        linear.weight.data = weight.detach()[expert]
        linear = Float8Linear.from_float(linear, linear_config(emulate=emulate))
        part = rows.detach()[start:end].clone().requires_grad_()
        if start == end:
            assert not weight.grad[expert].any()
            continue
        expected = linear(part)
        expected.backward(upstream[start:end])
        tolerance = 1e-5 if dtype is torch.float32 else 2**-7
        for actual, reference in ((product[start:end], expected), (rows.grad[start:end], part.grad)):
            assert ((actual - reference).abs() <= tolerance * reference.abs().amax(-1, keepdim=True)).all()
        exact = upstream[start:end].float().t() @ part.detach().float()
        assert (weight.grad[expert].float() - exact).abs().max() < 2**-7 * exact.abs().max()


def test_products_really_are_rounded():
    """Emulation that rounds nothing would pass every test of closeness."""
    plain, rounded = tiny_model(**ALIGNED), tiny_model(**ALIGNED)
    convert_experts(rounded, emulate=True)
    layer = next(index for index, layer in enumerate(plain.model.layers) if layer.is_moe)
    hidden = torch.randn(1, 12, 64, generator=torch.Generator().manual_seed(0))
    outputs = [model.model.layers[layer].mlp(hidden)[0] for model in (plain, rounded)]
    error = (outputs[1] - outputs[0]).norm() / outputs[0].norm()
    assert 2**-7 < error < 2**-3  # e4m3 rounds to 2^-4 at most


# In training.


@pytest.fixture
def fresh_accelerate():
    """Its state is one for the process, with one precision."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_accelerate_converts_in_prepare(fresh_accelerate):
    model = tiny_model(**ALIGNED).train()
    convert_experts(model, emulate=True)
    by_hand = convert_to_fp8_training(tiny_model(**ALIGNED).train(), emulate=True)
    accelerator = Accelerator(mixed_precision="fp8", cpu=True, kwargs_handlers=[accelerate_recipe(emulate=True)])
    model = accelerator.prepare(model)
    assert in_fp8(model) == in_fp8(by_hand)
    ids = tokens()
    loss = model(ids, labels=ids).loss
    accelerator.backward(loss)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = by_hand(ids, labels=ids).loss
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    for name, parameter in by_hand.named_parameters():
        assert torch.equal(model.get_parameter(name).grad, parameter.grad), name


def test_trainer_trains_every_parameter_and_saves_a_plain_checkpoint(tmp_path, fresh_accelerate):
    model = convert_to_fp8_training(tiny_model(**ALIGNED), emulate=True)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    rows = [{"input_ids": ids, "labels": ids} for ids in tokens(32, 16)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=16,
        learning_rate=1e-3,
        bf16=True,
        activation_checkpointing=True,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    Trainer(model, arguments, train_dataset=rows).train()
    assert [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])] == []
    model.save_pretrained(tmp_path / "saved")
    loaded = type(model).from_pretrained(tmp_path / "saved")
    assert loaded.state_dict().keys() == tiny_model(**ALIGNED).state_dict().keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert not in_fp8(loaded)


def chain(rows: int, length: int, seed: int) -> torch.Tensor:
    """Text that can be learnt: each of 254 words is followed by one of four, with odds of 60, 25, 10 and 5 in 100."""
    followers = torch.randint(2, 256, (256, 4), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    odds = torch.tensor([0.6, 0.25, 0.1, 0.05])
    columns = [torch.randint(2, 256, (rows,), generator=generator)]
    for _ in range(length - 1):
        which = torch.multinomial(odds, rows, replacement=True, generator=generator)
        columns.append(followers[columns[-1], which])
    return torch.stack(columns, dim=1)


def losses(precision: str, steps: int, device: str) -> torch.Tensor:
    """Of a small model that trains in bfloat16, with or without FP8, on the same text, smoothed as in the paper's
    figure: a moving average of 0.9."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 64, "initializer_range": 0.02}
    model = tiny_model(**{**ALIGNED, **sizes}).train().to(device)
    if precision == "fp8":
        convert_to_fp8_training(model, emulate=device == "cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    smoothed: list[float] = []
    for step in range(steps):
        ids = chain(8, 64, seed=step).to(device)
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = model(ids, labels=ids).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        model.update_correction_bias()
        smoothed.append(0.9 * smoothed[-1] + 0.1 * loss.item() if smoothed else loss.item())
    return torch.tensor(smoothed)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_hopper)])
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_loss_stays_within_the_paper_s_bound_of_bfloat16(device):
    """V3 3.3: a relative error of the loss below 0.25 %, throughout training."""
    expected, found = losses("bf16", 150, device), losses("fp8", 150, device)
    assert expected[-1] < expected[0] / 2  # it learns
    error = (found - expected).abs() / expected
    assert 0 < error.max() < 0.0025


def test_without_torchao_the_rest_of_the_package_is_there():
    source = Path(fp8_training.__file__).read_text(encoding="utf-8")
    top = [line for line in source.splitlines() if line.startswith(("import", "from"))]
    assert not any("torchao" in line or "accelerate" in line for line in top)
