"""Recipes: one strict YAML, one experiment. Everything that a run depends on is a field here.

    load_recipe("recipes/quickstart.yaml", ["seed=1", "teacher.temperature=0.8"])

An unknown key is an error with the nearest name. `kind: distill` (the default) is a `Recipe`, `kind: pretrain` a
`PretrainRecipe`. A path that begins with `./` or `../` is meant from the recipe's own folder, in an override from where
one stands; anything else is what Hugging Face makes of it: a folder here, or an id on the Hub. No torch, no network.
"""

import ast
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from distill.records import Kind
from eval.yaml_files import nearest, parse_yaml, read_yaml, validated


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


# Problems.


class ProblemSource(Strict):
    """Where problems come from: exactly one of `dataset` and `reasoning_gym`.

    `dataset` is a Hub id, a folder, or a file (.jsonl, .json, .parquet, .csv; .gz too). `question`, `answer`,
    `choices`, `tests` name its columns; a dotted name goes into a mapping or a list (`messages.0.content`).
    `answer_after` keeps what follows the last occurrence of a text (`####` for GSM8K). `reasoning_gym` is one of its
    datasets, `parameters` its settings (those of `eval`'s task of that name where they are left out).
    """

    dataset: str | None = None
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    question: str = "question"
    answer: str | None = "answer"
    answer_after: str | None = None
    choices: str | None = None
    tests: str | None = None
    reasoning_gym: str | None = None
    parameters: dict[str, Any] | None = None
    seed: int | None = None
    kind: Kind
    domain: str
    licence: str
    limit: int | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _one_origin(self) -> "ProblemSource":
        if (self.dataset is None) == (self.reasoning_gym is None):
            raise ValueError("give exactly one of dataset and reasoning_gym")
        if self.reasoning_gym is not None and (self.kind != "reasoning_gym" or self.limit is None):
            raise ValueError("reasoning_gym makes any number of problems: give limit, and kind: reasoning_gym")
        if self.reasoning_gym is None and self.kind == "reasoning_gym":
            raise ValueError("kind: reasoning_gym is for problems that reasoning_gym makes")
        if self.kind == "code" and self.tests is None:
            raise ValueError("kind: code needs tests, the column of its tests")
        if self.kind == "choice" and self.choices is None:
            raise ValueError("kind: choice needs choices, the column of its options")
        return self


# Models that are asked.


class Engine(Strict):
    """A model to ask: in this process (`engine: transformers`), or served (`engine: endpoint`, any OpenAI-compatible
    server: vLLM, SGLang, DeepSeek's API, `trl vllm-serve`)."""

    engine: Literal["transformers", "endpoint"]
    model: str
    revision: str | None = None
    # transformers
    dtype: str = "auto"
    device_map: str | None = None
    batch_size: int = Field(default=64, gt=0)
    trust_remote_code: bool = False
    chat_template: str | None = None  # a file, in place of the tokenizer's own
    # endpoint
    base_urls: list[str] = []
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: int = Field(default=64, gt=0)
    timeout: float = Field(default=1800.0, gt=0)
    retries: int = Field(default=8, ge=0)
    extra_body: dict[str, Any] = {}
    tokenizer: str | None = None
    # both
    context_length: int | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _where(self) -> "Engine":
        if (self.engine == "endpoint") != bool(self.base_urls):
            raise ValueError("base_urls are for engine: endpoint, which needs at least one")
        if self.engine == "endpoint" and self.chat_template is not None:
            raise ValueError("chat_template is for engine: transformers; an endpoint renders by its own")
        return self


class Price(Strict):
    """Dollars, for the plan and the budget: a million tokens of an endpoint, or an hour of the machine."""

    prompt_per_million: float = Field(default=0.0, ge=0)
    completion_per_million: float = Field(default=0.0, ge=0)
    machine_per_hour: float = Field(default=0.0, ge=0)


class Budget(Strict):
    """Where generation stops, with what is there: completion tokens, dollars, hours of generation; null is no limit."""

    tokens: int | None = Field(default=None, gt=0)
    dollars: float | None = Field(default=None, gt=0)
    hours: float | None = Field(default=None, gt=0)


class Teacher(Engine):
    """Whom to ask, how, and how often: until `correct` right samples of a problem are there, `most` at the most.

    `prompt` is the turn of the user, with `{question}` in it (and `{choices}`, the options as lettered lines). A
    mapping holds one for each kind of problem; the kinds that it leaves out are asked the question alone.
    """

    prompt: str | dict[Kind, str] = "{question}"
    system: str | None = None
    open_thought: bool = True
    temperature: float = Field(ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_tokens: int = Field(gt=0)
    correct: int = Field(gt=0)
    most: int = Field(gt=0)
    price: Price = Price()
    budget: Budget = Budget()

    @model_validator(mode="after")
    def _samples(self) -> "Teacher":
        if self.correct > self.most:
            raise ValueError(f"correct={self.correct} right samples cannot come from most={self.most}")
        if self.most > 1 and self.temperature == 0:
            raise ValueError(f"temperature=0 gives the same sample {self.most} times; raise it, or set most: 1")
        prompts = {"prompt": self.prompt} if isinstance(self.prompt, str) else self.prompt
        for name, prompt in prompts.items():
            if "{question}" not in prompt:
                raise ValueError(f"{name if name == 'prompt' else f'prompt.{name}'} must hold {{question}}")
        return self


# Verification.


class CodeTests(Strict):
    """Limits of one run of the tests, in a process of its own: no security boundary, and `allow` says that you know."""

    allow: bool = False
    seconds: float = Field(default=10.0, gt=0)
    memory_mb: int = Field(default=1024, gt=0)
    file_mb: int = Field(default=16, ge=0)


class Judge(Engine):
    """A model that compares an answer with the published one (kind `text`), `votes` times; the majority decides.

    Before it may be used it judges `calibration` answers whose verdict rules know (kinds math, choice, reasoning_gym of
    the same run); below `floor` agreement the run stops. `max_tokens` is for one judgement.
    """

    votes: int = Field(default=3, gt=0)
    temperature: float = Field(default=0.6, ge=0)
    top_p: float = Field(default=0.95, gt=0, le=1)
    max_tokens: int = Field(default=2048, gt=0)
    calibration: int = Field(default=100, gt=0)
    floor: float = Field(default=0.9, ge=0, le=1)


class Verify(Strict):
    time_limit: float = Field(default=5.0, gt=0)  # seconds for one mathematical comparison
    code: CodeTests = CodeTests()
    judge: Judge | None = None


# What is kept.


class Filter(Strict):
    """R1 drops mixed languages, long paragraphs and code blocks (v1 2.3.3); its thresholds were not published, so the
    numbers are our choice. null switches a filter off."""

    mixed_languages: bool = True
    paragraph_characters: int | None = Field(default=4000, gt=0)
    code_blocks: bool = True
    code_block_kinds_allowed: list[Kind] = ["code"]
    repetition: bool = True
    min_tokens: int | None = Field(default=None, gt=0)
    max_tokens: int | None = Field(default=None, gt=0)


class Deduplicate(Strict):
    """Jaccard similarity of character or word shingles from which two texts are near copies; null switches it off."""

    prompts: float | None = Field(default=0.9, gt=0, le=1)
    traces: float | None = Field(default=0.9, gt=0, le=1)


class Decontaminate(Strict):
    """Benchmarks of `eval` by name, or `all`. `data` is the folder of their files (null: the Hub)."""

    benchmarks: list[str] | Literal["all"]
    data: str | None = None
    ngram: int = Field(default=10, gt=0)


class Mix(Strict):
    """How much of each domain: `counts` of each, or `shares` of `total` (null: as many as the scarcest allows).
    Nothing given keeps everything. `unit` is what is counted."""

    unit: Literal["samples", "tokens"] = "samples"
    counts: dict[str, int] | None = None
    shares: dict[str, float] | None = None
    total: int | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _one_way(self) -> "Mix":
        if self.counts is not None and self.shares is not None:
            raise ValueError("give counts or shares, not both")
        if self.shares is not None and abs(sum(self.shares.values()) - 1) > 1e-6:
            raise ValueError(f"shares sum to {sum(self.shares.values()):g}, not to 1")
        if self.total is not None and self.shares is None:
            raise ValueError("total is divided by shares: give them")
        return self


# Students.


class Student(Strict):
    """A student: `model` fine-tuned on the dataset.

    `target` is what it learns to write after the prompt: the `trace` (thought and answer), or the bare `answer` behind
    an empty thought, for comparison. `sft` replaces single values of the recipe's `sft`. `adapter` holds fields of
    peft's LoraConfig ({} or null: full fine-tuning), where `target_modules` of a DeepSeek student may be sets such as
    [attention, routed_experts]; `quantization` holds those of transformers' BitsAndBytesConfig.
    `chat_template` is a file that replaces the tokenizer's own. `config` replaces fields of the model's configuration
    (a raised rope base for a longer context). `launch` is a configuration of accelerate: the training runs under
    `accelerate launch --config_file`. `too_long` says what happens to rows beyond `sft.max_length`.
    """

    model: str
    revision: str | None = None
    target: Literal["trace", "answer"] = "trace"
    sft: dict[str, Any] = {}
    adapter: dict[str, Any] | None = None
    quantization: dict[str, Any] | None = None
    dtype: str = "auto"
    config: dict[str, Any] = {}
    chat_template: str | None = None
    add_tokens: list[str] = []
    trust_remote_code: bool = False
    launch: str | None = None
    too_long: Literal["drop", "refuse"] = "drop"


class Evaluate(Strict):
    """Tasks and protocol of `eval`. `overrides` are its `Settings`; `models` are `teacher`, `base`, names of students
    (null: all of them)."""

    tasks: list[str]
    protocol: str
    k: int | None = Field(default=None, gt=0)
    limit: int | None = Field(default=None, gt=0)
    overrides: dict[str, Any] = {}
    data: str | None = None
    models: list[str] | None = None
    batch_size: int = Field(default=64, gt=0)


class Recipe(Strict):
    """From prompts to an evaluated student; the stages of `pipeline.py` in their order."""

    kind: Literal["distill"] = "distill"
    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    description: str = ""
    seed: int = 0
    problems: dict[str, ProblemSource] = Field(min_length=1)
    teacher: Teacher
    verify: Verify = Verify()
    filter: Filter = Filter()
    deduplicate: Deduplicate = Deduplicate()
    decontaminate: Decontaminate | None
    mix: Mix = Mix()
    sft: dict[str, Any] = {}
    students: dict[str, Student] = {}
    evaluate: Evaluate | None = None

    @model_validator(mode="after")
    def _names(self) -> "Recipe":
        for where, values in self._sft_parts():
            _check_names(where, values, "SFTConfig", sft_fields())
        reserved = {"teacher", "base"} & set(self.students)
        if reserved:
            raise ValueError(f"students may not be called {sorted(reserved)}: these names stand for the other models")
        known = ["teacher", "base", *self.students]
        for name in (self.evaluate.models or []) if self.evaluate else []:
            if name not in known:
                raise ValueError(f"evaluate.models: {name!r} is no model of this recipe.{nearest(name, known)}")
        text = [name for name, source in self.problems.items() if source.kind == "text"]
        if text and self.verify.judge is None:
            raise ValueError(f"problems.{text[0]} has kind text, which a judge must verify: give verify.judge")
        code = [name for name, source in self.problems.items() if source.kind == "code"]
        if code and not self.verify.code.allow:
            raise ValueError(
                f"problems.{code[0]} has kind code: its tests run what the teacher wrote, in a limited process that is "
                "no security boundary; run it where that is acceptable, and set verify.code.allow: true"
            )
        domains = {source.domain for source in self.problems.values()}
        for name in {**(self.mix.counts or {}), **(self.mix.shares or {})}:
            if name not in domains:
                raise ValueError(f"mix: no problems have the domain {name!r}.{nearest(name, domains)}")
        return self

    def sft_of(self, name: str) -> dict[str, Any]:
        """The SFTConfig of a student: the recipe's, with what the student says in its place."""
        return {"seed": self.seed, **self.sft, **self.students[name].sft}

    def _sft_parts(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        yield "sft", self.sft
        for name, student in self.students.items():
            yield f"students.{name}.sft", student.sft


# A small model from nothing (pretrain.py).


class CorpusPart(Strict):
    """`documents` worked examples of one reasoning-gym dataset; the forms are those of `pretrain.documents`."""

    dataset: str
    form: Literal["solution", "quiz", "notes"]
    documents: int = Field(gt=0)


class Corpus(Strict):
    seed: int
    parts: list[CorpusPart] = Field(min_length=1)


class CharacterTokenizer(Strict):
    phrases: list[str]
    chat_template: str


class Drafting(Strict):
    """The MTP modules once more, alone, on what drafting feeds them: `passes` is the configuration's `mtp_passes`,
    `training` the fields of TrainingArguments that differ from the recipe's."""

    passes: int = Field(gt=1)
    training: dict[str, Any]


class PretrainRecipe(Strict):
    """`model` holds `model_type` and the fields of its configuration, `training` those of TrainingArguments, `drafting`
    what follows for its MTP modules; `evaluate` is asked of the finished model."""

    kind: Literal["pretrain"]
    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    description: str = ""
    corpus: Corpus
    tokenizer: CharacterTokenizer
    context: int = Field(gt=0)
    model: dict[str, Any]
    training: dict[str, Any]
    drafting: Drafting | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    evaluate: Evaluate | None = None

    @model_validator(mode="after")
    def _names(self) -> "PretrainRecipe":
        _check_names("training", self.training, "TrainingArguments", training_fields())
        if self.drafting is not None:
            _check_names("drafting.training", self.drafting.training, "TrainingArguments", training_fields())
            if not self.model.get("num_nextn_predict_layers"):
                raise ValueError("drafting trains MTP modules, and model.num_nextn_predict_layers gives it none")
        if "model_type" not in self.model:
            raise ValueError("model.model_type is missing: it names the architecture (deepseek_v3, qwen2, llama, ...)")
        return self


# Reading.


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe | PretrainRecipe:
    """The recipe of a file, with `key=value` overrides (dotted keys, values in YAML). FileNotFoundError, ValueError."""
    path = Path(path)
    values = _from_folder(read_yaml(path), path.parent)
    for override in overrides:
        _override(values, override)
    kinds: dict[str, type[Recipe] | type[PretrainRecipe]] = {"distill": Recipe, "pretrain": PretrainRecipe}
    kind = values.get("kind", "distill")
    if kind not in kinds:
        raise ValueError(f"{path}: kind={kind!r} is neither distill nor pretrain.{nearest(str(kind), kinds)}")
    return validated(kinds[kind], values, str(path))


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"{override!r} is no override; write key=value, as in teacher.temperature=0.8")
    value = parse_yaml(f"value: {text}", f"the override {override!r}")["value"]
    *parents, last = _names(values, key)
    value = _from_folder(value, Path.cwd(), next((one for one in parents if one in TEXTS), last))
    at: Any = values
    for parent in parents:
        if isinstance(at, dict) and at.get(parent) is None:
            at[parent] = {}
        try:
            at = at[int(parent)] if isinstance(at, list) else at[parent]
        except (LookupError, ValueError, TypeError):
            raise ValueError(f"the override {override!r}: there is no {parent!r} to go into") from None
    if isinstance(at, list):
        try:
            at[int(last)] = value
        except (ValueError, IndexError):
            raise ValueError(f"the override {override!r}: {last!r} is none of the {len(at)} places of a list") from None
    elif isinstance(at, dict):
        at[last] = value
    else:
        raise ValueError(f"the override {override!r}: what stands before {last!r} holds no keys")


def _names(values: Any, key: str) -> list[str]:
    """The names in a dotted key. A name that is there may hold dots itself, as the student Distill-Qwen-1.5B does."""
    names, parts = [], key.split(".")
    while parts:
        whole = range(len(parts), 1, -1) if isinstance(values, dict) else ()
        taken = next((count for count in whole if ".".join(parts[:count]) in values), 1)
        names.append(".".join(parts[:taken]))
        values = values.get(names[-1]) if isinstance(values, dict) else None
        parts = parts[taken:]
    return names


TEXTS = ("prompt", "system", "description")


def _from_folder(value: Any, folder: Path, key: str = "") -> Any:
    """Every string that begins with ./ or ../, as a path from that folder. Prompts and templates of text are no
    paths, whatever they begin with."""
    if isinstance(value, dict):
        return {name: _from_folder(one, folder, key if key in TEXTS else name) for name, one in value.items()}
    if isinstance(value, list):
        return [_from_folder(one, folder, key) for one in value]
    if isinstance(value, str) and value.startswith(("./", "../")) and key not in TEXTS:
        return str((folder / value).resolve())
    return value


def _check_names(where: str, values: Mapping[str, Any], config: str, known: frozenset[str]) -> None:
    """ValueError for a key that the config has not; nothing is checked where its package is not installed."""
    for name in values:
        if known and name not in known:
            raise ValueError(f"{where}.{name} is no field of {config}.{nearest(name, known)}")


@cache
def training_fields() -> frozenset[str]:
    """The fields of transformers' TrainingArguments, read from its source: importing it would take seconds."""
    return _dataclass_fields("transformers", "training_args.py", "TrainingArguments")


@cache
def sft_fields() -> frozenset[str]:
    """The fields of TRL's SFTConfig with those it inherits, read from the sources; empty where TRL is not installed."""
    own = _dataclass_fields("trl", "trainer/sft_config.py", "SFTConfig")
    return own and own | training_fields() | _dataclass_fields("trl", "trainer/base_config.py", "_BaseConfig")


def _dataclass_fields(package: str, file: str, name: str) -> frozenset[str]:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return frozenset()
    source = Path(spec.origin).parent / file
    tree = ast.parse(source.read_text(encoding="utf-8")) if source.exists() else ast.Module([], [])
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return frozenset(
                one.target.id
                for one in node.body
                if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)
            )
    return frozenset()
