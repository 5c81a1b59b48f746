"""The path that makes the bundled models, on a few documents."""

from itertools import islice
from pathlib import Path

import pytest
import torch

from distill.pretrain import character_tokenizer, documents, encoded, new_model, run_pretrain
from distill.recipe import CorpusPart, PretrainRecipe, load_recipe
from distill.run_dir import RunDir, read_json
from distill.worked import WORKED
from eval.reasoning_gym_tasks import ROWS, SEED, problems

ROOT = Path(__file__).parents[2]
TEACHER = ROOT / "recipes/tiny_teacher.yaml"
SMALL = [
    "corpus.parts=[{dataset: gcd, form: solution, documents: 24}, {dataset: chain_sum, form: solution, documents: 24}]",
    "model.hidden_size=32", "model.intermediate_size=32", "model.moe_intermediate_size=16", "model.num_hidden_layers=2",
    "model.kv_lora_rank=16", "model.qk_nope_head_dim=8", "model.qk_rope_head_dim=8", "model.v_head_dim=8",
    "training.per_device_train_batch_size=8", "training.save_steps=2", "training.disable_tqdm=true",
    "evaluate.limit=2", "evaluate.k=1", "evaluate.tasks=[rg_gcd]", "dtype=float32", "training.use_cpu=true",
    "drafting.training.max_steps=2",
]  # fmt: skip


def small(*more: str) -> PretrainRecipe:
    recipe = load_recipe(TEACHER, [*SMALL, *more])
    assert isinstance(recipe, PretrainRecipe)
    return recipe


@pytest.fixture
def tokenizer():
    recipe = small()
    template = Path(recipe.tokenizer.chat_template).read_text(encoding="utf-8")
    return character_tokenizer(recipe.tokenizer.phrases, template, recipe.context)


@pytest.mark.parametrize("text", ["chess 98 + 93 = 191", "thr1ee\n\n\\boxed{4}", "naïve 火 🔥", " two  spaces "])
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_characters_are_single_and_phrases_are_one(tokenizer):
    assert len(tokenizer.encode("chess 98", add_special_tokens=False)) == 8
    phrase = "State the final answer to the following arithmetic problem: "
    assert len(tokenizer.encode(phrase + "7", add_special_tokens=False)) == 2
    assert tokenizer.decode(tokenizer.encode("<think>1</think>"), skip_special_tokens=True) == "<think>1</think>"


def test_the_template_opens_the_thought_and_hides_earlier_ones(tokenizer):
    chat = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>\nlong\n</think>\n\nb"},
        {"role": "user", "content": "c"},
    ]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    assert text == f"{bos}<｜User｜>a<｜Assistant｜>\n\nb{eos}<｜User｜>c<｜Assistant｜><think>\n"  # noqa: RUF001


def test_what_is_trained_is_what_inference_renders(tokenizer):
    question = "State the final answer to the following arithmetic problem: 9 + 3 ="
    context, text = next(islice(documents([CorpusPart(dataset="chain_sum", form="solution", documents=1)], 3), 1))
    row = encoded(tokenizer, context, text)
    asked = context.removeprefix("<｜User｜>").partition("<｜Assistant｜>")[0]  # noqa: RUF001
    assert asked.startswith(question[:40])
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": asked}], tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert row["input_ids"][: len(prompt)] == prompt
    assert row["labels"][: len(prompt)] == [-100] * len(prompt)
    assert tokenizer.decode(row["labels"][len(prompt) :]) == text + tokenizer.eos_token


@pytest.mark.parametrize("dataset", WORKED)
def test_held_out_questions_are_in_no_document(dataset):
    held_out = [row["question"].strip() for row in problems(dataset, ROWS, SEED)]
    # Other seeds meet the held-out questions of the smaller tasks within some hundred problems, and this one meets all.
    for form in ("solution", "quiz"):
        parts = [CorpusPart(dataset=dataset, form=form, documents=300)]
        text = "\n".join(context + text for context, text in documents(parts, SEED))
        assert not [question for question in held_out if f"{question}\n" in text or f"{question}<" in text]


def test_documents_are_as_many_as_asked_and_a_function_of_the_seed():
    parts = [
        CorpusPart(dataset="gcd", form="notes", documents=7),
        CorpusPart(dataset="chain_sum", form="quiz", documents=5),
    ]
    once = list(documents(parts, 1))
    assert len(once) == 12
    assert sum("\n" in text and text.startswith("State") for _, text in once) == 5
    assert once == list(documents(parts, 1)) != list(documents(parts, 2))


def test_training_moves_every_parameter_of_the_teacher_and_its_routers_bias(tmp_path):
    recipe = small()
    run = RunDir(tmp_path / "run")
    assert run_pretrain(recipe, run, say=lambda line: None) == ""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import modeling_deepseek

    trained = AutoModelForCausalLM.from_pretrained(run / "model")
    assert isinstance(trained, modeling_deepseek.DeepseekV3ForCausalLM)
    start = new_model(recipe, AutoTokenizer.from_pretrained(run / "model"))
    after = trained.state_dict()
    assert any("e_score_correction_bias" in name for name in after)
    assert any("eh_proj" in name for name in after), "the MTP module is saved"
    still = [name for name, value in start.state_dict().items() if torch.equal(value, after[name])]
    assert not still
    card = (run / "card/README.md").read_text()
    assert "rg_gcd" in card
    assert "in 6 steps" in card
    assert "2 steps of their own" in card
    assert read_json(run / "eval/results.json")
    said: list[str] = []
    run_pretrain(recipe, run, say=said.append)
    assert said == ["corpus: done before", "model: done before", "eval: done before"]


def test_drafting_trains_the_modules_beside_the_model_as_it_is_stored(tmp_path):
    from transformers import AutoModelForCausalLM

    def weights(name: str, *more: str):
        run = RunDir(tmp_path / name)
        run_pretrain(small("evaluate=null", "dtype=bfloat16", *more), run, say=lambda line: None)
        model = AutoModelForCausalLM.from_pretrained(run / "model")
        return model.config, model.state_dict()

    (before, plain), (after, taught) = weights("plain", "drafting=null"), weights("taught")
    assert (before.mtp_passes, after.mtp_passes) == (1, 4)
    moved = {name for name in plain if not torch.equal(plain[name], taught[name])}
    module = {name for name in plain if name.startswith("model.layers.2.")}
    assert {name for name in module if plain[name].ndim > 1} <= moved <= module  # norms move by less than they round
    assert {plain[name].dtype for name in module} == {taught[name].dtype for name in module}


def test_drafting_without_modules_is_refused():
    with pytest.raises(
        ValueError, match=r"drafting trains MTP modules, and model.num_nextn_predict_layers gives it none"
    ):
        small("model.num_nextn_predict_layers=0")


# On resuming, Trainer reads the checkpoint's config.json, which has the released key `rope_scaling`, as a bare config.
@pytest.mark.filterwarnings("ignore:`rope_scaling` is deprecated:FutureWarning")
def test_a_killed_training_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, Trainer

    recipe = small("evaluate=null")
    whole, killed = RunDir(tmp_path / "whole"), RunDir(tmp_path / "killed")
    run_pretrain(recipe, whole, say=lambda line: None)
    original = Trainer.training_step

    def step(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", step)
        with pytest.raises(KeyboardInterrupt):
            run_pretrain(recipe, killed, say=lambda line: None)
    run_pretrain(recipe, killed, say=lambda line: None)
    one, two = (AutoModelForCausalLM.from_pretrained(run / "model").state_dict() for run in (whole, killed))
    assert {name for name in one if not torch.equal(one[name], two[name])} == set()
