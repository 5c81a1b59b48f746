"""Training as its users do it: a plain loop, `Trainer`, TRL's `SFTTrainer`, PEFT, autocast."""

import random
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from modeling_deepseek import DeepseekTrainerCallback, DeepseekV3ForCausalLM
from tests.tiny import FAMILIES, tiny_model, tokens

ATTENTION = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]


def weights(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def unmoved(model, before: dict[str, torch.Tensor]) -> list[str]:
    return [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]


def biases(model) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers() if "correction_bias" in name}


@pytest.mark.parametrize("family", FAMILIES)
def test_training_moves_every_parameter_and_every_expert(family):
    model = tiny_model(family, num_nextn_predict_layers=2).train()
    before, bias_before = weights(model), biases(model)
    optimizer = torch.optim.Adam(model.parameters())  # without decay, which moves what has no gradient
    reached = {name: torch.zeros(8, dtype=torch.bool) for name in before if ".experts." in name}
    for step in range(3):
        ids = tokens(4, 16, seed=step)
        model(ids, labels=ids).loss.backward()
        for name, experts in reached.items():
            experts |= model.get_parameter(name).grad.abs().amax(dim=(1, 2)) > 0
        optimizer.step()
        optimizer.zero_grad()
        model.update_correction_bias()
    assert unmoved(model, before) == []
    assert len(reached) == 2 * 4  # two tensors in each of two layers and two modules
    assert [name for name, experts in reached.items() if not experts.all()] == []
    assert not [name for name, bias in biases(model).items() if torch.equal(bias, bias_before[name])]


LIBRARY = {"v2": transformers.DeepseekV2ForCausalLM, "v3": transformers.DeepseekV3ForCausalLM}


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_the_library_s(tmp_path, family):
    """On a padded batch, without what the library has not: MTP modules and a balance loss."""
    model = tiny_model(family, num_nextn_predict_layers=0, aux_loss_alpha=0.0, initializer_range=0.1).train()
    model.save_pretrained(tmp_path)
    library = LIBRARY[family].from_pretrained(tmp_path, attn_implementation="sdpa").train()
    assert type(library).__module__.startswith("transformers.")
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[0, 8:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    losses = [either(**inputs).loss for either in (model, library)]
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-5)
    for loss in losses:
        loss.backward()
    for name, parameter in library.named_parameters():
        difference = (model.get_parameter(name).grad - parameter.grad).abs().max()
        assert difference < 1e-5 * parameter.grad.abs().max(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_autocast_step_is_finite(family):
    model = tiny_model(family, num_nextn_predict_layers=2).train()
    ids = tokens()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(ids, labels=ids)
    output.loss.backward()
    exact = tiny_model(family, num_nextn_predict_layers=2).train()(ids, labels=ids)
    assert output.loss.item() == pytest.approx(exact.loss.item(), rel=0.02)  # bfloat16 has three digits
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name


# Activation checkpointing


class Kept:
    """Bytes that autograd keeps for the backward pass, parameters left out. What a checkpointed layer would keep is not
    among them: it is computed again."""

    def __init__(self, model):
        self.storages = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.kept = 0

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.storages:
            self.storages.add(storage.data_ptr())
            self.kept += storage.nbytes()
        return tensor


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_checkpointing_computes_again_and_keeps_less(use_reentrant, packed):
    """The same losses, gradients and load of the experts, with MTP modules among the layers that compute again."""
    ids = tokens(2, 64)
    inputs = {"input_ids": ids, "labels": ids, "use_cache": False}
    if packed:
        inputs["position_ids"] = torch.cat([torch.arange(40), torch.arange(24)]).expand(2, -1)
    steps, kept = [], []
    for checkpointed in (False, True):
        model = tiny_model(num_nextn_predict_layers=2, aux_loss_alpha=0.25).train()
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        runs = Counter()
        for layer in model.model.layers:
            layer.input_layernorm.register_forward_hook(lambda norm, *_, runs=runs: runs.update([norm]))
        counter = Kept(model)
        with torch.autograd.graph.saved_tensors_hooks(counter.pack, lambda tensor: tensor):
            output = model(**inputs)
        output.loss.backward()
        assert list(runs.values()) == [2 if checkpointed else 1] * 5
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        load = {layer: counts.tolist() for layer, counts in model.update_correction_bias().items()}
        parts = [output.loss, output.lm_loss, *output.mtp_losses, output.aux_loss]
        steps.append((torch.stack(parts).tolist(), gradients, load))
        kept.append(counter.kept)
    (parts, gradients, load), (parts_again, gradients_again, load_again) = steps
    assert parts_again == parts
    assert load_again == load
    for name, gradient in gradients.items():
        assert (gradients_again[name] - gradient).abs().max() <= 1e-6 * gradient.abs().max(), name
    assert kept[1] < kept[0] / 5, kept


# Trainer


ROWS = [{"input_ids": ids, "labels": ids} for ids in tokens(16, 10)]


def trainer_for(model, folder: Path, steps: int = 4, callbacks=(), **arguments) -> Trainer:
    arguments = {"save_strategy": "no", "logging_steps": 1, **arguments}
    training_arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **arguments,
    )
    return Trainer(model, training_arguments, train_dataset=ROWS, eval_dataset=ROWS, callbacks=list(callbacks))


def test_trainer_moves_the_bias_and_logs_the_load(tmp_path):
    model = tiny_model(bias_update_speed=0.25, num_nextn_predict_layers=2)
    expected = biases(model)
    trainer = trainer_for(model, tmp_path, callbacks=[DeepseekTrainerCallback()])
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 4
    for log in logs:
        violations = []
        # Of 4 rows of 10 tokens, module k sees no position in the last k.
        assert {layer: sum(load) for layer, load in log["tokens_per_expert"].items()} == {
            "1": 120, "2": 120, "3": 108, "4": 96,
        }  # fmt: skip
        for layer, load in log["tokens_per_expert"].items():
            mean = sum(load) / 8
            signs = [(count > mean) - (count < mean) for count in load]
            expected[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"] -= 0.25 * torch.tensor(signs)
            violations.append(max(load) / mean - 1)
            assert log[f"max_vio/layer_{layer}"] == pytest.approx(violations[-1], abs=1e-9)
        assert log["max_vio"] == pytest.approx(sum(violations) / 4, abs=1e-9)
    assert all(torch.equal(bias, expected[name]) for name, bias in biases(model).items())


def test_load_is_logged_over_the_steps_since_the_last_log(tmp_path):
    """Of training: a log of an evaluation in between does not take it."""
    each = trainer_for(tiny_model(), tmp_path, callbacks=[DeepseekTrainerCallback()])
    each.train()
    arguments = {"logging_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    paired = trainer_for(tiny_model(), tmp_path, callbacks=[DeepseekTrainerCallback()], **arguments)
    paired.train()
    assert not [log for log in paired.state.log_history if "eval_loss" in log and "max_vio" in log]
    steps = [log for log in each.state.log_history if "loss" in log]
    pairs = [log for log in paired.state.log_history if "loss" in log]
    assert len(pairs) == 2
    for pair, (first, second) in zip(pairs, (steps[:2], steps[2:]), strict=True):
        for name in ("max_vio", "max_vio/layer_1", "max_vio/layer_2", "max_vio/layer_3"):
            assert pair[name] == pytest.approx((first[name] + second[name]) / 2, abs=1e-9)
        for layer, load in pair["tokens_per_expert"].items():
            both = zip(first["tokens_per_expert"][layer], second["tokens_per_expert"][layer], strict=True)
            assert load == [sum(counts) for counts in both]


def test_modules_out_of_the_loss_are_out_of_the_log(tmp_path):
    """They route nothing, and the MaxVio of nothing would make the mean NaN."""
    trainer = trainer_for(tiny_model(mtp_loss_weight=0), tmp_path, steps=1, callbacks=[DeepseekTrainerCallback()])
    trainer.train()
    log = trainer.state.log_history[0]
    assert list(log["tokens_per_expert"]) == ["1", "2"]
    assert log["max_vio"] == pytest.approx((log["max_vio/layer_1"] + log["max_vio/layer_2"]) / 2, abs=1e-9)


class Reporter(TrainerCallback):
    """Sees the logs as W&B and TensorBoard do."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


def test_attached_callback_stands_before_the_reporters(tmp_path):
    reporter = Reporter()
    trainer = trainer_for(tiny_model(), tmp_path, steps=1, callbacks=[reporter])
    DeepseekTrainerCallback.attach(trainer)
    trainer.train()
    assert "max_vio" in reporter.seen[0]


def test_callback_refuses_another_model(tmp_path):
    trainer = trainer_for(torch.nn.Linear(2, 2), tmp_path, callbacks=[DeepseekTrainerCallback()])
    with pytest.raises(ValueError, match="no DeepSeek model of this package in Linear"):
        trainer.train()


def test_label_smoothing_that_would_leave_losses_out_is_refused(tmp_path):
    """`Trainer` keeps the labels, and the MTP modules would stay as they are without a word."""
    for parts in ({"aux_loss_alpha": 0.0}, {"num_nextn_predict_layers": 0}):
        settings = {"callbacks": [DeepseekTrainerCallback()], "label_smoothing_factor": 0.1}
        trainer = trainer_for(tiny_model(**parts), tmp_path, **settings)
        with pytest.raises(ValueError, match=r"label_smoothing_factor=0.1 takes the labels away"):
            trainer.train()
    alone = tiny_model(aux_loss_alpha=0.0, num_nextn_predict_layers=0)
    trainer_for(alone, tmp_path, steps=1, **settings).train()


def test_dense_model_has_no_load(tmp_path):
    model = tiny_model(n_routed_experts=None, num_experts_per_tok=None)
    trainer = trainer_for(model, tmp_path, steps=1, callbacks=[DeepseekTrainerCallback()])
    trainer.train()
    assert "max_vio" not in trainer.state.log_history[0]


# `Trainer` reads config.json with the library's base class, which warns of the released files' own `rope_scaling`.
@pytest.mark.filterwarnings("ignore:`rope_scaling` is deprecated:FutureWarning:transformers.configuration_utils")
@pytest.mark.parametrize("sharded", [False, True])
def test_resumed_training_is_uninterrupted_training(tmp_path, sharded):
    """`Trainer` resumes by `load_state_dict` on the files, which hold one tensor for each expert."""
    uninterrupted = tiny_model(bias_update_speed=0.25)
    arguments = {"save_strategy": "steps", "save_steps": 2}
    trainer_for(uninterrupted, tmp_path, callbacks=[DeepseekTrainerCallback()], **arguments).train()
    checkpoint = tmp_path / "checkpoint-2"
    if sharded:
        half = DeepseekV3ForCausalLM.from_pretrained(checkpoint)
        (checkpoint / "model.safetensors").unlink()
        half.save_pretrained(checkpoint, max_shard_size="250KB")
        assert len(list(checkpoint.glob("model-*.safetensors"))) > 2

    resumed = tiny_model(seed=1, bias_update_speed=0.25)  # other weights, which resuming must replace
    trainer = trainer_for(resumed, tmp_path / "resumed", callbacks=[DeepseekTrainerCallback()])
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 4
    state = resumed.state_dict()
    for name, tensor in uninterrupted.state_dict().items():
        assert torch.equal(state[name], tensor), name


def test_loss_and_logits_lead_the_output():
    """For callers that unpack a tuple or index the output; what only these models have comes last."""
    model, ids = tiny_model().train(), tokens()
    output = model(ids, labels=ids, output_router_logits=True)
    loss, logits = model(ids, labels=ids, return_dict=False)[:2]
    assert torch.equal(loss, output.loss)
    assert torch.equal(logits, output.logits)
    assert torch.equal(model(ids, return_dict=False)[0], output.logits)
    assert list(output)[-1] == "aux_loss"


def test_evaluation_and_prediction(tmp_path):
    """`Trainer` finds the loss, although it takes what the forward calls labels for required; only logits are gathered,
    not the parts of the loss."""
    model = tiny_model()
    trainer = trainer_for(model, tmp_path, steps=1, callbacks=[DeepseekTrainerCallback()])
    trainer.train()
    before = biases(model)
    with torch.no_grad():
        batch = torch.utils.data.default_collate(ROWS)
        expected = model.eval()(**batch, num_items_in_batch=16 * 9).loss.item()
    assert trainer.evaluate(ROWS)["eval_loss"] == pytest.approx(expected, abs=1e-5)
    predictions = trainer.predict(ROWS).predictions
    assert predictions.shape == (16, 10, 256)
    assert all(torch.equal(bias, before[name]) for name, bias in biases(model).items())
    assert not any(counts_E.any() for counts_E in model.update_correction_bias().values())


# TRL


def tokenizer() -> PreTrainedTokenizerFast:
    """Words w0 .. w199 to ids 3 .. 202."""
    words = {"<eos>": 1, "<pad>": 0, "<unk>": 2} | {f"w{number}": number + 3 for number in range(200)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>", model_max_length=64
    )


def texts(rows: int = 8) -> Dataset:
    draw = random.Random(0)
    return Dataset.from_dict(
        {"text": [" ".join(f"w{draw.randrange(200)}" for _ in range(draw.randrange(3, 12))) for _ in range(rows)]}
    )


def sft_trainer(model, folder: Path, callbacks=(), peft_config=None, **arguments) -> SFTTrainer:
    defaults = {
        "max_steps": 2, "per_device_train_batch_size": 4, "bf16": False, "max_length": 32, "save_strategy": "no",
    }  # fmt: skip
    config = SFTConfig(
        output_dir=str(folder),
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **{**defaults, **arguments},
    )
    return SFTTrainer(
        model,
        args=config,
        train_dataset=texts(),
        processing_class=tokenizer(),
        callbacks=list(callbacks),
        peft_config=peft_config,
    )


def test_trl_s_aux_loss_works_without_the_callback(tmp_path):
    model = tiny_model()
    trainer = sft_trainer(model, tmp_path, router_aux_loss_coef=0.02)
    trainer.train()
    assert trainer.state.log_history[0]["aux_loss"] > 0
    assert model.config.aux_loss_alpha == 0.02


@pytest.mark.parametrize("bf16", [False, True])  # True is TRL's default
def test_trl_trains_mtp_modules_with_the_callback(tmp_path, bf16):
    model = tiny_model(num_nextn_predict_layers=2)
    before, bias_before = weights(model), biases(model)
    trainer = sft_trainer(
        model,
        tmp_path,
        [DeepseekTrainerCallback()],
        bf16=bf16,
        learning_rate=1e-3,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
    )
    trainer.train()
    assert unmoved(model, before) == []
    assert not [name for name, bias in biases(model).items() if torch.equal(bias, bias_before[name])]
    assert {"aux_loss", "max_vio", "max_vio/layer_4", "tokens_per_expert"} <= trainer.state.log_history[0].keys()


class KeepGradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    "arguments",
    [{}, {"padding_free": True, "max_length": None}, {"packing": True}, {"router_aux_loss_coef": 0.0}],
    ids=["padded", "padding_free", "packed", "no aux loss"],
)
@pytest.mark.parametrize("mtp_modules", [0, 2])
def test_trl_s_gradient_is_that_of_our_loss(tmp_path, arguments, mtp_modules):
    overrides = {"num_nextn_predict_layers": mtp_modules, "aux_loss_alpha": 0.25}
    kept = KeepGradients()
    model = tiny_model(**overrides)
    trainer = sft_trainer(
        model,
        tmp_path,
        [DeepseekTrainerCallback(), kept],
        max_steps=1,
        max_grad_norm=0.0,
        per_device_train_batch_size=8,
        **arguments,
    )
    trainer.train()

    ours = tiny_model(**overrides).train()
    ours.config.aux_loss_alpha = arguments.get("router_aux_loss_coef", 0.25)
    batch = next(iter(trainer.get_train_dataloader()))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids", "labels") if name in batch}
    output = ours(**inputs, num_items_in_batch=(batch["labels"][:, 1:] != -100).sum())
    output.loss.backward()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(output.loss.item(), abs=1e-5)
    if ours.config.aux_loss_alpha:
        assert log["aux_loss"] == pytest.approx(output.aux_loss.item(), abs=1e-5)
    for name, parameter in ours.named_parameters():
        difference = (kept.gradients[name] - parameter.grad).abs().max()
        assert difference < 1e-5 * parameter.grad.abs().max(), name


def test_trl_losses_that_cannot_carry_mtp_are_refused(tmp_path):
    trainer = sft_trainer(tiny_model(), tmp_path, [DeepseekTrainerCallback()], loss_type="dft")
    with pytest.raises(ValueError, match=r"loss_type='dft'.*mtp_loss_weight = 0"):
        trainer.train()
    trainer = sft_trainer(tiny_model(mtp_loss_weight=0), tmp_path, [DeepseekTrainerCallback()], loss_type="dft")
    trainer.train()


def test_second_training_adds_nothing_twice_and_the_model_still_generates(tmp_path):
    model = tiny_model(bias_update_speed=0)
    arguments = {"max_steps": 1, "bf16": True, "learning_rate": 0.0, "per_device_train_batch_size": 8}
    trainer = sft_trainer(model, tmp_path, [DeepseekTrainerCallback()], **arguments)
    losses = []
    for _ in range(2):
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[1] == pytest.approx(losses[0], abs=1e-2)  # bfloat16; rows come in another order
    ids = tokens(1, 4)
    generated = model.eval().generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    assert generated.shape[1] > 4


# PEFT


@pytest.mark.parametrize("path", ["expanded", "absorbed"])
def test_lora_on_the_attention_trains_and_loads(tmp_path, path):
    """Onto the same base: nothing below the adapters may move, not even the bias, since it is not saved with them."""
    model = tiny_model(bias_update_speed=0.25, mla_path=path)
    model.save_pretrained(tmp_path / "base")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    peft_config = LoraConfig(r=4, lora_alpha=8, target_modules=ATTENTION, task_type="CAUSAL_LM")
    trainer = sft_trainer(model, tmp_path, [DeepseekTrainerCallback()], peft_config, learning_rate=1e-2)
    trainer.train()
    assert "max_vio" in trainer.state.log_history[0]
    adapters = {name: value for name, value in trainer.model.named_parameters() if "lora_" in name}
    assert len(adapters) == 2 * len(ATTENTION) * len(model.model.layers)
    assert [name for name, value in adapters.items() if "lora_B" in name and not value.any()] == []
    after = {name.replace("base_layer.", ""): tensor for name, tensor in model.state_dict().items()}
    assert [name for name, tensor in before.items() if not torch.equal(after[name], tensor)] == []

    trainer.save_model(str(tmp_path / "adapter"))
    base = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ids = tokens()
    with torch.no_grad():
        expected = trainer.model.eval()(ids, use_cache=False).logits
        assert torch.equal(loaded(ids, use_cache=False).logits, expected)


def test_absorbed_is_expanded_with_adapters():
    model = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=ATTENTION, init_lora_weights=False)).eval()
    ids = tokens(2, 9)
    logits = {}
    for path in ("expanded", "absorbed"):
        model.base_model.model.config.mla_path = path
        with torch.no_grad():
            logits[path] = model(ids).logits
            with model.disable_adapter():
                plain = model(ids).logits
        assert (logits[path] - plain).abs().max() > 1e-2  # adapters that do something
    torch.testing.assert_close(logits["absorbed"], logits["expanded"], rtol=0, atol=1e-5)
