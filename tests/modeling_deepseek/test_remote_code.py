"""A checkpoint saved with its code, in a process that has never heard of this package."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM
from transformers.dynamic_module_utils import get_imports, get_relative_imports

import modeling_deepseek
from modeling_deepseek.pretrained import TRAVELLING_FILES
from tests.tiny import tiny_model, tokens

PACKAGE = Path(modeling_deepseek.__file__).parent
AUTO_CLASSES = {
    "AutoModel": "Model",
    "AutoModelForCausalLM": "ForCausalLM",
    "AutoModelForSequenceClassification": "ForSequenceClassification",
    "AutoModelForTokenClassification": "ForTokenClassification",
}

# Saves with transformers' own way of sending code along, in a process of its own: it marks the classes for good.
STANDARD_FLOW = """
import sys
from modeling_deepseek import DeepseekV3Config, DeepseekV3ForCausalLM
DeepseekV3Config.register_for_auto_class()
DeepseekV3ForCausalLM.register_for_auto_class("AutoModelForCausalLM")
DeepseekV3ForCausalLM.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])
"""

# What a stranger does with the folders v2, v3 and standard; prints findings as JSON.
STRANGER = """
import json, sys
from pathlib import Path

sys.modules["modeling_deepseek"] = None  # not to be imported, even where it is installed
import torch
import transformers

root = Path(sys.argv[1])
input_ids = torch.load(root / "input_ids.pt")
found = {}
for name, auto_names in json.loads(sys.argv[2]).items():
    folder, told = root / name, found.setdefault(name, {"classes": {}})
    for auto_name in auto_names:
        model = getattr(transformers, auto_name).from_pretrained(folder, trust_remote_code=True)
        told["classes"][auto_name] = [type(kind).__module__.split(".")[0] + "." + type(kind).__name__
                                      for kind in (model, model.config)]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    told["generated"] = model.generate(input_ids, max_new_tokens=5, do_sample=False).tolist()
    with torch.no_grad():
        torch.save(model(input_ids).logits, root / f"{name}_remote.pt")
        own = transformers.AutoModelForCausalLM.from_pretrained(folder)
        torch.save(own(input_ids).logits, root / f"{name}_own.pt")
    told["own"] = type(own).__module__
    loss = model.train()(input_ids, labels=input_ids)
    loss.loss.backward()
    told["mtp_losses"] = len(loss.mtp_losses or ())
    model.save_pretrained(root / f"{name}_again")
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Holds the checkpoints v2 and v3, saved with code, and standard, saved by transformers' own flow."""
    root = tmp_path_factory.mktemp("remote_code")
    torch.save(tokens(), root / "input_ids.pt")
    for family in ("v2", "v3"):
        tiny_model(family).save_pretrained(root / family, save_code=True)
    run(["-c", STANDARD_FLOW, root / "v3", root / "standard"], root, cwd=PACKAGE.parent)
    return root


@pytest.fixture(scope="module")
def found(root):
    """What the stranger found."""
    auto_names = {"v2": list(AUTO_CLASSES), "v3": list(AUTO_CLASSES), "standard": ["AutoModelForCausalLM"]}
    return json.loads(run(["-I", "-c", STRANGER, root, json.dumps(auto_names)], root, cwd=root))


def run(arguments, root, cwd):
    """Output of a Python process that keeps the code it fetches under `root`."""
    environment = {**os.environ, "HF_MODULES_CACHE": str(root / "modules"), "PYTHONPATH": ""}
    command = [sys.executable, "-W", "ignore", *map(str, arguments)]
    process = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=200)
    assert process.returncode == 0, process.stderr
    return process.stdout


def names_of(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("name", ["v2", "v3", "standard"])
def test_auto_classes_give_the_code_beside_the_checkpoint(name, found):
    family = "Deepseek" + ("V2" if name == "v2" else "V3")
    for auto_name, classes in found[name]["classes"].items():
        module = "transformers_modules"
        assert classes == [f"{module}.{family}{AUTO_CLASSES[auto_name]}", f"{module}.{family}Config"]


@pytest.mark.parametrize("name", ["v2", "v3", "standard"])
def test_same_numbers_as_here(name, found, root):
    model = AutoModelForCausalLM.from_pretrained(root / name)
    with torch.no_grad():
        here = model(tokens()).logits
    torch.testing.assert_close(torch.load(root / f"{name}_remote.pt"), here, rtol=0, atol=1e-6)
    assert found[name]["generated"] == model.generate(tokens(), max_new_tokens=5, do_sample=False).tolist()
    assert found[name]["mtp_losses"] == model.config.num_nextn_predict_layers


@pytest.mark.parametrize("name", ["v2", "v3", "standard"])
def test_without_remote_code_by_transformers_own_class(name, found, root):
    family = "v2" if name == "v2" else "v3"
    assert found[name]["own"] == f"transformers.models.deepseek_{family}.modeling_deepseek_{family}"
    remote, own = torch.load(root / f"{name}_remote.pt"), torch.load(root / f"{name}_own.pt")
    torch.testing.assert_close(own, remote, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["v2", "v3", "standard"])
def test_saved_again_by_the_stranger(name, found, root):
    """In the Hub's layout, with the code, and read here."""
    again = root / f"{name}_again"
    assert names_of(again) == names_of(root / name)
    assert "model.layers.1.mlp.experts.7.up_proj.weight" in names_of(again)
    assert ("model.layers.3.shared_head.head.weight" in names_of(again)) == (name != "v2")
    assert {file.name for file in again.glob("*.py")} == set(TRAVELLING_FILES)
    before, after = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (root / name, again))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_saved_code_is_the_code_here(root):
    """By both ways, and all of it: a file that is forgotten is missing only where this package is not installed."""
    for name in ("v2", "v3", "standard"):
        assert {file.name for file in (root / name).glob("*.py")} == set(TRAVELLING_FILES)
        for file in TRAVELLING_FILES:
            assert (root / name / file).read_text() == (PACKAGE / file).read_text()
    auto_map = json.loads((root / "v2" / "config.json").read_text())["auto_map"]
    assert auto_map == {
        "AutoConfig": "configuration_deepseek.DeepseekV2Config",
        "AutoModel": "modeling_deepseek.DeepseekV2Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV2ForCausalLM",
        "AutoModelForSequenceClassification": "modeling_deepseek.DeepseekV2ForSequenceClassification",
        "AutoModelForTokenClassification": "modeling_deepseek.DeepseekV2ForTokenClassification",
    }


def test_package_that_is_imported_comes_before_the_code_beside_the_checkpoint(root):
    model = AutoModelForCausalLM.from_pretrained(root / "v3", trust_remote_code=True)
    assert type(model) is modeling_deepseek.DeepseekV3ForCausalLM


def test_code_is_not_promised_where_it_is_not_saved(root, tmp_path):
    """A configuration keeps the `auto_map` of the file it was read from, as all official ones have it."""

    def saved_auto_map(model, **kwargs):
        model.save_pretrained(tmp_path, **kwargs)
        return json.loads((tmp_path / "config.json").read_text()).get("auto_map")

    model = AutoModelForCausalLM.from_pretrained(root / "v3")
    official = model.config.auto_map
    assert saved_auto_map(model) is None
    assert model.config.auto_map == official  # saving changes nothing in memory
    assert saved_auto_map(model, save_code=True) == official
    assert saved_auto_map(model) == official  # again into the folder that has the code, as in training
    elsewhere = {"AutoModelForCausalLM": "deepseek-ai/DeepSeek-V3--modeling_deepseek.DeepseekV3ForCausalLM"}
    model.config.auto_map = elsewhere
    assert saved_auto_map(model) == elsewhere
    fresh = tiny_model()
    assert saved_auto_map(fresh, save_code=True) == official
    assert not hasattr(fresh.config, "auto_map")


def test_code_cannot_be_saved_and_pushed_at_once(tmp_path):
    with pytest.raises(ValueError, match="`save_code=True` cannot go with `push_to_hub=True`"):
        tiny_model().save_pretrained(tmp_path, save_code=True, push_to_hub=True)


@pytest.mark.parametrize("file", TRAVELLING_FILES)
def test_travelling_file_imports_only_siblings_and_what_transformers_needs(file):
    """transformers reads imports by regular expressions, docstrings included, and sub-folders, `from . import x` or
    the package by its own name do not travel."""
    siblings = {Path(name).stem for name in TRAVELLING_FILES}
    libraries = {"torch", "transformers", "huggingface_hub", "safetensors"}
    assert set(get_relative_imports(PACKAGE / file)) <= siblings
    assert set(get_imports(PACKAGE / file)) <= libraries | set(sys.stdlib_module_names)
    for node in ast.walk(ast.parse((PACKAGE / file).read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1
            assert node.module in siblings
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
            assert {name.partition(".")[0] for name in names} <= libraries | set(sys.stdlib_module_names)
