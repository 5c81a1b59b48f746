"""Who may import whom, read from the sources; and what importing costs, read from a clean process."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = [name for name in ("modeling_deepseek", "eval", "distill") if (ROOT / name).is_dir()]

# What each package may import of the others and of what lies below them; the standard library is free.
ALLOWED = {
    "modeling_deepseek": {"torch", "transformers", "huggingface_hub", "safetensors", "accelerate", "torchao"},
    "eval": {
        "modeling_deepseek", "torch", "transformers", "huggingface_hub", "datasets", "evaluate", "pyarrow",
        "math_verify", "latex2sympy2_extended", "sympy", "numpy", "scipy", "aiohttp", "pydantic", "yaml", "tqdm",
        "reasoning_gym", "lm_eval",
    },
    "distill": {
        "modeling_deepseek", "eval", "torch", "transformers", "tokenizers", "accelerate", "trl", "peft", "datasets",
        "pyarrow", "numpy", "scipy", "pydantic", "datasketch", "py3langid", "reasoning_gym",
    },
}  # fmt: skip
# The only files that may touch a model or a network, at the top or inside a function. The endpoint's client takes a
# tokenizer from transformers, if one is asked for.
TORCH = {"local_sampler.py", "decoding.py", "callback.py", "harness.py", "endpoint_sampler.py"}
NETWORK = {"endpoint_sampler.py"}
# Of distill, the files that train, or load the tokenizer to train with.
TRAIN = {"student.py", "labels.py", "batches.py", "pretrain.py"}


def imports(file: Path, *, top_level: bool = False) -> set[str]:
    """First parts of the modules that a file imports; the name of a sibling for `from .sibling import x`."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    nodes = tree.body if top_level else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(str(node.module).split(".")[0])
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_what_lies_below_them(package):
    for file in sorted((ROOT / package).rglob("*.py")):
        foreign = imports(file) - set(sys.stdlib_module_names) - {package}
        assert foreign <= ALLOWED[package], f"{file.relative_to(ROOT)} imports {foreign - ALLOWED[package]}"


def test_only_the_samplers_know_torch_and_the_network():
    for file in (ROOT / "eval").rglob("*.py"):
        assert file.name in TORCH or not imports(file) & {"torch", "transformers", "modeling_deepseek"}, file.name
        # `socket` alone is no network: the grader's processes speak through a pair of Unix sockets.
        assert file.name in NETWORK or not imports(file) & {"aiohttp", "urllib", "http", "requests"}, file.name


def test_only_the_student_knows_trl_and_only_training_knows_torch():
    for file in (ROOT / "distill").rglob("*.py"):
        assert file.name == "student.py" or not imports(file) & {"trl", "peft", "accelerate"}, file.name
        assert file.name in TRAIN or not imports(file) & {"torch", "transformers", "modeling_deepseek"}, file.name
        # `code_runner.py` takes the sockets away from what it runs.
        assert not imports(file) & {"aiohttp", "urllib", "http", "requests"}, file.name


def test_nothing_hides_the_builtin_eval():
    for file in [file for folder in ("eval", "distill", "tests") for file in (ROOT / folder).rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not any(alias.name.split(".")[0] == "eval" and not alias.asname for alias in node.names), file


def test_no_file_is_named_like_a_standard_module():
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            assert file.stem.startswith("__") or file.stem not in sys.stdlib_module_names, file


HEAVY = "torch transformers sympy math_verify datasets aiohttp pyarrow scipy pandas lm_eval reasoning_gym matplotlib"


@pytest.mark.parametrize(
    "module", ["answers", "multiple_choice", "tasks", "protocols", "metrics", "store", "rewards", "__main__"]
)
def test_grading_needs_neither_a_model_nor_a_network(module):
    program = f"import sys; from eval import {module}; print([m for m in {HEAVY.split()} if m in sys.modules])"
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert process.stdout.strip() == "[]"


@pytest.mark.parametrize("module", ["__main__", "recipe", "pipeline", "plan", "status", "why", "run_dir", "filtering"])
def test_planning_and_looking_need_neither_a_model_nor_a_table(module):
    program = f"import sys; from distill import {module}; print([m for m in {HEAVY.split()} if m in sys.modules])"
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert process.stdout.strip() == "[]"
