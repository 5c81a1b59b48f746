"""Fine-tunes a student with TRL's `SFTTrainer`, on rows that `labels.py` has proven. The only file that imports trl.

    train_in_run(run, recipe, name)        one student of a run, here or under `accelerate launch`; returns its counts
    train(student, sft, rows, folder)      labels.json -> training/ (tokens, checkpoints) -> model/, adapter/, log.json
    python -m distill.student RUN NAME     what `accelerate launch --config_file ... -m` starts

TRL is given tokens and labels, so none of its own templates, masks or cuts applies. A killed training goes on from its
last whole checkpoint, to the weights of one that was never killed.
"""

import argparse
import copy
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GenerationConfig,
    PrinterCallback,
    TrainerCallback,
    set_seed,
)
from transformers.integrations import unset_hf_deepspeed_config
from trl import SFTConfig, SFTTrainer

from distill.batches import ByLength
from distill.dataset import Row
from distill.labels import Prepared, load_tokenizer, prepare, tokens_hash
from distill.recipe import Recipe, Student
from distill.run_dir import (
    RunDir,
    content_hash,
    fingerprint,
    read_json,
    read_table,
    replacing,
    table_rows,
    write_json,
)
from distill.stages import signature as files_signature
from eval.progress import Display
from eval.runner import Progress
from eval.yaml_files import nearest, validated
from modeling_deepseek import DeepseekTrainerCallback  # importing the package also registers its Auto classes

RENDERED = "the rows are rendered, tokenised and masked before TRL is given them"
OWNED = {
    "output_dir": "it is students/NAME/training of the run",
    "resume_from_checkpoint": "a training always goes on from its last checkpoint",
    "trust_remote_code": "it is a field of the student",
    "chat_template_path": "it is the student's chat_template",
    "remove_unused_columns": "the rows have no others",
    **dict.fromkeys(
        ("dataset_text_field", "dataset_kwargs", "completion_only_loss", "assistant_only_loss", "truncation_mode",
         "eos_token", "pad_token"),
        RENDERED,
    ),
}  # fmt: skip
"""Fields of SFTConfig that a recipe may not set, and why."""
RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
"""Old names of fields. Where the new one is set transformers ignores the old one, and warns of it where it is not."""


# One student of a run.


def train_in_run(run: RunDir, recipe: Recipe, name: str, *, progress: Progress | None = None) -> dict[str, Any]:
    """Trains the student `name` on the run's dataset, under `accelerate launch` where it has a `launch`.

    ValueError where the recipe or its labels are wrong; ChildProcessError where the launched training failed.
    """
    student = recipe.students[name]
    arguments = _arguments(run, recipe, name)
    if student.launch is None:
        return train(student, **arguments, progress=progress)
    # Before the launch: processes that wait for the first one to tokenise would run into their time-out.
    _prepare(plan(student, arguments["sft"]), arguments["rows"], arguments["folder"], arguments["source"], progress)
    return launch(student.launch, run, name)


def _arguments(run: RunDir, recipe: Recipe, name: str) -> dict[str, Any]:
    dataset = run / "dataset" / "train.parquet"
    return dict(
        sft=recipe.sft_of(name),
        rows=_Table(dataset),
        folder=run / "students" / name,
        source=content_hash(dataset),
    )


class _Table:
    """The rows of a file, read as they are gone through."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __iter__(self) -> Any:
        return read_table(self.path, Row)

    def __len__(self) -> int:
        return table_rows(self.path)


def launch(config: str, run: RunDir, name: str) -> dict[str, Any]:
    """Runs this module under `accelerate launch --config_file config`; returns the counts that it writes."""
    counts = run / "students" / name / "training" / "counts.json"
    counts.unlink(missing_ok=True)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config]
    command += ["-m", "distill.student", str(run.path), name]
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    status = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}).returncode
    if status or not counts.exists():
        raise ChildProcessError(
            f"the training of {name} under {config} ended with status {status}; its own message stands above. "
            "The same command goes on from its last checkpoint"
        )
    return dict(read_json(counts))


def main(argv: Sequence[str] | None = None) -> int:
    """One process of the training of one student."""
    parser = argparse.ArgumentParser(prog="python -m distill.student", description=main.__doc__)
    parser.add_argument("run", type=Path, help="folder of a run whose dataset is done")
    parser.add_argument("name", help="of the student in the run's recipe")
    options = parser.parse_args(argv)
    try:
        run = RunDir(options.run)
        recipe = validated(Recipe, read_json(run / "recipe.json")["recipe"], str(run / "recipe.json"))
        if options.name not in recipe.students:
            raise ValueError(
                f"{options.name!r} is no student of {recipe.name}.{nearest(options.name, recipe.students)}"
            )
        train(recipe.students[options.name], **_arguments(run, recipe, options.name), progress=Display())
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


# What is trained: everything that can be wrong is found here, before weights are loaded.


@dataclass(frozen=True)
class Plan:
    """A student with what its files and settings amount to. `sft` are fields of SFTConfig; `generation` is the
    generation config that the student is saved with."""

    student: Student
    sft: Mapping[str, Any]
    max_length: int
    tokenizer: Any
    config: Any
    generation: GenerationConfig

    @property
    def stop_ids(self) -> frozenset[int]:
        eos = self.generation.eos_token_id
        if eos is None:
            eos = self.tokenizer.eos_token_id
        return frozenset() if eos is None else frozenset([eos] if isinstance(eos, int) else eos)


def plan(student: Student, sft: Mapping[str, Any]) -> Plan:
    """ValueError for settings that contradict each other, the model, or what this package sees to."""
    for name, why in OWNED.items():
        if name in sft:
            raise ValueError(f"sft.{name} cannot be set: {why}")
    for old, new in RENAMED.items():
        if old in sft and new in sft:
            raise ValueError(f"sft.{old} and sft.{new} are one setting; keep {new}, the newer name")
    if sft.get("packing") and sft.get("packing_strategy", "bfd") != "bfd":
        raise ValueError(f"sft.packing_strategy={sft['packing_strategy']!r} cuts examples in two; use 'bfd'")
    if student.quantization is not None and not student.adapter:
        raise ValueError(
            "quantization without adapter: 4-bit weights do not train; give the student an adapter (QLoRA)"
        )
    trains_tokens = {"modules_to_save", "trainable_token_indices"} & set(student.adapter or {})
    if student.add_tokens and student.adapter and not trains_tokens:
        raise ValueError(
            f"add_tokens={student.add_tokens} with an adapter: their embeddings would stay as they begin. Add "
            "modules_to_save: [embed_tokens, lm_head] to the adapter, or leave the tokens out"
        )
    for name in ("config", "dtype", "revision", "trust_remote_code", "quantization_config"):
        if name in sft.get("model_init_kwargs", {}):
            raise ValueError(f"sft.model_init_kwargs.{name} cannot be set: the student has a field for it")
    tokenizer = load_tokenizer(student)
    config, generation = _configs(student)
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    max_length = sft.get("max_length") or context
    if max_length is None:
        raise ValueError(f"{student.model} does not say its context: give sft.max_length, TRL's default would cut rows")
    if context is not None and max_length > context:
        raise ValueError(
            f"sft.max_length={max_length} is over the context of {student.model}, max_position_embeddings={context}; "
            "lower it, or raise the context under the student's config (with rope_parameters for the longer range)"
        )
    return Plan(student, dict(sft), max_length, tokenizer, config, generation)


def _configs(student: Student) -> tuple[Any, GenerationConfig]:
    where = dict(revision=student.revision or "main", trust_remote_code=student.trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(student.model, **where)
    except (OSError, ValueError) as error:
        raise ValueError(f"the configuration of {student.model!r} cannot be loaded: {error}") from error
    try:
        generation = GenerationConfig.from_pretrained(student.model, revision=student.revision or "main")
    except OSError:  # it has none of its own
        generation = GenerationConfig.from_model_config(config)
    known = config.to_dict()
    for name, value in student.config.items():
        if name not in known:
            near = " It belongs into rope_parameters." if name.startswith("rope_") else nearest(name, known)
            raise ValueError(f"config.{name} is no field of {type(config).__name__}.{near}")
        setattr(config, name, value)
    if "eos_token_id" in student.config:
        generation.eos_token_id = student.config["eos_token_id"]
    return config, generation


def _checked(of: type, values: Mapping[str, Any], where: str, **more: Any) -> Any:
    """`of(**values)`; ValueError for a name that it has not."""
    # Not its fields: BitsAndBytesConfig is a dataclass with an __init__ of its own.
    known = list(signature(of).parameters)
    for name in values:
        if name not in known:
            raise ValueError(f"{where}.{name} is no field of {of.__name__}.{nearest(name, known)}")
    try:
        return of(**more, **values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


# Training.


def train(
    student: Student,
    sft: Mapping[str, Any],
    rows: Iterable[Row],
    folder: Path,
    *,
    source: str = "",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Trains `student` with `sft`, fields of SFTConfig, on `rows`, whose content `source` names; returns the counts.

    Writes into `folder`: labels.json, training/, log.json (the loss by step), model/ (the Hub's layout; with the
    adapter merged into the weights that it began from), adapter/. The student is saved in the dtype of its base. With
    `dtype: auto`, weights that train are float32 while they do: steps of 1e-5 vanish in bfloat16.

    Raises:
        ValueError: for settings or labels that are wrong (before anything is trained), or a loss that is not a number.
    """
    planned = plan(student, sft)
    arguments = sft_config(planned, folder / "training")
    state = PartialState()
    with state.main_process_first():
        prepared = _prepare(planned, rows, folder, source, progress if state.is_main_process else None)
        checkpoint = _last_checkpoint(folder, _made_of(planned, folder))
    trainer = _trainer(planned, arguments, folder, progress)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    trained = folder / "training" / "trained"
    trainer.save_model(str(trained))  # every process takes part where weights are sharded
    counts = {
        **prepared.counts(),
        "steps": trainer.state.global_step,
        "epochs": round(trainer.state.epoch, 4),
        "batch": arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size,
        **_sizes(trainer.model),
    }
    log = [
        # TRL's num_tokens begins again at zero in a training that goes on.
        {name: value for name, value in entry.items() if name != "num_tokens"}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    if log:
        counts["final_loss"] = log[-1]["loss"]
    if state.is_main_process:
        unset_hf_deepspeed_config()  # or ZeRO-3 would shard what is loaded here, and wait for the other processes
        _write_model(planned, trained, folder)
        write_json(folder / "log.json", log)
        write_json(folder / "training" / "counts.json", counts)
    state.wait_for_everyone()
    return counts


def _sizes(model: Any) -> dict[str, int]:
    trained = model.num_parameters(only_trainable=True)
    return {"parameters": model.num_parameters(), "trained_parameters": trained}


def sft_config(planned: Plan, output_dir: Path) -> SFTConfig:
    """The recipe's SFTConfig. What TRL would do to rows is switched off; its other defaults stay."""
    packing = bool(planned.sft.get("packing"))
    values = {
        "activation_checkpointing": True,  # TRL's default, which it sets under the old name
        "report_to": "none",
        "disable_tqdm": True,  # `progress` shows how far it is
        "save_total_limit": 2,
        "logging_nan_inf_filter": False,  # would log the mean of earlier losses in place of a NaN
        "use_cpu": not torch.accelerator.is_available(),
        "dataloader_pin_memory": torch.accelerator.is_available(),
        **{RENAMED.get(name, name): value for name, value in planned.sft.items()},
        # Rows are short enough already; packing is the one step that is left to TRL.
        "max_length": planned.max_length if packing else None,
        "dataset_kwargs": {"skip_prepare_dataset": not packing},
        "remove_unused_columns": False,  # `length`
    }
    values.pop("model_init_kwargs", None)
    return _checked(SFTConfig, values, "sft", output_dir=str(output_dir))


def _prepare(planned: Plan, rows: Iterable[Row], folder: Path, source: str, progress: Progress | None) -> Prepared:
    return prepare(
        planned.student, planned.max_length, planned.stop_ids, rows, folder,
        total=len(rows) if isinstance(rows, Sized) else 0, source=source, tokenizer=planned.tokenizer,
        progress=progress,
    )  # fmt: skip


def _trainer(planned: Plan, arguments: SFTConfig, folder: Path, progress: Progress | None) -> "_Trainer":
    student = planned.student
    quantization = adapter = None
    if student.quantization is not None:
        quantization = _checked(BitsAndBytesConfig, student.quantization, "quantization")
    if student.adapter:
        from peft import LoraConfig

        adapter = _checked(LoraConfig, {"task_type": "CAUSAL_LM", **student.adapter}, "adapter")
    set_seed(arguments.seed)
    model = load_model(planned, quantization_config=quantization, **planned.sft.get("model_init_kwargs", {}))
    if not student.adapter and student.dtype == "auto" and arguments.deepspeed_plugin is None:
        model.float()  # DeepSpeed keeps a float32 copy of its own
    trainer = _Trainer(
        model,
        args=arguments,
        train_dataset=Dataset.from_file(str(folder / "training" / "tokens.arrow")),
        processing_class=planned.tokenizer,
        peft_config=adapter,
        callbacks=[_Watch(folder.name, progress)],
    )
    trainer.remove_callback(PrinterCallback)  # `progress` shows the loss
    if planned.config.model_type.startswith("deepseek"):
        DeepseekTrainerCallback.attach(trainer)
    return trainer


def load_model(planned: Plan, **options: Any) -> Any:
    """The base of a student, with the recipe's changes to its configuration and room for its tokens."""
    student = planned.student
    try:
        model = AutoModelForCausalLM.from_pretrained(
            student.model,
            revision=student.revision or "main",
            trust_remote_code=student.trust_remote_code,
            config=copy.deepcopy(planned.config),
            dtype=student.dtype,
            **options,
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"the model {student.model!r} cannot be loaded: {error}") from error
    # Not for a tokenizer that is larger by itself: what it has without a row is never used.
    rows: Any = model.get_input_embeddings().num_embeddings
    if student.add_tokens and len(planned.tokenizer) > rows:
        model.resize_token_embeddings(len(planned.tokenizer))
    return model


class _Trainer(SFTTrainer):
    """SFTTrainer with batches of equal length that a resumed training, and every process, draws alike."""

    def create_model_card(self, *arguments: Any, **more: Any) -> None:
        """None in checkpoints: a tenth of a second each, for what nobody publishes."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset: Any = train_dataset if train_dataset is not None else self.train_dataset
        if self.args.train_sampling_strategy != "group_by_length" or "length" not in dataset.column_names:
            return super()._get_train_sampler(train_dataset)
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        return ByLength(dataset["length"], step, seed)


class _Watch(TrainerCallback):
    """Tells how far the training is, stops it where the loss is lost, and marks checkpoints that are whole."""

    def __init__(self, name: str, progress: Progress | None) -> None:
        self.name, self.progress, self.loss = name, progress, ""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.progress and state.is_world_process_zero:
            self.progress(f"{self.name}: steps", state.global_step, state.max_steps, self.loss)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        loss = (logs or {}).get("loss")
        if loss is None:
            return
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss of {self.name} is {loss} at step {state.global_step}: lower sft.learning_rate, raise "
                "sft.warmup_steps, or train in float32"
            )
        self.loss = f"loss {loss:.3f}"

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        PartialState().wait_for_everyone()  # each process writes a part of it
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / WHOLE).touch()


# Going on.

WHOLE = "whole"  # a file in a checkpoint, written last


def _made_of(planned: Plan, folder: Path) -> str:
    """What decides the weights: a training that would end in others does not go on from these checkpoints."""
    model = planned.student.model
    return fingerprint(
        planned.student.model_dump(exclude={"launch"}), planned.sft, planned.max_length, tokens_hash(folder),
        files_signature(Path(model)) if Path(model).exists() else "",
    )  # fmt: skip


def _last_checkpoint(folder: Path, made_of: str) -> Path | None:
    """The last whole checkpoint of this very training; half-written ones, and those of another, are removed.

    transformers goes on from a checkpoint without its optimizer as if nothing were missing.
    """
    mark = folder / "training" / "made_of.json"
    same = mark.exists() and read_json(mark) == made_of
    found = {int(path.name.partition("-")[2]): path for path in (folder / "training").glob("checkpoint-*")}
    whole = {step: path for step, path in found.items() if same and (path / WHOLE).exists()}
    for step, path in found.items():
        if step not in whole:
            shutil.rmtree(path)
    write_json(mark, made_of)
    return whole[max(whole)] if whole else None


# The finished student.


def _write_model(planned: Plan, trained: Path, folder: Path) -> None:
    """model/ (and adapter/) from what the trainer saved, in the dtype of the base, with its generation config."""
    student = planned.student
    if student.adapter:
        from peft import PeftModel

        set_seed(planned.sft.get("seed", 42))  # new rows of embeddings, as they were before training
        # Onto the weights before quantisation, as QLoRA's adapters are used.
        model = PeftModel.from_pretrained(load_model(planned), trained).merge_and_unload()
        with replacing(folder / "adapter") as part:
            part.mkdir()
            for file in trained.glob("adapter_*"):
                shutil.copy(file, part)
            planned.tokenizer.save_pretrained(part)
    else:
        dtype = student.dtype if student.dtype != "auto" else planned.config.dtype or torch.float32
        model = AutoModelForCausalLM.from_pretrained(trained, dtype=dtype, trust_remote_code=student.trust_remote_code)
    model.config.use_cache = planned.config.use_cache
    model.generation_config = planned.generation
    with replacing(folder / "model") as part:
        model.save_pretrained(part)
        planned.tokenizer.save_pretrained(part)
    shutil.rmtree(trained)


if __name__ == "__main__":
    raise SystemExit(main())
