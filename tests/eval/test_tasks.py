"""Every task: its rows as published, gold answers graded correct, its templates to the letter, its errors."""
# ruff: noqa: RUF001  # Chinese punctuation

import csv
import hashlib
import importlib.util
import json
import subprocess
import sys
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from eval.benchmark import duplicates, exemplars, load, read_rows
from eval.gpqa import ANSWERS, GPQA_DIAMOND, GPQA_MAIN
from eval.hendrycks_math import MATH, SUBJECTS, last_box
from eval.metrics import score_interval
from eval.mmlu_pro import INSTRUCTION
from eval.multiple_choice import LETTERS, permuted
from eval.prompts import MINERVA
from eval.protocols import PROTOCOLS
from eval.reasoning_gym_tasks import DATASETS, SEED, problems
from eval.sample import Sample
from eval.tasks import TASKS, get_task
from tests.eval.data import DATA, needs_data

LOCAL = [name for name, task in TASKS.items() if (DATA / task.source.file).is_file()]
CHOICES = {"mmlu": 4, "mmlu_pro": 10, "ceval": 4, "cmmlu": 4}
FILES = ["mmlu/mmlu.zip", "mmlu_pro/test.jsonl.gz", "math500/test.jsonl", "aime24/test.jsonl", "aime25/test.jsonl"]
FILES += ["gsm8k/test.jsonl", "ceval/ceval.zip", "cmmlu/cmmlu.zip"]
needs_all = needs_data(*FILES)


@pytest.fixture(scope="module")
def samples():
    return {name: load(TASKS[name], DATA) for name in LOCAL}


# The table.


def test_every_entry_is_whole():
    for name, task in TASKS.items():
        assert task.name == name
        assert task.licence
        assert task.citation
        assert task.prompts
        assert "default" in task.chains
        assert task.source.rows > 0
        assert (task.kind == "choice") == (task.chance > 0)
        assert len(task.source.sha256) in (0, 64)
    # No pinned revision of these two is known to us: what is read is checked by its number of rows.
    unpinned = {name for name, task in TASKS.items() if len(task.source.revision) != 40} - {*LOCAL_ONLY}
    assert unpinned == {"ceval", "cmmlu"}


LOCAL_ONLY = [f"rg_{dataset}" for dataset in DATASETS]  # generated


def test_every_protocol_finds_its_templates():
    for protocol in PROTOCOLS.values():
        for name in protocol.only or TASKS:
            settings = protocol.settings(TASKS[name])
            assert settings.template in TASKS[name].prompts
            assert settings.chain in TASKS[name].chains
            if settings.shots:
                assert TASKS[name].exemplars or len(TASKS[name].fixed_exemplars) >= settings.shots


def test_an_unknown_task_is_an_error_with_the_nearest_name():
    assert get_task("mmlu") is TASKS["mmlu"]
    with pytest.raises(ValueError, match=r"'gpqa_dimond' is unknown\. Did you mean 'gpqa_diamond'\?"):
        get_task("gpqa_dimond")
    with pytest.raises(ValueError, match="no answers of its test split; use 'ceval'"):
        get_task("ceval_test")


def test_the_table_imports_neither_torch_nor_the_network_nor_a_generator():
    heavy = ("torch", "datasets", "sympy", "scipy", "numpy", "reasoning_gym")
    code = f"import sys; import eval.tasks; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert done.stdout.strip() == "[]"


# The published rows.


@needs_all
def test_the_published_numbers_of_rows(samples):
    counts = {name: len(rows) for name, rows in samples.items()}
    assert counts == {
        "mmlu": 14042, "mmlu_pro": 12032, "math500": 500, "aime24": 30, "aime25": 30, "gsm8k": 1319, "ceval": 1346,
        "cmmlu": 11582,
    }  # fmt: skip
    groups = {name: len({one.group for one in rows}) for name, rows in samples.items()}
    assert groups["mmlu"] == 57
    assert groups["mmlu_pro"] == 14
    assert groups["math500"] == 7
    assert groups["ceval"] == 52
    assert groups["cmmlu"] == 67
    assert Counter(len(one.choices) for one in samples["mmlu_pro"])[10] == 9982


@needs_all
@pytest.mark.parametrize(("name", "rows"), [("mmlu", 285), ("ceval", 260), ("cmmlu", 335)])
def test_five_worked_examples_of_each_subject(samples, name, rows):
    task = TASKS[name]
    pool = [task.to_sample(row, index) for index, row in enumerate(read_rows(task.exemplars, DATA))]
    assert len(pool) == rows
    for one in {sample.group: sample for sample in samples[name]}.values():
        examples = exemplars(task, one, pool, 5)
        assert {example.group for example in examples} == {one.group}
        assert task.prompts["few_shot"](one, examples).count("\nD. ") == 6
    with pytest.raises(ValueError, match="has 5 worked examples"):
        exemplars(task, samples[name][0], pool, 6)


# Groups of equal questions in the published sets, and the questions beyond the first of each. They stay in.
DUPLICATES = {"mmlu": (105, 105), "mmlu_pro": (159, 159), "ceval": (1, 1), "cmmlu": (3, 3)}


@needs_all
def test_duplicates_are_counted_and_kept(samples):
    for name in LOCAL:
        groups = duplicates(samples[name])
        assert (len(groups), sum(len(ids) - 1 for ids in groups)) == DUPLICATES.get(name, (0, 0)), name


# Grading.

FORMS = {
    "default": ["Answer: {}", "so the answer is ({}).", "\\boxed{{{}}}", "**Answer:** {}", "答案：{}"],
    "simple_evals": ["Reasoning.\nAnswer: {}"],
    "mmlu_pro": ["so the answer is ({})."],
}


@needs_all
@pytest.mark.parametrize("name", CHOICES)
def test_the_gold_letter_grades_correct_and_nothing_else_does(samples, name):
    grade = TASKS[name].grade
    for chain, forms in FORMS.items():
        for form in forms:
            verdicts = Counter(grade(one, form.format(one.gold), chain).verdict for one in samples[name])
            assert verdicts == {"correct": len(samples[name])}, (chain, form)
        empty = Counter(grade(one, "", chain).verdict for one in samples[name])
        assert empty == {"no_answer": len(samples[name])}
    for one in samples[name]:
        other = LETTERS[(LETTERS.index(one.gold) + 1) % len(one.choices)]
        assert grade(one, f"Answer: {other}", "default").verdict == "wrong"


@needs_all
@pytest.mark.parametrize("name", ["math500", "aime24", "aime25", "gsm8k"])
def test_the_gold_answer_grades_correct(samples, name):
    grade = TASKS[name].grade
    for one in samples[name]:
        for text in (f"Thus \\boxed{{{one.gold}}}.", f"Reasoning.\n\nAnswer: {one.gold}"):
            graded = grade(one, text, "default")
            assert graded.verdict == "correct", (one.id, one.gold, graded)
        assert grade(one, "", "default").verdict == "no_answer"


@needs_all
def test_the_published_solutions_grade_correct(samples):
    for one in samples["gsm8k"]:
        solution = f"{one.meta['solution']}\n#### {one.gold}"
        assert TASKS["gsm8k"].grade(one, solution, "default").verdict == "correct", one.id
        assert TASKS["gsm8k"].grade(one, solution, "official").verdict == "correct", one.id
        assert TASKS["gsm8k"].grade(one, "", "official").verdict == "no_answer"
    wrong = [
        one.id
        for one in samples["math500"]
        if TASKS["math500"].grade(one, one.meta["solution"], "default").verdict != "correct"
    ]
    assert wrong == []
    # The published answer of every MATH problem is the last box of its solution; PRM800K's copy tidied a few.
    boxes = sum(last_box(one.meta["solution"]) == one.gold for one in samples["math500"])
    assert boxes >= 490


@needs_all
@pytest.mark.parametrize("name", ["mmlu", "ceval", "cmmlu"])
def test_always_a_scores_a_quarter(samples, name):
    grade, n = TASKS[name].grade, len(samples[name])
    shown = sum(grade(one, "Answer: A", "default").credit for one in samples[name])
    assert 0.22 < shown / n < 0.28  # as published; MMLU prefers D
    mixed = [grade(permuted(one, 0), "Answer: A", "default").credit for one in samples[name]]
    low, high = score_interval(mixed).interval
    assert low < 0.25 < high


# Ids and orders.


@needs_all
def test_samples_do_not_depend_on_the_order_or_the_number_that_is_read(samples):
    rows = read_rows(TASKS["mmlu"].source, DATA)
    one_by_one = [TASKS["mmlu"].to_sample(rows[index], index) for index in (7, 3, 5)]
    assert one_by_one == [samples["mmlu"][index] for index in (7, 3, 5)]
    for name in CHOICES:
        some = [permuted(one, 3) for one in reversed(samples[name][:50])]
        assert list(reversed(some)) == [permuted(one, 3) for one in samples[name]][:50]
        assert any(one.permutation != tuple(range(len(one.choices))) for one in some)
        for one, shown in zip(samples[name], some[::-1], strict=False):
            assert shown.choices[LETTERS.index(shown.gold)] == one.choices[LETTERS.index(one.gold)]
    for rows in samples.values():
        assert all(Sample.from_json(one.to_json()) == one for one in rows[:20])


# Templates.

ONE = Sample(id="1", task="t", question="What is 1 + 1?", gold="B", choices=("1", "2", "3"), group="high_school_x")
TWO = Sample(id="2", task="t", question="What is 2 + 2?", gold="C", choices=("1", "2", "4"), group="high_school_x")
WORKED = replace(TWO, meta={"cot": "A: Let's think step by step. Add. The answer is (C).", "solution": "Add."})

SIMPLE_EVALS = """Answer the following multiple choice question. The last line of your response should be of the \
following format: 'Answer: $LETTER' (without quotes) where LETTER is one of ABC. Think step by step before answering.

What is 1 + 1?

A) 1
B) 2
C) 3"""
SIMPLE_EVALS_MATH = """Solve the following math problem step by step. The last line of your response should be of the \
form Answer: $ANSWER (without quotes) where $ANSWER is the answer to the problem.

What is 1 + 1?

Remember to put your answer on its own line after "Answer:", and you do not need to use a \\boxed command."""
BOXED = "What is 1 + 1?\nPlease reason step by step, and put your final answer within \\boxed{}."
FEW_SHOT = """The following are multiple choice questions (with answers) about high school x.

What is 2 + 2?
A. 1
B. 2
C. 4
Answer: C

What is 1 + 1?
A. 1
B. 2
C. 3
Answer:"""
OFFICIAL = """The following are multiple choice questions (with answers) about high_school_x. Think step by step and \
then finish your answer with "the answer is (X)" where X is the correct letter choice.

Question:
What is 2 + 2?
Options:
A. 1
B. 2
C. 4
Answer: Let's think step by step. Add. The answer is (C).

Question:
What is 1 + 1?
Options:
A. 1
B. 2
C. 3
Answer: Let's think step by step."""
ZERO_SHOT = f"The following is a multiple choice question about high school x.\n\n{SIMPLE_EVALS}"
ZERO_SHOT_PRO = """The following is a multiple choice question about high_school_x. Think step by step and then finish \
your answer with "the answer is (X)" where X is the correct letter choice.

Question:
What is 1 + 1?
Options:
A. 1
B. 2
C. 3"""
CEVAL = """以下是中国关于教育学考试的单项选择题，请选出其中的正确答案。

What is 2 + 2?
A. 1
B. 2
C. 4
答案：C

What is 1 + 1?
A. 1
B. 2
C. 3
答案："""
CMMLU = """以下是关于解剖学的单项选择题，请直接给出正确答案的选项。

题目：What is 2 + 2?
A. 1
B. 2
C. 4
答案是：C

题目：What is 1 + 1?
A. 1
B. 2
C. 3
答案是："""
CEVAL_ZERO = (
    "以下是中国关于教育学考试的单项选择题，请选出其中的正确答案。"
    "请逐步思考，并在最后一行以“答案：X”的形式给出答案，其中 X 是正确选项的字母。"
    "\n\nWhat is 1 + 1?\nA. 1\nB. 2\nC. 3"
)
CMMLU_ZERO = (
    "以下是关于解剖学的单项选择题，请选出其中的正确答案。"
    "请逐步思考，并在最后一行以“答案：X”的形式给出答案，其中 X 是正确选项的字母。"
    "\n\n题目：What is 1 + 1?\nA. 1\nB. 2\nC. 3"
)
MINERVA_FORM = """Problem:
What is 2 + 2?

Solution:
Add.
Final Answer: The final answer is $C$. I hope it is correct.

Problem:
What is 1 + 1?

Solution:"""
GSM8K = """Q: What is 2 + 2?
A: Let's think step by step. Add. The answer is C.

Q: What is 1 + 1?
A: Let's think step by step."""


@pytest.mark.parametrize(
    ("task", "template", "group", "shots", "prompt"),
    [
        ("mmlu", "simple_evals", "", 0, SIMPLE_EVALS),
        ("mmlu", "few_shot", "", 1, FEW_SHOT),
        ("mmlu", "zero_shot", "", 0, ZERO_SHOT),
        ("mmlu_pro", "official", "", 1, OFFICIAL),
        ("mmlu_pro", "zero_shot", "", 0, ZERO_SHOT_PRO),
        ("mmlu_pro", "simple_evals", "", 0, SIMPLE_EVALS),
        ("mmlu_pro", "few_shot", "", 1, FEW_SHOT.replace("high school x", "high_school_x")),
        ("gpqa_main", "simple_evals", "", 0, SIMPLE_EVALS),
        ("gpqa_diamond", "zero_shot", "", 0, SIMPLE_EVALS),
        ("ceval", "few_shot", "education_science", 1, CEVAL),
        ("ceval", "zero_shot", "education_science", 0, CEVAL_ZERO),
        ("ceval", "simple_evals", "", 0, SIMPLE_EVALS),
        ("cmmlu", "few_shot", "anatomy", 1, CMMLU),
        ("cmmlu", "zero_shot", "anatomy", 0, CMMLU_ZERO),
        ("cmmlu", "simple_evals", "", 0, SIMPLE_EVALS),
        ("math500", "boxed", "", 0, BOXED),
        ("math500", "simple_evals", "", 0, SIMPLE_EVALS_MATH),
        ("math", "few_shot", "", 1, MINERVA_FORM),
        ("aime24", "boxed", "", 0, BOXED),
        ("gsm8k", "few_shot", "", 1, GSM8K),
        ("rg_gcd", "zero_shot", "", 0, "What is 1 + 1?"),
    ],
)  # fmt: skip
def test_templates_to_the_letter(task, template, group, shots, prompt):
    sample, example = replace(ONE, group=group or ONE.group), replace(WORKED, group=group or ONE.group)
    assert TASKS[task].prompts[template](sample, [example][:shots]) == prompt


def test_a_template_without_a_place_for_examples_refuses_them():
    for task, template in (("mmlu", "simple_evals"), ("math500", "boxed"), ("mmlu_pro", "zero_shot")):
        with pytest.raises(ValueError, match="no place for worked examples, and shots=1"):
            TASKS[task].prompts[template](ONE, [TWO])


@pytest.fixture(scope="module")
def lm_eval_file():
    package = importlib.util.find_spec("lm_eval")
    if package is None:
        pytest.skip("lm-eval is not installed")

    def read(name):
        return Path(package.submodule_search_locations[0]) / "tasks" / name

    return read


def test_the_official_mmlu_pro_prompt_is_that_of_lm_eval(lm_eval_file):
    spec = importlib.util.spec_from_file_location("lm_eval_mmlu_pro", lm_eval_file("mmlu_pro/utils.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rows = [
        {"question": one.question, "options": list(one.choices), "cot_content": WORKED.meta["cot"]}
        for one in (TWO, ONE)
    ]
    theirs = module.format_cot_example(rows[0]) + module.format_cot_example(rows[1], including_answer=False)
    ours = TASKS["mmlu_pro"].prompts["official"](ONE, [WORKED])
    assert ours == INSTRUCTION.format(subject="high_school_x") + "\n\n" + theirs
    description = lm_eval_file("mmlu_pro/mmlu_pro_biology.yaml").read_text().split("\n")[0]
    assert json.loads(description.removeprefix("description: ")).strip() == INSTRUCTION.format(subject="biology")


def test_the_minerva_examples_are_those_of_lm_eval(lm_eval_file):
    """But for the stray brace after the first problem, which DeepSeek's prompt has and lm-eval has removed."""
    text = lm_eval_file("minerva_math/utils.py").read_text()
    body = text[text.index("    return [\n        {") : text.index("def process_results")]
    theirs = eval(body.strip().removeprefix("return "))
    for (problem, solution, answer), one in zip(MINERVA, theirs, strict=True):
        assert problem.removesuffix("}") == one["problem"]
        assert f"{solution}\nFinal Answer: The final answer is ${answer}$. I hope it is correct." == one["solution"]


# Layouts and errors.


def small(source, **changes):
    return replace(source, **changes)


def test_gpqa_from_a_file_in_its_layout(tmp_path):
    columns = ["Record ID", "Question", *ANSWERS, "High-level domain", "Subdomain", "Canary String"]
    with (tmp_path / "gpqa_diamond.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for n in range(198):
            writer.writerow(
                [f"rec{n}", f"Made up, question\n{n}?", f"right {n}", "w1", "w2", "w3 ", "Physics", "Optics", "x"]
            )
    samples = load(GPQA_DIAMOND, {"gpqa_diamond": tmp_path / "gpqa_diamond.csv"})
    assert len(samples) == 198
    assert samples[5].id == "rec5"
    assert samples[5].question == "Made up, question\n5?"
    assert samples[5].meta == {"subdomain": "Optics"}
    for n, one in enumerate(samples):
        assert one.choices[LETTERS.index(one.gold)] == f"right {n}"
        assert sorted(one.choices) == sorted([f"right {n}", "w1", "w2", "w3 "])
    golds = Counter(one.gold for one in samples)
    assert len(golds) == 4  # the rows give the right answer first; the sample does not
    assert max(golds.values()) < 75
    assert GPQA_DIAMOND.confidential
    assert GPQA_MAIN.confidential
    with pytest.raises(ValueError, match="has 198 rows, and the published set has 448"):
        load(GPQA_MAIN, tmp_path / "gpqa_diamond.csv")


def test_math_from_a_folder_and_from_a_zip(tmp_path):
    folder = tmp_path / "MATH"
    for subject in SUBJECTS[:2]:
        for n in (1, 2, 10):
            file = folder / "test" / subject / f"{n}.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            kind = subject.replace("_and_", " & ").title()
            problem = {
                "problem": f"{subject} {n}?",
                "level": "Level 2",
                "type": kind,
                "solution": f"It is $\\boxed{{{n}}}$.",
            }
            file.write_text(json.dumps(problem))
    (folder / "train" / "algebra").mkdir(parents=True)
    (folder / "train" / "algebra" / "1.json").write_text("{}")
    with zipfile.ZipFile(tmp_path / "MATH.zip", "w") as archive:
        for file in folder.rglob("*.json"):
            archive.write(file, file.relative_to(tmp_path))
    task = replace(MATH, source=small(MATH.source, rows=6))
    from_folder, from_zip = load(task, folder), load(task, tmp_path / "MATH.zip")
    assert from_folder == from_zip
    assert [one.id for one in from_folder][:3] == ["test/algebra/1.json", "test/algebra/10.json", "test/algebra/2.json"]
    assert [one.gold for one in from_folder] == ["1", "10", "2"] * 2
    assert from_folder[3].group == "Counting & Probability"
    assert all(task.grade(one, f"\\boxed{{{one.gold}}}", "default").verdict == "correct" for one in from_folder)
    hub = MATH.to_sample(
        {"problem": "?", "level": "Level 1", "type": "Counting & Probability", "solution": "\\boxed 3"}, 7
    )
    assert (hub.id, hub.gold) == ("counting_and_probability/7", "3")


def test_the_last_box():
    assert last_box("$\\boxed{\\frac{1}{2}}$ no, $\\boxed{\\text{(A)}}$") == "\\text{(A)}"
    assert last_box("\\fbox{3}") == "3"
    assert last_box("is $\\boxed 7$.") == "7"
    for wrong in ("no box", "\\boxed{1"):
        with pytest.raises(ValueError, match="box"):
            last_box(wrong)


@needs_data("mmlu/mmlu.zip")
def test_an_unpacked_archive_is_read_as_the_archive(tmp_path, samples):
    with zipfile.ZipFile(DATA / "mmlu/mmlu.zip") as archive:
        archive.extractall(tmp_path / "mmlu" / "mmlu")
    assert load(TASKS["mmlu"], tmp_path) == samples["mmlu"]


@needs_data("gsm8k/test.jsonl")
def test_a_parquet_file_is_read_as_the_jsonl(tmp_path, samples):
    import pyarrow
    import pyarrow.parquet

    rows = read_rows(TASKS["gsm8k"].source, DATA)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([dict(row) for row in rows]), tmp_path / "test.parquet")
    task = replace(TASKS["gsm8k"], source=small(TASKS["gsm8k"].source, sha256=""))
    assert load(task, tmp_path / "test.parquet") == samples["gsm8k"]


def test_files_that_are_not_the_published_ones(tmp_path):
    task = TASKS["gsm8k"]
    with pytest.raises(FileNotFoundError, match=r"no gsm8k/test\.jsonl under .*leave out the data folder"):
        load(task, tmp_path)
    (tmp_path / "gsm8k").mkdir()
    file = tmp_path / "gsm8k" / "test.jsonl"
    file.write_text(json.dumps({"question": "?", "answer": "x\n#### 3"}) + "\n")
    with pytest.raises(ValueError, match=r"has sha256 .*get the original, or accept it with --changed-data"):
        load(task, tmp_path)
    assert load(task, tmp_path, changed=True)[0].gold == "3"
    right = hashlib.sha256(file.read_bytes()).hexdigest()
    with pytest.raises(ValueError, match="has 1 rows, and the published set has 1319"):
        load(replace(task, source=small(task.source, sha256=right)), tmp_path)
    file.write_text(json.dumps({"question": "?"}) + "\n")
    with pytest.raises(ValueError, match="row 0 has no column 'answer'; it has question"):
        load(task, tmp_path, changed=True)
    file.write_text(json.dumps({"question": "?", "answer": "none"}) + "\n")
    with pytest.raises(ValueError, match="row 0 has no '#### N'"):
        load(task, tmp_path, changed=True)
    with pytest.raises(ValueError, match="no data is named for the task gsm8k"):
        load(task, {"mmlu": tmp_path})


def test_ceval_without_answers_says_why(tmp_path):
    file = tmp_path / "accountant_test.csv"
    file.write_text("id,question,A,B,C,D\n0,q,1,2,3,4\n")
    task = replace(TASKS["ceval"], source=small(TASKS["ceval"].source, sha256="", rows=1))
    with pytest.raises(ValueError, match="answers of C-Eval's test split are not published; use val"):
        load(task, file)


def test_ids_that_stand_twice_are_an_error(tmp_path):
    row = {"problem": "?", "solution": "", "answer": "1", "subject": "s", "level": 1, "unique_id": "same"}
    (tmp_path / "x.jsonl").write_text(f"{json.dumps(row)}\n" * 2)
    with pytest.raises(ValueError, match="1 of 2 ids stand twice"):
        load(TASKS["math500"], tmp_path / "x.jsonl", changed=True)


# The Hub.


def test_the_hub_is_asked_for_every_config_at_the_pinned_revision(monkeypatch):
    import datasets

    asked = []

    def load_dataset(hub, config, *, split, revision):
        asked.append((hub, config, split, revision))
        return [{"problem": "?", "level": "Level 1", "type": "Algebra", "solution": "\\boxed{1}"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    samples = load(replace(MATH, source=small(MATH.source, rows=7)))
    revision = "21a5633873b6a120296cce3e2df9d5550074f4a3"
    assert asked == [("EleutherAI/hendrycks_math", subject, "test", revision) for subject in SUBJECTS]
    assert len(samples) == 7


def test_the_rows_of_the_hub_give_the_samples_of_the_files():
    mmlu = TASKS["mmlu"].to_sample
    row = {"question": "q", "subject": "anatomy", "choices": ["1", "2", "3", "4"], "answer": 2}
    file = {
        "question": "q",
        "A": "1",
        "B": "2",
        "C": "3",
        "D": "4",
        "answer": "C",
        "_file": "data/test/anatomy_test.csv",
    }
    assert mmlu(row, 3) == mmlu(file, 3)
    ceval = TASKS["ceval"].to_sample
    row = {"id": 4, "question": "q", "A": "1", "B": "2", "C": "3", "D": "4", "answer": "C"}
    assert ceval({**row, "_config": "law"}, 9) == ceval({**row, "_file": "val/law_val.csv"}, 2)
    aime = TASKS["aime24"].to_sample
    assert aime({"problem": "p", "answer": "073"}, 1) == aime({"problem": "p", "expected_answer": "73"}, 1)
    with pytest.raises(ValueError, match="row 1 has neither expected_answer nor answer"):
        aime({"problem": "p"}, 1)
    assert TASKS["gsm8k"].to_sample({"question": "q", "answer": "So.\n#### 1,234"}, 0).gold == "1234"
    pro = TASKS["mmlu_pro"].to_sample
    row = {"question_id": 70, "question": "q", "options": ["1", "2", "N/A"], "answer": "B", "category": "law"}
    assert pro(row, 0).choices == ("1", "2")


# reasoning-gym.


@pytest.mark.parametrize("dataset", DATASETS)
def test_generated_tasks(dataset):
    if importlib.util.find_spec("reasoning_gym") is None:  # importing it is another matter: it may lack pycosat
        pytest.skip("the extra reasoning-gym is not installed")
    task = TASKS[f"rg_{dataset}"]
    samples = load(task, DATA)
    assert len(samples) == 200
    assert samples == load(task)
    for one in samples:
        for text in (
            one.gold,
            f"Thinking.\n{one.gold}",
            f"<answer>{one.gold}</answer>",
            f"So \\boxed{{{one.gold}}}.",
            f"The answer is {one.gold}.",
        ):
            assert task.grade(one, text, "default").verdict == "correct", (one.gold, text)
        assert task.grade(one, "", "default").verdict == "no_answer"
        assert task.grade(one, f"{one.gold}7x", "default").verdict == "wrong"
        assert Sample.from_json(one.to_json()) == one  # what is stored is enough to judge again
    few = [row["question"] for row in problems(dataset, 3, SEED)]
    assert few == [row["question"] for row in problems(dataset, 9, SEED)][:3]
    assert few != [row["question"] for row in problems(dataset, 3, SEED + 1000)]
    assert sum(len(ids) - 1 for ids in duplicates(samples)) < 40


def test_generated_tasks_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ImportError, match=r"pip install 'deepseek-hf\[reasoning-gym\]'"):
        load(TASKS["rg_gcd"])
