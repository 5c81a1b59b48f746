"""Recipes: what is written is what is meant, or an error that says how to write it."""

import subprocess
import sys
from pathlib import Path

import pytest

from distill.recipe import PretrainRecipe, Recipe, load_recipe, sft_fields, training_fields

RECIPE = """
name: made
problems:
  gsm8k: {dataset: openai/gsm8k, config: main, answer_after: "####", kind: math, domain: math, licence: MIT}
teacher:
  {engine: endpoint, model: m, base_urls: ["http://a/v1"], temperature: 0.6, max_tokens: 99, correct: 1, most: 4}
decontaminate: {benchmarks: all}
sft: {learning_rate: 1e-5, max_length: 4096}
students:
  small: {model: ./student, sft: {learning_rate: 2e-5}}
"""


def written(tmp_path: Path, text: str = RECIPE) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_a_recipe(tmp_path):
    recipe = load_recipe(written(tmp_path))
    assert isinstance(recipe, Recipe)
    assert recipe.sft["learning_rate"] == 1e-5, "YAML 1.1 reads a string here"
    assert recipe.students["small"].model == str(tmp_path / "student"), "./ is the recipe's folder"
    assert recipe.problems["gsm8k"].dataset == "openai/gsm8k"


def test_overrides(tmp_path):
    changes = ["seed=7", "teacher.temperature=1", "students.small.sft.num_train_epochs=3", "teacher.base_urls.0=http://b/v1",
               "evaluate.tasks=[gsm8k]", "evaluate.protocol=deepseek-r1", "students.small.launch=null"]  # fmt: skip
    recipe = load_recipe(written(tmp_path), changes)
    assert isinstance(recipe, Recipe)
    assert recipe.seed == 7
    assert recipe.teacher.temperature == 1
    assert recipe.teacher.base_urls == ["http://b/v1"]
    assert recipe.students["small"].sft == {"learning_rate": 2e-5, "num_train_epochs": 3}
    assert recipe.evaluate is not None
    assert recipe.evaluate.tasks == ["gsm8k"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("temperature", "'temperature' is no override; write key=value"),
        ("teacher.temprature=1", "teacher.temprature is unknown. Did you mean 'temperature'?"),
        ("teacher.temperature=hot", "teacher.temperature='hot': Input should be a valid number"),
        ("teacher.temperature=0", "temperature=0 gives the same sample 4 times"),
        ("teacher.correct=5", "correct=5 right samples cannot come from most=4"),
        ("teacher.prompt=hello", "prompt must hold {question}"),
        ("teacher.prompt={math: '{question}', code: hello}", "prompt.code must hold {question}"),
        ("teacher.prompt={maths: '{question}'}", "maths"),
        ("teacher.base_urls=[]", "engine: endpoint, which needs at least one"),
        ("teacher.base_urls.3=x", "'3' is none of the 1 places of a list"),
        ("name.first=x", "what stands before 'first' holds no keys"),
        ("sft.learning_rat=1", "sft.learning_rat is no field of SFTConfig. Did you mean 'learning_rate'?"),
        ("students.small.sft.max_len=1", "students.small.sft.max_len is no field of SFTConfig"),
        ("students.teacher.model=x", "students may not be called ['teacher']"),
        ("problems.gsm8k.reasoning_gym=gcd", "give exactly one of dataset and reasoning_gym"),
        ("problems.gsm8k.kind=code", "kind: code needs tests"),
        ("problems.gsm8k.kind=text", "problems.gsm8k has kind text, which a judge must verify"),
        ("problems.gsm8k.kind=essay", "problems.gsm8k.kind='essay'"),
        ("mix.shares={maths: 1.0}", "mix: no problems have the domain 'maths'. Did you mean 'math'?"),
        ("mix.shares={math: 0.5}", "shares sum to 0.5, not to 1"),
        ("kind=distil", "kind='distil' is neither distill nor pretrain. Did you mean 'distill'?"),
        (
            "evaluate={tasks: [gsm8k], protocol: deepseek-r1, models: [smal]}",
            "'smal' is no model of this recipe. Did you mean 'small'?",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_the_way_out(tmp_path, override, message):
    with pytest.raises(ValueError, match=r"(?s).+") as caught:
        load_recipe(written(tmp_path), [override])
    assert message in str(caught.value)
    assert len(str(caught.value)) < 600, "the message does not repeat the recipe"


def test_code_is_run_only_where_that_is_allowed(tmp_path):
    changes = ["problems.gsm8k.kind=code", "problems.gsm8k.tests=tests"]
    with pytest.raises(ValueError, match=r"no security boundary.*set verify.code.allow: true"):
        load_recipe(written(tmp_path), changes)
    load_recipe(written(tmp_path), [*changes, "verify.code.allow=true"])


def test_a_prompt_that_begins_like_a_path_is_none(tmp_path):
    recipe = load_recipe(written(tmp_path), ["teacher.prompt=../{question}"])
    assert isinstance(recipe, Recipe)
    assert recipe.teacher.prompt == "../{question}"


def test_a_path_in_an_override_is_meant_from_where_one_stands(tmp_path, monkeypatch):
    recipe, here = written(tmp_path), tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    read = load_recipe(recipe, ["problems.gsm8k.dataset=./rows.jsonl", "teacher.prompt={math: './{question}'}"])
    assert isinstance(read, Recipe)
    assert read.problems["gsm8k"].dataset == str(here / "rows.jsonl")
    assert read.students["small"].model == str(tmp_path / "student")
    assert read.teacher.prompt == {"math": "./{question}"}


def test_a_name_with_dots_can_be_overridden(tmp_path):
    recipe = written(tmp_path, RECIPE.replace("small:", "Qwen-1.5B:"))
    read = load_recipe(recipe, ["students.Qwen-1.5B.sft.num_train_epochs=2", "students.Qwen-1.5B.target=answer"])
    assert isinstance(read, Recipe)
    assert list(read.students) == ["Qwen-1.5B"]
    assert read.students["Qwen-1.5B"].target == "answer"
    assert read.students["Qwen-1.5B"].sft == {"learning_rate": 2e-5, "num_train_epochs": 2}


def test_fields_of_the_trainers_are_those_of_the_classes():
    from dataclasses import fields

    from transformers import TrainingArguments
    from trl import SFTConfig

    assert {one.name for one in fields(TrainingArguments)} == training_fields()
    assert {one.name for one in fields(SFTConfig)} == sft_fields()


def test_reading_recipes_loads_nothing_heavy():
    program = (
        "import sys; from distill.recipe import load_recipe; from distill import __main__, plan, pipeline\n"
        "load_recipe('recipes/quickstart.yaml')\n"
        "print([m for m in ('torch', 'transformers', 'trl', 'datasets', 'pyarrow', 'scipy') if m in sys.modules])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.strip() == "[]"


def test_a_pretraining_recipe_knows_its_trainer(tmp_path):
    text = """
name: tiny
kind: pretrain
corpus: {seed: 1, parts: [{dataset: gcd, form: notes, documents: 5}]}
tokenizer: {phrases: [], chat_template: ./t.jinja}
context: 64
model: {model_type: qwen2}
training: {learning_rate: 1e-3}
"""
    assert isinstance(load_recipe(written(tmp_path, text)), PretrainRecipe)
    with pytest.raises(ValueError, match=r"training.lr is no field of TrainingArguments"):
        load_recipe(written(tmp_path, text), ["training.lr=1"])
    with pytest.raises(ValueError, match=r"model.model_type is missing"):
        load_recipe(written(tmp_path, text), ["model={}"])
