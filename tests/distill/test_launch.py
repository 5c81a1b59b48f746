"""One student of a run in processes of its own: two of them on the CPU train as one does, and a killed one goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from safetensors.torch import load_file

from distill.dataset import Row
from distill.recipe import Recipe
from distill.run_dir import RunDir, read_json, write_json, write_table
from distill.student import main, train_in_run
from tests.distill.training import rows, save_base

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))
SFT = {
    "max_length": 256, "num_train_epochs": 2, "learning_rate": 1e-3, "bf16": False, "gradient_checkpointing": False,
    "logging_steps": 1, "save_strategy": "no", "train_sampling_strategy": "group_by_length",
}  # fmt: skip


def run_of(folder: Path, students: dict, count: int = 12) -> tuple[RunDir, Recipe]:
    """A run whose dataset is done."""
    run = RunDir(folder)
    recipe = Recipe(
        name="tiny",
        seed=5,
        problems={"sums": {"dataset": "sums.jsonl", "kind": "math", "domain": "math", "licence": "MIT"}},
        teacher={
            "engine": "transformers", "model": "teacher", "temperature": 1.0, "max_tokens": 64, "correct": 1, "most": 1
        },
        deduplicate={"prompts": None, "traces": None},
        decontaminate=None,
        sft=SFT,
        students=students,
    )  # fmt: skip
    write_json(run / "recipe.json", {"recipe": recipe.model_dump(mode="json")})
    write_table(run / "dataset" / "train.parquet", Row, rows(count))
    return run, recipe


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_configurations_are_what_accelerate_reads(config):
    """No field that it does not know, and the launcher that is meant."""
    read = load_config_from_file(str(config))
    known = set(vars(read))
    assert set(yaml.safe_load(config.read_text())) <= known
    arguments = launch_command_parser().parse_args(
        ["--config_file", str(config), "-m", "distill.student", "RUN", "NAME"]
    )
    arguments, _, _ = _validate_launch_command(arguments)
    kinds = {"cpu2": "multi_gpu", "fsdp2": "use_fsdp", "deepspeed_zero3": "use_deepspeed"}
    for kind in kinds.values():
        assert getattr(arguments, kind) is (kinds[config.stem] == kind)
    assert arguments.num_processes == (2 if config.stem == "cpu2" else 8)
    if config.stem == "fsdp2":
        assert (arguments.fsdp_version, arguments.fsdp_state_dict_type) == (2, "FULL_STATE_DICT")
    if config.stem == "deepspeed_zero3":
        assert (arguments.zero_stage, arguments.zero3_save_16bit_model) == (3, True)


def test_two_processes_train_as_one_with_the_doubled_batch(tmp_path, capfd):
    base = save_base(tmp_path / "base")
    launch = str(ROOT / "recipes" / "accelerate" / "cpu2.yaml")
    students = {
        "one": {"model": base, "sft": {"per_device_train_batch_size": 4}},
        "two": {"model": base, "sft": {"per_device_train_batch_size": 2}, "launch": launch},
    }
    run, recipe = run_of(tmp_path / "run", students)
    counts = {name: train_in_run(run, recipe, name) for name in students}
    assert counts["two"]["batch"] == counts["one"]["batch"] == 4
    assert counts["two"]["steps"] == counts["one"]["steps"] == 6
    logs = {name: read_json(run / f"students/{name}/log.json") for name in students}
    for one, two in zip(logs["one"], logs["two"], strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
    weights = {name: load_file(run / f"students/{name}/model/model.safetensors") for name in students}
    for name, tensor in weights["one"].items():
        assert (weights["two"][name] - tensor).abs().max() < 1e-5, name
    assert read_json(run / "students/two/labels.json") == read_json(run / "students/one/labels.json")


def test_what_cannot_be_trained_is_said_once_and_clearly(tmp_path, capfd):
    base = save_base(tmp_path / "base")
    run, recipe = run_of(tmp_path / "run", {"long": {"model": base, "sft": {"max_length": 1024}}})
    assert main([str(run.path), "lnog"]) == 1
    assert capfd.readouterr().err.strip().endswith("error: 'lnog' is no student of tiny. Did you mean 'long'?")
    assert main([str(run.path), "long"]) == 1
    assert "over the context of" in capfd.readouterr().err
    assert main([str(tmp_path / "nowhere"), "long"]) == 1

    launched = recipe.students["long"].model_copy(
        update={"launch": str(ROOT / "recipes/accelerate/cpu2.yaml"), "sft": {"max_length": 1024}}
    )
    recipe = recipe.model_copy(update={"students": {"long": launched}})
    with pytest.raises(ValueError, match="over the context"):  # before any process is started
        train_in_run(run, recipe, "long")


@pytest.mark.slow
def test_kill_9_at_any_moment_loses_no_more_than_steps(tmp_path):
    base = save_base(tmp_path / "base")
    sft = {"per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 2, "num_train_epochs": 8}
    run, recipe = run_of(
        tmp_path / "run", {"whole": {"model": base, "sft": sft}, "killed": {"model": base, "sft": sft}}
    )
    train_in_run(run, recipe, "whole")
    command = [sys.executable, "-m", "distill.student", str(run.path), "killed"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    folder = run / "students" / "killed"
    # As soon as each of these is there: rows half written, the first step, a checkpoint's weights before its optimizer.
    moments = ["training/.tokens.arrow.part", "labels.json", "training/checkpoint-4/model.safetensors",
               "training/checkpoint-12/model.safetensors", "training/checkpoint-20/optimizer.pt"]  # fmt: skip
    for moment in moments:
        process = subprocess.Popen(command, env=environment, cwd=ROOT)
        while process.poll() is None and not (folder / moment).exists():
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert subprocess.run(command, env=environment, cwd=ROOT).returncode == 0
    assert json.loads((folder / "log.json").read_text()) == read_json(run / "students/whole/log.json")
    killed, whole = (load_file(run / f"students/{name}/model/model.safetensors") for name in ("killed", "whole"))
    assert [name for name in whole if not (killed[name] == whole[name]).all()] == []
