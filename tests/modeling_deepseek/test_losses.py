"""The loss in chunks against the loss from whole logits: torch's own, transformers' own, and this model's."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainingArguments
from transformers.loss.loss_utils import ForCausalLMLoss

from modeling_deepseek.losses import gathers_at_every_call, token_losses
from tests import spread
from tests.ranks import on_ranks
from tests.tiny import tiny_config, tiny_model, tokens

VOCABULARY = 2**15  # of which 1 MiB holds the logits of 8 tokens
LARGE = {"vocab_size": VOCABULARY, "logits_workspace_mib": 1, "initializer_range": 0.1}
IGNORE = -100


def head_and_states(dtype=torch.float32, positions: int = 24, width: int = 16, words: int = 40):
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(width, words, bias=False, dtype=dtype)
    head.weight.data = torch.randn(words, width, generator=generator).to(dtype)
    hidden = torch.randn(2, positions // 2, width, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, words, (2, positions // 2), generator=generator)
    return head, hidden, targets.masked_fill(torch.rand(targets.shape, generator=generator) < 0.3, IGNORE)


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


# The function.


@pytest.mark.parametrize(
    ("mib", "words", "expected"), [(512, 129280, 1038), (1, 2**18, 1), (1, 2**30, 1), (2, 256, 2048)]
)
def test_tokens_at_once_by_hand(mib, words, expected):
    assert tiny_config(vocab_size=words, logits_workspace_mib=mib).logits_at_once == expected


@pytest.mark.parametrize("chunk_size", [1, 5, 8, 23, 24])
@pytest.mark.parametrize("frozen", [False, True])
def test_losses_and_gradients_are_torch_s(chunk_size, frozen):
    head, hidden, targets = head_and_states()
    head.requires_grad_(not frozen)
    weights = torch.rand(targets.shape, generator=torch.Generator().manual_seed(1))  # each loss counts differently
    losses = token_losses(head, hidden, targets, chunk_size)
    (losses * weights).sum().backward()
    assert losses.dtype == torch.float32

    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, head.weight)]
    expected = F.linear_cross_entropy(exact[0].flatten(0, 1), exact[1], targets.flatten(), reduction="none")
    (expected * weights.flatten()).sum().backward()
    assert distance(losses.flatten(), expected) < 1e-6
    assert distance(hidden.grad, exact[0].grad) < 1e-6
    assert head.weight.grad is None if frozen else distance(head.weight.grad, exact[1].grad) < 1e-6


class Sizes:
    """Of the states that a head is called with."""

    def __init__(self, head: nn.Module):
        self.seen = []
        head.register_forward_hook(lambda module, inputs, logits: self.seen.append(logits.shape[:-1].numel()))


def test_no_more_logits_than_asked_for_and_none_without_a_target():
    head, hidden, targets = head_and_states()
    count = int((targets != IGNORE).sum())
    assert count == 17
    sizes = Sizes(head)
    token_losses(head, hidden, targets, 6).sum().backward()
    assert sizes.seen[:3] == [6, 6, 5]
    assert sorted(sizes.seen[3:]) == [5, 6, 6]  # once more in the backward pass, in whichever order


@pytest.mark.parametrize("chunk_size", [4, 100])
def test_nothing_to_predict(chunk_size):
    """A loss of 0 that still reaches every parameter: DDP waits for each."""
    head, hidden, targets = head_and_states()
    losses = token_losses(head, hidden, torch.full_like(targets, IGNORE), chunk_size)
    losses.sum().backward()
    assert not losses.any()
    assert not head.weight.grad.any()
    assert not hidden.grad.any()
    empty = token_losses(head, hidden[:, :0], targets[:, :0], chunk_size)
    assert empty.shape == (2, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_softmax_of_narrow_states_is_float32(dtype):
    """As whole logits give it, to the last bits; torch's own rounds each loss to the dtype of the states."""
    head, hidden, targets = head_and_states(dtype)
    losses = token_losses(head, hidden, targets, 5)
    expected = F.cross_entropy(head(hidden).float().flatten(0, 1), targets.flatten(), reduction="none")
    assert losses.dtype == torch.float32
    assert distance(losses.flatten(), expected) < 1e-6
    losses.sum().backward()
    gradient, hidden.grad = hidden.grad, None
    expected.sum().backward()
    assert distance(gradient.float(), hidden.grad.float()) < 2**-7


def test_autocast_holds_in_the_backward_pass_too():
    head, hidden, targets = head_and_states()
    dtypes = []
    head.register_forward_hook(lambda module, inputs, logits: dtypes.append(logits.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = token_losses(head, hidden, targets, 6)
        whole = token_losses(head, hidden, targets, 24)
    assert losses.dtype == torch.float32
    assert distance(losses, whole) < 1e-6
    losses.sum().backward()
    assert len(dtypes) == 7
    assert set(dtypes) == {torch.bfloat16}


def test_dropout_of_an_adapted_head_is_drawn_once():
    """What is computed again in the backward pass must drop what the forward pass dropped."""
    head, hidden, targets = head_and_states()
    head = nn.Sequential(nn.Dropout(0.5), head)
    torch.manual_seed(0)
    losses = token_losses(head, hidden, targets, 6)
    gradient = torch.autograd.grad(losses.sum(), hidden)[0]
    torch.manual_seed(0)
    rows = hidden.flatten(0, 1)[targets.flatten() != IGNORE]
    logits = torch.cat([head(chunk) for chunk in rows.split(6)])
    expected = F.cross_entropy(logits, targets[targets != IGNORE], reduction="none")
    assert distance(losses[targets != IGNORE], expected) < 1e-6
    assert distance(gradient, torch.autograd.grad(expected.sum(), hidden)[0]) < 1e-6


def test_compiled_without_a_graph_break():
    head, hidden, targets = head_and_states()
    expected = token_losses(head, hidden, targets, 6)
    expected_gradient = torch.autograd.grad(expected.sum(), hidden)[0]
    compiled = torch.compile(lambda *inputs: token_losses(head, *inputs, 6), fullgraph=True, backend="aot_eager")
    losses = compiled(hidden, targets)
    assert distance(losses, expected) < 1e-6
    assert distance(torch.autograd.grad(losses.sum(), hidden)[0], expected_gradient) < 1e-6


def test_heads_that_gather_at_every_call_are_called_once():
    head, hidden, targets = head_and_states()
    assert not gathers_at_every_call(head)
    head.weight.ds_id = 0  # as ZeRO-3 marks its parameters
    assert gathers_at_every_call(head)
    sizes = Sizes(head)
    token_losses(head, hidden, targets, 6)
    assert sizes.seen == [24]


# In the model.


def batch(kind: str) -> dict[str, torch.Tensor]:
    ids = tokens(2, 24)
    inputs = {"input_ids": ids, "labels": ids.clone()}
    if kind == "padded":
        mask = torch.ones_like(ids)
        mask[0, :5] = mask[1, 20:] = 0
        inputs |= {"attention_mask": mask, "labels": ids.masked_fill(mask == 0, IGNORE)}
    if kind == "prompts":
        inputs["labels"][:, :15] = IGNORE
    if kind == "packed":
        inputs["position_ids"] = torch.cat([torch.arange(10), torch.arange(9), torch.arange(5)]).expand(2, -1)
    if kind == "shifted":
        inputs["shift_labels"] = F.pad(inputs.pop("labels")[:, 1:], (0, 1), value=IGNORE)
    if kind == "items":
        inputs["num_items_in_batch"] = torch.tensor(77)
    if kind == "nothing":
        inputs["labels"] = torch.full_like(ids, IGNORE)
    return inputs


def step(model, inputs, **kwargs):
    output = model(**inputs, use_cache=False, **kwargs)
    output.loss.backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    return output, gradients


def assert_same_step(model, inputs) -> None:
    """With logits and without."""
    expected, expected_gradients = step(model, inputs, skip_logits=False)
    output, gradients = step(model, inputs)
    assert expected.logits is not None
    assert output.logits is None
    assert expected.loss.item() == pytest.approx(output.loss.item(), rel=1e-6, abs=1e-6)
    assert expected.lm_loss.item() == pytest.approx(output.lm_loss.item(), rel=1e-6, abs=1e-6)
    for mtp_loss, expected_loss in zip(output.mtp_losses or (), expected.mtp_losses or (), strict=True):
        assert mtp_loss.item() == pytest.approx(expected_loss.item(), rel=1e-6, abs=1e-6)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert distance(gradient, expected_gradients[name]) < 1e-6, name


def large_model(family: str = "v3", **overrides):
    """In training mode. Its MTP modules' losses are always in chunks; `whole` makes them whole."""
    return tiny_model(family, **{**LARGE, **overrides}).train()


@pytest.mark.parametrize("kind", ["plain", "padded", "prompts", "packed", "shifted", "items", "nothing"])
@pytest.mark.parametrize("family", ["v2", "v3"])
def test_training_step_is_that_of_whole_logits(family, kind):
    assert_same_step(large_model(family, num_nextn_predict_layers=0), batch(kind))


@pytest.mark.parametrize("kind", ["plain", "padded", "prompts", "packed", "items"])
def test_losses_of_mtp_modules_are_those_of_whole_logits(kind):
    model = large_model(num_nextn_predict_layers=2)
    sizes = Sizes(model.lm_head)
    output, gradients = step(model, batch(kind))
    assert max(sizes.seen) == 8
    model.config.logits_workspace_mib = 100
    sizes.seen.clear()
    expected, expected_gradients = step(model, batch(kind))
    assert sizes.seen == [48] * 3
    assert torch.stack(output.mtp_losses).tolist() == pytest.approx(torch.stack(expected.mtp_losses).tolist(), rel=1e-6)
    assert output.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    for name, gradient in gradients.items():
        assert distance(gradient, expected_gradients[name]) < 2e-6, name


@pytest.mark.parametrize(
    "change",
    ["tied", "frozen head", "checkpointing", "reentrant", "LoRA", pytest.param("compiled", marks=pytest.mark.slow)],
)
def test_what_models_in_training_are_made_of(change):
    model = large_model(tie_word_embeddings=change == "tied")
    if change == "frozen head":
        model.lm_head.requires_grad_(False)
    if change in ("checkpointing", "reentrant"):
        model.activation_checkpointing_enable({"use_reentrant": change == "reentrant"})
        model.enable_input_require_grads()
    if change == "LoRA":  # of the head as well, and the tied embedding stays where it is
        config = LoraConfig(r=4, target_modules=["lm_head", "o_proj"], init_lora_weights=False, lora_dropout=0.0)
        model = get_peft_model(model, config).train()
        assert "lora" in str(model.base_model.model.lm_head)
    if change == "compiled":
        model.model.compile(backend="aot_eager")
    assert_same_step(model, batch("padded"))


def test_loss_is_transformers_own():
    model = large_model(num_nextn_predict_layers=0, aux_loss_alpha=0.0)
    inputs = batch("prompts")
    loss = model(**inputs).loss
    logits = model(inputs["input_ids"]).logits
    expected = ForCausalLMLoss(logits, inputs["labels"], VOCABULARY)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_when_there_are_logits():
    """In evaluation, without gradients, where they are small, where they are asked for."""
    model = large_model()
    inputs = batch("plain")
    few = {name: tensor[:, :4] for name, tensor in inputs.items()}  # 8 tokens, which just fit
    assert model(**inputs).logits is None
    assert model(**inputs, skip_logits=False).logits.shape == (2, 24, VOCABULARY)
    assert model(**few).logits is not None
    assert model(**few, skip_logits=True).logits is None
    assert model(inputs["input_ids"]).logits is not None
    with torch.no_grad():
        assert model(**inputs).logits is not None
    model.eval()
    assert model(**inputs).logits is not None
    evaluated = model(**inputs, skip_logits=True)
    assert evaluated.logits is None
    assert evaluated.loss.item() == pytest.approx(model(**inputs).loss.item(), rel=1e-6)


def test_whoever_needs_logits_gets_them_or_is_told():
    model, inputs = large_model(), batch("plain")
    with pytest.raises(ValueError, match=r"`skip_logits=True` needs `labels`"):
        model(inputs["input_ids"], skip_logits=True)
    with pytest.raises(ValueError, match=r"no `logits_to_keep`"):
        model(**inputs, skip_logits=True, logits_to_keep=1)
    seen = []

    def own(logits, **kwargs):
        seen.append(logits.shape)
        return ForCausalLMLoss(logits, **kwargs)

    model.loss_function = own
    assert model(**inputs).logits is not None
    assert seen == [(2, 24, VOCABULARY)]
    with pytest.raises(ValueError, match=r"no `loss_function` of your own"):
        model(**inputs, skip_logits=True)


class LargestTensor(TorchDispatchMode):
    """Remembers the most values that a tensor had, of forward and backward pass."""

    values = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor):
                self.values = max(self.values, value.numel())
        return result


def test_logits_of_all_tokens_never_exist():
    model = large_model(num_nextn_predict_layers=1)
    ids = tokens(2, 200)
    with LargestTensor() as largest:
        model(ids, labels=ids, use_cache=False).loss.backward()
    assert largest.values == VOCABULARY * model.config.hidden_size  # the head itself: 64 tokens would be as large
    assert largest.values < 2 * 200 * VOCABULARY / 5


@pytest.mark.parametrize("chunked", [True, False])
def test_trainer_trains_and_evaluates(tmp_path, chunked):
    """`Trainer` reads the loss in training, and logits in evaluation."""
    model = tiny_model(**LARGE)
    if not chunked:
        model.config.logits_workspace_mib = 1000
    sizes = Sizes(model.lm_head)
    rows = [{"input_ids": ids, "labels": ids} for ids in tokens(8, 10)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        gradient_accumulation_steps=2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    assert (max(sizes.seen) == 8) == chunked
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses == pytest.approx(LOGGED_LOSSES.setdefault("losses", losses), abs=1e-5)
    assert trainer.predict(rows).predictions.shape == (8, 10, VOCABULARY)


LOGGED_LOSSES: dict[str, list[float]] = {}  # of whichever of the two ran first


@pytest.mark.parametrize("head_alone", [False, True])
def test_ranks_with_more_targets_do_not_wait_for_the_others(tmp_path, head_alone):
    tiny_model(num_nextn_predict_layers=2).save_pretrained(tmp_path / "v3")
    on_ranks(tmp_path, spread.uneven_chunks, head_alone)


# Memory, by the process's own high-water mark.

PROGRAM = """
import json, sys, torch
from transformers.loss.loss_utils import ForCausalLMLoss
from modeling_deepseek import DeepseekV3Config
from modeling_deepseek.losses import token_losses

side, tokens, words, width, mib = sys.argv[1], *map(int, sys.argv[2:])
torch.manual_seed(0)
head = torch.nn.Linear(width, words, bias=False)
hidden = torch.randn(1, tokens, width, requires_grad=True)
targets = torch.randint(0, words, (1, tokens))
chunk_size = DeepseekV3Config(vocab_size=words, logits_workspace_mib=mib).logits_at_once

def loss(rows):
    states, wanted = hidden[:, :rows], targets[:, :rows]
    if side == "whole":
        return ForCausalLMLoss(head(states), None, words, shift_labels=wanted)
    return token_losses(head, states, wanted, chunk_size).sum() / rows

def mark(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(key))

loss(2).backward()
before = mark("VmRSS")
value = loss(tokens)
value.backward()
print(json.dumps([mark("VmHWM") - before, value.item(), head.weight.grad.norm().item()]))
"""


def peak(side: str, *sizes: int) -> tuple[int, float, float]:
    """Bytes above what was there before, the loss, and the norm of the head's gradient."""
    command = [sys.executable, "-c", PROGRAM, side, *map(str, sizes)]
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]).stdout
    return tuple(json.loads(output))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the high-water mark from Linux's /proc")
def test_peak_memory_is_below_a_fifth():
    """In small: 2,048 tokens of a vocabulary of 65,536, 40 MiB of logits at a time."""
    sizes = (2048, 2**16, 32, 40)  # below 32 MiB the C library keeps what is freed
    (whole, *expected), (chunked, *found) = peak("whole", *sizes), peak("chunked", *sizes)
    assert found == pytest.approx(expected, rel=1e-5)
    assert chunked < whole / 5, (chunked, whole)
