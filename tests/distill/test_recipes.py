"""Every recipe that is shipped: read, planned, and run whole, shrunk to tiny models, a stub server and local files."""

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill.pipeline import run_recipe
from distill.plan import plan_text
from distill.pretrain import run_pretrain
from distill.problems import load_problems, messages
from distill.recipe import PretrainRecipe, Recipe, load_recipe
from distill.records import Problem
from distill.run_dir import RunDir, read_json
from eval import reasoning_gym_tasks as reasoning_gym
from eval.prompts import boxed
from eval.sample import Sample
from tests.eval.data import DATA, needs_data
from tests.eval.models import tiny_lm, tiny_tokenizer
from tests.eval.stub_server import StubServer

ROOT = Path(__file__).parents[2]
RECIPES = {path.stem: path for path in sorted((ROOT / "recipes").glob("*.yaml"))}
DISTILL = ["gsm8k_endpoint", "qlora_24gb", "quickstart", "r1"]
PRETRAIN = ["tiny_base", "tiny_teacher"]

# arXiv 2501.12948: v1 section 2.4, v2 supplement B.4.3 and the table of the SFT data.
PUBLISHED_STUDENTS = {
    "Distill-Qwen-1.5B": ("Qwen/Qwen2.5-Math-1.5B", 1e-4),
    "Distill-Qwen-7B": ("Qwen/Qwen2.5-Math-7B", 8e-5),
    "Distill-Qwen-14B": ("Qwen/Qwen2.5-14B", 7e-5),
    "Distill-Qwen-32B": ("Qwen/Qwen2.5-32B", 6e-5),
    "Distill-Llama-8B": ("meta-llama/Llama-3.1-8B", 5e-5),
    "Distill-Llama-70B": ("meta-llama/Llama-3.3-70B-Instruct", 2e-5),
}
PUBLISHED_SAMPLES = {"math": 395_285, "code": 211_129, "stem": 10_124, "logic": 10_395, "general": 177_812}


def distill_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    recipe = load_recipe(RECIPES[name], overrides)
    assert isinstance(recipe, Recipe)
    return recipe


# Read and planned.


def test_each_recipe_is_among_those_that_are_run_here():
    assert sorted(RECIPES) == sorted([*DISTILL, *PRETRAIN])


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_read_and_planned(name, tmp_path):
    recipe = load_recipe(RECIPES[name])
    assert recipe.name == name, "the folder of a run is named so"
    text = plan_text(recipe, RunDir(tmp_path / "run"))
    if isinstance(recipe, Recipe):
        assert all(f"student:{student}" in text for student in recipe.students)
        assert all(source in text for source in recipe.problems)
    else:
        assert recipe.model["model_type"] in text
    assert not (tmp_path / "run").exists(), "a plan writes nothing"


@pytest.mark.parametrize("name", RECIPES)
def test_the_readme_has_each_recipe(name):
    readme = (ROOT / "recipes/README.md").read_text(encoding="utf-8")
    assert f"| [{name}.yaml]({name}.yaml) |" in readme


def test_the_readme_names_every_key():
    readme = (ROOT / "recipes/README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([a-z_]+)`", readme))
    assert {key for key in recipe_keys(Recipe) if key.rpartition(".")[2] not in named} == set()


def recipe_keys(model: Any, prefix: str = "") -> list[str]:
    """Every key of a recipe, dotted, without the names that a recipe gives itself."""
    keys = []
    for name, info in model.model_fields.items():
        keys.append(prefix + name)
        for part in (info.annotation, *getattr(info.annotation, "__args__", ())):
            if hasattr(part, "model_fields"):
                keys += recipe_keys(part, f"{prefix}{name}.")
    return keys


@pytest.mark.parametrize("name", DISTILL)
def test_files_that_a_recipe_names_are_there(name):
    recipe = distill_recipe(name)
    for student in recipe.students.values():
        for file in (student.chat_template, student.launch):
            assert file is None or Path(file).is_file()


# The published recipe.


def test_r1_has_the_published_mixture_and_students():
    recipe = distill_recipe("r1")
    assert recipe.mix.counts == PUBLISHED_SAMPLES
    assert sum(PUBLISHED_SAMPLES.values()) == 804_745
    found = {name: (one.model, one.sft["learning_rate"]) for name, one in recipe.students.items()}
    assert found == PUBLISHED_STUDENTS
    assert recipe.decontaminate is not None
    assert (recipe.decontaminate.benchmarks, recipe.decontaminate.ngram) == ("all", 10)


@pytest.mark.parametrize("name", PUBLISHED_STUDENTS)
def test_r1_trains_in_batches_of_64_at_32k_with_a_cosine_to_a_tenth(name):
    recipe = distill_recipe("r1")
    student = recipe.students[name]
    values = recipe.sft_of(name)
    devices = yaml.safe_load(Path(student.launch or "").read_text())["num_processes"]
    assert values["per_device_train_batch_size"] * values["gradient_accumulation_steps"] * devices == 64
    assert values["max_length"] == 32_768
    assert 2 <= values["num_train_epochs"] <= 3
    assert (values["lr_scheduler_type"], values["lr_scheduler_kwargs"]) == ("cosine_with_min_lr", {"min_lr_rate": 0.1})
    # A raised base, where the model's own context is 4,096 tokens.
    assert ("rope_parameters" in student.config) == ("Qwen2.5-Math" in student.model)


@pytest.mark.parametrize("name", DISTILL)
def test_what_reasoning_gym_makes_can_be_made_and_its_own_answers_are_right(name):
    for source in distill_recipe(name).problems.values():
        if source.reasoning_gym is not None:
            for row in reasoning_gym.problems(source.reasoning_gym, 2, 0, source.parameters):
                sample = reasoning_gym.to_sample(row, 0, source.reasoning_gym)
                own = f"<answer>{row['answer']}</answer>"
                assert reasoning_gym.grade(sample, own, "", source.reasoning_gym).verdict == "correct"


def test_the_teacher_is_asked_as_students_are_examined():
    sample = Sample(id="1", task="math500", question="1 + 1?", gold="2")
    for name in ("r1", "qlora_24gb", "gsm8k_endpoint"):
        teacher = distill_recipe(name).teacher
        problem = Problem("0" * 16, "math", "math", sample.question, sample.gold, "made", 0)
        assert messages(problem, teacher.prompt)[0]["content"] == boxed(sample, ())


def test_a_kind_has_its_own_prompt_and_the_others_none():
    prompt = distill_recipe("r1").teacher.prompt

    def asked(kind: Any) -> str:
        return messages(Problem("0" * 16, kind, "x", "Why?", "", "made", 0), prompt)[0]["content"]

    assert asked("none") == asked("text") == "Why?"
    assert asked("code").startswith("Why?\n\nSolve this in Python 3")
    assert asked("math").endswith("\\boxed{}.")


# Run, shrunk.

CODE = {
    "Read two whole numbers and print their sum.": "print(sum(map(int, input().split())))",
    "Write a function double(x) that gives twice x.": "def double(x):\n    return 2 * x",
    "Read a word and print it backwards.": "print(input()[::-1])",
}


def rows_as_on_the_hub() -> dict[str, list[dict[str, Any]]]:
    """Some rows for each source of r1.yaml, with the columns and nesting of the dataset that it names."""
    sums, double, word = CODE
    numbers = [(3, 4), (10, 5), (20, 22), (7, 9), (13, 13), (100, 1)]
    stdin = {"input": ["1 2\n", "30 4\n"], "output": ["3\n", "34\n"]}
    calls = {"fn_name": "double", "inputs": [[2]], "outputs": [4]}
    words = [{"fn_name": None, "input": "abc\n", "output": "cba\n", "type": "stdin_stdout"}]
    return {
        "openr1_math": [
            {"problem": f"What is the sum of {a} and {b}?", "answer": str(a + b), "solution": ""} for a, b in numbers
        ],
        "deepmath": [{"question": f"What is {a} times {b}?", "final_answer": str(a * b)} for a, b in numbers],
        "taco": [{"question": double, "input_output": json.dumps(calls)}],
        "code_contests": [{"description": sums, "generated_tests": stdin}],
        "verifiable_python": [
            {"problem_statement": word, "verification_info": {"language": "python", "test_cases": words}}
        ],
        "webinstruct": [
            {"question": f"Which element has the number {number}?", "answer": name}
            for number, name in ((1, "hydrogen"), (2, "helium"), (3, "lithium"))
        ],
        "ultrachat": [{"prompt": "Write a line about rain."}, {"prompt": "How do I keep a fern alive?"}],
        "wildchat": [{"conversation": [{"role": "user", "content": "Say something kind about tea."}]}],
    }  # fmt: skip


@dataclass
class Oracle:
    """A teacher that knows the problems of a recipe: wrong where the noise says so, its thought another each time.
    As a judge, it looks for the reference in the answer."""

    problems: dict[str, Problem] = field(default_factory=dict)
    asked: Counter[str] = field(default_factory=Counter)

    def __call__(self, prompt: str, noise: int) -> str:
        if "## Answer to be Evaluated" in prompt:
            reference, _, rest = prompt.partition("## Reference Answer\n")[2].partition(
                "\n\n## Answer to be Evaluated\n"
            )
            answer = rest.partition("\n\n## Output Format")[0]
            right = answer.endswith((f"{{{reference}}}", f">{reference}</answer>"))
            self.asked["judge"] += 1
            return json.dumps({"analysis": "compared", "correctness": "correct" if right else "incorrect"})
        problem = next((one for question, one in self.problems.items() if prompt.startswith(question)), None)
        self.asked[problem.kind if problem else "unknown"] += 1
        words = [
            "first",
            "then",
            "also",
            "next",
            "after",
            "these",
            "given",
            "values",
            "steps",
            "count",
            "check",
            "part",
        ]
        thought = " ".join(words[(noise >> place) % len(words)] for place in range(0, 40, 2))
        reply = "\\boxed{0}" if problem is None or noise % 4 == 0 else self.right(problem)
        return f"<think>\nWe {thought} so it is done.\n</think>\n\n{reply}"

    def right(self, problem: Problem) -> str:
        if problem.kind == "code":
            return f"```python\n{CODE[problem.question]}\n```"
        if problem.kind == "none":
            return "A few words, with care."
        if problem.kind == "reasoning_gym":
            return f"<answer>{problem.answer}</answer>"
        return f"\\boxed{{{problem.answer}}}"


@pytest.fixture
def oracle():
    return Oracle()


@pytest.fixture
def server(oracle):
    with StubServer(answer=oracle) as server:
        yield server


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A Qwen2 of two layers with a context of 32,768, which stands for every student's base."""
    folder = tmp_path_factory.mktemp("base")
    tiny_lm("qwen2", max_position_embeddings=32_768).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def common(recipe: Recipe, server: StubServer, base: Path) -> list[str]:
    """What stands for every machine, model and long run that a recipe names."""
    small = dict(
        max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=1, warmup_steps=0, bf16="false",
        optim="adamw_torch", logging_steps=1,
    )  # fmt: skip
    changes = [*(f"sft.{name}={value}" for name, value in small.items()), "sft.save_strategy='no'"]
    changes += ["teacher.engine=endpoint", f"teacher.base_urls=[{server.url}]", f"teacher.model={server.model}"]
    for name in recipe.students:
        changes += [f"students.{name}.model={base}", f"students.{name}.launch=null", f"students.{name}.dtype=float32"]
        changes += [f"students.{name}.sft.activation_offloading=false"]
    if recipe.verify.judge is not None:
        judge = {"base_urls": f"[{server.url}]", "model": server.model, "calibration": 6}
        changes += [f"verify.judge.{name}={value}" for name, value in judge.items()]
    changes += ["evaluate.limit=1", "evaluate.k=1", "evaluate.overrides={max_tokens: 4, temperature: 1.0}"]
    return changes


def local(source: str, file: Path) -> list[str]:
    names = ("config", "split", "revision")
    return [f"problems.{source}.dataset={file}", *(f"problems.{source}.{name}=null" for name in names)]


def shrunk_quickstart(tmp_path: Path) -> list[str]:
    sizes = [f"problems.{name}.limit=6" for name in ("letter_counting", "chain_sum", "leg_counting")]
    few = ["evaluate.tasks=[rg_chain_sum]", "decontaminate.benchmarks=[rg_chain_sum]"]
    return [*sizes, *few, "filter.max_tokens=null"]


def shrunk_gsm8k_endpoint(tmp_path: Path) -> list[str]:
    # As its comment says to run it without the Hub.
    files = [f"problems.gsm8k.dataset={DATA / 'gsm8k'}", "problems.gsm8k.config=null"]
    files += [f"decontaminate.data={DATA}", f"evaluate.data={DATA}"]
    return [*files, "problems.gsm8k.limit=12", "decontaminate.benchmarks=[gsm8k, aime24]"]


def shrunk_qlora_24gb(tmp_path: Path) -> list[str]:
    rows = rows_as_on_the_hub()["openr1_math"]
    return [*local("openr1_math", written(tmp_path / "math.jsonl", rows)), "problems.knights_knaves.limit=1",
            f"decontaminate.data={DATA}", f"evaluate.data={DATA}", "decontaminate.benchmarks=[math500]"]  # fmt: skip


def shrunk_r1(tmp_path: Path) -> list[str]:
    sources = rows_as_on_the_hub().items()
    changes = [one for name, rows in sources for one in local(name, written(tmp_path / f"{name}.jsonl", rows))]
    # Tasks that are scored in this process stand for three of the puzzles: each of those starts a process of its own.
    easy = {"circuit_logic": "gcd", "syllogism": "chain_sum", "futoshiki": "leg_counting"}
    changes += [f"problems.{name}.{key}" for name, task in easy.items() for key in (f"reasoning_gym={task}", "limit=2")]
    changes += [f"decontaminate.data={DATA}", f"evaluate.data={DATA}"]
    changes += ["decontaminate.benchmarks=[aime24]", "evaluate.tasks=[aime24]"]
    return [*changes, "problems.knights_knaves.limit=1", "teacher.correct=1"]


SHRUNK: dict[str, Callable[[Path], list[str]]] = {
    "gsm8k_endpoint": shrunk_gsm8k_endpoint,
    "qlora_24gb": shrunk_qlora_24gb,
    "quickstart": shrunk_quickstart,
    "r1": shrunk_r1,
}


def written(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def finished(tmp_path, oracle, server, base):
    """Runs a shrunk recipe to its end, and once more; returns the recipe and its folder."""

    def run(name: str, students: Sequence[str] | None = None) -> tuple[Recipe, RunDir]:
        changes = [*common(distill_recipe(name), server, base), *SHRUNK[name](tmp_path)]
        recipe = distill_recipe(name, changes)
        oracle.problems = {one.question: one for one, decision in load_problems(recipe) if not decision.reason}
        folder, said = RunDir(tmp_path / "run"), []
        assert run_recipe(recipe, folder, students=students) == ""
        calls = server.calls
        run_recipe(recipe, folder, students=students, say=said.append)
        assert all(line.endswith("done before") for line in said)
        assert server.calls == calls
        return recipe, folder

    return run


def domains(run: RunDir) -> dict[str, int]:
    return dict(run.manifest()["dataset"].counts["domains"])


def results(run: RunDir) -> set[str]:
    return {path.parent.name for path in run.path.glob("eval/*/results.json")}


def test_quickstart_runs(finished):
    _, run = finished("quickstart")
    assert set(domains(run)) == {"words", "arithmetic"}
    assert results(run) == {"teacher", "base", "on_answers", "on_traces"}


@needs_data("gsm8k/train.jsonl", "gsm8k/test.jsonl", "aime24/test.jsonl")
def test_gsm8k_endpoint_runs(finished, oracle):
    _, run = finished("gsm8k_endpoint")
    counts = run.manifest()["traces"].counts
    assert run.manifest()["problems"].counts["in"] == 12
    assert counts["kept"] == 24, "two right traces of each problem"
    assert counts["wrong"] > 0
    assert results(run) == {"teacher", "base", "on_answers", "on_traces"}
    # The published solution is no part of the question, and the answer is what follows its marks.
    assert all(re.fullmatch(r"-?[\d,.]+", one.answer) for one in oracle.problems.values())


@needs_data("math500/test.jsonl")
def test_qlora_24gb_runs(finished):
    _, run = finished("qlora_24gb")
    assert set(domains(run)) == {"math", "logic"}
    assert results(run) == {"base", "qlora"}
    counts = run.manifest()["student:qlora"].counts
    assert 0 < counts["trained_parameters"] < counts["parameters"]
    adapter = read_json(run / "students/qlora/adapter/adapter_config.json")
    assert (adapter["r"], adapter["lora_alpha"]) == (32, 64)
    adapted = {one.rpartition(".")[2] for one in adapter["target_modules"]}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert "quantization_config" not in read_json(run / "students/qlora/model/config.json"), "merged into whole weights"


@needs_data("aime24/test.jsonl")
def test_r1_runs(finished, oracle):
    # Three of the six, which differ in all that a recipe says of a student.
    chosen = ["Distill-Qwen-1.5B", "Distill-Qwen-14B", "Distill-Llama-70B"]
    recipe, run = finished("r1", chosen)
    assert set(domains(run)) == set(PUBLISHED_SAMPLES), "a sample of each line of the mixture"
    assert {"math", "code", "text", "none", "reasoning_gym", "judge"} <= set(oracle.asked)
    for name in chosen:
        config = read_json(run / f"students/{name}/model/config.json")
        raised = "rope_parameters" in recipe.students[name].config
        assert config["rope_parameters"]["rope_theta"] == (300_000 if raised else 10_000)
        shown = read_json(run / f"students/{name}/labels.json")["shown"]
        assert "<｜User｜>" in shown  # noqa: RUF001
        assert "<｜Assistant｜><think>\n⟧We " in shown  # noqa: RUF001
    assert results(run) == {"Distill-Qwen-1.5B", "Distill-Qwen-14B"}


@pytest.mark.parametrize("name", PRETRAIN)
def test_a_pretraining_recipe_runs(name, tmp_path):
    changes = [
        "model.hidden_size=32", "model.intermediate_size=32", "model.num_hidden_layers=2", "training.max_steps=2",
        "training.per_device_train_batch_size=2", "training.disable_tqdm=true", "training.use_cpu=true",
        "dtype=float32", "evaluate=null",
    ]  # fmt: skip
    parts = yaml.safe_load(RECIPES[name].read_text(encoding="utf-8"))["corpus"]["parts"]
    changes += [f"corpus.parts.{place}.documents=4" for place in range(len(parts))]
    recipe = load_recipe(RECIPES[name], changes)
    assert isinstance(recipe, PretrainRecipe)
    run = RunDir(tmp_path / "run")
    assert run_pretrain(recipe, run, say=lambda line: None) == ""
    assert read_json(run / "model/config.json")["model_type"] == recipe.model["model_type"]
