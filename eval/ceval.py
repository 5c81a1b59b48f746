"""C-Eval: Chinese examinations, four choices, 52 subjects (Huang et al. 2023), with 5 worked examples of each.

The 1,346 questions of `val` are asked: the answers of `test` are not published, so scores on it come only from the
authors' server.
"""

# ruff: noqa: RUF001  # Chinese punctuation

from dataclasses import replace
from pathlib import PurePosixPath

from eval.benchmark import Benchmark, Row, Source
from eval.multiple_choice import CHAINS, CHOICE_GRADER, grade_sample, render_choices
from eval.prompts import few_shot_choice, simple_evals_choice, without_examples
from eval.sample import Sample

SUBJECTS = {
    "accountant": "注册会计师",
    "advanced_mathematics": "高等数学",
    "art_studies": "艺术学",
    "basic_medicine": "基础医学",
    "business_administration": "工商管理",
    "chinese_language_and_literature": "中国语言文学",
    "civil_servant": "公务员",
    "clinical_medicine": "临床医学",
    "college_chemistry": "大学化学",
    "college_economics": "大学经济学",
    "college_physics": "大学物理",
    "college_programming": "大学编程",
    "computer_architecture": "计算机组成",
    "computer_network": "计算机网络",
    "discrete_mathematics": "离散数学",
    "education_science": "教育学",
    "electrical_engineer": "注册电气工程师",
    "environmental_impact_assessment_engineer": "环境影响评价工程师",
    "fire_engineer": "注册消防工程师",
    "high_school_biology": "高中生物",
    "high_school_chemistry": "高中化学",
    "high_school_chinese": "高中语文",
    "high_school_geography": "高中地理",
    "high_school_history": "高中历史",
    "high_school_mathematics": "高中数学",
    "high_school_physics": "高中物理",
    "high_school_politics": "高中政治",
    "ideological_and_moral_cultivation": "思想道德修养与法律基础",
    "law": "法学",
    "legal_professional": "法律职业资格",
    "logic": "逻辑学",
    "mao_zedong_thought": "毛泽东思想和中国特色社会主义理论体系概论",
    "marxism": "马克思主义基本原理",
    "metrology_engineer": "注册计量师",
    "middle_school_biology": "初中生物",
    "middle_school_chemistry": "初中化学",
    "middle_school_geography": "初中地理",
    "middle_school_history": "初中历史",
    "middle_school_mathematics": "初中数学",
    "middle_school_physics": "初中物理",
    "middle_school_politics": "初中政治",
    "modern_chinese_history": "近代史纲要",
    "operating_system": "操作系统",
    "physician": "医师资格",
    "plant_protection": "植物保护",
    "probability_and_statistics": "概率统计",
    "professional_tour_guide": "导游资格",
    "sports_science": "体育学",
    "tax_accountant": "税务师",
    "teacher_qualification": "教师资格",
    "urban_and_rural_planner": "注册城乡规划师",
    "veterinary_medicine": "兽医学",
}

VAL = Source(
    hub="ceval/ceval-exam",
    config=tuple(SUBJECTS),
    split="val",
    file="ceval/ceval.zip",
    members="val/*.csv",
    sha256="68786deeea68ff089c56563ee48fab8160da857b77b913437bb504d681fd8e20",
    rows=1346,
    requires=("question", "A", "B", "C", "D"),
)
DEV = replace(VAL, split="dev", members="dev/*.csv", rows=260)


def to_sample(row: Row, index: int) -> Sample:
    if not row.get("answer"):
        raise ValueError(
            f"ceval: row {index} has no answer. The answers of C-Eval's test split are not published; use val"
        )
    subject = row.get("_config") or PurePosixPath(row["_file"]).stem.rsplit("_", 1)[0]
    return Sample(
        id=f"{subject}/{row['id']}",
        task="ceval",
        question=row["question"],
        choices=tuple(row[letter] for letter in "ABCD"),
        gold=row["answer"],
        group=subject,
    )


def subject_name(sample: Sample) -> str:
    return SUBJECTS.get(sample.group, sample.group)


@without_examples
def zero_shot(sample: Sample) -> str:
    """Ours, for "C-Eval made zero-shot" (DeepSeek-R1, p. 11)."""
    return (
        f"以下是中国关于{subject_name(sample)}考试的单项选择题，请选出其中的正确答案。请逐步思考，并在最后一行以“答案：X”的形式"
        f"给出答案，其中 X 是正确选项的字母。\n\n{sample.question}\n{render_choices(sample.choices, 'A. ')}"
    )


CEVAL = Benchmark(
    name="ceval",
    title="C-Eval",
    source=VAL,
    licence="CC BY-NC-SA 4.0",
    citation="Huang et al. 2023, C-Eval, arXiv 2305.08322",
    kind="choice",
    to_sample=to_sample,
    prompts={
        "zero_shot": zero_shot,
        "simple_evals": simple_evals_choice,
        # DeepSeek-V2, appendix G, table 15.
        "few_shot": few_shot_choice(
            header="以下是中国关于{subject}考试的单项选择题，请选出其中的正确答案。",
            answer="答案：",
            subject=subject_name,
        ),
    },
    grade=grade_sample,
    grader=CHOICE_GRADER,
    chains=tuple(CHAINS),
    exemplars=DEV,
    stop=("\n\n",),
    chance=0.25,
)
