"""transformers' Auto classes give this package's classes, whenever they are imported, and give back their own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    pipeline,
)

import modeling_deepseek
from modeling_deepseek import register_auto_classes, unregister_auto_classes
from tests.tiny import tiny_config, tiny_model, tokens

ROOT = Path(__file__).parents[2]
AUTO_CLASSES = {
    AutoModel: "Model",
    AutoModelForCausalLM: "ForCausalLM",
    AutoModelForSequenceClassification: "ForSequenceClassification",
    AutoModelForTokenClassification: "ForTokenClassification",
}
OURS = "modeling_deepseek.modeling_deepseek"


def their_config(family):
    """transformers' own configuration of the tiny shape."""
    fields = {name: value for name, value in tiny_config(family).to_dict().items() if name != "model_type"}
    return getattr(transformers, f"Deepseek{family.upper()}Config")(**fields)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folder of a saved causal LM for each model type."""
    folders = {}
    for model_type, family in (("deepseek_v2", "v2"), ("deepseek_v3", "v3"), ("kimi_k2", "v3")):
        folders[model_type] = tmp_path_factory.mktemp(model_type)
        tiny_model(family).save_pretrained(folders[model_type])
    config_file = folders["kimi_k2"] / "config.json"
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps({**config, "model_type": "kimi_k2"}))
    return folders


def run_python(code, *arguments):
    """Output of `code` in a process that has imported nothing yet."""
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines()


@pytest.mark.parametrize("auto_class", AUTO_CLASSES, ids=lambda auto_class: auto_class.__name__)
@pytest.mark.parametrize("model_type", ["deepseek_v2", "deepseek_v3", "kimi_k2"])
def test_auto_class_gives_ours(model_type, auto_class, checkpoints):
    family = "V2" if model_type == "deepseek_v2" else "V3"
    expected = getattr(modeling_deepseek, f"Deepseek{family}{AUTO_CLASSES[auto_class]}")
    folder = checkpoints[model_type]
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is getattr(modeling_deepseek, f"Deepseek{family}Config")
    assert type(AutoConfig.for_model(model_type)) is type(config)
    theirs = their_config(family.lower())
    for model in (
        auto_class.from_pretrained(folder),
        auto_class.from_config(config),
        auto_class.from_pretrained(folder, config=theirs),
        auto_class.from_config(theirs),
    ):
        assert type(model) is expected
        assert type(model.config) is type(config)
    assert expected.__module__ == OURS


ORDERS = {
    "package first": "import modeling_deepseek",
    "package last": "import transformers\ntransformers.AutoConfig, transformers.AutoModelForCausalLM\n"
    "import modeling_deepseek",
    # Taken back before there was anything to change, and only one of the two Auto modules is there when it is wanted.
    "package between": "import modeling_deepseek\nmodeling_deepseek.unregister_auto_classes()\n"
    "from transformers import AutoConfig\n"
    "assert type(AutoConfig.from_pretrained(sys.argv[1])).__module__.startswith('transformers.')\n"
    "modeling_deepseek.register_auto_classes()",
}


@pytest.mark.parametrize("order", ORDERS)
def test_registered_whatever_is_imported_first(order, checkpoints):
    code = f"""
import sys
{ORDERS[order]}
from transformers import AutoConfig, AutoModelForCausalLM
for folder in sys.argv[1:]:
    config = AutoConfig.from_pretrained(folder)
    print(type(config).__module__, type(AutoModelForCausalLM.from_config(config)).__module__)
modeling_deepseek.unregister_auto_classes()
for folder in sys.argv[1:3]:
    config = AutoConfig.from_pretrained(folder)
    print(type(config).__module__, type(AutoModelForCausalLM.from_config(config)).__module__)
try:
    AutoConfig.from_pretrained(sys.argv[3])
except ValueError as error:
    print("kimi_k2" in str(error))
"""
    lines = run_python(code, *checkpoints.values())
    ours = f"modeling_deepseek.configuration_deepseek {OURS}"
    theirs = "transformers.models.deepseek_{0}.configuration_deepseek_{0} " + (
        "transformers.models.deepseek_{0}.modeling_deepseek_{0}"
    )
    assert lines == [ours, ours, ours, theirs.format("v2"), theirs.format("v3"), "True"]


def test_importing_costs_little_and_does_not_import_torch():
    code = """
import sys
import transformers
import time
start = time.perf_counter()
import modeling_deepseek
print(time.perf_counter() - start, "torch" in sys.modules)
"""
    seconds, has_torch = run_python(code)[0].split()
    assert float(seconds) < 0.3
    assert has_torch == "False"


def test_importing_twice_and_in_any_order():
    """Each file first in its turn, in a package that is imported afresh; the public names last."""
    code = """
import importlib, pathlib, sys
names = sorted(path.stem for path in pathlib.Path("modeling_deepseek").glob("*.py") if path.stem != "__init__")
for name in names[::-1] + names[:1]:
    for loaded in [loaded for loaded in sys.modules if loaded.partition(".")[0] == "modeling_deepseek"]:
        del sys.modules[loaded]
    importlib.import_module(f"modeling_deepseek.{name}")
import modeling_deepseek
importlib.reload(modeling_deepseek)
from modeling_deepseek import *
print(all(name in globals() for name in modeling_deepseek.__all__), len(names) > 8)
"""
    assert run_python(code) == ["True True"]


def test_public_names():
    for name in modeling_deepseek.__all__:
        assert getattr(modeling_deepseek, name) is not None
    assert dir(modeling_deepseek) == sorted(modeling_deepseek.__all__)
    with pytest.raises(AttributeError, match="DeepseekV4Model"):
        modeling_deepseek.DeepseekV4Model  # noqa: B018  # the access is what fails


def auto_state():
    """Everything by which the Auto classes find a class."""
    from transformers.models.auto import configuration_auto, modeling_auto

    state = {}
    for module in (configuration_auto, modeling_auto):
        for name, mapping in vars(module).items():
            if hasattr(mapping, "_modules") and hasattr(mapping, "_extra_content"):
                tables = ("_mapping", "_model_mapping", "_config_mapping", "_modules", "_extra_content")
                state[name] = {table: dict(getattr(mapping, table, {})) for table in tables}
            elif name.endswith("_NAMES"):
                state[name] = dict(mapping)
    return state


def test_unregister_takes_back_everything(checkpoints):
    def types(folder):
        config = AutoConfig.from_pretrained(folder)
        return type(config), type(AutoModel.from_config(config)), type(AutoModelForCausalLM.from_config(config))

    registered = auto_state()
    try:
        unregister_auto_classes()
        for model_type in ("deepseek_v2", "deepseek_v3"):
            assert all(kind.__module__.startswith("transformers.models.") for kind in types(checkpoints[model_type]))
        before = auto_state()
        register_auto_classes()
        register_auto_classes()  # twice is once
        unregister_auto_classes()
        unregister_auto_classes()
        assert auto_state() == before
        assert "'kimi_k2'" not in str(before)
    finally:
        register_auto_classes()
    assert auto_state() == registered != before
    assert {kind.__module__.partition(".")[0] for kind in types(checkpoints["kimi_k2"])} == {"modeling_deepseek"}


def test_other_models_and_transformers_own_classes_are_not_affected(checkpoints):
    llama = transformers.LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    assert type(AutoModelForCausalLM.from_config(llama)) is transformers.LlamaForCausalLM
    input_ids = tokens()
    for model_type, family in (("deepseek_v2", "V2"), ("deepseek_v3", "V3")):
        own_class = getattr(transformers, f"Deepseek{family}ForCausalLM")
        assert own_class.__module__.startswith("transformers.models.")
        assert type(own_class(their_config(family.lower()))) is own_class
        theirs = own_class.from_pretrained(checkpoints[model_type])
        assert type(theirs) is own_class
        assert type(theirs.config).__module__.startswith("transformers.models.")
        ours = AutoModelForCausalLM.from_pretrained(checkpoints[model_type])
        with torch.no_grad():
            torch.testing.assert_close(theirs(input_ids).logits, ours(input_ids).logits, rtol=0, atol=1e-5)


def test_configuration_of_transformers_given_to_our_class_directly():
    """The Auto classes convert it; a constructor says how to."""
    with pytest.raises(ValueError, match=r"transformers.*DeepseekV3Config.*DeepseekV3Config.converted\(config\)"):
        modeling_deepseek.DeepseekV3ForCausalLM(their_config("v3"))


@pytest.fixture(scope="module")
def with_tokenizer(checkpoints):
    """The V3 checkpoint with a tokenizer of the 256 bytes, declared as DeepSeek's are (Llama's class, bytes)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({symbol: index for index, symbol in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    folder = checkpoints["deepseek_v3"]
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=alphabet[0], eos_token=alphabet[1]).save_pretrained(
        folder
    )
    config_file = folder / "tokenizer_config.json"
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps({**config, "tokenizer_class": "LlamaTokenizerFast"}))
    return folder


def test_tokenizer_of_a_checkpoint(with_tokenizer):
    """`AutoTokenizer` looks at the configuration, which is ours. Byte symbols are sorted: "a" is 97 - 33."""
    tokenizer = AutoTokenizer.from_pretrained(with_tokenizer)
    assert tokenizer("abc").input_ids == [64, 65, 66]
    assert tokenizer.decode([64, 65, 66]) == "abc"


def test_pipeline(with_tokenizer):
    generator = pipeline("text-generation", model=str(with_tokenizer))
    assert type(generator.model) is modeling_deepseek.DeepseekV3ForCausalLM
    [answer] = generator("abc", max_new_tokens=4, do_sample=False, return_full_text=False)
    model = AutoModelForCausalLM.from_pretrained(with_tokenizer)
    generated = model.generate(torch.tensor([[64, 65, 66]]), max_new_tokens=4, do_sample=False)
    assert answer["generated_text"] == generator.tokenizer.decode(generated[0, 3:])
    assert len(answer["generated_text"]) == 4
