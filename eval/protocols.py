"""How a score is obtained: DeepSeek's published protocols as objects that cite their source, and one's own in YAML.

A `Protocol` resolves to `Settings` for one task: defaults, then what holds for the kind of task, then for the task.
Two scores can be compared only if their settings are equal, but for the number of samples, which moves the interval and
not the value. Whatever a paper leaves open is our choice and stands in `ours`, so that a report can say so.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from eval.benchmark import Benchmark
from eval.yaml_files import nearest, parse_yaml, read_yaml, validated

STRICT = ConfigDict(frozen=True, extra="forbid", strict=True)


class Settings(BaseModel):
    """Everything that decides the prompt, the sampling and the reading of one task's answers.

    `mode`: `chat` goes through the model's chat template, `completion` is plain text, `loglikelihood` generates nothing
    and takes the choice of lowest perplexity. `samples` is k, per question; `max_tokens` is the budget of one sample,
    thought included. `temperature` 0 is greedy. `open_thought` starts the reply with `<think>\\n` where the template
    does not. `chain` names the extraction of a letter (`multiple_choice.CHAINS`). `permutation` orders the choices:
    as `published`, or `per_sample`, another seeded order for each of the k samples of an item.
    """

    model_config = STRICT

    mode: Literal["chat", "completion", "loglikelihood"]
    template: str
    shots: int = Field(0, ge=0)
    samples: int = Field(1, ge=1)
    temperature: float = Field(0.0, ge=0, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1)
    max_tokens: int = Field(ge=0)
    system: str | None = None
    open_thought: bool = False
    chain: str = "default"
    permutation: Literal["published", "per_sample"] = "published"

    def unlike(self, other: "Settings") -> dict[str, tuple[Any, Any]]:
        """The fields in which two settings measure different things: name to both values."""
        nothing = {"samples"}
        if self.mode == other.mode == "loglikelihood":  # nothing is generated
            nothing |= {"temperature", "top_p", "max_tokens"}
        ours, theirs = self.model_dump(exclude=nothing), other.model_dump(exclude=nothing)
        return {name: (ours[name], theirs[name]) for name in ours if ours[name] != theirs[name]}


class Protocol(BaseModel):
    """A way to ask, with its source. `kinds` and `tasks` hold what differs from `defaults`, by kind and by task name.

    `only` lists the tasks the protocol is defined for; empty means all. `ours` maps a task, or "*", to the settings
    that the source leaves open and that we chose. `base` is the published protocol that one's own started from.
    """

    model_config = STRICT

    name: str
    source: str
    defaults: dict[str, Any]
    kinds: dict[str, dict[str, Any]] = {}
    tasks: dict[str, dict[str, Any]] = {}
    only: list[str] = []
    ours: dict[str, str] = {}
    base: str = ""

    def settings(self, benchmark: Benchmark, **overrides: Any) -> Settings:
        """The settings for one task; None among `overrides` leaves the protocol's value.

        Raises ValueError, naming the protocol, the task and the field, where the protocol does not cover the task,
        a field is unknown or a value is out of range.
        """
        where = f"protocol {self.name}, task {benchmark.name}"
        if self.only and benchmark.name not in self.only:
            raise ValueError(
                f"{where}: the protocol is defined for {', '.join(self.only)}; use another one, or your own in YAML"
            )
        merged = {**self.defaults, **self.kinds.get(benchmark.kind, {}), **self.tasks.get(benchmark.name, {})}
        merged.update({name: value for name, value in overrides.items() if value is not None})
        settings = validated(Settings, merged, where)
        if settings.template not in benchmark.prompts:
            raise ValueError(
                f"{where}: template={settings.template!r} is none of the task's: {', '.join(benchmark.prompts)}"
            )
        if settings.mode == "loglikelihood" and benchmark.kind != "choice":
            raise ValueError(
                f"{where}: mode=loglikelihood needs choices, and the answers here are free; use chat or completion"
            )
        return settings

    def choices_of_ours(self, task: str) -> list[str]:
        """What the source leaves open for a task, one line each."""
        return [self.ours[key] for key in ("*", task) if key in self.ours]


# R1 p. 11-14 and the README's usage notes: temperature 0.6, top-p 0.95, 32,768 tokens, no system prompt, no few-shot,
# the directive for mathematics, the reply started with <think>; simple-evals prompts for MMLU, DROP and GPQA-Diamond;
# MMLU-Pro and C-Eval made zero-shot. v2 (arXiv 2501.12948v2) gives k = 64 for AIME and GPQA-Diamond, 16 for MATH-500.
DEEPSEEK_R1 = Protocol(
    name="deepseek-r1",
    source="DeepSeek-R1, arXiv 2501.12948 v1 pp. 11-14 and README; k from v2 (supplement)",
    defaults=dict(
        mode="chat", template="zero_shot", samples=4, temperature=0.6, top_p=0.95, max_tokens=32768, open_thought=True
    ),
    kinds={"math": dict(template="boxed")},
    tasks={
        "mmlu": dict(template="simple_evals"),
        "gpqa_main": dict(template="simple_evals", permutation="per_sample"),
        "gpqa_diamond": dict(template="simple_evals", samples=64, permutation="per_sample"),
        "drop": dict(template="simple_evals"),
        "aime24": dict(samples=64),
        "aime25": dict(samples=64),
        "math500": dict(samples=16),
    },
    ours={
        "*": "extraction of the answer: our default chain, since the paper names none",
        "mmlu": "k = 4, the lower end of the paper's 'typically between 4 and 64'",
        "mmlu_pro": "k = 4 and the wording of the zero-shot prompt",
        "ceval": "k = 4 and the wording of the zero-shot prompt",
        "cmmlu": "not in the paper: k = 4 and the wording of the zero-shot prompt",
        "drop": "k = 4",
        "gsm8k": "not in the paper: k = 4 and the directive for mathematics",
        "math": "not in the paper: k = 4",
        "gpqa_main": "the paper has the diamond set only: k = 4",
        "aime25": "after the paper: as AIME 2024",
    },
)

# V3 pp. 30-31, table 6: simple-evals prompts, 8,192 output tokens, AIME at temperature 0.7 over 16 runs, MATH-500
# greedy, sets under 1,000 items several times at several temperatures.
DEEPSEEK_V3_CHAT = Protocol(
    name="deepseek-v3-chat",
    source="DeepSeek-V3, arXiv 2412.19437 v1 pp. 30-31, table 6",
    defaults=dict(mode="chat", template="zero_shot", max_tokens=8192),
    kinds={"math": dict(template="boxed")},
    tasks={
        "mmlu": dict(template="simple_evals"),
        "gpqa_main": dict(template="simple_evals", samples=4, temperature=0.7, permutation="per_sample"),
        "gpqa_diamond": dict(template="simple_evals", samples=4, temperature=0.7, permutation="per_sample"),
        "drop": dict(template="simple_evals", shots=3),
        "aime24": dict(samples=16, temperature=0.7),
        "aime25": dict(samples=16, temperature=0.7),
        "math500": dict(temperature=0.0),
    },
    ours={
        "*": "extraction of the answer: our default chain; greedy and top-p 1 where no temperature is published",
        "gpqa_main": "4 samples at 0.7, for the paper's several runs at several temperatures",
        "gpqa_diamond": "4 samples at 0.7, for the paper's several runs at several temperatures",
        "aime25": "after the paper: as AIME 2024",
        "cmmlu": "no chat CMMLU is published",
    },
)

# V3 pp. 24-25, table 3; prompts of V2 (arXiv 2405.04434) appendix G. Multiple choice by the perplexity of each choice.
DEEPSEEK_V3_BASE = Protocol(
    name="deepseek-v3-base",
    source="DeepSeek-V3, arXiv 2412.19437 v1 pp. 24-25, table 3; prompts: DeepSeek-V2, arXiv 2405.04434, appendix G",
    defaults=dict(mode="completion", template="few_shot", max_tokens=1024),
    kinds={"choice": dict(mode="loglikelihood", shots=5, max_tokens=0)},
    tasks={
        "gsm8k": dict(shots=8, max_tokens=512),
        "math": dict(shots=4),
        "math500": dict(shots=4),
        "drop": dict(shots=3, max_tokens=64),
    },
    only=["mmlu", "mmlu_pro", "ceval", "cmmlu", "drop", "gsm8k", "math", "math500"],
    ours={
        "*": "budgets of the generated answers, greedy",
        "math500": "the paper has the whole of MATH",
    },
)

PROTOCOLS: Mapping[str, Protocol] = {one.name: one for one in (DEEPSEEK_R1, DEEPSEEK_V3_CHAT, DEEPSEEK_V3_BASE)}


class _File(BaseModel):
    """One's own protocol as it stands in a YAML file: whole, or what differs from a `base`."""

    model_config = STRICT

    name: str
    base: str | None = None
    source: str = "a file"
    defaults: dict[str, Any] = {}
    kinds: dict[str, dict[str, Any]] = {}
    tasks: dict[str, dict[str, Any]] = {}
    only: list[str] = []


def get_protocol(name: str | Path) -> Protocol:
    """A published protocol by its name, or one's own by the path of its YAML file.

    The file has `name` and, unless it is whole, the `base` it starts from; then `defaults`, `kinds`, `tasks`, `only`.
    Raises ValueError, with the nearest name, for a name that is neither.
    """
    if str(name) in PROTOCOLS:
        return PROTOCOLS[str(name)]
    if not str(name).endswith((".yaml", ".yml")):
        raise ValueError(
            f"protocol={str(name)!r} is unknown.{nearest(str(name), PROTOCOLS)} Known: {', '.join(PROTOCOLS)}, or the "
            "path of a .yaml file"
        )
    return _from_values(read_yaml(name), str(name))


def protocol_from_yaml(text: str) -> Protocol:
    """`get_protocol` of a text instead of a file."""
    return _from_values(parse_yaml(text, "the protocol"), "the protocol")


def _from_values(values: dict[str, Any], where: str) -> Protocol:
    file = validated(_File, values, where)
    if file.name in PROTOCOLS:
        raise ValueError(f"{where}: name={file.name!r} is a published protocol's; give yours another")
    base = get_protocol(file.base) if file.base else None
    known = set(Settings.model_fields)
    for part, fields in [("defaults", file.defaults), *file.kinds.items(), *file.tasks.items()]:
        for unknown in set(fields) - known:
            raise ValueError(
                f"{where}: {part}.{unknown} is unknown.{nearest(unknown, known)} Known: {', '.join(sorted(known))}"
            )

    def over(ours: Mapping[str, dict[str, Any]], theirs: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        # What the file says by default holds over what its base says of a kind or a task.
        return {
            name: {**{k: v for k, v in ours.get(name, {}).items() if k not in file.defaults}, **theirs.get(name, {})}
            for name in {**ours, **theirs}
        }

    return Protocol(
        name=file.name,
        source=f"{file.source}, from {base.name}" if base else file.source,
        defaults={**(base.defaults if base else {}), **file.defaults},
        kinds=over(base.kinds if base else {}, file.kinds),
        tasks=over(base.tasks if base else {}, file.tasks),
        only=file.only or (base.only if base else []),
        ours=base.ours if base else {},
        base=base.name if base else "",
    )
