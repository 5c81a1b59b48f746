"""What TRL trains on is what was proven; a training that was stopped ends like one that was not."""

# ruff: noqa: RUF001  # the wide bars of DeepSeek's tokens are meant

import json
import math
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

import distill.student
from distill.batches import ByLength
from distill.chat import MASKED
from distill.recipe import Student
from distill.run_dir import read_json
from distill.student import plan, sft_config, train
from eval.local_sampler import TransformersSampler
from eval.samplers import Request
from tests.distill.training import FAMILIES, family_tokenizer, row, rows, save_base

SFT = {
    "seed": 3, "max_length": 256, "per_device_train_batch_size": 4, "num_train_epochs": 1, "learning_rate": 1e-2,
    "bf16": False, "gradient_checkpointing": False, "logging_steps": 1, "save_strategy": "no",
}  # fmt: skip


@pytest.fixture
def base(tmp_path) -> str:
    return save_base(tmp_path / "base")


def student(base: str, **changes) -> Student:
    return Student(**{"model": base, **changes})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_equal_weights(first: Path, second: Path) -> None:
    one, other = weights(first), weights(second)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def moved(first: Path, second: Path) -> set[str]:
    one, other = weights(first), weights(second)
    return {name for name in one if not torch.equal(one[name], other[name])}


# What is trained on.


@pytest.mark.parametrize("target", ["trace", "answer"])
def test_trl_s_own_batches_hold_trace_answer_and_end(base, tmp_path, monkeypatch, target):
    batches = []
    collate = DataCollatorForLanguageModeling.torch_call

    def spy(self, examples):
        batches.append(collate(self, examples))
        return batches[-1]

    monkeypatch.setattr(DataCollatorForLanguageModeling, "torch_call", spy)
    counts = train(student(base, target=target), SFT, rows(10), tmp_path / "student")
    tokenizer = family_tokenizer("ours")
    learnt = [
        tokenizer.decode([label for label in labels if label != MASKED])
        for batch in batches
        for labels in batch["labels"].tolist()
    ]
    expected = [
        (f"{one.thought}\n</think>\n\n{one.response}" if target == "trace" else f"\n</think>\n\n{one.answer}")
        + tokenizer.eos_token
        for one in rows(10)
    ]
    assert sorted(learnt) == sorted(expected)
    assert counts["rows"] == counts["in"] == 10
    assert counts["taught_tokens"] == sum(int((batch["labels"] != MASKED).sum()) for batch in batches)
    assert counts["tokens"] == sum(int(batch["attention_mask"].sum()) for batch in batches)
    proof = read_json(tmp_path / "student" / "labels.json")
    assert proof["shown"].startswith("⟦<｜begin▁of▁sentence｜><｜User｜>Add ")
    assert proof["shown"].endswith("⟧" + expected[0])


def test_a_student_learns_to_think_to_answer_and_to_stop(base, tmp_path):
    sft = {**SFT, "num_train_epochs": 120, "logging_steps": 20}
    counts = train(student(base), sft, rows(2), tmp_path / "student")
    assert counts["final_loss"] < 0.1
    sampler = TransformersSampler.from_pretrained(tmp_path / "student" / "model")
    for one in rows(2):
        prompt = sampler.render(json.loads(one.messages), open_thought=True)
        ((_, completion),) = sampler.sample([Request(prompt, max_tokens=200)])
        assert completion.text == f"{one.thought}\n</think>\n\n{one.response}"
        assert completion.finish_reason == "stop"


# What is saved.


def test_the_student_is_a_model_as_its_base_was(base, tmp_path):
    counts = train(student(base), SFT, rows(12), tmp_path / "student")
    folder = tmp_path / "student" / "model"
    assert moved(Path(base), folder) == set(weights(folder))  # every parameter
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert (counts["parameters"], counts["trained_parameters"]) == (model.num_parameters(),) * 2
    assert (counts["steps"], counts["epochs"], counts["batch"]) == (3, 1, 4)

    kept, own = GenerationConfig.from_pretrained(folder), GenerationConfig.from_pretrained(base)
    assert kept.to_diff_dict() == own.to_diff_dict()
    assert (kept.eos_token_id, kept.temperature) == ([1, 3], 0.6)
    before, after = (json.loads((one / "config.json").read_text()) for one in (Path(base), folder))
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    assert changed <= {"pad_token_id", "bos_token_id", "eos_token_id"}  # the tokenizer's, as trl aligns them
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == family_tokenizer("ours").chat_template
    assert sorted(one.name for one in folder.iterdir()) == [
        "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip

    log = read_json(tmp_path / "student" / "log.json")
    assert [one["step"] for one in log] == [1, 2, 3]
    assert counts["final_loss"] == log[-1]["loss"]
    assert 0 < log[-1]["mean_token_accuracy"] < 1


def test_weights_train_in_float32_and_are_saved_as_they_were(tmp_path):
    base = save_base(tmp_path / "base", dtype=torch.bfloat16)
    sft = {**SFT, "learning_rate": 1e-6, "save_strategy": "steps", "save_steps": 3}
    train(student(base), sft, rows(12), tmp_path / "student")
    begun, saved = weights(Path(base)), weights(tmp_path / "student" / "model")
    trained = weights(tmp_path / "student" / "training" / "checkpoint-3")
    name = "model.layers.0.mlp.up_proj.weight"
    assert (trained[name].dtype, saved[name].dtype) == (torch.float32, torch.bfloat16)
    assert not torch.equal(trained[name], begun[name].float())  # in bfloat16 these steps would be lost
    assert torch.equal(trained[name].bfloat16(), saved[name])
    assert json.loads((tmp_path / "student" / "model" / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_configuration_can_be_changed(base, tmp_path):
    rope = {"rope_type": "default", "rope_theta": 500000.0}
    changes = {"max_position_embeddings": 2048, "rope_parameters": rope}
    train(student(base, config=changes), {**SFT, "max_length": 1024}, rows(4), tmp_path / "student")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "student" / "model")
    assert model.config.max_position_embeddings == 2048
    assert model.model.rotary_emb.inv_freq[1].item() == pytest.approx(500000.0 ** (-2 / 8))


def test_added_tokens_get_rows_and_learn(tmp_path):
    base = save_base(tmp_path / "base", "llama", family="llama3")
    train(student(base, add_tokens=["<think>", "</think>"]), SFT, rows(8), tmp_path / "student")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "student" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "student" / "model")
    assert tokenizer.encode("<think>", add_special_tokens=False) == [261]
    assert model.get_input_embeddings().num_embeddings == len(tokenizer) == 263
    assert read_json(tmp_path / "student" / "labels.json")["tags_are_tokens"]


# Rows that do not fit.


def test_rows_that_are_too_long_are_dropped_and_counted_or_refused(base, tmp_path):
    long = row(100, thought="so " * 200)
    control = row(101, thought="it ends with <｜end▁of▁sentence｜>")
    mixed = [*rows(6), long, control, row(102, answer="")]
    counts = train(student(base), SFT, mixed, tmp_path / "dropped")
    dropped = {name: value for name, value in counts.items() if name.startswith("dropped_")}
    assert dropped == {"dropped_too_long": 1, "dropped_control_tokens": 1, "dropped_no_answer": 0}
    assert (counts["in"], counts["rows"]) == (9, 7)
    assert counts["longest"] <= SFT["max_length"]
    answers = train(student(base, target="answer"), SFT, mixed, tmp_path / "answers")
    assert (answers["in"], answers["rows"], answers["dropped_no_answer"]) == (9, 8, 1)

    with pytest.raises(ValueError, match=rf"row {long.id} has \d+ tokens, over max_length=256.*too_long: drop"):
        train(student(base, too_long="refuse"), SFT, mixed, tmp_path / "refused")
    with pytest.raises(ValueError, match="no row is left to train on: 1 over max_length=256"):
        train(student(base), SFT, [long], tmp_path / "none")


def test_a_row_that_would_be_taught_wrong_stops_before_anything_is_trained(base, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text("{{ bos_token }}{{ messages[-1]['content'] }}<think>\n\n</think>\n")
    with pytest.raises(ValueError, match="the thought would stand outside its tags"):
        train(student(base, chat_template=str(template)), SFT, rows(4), tmp_path / "student")
    assert not (tmp_path / "student" / "model").exists()
    assert not (tmp_path / "student" / "training" / "tokens.arrow").exists()


# TRL's own settings.


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
@pytest.mark.parametrize("value", [True, False])
def test_checkpointing_is_what_the_recipe_says_under_either_name(base, tmp_path, name, value):
    sft = {key: one for key, one in SFT.items() if key != "gradient_checkpointing"}
    arguments = sft_config(plan(student(base), {**sft, name: value}), tmp_path)
    assert arguments.activation_checkpointing is arguments.gradient_checkpointing is value
    assert sft_config(plan(student(base), sft), tmp_path).gradient_checkpointing, "TRL's default"


# Packing.


def test_packed_rows_have_the_loss_of_padded_ones(base, tmp_path):
    """One step over all rows. On the CPU documents in one row are kept apart by their positions alone."""
    sft = {**SFT, "per_device_train_batch_size": 16, "learning_rate": 0.0}
    logs = []
    for name, more in (("padded", {}), ("packed", {"packing": True})):
        counts = train(student(base), {**sft, **more}, rows(16), tmp_path / name)
        assert (counts["rows"], counts["steps"]) == (16, 1)
        logs.append(read_json(tmp_path / name / "log.json")[0])
    assert logs[1]["loss"] == pytest.approx(logs[0]["loss"], abs=1e-5)
    assert logs[1]["grad_norm"] == pytest.approx(logs[0]["grad_norm"], rel=1e-4)


# Going on.

RESUMED = {**SFT, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 2, "logging_steps": 2}


class Killed(BaseException):
    """Where a kill would come."""


@pytest.mark.parametrize("sampling", ["random", "group_by_length"])
@pytest.mark.parametrize("at", ["half-written checkpoint", "step"])
def test_a_killed_training_ends_like_one_that_was_not(base, tmp_path, monkeypatch, sampling, at):
    """Killed in its second epoch: between checkpoints, or with the weights of one written and its optimizer not."""
    sft = {**RESUMED, "train_sampling_strategy": sampling}
    recipe = student(base, config={"attention_dropout": 0.1})  # noise that must go on too
    whole = train(recipe, sft, rows(12), tmp_path / "whole")
    assert whole["steps"] == 6

    with monkeypatch.context() as patch:
        if at == "step":
            step = distill.student._Trainer.training_step

            def killed(self, *arguments, **more):
                if self.state.global_step == 5:
                    raise Killed
                return step(self, *arguments, **more)

            patch.setattr(distill.student._Trainer, "training_step", killed)
        else:
            save = distill.student._Trainer._save_optimizer_and_scheduler

            def killed(self, output_dir):
                if self.state.global_step == 4:
                    raise Killed
                save(self, output_dir)

            patch.setattr(distill.student._Trainer, "_save_optimizer_and_scheduler", killed)
        with pytest.raises(Killed):
            train(recipe, sft, rows(12), tmp_path / "killed")
    training = tmp_path / "killed" / "training"
    assert (training / "checkpoint-4").exists()

    steps = []
    patched = distill.student._Trainer.training_step
    monkeypatch.setattr(
        distill.student._Trainer,
        "training_step",
        lambda self, *arguments, **more: steps.append(self.state.global_step) or patched(self, *arguments, **more),
    )
    counts = train(recipe, sft, rows(12), tmp_path / "killed")
    assert steps[0] == (4 if at == "step" else 2)  # from the last whole checkpoint, not from the start
    assert counts == whole
    assert_equal_weights(tmp_path / "killed" / "model", tmp_path / "whole" / "model")
    assert read_json(tmp_path / "killed" / "log.json") == read_json(tmp_path / "whole" / "log.json")


@pytest.mark.parametrize("change", ["rows", "settings", "base"])
def test_checkpoints_of_another_training_are_not_gone_on_from(base, tmp_path, monkeypatch, change):
    train(student(base), RESUMED, rows(12), tmp_path / "student")
    data, sft = rows(12), RESUMED
    if change == "rows":
        data = rows(13)[1:]
    elif change == "settings":
        sft = {**RESUMED, "learning_rate": 2e-2}
    else:
        other = AutoModelForCausalLM.from_pretrained(base)
        other.model.norm.weight.data += 0.5
        other.save_pretrained(base)
    train(student(base), sft, data, tmp_path / "student")
    train(student(base), sft, data, tmp_path / "fresh")
    assert_equal_weights(tmp_path / "student" / "model", tmp_path / "fresh" / "model")


# Adapters.

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}


def test_lora_saves_the_adapter_and_the_merged_model(base, tmp_path):
    counts = train(student(base, adapter=LORA), SFT, rows(12), tmp_path / "student")
    assert counts["trained_parameters"] < counts["parameters"] / 10
    assert {one.name for one in (tmp_path / "student" / "adapter").iterdir()} >= {
        "adapter_config.json", "adapter_model.safetensors", "tokenizer.json",
    }  # fmt: skip
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "student" / "model").eval()
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        before = plain(ids).logits
        adapted = PeftModel.from_pretrained(plain, tmp_path / "student" / "adapter").eval()(ids).logits
        assert (adapted - before).abs().max() > 1e-3
        torch.testing.assert_close(merged(ids).logits, adapted, rtol=0, atol=1e-5)
    assert {name.split(".")[-2] for name in moved(Path(base), tmp_path / "student" / "model")} == set(
        LORA["target_modules"]
    )


def test_qlora_trains_on_4_bit_weights_and_merges_into_the_base_s_own(tmp_path):
    pytest.importorskip("bitsandbytes")
    base = save_base(tmp_path / "base", "llama")
    quantization = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"}
    train(student(base, adapter=LORA, quantization=quantization), SFT, rows(12), tmp_path / "student")
    saved, begun = weights(tmp_path / "student" / "model"), weights(Path(base))
    assert {name: tensor.dtype for name, tensor in saved.items()} == {
        name: tensor.dtype for name, tensor in begun.items()
    }
    assert {name.split(".")[-2] for name in moved(Path(base), tmp_path / "student" / "model")} == set(
        LORA["target_modules"]
    )


def test_a_deepseek_student_trains_its_mtp_modules_and_moves_its_bias(tmp_path):
    base = save_base(tmp_path / "base", "deepseek")
    train(student(base), SFT, rows(12), tmp_path / "student")
    names = moved(Path(base), tmp_path / "student" / "model")
    assert names == set(weights(Path(base)))
    assert any("e_score_correction_bias" in name for name in names)
    assert any("eh_proj" in name for name in names)
    assert "max_vio" in read_json(tmp_path / "student" / "log.json")[0]


NAMED = {
    "shared_experts": r"layers\.[12]\.mlp\.shared_experts\.(gate|up|down)_proj",
    "routed_experts": r"layers\.[12]\.mlp\.experts\.[0-7]\.(gate|up|down)_proj",
    "mtp": r"layers\.3\.(eh_proj|self_attn\..*_proj(_with_mqa)?|mlp\.(shared_experts|experts\.[0-7])\..*_proj)",
    "q_a_proj": r"layers\.[0-3]\.self_attn\.q_a_proj",
}


@pytest.mark.parametrize(
    ("targets", "quantization"),
    [
        (["shared_experts"], None),
        (["mtp"], None),
        (["routed_experts", "q_a_proj"], {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    ],
)
def test_an_adapter_of_a_deepseek_student_is_where_the_recipe_says(tmp_path, targets, quantization):
    base = save_base(tmp_path / "base", "deepseek")
    lora = {"r": 4, "lora_dropout": 0.1, "target_modules": targets}
    recipe = student(base, adapter=lora, quantization=quantization)
    train(recipe, {**SFT, "num_train_epochs": 3}, rows(12), tmp_path / "student")  # long enough to choose every expert
    asked = re.compile(r"model\.(" + "|".join(NAMED[one] for one in targets) + r")\.weight")
    assert moved(Path(base), tmp_path / "student" / "model") == {
        name for name in weights(Path(base)) if asked.fullmatch(name)
    }
    plain = AutoModelForCausalLM.from_pretrained(base)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "student" / "model")
    adapted = PeftModel.from_pretrained(plain, tmp_path / "student" / "adapter").merge_and_unload()
    for name, tensor in merged.state_dict().items():
        assert torch.equal(adapted.state_dict()[name], tensor)


# Settings.


@pytest.mark.parametrize(
    ("changes", "sft", "message"),
    [
        ({}, {"max_length": 1024}, r"max_length=1024 is over the context of .*max_position_embeddings=512"),
        ({}, {"dataset_text_field": "text"}, "sft.dataset_text_field cannot be set: the rows are rendered"),
        ({}, {"output_dir": "x"}, "sft.output_dir cannot be set"),
        ({}, {"packing": True, "packing_strategy": "wrapped"}, "packing_strategy='wrapped' cuts examples"),
        ({"config": {"rope_theta": 1e6}}, {}, "config.rope_theta is no field of .* It belongs into rope_parameters"),
        ({}, {"activation_checkpointing": True}, "are one setting; keep activation_checkpointing"),
        ({}, {"model_init_kwargs": {"dtype": "bfloat16"}}, "model_init_kwargs.dtype cannot be set"),
        ({"quantization": {"load_in_4bit": True}}, {}, "quantization without adapter"),
        ({"adapter": LORA, "add_tokens": ["<t>"]}, {}, r"add_tokens=\['<t>'\] with an adapter.*modules_to_save"),
        ({"model": "nowhere/at-all"}, {}, "the tokenizer of 'nowhere/at-all' cannot be loaded"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_meant_are_refused(base, changes, sft, message):
    with pytest.raises(ValueError, match=message):
        plan(student(**{"base": base, **changes}) if "model" not in changes else Student(**changes), {**SFT, **sft})


def test_names_of_other_packages_are_checked(base, tmp_path):
    for changes, sft, message in [
        ({}, {"lerning_rate": 1.0}, "sft.lerning_rate is no field of SFTConfig. Did you mean 'learning_rate'"),
        ({"adapter": {**LORA, "rank": 4}}, {}, "adapter.rank is no field of LoraConfig"),
        (
            {"adapter": LORA, "quantization": {"load_in_4_bit": True}},
            {},
            "quantization.load_in_4_bit is no field of BitsAndBytesConfig. Did you mean 'load_in_4bit'",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            train(student(base, **changes), {**SFT, **sft}, rows(4), tmp_path / "student")


def test_without_max_length_the_model_s_context_counts_and_not_trl_s_1024(base):
    sft = {name: value for name, value in SFT.items() if name != "max_length"}
    assert plan(student(base), sft).max_length == 512


def test_a_tokenizer_without_a_template_is_refused(tmp_path, base):
    (Path(base) / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=r"has no chat template.*give the student a chat_template"):
        plan(student(base), SFT)
    template = str(FAMILIES["ours"][0])
    assert plan(student(base, chat_template=template), SFT).tokenizer.chat_template


def test_a_loss_that_is_lost_stops_the_training(base, tmp_path):
    sft = {**SFT, "learning_rate": 1e30, "max_grad_norm": 0.0}
    with pytest.raises(ValueError, match=r"the loss of student is nan at step 2: lower sft.learning_rate"):
        train(student(base), sft, rows(12), tmp_path / "student")


# The order of rows.


def test_rows_of_a_step_are_of_one_length():
    lengths = [17 * at % 101 for at in range(1003)]
    sampler = ByLength(lengths, rows_per_step=8, seed=1)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert sorted(orders[-1]) == list(range(1003))
    assert orders[0] == orders[2] != orders[1]
    assert list(ByLength(lengths, 8, seed=2)) != orders[0]

    def padding(order: list[int]) -> float:
        steps = [order[at : at + 8] for at in range(0, len(order), 8)]
        padded = sum(max(lengths[one] for one in step) * len(step) for step in steps)
        return 1 - sum(lengths) / padded

    assert padding(list(range(1003))) > 0.4
    assert padding(orders[0]) < 0.05
    assert lengths[orders[0][0]] == max(lengths)
    assert len(orders[0][1000:]) == 3  # what is not full is last


def test_progress_is_told(base, tmp_path):
    told = []
    train(student(base), SFT, rows(12), tmp_path / "student", progress=lambda *one: told.append(one))
    steps = [one for one in told if one[0] == "student: steps"]
    assert [one[1:3] for one in steps] == [(1, 3), (2, 3), (3, 3)]
    assert ("student: tokens", 12, 12, "") in told
    assert steps[-1][3].startswith("loss ")
    assert math.isfinite(float(steps[-1][3].removeprefix("loss ")))
