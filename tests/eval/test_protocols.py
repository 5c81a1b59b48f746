"""The protocols say what the papers say, cell by cell; one's own is strict; unlike ones are told apart."""

import pytest

from eval.protocols import PROTOCOLS, get_protocol, protocol_from_yaml
from eval.published import PUBLISHED, published_scores
from eval.tasks import TASKS

R1, CHAT, BASE = PROTOCOLS["deepseek-r1"], PROTOCOLS["deepseek-v3-chat"], PROTOCOLS["deepseek-v3-base"]


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_task_is_covered_or_refused_by_name(name):
    protocol = PROTOCOLS[name]
    for task, benchmark in TASKS.items():
        if protocol.only and task not in protocol.only:
            with pytest.raises(ValueError, match=f"protocol {name}, task {task}: the protocol is defined for"):
                protocol.settings(benchmark)
        else:
            settings = protocol.settings(benchmark)
            assert settings.template in benchmark.prompts
            assert settings.shots == 0 or benchmark.exemplars or len(benchmark.fixed_exemplars) >= settings.shots
    for task in {*protocol.tasks, *protocol.only, *protocol.ours} - {"*"}:
        assert task in TASKS


def test_deepseek_r1_is_the_papers():
    """R1 pp. 11-14: 0.6, 0.95, 32,768 tokens, no system prompt, no few-shot; k of v2."""
    for benchmark in TASKS.values():
        settings = R1.settings(benchmark)
        assert (settings.temperature, settings.top_p, settings.max_tokens) == (0.6, 0.95, 32768)
        assert settings.system is None
        assert settings.shots == 0
        assert settings.open_thought
        assert 4 <= settings.samples <= 64
    samples = {task: R1.settings(TASKS[task]).samples for task in ("aime24", "gpqa_diamond", "math500")}
    assert samples == {"aime24": 64, "gpqa_diamond": 64, "math500": 16}


def test_the_directive_closes_every_prompt_of_mathematics():
    directive = "Please reason step by step, and put your final answer within \\boxed{}."
    from eval.sample import Sample

    for task, benchmark in TASKS.items():
        if benchmark.kind == "math":
            sample = Sample(id="1", task=task, question="What is 1 + 1?", gold="2")
            prompt = benchmark.prompts[R1.settings(benchmark).template](sample, ())
            assert prompt.startswith("What is 1 + 1?")
            assert prompt.endswith(directive)


def test_deepseek_v3_chat_is_the_papers():
    """V3 pp. 30-31: 8,192 tokens; AIME at 0.7, 16 runs; MATH-500 greedy; DROP 3-shot."""
    assert {CHAT.settings(benchmark).max_tokens for benchmark in TASKS.values()} == {8192}
    aime, math = CHAT.settings(TASKS["aime24"]), CHAT.settings(TASKS["math500"])
    assert (aime.temperature, aime.samples, math.temperature, math.samples) == (0.7, 16, 0.0, 1)
    assert CHAT.settings(TASKS["drop"]).shots == 3
    for benchmark in TASKS.values():
        settings = CHAT.settings(benchmark)
        assert settings.samples == 1 or settings.temperature > 0, "several greedy samples are one sample"


def test_deepseek_v3_base_is_the_papers():
    """V3 pp. 24-25: shots, and which sets are judged by perplexity."""
    settings = {task: BASE.settings(TASKS[task]) for task in BASE.only}
    shots = {"mmlu": 5, "mmlu_pro": 5, "ceval": 5, "cmmlu": 5, "drop": 3, "gsm8k": 8, "math": 4, "math500": 4}
    assert {task: one.shots for task, one in settings.items()} == shots
    by_perplexity = {task for task, one in settings.items() if one.mode == "loglikelihood"}
    assert by_perplexity == {"mmlu", "mmlu_pro", "ceval", "cmmlu"}


def test_published_scores_name_protocol_task_and_page():
    for score in PUBLISHED:
        assert score.protocol in PROTOCOLS
        assert score.task in TASKS
        PROTOCOLS[score.protocol].settings(TASKS[score.task])
        assert "arXiv" in score.source
        assert "table" in score.source
        assert 0 < score.value < 100
    cells = [(score.model, score.task, score.metric, score.protocol) for score in PUBLISHED]
    assert len(set(cells)) == len(cells)


def test_published_scores_are_found_by_hub_id_and_by_folder():
    (score,) = [
        one for one in published_scores("/models/DeepSeek-R1-Distill-Llama-8B/", "aime24") if one.metric == "pass@1"
    ]
    assert score.value == 50.4  # not the 41.7 of a well-known secondary table
    assert [one.value for one in published_scores("deepseek-ai/DeepSeek-R1", "gpqa_diamond")] == [71.5]
    assert published_scores("deepseek-ai/DeepSeek-R1-Distill") == []


def test_settings_that_measure_the_same_differ_in_samples_only():
    paper = R1.settings(TASKS["math500"])
    assert paper.unlike(R1.settings(TASKS["math500"], samples=4)) == {}
    assert paper.unlike(R1.settings(TASKS["math500"], max_tokens=2048)) == {"max_tokens": (32768, 2048)}
    assert set(paper.unlike(CHAT.settings(TASKS["math500"]))) >= {"temperature", "max_tokens", "open_thought"}


def test_a_budget_measures_nothing_where_nothing_is_generated():
    assert BASE.settings(TASKS["mmlu"], max_tokens=20).unlike(BASE.settings(TASKS["mmlu"])) == {}
    assert BASE.settings(TASKS["gsm8k"], max_tokens=20).unlike(BASE.settings(TASKS["gsm8k"])) != {}


def test_ones_own_starts_from_a_published_one():
    mine = protocol_from_yaml(
        "name: short\nbase: deepseek-r1\ndefaults: {max_tokens: 2048, samples: 2}\ntasks: {aime24: {samples: 8}}"
    )
    assert mine.settings(TASKS["aime24"]).samples == 8
    # What the file says by default holds over what its base says of a task: 16 there.
    assert mine.settings(TASKS["math500"]).samples == 2
    assert mine.settings(TASKS["math500"]).unlike(R1.settings(TASKS["math500"])) == {"max_tokens": (2048, 32768)}
    assert mine.source == "a file, from deepseek-r1"
    assert mine.choices_of_ours("gsm8k") == R1.choices_of_ours("gsm8k")


def test_ones_own_may_stand_alone(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "name: mine\ndefaults: {mode: completion, template: few_shot, shots: 2, max_tokens: 16}\nonly: [gsm8k]\n"
    )
    assert get_protocol(file).settings(TASKS["gsm8k"]).shots == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: deepseek-r1", "is a published protocol's"),
        ("base: deepseek-r1", "name is missing"),
        ("name: a\nbase: deepseek-r2", "protocol='deepseek-r2' is unknown. Did you mean 'deepseek-r1'?"),
        ("name: a\ntask: {}", "task is unknown. Did you mean 'tasks'?"),
        (
            "name: a\nbase: deepseek-r1\ndefaults: {temprature: 1}",
            "defaults.temprature is unknown. Did you mean 'temperature'?",
        ),
        ("name: a\nbase: deepseek-r1\ntasks: {mmlu: {k: 1}}", "mmlu.k is unknown"),
    ],
)
def test_a_wrong_file_is_refused(text, message):
    with pytest.raises(ValueError, match="protocol") as error:
        protocol_from_yaml(text)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("temperature: -1", "temperature=-1"),
        ("top_p: 0", "top_p=0"),
        ("samples: 0", "samples=0"),
        ("samples: 1.5", "samples=1.5"),
        ("mode: caht", "mode='caht'"),
        ("template: none", "template='none' is none of the task's: "),
        ("mode: loglikelihood", "mode=loglikelihood needs choices"),
        ("temperature: .inf", "temperature=inf"),
    ],
)
def test_a_value_out_of_range_names_protocol_task_and_field(fields, message):
    mine = protocol_from_yaml(f"name: mine\nbase: deepseek-r1\ntasks: {{gsm8k: {{{fields}}}}}")
    with pytest.raises(ValueError, match="protocol mine, task gsm8k") as error:
        mine.settings(TASKS["gsm8k"])
    assert message in str(error.value)


def test_unknown_names():
    with pytest.raises(ValueError, match=r"'deepseek-r' is unknown. Did you mean 'deepseek-r1'\?"):
        get_protocol("deepseek-r")
    with pytest.raises(FileNotFoundError, match="no file"):
        get_protocol("mine.yaml")
