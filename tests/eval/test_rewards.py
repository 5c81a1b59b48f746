"""Rewards are the graders' verdicts, in the shapes that TRL passes; the evaluate modules load from disk, offline."""

import subprocess
import sys
from pathlib import Path

import pytest

from eval.evaluate_modules import MODULES, path
from eval.rewards import ChoiceReward, MathReward, ThoughtReward


def chat(*texts):
    return [[{"role": "assistant", "content": text}] for text in texts]


def test_math_reward_in_plain_text_and_in_conversations():
    texts = [r"\boxed{\frac12}", "The answer is 42", r"<think>\boxed{3}", "<think>a</think>\\boxed{4}", r"\boxed{5}"]
    golds = ["0.5", "42", "3", "4", "6"]  # trl's accuracy_reward: 0 for the second
    expected = [1.0, 1.0, 0.0, 1.0, 0.0]
    assert MathReward()(texts, answer=golds) == expected
    assert MathReward()(chat(*texts), solution=golds, prompts=["p"] * 5, completion_ids=[[1]] * 5) == expected


def test_a_thought_that_the_template_opened_and_nobody_closed_earns_nothing():
    texts = [r"so \boxed{4}", r"so</think>\boxed{4}"]
    assert MathReward(thinking=True)(texts, answer=["4", "4"]) == [0.0, 1.0]
    assert ChoiceReward(thinking=True)(["Answer: B", "x</think>Answer: B"], answer=["B", "B"]) == [0.0, 1.0]
    assert ThoughtReward(thinking=True)([*texts, "so</think> "]) == [0.0, 1.0, 0.0]


def test_an_endpoints_own_field_is_a_closed_thought():
    message = [{"role": "assistant", "content": r"\boxed{4}", "reasoning_content": "2 + 2"}]
    assert MathReward(thinking=True)([message], answer=["4"]) == [1.0]
    assert ThoughtReward(thinking=True)([message]) == [1.0]


def test_choice_reward():
    texts = ["**Answer: (B)**", "Answer: don't know", "Answer: E"]
    assert ChoiceReward()(texts, answer=["B", "D", "A"]) == [1.0, 0.0, 0.0]
    assert ChoiceReward(n_choices=10)(texts, answer=["B", "D", "E"]) == [1.0, 0.0, 1.0]


def test_thought_reward_wants_one_thought_and_an_answer():
    texts = ["<think>a</think>4", "4", "<think>a", "<think>a</think> ", "<think>a<think>b</think>4"]
    assert ThoughtReward()(texts) == [1.0, 0.0, 0.0, 0.0, 0.0]


def test_verdicts_reach_the_trainers_table():
    logged = {}
    MathReward()(["4", "5", "<think>"], answer=["4", "4", "4"], log_extra=logged.__setitem__)
    assert logged == {"verdict": ["correct", "wrong", "truncated"]}


def test_columns_are_asked_for_by_name():
    with pytest.raises(ValueError, match="neither a column `answer` nor `solution`"):
        MathReward()(["4"], problem=["2+2"])
    with pytest.raises(ValueError, match="1 gold answers for 2 completions"):
        MathReward()(["4", "5"], answer=["4"])


@pytest.mark.filterwarnings("ignore")
def test_grpo_trains_on_them(tmp_path):
    """TRL takes them as they are: it names them, calls them, logs their verdicts."""
    import datasets
    from trl import GRPOConfig, GRPOTrainer

    from tests.eval.models import tiny_lm, tiny_tokenizer

    rows = datasets.Dataset.from_dict({"prompt": ["2+2=", "1+1="] * 4, "answer": ["4", "2"] * 4})
    arguments = GRPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=4, num_generations=4, max_completion_length=4,
        max_steps=1, report_to=[], use_cpu=True, bf16=False, logging_steps=1,
    )  # fmt: skip
    trainer = GRPOTrainer(
        tiny_lm(), reward_funcs=[MathReward(), ThoughtReward()], args=arguments, train_dataset=rows,
        processing_class=tiny_tokenizer(),
    )  # fmt: skip
    trainer.train()
    assert any("rewards/math_reward/mean" in line for line in trainer.state.log_history)
    assert any("rewards/thought_reward/mean" in line for line in trainer.state.log_history)


PROGRAM = r"""
import evaluate, sys
from eval.evaluate_modules import path
load = lambda name: evaluate.load(path(name), cache_dir=sys.argv[1])
texts, golds = [r"\boxed{0.5}", "Answer: 3", "<think>4"], [r"\frac12", "2", "4"]
m = load("math_answer").compute(predictions=texts, references=golds)
assert (m["accuracy"], m["verdicts"]) == (1 / 3, ["correct", "wrong", "truncated"]), m
assert m["low"] < 1 / 3 < m["high"], m
m = load("choice_answer").compute(predictions=["Answer: B", "none"], references=["B", "A"], n_choices=4)
assert (m["accuracy"], m["verdicts"], m["answers"]) == (0.5, ["correct", "no_answer"], ["B", None]), m
samples = [["1", "2", "2", "2"], ["3", "3", "4", "5"]]
# pass@2: 1 - C(3,2)/C(4,2) = 1/2 for one right of four; 1 - C(2,2)/C(4,2) = 5/6 for two.
m = load("pass_at_k").compute(predictions=samples, references=["1", "3"], k=[1, 2])
assert abs(m["pass@1"] - 3 / 8) < 1e-12 and abs(m["pass@2"] - (1 / 2 + 5 / 6) / 2) < 1e-12, m
assert load("cons_at_k").compute(predictions=samples, references=["1", "3"]) == {"cons@4": 0.5}
m = load("paired_difference").compute(predictions=[1, 1, 0, 1], references=[0, 1, 0, 0])
assert (m["difference"], m["wins"], m["losses"]) == (0.5, 2, 0), m
print("all of them")
"""


def test_evaluate_loads_every_module_from_its_folder(tmp_path):
    """In a process of its own: `evaluate` copies modules into its cache and imports them from there."""
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1", "PATH": ""},
    )
    assert process.stdout.strip() == "all of them", process.stderr
    assert all(Path(path(name), f"{name}.py").is_file() for name in MODULES)


def test_an_unknown_module_is_named():
    with pytest.raises(ValueError, match="there is no module 'accuracy'"):
        path("accuracy")
